import pytest
import torch

from spd_lens.bench import bench_step


@pytest.mark.parametrize("importance", ["scalar", "vector", "attention"])
def test_every_importance_function_is_measured(importance):
    threads = torch.get_num_threads()
    line = bench_step(batch=2, subcomponents=16, importance=importance, threads=1, device="cpu", steps=1)
    torch.set_num_threads(threads)
    assert line["importance"] == importance and line["peak_cuda_mb"] is None and line["steps_per_s"] > 0
