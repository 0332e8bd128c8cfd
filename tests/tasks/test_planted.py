import json

import pytest
import torch

from spd_lens import SPDConfig, Verification, cli, decompose, find_sites
from spd_lens.decomposition import Observation
from spd_lens.losses import kl_divergence
from spd_lens.tasks import planted
from spd_lens.tasks.planted import CASES, OFFSET, measure, plant


def as_planted(case):
    """The truth as a decomposition."""
    config = SPDConfig(
        sites=tuple(case.truth), steps=0, subcomponents=case.subcomponents, output_positions=case.outputs, importance="vector", gate_width=1
    )
    d = decompose(case.model, case.tokens[:8], config, progress=False)
    with torch.no_grad():
        for name, (V, U) in case.truth.items():
            c, K = d.components[name], len(U)
            c.V.zero_(), c.U.zero_()
            c.V[:, :K], c.U[:K] = V, U
    return d


@pytest.mark.parametrize("name", CASES)
def test_the_pieces_make_the_matrices_and_act_where_it_is_said(name):
    """With the pieces that act, and no others, the model does what it does; so it does with those that may be either."""
    case = plant(name, 1)
    tokens = case.tokens[:64]
    for site, (V, U) in case.truth.items():
        weight = find_sites(case.model, site)[site].weight
        assert torch.allclose(V @ U, weight, atol=1e-4 * float(weight.abs().max()))
    d, active = as_planted(case), case.active(tokens)
    last = slice(None) if case.outputs == "all" else slice(-1, None)
    clean = case.model(tokens, return_type="logits")[:, last]
    sure = {}
    for either in (0.0, 1.0):
        masks = {site: torch.zeros(*tokens.shape, d.components[site].C) for site in active}
        for site, on in active.items():
            masks[site][..., : on.shape[-1]] = on.nan_to_num(either)
        with torch.no_grad():
            sure[either] = float(kl_divergence(clean, d.run(tokens, masks)[:, last]).mean())
    assert sure[1.0] < 1e-5 or case.unknown
    assert sure[0.0] < 1e-5 or name == "or" or case.unknown  # OR needs one of the two, and both are left out
    with torch.no_grad():
        nothing = {site: torch.zeros(()) for site in active}
        assert float(kl_divergence(clean, d.run(tokens, nothing)[:, last]).mean()) > 0.1  # they matter


def test_both_model_classes_are_built_alike(monkeypatch):
    one = {name: plant(name, 0) for name in ("together", "product", "induction")}
    monkeypatch.setattr(planted, "HookedTransformer", None)
    for name, case in one.items():
        bridge = plant(name, 0)
        assert type(bridge.model).__name__ == "TransformerBridge"
        assert torch.equal(bridge.tokens, case.tokens)
        logits = [c.model(c.tokens[:16], return_type="logits") for c in (case, bridge)]
        assert torch.allclose(*logits, atol=1e-4)


def test_a_seed_is_another_model():
    (V, _), (again, _), (other, _) = (plant("oblique", seed).truth[planted.IN] for seed in (0, 0, 1))
    assert torch.equal(V, again) and not torch.allclose(V, other, atol=0.1)


def test_the_truth_scores_full_marks_and_always_on_does_not(monkeypatch):
    case = plant("orthogonal", 0)
    d, tokens = as_planted(case), case.tokens[:32]
    on = case.active(tokens)[planted.IN]
    right = torch.cat([on, torch.zeros(*tokens.shape, case.subcomponents - 8)], -1)

    def say(importances):
        monkeypatch.setattr(type(d), "importances", lambda self, t: {planted.IN: importances[: len(t)]})
        seen = Observation(torch.zeros(*tokens.shape, 1), {}, {planted.IN: importances})
        monkeypatch.setattr(type(d), "look", lambda self, batch: seen)

    say(right)
    monkeypatch.setattr(planted, "verify", lambda d, t: Verification(*[0.0] * 8, l0={planted.IN: 1.0}))
    score = measure(d, case, tokens)
    assert score.recovery is not None and score.recovery.above == 8 and score.recovery.back == pytest.approx(1, abs=1e-5)
    assert (score.precision, score.recall, score.f1) == (1.0, 1.0, 1.0)
    assert (score.true_active, score.distinct, score.true_distinct) == (1.0, 8, 8)
    always = torch.cat([torch.ones_like(on), torch.zeros(*tokens.shape, case.subcomponents - 8)], -1)
    say(always)
    score = measure(d, case, tokens)
    assert score.precision == pytest.approx(1 / 8) and score.recall == 1.0
    say(0 * always)
    score = measure(d, case, tokens)
    assert (score.f1, score.distinct, score.recovery.mean if score.recovery else None) == (0.0, 0, 0.0)


def test_where_the_truth_is_not_identifiable_there_is_no_score():
    results = planted.run("low-rank", 0, "SVD").results()
    assert results["recovered"] is None and results["importance_f1"] is None and results["verification"]["kl_plain"] < 1e-3
    assert "not identifiable" in planted.table({"low-rank": {"seeds": [results], "baselines": {}}}).to_string()


def test_the_recipe_finds_what_the_singular_vectors_do_not():
    """The measurement that the recipe is there for, in its smallest form: 60 steps."""
    scores = {method: planted.run("oblique", 0, method, steps=60) for method in ("pieces", "SVD")}
    found = {method: score.recovery for method, score in scores.items()}
    assert found["pieces"] is not None and found["SVD"] is not None
    assert found["pieces"].above == 8 and found["pieces"].mean > 0.98 and scores["pieces"].verification.kl_hard < 1e-2
    assert found["SVD"].above <= 1


def test_the_command_writes_what_it_promises(tmp_path, capsys):
    cli.main(["planted", "--cases", "oblique", "--steps", "2", "--seeds", "2", "--baselines", "SVD", "--out", str(tmp_path)])
    printed = capsys.readouterr().out
    assert "oblique, pieces" in printed and "oblique, SVD" in printed and "adversarial" in printed
    found = json.loads((tmp_path / "results.json").read_text())["oblique"]
    assert len(found["seeds"]) == 2 and list(found["baselines"]) == ["SVD"]
    names = {"true_active", "active", "true_distinct", "distinct", "recovered", "above_0.9", "importance_f1", "verification", "seconds"}
    assert names <= set(found["seeds"][0]) and found["seeds"][0]["true_distinct"] == 8
    assert "src=" not in (tmp_path / "report.html").read_text().split("<body>")[1]


@pytest.mark.parametrize(
    "arguments, message",
    [(["--cases", "orthogonl"], "nearest: orthogonal"), (["--seeds", "0"], "at least 1"), (["--steps", "-1"], "at least 0")],
)
def test_bad_input_is_found_at_once(arguments, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["planted", "--out", str(tmp_path), *arguments])
    assert stopped.value.code == 2 and message in " ".join(capsys.readouterr().err.split())


def test_linear_neurons_stay_linear():
    case = plant("write-superposition-sets", 0)
    with torch.no_grad():
        x = case.model.W_E[case.tokens]
        assert float((x @ find_sites(case.model, planted.IN)[planted.IN].weight).abs().max()) < OFFSET / 2
