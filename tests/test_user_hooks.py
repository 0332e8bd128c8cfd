"""The user's hooks and TransformerLens' own recipes, with a decomposition attached: nothing of theirs is lost, nothing comes out differently."""

import pytest
import torch
from transformer_lens import patching

from tests import zoo
from tests.test_attachment import BOTH, MLP, OUT, QUERY, scrambled, set_to

PATCHES = [name for name in vars(patching) if name.startswith("get_act_patch_")]
PATCHES = [name for name in PATCHES if not name.endswith("every") and "direct_path" not in name]  # made of the others; with more arguments


def on(d):
    """Everything on and delta 1, and every site really computed from its subcomponents."""
    return d.attached({site: torch.ones(()) for site in d.sites}, 1.0)


def same(new, old):
    return torch.allclose(new, old, atol=1e-4, rtol=1e-4)


@pytest.fixture(params=BOTH, scope="module")
def d(request):
    return scrambled(request.param)


class TestTraps:
    def test_a_patch_of_z_is_seen_by_the_subcomponents_of_the_output_matrix(self, d, tokens):
        z = torch.randn(*tokens.shape, 4, 8, generator=torch.Generator().manual_seed(5))
        patch = [("blocks.1.attn.hook_z", lambda value, hook: z)]
        with torch.no_grad():
            alone = d.model.run_with_hooks(tokens, fwd_hooks=patch)
            for before in (True, False):  # attached before the user's hook and after it
                with d.model.hooks(fwd_hooks=patch if before else []), on(d) as model, model.hooks(fwd_hooks=[] if before else patch):
                    logits, cache = model.run_with_cache(tokens)
                assert same(logits, alone)
                assert torch.allclose(cache[f"{OUT}.hook_spd_acts"], z.flatten(2) @ d.components[OUT].V, atol=1e-4)

    @pytest.mark.parametrize("permanent", [False, True])
    @pytest.mark.parametrize("point, site", [("blocks.0.hook_attn_out", "blocks.0.attn.W_O"), ("blocks.0.hook_mlp_out", "blocks.0.mlp.W_out"),
                                             ("blocks.0.attn.hook_q", QUERY), ("blocks.0.mlp.hook_pre", MLP)])  # fmt: skip
    def test_a_hook_that_was_there_before_is_applied_after_ours_and_stays(self, d, tokens, point, site, permanent):
        seen = []

        def keep_and_double(value, hook):
            seen.append(value.clone())
            return 2 * value

        with torch.no_grad():
            with d.attached({site: torch.zeros(())}, 0.0):
                written = d.model.run_with_cache(tokens)[1][point]
            d.model.hook_dict[point].add_hook(keep_and_double, is_permanent=permanent)
            with d.attached({site: torch.zeros(())}, 0.0) as model:
                inside = model(tokens)
            assert torch.equal(seen[-1], written)
            doubled = d.model(tokens)
            assert len(seen) == 2 and not torch.allclose(seen[-1], written) and not torch.allclose(inside, doubled)
            d.model.reset_hooks()
            d.model(tokens)
            assert len(seen) == (3 if permanent else 2)
            d.model.reset_hooks(including_permanent=True)

    def test_a_hook_attached_inside_stays_when_ours_leave(self, d, tokens):
        calls = []
        with d.attached() as model:
            for permanent in (False, True):
                model.hook_dict["blocks.0.hook_attn_out"].add_hook(lambda value, hook: calls.append(hook.name), is_permanent=permanent)
            model(tokens)
        d.model(tokens)
        assert len(calls) == 4

    def test_reset_hooks_inside_takes_theirs_and_leaves_ours(self, d, tokens):
        with torch.no_grad(), d.attached({QUERY: torch.zeros(())}, 0.0) as model:
            expected = d.run(tokens, {QUERY: torch.zeros(())})
            model.hook_dict[f"{MLP}.hook_spd_ci"].add_hook(set_to(list(range(9))))
            assert not torch.allclose(model(tokens), expected)
            model.reset_hooks()
            assert torch.equal(model(tokens), expected)

    def test_theirs_on_our_points_by_name_and_by_filter(self, d, tokens):
        chosen = {site: [2] for site in d.sites if site.endswith("W_in")}
        with torch.no_grad():
            expected = d.model.run_with_hooks(tokens, fwd_hooks=d.ablate(chosen))
            with d.attached() as model:
                model.add_hook(lambda name: name.endswith("W_in.hook_spd_ci"), set_to(2))
                assert torch.allclose(model(tokens), expected, atol=1e-5)
                model.reset_hooks()
                hooks = [(f"{site}.hook_spd_ci", set_to(2)) for site in chosen]
                assert torch.allclose(model.run_with_hooks(tokens, fwd_hooks=hooks), expected, atol=1e-5)

    def test_ablation_hooks_that_were_there_before_act_on_what_the_masks_leave(self, d, tokens):
        with torch.no_grad():
            hooks = d.ablate({QUERY: [1]})
            expected = d.model.run_with_hooks(tokens, fwd_hooks=d.hooks({QUERY: torch.ones(())}) + hooks)
            with d.model.hooks(fwd_hooks=hooks), d.attached({QUERY: torch.ones(())}, 0.0) as model:
                assert torch.allclose(model(tokens), expected, atol=1e-5)

    def test_ablation_hooks_and_a_patch_of_an_importance_add_up(self, d, tokens):
        with torch.no_grad():
            expected = d.model.run_with_hooks(tokens, fwd_hooks=d.ablate({QUERY: [1, 2], OUT: [3, 5]}))
            with d.attached() as model:
                hooks = [*d.ablate({QUERY: [1], OUT: [5]}), (f"{QUERY}.hook_spd_ci", set_to(2)), (f"{OUT}.hook_spd_ci", set_to(3))]
                assert torch.allclose(model.run_with_hooks(tokens, fwd_hooks=hooks), expected, atol=1e-5)

    def test_backward_hooks_and_incl_bwd(self, d, tokens):
        def gradients(names):
            return d.model.run_with_cache(tokens, names_filter=names, incl_bwd=True, return_type="loss")[1]

        point = "blocks.0.mlp.hook_post"
        alone = gradients(point)[f"{point}_grad"]
        with d.attached():
            inside = gradients([point, f"{QUERY}.hook_spd_ci", f"{OUT}.hook_spd_acts"])
        assert same(inside[f"{point}_grad"], alone)
        assert inside[f"{QUERY}.hook_spd_ci_grad"].abs().max() > 0 and inside[f"{OUT}.hook_spd_acts_grad"].abs().max() > 0


class TestRecipes:
    """The same results as without a decomposition."""

    clean, corrupted = zoo.tokens(2, 2, seed=1), zoo.tokens(2, 2, seed=2)  # short: a pass for each position and head

    @staticmethod
    def metric(logits):
        return logits[:, -1, 3].mean() - logits[:, -1, 7].mean()

    @pytest.mark.parametrize("recipe", PATCHES)
    def test_activation_patching(self, d, recipe):
        def patched():
            cache = d.model.run_with_cache(self.clean)[1]
            return getattr(patching, recipe)(d.model, self.corrupted, cache, self.metric)

        with torch.no_grad():
            alone = patched()
            with on(d):
                inside = patched()
        assert same(inside, alone) and alone.abs().max() > 0

    def test_direct_logit_attribution(self, d):
        direction = (d.model.W_U[:, 3] - d.model.W_U[:, 7]).detach()

        def attributed():
            cache = d.model.run_with_cache(self.clean)[1]
            residual, labels = cache.decompose_resid(layer=-1, pos_slice=-1, return_labels=True)
            return cache.apply_ln_to_stack(residual, layer=-1, pos_slice=-1) @ direction, labels

        with torch.no_grad():
            alone, labels = attributed()
            with on(d):
                inside, again = attributed()
        assert labels == again and same(inside, alone)

    def test_attribution_of_heads(self, d):
        def attributed():
            cache = d.model.run_with_cache(self.clean)[1]
            return cache.stack_head_results(layer=-1, pos_slice=-1), cache.logit_attrs(cache.accumulated_resid(), tokens=3)

        with torch.no_grad():
            alone = attributed()
            with on(d):
                inside = attributed()
        assert all(map(same, inside, alone))

    @pytest.mark.parametrize("point", ["hook_z", "hook_v", "hook_pattern", "hook_attn_scores"])
    def test_ablation_of_a_head(self, d, point):
        heads = 2 if point in ("hook_z", "hook_v") else 1  # the dimension

        def zero(value, hook):
            value.select(heads, 2).zero_()
            return value

        def ablated():
            return d.model.run_with_hooks(self.clean, fwd_hooks=[(f"blocks.0.attn.{point}", zero)])

        with torch.no_grad():
            alone = ablated()
            assert not torch.allclose(alone, d.model(self.clean), atol=1e-3)
            with on(d):
                inside = ablated()
        assert same(inside, alone)
