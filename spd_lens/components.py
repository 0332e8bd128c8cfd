"""The rank-one subcomponents of one site: `W ≈ Σ_c v_c ⊗ u_c` (arXiv 2506.20790, section 2; 2511.08854, section 3).

1. inner activation   `a = x·V`                      `[b, s, C]`
2. masked output      `(a ∘ m)·U`                    `[b, s, d_out]`
3. delta              `δ · x·(W - V·U)`, so that every mask at 1 with δ = 1 is exactly the original.
"""

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from spd_lens.errors import SPDError
from spd_lens.guards import back, double
from spd_lens.schema import brief
from spd_lens.sites import Passage, Site

DAMPING = 1e-3  # of a factor's mean eigenvalue: directions that the sample did not show are not free
BACKGROUND = 0.1  # weight of what is read elsewhere, against what is read on the prompts
SPANS = 1e-6  # of the matrix's norm may be left
NOISE = 0.01  # of subcomponents beyond the rank: small, so that they start idle, not zero, so that they can learn


class Components(nn.Module):
    """V `[d_in, C]` and U `[C, d_out]` of one site."""

    def __init__(self, V: Float[Tensor, "d_in C"], U: Float[Tensor, "C d_out"]):
        super().__init__()
        self.V = nn.Parameter(V)
        self.U = nn.Parameter(U)

    @property
    def C(self) -> int:
        """How many subcomponents the site has."""
        return self.V.shape[1]

    def inner(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch C"]:
        """Inner activations `x·V`: what each subcomponent reads."""
        return x @ self.V

    def delta(self, weight: Float[Tensor, "d_in d_out"]) -> Float[Tensor, "d_in d_out"]:
        """What the subcomponents leave of the matrix: `W - V·U`."""
        return weight - self.V @ self.U

    @torch.no_grad()
    def close(self, weight: Float[Tensor, "d_in d_out"]) -> None:
        """Make `V·U = W` exact by the least change of U, `U += V⁺·(W - V·U)`, where V spans everything that W reads."""
        V, W = double(self.V), double(weight)
        delta = W - V @ double(self.U)  # in double, whatever float32 products are rounded to
        change = torch.linalg.pinv(V) @ delta
        if float((delta - V @ change).norm()) <= SPANS * float(W.norm()):
            self.U += back(change, self.U)

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
    output = (inner * mask.to(inner)) @ components.U
    if isinstance(delta, Tensor) or delta != 0:
        output = output + (delta.to(x) if isinstance(delta, Tensor) else delta) * (x @ components.delta(site.weight))
    return passage.biased(output)


def check_mask(name: str, mask: Any, C: int, batch: Sequence[int] | None = None) -> None:
    """Refuse a mask that does not broadcast to `[b, s, C]`, or may be meant in two ways.

    Args:
        batch: (b, s) where they are known.
    """
    shape = [None, None, C] if batch is None else [*batch, C]
    fits = isinstance(mask, Tensor) and mask.ndim <= 3 and not mask.is_complex()
    fits = fits and all(size in (1, full) or full is None for size, full in zip(reversed(mask.shape), reversed(shape)))
    two = isinstance(mask, Tensor) and mask.ndim == 2
    if not fits:
        given = f"shape {list(mask.shape)}" if isinstance(mask, Tensor) else f"a {type(mask).__name__}"
        given += " of complex numbers" if isinstance(mask, Tensor) and mask.is_complex() else ""
        known = "" if batch is None else f" = {shape}"
        hint = " Of one row a sequence give mask[:, None, :]." if two else ""
        raise SPDError(f"{name}: the mask has {given}; it has to be a tensor that broadcasts to [b, s, {C}]{known}.{hint}")
    if batch is not None and two and mask.shape[0] == batch[0] == batch[1] != 1:
        raise SPDError(f"{name}: the mask has shape {list(mask.shape)} and the tokens {list(batch)}, so its rows may be sequences or positions; "
                       "give mask[:, None, :] for one row a sequence, mask[None] for one a position.")  # fmt: skip


def check_delta(delta: Any, batch: Sequence[int] | None = None) -> None:
    """Refuse what is neither a finite number nor a tensor that broadcasts to `[b, s, 1]`."""
    shape = [None, None, 1] if batch is None else [*batch, 1]
    if isinstance(delta, Tensor):
        fits = delta.ndim <= 3 and all(size in (1, full) or full is None for size, full in zip(reversed(delta.shape), reversed(shape)))
    else:
        fits = isinstance(delta, Real) and math.isfinite(delta)
    if not fits:
        given = f"a tensor {list(delta.shape)}" if isinstance(delta, Tensor) else brief(delta)
        raise SPDError(
            f"delta was given as {given}; give a finite number, or a tensor that broadcasts to [b, s, 1], e.g. values[:, None, None]."
        )


Factors = tuple[Float[Tensor, "d_in d_in"], Float[Tensor, "d_out d_out"]]


def initialise(site: Site, C: int, kind: str, generator: torch.Generator, factors: Factors | None = None) -> Components:
    """`random`: Gaussian, scaled so that `V·U` has about the matrix's norm. `svd`: the singular vectors. `fisher`: the same in the
    metric of `factors` (`weighted_svd`). Of the last two, what lies beyond the rank is small noise."""
    weight = site.weight
    if kind == "random":
        scale = (weight.norm() / (C * site.d_in * site.d_out) ** 0.5) ** 0.5
        V, U = (
            torch.randn(*shape, generator=generator, dtype=weight.dtype, device=weight.device)
            for shape in ((site.d_in, C), (C, site.d_out))
        )
        return Components(scale * V, scale * U)
    rank = int(torch.linalg.matrix_rank(double(weight), rtol=1e-5))
    if rank > C:
        warnings.warn(f"{site.name}: {C} subcomponents for a matrix of rank {rank} leave a part of it to the delta. "
                      f"Give subcomponents={rank} or more for an exact decomposition.", stacklevel=3)  # fmt: skip
    return _filled(site, C, *weighted_svd(weight, factors), generator)


ALIKE = 8  # power of the cosine of what is written
RIDGE = 1e-3  # share of the mean eigenvalue that every direction has at least
STARTS, ROUNDS = 6, (20, 5, 0)  # directions tried per subcomponent; how often each is sharpened
OWN, UNSEEN = 0.75, 1e-2  # share of the subcomponents that are found so; weight of directions that no input shows
SAME, FELT = 0.9, 1e-2  # likeness of two that are one; share of the largest effect below which a subcomponent is not worth having


def from_positions(site: Site, C: int, x: Float[Tensor, "n d_in"], g: Float[Tensor, "n d_out"], generator: torch.Generator) -> Components:
    """Subcomponents that are read at few positions each.

    1. Positions of which no two write alike (`y = x·W` in the metric of the output, `E[ggᵀ]`).
    2. For each a direction `v` that answers 1 where what is written is alike and 0 elsewhere, by least squares over all positions: what varies
       between positions that write the same is not read by it.
    3. Sharpened: `v` is fitted to what it answers above its own root mean square, again and again (of features that are on at few positions
       each the single ones are what this comes to rest at; the cubed answer of fast independent component analysis is the same with a softer
       threshold). Those sharpened longest come first, and of those that are read and write alike one is kept.
    4. `u` is what is written where `v` answers, corrected by least squares so that all of them together make W, most of all on what is read.
    5. What is left of W, by its singular vectors, in the other subcomponents.
    """
    W, x, g = double(site.weight), double(x), double(g)
    y, n = x @ W, len(x)
    root, _ = _roots(g.T @ g / n)
    A = x.T @ x / n
    A = torch.linalg.inv(A + RIDGE * A.diagonal().mean().clamp_min(1e-300) * torch.eye(len(A), dtype=A.dtype, device=A.device))
    felt = y @ root
    size = felt.norm(dim=1)
    felt = felt / size.clamp_min(1e-300)[:, None]
    chosen = _unlike(felt, size > FELT * size.square().mean().sqrt(), STARTS * C, generator)
    if not chosen:  # nothing is written anywhere
        return _filled(site, C, *weighted_svd(W, None), generator)

    def answers(targets: Tensor) -> tuple[Tensor, Tensor]:
        V = A @ (x.T @ targets / n)
        V = V / (x @ V).square().mean(0).sqrt().clamp_min(1e-300)
        return V, x @ V

    V, a = answers((felt @ felt[chosen].T).clamp_min(0) ** ALIKE)
    found = [(V, a)]
    for _ in range(max(ROUNDS)):
        found.append(answers((found[-1][1] - 1).clamp_min(0)))
    V, a = (torch.cat([found[rounds][i] for rounds in ROUNDS], 1) for i in (0, 1))
    U = ((a.clamp_min(0) ** 3).T @ y) / (a.clamp_min(0) ** 4).sum(0).clamp_min(1e-300)[:, None]
    effect = (U @ root).norm(dim=1)
    kept = _apart(a / n**0.5, (U @ root) / effect.clamp_min(1e-300)[:, None], effect > FELT * effect.max(), max(1, round(C * OWN)))
    V, U = V[:, kept], U[kept]
    metric = x.T @ x / n
    metric = metric + UNSEEN * metric.diagonal().mean() * torch.eye(len(metric), dtype=metric.dtype, device=metric.device)
    M = V.T @ metric @ V
    U = U + torch.linalg.solve(M + RIDGE * torch.eye(len(M), dtype=M.dtype, device=M.device), V.T @ metric @ (W - V @ U))
    rest = _balanced(*_halves(*torch.linalg.svd(W - V @ U, full_matrices=False)))
    keep = rest[0].norm(dim=0) * rest[1].norm(dim=1) > SPANS * W.norm()
    V, U = _balanced(V, U)
    return _filled(site, C, torch.cat([V, rest[0][:, keep]], 1), torch.cat([U, rest[1][keep]]), generator)


def _halves(left: Tensor, singular: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    return left * singular, right


def _unlike(felt: Tensor, matters: Tensor, most: int, generator: torch.Generator) -> list[int]:
    """Positions of which no two write alike: the pivots of their kernel's Cholesky factorisation. Which of equals is chance."""
    drawn = torch.float64 if generator.device.type == "cpu" else torch.float32
    left = matters * (1 + 1e-3 * torch.rand(len(felt), generator=generator, dtype=drawn, device=generator.device).to(felt))
    columns, chosen = felt[:, :0], []
    for _ in range(most):
        at = int(left.argmax())
        if float(left[at]) < 0.05:
            break
        chosen.append(at)
        column = ((felt @ felt[at]) ** ALIKE - columns @ columns[at]) / left[at].sqrt()
        columns = torch.cat([columns, column[:, None]], 1)
        left = (left - column.square()).clamp_min(0)
    return chosen


def _apart(answers: Tensor, writes: Tensor, matters: Tensor, most: int) -> list[int]:
    """The first of those that are read and write alike."""
    alike, kept = ((answers.T @ answers) * (writes @ writes.T)).abs(), []
    for c in torch.nonzero(matters).flatten().tolist():
        if len(kept) < most and not any(float(alike[c, other]) > SAME for other in kept):
            kept.append(c)
    return kept


def _filled(site: Site, C: int, V: Tensor, U: Tensor, generator: torch.Generator) -> Components:
    """The first C terms; small noise where there are fewer."""
    weight = site.weight

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=weight.dtype, device=weight.device)

    spread, beyond = float(weight.norm()) ** 0.5 * NOISE, max(0, C - len(U))
    V = torch.cat([back(V[:, :C], weight), spread * noise(site.d_in, beyond) / site.d_in**0.5], 1)
    U = torch.cat([back(U[:C], weight), spread * noise(beyond, site.d_out) / site.d_out**0.5], 0)
    return Components(V, U)


def weighted_svd(weight: Float[Tensor, "d_in d_out"], factors: Factors | None) -> tuple[Float[Tensor, "d_in r"], Float[Tensor, "r d_out"]]:
    """V and U in double, `r = min(d_in, d_out)`, with `V·U = W` exactly. The first k lose the least of `tr(A·Δ·G·Δᵀ)`, where Δ is what the
    others would have added, A and G the factors (the identity where none are given). `v_c` and `u_c` have the same norm."""
    W = double(weight)
    if factors is None:
        (root_a, inverse_a), (root_g, inverse_g) = ((torch.eye(d, dtype=W.dtype, device=W.device),) * 2 for d in W.shape)
    else:
        (root_a, inverse_a), (root_g, inverse_g) = map(_roots, factors)
    left, singular, right = torch.linalg.svd(root_a @ W @ root_g, full_matrices=False)
    V, U = inverse_a @ (left * singular), right @ inverse_g
    return _balanced(V, U)


def _roots(M: Tensor) -> tuple[Tensor, Tensor]:
    """The root of a positive matrix, damped, and its inverse."""
    values, vectors = torch.linalg.eigh(M / M.diagonal().mean().clamp_min(1e-300))
    values = values.clamp_min(0) + DAMPING
    return (vectors * values.sqrt()) @ vectors.T, (vectors / values.sqrt()) @ vectors.T


@dataclass(frozen=True, eq=False)
class Target:
    """What a matrix reads and how much what it writes matters on the prompts of a targeted decomposition, and what it reads elsewhere.

    Attributes:
        rows: `[n, d_in]`, what it reads, position by position.
        weights: `[n]`, how much an output depends on what it writes there: the mean square of the gradient.
        output: `[d_out, d_out]`, G of the Kronecker factors.
        background: `[d_in, d_in]`, the second moment of what it reads in other text.
    """

    rows: Float[Tensor, "n d_in"]
    weights: Float[Tensor, " n"]
    output: Float[Tensor, "d_out d_out"]
    background: Float[Tensor, "d_in d_in"]


def targeted(site: Site, C: int, target: Target, generator: torch.Generator) -> Components:
    """Subcomponents of what the matrix does on the prompts alone.

    1. The filter `M = (A + β·B)⁻¹·A`, A and B the second moments on the prompts (weighted) and elsewhere, lets pass what is read on the prompts and
       as little as it can of the rest (Wiener's): `x·M·W` is `x·W` there and small elsewhere. The delta keeps the rest.
    2. `M·W` is factored in the metric of the prompts' outputs (as `weighted_svd`), the first C terms.
    3. The terms are rotated to simple structure: each is read at few positions (`varimax`). The outputs of two prompts then belong to
       different subcomponents wherever what is read there differs.
    """
    weights = double(target.weights) / double(target.weights).mean().clamp_min(1e-300)
    W, seen, B = double(site.weight), weights.sqrt()[:, None] * double(target.rows), double(target.background)
    A = seen.T @ seen / len(seen)
    damping = DAMPING * B.diagonal().mean().clamp_min(1e-300) * torch.eye(len(B), dtype=B.dtype, device=B.device)
    filtered = torch.linalg.solve(A + BACKGROUND * (B + damping), A @ W)
    root, inverse = _roots(double(target.output))
    _, singular, right = torch.linalg.svd(seen @ filtered @ root, full_matrices=False)
    many = min(C, int((singular > SPANS * singular[0].clamp_min(1e-300)).sum()))
    V, U = filtered @ root @ right[:many].T, right[:many] @ inverse
    rotation = varimax(seen @ V)
    return _filled(site, C, *_balanced(V @ rotation, rotation.T @ U), generator)


@torch.no_grad()
def likeness(
    V: Float[Tensor, "d_in K"], U: Float[Tensor, "K d_out"], V2: Float[Tensor, "d_in A"], U2: Float[Tensor, "A d_out"]
) -> Float[Tensor, "K A"]:
    """`|cos v|·|cos u|` of each of the first pieces with each of the second."""

    def cosines(a: Tensor, b: Tensor) -> Tensor:
        a, b = (double(x) / double(x).norm(dim=-1, keepdim=True).clamp_min(1e-300) for x in (a, b))
        return (a @ b.T).abs()

    return back(cosines(V.T, V2.T) * cosines(U, U2), V)


def varimax(loadings: Float[Tensor, "n k"], steps: int = 200, tolerance: float = 1e-7) -> Float[Tensor, "k k"]:
    """The rotation after which each column of `loadings·R` has few large entries: it maximises the variance of their squares (Kaiser 1958,
    by the iterated singular value decomposition)."""
    rotation = torch.eye(loadings.shape[1], dtype=loadings.dtype, device=loadings.device)
    reached = 0.0
    for _ in range(steps):
        rotated = loadings @ rotation
        gradient = loadings.T @ (rotated**3 - rotated * rotated.square().mean(0))
        left, singular, right = torch.linalg.svd(gradient)
        rotation = left @ right
        if float(singular.sum()) <= reached * (1 + tolerance):
            break
        reached = float(singular.sum())
    return rotation


def _balanced(V: Tensor, U: Tensor) -> tuple[Tensor, Tensor]:
    """`v_c` and `u_c` of the same norm."""
    balance = (U.norm(dim=1) / V.norm(dim=0).clamp_min(1e-300)).sqrt()
    return V * balance, U / balance[:, None].clamp_min(1e-300)


def check_weight(site: Site) -> None:
    if site.weight.dtype not in (torch.float32, torch.float64):
        raise SPDError(f"{site.name} is {site.weight.dtype}; subcomponents are learnt in float32. Convert the model with "
                       "model.to(torch.float32) first.")  # fmt: skip
    if not torch.isfinite(site.weight).all():
        bad = int((~torch.isfinite(site.weight)).sum())
        raise SPDError(f"{site.name} holds {bad} NaN or infinite entries of {site.weight.numel()}; the model itself is broken.")
