"""What a decomposition is trained on. A new loss is one function and one line of `LOSSES`.

A *penalty* is a function of a `Pass`. A *reconstruction* is a sampler and a router (`spd_lens.masks`): its masked passes are
run by the trainer, and its loss is `KL(original ‖ masked)` in nats, the mean over the passes and the compared positions.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

from spd_lens import masks
from spd_lens.components import Components
from spd_lens.config import SPDConfig
from spd_lens.sites import Site

EPSILON = 1e-6  # keeps the slope of g^p finite at 0


@dataclass(frozen=True, eq=False)
class Pass:
    """What the penalties of one step see.

    Attributes:
        sites, components: what is decomposed, and into what.
        importances: upper-leaky, site → `[b, s, C]`.
        power: p of `|g|^p`, annealed.
    """

    sites: Mapping[str, Site]
    components: Mapping[str, Components]
    importances: Mapping[str, Tensor]
    power: float
    config: SPDConfig

    @cached_property
    def usage(self) -> dict[str, Tensor]:
        """Site → `[C]`, mean of `g^p` over all positions."""
        return {name: (g.clamp_min(0) + EPSILON).pow(self.power).mean((0, 1)) for name, g in self.importances.items()}


@dataclass(frozen=True)
class Reconstruction:
    sampler: masks.Sampler
    router: masks.Router


def faithfulness(step: Pass) -> Float[Tensor, ""]:
    """Mean over all decomposed weight entries of `(W - V·U)²` (arXiv 2506.20790, eq. 3)."""
    return mean_squared_delta(step.sites, step.components)


def mean_squared_delta(sites: Mapping[str, Site], components: Mapping[str, Components]) -> Float[Tensor, ""]:
    squares = [components[name].delta(site.weight).square().sum() for name, site in sites.items()]
    return torch.stack(squares).sum() / sum(site.weight.numel() for site in sites.values())


def minimality(step: Pass) -> Float[Tensor, ""]:
    """`Σ_l Σ_c mean_n g^p` (arXiv 2506.20790, eq. 7; p annealed in arXiv 2511.08854)."""
    return torch.stack([usage.sum() for usage in step.usage.values()]).sum()


def frequency(step: Pass) -> Float[Tensor, ""]:
    """`Σ_c log(1 + F_c/scale)`, F_c the expected active positions of c per sequence: concave, so that different inputs come to
    share a subcomponent instead of using one each."""
    expected = [usage * step.importances[name].shape[1] for name, usage in step.usage.items()]
    return torch.stack([torch.log1p(f / step.config.frequency_scale).sum() for f in expected]).sum()


Penalty = Callable[[Pass], Tensor]

LOSSES: dict[str, Penalty | Reconstruction] = {
    "faithfulness": faithfulness,
    "minimality": minimality,
    "frequency": frequency,
    "plain": Reconstruction(masks.ones, masks.every_site),
    "stochastic": Reconstruction(masks.stochastic, masks.every_site),
    "layerwise": Reconstruction(masks.stochastic, masks.one_at_a_time),
    "partial": Reconstruction(masks.stochastic, masks.random_subset),
    "adversarial": Reconstruction(masks.adversarial, masks.every_site),
}


def kl_divergence(original: Float[Tensor, "... v"], masked: Float[Tensor, "... v"]) -> Float[Tensor, "..."]:
    """`KL(softmax(original) ‖ softmax(masked))` in nats, at every position; the two broadcast."""
    p, q = original.log_softmax(-1), masked.log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1)


def compared(logits: Float[Tensor, "*b s v"], positions: str) -> Float[Tensor, "*b n v"]:
    """The output positions that count: `all`, or the `last`."""
    return logits[..., -1:, :] if positions == "last" else logits
