import gc

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from spd_lens import SPDError, find_sites
from spd_lens.sites import disarm, rewrite_hooks
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


def test_nothing_is_left_after_an_exception(model, tokens):
    model(tokens)
    before = hook_state(model)
    sites = find_sites(model)

    def broken(passage):
        raise RuntimeError("mine")

    hooks = rewrite_hooks(model, sites, {"blocks.0.mlp.W_in": broken})
    with pytest.raises(RuntimeError, match="mine"):
        model.run_with_hooks(tokens, fwd_hooks=hooks)
    assert hook_state(model) == before

    def early(tensor, hook):
        raise RuntimeError("yours")

    entry = "blocks.0.ln1.hook_normalized"  # after the block's entry, before its attention
    hooks = rewrite_hooks(model, sites, {name: lambda passage: None for name in sites})
    with pytest.raises(RuntimeError, match="yours"):
        model.run_with_hooks(tokens, fwd_hooks=[*hooks, (entry, early)])
    disarm(hooks)
    assert hook_state(model) == before


@pytest.mark.parametrize("name", [n for n in ("HT-standard", "Bridge-native", "Bridge-gpt2", "Bridge-gpt2-compatible") if n in zoo.ALL])
class TestTheUsersHooksWin:
    """Capture last, override first."""

    def test_a_patch_upstream_is_seen_although_attached_after_ours(self, name):
        model, tokens = zoo.ALL[name](), zoo.tokens()
        sites = find_sites(model)

        def patch(z, hook):
            return torch.zeros_like(z)

        identity = lambda passage: passage.biased(passage.source @ sites["blocks.0.attn.W_O"].weight)  # noqa: E731
        ours = rewrite_hooks(model, sites, {"blocks.0.attn.W_O": identity})
        theirs = [("blocks.0.attn.hook_z", patch)]
        with torch.no_grad():
            alone = model.run_with_hooks(tokens, fwd_hooks=theirs)
            for order in (ours + theirs, theirs + ours):
                assert torch.allclose(model.run_with_hooks(tokens, fwd_hooks=order), alone, atol=1e-5)
            with model.hooks(fwd_hooks=ours), model.hooks(fwd_hooks=theirs):
                assert torch.allclose(model(tokens), alone, atol=1e-5)

    def test_a_hook_on_the_overridden_point_is_applied_after_ours(self, name):
        model, tokens = zoo.ALL[name](), zoo.tokens()
        sites = find_sites(model)
        zero = lambda passage: torch.zeros_like(passage.y)  # noqa: E731
        ours = rewrite_hooks(model, sites, {"blocks.0.attn.W_Q": zero, "blocks.0.attn.W_O": zero})
        seen = []

        def add(value, hook):
            seen.append(float(value.abs().max()))
            return value + 1.0

        theirs = [("blocks.0.attn.hook_q", add), ("blocks.0.hook_attn_out", add)]
        with torch.no_grad(), model.hooks(fwd_hooks=theirs):
            model.run_with_hooks(tokens, fwd_hooks=ours)
        assert seen and all(value == 0 for value in seen)  # they saw what we wrote

    def test_permanent_hooks_survive(self, name):
        model, tokens = zoo.ALL[name](), zoo.tokens()
        sites, calls = find_sites(model), []
        model.add_hook("blocks.0.attn.hook_q", lambda value, hook: calls.append(1), is_permanent=True)
        hooks = rewrite_hooks(model, sites, {n: lambda passage: None for n in sites})
        with torch.no_grad():
            model.run_with_hooks(tokens, fwd_hooks=hooks)
            model(tokens)
        assert len(calls) >= 2


@pytest.mark.parametrize("name", sorted(zoo.ALL))
def test_a_product_that_is_replaced_is_not_computed(name):
    model, tokens = zoo.ALL[name](), zoo.tokens()
    sites = find_sites(model)
    replacing, before = [n for n in sites if _can_rest(model, n)], shadows(model)
    blank = {n: (lambda passage, d=site.d_out: passage.source.new_zeros(*passage.source.shape[:-1], d)) for n, site in sites.items()}
    work = {}
    for skipped in ([], replacing):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            logits = model.run_with_hooks(tokens, fwd_hooks=rewrite_hooks(model, sites, blank, replacing=skipped))
        work[bool(skipped)] = counter.get_total_flops(), logits
    products = 2 * tokens.numel() * sum(sites[n].weight.numel() for n in replacing)
    assert torch.equal(work[True][1], work[False][1])
    assert work[False][0] - work[True][0] >= products > 0
    assert shadows(model) == before


def _can_rest(model, site: str) -> bool:
    """Where heads read or write alone, and in TransformerBridge's functional gated MLP, the original product is computed."""
    cfg = model.cfg
    if getattr(cfg, "use_split_qkv_input", False) or getattr(cfg, "use_attn_in", False):
        return site[-3:] not in ("W_Q", "W_K", "W_V")
    if site.endswith("W_O"):
        return not getattr(cfg, "use_attn_result", False)
    functional = (
        ".mlp." in site and getattr(model.blocks[0].mlp, "_use_processed_weights", False) and "gate" in model.blocks[0].mlp._modules
    )
    return not functional


def shadows(model):
    """What lies in an instance's `__dict__`, where it would hide a weight or a method."""
    return [
        (name, key) for name, m in model.named_modules() for key in m.__dict__ if key.lstrip("_")[:2] in ("W_", "b_") or key == "forward"
    ]


@pytest.mark.parametrize("point", ["blocks.0.attn.hook_q", "blocks.0.attn.hook_z", "blocks.0.mlp.hook_pre", "blocks.1.mlp.hook_post"])
def test_an_error_on_the_way_leaves_every_weight_in_its_place(model, tokens, point):
    sites = find_sites(model)
    clean, before = model(tokens), shadows(model)
    for error in (RuntimeError, KeyboardInterrupt):
        blank = {n: (lambda passage, d=site.d_out: passage.source.new_zeros(*passage.source.shape[:-1], d)) for n, site in sites.items()}
        hooks = rewrite_hooks(model, sites, blank, replacing=sites)
        with pytest.raises(error), model.hooks(fwd_hooks=[*hooks, (point, lambda tensor, hook, e=error: (_ for _ in ()).throw(e("mine")))]):
            model(tokens)
        del hooks
        gc.collect()
        assert torch.equal(model(tokens), clean) and shadows(model) == before
