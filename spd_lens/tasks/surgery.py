"""Which subcomponents to cut, or to rewire, for one answer. Shared by the tasks `facts` and `entangled`.

1. `candidates`: the subcomponents that are active on a question, by what cutting each one alone does to its answer.
2. `choose_cut`: the fewest of them whose joint cut takes the answer away, one after the other; `choose_swap` the same with pairs that
   exchange their outputs, calibrated on the two questions. A choice sees these, and what it may change little (`Limits`): other questions
   and text. Everything else is measured afterwards.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from spd_lens.decomposition import Decomposition
from spd_lens.interventions import One, calibrated, peaks
from spd_lens.masks import THRESHOLD
from spd_lens.patching import attribution
from spd_lens.sites import Hook
from spd_lens.tasks.questions import Questions, drift

Pair = tuple[One, One]

MOST = 10  # subcomponents of a cut, pairs of a swap
ENOUGH = 0.95  # of the probability is to be taken away
SWAPPED, CROSSED = 0.9, 0.5  # probability of an exchanged answer that a swap need not exceed, and has to reach
POOL = 60  # candidates that are tried together with others


@dataclass(frozen=True)
class Limits:
    """What a choice may cost.

    Attributes:
        probability: change in the probability of each answer that is to stay.
        known: fall in the mean probability of the other questions' answers; of their accuracy nothing may be lost, unless `accuracy` says so.
        mean, tail: KL on the text, and its 99th percentile.
    """

    probability: float = 0.01
    known: float = 1.0
    accuracy: float = 0.0
    mean: float = 2e-3
    tail: float = 0.03


CUT = Limits()
SWAP = tuple(Limits(known=known, mean=5e-3, tail=0.06) for known in (0.005, 0.01, 0.02))  # the first that suffices


@dataclass(frozen=True, eq=False)
class Guard:
    """What a choice must not change: the probability of some answers, the answers to other questions, and text."""

    model: Any
    same: Questions
    right: Questions
    text: Int[Tensor, "N s"]
    before: Float[Tensor, " K"]
    known: float
    accuracy: float
    original: Float[Tensor, "N s v"]

    @classmethod
    @torch.no_grad()
    def of(cls, model: Any, same: Questions, right: Questions, text: Int[Tensor, "N s"]) -> "Guard":
        known, accuracy = right.scored(model)
        return cls(model, same, right, text, same.probabilities(model), known, accuracy, model(text))

    def allows(self, hooks: Sequence[Hook], limits: Limits) -> bool:
        change = self.same.probabilities(self.model, hooks) - self.before
        if len(change) and float(change.abs().max()) > limits.probability:
            return False
        if len(self.right):
            known, accuracy = self.right.scored(self.model, hooks)
            if accuracy < self.accuracy - limits.accuracy or known < self.known - limits.known:
                return False
        moved = drift(self.model, self.text, hooks, self.original)
        return moved.mean <= limits.mean and moved.p99 <= limits.tail


@torch.no_grad()
def active_on(d: Decomposition, tokens: Int[Tensor, "N s"]) -> list[One]:
    """Subcomponents that are active at any position."""
    found = {name: torch.nonzero((g > THRESHOLD).any(0).any(0)).flatten().tolist() for name, g in d.importances(tokens).items()}
    return [(name, c) for name, indices in found.items() for c in indices]


def grouped(chosen: Iterable[One]) -> dict[str, list[int]]:
    by_site: dict[str, list[int]] = {}
    for name, c in chosen:
        by_site.setdefault(name, []).append(c)
    return by_site


def candidates(d: Decomposition, question: Questions, pool: Sequence[One], most: int | None = None) -> list[One]:
    """Those whose cut alone lowers the log-probability of the answer most, each measured by cutting it."""
    effect = {one: float(question.probabilities(d.model, d.ablate(grouped([one]))).log().mean()) for one in pool}
    return sorted(pool, key=lambda one: effect[one])[: most or POOL]


def first_by_attribution(d: Decomposition, question: Questions, most: int | None = None) -> list[One]:
    """Those that one backward pass says the answer's log-probability would lose most without."""

    def answer(logits: Tensor) -> Tensor:
        return logits[:, -1].log_softmax(-1).gather(1, question.answers[:, None]).mean()

    table = attribution(d, question.tokens, answer).sort_values("effect")
    return list(zip(table["site"], table["subcomponent"]))[: most or POOL]


def choose_cut(d: Decomposition, question: Questions, pool: Sequence[One], guard: Guard, limits: Limits = CUT) -> list[One]:
    """The fewest subcomponents, at most `MOST`, whose cut takes `ENOUGH` of the answer's probability away and that the guard allows."""
    before = float(question.probabilities(d.model).mean())

    def left(chosen: Sequence[One]) -> float:
        return float(question.probabilities(d.model, d.ablate(grouped(chosen))).mean())

    def allowed(chosen: Sequence[One]) -> bool:
        return guard.allows(d.ablate(grouped(chosen)), limits)

    return _greedy(candidates(d, question, pool), left, allowed, (1 - ENOUGH) * before)


def choose_swap(
    d: Decomposition,
    first: Questions,
    second: Questions,
    pools: tuple[Sequence[One], Sequence[One]],
    guard: Guard,
    limits: Sequence[Limits] = SWAP,
) -> list[Pair]:
    """The fewest pairs, at most `MOST`, whose exchange of outputs, calibrated on the two questions, makes each one's answer the other's.

    A pool holds what is active on its question. Of several limits the first counts within which both answers reach a probability of `CROSSED`; if none does, the one that comes nearest.
    """
    mine, theirs = (candidates(d, question, pool, POOL // 2) for question, pool in zip((first, second), pools))
    writes = {name: "the residual stream" if site.kind in ("W_O", "W_out") else name for name, site in d.sites.items()}
    crossed = Questions(torch.cat([first.tokens, second.tokens]), torch.cat([second.answers, first.answers]))
    at = peaks(d, crossed.tokens)
    mine, theirs = ([(name, c) for name, c in some if at[name][c]] for some in (mine, theirs))
    pairs = [(a, b) for a in mine for b in theirs if a != b and writes[a[0]] == writes[b[0]]]

    def exchanged(chosen: Sequence[Pair]) -> list[Hook]:
        return d.rewire(set_output=calibrated(d, chosen, at))

    def missing(chosen: Sequence[Pair]) -> float:
        p = crossed.probabilities(d.model, exchanged(chosen))
        return -float(p.clamp_min(1e-30).log().clamp_max(math.log(SWAPPED)).sum())

    def allowed(limit: Limits) -> Callable[[Sequence[Pair]], bool]:
        return lambda chosen: guard.allows(exchanged(chosen), limit)

    found: list[list[Pair]] = []
    for limit in limits:
        found.append(_greedy(pairs, missing, allowed(limit), -len(crossed) * math.log(SWAPPED)))
        if float(crossed.probabilities(d.model, exchanged(found[-1])).min()) >= CROSSED:
            return found[-1]
    return min(found, key=missing)


def _greedy(pool: Sequence[Any], loss: Callable[[list[Any]], float], allowed: Callable[[list[Any]], bool], goal: float) -> list[Any]:
    """One more at a time, each the best that is allowed, until the goal is reached or nothing helps; then those that are not needed go."""
    chosen: list[Any] = []
    reached = loss(chosen)
    while reached > goal + 1e-9 and len(chosen) < MOST:
        used = {one for pair in chosen for one in (pair if isinstance(pair[0], tuple) else [pair])}
        free = [one for one in pool if not used & set(one if isinstance(one[0], tuple) else [one])]
        trials = sorted(((loss([*chosen, one]), index) for index, one in enumerate(free)))
        better = next((free[index] for value, index in trials if value < reached - 1e-6 and allowed([*chosen, free[index]])), None)
        if better is None:
            break
        chosen.append(better)
        reached = loss(chosen)
    for one in list(chosen):
        rest = [other for other in chosen if other != one]
        if rest and loss(rest) <= max(goal, reached) + 1e-9 and allowed(rest):
            chosen = rest
    return chosen
