"""`with decomposition.attached():` the model's own methods know the subcomponents."""

import pytest
import torch

from spd_lens import SPDConfig, decompose
from spd_lens.sites import hook_registries
from tests import zoo
from tests.test_sites import hook_state

BOTH = [n for n in ("HT-standard", "Bridge-gpt2", "Bridge-gpt2-compatible") if n in zoo.ALL]
SOME = [n for n in (*BOTH, "HT-split", "HT-attn-result", "HT-grouped", "Bridge-native", "Bridge-llama-processed",
                    "Bridge-gpt2-use_split_qkv_input", "Bridge-neox-use_attn_result") if n in zoo.ALL]  # fmt: skip
QUERY, OUT, MLP = "blocks.0.attn.W_Q", "blocks.1.attn.W_O", "blocks.0.mlp.W_in"
C = 24


def scrambled(name, sites="*"):
    """A decomposition far from the matrices and with importances of 0, of 1 and between, so that mistakes show."""
    model = zoo.ALL[name]() if isinstance(name, str) else name
    d = decompose(model, zoo.tokens(4), SPDConfig(steps=0, subcomponents=C, init="random", sites=sites, gate_width=4), progress=False)
    generator = torch.Generator().manual_seed(0)
    for gate in d.gates.values():
        with torch.no_grad():
            gate.mlps.b2.copy_(1.5 * torch.randn(C, generator=generator))
    return d


def set_to(index, value=0.0, where=None):
    """A hook that sets some subcomponents, by a copy or in place."""

    def hook(tensor, hook):
        tensor = tensor if where == "in place" else tensor.clone()
        tensor[..., index] = value
        return None if where == "in place" else tensor

    return hook


@pytest.mark.parametrize("name", sorted(zoo.ALL))
def test_the_models_own_cache_holds_both_names_and_nothing_else_changes(name):
    d, tokens = scrambled(name), zoo.tokens()
    with torch.no_grad():
        clean, before = d.model.run_with_cache(tokens)
        state, seen = hook_state(d.model), d.observe(tokens)
        with d.attached() as model:
            assert model is d.model
            assert torch.equal(model(tokens), clean)
            logits, cache = model.run_with_cache(tokens)
    assert torch.equal(logits, clean)
    for site in d.sites:
        assert torch.allclose(cache[f"{site}.hook_spd_acts"], seen.inner[site], atol=1e-6)
        assert torch.allclose(cache[f"{site}.hook_spd_ci"], seen.importances[site], atol=1e-6)
        assert 0 < (seen.importances[site] == 0).float().mean() < 1
    ours = {key for key in cache.cache_dict if "hook_spd" in key}
    assert len(ours) == 2 * len(d.sites) and set(cache.cache_dict) - ours == set(before.cache_dict)
    for key, value in before.cache_dict.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, cache[key]), key
    assert hook_state(d.model) == state
    assert not any("hook_spd" in key for registry in hook_registries(d.model) for key in registry)
    assert torch.equal(d.model(tokens), clean)


@pytest.mark.parametrize("name", sorted(zoo.ALL))
def test_a_zero_importance_is_an_ablation(name):
    d, tokens = scrambled(name), zoo.tokens()
    chosen = {site: [3, 7, 12] for site in d.sites}
    with torch.no_grad():
        expected = d.model.run_with_hooks(tokens, fwd_hooks=d.ablate(chosen))
        assert (expected - d.model(tokens)).abs().max() > 1e-2
    for suffix in ("hook_spd_ci", "hook_spd_acts"):
        for where in ("copy", "in place"):
            for gradients in (True, False):
                hooks = [(f"{site}.{suffix}", set_to(index, where=where)) for site, index in chosen.items()]
                with torch.set_grad_enabled(gradients), d.attached() as model:
                    logits = model.run_with_hooks(tokens, fwd_hooks=hooks)
                    with model.hooks(fwd_hooks=hooks):
                        assert torch.equal(model(tokens), logits)
                assert torch.allclose(logits, expected, atol=1e-5, rtol=1e-5), (suffix, where, gradients)


@pytest.mark.parametrize("name", SOME)
def test_under_masks_the_model_is_run(name):
    d, tokens = scrambled(name), zoo.tokens()
    masks = {site: torch.rand(*tokens.shape, C, generator=torch.Generator().manual_seed(1)) for site in d.sites}
    patched = {site: mask.clone() for site, mask in masks.items()}
    patched[QUERY][..., 3], patched[OUT][..., 5] = 0.0, 2.0
    hooks = [(f"{QUERY}.hook_spd_ci", set_to(3)), (f"{OUT}.hook_spd_ci", set_to(5, 2.0))]
    with torch.no_grad():
        for delta in (0.0, 1.0):
            with d.attached(masks, delta) as model:
                assert torch.equal(model(tokens), d.run(tokens, masks, delta))
                assert torch.allclose(model.run_with_cache(tokens)[0], d.run(tokens, masks, delta), atol=1e-5)
                assert torch.allclose(model.run_with_hooks(tokens, fwd_hooks=hooks), d.run(tokens, patched, delta), atol=1e-5)
            assert torch.equal(d.run_with_cache(tokens, masks, delta, names_filter=QUERY)[0], d.run(tokens, masks, delta))
        everything = {site: torch.ones(()) for site in d.sites}
        with d.attached(delta=0.25) as model:
            assert torch.equal(model(tokens), d.run(tokens, everything, 0.25))


@pytest.mark.parametrize("name", SOME)
def test_a_gradient_reaches_what_a_hook_saw(name):
    """It is the gradient by the mask, and by the inner activation, of a model that the hooks change."""
    d, tokens = scrambled(name), zoo.tokens()
    for parameter in d.model.parameters():
        parameter.requires_grad_(False)
    seen = {}

    def keep(tensor, hook):
        tensor.retain_grad()
        seen[hook.name] = tensor

    def loss(logits):
        return logits[:, -1].log_softmax(-1)[:, 0].sum()

    with d.attached() as model:
        loss(model.run_with_hooks(tokens, fwd_hooks=[(lambda n: "hook_spd" in n, keep)])).backward()
    masks = {site: torch.ones(*tokens.shape, C, requires_grad=True) for site in d.sites}
    loss(d.run(tokens, masks, delta=1.0)).backward()
    inner = d.observe(tokens).inner
    for site in d.sites:
        by_mask = seen[f"{site}.hook_spd_ci"].grad
        assert torch.allclose(by_mask, masks[site].grad, atol=1e-4 * float(masks[site].grad.abs().max())), site
        by_inner = seen[f"{site}.hook_spd_acts"].grad
        if "W_O" not in site and "split" not in name:  # where heads go apart, an inner activation is a sum or a mean
            assert torch.allclose(by_inner * inner[site], by_mask, atol=1e-4 * float(by_mask.abs().max())), site
        assert by_inner.abs().max() > 0


def test_one_step_along_the_gradient_is_the_effect(tokens):
    d = scrambled(BOTH[0])
    seen = {}

    def keep(tensor, hook):
        tensor.retain_grad()
        seen["g"] = tensor

    def lower(tensor, hook):
        tensor[1, 4, 6] = 0.999
        return tensor

    point = f"{MLP}.hook_spd_ci"
    with d.attached() as model:
        metric = model.run_with_hooks(tokens, fwd_hooks=[(point, keep)])[..., 0].sum()
        metric.backward()
        with torch.no_grad():
            changed = model.run_with_hooks(tokens, fwd_hooks=[(point, lower)])[..., 0].sum()
    assert abs((changed - metric) / -0.001 / seen["g"].grad[1, 4, 6] - 1) < 0.05
