"""What a decomposition is trained on. A new loss is one function and one line of `LOSSES`.

A *penalty* is a function of a `Pass`. A *reconstruction* is a sampler and a router (`spd_lens.masks`): its masked passes are
run by the trainer, and its loss is `KL(original ‖ masked)` in nats, the mean over the passes and the compared positions.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from spd_lens import masks
from spd_lens.components import Components
from spd_lens.config import SPDConfig
from spd_lens.importance import JUST_ABOVE_1, LEAK, TINY, above, between, upper_leaky
from spd_lens.ranks import ALONE, Ranks
from spd_lens.sites import Site
from spd_lens.tokens import Batch

EPSILON = 1e-6  # keeps the slope of g^p finite at 0
SLICE = 1 << 11  # rows that the penalties work on at once


@dataclass(frozen=True, eq=False)
class Pass:
    """What the penalties of one step see.

    Attributes:
        sites, components: what is decomposed, and into what.
        logits: of importance, site → `[b, s, C]`.
        power: p of `|g|^p`, annealed.
        ranks: who holds the other sequences of the batch.
        positions: at which outputs are compared: `all` or `last`; None: as the config says.
        batch: the sequences, where some of them are padded.
    """

    sites: Mapping[str, Site]
    components: Mapping[str, Components]
    logits: Mapping[str, Tensor]
    power: float
    config: SPDConfig
    ranks: Ranks = ALONE
    positions: str | None = None
    batch: Batch | None = None

    @cached_property
    def length(self) -> float:
        """Positions of a sequence, padding left out; the mean over the whole batch."""
        b, s = next(iter(self.logits.values())).shape[:2]
        if self.batch is None or self.batch.real is None:
            return float(s)
        return float(self.ranks.mean({"length": self.batch.real.float().sum() / b})["length"])

    @property
    def outputs(self) -> float:
        """Compared outputs of a sequence."""
        return 1.0 if (self.positions or self.config.output_positions) == "last" else self.length

    @cached_property
    def importances(self) -> dict[str, Tensor]:
        """Site → upper-leaky importances `[b, s, C]`."""
        return {name: upper_leaky(z) for name, z in self.logits.items()}

    @cached_property
    def usage(self) -> dict[str, Tensor]:
        """Site → `[C]`, mean of `g^p` over all positions of the whole batch, the other ranks' sequences included. Padding has g = 0."""
        real = next(iter(self.logits.values())).shape[1] / self.length
        means = {name: mean_power(z, self.power) for name, z in self.logits.items()}
        return self.ranks.mean(means if real == 1 else {name: mean * real for name, mean in means.items()})


class _MeanPower(torch.autograd.Function):
    """In slices of rows, and without keeping more than z: the penalties see as many numbers as the masks, and each of them once."""

    @staticmethod
    def forward(ctx, z, power):
        ctx.save_for_backward(z)
        ctx.power = power
        total = z.new_zeros(z.shape[-1])
        for part in z.flatten(0, -2).split(SLICE):
            total += _leaky(part).pow_(power).sub_(EPSILON**power).sum(0)
        return total / (z.numel() // z.shape[-1])

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        (z,) = ctx.saved_tensors
        incoming = gradient * (ctx.power / (z.numel() // z.shape[-1]))
        dz = z.new_empty(z.shape)
        for part, out in zip(z.flatten(0, -2).split(SLICE), dz.flatten(0, -2).split(SLICE)):
            slope = _leaky(part).pow_(ctx.power - 1).mul_(incoming)
            torch.add(between(slope, part, -TINY, JUST_ABOVE_1), above(slope, part, 1.0), alpha=LEAK, out=out)
        return dz, None


def _leaky(z: Tensor) -> Tensor:
    return upper_leaky(z) + EPSILON


def mean_power(z: Float[Tensor, "b s C"], power: float | int) -> Float[Tensor, " C"]:
    """Mean of `g^power` over positions, g the upper-leaky importance: `((upper_leaky(z) + ε).pow(power) - ε**power).mean((0, 1))`."""
    return _MeanPower.apply(z, power)


@dataclass(frozen=True)
class Reconstruction:
    """A loss `KL(original ‖ masked)` in nats: which values the masks take, and which sites are replaced at once."""

    sampler: masks.Sampler
    router: masks.Router


def faithfulness(step: Pass) -> Float[Tensor, ""]:
    """Mean over all decomposed weight entries of `(W - V·U)²` (arXiv 2506.20790, eq. 3)."""
    return mean_squared_delta(step.sites, step.components)


def mean_squared_delta(sites: Mapping[str, Site], components: Mapping[str, Components]) -> Float[Tensor, ""]:
    """Mean over all entries of these sites' weights of `(W - V·U)²`, in squared weight units."""
    squares = [components[name].delta(site.weight).square().sum() for name, site in sites.items()]
    return torch.stack(squares).sum() / sum(site.weight.numel() for site in sites.values())


def minimality(step: Pass) -> Float[Tensor, ""]:
    """`Σ_l Σ_c mean_n g^p` (arXiv 2506.20790, eq. 7; p annealed in arXiv 2511.08854)."""
    return torch.stack([usage.sum() for usage in step.usage.values()]).sum()


def price(step: Pass) -> Float[Tensor, ""]:
    """The same per compared output instead of per position: its weight is what one active subcomponent may cost, in nats of an output's
    KL, so that one weight serves a task with one output a sequence and a language model with one a token."""
    return minimality(step) * (step.length / step.outputs)


def frequency(step: Pass) -> Float[Tensor, ""]:
    """`Σ_c log(1 + F_c/scale)` per compared output, F_c the expected active positions of c per sequence: concave, so that different inputs
    come to share a subcomponent instead of using one each."""
    expected = [usage * step.length for usage in step.usage.values()]
    return torch.stack([torch.log1p(f / step.config.frequency_scale).sum() for f in expected]).sum() / step.outputs


Penalty = Callable[[Pass], Tensor]


@dataclass(frozen=True)
class OnBackground:
    """A loss on the second stream of a targeted decomposition (`decompose(background=…)`): there the delta is fully on and every output is
    compared (Vigouroux & Sharkey 2026, arXiv 2607.13047), so that what is learnt on a few prompts does no harm elsewhere."""

    loss: Penalty | Reconstruction


LOSSES: dict[str, Penalty | Reconstruction | OnBackground] = {
    "faithfulness": faithfulness,
    "minimality": minimality,
    "price": price,
    "frequency": frequency,
    "plain": Reconstruction(masks.ones, masks.every_site),
    "alive": Reconstruction(masks.alive, masks.every_site),
    "stochastic": Reconstruction(masks.stochastic, masks.every_site),
    "layerwise": Reconstruction(masks.stochastic, masks.one_at_a_time),
    "partial": Reconstruction(masks.stochastic, masks.random_subset),
    "adversarial": Reconstruction(masks.adversarial, masks.every_site),
    "background": OnBackground(Reconstruction(masks.stochastic, masks.every_site)),
    "background_price": OnBackground(price),
}


def of_stream(names: Iterable[str], background: bool) -> dict[str, Penalty | Reconstruction]:
    """Those of the named losses that belong to the background, or to the tokens themselves."""
    losses = {name: LOSSES[name] for name in names}
    return {name: loss.loss if isinstance(loss, OnBackground) else loss for name, loss in losses.items()
            if isinstance(loss, OnBackground) is background}  # fmt: skip


def kl_divergence(original: Float[Tensor, "... v"], masked: Float[Tensor, "... v"]) -> Float[Tensor, "..."]:
    """`KL(softmax(original) ‖ softmax(masked))` in nats, at every position; the two broadcast."""
    return kl_from(original.log_softmax(-1), masked)


def kl_from(p: Float[Tensor, "... v"], masked: Float[Tensor, "... v"]) -> Float[Tensor, "..."]:
    """The same from the original's log-probabilities, where they are needed more than once."""
    q = masked.to(p.dtype).log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1)
