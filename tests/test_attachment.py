"""`with decomposition.attached():` the model's own methods know the subcomponents."""

import pytest
import torch

from spd_lens import SPDConfig, SPDError, decompose
from spd_lens.sites import hook_registries
from tests import test_sites, zoo

BOTH = [n for n in ("HT-standard", "Bridge-gpt2", "Bridge-gpt2-compatible") if n in zoo.ALL]
SOME = [n for n in (*BOTH, "HT-split", "HT-attn-result", "HT-grouped", "Bridge-native", "Bridge-llama-processed",
                    "Bridge-gpt2-use_split_qkv_input", "Bridge-neox-use_attn_result") if n in zoo.ALL]  # fmt: skip
QUERY, OUT, MLP = "blocks.0.attn.W_Q", "blocks.1.attn.W_O", "blocks.0.mlp.W_in"
C = 24


def hook_state(model):
    """Every hook; but TransformerBridge leaves some of its own on what it wraps (`output_attentions` in `run_with_cache`)."""
    return {name: many for name, many in test_sites.hook_state(model).items() if not name.endswith("_original_component")}


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
            assert torch.equal(d.run_with_cache(tokens, masks, delta, names_filter="blocks.0.attn.hook_z")[0], d.run(tokens, masks, delta))
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


@pytest.mark.parametrize("name", BOTH)
class TestTheCachesArguments:
    """`run_with_cache`, the model's and ours, with the two names among its own."""

    @pytest.fixture
    def caches(self, name):
        d = scrambled(name)

        def both(tokens, **options):
            with torch.no_grad():
                ours = d.run_with_cache(tokens, **options)
                with d.attached() as model:
                    theirs = model.run_with_cache(tokens, **options)
            assert torch.equal(ours[0], theirs[0])
            entries = [cache if isinstance(cache, dict) else cache.cache_dict for _, cache in (ours, theirs)]
            assert entries[0].keys() == entries[1].keys()
            assert all(torch.equal(entries[0][key], entries[1][key]) for key in entries[0] if isinstance(entries[0][key], torch.Tensor))
            return ours

        return d, both

    def test_names_filter(self, caches, tokens):
        d, both = caches
        point = f"{QUERY}.hook_spd_ci"
        assert list(both(tokens, names_filter=point)[1].cache_dict) == [point]
        assert sorted(both(tokens, names_filter=[point, f"{OUT}.hook_spd_acts"])[1].cache_dict) == [point, f"{OUT}.hook_spd_acts"]
        assert {point, "blocks.0.attn.hook_z"} <= set(both(tokens, names_filter=[point, "blocks.0.attn.hook_z"])[1].cache_dict)
        found = both(tokens, names_filter=lambda name: name.endswith("hook_spd_ci"))[1]
        assert sorted(found.cache_dict) == sorted(f"{site}.hook_spd_ci" for site in d.sites)

    def test_stop_at_layer(self, caches, tokens):
        d, both = caches
        residual, cache = both(tokens, stop_at_layer=1)
        assert torch.equal(residual, d.model(tokens, stop_at_layer=1))
        assert {key.split(".")[1] for key in cache.cache_dict if "hook_spd" in key} == {"0"}
        with torch.no_grad(), d.attached():  # a pass that was broken off leaves nothing behind
            d.model.run_with_cache(tokens, stop_at_layer=1)
            cut = d.model(tokens)
        assert torch.equal(cut, d.model(tokens))

    def test_pos_slice(self, caches, tokens):
        _, both = caches
        whole = both(tokens)[1]
        for pos_slice in (3, (2, 7), -1):
            part = both(tokens, pos_slice=pos_slice)[1]
            rows = slice(*pos_slice) if isinstance(pos_slice, tuple) else [pos_slice]
            for key in (f"{QUERY}.hook_spd_ci", f"{OUT}.hook_spd_acts"):
                assert torch.equal(part[key], whole[key][:, rows]), (key, pos_slice)

    def test_one_sequence_and_a_plain_dict(self, caches, tokens):
        _, both = caches
        _, cache = both(tokens[:1], remove_batch_dim=True, return_cache_object=False)
        assert cache[f"{QUERY}.hook_spd_ci"].shape == (tokens.shape[1], C) and type(cache) is dict
        assert both(tokens[:1], device="cpu")[1][f"{QUERY}.hook_spd_ci"].shape == (1, tokens.shape[1], C)


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("name", BOTH)
def test_generate(name, cached):
    """With the key/value cache a site sees the tokens of one pass alone."""
    d, prompt, seen = scrambled(name), zoo.tokens(2, 4), []

    def hook(tensor, hook):
        seen.append(tensor.shape[1])
        return set_to([3, 7])(tensor, hook)

    options = dict(max_new_tokens=5, do_sample=False, stop_at_eos=False, return_type="tokens", verbose=False, use_past_kv_cache=cached)
    with torch.no_grad():
        plain = d.model.generate(prompt, **options)
        with d.model.hooks(fwd_hooks=d.ablate({site: [3, 7] for site in d.sites})):
            expected = d.model.generate(prompt, **options)
        with d.attached() as model:
            assert torch.equal(model.generate(prompt, **options), plain)
            with model.hooks(fwd_hooks=[(f"{site}.hook_spd_ci", hook) for site in d.sites]):
                written = model.generate(prompt, **options)
    assert torch.equal(written, expected) and not torch.equal(written, plain)
    assert set(seen) == ({4, 1} if cached else {4, 5, 6, 7, 8})


@pytest.mark.parametrize("name", BOTH)
def test_nested_and_repeated(name):
    d, tokens = scrambled(name), zoo.tokens()
    state = hook_state(d.model)
    zeros = {QUERY: torch.zeros(())}
    with torch.no_grad():
        clean, cut, deep = d.model(tokens), d.run(tokens, zeros), d.run(tokens, {OUT: torch.zeros(())})
        for _ in range(2):
            with d.attached() as model:
                point = model.hook_dict[f"{QUERY}.hook_spd_ci"]
                with d.attached():  # the same points: a hook outside still holds
                    assert model.hook_dict[f"{QUERY}.hook_spd_ci"] is point
                    with d.attached(zeros, 0.0):
                        assert torch.equal(model(tokens), cut)
                        with d.attached({OUT: torch.zeros(())}, 0.0):  # the innermost masks hold
                            assert torch.equal(model(tokens), deep)
                        with d.attached():
                            assert torch.equal(model(tokens), cut)
                        assert torch.equal(model(tokens), cut)
                        assert torch.equal(d.run_with_cache(tokens)[0], cut)
                    assert torch.equal(model(tokens), clean)
                assert torch.equal(model(tokens), clean)
            assert hook_state(d.model) == state and torch.equal(d.model(tokens), clean)


@pytest.mark.parametrize("name", BOTH)
def test_run_inside(name):
    """It replaces its sites as ever; a patch around it changes what it writes, as ablation hooks do."""
    d, tokens = scrambled(name), zoo.tokens()
    masks = {QUERY: torch.rand(C, generator=torch.Generator().manual_seed(2))}
    with torch.no_grad():
        expected = d.run(tokens, masks)
        with d.attached() as model:
            assert torch.equal(d.run(tokens, masks), expected)
            for chosen in ({QUERY: [1, 2]}, {OUT: [4]}):
                ablated = d.model.run_with_hooks(tokens, fwd_hooks=d.hooks(masks) + d.ablate(chosen))
                with model.hooks(fwd_hooks=[(f"{site}.hook_spd_ci", set_to(index)) for site, index in chosen.items()]):
                    assert torch.allclose(d.run(tokens, masks), ablated, atol=1e-5)
                assert not torch.allclose(ablated, expected, atol=1e-4)


@pytest.mark.parametrize("name", BOTH)
def test_two_decompositions_of_one_model(name):
    tokens, model = zoo.tokens(), zoo.ALL[name]()
    queries, keys = scrambled(model, "blocks.*.attn.W_Q"), scrambled(model, "blocks.*.attn.W_K")
    with torch.no_grad():
        chosen = queries.ablate({QUERY: [3]}), keys.ablate({"blocks.0.attn.W_K": [5]})
        expected, clean = model.run_with_hooks(tokens, fwd_hooks=chosen[0] + chosen[1]), model(tokens)
        state = hook_state(model)
        with queries.attached(), keys.attached():
            hooks = [(f"{QUERY}.hook_spd_ci", set_to(3)), ("blocks.0.attn.W_K.hook_spd_ci", set_to(5))]
            assert torch.allclose(model.run_with_hooks(tokens, fwd_hooks=hooks), expected, atol=1e-5)
            within = hook_state(model)
            others = scrambled(model, QUERY)
            with pytest.raises(SPDError, match=f"another decomposition of this model is attached to {QUERY}"), others.attached():
                pass
            assert hook_state(model) == within and torch.equal(model(tokens), clean)
        assert hook_state(model) == state and torch.equal(model(tokens), clean)


@pytest.mark.parametrize("name", BOTH)
def test_an_exception_inside_leaves_the_model_as_it_was(name):
    d, tokens = scrambled(name), zoo.tokens()
    clean, state = d.model(tokens), hook_state(d.model)

    def broken(tensor, hook):
        raise KeyError("mine")

    for point in (f"{QUERY}.hook_spd_ci", f"{MLP}.hook_spd_acts", "blocks.0.mlp.hook_post"):
        with pytest.raises(KeyError, match="mine"), d.attached({MLP: torch.ones(())}) as model:
            model.run_with_hooks(tokens, fwd_hooks=[(point, broken)])
        assert hook_state(d.model) == state and torch.equal(d.model(tokens), clean)


@pytest.mark.parametrize("name", BOTH)
def test_hooks_that_were_taken_away_are_missed(name):
    d, tokens = scrambled(name), zoo.tokens()
    clean, state = d.model(tokens), hook_state(d.model)
    with d.attached() as model:
        model.reset_hooks()
        assert f"{QUERY}.hook_spd_ci" in d.run_with_cache(tokens)[1].cache_dict
        model.reset_hooks(including_permanent=True)
        with pytest.raises(SPDError, match="was removed while a decomposition was attached"):
            model(tokens)
    assert torch.equal(d.model(tokens), clean) and hook_state(d.model) == state
    anew = d.model.setup if hasattr(d.model, "setup") else lambda: d.model.enable_compatibility_mode(no_processing=True)
    with d.attached() as model:
        anew()
        with pytest.raises(SPDError, match="was exchanged while a decomposition was attached"):
            model(tokens)
    assert not any("hook_spd" in key for registry in hook_registries(d.model) for key in registry)
    assert torch.allclose(d.model(tokens), clean, atol=1e-6)


def test_bad_input(tokens):
    d = scrambled(BOTH[0])
    state = hook_state(d.model)
    with pytest.raises(SPDError, match="not decomposed here; nearest"), d.attached({"blocks.0.attn.W_q": torch.ones(())}):
        pass
    with pytest.raises(SPDError, match=rf"broadcasts to \[b, s, {C}\]"), d.attached({QUERY: torch.ones(3)}):
        pass
    with d.attached() as model, pytest.raises(SPDError, match=r"hook on blocks.0.attn.W_Q.hook_spd_ci returned shape \[3, 11\]"):
        model.run_with_hooks(tokens, fwd_hooks=[(f"{QUERY}.hook_spd_ci", lambda tensor, hook: tensor[..., 0])])
    for c in d.components.values():
        c.to("meta")
    with pytest.raises(SPDError, match="decomposition is on meta"), d.attached():
        pass
    assert hook_state(d.model) == state


@pytest.mark.parametrize("name", [n for n in ("HT-standard", "Bridge-gpt2") if n in zoo.ALL])
def test_a_copy_that_is_made_while_attached_computes_with_its_own_weights(name):
    d, tokens = scrambled(name), zoo.tokens()
    site = next(iter(d.sites))
    with d.attached():
        edited = d.edited_model({site: [0, 1]})
    assert "forward" not in vars(edited) and "forward" not in vars(d.model)
    wanted = d.model.run_with_hooks(tokens, fwd_hooks=d.ablate({site: [0, 1]}))
    assert torch.allclose(edited(tokens), wanted, atol=1e-4) and not torch.allclose(wanted, d.model(tokens), atol=1e-3)


def test_the_same_masks_mean_the_same_logits():
    d, tokens = scrambled(BOTH[0]), zoo.tokens()
    half = {site: torch.full((), 0.5) for site in d.sites}
    for delta in ((), (0.25,)):
        wanted = d.run(tokens, half, *delta)
        with d.attached(half, *delta) as model:
            assert torch.allclose(model(tokens), wanted, atol=1e-5)
        assert torch.allclose(d.run_with_cache(tokens, half, *delta)[0], wanted, atol=1e-5)
        assert torch.allclose(d.model.run_with_hooks(tokens, fwd_hooks=d.hooks(half, *delta)), wanted, atol=1e-5)
    ones = {site: torch.ones(()) for site in d.sites}
    assert torch.allclose(d.run_with_cache(tokens, delta=0.25)[0], d.run(tokens, ones, 0.25), atol=1e-5)
