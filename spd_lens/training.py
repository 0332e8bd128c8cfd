"""Learning a decomposition (arXiv 2506.20790, section 2; arXiv 2511.08854, section 3).

One step:
1. clean pass: the original logits and the input of every site, without gradients;
2. inner activations and importances of every site;
3. the masked passes of every reconstruction loss, stacked along the batch (`Decomposition.run_many`), their KL, and its gradient as
   far as the importance logits, one lot of passes after the other;
4. the penalties and their gradient;
5. backward through the importance functions, then Adam.
"""

import itertools
import json
import math
import os
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal, TypedDict

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from spd_lens import masks
from spd_lens.advice import SETTLED, Advice, advise, while_training
from spd_lens.batches import Batches
from spd_lens.components import check_weight, from_positions, initialise, targeted
from spd_lens.config import SPDConfig
from spd_lens.curvature import factors, targets, watched
from spd_lens.decomposition import Decomposition, Trace
from spd_lens.errors import SPDError, nearest
from spd_lens.guards import frozen, interrupts_wait, out_of_memory, reproducible, steady
from spd_lens.importance import build_importance, lower_leaky
from spd_lens.losses import LOSSES, Pass, Reconstruction, kl_from, of_stream
from spd_lens.ranks import ALONE, Ranks, join
from spd_lens.retirement import close, merge, retire
from spd_lens.schema import Count, Natural, brief
from spd_lens.sites import Site, find_sites, held, is_causal, model_device
from spd_lens.storage import FORMAT, Saved, check_writable, write_tensors
from spd_lens.tokens import Batch

ADVERSARY_STEP = 0.1
TAUGHT = 32  # sequences on which a finished decomposition is looked at
TOKENS_PER_PASS, CUDA_TOKENS_PER_PASS = 1 << 12, 1 << 16
IDENTITY_TOLERANCE = 1e-3  # of the logits' largest value: far above rounding, far below a matrix at the wrong place


@dataclass(frozen=True, eq=False)
class StepResult:
    """What one training step did.

    Attributes:
        step: counted from 1.
        losses: each by name, unweighted: KL in nats, faithfulness in squared weight units.
        total: their weighted sum.
        active: site → mean number of active subcomponents (g > 0.5) per position.
        decomposition: as it is after the step.
    """

    step: int
    losses: dict[str, Tensor]
    total: Tensor
    active: dict[str, Tensor]
    decomposition: Decomposition

    def figures(self) -> dict[str, Any]:
        """The same as plain numbers."""
        return {"step": self.step, "total": float(self.total), **{name: float(v) for name, v in self.losses.items()},
                "active": {name: float(v) for name, v in self.active.items()}}  # fmt: skip


Callback = Callable[[StepResult], None]


@steady(gradients=True, lasting="being decomposed")
def decompose(
    model: Any, tokens: Any, config: SPDConfig | None = None, *, attention_mask: Any = None, progress: bool = True,
    background: Any = None, checkpoint: str | Path | None = None, checkpoint_every: int = 500,
    resume: bool = False, callbacks: Iterable[Callback] = (),
) -> Decomposition:  # fmt: skip
    """Split the model's matrices into rank-one subcomponents and learn which of them each position needs.

    Called in every process of `torchrun` or `accelerate launch`, these train one decomposition together (`spd_lens.ranks`).

    Args:
        model: a `HookedTransformer` or `TransformerBridge` in float32. It is not changed.
        tokens: `[N, seq]`, from which each step draws `config.batch_size` rows: a tensor, texts, or a tokenizer's dict; or an iterable of
            batches, each of which may be one of these, gone through as often as the steps need where it can be (a list, a DataLoader); or a
            dataset of Hugging Face, of which `config.batch_size` rows in its order make a batch. Where an iterator ends early, training ends
            there with a warning. Several processes iterate over the same batches, and each takes its rows of every one.
        attention_mask: `[N, seq]`, 0 at padding, where tokens are one tensor (`spd_lens.tokens.take_in`).
        config: `SPDConfig()` by default; `steps=0` returns the initialised decomposition.
        background: other text, as `tokens`: a targeted decomposition (`SPDConfig.targeted()`). On it the delta is fully on, and what is learnt
            for `tokens` has to be harmless and is to be inactive.
        progress: show a bar with faithfulness, stochastic KL and active subcomponents per position.
        checkpoint: a file to keep the state of the training in, written whole or not at all. Several
            processes have to see the same file, and the first of them writes it.
        checkpoint_every: steps between two checkpoints. Ctrl-C writes one more before it stops.
        resume: go on from `checkpoint` where it exists; the result is the same to the bit as without the interruption.
        callbacks: called with a `StepResult` after every step, in every process.

    Raises:
        SPDError: for bad input, before any work starts; during training, when a loss is no longer finite (the step and
            the term are named), or a batch cannot be used. Where a batch, the iterable itself or a callback fails, the last whole step is
            in `checkpoint`.
    """
    config = SPDConfig() if config is None else config
    callbacks = _checked_options(config, checkpoint, checkpoint_every, resume, callbacks)
    ranks = join(model) if hasattr(model, "parameters") else ALONE
    model_at = model_device(model) if hasattr(model, "parameters") else None
    sites = find_sites(model, config.sites)
    for site in sites.values():
        check_weight(site)
    _warn_of_idle_patterns(config, sites)
    if config.device is not None and model_at is not None and config.device not in (str(model_at), model_at.type):
        raise SPDError(f"config.device is {config.device!r} and the model is on {model_at}; move it with model.to({config.device!r}).")
    for name in config.weights:
        if name not in LOSSES:
            raise SPDError(f"there is no loss {name!r}; {nearest(name, LOSSES)}.")
    if (background is not None) != config.is_targeted:
        raise SPDError("the config is that of a targeted decomposition, and no background was given; give decompose(…, background=other text)."
                       if config.is_targeted else "a background was given, and the config has no use for it; take SPDConfig.targeted(…), or give "
                       "a weight to the loss 'background'.")  # fmt: skip
    checkpoint = None if checkpoint is None else Path(checkpoint)
    if checkpoint is not None and checkpoint.exists() and not resume:
        raise SPDError(f"{checkpoint} exists; pass resume=True to go on from it, or delete it to start anew.")
    data = Batches(model, tokens, config, attention_mask)
    other = None if background is None else Batches(model, background, config)
    ranks.per_rank(len(data.example) if data.whole is None else config.batch_size)
    ranks.expect_alike({"config": config.to_json(), "tokens": (data.example if data.whole is None else data.whole).ids,
                        **({} if other is None else {"background": (other.example if other.whole is None else other.whole).ids}),
                        "checkpoint (all have to see one file)": checkpoint is not None and checkpoint.exists(),
                        **{name: site.weight for name, site in sites.items()}})  # fmt: skip
    if checkpoint is not None:
        folder = checkpoint.parent
        numbers = sum(site.weight.numel() + 40 * (site.d_in + site.d_out) * count(config, site.name) for site in sites.values())
        ranks.only_first(lambda: check_writable(folder, 12 * numbers))
    with frozen(model), reproducible(), held(sites.values()):
        decomposition = initialised(model, sites, data.example, config, data.sample, None if other is None else other.sample, data.reach)
        ranks.from_first(decomposition.state().values())
        check_identity(decomposition, data.example[:2])
        trainer = Trainer(decomposition, ranks)
        if checkpoint is not None and checkpoint.exists():
            trainer.load(checkpoint)
        fit(trainer, data, other, progress and ranks.rank == 0, checkpoint, checkpoint_every, callbacks)
        if config.exact and config.steps:
            trainer.close(data.sample)
    if ranks.rank == 0:
        _teach_at_the_end(trainer, data.example)
    return decomposition


def _checked_options(config: Any, checkpoint: Any, checkpoint_every: Any, resume: Any, callbacks: Any) -> list[Callback]:
    """Nothing else is looked at so early; the callbacks as a list."""
    if not isinstance(config, SPDConfig):
        mend = "SPDConfig(**{…}), which checks it" if isinstance(config, Mapping) else "an SPDConfig"
        raise SPDError(f"config was given as {brief(config)}; give {mend}.")
    if not isinstance(checkpoint_every, int | np.integer) or checkpoint_every < 1:
        raise SPDError(f"checkpoint_every was given as {brief(checkpoint_every)}; it is a number of steps, at least 1.")
    if checkpoint is not None and not isinstance(checkpoint, str | os.PathLike):
        raise SPDError(f"checkpoint was given as {brief(checkpoint)}; give a file's name, or None.")
    if resume and checkpoint is None:
        raise SPDError("resume=True was given without a checkpoint, and there is nothing to go on from; give checkpoint=the file.")
    given: list[Any] = list(callbacks) if isinstance(callbacks, Iterable) else [None]
    if not all(map(callable, given)):
        raise SPDError(f"callbacks were given as {brief(callbacks)}; give a list of functions of a StepResult.")
    return given


def _warn_of_idle_patterns(config: SPDConfig, names: Iterable[str]) -> None:
    """A misspelt pattern of `subcomponents`, or one behind a more general one, would change nothing."""
    given = config.subcomponents if isinstance(config.subcomponents, Mapping) else {}
    used = {next((pattern for pattern in given if fnmatchcase(name, pattern)), None) for name in names}
    for pattern in given:
        if pattern not in used:
            warnings.warn(f"subcomponents: {pattern!r} is used for no matrix; the first pattern that matches counts, so check its spelling, and give "
                          "the more general ones last.", stacklevel=3)  # fmt: skip


def count(config: SPDConfig, name: str) -> int:
    """How many subcomponents the config gives to a site."""
    if isinstance(config.subcomponents, int):
        return config.subcomponents
    for pattern, C in config.subcomponents.items():
        if fnmatchcase(name, pattern):
            return C
    raise SPDError(f"subcomponents names no pattern for {name}; given: {', '.join(config.subcomponents)}. Add one, e.g. '*': 64.")


def initialised(
    model: Any, sites: dict[str, Site], example: Batch | Tensor, config: SPDConfig, sample: Batch | Tensor | None = None,
    background: Batch | Tensor | None = None, reach: int | None = None,
) -> Decomposition:  # fmt: skip
    """The untrained decomposition: subcomponents from each matrix and its curvature on `sample` (None: on `example`), importance functions
    scaled to the inputs of `example`, with positions up to `reach` (None: as long as `example`). With a background, those of what the matrix
    does on `sample` and not there."""
    device = next(iter(sites.values())).weight.device
    generator = torch.Generator(device).manual_seed(config.seed)
    decomposition = Decomposition(model, sites, {}, {}, config)
    example = Batch.of(example)
    rows = max(1, TOKENS_PER_PASS // example.shape[1])
    weighing = (
        factors(decomposition, example if sample is None else sample, generator, rows)
        if config.init == "fisher" and background is None
        else {}
    )
    data = (
        watched(decomposition, example if sample is None else sample, generator, rows)
        if config.init == "positions" and background is None
        else {}
    )
    aims = {} if background is None else targets(decomposition, example if sample is None else sample, background, generator, rows)
    for name, site in sites.items():
        C = count(config, name)
        decomposition.components[name] = (
            targeted(site, C, aims[name], generator)
            if aims
            else from_positions(site, C, *data[name], generator)
            if data
            else initialise(site, C, config.init, generator, weighing.get(name))
        )
    components = decomposition.components
    with torch.no_grad():
        for name, x in decomposition.trace(example).inputs.items():
            decomposition.gates[name] = build_importance(
                config.importance, example.rows(x)[None], components[name].inner(example.rows(x))[None], config.gate_width, config.gate_bias,
                config.distance_decay, reach or example.shape[1], is_causal(model), generator,
            )  # fmt: skip
    return decomposition


@torch.no_grad()
def check_identity(decomposition: Decomposition, tokens: Batch | Tensor) -> None:
    """Every mask 1 and the delta on must give the original logits: a model that runs other than TransformerLens says shows here."""
    batch = Batch.of(tokens)

    def own() -> Tensor:
        return decomposition.model(batch.ids, return_type="logits", **batch.model_arguments)

    clean = own()
    if not torch.isfinite(clean).all():
        raise SPDError("the model's own logits hold NaN or infinite values on these tokens; decompose a model that runs.")
    everything = {name: torch.ones_like(clean[0, 0, 0]) for name in decomposition.sites}
    tolerance = IDENTITY_TOLERANCE * max(1.0, float(clean.abs().max()))

    def error(masks: Mapping[str, Tensor]) -> float:
        return float((decomposition.masked(batch, masks, delta=1.0) - clean).abs().max())

    if error(everything) <= tolerance:
        return
    if float((own() - clean).abs().max()) > tolerance:
        raise SPDError("the model gives other logits each time it runs (dropout?); call model.eval() first.")
    wrong = [name for name in everything if error({name: everything[name]}) > tolerance]
    raise SPDError(f"{', '.join(wrong or everything)}: replacing the matrix by itself changes the logits, so this model does not use it "
                   "as TransformerLens describes. Leave these sites out.")  # fmt: skip


@dataclass
class Stopwatch:
    """Seconds per part of the step; `spd-lens bench step` reads them."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start


@dataclass(frozen=True, eq=False)
class _Variant:
    """One masked pass: which loss wants it, its share in that loss, the masks of the sites that are replaced."""

    loss: str
    share: float
    masks: masks.Masks


@dataclass(frozen=True, eq=False)
class _Passed:
    """What the passes over one stream leave.

    Attributes:
        logits: of importance, site → `[b, s, C]`.
        z: the same cut off from what they came from, with the gradients of the masked passes.
        losses: the reconstruction losses.
        batch: the tokens.
    """

    logits: dict[str, Tensor]
    z: dict[str, Tensor]
    losses: dict[str, Tensor]
    batch: Batch


class _Stream:
    """What one step goes through: the tokens, or the background of a targeted decomposition.

    Attributes:
        outputs, tokens: how many outputs are compared and how many tokens there are; the mean over the ranks.
    """

    def __init__(self, ranks: Ranks, batch: Batch, positions: str, background: bool = False):
        self.batch, self.positions, self.background = batch, positions, background
        self.outputs, self.tokens = float(batch.outputs(positions)), float(batch.numel)
        if batch.lengths is not None:
            self.outputs, self.tokens = ranks.mean({"": torch.tensor([self.outputs, self.tokens], dtype=torch.float64, device="cpu")})[
                ""
            ].tolist()


class Progress(TypedDict):
    """What a checkpoint says about itself."""

    format: Literal[1]
    config: dict[str, Any]
    steps_done: Natural
    tokens_per_pass: Count
    history: list[dict[str, Any]]


class Trainer:
    """The state of a training: decomposition, optimiser, randomness, the adversary's memory, the step."""

    def __init__(self, decomposition: Decomposition, ranks: Ranks = ALONE):
        self.decomposition = decomposition
        self.ranks = ranks
        self.config = config = decomposition.config
        self.device = device = decomposition.parameters()[0].device
        self.tokens_per_pass = config.tokens_per_pass or (TOKENS_PER_PASS if device.type == "cpu" else CUDA_TOKENS_PER_PASS)
        groups: list[dict[str, Any]] = [{"params": list(g.parameters()), "scale": 1.0} for g in decomposition.gates.values()]
        for c in decomposition.components.values():
            size = float((c.V.detach().square().mean() + c.U.detach().square().mean()).div(2).sqrt())
            groups.append({"params": [c.V, c.U], "scale": size if config.scaled_rate else 1.0})
        self.optimiser = torch.optim.Adam(groups, lr=config.learning_rate.at(0), fused=True)
        self.shared = torch.Generator(device).manual_seed(config.seed + 1)  # not the stream that initialised the parameters
        alive = {name: gate.alive for name, gate in decomposition.gates.items()}
        self.draw = masks.Draw(self.shared, kind=config.masks, layerwise_sites=config.layerwise_sites, alive=alive)
        for name, c in decomposition.components.items():
            self.draw.sources[name] = self.draw.uniform(c.C, like=c.V)
        self.stopwatch = Stopwatch()
        self.kept: int | None = None  # the step of the last checkpoint

    def weights(self, fraction: float) -> dict[str, float]:
        weights = {name: schedule.at(fraction) for name, schedule in self.config.weights.items()}
        return {name: weight for name, weight in weights.items() if weight != 0}

    def step(self, tokens: Batch | Tensor, background: Batch | Tensor | None = None) -> StepResult:
        d, config, part = self.decomposition, self.config, self.stopwatch.part
        fraction = d.steps_done / max(1, config.steps)
        weights = self.weights(fraction)
        self.draw.generator = self.ranks.stream(self.shared, config.seed, d.steps_done)
        tokens = Batch.of(tokens)
        streams = [_Stream(self.ranks, tokens, config.output_positions)]
        if background is not None:
            streams.append(_Stream(self.ranks, Batch.of(background), "all", background=True))
        passed: list[_Passed] = self._with_room(tokens, lambda: self._streams(streams, weights))
        losses = self._check({name: loss for one in passed for name, loss in one.losses.items()})
        if "adversarial" in weights:
            gradients = self.ranks.mean({name: r.grad for name, r in self.draw.sources.items() if r.grad is not None})
            self.draw.sources |= masks.ascend({name: self.draw.sources[name] for name in gradients}, gradients, ADVERSARY_STEP)
        with part("losses"):
            penalties = {}
            power = config.minimality_power.at(fraction)
            for one, stream in zip(passed, streams):
                seen = Pass(d.sites, d.components, one.z, power, config, self.ranks, stream.positions, one.batch)
                wanted = of_stream(weights, stream.background)
                penalties |= {name: loss(seen) for name, loss in wanted.items() if not isinstance(loss, Reconstruction)}
            losses |= self._check(penalties)
            if penalties:
                torch.stack([weights[name] * loss for name, loss in penalties.items()]).sum().backward()
        with part("importance"):
            for one in passed:
                torch.autograd.backward(list(one.logits.values()), [one.z[name].grad for name in one.logits])
        with part("optimiser"):
            self.ranks.average_gradients(d.parameters())
            for group in self.optimiser.param_groups:
                group["lr"] = group["scale"] * config.learning_rate.at(fraction)
            self.optimiser.step()
        d.steps_done += 1
        with torch.no_grad():
            active = self.ranks.mean(
                {name: (value > masks.THRESHOLD).sum(dtype=value.dtype) / streams[0].tokens for name, value in passed[0].z.items()}
            )
            total = sum((weights[name] * loss for name, loss in losses.items()), torch.zeros((), dtype=torch.float32, device=self.device))
        return StepResult(d.steps_done, losses, total, active, d)

    def retire(self, tokens: Batch) -> None:
        """The same ones in every process."""
        self._with_room(tokens, lambda: retire(self.decomposition, tokens, self.config.retire_tolerance, self._rows(tokens)))
        self._as_the_first([gate.alive for gate in self.decomposition.gates.values()])

    def merge(self, tokens: Batch) -> None:
        self._with_room(tokens, lambda: merge(self.decomposition, tokens, self._rows(tokens)))
        d = self.decomposition
        self._as_the_first([t.data for c in d.components.values() for t in (c.V, c.U)] + [gate.alive for gate in d.gates.values()])

    def close(self, tokens: Batch) -> None:
        self._with_room(tokens, lambda: close(self.decomposition, tokens, self.config.retire_tolerance, self._rows(tokens)))
        self._as_the_first([c.U.data for c in self.decomposition.components.values()])

    def _rows(self, tokens: Batch) -> int:
        """Sequences of one pass."""
        return max(1, self.tokens_per_pass // tokens.shape[1])

    def _as_the_first(self, tensors: Sequence[Tensor]) -> None:
        copies = [tensor.clone() for tensor in tensors]
        self.ranks.from_first(copies)
        for tensor, copy in zip(tensors, copies):
            tensor.copy_(copy)

    def _streams(self, streams: "Sequence[_Stream]", weights: Mapping[str, float]) -> "list[_Passed]":
        """The passes over the tokens, and over the background where there is one. No rank waits for another here, since memory may run out
        on one alone."""
        self.optimiser.zero_grad(set_to_none=True)
        self.draw.sources = {name: r.detach().requires_grad_("adversarial" in weights) for name, r in self.draw.sources.items()}
        passed = []
        for stream in streams:
            wanted = {name: loss for name, loss in of_stream(weights, stream.background).items() if isinstance(loss, Reconstruction)}
            passed.append(self._passes(stream, wanted, weights))
        return passed

    def _passes(self, stream: "_Stream", wanted: Mapping[str, Reconstruction], weights: Mapping[str, float]) -> "_Passed":
        """The clean pass and the masked ones."""
        d, part, batch = self.decomposition, self.stopwatch.part, stream.batch
        with part("reconstruction"), torch.no_grad(), self._autocast():
            clean = [d.trace(some, stream.positions) for some in batch.split(self._rows(batch))]
            inputs = {name: torch.cat([some.inputs[name] for some in clean]) for name in d.sites}
        with part("importance"), self._autocast():
            _, logits = d.importance_logits(inputs, batch)
        z = {name: value.detach().requires_grad_() for name, value in logits.items()}
        for value in z.values():
            value.grad = torch.zeros_like(value)
        with part("reconstruction"):
            losses = self._reconstruct(clean, z, stream, wanted, weights)
        return _Passed(logits, z, losses, batch)

    def _reconstruct(
        self, clean: Sequence[Trace], z: Mapping[str, Tensor], stream: "_Stream", wanted: Mapping[str, Reconstruction],
        weights: Mapping[str, float],
    ) -> dict[str, Tensor]:  # fmt: skip
        """The masked passes of every wanted reconstruction loss. Gradients are added to those of z, V, U and the adversary.

        Rows of the batch come one lot after the other (`clean`), and in it as many variants at once as `tokens_per_pass` allows, if
        they begin in the same layer. Each pass is followed by its backward pass, so memory grows neither with the batch nor with the
        number of variants.
        """
        d, losses = self.decomposition, {}
        alike = replace(self.draw, generator=self.shared)  # which sites are replaced is the same on all ranks
        routes = {name: (loss, loss.router(list(d.sites), alike)) for name, loss in wanted.items()}
        start = 0
        for some in clean:
            rows = slice(start, start := start + len(some.batch))
            share = some.batch.outputs(stream.positions) / stream.outputs
            here = {name: value.detach()[rows].requires_grad_() for name, value in z.items()}
            lower = {name: lower_leaky(value).detach().requires_grad_() for name, value in here.items()}
            original = some.logits.to(next(iter(z.values())).dtype).log_softmax(-1)
            for _, group in itertools.groupby(self._variants(routes, lower), lambda variant: d.first_layer(variant.masks)):
                while lot := list(itertools.islice(group, max(1, self.tokens_per_pass // some.batch.ids.numel()))):
                    with self._autocast():
                        masked = d.run_many(some, [variant.masks for variant in lot], stream.positions, float(stream.background))
                    divergence = some.batch.mean(kl_from(original, masked), stream.positions) * share
                    (divergence * divergence.new_tensor([weights[v.loss] * v.share for v in lot])).sum().backward()
                    for variant, value in zip(lot, divergence.detach()):
                        losses[variant.loss] = losses.get(variant.loss, 0.0) + variant.share * value
            for name, importance in lower.items():
                if importance.grad is not None:
                    lower_leaky(here[name]).backward(importance.grad)
                    z[name].grad[rows] += here[name].grad  # pyright: ignore
        return losses

    def _variants(
        self, routes: Mapping[str, tuple[Reconstruction, Sequence[Sequence[str]]]], lower: Mapping[str, Tensor]
    ) -> "Iterator[_Variant]":
        """Masks are drawn as they are asked for."""
        for name, (loss, routed) in routes.items():
            for chosen in routed:
                drawn = loss.sampler({site: lower[site] for site in chosen}, self.draw)
                yield _Variant(name, 1 / len(routed), drawn)

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.precision == "bfloat16")

    def _with_room(self, tokens: Batch, work: Callable[[], Any]) -> Any:
        """`work`, again with half the tokens per pass where memory runs out."""
        before = self.draw.generator.get_state(), self.shared.get_state()
        while True:
            try:
                return work()
            except RuntimeError as error:
                if not out_of_memory(error):
                    raise
                fewer = min(self.tokens_per_pass, tokens.ids.numel()) // 2
                if fewer < tokens.shape[1]:
                    raise SPDError(f"step {self.decomposition.steps_done + 1}: not even one sequence of {tokens.shape[1]} tokens fits into memory "
                                   f"({error}). Give shorter sequences, fewer subcomponents, or a smaller batch_size.") from error  # fmt: skip
                warnings.warn(f"step {self.decomposition.steps_done + 1}: out of memory with {self.tokens_per_pass} tokens per pass; "
                              f"going on with {fewer}", stacklevel=2)  # fmt: skip
                self.tokens_per_pass = fewer
            self.optimiser.zero_grad(set_to_none=True)
            self.draw.generator.set_state(before[0])
            self.shared.set_state(before[1])
            if self.device.type == "cuda":
                torch.cuda.empty_cache()

    def _tensors(self) -> dict[str, Tensor]:
        """Every tensor of the state by name; what Adam has not begun is zeros, as it would begin."""
        d = self.decomposition
        tensors = {f"decomposition.{name}": value for name, value in d.state().items()}
        for index, parameter in enumerate(d.parameters()):
            if not (slots := self.optimiser.state[parameter]):
                slots["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
                slots["exp_avg"], slots["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
            tensors |= {f"optimiser.{index}.{slot}": value for slot, value in slots.items()}
        tensors |= {f"adversary.{name}": r for name, r in self.draw.sources.items()}
        return {**tensors, "generator.state": self.shared.get_state()}

    def save(self, path: Path) -> None:
        """Everything that it takes to go on as if the training had not stopped, in one file."""
        d = self.decomposition
        about = {"format": FORMAT, "config": d.config.to_json(), "steps_done": d.steps_done,
                 "tokens_per_pass": self.tokens_per_pass, "history": d.history}  # fmt: skip
        try:
            write_tensors(path, self._tensors(), about)
        except SPDError as error:
            kept = self.kept is not None and path.exists()
            earlier = f"The checkpoint of step {self.kept} is kept in {path}" if kept else "There is no earlier checkpoint"
            raise SPDError(f"step {d.steps_done}: {error} {earlier}; mend this, and go on with resume=True.") from error
        self.kept = d.steps_done

    def load(self, path: Path) -> None:
        """Go back to where `save` was called.

        Raises:
            SPDError: the file is cut short, damaged or not ours, or was written under another config or for another model.
        """
        d = self.decomposition
        saved = Saved(path, Progress)
        now, then = json.loads(json.dumps(d.config.to_json())), saved.about["config"]
        changed = [key for key in now if now[key] != then.get(key)]
        if changed:
            raise SPDError(f"{path} was written under another config (other: {', '.join(changed)}); resume with the same, or start anew.")
        if saved.about["steps_done"] > d.config.steps:
            raise SPDError(f"{path} is of step {saved.about['steps_done']}, of {d.config.steps} in all; start anew.")
        tensors = self._tensors()
        saved.copy_to(tensors)
        try:
            self.shared.set_state(tensors["generator.state"])
        except RuntimeError as error:
            raise SPDError(f"{path}: generator.state is no state of a generator ({error}).") from error
        d.steps_done, d.history = saved.about["steps_done"], saved.about["history"]
        self.tokens_per_pass = saved.about["tokens_per_pass"]  # less than at the start, if memory ran out
        self.kept = d.steps_done

    def _check(self, losses: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The same of all ranks together, finite."""
        losses = self.ranks.mean({name: loss.detach() for name, loss in losses.items()})
        for name, loss in losses.items():
            if not torch.isfinite(loss):
                raise SPDError(f"step {self.decomposition.steps_done + 1}: the {name} loss is {float(loss)}. The last checkpoint is kept; "
                               "lower learning_rate, or the weight of this term.")  # fmt: skip
        return losses


def fit(
    trainer: Trainer,
    data: Batches,
    background: Batches | None,
    progress: bool,
    checkpoint: Path | None,
    checkpoint_every: int,
    callbacks: list[Callback],
) -> None:
    """Step until the config's number of steps is reached, or a stream ends."""
    d, config = trainer.decomposition, trainer.config
    streams = [data] if background is None else [data, background]
    for stream in streams:
        stream.skip(d.steps_done)
    line = max(1, config.steps // 100)
    retire_at, merge_at = ({round(at * config.steps) for at in when} for when in (config.retire_at, config.merge_at))
    bar = tqdm(total=config.steps, initial=d.steps_done, disable=not progress, desc="decompose", unit="step", mininterval=0.5)
    whole, said = True, set()  # whether the state is that between two steps; what was warned of

    def keep(path: Path) -> None:
        trainer.ranks.only_first(lambda: trainer.save(path))

    try:
        with interrupts_wait() as interrupted:
            while d.steps_done < config.steps:
                if trainer.ranks.anywhere(not all([stream.ready() for stream in streams])):
                    _ended(trainer)
                    break
                batches = [trainer.ranks.share(stream.take(trainer.shared)) for stream in streams]
                whole = False
                if d.steps_done in merge_at:
                    trainer.merge(data.sample)
                if d.steps_done in retire_at:
                    trainer.retire(data.sample)
                result = trainer.step(*batches)
                whole = True
                if result.step % line == 0 or result.step == config.steps:
                    d.history.append(result.figures())
                    bar.set_postfix_str(_postfix(d, d.history[-1]), refresh=False)
                    _teach(trainer, said)
                bar.update()
                if checkpoint is not None and result.step % checkpoint_every == 0:
                    keep(checkpoint)
                for callback in callbacks:
                    callback(result)
                if trainer.ranks.anywhere(interrupted()):
                    raise KeyboardInterrupt
    except KeyboardInterrupt:
        if checkpoint is not None and whole:
            keep(checkpoint)
        raise
    except Exception:  # of a stream or a callback; the other processes may know nothing of it
        if checkpoint is not None and whole and trainer.ranks.rank == 0:
            trainer.save(checkpoint)
        raise
    finally:
        bar.close()
    if checkpoint is not None and config.steps and d.steps_done % checkpoint_every:
        keep(checkpoint)


def _ended(trainer: Trainer) -> None:
    """An iterator that did not say how much it holds."""
    done, steps = trainer.decomposition.steps_done, trainer.config.steps
    if trainer.ranks.rank == 0:
        warnings.warn(f"the batches ended after {done} of {steps} steps. Training ends there, and what was learnt is kept, but the schedules did not "
                      f"come to their end (learning rate, weights, retirement). Set steps={done}, or give a list or a DataLoader, which are gone "
                      "through again; or go on from the checkpoint, if there is one, with resume=True and an iterable that goes on.", stacklevel=4)  # fmt: skip


def _teach(trainer: Trainer, said: set[str]) -> None:
    """Warn once, while there is time to stop, of what will not mend itself."""
    d = trainer.decomposition
    if trainer.ranks.rank == 0 and d.steps_done < trainer.config.steps:
        for advice in while_training(d, d.history[-1]["active"]):
            if advice.kind not in said:
                said.add(advice.kind)
                _warn(d, advice, 6)


def _teach_at_the_end(trainer: Trainer, example: Batch) -> None:
    """Warn of everything that is amiss on a few sequences, no more of them than a pass of the training held. Trials are not lectured."""
    d = trainer.decomposition
    if d.steps_done < SETTLED:
        return
    try:
        found = advise(d, example[: max(1, min(TAUGHT, trainer.tokens_per_pass // example.shape[1]))])
    except (RuntimeError, SPDError) as error:  # what was learnt is not lost for it
        if not isinstance(error, SPDError) and not out_of_memory(error):
            raise
        return warnings.warn(
            f"the look at what is amiss failed ({error}); call advise(decomposition, tokens) on other or fewer tokens.", stacklevel=5
        )
    for advice in found:
        _warn(d, advice, 5)


def _warn(d: Decomposition, advice: Advice, stacklevel: int) -> None:
    warnings.warn(f"after {d.steps_done} of {d.config.steps} steps: {advice}", stacklevel=stacklevel)


def _postfix(d: Decomposition, figures: Mapping[str, Any]) -> str:
    active = figures["active"]
    rank = sum(min(site.d_in, site.d_out) for site in d.sites.values())
    shown = [f"{d.sites[n].short} {v:.2g}" for n, v in active.items()] if len(active) <= 8 else [f"{sum(active.values()):.3g} in all"]
    shown.append(f"(rank ≤ {rank})")
    kl = next((f"KL {figures[n]:.1e} " for n in ("stochastic", "partial", "plain") if n in figures), "")
    return f"faithfulness {figures.get('faithfulness', math.nan):.1e} {kl}active {' '.join(shown)}"
