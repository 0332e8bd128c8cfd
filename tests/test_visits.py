import gc

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from spd_lens import find_sites
from spd_lens.visits import disarm, rewrite_hooks
from tests import zoo
from tests.test_sites import hook_state


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


@pytest.mark.parametrize("name", sorted(zoo.ALL))
def test_two_replacements_of_one_matrix_in_one_pass_give_the_model_back(name):
    model, tokens = zoo.ALL[name](), zoo.tokens()
    sites = find_sites(model)
    with torch.no_grad():
        clean = model(tokens, return_type="logits")
        for site in sites:
            nothing = [rewrite_hooks(model, sites, {site: lambda p: p.biased(0 * p.source @ sites[site].weight)}, [site]) for _ in "ab"]  # noqa: B023
            model.run_with_hooks(tokens, fwd_hooks=nothing[0] + nothing[1])
            assert torch.equal(model(tokens, return_type="logits"), clean), site


def test_an_error_between_two_watches_leaves_a_model_that_runs(model, tokens):
    sites = find_sites(model)
    chosen, on = ("blocks.1.attn.W_Q", "blocks.1.attn.W_O"), [True]

    def fail(x, hook):
        if on[0]:
            raise RuntimeError("on the way")

    with torch.no_grad():
        clean = model(tokens, return_type="logits")
        hooks = [rewrite_hooks(model, sites, {site: lambda p: p.y}) for site in chosen]
        with model.hooks(fwd_hooks=hooks[0] + hooks[1] + [("blocks.1.ln1.hook_normalized", fail)]):
            with pytest.raises(RuntimeError, match="on the way"):
                model(tokens)
            on[0] = False
            model(tokens)
        assert torch.equal(model(tokens, return_type="logits"), clean)
