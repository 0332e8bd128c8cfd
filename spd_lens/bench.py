"""How long a training step takes, what it needs, and where the time goes. Speed is measured here and asserted nowhere."""

import contextlib
import io
import resource
import time
from typing import Any

import torch

from spd_lens.config import SPDConfig
from spd_lens.guards import frozen
from spd_lens.sites import find_sites
from spd_lens.tasks import induction
from spd_lens.training import Trainer, initialised

MEGABYTE = 1024  # of ru_maxrss, which counts KiB on Linux


def bench_step(batch: int, subcomponents: int, importance: str, threads: int, device: str, steps: int = 5) -> dict[str, Any]:
    """Training steps on the induction toy (q, k, v of two layers, 64 tokens, the paper's losses: 8 masked passes) after one that warms up.

    Returns:
        the names of DESIGN: steps/s, CPU seconds per step, peak memory, the share of each part of the step; and
        `idle_rss_mb`, what the process held before its first step (most of it is importing torch).
    """
    torch.set_num_threads(threads)
    with contextlib.redirect_stdout(io.StringIO()):  # HookedTransformer announces where it moves
        model = induction.build_target(0).to(device)
    config = SPDConfig.paper(subcomponents=subcomponents, importance=importance, batch_size=batch)
    data = induction.batches(batch, 0)
    with frozen(model):
        decomposition = initialised(model, find_sites(model, config.sites), next(data).to(device)[:32], config)
        trainer = Trainer(decomposition)
        idle = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / MEGABYTE
        trainer.step(next(data).to(device))
        trainer.stopwatch.seconds.clear()
        wall, cpu = time.perf_counter(), time.process_time()
        for _ in range(steps):
            trainer.step(next(data).to(device))
        if device != "cpu":
            torch.cuda.synchronize()
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    whole = sum(trainer.stopwatch.seconds.values())
    return {
        "batch": batch, "subcomponents": subcomponents, "importance": importance, "threads": threads, "device": device,
        "steps_per_s": round(steps / wall, 4), "cpu_s_per_step": round(cpu / steps, 4),
        "peak_rss_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / MEGABYTE), "idle_rss_mb": round(idle),
        "peak_cuda_mb": round(torch.cuda.max_memory_allocated() / 2**20) if device != "cpu" else None,
        "shares": {name: round(trainer.stopwatch.seconds[name] / whole, 3) for name in ("importance", "reconstruction", "losses", "optimiser")},
    }  # fmt: skip
