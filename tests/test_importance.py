import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spd_lens import importance
from spd_lens.importance import build_importance, fast_independent_mlps, independent_mlps, lower_leaky, upper_leaky


def gradient(function, z, incoming):
    z = torch.tensor(z, requires_grad=True)
    function(z).backward(torch.tensor(incoming))
    return z.grad


def test_lower_leaky_values_and_gradients():
    z = [-1.0, -1.0, 0.0, 0.0, 0.5, 0.5, 2.0, 2.0]
    assert lower_leaky(torch.tensor(z)).tolist() == [0, 0, 0, 0, 0.5, 0.5, 1, 1]
    got = gradient(lower_leaky, z, [1.0, -1.0, 1.0, -1.0, 1.0, -1.0, 1.0, -1.0])
    assert got.tolist() == pytest.approx([0, -0.01, 0, -0.01, 1, -1, 0, 0])  # below 0 only what would raise z


def test_upper_leaky_values_and_gradients():
    z = [-1.0, 0.5, 2.0]
    assert upper_leaky(torch.tensor(z)).tolist() == pytest.approx([0, 0.5, 1.01])
    assert gradient(upper_leaky, z, [1.0, 1.0, 1.0]).tolist() == pytest.approx([0, 1, 0.01])


@settings(max_examples=25, deadline=None)
@given(
    rows=st.integers(1, 70), widths=st.lists(st.integers(1, 9), min_size=1, max_size=3), C=st.integers(1, 9), H=st.integers(1, 5),
    chunk=st.integers(1, 200),
)  # fmt: skip
def test_the_fast_form_equals_the_readable_one_gradients_included(rows, widths, C, H, chunk):
    generator = torch.Generator().manual_seed(rows)
    shapes = [(sum(widths), C, H), (C, H), (C, H), (C,), *((rows, d) for d in widths)]
    arguments = [torch.randn(*shape, generator=generator, requires_grad=True) for shape in shapes]
    parameters, inputs = arguments[:4], arguments[4:]
    weight = torch.randn(rows, C, generator=generator)
    results = []
    before, importance.CHUNK = importance.CHUNK, chunk
    try:
        for z in (independent_mlps(torch.cat(inputs, 1), *parameters), fast_independent_mlps(inputs, *parameters)):
            results.append((z, *torch.autograd.grad((z * weight).sum(), arguments)))
    finally:
        importance.CHUNK = before
    for readable, fast in zip(*results):
        assert torch.allclose(readable, fast, atol=1e-5 * max(1.0, float(readable.detach().abs().max())))


def build(kind, s=7, d=5, C=4, causal=True, context=7):
    x, inner = torch.randn(3, s, d), torch.randn(3, s, C)
    generator = torch.Generator().manual_seed(0)
    return build_importance(kind, x, inner, 6, 1.0, 0.3, context, causal, generator), x, inner


def moved(gate, x, inner, n):
    """Positions whose importance changes when position n's input does."""
    other, changed = x.clone(), inner.clone()
    other[:, n] += 1.0
    changed[:, n] += 1.0
    return ((gate(other, changed) - gate(x, inner)).abs().amax((0, 2)) > 1e-7).tolist()


@pytest.mark.parametrize("kind", ["scalar", "vector", "attention"])
def test_who_sees_what(kind):
    gate, x, inner = build(kind)
    expected = [False, False, True, True, True, True, True] if kind == "attention" else [n == 2 for n in range(7)]
    assert moved(gate, x, inner, 2) == expected


def test_attention_looks_both_ways_where_the_model_does():
    gate, x, inner = build("attention", causal=False)
    assert all(moved(gate, x, inner, 2))


def test_scalar_sees_only_its_own_inner_activation():
    gate, x, inner = build("scalar")
    other = inner.clone()
    other[..., 1] += 1.0
    difference = (gate(x, other) - gate(x, inner)).abs().amax((0, 1))
    assert difference[1] > 0 and difference[[0, 2, 3]].max() == 0


@pytest.mark.parametrize("kind", ["scalar", "vector", "attention"])
def test_the_retired_are_off_for_good_and_change_nothing_for_the_others(kind):
    gate, x, inner = build(kind)
    before = gate(x, inner)
    gate.alive[[0, 2]] = 0
    after = gate(x, inner)
    assert torch.allclose(after[..., [1, 3]], before[..., [1, 3]], atol=1e-6)
    assert lower_leaky(after)[..., [0, 2]].max() == 0 and upper_leaky(after)[..., [0, 2]].max() == 0
    (after * torch.randn(after.shape)).sum().backward()
    outer = gate.b2 if kind == "scalar" else gate.mlps.b2
    assert (outer.grad[[0, 2]] == 0).all() and (outer.grad[[1, 3]] != 0).all()
    gate.alive.fill_(1)
    assert torch.equal(gate(x, inner), before)
    gate.alive.zero_()
    assert lower_leaky(gate(x, inner)).max() == 0


def test_attention_is_the_papers_formula():
    gate, x, inner = build("attention")
    scaled = x / gate.scale
    q, k, v = scaled @ gate.W_Q, scaled @ gate.W_K, scaled @ gate.W_V + gate.absolute
    scores = torch.full((3, 7, 7), -torch.inf)
    for n in range(7):
        for j in range(n + 1):
            scores[:, n, j] = ((q[:, n] * k[:, j]).sum(-1) + gate.relative[n - j]) / 6**0.5
    bar = torch.cat([scores.softmax(-1) @ v, scaled], -1)
    m = gate.mlps
    expected = independent_mlps(bar.flatten(0, 1), m.w1, m.b1, m.w2, m.b2).view(3, 7, 4)
    assert torch.allclose(gate(x, inner), expected, atol=1e-5)


def test_positions_beyond_the_learned_ones_share_the_last():
    gate, x, inner = build("attention", s=7, context=3)
    bias = gate.bias_by_distance(7)  # from 6 ahead to 6 back
    assert bias[6 + 6] == bias[6 + 2] != bias[6 + 1] and bias[5] == -torch.inf
    assert gate(x, inner).shape == (3, 7, 4)


@pytest.mark.parametrize("kind", ["scalar", "vector", "attention"])
def test_the_scale_of_the_inputs_does_not_matter(kind):
    generator = torch.Generator().manual_seed(0)
    x, inner = torch.randn(3, 5, 4), torch.randn(3, 5, 2)
    small = build_importance(kind, x, inner, 6, 1.0, 0.3, 5, True, generator.manual_seed(0))
    large = build_importance(kind, 1000 * x, 1000 * inner, 6, 1.0, 0.3, 5, True, generator.manual_seed(0))
    assert torch.allclose(small(x, inner), large(1000 * x, 1000 * inner), atol=1e-4)


@settings(max_examples=20, deadline=None)
@given(batch=st.integers(1, 3), length=st.integers(1, 12), context=st.integers(1, 14), causal=st.booleans(), scores=st.integers(1, 150))
def test_attention_in_blocks_equals_attention_at_once_gradients_included(batch, length, context, causal, scores):
    torch.manual_seed(length)
    x, weight = torch.randn(batch, length, 5), torch.randn(batch, length, 4)
    gate = build_importance("attention", x, torch.randn(batch, length, 4), 3, 1.0, 0.3, context, causal, torch.Generator().manual_seed(0))
    results, before = [], importance.SCORES
    try:
        for importance.SCORES in (10**9, scores):
            z = gate(x, torch.zeros(batch, length, 4))
            results.append((z, *torch.autograd.grad((z * weight).sum(), list(gate.parameters()))))
    finally:
        importance.SCORES = before
    for whole, blocks in zip(*results):
        assert torch.allclose(whole, blocks, atol=1e-5 * max(1.0, float(whole.detach().abs().max())))
