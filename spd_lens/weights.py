"""A model's weights written anew: an independent copy with other matrices in it.

1. Refused before anything is copied: a matrix that other modules share (tied), one that cannot be served (quantised).
2. The copy: the model without anybody's hooks and without what the last pass left in it. What closes over the model's modules, as
   TransformerLens' own wrappers do, closes over the copy's.
3. Every matrix of the copy is read back: the written ones as wanted, all others as before.
"""

import copy
import functools
from collections.abc import Mapping
from types import CellType, FunctionType, MethodType
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.overrides import TorchFunctionMode
from transformer_lens.hook_points import HookPoint

from spd_lens.errors import SPDError
from spd_lens.labels import NAMES
from spd_lens.sites import layout_of, unflattened
from spd_lens.visits import unwatch


def rewritten(model: Any, weights: Mapping[str, Float[Tensor, "d_in d_out"]]) -> Any:
    """A copy of `model` in which the named matrices, which `check_writable` let pass, are `weights` (heads flattened, as in `Site.weight`).

    Raises:
        SPDError: another matrix changed with them.
    """
    before, new = layout_of(model), copied(model)
    for name, weight in weights.items():
        set_weight(new, name, weight)
    if model in NAMES:
        NAMES[new] = NAMES[model]
    after = layout_of(new)
    for name in before.names():
        if before.refusal(name) is None:
            found = after.site(name).weight
            if not torch.equal(found, weights[name].to(found) if name in weights else before.site(name).weight):
                raise SPDError(f"{name} of the copy is not what it should be: {'it was not written' if name in weights else 'it changed too'}. "
                               "Its memory is shared with another matrix; edit a model whose matrices are its own.")  # fmt: skip
    return new


@torch.no_grad()
def set_weight(model: Any, name: str, weight: Float[Tensor, "d_in d_out"]) -> None:
    """Write a matrix into the model itself, in the place and layout where it has it (grouped keys, a part of a fused matrix, a view)."""
    stored = layout_of(model).stored(name)
    stored.copy_(unflattened(name, weight, stored))


def check_writable(model: Any, name: str) -> None:
    """An error where the matrix is not the model's own plain tensor."""
    layout = layout_of(model)
    if reason := layout.refusal(name):
        raise SPDError(f"{name} cannot be edited: {reason}")
    stored, _, layer, part = layout.stored(name), *name.split(".")[:3]
    own = {id(module) for module in getattr(model.blocks[int(layer)], part).modules()}
    for owner, module in model.named_modules():
        for key, parameter in module._parameters.items():
            if id(module) not in own and parameter is not None and _overlap(stored, parameter):
                raise SPDError(f"{name} cannot be edited: its memory is shared with {owner}.{key} (tied weights), which would change too. "
                               "Untie them first: give one of the two a parameter of its own, a clone.")  # fmt: skip


def _overlap(a: Tensor, b: Tensor) -> bool:
    (begin, end), (other_begin, other_end) = _ends(a), _ends(b)
    return a.device == b.device and begin < other_end and other_begin < end


def _within(a: Tensor, b: Tensor) -> bool:
    (begin, end), (other_begin, other_end) = _ends(a), _ends(b)
    return a.device == b.device and a.dtype == b.dtype and other_begin <= begin and end <= other_end


def _ends(t: Tensor) -> tuple[int, int]:
    """The addresses between which its entries lie."""
    last = sum((size - 1) * stride for size, stride in zip(t.shape, t.stride()))
    return t.data_ptr(), t.data_ptr() + (last + 1) * t.element_size() * bool(t.numel())


class _Detaching(TorchFunctionMode):
    """`deepcopy` refuses tensors with a gradient behind them, and models keep some of the last pass (an attention pattern): copied without."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: list[Tensor] = []  # deepcopy remembers what it has copied by address

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.__deepcopy__ and not args[0].is_leaf:
            self.kept.append(args[0].detach())
            args = (self.kept[-1], *args[1:])
        return func(*args, **(kwargs or {}))


def copied(model: Any) -> Any:
    """An independent copy, without the hooks on its hook points (permanent ones too) and without us; what hooks refer to is not copied either."""
    users = [handle.user_hook for point in _points(model) for handle in (*point.fwd_hooks, *point.bwd_hooks)]
    users += [
        hook for module in model.modules() for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values()) if _ours(hook)
    ]
    copies: dict[int, Any] = {id(hook): hook for hook in users}
    with _Detaching():
        new = copy.deepcopy(model, copies)
    for module in new.modules():
        for key, value in vars(module).items():
            vars(module)[key] = _rebound(value, copies)
    for point in _points(new):
        point.remove_hooks("both", including_permanent=True)
        point.clear_context()
    new.context_level = 0
    for block in new.blocks:
        if hasattr(block, "_teardown_capture_hooks"):  # TransformerBridge's own: they refer to the block that they were made in, and are
            block._teardown_capture_hooks()  #            made again in the next pass
    for module in new.modules():
        for hooks in (module._forward_hooks, module._forward_pre_hooks):
            for key in [key for key, hook in hooks.items() if _ours(hook)]:
                del hooks[key]
    for table in vars(new).values():
        if isinstance(table, dict):  # of hook points by name
            for key in [key for key in table if ".hook_spd_" in str(key)]:
                del table[key]
    unwatch(new)
    _share_alike(model, new)
    return new


def _rebound(value: Any, copies: dict[int, Any]) -> Any:
    """`deepcopy` takes a function as it is: one made inside a method still computes with the modules that it closed over."""
    if isinstance(value, MethodType):
        return MethodType(_rebound(value.__func__, copies), value.__self__)
    if id(value) in copies or not _reaches(value, copies, set()):
        return copies.get(id(value), value)
    cells = tuple(CellType() for _ in value.__closure__)
    function = FunctionType(value.__code__, value.__globals__, value.__name__, value.__defaults__, cells)
    function.__kwdefaults__ = value.__kwdefaults__
    copies[id(value)] = functools.update_wrapper(function, value)
    for cell, held in zip(cells, _held(value)):
        cell.cell_contents = copies.get(id(held), held) if isinstance(held, (torch.nn.Module, Tensor)) else _rebound(held, copies)
    return function


def _reaches(value: Any, copies: Mapping[int, Any], seen: set[int]) -> bool:
    """Whether it is a function that closes over something that was copied, itself or through others."""
    if not isinstance(value, FunctionType) or id(value) in seen:
        return False
    seen.add(id(value))
    return any(id(held) in copies if isinstance(held, (torch.nn.Module, Tensor)) else _reaches(held, copies, seen) for held in _held(value))


def _held(function: FunctionType) -> list[Any]:
    """What it closes over; an error of Python's where that is not there yet."""
    return [cell.cell_contents for cell in function.__closure__ or ()]


def _ours(hook: Any) -> bool:
    return str(getattr(hook, "__module__", "")).startswith("spd_lens")


def _share_alike(model: Any, new: Any) -> None:
    """`deepcopy` gives every parameter memory of its own. What was a view of another one is made a view again: of GPT-2's fused `c_attn`;
    of a parameter that TransformerBridge's processed MLP also keeps as an attribute, and computes with."""
    groups: dict[int, dict[int, tuple[Tensor, Tensor]]] = {}
    for old_module, new_module in zip(model.modules(), new.modules()):
        for old_table, new_table in ((old_module._parameters, new_module._parameters), (vars(old_module), vars(new_module))):
            for key, old in old_table.items():
                if isinstance(old, Tensor) and old.numel() and not old.is_meta:
                    groups.setdefault(old.untyped_storage().data_ptr(), {})[id(old)] = (old, new_table[key])
    for group in groups.values():
        whole, base = max(group.values(), key=lambda pair: (pair[0].numel(), isinstance(pair[0], torch.nn.Parameter)))
        for old, own in group.values():
            if old is not whole and whole.is_contiguous() and _within(old, whole):
                own.data = base.data.as_strided(old.shape, old.stride(), old.storage_offset() - whole.storage_offset())


def hooked(model: Any) -> bool:
    """Whether anybody has hooks on its hook points, which a copy goes without."""
    return any(point.fwd_hooks for point in _points(model))


def _points(model: Any) -> list[HookPoint]:
    points = {id(module): module for module in (*model.modules(), *model.hook_dict.values()) if isinstance(module, HookPoint)}
    return list(points.values())
