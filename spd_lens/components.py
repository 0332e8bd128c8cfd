"""The rank-one subcomponents of one site: `W ≈ Σ_c v_c ⊗ u_c` (arXiv 2506.20790, section 2; 2511.08854, section 3).

1. inner activation   `a = x·V`                      `[b, s, C]`
2. masked output      `(a ∘ m)·U`                    `[b, s, d_out]`
3. delta              `δ · x·(W - V·U)`, so that every mask at 1 with δ = 1 is exactly the original.
"""

import warnings

import torch
from jaxtyping import Float
from torch import Tensor, nn

from spd_lens.errors import SPDError
from spd_lens.sites import Passage, Site

NOISE = 0.01  # of subcomponents beyond the rank: small, so that they start idle, not zero, so that they can learn


class Components(nn.Module):
    """V `[d_in, C]` and U `[C, d_out]` of one site."""

    def __init__(self, V: Float[Tensor, "d_in C"], U: Float[Tensor, "C d_out"]):
        super().__init__()
        self.V = nn.Parameter(V)
        self.U = nn.Parameter(U)

    @property
    def C(self) -> int:
        return self.V.shape[1]

    def inner(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch C"]:
        return x @ self.V

    def delta(self, weight: Float[Tensor, "d_in d_out"]) -> Float[Tensor, "d_in d_out"]:
        """What the subcomponents leave of the matrix: `W - V·U`."""
        return weight - self.V @ self.U

    def __repr__(self) -> str:
        return f"Components(V {list(self.V.shape)}, U {list(self.U.shape)})"


def masked_output(
    components: Components, site: Site, passage: Passage, mask: Tensor, delta: float | int | Tensor, inner: Tensor | None = None
) -> Tensor:
    """What the site writes under a mask, bias included: `((x·V) ∘ m)·U + δ·x·(W - V·U) + bias`.

    Args:
        mask: broadcasts to `[b, s, C]`.
        delta: scales the rest; a number, or a tensor that broadcasts to `[b, s, 1]`.
        inner: `x·V` where it is known already.

    Returns:
        a tensor of the shape of `passage.y`.
    """
    x = passage.source
    inner = components.inner(x) if inner is None else inner
    output = (inner * mask.to(inner.dtype)) @ components.U
    if isinstance(delta, Tensor) or delta != 0:
        output = output + delta * (x @ components.delta(site.weight))
    return passage.biased(output)


def initialise(site: Site, C: int, kind: str, generator: torch.Generator) -> Components:
    """`svd`: the singular vectors, each scaled by the root of its singular value, unrotated; the rest small noise.
    `random`: Gaussian, scaled so that `V·U` has about the matrix's norm."""
    weight = site.weight

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=weight.dtype, device=weight.device)

    if kind == "random":
        scale = (weight.norm() / (C * site.d_in * site.d_out) ** 0.5) ** 0.5
        return Components(scale * noise(site.d_in, C), scale * noise(C, site.d_out))
    left, singular, right = torch.linalg.svd(weight.double(), full_matrices=False)
    kept = min(C, len(singular))
    if lost := float((singular[C:] ** 2).sum() / (singular**2).sum().clamp_min(1e-300)):
        rank = int((singular > 1e-5 * singular[0]).sum())
        if rank > C:
            warnings.warn(
                f"{site.name}: {C} subcomponents for a matrix of rank {rank} leave at best {lost:.1%} of its squared norm to the "
                f"delta. Give subcomponents={rank} or more for an exact decomposition.", stacklevel=3,
            )  # fmt: skip
    root = singular[:kept].sqrt()
    spread = float(weight.norm()) ** 0.5 * NOISE
    V = torch.cat([(left[:, :kept] * root).to(weight), spread * noise(site.d_in, C - kept) / site.d_in**0.5], 1)
    U = torch.cat([(right[:kept] * root[:, None]).to(weight), spread * noise(C - kept, site.d_out) / site.d_out**0.5], 0)
    return Components(V, U)


def check_weight(site: Site) -> None:
    if site.weight.dtype not in (torch.float32, torch.float64):
        raise SPDError(f"{site.name} is {site.weight.dtype}; subcomponents are learnt in float32. Convert the model with "
                       "model.to(torch.float32) first.")  # fmt: skip
    if not torch.isfinite(site.weight).all():
        bad = int((~torch.isfinite(site.weight)).sum())
        raise SPDError(f"{site.name} holds {bad} NaN or infinite entries of {site.weight.numel()}; the model itself is broken.")
