import json

import pytest
import torch

from spd_lens import SPDError, decompose, find_sites
from spd_lens.tasks import induction
from tests import zoo

CLASSES = [False, True] if zoo.HookedTransformer is not None else [True]


def test_data_is_as_the_paper_says():
    data = induction.sequences(500, torch.Generator().manual_seed(0))
    rows = torch.arange(500)
    special = data.tokens == induction.SPECIAL
    assert data.tokens.shape == (500, 64) and (special.sum(1) == 2).all() and special[:, -1].all()
    assert special[rows, data.positions["s1"]].all() and torch.equal(data.positions["m"], data.positions["s1"] + 1)
    assert torch.equal(data.answers, data.tokens[rows, data.positions["m"]])
    for name in ("s1", "m", "s2"):
        assert (data.positions["random"] != data.positions[name]).all()
    assert data.positions["s1"].min() == 0 and data.positions["s1"].max() == 61
    assert torch.equal(data.s_first, data.tokens[:, 0] == induction.SPECIAL)


def test_batches_are_the_same_for_the_same_seed():
    first, second, other = (next(induction.batches(4, seed)) for seed in (1, 1, 2))
    assert torch.equal(first, second) and not torch.equal(first, other)


@pytest.mark.parametrize("bridge", CLASSES)
def test_the_target_is_the_papers_model(bridge):
    model = induction.build_target(0, bridge)
    sites = find_sites(model, induction.SITES)
    assert [s.short for s in sites.values()] == ["Q0", "K0", "V0", "Q1", "K1", "V1"]
    assert all((s.d_in, s.d_out) == (16, 16) for s in sites.values())
    learned = {tuple(p.shape) for p in model.parameters() if p.requires_grad}
    assert (64, 16) in learned  # positions
    tokens = induction.sequences(2, torch.Generator().manual_seed(0)).tokens
    d = decompose(model, tokens, induction.config(steps=0), progress=False)
    inputs = d.trace(tokens).inputs
    difference = {n: (inputs[f"blocks.0.attn.W_{n}"] - inputs["blocks.0.attn.W_V"]) for n in "QK"}
    assert torch.allclose(difference["Q"], difference["K"], atol=1e-6)  # positions enter W_Q and W_K, not W_V
    assert torch.allclose(difference["Q"][0], difference["Q"][1], atol=1e-6) and difference["Q"].abs().max() > 0.1


@pytest.mark.parametrize("bridge", CLASSES)
def test_a_saved_target_is_the_same(bridge, tmp_path):
    model = induction.build_target(3, bridge)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01)
    induction.save_target(model, tmp_path / "t.safetensors", 3)
    tokens = induction.sequences(2, torch.Generator().manual_seed(0)).tokens
    with torch.no_grad():
        assert torch.equal(
            induction.load_target(tmp_path / "t.safetensors")(tokens, return_type="logits"), model(tokens, return_type="logits")
        )
    (tmp_path / "t.safetensors").write_bytes(b"no")
    with pytest.raises(SPDError, match="no whole file"):
        induction.load_target(tmp_path / "t.safetensors")


def test_the_papers_table_adds_up():
    assert sum(row["distinct"] for row in induction.PAPER.values()) == 16


def test_what_is_measured_is_what_is_there():
    """The figures of an untrained decomposition (all importances on) are known in advance."""
    model = induction.build_target(0)
    d = decompose(model, induction.batches(8, 0), induction.config(steps=0, gate_bias=3.0), progress=False)
    outcome = induction.measure(d, 0, {"decomposition": 2.0}, many=64)
    assert outcome.distinct["total"] == outcome.distinct["total_without_s_first"] == 6 * 16
    assert all(value == 16 for means in outcome.mean_active.values() for value in means.values())
    assert outcome.accuracy_hard == outcome.target_accuracy and abs(outcome.verification.kl_hard) < 1e-6
    for value in outcome.diagnosis.attention.values():
        assert value["original"] == pytest.approx(value["hard"], abs=1e-5)
    results = outcome.results()
    assert results["seconds"] == sum(results["seconds_by_part"].values()) > 2.0
    assert set(results) >= {"seconds", "config", "target_accuracy", "distinct", "mean_active", "verification"}
    assert set(results["mean_active"]) == set(induction.PAPER) == set(results["distinct"]) - {"total", "total_without_s_first"}
    assert set(results["mean_active"]["Q0"]) == {"s1", "m", "s2", "random"} and "accuracy_hard" in results["verification"]
    figures = outcome.figures()
    assert (
        figures["distinct"] == 96 and figures["seconds, decomposition"] == 2.0 and figures["accuracy, hard masks"] == outcome.accuracy_hard
    )
    assert figures["K1 active at m"] == 16 and figures["target: attention s2→m"] == outcome.diagnosis.attention["s2→m"]["original"]
    json.loads(json.dumps(results, allow_nan=False))
    assert outcome.interventions_table().loc["everything", "without other active"] == ""  # there is no other one
    assert outcome.beside_paper().loc["V1", "m"] == "16.000 (5.053)"


@pytest.mark.slow
@pytest.mark.parametrize("bridge", CLASSES)
def test_training_gives_a_target_that_knows_the_answer(bridge):
    model = induction.train_target(1, bridge)
    data = induction.sequences(4096, torch.Generator().manual_seed(5))
    with torch.no_grad():
        assert induction.accuracy(model(data.tokens, return_type="logits"), data.answers) >= induction.ENOUGH
        pattern = model.run_with_cache(data.tokens)[1]["blocks.1.attn.hook_pattern"][:, 0]
    rows = torch.arange(4096)
    assert pattern[rows, data.positions["s2"], data.positions["m"]].mean() > 0.9
    assert not any(p.grad is not None for p in model.parameters())
