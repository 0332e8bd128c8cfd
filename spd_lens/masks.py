"""Two axes: which value in [g, 1] each subcomponent gets (a *sampler*), and which sites are replaced (a *router*).

A sampler maps importances g `[b, s, C]` to masks `m = g + (1-g)·r`. A router lists the sets of sites replaced together,
one masked forward pass each. Every reconstruction loss is one of the first with one of the second.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

Importances = Mapping[str, Tensor]
Masks = dict[str, Tensor]
Sampler = Callable[[Importances, "Draw"], Masks]
Router = Callable[[Sequence[str], "Draw"], list[list[str]]]

THRESHOLD = 0.5  # a subcomponent counts as active where g > 0.5 (arXiv 2511.08854, Table 1)
ZERO_SHARE, COIN_SHARE = 0.3, 0.2  # of the sequences in a mixed draw


@dataclass
class Draw:
    """Where randomness and the adversary's memory come from.

    Attributes:
        generator: the only source of randomness.
        sources: the adversary's r, `[C]` a site: one value per subcomponent for all sequences and positions.
        kind: what `stochastic` draws: `mixed` or `uniform`.
        layerwise_sites: how many sites `one_at_a_time` draws; None: all.
        alive: site → `[C]`, 0 for retired subcomponents, else 1; a site that is not named has all of its own.
    """

    generator: torch.Generator
    sources: dict[str, Tensor] = field(default_factory=dict)
    kind: str = "mixed"
    layerwise_sites: int | None = None
    alive: Mapping[str, Tensor] = field(default_factory=dict)

    def uniform(self, *shape: int, like: Tensor) -> Tensor:
        """`U(0, 1)` of this shape, in the type and on the device of `like`."""
        return torch.rand(*shape, generator=self.generator, dtype=like.dtype, device=like.device)


def between(importance: Tensor, r: Tensor) -> Tensor:
    """`m = g + (1-g)·r`: an important subcomponent stays on, an unimportant one takes r."""
    return torch.lerp(importance, torch.ones_like(r[..., :1]), r)


def uniform(importances: Importances, draw: Draw) -> Masks:
    """r ~ U(0, 1), one each (arXiv 2506.20790, section 2.2)."""
    return {name: between(g, draw.uniform(*g.shape, like=g)) for name, g in importances.items()}


def mixed(importances: Importances, draw: Draw) -> Masks:
    """Uniform in half of the sequences, a fair coin in 20 %: with uniform draws alone an unimportant subcomponent is at half strength on
    average, and a decomposition can come to rely on that average. In the other 30 % r = 0 and g itself is drawn: 1 with probability g,
    else 0, with the gradient of g, so that half an importance is not enough where the subcomponent is needed."""
    g = next(iter(importances.values()))
    kind = draw.uniform(g.shape[0], like=g)
    zero, coin = (torch.nonzero(chosen).flatten() for chosen in (kind < ZERO_SHARE, kind > 1 - COIN_SHARE))
    masks = {}
    for name, g in importances.items():
        r = draw.uniform(*g.shape, like=g)
        off = g.detach()[zero]
        drawn = (r[zero] < off).to(off.dtype) - off
        r[zero] = 0.0
        r[coin] = r[coin].round()
        masks[name] = between(g, r).index_add(0, zero, drawn)
    return masks


def coins(importances: Importances, draw: Draw) -> Masks:
    """r is 0 or 1, one value per subcomponent for all sequences and positions."""
    return {name: between(g, draw.uniform(g.shape[-1], like=g).round()) for name, g in importances.items()}


def stochastic(importances: Importances, draw: Draw) -> Masks:
    """`mixed` or `uniform`, as `draw.kind` says: what `SPDConfig.masks` chooses."""
    return {"mixed": mixed, "uniform": uniform}[draw.kind](importances, draw)


def hard(importances: Importances, draw: Draw | None = None) -> Masks:
    """1 where active, else 0."""
    return {name: (g > THRESHOLD).to(g.dtype) for name, g in importances.items()}


def soft(importances: Importances, draw: Draw | None = None) -> Masks:
    """The importance itself."""
    return dict(importances)


def ones(importances: Importances, draw: Draw | None = None) -> Masks:
    """1 everywhere: the sum of all subcomponents."""
    return {name: torch.ones_like(g) for name, g in importances.items()}


def alive(importances: Importances, draw: Draw) -> Masks:
    """1, but 0 for the retired."""
    return {name: torch.ones_like(g) * draw.alive.get(name, 1.0) for name, g in importances.items()}


def zeros(importances: Importances, draw: Draw | None = None) -> Masks:
    """0 everywhere: what the sites write without any subcomponent, the bias (and the delta where it is on)."""
    return {name: torch.zeros_like(g) for name, g in importances.items()}


def adversarial(importances: Importances, draw: Draw) -> Masks:
    """r from the adversary's sources: one value per subcomponent for all sequences and positions."""
    return {name: between(g, draw.sources[name]) for name, g in importances.items()}


def ascend(sources: Mapping[str, Tensor], gradients: Mapping[str, Tensor], step: float) -> dict[str, Tensor]:
    """One step of the adversary: sign ascent, kept in [0, 1]."""
    return {name: (r + step * gradients[name].sign()).clamp(0, 1).detach() for name, r in sources.items()}


def every_site(names: Sequence[str], draw: Draw) -> list[list[str]]:
    """All sites in one pass."""
    return [list(names)]


def one_at_a_time(names: Sequence[str], draw: Draw) -> list[list[str]]:
    """Layerwise: each site alone, or as many as `layerwise_sites` says, drawn without replacement."""
    many = draw.layerwise_sites
    if many is None or many >= len(names):
        return [[name] for name in names]
    order: list[int] = torch.randperm(len(names), generator=draw.generator, device=draw.generator.device).tolist()
    return [[names[i]] for i in order[:many]]


def random_subset(names: Sequence[str], draw: Draw) -> list[list[str]]:
    """Partial (arXiv 2511.08854, section 3): each site with probability ½, at least one."""
    coins = torch.rand(len(names), generator=draw.generator, dtype=torch.float32, device=draw.generator.device)
    chosen = [name for name, coin in zip(names, coins.tolist()) if coin < 0.5]
    return [chosen or [names[int(coins.argmin())]]]
