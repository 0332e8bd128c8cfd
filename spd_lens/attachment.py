"""Our hooks on a model, for a while: put on, watched over, taken off. The only file that attaches hooks.

1. `rewritten` attaches what `spd_lens.visits` makes of rewrites, and takes exactly that off again.
2. `guarded` looks at every block whether our hooks are still there: a model whose hook points were exchanged meanwhile (SAELens, `setup()`)
   would go on silently without them.
3. `Attachment` gives a model two more HookPoints a site, `<site>.hook_spd_acts` and `<site>.hook_spd_ci`, and lets the site write what the
   user's hooks made of them:

       y + ((a' ∘ m) - a)·U        a = x·V;  a' is a after the hooks;  m = 1 where the importance was left as it was, else the user's value
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache as once
from typing import Any

import torch
from torch import Tensor
from transformer_lens.hook_points import HookPoint

from spd_lens.components import Components, check_delta, check_mask, masked_output
from spd_lens.errors import SPDError
from spd_lens.importance import Importance, lower_leaky
from spd_lens.sites import Hook, Passage, Rewrite, Site, hook_registries, writes_to
from spd_lens.tokens import Batch, called_with
from spd_lens.visits import disarm, rewrite_hooks

ACTS, IMPORTANCE = "hook_spd_acts", "hook_spd_ci"  # after the site's name
ALL_ON: tuple[Mapping[str, Tensor], float] = ({}, 1.0)


@contextmanager
def rewritten(
    model: Any, sites: Mapping[str, Site], rewrites: Mapping[str, Rewrite], replacing: Collection[str] = (), permanent: bool = False
) -> Iterator[list[Hook]]:
    """The model with the rewrites on (see `rewrite_hooks`); on the way out everything is as it was, also after an exception.

    Args:
        permanent: our hooks survive `model.reset_hooks()`.
    """
    with _doors(model, [sites[name] for name in rewrites]):
        hooks = rewrite_hooks(model, sites, rewrites, replacing)
        points = model.hook_dict  # once: TransformerBridge makes it anew, for every hook, when its own `hooks` is asked to attach
        try:
            for name, function in hooks:
                points[name].add_hook(function, is_permanent=permanent)
            yield hooks
        finally:
            disarm(hooks)
            ours = {id(function) for _, function in hooks}
            for name in dict(hooks):
                for handle in [handle for handle in points[name].fwd_hooks if id(handle.user_hook) in ours]:
                    handle.hook.remove()
                    points[name].fwd_hooks.remove(handle)


@contextmanager
def _doors(model: Any, sites: Sequence[Site]) -> Iterator[None]:
    """Where a module has taken the place of the hook point that a site writes (SAELens: an SAE), a hook point before it, under the old name."""
    opened, tables = [], hook_registries(model)
    for name in {writes_to(model, site) for site in sites}:
        if isinstance(module := tables[-1].get(name), torch.nn.Module) and not isinstance(module, HookPoint):
            door = HookPoint()
            door.name = name
            handle = module.register_forward_pre_hook(_through(door))
            opened.append((name, door, handle, [table.get(name) for table in tables]))
    try:
        for name, door, _, _ in opened:
            for table in tables:
                table[name] = door
        yield
    finally:
        for name, door, handle, before in opened:
            handle.remove()
            for table, value in zip(hook_registries(model), before):
                if table.get(name) is door and value is None:
                    del table[name]
                elif table.get(name) is door:
                    table[name] = value


def _through(door: HookPoint) -> Callable[[torch.nn.Module, tuple[Any, ...]], tuple[Any, ...]]:
    """A forward pre-hook which passes a module's first argument through a hook point."""
    return lambda _, arguments: (door(arguments[0]), *arguments[1:])


@contextmanager
def guarded(model: Any, hooks: Sequence[Hook], more: Mapping[str, HookPoint]) -> Iterator[None]:
    """At the beginning of every block, an error if one of these hooks is not on the model any more, or if it does not know `more` points."""
    points = model.hook_dict
    names = {id(point): name for name, point in hook_registries(model)[0].items()}  # the model's own: a hook may be named by an alias
    handles = []
    try:
        for i, block in enumerate(model.blocks):
            here = [(points[name], function) for name, function in hooks if name.startswith(f"blocks.{i}.")]
            known = {names[id(point)]: point for point, _ in here} | dict(more)
            if here:
                handles.append(block.register_forward_pre_hook(_Guard(model, here, known)))
        yield
    finally:
        for handle in handles:
            handle.remove()


@dataclass(frozen=True, eq=False)
class _Guard:
    model: Any
    on: Sequence[tuple[HookPoint, Any]]
    known: Mapping[str, HookPoint]

    def __call__(self, block: Any, arguments: Any) -> None:
        registry = hook_registries(self.model)[0]
        for name, point in self.known.items():
            if registry.get(name) is not point:
                raise SPDError(f"the model's hook point {name} was exchanged while a decomposition was attached (an SAE of SAELens, setup() or "
                               "compatibility mode does that); do that first, and attach the decomposition inside it.")  # fmt: skip
        for point, function in self.on:
            if all(handle.user_hook is not function for handle in point.fwd_hooks):
                raise SPDError(f"our hook on {point.name} was removed while a decomposition was attached (reset_hooks(including_permanent=True)?); "
                               "leave the `with` block and attach again. reset_hooks() alone leaves our hooks in place.")  # fmt: skip


@dataclass(eq=False)
class Attachment:
    """A decomposition that is attached to its model.

    Attributes:
        points: `<site>.hook_spd_acts` and `<site>.hook_spd_ci` → HookPoint.
        settings: masks and delta, the innermost `attached(…)` last.
        replacing: the sites that the innermost masks name.
        batch: what the model is running on, with its padding; None where that is not known.
    """

    model: Any
    sites: Mapping[str, Site]
    components: Mapping[str, Components]
    gates: Mapping[str, Importance]
    points: dict[str, HookPoint] = field(init=False)
    settings: list[tuple[Mapping[str, Tensor], float | int | Tensor]] = field(default_factory=lambda: [ALL_ON])
    replacing: set[str] = field(default_factory=set)
    batch: Callable[[], Batch | None] | None = None

    def __post_init__(self) -> None:
        self.points = {}
        for name in self.sites:
            for suffix in (ACTS, IMPORTANCE):
                point = self.points[f"{name}.{suffix}"] = HookPoint()
                point.name = f"{name}.{suffix}"

    @contextmanager
    def registered(self) -> Iterator[None]:
        """The points in the model's tables, where its own methods look for hook points."""
        known = hook_registries(self.model)[0]
        if taken := [name for name in self.points if name in known]:
            site = taken[0].rsplit(".", 1)[0]
            raise SPDError(
                f"another decomposition of this model is attached to {site}; leave its `with` block first, or decompose other sites."
            )
        try:
            for registry in hook_registries(self.model):
                registry.update(self.points)
            yield
        finally:
            for registry in hook_registries(self.model):
                for name, point in self.points.items():
                    if registry.get(name) is point:
                        del registry[name]

    @contextmanager
    def set_to(self, masks: Mapping[str, Tensor] | None, delta: float | int | Tensor) -> Iterator[None]:
        """These masks as long as this lasts; None leaves those that hold."""
        self.settings.append(self.settings[-1] if masks is None else (masks, delta))
        self._note()
        try:
            yield
        finally:
            self.settings.pop()
            self._note()

    def hear(self, call: tuple[tuple, dict] | None) -> None:
        """What the model is called with, so that importance functions know what is padding; looked into where it is asked for."""
        self.batch = None if call is None else once(lambda: called_with(self.model, *call))

    def importance(self, name: str, x: Tensor, inner: Tensor) -> Tensor:
        """Of the passage, in the layout that the model was called with; 0 at padding."""
        batch = None if self.batch is None else self.batch()
        if batch is None or batch.real is None or batch.shape != x.shape[:2]:
            return lower_leaky(self.gates[name](x, inner).to(inner.dtype))
        z = self.gates[name](batch.aligned(x), batch.aligned(inner), batch.real)
        return batch.given(lower_leaky(z.to(inner.dtype)))

    def _note(self) -> None:
        self.replacing.clear()
        self.replacing.update(self.settings[-1][0])

    def rewrites(self) -> dict[str, Rewrite]:
        return {name: lambda passage, name=name: self.rewrite(name, passage) for name in self.sites}

    def rewrite(self, name: str, passage: Passage) -> Tensor | None:
        """What the site writes; None where that is the original output."""
        masks, delta = self.settings[-1]
        components, site, gradients = self.components[name], self.sites[name], torch.is_grad_enabled()
        acts_point, importance_point = self.points[f"{name}.{ACTS}"], self.points[f"{name}.{IMPORTANCE}"]
        heard, masked = (_listened_to(acts_point), _listened_to(importance_point)), name in masks
        if masked:
            check_mask(name, masks[name], components.C, passage.x.shape[:2])
            check_delta(delta, passage.x.shape[:2])
        if not any(heard):
            return masked_output(components, site, passage, masks[name].to(passage.x.device), delta) if masked else None
        V, U = components.V.detach(), components.U.detach()
        x = passage.x.detach()
        inner = (passage.x @ V).requires_grad_(gradients)  # also of a frozen model
        mask: Tensor = masks[name].to(inner) if masked else inner.new_ones(())
        acts, left_alone = inner, True
        if heard[0]:
            acts = _answer(acts_point, inner)
            left_alone = torch.equal(acts, inner)
        if heard[1]:
            with torch.no_grad():
                importance = self.importance(name, x, inner.detach()).clamp_min(torch.finfo(inner.dtype).tiny)
                if masked:  # so that a 1 is somebody's, too
                    importance = importance.clamp_max(1 - torch.finfo(inner.dtype).eps)
            given = _answer(importance_point, importance.requires_grad_(gradients))
            same = given == importance
            left_alone = left_alone and bool(same.all())
            mask = torch.where(same, mask + (given - given.detach()), given)  # the gradient by m is what a hook on the importance gets
        if left_alone and not masked and not gradients:
            return None
        before = passage.source @ V if passage.by_head is not None else inner
        after = acts
        if passage.by_head is not None:  # heads that read alone all read the change; heads that write alone share it
            after = before + (acts - inner) / (len(before) if site.kind == "W_O" else 1)
        if masked:
            return masked_output(components, site, passage, mask, delta, inner=after)
        assert passage.y is not None
        return passage.y + (after * mask - before) @ U


def _listened_to(point: HookPoint) -> bool:
    return bool(point._forward_hooks or point._forward_pre_hooks or point._backward_hooks or point._backward_pre_hooks)


def _answer(point: HookPoint, value: Tensor) -> Tensor:
    """What the hooks make of a copy, which they may change in place."""
    given = point(value.clone())
    if not isinstance(given, Tensor) or given.shape != value.shape:
        shape = f"shape {list(given.shape)}" if isinstance(given, Tensor) else f"a {type(given).__name__}"
        raise SPDError(
            f"a hook on {point.name} returned {shape}; return a tensor of the shape that it was given, {list(value.shape)}, or None."
        )
    return given.to(value.dtype)
