"""The circuit on one prompt: which subcomponents feed which, at which positions, and what each is worth to the answer.

1. *Nodes* are the active subcomponents (g > 0.5) at their positions which are worth most to a metric: the first by attribution
   (`patching.attribution`), which misjudges where an answer is saturated, are each ablated at their position in the original model
   (`patching.ablation_effects`), and those with the largest effect stay.
2. *Edges* are direct: what a source adds to a target's inner activation when every other decomposed matrix keeps writing what it wrote. First
   order: in a pass in which every site writes its clean output plus a leaf of zeros, the gradient of the target's `v·x` on the source's leaf,
   times what the source writes, `a·u`. Paths through norms, attention patterns, activation functions and matrices that are not decomposed count.
3. *Checked*: for each source one pass in which it is subtracted and all else is held; what every target loses stands beside the first order.
4. The whole: the metric with the graph's nodes alone kept, without the delta; and with them cut out of the original model.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from spd_lens.decomposition import Decomposition
from spd_lens.errors import SPDError
from spd_lens.guards import frozen, steady
from spd_lens.labels import token_labels
from spd_lens.masks import THRESHOLD
from spd_lens.patching import Metric, _adding, ablation_effects, attribution
from spd_lens.sites import Passage, Rewrite
from spd_lens.tokens import Batch

Node = tuple[str, int, int]  # site, subcomponent, position
OUTPUT: Node = ("the metric", 0, -1)
TRIED = 4  # times as many are ablated as nodes are kept
ROWS = 32  # sources that are subtracted in one pass


@dataclass(frozen=True, eq=False)
class CircuitGraph:
    """What feeds what on one prompt.

    Attributes:
        labels: a readable token for each position.
        metric: its value in the original model.
        kept: its value with only the nodes on, without the delta.
        cut: its value with the nodes cut out of the original model.
        active: how many (subcomponent, position) are active on the prompt; the nodes are the first of them.
        nodes: `site`, `subcomponent`, `position`, `inner` (v·x), `effect` (first order, of ablating it there) and `exact`, in the metric's unit.
        edges: `site`, `subcomponent`, `position` of the source, the same of the target with `to_` before it (the metric's site is
            `the metric`); `part`: what the source adds to the target's inner activation (or to the metric), first order; `exact`: what the target loses
            without it; `strength`: `exact` as a share of the target's activation, times what the metric loses without the target.
    """

    labels: tuple[str, ...]
    metric: float
    kept: float
    cut: float
    active: int
    nodes: pd.DataFrame
    edges: pd.DataFrame

    @property
    def agreement(self) -> float:
        """Correlation of `part` and `exact` over the edges, each weighed by what a unit of its target is worth; nan below three edges."""
        worth = (self.edges["strength"] / self.edges["exact"]).where(self.edges["exact"] != 0, 0.0)
        return float((self.edges["part"] * worth).corr(self.edges["strength"])) if len(self.edges) > 2 else float("nan")

    def __repr__(self) -> str:
        return (
            f"CircuitGraph of {len(self.nodes)} of {self.active} active subcomponents and positions, {len(self.edges)} edges; metric {self.metric:.3f}, "
            f"with the nodes alone {self.kept:.3f}, without them {self.cut:.3f}; first order against ablation r = {self.agreement:.2f}"
        )


@steady(gradients=True)
def circuit_graph(
    d: Decomposition, tokens: Any, metric: Metric, most_nodes: int = 40, most_edges: int = 80, attention_mask: Any = None
) -> CircuitGraph:
    """The circuit of one prompt.

    Args:
        d: the decomposition.
        tokens, attention_mask: `[1, s]`, as `spd_lens.tokens.take_in` takes them; padding is cut off, and positions count without it.
        metric: a differentiable function of the logits `[b, s, vocabulary]` that gives one number, e.g. `answer_logit(token)`.
        most_nodes: those worth most to the metric.
        most_edges: the strongest.

    Raises:
        SPDError: several prompts, nothing active, or a metric that is not one number or has no gradient.
    """
    batch = d.batch(tokens, attention_mask)
    if len(batch) != 1:
        raise SPDError(f"{len(batch)} prompts were given; a circuit is drawn of one, [1, s]: tokens[:1], or one after the other.")
    batch = batch.alone()
    seen = d.look(batch)
    ranked = attribution(d, batch, metric, per_position=True)
    active = {name: (g[0] > THRESHOLD).T.cpu() for name, g in seen.importances.items()}  # [C, s]
    on = [bool(active[name][c, p]) for name, c, p in zip(ranked["site"], ranked["subcomponent"], ranked["position"])]
    nodes = ranked[on].head(TRIED * most_nodes).reset_index(drop=True)
    if nodes.empty:
        raise SPDError("no subcomponent is active (g > 0.5) on this prompt, so there is no circuit to draw; give a prompt like those that the "
                       "decomposition was learnt on, or look at verify(decomposition, tokens).")  # fmt: skip
    exact = ablation_effects(d, batch, metric, nodes, per_position=True, progress=False)
    nodes = exact.rename(columns={"effect": "exact"}).merge(nodes, on=["site", "subcomponent", "position"]).head(most_nodes)
    nodes["inner"] = [float(seen.inner[name][0, p, c]) for name, c, p in _keys(nodes)]
    edges = _edges(d, batch, metric, nodes).head(most_edges)
    kept, cut = _whole(d, batch, metric, nodes)
    return CircuitGraph(
        tuple(token_labels(d.model, batch.ids[0])), float(metric(seen.logits)), kept, cut, int(sum(int(a.sum()) for a in active.values())), nodes, edges,
    )  # fmt: skip


def answer_logit(token: int, position: int = -1) -> Metric:
    """A metric: the token's logit at a position, less the mean logit there, over the batch."""

    def metric(logits: Tensor) -> Tensor:
        there = logits[:, position]
        return (there[:, token] - there.mean(-1)).mean()

    return metric


def _keys(nodes: pd.DataFrame) -> list[Node]:
    return [(str(name), int(c), int(p)) for name, c, p in zip(nodes["site"], nodes["subcomponent"], nodes["position"])]


def _edges(d: Decomposition, batch: Batch, metric: Metric, nodes: pd.DataFrame) -> pd.DataFrame:
    keys, inner = _keys(nodes), dict(zip(_keys(nodes), nodes["inner"]))
    worth = {key: -effect / a if (a := inner[key]) else 0.0 for key, effect in zip(keys, nodes["exact"])} | {OUTPUT: 1.0}
    clean: dict[str, Tensor] = {}
    with torch.enable_grad(), frozen(d.model):
        leaves = {name: site.weight.new_zeros(1, batch.shape[1], site.d_out, requires_grad=True) for name, site in d.sites.items()}
        read: dict[str, Tensor] = {}

        def held(name: str) -> Rewrite:
            adding = _adding(d, name, leaves[name])

            def rewrite(passage: Passage) -> Tensor | None:
                assert passage.y is not None
                read[name], clean[name] = passage.x, passage.y.detach()
                return adding(Passage(passage.x, clean[name], passage.bias, passage.by_head, passage.start))

            return rewrite

        logits = d._forward(batch, {name: held(name) for name in d.sites})
        values = {key: (read[key[0]][0, key[2]] @ d.components[key[0]].V.detach()[:, key[1]]) for key in keys} | {OUTPUT: metric(logits)}
        rows = []
        for target, value in values.items():
            gradients = (
                torch.autograd.grad(value, list(leaves.values()), retain_graph=True, allow_unused=True, materialize_grads=True)
                if value.requires_grad
                else []
            )
            slopes = dict(zip(leaves, gradients))
            for source in keys:
                name, c, p = source
                part = float(slopes[name][0, p] @ d.components[name].U.detach()[c]) * inner[source] if slopes else 0.0
                if source != target and part != 0.0:
                    rows.append((*source, *target, part))
    lost = _lost(d, batch, metric, keys, inner, clean)
    columns = ["site", "subcomponent", "position", "to_site", "to_subcomponent", "to_position", "part"]
    table = pd.DataFrame(rows, columns=columns)
    table["exact"] = [lost[row[:3]][row[3:6]] for row in rows]
    table["strength"] = [lost[row[:3]][row[3:6]] * worth[row[3:6]] for row in rows]
    return table.sort_values("strength", key=abs, ascending=False, kind="stable", ignore_index=True)


@torch.no_grad()
def _lost(
    d: Decomposition,
    batch: Batch,
    metric: Metric,
    keys: Sequence[Node],
    inner: Mapping[Node, float],
    clean: Mapping[str, Tensor],
) -> dict[Node, dict[Node, float]]:
    """Source → target → what it loses when the source alone is subtracted and every site else writes what it wrote."""
    before = {**inner, OUTPUT: float(metric(d.model(batch.ids, return_type="logits")))}
    found: dict[Node, dict[Node, float]] = {}
    for start in range(0, len(keys), ROWS):
        some = keys[start : start + ROWS]
        read: dict[str, Tensor] = {}

        def held(name: str, some: Sequence[Node] = some, read: dict[str, Tensor] = read) -> Rewrite:
            taken = clean[name].new_zeros(len(some), batch.shape[1], d.sites[name].d_out)
            for row, (site, c, p) in enumerate(some):
                if site == name:
                    taken[row, p] = -inner[site, c, p] * d.components[site].U[c]
            adding = _adding(d, name, taken)

            def rewrite(passage: Passage) -> Tensor | None:
                read[name] = passage.x
                y = clean[name].repeat_interleave(len(some), -3)
                return adding(Passage(passage.x, y, passage.bias, passage.by_head, passage.start))

            return rewrite

        logits = d._forward(batch.repeated(len(some)), {name: held(name) for name in d.sites})
        for row, source in enumerate(some):
            after = {(name, c, p): float(read[name][row, p] @ d.components[name].V[:, c]) for name, c, p in keys}
            after[OUTPUT] = float(metric(logits[row : row + 1]))
            found[source] = {target: before[target] - after[target] for target in after}
    return found


@torch.no_grad()
def _whole(d: Decomposition, batch: Batch, metric: Metric, nodes: pd.DataFrame) -> tuple[float, float]:
    """The metric with the nodes alone, and without them."""
    masks: dict[str, Float[Tensor, "1 s C"]] = {name: c.V.new_zeros(1, batch.shape[1], c.C) for name, c in d.components.items()}
    for name, c, p in _keys(nodes):
        masks[name][0, p, c] = 1
    hooks = [hook for name, c, p in _keys(nodes) for hook in d.ablate({name: [c]}, positions=[p])]
    return float(metric(d.masked(batch, masks))), float(metric(d.model.run_with_hooks(batch.ids, fwd_hooks=hooks)))
