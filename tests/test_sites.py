import pytest
import torch
from torch import nn

from spd_lens import SPDError, find_sites
from spd_lens.visits import rewrite_hooks
from tests import zoo


def exact_factors(sites):
    factors = {}
    for name, site in sites.items():
        left, singular, right = torch.linalg.svd(site.weight.double(), full_matrices=False)
        factors[name] = ((left * singular).float().requires_grad_(), right.float().requires_grad_())
    return factors


def hook_state(model):
    """Every hook on the model, torch's own included."""
    return {name: (len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks)) for name, m in model.named_modules()}


@pytest.mark.parametrize("name", zoo.ALL)
def test_replacing_every_site_by_an_exact_factorisation_changes_nothing(name):
    model, tokens = zoo.ALL[name](), zoo.tokens()
    weights = {k: v.clone() for k, v in model.state_dict().items()}
    with torch.no_grad():
        clean = model(tokens)
    before = hook_state(model)  # after a first pass: TransformerBridge attaches hooks of its own in it
    sites = find_sites(model)
    factors = exact_factors(sites)

    def rewrite(site):
        return lambda passage: passage.biased(passage.source @ factors[site][0] @ factors[site][1])

    logits = model.run_with_hooks(tokens, fwd_hooks=rewrite_hooks(model, sites, {n: rewrite(n) for n in sites}))
    print(f"{name}: {float((logits - clean).abs().max()):.1e}")
    assert (logits - clean).abs().max() <= 1e-5
    logits.square().mean().backward()
    for site, (V, U) in factors.items():
        assert V.grad is not None and V.grad.abs().sum() > 0, site
        assert U.grad is not None and U.grad.abs().sum() > 0, site
    assert hook_state(model) == before
    with torch.no_grad():
        assert torch.equal(model(tokens), clean)
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in weights.items())


@pytest.mark.parametrize("name", zoo.ALL)
def test_every_site_reaches_the_output_alone(name):
    """Its own hook, not a neighbour's: an emptied matrix changes the logits, and its input gives its output."""
    model, tokens = zoo.ALL[name](), zoo.tokens()
    sites = find_sites(model)
    with torch.no_grad():
        clean = model(tokens)
        for site in sites:
            seen = {}

            def empty(passage, seen=seen, weight=sites[site].weight):
                seen["error"] = (passage.biased(passage.source @ weight) - passage.y).abs()
                return passage.biased(torch.zeros_like(passage.y))

            emptied = model.run_with_hooks(tokens, fwd_hooks=rewrite_hooks(model, sites, {site: empty}))
            assert (emptied - clean).abs().max() > 1e-4, site
            if not ("split" in name or "attn_in" in name or "attn-in" in name):  # there y holds head h's output for every input h
                assert seen["error"].max() < 1e-5, site


def test_names_shapes_and_order(model):
    sites = find_sites(model, ("blocks.1.mlp.W_*", "blocks.0.attn.W_[QO]"))
    assert list(sites) == ["blocks.0.attn.W_Q", "blocks.0.attn.W_O", "blocks.1.mlp.W_in", "blocks.1.mlp.W_out"]
    assert (sites["blocks.0.attn.W_O"].d_in, sites["blocks.0.attn.W_O"].d_out) == (32, 32)
    assert (sites["blocks.1.mlp.W_in"].d_in, sites["blocks.1.mlp.W_in"].d_out) == (32, 48)
    assert sites["blocks.1.mlp.W_in"].bias.shape == (48,)
    assert sites["blocks.0.attn.W_Q"].short == "Q0"


@pytest.mark.parametrize("name", [n for n in zoo.ALL if "grouped" in n or n == "Bridge-llama"])
def test_grouped_keys_and_values_at_their_true_number_of_heads(name):
    sites = find_sites(zoo.ALL[name](), "blocks.0.attn.W_[QKV]")
    assert [(s.heads, s.d_out) for s in sites.values()] == [(4, 32), (2, 16), (2, 16)]


@pytest.mark.parametrize(
    "pattern, message",
    [
        ("blocks.0.attn.W_X", "nearest: blocks.0.attn.W_"),
        ("blocks.7.attn.W_Q", "no site matches"),
        ("blocks.*.attn.b_Q", "names a bias"),
        ("attn.W_Q", "nearest: .*blocks.0.attn.W_Q"),
        ((), "no pattern"),
    ],
)
def test_patterns_that_match_nothing_say_what_would(model, pattern, message):
    with pytest.raises(SPDError, match=message):
        find_sites(model, pattern)


ATTENTION_ONLY = [build for name, build in zoo.ALL.items() if name in ("HT-shortformer-attn-only", "Bridge-native-attn-only")]


@pytest.mark.parametrize("build", ATTENTION_ONLY)
def test_one_pattern_of_several_that_matches_nothing_is_a_warning(build):
    model, both = build(), ("blocks.*.attn.W_[QKVO]", "blocks.*.mlp.W_*")
    with pytest.warns(UserWarning, match=r"^no site matches 'blocks.\*.mlp.W_\*'; nearest: .* The other patterns match 8 sites\."):
        sites = find_sites(model, both)
    assert len(sites) == 8
    with pytest.raises(SPDError, match=r"no site matches 'blocks.\*.mlp.W_\*'"):
        find_sites(model, both[1:])


def test_a_bias_among_matrices_is_a_warning(model):
    with pytest.warns(UserWarning, match="'blocks.0.attn.b_Q' names a bias"):
        assert list(find_sites(model, ["blocks.0.attn.W_Q", "blocks.0.attn.b_Q"])) == ["blocks.0.attn.W_Q"]


def test_other_models_are_refused():
    with pytest.raises(SPDError, match="TransformerBridge"):
        find_sites(nn.Linear(2, 2), "*")


@pytest.mark.skipif(zoo.HookedTransformer is None, reason="transformer-lens 4.x has no HookedTransformer")
def test_what_cannot_be_served_names_the_site_and_the_reason():
    doubly = zoo.hooked(normalization_type="RMS", use_normalization_before_and_after=True)
    with pytest.raises(SPDError, match=r"blocks.0.attn.W_O cannot be decomposed: .*use_normalization_before_and_after"):
        find_sites(doubly)
    assert len(find_sites(doubly, "*.W_[QKV]")) == 6
    mixture = zoo.hooked(normalization_type="LN", num_experts=2, experts_per_token=1)
    with pytest.raises(SPDError, match="blocks.0.mlp.W_in cannot be decomposed: its MLP is a MoE"):
        find_sites(mixture)
