import pytest
import torch

from spd_lens import SPDConfig, curvature, decompose
from spd_lens.curvature import effects, factors, sensitivities
from spd_lens.losses import kl_divergence
from tests import zoo

NAMES = ("blocks.0.attn.W_K", "blocks.0.mlp.W_in", "blocks.1.attn.W_O")
MANY = 400


@pytest.fixture(scope="module", params=["all", "last"])
def small(request, model):
    """Full-rank decomposition of three matrices."""
    config = SPDConfig(sites=NAMES, subcomponents=33, steps=0, output_positions=request.param)
    return decompose(model, zoo.tokens(8), config, progress=False)


def kl(d, tokens, masks):
    last = slice(None) if d.config.output_positions == "all" else slice(-1, None)
    with torch.no_grad():
        return float(kl_divergence(*(d.run(tokens, m).double()[:, last] for m in ({}, masks))).mean())


def test_what_it_sees_are_the_inputs_and_the_slopes(small):
    tokens = zoo.tokens(2)
    inputs, gradients = sensitivities(small, tokens, torch.Generator().manual_seed(0))
    clean = small.trace(tokens).inputs
    for name, site in small.sites.items():
        assert torch.allclose(inputs[name], clean[name], atol=1e-6)
        assert gradients[name].shape == (*tokens.shape, site.d_out) and gradients[name].abs().max() > 0
    if small.config.output_positions == "last":  # of the last layer only the last position reaches the last output
        assert gradients["blocks.1.attn.W_O"][:, :-1].abs().max() == 0
    assert all(p.grad is None for p in small.model.parameters())


@pytest.mark.parametrize("name", NAMES)
def test_the_metric_predicts_the_kl_of_a_small_change(small, name, monkeypatch):
    """`½·E[(Σ_n g·dWᵀx)²]` over draws of the label against the KL that the change costs when run."""
    monkeypatch.setattr(curvature, "TEMPERATURE", 1.0)  # the model's own distribution: then it is exact
    tokens, generator = zoo.tokens(4), torch.Generator().manual_seed(0)
    c = small.components[name]
    mask = 1 + 0.01 * torch.randn(c.C, generator=generator)
    measured = kl(small, tokens, {name: mask})
    dW = (c.V * (mask - 1)) @ c.U
    expected = 0.0
    for _ in range(MANY):
        inputs, gradients = sensitivities(small, tokens, generator)
        expected += float(((inputs[name] @ dW) * gradients[name]).sum((1, 2)).square().mean()) / 2 / MANY
    outputs = 1 if small.config.output_positions == "last" else tokens.shape[1]
    assert expected / outputs == pytest.approx(measured, rel=0.2)


@pytest.mark.parametrize("name", NAMES)
def test_effects_predict_the_kl_of_cutting(small, name, monkeypatch):
    monkeypatch.setattr(curvature, "TEMPERATURE", 1.0)
    tokens, generator = zoo.tokens(4), torch.Generator().manual_seed(0)
    C = small.components[name].C
    active = [{site: torch.ones(*tokens.shape, small.components[site].C) for site in small.sites}]
    active[0][name][..., 3] = 0
    total = sum(effects(small, tokens, active, generator, 4)[name] for _ in range(MANY)) / MANY
    assert total[3] == 0
    order = [c for c in total.argsort().tolist() if c != 3]
    for c in (order[C // 8], order[C // 4], order[C // 2]):  # small ones, whose KL is of second order
        cut = torch.ones(C)
        cut[c] = 0
        assert float(total[c]) == pytest.approx(kl(small, tokens, {name: cut}), rel=0.35, abs=1e-9)
    halves = effects(small, tokens, [{k: v[:2] for k, v in active[0].items()}, {k: v[2:] for k, v in active[0].items()}], generator, 2)
    assert halves[name].shape == (C,)


def test_factors_are_weighted_covariances(small):
    tokens = zoo.tokens(3)
    inputs, gradients = sensitivities(small, tokens, torch.Generator().manual_seed(0))
    for name, (A, G) in factors(small, tokens, torch.Generator().manual_seed(0), 3).items():
        x, g = inputs[name].flatten(0, 1).double(), gradients[name].flatten(0, 1).double()
        assert torch.allclose(A, sum(torch.outer(a, a) * (b @ b) for a, b in zip(x, g)))
        assert torch.allclose(G, sum(torch.outer(b, b) * (a @ a) for a, b in zip(x, g)))


def test_few_subcomponents_of_the_metric_lose_less_than_the_matrix_own(model):
    """What it is for: the first few of all matrices at once."""
    tokens, lost = zoo.tokens(64), {}
    for init in ("fisher", "svd"):
        d = decompose(model, tokens, SPDConfig(steps=0, subcomponents=32, init=init), progress=False)
        some = {name: (torch.arange(32) < 24).float() for name in d.sites}
        lost[init] = kl(d, tokens, some)
    assert lost["fisher"] < 0.8 * lost["svd"]
