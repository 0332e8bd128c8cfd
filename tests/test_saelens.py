"""An SAE of SAELens on a hook point and a decomposition at once. SAELens puts the SAE in the hook point's place."""

import pytest
import torch

from spd_lens import SPDError
from tests import zoo
from tests.test_attachment import hook_state, scrambled, set_to

sae_lens = pytest.importorskip("sae_lens", reason="sae_lens is not installed (it needs transformer-lens 3)")
SITES = ["blocks.0.attn.W_Q", "blocks.0.attn.W_O", "blocks.0.mlp.W_in", "blocks.0.mlp.W_out", "blocks.1.attn.W_K"]


def sae_model(kind):
    if kind == "HookedSAETransformer":
        config = zoo.HookedTransformerConfig(**{**zoo.SHAPE, "seed": 0, "device": "cpu"}, normalization_type="LN")
        torch.manual_seed(0)
        return zoo.randomised(sae_lens.HookedSAETransformer(config))
    from sae_lens.analysis.sae_transformer_bridge import SAETransformerBridge

    model = zoo.wrapped("gpt2")
    model.__class__ = SAETransformerBridge  # as its own boot_transformers does
    model._acts_to_saes, model._transcoder_output_hooks = {}, {}
    return model


def sae_at(hook, d):
    from sae_lens import StandardSAE, StandardSAEConfig
    from sae_lens.saes.sae import SAEMetadata

    shape = dict(reshape_activations="hook_z") if hook.endswith("hook_z") else {}
    width = d.sites["blocks.0.mlp.W_out"].d_in if "mlp.hook_p" in hook else 32
    sae = StandardSAE(StandardSAEConfig(d_in=width, d_sae=40, device="cpu", dtype="float32", metadata=SAEMetadata(hook_name=hook), **shape))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return sae


@pytest.fixture(params=["HookedSAETransformer", "SAETransformerBridge"])
def d(request):
    return scrambled(sae_model(request.param))


POINTS = ["blocks.0.attn.hook_z", "blocks.0.mlp.hook_post", "blocks.0.mlp.hook_pre", "blocks.0.hook_attn_out", "blocks.0.hook_mlp_out",
          "blocks.0.hook_resid_pre", "blocks.1.hook_resid_pre", "blocks.0.hook_resid_mid"]  # fmt: skip


@pytest.mark.parametrize("point", POINTS)
@pytest.mark.parametrize("error_term", [False, True])
def test_attached_inside_the_sae(d, point, error_term, tokens):
    """The pass equals that of the model with the subcomponents taken out of its weights, and the SAE where it was."""
    sae = sae_at(point, d)
    with torch.no_grad():
        plain = d.model(tokens)
        alone = d.model.run_with_saes(tokens, saes=[sae], use_error_term=error_term)
        assert error_term or (alone - plain).abs().max() > 1e-2
        with d.model.saes([sae], use_error_term=error_term):
            state = hook_state(d.model)
            with d.attached() as model:
                assert torch.equal(model(tokens), alone)
                cache = d.run_with_cache(tokens)[1]
                hooks = [(f"{site}.hook_spd_ci", set_to([3, 7])) for site in SITES]
                patched = model.run_with_hooks(tokens, fwd_hooks=hooks)
                assert torch.equal(d.observe(tokens).inner[SITES[1]], cache[f"{SITES[1]}.hook_spd_acts"])
            assert hook_state(d.model) == state and torch.equal(d.model(tokens), alone)
            seen = d.observe(tokens).inner
        originals = {site: weight.clone() for site, weight in weights(d).items()}
        try:
            for site, weight in weights(d).items():
                change = d.components[site].V[:, [3, 7]] @ d.components[site].U[[3, 7]]
                weight -= unflattened(change, weight, site)
            expected = d.model.run_with_saes(tokens, saes=[sae], use_error_term=error_term)
        finally:
            for site, weight in weights(d).items():
                weight.copy_(originals[site])
    assert torch.allclose(patched, expected, atol=1e-4, rtol=1e-4)
    assert any("hook_sae_acts_post" in key for key in cache.cache_dict)
    for site in d.sites:
        assert torch.allclose(seen[site], cache[f"{site}.hook_spd_acts"], atol=1e-5)
    assert torch.equal(d.model(tokens), plain)


def weights(d):
    """The weights themselves, of which a change changes the model."""
    found = {}
    for site in SITES:
        _, layer, part, kind = site.split(".")
        found[site] = getattr(getattr(d.model.blocks[int(layer)], part), kind)
    return found


def unflattened(change, weight, site):
    heads = weight.shape[0]
    if weight.ndim == 2:
        return change
    return change.unflatten(0, (heads, -1)) if site.endswith("W_O") else change.unflatten(1, (heads, -1)).movedim(1, 0)


@pytest.mark.parametrize("point", ["blocks.0.attn.hook_q", "blocks.1.hook_resid_pre"])
def test_an_sae_inside_the_attachment_is_an_error_in_the_pass(d, point, tokens):
    clean = d.model(tokens)
    with d.attached() as model, pytest.raises(SPDError, match="was exchanged while a decomposition was attached"):
        model.run_with_saes(tokens, saes=[sae_at(point, d)])
    assert torch.equal(d.model(tokens), clean)
    with d.attached() as model:
        assert torch.equal(model(tokens), clean)


def test_hooks_for_a_point_that_is_gone(tokens):
    d = scrambled(sae_model("HookedSAETransformer"))
    with d.model.saes([sae_at("blocks.0.hook_mlp_out", d)]):
        with pytest.raises(SPDError, match=r"blocks.0.mlp.W_out: the model has no hook point blocks.0.hook_mlp_out any more"):
            d.ablate({"blocks.0.mlp.W_out": [3]})
        d.ablate({"blocks.0.mlp.W_in": [3]})


def test_a_patch_of_saelens_own_mlp_input_is_seen(tokens):
    d = scrambled(sae_model("HookedSAETransformer"))
    with d.attached() as model, model.hooks(fwd_hooks=[("blocks.0.mlp.hook_in", lambda x, hook: torch.zeros_like(x))]):
        assert d.observe(tokens).inner["blocks.0.mlp.W_in"].abs().max() == 0
