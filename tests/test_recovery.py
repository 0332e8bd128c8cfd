import re

import pytest
import torch

from spd_lens import SPDConfig, SPDError, decompose, recovered, similarity, viz
from spd_lens.recovery import Recovery, matched
from tests import zoo

SITE = "blocks.0.mlp.W_in"


@pytest.fixture
def d(model):
    """One site, every subcomponent active but the last four of 32."""
    d = decompose(model, zoo.tokens(4), SPDConfig(sites=SITE, steps=0, subcomponents=32, importance="vector", gate_width=1), progress=False)
    with torch.no_grad():
        mlps = d.gates[SITE].mlps
        mlps.w2.zero_()
        mlps.b2.copy_(torch.where(torch.arange(32) < 28, 1.0, -1.0))
    return d


def own(d, chosen):
    c = d.components[SITE]
    return c.V.detach()[:, chosen], c.U.detach()[chosen]


def test_a_piece_comes_back_whatever_its_length_and_sign(d, tokens):
    V, U = own(d, [3, 7])
    found = recovered(d, {SITE: (-5 * V, 0.1 * U)}, tokens)
    assert found.mean == pytest.approx(1, abs=1e-5) and (found.above, found.total) == (2, 2)
    assert [(piece, c) for piece, c, _ in sorted(found.matching[SITE])] == [(0, 3), (1, 7)]
    assert list(found.table()["best"]) == list(found.table()["matched"]) == [3, 7]


def test_only_active_subcomponents_count(d, tokens):
    found = recovered(d, {SITE: own(d, [3, 30])}, tokens)
    assert found.active[SITE] == list(range(28)) and found.above == 1 and found.mean < 0.95


def test_forward_and_back_by_hand(d, tokens):
    """Each pair's cosine against the cosine of the two matrices; a truth found among much else has a low mean back."""
    V, U = torch.randn(32, 3, generator=torch.Generator().manual_seed(0)), own(d, [0, 1, 2])[1]
    found = recovered(d, {SITE: (V, U)}, tokens)
    c = d.components[SITE]
    for k in range(3):
        for a in range(28):
            one, other = torch.outer(V[:, k], U[k]), torch.outer(c.V[:, a], c.U[a]).detach()
            assert float(found.likeness[SITE][k, a]) == pytest.approx(abs(float((one * other).sum() / one.norm() / other.norm())), abs=1e-5)
    assert found.mean == pytest.approx(float(found.likeness[SITE].amax(1).mean())) and found.above == 0
    assert found.back == pytest.approx(float(found.likeness[SITE].amax(0).mean()))


def test_the_matching_takes_each_once_the_most_alike_first():
    assert matched(torch.tensor([[0.9, 0.8], [0.95, 0.1], [0.2, 0.3]])) == [(1, 0), (0, 1)]


def test_two_decompositions_are_alike_where_they_are_the_same(d, model, tokens):
    assert similarity(d, d, tokens).mean == pytest.approx(1, abs=1e-5)
    other = decompose(
        model, zoo.tokens(4), SPDConfig(sites=SITE, steps=0, subcomponents=20, init="random", importance="vector"), progress=False
    )
    found = similarity(other, d, tokens)
    assert found.likeness[SITE].shape == (28, 20) and found.mean < 0.5
    assert similarity(d, other, tokens).likeness[SITE].shape == (20, 28)
    assert torch.allclose(similarity(d, other, tokens).likeness[SITE], found.likeness[SITE].T)


def test_none_active_finds_nothing(d, tokens):
    with torch.no_grad():
        d.gates[SITE].mlps.b2.fill_(-1.0)
    found = recovered(d, {SITE: own(d, [1])}, tokens)
    assert (found.mean, found.above) == (0.0, 0) and found.matching == {SITE: []} and found.back != found.back
    assert list(found.table()["best"]) == [-1]
    with pytest.raises(SPDError, match="none to come back"):
        similarity(d, d, tokens)


def test_what_cannot_be_compared_is_refused(d, model, tokens):
    V, U = own(d, [1, 2])
    for truth, message in (
        ({}, "names no site"), ({"blocks.0.mlp.W_on": (V, U)}, "nearest"), ({SITE: [1]}, "two tensors"), ({SITE: (V.T, U.T)}, "transpose"),
        ({SITE: (V * torch.tensor([1.0, 0.0]), U)}, re.escape("[1]")), ({SITE: (V / 0, U)}, "not finite"),
    ):  # fmt: skip
        with pytest.raises(SPDError, match=message):
            recovered(d, truth, tokens)
    elsewhere = decompose(model, zoo.tokens(4), SPDConfig(sites="blocks.1.mlp.W_in", steps=0, subcomponents=32), progress=False)
    with pytest.raises(SPDError, match="no site in common"):
        similarity(d, elsewhere, tokens)
    narrow = decompose(zoo.native(d_mlp=40), zoo.tokens(4), SPDConfig(sites=SITE, steps=0, subcomponents=32), progress=False)
    with pytest.raises(SPDError, match=re.escape("[32, 48] in one decomposition and [32, 40]")):
        similarity(d, narrow, tokens)


def test_it_shows_itself_and_the_picture_puts_the_matched_on_the_diagonal():
    alike = torch.tensor([[0.1, 0.2, 0.95], [0.92, 0.3, 0.0]])
    found = Recovery({SITE: alike}, {SITE: [0, 1]}, {SITE: [4, 5, 6]})
    assert "2 of 2 pieces" in repr(found) and "back" in found._repr_html_()
    heat = viz.recovery(found).data[0]
    assert torch.tensor(heat.z).allclose(torch.tensor([[0.95, 0.1, 0.2], [0.0, 0.92, 0.3]]))
    assert (list(heat.y), list(heat.x)) == (["0", "1"], ["6", "4", "5"])
