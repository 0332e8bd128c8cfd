import numpy as np
import pytest
import torch

from spd_lens import SPDConfig, SPDError, census, decompose, verify
from spd_lens.decomposition import Decomposition
from tests import zoo


def loud():
    """A model whose outputs are far from uniform, so that a broken one shows."""
    model = (
        zoo.hooked(normalization_type=None, attn_only=True)
        if zoo.HookedTransformer is not None
        else zoo.native(normalization_type=None, attn_only=True)
    )
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:  # matrices 0.2, token embeddings 0.7
                parameter.mul_((0.7 if zoo.VOCABULARY in parameter.shape else 0.2) / parameter.std())
    return model


def decided(model, importance: float, copies: int, strength: float) -> Decomposition:
    """Every importance the same number; W in `copies` equal shares, times `strength`."""
    d = decompose(model, zoo.tokens(4), SPDConfig(steps=0, subcomponents=32, importance="vector", gate_width=1), progress=False)
    with torch.no_grad():
        for name, c in d.components.items():
            c.V.data, c.U.data = c.V.repeat(1, copies) / copies * strength, c.U.repeat(copies, 1)
            mlps = d.gates[name].mlps
            mlps.w1.data, mlps.b1.data = mlps.w1.repeat(1, copies, 1), mlps.b1.repeat(copies, 1)
            mlps.w2.data, mlps.b2.data = torch.zeros_like(mlps.w2).repeat(copies, 1), torch.full((32 * copies,), importance)
    return d


def test_verify_exposes_a_count_that_leans_on_half_strength():
    """No subcomponent counts as active, stochastic masks reconstruct the model, and hard masks show that it is a cheat."""
    model, tokens = loud(), zoo.tokens(40)
    cheat = verify(decided(model, -1.0, copies=256, strength=2.0), tokens)
    honest = verify(decided(model, 2.0, copies=1, strength=1.0), tokens)
    assert sum(cheat.l0.values()) == 0 and cheat.kl_stochastic < 0.05  # a perfect count and a fine stochastic KL
    assert min(cheat.kl_hard, cheat.kl_alive_only, cheat.kl_importance) > 20 * cheat.kl_stochastic
    assert cheat.kl_adversarial > 20 * cheat.kl_stochastic
    assert cheat.leans_on_inactive and "not to be trusted" in repr(cheat) and "not to be trusted" in cheat._repr_html_()
    assert not honest.leans_on_inactive and "not to be trusted" not in repr(honest)
    for kl in ("kl_plain", "kl_stochastic", "kl_layerwise", "kl_importance", "kl_hard", "kl_alive_only", "kl_adversarial"):
        assert abs(getattr(honest, kl)) < 1e-4, kl


def test_verify_by_hand(untrained, tokens):
    """Each figure against its definition, on importances that differ by position."""
    d = untrained
    with torch.no_grad():
        for gate in d.gates.values():  # some on, some off
            gate.mlps.b2.add_(torch.linspace(-3, 1, 40))
    try:
        found = verify(d, tokens, batch_size=2)
        g = d.importances(tokens)
        with torch.no_grad():
            p = d.model(tokens).log_softmax(-1)

            def kl(masks):
                return float((p.exp() * (p - d.run(tokens, masks).log_softmax(-1))).sum(-1).mean())

            alive = {n: (v > 0.5).flatten(0, 1).any(0).float() for n, v in g.items()}
            assert found.kl_hard == pytest.approx(kl({n: (v > 0.5).float() for n, v in g.items()}), rel=1e-3, abs=1e-6)
            assert found.kl_alive_only == pytest.approx(kl(alive), rel=1e-3, abs=1e-6)
            assert found.kl_importance == pytest.approx(kl(g), rel=1e-3, abs=1e-6)
            assert found.kl_plain == pytest.approx(kl({n: torch.ones(()) for n in g}), rel=1e-3, abs=1e-6)
            zeros = kl({n: (v > 0.5).float() for n, v in g.items()})
            ones = kl({n: torch.ones(()) for n in g})
        assert found.kl_adversarial > max(0.3 * zeros, ones)
        assert found.l0 == pytest.approx({n: float((v > 0.5).sum(-1).float().mean()) for n, v in g.items()})
        assert found.distinct == {n: int(on.sum()) for n, on in alive.items()} and set(found.width.values()) == {32}
        assert f"{sum(found.l0.values()):.3g} active per position of {sum(found.distinct.values())} distinct" in repr(found)
        squares = torch.cat([(s.weight - d.components[n].V @ d.components[n].U).flatten() ** 2 for n, s in d.sites.items()])
        assert found.faithfulness == pytest.approx(float(squares.mean()), rel=1e-4)
        assert set(found.as_dict()) == {"faithfulness", "kl_plain", "kl_stochastic", "kl_layerwise", "kl_importance", "kl_hard",
                                        "kl_alive_only", "kl_adversarial", "l0", "distinct", "width"}  # fmt: skip
    finally:
        with torch.no_grad():
            for gate in d.gates.values():
                gate.mlps.b2.sub_(torch.linspace(-3, 1, 40))


def test_verify_gives_the_same_twice_and_leaves_the_model_alone(trained, tokens):
    wanted = [p.requires_grad for p in trained.model.parameters()]
    first, second = verify(trained, tokens), verify(trained, tokens)
    assert first.as_dict() == second.as_dict()
    assert [p.requires_grad for p in trained.model.parameters()] == wanted
    assert all(p.grad is None for p in trained.model.parameters())


def test_census_counts_by_position(trained, tokens):
    g = trained.importances(tokens)
    first = torch.tensor([1, 4, 2])
    counted = census(trained, tokens, {"first": first}, threshold=0.9)
    site = "blocks.1.mlp.W_out"
    by_hand = sum(int((g[site][b, first[b]] > 0.9).sum()) for b in range(3)) / 3
    assert counted.mean_active[site]["first"] == pytest.approx(by_hand)
    assert counted.distinct[site] == int((g[site] > 0.9).flatten(0, 1).any(0).sum())
    table = counted.table()
    assert list(table.columns) == ["first", "all", "distinct", "rank ≤", "allocated"] and list(table.index) == list(trained.sites)
    assert "verify" in repr(counted)


@pytest.mark.parametrize(
    "index", [-1, [10, -1, 10], np.array([10, 10, -1]), torch.tensor([-1, 10, 10]), torch.tensor(10), np.int64(-1), (10, 10, 10)]
)
def test_positions_of_every_kind(trained, tokens, index):
    expected = census(trained, tokens, {"last": torch.tensor([10, 10, 10])}).mean_active
    assert census(trained, tokens, {"last": index}).mean_active == expected


@pytest.mark.parametrize("index", [torch.tensor([0, 1]), torch.tensor([0, 1, 11]), torch.tensor([0, 1, -12]), torch.tensor([0.0, 1.0, 2.0]),
                                   torch.tensor([True, False, True]), torch.zeros(3, 11, dtype=torch.long), 11, "last", None, slice(0, 1)])  # fmt: skip
def test_census_refuses_positions_outside(trained, tokens, index):
    with pytest.raises(SPDError, match=r"give one position 0 … 10 \(negative: from the end\) .* one for each of the 3 sequences"):
        census(trained, tokens, {"here": index})


def test_positions_that_are_a_mask_are_refused_where_they_would_fit_by_chance(trained):
    """`[True, False, …]` of as many sequences as there are positions would have been read as 1, 0, …"""
    with pytest.raises(SPDError, match=r"positions\['here'\]"):
        census(trained, zoo.tokens(3, 3), {"here": torch.tensor([True, False, True])})


def test_what_is_no_mapping_and_no_size_is_refused(trained, tokens):
    with pytest.raises(SPDError, match="positions were given as .*; give a mapping"):
        census(trained, tokens, [1, 2, 3])
    for size in (0, -1, 2.0):
        with pytest.raises(SPDError, match="batch_size was given as .*at least 1"):
            verify(trained, tokens, batch_size=size)


@pytest.mark.parametrize("threshold", [50, 1.0, -0.1, float("nan")])
def test_a_threshold_that_nothing_or_everything_passes_is_refused(trained, tokens, threshold):
    with pytest.raises(SPDError, match="threshold was given as .*at least 0 and below 1"):
        census(trained, tokens, threshold=threshold)
