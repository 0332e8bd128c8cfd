import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spd_lens import SPDConfig, losses
from spd_lens.components import Components
from spd_lens.importance import upper_leaky
from spd_lens.losses import EPSILON, LOSSES, Pass, Reconstruction, faithfulness, frequency, kl_divergence, mean_power, minimality, price
from spd_lens.sites import Site


def make_pass(power=0.5, output_positions="last"):
    generator = torch.Generator().manual_seed(0)
    sites = {n: Site(n, torch.randn(3, d, generator=generator), None, 1) for n, d in (("blocks.0.mlp.W_in", 4), ("blocks.0.mlp.W_out", 7))}
    components = {
        n: Components(torch.randn(3, 2, generator=generator), torch.randn(2, s.d_out, generator=generator)) for n, s in sites.items()
    }
    g = {n: torch.rand(5, 6, 2, generator=generator) for n in sites}
    return Pass(sites, components, g, power, SPDConfig(frequency_scale=0.1, output_positions=output_positions))


def test_faithfulness_is_the_mean_over_all_entries():
    p = make_pass()
    squares = torch.cat([(s.weight - p.components[n].V @ p.components[n].U).flatten() ** 2 for n, s in p.sites.items()])
    assert torch.allclose(faithfulness(p), squares.mean())


def test_minimality_sums_over_sites_and_subcomponents_the_mean_over_positions():
    p = make_pass()
    expected = sum(float((g[..., c] ** 0.5).mean()) - EPSILON**0.5 for g in p.logits.values() for c in range(2))
    assert float(minimality(p)) == pytest.approx(expected, rel=1e-4)


def test_price_is_per_compared_output():
    last, every = make_pass(1.0, "last"), make_pass(1.0, "all")
    active = sum(float(g.sum()) for g in last.logits.values())
    assert float(price(last)) == pytest.approx(active / 5, rel=1e-4)  # 5 sequences, an output each
    assert float(price(every)) == pytest.approx(active / 30, rel=1e-4)  # 6 positions, an output each


def test_what_is_never_active_costs_nothing_however_small_the_power():
    p = make_pass(power=0.1)
    off = Pass(p.sites, p.components, {name: torch.full_like(g, -1.0) for name, g in p.logits.items()}, 0.1, p.config)
    assert float(minimality(off)) == float(price(off)) == float(frequency(off)) == 0


def test_frequency_is_concave_in_how_often_a_subcomponent_is_used():
    p = make_pass(power=1.0)
    expected = sum(float(torch.log1p(g[..., c].mean() * 6 / 0.1)) for g in p.logits.values() for c in range(2))
    assert float(frequency(p)) == pytest.approx(expected, rel=1e-4)
    shared, spread = torch.zeros(4, 8, 2), torch.zeros(4, 8, 2)
    shared[:, 0, 0] = 1
    spread[:2, 0, 0] = spread[2:, 0, 1] = 1  # as many activations, on two subcomponents
    cost = [float(frequency(Pass(p.sites, p.components, {"blocks.0.mlp.W_in": g}, 1.0, p.config))) for g in (shared, spread)]
    assert cost[0] < cost[1]


def test_the_slope_of_minimality_is_finite_at_zero():
    p = make_pass(power=0.1)
    g = torch.zeros(2, 3, 2, requires_grad=True)
    minimality(Pass(p.sites, p.components, {"blocks.0.mlp.W_in": g}, 0.1, p.config)).backward()
    assert torch.isfinite(g.grad).all()


def test_kl_is_in_nats_from_the_original():
    original, masked = torch.log(torch.tensor([[0.75, 0.25]])), torch.log(torch.tensor([[0.5, 0.5]]))
    expected = 0.75 * torch.log(torch.tensor(1.5)) + 0.25 * torch.log(torch.tensor(0.5))
    assert torch.allclose(kl_divergence(original, masked), expected)
    assert torch.allclose(kl_divergence(original + 3.0, masked - 2.0), expected)


def test_the_registry_holds_what_the_papers_name():
    assert set(LOSSES) >= {
        "faithfulness",
        "minimality",
        "price",
        "frequency",
        "plain",
        "stochastic",
        "layerwise",
        "partial",
        "adversarial",
        "alive",
    }
    assert sum(isinstance(loss, Reconstruction) for loss in LOSSES.values()) == 6


@settings(max_examples=25, deadline=None)
@given(rows=st.integers(1, 9), C=st.integers(1, 5), power=st.floats(0.1, 2.0), slice_=st.integers(1, 30))
def test_the_mean_power_is_what_it_says_gradients_included(rows, C, power, slice_):
    z = (2 * torch.randn(rows, 3, C, generator=torch.Generator().manual_seed(rows))).requires_grad_()
    before, losses.SLICE = losses.SLICE, slice_
    try:
        results = []
        for usage in (mean_power(z, power), ((upper_leaky(z) + EPSILON).pow(power) - EPSILON**power).mean((0, 1))):
            results.append((usage, torch.autograd.grad((usage * torch.arange(1.0, C + 1)).sum(), z)[0]))
    finally:
        losses.SLICE = before
    for fast, readable in zip(*results):
        assert torch.allclose(fast, readable, rtol=1e-4, atol=1e-6)
