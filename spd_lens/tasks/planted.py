"""Planted truth: models built by hand from known rank-one pieces, to see whether a decomposition finds them.

1. A *case* is a model whose decomposed matrices are sums of pieces `v_k ⊗ u_k` that were put there, sequences, and at which positions each piece
   acts (1), does not (0), or may do either (nan). Nothing is trained; every direction is drawn from the seed.
2. `measure` holds a decomposition against it: which pieces come back (`spd_lens.recovered`), whether importance is on where the piece acts,
   how many are active beside how many there are, and what `verify` says.
3. Where the pieces do not follow from what the model does (a random matrix, a dense one of low rank), `unknown` says why, and there is no score.
"""

import math
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from spd_lens.config import SPDConfig
from spd_lens.decomposition import Decomposition
from spd_lens.errors import SPDError, nearest
from spd_lens.guards import plainly
from spd_lens.masks import THRESHOLD
from spd_lens.metrics import Verification, verify
from spd_lens.recovery import Pieces, Recovery, recovered
from spd_lens.training import decompose
from spd_lens.weights import set_weight

try:
    from transformer_lens import HookedTransformer, HookedTransformerConfig
except ImportError:  # transformer-lens 4.x
    HookedTransformer = HookedTransformerConfig = None

SEQUENCES, LENGTH, MEASURED = 512, 8, 256
OFFSET = 20.0  # of a neuron that has to stay in its linear range
SURE = 8.0  # logit of the right answer
NEVER = -20.0  # logit of what is no answer
SHARP = 10.0  # attention score of the position that is meant
EITHER = math.nan


@dataclass(frozen=True, eq=False)
class Planted:
    """A model and what was put into it.

    Attributes:
        model: with weights set by hand.
        tokens: `[N, s]`, to decompose on.
        truth: site → the pieces that its matrix is the sum of.
        active: tokens → site → `[b, s, K]`: 1 where a piece acts, 0 where not, nan where either is right.
        subcomponents: how many a matrix gets: more than there are pieces.
        outputs: `all` or `last`: where the model answers.
        unknown: why these pieces do not follow from what the model does; empty where they do.
    """

    model: Any
    tokens: Int[Tensor, "N s"]
    truth: dict[str, Pieces]
    active: Callable[[Tensor], dict[str, Float[Tensor, "b s K"]]]
    subcomponents: int
    outputs: str = "all"
    unknown: str = ""


# --- building ---

PLACES = {  # name → of the parameter in a HookedTransformer, in a TransformerBridge
    "W_E": ("embed.W_E", "tok_embed.weight"), "W_pos": ("pos_embed.W_pos", "pos.weight"),
    "W_U": ("unembed.W_U", "head.weight"), "b_U": ("unembed.b_U", "head.bias"),
}  # fmt: skip


@torch.no_grad()
def build(
    parameters: Mapping[str, Tensor], layers: int = 1, head: int = 1, neurons: int | None = None, length: int = LENGTH, gated: bool = False
) -> Any:
    """A model of blocks of one head (and a ReLU MLP, gated or not, where there are neurons) without LayerNorm. Everything is 0 but what is given:
    `W_E`, `W_pos`, `W_U`, `b_U`, matrices by their site's name, biases as `blocks.0.mlp.b_in`."""
    n, d = parameters["W_E"].shape
    shape: dict[str, Any] = dict(n_layers=layers, d_model=d, n_heads=1, d_head=head, d_mlp=neurons, d_vocab=n, n_ctx=length, act_fn="relu",
                                 gated_mlp=gated, attn_only=neurons is None, normalization_type=None)  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        if HookedTransformer is not None and HookedTransformerConfig is not None:
            model = HookedTransformer(HookedTransformerConfig(**shape, seed=None, device="cpu"))
        else:
            from transformer_lens.config import TransformerBridgeConfig

            model = TransformerBridge.boot_native(TransformerBridgeConfig(**shape, architecture="TransformerLensNative"), device="cpu")
    bridge = isinstance(model, TransformerBridge)
    if bridge and "b_U" in parameters:  # transformer-lens 4.3 has no parameter for it
        model.unembed.original_component.bias = torch.nn.Parameter(torch.zeros(n))  # pyright: ignore
    own = {name.replace("_original_component.", ""): parameter for name, parameter in model.named_parameters()}
    for parameter in own.values():
        parameter.zero_()
    for name, value in parameters.items():
        if name in PLACES:
            own[PLACES[name][bridge]].copy_(value.T if bridge and name == "W_U" else value)
        elif name.split(".")[-1].startswith("b_"):
            layer, _, bias = name.split(".")[1:]
            own[f"layers.{layer}.mlp.fc_{bias[2:]}.bias" if bridge else name].copy_(value)
        else:
            set_weight(model, name, value)
    return model.eval()


def gaussian(*shape: int, generator: torch.Generator) -> Tensor:
    return torch.randn(*shape, generator=generator)


def unit(vectors: Float[Tensor, "k d"]) -> Float[Tensor, "k d"]:
    return vectors / vectors.norm(dim=-1, keepdim=True)


def orthogonal(d: int, generator: torch.Generator) -> Float[Tensor, "d d"]:
    return torch.linalg.qr(gaussian(d, d, generator=generator)).Q


def spread(many: int, d: int, generator: torch.Generator) -> Float[Tensor, "many d"]:
    """More unit vectors than dimensions, pushed apart until no two are close."""
    vectors = unit(gaussian(many, d, generator=generator))
    for _ in range(2000):
        overlaps = (vectors @ vectors.T).fill_diagonal_(0)
        vectors = unit(vectors - 0.05 * overlaps**7 @ vectors / overlaps.abs().max() ** 7)
    return vectors


def single(K: int, n: int, generator: torch.Generator, low: float = 0.7, high: float = 1.3) -> Float[Tensor, "n K"]:
    """A table of tokens: each switches on one of K features, by as much as it likes."""
    z = torch.zeros(n, K)
    z[torch.arange(n), torch.arange(n) % K] = low + (high - low) * torch.rand(n, generator=generator)
    return z


def sets(K: int, n: int, generator: torch.Generator, most: int = 3, shares: Tensor | None = None) -> Float[Tensor, "n K"]:
    """A table of tokens: each switches on one to `most` features, drawn evenly or by `shares`."""
    z = torch.zeros(n, K)
    for row in z:
        many = int(torch.randint(1, most + 1, (), generator=generator))
        chosen = torch.multinomial(torch.ones(K) if shares is None else shares, many, generator=generator)
        row[chosen] = 0.7 + 0.6 * torch.rand(many, generator=generator)
    return z


def any_tokens(n: int, generator: torch.Generator, length: int = LENGTH) -> Int[Tensor, "N s"]:
    return torch.randint(n, (SEQUENCES, length), generator=generator)


def by_token(site: str, table: Float[Tensor, "n K"]) -> Callable[[Tensor], dict[str, Tensor]]:
    """Pieces that act wherever a token stands, whatever stands before it."""
    return lambda tokens: {site: table[tokens]}


# --- one MLP in its linear range: the matrix alone ---

IN, OUT, IN1 = "blocks.0.mlp.W_in", "blocks.0.mlp.W_out", "blocks.1.mlp.W_in"


def linear(
    z: Float[Tensor, "n K"], reads: Float[Tensor, "K d"], writes: Float[Tensor, "K m"], generator: torch.Generator,
    beside: Float[Tensor, "n d"] | None = None, unknown: str = "", subcomponents: int | None = None,
) -> Planted:  # fmt: skip
    """`W_in = Σ_k read_k ⊗ write_k`. A token's embedding is read by its features' pieces with the strengths `z` and by no other (plus what is
    `beside`, which none reads); the output sees what the MLP writes alone, and has to name the token by it."""
    (K, d), m, n = reads.shape, writes.shape[1], len(z)
    x = z @ torch.linalg.pinv(reads).T + (0.0 if beside is None else beside)
    written = x @ reads.T @ writes
    model = build({
        "W_E": torch.cat([x, torch.zeros(n, m)], 1), "W_U": torch.cat([torch.zeros(d, n), SURE * unit(written).T]),
        IN: torch.cat([reads.T @ writes, torch.zeros(m, m)]), OUT: torch.cat([torch.zeros(m, d), torch.eye(m)], 1),
        "blocks.0.mlp.b_in": torch.full((m,), OFFSET), "blocks.0.mlp.b_out": torch.cat([torch.zeros(d), torch.full((m,), -OFFSET)]),
    }, neurons=m)  # fmt: skip
    V = torch.cat([reads.T, torch.zeros(m, K)])
    return Planted(model, any_tokens(n, generator), {IN: (V, writes)}, by_token(IN, (z != 0).float()),
                   subcomponents or max(2 * K, 24), unknown=unknown)  # fmt: skip


def orthogonal_pieces(g: torch.Generator) -> Planted:
    """8 orthogonal pieces in 16 dimensions; a token switches on one."""
    return linear(single(8, 64, g), orthogonal(16, g)[:8], orthogonal(16, g)[:8], g)


def oblique_pieces(g: torch.Generator) -> Planted:
    """8 pieces in 16 dimensions at random angles; a token switches on one."""
    return linear(single(8, 64, g), unit(gaussian(8, 16, generator=g)), unit(gaussian(8, 16, generator=g)), g)


def together(g: torch.Generator) -> Planted:
    """8 pieces in 16 dimensions at random angles; a token switches on one to three."""
    return linear(sets(8, 128, g), unit(gaussian(8, 16, generator=g)), unit(gaussian(8, 16, generator=g)), g)


def uneven(g: torch.Generator) -> Planted:
    """The same, one piece used by many tokens and the last by few (Zipf's shares)."""
    z = sets(8, 128, g, 2, 1 / torch.arange(1, 9))
    return linear(z, unit(gaussian(8, 16, generator=g)), unit(gaussian(8, 16, generator=g)), g)


def nuisance(g: torch.Generator) -> Planted:
    """8 pieces in 16 dimensions; a token switches on one, and moves in 8 directions that no piece reads."""
    frame, z = orthogonal(16, g), single(8, 128, g)
    return linear(z, frame[:8], unit(gaussian(8, 16, generator=g)), g, beside=0.5 * gaussian(128, 8, generator=g) @ frame[8:])


def write_superposition(g: torch.Generator) -> Planted:
    """24 orthogonal pieces that write into 8 dimensions; a token switches on one."""
    return linear(single(24, 72, g), orthogonal(24, g), spread(24, 8, g), g)


def write_superposition_sets(g: torch.Generator) -> Planted:
    """24 orthogonal pieces that write into 12 dimensions; a token switches on one to three."""
    return linear(sets(24, 200, g), orthogonal(24, g), spread(24, 12, g), g)


def both_superposition(g: torch.Generator) -> Planted:
    """24 pieces that read in 12 dimensions and write into 12; a token points where one piece reads."""
    reads, writes, z = spread(24, 12, g), spread(24, 12, g), single(24, 72, g)
    case = linear(z, reads, writes, g)
    return Planted(**{**vars(case), "unknown": "a linear map that reads in superposition acts with all of its pieces at every token"})


# --- neurons: what is read in superposition is told apart by a threshold ---


def relu_neurons(g: torch.Generator) -> Planted:
    """20 ReLU neurons that read in 12 dimensions and write into 12 others: superposition in both, and each token wakes one neuron."""
    K, d = 20, 12
    reads, writes, z = spread(K, d, g), spread(K, d, g), single(K, 80, g)
    x = z @ reads
    threshold = 1.05 * float((x @ reads.T)[z == 0].max())
    woken = torch.relu(x @ reads.T - threshold)
    model = build({
        "W_E": torch.cat([x, torch.zeros(len(x), d)], 1), "W_U": torch.cat([torch.zeros(d, len(x)), 2 * SURE * unit(woken @ writes).T]),
        IN: torch.cat([reads.T, torch.zeros(d, K)]), OUT: torch.cat([torch.zeros(K, d), writes], 1),
        "blocks.0.mlp.b_in": torch.full((K,), -threshold),
    }, neurons=K)  # fmt: skip
    on = (z != 0).float()
    truth = {IN: (torch.cat([reads.T, torch.zeros(d, K)]), torch.eye(K)), OUT: (torch.eye(K), torch.cat([torch.zeros(K, d), writes], 1))}
    return Planted(model, any_tokens(len(z), g), truth, lambda tokens: {site: on[tokens] for site in truth}, 40)


def toy_superposition(g: torch.Generator) -> Planted:
    """The toy model of superposition: 5 continuous sparse features in 2 dimensions and back, with a ReLU (the pentagon, which training finds)."""
    K, n = 5, 200
    angles = 2 * math.pi * torch.arange(K) / K
    corners = torch.stack([angles.cos(), angles.sin()], 1)
    z, frame = single(K, n, g, 0.4, 1.5), orthogonal(K, g)
    threshold = 1.02 * 1.5 * math.cos(2 * math.pi / K)
    d = K + 2 + K
    first, second = torch.zeros(d, 7), torch.zeros(d, 7)
    first[:K, :2], second[K : K + 2, :K] = frame.T @ corners, corners.T
    out0, out1 = torch.zeros(7, d), torch.zeros(7, d)
    out0[:2, K : K + 2], out1[:K, K + 2 :] = torch.eye(2), torch.eye(K)
    b_out = torch.zeros(d)
    b_out[K : K + 2] = -OFFSET
    answers = torch.zeros(d, n)
    answers[K + 2 :, :K] = SURE * torch.eye(K)
    model = build({
        "W_E": torch.cat([z @ frame, torch.zeros(n, 7)], 1), "W_U": answers, "b_U": torch.cat([torch.zeros(K), torch.full((n - K,), NEVER)]),
        IN: first, OUT: out0, IN1: second, "blocks.1.mlp.W_out": out1, "blocks.0.mlp.b_in": torch.full((7,), OFFSET) * (first.abs().sum(0) > 0),
        "blocks.0.mlp.b_out": b_out, "blocks.1.mlp.b_in": torch.full((7,), -threshold),
    }, layers=2, neurons=7)  # fmt: skip
    pre = z @ corners @ corners.T
    on, awake = (z != 0) & (pre > threshold), pre > threshold
    V0, V1 = torch.zeros(d, K), torch.zeros(d, K)
    V0[:K], V1[K : K + 2] = frame.T, corners.T
    truth = {IN: (V0, torch.cat([corners, torch.zeros(K, 5)], 1)), IN1: (V1, torch.eye(7)[:K])}
    return Planted(model, any_tokens(n, g), truth, lambda t: {IN: on[t].float(), IN1: awake[t].float()}, 16)


def residual_mlp(g: torch.Generator) -> Planted:
    """The residual MLP of the SPD papers, small: 16 features of continuous values of either sign, at once one to three; a neuron rectifies each."""
    K, n = 16, 256
    z = sets(K, n, g) * torch.where(torch.rand(n, K, generator=g) < 0.3, -1.0, 1.0)
    frame, out = unit(orthogonal(K, g) + 0.1 * gaussian(K, K, generator=g)), orthogonal(K, g)
    x = z @ torch.linalg.pinv(frame).T
    rectified = torch.relu(z)
    model = build({
        "W_E": torch.cat([x, 0.2 * z @ out], 1), "W_U": torch.cat([torch.zeros(K, n), SURE * unit(rectified @ out + 0.2 * z @ out).T]),
        IN: torch.cat([frame.T, torch.zeros(K, K)]), OUT: torch.cat([torch.zeros(K, K), out], 1),
    }, neurons=K)  # fmt: skip
    on = (z > 0).float()
    truth = {IN: (torch.cat([frame.T, torch.zeros(K, K)]), torch.eye(K)), OUT: (torch.eye(K), torch.cat([torch.zeros(K, K), out], 1))}
    return Planted(model, any_tokens(n, g), truth, lambda tokens: {site: on[tokens] for site in truth}, 32)


# --- interactions: two features, one neuron ---

GATE = "blocks.0.mlp.W_gate"


def _pairs(K: int) -> Float[Tensor, "n features"]:
    """Every choice of one or none of K features, with one or none of K others."""
    one = torch.cat([torch.zeros(1, K), torch.eye(K)])
    return torch.cat([one.repeat_interleave(K + 1, 0), one.repeat(K + 1, 1)], 1)


def product(g: torch.Generator) -> Planted:
    """A gated MLP multiplies feature a_k by feature b_k; a token has one of each, or of one kind alone."""
    K = 8
    z = torch.cat([_pairs(K), _pairs(K)[[i * (K + 2) for i in range(1, K + 1)]].repeat(4, 1)])
    n, frame, out = len(z), orthogonal(2 * K, g), orthogonal(K, g)
    z = z * (0.7 + 0.6 * torch.rand(n, 1, generator=g))
    done = z[:, :K] * z[:, K:]
    wide = torch.zeros(K, K)
    model = build({
        "W_E": torch.cat([z @ frame, torch.zeros(n, K)], 1), "W_U": _answers(2 * K, out, n),
        "b_U": _only(K, n), GATE: torch.cat([frame[:K].T, wide]), IN: torch.cat([frame[K:].T, wide]), OUT: torch.cat([torch.zeros(K, 2 * K), out], 1),
    }, neurons=K, gated=True)  # fmt: skip
    on = (done > 0).float()
    truth = {GATE: (torch.cat([frame[:K].T, wide]), torch.eye(K)), IN: (torch.cat([frame[K:].T, wide]), torch.eye(K))}
    return Planted(model, any_tokens(n, g), truth, lambda tokens: {site: on[tokens] for site in truth}, 24)


def _answers(d: int, out: Float[Tensor, "K m"], n: int) -> Tensor:
    """`W_U`: the first K outputs read these directions, behind d others."""
    return torch.cat([torch.zeros(d, n), torch.cat([SURE * out.T, torch.zeros(out.shape[1], n - len(out))], 1)])


def _only(K: int, n: int) -> Tensor:
    """`b_U`: the first K outputs are answers."""
    return torch.cat([torch.zeros(K), torch.full((n - K,), NEVER)])


def conjunction(g: torch.Generator) -> Planted:
    """AND: neuron k is awake where a_k and b_k are both there, and reads their sum."""
    K = 6
    z = torch.cat([_pairs(K), _pairs(K)[[i * (K + 2) for i in range(1, K + 1)]].repeat(4, 1)])
    n, frame, out = len(z), orthogonal(2 * K, g), orthogonal(K, g)
    reads = frame[:K] + frame[K:]
    z = z * (
        0.8 + 0.4 * torch.rand(z.shape, generator=g)
    )  # each by its own amount: only so does the output tell which of the two is read how much
    x = z @ frame
    model = build({
        "W_E": torch.cat([x, torch.zeros(n, K)], 1), "W_U": _answers(2 * K, 2 * out, n), "b_U": _only(K, n),
        IN: torch.cat([reads.T, torch.zeros(K, K)]), OUT: torch.cat([torch.zeros(K, 2 * K), out], 1), "blocks.0.mlp.b_in": torch.full((K,), -1.5),
    }, neurons=K)  # fmt: skip
    on = (x @ reads.T > 1.5).float()
    return Planted(model, any_tokens(n, g), {IN: (torch.cat([reads.T, torch.zeros(K, K)]), torch.eye(K))}, by_token(IN, on), 24)


def disjunction(g: torch.Generator) -> Planted:
    """OR: of two pieces that say the same, either suffices: layer 1 has enough of one (`1 - relu(1 - a - b)`). Where both are there, either is right."""
    K = 6
    z = torch.cat([torch.eye(2 * K).repeat(3, 1), torch.cat([torch.eye(K), torch.eye(K)], 1)])
    n, frame, out = len(z), orthogonal(2 * K, g), orthogonal(K, g)
    d = 4 * K
    first, second, out0, out1 = torch.zeros(d, 2 * K), torch.zeros(d, 2 * K), torch.zeros(2 * K, d), torch.zeros(2 * K, d)
    first[: 2 * K] = frame.T
    out0[:, 2 * K : 3 * K] = torch.cat([torch.eye(K), torch.eye(K)])
    second[2 * K : 3 * K, :K], out1[:K, 3 * K :] = -torch.eye(K), -out
    model = build({
        "W_E": torch.cat([z @ frame, torch.zeros(n, d - 2 * K)], 1), "W_U": _answers(3 * K, out, n), "b_U": _only(K, n),
        IN: first, OUT: out0, IN1: second, "blocks.1.mlp.W_out": out1, "blocks.1.mlp.b_in": (torch.arange(2 * K) < K).float(),
    }, layers=2, neurons=2 * K)  # fmt: skip
    both = (z[:, :K] + z[:, K:] > 1.5).repeat(1, 2)
    return Planted(model, any_tokens(n, g), {IN: (torch.eye(d)[:, : 2 * K] @ frame.T, torch.eye(2 * K))},
                   by_token(IN, z.masked_fill(both & (z > 0), EITHER)), 24)  # fmt: skip


# --- attention ---


def ov_copy(g: torch.Generator) -> Planted:
    """A head that attends everywhere alike and copies 8 of 12 tokens: an OV circuit of 8 directions."""
    K, n, length = 8, 12, 4
    frame, inner, out = orthogonal(n, g), orthogonal(K, g), orthogonal(K, g)
    W_V, W_O = torch.cat([frame[:K].T @ inner, torch.zeros(K, K)]), torch.cat([torch.zeros(K, n), inner.T @ out], 1)
    model = build({
        "W_E": torch.cat([frame, torch.zeros(n, K)], 1), "W_U": _answers(n, 1.5 * out, n),
        "blocks.0.attn.W_V": W_V, "blocks.0.attn.W_O": W_O,
    }, head=K, length=length)  # fmt: skip
    tokens = any_tokens(n, g, length)

    def active(tokens: Tensor) -> dict[str, Tensor]:
        here = torch.eye(n)[tokens][..., :K]
        return {"blocks.0.attn.W_V": here, "blocks.0.attn.W_O": (here.cumsum(1) > 0).float()}

    truth = {"blocks.0.attn.W_V": (torch.cat([frame[:K].T, torch.zeros(K, K)]), inner),
             "blocks.0.attn.W_O": (inner.T, torch.cat([torch.zeros(K, n), out], 1))}  # fmt: skip
    return Planted(model, tokens, truth, active, 20)


def qk_match(g: torch.Generator) -> Planted:
    """The last token asks for one of 8 keys, and the model says where it stands: a QK circuit of 8 pairs."""
    K, length = 8, 6
    frame, inner, out = orthogonal(2 * K + length, g), orthogonal(K, g), orthogonal(length, g)
    n, d, scale = 2 * K, 2 * K + 2 * length, (SHARP * K**0.5) ** 0.5

    def reads(rows: Tensor) -> Tensor:
        return torch.cat([rows.T, torch.zeros(length, len(rows))])

    places = torch.cat([frame[2 * K :], torch.zeros(length, length)], 1)
    model = build({
        "W_E": torch.cat([frame[:n], torch.zeros(n, length)], 1), "W_pos": places, "W_U": _answers(d - length, out, n), "b_U": _only(length, n),
        "blocks.0.attn.W_Q": scale * reads(frame[K:n]) @ inner, "blocks.0.attn.W_K": scale * reads(frame[:K]) @ inner,
        "blocks.0.attn.W_V": torch.cat([reads(frame[n:]), torch.zeros(d, K - length)], 1),
        "blocks.0.attn.W_O": torch.cat([torch.cat([torch.zeros(length, d - length), out], 1), torch.zeros(K - length, d)]),
    }, head=K, length=length)  # fmt: skip
    keys = torch.rand(SEQUENCES, K, generator=g).argsort(1)[:, : length - 1]
    asked = keys.gather(1, torch.randint(length - 1, (SEQUENCES, 1), generator=g)) + K

    def active(tokens: Tensor) -> dict[str, Tensor]:
        one = torch.eye(n)[tokens]
        return {"blocks.0.attn.W_Q": one[..., K:], "blocks.0.attn.W_K": one[..., :K]}

    truth = {"blocks.0.attn.W_Q": (scale * reads(frame[K:n]), inner), "blocks.0.attn.W_K": (scale * reads(frame[:K]), inner)}
    return Planted(model, torch.cat([keys, asked], 1), truth, active, 20, outputs="last")


def previous_token(g: torch.Generator) -> Planted:
    """Every position attends to the one before it and says its token: a QK circuit by position."""
    n, length = 10, 6
    frame, inner, out = orthogonal(n + length, g), orthogonal(length, g), orthogonal(n, g)
    scale = (SHARP * n**0.5) ** 0.5
    inner = torch.cat([inner, torch.zeros(length, n - length)], 1)

    def reads(rows: Tensor) -> Tensor:
        return torch.cat([rows.T, torch.zeros(n, len(rows))])

    places = frame[n:]
    model = build({
        "W_E": torch.cat([frame[:n], torch.zeros(n, n)], 1), "W_pos": torch.cat([places, torch.zeros(length, n)], 1),
        "W_U": _answers(n + length, out, n), "blocks.0.attn.W_Q": scale * reads(places[1:]) @ inner[1:],
        "blocks.0.attn.W_K": scale * reads(places[:-1]) @ inner[1:], "blocks.0.attn.W_V": reads(frame[:n]),
        "blocks.0.attn.W_O": torch.cat([torch.zeros(n, n + length), out], 1),
    }, head=n, length=length)  # fmt: skip
    where = torch.eye(length)
    asks, answers = where[:, 1:].clone(), where[:, :-1]

    def active(tokens: Tensor) -> dict[str, Tensor]:
        return {"blocks.0.attn.W_Q": asks.expand(len(tokens), -1, -1), "blocks.0.attn.W_K": answers.expand(len(tokens), -1, -1)}

    truth = {"blocks.0.attn.W_Q": (scale * reads(places[1:]), inner[1:]), "blocks.0.attn.W_K": (scale * reads(places[:-1]), inner[1:])}
    return Planted(model, any_tokens(n, g, length), truth, active, 16)


def induction_by_hand(g: torch.Generator) -> Planted:
    """Two layers: every token learns which one stood before it (by position); the last, which was there already, finds what followed it."""
    n, length = 8, 8  # tokens, and a first one that begins every sequence
    d, scale = 4 * n, (SHARP * n**0.5) ** 0.5
    frame, h = orthogonal(d, g), orthogonal(n, g)
    token, place, before, out = frame.split(n)
    sites = {
        "blocks.0.attn.W_Q": (scale * place[1:].T, h[1:]), "blocks.0.attn.W_K": (scale * place[:-1].T, h[1:]), "blocks.0.attn.W_V": (token.T, h),
        "blocks.1.attn.W_Q": (scale * token.T, h), "blocks.1.attn.W_K": (scale * before.T, h), "blocks.1.attn.W_V": (token.T, h),
    }  # fmt: skip
    model = build({
        "W_E": torch.cat([token, torch.zeros(1, d)]), "W_pos": place, "W_U": torch.cat([SURE * out.T, torch.zeros(d, 1)], 1),
        "b_U": _only(n, n + 1), **{site: V @ U for site, (V, U) in sites.items()},
        "blocks.0.attn.W_O": h.T @ before, "blocks.1.attn.W_O": h.T @ out,
    }, layers=2, head=n, length=length)  # fmt: skip
    middle = torch.rand(SEQUENCES, n, generator=g).argsort(1)[:, : length - 2]
    again = middle.gather(1, torch.randint(length - 3, (SEQUENCES, 1), generator=g))
    tokens = torch.cat([torch.full((SEQUENCES, 1), n), middle, again], 1)

    def active(tokens: Tensor) -> dict[str, Tensor]:
        one = torch.eye(n + 1)[tokens][..., :n]
        earlier = torch.cat([torch.zeros_like(one[:, :1]), one[:, :-1]], 1)
        where = torch.eye(length).expand(len(tokens), -1, -1)
        asks, answers, flags, keys, copies = where[..., 1:].clone(), where[..., :-1].clone(), one.clone(), earlier.clone(), one.clone()
        asks[:, -1], answers[:, -2], flags[:, -2:], keys[:, -1], copies[:, 1], copies[:, -1] = (EITHER,) * 6
        last = one.clone()
        last[:, :-1] = 0
        return dict(zip(sites, (asks, answers, flags, last, keys, copies)))

    return Planted(model, tokens, sites, active, 20, outputs="last")


def skip_trigram(g: torch.Generator) -> Planted:
    """`A_k … B → C_k` through attention, and `D_k → E_k` through the MLP: which of the two acts where is known."""
    K, length = 4, 6
    n, d = 5 * K + 1, 2 * K + 1 + 2 * K  # A, D, C, E, others, B; the model sees A, D and B apart, and has C and E to write
    frame, h, inner = orthogonal(2 * K + 1, g), orthogonal(K + 1, g), orthogonal(K, g)
    a, b, dd = frame[:K], frame[K : K + 1], frame[K + 1 :]
    out = orthogonal(2 * K, g)
    wide = torch.zeros(2 * K, K)

    def reads(rows: Tensor) -> Tensor:
        return torch.cat([rows.T, torch.zeros(2 * K, len(rows))])

    scale = (SHARP * (K + 1) ** 0.5) ** 0.5
    W_E = torch.zeros(n, d)
    W_E[:K, : 2 * K + 1], W_E[K : 2 * K, : 2 * K + 1], W_E[-1, : 2 * K + 1] = a, dd, b[0]
    W_U = torch.zeros(d, n)
    W_U[2 * K + 1 :, 2 * K : 4 * K] = SURE * out.T
    b_U = torch.full((n,), NEVER)
    b_U[2 * K : 4 * K] = 0
    W_out = torch.cat([torch.zeros(K, 2 * K + 1), out[K:]], 1)
    model = build({
        "W_E": W_E, "W_U": W_U, "b_U": b_U, "blocks.0.attn.W_Q": scale * reads(b) @ h[:1], "blocks.0.attn.W_K": scale * reads(a.sum(0, keepdim=True)) @ h[:1],
        "blocks.0.attn.W_V": torch.cat([torch.cat([a.T @ inner, wide]), torch.zeros(d, 1)], 1),
        "blocks.0.attn.W_O": torch.cat([torch.cat([torch.zeros(K, 2 * K + 1), inner.T @ out[:K]], 1), torch.zeros(1, d)]),
        IN: reads(dd), OUT: W_out,
    }, head=K + 1, neurons=K, length=length)  # fmt: skip
    tokens = torch.randint(K, n, (SEQUENCES, length), generator=g)
    rows = torch.arange(SEQUENCES)
    tokens[rows, torch.randint(length - 1, (SEQUENCES,), generator=g)] = torch.randint(K, (SEQUENCES,), generator=g)
    asks = torch.rand(SEQUENCES, generator=g) < 0.6
    tokens[asks, -1] = n - 1

    def active(tokens: Tensor) -> dict[str, Tensor]:
        one = torch.eye(n)[tokens]
        return {"blocks.0.attn.W_Q": one[..., -1:], "blocks.0.attn.W_K": one[..., :K].sum(-1, keepdim=True),
                "blocks.0.attn.W_V": one[..., :K], IN: one[..., K : 2 * K]}  # fmt: skip

    truth = {"blocks.0.attn.W_Q": (scale * reads(b), h[:1]), "blocks.0.attn.W_K": (scale * reads(a.sum(0, keepdim=True)), h[:1]),
             "blocks.0.attn.W_V": (reads(a), torch.cat([inner, torch.zeros(K, 1)], 1)), IN: (reads(dd), torch.eye(K))}  # fmt: skip
    return Planted(model, tokens, truth, active, 16)


# --- controls ---


def random_matrix(g: torch.Generator) -> Planted:
    """A random matrix, random inputs."""
    return linear(gaussian(64, 16, generator=g), orthogonal(16, g), gaussian(16, 16, generator=g) / 4, g, subcomponents=24,
                  unknown="every input uses every direction of a random matrix, so no basis of it is better than another")  # fmt: skip


def low_rank(g: torch.Generator) -> Planted:
    """A dense matrix of rank 4, random inputs."""
    reads, writes = unit(gaussian(4, 16, generator=g)), unit(gaussian(4, 16, generator=g))
    return linear(gaussian(64, 4, generator=g), reads, writes, g, beside=0.5 * gaussian(64, 16, generator=g), subcomponents=24,
                  unknown="every input uses all four directions, so any four that span them do as well")  # fmt: skip


CASES: dict[str, Callable[[torch.Generator], Planted]] = {
    "orthogonal": orthogonal_pieces, "oblique": oblique_pieces, "together": together, "uneven": uneven, "nuisance": nuisance,
    "write-superposition": write_superposition, "write-superposition-sets": write_superposition_sets, "both-superposition": both_superposition,
    "relu-neurons": relu_neurons, "toy-superposition": toy_superposition, "residual-mlp": residual_mlp,
    "product": product, "and": conjunction, "or": disjunction,
    "ov-copy": ov_copy, "qk-match": qk_match, "previous-token": previous_token, "induction": induction_by_hand, "skip-trigram": skip_trigram,
    "random-matrix": random_matrix, "low-rank": low_rank,
}  # fmt: skip


def plant(name: str, seed: int) -> Planted:
    with plainly():
        return CASES[name](torch.Generator("cpu").manual_seed(seed))


# --- measuring ---


@dataclass(frozen=True, eq=False)
class Score:
    """A decomposition beside the truth.

    Attributes:
        recovery: which pieces come back; None where the truth does not follow from what the model does.
        true_active, active: mean number per position, of pieces and of subcomponents (g > 0.5).
        true_distinct, distinct: how many there are.
        precision, recall: of importance against true activity, position by position: each active subcomponent speaks for the piece that it is most
            like; where either is right nothing is counted.
        seconds: of the decomposition.
    """

    recovery: Recovery | None
    true_active: float
    active: float
    true_distinct: int
    distinct: int
    precision: float
    recall: float
    verification: Verification
    seconds: float

    @property
    def f1(self) -> float:
        return 2 * self.precision * self.recall / max(1e-12, self.precision + self.recall)

    def results(self) -> dict[str, Any]:
        """One entry of `results.json`; what is not identifiable is null."""
        known = self.recovery is not None
        return {
            "true_active": self.true_active, "active": self.active, "true_distinct": self.true_distinct, "distinct": self.distinct,
            "recovered": self.recovery.mean if self.recovery else None, "above_0.9": self.recovery.above if self.recovery else None,
            "back": self.recovery.back if self.recovery and self.distinct else None, "importance_precision": self.precision if known else None,
            "importance_recall": self.recall if known else None, "importance_f1": self.f1 if known else None,
            "verification": self.verification.as_dict(), "seconds": self.seconds,
        }  # fmt: skip


@torch.no_grad()
def measure(d: Decomposition, case: Planted, tokens: Int[Tensor, "b s"], seconds: float | int = 0.0) -> Score:
    """`d` against the truth of its case on these tokens."""
    recovery = recovered(d, case.truth, tokens)
    importances, acting = d.importances(tokens), case.active(tokens)
    hits = said = meant = 0
    for name, alike in recovery.likeness.items():
        on = importances[name][..., recovery.active[name]] > THRESHOLD
        speaks = torch.zeros(*on.shape[:2], len(alike))
        if recovery.active[name]:
            speaks.index_add_(-1, alike.argmax(0), on.float())
        truth = acting[name]
        hits += int(((speaks > 0) & (truth == 1)).sum())
        said += int(((speaks > 0) & ~truth.isnan()).sum())
        meant += int((truth == 1).sum())
    with torch.enable_grad():
        verification = verify(d, tokens)
    return Score(
        None if case.unknown else recovery, sum(float((a == 1).sum()) for a in acting.values()) / tokens.numel(), sum(verification.l0.values()),
        recovery.total, sum(map(len, recovery.active.values())), hits / max(1, said), hits / max(1, meant), verification, float(seconds),
    )  # fmt: skip


def configs(case: Planted, seed: int, changes: Mapping[str, Any]) -> dict[str, SPDConfig]:
    """What a case is decomposed with: the recipe for pieces, and what stands beside it: the singular vectors untrained, the defaults, the settings
    of the papers (SPD, arXiv 2506.20790 and 2511.08854; adversarial as in VPD, as far as our losses go: its frequency term is not among them), all
    with as many steps, sequences and subcomponents."""
    own = {"sites": tuple(case.truth), "subcomponents": case.subcomponents, "output_positions": case.outputs, "seed": seed, **changes}
    recipe = SPDConfig.pieces(**own)
    same = {**own, "steps": recipe.steps, "batch_size": recipe.batch_size}
    spd = SPDConfig.paper(**same)
    return {
        "pieces": recipe, "SVD": SPDConfig(**{**same, "steps": 0, "init": "svd"}), "defaults": SPDConfig(**same), "SPD": spd,
        "VPD-like": spd.replace(weights={"faithfulness": 1e3, "stochastic": 1.0, "adversarial": 0.5, "minimality": 0.02}),
    }  # fmt: skip


def run(name: str, seed: int, method: str, progress: bool = False, **changes: Any) -> Score:
    """Plant, decompose, measure."""
    case = plant(name, seed)
    start = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what `decompose` would warn of is what is measured
        d = decompose(case.model, case.tokens, configs(case, seed, changes)[method], progress=progress)
    return measure(d, case, case.tokens[:MEASURED], time.perf_counter() - start)


METHODS = ("SVD", "defaults", "SPD", "VPD-like")  # beside the recipe


def table(results: Mapping[str, Any]) -> pd.DataFrame:
    """A row per case and method of `results.json`: of several seeds the mean of each figure; beside each count the true one and what it survives."""
    rows = {}
    for case, found in results.items():
        for method, runs in {"pieces": found["seeds"], **{name: [one] for name, one in found["baselines"].items()}}.items():

            def mean(*path: str, runs: Any = runs) -> float:
                values = [float(math.nan if one is None else one) for run in runs for one in [_dig(run, path)]]
                return sum(values) / len(values)

            unknown = runs[0]["recovered"] is None
            rows[f"{case}, {method}"] = {
                "recovered": "not identifiable" if unknown else f"{mean('recovered'):.3f}",
                "above 0.9": "" if unknown else f"{mean('above_0.9'):.3g} of {runs[0]['true_distinct']}", "back": f"{mean('back'):.2f}",
                "F1": f"{mean('importance_f1'):.3f}", "active (true)": f"{mean('active'):.2f} ({mean('true_active'):.2f})",
                "distinct (true)": f"{mean('distinct'):.3g} ({mean('true_distinct'):.0f})",
                **{label: f"{mean('verification', name):.1e}" for name, label in (("kl_hard", "hard"), ("kl_alive_only", "alive-only"), ("kl_adversarial", "adversarial"))},
                "seconds": f"{mean('seconds'):.0f}",
            }  # fmt: skip
    return pd.DataFrame.from_dict(rows, orient="index").replace("nan", "").rename_axis("case, method")


def _dig(run: Any, path: tuple[str, ...]) -> Any:
    for key in path:
        run = run[key]
    return run


def chosen(given: str | None) -> list[str]:
    """The cases of a comma-separated list, all where none is given."""
    names = list(CASES) if given is None else given.split(",")
    for name in names:
        if name not in CASES:
            raise SPDError(f"there is no planted case {name!r}; {nearest(name, CASES)}.")
    return names
