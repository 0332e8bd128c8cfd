"""What a subcomponent reads, writes and reacts to.

1. *Reads and writes in the model's own terms*: a matrix that reads the residual stream reads tokens, `W_E·v` (before the layer's norm); one
   that writes to it writes logits, `u·W_U` (before the last norm). Between W_in and W_out there are neurons, between Q, K, V and W_O heads.
2. *Partners*: subcomponents whose output this one reads, or that read its output, by the cosine of one's u and the other's v in the space
   that both share; of Q and K that of their two u in their best head. A cosine is a lead, not a proof: `circuit_graph` measures.
3. *Contexts*: the positions of the given tokens where it is active and its inner activation `v·x` is largest, with what stands around.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from spd_lens.decomposition import Decomposition
from spd_lens.guards import steady
from spd_lens.interventions import One, choice
from spd_lens.labels import token_labels
from spd_lens.masks import THRESHOLD
from spd_lens.sites import Site
from spd_lens.suffix import rows_at_once
from spd_lens.tokens import Batch

RESIDUAL, HEADS, NEURONS = "residual stream", "heads", "neurons"
READS = {"W_O": HEADS, "W_out": NEURONS}  # every other kind reads the residual stream
WRITES = {"W_Q": HEADS, "W_K": HEADS, "W_V": HEADS, "W_in": NEURONS, "W_gate": NEURONS}
BINS = 20
ROWS = 64  # sequences looked at together
SPARE = 16
AROUND = 8  # tokens shown on each side


@dataclass(frozen=True)
class Context:
    """A place where a subcomponent is active.

    Attributes:
        sequence, position: where in the tokens given.
        labels: readable tokens around, the place itself at `at`.
        inner: `v·x` at each of them.
        importances: g at each of them.
    """

    sequence: int
    position: int
    at: int
    labels: tuple[str, ...]
    inner: tuple[float, ...]
    importances: tuple[float, ...]


@dataclass(frozen=True)
class Card:
    """One subcomponent.

    Attributes:
        site, index: its name.
        short: `Q0 · 3`.
        share_active: of all positions.
        mean_importance: over all positions.
        histogram: how many positions have an importance in each of 20 equal bins of [0, 1].
        reads, writes: (label, value), largest |value| first: tokens, heads (share of the squared norm) or neurons.
        reads_in, writes_in: the space: `residual stream` (labels are tokens), `heads` or `neurons`.
        earlier, later: (site, index, cosine) of the partners before and after it, largest |cosine| first.
        matched: of a Q or K: (site, index, cosine) in the other.
        contexts: strongest first; of neighbouring places the strongest alone, no text twice.
    """

    site: str
    index: int
    short: str
    share_active: float
    mean_importance: float
    histogram: tuple[int, ...]
    reads: tuple[tuple[str, float], ...]
    writes: tuple[tuple[str, float], ...]
    reads_in: str
    writes_in: str
    earlier: tuple[tuple[str, int, float], ...]
    later: tuple[tuple[str, int, float], ...]
    matched: tuple[tuple[str, int, float], ...]
    contexts: tuple[Context, ...]

    @property
    def key(self) -> One:
        return self.site, self.index


def ever_active(d: Decomposition, tokens: Any, attention_mask: Any = None) -> dict[str, list[int]]:
    """Site → subcomponents with g > 0.5 at any position of the tokens `[N, s]`."""
    return {name: torch.nonzero(times).flatten().tolist() for name, times in times_active(d, tokens, attention_mask).items()}


@steady()
def times_active(d: Decomposition, tokens: Any, attention_mask: Any = None) -> dict[str, Int[Tensor, " C"]]:
    """Site → at how many positions of the tokens `[N, s]` each subcomponent has g > 0.5."""
    tokens = d.batch(tokens, attention_mask)
    times = {name: torch.zeros(c.C, dtype=torch.long, device=c.V.device) for name, c in d.components.items()}
    for batch in tokens.split(rows_at_once(d.model, tokens.shape[1], ROWS)):
        for name, g in d.look(batch).importances.items():
            times[name] += (g > THRESHOLD).flatten(0, 1).sum(0)
    return times


@steady()
def describe(
    d: Decomposition, tokens: Any, chosen: Any = None, most: int = 8, progress: bool = False, attention_mask: Any = None
) -> list[Card]:
    """A card for each chosen subcomponent, in the order of the layers.

    Args:
        d: the decomposition.
        tokens, attention_mask: `[N, s]`, as `spd_lens.tokens.take_in` takes them: where contexts are looked for.
        chosen: site → indices; None: all that are active (g > 0.5) anywhere in the tokens.
        most: how many tokens, neurons, partners and contexts a card lists.

    Raises:
        SPDError: an unknown subcomponent.
    """
    tokens = d.batch(tokens, attention_mask)
    wanted = {name: indices for name, indices in (ever_active(d, tokens) if chosen is None else choice(d, chosen)).items() if indices}
    seen = _looked_at(d, tokens, wanted, most, progress)
    between = _Partners(d, wanted)
    return [_card(d, name, c, seen[name, c], between, most) for name in d.sites if name in wanted for c in wanted[name]]


def cards_table(cards: Sequence[Card]) -> pd.DataFrame:
    """One line a card: how often it is active, what it reads and writes first, its strongest context."""
    return pd.DataFrame(
        [
            {
                "site": card.site,
                "subcomponent": card.index,
                "active at": card.share_active,
                "reads": _first(card.reads),
                "writes": _first(card.writes),
                "strongest context": "".join(card.contexts[0].labels[: card.contexts[0].at + 1]) if card.contexts else "",
            }
            for card in cards
        ]
    )


def _first(pairs: Sequence[tuple[str, float]]) -> str:
    return ", ".join(f"{label} {value:+.2f}" for label, value in pairs[:3])


@dataclass(frozen=True)
class _Seen:
    """Of one subcomponent over all tokens."""

    share: float
    mean: float
    histogram: tuple[int, ...]
    contexts: tuple[Context, ...]


@torch.no_grad()
def _looked_at(d: Decomposition, tokens: Batch, wanted: Mapping[str, Sequence[int]], most: int, progress: bool) -> dict[One, _Seen]:
    places: dict[One, list[tuple[float, int, int]]] = {(name, c): [] for name in wanted for c in wanted[name]}
    counts = {one: torch.zeros(BINS, dtype=torch.float32, device="cpu") for one in places}
    sums, active = dict.fromkeys(places, 0.0), dict.fromkeys(places, 0)
    together, s = rows_at_once(d.model, tokens.shape[1], ROWS), tokens.shape[1]
    batches = tokens.split(together)
    for number, batch in enumerate(tqdm(batches, disable=not progress, desc="looking at contexts", unit="batch")):
        seen = d.look(batch)
        for name, indices in wanted.items():
            inner, g = seen.inner[name][..., indices].flatten(0, 1), seen.importances[name][..., indices].flatten(0, 1)
            real = batch.rows(seen.importances[name][..., indices])
            strength = torch.where(g > THRESHOLD, inner.abs(), 0.0)
            values, where = strength.topk(
                min(SPARE * most, len(strength)), 0
            )  # more than are shown: neighbours and repeated texts are left out
            for i, c in enumerate(indices):
                one = (name, c)
                sums[one] += float(g[:, i].sum())
                active[one] += int((g[:, i] > THRESHOLD).sum())
                counts[one] += torch.histc(real[:, i].float().cpu(), BINS, 0.0, 1.0)
                found = [(v, number * together + p // s, p % s) for v, p in zip(values[:, i].tolist(), where[:, i].tolist()) if v > 0]
                places[one] = sorted(places[one] + found, reverse=True)[: SPARE * most]
    contexts = _contexts(d, tokens, places, most)
    n = tokens.numel
    return {one: _Seen(active[one] / n, sums[one] / n, tuple(int(k) for k in counts[one]), contexts[one]) for one in places}


def _contexts(
    d: Decomposition, tokens: Batch, places: Mapping[One, list[tuple[float, int, int]]], most: int
) -> dict[One, tuple[Context, ...]]:
    """The strongest places of each, one of neighbours and no text twice; the sequences that they lie in are run once more for what stands around."""
    kept: dict[One, list[tuple[int, int]]] = {}
    for one, found in places.items():
        kept[one] = []
        for _, n, p in found:
            near = [row for row, place in kept[one] if abs(place - p) <= AROUND and torch.equal(tokens.ids[row], tokens.ids[n])]
            if not near and len(kept[one]) < most:
                kept[one].append((n, p))
    rows = sorted({n for found in kept.values() for n, _ in found})
    contexts: dict[One, dict[tuple[int, int], Context]] = {one: {} for one in kept}
    together = rows_at_once(d.model, tokens.shape[1], ROWS)
    for part in range(0, len(rows), together):
        some = rows[part : part + together]
        seen, labels = d.look(tokens[some]), {n: token_labels(d.model, tokens.alone(n).ids[0]) for n in some}
        row = {n: i for i, n in enumerate(some)}
        for (name, c), found in kept.items():
            for n, p in found:
                if n in row:
                    span = slice(max(0, p - AROUND), min(p + AROUND + 1, len(labels[n])))
                    before = 0 if tokens.offsets is None else int(tokens.offsets[n])
                    inner, g = (of[name][row[n], span, c].tolist() for of in (seen.inner, seen.importances))
                    contexts[name, c][n, p] = Context(n, before + p, p - span.start, tuple(labels[n][span]), tuple(inner), tuple(g))
    return {one: tuple(contexts[one][place] for place in kept[one]) for one in kept}


def _card(d: Decomposition, name: str, c: int, seen: _Seen, between: "_Partners", most: int) -> Card:
    site, components = d.sites[name], d.components[name]
    v, u = components.V[:, c].detach(), components.U[c].detach()
    reads_in, writes_in = READS.get(site.kind, RESIDUAL), WRITES.get(site.kind, RESIDUAL)
    return Card(
        name, c, f"{site.short} · {c}", seen.share, seen.mean, seen.histogram,
        _told(d, site, v, reads_in, most, writing=False), _told(d, site, u, writes_in, most, writing=True), reads_in, writes_in,
        between.of(name, c, "earlier", most), between.of(name, c, "later", most), between.of(name, c, "matched", most), seen.contexts,
    )  # fmt: skip


def _told(
    d: Decomposition, site: Site, direction: Float[Tensor, " d"], space: str, most: int, writing: bool
) -> tuple[tuple[str, float], ...]:
    """A direction in the terms of its space."""
    if space == HEADS:
        by_head = direction.view(site.heads, -1).square().sum(1)
        values, named = by_head / by_head.sum().clamp_min(1e-30), lambda i: f"head {i}"
    elif space == NEURONS:
        values, named = direction, lambda i: f"neuron {i}"
    else:
        W = d.model.W_U.detach() if writing else d.model.W_E.detach().T  # [d, vocabulary]
        values, named = direction.to(W.dtype) @ W, lambda i: token_labels(d.model, [i])[0]
    top = values.abs().topk(min(most, len(values))).indices.tolist()
    return tuple((named(i), float(values[i])) for i in top)


class _Partners:
    """Cosines between what the chosen subcomponents write and what they read."""

    def __init__(self, d: Decomposition, wanted: Mapping[str, Sequence[int]]):
        self.d, self.wanted = d, wanted
        self.heads = {site.layer: max(s.heads for s in d.sites.values() if s.layer == site.layer) for site in d.sites.values()}

    def of(self, name: str, c: int, side: str, most: int) -> tuple[tuple[str, int, float], ...]:
        """The partners of one on one side: `earlier`, `later` or `matched`."""
        found = [(other, k, value) for other, k, value in self._all(name, c, side) if other in self.wanted]
        return tuple(sorted(found, key=lambda partner: -abs(partner[2]))[:most])

    def _all(self, name: str, c: int, side: str) -> Iterator[tuple[str, int, float]]:
        here = self.d.sites[name]
        for other, indices in self.wanted.items():
            there = self.d.sites[other]
            if side == "matched":
                if {here.kind, there.kind} == {"W_Q", "W_K"} and here.layer == there.layer:
                    mine, theirs = self._by_head(name, [c]), self._by_head(other, indices)  # [1, h, d_head], [k, h, d_head]
                    cosines = torch.cosine_similarity(mine, theirs, dim=-1)
                    best = cosines.abs().argmax(1, keepdim=True)
                    yield from zip([other] * len(indices), indices, cosines.gather(1, best)[:, 0].tolist())
                continue
            writer, reader = (other, name) if side == "earlier" else (name, other)
            if self._meets(writer, reader):
                writing = self._written(writer, indices if side == "earlier" else [c], reader)
                reading = self.d.components[reader].V.detach().T[[c] if side == "earlier" else indices]
                yield from zip([other] * len(indices), indices, torch.cosine_similarity(writing, reading, dim=-1).tolist())

    def _meets(self, writer: str, reader: str) -> bool:
        """Whether the reader reads what the writer writes: the residual stream of a later place, or the same layer's heads or neurons."""
        w, r = self.d.sites[writer], self.d.sites[reader]
        space = WRITES.get(w.kind, RESIDUAL)
        if space != READS.get(r.kind, RESIDUAL):
            return False
        if space == RESIDUAL:
            parallel = getattr(self.d.model.cfg, "parallel_attn_mlp", False)
            return w.layer < r.layer or (w.layer == r.layer and w.kind == "W_O" and r.kind in ("W_in", "W_gate") and not parallel)
        return w.layer == r.layer and w.kind not in ("W_Q", "W_K")

    def _written(self, writer: str, indices: Sequence[int], reader: str) -> Float[Tensor, "k d"]:
        """Rows of U in the reader's space: grouped values are repeated for the heads that share them."""
        U = self.d.components[writer].U.detach()[list(indices)]
        if self.d.sites[writer].kind != "W_V":
            return U
        heads, own = self.d.sites[reader].heads, self.d.sites[writer].heads
        return U.view(len(U), own, -1).repeat_interleave(heads // own, 1).flatten(1)

    def _by_head(self, name: str, indices: Sequence[int]) -> Float[Tensor, "k h d_head"]:
        own = self.d.sites[name].heads
        U = self.d.components[name].U.detach()[list(indices)].view(len(indices), own, -1)
        return U.repeat_interleave(self.heads[self.d.sites[name].layer] // own, 1)
