import pytest
import torch

from spd_lens import SPDError
from spd_lens.components import (
    Components,
    Target,
    check_weight,
    from_positions,
    initialise,
    likeness,
    masked_output,
    targeted,
    varimax,
    weighted_svd,
)
from spd_lens.sites import Passage, Site


def site(d_in=6, d_out=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(d_in, d_out, generator=generator)
    return Site("blocks.0.mlp.W_in", weight, torch.randn(d_out, generator=generator), 1)


def passage(s, heads=None):
    x = torch.randn(2, 3, s.d_in)
    return Passage(x, x @ s.weight + s.bias, s.bias)


def test_singular_vectors_are_exact_at_full_rank_and_noise_is_small():
    s = site()
    exact = initialise(s, 5, "svd", torch.Generator().manual_seed(0))
    assert torch.allclose(exact.V @ exact.U, s.weight, atol=1e-6)
    assert torch.allclose(exact.V.norm(dim=0), exact.U.norm(dim=1), atol=1e-6)
    more = initialise(s, 9, "svd", torch.Generator().manual_seed(0))
    assert more.delta(s.weight).norm() < 0.01 * s.weight.norm() and (more.V[:, 5:] != 0).all()


def test_the_metrics_vectors_are_exact_together_and_best_one_by_one():
    s, generator = site(), torch.Generator().manual_seed(1)
    A, G = (M @ M.T for M in (torch.randn(d, d, generator=generator, dtype=torch.float64) for d in (6, 5)))
    V, U = weighted_svd(s.weight, (A, G))
    assert torch.allclose(V @ U, s.weight.double(), atol=1e-12) and torch.allclose(V.norm(dim=0), U.norm(dim=1))

    def lost(V, U):
        delta = s.weight.double() - V @ U
        return float((A @ delta @ G @ delta.T).trace())

    own = weighted_svd(s.weight, None)
    for k in range(1, 5):
        assert lost(V[:, :k], U[:k]) < lost(own[0][:, :k], own[1][:k])
        for _ in range(20):  # nor does any small step away from them lose less
            step = 1e-2 * torch.randn(6, 5, generator=generator, dtype=torch.float64)
            near, values, far = torch.linalg.svd(V[:, :k] @ U[:k] + step, full_matrices=False)
            assert lost(near[:, :k] * values[:k], far[:k]) > 0.98 * lost(V[:, :k], U[:k])
    c = initialise(s, 9, "fisher", generator, (A, G))
    assert torch.allclose(c.V[:, :5], V.float()) and c.delta(s.weight).norm() < 0.01 * s.weight.norm()


def test_a_metric_that_knows_nothing_of_a_direction_stays_exact():
    s = site()
    A, G = torch.zeros(6, 6, dtype=torch.float64), torch.zeros(5, 5, dtype=torch.float64)
    A[0, 0] = G[1, 1] = 1.0
    for factors in ((A, G), (torch.zeros_like(A), torch.zeros_like(G))):
        V, U = weighted_svd(s.weight, factors)
        assert torch.allclose(V @ U, s.weight.double(), atol=1e-9) and torch.isfinite(V).all() and torch.isfinite(U).all()


def test_a_targeted_start_does_what_the_matrix_does_on_the_prompts_and_little_elsewhere():
    generator = torch.Generator().manual_seed(0)
    s = site(20, 12)
    prompts, elsewhere = (
        torch.randn(3, 20, generator=generator),
        torch.randn(400, 12, generator=generator) @ torch.randn(12, 20, generator=generator),
    )
    target = Target(prompts, torch.ones(3), torch.eye(12), elsewhere.T @ elsewhere / 400)
    c = targeted(s, 8, target, generator).requires_grad_(False)
    assert (c.V.shape, c.U.shape) == ((20, 8), (8, 12)) and torch.allclose(c.V.norm(dim=0)[:3], c.U.norm(dim=1)[:3], rtol=1e-4)

    def share(x, V=c.V[:, :3], U=c.U[:3]):
        return float((x @ V @ U).norm() / (x @ s.weight).norm())

    assert float((prompts @ c.V[:, :3] @ c.U[:3] - prompts @ s.weight).norm() / (prompts @ s.weight).norm()) < 0.01
    V, U = weighted_svd(s.weight, ((prompts.T @ prompts).double(), torch.eye(12).double()))  # which knows nothing of the rest
    assert share(elsewhere) < 0.1 < share(elsewhere, V[:, :3].float(), U[:3].float())
    inner = (prompts @ c.V[:, :3]).abs()
    assert (inner.max(0).values > 3 * (inner.sum(0) - inner.max(0).values)).all()  # each is read at one of the three


def test_varimax_finds_the_simple_structure_again():
    generator = torch.Generator().manual_seed(0)
    simple = torch.eye(4, dtype=torch.float64).repeat(5, 1) * torch.rand(20, 1, generator=generator, dtype=torch.float64)
    turned = simple @ torch.linalg.qr(torch.randn(4, 4, generator=generator, dtype=torch.float64))[0]
    rotation = varimax(turned)
    assert torch.allclose(rotation @ rotation.T, torch.eye(4, dtype=torch.float64), atol=1e-9)
    assert torch.allclose((turned @ rotation).abs().sort(1).values[:, :3], torch.zeros(20, 3, dtype=torch.float64), atol=1e-4)


def test_closing_makes_the_product_exact_or_does_nothing():
    s = site()
    c = Components(torch.randn(6, 8), torch.randn(8, 5))
    c.close(s.weight)
    assert c.delta(s.weight).norm() < 1e-6 * s.weight.norm()
    few = Components(torch.randn(6, 3), torch.randn(3, 5))
    before = few.U.clone()
    few.close(s.weight)
    assert torch.equal(few.U, before)


def test_random_start_has_the_matrix_norm():
    s = site(60, 50)
    start = initialise(s, 80, "random", torch.Generator().manual_seed(0))
    assert 0.5 < (start.V @ start.U).norm() / s.weight.norm() < 2


def test_fewer_subcomponents_than_the_rank_say_what_it_costs():
    with pytest.warns(UserWarning, match=r"3 subcomponents for a matrix of rank 5 leave a part .* Give subcomponents=5"):
        initialise(site(), 3, "svd", torch.Generator())


def test_masked_output_is_the_formula():
    s = site()
    c = Components(torch.randn(6, 4), torch.randn(4, 5))
    p, mask = passage(s), torch.rand(2, 3, 4)
    expected = torch.stack(
        [
            torch.stack([sum(mask[b, n, i] * (p.x[b, n] @ c.V[:, i]) * c.U[i] for i in range(4)) + s.bias for n in range(3)])
            for b in range(2)
        ]
    )
    assert torch.allclose(masked_output(c, s, p, mask, 0.0), expected, atol=1e-5)
    everything = masked_output(c, s, p, torch.ones(()), 1.0)
    assert torch.allclose(everything, p.y, atol=1e-5)  # all on and the delta: the original


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_broken_weights_are_named(bad):
    s = site()
    s.weight[1, 2] = bad
    with pytest.raises(SPDError, match=r"blocks.0.mlp.W_in holds 1 NaN or infinite"):
        check_weight(s)


def test_half_precision_is_refused():
    with pytest.raises(SPDError, match=r"float16.*model.to\(torch.float32\)"):
        check_weight(Site("blocks.0.attn.W_Q", torch.ones(2, 2, dtype=torch.float16), None, 1))


def read_here_and_there(K=8, d_in=12, d_out=10, many=400, most=1):
    """Inputs that switch on a few of K features, which oblique pieces read; and what else varies, which none reads."""
    generator = torch.Generator().manual_seed(0)
    V, U = torch.randn(d_in, K, generator=generator), torch.randn(K, d_out, generator=generator)
    z = torch.zeros(many, K)
    for row in z:
        row[torch.randperm(K, generator=generator)[: int(torch.randint(1, most + 1, (), generator=generator))]] = 1.0
    z *= 0.7 + 0.6 * torch.rand(many, K, generator=generator)
    null = torch.linalg.svd(V.T).Vh[K:]
    x = z @ torch.linalg.pinv(V) + 0.3 * torch.randn(many, d_in - K, generator=generator) @ null
    weight = V @ U
    return Site("blocks.0.mlp.W_in", weight, None, 1), V, U, x, torch.randn(many, d_out, generator=generator)


@pytest.mark.parametrize("most", [1, 3])
def test_positions_show_the_pieces_that_the_singular_vectors_hide(most):
    """One feature a position or up to three, at random angles, with directions that vary and are not read."""
    site, V, U, x, g = read_here_and_there(most=most)
    c = from_positions(site, 24, x, g, torch.Generator().manual_seed(1))
    assert c.V.shape == (12, 24) and c.U.shape == (24, 10) and bool(torch.isfinite(c.V).all() and torch.isfinite(c.U).all())
    assert float(likeness(V, U, c.V.detach(), c.U.detach()).amax(1).mean()) > (0.97 if most == 1 else 0.9)
    own = initialise(site, 24, "svd", torch.Generator().manual_seed(1))
    assert float(likeness(V, U, own.V.detach(), own.U.detach()).amax(1).mean()) < 0.8
    assert float(c.delta(site.weight).detach().norm()) < 0.02 * float(site.weight.norm())  # and they are the matrix


def test_positions_that_write_nothing_leave_the_matrix_whole():
    site, _, _, x, g = read_here_and_there()
    for inputs in (torch.zeros_like(x), x[:1].expand(400, -1)):
        c = from_positions(site, 20, inputs, g, torch.Generator().manual_seed(1))
        assert float(c.delta(site.weight).detach().norm()) < 0.05 * float(site.weight.norm())
