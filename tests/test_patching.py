import numpy as np
import pandas as pd
import pytest
import torch
from transformer_lens import patching

from spd_lens import SPDConfig, SPDError, ablation_effects, activation_patching, attribution, attribution_patching, cut_costs, decompose
from spd_lens.visits import rewrite_hooks
from tests import zoo
from tests.test_decomposition import scrambled
from tests.test_interventions import SOME, run

CLEAN, CORRUPTED = zoo.tokens(2, 6), zoo.tokens(2, 6, seed=1)
OUT = "blocks.1.mlp.W_out"


def metric(logits):
    """Not linear in the logits, and another one at each position."""
    return (logits.log_softmax(-1)[:, :, 3] * torch.arange(1, logits.shape[1] + 1)).mean()


def linear(logits):
    return (logits[:, -1, 3] - logits[:, -1, 4]).mean()


def by_place(table):
    return table.set_index([c for c in table.columns if c != "effect"])["effect"]


@pytest.mark.parametrize("name", SOME)
def test_an_exact_effect_is_the_metrics_difference_under_that_intervention(name):
    d = scrambled(name, C=6)
    clean, corrupted = (d.trace(t).inputs for t in (CLEAN, CORRUPTED))
    before = float(metric(run(d, CORRUPTED, [])))
    last = list(d.sites)[-1]
    chosen = {"blocks.0.attn.W_V": [1, 4], "blocks.1.attn.W_O": [0], "blocks.1.attn.W_Q": [5], last: 2}
    whole = by_place(activation_patching(d, CLEAN, CORRUPTED, metric, chosen, progress=False))
    cut = by_place(ablation_effects(d, CORRUPTED, metric, chosen, per_position=True, progress=False))
    assert len(whole) == 5 and len(cut) == 5 * 6
    for site, c in whole.index:
        V, U, W = d.components[site].V[:, [c]], d.components[site].U[[c]], d.sites[site].weight
        shift = ((clean[site] - corrupted[site]) @ V @ U).detach()
        heads = d.sites[site].heads if "result" in name and site.endswith("W_O") else 1
        hooks = rewrite_hooks(d.model, d.sites, {site: lambda p, s=shift, w=W, h=heads: p.biased(p.source @ w) + s / h})
        assert whole[site, c] == pytest.approx(float(metric(run(d, CORRUPTED, hooks))) - before, abs=1e-5)
        for p in (0, 5):
            under = float(metric(run(d, CORRUPTED, d.ablate({site: c}, positions=[p]))))
            assert cut[site, c, p] == pytest.approx(under - before, abs=1e-5)


@pytest.mark.parametrize("name", SOME)
def test_first_order_is_the_limit_of_small_interventions(name):
    d, step = scrambled(name, C=6), 0.02
    table = by_place(attribution(d, CORRUPTED, metric))
    assert list(table.abs()) == sorted(table.abs(), reverse=True) and len(table) == 6 * len(d.sites)
    for site, c in [*table.index[:12], *table.index[20:30]]:
        up, down = (float(metric(run(d, CORRUPTED, d.ablate({site: c}, strength=s)))) for s in (step, -step))
        assert table[site, c] == pytest.approx((up - down) / (2 * step), rel=5e-3, abs=2e-4), (site, c)
    assert table.abs().max() > 1e-2


@pytest.mark.parametrize("name", [n for n in ("HT-no-norm", "Bridge-native-no-norm") if n in zoo.ALL])
@pytest.mark.parametrize("per_position", [False, True])
def test_where_the_model_is_linear_first_order_is_exact_and_sums_to_the_whole_activations_patch(name, per_position):
    d = decompose(zoo.ALL[name](), CLEAN, SPDConfig(steps=0, subcomponents=48, sites="blocks.1.mlp.W_out"), progress=False)
    first = attribution_patching(d, CLEAN, CORRUPTED, linear, per_position)
    exact = by_place(activation_patching(d, CLEAN, CORRUPTED, linear, {OUT: range(48)}, per_position, progress=False))
    assert np.allclose(by_place(first).loc[exact.index], exact, atol=1e-5) and exact.abs().max() > 1e-3
    with torch.no_grad():
        _, cache = d.model.run_with_cache(CLEAN)
        whole = patching.get_act_patch_mlp_out(d.model, CORRUPTED, cache, linear)[1] - linear(run(d, CORRUPTED, []))
    if per_position:
        assert np.allclose(exact.groupby("position").sum(), whole, atol=1e-5)
    assert exact.sum() == pytest.approx(float(whole.sum()), abs=1e-5)


@pytest.mark.parametrize("name", [n for n in ("HT-no-norm", "Bridge-native-no-norm") if n in zoo.ALL])
def test_what_the_subcomponents_leave_is_the_rest_of_the_whole_patch(name):
    """A bad decomposition: its subcomponents and the delta together are the activation."""
    d = scrambled(name, C=6)
    exact = activation_patching(d, CLEAN, CORRUPTED, linear, {OUT: range(6)}, progress=False)["effect"].sum()
    x = [d.trace(t).inputs[OUT] for t in (CLEAN, CORRUPTED)]
    delta = ((x[0] - x[1]) @ d.components[OUT].delta(d.sites[OUT].weight)).detach()
    rest = linear(run(d, CORRUPTED, [("blocks.1.hook_mlp_out", lambda y, hook: y + delta)])) - linear(run(d, CORRUPTED, []))
    whole = linear(run(d, CORRUPTED, given(d, x[0]))) - linear(run(d, CORRUPTED, []))
    assert exact + float(rest) == pytest.approx(float(whole), abs=1e-5) and abs(float(rest)) > 1e-3


def given(d, x):
    W, bias = d.sites[OUT].weight, d.sites[OUT].bias
    return [("blocks.1.hook_mlp_out", lambda y, hook: x @ W + bias)]


def test_the_best_of_the_attribution_is_patched_exactly(untrained):
    table = attribution_patching(untrained, CLEAN, CORRUPTED, metric, per_position=True)
    best = table.head(30)
    exact = activation_patching(untrained, CLEAN, CORRUPTED, metric, best, per_position=True, progress=False)
    assert set(by_place(exact).index) == set(by_place(best).index)
    assert np.corrcoef(by_place(exact).loc[by_place(best).index], best["effect"])[0, 1] > 0.9
    whole = attribution_patching(untrained, CLEAN, CORRUPTED, metric)
    summed = table.groupby(["site", "subcomponent"])["effect"].sum()
    assert np.allclose(by_place(whole).loc[summed.index], summed, atol=1e-5)
    assert not any(p.grad is not None for p in untrained.model.parameters())


def test_everything_is_patched_where_nothing_is_chosen():
    d = scrambled("Bridge-native", C=2)
    assert len(activation_patching(d, CLEAN, CORRUPTED, lambda logits: float(linear(logits)), progress=False)) == 2 * len(d.sites)
    assert (activation_patching(d, CLEAN, CLEAN, linear, progress=False)["effect"].abs() < 1e-6).all()
    empty = activation_patching(d, CLEAN, CORRUPTED, linear, {}, progress=False)
    assert list(empty.columns) == ["site", "subcomponent", "effect"] and len(empty) == 0


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda d: attribution_patching(d, CLEAN, CORRUPTED[:, :5], metric), r"clean is \[2, 6\] and corrupted \[2, 5\]"),
        (lambda d: activation_patching(d, CLEAN[:1], CORRUPTED, metric), "one shape"),
        (lambda d: attribution(d, CLEAN, lambda logits: logits[:, -1, 3]), r"tensor of shape \[2\]"),
        (lambda d: attribution(d, CLEAN, lambda logits: linear(logits.detach())), "no gradient"),
        (lambda d: attribution(d, CLEAN, lambda logits: float(linear(logits))), "no gradient"),
        (lambda d: ablation_effects(d, CLEAN, lambda logits: None), "gave a NoneType"),
        (lambda d: ablation_effects(d, CLEAN, lambda logits: linear(logits) / 0), "finite"),
        (lambda d: ablation_effects(d, CLEAN, metric, {OUT: [99]}), "it has 0 … 39"),
        (lambda d: ablation_effects(d, CLEAN, metric, pd.DataFrame({"site": [OUT]})), "no column subcomponent"),
        (
            lambda d: ablation_effects(d, CLEAN, metric, pd.DataFrame({"site": [OUT], "subcomponent": [1], "position": [6]}), True),
            "position 6",
        ),
    ],
)
def test_bad_input(untrained, call, message):
    clean = run(untrained, CLEAN, [])
    with pytest.raises(SPDError, match=message):
        call(untrained)
    assert torch.equal(run(untrained, CLEAN, []), clean)


def test_what_a_cut_costs_is_the_kl_of_an_ablation(trained, tokens):
    costs = cut_costs(trained, tokens, {"blocks.0.mlp.W_in": [1, 3]})
    with torch.no_grad():
        clean = trained.model(tokens).log_softmax(-1)
        for (site, c), cost in costs.items():
            cut = trained.model.run_with_hooks(tokens, fwd_hooks=trained.ablate({site: [c]})).log_softmax(-1)
            assert cost == pytest.approx(float((clean.exp() * (clean - cut)).sum(-1).mean()), rel=1e-3, abs=1e-7)
    assert set(costs) == {("blocks.0.mlp.W_in", 1), ("blocks.0.mlp.W_in", 3)}
