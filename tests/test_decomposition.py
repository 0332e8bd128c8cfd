import pytest
import torch

from spd_lens import SPDConfig, SPDError, decompose, masks
from tests import zoo

SOME = [n for n in ("HT-standard", "HT-split", "HT-attn-result", "HT-grouped", "Bridge-native", "Bridge-gpt2", "Bridge-llama-processed",
                    "Bridge-gpt2-use_split_qkv_input", "Bridge-neox-use_attn_result") if n in zoo.ALL]  # fmt: skip


def ones(decomposition):
    return {name: torch.ones(()) for name in decomposition.sites}


def scrambled(name, C=24, **config):
    """A decomposition whose components are far from the matrix, so that mistakes show."""
    model = zoo.ALL[name]()
    d = decompose(model, zoo.tokens(4), SPDConfig(steps=0, subcomponents=C, init="random", **config), progress=False)
    return d


@pytest.mark.parametrize("name", SOME)
def test_everything_on_with_the_delta_is_the_original(name):
    d, tokens = scrambled(name), zoo.tokens()
    clean = d.model(tokens)
    assert (d.run(tokens, ones(d), delta=1.0) - clean).abs().max() < 1e-4
    assert (d.run(tokens, ones(d)) - clean).abs().max() > 1e-3
    assert torch.equal(d.run(tokens, {}), clean)


@pytest.mark.parametrize("name", SOME)
def test_the_stacked_pass_equals_run_gradients_included(name):
    d, tokens = scrambled(name), zoo.tokens()
    generator = torch.Generator().manual_seed(0)
    shape = (*tokens.shape, 24)
    names = list(d.sites)
    variants = [
        {n: torch.rand(shape, generator=generator, requires_grad=True) for n in chosen}
        for chosen in (names, names[:1], names[-2:], names[1::2], names[3:4])
    ]
    leaves = [m for v in variants for m in v.values()] + [p for c in d.components.values() for p in c.parameters()]
    weight = torch.randn(len(variants), *d.model(tokens).shape, generator=generator)
    results = []
    with torch.no_grad():
        clean = d.trace(tokens)
    for logits in (torch.stack([d.run(tokens, v) for v in variants]), d.run_many(clean, variants)):
        results.append((logits, *torch.autograd.grad((logits * weight).sum(), leaves)))
    for naive, fast in zip(*results):
        assert torch.allclose(naive, fast, atol=1e-5 * max(1.0, float(naive.detach().abs().max())))


@pytest.mark.parametrize("name", sorted(zoo.ALL))
@pytest.mark.parametrize("positions", ["all", "last"])
def test_a_pass_that_begins_late_and_compares_little_equals_run(name, positions):
    """Variants which leave the first block alone, on every architecture: its output is taken from the clean pass."""
    d, tokens = scrambled(name), zoo.tokens()
    late = [n for n, site in d.sites.items() if site.layer == 1]
    variants = [{n: torch.rand(*tokens.shape, 24, requires_grad=True) for n in chosen} for chosen in (late, late[:1], late[-1:])]
    leaves = [m for v in variants for m in v.values()] + [p for n in late for p in d.components[n].parameters()]
    with torch.no_grad():
        clean = d.trace(tokens, positions)
    naive, fast = torch.stack([d.run(tokens, v) for v in variants]), d.run_many(clean, variants, positions)
    naive = naive[..., -1:, :] if positions == "last" else naive
    assert fast.shape == naive.shape and clean.logits.shape == naive.shape[1:]
    gradients = [torch.autograd.grad(logits.square().sum(), leaves) for logits in (naive, fast)]
    for expected, got in zip((naive, *gradients[0]), (fast, *gradients[1])):
        assert torch.allclose(expected, got, rtol=1e-3, atol=1e-5 * max(1.0, float(expected.detach().abs().max())))
    assert all("forward" not in block.__dict__ for block in d.model.blocks)


@pytest.mark.parametrize("name", SOME)
def test_an_observation_is_made_of_what_the_model_computes(name):
    d, tokens = scrambled(name), zoo.tokens()
    seen = d.observe(tokens)
    with torch.no_grad():
        assert torch.equal(seen.logits, d.model(tokens))
    for site in d.components:
        assert seen.inner[site].shape == seen.importances[site].shape == (*tokens.shape, 24)
        assert (seen.importances[site] >= 0).all() and (seen.importances[site] <= 1).all()
    z = d.model.run_with_cache(tokens)[1]["blocks.0.attn.hook_z"].flatten(2)
    assert torch.allclose(seen.inner["blocks.0.attn.W_O"], z @ d.components["blocks.0.attn.W_O"].V, atol=1e-5)
    assert not any(value.requires_grad for value in seen.importances.values())


@pytest.mark.parametrize("name", SOME)
def test_hooks_are_run_in_the_models_own_words(name):
    d, tokens = scrambled(name), zoo.tokens()
    hard = masks.hard(d.importances(tokens))
    with torch.no_grad():
        expected = d.run(tokens, hard)
        assert torch.equal(d.model.run_with_hooks(tokens, fwd_hooks=d.hooks(hard)), expected)
        with d.model.hooks(fwd_hooks=d.hooks(hard)):
            assert torch.equal(d.model(tokens), expected)
        assert not torch.equal(d.model(tokens), expected)


@pytest.mark.parametrize("name", SOME)
def test_ablation_takes_exactly_the_subcomponent_out_of_the_weight(name):
    d, tokens = scrambled(name), zoo.tokens()
    site = "blocks.1.attn.W_Q"
    with torch.no_grad():
        c = d.components[site]
        left = d.sites[site].weight - c.V[:, [3, 7]] @ c.U[[3, 7]]

        def edited(passage):
            return passage.biased(passage.source @ left)

        from spd_lens.visits import rewrite_hooks

        expected = d.model.run_with_hooks(tokens, fwd_hooks=rewrite_hooks(d.model, d.sites, {site: edited}))
        ablated = d.model.run_with_hooks(tokens, fwd_hooks=d.ablate({site: [3, 7]}))
        assert torch.allclose(ablated, expected, atol=1e-4)
        assert torch.equal(d.model.run_with_hooks(tokens, fwd_hooks=d.ablate({site: []})), d.model(tokens))


def test_ablation_at_some_positions(untrained, tokens):
    hooks = untrained.ablate({"blocks.0.mlp.W_in": list(range(20))}, positions=[5])
    with torch.no_grad():
        difference = (untrained.model.run_with_hooks(tokens, fwd_hooks=hooks) - untrained.model(tokens)).abs().amax((0, 2))
    assert difference[:5].max() == 0 and difference[5] > 1e-4


def test_the_cache_holds_activations_and_importances(untrained, tokens):
    seen = untrained.observe(tokens)
    logits, cache = untrained.run_with_cache(tokens)
    for site in untrained.sites:
        assert torch.allclose(cache[f"{site}.hook_spd_acts"], seen.inner[site])
        assert torch.allclose(cache[f"{site}.hook_spd_ci"], seen.importances[site])
    assert torch.allclose(logits, seen.logits)
    assert "blocks.0.attn.hook_z" in cache.cache_dict
    _, few = untrained.run_with_cache(tokens, names_filter=lambda name: name.endswith("W_Q.hook_spd_ci"))
    assert sorted(few.cache_dict) == ["blocks.0.attn.W_Q.hook_spd_ci", "blocks.1.attn.W_Q.hook_spd_ci"]
    _, listed = untrained.run_with_cache(tokens, names_filter=["blocks.0.attn.W_Q.hook_spd_ci", "blocks.0.attn.hook_z"])
    aliases = {"blocks.0.attn.o.hook_in"}  # TransformerBridge may add its own name of hook_z
    assert set(listed.cache_dict) - aliases == {"blocks.0.attn.W_Q.hook_spd_ci", "blocks.0.attn.hook_z"}
    _, one = untrained.run_with_cache(tokens, names_filter="blocks.0.mlp.W_in.hook_spd_acts")
    assert sorted(one.cache_dict) == ["blocks.0.mlp.W_in.hook_spd_acts"]
    masked, _ = untrained.run_with_cache(tokens, masks={n: torch.zeros(()) for n in untrained.sites})
    with torch.no_grad():
        assert torch.allclose(masked, untrained.run(tokens, {n: torch.zeros(()) for n in untrained.sites}))


def test_the_model_is_as_before_also_after_an_exception(untrained, tokens):
    clean = untrained.model(tokens)
    hooks = untrained.hooks({"blocks.0.mlp.W_in": torch.ones(7, 1, 40)})
    with pytest.raises(SPDError, match=r"\[7, 1, 40\]; .* = \[3, 11, 40\]"):  # known inside of the forward pass alone
        untrained.model.run_with_hooks(tokens, fwd_hooks=hooks)
    assert torch.equal(untrained.model(tokens), clean)


SITE = "blocks.0.mlp.W_in"


def four_ways(d, tokens, mask, delta=0.0):
    """A mask in each of the ways that there are to give one; a function for each."""

    def attached():
        with d.attached({SITE: mask}, delta) as model:
            return model(tokens)

    return [lambda: d.run(tokens, {SITE: mask}, delta), lambda: d.run_with_cache(tokens, {SITE: mask}, delta)[0], attached,
            lambda: d.model.run_with_hooks(tokens, fwd_hooks=d.hooks({SITE: mask}, delta))]  # fmt: skip


@pytest.mark.parametrize(
    "batch, length, shape, message",
    [
        (3, 11, (7, 1, 40), r"\[7, 1, 40\]; it has to be a tensor that broadcasts to \[b, s, 40\] = \[3, 11, 40\]\.$"),
        (1, 11, (7, 1, 40), r"\[7, 1, 40\]; .* = \[1, 11, 40\]"),
        (3, 1, (3, 11, 40), r"\[3, 11, 40\]; .* = \[3, 1, 40\]"),
        (3, 11, (3, 40), r"\[3, 40\]; .* = \[3, 11, 40\]\. Of one row a sequence give mask\[:, None, :\]"),
        (11, 11, (11, 40), r"tokens \[11, 11\], so its rows may be sequences or positions; give mask\[:, None, :\] .* mask\[None\]"),
        (11, 11, (11, 1), "may be sequences or positions"),
        (3, 11, (1, 3, 11, 40), r"\[1, 3, 11, 40\]"),
    ],
)
def test_masks_of_another_shape_are_refused_by_name(untrained, batch, length, shape, message):
    for way in four_ways(untrained, zoo.tokens(batch, length), torch.ones(shape)):
        with pytest.raises(SPDError, match=rf"^{SITE}: .*{message}"):
            way()


def test_a_mask_of_another_shape_is_refused_before_the_pass(untrained, tokens, monkeypatch):
    monkeypatch.setattr(type(untrained.model), "forward", lambda *_, **__: pytest.fail("the model was run"))
    run, run_with_cache, *_ = four_ways(untrained, tokens, torch.ones(3, 40))
    for way in (run, run_with_cache):
        with pytest.raises(SPDError, match="mask"):
            way()


@pytest.mark.parametrize("shape", [(), (40,), (1,), (11, 40), (11, 1), (1, 40), (3, 11, 40), (3, 1, 40), (1, 11, 1), (3, 11, 1)])
def test_masks_that_broadcast_are_what_they_broadcast_to(untrained, tokens, shape):
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(0))
    expected = untrained.run(tokens, {SITE: mask.expand(3, 11, 40)})
    for way in four_ways(untrained, tokens, mask):
        assert torch.allclose(way(), expected, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.uint8, torch.float64, torch.float16])
def test_masks_of_other_types_are_numbers(untrained, tokens, dtype):
    mask = torch.arange(40).remainder(2).to(dtype)
    expected = untrained.run(tokens, {SITE: mask.float()})
    for way in four_ways(untrained, tokens, mask):
        assert torch.allclose(way(), expected, atol=1e-5)


@pytest.mark.parametrize("bad, message", [(torch.tensor(torch.nan), "NaN or infinite"), (torch.tensor([torch.inf] * 40), "NaN or infinite"),
                                          (torch.ones(40, dtype=torch.complex64), "complex")])  # fmt: skip
def test_masks_that_are_no_numbers_are_refused(untrained, tokens, bad, message):
    for way in four_ways(untrained, tokens, bad):
        with pytest.raises(SPDError, match=f"^{SITE}: .*{message}"):
            way()


@pytest.mark.parametrize("bad", [torch.ones(40), [SITE], None, 1.0])
def test_masks_that_are_no_mapping_are_refused(untrained, bad):
    with pytest.raises(SPDError, match="masks were given as .*; give a mapping"):
        untrained.check_masks(bad, 0.0)


@pytest.mark.parametrize("delta", [torch.ones(3), torch.ones(3, 11), torch.ones(48), torch.nan, torch.inf, torch.ones(3, 11, 48)])
def test_a_delta_that_is_no_number_is_refused(untrained, tokens, delta):
    """`[48]` would have scaled what is written, entry by entry."""
    for way in four_ways(untrained, tokens, torch.ones(()), delta):
        with pytest.raises(SPDError, match="delta was given as .*; give a finite number, or a tensor that broadcasts"):
            way()


def test_masks_go_through_vmap(untrained, tokens):
    many = torch.rand(2, 40, generator=torch.Generator().manual_seed(0))
    together = torch.vmap(lambda mask: untrained.run(tokens, {SITE: mask}))(many)
    for mask, logits in zip(many, together):
        assert torch.allclose(untrained.run(tokens, {SITE: mask}), logits, atol=1e-5)


@pytest.mark.parametrize(
    "bad, message",
    [
        (5, "given as int"),
        ([], "given as list"),
        (torch.tensor([[0, zoo.VOCABULARY]]), r"run from 0 to 50; the model's vocabulary is 0 … 49"),
        (torch.tensor([[-1, 3]]), "run from -1"),
        (torch.tensor([[0.0, 1.0]]), "float32"),
        (torch.tensor([[True]]), "bool"),
        (torch.tensor([1, 2]), r"tokens\[None\]"),
        (torch.zeros(1, 2, 3, dtype=torch.long), r"give \[b, s\]"),
        (torch.zeros(1, zoo.CONTEXT + 1, dtype=torch.long), "n_ctx is 24"),
        (torch.zeros(0, 4, dtype=torch.long), "empty"),
        ([[1, 2]], "list"),
        ("text", "no tokenizer"),
    ],
)
def test_bad_tokens(untrained, bad, message):
    with pytest.raises(SPDError, match=message):
        untrained.observe(bad)


def test_unknown_sites_and_indices_and_masks(untrained, tokens):
    with pytest.raises(SPDError, match="not decomposed here; nearest: .*blocks.0.attn.W_Q"):
        untrained.run(tokens, {"blocks.0.attn.W_q": torch.ones(())})
    with pytest.raises(SPDError, match="subcomponent 40 was given; it has 0 … 39"):
        untrained.ablate({"blocks.0.attn.W_Q": [40]})
    with pytest.raises(SPDError, match=r"broadcasts to \[b, s, 40\]"):
        untrained.run(tokens, {"blocks.0.attn.W_Q": torch.ones(3)})


def test_a_model_that_was_moved_is_noticed(tokens):
    d = scrambled("HT-standard" if "HT-standard" in zoo.ALL else "Bridge-native")
    for c in d.components.values():
        c.to("meta")
    with pytest.raises(SPDError, match="decomposition is on meta"):
        d.run(tokens, ones(d))
