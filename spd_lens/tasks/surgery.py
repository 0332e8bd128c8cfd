"""Which subcomponents to cut, or to rewire, for one answer. Shared by the tasks `facts` and `entangled`.

1. `candidates`: the subcomponents that are active on a question, by what cutting each one alone does to its answer.
2. `choose_cut`: the fewest of them whose joint cut takes the answer away, one after the other; `choose_swap` the same with pairs that
   exchange their outputs. A choice sees the two questions, and text on which it may change little; everything else is measured afterwards.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from spd_lens.decomposition import Decomposition
from spd_lens.masks import THRESHOLD
from spd_lens.patching import attribution
from spd_lens.sites import Hook
from spd_lens.tasks.questions import Questions, drift

One = tuple[str, int]  # a subcomponent: its site and its index
Pair = tuple[One, One]

MOST = 10  # subcomponents of a cut, pairs of a swap
ENOUGH = 0.95  # of the probability is to be taken away
SWAPPED = 0.9  # probability of the exchanged answer that a swap need not exceed
POOL = 60  # candidates that are tried together with others
KEPT_PROBABILITY = 0.01  # change of the other answer that a choice may cost
KEPT_ACCURACY = 0.0  # of the other questions: none may be lost
KEPT_MEAN, KEPT_TAIL = 2e-3, 0.03  # KL on the text, mean and 99th percentile, that a choice may cost


@dataclass(frozen=True, eq=False)
class Guard:
    """What a choice must not change: the probability of some answers, how many others are right, and text."""

    model: Any
    same: Questions
    right: Questions
    text: Int[Tensor, "N s"]
    before: Float[Tensor, " K"]
    accuracy: float
    original: Float[Tensor, "N s v"]

    @classmethod
    @torch.no_grad()
    def of(cls, model: Any, same: Questions, right: Questions, text: Int[Tensor, "N s"]) -> "Guard":
        return cls(model, same, right, text, same.probabilities(model), right.accuracy(model), model(text))

    def allows(self, hooks: Sequence[Hook]) -> bool:
        change = self.same.probabilities(self.model, hooks) - self.before
        if len(change) and float(change.abs().max()) > KEPT_PROBABILITY:
            return False
        if len(self.right) and self.right.accuracy(self.model, hooks) < self.accuracy - KEPT_ACCURACY:
            return False
        moved = drift(self.model, self.text, hooks, self.original)
        return moved.mean <= KEPT_MEAN and moved.p99 <= KEPT_TAIL


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


def choose_cut(d: Decomposition, question: Questions, pool: Sequence[One], guard: Guard) -> list[One]:
    """The fewest subcomponents, at most `MOST`, whose cut takes `ENOUGH` of the answer's probability away and that the guard allows."""
    before = float(question.probabilities(d.model).mean())

    def left(chosen: Sequence[One]) -> float:
        return float(question.probabilities(d.model, d.ablate(grouped(chosen))).mean())

    return _greedy(candidates(d, question, pool), left, lambda chosen: guard.allows(d.ablate(grouped(chosen))), (1 - ENOUGH) * before)


def choose_swap(
    d: Decomposition, first: Questions, second: Questions, pools: tuple[Sequence[One], Sequence[One]], guard: Guard
) -> list[Pair]:
    """The fewest pairs, at most `MOST`, whose exchange of outputs makes each question's answer the other's."""
    mine, theirs = (candidates(d, question, pool, POOL // 2) for question, pool in zip((first, second), pools))
    writes = {name: "the residual stream" if site.kind in ("W_O", "W_out") else name for name, site in d.sites.items()}
    pairs = [(a, b) for a in mine for b in theirs if a != b and writes[a[0]] == writes[b[0]]]
    crossed = Questions(torch.cat([first.tokens, second.tokens]), torch.cat([second.answers, first.answers]))

    def missing(chosen: Sequence[Pair]) -> float:
        return -float(
            crossed.probabilities(d.model, d.rewire(swap_outputs=list(chosen))).clamp_min(1e-30).log().clamp_max(math.log(SWAPPED)).sum()
        )

    return _greedy(pairs, missing, lambda chosen: guard.allows(d.rewire(swap_outputs=list(chosen))), -len(crossed) * math.log(SWAPPED))


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
        if rest and loss(rest) <= max(goal, reached) + 1e-9:
            chosen = rest
    return chosen
