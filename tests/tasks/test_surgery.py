import pytest

from spd_lens import SPDConfig, decompose
from spd_lens.tasks import facts, surgery
from spd_lens.tasks.surgery import _greedy, active_on, candidates, choose_cut, choose_swap, first_by_attribution, grouped

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


def test_a_cut_takes_the_answer_away_and_keeps_to_the_guard(s, singular, monkeypatch):
    asked, guard = s.asked["golf"], s.guard(s.asked["basketball"])
    pool = first_by_attribution(singular, asked, 10)
    monkeypatch.setattr(surgery, "KEPT_MEAN", 1.0)
    monkeypatch.setattr(surgery, "KEPT_TAIL", 9.0)
    monkeypatch.setattr(surgery, "KEPT_PROBABILITY", 0.5)
    monkeypatch.setattr(surgery, "KEPT_ACCURACY", 1.0)
    free = choose_cut(singular, asked, pool, guard)
    assert 0 < len(free) <= surgery.MOST
    assert float(asked.probabilities(s.model, singular.ablate(grouped(free)))) < 0.5 * float(asked.probabilities(s.model))
    monkeypatch.setattr(surgery, "KEPT_MEAN", 0.0)
    assert choose_cut(singular, asked, pool, guard) == []


def test_a_swap_pairs_what_writes_to_the_same_place(s, singular):
    pools = tuple(first_by_attribution(singular, asked, 8) for asked in s.asked.values())
    for a, b in choose_swap(singular, *s.asked.values(), pools, s.guard(s.known[:0])):
        assert a[0] == b[0] or {a[0].rsplit("_")[-1], b[0].rsplit("_")[-1]} <= {"O", "out"}


def test_active_is_what_is_active_anywhere(s):
    d = decompose(s.model, s.prompts, SPDConfig(steps=0, subcomponents=64), progress=False)
    for gate in d.gates.values():
        gate.alive.zero_()
        gate.alive[[1, 3]] = 1.0
    assert active_on(d, s.prompts) == [(name, c) for name in d.sites for c in (1, 3)]
