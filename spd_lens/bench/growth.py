"""How time and memory grow: of attention importance with the length of the sequence, of the training step with everything.

1. One *axis* at a time is doubled and doubled again from a base; everything else stays.
2. Each point is measured in a process of its own (`measure.in_own_process`): median seconds, and peak memory above what the
   process held before it made anything (after a tiny step that loads what torch loads late).
3. A line through the points on log-log axes; its slope is the exponent. `…_last` is that of the last doubling alone: where
   it is greater, the small points still hide a fixed overhead, and the growth is to be read there.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from spd_lens.bench.measure import PeakMemory, check, counted, in_turns, short, with_threads
from spd_lens.bench.models import CLASSES, gpt2, random_tokens
from spd_lens.bench.step import step_of, trainer_at
from spd_lens.config import SPDConfig
from spd_lens.importance import build_importance

BASE = {"d_model": 64, "subcomponents": 64, "layers": 2, "batch": 16, "length": 64}  # every one of them is an axis
LARGEST = {"d_model": 8, "subcomponents": 16, "layers": 8, "batch": 16, "length": 8}  # times the base
VOCABULARY = 512  # small: the embedding is not what grows
TOY = dict(subcomponents=100, sites=6, d_in=16, gate_width=16)  # the induction toy's


@with_threads
def bench_length(
    length: int, batch: int = 1, subcomponents: int = TOY["subcomponents"], threads: int = 1, device: str = "cpu", steps: int = 3,
    sites: int = TOY["sites"], d_in: int = TOY["d_in"], gate_width: int = TOY["gate_width"],
) -> dict[str, Any]:  # fmt: skip
    """Attention importance alone, forward and backward, of a training step's sites: all forward, then all backward."""
    sizes = dict(length=length, batch=batch, subcomponents=subcomponents, sites=sites, d_in=d_in, gate_width=gate_width)
    check(device, **sizes, threads=threads, steps=steps)
    _attention(2, 1, 2, 1, 2, 2, device)()
    memory = PeakMemory(device)
    work = _attention(**sizes, device=device)
    flops = {"importance": counted(work)}
    peak = {**memory.figures(), "memory_mb": short(memory.above_idle())}
    measured = in_turns({"importance": work}, flops, steps, device)
    return {
        **sizes, "importance": "attention", "threads": threads, "device": device, "seconds": short(measured.median("importance")),
        "steps_per_s": short(1 / measured.median("importance")), **peak, **measured.roofline("importance"), "steps": steps,
    }  # fmt: skip


def _attention(length: int, batch: int, subcomponents: int, sites: int, d_in: int, gate_width: int, device: str) -> Any:
    generator = torch.Generator(device).manual_seed(0)
    x = torch.randn(batch, length, d_in, generator=generator, dtype=torch.float32, device=device)
    inner = x @ torch.randn(d_in, subcomponents, generator=generator, dtype=torch.float32, device=device)
    gates = [build_importance("attention", x, inner, gate_width, 1.0, 0.3, length, True, generator) for _ in range(sites)]
    gradient = torch.randn_like(inner)

    def work() -> None:
        logits = [gate(x, inner) for gate in gates]
        torch.autograd.backward(logits, [gradient] * sites)
        for gate in gates:
            gate.zero_grad(set_to_none=True)

    return work


@with_threads
def bench_scale(
    d_model: int = BASE["d_model"], subcomponents: int = BASE["subcomponents"], layers: int = BASE["layers"], batch: int = BASE["batch"],
    length: int = BASE["length"], threads: int = 1, device: str = "cpu", steps: int = 3,
) -> dict[str, Any]:  # fmt: skip
    """One point: training steps, all default losses on, of every matrix of a model of GPT-2's make."""
    sizes = dict(d_model=d_model, subcomponents=subcomponents, layers=layers, batch=batch, length=length)
    check(device, **sizes, threads=threads, steps=steps)
    for _ in range(2):
        _step(16, 4, 1, 1, 4, device)()
    memory = PeakMemory(device)
    work = _step(**sizes, device=device)
    flops = {"step": counted(work)}
    work()  # the first one made the optimiser's memory
    peak = {**memory.figures(), "memory_mb": short(memory.above_idle())}
    measured = in_turns({"step": work}, flops, steps, device)
    return {**sizes, "threads": threads, "device": device, "seconds": short(measured.median("step")), **peak, **measured.roofline("step")}


def _step(d_model: int, subcomponents: int, layers: int, batch: int, length: int, device: str) -> Any:
    model = gpt2(CLASSES[0], layers, d_model, VOCABULARY, length, device)
    config = SPDConfig(subcomponents=subcomponents, init="random", batch_size=batch)
    tokens = random_tokens(batch, length, VOCABULARY, device)
    return step_of(trainer_at(model, config, tokens, config.steps // 2), itertools.repeat(tokens), device)


def points_of(axis: str, base: Mapping[str, int], largest: int) -> list[dict[str, int]]:
    """The base and its doublings along one axis, up to `largest` times the base."""
    return [{**base, axis: base[axis] * 2**power} for power in range(int(math.log2(largest)) + 1)]


def grown(axis: str, points: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Exponents of time and memory along an axis: the slopes of lines through measured points, on log-log axes."""
    points = sorted(points, key=lambda point: point[axis])
    fits: dict[str, Any] = {}
    for name, key in (("time", "seconds"), ("memory", "memory_mb")):
        fits[f"exponent_{name}"] = _slope(axis, key, points)
        fits[f"exponent_{name}_last"] = _slope(axis, key, points[-2:])
    kept = (axis, "seconds", "memory_mb", "gflop", "roofline_s", "roofline_share")
    fixed = {key: value for key, value in points[0].items() if key in (*BASE, *TOY, "threads", "device") and key != axis}
    return {
        "axis": axis, **fits, "from": points[0][axis], "to": points[-1][axis], "base": fixed,
        "points": [{key: point[key] for key in kept} for point in points],
    }  # fmt: skip


def _slope(axis: str, key: str, points: Sequence[Mapping[str, Any]]) -> float | None:
    """None where there is nothing to fit: a single point, or memory that was not seen to rise."""
    pairs = np.log([(point[axis], point[key]) for point in points if point[key] > 0]).reshape(-1, 2)
    if len(set(pairs[:, 0])) < 2:
        return None
    return round(float(np.polyfit(pairs[:, 0], pairs[:, 1], 1)[0]), 3)
