"""`spd-lens bench`: parse, measure, print JSON lines, draw."""

import argparse
import itertools
import json
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from rich.console import Console

from spd_lens import bench, viz
from spd_lens.bench.growth import BASE, LARGEST, TOY, points_of
from spd_lens.bench.measure import check, in_own_process
from spd_lens.bench.models import CLASSES, LAYERS, VOCABULARY, WIDTH, check_class
from spd_lens.bench.step import MODELS
from spd_lens.errors import SPDError
from spd_lens.report import REPORT_BYTES, page
from spd_lens.storage import check_writable, write_text

LENGTHS = (1024, 4096, 10240)
SHAPE = dict(length=64, layers=LAYERS, width=WIDTH, vocabulary=VOCABULARY)
KEYS = (
    "Keys of every line (in scale: of every point): gflop, floating-point operations of the matrix products in what was measured; matmul_gflop_per_s, what a plain "
    "matrix product reaches in the same run; roofline_s, the time of these operations at that rate; roofline_share, roofline_s over the "
    "measured time. Seconds are CPU seconds on a CPU (of all threads together) and wall seconds on CUDA."
)


def add_bench(commands: Any) -> None:
    """The command `bench` and what it can measure."""
    parser = commands.add_parser("bench", help="measure speed and memory", description=bench.__doc__,
                                 formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    kinds = parser.add_subparsers(required=True, metavar="WHAT")

    step = _kind(kinds, "step", "the training step: steps/s, CPU seconds, peak memory, the share of each part", _step)
    step.add_argument("--model", default="induction", choices=tuple(MODELS),
                      help="the induction toy (q, k, v; the paper's losses), or GPT-2 small with random weights (all 72 matrices; the "
                      "default losses), whose own forward and backward pass is timed beside: plain_s, ratio (%(default)s)")  # fmt: skip
    step.add_argument("--batch", type=int, nargs="+", help="sequences (induction: 128; gpt2: 4)")
    step.add_argument("--subcomponents", type=int, nargs="+", help="per matrix (induction: 100; gpt2: 256)")
    step.add_argument("--importance", nargs="+", default=["attention"], choices=("attention", "vector", "scalar"), help="(attention)")
    step.add_argument("--steps", type=int, help="timed steps, after two that warm up (induction: 5; gpt2: 3)")
    _shape(step, "gpt2 only: ", default=False)

    forward = _kind(kinds, "forward", "the forward pass of GPT-2 small, every matrix replaced by subcomponents, beside the plain one",
                    _forward)  # fmt: skip
    forward.add_argument("--model", nargs="+", default=list(CLASSES), help=f"the model's class ({' '.join(CLASSES)})")
    forward.add_argument("--subcomponents", type=int, nargs="+", default=[64], help="per matrix (64)")
    forward.add_argument("--batch", type=int, nargs="+", default=[4], help="sequences (4)")
    forward.add_argument("--rounds", type=int, default=7, help="rounds in which the passes take turns; medians are given (%(default)s)")
    _shape(forward)

    length = _kind(kinds, "length", "attention importance alone, forward and backward, of six sites of the induction toy", _length)
    length.add_argument("--length", type=int, nargs="+", default=list(LENGTHS), help=f"positions ({' '.join(map(str, LENGTHS))})")
    length.add_argument("--batch", type=int, default=1, help="sequences (%(default)s)")
    length.add_argument("--subcomponents", type=int, default=TOY["subcomponents"], help="per site (%(default)s)")
    length.add_argument("--steps", type=int, default=3, help="timed rounds (%(default)s)")

    scale = _kind(
        kinds, "scale", "how the training step's time and memory grow, one size at a time from a base (about six minutes)", _scale
    )
    scale.add_argument("--axes", nargs="+", default=list(BASE), choices=tuple(BASE), metavar="AXIS",
                       help=f"what grows, of {', '.join(BASE)} (all)")  # fmt: skip
    for name, value in BASE.items():
        scale.add_argument(f"--{name.replace('_', '-')}", type=int, default=value, help=f"the base's (%(default)s; grows {LARGEST[name]}×)")
    scale.add_argument("--largest", type=int, help="times the base, doubling up to there (as said at each axis)")
    scale.add_argument("--steps", type=int, default=3, help="timed steps of each point (%(default)s)")


def _kind(kinds: Any, name: str, about: str, call: Any) -> argparse.ArgumentParser:
    parser = kinds.add_parser(name, help=about, epilog=KEYS,
                              description=f"{about[0].upper()}{about[1:]}. Prints JSON lines; each configuration in a process of its own.")  # fmt: skip
    many = dict(nargs="+", default=[1]) if name in ("step", "forward") else dict(default=1)
    parser.add_argument("--threads", type=int, help="of the CPU (1)", **many)
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N (%(default)s)")
    parser.add_argument("--plot", type=Path, metavar="FILE.html", help="draw it as well, as one page that opens offline")
    parser.set_defaults(call=call)
    return parser


def _shape(parser: argparse.ArgumentParser, note: str = "", default: bool = True) -> None:
    said = dict(length="positions of each sequence", layers="of the model", width="of the residual stream", vocabulary="of the model")
    for name, value in SHAPE.items():
        parser.add_argument(f"--{name}", type=int, default=value if default else None, help=f"{note}{said[name]} ({value})")


def _step(options: argparse.Namespace, console: Console) -> None:
    shape = {name: getattr(options, name) for name in SHAPE if getattr(options, name) is not None}
    if shape and options.model != "gpt2":
        raise SPDError(
            f"--{next(iter(shape))} was given with --model {options.model}, whose shape is fixed; give --model gpt2, or leave it out."
        )
    own = MODELS[options.model]
    cases = _cases(
        options, batch=options.batch or [own["batch"]], subcomponents=options.subcomponents or [own["subcomponents"]],
        importance=options.importance, threads=options.threads, steps=[own["steps"] if options.steps is None else options.steps], model=[options.model],
        **{name: [value] for name, value in shape.items()},
    )  # fmt: skip
    lines = _measure("step", cases)
    _page(options, "The training step", "Time of one step by what it is spent on. The black mark is the time that its matrix products would "
          "take alone, at the rate of one big product in the same run: the limit without fewer operations. The diamond, where there is one, is the "
          "model's own forward and backward pass.", viz.bench_step_bars(lines), lines)  # fmt: skip


def _forward(options: argparse.Namespace, console: Console) -> None:
    for kind in options.model:
        check_class(kind)
    cases = _cases(
        options, model=options.model, subcomponents=options.subcomponents, batch=options.batch, threads=options.threads,
        rounds=[options.rounds], **{name: [getattr(options, name)] for name in SHAPE},
    )  # fmt: skip
    lines = _measure("forward", cases)
    _page(options, "The forward pass with every matrix replaced", "Medians of passes that took turns, without gradients. The black mark is the "
          "time that the pass's matrix products would take alone, at the rate of one big product in the same run. Ratios are of passes of the same "
          "round: their median, least and greatest.", viz.bench_forward_bars(lines), lines)  # fmt: skip


def _length(options: argparse.Namespace, console: Console) -> None:
    cases = _cases(options, length=sorted(set(options.length)), batch=[options.batch], subcomponents=[options.subcomponents],
                   threads=[options.threads], steps=[options.steps])  # fmt: skip
    lines = _measure("length", cases)
    grown = bench.grown("length", lines)
    if len(lines) > 1:
        print(json.dumps(grown), flush=True)
    _page(options, "Attention importance and the length of the sequence", "Forward and backward pass of the importance functions of "
          f"{TOY['sites']} sites, {options.subcomponents} subcomponents each. Memory is the peak above what the process held before.",
          viz.bench_growth_lines([grown]), lines)  # fmt: skip


def _scale(options: argparse.Namespace, console: Console) -> None:
    base = {name: getattr(options, name) for name in BASE}
    fixed = dict(threads=options.threads, device=options.device, steps=options.steps)
    factors = {axis: options.largest or LARGEST[axis] for axis in options.axes}
    check(options.device, **base, threads=options.threads, steps=options.steps, largest=min(factors.values()))
    write = _writes(options)
    measured: dict[tuple[int, ...], dict[str, Any]] = {}
    axes = []
    for axis in options.axes:
        points = points_of(axis, base, factors[axis])
        for point in points:
            if tuple(point.values()) not in measured:  # the base belongs to every axis
                measured[tuple(point.values())] = in_own_process("scale", **point, **fixed)
        axes.append(bench.grown(axis, [measured[tuple(point.values())] for point in points]))
        print(json.dumps(axes[-1]), flush=True)
    shown = [{key: value for key, value in axis.items() if key not in ("base", "points")} for axis in axes]
    at = ", ".join(f"{name} {value}" for name, value in base.items())
    if write:
        _page(options, "How the training step grows", f"One size at a time grows from the base ({at}); all default losses, every matrix of a "
              "model of GPT-2's make. Memory is the peak above what the process held before the model was made.",
              viz.bench_growth_lines(axes), shown)  # fmt: skip


def _cases(options: argparse.Namespace, **lists: Sequence[Any]) -> list[dict[str, Any]]:
    """Every combination, checked before any of them is measured."""
    cases = [dict(zip(lists, values)) for values in itertools.product(*lists.values())]
    for case in cases:
        check(options.device, **{name: value for name, value in case.items() if not isinstance(value, str)})
    _writes(options)
    return [{**case, "device": options.device} for case in cases]


def _writes(options: argparse.Namespace) -> bool:
    if options.plot is None:
        return False
    if options.plot.is_dir():
        raise SPDError(f"--plot was given as {options.plot}, which is a folder; give a file, e.g. {options.plot / 'bench.html'}.")
    check_writable(options.plot.parent, REPORT_BYTES)
    return True


def _measure(name: str, cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    lines = []
    for case in cases:
        lines.append(bench.BENCHES[name](**case) if len(cases) == 1 else in_own_process(name, **case))
        print(json.dumps(lines[-1]), flush=True)
    return lines


def _page(options: argparse.Namespace, title: str, explanation: str, figure: Any, lines: Sequence[dict[str, Any]]) -> None:
    if options.plot is None:
        return
    flat = [{key: json.dumps(value) if isinstance(value, (dict, list)) else value for key, value in line.items()} for line in lines]
    where = torch.cuda.get_device_name(options.device) if options.device != "cpu" else f"{platform.machine()} CPU"
    lead = f"spd-lens bench, on {where}, torch {torch.__version__}."
    table = pd.DataFrame(flat, index=pd.Index([f"line {number}" for number in range(1, len(flat) + 1)])).T.rename_axis("key")
    write_text(options.plot, page(title, lead, [("The picture", explanation, figure), ("The figures", KEYS, table)]))
