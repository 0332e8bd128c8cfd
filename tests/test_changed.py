"""A model that changed after it was decomposed: served right, or refused with the reason, in whatever is called. Never two versions of a weight."""

import pytest
import torch

from spd_lens import SPDConfig, SPDError, ablation_effects, attribution, decompose, find_sites, verify
from spd_lens.sites import held, layout_of
from tests import zoo

MODELS = [n for n in ("HT-standard", "HT-grouped", "Bridge-native", "Bridge-gpt2", "Bridge-llama", "Bridge-neox-processed") if n in zoo.ALL]
SITES = ["blocks.0.attn.W_Q", "blocks.1.attn.W_V", "blocks.0.attn.W_O", "blocks.0.mlp.W_in", "blocks.1.mlp.W_out"]
Q, IN = SITES[0], SITES[3]


def decomposed(name="HT-standard", model=None):
    model = model or zoo.ALL[name if name in zoo.ALL else "Bridge-native"]()
    return decompose(model, zoo.tokens(4), SPDConfig(steps=0, subcomponents=12, init="random", gate_width=2, sites=SITES), progress=False)


def ones(d):
    return {name: torch.ones(()) for name in d.sites}


def metric(logits):
    return logits.mean()


def everything(d, tokens, site=IN):
    """Every public call that runs the model or writes its weights; hooks on `site` that were made before the change are run after it."""
    cut, masked, without, moved = d.ablate({site: 1}), d.hooks(ones(d)), d.project_out({site: 0}), d.rewire([((site, 0), (site, 1))])

    def hooked(hooks):
        return lambda: d.model.run_with_hooks(tokens, fwd_hooks=hooks)

    def attached():
        with d.attached():
            d.model(tokens)

    return {
        "run": lambda: d.run(tokens, ones(d), delta=1.0),
        "observe": lambda: d.observe(tokens),
        "importances": lambda: d.importances(tokens),
        "attached": attached,
        "run_with_cache": lambda: d.run_with_cache(tokens),
        "the hooks of masks": hooked(masked),
        "those of ablate": hooked(cut),
        "those of project_out": hooked(without),
        "those of rewire": hooked(moved),
        "hooks": lambda: d.hooks(ones(d)),
        "ablate": lambda: d.ablate({site: 1}),
        "keep": lambda: d.keep({site: 1}),
        "project_out": lambda: d.project_out({site: 1}),
        "rewire": lambda: d.rewire([((site, 0), (site, 1))]),
        "edited_model": lambda: d.edited_model(remove={site: 1}),
        "verify": lambda: verify(d, tokens),
        "attribution": lambda: attribution(d, tokens, metric),
        "ablation_effects": lambda: ablation_effects(d, tokens, metric, chosen=[(site, 0)], progress=False),
    }


def refused(calls, message):
    for what, call in calls.items():
        with pytest.raises(SPDError, match=message):
            call()
            pytest.fail(f"{what} took no notice")


def data(model, name):
    """The matrix as the model has it, with no version that tells of a change: what `.data` is to a parameter."""
    return layout_of(model).stored(name).data


@torch.no_grad()
def one_entry(d):
    data(d.model, IN)[3, 5] += 1e-3


@torch.no_grad()
def another_checkpoint(d):
    d.model.load_state_dict({k: v * 3 for k, v in d.model.state_dict().items()})


@torch.no_grad()
def an_optimiser(d):
    weight = next(p for p in d.model.blocks[0].mlp.parameters() if p.ndim == 2)
    weight.requires_grad_().grad = torch.ones_like(weight)
    torch.optim.SGD([weight], 0.1).step()


def another_block(d):
    """The modules of the second block in the first."""
    first, second = (block.mlp for block in d.model.blocks)
    if type(d.model).__name__ == "HookedTransformer":
        d.model.blocks[0].mlp = second
    else:
        getattr(first, "in")._modules["_original_component"] = getattr(second, "in")._modules["_original_component"]


def assigned_data(d):
    owner = d.model.blocks[0].mlp
    parameter = next(p for p in owner.parameters() if p.ndim == 2)
    parameter.data = parameter.data * 2


CHANGES = [one_entry, another_checkpoint, an_optimiser, another_block, assigned_data]


@pytest.mark.parametrize("change", CHANGES)
def test_every_call_refuses_other_weights(change):
    d, tokens = decomposed(), zoo.tokens(2, 6)
    calls = everything(d, tokens)
    change(d)
    refused(calls, "another matrix than was decomposed.*Give the model its weights back, or decompose")


class Adapted(torch.nn.Linear):
    """As adapters are: the weight is shown as it was, and more is computed."""

    def forward(self, x):
        return super().forward(x) + x.sum(-1, keepdim=True)


@pytest.mark.parametrize("name", ["Bridge-native", "Bridge-llama"])
def test_another_module_with_the_same_weight_is_noticed(name):
    d, tokens = decomposed(name), zoo.tokens(2, 6)
    calls = everything(d, tokens)
    linear = getattr(d.model.blocks[0].mlp, "in")._modules["_original_component"]
    linear.__class__ = Adapted
    refused(calls, f"{IN} was computed by Linear when it was decomposed and is by Adapted now")
    linear.__class__ = torch.nn.Linear
    torch.nn.utils.parametrizations.weight_norm(linear)
    with pytest.raises(SPDError, match=f"{IN} "):
        d.run(tokens, ones(d))


@pytest.mark.parametrize("name", ["Bridge-native", "Bridge-llama"])
def test_hooks_that_the_pass_does_not_come_by_are_an_error(name):
    """A block may be given another MLP behind TransformerBridge's back: hooks on the old one would do nothing, silently."""
    d, tokens = decomposed(name), zoo.tokens(2, 6)
    hooks = d.ablate({IN: range(6)})
    d.model.blocks[0]._modules["_original_component"].mlp = torch.nn.Identity()
    with pytest.raises(SPDError, match=f"{IN}: the model's forward pass did not come by"):
        d.model.run_with_hooks(tokens, fwd_hooks=hooks)
    with pytest.raises(SPDError, match="did not come by"), d.attached():
        d.model.run_with_cache(tokens, names_filter=f"{IN}.hook_spd_ci")


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("site", SITES)
def test_one_entry_of_any_kind_of_matrix_is_noticed_and_given_back(name, site):
    d, tokens = decomposed(name), zoo.tokens(2, 6)
    cut, clean = d.ablate({site: range(6)}), d.model(tokens)
    ablated, stored = d.model.run_with_hooks(tokens, fwd_hooks=cut), data(d.model, site)
    before = stored.flatten()[7].clone()
    at = tuple(int(i) for i in torch.unravel_index(torch.tensor(7), stored.shape))
    stored[at] *= 1.5
    for call in (lambda: d.run(tokens, {IN: torch.ones(())}), lambda: d.model.run_with_hooks(tokens, fwd_hooks=cut)):
        with pytest.raises(SPDError, match=f"{site} is another matrix"):
            call()
    stored[at] = before
    assert torch.equal(d.model.run_with_hooks(tokens, fwd_hooks=cut), ablated) and torch.equal(d.model(tokens), clean)
    assert torch.allclose(d.run(tokens, ones(d), delta=1.0), clean, atol=1e-4)


@pytest.mark.parametrize("name", MODELS)
def test_a_site_is_a_copy_whatever_the_model_does(name):
    model = zoo.ALL[name]()
    sites = find_sites(model)
    before = {n: (s.weight.clone(), None if s.bias is None else s.bias.clone()) for n, s in sites.items()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2)
    for n, (weight, bias) in before.items():
        assert torch.equal(sites[n].weight, weight) and (bias is None or torch.equal(sites[n].bias, bias))
        assert not torch.equal(find_sites(model, n)[n].weight, weight)


def test_a_bias_that_changed_is_noticed():
    """`fold_value_biases` moves b_V into b_O: W_V and W_O stay, and masked ones would be given the bias that is there no more."""
    d, tokens = decomposed(), zoo.tokens(2, 6)
    calls = everything(d, tokens, Q)
    with torch.no_grad():
        bias = d.model.blocks[0].attn.b_Q
        bias.add_(0.1)
        if not torch.equal(d.model.blocks[0].attn.b_Q, bias):
            pytest.skip("this class shows a copy of its bias")
    refused(calls, "its bias is another")


@pytest.mark.skipif("HT-standard" not in zoo.ALL, reason="HookedTransformer's own methods")
@pytest.mark.parametrize(
    "process, message",
    [
        (dict(fold_ln=True, center_writing_weights=False, center_unembed=False, fold_value_biases=False), "another matrix"),
        (dict(fold_ln=False, center_writing_weights=True, center_unembed=False, fold_value_biases=False), "another matrix"),
        (dict(fold_ln=False, center_writing_weights=False, center_unembed=False, fold_value_biases=True), "its bias"),
        (dict(fold_ln=False, center_writing_weights=False, center_unembed=True, fold_value_biases=False), None),
    ],
)
def test_folding_and_centring_of_a_hooked_transformer(process, message):
    d, tokens = decomposed("HT-standard"), zoo.tokens(2, 6)
    d.model.load_and_process_state_dict(d.model.state_dict(), **process)
    if message is None:  # the unembedding is no site: nothing of what was decomposed changed
        assert torch.allclose(d.run(tokens, ones(d), delta=1.0), d.model(tokens), atol=1e-4)
    else:
        with pytest.raises(SPDError, match=message):
            d.run(tokens, ones(d), delta=1.0)


@pytest.mark.parametrize("name", ["Bridge-gpt2", "Bridge-llama", "Bridge-neox"])
@pytest.mark.parametrize("processing", [True, False])
def test_compatibility_mode_after_decomposing(name, processing):
    d, tokens = decomposed(name), zoo.tokens(2, 6)
    d.model.enable_compatibility_mode(no_processing=not processing)
    if processing:
        with pytest.raises(SPDError, match="was decomposed|its bias"):
            d.run(tokens, ones(d), delta=1.0)
    else:
        assert torch.allclose(d.run(tokens, ones(d), delta=1.0), d.model(tokens), atol=1e-4)


FLAGS = ("use_split_qkv_input", "use_attn_in", "use_attn_result", "use_hook_mlp_in")


@pytest.mark.parametrize("name", [n for n in ("HT-standard", "Bridge-gpt2", "Bridge-llama") if n in zoo.ALL])
@pytest.mark.parametrize("flag", FLAGS)
def test_flags_are_served_as_they_stand(name, flag):
    """Calls follow a flag; hooks that were made before it act as they did, or are refused."""
    d, tokens = decomposed(name), zoo.tokens(2, 6)
    chosen = {site: range(6) for site in d.sites}
    clean, ablated = d.model(tokens), d.model.run_with_hooks(tokens, fwd_hooks=d.ablate(chosen))
    for value in (True, False):
        old = [(d.ablate({site: range(6)}), d.model.run_with_hooks(tokens, fwd_hooks=d.ablate({site: range(6)}))) for site in d.sites]
        masked = d.hooks(ones(d), delta=1.0)
        getattr(d.model, f"set_{flag}")(value)
        assert torch.allclose(d.run(tokens, ones(d), delta=1.0), clean, atol=1e-4)
        assert torch.allclose(d.model.run_with_hooks(tokens, fwd_hooks=d.ablate(chosen)), ablated, atol=1e-4)
        for hooks, expected in [*old, (masked, clean)]:
            try:
                got = d.model.run_with_hooks(tokens, fwd_hooks=hooks)
            except (SPDError, ValueError, AssertionError) as error:  # TransformerLens refuses a hook on a point that it will not call
                assert "make the hooks again" in str(error) or f"{flag} is False" in str(error)
            else:
                assert torch.allclose(got, expected, atol=1e-4)


@pytest.mark.parametrize("name", [n for n in ("HT-standard", "Bridge-gpt2") if n in zoo.ALL])
def test_hooks_on_a_point_that_is_not_called_any_more_are_refused(name):
    """Without a look at the flags they would do nothing, silently."""
    d, tokens = decomposed(name), zoo.tokens(2, 6)
    d.model.set_use_attn_result(True)
    with d.attached({"blocks.0.attn.W_O": torch.zeros(())}, 0.0):
        d.model.set_use_attn_result(False)
        with pytest.raises(SPDError, match="blocks.0.attn.W_O: the model's flags were changed"):
            d.model(tokens)


@pytest.mark.skipif("HT-grouped" not in zoo.ALL, reason="a flag of HookedTransformer's")
def test_ungrouped_keys_are_refused():
    d, tokens = decomposed("HT-grouped"), zoo.tokens(2, 6)
    calls = everything(d, tokens, "blocks.1.attn.W_V")
    d.model.set_ungroup_grouped_query_attention(True)
    refused(calls, r"W_V cannot be reached any more: its heads are repeated.*grouped_query_attention\(False\)")
    with pytest.raises(SPDError, match=r"W_K cannot be decomposed: its heads are repeated"):
        find_sites(d.model)
    d.model.set_ungroup_grouped_query_attention(False)
    assert torch.allclose(d.run(tokens, ones(d), delta=1.0), d.model(tokens), atol=1e-4)


@pytest.mark.parametrize("name", [n for n in ("HT-standard", "Bridge-native", "Bridge-gpt2") if n in zoo.ALL])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_another_dtype_is_refused_and_float32_mends_what_was_not_rounded(name, dtype, tmp_path):
    d, tokens = decomposed(name), zoo.tokens(2, 6)
    calls, folder = everything(d, tokens), d.save(tmp_path / "saved")
    d.model.to(dtype)
    refused(calls, rf"was torch.float32 when it was decomposed and is {dtype} now; call model.to\(torch.float32\)")
    if dtype == torch.bfloat16:
        with pytest.raises(SPDError, match=r"learnt in float32. Convert the model with model.to\(torch.float32\)"):
            type(d).load(folder, d.model)
    d.model.to(torch.float32)
    if dtype == torch.float64:
        assert torch.allclose(d.run(tokens, ones(d), delta=1.0), d.model(tokens), atol=1e-4)
    else:
        refused(calls, "another matrix")


def test_dropout_that_was_switched_on_is_refused():
    """Importances, losses and effects would be of another model in each pass."""
    d, tokens = decomposed("Bridge-gpt2"), zoo.tokens(2, 6)
    calls = everything(d, tokens)
    d.model.train()
    refused(
        {what: calls[what] for what in ("run", "observe", "importances", "verify", "attribution", "ablation_effects")},
        r"call model.eval\(\)",
    )
    d.model.eval()
    d.observe(tokens)


def test_another_device_is_refused_site_by_site():
    d, tokens = decomposed(), zoo.tokens(2, 6)
    d.model.blocks[1].to("meta")
    with pytest.raises(SPDError, match="the model is on meta and the decomposition is on cpu|meta device"):
        d.observe(tokens)


def test_training_does_not_look_and_what_comes_after_does(model, tokens, monkeypatch):
    """Thousands of passes go without; one look at a matrix costs about what a pass of two tokens through it does."""
    d = decomposed()
    looked = []
    real = layout_of(d.model).__class__.stored
    monkeypatch.setattr(layout_of(d.model).__class__, "stored", lambda self, name: looked.append(name) or real(self, name))
    with held(d.sites.values()):
        d.run(tokens, ones(d))
    assert not looked
    d.run(tokens, ones(d))
    assert sorted(looked) == sorted(d.sites)
