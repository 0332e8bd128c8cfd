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
from spd_lens.curvature import effects
from spd_lens.decomposition import Decomposition
from spd_lens.losses import kl_from
from spd_lens.tokens import Batch

DRAWS = 2


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
