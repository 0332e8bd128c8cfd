"""How many subcomponents are active, and whether the count can be trusted.

`census` counts; `verify` cuts. A small count alone proves nothing: a decomposition can lean on unimportant subcomponents that
uniform masks leave at half strength on average. Such a one has a fine stochastic KL and falls apart under hard masks. So no
count is shown without `verify` beside it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from numbers import Integral
from typing import Any

import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from spd_lens import masks
from spd_lens.decomposition import Decomposition
from spd_lens.errors import SPDError
from spd_lens.guards import frozen, steady
from spd_lens.losses import kl_divergence, mean_squared_delta
from spd_lens.schema import brief, plain
from spd_lens.suffix import rows_at_once
from spd_lens.tables import Shown, Tabular
from spd_lens.tokens import Batch, TokensLike

ASCENT_STEPS, ASCENT_RATE = 20, 0.1
TOGETHER = 256  # sequences run at once


@dataclass(frozen=True, eq=False, repr=False)
class Census(Tabular):
    """How many subcomponents are active where.

    Attributes:
        mean_active: site → position → mean number active there; `all` is every position.
        alive: site → `[C]`, active at any position of any sequence.
        threshold: active means g above this.
        width: site → the rank that its matrix can have, `min(d_in, d_out)`: what a full basis of it would count.
    """

    mean_active: dict[str, dict[str, float]]
    alive: dict[str, Bool[Tensor, " C"]]
    threshold: float
    width: dict[str, int]

    @property
    def distinct(self) -> dict[str, int]:
        """Site → how many subcomponents are ever active."""
        return {name: int(alive.sum()) for name, alive in self.alive.items()}

    @property
    def total(self) -> int:
        return sum(self.distinct.values())

    @property
    def per_position(self) -> float:
        """Mean number active at a position, all sites together."""
        return sum(means["all"] for means in self.mean_active.values())

    def table(self) -> pd.DataFrame:
        """One row per site: mean active at each position, distinct ever active, the rank that the matrix can have, allocated."""
        rows = {
            name: {**means, "distinct": self.distinct[name], "rank ≤": self.width[name], "allocated": len(self.alive[name])}
            for name, means in self.mean_active.items()
        }
        return pd.DataFrame.from_dict(rows, orient="index").rename_axis("site")

    def _shown(self) -> Shown:
        figures = self.table().map(lambda value: value if isinstance(value, int) else f"{value:.3f}")
        return Shown(f"Active subcomponents (g > {self.threshold}), mean per position", figures,
                     f"{self.per_position:.3g} active per position of {self.total} distinct; a count alone proves nothing: read it with verify(decomposition, tokens).")  # fmt: skip


@steady()
def census(
    decomposition: Decomposition,
    tokens: TokensLike,
    positions: Any = None,
    threshold: float | int = masks.THRESHOLD,
    attention_mask: Any = None,
) -> Census:
    """Count active subcomponents (arXiv 2511.08854, Table 1). Padding is not counted.

    Args:
        tokens, attention_mask: `[b, s]`, as `spd_lens.tokens.take_in` takes them.
        positions: label → one position in each sequence: a whole number, which is meant in every sequence, or `[b]` of them. Negative ones
            count from the end of each sequence, padding left out.
        threshold: a subcomponent is active where its importance is above this.
    """
    if not 0 <= threshold < 1:
        raise SPDError(f"threshold was given as {threshold!r}; importances lie in 0 … 1, so it has to be at least 0 and below 1.")
    if not isinstance(positions, Mapping | None):
        raise SPDError(f"positions were given as {brief(positions)}; give a mapping from a label to positions, e.g. {{'last': -1}}.")
    tokens = decomposition.batch(tokens, attention_mask)
    positions = {label: position_of_each(label, index, tokens) for label, index in (positions or {}).items()}
    number: dict[str, list[Tensor]] = {name: [] for name in decomposition.sites}
    alive = {name: torch.zeros(c.C, dtype=torch.bool, device=c.V.device) for name, c in decomposition.components.items()}
    for batch in tokens.split(rows_at_once(decomposition.model, tokens.shape[1], TOGETHER)):
        for name, g in decomposition.look(batch).importances.items():
            number[name].append(batch.blanked((g > threshold).sum(-1).float()))
            alive[name] |= batch.rows(g > threshold).any(0)
    rows, mean_active = torch.arange(len(tokens), device=tokens.device), {}
    for name, parts in number.items():
        active = torch.cat(parts)
        means = {label: float(active[rows, index].mean()) for label, index in positions.items()}
        mean_active[name] = {**means, "all": float(active.sum() / tokens.numel)}
    return Census(mean_active, alive, threshold, {name: min(site.d_in, site.d_out) for name, site in decomposition.sites.items()})


def position_of_each(label: str, given: Any, batch: Batch) -> Int[Tensor, " b"]:
    """One position, from 0, in each sequence: from a whole number for all of them, or from one for each; negative ones from its end."""
    given = plain(given)
    b, s = batch.shape
    index = given if isinstance(given, (list, tuple)) else [given] * b
    if len(index) != b or not all(type(n) is int and -s <= n < s for n in index):
        raise SPDError(f"positions[{label!r}] was given as {brief(given)}; give one position 0 … {s - 1} (negative: from the end) for all sequences, or "
                       f"one for each of the {b} sequences.")  # fmt: skip
    wanted = torch.tensor(index, device=batch.device)
    here = torch.where(wanted < 0, batch.last + 1 + wanted, batch.position(wanted))
    if len(padded := torch.nonzero((here < 0) | (here > batch.last)).flatten()):
        n = int(padded[0])
        raise SPDError(f"positions[{label!r}] of sequence {n} is {index[n]}, which is padding; give a position of one of its tokens.")
    return here


@dataclass(frozen=True, eq=False, repr=False)
class Verification(Tabular):
    """Whether a decomposition stands for its model. KL(original ‖ masked) in nats, without delta, mean over compared positions.

    Attributes:
        faithfulness: mean over all decomposed weight entries of `(W - V·U)²`.
        kl_plain: every mask 1.
        kl_stochastic: uniform masks `m = g + (1-g)·r`, all sites.
        kl_layerwise: the same, one site at a time, the mean over sites.
        kl_importance: mask = g.
        kl_hard: active ones (g > 0.5) 1, others 0, position by position.
        kl_alive_only: ever-active ones 1 everywhere, others 0.
        kl_adversarial: active ones 1; each other one gets the worst value in [0, 1] found for all sequences and positions
            (20 steps of sign ascent of 0.1 from a uniform start; the worst met counts).
        l0: site → mean number of active subcomponents per position.
        distinct: site → how many are ever active.
        width: site → the rank that its matrix can have.
    """

    faithfulness: float
    kl_plain: float
    kl_stochastic: float
    kl_layerwise: float
    kl_importance: float
    kl_hard: float
    kl_alive_only: float
    kl_adversarial: float
    l0: dict[str, float]
    distinct: dict[str, int] = field(default_factory=dict)
    width: dict[str, int] = field(default_factory=dict)

    def table(self) -> pd.DataFrame:
        """The figures with what each one checks."""
        return pd.DataFrame([{"check": label, "value": getattr(self, name)} for name, label in LABELS.items()]).set_index("check")

    @property
    def leans_on_inactive(self) -> bool:
        """The cheat: fine under stochastic masks, broken once the inactive subcomponents are cut."""
        return self.kl_hard > max(0.1, 10 * self.kl_stochastic)

    @property
    def beside_a_count(self) -> str:
        """What has to stand next to every count, in one line."""
        return f"KL hard {self.kl_hard:.1e}, alive-only {self.kl_alive_only:.1e}, adversarial {self.kl_adversarial:.1e} nats"

    def as_dict(self) -> dict[str, Any]:
        return {f.name: getattr(self, f.name) for f in fields(self)}

    def _shown(self) -> Shown:
        active = f"{sum(self.l0.values()):.3g} active per position"
        active += f" of {sum(self.distinct.values())} distinct; ranks up to {sum(self.width.values())} in all. " if self.distinct else ". "
        return Shown("Does it stand for its model? KL(original ‖ masked) in nats, without delta", self.table().map("{:.1e}".format),
                     active + (CHEAT if self.leans_on_inactive else ""))  # fmt: skip


LABELS = {
    "faithfulness": "faithfulness: mean (W - V·U)²",
    "kl_plain": "KL, every mask 1",
    "kl_stochastic": "KL, stochastic masks",
    "kl_layerwise": "KL, stochastic, one site at a time",
    "kl_importance": "KL, mask = importance",
    "kl_hard": "KL, hard: only active ones kept",
    "kl_alive_only": "KL, alive-only: ever-active ones everywhere",
    "kl_adversarial": "KL, adversarial: worst value per inactive one",
}
CHEAT = ("The count is not to be trusted: stochastic masks are survived and hard ones are not, so the outputs lean on subcomponents that "
         "count as inactive. Train longer with masks='mixed', or with smaller weights on price and minimality.")  # fmt: skip


@steady(gradients=True)
def verify(
    decomposition: Decomposition, tokens: TokensLike, seed: int = 0, batch_size: Any = None, attention_mask: Any = None
) -> Verification:
    """Cut a decomposition in every way that its count of active subcomponents promises to survive.

    Args:
        tokens, attention_mask: `[b, s]`, as `spd_lens.tokens.take_in` takes them; outputs are compared at the positions that the decomposition was
            trained on, padding left out.
        seed: of the stochastic masks and the adversary's start.
        batch_size: sequences run at once (None: what memory is likely to hold); the figures are those of all of them together.
    """
    if batch_size is not None and (not isinstance(batch_size, Integral) or batch_size < 1):
        raise SPDError(f"batch_size was given as {brief(batch_size)}; it is a number of sequences, at least 1, or None.")
    tokens, positions = decomposition.batch(tokens, attention_mask), decomposition.config.output_positions
    batches = tokens.split(batch_size or rows_at_once(decomposition.model, tokens.shape[1], TOGETHER))
    draw = masks.Draw(torch.Generator(tokens.device).manual_seed(seed), kind="uniform")
    observations = [_Seen.of(decomposition, batch) for batch in batches]
    names = list(decomposition.sites)

    def active(o: _Seen) -> dict[str, Tensor]:
        return {name: g > masks.THRESHOLD for name, g in o.importances.items()}

    alive = {name: torch.stack([active(o)[name].any(0).any(0) for o in observations]).any(0).to(tokens.device) for name in names}
    samplers: dict[str, Any] = {
        "kl_plain": masks.ones, "kl_stochastic": masks.uniform, "kl_importance": masks.soft, "kl_hard": masks.hard,
        "kl_alive_only": lambda g, _: {name: alive[name].to(g[name].dtype).expand_as(g[name]) for name in g},
    }  # fmt: skip
    sums = dict.fromkeys([*samplers, "kl_layerwise"], 0.0)
    with torch.no_grad():
        for batch, o in zip(batches, observations):
            share = batch.outputs(positions) / tokens.outputs(positions)
            for name, sampler in samplers.items():
                sums[name] += share * float(_divergence(decomposition, batch, o.logits, sampler(o.importances, draw)))
            for name, mask in masks.uniform(o.importances, draw).items():
                sums["kl_layerwise"] += share * float(_divergence(decomposition, batch, o.logits, {name: mask})) / len(names)
        faithfulness = float(mean_squared_delta(decomposition.sites, decomposition.components))
    with frozen(decomposition.model):
        worst = _adversarial(decomposition, batches, observations, draw)
    numbers = {name: sum(float(active(o)[name].sum()) for o in observations) / tokens.numel for name in names}
    return Verification(
        faithfulness, **sums, kl_adversarial=worst, l0=numbers, distinct={name: int(on.sum()) for name, on in alive.items()},
        width={name: min(site.d_in, site.d_out) for name, site in decomposition.sites.items()},
    )  # fmt: skip


@dataclass(frozen=True, eq=False)
class _Seen:
    """What is kept of every batch until the end: the compared logits and the importances."""

    logits: Float[Tensor, "b n vocabulary"]
    importances: dict[str, Float[Tensor, "b s C"]]

    @classmethod
    def of(cls, decomposition: Decomposition, batch: Batch) -> "_Seen":
        seen = decomposition.look(batch)
        return cls(batch.compared(seen.logits, decomposition.config.output_positions).clone(), seen.importances)


def _divergence(decomposition: Decomposition, batch: Batch, original: Tensor, mask: Mapping[str, Tensor]) -> Float[Tensor, ""]:
    """KL(original ‖ masked), mean over the compared outputs of one batch."""
    positions = decomposition.config.output_positions
    return batch.mean(kl_divergence(original, batch.compared(decomposition.masked(batch, mask), positions)), positions)


def _adversarial(decomposition: Decomposition, batches: Sequence[Batch], observations: list[_Seen], draw: masks.Draw) -> float:
    """The worst KL that one value per inactive subcomponent, shared by all sequences and positions, can do."""
    positions = decomposition.config.output_positions
    many = sum(batch.outputs(positions) for batch in batches)
    sources = {name: draw.uniform(c.C, like=c.V) for name, c in decomposition.components.items()}
    worst = 0.0
    for _ in range(ASCENT_STEPS + 1):  # the last value is looked at too
        sources = {name: r.detach().requires_grad_() for name, r in sources.items()}
        gradients = {name: torch.zeros_like(r) for name, r in sources.items()}
        total = 0.0
        for batch, o in zip(batches, observations):
            mask = {name: masks.between(m, sources[name]) for name, m in masks.hard(o.importances).items()}
            with torch.enable_grad():
                loss = _divergence(decomposition, batch, o.logits, mask) * batch.outputs(positions) / many
            for name, gradient in zip(sources, torch.autograd.grad(loss, list(sources.values()))):
                gradients[name] += gradient
            total += float(loss.detach())
        worst = max(worst, total)
        sources = masks.ascend(sources, gradients, ASCENT_RATE)
    return worst
