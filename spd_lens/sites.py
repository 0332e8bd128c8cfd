"""Where a weight matrix is, what it reads, what it writes: the only file that knows TransformerLens' classes.

1. `find_sites` lists the matrices by TransformerLens' own names (`blocks.0.attn.W_Q`, …), heads flattened.
2. A `Wire` says how a site is reached in a model as its flags stand now: which hook or argument it reads, which hook it writes, and how its
   original product can be kept from being computed. `spd_lens.visits` follows it.

A site's input is not at a hook in every case (HookedTransformer adds LayerNorm's weights and shortformer positions
inside the block). There it is taken from the arguments of the attention or MLP module.
"""

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import pandas as pd
import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn
from transformer_lens.model_bridge import TransformerBridge

from spd_lens.errors import SPDError, nearest
from spd_lens.guards import steady
from spd_lens.schema import brief
from spd_lens.tables import Shown, Tabular

try:
    from transformer_lens import HookedTransformer
except ImportError:  # transformer-lens 4.x has TransformerBridge alone
    HookedTransformer = None

ATTENTION = {"W_Q": "q", "W_K": "k", "W_V": "v", "W_O": "o"}
MLP = {"W_in": "in", "W_gate": "gate", "W_out": "out"}

Hook = tuple[str, Callable[..., Any]]


@dataclass(frozen=True, eq=False, repr=False)
class Site(Tabular):
    """One weight matrix that can be decomposed.

    Attributes:
        name: TransformerLens' own name, e.g. `blocks.0.attn.W_Q`, whichever class the model is.
        weight: `[d_in, d_out]`, heads flattened (`W_Q`: d_out = head·d_head; `W_O`: d_in = head·d_head); a copy, which stays as it was found
            whatever becomes of the model.
        bias: `[d_out]`, a copy too, or None where the model has none. Biases are not decomposed.
        heads: how many heads the matrix has of its own (grouped keys and values: fewer than queries); 1 in an MLP.
    """

    name: str
    weight: Float[Tensor, "d_in d_out"]
    bias: Float[Tensor, " d_out"] | None
    heads: int
    modules: tuple[type, ...] = ()  # the classes that compute it, from the block's part inwards

    @property
    def d_in(self) -> int:
        """Width of what it reads: d_model, d_mlp, or heads · d_head of W_O."""
        return self.weight.shape[0]

    @property
    def d_out(self) -> int:
        """Width of what it writes."""
        return self.weight.shape[1]

    @property
    def layer(self) -> int:
        """The block that it is in, from 0."""
        return int(self.name.split(".")[1])

    @property
    def kind(self) -> str:
        """`W_Q`, `W_K`, `W_V`, `W_O`, `W_in`, `W_gate` or `W_out`."""
        return self.name.rsplit(".", 1)[1]

    @property
    def short(self) -> str:
        """Letter(s) and layer as the papers write it: `Q0`, `out3`."""
        return f"{self.kind[2:]}{self.layer}"

    def _shown(self) -> Shown:
        row = {"d_in": self.d_in, "d_out": self.d_out, "heads": self.heads, "bias": "no" if self.bias is None else "yes",
               "norm": f"{float(self.weight.norm()):.3g}"}  # fmt: skip
        return Shown("A matrix that can be decomposed", pd.DataFrame({self.name: row}).T.rename_axis("site"))

    def __repr__(self) -> str:  # a line, since they come by the dozen
        return f"Site({self.name}: {self.d_in} → {self.d_out}{'' if self.bias is None else ', biased'})"


@dataclass(frozen=True, eq=False)
class Passage:
    """What passes through a site in one forward pass, handed to a rewrite.

    Attributes:
        x: `[b, s, d_in]`, what the matrix reads.
        y: the original output, with `bias` in it: `[b, s, d_out]`, or `[head, b, s, d_out]` where heads go apart; None where
            the rewrite said that it does without (`replacing`).
        bias: what a replacement of `y` has to add; None where the model adds the bias later or has none.
        by_head: `[head, b, s, d_in]` where each head reads (`use_split_qkv_input`) or writes (`use_attn_result`) alone.
        start: where in the whole sequence `x` begins: not 0 where a key/value cache holds what came before. Known where it was asked for.
        apart: each head reads alone, so that of `[head, b, s, d_out]` the h-th head's columns of the h-th entry are what is taken.
    """

    x: Float[Tensor, "b s d_in"]
    y: Tensor | None
    bias: Float[Tensor, " d_out"] | None
    by_head: Float[Tensor, "head b s d_in"] | None = None
    start: int = 0
    apart: bool = False

    @property
    def source(self) -> Tensor:
        """What a linear map that is to replace the matrix should be applied to: `[b, s, d_in]` or `[head, b, s, d_in]`."""
        return self.x if self.by_head is None else self.by_head

    def taken(self, output: Tensor) -> Tensor:
        """Of an output for `source`, what the model goes on with: `[b, s, d_out]`; `[head, b, s, d_out]` where heads write alone."""
        if not self.apart or self.by_head is None:
            return output
        return rearrange(output.unflatten(-1, (len(self.by_head), -1)).diagonal(dim1=0, dim2=3), "b s d h -> b s (h d)")

    def biased(self, output: Tensor) -> Tensor:
        return output if self.bias is None else output + self.bias


Rewrite = Callable[[Passage], Tensor | None]


@dataclass(frozen=True, eq=False)
class Wire:
    """How one site is reached today (a model's flags may change between two calls)."""

    site: Site
    entry: str  # a hook that fires first in the block
    read: str | int  # a hook name; or an argument of `within`, by name or position
    write: str
    bias_in_output: bool = True
    norm: Callable[[Tensor], Tensor] | None = None  # Bridge forks the heads before LayerNorm, and no hook follows it
    result_by_head: bool = False
    idle: "Idle | None" = None  # keeps the original product from being computed; None where that is not known to be safe
    within: nn.Module | None = None  # the module whose call it is read and, if so, skipped in


_IDLING: set[tuple[int, str]] = set()  # module, attribute: shadowed at this moment


@dataclass(frozen=True, eq=False)
class Idle:
    """Attributes of `module` that are shadowed while the original product is not wanted. Shadows lie in the instance's `__dict__`, which
    Python asks before `nn.Module` does: parameters, `state_dict` and everything else of the model stay as they are."""

    module: nn.Module
    shadows: Callable[[], dict[str, Any]]

    def begin(self) -> Callable[[], None]:
        """Returns what ends it."""
        own = self.module.__dict__
        shadows = self.shadows()
        keys = {(id(self.module), name) for name in shadows}
        if keys & _IDLING:  # another replacement in the same pass skips it already, and gives back what was there
            return lambda: None
        _IDLING.update(keys)
        before = {name: own[name] for name in shadows if name in own}
        own.update(shadows)

        def end() -> None:
            for name in shadows:
                own.pop(name, None)
            own.update(before)
            _IDLING.difference_update(keys)

        return end


_HELD: list[frozenset[int]] = []  # sites that were looked at and that nobody changes at this moment


@contextmanager
def held(sites: Iterable[Site]) -> Iterator[None]:
    """Inside, nobody looks whether these are still as they were found: of use to passes by the thousand that change nothing."""
    these = frozenset(map(id, sites))
    _HELD.append(these)
    try:
        yield
    finally:
        _HELD.remove(these)


def is_held(site: Site) -> bool:
    return any(id(site) in these for these in _HELD)


def check_unchanged(model: Any, site: Site) -> None:
    """An error where the model's matrix is not the one that was found any more.

    Entry by entry, since `.data` and numpy write into a matrix without a trace in its version or address. A pass reads the matrix too.

    Raises:
        SPDError: the site, what changed and how to mend it.
    """
    if is_held(site):
        return
    layout, name, was = layout_of(model), site.name, site.weight
    try:
        now, bias = layout.stored(name), layout.bias(name)
    except Exception as error:  # there is no such module, or TransformerLens cannot read its weight any more (quantised)
        if name in layout.names() and (reason := layout.refusal(name)):
            raise SPDError(f"{name} cannot be reached any more: {reason}") from error
        raise SPDError(
            f"{name} was decomposed, but this model has no such matrix; give the decomposition the model that it was made from."
        ) from error
    if now.device != was.device:
        raise SPDError(f"{name}: the model is on {now.device} and the decomposition is on {was.device}; load it again with "
                       "Decomposition.load(folder, model), or move the model back.")  # fmt: skip
    if now.dtype != was.dtype:
        raise SPDError(f"{name} was {was.dtype} when it was decomposed and is {now.dtype} now; call model.to({was.dtype}). "
                       "What was rounded meanwhile has to be loaded again.")  # fmt: skip
    if (found := _shape(name, now)) != list(was.shape):
        raise SPDError(
            f"{name} is {found} in this model and was {list(was.shape)} when it was decomposed; load the model that it was made from."
        )
    if not torch.equal(now, unflattened(name, was, now)):
        raise SPDError(f"{name} is another matrix than was decomposed: the model's weights were changed since (in place, load_state_dict, fold_…, "
                       "process_weights_). Give the model its weights back, or decompose it as it is now.")  # fmt: skip
    if not (bias is None or site.bias is None or torch.equal(bias, site.bias)) or (bias is None) != (site.bias is None):
        raise SPDError(f"{name}: its bias is another than when it was decomposed (changed in place, load_state_dict, fold_value_biases). "
                       "Give the model its bias back, or decompose it as it is now.")  # fmt: skip
    if site.modules and (modules := layout.modules(name)) != site.modules:
        expect_uncompiled(model)
        other = next((a.__name__, b.__name__) for a, b in zip((*site.modules, type(None)), (*modules, type(None))) if a is not b)
        raise SPDError(f"{name} was computed by {other[0]} when it was decomposed and is by {other[1]} now (an adapter, a parametrisation?). "
                       "Undo that, or decompose the model as it is now.")  # fmt: skip
    if reason := layout.flagged(name):
        raise SPDError(f"{name} cannot be reached any more: {reason}")


def check_reached(model: Any, made: Wire) -> None:
    """An error where the model's flags lead to another way than when hooks were made."""
    now = layout_of(model).wire(made.site)
    if (now.read, now.write, now.norm is None, now.idle is None) != (made.read, made.write, made.norm is None, made.idle is None):
        raise SPDError(f"{made.site.name}: the model's flags were changed (set_use_split_qkv_input, set_use_attn_result, …) after these hooks "
                       "were made; make the hooks again.")  # fmt: skip


def model_is_supported(model: Any) -> bool:
    return isinstance(model, TransformerBridge) or (HookedTransformer is not None and isinstance(model, HookedTransformer))


def layout_of(model: Any) -> "_HookedTransformerLayout | _BridgeLayout":
    if isinstance(model, TransformerBridge):
        return _BridgeLayout(model)
    if model_is_supported(model):
        return _HookedTransformerLayout(model)
    expect_uncompiled(model)
    raise SPDError(
        f"a {type(model).__name__} was given as the model; spd_lens opens a HookedTransformer (transformer-lens 3.9) or a "
        "TransformerBridge. Wrap a Hugging Face model with TransformerBridge.boot_transformers(…)."
    )


def expect_uncompiled(model: Any) -> None:
    """An error where a part of the model, or all of it, was compiled: compiled code passes by the hooks that were there when it was made."""
    for module in model.modules() if isinstance(model, nn.Module) else ():
        compiled = "_orig_mod" in module._modules or module._compiled_call_impl is not None
        if not compiled and not hasattr(vars(module).get("forward"), "_torchdynamo_orig_callable"):
            continue
        name = min((n for n, m in model.named_modules(remove_duplicate=False) if m is module), key=len)  # TransformerBridge has several
        place = f"model.{name}" if name else "model"
        if "_orig_mod" in module._modules:
            mend = f"take {place}._orig_mod, which is what was compiled, in its place"
        elif module._compiled_call_impl is not None:
            mend = "give copy.deepcopy(model), which is not compiled"
        else:
            mend = f"del {place}.forward gives back what its class has"
        raise SPDError(f"{place} was compiled (torch.compile), and compiled code passes by hooks; {mend}.")


def drops_out(model: Any) -> bool:
    """Whether it gives other logits each time."""
    return model.training and any(isinstance(m, nn.Dropout) and m.training and m.p > 0 for m in model.modules())


def is_causal(model: Any) -> bool:
    return getattr(model.cfg, "attention_dir", "causal") != "bidirectional"


def site_names(model: Any) -> list[str]:
    """TransformerLens' name of every weight matrix, in the model's order, whether it can be served or not."""
    return layout_of(model).names()


@steady()
def find_sites(model: Any, patterns: str | Iterable[str] = "*") -> dict[str, Site]:
    """The weight matrices whose names match any of the glob `patterns`, in the model's order.

    Args:
        model: a `HookedTransformer` or a `TransformerBridge`.
        patterns: e.g. `"blocks.*.attn.W_[QKV]"`, or several of them.

    Returns:
        `{name: Site}`.

    Raises:
        SPDError: no site matches any of the patterns (the nearest names are listed), or a matching matrix cannot be served (the site
            and the reason are named). A pattern that matches nothing where others match is a warning.
    """
    layout = layout_of(model)
    expect_uncompiled(model)
    patterns = [patterns] if isinstance(patterns, str) else list(patterns)
    available = layout.names()
    if not patterns:
        raise SPDError(f"no pattern was given; {nearest('', available)}")
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise SPDError(f"a pattern was given as {brief(pattern)}; give text, e.g. 'blocks.*.attn.W_Q'.")
    chosen = [name for name in available if any(fnmatchcase(name, p) for p in patterns)]
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in available):
            if not chosen:
                raise _nothing(pattern, available)
            warnings.warn(f"{_nothing(pattern, available)} The other patterns match {len(chosen)} sites.", stacklevel=3)
    for name in chosen:
        if reason := layout.refusal(name):
            raise SPDError(f"{name} cannot be decomposed: {reason}")
    return {name: layout.site(name) for name in chosen}


def _nothing(pattern: str, available: list[str]) -> SPDError:
    """Why a pattern matches nothing."""
    if any(fnmatchcase(name.replace(".W_", ".b_"), pattern) for name in available):
        return SPDError(f"{pattern!r} names a bias; only weight matrices are decomposed, biases stay as they are. "
                        f"Use {pattern.replace('b_', 'W_')!r} for the matrix.")  # fmt: skip
    return SPDError(f"no site matches {pattern!r}; {nearest(pattern.replace('*', '0'), available)}.")


@dataclass
class _HookedTransformerLayout:
    model: Any
    _known: tuple[str, ...] = field(default=("MLP", "GatedMLP"), init=False)

    def registries(self) -> list[dict[str, Any]]:
        return [self.model.hook_dict, self.model.mod_dict]

    def names(self) -> list[str]:
        names = []
        for layer, block in enumerate(self.model.blocks):
            names += [f"blocks.{layer}.attn.{matrix}" for matrix in ATTENTION]
            if hasattr(block, "mlp"):
                mlp = block.mlp
                names += [f"blocks.{layer}.mlp.{m}" for m in MLP if hasattr(mlp, m) or type(mlp).__name__ not in self._known]
        return names

    def refusal(self, name: str) -> str | None:
        cfg, kind = self.model.cfg, name.rsplit(".", 1)[1]
        block = self.model.blocks[int(name.split(".")[1])]
        advice = "Load the model as a TransformerBridge instead."
        if getattr(cfg, "load_in_4bit", False):
            return "the weights are quantised to 4 bits. Load the model in float32."
        if reason := self.flagged(name):
            return reason
        if ".mlp." in name and type(block.mlp).__name__ not in self._known:
            return f"its MLP is a {type(block.mlp).__name__}, whose experts have no hooks of their own. Leave the MLP sites out."
        if kind == "W_gate" and not hasattr(block.mlp, "W_gate"):
            return "this MLP has no gate."
        if kind in ("W_O", "W_out") and getattr(cfg, "use_normalization_before_and_after", False):
            return f"HookedTransformer normalises its output before the hook (use_normalization_before_and_after). {advice}"
        if kind in ("W_O", "W_out") and getattr(cfg, "original_architecture", None) in ("Olmo2ForCausalLM", "Olmo3ForCausalLM"):
            return f"HookedTransformer normalises its output before the hook ({cfg.original_architecture}). {advice}"
        return None

    def modules(self, name: str) -> tuple[type, ...]:
        return (type(self._parameter(name)[0]),)

    def flagged(self, name: str) -> str | None:
        """Why the model's flags, as they stand now, keep the site from being served."""
        if self.model.cfg.ungroup_grouped_query_attention and self._parameter(name)[1].startswith("_"):
            return "its heads are repeated before the hook. Switch that off with model.set_ungroup_grouped_query_attention(False)."
        return None

    def site(self, name: str) -> Site:
        return _found(name, self.stored(name), self.bias(name), self.modules(name))

    def bias(self, name: str) -> Tensor | None:
        """`[d_out]` as the model has it now."""
        module, own = self._parameter(name)
        return _flat(getattr(module, own.replace("W_", "b_"), None))

    def stored(self, name: str) -> Tensor:
        """The matrix where the model has it, heads apart where it has them so: what is written here, the model computes with."""
        module, own = self._parameter(name)
        return getattr(module, own).detach()

    def _parameter(self, name: str) -> tuple[nn.Module, str]:
        _, layer, part, kind = name.split(".")
        module = getattr(self.model.blocks[int(layer)], part)
        return module, f"_{kind}" if f"_{kind}" in module._parameters else kind  # grouped keys and values: the unexpanded parameter

    @staticmethod
    def seen(arguments: Mapping[str, Any], layer: int) -> int:
        """How many positions attention's key/value cache holds already, from the keyword arguments of its call."""
        entry = arguments.get("past_kv_cache_entry")
        return 0 if entry is None else entry.past_keys.shape[1]

    @staticmethod
    def end(site: Site) -> str:
        """The hook that fires last in the block."""
        return f"blocks.{site.layer}.hook_resid_post"

    def wire(self, site: Site) -> Wire:
        base, cfg = f"blocks.{site.layer}", self.model.cfg
        block = self.model.blocks[site.layer]
        entry = f"{base}.hook_resid_pre"
        gated = hasattr(block, "mlp") and hasattr(block.mlp, "W_gate")
        part = block.attn if site.kind in ATTENTION else block.mlp
        within = dict(within=part)
        mlp_input = f"{base}.mlp.hook_in" if hasattr(part, "hook_in") else 0  # SAELens' HookedSAETransformer adds that hook
        idle = dict(within=part, idle=Idle(part, self._narrowed(part, site.kind, gated)))
        match site.kind:
            case "W_Q" | "W_K" | "W_V":
                argument = {"W_Q": "query_input", "W_K": "key_input", "W_V": "value_input"}[site.kind]
                apart = within if cfg.use_split_qkv_input or cfg.use_attn_in else idle
                return Wire(site, entry, argument, f"{base}.attn.hook_{ATTENTION[site.kind]}", **apart)
            case "W_O" if cfg.use_attn_result:
                return Wire(site, entry, f"{base}.attn.hook_z", f"{base}.attn.hook_result", result_by_head=True)
            case "W_O":
                return Wire(site, entry, f"{base}.attn.hook_z", f"{base}.hook_attn_out", **idle)
            case "W_out":
                return Wire(site, entry, f"{base}.mlp.hook_post", f"{base}.hook_mlp_out", **idle)
            case "W_in" if gated:  # b_in is added later, on the way to hook_post
                return Wire(site, entry, mlp_input, f"{base}.mlp.hook_pre_linear", bias_in_output=False, **idle)
            case _:
                return Wire(site, entry, mlp_input, f"{base}.mlp.hook_pre", **idle)

    @staticmethod
    def _narrowed(part: nn.Module, kind: str, gated: bool) -> Callable[[], dict[str, Any]]:
        """Weight and bias without columns: a product of no width costs nothing, and whatever reshapes it still can."""
        weight = f"_{kind}" if f"_{kind}" in part._parameters else kind
        bias = weight.replace("W_", "b_")
        names = [weight] if gated and kind in ("W_in", "W_gate") else [weight, bias]
        return lambda: {name: part._parameters[name][..., :0] for name in names if part._parameters.get(name) is not None}  # pyright: ignore


@dataclass
class _BridgeLayout:
    model: Any

    def registries(self) -> list[dict[str, Any]]:
        return [self.model._hook_registry]

    def names(self) -> list[str]:
        names = []
        for layer, block in enumerate(self.model.blocks):
            if hasattr(block, "attn"):
                names += [f"blocks.{layer}.attn.{matrix}" for matrix in ATTENTION]
            if hasattr(block, "mlp"):
                names += [f"blocks.{layer}.mlp.{m}" for m, part in MLP.items() if m != "W_gate" or self._part(block.mlp, part)]
        return names

    @staticmethod
    def _part(module: nn.Module, part: str) -> nn.Module | None:
        return module._modules.get(part)

    def refusal(self, name: str) -> str | None:
        _, layer, part, kind = name.split(".")
        module = getattr(self.model.blocks[int(layer)], part)
        child = {**ATTENTION, **MLP}[kind]
        if self._part(module, child) is None:
            return f"this model's {part} ({type(module).__name__}) has no separate {child} projection. Leave the site out."
        try:
            weight = getattr(module, kind)
        except Exception as error:  # quantised or offloaded weights: TransformerLens says which
            return f"TransformerLens cannot read its weight ({error})."
        if not isinstance(weight, Tensor) or not weight.is_floating_point():
            return "its weight is no plain floating-point matrix (quantised?). Load the model in float32."
        if weight.is_meta:
            return "its weight is on no device (offloaded). Load the model without a device_map."
        return None

    def modules(self, name: str) -> tuple[type, ...]:
        _, layer, part, kind = name.split(".")
        module = getattr(self.model.blocks[int(layer)], part)
        child = self._part(module, {**ATTENTION, **MLP}[kind])
        return (type(module), type(child), type(None if child is None else child._modules.get("_original_component")))

    @staticmethod
    def flagged(name: str) -> str | None:
        return None

    def site(self, name: str) -> Site:
        return _found(name, self.stored(name), self.bias(name), self.modules(name))

    def bias(self, name: str) -> Tensor | None:
        _, layer, part, kind = name.split(".")
        return _flat(getattr(getattr(self.model.blocks[int(layer)], part), kind.replace("W_", "b_"), None))

    def stored(self, name: str) -> Tensor:
        """A view of the parameter that the bridge computes with: of a part of GPT-2's fused `c_attn`, say."""
        _, layer, part, kind = name.split(".")
        return getattr(getattr(self.model.blocks[int(layer)], part), kind).detach()

    @staticmethod
    def seen(arguments: Mapping[str, Any], layer: int) -> int:
        """How many positions the key/value cache holds already; older architectures call it `layer_past`, transformers from 5.24 on `cache`."""
        names = ("past_key_values", "layer_past", "cache")
        cache = next((arguments[name] for name in names if arguments.get(name) is not None), None)
        return 0 if cache is None else int(cache.get_seq_length(layer))

    @staticmethod
    def end(site: Site) -> str:
        return f"blocks.{site.layer}.hook_out"

    def wire(self, site: Site) -> Wire:
        base, cfg = f"blocks.{site.layer}", self.model.cfg
        block = self.model.blocks[site.layer]
        entry = f"{base}.hook_in"
        part = {**ATTENTION, **MLP}[site.kind]
        if site.kind in MLP:
            functional = getattr(block.mlp, "_use_processed_weights", False) and "gate" in block.mlp._modules
            read = f"{base}.mlp.hook_in" if functional and site.kind != "W_out" else f"{base}.mlp.{part}.hook_in"
            return Wire(site, entry, read, f"{base}.mlp.{part}.hook_out", idle=None if functional else self._resting(site, block.mlp, part))
        if site.kind == "W_O":
            if getattr(cfg, "use_attn_result", False):
                return Wire(site, entry, f"{base}.attn.o.hook_in", f"{base}.attn.hook_result", result_by_head=True)
            return Wire(site, entry, f"{base}.attn.o.hook_in", f"{base}.attn.o.hook_out", idle=self._resting(site, block.attn, part))
        write = f"{base}.attn.{part}.hook_out"
        split, shared = getattr(cfg, "use_split_qkv_input", False), getattr(cfg, "use_attn_in", False)
        if not (split or shared):
            return Wire(site, entry, f"{base}.attn.{part}.hook_in", write, idle=self._resting(site, block.attn, part))
        read = f"{base}.attn.hook_{part}_input" if split else f"{base}.attn.hook_attn_in"

        def norm(x: Tensor) -> Tensor:  # TransformerBridge applies ln1 after the fork where it forked before it
            return block.attn._apply_ln1_per_head(x) if block.attn._captured_pre_ln_residual is not None else x

        return Wire(site, entry, read, write, norm=norm)

    @classmethod
    def _resting(cls, site: Site, module: nn.Module, part: str) -> Idle | None:
        """The wrapped linear layer answers with one zero in the shape of its output, which takes no memory."""
        component = cls._part(module, part)
        linear = None if component is None else component._modules.get("_original_component")
        if linear is None:
            return None

        def nothing(x: Tensor, *_: Any, **__: Any) -> Tensor:
            return x.new_zeros(()).expand(*x.shape[:-1], site.d_out)

        return Idle(linear, lambda: {"forward": nothing})


def _found(name: str, stored: Tensor, bias: Tensor | None, modules: tuple[type, ...]) -> Site:
    """In memory of its own."""
    weight = _flattened(name, stored)
    weight = weight.clone() if weight.data_ptr() == stored.data_ptr() else weight
    return Site(name, weight, None if bias is None else bias.clone(), stored.shape[0] if stored.ndim == 3 else 1, modules)


def _flattened(name: str, stored: Tensor) -> Tensor:
    """Heads next to their own axis: `W_Q [h, d, dh] → [d, h·dh]`, `W_O [h, dh, d] → [h·dh, d]`."""
    if stored.ndim == 2:
        return stored
    return rearrange(stored, "h dh d -> (h dh) d" if name.endswith("W_O") else "h d dh -> d (h dh)")


def _shape(name: str, stored: Tensor) -> list[int]:
    *heads, rows, columns = stored.shape
    many = heads[0] if heads else 1
    return [many * rows, columns] if name.endswith("W_O") else [rows, many * columns]


def _flat(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias.detach().flatten()


def unflattened(name: str, weight: Float[Tensor, "d_in d_out"], like: Tensor) -> Tensor:
    """`weight` with heads apart where the model's own tensor has them so: what `Site.weight` undoes."""
    if like.ndim == 2:
        return weight
    return rearrange(weight, "(h dh) d -> h dh d" if name.endswith("W_O") else "d (h dh) -> h d dh", h=like.shape[0])


def hook_registries(model: Any) -> list[dict[str, Any]]:
    """The tables, name → hook point, in which the model's own methods look; made anew by `setup()` and compatibility mode."""
    return layout_of(model).registries()


def writes_to(model: Any, site: Site) -> str:
    """The hook point that carries what the site writes."""
    return layout_of(model).wire(site).write


def model_device(model: Any) -> torch.device:
    return next(model.parameters()).device
