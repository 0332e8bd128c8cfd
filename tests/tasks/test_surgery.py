from dataclasses import replace

import pytest

from spd_lens import SPDConfig, decompose
from spd_lens.tasks import facts, surgery
from spd_lens.tasks.surgery import (
    MOST,
    Guard,
    Limits,
    _greedy,
    active_on,
    candidates,
    choose_cut,
    choose_swap,
    first_by_attribution,
    grouped,
)

pytestmark = [pytest.mark.usefixtures("small"), pytest.mark.xdist_group("worlds")]  # one worker trains the small targets


@pytest.fixture(scope="module")
def s(athlete_model, small):
    return facts.setting(athlete_model, 0)


@pytest.fixture(scope="module")
def singular(s):
    return facts.singular_directions(s)


def test_the_greedy_choice_takes_the_fewest_that_are_allowed():
    worth = {("a", 0): 5.0, ("a", 1): 4.0, ("b", 0): 3.0, ("b", 1): 0.0}

    def choose(allowed=lambda chosen: True, goal=2.0):
        return _greedy(list(worth), lambda chosen: 10 - sum(worth[one] for one in chosen), allowed, goal)

    assert choose() == [("a", 0), ("a", 1)]
    assert choose(lambda chosen: ("a", 0) not in chosen, 3.0) == [("a", 1), ("b", 0)]
    assert choose(lambda chosen: chosen != [("a", 1)], 7.0) == [("a", 0)]
    only_together = {("a", 0): 1.0, ("a", 1): 9.0}
    assert _greedy(list(only_together), lambda chosen: 10 - sum(only_together[one] for one in chosen), lambda c: ("a", 0) in c, 1.0) == [
        ("a", 0), ("a", 1)]  # fmt: skip
    assert choose(lambda chosen: False) == [] and choose(goal=-5.0) == [("a", 0), ("a", 1), ("b", 0)]


def test_a_pair_uses_no_subcomponent_twice():
    pairs = [((("a", 0), ("b", 0))), ((("a", 0), ("b", 1))), ((("a", 1), ("b", 1)))]
    chosen = _greedy(pairs, lambda chosen: -len(chosen) - ((("a", 0), ("b", 1)) in chosen), lambda chosen: True, -9.0)
    assert chosen == [(("a", 0), ("b", 1))]


def test_candidates_are_ranked_by_cutting_them(s, singular):
    asked = s.asked["golf"]
    pool = first_by_attribution(singular, asked, 12)
    ranked = candidates(singular, asked, pool)
    left = [float(asked.probabilities(s.model, singular.ablate(grouped([one])))) for one in ranked]
    assert sorted(ranked) == sorted(pool) and left == sorted(left) and left[0] < float(asked.probabilities(s.model))


def test_a_cut_takes_the_answer_away_and_keeps_to_the_guard(s, singular):
    asked, guard = s.asked["golf"], s.guard(s.asked["basketball"])
    pool = first_by_attribution(singular, asked, 10)
    loose = Limits(probability=0.5, accuracy=1.0, mean=1.0, tail=9.0)
    free = choose_cut(singular, asked, pool, guard, loose)
    assert 0 < len(free) <= MOST
    assert float(asked.probabilities(s.model, singular.ablate(grouped(free)))) < 0.5 * float(asked.probabilities(s.model))
    hooks = singular.ablate(grouped(free))
    for tight in (dict(probability=-1.0), dict(known=-1.0), dict(accuracy=-1.0), dict(mean=0.0), dict(tail=0.0)):
        assert guard.allows(hooks, loose) and not guard.allows(hooks, replace(loose, **tight)), tight
    assert choose_cut(singular, asked, pool, guard, replace(loose, mean=0.0)) == []


@pytest.fixture(scope="module")
def untrained(s):
    """Everything active, and enough of it to hold each matrix."""
    return decompose(s.model, s.prompts, SPDConfig(steps=0, subcomponents=64), progress=False)


def test_a_swap_pairs_what_writes_to_the_same_place(s, untrained):
    pools = tuple(first_by_attribution(untrained, asked, 8) for asked in s.asked.values())
    free = Limits(probability=1.0, accuracy=1.0, mean=99.0, tail=99.0)
    pairs = choose_swap(untrained, *s.asked.values(), pools, s.guard(s.known[:0]), [free])
    assert pairs
    for a, b in pairs:
        assert a[0] == b[0] or {a[0].rsplit("_")[-1], b[0].rsplit("_")[-1]} <= {"O", "out"}


def test_a_swap_takes_the_first_limits_that_suffice(s, untrained, monkeypatch):
    pools = tuple(first_by_attribution(untrained, asked, 8) for asked in s.asked.values())
    tried, guard = [], s.guard(s.known[:0])
    limits = [Limits(known=known, accuracy=1.0, mean=99.0, tail=99.0) for known in (0.0, 0.5, 1.0)]
    monkeypatch.setattr(Guard, "allows", lambda self, hooks, limit: tried.append(limit) or True)
    monkeypatch.setattr(surgery, "CROSSED", 0.0)
    choose_swap(untrained, *s.asked.values(), pools, guard, limits)
    assert {limit.known for limit in tried} == {0.0}
    monkeypatch.setattr(surgery, "CROSSED", 2.0)  # out of reach
    choose_swap(untrained, *s.asked.values(), pools, guard, limits)
    assert {limit.known for limit in tried} == {0.0, 0.5, 1.0}


def test_active_is_what_is_active_anywhere(s):
    d = decompose(s.model, s.prompts, SPDConfig(steps=0, subcomponents=64), progress=False)
    for gate in d.gates.values():
        gate.alive.zero_()
        gate.alive[[1, 3]] = 1.0
    assert active_on(d, s.prompts) == [(name, c) for name in d.sites for c in (1, 3)]
