import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from spd_lens import SPDError
from spd_lens.bench import bench_forward, bench_length, bench_scale, bench_step, grown
from spd_lens.bench.growth import points_of
from spd_lens.bench.measure import PeakMemory, check, counted, in_own_process, in_turns
from spd_lens.bench.models import CLASSES

TINY = dict(length=6, layers=1, width=16, vocabulary=20)
ROOFLINE = {"gflop", "roofline_s", "roofline_share", "matmul_gflop_per_s"}


@pytest.fixture(autouse=True)
def the_number_of_threads_is_given_back():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("importance", ["scalar", "vector", "attention"])
def test_every_importance_function_is_measured(importance):
    line = bench_step(batch=2, subcomponents=16, importance=importance, threads=1, device="cpu", steps=1)
    assert line["importance"] == importance and line["peak_cuda_mb"] is None and line["steps_per_s"] > 0
    assert line.keys() >= ROOFLINE and "ratio" not in line and "plain" in line["losses"]


def test_the_step_of_gpt2_stands_beside_the_models_own_passes():
    line = bench_step(2, 4, "attention", 1, "cpu", steps=2, model="gpt2", **TINY)
    assert line["sites"] == 6 and line["plain_s"] > 0 and line["ratio_min"] <= line["ratio"] <= line["ratio_max"]
    assert {"stochastic", "layerwise", "adversarial", "price"} <= set(line["losses"])  # all that are ever on


@pytest.mark.parametrize("kind", CLASSES)
def test_the_forward_pass_is_measured_four_ways(kind):
    line = bench_forward(kind, subcomponents=4, batch=2, rounds=2, **TINY)
    assert all(line[f"{way}_s"] > 0 for way in ("plain", "hooks", "run", "run_with_hooks"))
    assert line["model"] == kind and line["sites"] == 6 and line["ratio_min"] <= line["ratio"] <= line["ratio_max"]
    assert line.keys() >= ROOFLINE and line["plain_gflop"] > 0


def test_attention_importance_is_measured_alone():
    line = bench_length(16, subcomponents=4, steps=1)
    assert line["length"] == 16 and line["sites"] == 6 and line["seconds"] > 0 and line.keys() >= ROOFLINE | {"memory_mb"}


def test_a_point_of_the_training_steps_growth():
    line = bench_scale(d_model=16, subcomponents=4, layers=1, batch=2, length=6, steps=1)
    assert line["seconds"] > 0 and line["memory_mb"] > 0 and line.keys() >= ROOFLINE


def test_exponents_are_slopes_on_log_log_axes():
    points = [{"batch": n, "length": 64, "seconds": 0.5 * n**2, "memory_mb": 3.0 * n, **dict.fromkeys(ROOFLINE, 1.0)} for n in (4, 1, 2)]
    line = grown("batch", points)
    assert (line["exponent_time"], line["exponent_memory"], line["from"], line["to"]) == (2.0, 1.0, 1, 4)
    assert line["base"] == {"length": 64} and [point["batch"] for point in line["points"]] == [1, 2, 4]
    assert grown("batch", points[:1])["exponent_time"] is None


def test_one_size_grows_and_the_others_stay():
    assert points_of("b", {"a": 3, "b": 5}, 4) == [{"a": 3, "b": 5}, {"a": 3, "b": 10}, {"a": 3, "b": 20}]


def test_products_are_counted_as_torch_counts_them_and_those_in_place_as_well():
    a, q = torch.randn(3, 4, requires_grad=True), torch.randn(1, 2, 5, 4, requires_grad=True)
    mask = torch.zeros(5, 5, requires_grad=True)

    def work():
        seen = torch.nn.functional.scaled_dot_product_attention(q, q, q, attn_mask=mask)  # a mask that learns: no fused kernel
        (torch.einsum("ij,kj->ik", a, a).sum() + seen.sum()).backward()

    with FlopCounterMode(display=False) as torchs:
        work()
    assert counted(work) == {torch.float32: torchs.get_total_flops()}
    square = torch.ones(4, 4, dtype=torch.float64)
    assert counted(lambda: square.addmm_(square.clone(), square.clone())) == {torch.float64: 2 * 4**3}
    assert counted(lambda: square + 1) == {}


def test_the_cpus_fused_attention_is_counted():
    q = torch.randn(1, 2, 5, 4, requires_grad=True)
    flops = counted(lambda: torch.nn.functional.scaled_dot_product_attention(q, q, q, is_causal=True).sum().backward())
    assert flops == {torch.float32: (2 + 5) * 2 * (2 * 5 * 5 * 4)}  # forward 2 products; backward 5, as torch counts a fused one


def test_works_take_turns():
    order = []
    measured = in_turns({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, {"a": {torch.float32: 10**9}}, 2, "cpu")
    assert order == ["a", "b", "a", "b"] and len(measured.seconds["b"]) == 2
    assert measured.roofline("a")["gflop"] == 1.0


def test_peak_memory_is_what_was_held_at_once():
    memory = PeakMemory("cpu")
    torch.ones(16 << 20, dtype=torch.uint8)  # given back at once
    assert 15 < memory.above_idle() < 40 and memory.figures()["peak_rss_mb"] >= memory.figures()["idle_rss_mb"]


@pytest.mark.parametrize(
    "device, sizes, message",
    [
        ("cpu", {"batch": 0}, "batch was given as 0"),
        ("cpu", {"length": -3}, "at least 1"),
        ("gpu", {}, "allowed: cpu, cuda"),
        ("mps", {}, "allowed: cpu, cuda"),
        ("cuda:99", {}, "Leave --device out"),
    ],
)
def test_what_cannot_be_measured_is_refused(device, sizes, message):
    with pytest.raises(SPDError, match=message):
        check(device, **sizes)


def test_an_unknown_class_or_model_is_refused():
    with pytest.raises(SPDError, match="TransformerBridge"):
        bench_forward("Transformer")
    with pytest.raises(SPDError, match="gpt2"):
        bench_step(1, 1, "scalar", 1, "cpu", model="gpt3")


@pytest.mark.slow
def test_a_process_of_its_own_gives_the_line_or_says_that_it_failed(capfd):
    assert in_own_process("length", length=16, subcomponents=4, steps=1)["length"] == 16
    with pytest.raises(SPDError, match="ended with 1"):
        in_own_process("length", length=0)
    assert "length was given as 0" in capfd.readouterr().err
