import warnings
from dataclasses import replace

import pytest
import torch

from spd_lens import SPDConfig, census, decompose, verify
from spd_lens.advice import advise, while_training
from spd_lens.tasks.planted import configs, plant
from tests import zoo


@pytest.fixture(scope="module")
def seen(untrained):
    tokens = zoo.tokens()
    return untrained, tokens, census(untrained, tokens), verify(untrained, tokens)


def kinds(found):
    return [advice.kind for advice in found]


def test_nothing_is_amiss_where_nothing_is(seen):
    """All of 40 subcomponents are on, of matrices of rank 32: no mechanism has to share."""
    d, tokens, counted, checked = seen
    assert advise(d, tokens) == advise(d, tokens, counted, checked) == []


def test_the_cheat_is_named(seen):
    d, tokens, counted, checked = seen
    (one,) = advise(d, tokens, counted, replace(checked, kl_stochastic=1e-4, kl_hard=0.5))
    assert one.kind == "cheat" and "masks='mixed'" in one.mend and "5.0e-01" in one.seen
    (one,) = advise(d, tokens, counted, replace(checked, kl_stochastic=0.4, kl_hard=0.5))
    assert one.kind == "broken" and "steps=" in one.mend


def test_too_few_too_many_and_none(seen):
    d, tokens, counted, checked = seen
    nobody = replace(counted, alive={name: torch.zeros_like(on) for name, on in counted.alive.items()})
    assert kinds(advise(d, tokens, nobody, checked)) == ["nothing active"]
    one = {name: torch.arange(40) < (12 if name.endswith("0.attn.W_Q") else 0) for name in counted.alive}
    assert "lopsided" in kinds(advise(d, tokens, replace(counted, alive=one), checked))
    few = {name: torch.arange(40) < (1 if i < 3 else 0) for i, name in enumerate(counted.alive)}
    assert kinds(advise(d, tokens, replace(counted, alive=few), checked)) == ["dead"]


def test_a_matrix_all_of_whose_subcomponents_are_on_needs_more(model, tokens):
    with pytest.warns(UserWarning, match="rank"):
        d = decompose(model, tokens, SPDConfig(steps=0, subcomponents=6), progress=False)
    found = {advice.kind: str(advice) for advice in advise(d, tokens)}
    assert "C is too small" in found["crowded"] and "subcomponents={" in found["crowded"]
    assert "V·U misses" in found["faithfulness"]


def test_it_is_taught_once_and_at_the_end(model, tokens, monkeypatch):
    monkeypatch.setattr("spd_lens.training.SETTLED", 4)
    config = SPDConfig(sites="blocks.0.attn.W_[QK]", steps=8, subcomponents=2, batch_size=3, gate_width=4)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        decompose(model, tokens, config, progress=False)
    taught = [str(w.message) for w in caught if "steps: V·U misses" in str(w.message)]
    assert len(taught) == 1 and taught[0].startswith("after 8 of 8 steps")


def test_short_trials_are_not_lectured(untrained):
    assert while_training(untrained, dict.fromkeys(untrained.sites, 0.0)) == []  # no step was done


def test_a_basis_that_is_always_on_is_named_and_pieces_are_not():
    """8 planted pieces, one to three a token: the defaults give singular vectors that are on everywhere, and every KL is fine."""
    case = plant("together", 0)
    d = decompose(case.model, case.tokens, configs(case, 0, {"steps": 40})["defaults"], progress=False)
    tokens = case.tokens[:32]
    counted, checked = census(d, tokens), verify(d, tokens)
    (said,) = [advice for advice in advise(d, tokens, counted, checked) if advice.kind == "basis"]
    assert (
        checked.kl_hard < 1e-2
        and "singular basis" in said.seen
        and f"of {counted.total} in blocks.0.mlp.W_in" in said.seen
        and "SPDConfig.pieces()" in said.mend
    )
    sparse = replace(counted, mean_active={"blocks.0.mlp.W_in": {"all": 1.0}})
    assert "basis" not in kinds(advise(d, tokens, sparse, checked))
    d.steps_done = 0  # all importances begin on
    assert "basis" not in kinds(advise(d, tokens, counted, checked))


def test_what_the_inactive_ones_can_do_is_not_passed_over(seen):
    d, tokens, counted, checked = seen
    found = {one.kind: str(one) for one in advise(d, tokens, counted, replace(checked, kl_alive_only=0.43, kl_adversarial=0.81))}
    assert list(found) == ["alive-only", "adversarial"] and "0.43 nats" in found["alive-only"] and "0.81 nats" in found["adversarial"]
    assert kinds(advise(d, tokens, counted, replace(checked, kl_alive_only=0.05, kl_adversarial=0.2))) == []
