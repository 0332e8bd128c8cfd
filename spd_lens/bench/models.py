"""A model of GPT-2's shape with random weights, built offline, of either class of TransformerLens."""

import contextlib
import io
from typing import Any

import torch
from transformer_lens.model_bridge.sources import build_bridge_from_module

from spd_lens.errors import SPDError, nearest
from spd_lens.guards import seeded

try:
    from transformer_lens import HookedTransformer, HookedTransformerConfig
except ImportError:  # transformer-lens 4.x
    HookedTransformer = HookedTransformerConfig = None

CLASSES = ("HookedTransformer", "TransformerBridge") if HookedTransformer is not None else ("TransformerBridge",)
LAYERS, WIDTH, VOCABULARY, HEAD = 12, 768, 50257, 64  # GPT-2 small


def check_class(kind: str) -> None:
    if kind not in CLASSES:
        raise SPDError(
            f"the model's class was given as {kind!r}; this transformer-lens has {', '.join(CLASSES)} ({nearest(kind, CLASSES)})."
        )


def gpt2(
    kind: str, layers: int = LAYERS, width: int = WIDTH, vocabulary: int = VOCABULARY, context: int = 1024, device: str = "cpu"
) -> Any:
    """Learned positions, LayerNorm, `gelu_new`, heads of 64, an MLP four times as wide; small by default."""
    heads, head = (width // HEAD, HEAD) if width % HEAD == 0 else (1, width)
    # both classes announce things, and neither may move the caller's random numbers
    with contextlib.redirect_stdout(io.StringIO()), seeded(0):
        if kind == "HookedTransformer" and HookedTransformer is not None and HookedTransformerConfig is not None:
            config = HookedTransformerConfig(
                n_layers=layers, d_model=width, n_heads=heads, d_head=head, d_mlp=4 * width, d_vocab=vocabulary, n_ctx=context,
                act_fn="gelu_new", normalization_type="LN", seed=0, device="cpu",
            )  # fmt: skip
            return HookedTransformer(config).to(device).eval()
        return _wrapped(layers, width, heads, vocabulary, context).to(device).eval()


def _wrapped(layers: int, width: int, heads: int, vocabulary: int, context: int) -> Any:
    """As `TransformerBridge.boot_transformers("gpt2")`, without the download."""
    import transformers

    eager: dict[str, Any] = dict(attn_implementation="eager")  # as the Bridge loads it: a fused kernel has no pattern to hook
    config = transformers.GPT2Config(
        n_layer=layers, n_embd=width, n_head=heads, vocab_size=vocabulary, n_positions=context, bos_token_id=0, eos_token_id=0, **eager
    )
    module = transformers.GPT2LMHeadModel(config).eval()
    return build_bridge_from_module(module, type(module).__name__, hf_config=config)


def random_tokens(batch: int, length: int, vocabulary: int, device: str) -> torch.Tensor:
    return torch.randint(vocabulary, (batch, length), generator=torch.Generator().manual_seed(0), device="cpu").to(device)
