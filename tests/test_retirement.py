import pytest
import torch

from spd_lens import SPDConfig, decompose, masks
from spd_lens.losses import kl_divergence
from spd_lens.retirement import close, merge, rank_one, retire
from tests import zoo

TOKENS = zoo.tokens(16)


@pytest.fixture(params=["all", "last"])
def untrained(request, model):
    """All are on everywhere; 8 of 40 lie beyond each matrix's rank."""
    return decompose(model, zoo.tokens(8), SPDConfig(steps=0, subcomponents=40, output_positions=request.param), progress=False)


def hard_kl(d):
    last = slice(None) if d.config.output_positions == "all" else slice(-1, None)
    with torch.no_grad():
        return float(kl_divergence(d.model(TOKENS)[:, last], d.run(TOKENS, masks.hard(d.importances(TOKENS)))[:, last]).mean())


def alive(d):
    return sum(int(gate.alive.sum()) for gate in d.gates.values())


def test_what_goes_costs_no_more_than_the_tolerance(untrained):
    before, many = hard_kl(untrained), alive(untrained)
    gone = retire(untrained, TOKENS, 1e-3, 5)
    assert alive(untrained) == many - gone and 0.1 * many < gone < many
    assert hard_kl(untrained) <= before + 1e-3 + 1e-6
    again = retire(untrained, TOKENS, 0.0, 16)  # nothing is free any more
    assert again <= 2


def test_more_may_cost_more(untrained):
    gone = [retire(untrained, TOKENS, tolerance, 8) for tolerance in (1e-5, 1e-3, 1e-1)]
    assert all(gone)


def test_what_is_needed_stays_and_what_is_never_active_goes(untrained):
    name = "blocks.0.mlp.W_in"
    gate = untrained.gates[name]
    with torch.no_grad():
        gate.mlps.b2[7] = -50.0
    off = [{site: torch.ones(()) for site in untrained.sites} | {name: 1 - torch.eye(40)[c]} for c in range(40)]
    most = max(
        (c for c in range(40) if c != 7), key=lambda c: float(kl_divergence(untrained.model(TOKENS), untrained.run(TOKENS, off[c])).mean())
    )
    retire(untrained, TOKENS, 1e-4, 16)
    assert gate.alive[7] == 0 and gate.alive[most] == 1


def test_rows_at_once_do_not_matter(model):
    results = []
    for rows in (3, 16):
        d = decompose(model, zoo.tokens(8), SPDConfig(steps=0, subcomponents=36), progress=False)
        with torch.no_grad():  # a draw of other labels would move the order of those that matter alike: none of them do here
            for gate in d.gates.values():
                gate.mlps.b2[:12] = -50.0
        retire(d, TOKENS, 0.0, rows)
        results.append({name: gate.alive.tolist() for name, gate in d.gates.items()})
    assert results[0] == results[1] and all(kept[:12] == [0] * 12 for kept in results[0].values())


def test_a_model_without_its_subcomponents_is_refused_nothing(untrained):
    """Everything may go where nothing matters: the tolerance decides, not a floor."""
    retire(untrained, TOKENS, 1e6, 16)
    assert alive(untrained) == 0
    assert all(float(g.max()) == 0 for g in untrained.importances(TOKENS).values())


def test_closing_makes_the_matrix_whole_where_that_is_harmless(model):
    d = decompose(model, zoo.tokens(8), SPDConfig(steps=0, subcomponents=49), progress=False)
    with torch.no_grad():
        for c in d.components.values():
            c.U += 1e-4 * torch.randn_like(c.U)
    close(d, TOKENS, 1e-3, 5)
    assert all(float(c.delta(d.sites[name].weight).norm()) < 1e-5 for name, c in d.components.items())


def test_closing_leaves_alone_what_it_would_spoil(model):
    """Two directions of V are nearly parallel: to make up for what is missing across them, U would have to change beyond measure."""
    name = "blocks.0.mlp.W_in"
    d = decompose(model, zoo.tokens(8), SPDConfig(sites=name, steps=0, subcomponents=32), progress=False)
    c, site = d.components[name], d.sites[name]
    with torch.no_grad():
        c.V[:, 1] = c.V[:, 0] + 1e-5 * c.V[:, 1]
        c.U.copy_(torch.linalg.lstsq(c.V.double(), site.weight.double()).solution.clamp(-0.5, 0.5))
    for gate in d.gates.values():
        gate.alive[1] = 0
    kl, before = hard_kl(d), c.U.clone()
    assert c.delta(site.weight).norm() > 0.01 * site.weight.norm()
    close(d, TOKENS, 1e-4, 16)
    assert hard_kl(d) <= kl + 1e-4 + 1e-6 and torch.equal(c.U, before)


SITE = "blocks.0.mlp.W_in"


@pytest.fixture
def split(model):
    """One site, all of 40 active everywhere; the first is in three parts: a half, a half of the other sign twice over."""
    d = decompose(model, zoo.tokens(8), SPDConfig(sites=SITE, steps=0, subcomponents=40, importance="vector"), progress=False)
    c = d.components[SITE]
    with torch.no_grad():
        c.V[:, 33], c.U[33] = -c.V[:, 0], -0.25 * c.U[0]
        c.V[:, 34], c.U[34] = c.V[:, 0], 0.25 * c.U[0]
        c.U[0] *= 0.5
    return d


def test_those_that_are_alike_become_one_and_the_matrix_stays(split):
    c, before = split.components[SITE], split.components[SITE].V.detach() @ split.components[SITE].U.detach()
    mlps = split.gates[SITE].mlps
    with torch.no_grad():
        mlps.w2.zero_()
        mlps.b2.copy_(torch.where(torch.arange(40) < 35, 1.0, -1.0))  # the last are never active
        c.V[:, 39], c.U[39] = c.V[:, 1], c.U[1]
        before = c.V @ c.U
    hard = hard_kl(split)
    assert merge(split, TOKENS, 5) == 2
    gate = split.gates[SITE].alive
    assert int(gate.sum()) == 38 and int(gate[[0, 33, 34]].sum()) == 1 and gate[1] == gate[39] == 1
    assert torch.allclose(c.V @ c.U, before, atol=1e-5) and abs(hard_kl(split) - hard) < 1e-5


def test_parts_that_are_always_active_together_and_write_alike_become_one(split):
    """A sum of two that read differently and write the same is of rank one; that of two which are not active together is two things."""
    c, mlps = split.components[SITE], split.gates[SITE].mlps
    with torch.no_grad():
        mlps.w2.zero_()
        c.U[[33, 34]] = 0.01 * c.U[[33, 34]]
        c.U[3] = c.U[2] * c.U[3].norm() / c.U[2].norm()
        mlps.b2.fill_(-1.0)
        mlps.b2[[2, 3]] = 1.0
        before = c.V @ c.U
    assert merge(split, TOKENS, 16) == 1 and split.gates[SITE].alive[[2, 3]].sum() == 1
    assert torch.allclose(c.V @ c.U, before, atol=1e-5)


def test_what_is_apart_stays_apart(split):
    with torch.no_grad():
        split.gates[SITE].alive[[33, 34]] = 0
    assert merge(split, TOKENS, 16) == 0


def test_the_best_rank_one_matrix():
    V, U = torch.randn(6, 3, generator=torch.Generator().manual_seed(0)), torch.randn(3, 4, generator=torch.Generator().manual_seed(1))
    v, u = rank_one(V, U)
    left, s, right = torch.linalg.svd(V @ U)
    assert torch.allclose(torch.outer(v, u), s[0] * torch.outer(left[:, 0], right[0]), atol=1e-5)
    assert float(v.norm()) == pytest.approx(float(u.norm()), rel=1e-4)
