import re
from dataclasses import replace

import pytest
import torch
from transformer_lens.hook_points import HookPoint

from spd_lens import SPDConfig, SPDError, decompose, find_sites
from spd_lens.interventions import calibrated, peaks, span
from spd_lens.sites import layout_of
from spd_lens.visits import rewrite_hooks
from tests import zoo
from tests.test_decomposition import scrambled

SOME = [n for n in ("HT-standard", "HT-split", "HT-attn-result", "HT-grouped", "HT-gated", "HT-parallel", "Bridge-native", "Bridge-gpt2",
                    "Bridge-llama-processed", "Bridge-neox", "Bridge-gpt2-use_split_qkv_input", "Bridge-neox-use_attn_result")
        if n in zoo.ALL]  # fmt: skip
FEW = [n for n in ("HT-rotary", "HT-grouped", "Bridge-native", "Bridge-gpt2", "Bridge-llama", "Bridge-neox-processed") if n in zoo.ALL]
Q, K, OUT = "blocks.0.attn.W_Q", "blocks.1.attn.W_K", "blocks.1.attn.W_O"


def run(d, tokens, hooks):
    with torch.no_grad():
        return d.model.run_with_hooks(tokens, fwd_hooks=hooks)


def with_weights(d, weights):
    """The naive twin: replace the product at the sites' hooks."""
    return rewrite_hooks(d.model, d.sites, {n: (lambda p, n=n: p.biased(p.source @ weights[n])) for n in weights})


def two_of_one_width(d):
    return next((a, b) for a in d.sites for b in d.sites if a < b and d.sites[a].d_out == d.sites[b].d_out)


def an_edit(d):
    """Something of everything, in every kind of matrix."""
    a, b = two_of_one_width(d)
    last = list(d.sites)[-1]
    return dict(
        remove={name: [0, 2] for name in d.sites},
        swap_outputs=[((a, 3), (b, 4))],
        set_output={(last, 5): 7, (last, 6): torch.ones(d.sites[last].d_out)},
    )


def hooks_of(d, remove, **rest):
    return d.ablate(remove) + d.rewire(**rest)


@pytest.mark.parametrize("name", SOME)
def test_ablate_and_keep_are_the_original_weight_without(name):
    d, tokens = scrambled(name), zoo.tokens()
    chosen = {site: [1, 3] for site in d.sites}
    for hooks, gone in ((d.ablate(chosen), [1, 3]), (d.keep(chosen), [c for c in range(24) if c not in (1, 3)])):
        left = {n: site.weight - (d.components[n].V[:, gone] @ d.components[n].U[gone]).detach() for n, site in d.sites.items()}
        assert torch.allclose(run(d, tokens, hooks), run(d, tokens, with_weights(d, left)), atol=1e-5)
    clean = run(d, tokens, [])
    assert torch.allclose(run(d, tokens, d.ablate(chosen, strength=0)), clean)
    assert torch.equal(run(d, tokens, d.keep({site: range(24) for site in d.sites})), clean) and d.ablate({}) == []


@pytest.mark.parametrize("name", SOME)
def test_positions_examples_and_strength(name):
    d, tokens = scrambled(name), zoo.tokens()
    mask = torch.zeros(tokens.shape)
    mask[1:, [4, 10]] = 0.5
    V, U = d.components[OUT].V[:, [2]], d.components[OUT].U[[2]]
    z = d.trace(tokens).inputs[OUT]
    expected = -(mask[..., None] * (z @ V) @ U).detach()
    point = "blocks.1.attn.hook_result" if "attn_result" in name or "attn-result" in name else "blocks.1.hook_attn_out"
    for where in (dict(positions=[4, -1], examples=[1, 2], strength=0.5), dict(positions=mask), dict(positions=mask > 0, strength=0.5)):
        seen = []
        for hooks in ([], d.ablate({OUT: 2}, **where)):
            run(d, tokens, [*hooks, (point, lambda t, hook, seen=seen: seen.append(t.clone()))])
        difference = seen[1] - seen[0]
        assert torch.allclose(difference.sum(2) if difference.ndim == 4 else difference, expected, atol=1e-5)
    rows = run(d, tokens, d.ablate({Q: range(20)}, positions=slice(5, None), examples=-1)) - run(d, tokens, [])
    changed = rows.abs().amax(2) > 1e-6
    assert changed[2, 5:].all() and not changed[2, :5].any() and not changed[:2].any()


@pytest.mark.parametrize("name", FEW)
def test_positions_are_of_the_whole_sequence_where_a_cache_holds_its_beginning(name):
    d, tokens = scrambled(name), zoo.tokens(2, 6)
    chosen, mask = {site: range(6) for site in d.sites}, torch.rand(2, 6)

    def made(where):
        with d.model.hooks(fwd_hooks=d.ablate(chosen, **where)):
            return d.model.generate(tokens, max_new_tokens=5, do_sample=False, stop_at_eos=False, verbose=False)

    def naive(where):
        grown = tokens
        for _ in range(5):
            grown = torch.cat([grown, run(d, grown, d.ablate(chosen, **where(grown.shape[1])))[:, -1].argmax(-1, keepdim=True)], 1)
        return grown

    for where in (dict(positions=[0, 3]), dict(positions=[5], examples=[1]), dict(positions=slice(4, 9)), dict()):
        assert torch.equal(made(where), naive(lambda length, where=where: where)), where
    if name != "Bridge-native":  # has no cache: every pass sees the whole, longer sequence
        padded = naive(lambda length: dict(positions=torch.nn.functional.pad(mask, (0, length - 6))))
        assert torch.equal(made(dict(positions=mask)), padded)
    assert not any("forward" in m.__dict__ for m in d.model.blocks[0].modules())


@pytest.mark.parametrize("name", [n for n in ("HT-standard", "Bridge-gpt2") if n in zoo.ALL])
def test_a_pass_after_a_cache_gives_the_logits_of_the_whole(name):
    d, tokens = scrambled(name), zoo.tokens(2, 9)
    hooks = d.ablate({site: range(8) for site in d.sites}, positions=[1, 6, 8], examples=[0])
    whole = run(d, tokens, hooks)
    with torch.no_grad(), d.model.hooks(fwd_hooks=d.ablate({site: range(8) for site in d.sites}, positions=slice(1, 2), examples=[0])):
        if name.startswith("HT"):
            from transformer_lens import TransformerLensKeyValueCache

            cache = TransformerLensKeyValueCache.init_cache(d.model.cfg, "cpu", 2)
            first = d.model(tokens[:, :5], past_kv_cache=cache, attention_mask=torch.ones(2, 5).long())
            rest = dict(past_kv_cache=cache, attention_mask=torch.ones(2, 4).long())
        else:
            first, cache = d.model(tokens[:, :5], use_past_kv_cache=True, return_type="logits_and_cache")
            rest = dict(past_key_values=cache)
    second = d.model.run_with_hooks(tokens[:, 5:], fwd_hooks=hooks, **rest)
    assert torch.allclose(torch.cat([first, second], 1), whole, atol=1e-5)


@pytest.mark.parametrize("name", SOME)
def test_projection_leaves_nothing_of_the_span(name):
    d, tokens = scrambled(name), zoo.tokens()
    with torch.no_grad():
        d.components[K].V[:, 9] = 2 * d.components[K].V[:, 1] - d.components[K].V[:, 2]  # dependent, and a zero one
        d.components[K].V[:, 10] = 0
        basis = torch.linalg.qr(d.components[K].V[:, [1, 2]])[0]
        W = d.sites[K].weight
    hooks = d.project_out({K: [1, 2, 9, 10]})
    assert torch.allclose(run(d, tokens, hooks), run(d, tokens, with_weights(d, {K: W - basis @ basis.T @ W})), atol=1e-5)
    u = d.components[K].U[[1, 2]]
    seen = []
    look = ("blocks.1.attn.hook_k", lambda k, hook: seen.append(k.flatten(2)))
    run(d, tokens, [*d.project_out({K: [1, 2]}, side="output", positions=[3]), look])
    assert (seen[-1][:, 3] @ u.T).abs().max() < 1e-5 < 1e-3 < (seen[-1][:, 4] @ u.T).abs().max()
    half = run(d, tokens, [*d.project_out({K: [1, 2]}, side="output", strength=0.5), look]), seen[-1]
    run(d, tokens, [look])
    assert torch.allclose(half[1] @ u.T, seen[-1] @ u.T / 2, atol=1e-5)


def test_the_span_of_dependent_directions():
    assert span(torch.zeros(5, 3)).shape == (5, 0)
    tiny = torch.eye(5)[:, :2] * torch.tensor([1.0, 1e-9])  # small, but a direction of its own
    assert span(torch.cat([tiny, tiny.sum(1, keepdim=True)], 1)).shape == (5, 2)


@pytest.mark.parametrize("name", SOME)
def test_rewiring_exchanges_what_is_written(name):
    d, tokens = scrambled(name), zoo.tokens()
    (a, b), last = two_of_one_width(d), list(d.sites)[-1]
    edit = dict(swap_outputs=[((a, 1), (b, 2))], set_output={(last, 0): 7})
    weights = {n: s.weight.clone() for n, s in d.sites.items()}
    with torch.no_grad():
        ca, cb, cl = (d.components[n] for n in (a, b, last))
        weights[a] += torch.outer(ca.V[:, 1], cb.U[2] - ca.U[1])
        weights[b] += torch.outer(cb.V[:, 2], ca.U[1] - cb.U[2])
        token = d.model.W_U[:, 7]
        weights[last] += torch.outer(cl.V[:, 0], token / token.norm() * cl.U[0].norm() - cl.U[0])
    assert torch.allclose(run(d, tokens, d.rewire(**edit)), run(d, tokens, with_weights(d, weights)), atol=1e-5)


@pytest.mark.parametrize("name", FEW)
def test_a_calibrated_exchange_writes_at_its_peak_what_the_other_wrote_at_its_own(name):
    d, tokens = scrambled(name), zoo.tokens()
    (a, b), at = two_of_one_width(d), peaks(d, tokens)
    i, j = (int(at[site].nonzero()[0]) for site in (a, b))
    edit = dict(swap_outputs=[((a, i), (b, j))], calibrate_on=tokens)
    weights = {n: s.weight.clone() for n, s in d.sites.items()}
    with torch.no_grad():
        ca, cb = d.components[a], d.components[b]
        weights[a] += torch.outer(ca.V[:, i], cb.U[j] * at[b][j] / at[a][i] - ca.U[i])
        weights[b] += torch.outer(cb.V[:, j], ca.U[i] * at[a][i] / at[b][j] - cb.U[j])
        expected = run(d, tokens, with_weights(d, weights))
        assert torch.allclose(run(d, tokens, d.rewire(**edit)), expected, atol=1e-5)
        assert torch.allclose(d.edited_model(**edit)(tokens), expected, atol=1e-5)
        assert not torch.allclose(run(d, tokens, d.rewire(edit["swap_outputs"])), expected, atol=1e-5)


def test_the_peak_is_where_importance_times_activation_is_largest():
    d, tokens = scrambled(FEW[0]), zoo.tokens()
    seen, at = d.observe(tokens), peaks(d, tokens)
    for site, values in at.items():
        for c, value in enumerate(values.tolist()):
            inner, g = seen.inner[site][..., c].flatten(), seen.importances[site][..., c].flatten()
            on = torch.nonzero(g > 0.5).flatten()  # a larger one where it is inactive does not count
            assert value == (float(inner[on[(inner * g)[on].abs().argmax()]]) if len(on) else 0.0)
    assert any(bool((values < 0).any()) for values in at.values())


def test_a_calibrated_exchange_does_not_depend_on_how_v_and_u_share_a_term():
    d = scrambled(FEW[0])
    a, b = two_of_one_width(d)
    pair, at = ((a, 1), (b, 2)), {site: torch.linspace(1.0, 2.0, 24) for site in d.sites}

    def terms():
        new = calibrated(d, [pair], at)
        return [torch.outer(d.components[site].V[:, c], new[site, c]) for site, c in pair]

    with torch.no_grad():
        before = terms()
        d.components[a].V[:, 1] *= -3
        d.components[a].U[1] /= -3
        at[a][1] *= -3
        assert all(torch.allclose(one, other, atol=1e-6) for one, other in zip(terms(), before))


def test_a_calibrated_exchange_needs_both_to_be_active():
    d, tokens = scrambled(FEW[0]), zoo.tokens()
    a, b = two_of_one_width(d)
    d.gates[a].alive.zero_()
    d.gates[a].alive[[0, 5]] = 1.0
    for pairs in ([((a, 3), (b, 2))], [((b, 2), (a, 3))]):
        with pytest.raises(SPDError, match=f"{a}: subcomponent 3 is active nowhere .* there: "):
            d.rewire(swap_outputs=pairs, calibrate_on=tokens)
    assert d.rewire(swap_outputs=[((a, 3), (b, 2))])


@pytest.mark.parametrize("name", sorted(zoo.ALL))
def test_an_edited_model_is_the_hooked_one_independent_and_loadable(name):
    d, tokens = scrambled(name), zoo.tokens()
    d.model(tokens)  # with gradients, of which models keep something
    d.model.add_hook("blocks.0.attn.hook_z", lambda z, hook: 0 * z, is_permanent=True)
    before = {key: value.clone() for key, value in d.model.state_dict().items()}
    edit = an_edit(d)
    with d.model.hooks(fwd_hooks=d.ablate({Q: 3}, positions=[2])):
        edited = d.edited_model(**edit)
    assert type(edited) is type(d.model) and all(torch.equal(value, before[key]) for key, value in d.model.state_dict().items())
    d.model.reset_hooks(including_permanent=True)
    expected, clean = run(d, tokens, hooks_of(d, **edit)), run(d, tokens, [])
    with torch.no_grad():
        assert (edited(tokens) - expected).abs().max() <= 1e-5 < 1e-3 < (expected - clean).abs().max()
        assert torch.equal(edited.run_with_cache(tokens)[0], edited(tokens))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in edited.modules() if isinstance(m, HookPoint))
    assert not any(type(value).__module__.startswith("spd_lens") for m in edited.modules() for value in vars(m).values())

    fresh = zoo.ALL[name]()
    fresh.load_state_dict({key: value.clone() for key, value in edited.state_dict().items()})
    with torch.no_grad():
        assert torch.allclose(fresh(tokens), edited(tokens), atol=1e-5)
    wanted, changed = find_sites(edited), set()
    for (key, p), (_, q) in zip(d.model.named_parameters(), edited.named_parameters()):
        assert p.data_ptr() != q.data_ptr(), key
        changed |= {key} if not torch.equal(p, q) else set()
    assert changed and not any(re.search(r"embed|ln|norm|wte|wpe|lm_head|b_[QKVO]|b_in|b_out|b_gate", key) for key in changed), changed
    with torch.no_grad():
        for p in d.model.parameters():
            p.zero_()
        assert (edited(tokens) - expected).abs().max() <= 1e-5
    assert all(torch.equal(site.weight, wanted[n].weight) for n, site in find_sites(edited).items())


@pytest.mark.parametrize(
    "name", [n for n in ("Bridge-gpt2", "Bridge-gpt2-compatible", "Bridge-llama", "Bridge-neox", "Bridge-gpt2-processed")]
)
def test_the_wrapped_model_holds_the_change_where_the_bridge_computes_with_its_weights(name):
    d = scrambled(name)
    edited = d.edited_model(remove={site: [0] for site in d.sites})
    own = {p.untyped_storage().data_ptr() for p in edited.original_model.parameters()}
    assert all(layout_of(edited).stored(site).untyped_storage().data_ptr() in own for site in d.sites)
    if name in ("Bridge-gpt2", "Bridge-gpt2-compatible"):
        fused = edited.original_model.transformer.h[0].attn._original_component.c_attn.weight
        sites = find_sites(edited, "blocks.0.attn.W_[QKV]")
        assert torch.equal(fused, torch.cat([site.weight for site in sites.values()], 1))


@pytest.mark.parametrize("name", [n for n in ("HT-standard", "HT-split", "Bridge-gpt2", "Bridge-gpt2-use_attn_in") if n in zoo.ALL])
def test_a_change_goes_together_with_masks_in_either_order(name):
    d, tokens = scrambled(name), zoo.tokens()
    on, cut = d.hooks({Q: torch.ones(()), OUT: torch.ones(())}, delta=1.0), d.ablate({Q: [1, 2], OUT: [3]})
    expected = run(d, tokens, cut)
    for hooks in (on + cut, cut + on):
        assert torch.allclose(run(d, tokens, hooks), expected, atol=1e-5)


@pytest.mark.parametrize("name", [n for n in ("HT-standard", "Bridge-gpt2") if n in zoo.ALL])
def test_a_copy_has_nothing_of_us_wherever_it_was(name):
    d, tokens = scrambled(name), zoo.tokens()
    clean = run(d, tokens, [])
    table = d.model.hook_dict if name.startswith("HT") else d.model._hook_registry
    table[f"{Q}.hook_spd_acts"] = HookPoint()
    ours = dict(d.ablate({Q: [0]}))

    guard = next(iter(ours.values()))
    d.model.blocks[1].register_forward_pre_hook(guard)
    with pytest.raises(RuntimeError, match="stop"):  # a pass that was broken off leaves a watch
        run(d, tokens, [*ours.items(), ("blocks.0.hook_resid_pre", lambda x, hook: (_ for _ in ()).throw(RuntimeError("stop")))])
    copy = d.edited_model()
    assert not any("hook_spd" in key for key in copy.hook_dict) and not copy.blocks[1]._forward_pre_hooks
    assert d.model.blocks[1]._forward_pre_hooks and not any("forward" in vars(m) for m in copy.modules())
    with torch.no_grad():
        assert torch.equal(copy(tokens), clean)


MLP = "blocks.0.mlp.W_in"


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda d: d.ablate({"blocks.0.attn.W_q": [0]}), "nearest: .*blocks.0.attn.W_Q"),
        (lambda d: d.keep({Q: [40]}), "subcomponent 40 was given; it has 0 … 39"),
        (lambda d: d.ablate({Q: [-1]}), "subcomponent -1"),
        (lambda d: d.ablate({Q: [0.5]}), "0.5 is no index"),
        (lambda d: d.ablate({Q: torch.tensor([True])}), "torch.bool"),
        (lambda d: d.ablate({Q: "3"}), "an index or a list"),
        (lambda d: d.ablate([Q]), "by a list"),
        (lambda d: d.ablate({Q: 0}, strength=float("nan")), "finite number"),
        (lambda d: d.ablate({Q: 0}, positions=[24]), "n_ctx is 24"),
        (lambda d: d.ablate({Q: 0}, positions=torch.ones(1, 2, 3)), r"broadcasts to \[b, s\]"),
        (lambda d: d.ablate({Q: 0}, positions=torch.tensor([[1, 2]])), "integer indices"),
        (lambda d: d.ablate({Q: 0}, examples=torch.tensor([0.5])), "integer indices"),
        (lambda d: d.project_out({Q: 0}, side="inputs"), "nearest: input"),
        (lambda d: d.rewire([((Q, 0), (MLP, 0))]), "between equal widths"),
        (lambda d: d.rewire([((Q, 0), (Q, 0))]), "named twice"),
        (lambda d: d.rewire([(Q, 0)]), "names no subcomponent"),
        (lambda d: d.rewire([3]), "give pairs"),
        (lambda d: d.rewire([((Q, [0, 1]), (Q, 2))]), "names 2 subcomponents"),
        (lambda d: d.rewire(set_output={(Q, 0): 3}), "W_O and W_out do"),
        (lambda d: d.rewire(set_output={(OUT, 0): 50}), "0 … 49"),
        (lambda d: d.rewire(set_output={(OUT, 0): "golf"}), "no tokenizer"),
        (lambda d: d.rewire(set_output={(OUT, 0): torch.ones(31)}), r"shape \[31\]; .*\[32\]"),
        (lambda d: d.rewire(set_output={(OUT, 0): [float("nan")] * 32}), "NaN"),
        (lambda d: d.rewire(set_output={(OUT, 0): object()}), "object is no output"),
        (lambda d: d.rewire(set_output=[(OUT, 0)]), "set_output is a list"),
        (lambda d: d.edited_model(remove={Q: 1}, set_output={(Q, 1): torch.ones(32)}), "named twice"),
    ],
)
def test_bad_input_is_refused_before_anything(untrained, call, message):
    with pytest.raises(SPDError, match=message):
        call(untrained)


@pytest.mark.parametrize(
    "where, message",
    [
        (dict(positions=[11]), r"\[11\] were chosen and the sequence has 0 … 10"),
        (dict(positions=[-12]), r"\[-12\]"),
        (dict(examples=[3]), "the batch has 0 … 2"),
        (dict(positions=torch.ones(3, 10)), r"broadcast to \[b, s\] = \[3, 11\]"),
        (dict(positions=torch.ones(2, 11)), r"shape \[2, 11\]"),
    ],
)
def test_what_only_the_pass_can_know_is_refused_there(untrained, tokens, where, message):
    clean = run(untrained, tokens, [])
    with pytest.raises(SPDError, match=message):
        run(untrained, tokens, untrained.ablate({Q: 0, MLP: 1}, **where))
    assert torch.equal(run(untrained, tokens, []), clean)


def test_a_token_as_text_has_to_be_one(monkeypatch):
    d = scrambled("Bridge-gpt2")
    ids = {" golf": [7], "Kobe": [3, 4]}
    monkeypatch.setattr(type(d.model), "tokenizer", property(lambda self: "some"))
    monkeypatch.setattr(type(d.model), "to_tokens", lambda self, text, prepend_bos=True: torch.tensor([ids[text]]))
    by_text, by_id = (run(d, zoo.tokens(), d.rewire(set_output={(OUT, 0): token})) for token in (" golf", 7))
    assert torch.equal(by_text, by_id)
    with pytest.raises(SPDError, match=r"is 2 tokens, \[3, 4\]"):
        d.rewire(set_output={(OUT, 0): "Kobe"})


@pytest.mark.parametrize("name", [n for n in ("HT-standard", "Bridge-native", "Bridge-gpt2") if n in zoo.ALL])
def test_tied_weights_are_refused(name):
    model = zoo.ALL[name]()
    first, second = (model.blocks[layer].mlp for layer in (0, 1))
    if name.startswith("HT"):
        second.W_in = first.W_in
    else:
        first, second = (getattr(mlp, "in")._modules["_original_component"] for mlp in (first, second))
        second.weight = first.weight
    d = decompose(model, zoo.tokens(4), SPDConfig(steps=0, subcomponents=24, init="random"), progress=False)
    before = find_sites(d.model)["blocks.0.mlp.W_in"].weight
    with pytest.raises(SPDError, match=r"shared with .*1.*tied"):
        d.edited_model(remove={"blocks.0.mlp.W_in": [1]})
    assert torch.equal(find_sites(d.model)["blocks.0.mlp.W_in"].weight, before)
    d.edited_model(remove={"blocks.0.mlp.W_out": [1]})


def test_a_model_of_another_shape_or_device_is_refused(untrained):
    d = scrambled("Bridge-native")
    d.sites[MLP] = replace(d.sites[MLP], weight=torch.zeros(32, 40), bias=torch.zeros(40))
    with pytest.raises(SPDError, match=r"is \[32, 48\] in this model and was \[32, 40\]"):
        d.edited_model(remove={MLP: [0]})
    d = scrambled("Bridge-native")
    d.components[Q].to("meta")
    with pytest.raises(SPDError, match="decomposition is on meta"):
        d.ablate({Q: 0})
