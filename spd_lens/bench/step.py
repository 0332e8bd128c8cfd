"""The training step: how long, how much memory, where the time goes."""

import contextlib
import io
import itertools
from collections.abc import Iterator
from typing import Any

from torch import Tensor

from spd_lens.bench.measure import PeakMemory, Work, check, counted, in_turns, short, with_threads
from spd_lens.bench.models import CLASSES, LAYERS, VOCABULARY, WIDTH, gpt2, random_tokens
from spd_lens.config import SPDConfig
from spd_lens.errors import SPDError, nearest
from spd_lens.guards import frozen, reproducible
from spd_lens.sites import find_sites, held
from spd_lens.tasks import induction
from spd_lens.training import Trainer, initialised

MODELS = {
    "induction": dict(batch=128, subcomponents=100, steps=5),
    "gpt2": dict(batch=4, subcomponents=256, steps=3),
}  # what each is measured at
PARTS = ("importance", "reconstruction", "losses", "optimiser")


def check_model(model: str) -> None:
    if model not in MODELS:
        raise SPDError(f"model was given as {model!r}; {nearest(model, MODELS)}.")


@with_threads
def bench_step(
    batch: int, subcomponents: int, importance: str, threads: int, device: str, steps: int = 5, model: str = "induction",
    length: int = 64, layers: int = LAYERS, width: int = WIDTH, vocabulary: int = VOCABULARY,
) -> dict[str, Any]:  # fmt: skip
    """Training steps after two that warm up.

    Args:
        model: `induction`, the toy with the paper's losses on q, k, v of two layers (64 tokens, 8 masked passes); or `gpt2`,
            random weights of GPT-2's shape (`layers`, `width`, `vocabulary`, sequences of `length`), every matrix, the default
            losses at half of the training, when all of them are on (4 masked passes). There the model's own forward and
            backward pass, with gradients for its parameters, takes its turn with the step.

    Returns:
        the names of DESIGN: steps/s, CPU seconds per step, peak memory, the share of each part of the step;
        `idle_rss_mb`, what the process held before its first step (importing torch, and the model); the roofline; and for
        `gpt2` `plain_s`, and `ratio`, the step over the plain passes, with its least and greatest in a round.
    """
    check(device, batch=batch, subcomponents=subcomponents, threads=threads, steps=steps, length=length, layers=layers, width=width,
          vocabulary=vocabulary)  # fmt: skip
    check_model(model)
    data: Iterator[Tensor]
    if model == "induction":
        with contextlib.redirect_stdout(io.StringIO()):  # HookedTransformer announces where it moves
            target = induction.build_target(0).to(device)
        config = SPDConfig.paper(subcomponents=subcomponents, importance=importance, batch_size=batch)
        length, layers, width, data = induction.CONTEXT, induction.LAYERS, induction.WIDTH, induction.batches(batch, 0)
    else:
        target = gpt2(CLASSES[0], layers, width, vocabulary, length, device)
        config = SPDConfig(subcomponents=subcomponents, importance=importance, init="random", batch_size=batch)
        data = itertools.repeat(random_tokens(batch, length, vocabulary, device))
    trainer = trainer_at(target, config, next(data).to(device), 0 if model == "induction" else config.steps // 2)
    memory = PeakMemory(device)
    works = {"step": step_of(trainer, data, device)}
    flops = {"step": counted(works["step"])}
    works["step"]()  # the first one made the optimiser's memory: only now is the peak reached
    peak = memory.figures()
    if model == "gpt2":
        works["plain"] = forward_and_backward(target, next(data))
        flops["plain"] = counted(works["plain"])
    trainer.stopwatch.seconds.clear()
    measured = in_turns(works, flops, steps, device)
    whole = sum(trainer.stopwatch.seconds.values())
    return {
        "batch": batch, "subcomponents": subcomponents, "importance": importance, "threads": threads, "device": device,
        "steps_per_s": short(steps / sum(measured.wall["step"])), "cpu_s_per_step": short(sum(measured.cpu["step"]) / steps), **peak,
        "shares": {name: round(trainer.stopwatch.seconds[name] / whole, 3) for name in PARTS},
        **measured.roofline("step"), **_beside_plain(measured), "model": model, "class": type(target).__name__,
        "length": length, "layers": layers, "width": width, "sites": len(trainer.decomposition.sites), "steps": steps,
        "losses": list(trainer.weights(trainer.decomposition.steps_done / config.steps)),
    }  # fmt: skip


def _beside_plain(measured: Any) -> dict[str, float]:
    if "plain" not in measured.seconds:
        return {}
    return {"step_s": short(measured.median("step")), "plain_s": short(measured.median("plain")), **measured.ratio("step", "plain")}


def trainer_at(model: Any, config: SPDConfig, tokens: Tensor, steps_done: int) -> Trainer:
    """A trainer that stands where so many steps would have brought it, with parameters as they were born."""
    with frozen(model), reproducible():
        decomposition = initialised(model, find_sites(model, config.sites), tokens[:32], config)
    decomposition.steps_done = steps_done
    return Trainer(decomposition)


def step_of(trainer: Trainer, data: Iterator[Tensor], device: str) -> Work:
    """One step as `decompose` takes it."""

    def step() -> None:
        with frozen(trainer.decomposition.model), reproducible(), held(trainer.decomposition.sites.values()):
            trainer.step(next(data).to(device))

    return step


def forward_and_backward(model: Any, tokens: Tensor) -> Work:
    def plain() -> None:
        model(tokens, return_type="loss").backward()
        model.zero_grad(set_to_none=True)

    return plain
