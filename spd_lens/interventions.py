"""Cut, project out, rewire: what is done to the *original* weights by what a decomposition found.

1. Ablating, keeping and rewiring are one low-rank `Change` of a site's weight each, `W + V·U`: taking subcomponents out adds `-v_c ⊗ u_c`,
   another output direction adds `v_c ⊗ (u' - u_c)` (arXiv 2607.13047 swaps two). Projecting out on the reading side is `-q ⊗ qᵀW`.
2. As hooks a change adds `(x·V)·U` to what the site writes, `Where` it is wanted: positions, examples, strength.
3. As an edit it is added to the weight of a copy of the model (`spd_lens.weights`). The two agree because they are one object.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from math import inf, isfinite
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from spd_lens.errors import SPDError, nearest
from spd_lens.guards import back, double, steady
from spd_lens.masks import THRESHOLD
from spd_lens.sites import Hook, Passage, Rewrite, model_device
from spd_lens.visits import rewrite_hooks
from spd_lens.weights import check_writable, hooked, rewritten, set_weight

if TYPE_CHECKING:
    from spd_lens.decomposition import Decomposition

One = tuple[str, int]  # a subcomponent: its site and its index

SIDES = ("input", "output")
LOOKED_AT, SAME = 8, 1e-3  # positions on which an edit is looked at; what rounding may make of it
DEPENDENT = 1e-5  # a direction of which less than this lies outside the others' span adds nothing to it


@dataclass(frozen=True, eq=False)
class Change:
    """`W + V·U`, with V `[d_in, k]` and U `[k, d_out]`."""

    V: Float[Tensor, "d_in k"]
    U: Float[Tensor, "k d_out"]

    def added(self, x: Tensor) -> Tensor:
        """What it adds to the site's output for the input `x`."""
        return (x @ self.V.to(x.dtype)) @ self.U.to(x.dtype)

    def weight(self, weight: Float[Tensor, "d_in d_out"]) -> Float[Tensor, "d_in d_out"]:
        return back(double(weight) + double(self.V) @ double(self.U), weight)


@dataclass(frozen=True, eq=False)
class Where:
    """At which positions of which examples an intervention acts, and how strongly; `where` checks what a person gives."""

    positions: list[int] | slice | Float[Tensor, "rows columns"] | None
    examples: list[int] | None
    strength: float

    def weights(self, passage: Passage) -> Tensor | float:
        """How much of it: a number, or `[b or 1, s, 1]`."""
        if self.positions is None and self.examples is None:
            return self.strength
        b, s = passage.x.shape[:2]
        here = passage.x.new_ones(1, s) if self.positions is None else self._along(passage, b, s)
        if self.examples is not None:
            beyond = [i for i in self.examples if not -b <= i < b]
            if beyond:
                raise SPDError(f"examples {beyond[:5]} were chosen and the batch has 0 … {b - 1}.")
            rows = here.new_zeros(b)
            rows[self.examples] = 1
            here = here * rows[:, None]
        return self.strength * here[..., None]

    def _along(self, passage: Passage, b: int, s: int) -> Tensor:
        """Positions count from the beginning of the whole sequence, of which this pass sees the end."""
        length = passage.start + s
        match self.positions:
            case slice() as positions:
                row = passage.x.new_zeros(1, length)
                row[:, positions] = 1
            case list() as positions:
                beyond = [p for p in positions if not -length <= p < length]
                if beyond:
                    raise SPDError(f"positions {beyond[:5]} were chosen and the sequence has 0 … {length - 1}; "
                                   "slice(a, None) means every position from a on, those that are generated later included.")  # fmt: skip
                row = passage.x.new_zeros(1, length)
                row[:, positions] = 1
            case Tensor() as given:
                rows, columns = given.shape
                if rows not in (1, b) or (columns not in (1, length) and not (passage.start and columns < length)):
                    raise SPDError(f"positions has shape {list(given.shape)}; it has to broadcast to [b, s] = [{b}, {length}].")
                if columns == 1:
                    return given.to(passage.x)
                row = passage.x.new_zeros(rows, length)
                row[:, :columns] = given.to(row)
        return row[:, passage.start :]


def where(model: Any, positions: Any, examples: Any, strength: Any) -> Where:
    if isinstance(strength, bool) or not isinstance(strength, (int, float)) or not isfinite(strength):
        raise SPDError(f"strength {strength!r} was given; it is a finite number, 1 for the whole effect.")
    if isinstance(positions, Tensor) and (positions.dtype == torch.bool or positions.is_floating_point()):
        if positions.ndim > 2 or not torch.isfinite(positions.float()).all():
            raise SPDError(f"positions of shape {list(positions.shape)} were given; a mask is finite and broadcasts to [b, s].")
        positions = positions.detach().reshape(-1, positions.shape[-1] if positions.ndim else 1).float()
    elif positions is not None and not isinstance(positions, slice):
        positions, context = _integers(positions, "positions"), model.cfg.n_ctx
        for p in positions:
            if not -context <= p < context:
                raise SPDError(f"position {p} was chosen and the model's n_ctx is {context}: 0 … {context - 1}, or negative from the end.")
    return Where(positions, None if examples is None else _integers(examples, "examples"), float(strength))


@steady()
def ablate(d: "Decomposition", chosen: Any, positions: Any = None, examples: Any = None, strength: Any = 1.0) -> list[Hook]:
    """See `Decomposition.ablate`."""
    here = where(d.model, positions, examples, strength)
    return _hooks(d, _rewired(d, chosen, (), {}), here)


@steady()
def keep(d: "Decomposition", chosen: Any, positions: Any = None, examples: Any = None, strength: Any = 1.0) -> list[Hook]:
    """See `Decomposition.keep`."""
    others = {name: sorted(set(range(d.components[name].C)) - set(kept)) for name, kept in choice(d, chosen).items()}
    return ablate(d, others, positions, examples, strength)


@steady()
def project_out(
    d: "Decomposition", chosen: Any, side: Any = "input", positions: Any = None, examples: Any = None, strength: Any = 1.0
) -> list[Hook]:
    """See `Decomposition.project_out`."""
    if side not in SIDES:
        raise SPDError(f"side {side!r} was given; {nearest(str(side), SIDES)}: what the matrix reads, or what it writes.")
    here = where(d.model, positions, examples, strength)
    rewrites: dict[str, Rewrite] = {}
    changes: dict[str, Change] = {}
    for name, index in choice(d, chosen).items():
        components = d.components[name]
        weight, Q = d.sites[name].weight, span(components.V[:, index] if side == "input" else components.U[index].T)
        if side == "input":
            changes[name] = Change(back(Q, weight), back(-Q.T @ double(weight), weight))
        else:
            rewrites[name] = _without(back(Q, weight), here)
    return _hooks(d, changes, here) + _attachable(d, rewrites, here)


@steady()
def rewire(d: "Decomposition", swap_outputs: Any = (), set_output: Any = None, calibrate_on: Any = None) -> list[Hook]:
    """See `Decomposition.rewire`."""
    return _hooks(d, _rewired(d, {}, swap_outputs, set_output or {}, calibrate_on), Where(None, None, 1.0))


@steady()
def edited_model(
    d: "Decomposition",
    remove: Any = None,
    swap_outputs: Any = (),
    set_output: Any = None,
    calibrate_on: Any = None,
) -> Any:
    """See `Decomposition.edited_model`."""
    changes = _rewired(d, remove or {}, swap_outputs, set_output or {}, calibrate_on)
    d.check_model()
    for name in changes:
        check_writable(d.model, name)
    weights = {name: change.weight(d.sites[name].weight) for name, change in changes.items()}
    new = rewritten(d.model, weights)
    if changes:
        _check_edited(d, new, changes, weights)
    return new


@torch.no_grad()
def _check_edited(d: "Decomposition", new: Any, changes: Mapping[str, Change], weights: Mapping[str, Tensor]) -> None:
    """An error where the copy does not compute with what was written: TransformerLens wraps some architectures in functions of the original's
    modules, and a matrix may be read from another place than where it is shown.

    1. With `-W` written, every changed matrix gives `-x·W`: nothing else would.
    2. With W written back, hooks give what the edited weights give; the original, if nobody has hooks on it, gives the same.
    """
    vocabulary, length = d.model.cfg.d_vocab, min(LOOKED_AT, d.model.cfg.n_ctx)
    tokens = torch.linspace(0, vocabulary - 1, 2 * length, dtype=torch.float32, device=model_device(d.model)).long().view(2, length)
    seen: dict[str, float] = {}

    def look(name: str) -> Rewrite:
        def rewrite(passage: Passage) -> None:
            assert passage.y is not None
            product, y = passage.taken(passage.source @ -d.sites[name].weight), passage.taken(passage.y)
            size = product.abs().max() + 0.01 * y.abs().max()  # of a product far below its bias little is left after the sum
            seen[name] = float((passage.biased(product) - y).abs().max() / size.clamp_min(1e-30))

        return rewrite

    def logits(model: Any, hooks: list[Hook]) -> Tensor:
        with model.hooks(fwd_hooks=hooks):
            return model(tokens, return_type="logits")

    def write(of: Mapping[str, Tensor], sign: int = 1) -> None:
        for name in changes:
            set_weight(new, name, sign * of[name])

    added = {name: _added(change, Where(None, None, 1.0)) for name, change in changes.items()}
    given, original = logits(new, []), {name: d.sites[name].weight for name in changes}
    try:
        write(original, -1)
        negative = {name: replace(d.sites[name], weight=-weight) for name, weight in original.items()}
        logits(new, rewrite_hooks(new, negative, {name: look(name) for name in changes}))
        write(original)
        wanted = [logits(new, rewrite_hooks(new, d.sites, added))]
    finally:
        write(weights)
    if not hooked(d.model):
        wanted.append(logits(d.model, rewrite_hooks(d.model, d.sites, added)))
    for name in changes:
        if not seen.get(name, inf) <= SAME:
            raise SPDError(f"{name} of the copy is not what the copy computes with: TransformerLens runs this architecture in a way that cannot be "
                           "copied. Use the hooks (ablate, rewire), which do the same.")  # fmt: skip
    for one in wanted:
        off = float((one - given).abs().max())
        if not off <= SAME * float(one.abs().max()):
            raise SPDError(f"the edited copy gives other logits than the hooks on {', '.join(changes)} (off by {off:.1e}). Has the model dropout? Then "
                           "call model.eval() first. Else use the hooks (ablate, rewire), which do the same.")  # fmt: skip


def choice(d: "Decomposition", chosen: Any) -> dict[str, list[int]]:
    """Site → indices of its subcomponents, each once; refuses what is not there."""
    if not isinstance(chosen, Mapping):
        raise SPDError(
            f"subcomponents were chosen by a {type(chosen).__name__}; give {{site: indices}}, e.g. {{'{next(iter(d.sites))}': [3, 7]}}."
        )
    found = {name: list(dict.fromkeys(_integers(indices, name))) for name, indices in chosen.items()}
    d.check_chosen(found)
    d.check_model()
    return found


@torch.no_grad()
def span(directions: Float[Tensor, "d k"]) -> Float[Tensor, "d r"]:
    """An orthonormal basis of what the columns span, in double; zero and dependent columns add nothing to it."""
    columns = double(directions.detach())
    columns = columns[:, columns.norm(dim=0) > 0]
    left, singular, _ = torch.linalg.svd(columns / columns.norm(dim=0), full_matrices=False)
    return left[:, singular > DEPENDENT]


@steady()
def peaks(d: "Decomposition", tokens: Any) -> dict[str, Float[Tensor, " C"]]:
    """Site → every subcomponent's inner activation, with its sign, where it is active and importance times activation is largest; else 0."""
    observed = d.look(d.batch(tokens))
    found = {}
    for name, inner in observed.inner.items():
        importance = observed.importances[name].flatten(0, 1)
        own = torch.where(importance > THRESHOLD, inner.flatten(0, 1), 0.0)
        at = (own * importance).abs().argmax(0, keepdim=True)
        found[name] = own.gather(0, at)[0]
    return found


def calibrated(d: "Decomposition", pairs: Iterable[tuple[One, One]], at: Mapping[str, Float[Tensor, " C"]]) -> dict[One, Tensor]:
    """The outputs of an exchange in which each, at its peak, writes exactly what the other wrote at its own.

    Only the product `v_c ⊗ u_c` is learnt: how its length and its sign are shared between `v_c` and `u_c` is not, and rows that are
    exchanged as they stand come out too strong, too weak or reversed.
    """
    new: dict[One, Tensor] = {}
    for a, b in pairs:
        (one, i), (other, j) = a, b
        ratio = at[other][j] / at[one][i]
        new[a], new[b] = d.components[other].U[j] * ratio, d.components[one].U[i] / ratio
    return new


def _rewired(d: "Decomposition", remove: Any, swap_outputs: Any, set_output: Any, calibrate_on: Any = None) -> dict[str, Change]:
    """Every named subcomponent with its new output direction, as one change a site."""
    new: dict[str, dict[int, Tensor]] = {}

    def put(at: tuple[str, int], u: Tensor) -> None:
        name, index = at
        if index in new.setdefault(name, {}):
            raise SPDError(f"{name}: subcomponent {index} is named twice; one of remove, swap_outputs and set_output can have it.")
        new[name][index] = u

    for name, indices in choice(d, remove).items():
        for index in indices:
            put((name, index), d.components[name].U.new_zeros(d.sites[name].d_out))
    pairs = [_pair(d, pair) for pair in swap_outputs]
    for (a, b), outputs in zip(pairs, _exchanged(d, pairs, calibrate_on)):
        put(a, outputs[a])
        put(b, outputs[b])
    if not isinstance(set_output, Mapping):
        raise SPDError(f"set_output is a {type(set_output).__name__}; give {{(site, index): vector or token}}.")
    for key, value in set_output.items():
        at = _one(d, key)
        put(at, _direction(d, at, value))
    changes = {}
    for name, outputs in new.items():
        components, index = d.components[name], list(outputs)
        changes[name] = Change(components.V[:, index].detach(), (torch.stack(list(outputs.values())) - components.U[index]).detach())
    return changes


def _pair(d: "Decomposition", pair: Any) -> tuple[One, One]:
    """A checked pair whose outputs are equally wide."""
    if not isinstance(pair, (tuple, list)) or len(pair) != 2:
        raise SPDError(f"swap_outputs holds {pair!r}; give pairs ((site, index), (site, index)).")
    a, b = (_one(d, at) for at in pair)
    if d.sites[a[0]].d_out != d.sites[b[0]].d_out:
        raise SPDError(
            f"{a[0]} writes {d.sites[a[0]].d_out} wide and {b[0]} {d.sites[b[0]].d_out}; outputs are swapped between equal widths."
        )
    return a, b


def _exchanged(d: "Decomposition", pairs: list[tuple[One, One]], calibrate_on: Any) -> list[dict[One, Tensor]]:
    """Of every pair the two new outputs: as they stand, or calibrated on tokens on which both are active."""
    if calibrate_on is None:
        return [{a: d.components[b[0]].U[b[1]], b: d.components[a[0]].U[a[1]]} for a, b in pairs]
    at = peaks(d, calibrate_on)
    for name, index in (one for pair in pairs for one in pair):
        if not at[name][index]:
            active = torch.nonzero(at[name]).flatten().tolist()
            raise SPDError(f"{name}: subcomponent {index} is active nowhere on calibrate_on, so there is nothing to scale its output by; active "
                           f"there: {active[:10]}{' …' * (len(active) > 10)}. Give tokens on which it is active, or leave calibrate_on out.")  # fmt: skip
    return [calibrated(d, [pair], at) for pair in pairs]


def _hooks(d: "Decomposition", changes: Mapping[str, Change], here: Where) -> list[Hook]:
    return _attachable(d, {name: _added(change, here) for name, change in changes.items()}, here)


def _added(change: Change, here: Where) -> Rewrite:
    def rewrite(passage: Passage) -> Tensor:
        assert passage.y is not None
        return passage.y + here.weights(passage) * change.added(passage.source)

    return rewrite


def _without(Q: Float[Tensor, "d_out r"], here: Where) -> Rewrite:
    def rewrite(passage: Passage) -> Tensor:
        assert passage.y is not None
        basis = Q.to(passage.y.dtype)
        return passage.y - here.weights(passage) * ((passage.y @ basis) @ basis.T)

    return rewrite


def _attachable(d: "Decomposition", rewrites: Mapping[str, Rewrite], here: Where) -> list[Hook]:
    return rewrite_hooks(d.model, d.sites, rewrites, counting=here.positions is not None)


def _integers(given: Any, what: str) -> list[int]:
    """An index, or several: integers of Python, numpy or torch."""
    if isinstance(given, Tensor):
        if given.is_floating_point() or given.dtype == torch.bool or given.ndim > 1:
            raise SPDError(f"{what}: a {given.dtype} tensor of shape {list(given.shape)} was given; give integer indices [k].")
        return given.reshape(-1).tolist()
    values = [given] if hasattr(given, "__index__") and not hasattr(given, "__len__") else given
    if isinstance(values, (str, bytes)) or not isinstance(values, Iterable):
        raise SPDError(f"{what}: {given!r} was given; give an index or a list of them.")
    values = list(values)
    for value in values:
        if isinstance(value, bool) or not hasattr(value, "__index__"):
            raise SPDError(f"{what}: {value!r} is no index; give integers.")
    return [int(value) for value in values]


def _one(d: "Decomposition", at: Any) -> tuple[str, int]:
    """A checked `(site, index)`."""
    if not isinstance(at, tuple) or len(at) != 2 or not isinstance(at[0], str):
        raise SPDError(f"{at!r} names no subcomponent; give (site, index), e.g. ('{next(iter(d.sites))}', 3).")
    ((name, indices),) = choice(d, {at[0]: at[1]}).items()
    if len(indices) != 1:
        raise SPDError(f"{at!r} names {len(indices)} subcomponents; give one index.")
    return name, indices[0]


def _direction(d: "Decomposition", at: tuple[str, int], value: Any) -> Tensor:
    """A vector as it is; a token as its unembedding column with the norm of what it replaces."""
    name, index = at
    site, u = d.sites[name], d.components[name].U[at[1]]
    if isinstance(value, str) or (hasattr(value, "__index__") and not (isinstance(value, Tensor) and value.ndim)):
        column = _unembedding(d, name, value).to(u)
        return column * (u.norm() / column.norm())
    try:
        vector = torch.as_tensor(value, dtype=u.dtype, device=u.device)
    except (TypeError, ValueError, RuntimeError):
        raise SPDError(
            f"{name}, {index}: {type(value).__name__} is no output; give a vector [{site.d_out}], a token's id or its text."
        ) from None
    if vector.shape != u.shape or not torch.isfinite(vector).all():
        wrong = f"has shape {list(vector.shape)}" if vector.shape != u.shape else "holds NaN or infinite entries"
        raise SPDError(f"{name}, {index}: the vector {wrong}; an output of this site is finite and [{site.d_out}].")
    return vector


def _unembedding(d: "Decomposition", name: str, token: Any) -> Tensor:
    model = d.model
    if d.sites[name].kind not in ("W_O", "W_out"):
        raise SPDError(f"{name} does not write to the residual stream, where a token has a direction; W_O and W_out do. Give a vector.")
    if isinstance(token, str):
        if getattr(model, "tokenizer", None) is None:
            raise SPDError(f"the token {token!r} was given as text, but the model has no tokenizer; give its id.")
        ids = model.to_tokens(token, prepend_bos=False).flatten().tolist()
        if len(ids) != 1:
            raise SPDError(f"{token!r} is {len(ids)} tokens, {ids}; give one token (a space before a word matters), or one of the ids.")
        token = ids[0]
    W_U = model.W_U.detach()
    token = int(token)
    if not 0 <= token < W_U.shape[1]:
        raise SPDError(f"token {token} was given; the vocabulary is 0 … {W_U.shape[1] - 1}.")
    return W_U[:, token]
