"""How much a change at a site would change the model's output, to second order.

1. `sensitivities`: what every matrix reads, `x`, and the gradient `g` of the log-likelihood of a token drawn from the model's own output, by
   what the matrix writes. The output's KL for a small change `dy` of what is written is `½·E[(g·dy)²]` (the Fisher metric).
2. `factors`: of `E[(g·dWᵀx)²]` over positions, the Kronecker approximation `A ⊗ G` (Martens & Grosse 2015, arXiv 1503.05671), each factor
   weighted by the other's norm, so that positions which do not matter do not count. `components.weighted_svd` makes of them a
   factorisation whose first k terms lose the least KL (as weighted low-rank compression does: Hsu et al. 2022, arXiv 2207.00112).
3. `effects`: `½·E[Σ_n (x·v_c)²(g·u_c)²]`, the KL that cutting a subcomponent where it is active would cost.
"""

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from spd_lens.components import Factors, Target
from spd_lens.decomposition import Decomposition
from spd_lens.guards import double
from spd_lens.sites import Passage, Rewrite
from spd_lens.tokens import Batch

POSITIONS = 1 << 12  # of which a start is made
TEMPERATURE = 2.0  # of the draw: where a model is sure of its answer, a small change does nothing and says nothing of a large one


def sensitivities(
    d: Decomposition, tokens: Batch | Tensor, generator: torch.Generator
) -> tuple[dict[str, Float[Tensor, "b s d_in"]], dict[str, Float[Tensor, "b s d_out"]]]:
    """Site → its input; site → the gradient of `Σ log p(y)` by its output, y drawn from the model's own distribution at every compared
    position."""
    inputs: dict[str, Tensor] = {}
    changes: dict[str, Tensor] = {}
    batch = Batch.of(tokens)

    def watch(name: str) -> Rewrite:
        def add_nothing(passage: Passage) -> Tensor:
            assert passage.y is not None  # nothing is replaced
            inputs[name] = passage.x.detach()
            changes[name] = torch.zeros_like(passage.y, requires_grad=True)
            return passage.y + changes[name]

        return add_nothing

    with torch.enable_grad():
        logits = batch.compared(d._forward(batch, {name: watch(name) for name in d.sites}), d.config.output_positions)
        log_p = logits.log_softmax(-1)
        log_p = log_p.flatten(0, -2) if d.config.output_positions == "last" else batch.rows(log_p)
        drawn = torch.multinomial((log_p.detach() / TEMPERATURE).softmax(-1), 1, generator=generator)
        gradients = torch.autograd.grad(log_p.gather(-1, drawn).sum(), list(changes.values()))
    return inputs, {name: g.sum(0) if g.ndim == 4 else g for name, g in zip(changes, gradients)}


def factors(d: Decomposition, tokens: Batch | Tensor, generator: torch.Generator, rows: int) -> dict[str, Factors]:
    """Site → A and G, `rows` sequences at once. No gradient reaches padding, so it adds nothing."""
    sums: dict[str, tuple[Tensor, Tensor]] = {}
    for some in Batch.of(tokens).split(rows):
        inputs, gradients = sensitivities(d, some, generator)
        for name in d.sites:
            x, g = double(inputs[name].flatten(0, 1)), double(gradients[name].flatten(0, 1))
            A, G = (x * g.square().sum(-1, keepdim=True)).T @ x, (g * x.square().sum(-1, keepdim=True)).T @ g
            before = sums.get(name)
            sums[name] = (A, G) if before is None else (before[0] + A, before[1] + G)
    return sums


def watched(
    d: Decomposition, tokens: Batch | Tensor, generator: torch.Generator, rows: int
) -> dict[str, tuple[Float[Tensor, "n d_in"], Float[Tensor, "n d_out"]]]:
    """Site → what it reads and the gradient by what it writes, at no more than `POSITIONS` positions drawn from the tokens."""
    lots = Batch.of(tokens).split(rows)
    seen = [sensitivities(d, some, generator) for some in lots]
    found = {}
    for name in d.sites:
        x, g = (torch.cat([some.rows(part[i][name]) for some, part in zip(lots, seen)]) for i in (0, 1))
        drawn = torch.randperm(len(x), generator=generator, device=x.device)[:POSITIONS]
        found[name] = (x[drawn], g[drawn])
    return found


def targets(
    d: Decomposition, tokens: Batch | Tensor, background: Batch | Tensor, generator: torch.Generator, rows: int
) -> dict[str, Target]:
    """Site → what a targeted decomposition starts from. Of the tokens no more than one pass; few of them are gone through several times, since
    each draw of an output shows one direction of it alone."""
    prompts, other = Batch.of(tokens)[:rows], Batch.of(background)
    prompts = prompts.repeated(max(1, rows // len(prompts)))
    inputs, gradients = sensitivities(d, prompts, generator)
    moments: dict[str, Tensor] = {}
    for some in other.split(rows):
        for name, x in d.trace(some).inputs.items():
            x = double(some.rows(x))
            moments[name] = moments.get(name, 0.0) + x.T @ x / other.numel
    found = {}
    for name in d.sites:
        x, g = prompts.rows(inputs[name]), double(prompts.rows(gradients[name]))
        G = (g * double(x).square().sum(-1, keepdim=True)).T @ g
        found[name] = Target(x, g.square().sum(-1), G, moments[name])
    return found


def effects(
    d: Decomposition, tokens: Batch | Tensor, active: Sequence[Mapping[str, Tensor]], generator: torch.Generator, rows: int
) -> dict[str, Float[Tensor, " C"]]:
    """Site → what cutting each subcomponent, at all positions where it is active, would cost: KL in nats per compared output.

    Args:
        active: for every `rows` sequences of tokens, site → `[rows, s, C]`, 1 where active.
    """
    batch = Batch.of(tokens)
    outputs = batch.outputs(d.config.output_positions)
    found = {name: torch.zeros(c.C, device=c.V.device, dtype=c.V.dtype) for name, c in d.components.items()}
    for some, on in zip(batch.split(rows), active):
        inputs, gradients = sensitivities(d, some, generator)
        for name, c in d.components.items():
            change = (inputs[name].to(c.V.dtype) @ c.V) * (gradients[name].to(c.V.dtype) @ c.U.T) * on[name]
            found[name] += change.sum(1).square().sum(0) / (2 * outputs)
    return found
