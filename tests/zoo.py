"""Small models of every architecture that `sites.py` serves, built offline with random weights."""

from collections.abc import Callable
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.model_bridge.sources import build_bridge_from_module
from transformers import PreTrainedTokenizerFast

try:
    from transformer_lens import HookedTransformer, HookedTransformerConfig
except ImportError:
    HookedTransformer = None
try:
    from transformer_lens.config import TransformerBridgeConfig
except ImportError:
    from transformer_lens.config.transformer_bridge_config import TransformerBridgeConfig

VOCABULARY, CONTEXT = 50, 24
SHAPE = dict(n_layers=2, d_model=32, n_heads=4, d_head=8, d_mlp=48, d_vocab=VOCABULARY, n_ctx=CONTEXT, act_fn="gelu")


def tokens(batch: int = 3, length: int = 11, seed: int = 0) -> torch.Tensor:
    return torch.randint(VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


def randomised(model: Any) -> Any:
    """Biases and norms are constants at birth, and a wrong place for them would not show: make them random."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model


def hooked(**changes: Any) -> Any:
    torch.manual_seed(0)
    return randomised(HookedTransformer(HookedTransformerConfig(**{**SHAPE, "seed": 0, "device": "cpu", **changes})))


def folded(**changes: Any) -> Any:
    """As `from_pretrained` does by default: LayerNorm's weights folded, writing weights centred."""
    model = hooked(normalization_type="LN", **changes)
    model.load_and_process_state_dict(model.state_dict(), fold_ln=True, center_writing_weights=True, fold_value_biases=True)
    return model


def native(**changes: Any) -> Any:
    torch.manual_seed(0)
    config = TransformerBridgeConfig(**{**SHAPE, "architecture": "TransformerLensNative", "normalization_type": "LN", **changes})
    return randomised(TransformerBridge.boot_native(config, device="cpu")).eval()


def wrapped(kind: str, processing: bool | None = None, **flags: bool) -> Any:
    """A TransformerBridge around a Hugging Face model; `processing` None leaves compatibility mode off."""
    import transformers

    torch.manual_seed(0)
    common = dict(vocab_size=VOCABULARY, attn_implementation="eager")
    wide = dict(num_hidden_layers=2, num_attention_heads=4, hidden_size=32, intermediate_size=48, max_position_embeddings=CONTEXT)
    match kind:
        case "gpt2":
            config = transformers.GPT2Config(n_layer=2, n_head=4, n_embd=32, n_positions=CONTEXT, **common)
            module = transformers.GPT2LMHeadModel(config)
        case "llama":
            config = transformers.LlamaConfig(num_key_value_heads=2, **wide, **common)
            module = transformers.LlamaForCausalLM(config)
        case "neox":
            config = transformers.GPTNeoXConfig(**wide, **common)
            module = transformers.GPTNeoXForCausalLM(config)
        case _:
            raise ValueError(kind)
    bridge = build_bridge_from_module(randomised(module.eval()), type(module).__name__, hf_config=config)
    if processing is not None:
        bridge.enable_compatibility_mode(no_processing=not processing)
    for flag, value in flags.items():
        getattr(bridge, f"set_{flag}")(value)
    return bridge


def tokenizer(side: str, pad: str = "<pad>") -> PreTrainedTokenizerFast:
    """Words w0, w1, … of the vocabulary; any other is unknown."""
    words = ["<bos>", "<eos>", "<pad>", "<unk>", *(f"w{i}" for i in range(VOCABULARY - 4))]
    raw = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<bos>", eos_token="<eos>", pad_token=pad, unk_token="<unk>", padding_side=side,
                                   name_or_path="words", add_bos_token=True)  # fmt: skip


def reading(side: str, pad: str = "<pad>", model: Any = None) -> Any:
    """A model that reads text."""
    model = model or (hooked(normalization_type="LN") if HookedTransformer is not None else wrapped("gpt2", processing=True))
    if hasattr(model, "set_tokenizer"):
        model.set_tokenizer(tokenizer(side, pad), default_padding_side=side)
    else:
        model.tokenizer = tokenizer(side, pad)
    return model


HOOKED: dict[str, Callable[[], Any]] = {
    "standard": lambda: hooked(normalization_type="LN"),
    "folded": folded,
    "no-norm": lambda: hooked(normalization_type=None),
    "rms": lambda: hooked(normalization_type="RMS", final_rms=True),
    "rotary": lambda: hooked(normalization_type="LN", positional_embedding_type="rotary", rotary_dim=8),
    "shortformer": lambda: hooked(normalization_type="LN", positional_embedding_type="shortformer"),
    "shortformer-attn-only": lambda: hooked(normalization_type=None, positional_embedding_type="shortformer", attn_only=True),
    "grouped": lambda: hooked(normalization_type="RMS", n_key_value_heads=2, positional_embedding_type="rotary", rotary_dim=8),
    "gated": lambda: hooked(normalization_type="RMS", gated_mlp=True, act_fn="silu"),
    "parallel": lambda: hooked(normalization_type="LN", parallel_attn_mlp=True),
    "bidirectional": lambda: hooked(normalization_type="LN", attention_dir="bidirectional"),
    "split": lambda: hooked(normalization_type="LN", use_split_qkv_input=True),
    "split-grouped": lambda: hooked(normalization_type="LN", use_split_qkv_input=True, n_key_value_heads=2),
    "split-shortformer": lambda: hooked(normalization_type="LN", use_split_qkv_input=True, positional_embedding_type="shortformer"),
    "attn-in": lambda: hooked(normalization_type="LN", use_attn_in=True),
    "attn-result": lambda: hooked(normalization_type="LN", use_attn_result=True),
    "mlp-in": lambda: hooked(normalization_type="LN", use_hook_mlp_in=True),
}
BRIDGED: dict[str, Callable[[], Any]] = {
    "native": native,
    "native-no-norm": lambda: native(normalization_type=None),
    "native-rms": lambda: native(normalization_type="RMS", final_rms=True),
    "native-rotary": lambda: native(positional_embedding_type="rotary", rotary_dim=8),
    "native-gated": lambda: native(gated_mlp=True, act_fn="silu"),
    "native-grouped": lambda: native(n_key_value_heads=2),
    "native-attn-only": lambda: native(attn_only=True),
    "native-bidirectional": lambda: native(attention_dir="bidirectional"),
}
for _kind in ("gpt2", "llama", "neox"):
    BRIDGED[_kind] = lambda kind=_kind: wrapped(kind)
    BRIDGED[f"{_kind}-compatible"] = lambda kind=_kind: wrapped(kind, processing=False)
    BRIDGED[f"{_kind}-processed"] = lambda kind=_kind: wrapped(kind, processing=True)
    for _flag in ("use_split_qkv_input", "use_attn_in", "use_attn_result", "use_hook_mlp_in"):
        BRIDGED[f"{_kind}-{_flag}"] = lambda kind=_kind, flag=_flag: wrapped(kind, **{flag: True})

ALL = {**({f"HT-{name}": build for name, build in HOOKED.items()} if HookedTransformer is not None else {}),
       **{f"Bridge-{name}": build for name, build in BRIDGED.items()}}  # fmt: skip
