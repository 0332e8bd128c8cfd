"""What every bench measures with: seconds in turns, floating-point operations, memory, a process of its own.

Seconds are CPU seconds of the process on a CPU (another program's share of the machine does not count; with several threads
the sum over them) and seconds on the wall, synchronised, on CUDA.
"""

import contextlib
import ctypes
import json
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import wraps
from inspect import signature
from pathlib import Path
from statistics import median
from typing import Any, ParamSpec, TypeVar

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from spd_lens.errors import SPDError

resource: Any
try:
    import resource
except ImportError:  # Windows
    resource = None

Work = Callable[[], Any]
Given = ParamSpec("Given")
Result = TypeVar("Result")

MATMUL_SIDE = {"cpu": 1024, "cuda": 8192}  # of the square product that is the roofline: big enough to run at full speed
PRODUCTS = 4  # a turn
KIB = 1024  # /proc and ru_maxrss count KiB on Linux


def check(device: str, **sizes: int) -> None:
    """Refuse what cannot be measured, before any work."""
    if resource is None:
        raise SPDError("this system does not tell how much memory a process takes (Windows?); run the bench on Linux or macOS.")
    for name, size in sizes.items():
        if not isinstance(size, int) or size < 1:
            raise SPDError(f"{name} was given as {size!r}; it has to be a whole number of at least 1.")
    try:
        kind, index = torch.device(device).type, torch.device(device).index or 0
    except RuntimeError:
        kind, index = "", 0
    if kind not in MATMUL_SIDE:
        raise SPDError(f"device was given as {device!r}; allowed: cpu, cuda, cuda:0, cuda:1, …")
    if kind == "cuda" and index >= torch.cuda.device_count():
        raise SPDError(f"device was given as {device!r}; this torch ({torch.__version__}) sees {torch.cuda.device_count()} CUDA devices. "
                       "Leave --device out to measure on the CPU.")  # fmt: skip


def with_threads(bench: Callable[Given, Result]) -> Callable[Given, Result]:
    """Of a bench: it runs with as many threads as its argument `threads` says, and the process has as many as before afterwards."""
    arguments = signature(bench)

    @wraps(bench)
    def measured(*args: Given.args, **kwargs: Given.kwargs) -> Result:
        bound = arguments.bind(*args, **kwargs)
        bound.apply_defaults()
        before, wanted = torch.get_num_threads(), bound.arguments["threads"]
        try:
            if isinstance(wanted, int) and wanted > 0:  # else the bench says what is wrong
                torch.set_num_threads(wanted)
            return bench(*args, **kwargs)
        finally:
            torch.set_num_threads(before)

    return measured


def short(number: float) -> float:
    """Four significant digits: more would be noise."""
    return float(f"{number:.4g}")


class Flops(TorchDispatchMode):
    """Counts the floating-point operations of matrix products, by the type of number they are done in.

    As torch's `FlopCounterMode`, which leaves out products that are added in place and the CPU's own fused attention.
    """

    def __init__(self) -> None:
        super().__init__()
        self.by_dtype: dict[torch.dtype, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func._schema.name.removesuffix("_")
        formula = _FUSED.get(name) or flop_registry.get(getattr(torch.ops.aten, name.split("::")[1], None)) if "aten::" in name else None
        if formula is not None:
            dtype = next(a.dtype for a in args if isinstance(a, torch.Tensor))
            self.by_dtype[dtype] = self.by_dtype.get(dtype, 0) + formula(*args, **(kwargs or {}), out_val=out)
        return out


_FUSED: dict[str, Callable[..., int]] = {
    "aten::_scaled_dot_product_flash_attention_for_cpu": lambda q, k, v, *rest, **options: sdpa_flop_count(q.shape, k.shape, v.shape),
    "aten::_scaled_dot_product_flash_attention_for_cpu_backward": lambda gradient, q, k, v, *rest, **options: sdpa_backward_flop_count(
        gradient.shape, q.shape, k.shape, v.shape
    ),
}


def counted(work: Work) -> dict[torch.dtype, int]:
    """Floating-point operations of one run of the work, which warms it up as well."""
    with Flops() as flops:
        work()
    return flops.by_dtype


@dataclass(frozen=True)
class Measured:
    """Seconds of several works that ran in turns.

    Attributes:
        seconds: work → one number a round, by the clock that counts on this device.
        wall, cpu: the same by both clocks.
        flops: work → floating-point operations by type of number.
        matmul: type of number → seconds per GFLOP of a plain product, one number a round.
    """

    seconds: dict[str, list[float]]
    wall: dict[str, list[float]]
    cpu: dict[str, list[float]]
    flops: Mapping[str, Mapping[torch.dtype, int]]
    matmul: dict[torch.dtype, list[float]]

    def median(self, work: str) -> float:
        return median(self.seconds[work])

    def ratio(self, work: str, to: str, prefix: str = "ratio") -> dict[str, float]:
        """Of two works of the same round: the median of the rounds, and the extremes."""
        ratios = [a / b for a, b in zip(self.seconds[work], self.seconds[to])]
        return {prefix: short(median(ratios)), f"{prefix}_min": short(min(ratios)), f"{prefix}_max": short(max(ratios))}

    def roofline(self, work: str) -> dict[str, Any]:
        """The distance from the limit: `gflop`, `roofline_s`, `roofline_share`, `matmul_gflop_per_s`; each the median of the rounds."""
        flops, seconds = self.flops[work], self.seconds[work]
        limits = [sum(count / 1e9 * self.matmul[dtype][turn] for dtype, count in flops.items()) for turn in range(len(seconds))]
        return {
            "gflop": short(sum(flops.values()) / 1e9), "roofline_s": short(median(limits)),
            "roofline_share": short(median(limit / s for limit, s in zip(limits, seconds))),
            "matmul_gflop_per_s": {str(dtype).removeprefix("torch."): short(1 / median(times)) for dtype, times in self.matmul.items()},
        }  # fmt: skip


def in_turns(works: Mapping[str, Work], flops: Mapping[str, Mapping[torch.dtype, int]], rounds: int, device: str) -> Measured:
    """Run the works one after another, `rounds` times over, so that whatever slows the machine slows all alike; a plain matrix
    product of each type of number that they use takes its turn. Everything is to be warm already, but for the product."""
    kind = torch.device(device).type
    dtypes = {dtype for counts in flops.values() for dtype in counts} or {torch.float32}
    products = {dtype: _product(dtype, kind, device) for dtype in dtypes}
    everything: dict[Any, Work] = {**products, **works}
    for product in products.values():
        product()
    wall: dict[Any, list[float]] = {name: [] for name in everything}
    cpu: dict[Any, list[float]] = {name: [] for name in everything}
    for _ in range(rounds):
        for name, work in everything.items():
            _synchronise(kind)
            began, busy = time.perf_counter(), time.process_time()
            work()
            _synchronise(kind)
            wall[name].append(time.perf_counter() - began)
            cpu[name].append(time.process_time() - busy)
    seconds = cpu if kind == "cpu" else wall
    gflop = PRODUCTS * 2 * MATMUL_SIDE[kind] ** 3 / 1e9
    matmul = {dtype: [s / gflop for s in seconds[dtype]] for dtype in products}
    seconds, wall, cpu = ({name: times[name] for name in works} for times in (seconds, wall, cpu))
    return Measured(seconds, wall, cpu, flops, matmul)


def _product(dtype: torch.dtype, kind: str, device: str) -> Work:
    left, right = (torch.full((MATMUL_SIDE[kind],) * 2, 0.5, dtype=dtype, device=device) for _ in range(2))
    out = torch.empty_like(left)

    def products() -> None:
        for _ in range(PRODUCTS):
            torch.mm(left, right, out=out)

    return products


def _synchronise(kind: str) -> None:
    if kind == "cuda":
        torch.cuda.synchronize()


class PeakMemory:
    """The peak of memory from here on, and what is held here."""

    def __init__(self, device: str):
        self.cuda = torch.device(device) if torch.device(device).type == "cuda" else None
        with contextlib.suppress(OSError, AttributeError):  # give back what is free; only then does a peak show all that is asked for
            ctypes.CDLL(None).malloc_trim(0)
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")  # the peak is now what is held
        self.idle = _resident("VmRSS")
        if self.cuda is not None:
            torch.cuda.reset_peak_memory_stats(self.cuda)

    def figures(self) -> dict[str, Any]:
        return {
            "peak_rss_mb": round(_resident("VmHWM")), "idle_rss_mb": round(self.idle),
            "peak_cuda_mb": round(torch.cuda.max_memory_allocated(self.cuda) / 2**20) if self.cuda is not None else None,
        }  # fmt: skip

    def above_idle(self) -> float:
        """MB on the device, or of the process over what it held before."""
        return torch.cuda.max_memory_allocated(self.cuda) / 2**20 if self.cuda is not None else _resident("VmHWM") - self.idle


def _resident(field: str) -> float:
    """MB; not `ru_maxrss`, which on Linux begins with what the parent process held."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:  # not Linux
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else KIB)
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / KIB


def in_own_process(name: str, **settings: Any) -> dict[str, Any]:
    """One configuration in a process of its own, since peak memory is a process's.

    Raises:
        SPDError: it did not end well; what it said is on stderr.
    """
    command = [sys.executable, "-m", "spd_lens.bench", name, json.dumps(settings)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        killed = " (killed: it may have asked for more memory than there is)" if done.returncode == -9 else ""
        raise SPDError(f"bench {name} ended with {done.returncode}{killed}; its configuration was {json.dumps(settings)}. "
                       "Leave it out, or give smaller sizes.")  # fmt: skip
    return json.loads(done.stdout)
