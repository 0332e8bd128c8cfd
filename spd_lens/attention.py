"""What a pair of Q and K subcomponents attends to when it makes the scores alone.

The model runs once with everything as it is, and once a pair with W_Q and W_K of the layer replaced by one subcomponent each, without the delta:
rotary positions, scale, mask and biases are the model's own. Beside it stands the pattern of the head in which the pair scores most.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from spd_lens.decomposition import Decomposition
from spd_lens.errors import SPDError
from spd_lens.guards import steady
from spd_lens.labels import token_labels
from spd_lens.masks import THRESHOLD

MOST = 5  # pairs, where none are given


@dataclass(frozen=True, eq=False)
class PairAttention:
    """Attention patterns of one layer on one prompt.

    Attributes:
        layer: which.
        labels: a readable token for each position.
        full: `[h, s, s]`, the original pattern of every head.
        pairs: (subcomponent of W_Q, of W_K), strongest first where they were not given.
        heads: of each pair, the head in which it scores most.
        alone: `[pairs, s, s]`, the pattern that each pair makes alone in that head.
    """

    layer: int
    labels: tuple[str, ...]
    full: Float[Tensor, "h s s"]
    pairs: tuple[tuple[int, int], ...]
    heads: tuple[int, ...]
    alone: Float[Tensor, "n s s"]

    def __repr__(self) -> str:
        return f"PairAttention of layer {self.layer} on {len(self.labels)} tokens: {', '.join(f'Q·{q} × K·{k}' for q, k in self.pairs)}"


@steady()
@torch.no_grad()
def pair_attention(
    d: Decomposition, tokens: Any, layer: int, pairs: Sequence[tuple[int, int]] | None = None, attention_mask: Any = None
) -> PairAttention:
    """The attention that pairs of Q and K subcomponents make alone.

    Args:
        d: with W_Q and W_K of the layer decomposed.
        tokens, attention_mask: `[1, s]`, as `spd_lens.tokens.take_in` takes them; padding is cut off.
        layer: which.
        pairs: (index in W_Q, index in W_K); None: the up to five active pairs whose scores reach farthest on these tokens.

    Raises:
        SPDError: several prompts, W_Q or W_K not decomposed, an unknown index, or no pair that is active.
    """
    batch = d.batch(tokens, attention_mask)
    if len(batch) != 1:
        raise SPDError(f"{len(batch)} prompts were given; attention is shown of one, [1, s]: tokens[:1], or one after the other.")
    tokens = batch.alone().ids
    query, key = (f"blocks.{layer}.attn.W_{matrix}" for matrix in "QK")
    if missing := [name for name in (query, key) if name not in d.sites]:
        raise SPDError(
            f"{', '.join(missing)} not decomposed here ({', '.join(d.sites)} are); choose a layer of which both W_Q and W_K are."
        )
    strength = _strengths(d, tokens, query, key)  # [h, q, k]
    if pairs is None:
        best = strength.amax(0)
        order = best.flatten().argsort(descending=True)[:MOST].tolist()
        pairs = [(i // best.shape[1], i % best.shape[1]) for i in order if best.flatten()[i] > 0]
        if not pairs:
            raise SPDError(f"layer {layer} has no pair of active Q and K subcomponents (g > 0.5) on these tokens; give pairs=[(q, k), …].")
    d.check_chosen({query: [q for q, _ in pairs], key: [k for _, k in pairs]})
    named = f"blocks.{layer}.attn.hook_pattern"

    def pattern(masks: dict[str, Tensor] | None) -> Float[Tensor, "h s s"]:
        return d.run_with_cache(tokens, masks, names_filter=lambda name: name == named)[1][named][0]

    full, heads, alone = pattern(None), [], []
    for q, k in pairs:
        masks = {name: torch.eye(d.components[name].C, dtype=torch.float32, device=tokens.device)[c] for name, c in ((query, q), (key, k))}
        heads.append(int(_scored(d, tokens, query, key, q, k).argmax()))
        alone.append(pattern(masks)[heads[-1]])
    return PairAttention(
        layer, tuple(token_labels(d.model, tokens[0])), full, tuple((int(q), int(k)) for q, k in pairs), tuple(heads), torch.stack(alone)
    )


def _by_head(d: Decomposition, name: str, heads: int) -> Float[Tensor, "C h d_head"]:
    """Rows of U by the query's head: grouped keys are repeated."""
    own = d.sites[name].heads
    return d.components[name].U.detach().unflatten(1, (own, -1)).repeat_interleave(heads // own, 1)


def _strengths(d: Decomposition, tokens: Tensor, query: str, key: str) -> Float[Tensor, "h q k"]:
    """Largest |score| of each pair on these tokens, where both are active; positions as if there were no rotation."""
    seen, heads = d.observe(tokens), d.sites[query].heads
    peak = {name: (seen.inner[name][0].abs() * (seen.importances[name][0] > THRESHOLD)).amax(0) for name in (query, key)}
    gram = torch.einsum("qhd,khd->hqk", _by_head(d, query, heads), _by_head(d, key, heads)).abs()
    return gram * peak[query][:, None] * peak[key]


def _scored(d: Decomposition, tokens: Tensor, query: str, key: str, q: int, k: int) -> Float[Tensor, " h"]:
    heads = d.sites[query].heads
    return (_by_head(d, query, heads)[q] * _by_head(d, key, heads)[k]).sum(-1).abs()
