import json

import pytest
import torch

from spd_lens import SPDConfig, SPDError
from spd_lens.report import facts_page
from spd_lens.tasks import facts, surgery
from spd_lens.tasks.facts import _mean, effect_of, run, setting
from spd_lens.tasks.language import build_model
from spd_lens.tasks.questions import Questions

pytestmark = [pytest.mark.usefixtures("small"), pytest.mark.xdist_group("worlds")]  # one worker trains the small targets

QUICK = SPDConfig.targeted(steps=6, subcomponents=6, batch_size=4, gate_width=4)


@pytest.fixture(scope="module")
def small_texts(small):
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"BACKGROUND": 60, "TEXT": 8, "UNRELATED": 8, "RANDOM_DRAWS": 2}.items():
            patch.setattr(facts, name, value)
        for name, value in {"POOL": 6, "MOST": 3}.items():
            patch.setattr(surgery, name, value)
        yield


@pytest.fixture(scope="module")
def outcome(athlete_model, small_texts):
    return run(athlete_model, QUICK, {"target": 1.0}, progress=False)


def test_what_is_held_out_is_nowhere_else(athlete_model, small_texts):
    s = setting(athlete_model, 0)
    text = athlete_model.tokenizer.batch_decode(torch.cat([s.background, s.text]))
    held_out = {athlete_model.tokenizer.decode(row) for row in s.held_out.tokens}
    known = {athlete_model.tokenizer.decode(row) for row in s.known.tokens}
    assert held_out and not held_out & known and s.held_out.accuracy(athlete_model) == s.known.accuracy(athlete_model) == 1.0
    names = [name for name in facts.all_athletes() if any(name in asked for asked in held_out)]
    assert names and not any(name in " ".join(text) for name in (*names, *facts.CONCEPTS.values()))
    assert [float(asked.probabilities(athlete_model)) > 0.5 for asked in s.asked.values()] == [True, True]
    assert len(setting(athlete_model, 0, whole=True).prompts) > len(s.prompts) == 2
    other = setting(athlete_model, 1)
    assert not torch.equal(other.held_out.tokens[0], s.held_out.tokens[0]) or not torch.equal(other.background[0], s.background[0])


def test_a_model_that_does_not_know_is_refused(athlete_model):
    with pytest.raises(SPDError, match="does not know the two facts"):
        setting(build_model(athlete_model.tokenizer, 5), 0)


def test_effects_are_what_the_hooks_do(athlete_model, small_texts):
    s = setting(athlete_model, 0)
    nothing = effect_of(s, [])
    assert nothing.before == nothing.after and nothing.unrelated.p99 == 0 and nothing.held_out == (1.0, 1.0) and nothing.fall("golf") == 0
    hooks = [("blocks.1.hook_mlp_out", lambda x, hook: 0 * x)]
    changed, asked = effect_of(s, hooks), s.asked["golf"]
    assert changed.after["golf"] == pytest.approx(float(asked.probabilities(athlete_model, hooks)))
    assert changed.crossed["golf"] == pytest.approx(
        float(Questions(asked.tokens, s.asked["basketball"].answers).probabilities(athlete_model, hooks))
    )
    mean = _mean([facts.Cut([], nothing), facts.Cut([], changed)]).effect
    assert mean.after["golf"] == pytest.approx((nothing.after["golf"] + changed.after["golf"]) / 2)
    assert mean.unrelated.mean == pytest.approx(changed.unrelated.mean / 2)


def test_the_baselines_are_the_matrices_themselves(athlete_model, small_texts):
    s = setting(athlete_model, 0)
    for d in (facts.neurons(s), facts.singular_directions(s)):
        for name, site in d.sites.items():
            assert torch.allclose(d.components[name].V @ d.components[name].U, site.weight, atol=1e-5)


def test_the_outcome_says_what_the_contract_promises(outcome, athlete_model):
    results = json.loads(json.dumps(outcome.results()))
    assert {"seconds", "subcomponents", "suppress", "held_out_accuracy", "inverse", "unrelated_kl", "swap", "baselines"} <= results.keys()
    assert results["suppress"]["golf"]["before"].keys() == results["suppress"]["golf"]["after"].keys() == {"golf", "basketball"}
    assert results["held_out_accuracy"].keys() == results["inverse"].keys() == {"before", "after"}
    assert results["swap"].keys() >= {"golfer", "basketball_player"} and results["unrelated_kl"].keys() == {"mean", "p99"}
    golf, s = outcome.cuts["golf"], outcome.setting
    assert results["subcomponents"] == len(golf.chosen)
    after = s.asked["golf"].probabilities(athlete_model, outcome.decomposition.ablate(facts.grouped(golf.chosen)))
    assert results["suppress"]["golf"]["after"]["golf"] == pytest.approx(float(after))
    assert set(facts.goals({"seed 0": outcome.figures()})) >= {"golf: fall", "swap: golfer, exchanged"}
    page = facts_page(outcome)
    for check in ("hard", "alive-only", "adversarial"):
        assert f"KL {check}" in page.replace("KL, ", "KL ")
    assert "https://" not in page.split("<body>")[1].split("<script")[0]
    described = outcome.described["golf"]
    assert len(described) == len(golf.chosen)
