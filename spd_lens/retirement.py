"""Subcomponents that are not needed are retired: their importance is 0 for good.

1. Every subcomponent's effect: what cutting it wherever it is active would cost, to second order (`curvature.effects`).
2. In the order of effect, as many as can be cut *together* for a KL of no more than the tolerance: measured by running, with a binary
   search, so that many subcomponents cost few passes. What is inactive is at 0 in one of the runs, and anywhere in [0, 1] in the others:
   what is retired has to be harmless at any strength. Those that are never active go in any case.

What is retired stays in `V·U`, so the matrix stays whole; it cannot come back into the count, and its importance is not computed. `close` makes
the matrix exactly whole in the end, where that does not change what the others do.
"""

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from spd_lens import masks
from spd_lens.components import likeness
from spd_lens.curvature import effects
from spd_lens.decomposition import Decomposition
from spd_lens.guards import back, double
from spd_lens.losses import kl_from
from spd_lens.tokens import Batch

DRAWS = 2
ALIKE, TOGETHER = 0.9, 0.9  # of two that are one: |cos v|·|cos u|, or what one can be of both; positions of either at which both are active


@torch.no_grad()
def retire(d: Decomposition, tokens: Batch | Tensor, tolerance: float, rows: int) -> int:
    """Retire subcomponents of `d`, and say how many.

    Args:
        tokens: what the need for them is measured on.
        tolerance: KL in nats per compared output that may be lost, in each of the runs.
        rows: sequences run at once; only which subcomponents are active is held for all of them.
    """
    batch = Batch.of(tokens)
    lots = batch.split(rows)
    active = [_active(d, some) for some in lots]
    effect = effects(d, batch, active, torch.Generator(batch.device).manual_seed(d.config.seed), rows)
    order = [(float(effect[name][c]), name, c) for name, gate in d.gates.items() for c in torch.nonzero(gate.alive).flatten().tolist()]
    order.sort(key=lambda one: one[0])
    idle = sum(cost == 0 for cost, _, _ in order)

    def kl_without(many: int) -> Float[Tensor, " runs"]:
        kept = {name: torch.ones_like(cost) for name, cost in effect.items()}
        for _, name, c in order[:many]:
            kept[name][c] = 0
        return _kl(d, lots, [{name: on[name] * k for name, k in kept.items()} for on in active])

    most = kl_without(idle) + tolerance
    low, high = idle, len(order) + 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if bool((kl_without(middle) <= most).all()) else (low, middle)
    for _, name, c in order[:low]:
        d.gates[name].alive[c] = 0
    return low


@torch.no_grad()
def merge(d: Decomposition, tokens: Batch | Tensor, rows: int) -> int:
    """Make one of those that do one thing, the more often active one of them, and say how many are gone.

    Two do one thing where they read and write alike, or where they are active together and their sum is about as good as one (they read or write
    alike, and the other halves add up). Each of them is needed, so no cutting finds them. What is left is the best rank-one matrix for their
    sum; the other is retired, with nothing in it.
    """
    both: dict[str, Tensor] = {}
    for some in Batch.of(tokens).split(rows):
        for name, on in _active(d, some).items():
            seen = on.flatten(0, 1).to(d.components[name].V)
            both[name] = both.get(name, 0.0) + seen.T @ seen
    gone = 0
    for name, c in d.components.items():
        often = both[name].diagonal()
        used = torch.nonzero((often > 0) & (d.gates[name].alive > 0)).flatten()
        used = used[often[used].argsort(descending=True)]
        V, U, often, together = c.V[:, used], c.U[used], often[used], both[name][used][:, used]
        jointly = together / (often[:, None] + often - together)
        alike = (likeness(V, U, V, U) > ALIKE) | ((jointly > TOGETHER) & (_as_one(V.T @ V, U @ U.T) > ALIKE))
        left = list(range(len(used)))
        while left:
            first, *rest = left
            same = [other for other in rest if bool(alike[first, other])]
            left = [other for other in rest if other not in same]
            if same:
                keep, *others = used[[first, *same]].tolist()
                v, u = rank_one(c.V[:, [keep, *others]], c.U[[keep, *others]])
                sign = 1.0 if float(v @ c.V[:, keep]) >= 0 else -1.0  # what reads with a sign of its own goes on doing so
                c.V[:, others], c.U[others] = 0.0, 0.0
                c.V[:, keep], c.U[keep] = sign * v, sign * u
                d.gates[name].alive[others] = 0
                gone += len(others)
    return gone


def _as_one(reads: Float[Tensor, "k k"], writes: Float[Tensor, "k k"]) -> Float[Tensor, "k k"]:
    """How much the best rank-one matrix leaves of the lesser of `v_i ⊗ u_i` and `v_j ⊗ u_j` when it stands for their sum: 1 less the second singular
    value of the sum, squared, over the lesser's squared norm; from the products `v_i·v_j` and `u_i·u_j`."""
    n, m = reads.diagonal(), writes.diagonal()
    total = n[:, None] * m[:, None] + 2 * reads * writes + n * m
    area = (n[:, None] * n - reads.square()) * (m[:, None] * m - writes.square())
    second = 2 * area / (total + (total.square() - 4 * area).clamp_min(0).sqrt()).clamp_min(1e-30)
    return 1 - second / torch.minimum((n * m)[:, None], n * m).clamp_min(1e-30)


def rank_one(V: Float[Tensor, "d_in k"], U: Float[Tensor, "k d_out"]) -> tuple[Float[Tensor, " d_in"], Float[Tensor, " d_out"]]:
    """The best rank-one matrix `v ⊗ u` for `V·U`, v and u of the same norm."""
    left, right = torch.linalg.qr(double(V)), torch.linalg.qr(double(U.T))
    a, s, b = torch.linalg.svd(left.R @ right.R.T)
    return back(left.Q @ a[:, 0] * s[0].sqrt(), V), back(right.Q @ b[0] * s[0].sqrt(), U)


@torch.no_grad()
def close(d: Decomposition, tokens: Batch | Tensor, tolerance: float, rows: int) -> None:
    """Make `V·U = W` exact by the least change of U (`Components.close`), site by site; not where there are too few subcomponents, nor where
    it would cost more KL than the tolerance: where V is badly conditioned, the least change is not small."""
    lots = Batch.of(tokens).split(rows)
    active = [_active(d, some) for some in lots]
    most = _kl(d, lots, active) + tolerance
    for name, components in d.components.items():
        before = components.U.clone()
        components.close(d.sites[name].weight)
        if not torch.equal(components.U, before) and not bool((_kl(d, lots, active) <= most).all()):
            components.U.copy_(before)


def _active(d: Decomposition, batch: Batch) -> dict[str, Tensor]:
    logits = d.importance_logits(d.trace(batch, d.config.output_positions).inputs, batch)[1]
    return {name: z > masks.THRESHOLD for name, z in logits.items()}


def _kl(d: Decomposition, lots: Sequence[Batch], active: Sequence[Mapping[str, Tensor]]) -> Float[Tensor, " runs"]:
    """Mean KL per compared output, with the inactive ones at 0, and at `DRAWS` random corners, the same ones each time."""
    positions, draw = d.config.output_positions, masks.Draw(torch.Generator(lots[0].device).manual_seed(d.config.seed))
    nothing = {name: torch.zeros_like(c.V[0]) for name, c in d.components.items()}
    strengths = [nothing, *(masks.coins(nothing, draw) for _ in range(DRAWS))]
    total = next(iter(nothing.values())).new_zeros(len(strengths))
    for some, on in zip(lots, active):
        clean = d.trace(some, positions)
        for i, r in enumerate(strengths):
            mask = {name: masks.between(chosen.to(r[name].dtype), r[name]) for name, chosen in on.items()}
            divergence = kl_from(clean.logits.log_softmax(-1), d.run_many(clean, [mask], positions)[0])
            total[i] += some.mean(divergence, positions) * some.outputs(positions)
    return total / sum(some.outputs(positions) for some in lots)
