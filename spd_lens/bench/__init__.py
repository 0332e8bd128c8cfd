"""How long things take, what they need, and how far that is from the limit. Speed is measured here and asserted nowhere.

Every figure stands beside a plain matrix product that was timed in the same run, in turns with what is measured, so that a
line says more than how fast and how busy the machine was: `gflop`, the floating-point operations of the measured work's
matrix products; `matmul_gflop_per_s`, what one big product reaches on the same threads; `roofline_s`, the time that these
products alone would take at that rate; and `roofline_share`, the part of the measured time that they would fill (1: nothing
left to gain but fewer operations).
"""

from spd_lens.bench.forward import bench_forward
from spd_lens.bench.growth import bench_length, bench_scale, grown
from spd_lens.bench.step import bench_step

BENCHES = {"step": bench_step, "forward": bench_forward, "length": bench_length, "scale": bench_scale}

__all__ = ["BENCHES", "bench_forward", "bench_length", "bench_scale", "bench_step", "grown"]
