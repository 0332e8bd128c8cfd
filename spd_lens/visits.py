"""What happens at the sites during one forward pass: read, replace, give back.

1. `rewrite_hooks` turns `{site name: rewrite}` into ordinary `(hook name, function)` pairs. A rewrite sees what passes
   through its site (a `Passage`) and may return another output.
2. The pairs follow one rule: *capture last, override first*. At the entry of a block its hooks are put in that order, so
   a person's patch upstream of a site is seen by the site, and a hook of theirs on the same point is applied after ours.
3. What is read from a module's arguments is taken in its next call, which is watched from the entry of the block on.
4. A rewrite that does not look at the original output says so, and the original product is not computed: between the reading
   and the writing of a site its weight has no columns (HookedTransformer) or its linear layer does nothing (TransformerBridge).
"""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import update_wrapper
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn
from transformer_lens.hook_points import HookPoint

from spd_lens.errors import SPDError
from spd_lens.sites import Hook, Passage, Rewrite, Site, Wire, check_reached, check_unchanged, expect_uncompiled, is_held, layout_of


def rewrite_hooks(
    model: Any, sites: Mapping[str, Site], rewrites: Mapping[str, Rewrite], replacing: Collection[str] = (), counting: bool = False
) -> list[Hook]:
    """`(hook name, function)` pairs for `fwd_hooks=` and `model.hooks(...)` which apply each site's rewrite.

    Args:
        model: the model that `sites` were found in.
        sites: from `find_sites`.
        rewrites: site name → function of a `Passage`. It returns the new output, of the shape of `Passage.y`, or None to
            leave the output as it is.
        replacing: sites whose rewrite always returns an output and never looks at `Passage.y`; asked at every pass.
        counting: whether `Passage.start` is wanted.

    Raises:
        SPDError: `counting` in a block without attention, which alone is told what the key/value cache holds; a model that was compiled.
    """
    if not all(is_held(sites[name]) for name in rewrites):
        expect_uncompiled(model)
    layout, hook_points = layout_of(model), model.hook_dict
    pairs: list[Hook] = []
    blocks: dict[str, list[_Visit]] = {}
    for name, rewrite in rewrites.items():
        wire = layout.wire(sites[name])
        if wire.write not in hook_points:
            raise SPDError(f"{name}: the model has no hook point {wire.write} any more; something has taken its place (an SAE of SAELens?). "
                           "Give the hooks to the model before that, or use `with decomposition.attached():` after it.")  # fmt: skip
        read = wire.read if isinstance(wire.read, int) else _through(wire.read, hook_points)
        made, wire = wire, replace(wire, entry=_through(wire.entry, hook_points), read=read)
        visit = _Visit(wire, rewrite, made, replacing)
        if counting:
            visit.attention, visit.seen = getattr(model.blocks[wire.site.layer], "attn", None), layout.seen
            if visit.attention is None:
                raise SPDError(f"{name}: its block has no attention, so positions cannot be told there; leave positions out.")
        blocks.setdefault(wire.entry, []).append(visit)
    for entry, visits in blocks.items():
        points = {name: hook_points[name] for visit in visits for name in visit.hook_names if name in hook_points}
        pairs.append((entry, _Arrive(visits, points, model)))
        for visit in visits:
            if isinstance(visit.wire.read, str) and visit.wire.read in hook_points:
                pairs.append((visit.wire.read, _Capture(visit)))
            pairs.append((visit.wire.write, _Override(visit)))
        leave = layout.end(visits[0].wire.site)
        if leave in hook_points:
            pairs.append((leave, _Leave(visits)))
    return pairs


def _through(name: str, hook_points: Mapping[str, HookPoint]) -> str:
    """Where what flows on at a hook point is seen: an SAE of SAELens takes the point's place and has one of its own at its end."""
    inside = f"{name}.hook_sae_output"
    return inside if name not in hook_points and inside in hook_points else name


@dataclass(eq=False)
class _Visit:
    """One site during one forward pass: what was read, until it is used."""

    wire: Wire
    rewrite: Rewrite
    made: Wire  # as the flags stood when the hooks were made
    replacing: Collection[str] = ()
    skips: bool = False
    read: Tensor | None = None
    wake: Callable[[], None] | None = None
    attention: nn.Module | None = None  # is told in its call how many positions came before; None where nobody asks
    seen: Callable[[Mapping[str, Any], int], int] | None = None
    start: int | None = None
    pending: bool = False  # its block has begun and the site has not been come by

    @property
    def hook_names(self) -> list[str]:
        return [name for name in (self.wire.read, self.wire.write) if isinstance(name, str)]

    @property
    def replaces(self) -> bool:
        return self.wire.site.name in self.replacing

    def disarm(self) -> None:
        self.end_skip()
        self.read = self.start = None

    @property
    def watched(self) -> list[nn.Module]:
        return [module for module in (self.wire.within, self.attention) if module is not None]

    def capture(self, tensor: Tensor) -> None:
        self.read = tensor
        if self.skips and self.wire.idle is not None:
            self.wake = self.wire.idle.begin()

    def end_skip(self) -> None:
        if self.wake is not None:
            self.wake()
        self.wake = None

    def write(self, output: Tensor) -> Tensor | None:
        self.pending = False
        passage = self.passage(output)
        if self.attention is not None:
            if self.start is None:
                raise SPDError(f"{self.wire.site.name}: this block does not call its attention first, so positions cannot be told.")
            passage = replace(passage, start=self.start)
        self.disarm()
        new = self.rewrite(passage)
        return None if new is None else self.back(passage, new, output)

    def passage(self, output: Tensor) -> Passage:
        wire, site = self.wire, self.wire.site
        if self.read is None:
            raise SPDError(f"{site.name}: its output was computed before its input was seen; this model does not run the "
                           "block as TransformerLens describes it, so the site cannot be decomposed; or two threads run it at once.")  # fmt: skip
        read = self.read
        bias = site.bias if wire.bias_in_output and not wire.result_by_head else None
        if wire.result_by_head:
            x = read.flatten(2)
            apart = torch.eye(site.heads, dtype=x.dtype, device=x.device)
            by_head = torch.einsum("bshd,gh->gbshd", x.unflatten(-1, (site.heads, -1)), apart).flatten(3)
            return Passage(x, rearrange(output, "b s h d -> h b s d"), None, by_head)
        if site.kind in ("W_Q", "W_K", "W_V") and read.ndim == 4:
            if wire.norm is not None:
                read = wire.norm(read)
            by_head = rearrange(read[:, :, : site.heads], "b s h d -> h b s d")
            y = output.flatten(2).expand(site.heads, -1, -1, -1)
            return Passage(by_head.mean(0), y, bias, by_head, apart=True)
        return Passage(read.flatten(2), None if self.skips else output.flatten(2), bias)

    def back(self, passage: Passage, new: Tensor, output: Tensor) -> Tensor:
        """`new` in the shape that the hook carries."""
        if self.wire.result_by_head:
            return rearrange(new, "h b s d -> b s h d")
        if passage.by_head is not None:  # head h of the output, computed from head h of the input
            return passage.taken(new).reshape(output.shape)
        return new.reshape(*output.shape[:-1], -1)  # a product that was skipped has heads without width


class _Capture:
    def __init__(self, visit: _Visit):
        self.visit = visit

    def __call__(self, tensor: Tensor, hook: Any) -> None:
        self.visit.capture(tensor)


class _Override:
    def __init__(self, visit: _Visit):
        self.visit = visit

    def __call__(self, tensor: Tensor, hook: Any) -> Tensor | None:
        if getattr(hook, "_target", None) is not None and hook.name != hook._target.name:
            return None  # compatibility mode calls a hook once per alias of its point
        return self.visit.write(tensor)


class _Leave:
    """Runs at the end of a block: hooks that were not called have done nothing, and nobody would know."""

    def __init__(self, visits: Sequence[_Visit]):
        self.visits = visits

    def __call__(self, tensor: Tensor, hook: Any) -> None:
        for visit in self.visits:
            if visit.pending:
                visit.pending = False
                raise SPDError(
                    f"{visit.wire.site.name}: the model's forward pass did not come by this matrix's hooks, so it cannot be replaced."
                )


class _Watch:
    """The next call of a module's `forward`, once: takes the arguments that sites read, after every pre-hook, and sees to it that a
    product is skipped in this call alone, however it ends."""

    def __init__(self, module: nn.Module, visits: Sequence[_Visit], points: Mapping[str, HookPoint]):
        self.module, self.visits, self.points, self.before = module, visits, points, None

    def begin(self) -> None:
        self.end()
        self.before, self.forward = self.module.__dict__.get("forward"), self.module.forward
        self.module.__dict__["forward"] = self

    def end(self) -> None:
        """Take this one out of the chain, wherever in it: others may have begun after it."""
        own, above = self.module.__dict__, None
        at = own.get("forward")
        while isinstance(at, _Watch) and at is not self:
            above, at = at, at.before
        if at is not self:
            return
        if above is not None:
            above.before, above.forward = self.before, self.forward
        elif self.before is None:
            del own["forward"]
        else:
            own["forward"] = self.before

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.end()
        try:
            for visit in filter(self.attached, self.visits):
                if visit.attention is self.module and visit.seen is not None:
                    visit.start = visit.seen(kwargs, visit.wire.site.layer)
                if visit.wire.within is not self.module:
                    continue
                match visit.wire.read:
                    case int(position):
                        visit.capture(args[position])
                    case str(name) if name in kwargs:
                        visit.capture(kwargs[name])
            return self.forward(*args, **kwargs)
        finally:
            for visit in self.visits:
                visit.end_skip()

    def attached(self, visit: _Visit) -> bool:
        """An error between the entry of the block and this call may have taken our hooks away."""
        return any(getattr(handle.user_hook, "visit", None) is visit for handle in self.points[visit.wire.write].fwd_hooks)


class _Arrive:
    """Runs at the entry of a block: sees that its matrices are those that were decomposed, arms what has to be armed and settles the order of
    the hooks in the block."""

    def __init__(self, visits: Sequence[_Visit], points: Mapping[str, HookPoint], model: Any):
        self.visits, self.points, self.model = visits, points, model
        modules = {module: None for visit in visits for module in visit.watched}
        self.watches = [_Watch(module, [visit for visit in visits if module in visit.watched], points) for module in modules]

    def disarm(self) -> None:
        for visit in self.visits:
            visit.disarm()
        for watch in self.watches:
            watch.end()

    def __call__(self, tensor: Tensor, hook: Any) -> None:
        self.disarm()
        for visit in self.visits:
            visit.pending = True
            if not is_held(visit.wire.site):
                check_unchanged(self.model, visit.wire.site)
                check_reached(self.model, visit.made)
        for watch in self.watches:
            watch.begin()
        for visit in self.visits:  # what one of several rewrites of a matrix looks at has to be computed
            there = [handle.user_hook for handle in self.points[visit.wire.write].fwd_hooks]
            visit.skips = visit.wire.idle is not None and all(f.visit.replaces for f in there if isinstance(f, _Override))
        for point in self.points.values():
            order: Any = point._forward_hooks  # an OrderedDict: torch's own prepend works on it so
            own = [(handle.hook.id, handle.user_hook) for handle in point.fwd_hooks]
            own.sort(key=lambda entry: not (isinstance(entry[1], _Override) and entry[1].visit.replaces))  # others change what it writes
            for key, function in reversed(own):
                if isinstance(function, _Override) and key in order:
                    order.move_to_end(key, last=False)
            for key, function in own:
                if isinstance(function, _Capture) and key in order:
                    order.move_to_end(key)


class Overheard:
    """While it lasts, what a model's `forward` is called with is told to `hear` before each call, and None after it. An object and no closure:
    a copy of the model has a copy of it, which `unwatch` finds."""

    def __init__(self, model: nn.Module, hear: Callable[[tuple[tuple, dict] | None], Any]):
        self.model, self.hear, self.before, self.forward = model, hear, model.__dict__.get("forward"), model.forward
        update_wrapper(self, self.forward)

    def __enter__(self) -> "Overheard":
        self.model.__dict__["forward"] = self
        return self

    def __exit__(self, *_: Any) -> None:
        self.end()

    def end(self) -> None:
        if self.model.__dict__.get("forward") is self:
            del self.model.__dict__["forward"]
            if self.before is not None:
                self.model.__dict__["forward"] = self.before

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.hear((args, kwargs))
        try:
            return self.forward(*args, **kwargs)
        finally:
            self.hear(None)


def disarm(hooks: Iterable[Hook]) -> None:
    """Take back what a forward pass has left that was broken off between a block's entry and its end."""
    for _, function in hooks:
        if isinstance(function, _Arrive):
            function.disarm()


def unwatch(model: nn.Module) -> None:
    """Take back every watch of a model, whosever: of a copy, which nobody waits for."""
    for module in model.modules():
        while isinstance(watch := module.__dict__.get("forward"), (_Watch, Overheard)):
            watch.end()
