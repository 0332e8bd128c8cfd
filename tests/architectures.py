"""Which of TransformerLens' architectures can be decomposed and edited: `python -m tests.architectures` writes docs/architectures.md.

Every adapter is tried for which Hugging Face's own classes make a small model with random weights in memory: of its default configuration with
narrow widths. What then holds is looked at, not assumed: sites, the identity, the key/value cache, an edited copy against the hooks.
"""

import contextlib
import io
import os
import re
import sys
import warnings
from collections.abc import Iterable
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = os.environ["TRANSFORMERS_OFFLINE"] = "1"

import torch
import transformers
from transformer_lens.factories.architecture_adapter_factory import SUPPORTED_ARCHITECTURES
from transformer_lens.model_bridge.sources import build_bridge_from_module

from spd_lens import SPDConfig, SPDError, decompose, find_sites
from spd_lens.sites import layout_of, site_names
from tests.zoo import VOCABULARY, randomised

PAGE = Path(__file__).parents[1] / "docs" / "architectures.md"
IDENTITY = 1e-5  # of the largest logit
BIGGEST = 30_000_000  # parameters: what is bigger with these settings has parts (vision, audio) that are not made small
NARROW: dict[str, Any] = {
    name: value
    for names, value in {
        "hidden_size n_embd d_model dim model_dim embed_dim": 32,
        "num_hidden_layers n_layer n_layers num_layers encoder_layers decoder_layers num_decoder_layers": 2,
        "num_attention_heads n_head n_heads num_heads encoder_attention_heads decoder_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim d_kv": 8,
        "rotary_dim": 4,
        "intermediate_size n_inner ffn_dim d_ff encoder_ffn_dim decoder_ffn_dim ffn_hidden_size": 48,
        "vocab_size vocab_size_per_layer_input": VOCABULARY,
        "max_position_embeddings n_positions n_ctx max_seq_len max_target_positions": 64,
        "num_experts num_local_experts n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "mamba_n_heads": 4,
        "qk_rope_head_dim qk_nope_head_dim v_head_dim kv_lora_rank": 8,
        "q_lora_rank": 16,
        "n_group topk_group": 1,
        "pad_token_id decoder_start_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "full_attention_interval attn_layer_period": 2,
        "attn_layer_offset": 1,
    }.items()
    for name in names.split()
}
OWN: dict[str, dict[str, Any]] = {
    "GPTNeoForCausalLM": {"attention_types": [[["global", "local"], 1]]},
    "BambaForCausalLM": {"attn_layer_indices": [1]},
    "Qwen3NextForCausalLM": {"layer_types": ["linear_attention", "full_attention"]},
    "Qwen3_5ForCausalLM": {"layer_types": ["linear_attention", "full_attention"]},
    "Qwen3_5MoeForCausalLM": {"layer_types": ["linear_attention", "full_attention"]},
    "Lfm2MoeForCausalLM": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "RecurrentGemmaForCausalLM": {"block_types": ["recurrent", "attention"]},
}
UNSET = ("n_inner", "num_experts_per_tok", "num_key_value_heads", "head_dim")  # None by default, and meant
PARTS = ("text_config",)


@dataclass
class Looked:
    """What was found of one architecture."""

    sites: dict[str, int] = field(default_factory=dict)  # kind → how many are served
    refused: dict[str, str] = field(default_factory=dict)  # kind → why
    identity: float | None = None
    cache: str = ""
    edits: str = ""
    reason: str = ""  # why there is nothing to say

    @property
    def edited(self) -> bool:
        return self.edits == "equal the hooks"


def narrow(kind: Any, **more: Any) -> Any:
    """The configuration class's defaults, small."""
    default = kind()
    own = {key: NARROW[key] for key, value in default.to_dict().items() if key in NARROW and (value is not None or key in UNSET)}
    own |= {part: narrow(type(getattr(default, part))).to_dict() for part in PARTS if getattr(default, part, None) is not None}
    config = kind(**own | more)
    config._attn_implementation = "eager"
    return config


def bridged(architecture: str) -> Any:
    """A small one with random weights; an error of whoever cannot make it."""
    made = getattr(transformers, architecture, None)
    if made is None:
        raise LookupError("Hugging Face's library has no class of this name (code from elsewhere)")
    torch.manual_seed(0)
    config = narrow(made.config_class, **OWN.get(architecture, {}))
    if made.main_input_name != "input_ids":
        raise LookupError("reads images or sound, no tokens")
    if config.is_encoder_decoder:
        raise LookupError("has an encoder and a decoder, and in TransformerLens no `blocks`")
    with torch.device("meta"):
        size = sum(p.numel() for p in made(config).parameters())
    if size > BIGGEST:
        raise LookupError(f"not small: {size // 10**6} million parameters with narrow widths")
    return build_bridge_from_module(randomised(made(config).eval()), architecture, hf_config=config)


def _short(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:90]}{'…' * (len(text) > 90)}".replace("|", "/")


def look(architecture: str) -> Looked:
    """Everything about one architecture."""
    found, tokens = Looked(), torch.randint(3, VOCABULARY, (2, 8), generator=torch.Generator().manual_seed(0))
    try:
        model = bridged(architecture)
        with torch.no_grad():
            clean = model(tokens, return_type="logits")
    except LookupError as error:
        found.reason = str(error)
        return found
    except Exception as error:
        found.reason = f"the small model is not made or does not run by itself ({_short(error)})"
        return found
    if clean.shape[-1] != model.cfg.d_vocab:
        found.reason = "gives no logits"
        return found
    if not hasattr(model, "blocks"):
        found.reason = "has no `blocks` in TransformerLens"
        return found
    layout, served = layout_of(model), []
    for name in site_names(model):
        kind = name.rsplit(".", 1)[1]
        try:
            reason = layout.refusal(name)
            if reason is None:
                find_sites(model, name)
                decompose(model, tokens, SPDConfig(steps=0, subcomponents=4, init="random", gate_width=2, sites=(name,)), progress=False)
        except SPDError as error:
            reason = str(error)
        except Exception as error:
            reason = _short(error)
        if reason is None:
            served.append(name)
            found.sites[kind] = found.sites.get(kind, 0) + 1
        else:
            found.refused[kind] = reason
    if not served:
        found.reason = "no matrix is served"
        return found
    d = decompose(model, tokens, SPDConfig(steps=0, subcomponents=6, init="random", gate_width=2, sites=tuple(served)), progress=False)
    everything = {name: torch.ones(()) for name in served}
    with torch.no_grad():
        found.identity = float((d.run(tokens, everything, delta=1.0) - clean).abs().max() / clean.abs().max())
        found.cache = cached(model, tokens, clean)
        found.edits = edited(d, tokens)
    return found


def cached(model: Any, tokens: torch.Tensor, clean: torch.Tensor) -> str:
    """Whether passes of one token after a key/value cache give the logits of the whole, as `generate` believes."""
    try:
        first, cache = model(tokens[:, :5], use_past_kv_cache=True, return_type="logits_and_cache")
        if cache is None or not hasattr(cache, "get_seq_length"):
            return "none"
        second = [model(tokens[:, i : i + 1], past_key_values=cache) for i in range(5, tokens.shape[1])]
    except Exception as error:
        return f"fails ({type(error).__name__})"
    off = float((torch.cat([first, *second], 1) - clean).abs().max() / clean.abs().max())
    return "right" if off < 1e-3 else "**wrong**"


def edited(d: Any, tokens: torch.Tensor) -> str:
    """Whether an edited copy gives what the hooks give, for every kind of matrix; and the original what it gave."""
    before = d.model(tokens, return_type="logits")
    for kind in sorted({site.kind for site in d.sites.values()}):
        chosen = {name: [0, 2] for name, site in d.sites.items() if site.kind == kind}
        try:
            copy = d.edited_model(remove=chosen)
        except SPDError as error:
            return f"refused: {error}"
        wanted = d.model.run_with_hooks(tokens, fwd_hooks=d.ablate(chosen))
        off = float((copy(tokens, return_type="logits") - wanted).abs().max() / wanted.abs().max())
        if off > 1e-4:
            return f"**{kind} wrong by {off:.1e}**"
    return "equal the hooks" if torch.equal(d.model(tokens, return_type="logits"), before) else "**the original changed**"


def kinds(reasons: dict[str, str]) -> str:
    """`W_in W_out: MoEBridge`: what is not served, and the module of TransformerLens's that has it otherwise."""
    by: dict[str, list[str]] = {}
    for kind, reason in reasons.items():
        module = re.search(r"\w*(?:Bridge|GeneralizedComponent)", reason)
        by.setdefault(module[0] if module else reason.replace("|", "/"), []).append(kind)
    return "; ".join(f"{' '.join(some)}: {why}" for why, some in by.items())


def page(found: dict[str, Looked]) -> str:
    served, others = ({name: one for name, one in found.items() if bool(one.sites) is wanted} for wanted in (True, False))
    rows = [f"| {name} | {' '.join(one.sites)} | {kinds(one.refused)} | {one.edits} | {one.cache} |" for name, one in served.items()]
    rest = [f"| {name} | {one.reason}{': ' * bool(one.refused)}{kinds(one.refused)} |" for name, one in others.items()]
    return TEXT.format(versions=versions(), rows="\n".join(rows), rest="\n".join(rest), many=len(served), error=IDENTITY)


def versions() -> str:
    return f"transformer-lens {version('transformer-lens')} and transformers {version('transformers')}"


def everywhere(names: Iterable[str] = tuple(SUPPORTED_ARCHITECTURES)) -> dict[str, Looked]:
    found = {}
    for name in names:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            found[name] = look(name)
        print(name, found[name], file=sys.stderr, flush=True)
    return found


TEXT = """# Architectures

*Written by `python -m tests.architectures`, with {versions}; a test holds this page against what it finds.*

Every architecture that a `TransformerBridge` can wrap is tried for which Hugging Face's own classes make a small model with random weights in memory: {many} are served. In each of
these, every matrix named under *sites* was decomposed and replaced by its subcomponents with the delta on, which moved no logit by more than {error:.0e} of the largest; *edited copies* says whether
`edited_model` gives what `ablate` gives, for every kind of matrix. Where it could not, it would raise: it looks on the spot, so this holds for architectures that are not listed, too.

*After a cache*: whether TransformerLens, with no hooks of ours, gives the same logits from a key/value cache as from the whole sequence. Where it says **wrong**, call `generate` with `use_past_kv_cache=False`.

| architecture | sites | not served | edited copies | after a cache |
|---|---|---|---|---|
{rows}

What is not served is refused by `find_sites` with the reason: experts (`MoEBridge`) and joint or latent projections (`MLAAttentionBridge`) have no matrix of their own between two hook points.

## Not served, or not tried

| architecture | why |
|---|---|
{rest}

`TransformerLensNative` (`boot_native`) and `HookedTransformer` are tested throughout, in every variant that their configurations have.
"""

if __name__ == "__main__":
    torch.set_num_threads(1)
    PAGE.write_text(page(everywhere(sys.argv[1:] or tuple(SUPPORTED_ARCHITECTURES))), encoding="utf-8")
