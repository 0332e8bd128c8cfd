"""Which subcomponents carry a metric from one prompt to another: TransformerLens' `patching`, subcomponent by subcomponent.

1. A subcomponent's *effect* is what the metric gains when its inner activation `a = v_c·x` is another one: the clean prompt's in the run on the
   corrupted prompt (`attribution_patching`, `activation_patching`), or zero in the run itself (`attribution`, `ablation_effects`). The weights
   are the original ones: `x·W + (a' - a)·u_c`, whatever the decomposition leaves.
2. First order: `Σ (a' - a)·∂metric/∂a`, of all subcomponents of all sites by one backward pass. The gradient on `a` is that on what the
   site writes, times `u_c`.
3. Exact: one run each, several stacked along the batch; the blocks before the site are not run again.
"""

from collections.abc import Callable, Iterator, Mapping
from math import isfinite
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from spd_lens.decomposition import Decomposition, Trace
from spd_lens.errors import SPDError
from spd_lens.guards import frozen, steady
from spd_lens.interventions import One, choice
from spd_lens.losses import kl_divergence
from spd_lens.sites import Passage, Rewrite
from spd_lens.suffix import repeated, resumed, rows_at_once
from spd_lens.tokens import Batch

Metric = Callable[[Tensor], Any]  # logits [b, s, vocabulary] → one number
Inner = Mapping[str, Float[Tensor, "b s C"]]
Place = tuple[str, int, int | None]  # site, subcomponent, position (None: all of them at once)

ROWS = 64  # of one stacked pass, unless the batch alone is larger


@steady(gradients=True)
def attribution_patching(
    d: Decomposition, clean: Any, corrupted: Any, metric: Metric, per_position: bool = False, attention_mask: Any = None
) -> pd.DataFrame:
    """First-order effect of each subcomponent's clean inner activation in the corrupted run (Nanda 2023, *Attribution patching*; Syed et al.
    2023, arXiv 2310.10348): two forward passes and one backward, for everything at once.

    Args:
        d: the decomposition.
        clean, corrupted: tokens `[b, s]` of one shape and padding, or text where the model has a tokenizer.
        metric: a differentiable function of the logits `[b, s, vocabulary]`, one number. At padding they are nan, so that a metric cannot
            look there unnoticed.
        per_position: a row for each position, else their sum.
        attention_mask: `[b, s]`, 0 at padding, of both (`spd_lens.tokens.take_in`).

    Returns:
        `site`, `subcomponent`, (`position`,) `effect` in the metric's unit, largest |effect| first.

    Raises:
        SPDError: prompts of different shapes, or a metric that is not one number or has no gradient.
    """
    clean_tokens, tokens = _pair(d, clean, corrupted, attention_mask)
    run = _trace(d, tokens)
    return _first_order(d, run, _inner(d, run), _inner(d, _trace(d, clean_tokens)), metric, per_position)


@steady(gradients=True)
def attribution(d: Decomposition, tokens: Any, metric: Metric, per_position: bool = False, attention_mask: Any = None) -> pd.DataFrame:
    """First-order effect of ablating each subcomponent, `-Σ a·∂metric/∂a`; arguments and table as in `attribution_patching`."""
    run = _trace(d, d.batch(tokens, attention_mask))
    return _first_order(d, run, _inner(d, run), None, metric, per_position)


@steady()
def activation_patching(
    d: Decomposition,
    clean: Any,
    corrupted: Any,
    metric: Metric,
    chosen: Any = None,
    per_position: bool = False,
    progress: bool = True,
    attention_mask: Any = None,
) -> pd.DataFrame:
    """The exact effect of each subcomponent's clean inner activation in the corrupted run: one run each.

    Args:
        d, clean, corrupted, per_position: as in `attribution_patching`.
        metric: any function of the logits `[b, s, vocabulary]` that gives one number.
        chosen: site → indices; or a table as these functions return (`attribution_patching(…).head(50)`), its positions too; None: all.
        progress: whether to show a bar.
        attention_mask: as in `attribution_patching`.

    Returns:
        the table of `attribution_patching`.

    Raises:
        SPDError: prompts of different shapes, a metric that is not one number, or a choice of what is not there.
    """
    clean_tokens, tokens = _pair(d, clean, corrupted, attention_mask)
    run = _trace(d, tokens)
    return _exact(d, run, _inner(d, run), _inner(d, _trace(d, clean_tokens)), metric, chosen, per_position, progress)


@steady()
def ablation_effects(
    d: Decomposition, tokens: Any, metric: Metric, chosen: Any = None, per_position: bool = False, progress: bool = True,
    attention_mask: Any = None,
) -> pd.DataFrame:  # fmt: skip
    """The exact effect of ablating each subcomponent, as `Decomposition.ablate` does; arguments and table as in `activation_patching`."""
    run = _trace(d, d.batch(tokens, attention_mask))
    return _exact(d, run, _inner(d, run), None, metric, chosen, per_position, progress)


@steady()
def cut_costs(d: Decomposition, tokens: Any, chosen: Any = None, progress: bool = False, attention_mask: Any = None) -> dict[One, float]:
    """What cutting each subcomponent alone out of the original weights does to the outputs, whichever they are: KL(original ‖ without it) in
    nats, mean over the compared outputs; one run each.

    Args:
        d: the decomposition.
        tokens, attention_mask: `[b, s]`, as `spd_lens.tokens.take_in` takes them.
        chosen, progress: as in `activation_patching`.
    """
    tokens, positions = d.batch(tokens, attention_mask), d.config.output_positions
    costs: dict[One, float] = {}
    for batch in tokens.split(rows_at_once(d.model, tokens.shape[1], ROWS)):
        run = _trace(d, batch)
        clean = batch.compared(run.logits, positions)

        def cost(logits: Tensor, clean: Tensor = clean, batch: Batch = batch) -> Tensor:
            return batch.mean(kl_divergence(clean, batch.compared(logits, positions)), positions)

        table = _exact(d, run, _inner(d, run), None, cost, chosen, False, progress, own=True)
        for name, c, effect in zip(table["site"], table["subcomponent"], table["effect"]):
            costs[name, int(c)] = costs.get((name, int(c)), 0.0) + float(effect) * batch.outputs(positions) / tokens.outputs(positions)
    return costs


def _first_order(d: Decomposition, run: Trace, inner: Inner, wanted: Inner | None, metric: Metric, per_position: bool) -> pd.DataFrame:
    b, s = run.batch.shape
    with torch.enable_grad(), frozen(d.model):
        added = {name: run.logits.new_zeros(b, s, site.d_out, requires_grad=True) for name, site in d.sites.items()}
        logits = d._forward(run.batch, {name: _adding(d, name, extra) for name, extra in added.items()})
        value = _number(metric(_told(run.batch, logits)), run.batch)
        if not isinstance(value, Tensor) or not value.requires_grad:
            raise SPDError("the metric has no gradient; compute it from the logits it is given, without detach, argmax or item.")
        gradients = torch.autograd.grad(value, list(added.values()), allow_unused=True, materialize_grads=True)
    effects = {}
    for name, gradient in zip(added, gradients):
        difference = -inner[name] if wanted is None else wanted[name] - inner[name]
        effect = run.batch.blanked(difference * (gradient @ d.components[name].U.detach().T))
        effects[name] = run.batch.given(effect).sum(0)  # [s, C]
    rows = [(name, c, p) for name, e in effects.items() for p in (range(s) if per_position else [None]) for c in range(e.shape[1])]
    return _ranked(rows, torch.cat([(e if per_position else e.sum(0)).flatten() for e in effects.values()]).tolist(), per_position)


@torch.no_grad()
def _exact(
    d: Decomposition, run: Trace, inner: Inner, wanted: Inner | None, metric: Metric, chosen: Any, per_position: bool, progress: bool,
    own: bool = False,
) -> pd.DataFrame:  # fmt: skip
    """`own`: the metric is ours and knows the padding."""
    batch = run.batch

    def measured(logits: Tensor) -> float:
        return float(_number(metric(logits if own else _told(batch, logits)), batch))

    places = list(_places(d, chosen, batch.shape[1], per_position))
    before = measured(run.logits)
    effects: list[float] = []
    with tqdm(total=len(places), disable=not progress, desc="patching", unit="run") as bar:
        for stack in _stacks(places, max(1, rows_at_once(d.model, batch.shape[1], ROWS) // len(batch))):
            name = stack[0][0]
            difference = -inner[name] if wanted is None else wanted[name] - inner[name]
            extra = torch.cat([_written(d, batch, difference, place) for place in stack])
            layer, many = d.sites[name].layer, len(stack)
            start = repeated(run.blocks[layer - 1], len(batch), many) if layer else None
            with resumed(d.model, start, layer):
                logits = d._forward(batch.repeated(many), {name: _adding(d, name, extra)})
            effects += [measured(part) - before for part in logits.unflatten(0, (many, -1))]
            bar.update(many)
    return _ranked(places, effects, per_position)


def _told(batch: Batch, logits: Float[Tensor, "b s v"]) -> Float[Tensor, "b s v"]:
    """The logits as the person's metric gets them: at the positions of the tokens as they were given, nan at padding."""
    if batch.real is None:
        return logits
    return batch.given(logits.masked_fill(~batch.real[..., None], torch.nan))


def _written(d: Decomposition, batch: Batch, difference: Float[Tensor, "b s C"], place: Place) -> Float[Tensor, "b s d_out"]:
    """What is added to the site's output; the position is one of the tokens as they were given."""
    name, c, position = place
    a = batch.blanked(difference[..., c])
    if position is not None:
        there = torch.arange(a.shape[1], device=a.device).expand_as(a) == position
        a = a * batch.aligned(there[..., None])[..., 0]
    return a[..., None] * d.components[name].U[c]


def _adding(d: Decomposition, name: str, extra: Float[Tensor, "b s d_out"]) -> Rewrite:
    def rewrite(passage: Passage) -> Tensor:
        assert passage.y is not None
        summed = d.sites[name].heads if d.sites[name].kind == "W_O" and passage.by_head is not None else 1  # use_attn_result
        return passage.y + extra / summed

    return rewrite


def _stacks(places: list[Place], most: int) -> Iterator[list[Place]]:
    """Runs of one site together, at most so many."""
    stack: list[Place] = []
    for place in places:
        if stack and (place[0] != stack[0][0] or len(stack) == most):
            yield stack
            stack = []
        stack.append(place)
    if stack:
        yield stack


def _places(d: Decomposition, chosen: Any, s: int, per_position: bool) -> Iterator[Place]:
    everywhere = range(s) if per_position else [None]
    if isinstance(chosen, pd.DataFrame):
        missing = {"site", "subcomponent"} - set(chosen.columns)
        if missing:
            raise SPDError(f"the table has no column {', '.join(sorted(missing))}; give one as attribution_patching returns it.")
        rows = chosen.sort_values("site", kind="stable")
        choice(d, {name: part["subcomponent"].tolist() for name, part in rows.groupby("site")})
        named = rows["position"].tolist() if per_position and "position" in rows else [None] * len(rows)
        for name, c, position in zip(rows["site"], rows["subcomponent"], named):
            if position is not None and not 0 <= position < s:
                raise SPDError(f"position {position} was chosen and the sequence has 0 … {s - 1}.")
            yield from ((name, int(c), p) for p in (everywhere if position is None else [int(position)]))
        return
    for name, indices in choice(d, {name: range(c.C) for name, c in d.components.items()} if chosen is None else chosen).items():
        yield from ((name, c, p) for p in everywhere for c in indices)


def _ranked(places: list[Place], effects: list[float], per_position: bool) -> pd.DataFrame:
    table = pd.DataFrame(places, columns=["site", "subcomponent", "position"]).assign(effect=pd.Series(effects, dtype=float))
    table = table if per_position else table.drop(columns="position")
    return table.sort_values("effect", key=abs, ascending=False, kind="stable", ignore_index=True)


def _pair(d: Decomposition, clean: Any, corrupted: Any, attention_mask: Any) -> tuple[Batch, Batch]:
    first, second = d.batch(clean, attention_mask), d.batch(corrupted, attention_mask)
    if first.shape != second.shape:
        raise SPDError(f"clean is {list(first.shape)} and corrupted {list(second.shape)} tokens; patching needs them of one shape, [b, s].")
    if not torch.equal(first.last, second.last):
        raise SPDError("clean and corrupted are padded differently; patching needs sequences of the same lengths, one by one.")
    return first, second


@torch.no_grad()
def _trace(d: Decomposition, batch: Batch) -> Trace:
    return d.trace(batch)


@torch.no_grad()
def _inner(d: Decomposition, trace: Trace) -> dict[str, Tensor]:
    return {name: d.components[name].inner(x) for name, x in trace.inputs.items()}


def _number(value: Any, batch: Batch) -> Any:
    """The metric's value, if it is one finite number."""
    if isinstance(value, Tensor) and value.numel() != 1:
        raise SPDError(f"the metric gave a tensor of shape {list(value.shape)}; it has to give one number, e.g. its mean.")
    try:
        number = float(value.detach() if isinstance(value, Tensor) else value)
    except (TypeError, ValueError):
        raise SPDError(f"the metric gave a {type(value).__name__}; it has to give one number.") from None
    if not isfinite(number):
        padded = (
            ""
            if batch.real is None
            else " At padding the logits are nan: look at real tokens alone (Observation.real says where they are)."
        )
        raise SPDError(f"the metric gave {number}; effects need a finite number.{padded}")
    return value
