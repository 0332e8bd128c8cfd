"""Causal importance: how much each subcomponent matters, position by position (arXiv 2511.08854, section 3).

1. A site's input `x [b, s, d_in]` gives one logit `z [b, s, C]` per subcomponent, by one of three functions:
   *scalar* an MLP on its own inner activation, *vector* an MLP on the whole input, *attention* an MLP on
   `softmax((q_n·Kᵀ + r_n)/√d_k)·V ⊕ x_n`, which sees other positions.
2. Two leaky hard sigmoids make importances of z: the lower-leaky one for masks, the upper-leaky one for minimality.

The MLPs of C subcomponents are independent and their hidden layer is `[b, s, C, gate_width]`: the largest thing in a
training step. `independent_mlps` is the readable form; `fast_independent_mlps` gives the same numbers and gradients but
works through the rows in chunks that stay in cache, and recomputes the hidden layer instead of storing it.
"""

import itertools
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

LEAK = 0.01
DRAWN = torch.float32  # parameters are drawn in it, whatever the default and the model are: the same seed gives the same start
RETIRED = -1.0  # the logit of what is never active again
CHUNK = 1 << 19  # hidden activations worked on at once: 2 MiB of float32, about what a core holds in its cache
CUDA_CHUNK = 1 << 26  # a GPU wants them by the 256 MiB
SCORES, CUDA_SCORES = 1 << 20, 1 << 28  # attention scores of one gate that are held at once


# `torch.where` asks for every number and guesses wrong half of the time: twenty times slower than these two on a CPU.
above = torch.ops.aten.threshold_backward  # (gradient, z, low): the gradient where z > low, else 0
between = torch.ops.aten.hardtanh_backward  # (gradient, z, low, high): the gradient where low < z < high, else 0
TINY, JUST_ABOVE_1 = 1e-30, 1.0000001


class _LowerLeaky(torch.autograd.Function):
    @staticmethod
    def forward(ctx, z):
        ctx.save_for_backward(z)
        return z.clamp(0, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        (z,) = ctx.saved_tensors
        return between(gradient, z, 0.0, JUST_ABOVE_1) + above(LEAK * gradient.clamp(max=0), -z, -TINY)


def lower_leaky(z: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """`clamp(z, 0, 1)`. Gradient 1 inside, 0 above 1; at or below 0, 0.01 of the incoming one where it would raise z."""
    return _LowerLeaky.apply(z)


def upper_leaky(z: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """`clamp(z, 0, 1)` up to 1 and `1 + 0.01·(z-1)` above, so that a saturated importance can still come down."""
    return z.clamp(0, 1) + LEAK * (z - 1).clamp(min=0)


def independent_mlps(
    x: Float[Tensor, "N d"], w1: Float[Tensor, "d C H"], b1: Float[Tensor, "C H"], w2: Float[Tensor, "C H"], b2: Float[Tensor, " C"]
) -> Float[Tensor, "N C"]:
    """`z_c = w2_c · GELU(x·w1_c + b1_c) + b2_c`, stated plainly."""
    hidden = F.gelu(torch.einsum("nd,dch->nch", x, w1) + b1)
    return (hidden * w2).sum(-1) + b2


class _ChunkedMLPs(torch.autograd.Function):
    """Works on the transpose, `[C, H, rows]`: there biases ride along with the product and sums run along memory."""

    @staticmethod
    def forward(ctx, w1, b1, w2, b2, *inputs):
        device = w1.device.type
        ctx.dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else w1.dtype
        ctx.save_for_backward(w1, b1, w2, *inputs)
        C, H = w2.shape
        z = w2.new_empty(len(inputs[0]), C)
        weight, bias, out = (t.to(ctx.dtype) for t in (w1.flatten(1).T.contiguous(), b1.view(-1, 1), w2[:, None]))
        for rows, x, (hidden,) in _chunks(inputs, C, H, ctx.dtype, buffers=1):
            torch.addmm(bias, weight, x.T, out=hidden.flatten(0, 1))
            torch.ops.aten.gelu.out(hidden, out=hidden)
            z[rows] = torch.bmm(out, hidden)[:, 0].T
        return z.add_(b2)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        w1, b1, w2, *inputs = ctx.saved_tensors
        C, H = w2.shape
        weight = w1.flatten(1).T.contiguous()
        back = (weight * w2.view(-1, 1)).to(ctx.dtype)  # w2 factors out of the sum over rows: it enters here and at the end
        dweight, dbias, dw2 = torch.zeros_like(weight), torch.zeros_like(b1), torch.zeros_like(w2)
        edges = list(itertools.accumulate((x.shape[1] for x in inputs), initial=0))
        dinputs = [torch.empty_like(x) if wanted else None for x, wanted in zip(inputs, ctx.needs_input_grad[4:])]
        weight, bias = weight.to(ctx.dtype), b1.view(-1, 1).to(ctx.dtype)
        for rows, x, (before, after) in _chunks(inputs, C, H, ctx.dtype, buffers=2):
            dz = gradient[rows].T.to(ctx.dtype).contiguous()[:, None]
            torch.addmm(bias, weight, x.T, out=before.flatten(0, 1))
            torch.ops.aten.gelu.out(before, out=after)
            dw2 += after.mul_(dz).sum(-1)
            torch.ops.aten.gelu_backward.grad_input(dz.expand_as(before), before, grad_input=after)
            dbias += after.sum(-1)
            if ctx.dtype == dweight.dtype:
                dweight.addmm_(after.flatten(0, 1), x)
            else:
                dweight += after.flatten(0, 1) @ x
            for dx, start, end in zip(dinputs, edges, edges[1:]):
                if dx is not None:
                    dx[rows] = torch.mm(back[:, start:end].T, after.flatten(0, 1)).T
        dw1 = (dweight * w2.view(-1, 1)).T.reshape(w1.shape)
        return dw1, dbias * w2, dw2, gradient.sum(0), *dinputs


def _chunks(inputs: Sequence[Tensor], C: int, H: int, dtype: torch.dtype, buffers: int) -> Iterator[tuple[slice, Tensor, list[Tensor]]]:
    """Slices of rows, the inputs side by side `[rows, d]`, and buffers `[C, H, rows]`, the same memory each time: it stays in cache."""
    many = len(inputs[0])
    size = min(many, max(16, (CHUNK if inputs[0].device.type == "cpu" else CUDA_CHUNK) // max(1, C * H)))
    memory = [inputs[0].new_empty(C * H * size, dtype=dtype) for _ in range(buffers)]
    for start in range(0, many, size):
        rows = slice(start, min(start + size, many))
        width = rows.stop - start
        yield rows, torch.cat([part[rows].to(dtype) for part in inputs], 1), [m[: C * H * width].view(C, H, width) for m in memory]


def fast_independent_mlps(
    inputs: Sequence[Float[Tensor, "N _"]], w1: Float[Tensor, "d C H"], b1: Float[Tensor, "C H"],
    w2: Float[Tensor, "C H"], b2: Float[Tensor, " C"],
) -> Float[Tensor, "N C"]:  # fmt: skip
    """`independent_mlps` of the inputs side by side, in chunks of rows and with the hidden layer recomputed in the backward pass.
    An input without gradient costs no backward product."""
    return _ChunkedMLPs.apply(w1, b1, w2, b2, *inputs)


class Importance(nn.Module):
    """Logits of causal importance from a site's input. Abstract: see the three below.

    Attributes:
        alive: `[C]`, 1 or 0: retired subcomponents have an importance of 0 for good, and cost nothing.
    """

    alive: Tensor
    _known: tuple[int, Tensor | None] | None = None

    def __init__(self, C: int):
        super().__init__()
        self.register_buffer("alive", torch.ones(C, dtype=DRAWN))

    def logits(
        self, x: Float[Tensor, "b s d_in"], inner: Float[Tensor, "b s C"], some: Int[Tensor, " k"] | None,
        real: Bool[Tensor, "b s"] | None = None,
    ) -> Float[Tensor, "b s k"]:  # fmt: skip
        """Of `some` subcomponents; None: of all. What stands where `real` is False is not looked at from elsewhere."""
        raise TypeError(f"{type(self).__name__} has to define logits")

    def forward(
        self, x: Float[Tensor, "b s d_in"], inner: Float[Tensor, "b s C"], real: Bool[Tensor, "b s"] | None = None
    ) -> Float[Tensor, "b s C"]:
        """Logits; of padding, where `real` is False, as of what is retired. Padding comes behind a sequence's tokens."""
        some = self._some()
        z = self.logits(x, inner, some, real)
        if some is not None:
            z = z.new_full((*z.shape[:-1], len(self.alive)), RETIRED).index_copy(-1, some, z)
        return z if real is None else z.masked_fill(~real[..., None], RETIRED)

    def _some(self) -> Tensor | None:
        """Indices of those alive, None for all; looked up anew when `alive` was written to."""
        if self._known is None or self._known[0] != self.alive._version:
            with torch.inference_mode(False):  # it is kept, and may be wanted where there are gradients
                some = torch.nonzero(self.alive).flatten()
            self._known = (self.alive._version, None if len(some) == len(self.alive) else some)
        return self._known[1]


def _gaussian(*shape: int, scale: float, generator: torch.Generator) -> nn.Parameter:
    return nn.Parameter(scale * torch.randn(*shape, generator=generator, dtype=DRAWN))


class _MLPs(nn.Module):
    """The independent MLPs' parameters; `d` inputs each."""

    def __init__(self, d: int, C: int, width: int, bias: float, generator: torch.Generator):
        super().__init__()
        self.w1 = _gaussian(d, C, width, scale=d**-0.5, generator=generator)
        self.b1 = nn.Parameter(torch.zeros(C, width, dtype=DRAWN))
        self.w2 = _gaussian(C, width, scale=0.3 * width**-0.5, generator=generator)
        self.b2 = nn.Parameter(torch.full((C,), bias, dtype=DRAWN))

    def forward(self, some: Tensor | None, *inputs: Float[Tensor, "b s _"]) -> Float[Tensor, "b s k"]:
        w1, b1, w2, b2 = self.w1, self.b1, self.w2, self.b2
        if some is not None:
            w1, b1, w2, b2 = w1.index_select(1, some), b1.index_select(0, some), w2.index_select(0, some), b2.index_select(0, some)
        z = fast_independent_mlps([x.flatten(0, 1) for x in inputs], w1, b1, w2, b2)
        return z.unflatten(0, inputs[0].shape[:2])


class ScalarImportance(Importance):
    """An MLP per subcomponent on its inner activation `v_c·x_n` (arXiv 2506.20790, section 2.3)."""

    scale: Tensor

    def __init__(self, scale: Float[Tensor, " C"], width: int, bias: float, generator: torch.Generator):
        super().__init__(len(scale))
        C = len(scale)
        self.register_buffer("scale", scale)
        self.w1 = _gaussian(C, width, scale=1.0, generator=generator)
        self.b1 = _gaussian(C, width, scale=1.0, generator=generator)
        self.w2 = _gaussian(C, width, scale=0.3 * width**-0.5, generator=generator)
        self.b2 = nn.Parameter(torch.full((C,), bias, dtype=DRAWN))

    def logits(
        self, x: Float[Tensor, "b s d_in"], inner: Float[Tensor, "b s C"], some: Int[Tensor, " k"] | None,
        real: Bool[Tensor, "b s"] | None = None,
    ) -> Float[Tensor, "b s k"]:  # fmt: skip
        these = slice(None) if some is None else some
        hidden = F.gelu((inner / self.scale)[..., these, None] * self.w1[these] + self.b1[these])
        return (hidden * self.w2[these]).sum(-1) + self.b2[these]


class VectorImportance(Importance):
    """An MLP per subcomponent on the site's whole input."""

    scale: Tensor

    def __init__(self, d_in: int, C: int, scale: Float[Tensor, ""], width: int, bias: float, generator: torch.Generator):
        super().__init__(C)
        self.register_buffer("scale", scale)
        self.mlps = _MLPs(d_in, C, width, bias, generator)

    def logits(
        self, x: Float[Tensor, "b s d_in"], inner: Float[Tensor, "b s C"], some: Int[Tensor, " k"] | None,
        real: Bool[Tensor, "b s"] | None = None,
    ) -> Float[Tensor, "b s k"]:  # fmt: skip
        return self.mlps(some, x / self.scale)


class AttentionImportance(Importance):
    """One attention head before the MLPs (arXiv 2511.08854, section 3), since the same token elsewhere has another role.

    The head has only Q, K and V; a learned relative positional bias on its scores; learned absolute encodings on its
    values; its output is concatenated with the input.

    Args:
        context: positions that the learned encodings reach; farther ones share the last entry.
        causal: False where the model itself attends both ways.
    """

    scale: Tensor

    def __init__(
        self, d_in: int, C: int, scale: Float[Tensor, ""], width: int, bias: float, generator: torch.Generator,
        context: int, causal: bool = True, decay: float = 0.3,
    ):  # fmt: skip
        super().__init__(C)
        self.context, self.causal = context, causal
        self.register_buffer("scale", scale)
        self.W_Q, self.W_K, self.W_V = (_gaussian(d_in, width, scale=d_in**-0.5, generator=generator) for _ in range(3))
        distance = torch.arange(context if causal else 2 * context - 1, dtype=DRAWN)
        distance = distance if causal else (distance - (context - 1)).abs()
        self.relative = nn.Parameter(-decay * width**0.5 * distance)  # r: divided by √d_k with the scores
        self.absolute = _gaussian(context, width, scale=0.1, generator=generator)
        self.mlps = _MLPs(width + d_in, C, width, bias, generator)

    def bias_by_distance(self, length: int) -> Float[Tensor, " distances"]:
        """r_n over √d_k from the key `length - 1` positions ahead to the one as far back; minus infinity where position n may not look."""
        distance = torch.arange(1 - length, length, device=self.relative.device)
        low = 0 if self.causal else 1 - self.context
        # index_select, since the backward of plain indexing adds in an order that changes from run to run
        bias = self.relative.index_select(0, distance.clamp(low, self.context - 1) - low) / self.W_Q.shape[1] ** 0.5
        return bias.masked_fill(distance < 0, -torch.inf) if self.causal else bias

    def attend(
        self, q: Float[Tensor, "b s w"], k: Float[Tensor, "b s w"], v: Float[Tensor, "b s w"], real: Bool[Tensor, "b s"] | None = None
    ) -> Float[Tensor, "b s w"]:
        """The head's output; of long sequences block by block, so that memory grows with the length and not with its square. Keys where `real` is
        False are hidden (a causal head does not reach padding behind a sequence anyway)."""
        batch, length, _ = q.shape
        ahead = self.bias_by_distance(length).flip(0).to(q.dtype)  # [0] is the farthest back
        rows = max(1, (SCORES if q.device.type == "cpu" else CUDA_SCORES) // (batch * length))
        if real is not None:
            bias = _windows(ahead, 0, length, length).flip(0).masked_fill(~real[:, None, None], -torch.inf)
            return F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None], attn_mask=bias)[:, 0]
        if rows < length:
            return _BlockedAttention.apply(q, k, v, ahead, rows, self.causal)
        bias = _windows(ahead, 0, length, length).flip(0)
        return F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None], attn_mask=bias)[:, 0]

    def logits(
        self, x: Float[Tensor, "b s d_in"], inner: Float[Tensor, "b s C"], some: Int[Tensor, " k"] | None,
        real: Bool[Tensor, "b s"] | None = None,
    ) -> Float[Tensor, "b s k"]:  # fmt: skip
        x = x / self.scale
        encoding = self.absolute[torch.arange(x.shape[1], device=x.device).clamp(max=self.context - 1)]
        q, k = x @ self.W_Q, x @ self.W_K
        v = x @ self.W_V + encoding
        return self.mlps(some, self.attend(q, k, v.to(q.dtype), None if self.causal else real), x)


def _windows(ahead: Tensor, start: int, end: int, keys: int) -> Tensor:
    """The biases of the queries `end - 1` down to `start` and the first `keys` keys: query i sees key j at distance i - j, so that each
    query's row is a window of the biases by distance, moved by one from the next query's. `[end - start, keys]`, no memory of its own."""
    length = (len(ahead) + 1) // 2
    return ahead[length - end : length - start + keys - 1].unfold(0, keys, 1)


class _BlockedAttention(torch.autograd.Function):
    """`softmax(q·kᵀ/√w + bias)·v`, one block of queries after the other in the same two buffers; the scores are computed anew in the backward
    pass. In a block the queries run backwards, as `_windows` does."""

    @staticmethod
    def forward(ctx, q, k, v, ahead, rows, causal):
        out = torch.empty_like(q)
        ctx.rows, ctx.causal = rows, causal
        for queries, weights, _ in _BlockedAttention.blocks(q, k, ahead, rows, causal):
            out[:, queries] = (weights @ v[:, : weights.shape[-1]]).flip(1)
        ctx.save_for_backward(q, k, v, ahead, out)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        q, k, v, ahead, out = ctx.saved_tensors
        length, scale = q.shape[1], q.shape[-1] ** -0.5
        dq, dk, dv, dahead = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v), torch.zeros_like(ahead)
        through = (gradient * out).sum(-1, keepdim=True)
        for queries, weights, spare in _BlockedAttention.blocks(q, k, ahead, ctx.rows, ctx.causal):
            many, keys = weights.shape[-2:]
            dout = gradient[:, queries].flip(1)
            dv[:, :keys].baddbmm_(weights.transpose(1, 2), dout)
            dscores = torch.bmm(dout, v[:, :keys].transpose(1, 2), out=spare).sub_(through[:, queries].flip(1)).mul_(weights)
            dq[:, queries] = (dscores @ k[:, :keys]).mul_(scale).flip(1)
            dk[:, :keys].baddbmm_(dscores.transpose(1, 2), q[:, queries].flip(1), alpha=scale)
            # sums along the diagonals: with `many` zeros after each row, rows one shorter start one later each
            padded = F.pad(dscores.sum(0), (0, many)).flatten()
            start = length - queries.stop
            dahead[start : start + keys + many - 1] += padded[: many * (keys + many - 1)].view(many, -1).sum(0)
        return dq, dk, dv, dahead, None, None

    @staticmethod
    def blocks(q: Tensor, k: Tensor, ahead: Tensor, rows: int, causal: bool) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Slices of queries, their attention weights `[b, rows, keys]`, and as much spare memory."""
        batch, length, width = q.shape
        memory = [q.new_empty(batch * rows * length) for _ in range(2)]
        for start in range(0, length, rows):
            end = min(start + rows, length)
            keys = end if causal else length
            weights, scores = (m[: batch * (end - start) * keys].view(batch, -1, keys) for m in memory)
            bias = _windows(ahead, start, end, keys).expand(batch, -1, -1)
            torch.baddbmm(bias, q[:, start:end].flip(1), k[:, :keys].transpose(1, 2), alpha=width**-0.5, out=scores)
            yield slice(start, end), torch.softmax(scores, -1, out=weights), scores


def build_importance(
    kind: str, x: Float[Tensor, "b s d_in"], inner: Float[Tensor, "b s C"], width: int, bias: float, decay: float,
    context: int, causal: bool, generator: torch.Generator,
) -> Importance:  # fmt: skip
    """The importance function of one site; `x` and `inner` of some data set the scale of its inputs, once and for all."""
    rms = x.square().mean().sqrt().clamp_min(1e-6)
    d_in, C = x.shape[-1], inner.shape[-1]
    with x.device:  # the parameters are made there
        match kind:
            case "scalar":
                per_component = inner.square().mean((0, 1)).sqrt()
                importance = ScalarImportance(per_component.clamp_min(1e-6), width, bias, generator)
            case "vector":
                importance = VectorImportance(d_in, C, rms, width, bias, generator)
            case _:
                importance = AttentionImportance(d_in, C, rms, width, bias, generator, context, causal, decay)
    return importance.to(x.dtype)
