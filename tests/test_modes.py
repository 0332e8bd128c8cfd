"""The modes that a notebook runs in: whichever holds, a public function gives the same figures, and leaves the mode as it was."""

import ast
import gc
import threading
from contextlib import contextmanager, nullcontext
from inspect import getmembers, isfunction
from pathlib import Path

import pandas as pd
import pytest
import torch
from torch import Tensor

import spd_lens
from spd_lens import Decomposition, SPDConfig, SPDError, answer_logit
from spd_lens.report import decomposition_page
from spd_lens.tasks import induction
from tests import zoo

OUT, IN = "blocks.1.mlp.W_out", "blocks.0.mlp.W_in"
SHORT = SPDConfig(steps=3, subcomponents=32, batch_size=4, gate_width=4, retire_at=(0.5,))


@contextmanager
def gradients_off():
    torch.set_grad_enabled(False)
    try:
        yield
    finally:
        torch.set_grad_enabled(True)


@contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def default_device():
    torch.set_default_device("meta")  # stands for any that is not the model's
    try:
        yield
    finally:
        torch.set_default_device(None)


MODES = {
    "gradients off": gradients_off,
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "default dtype float64": lambda: default_dtype(torch.float64),
    "default dtype bfloat16": lambda: default_dtype(torch.bfloat16),
    "default device": default_device,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
}


def modes():
    """What must be as it was."""
    return (
        torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.get_default_dtype(), torch.get_default_device(), torch.is_autocast_enabled("cpu"),
        torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled(), torch.utils.deterministic.fill_uninitialized_memory,
        torch.get_num_threads(), torch.initial_seed(),
    )  # fmt: skip


# --- every public name, called ---


class World:
    """A decomposition on its model, tokens and a folder."""

    def __init__(self, d, folder):
        self.d, self.model, self.tokens, self.folder = d, d.model, zoo.tokens(4), folder
        self.masks = {name: torch.full((), 0.5) for name in d.sites}
        self.saved = d.save(folder / "saved")
        self.chosen = {IN: [0, 3], OUT: [1]}

    def after(self, hooks):
        """The model's logits with hooks, with gradients all the way: what was made in a mode is used outside."""
        with torch.enable_grad():
            logits = self.model.run_with_hooks(self.tokens, fwd_hooks=hooks)
            logits.sum().backward()
        self.model.zero_grad()
        return logits

    def trainable(self, d):
        """What a new decomposition shows, and that it can be learnt on."""
        with torch.enable_grad():
            d.run(self.tokens, d.importances(self.tokens)).sum().backward()
        assert all(c.V.grad is not None for c in d.components.values())
        return d.state(), d.observe(self.tokens)


def attached(w):
    with w.d.attached(w.masks, delta=0.0) as model, torch.autocast("cpu", enabled=False):  # the pass is the user's own
        return model(w.tokens)


CALLS = {  # name → what is called in the mode, and what is looked at outside of it
    "find_sites": (lambda w: spd_lens.find_sites(w.model), lambda w, sites: [(site.weight, site.bias) for site in sites.values()]),
    "decompose": (lambda w: spd_lens.decompose(w.model, w.tokens, SHORT, progress=False), World.trainable),
    "observe": (lambda w: w.d.observe(w.tokens), None),
    "importances": (lambda w: w.d.importances(w.tokens), None),
    "run": (lambda w: w.d.run(w.tokens, w.masks, delta=0.3), None),
    "hooks": (lambda w: w.d.hooks(w.masks), World.after),
    "attached": (attached, lambda w, logits: logits.clone()),
    "run_with_cache": (lambda w: w.d.run_with_cache(w.tokens)[1][f"{IN}.hook_spd_ci"], None),
    "ablate": (lambda w: w.d.ablate(w.chosen, positions=[1, -1]), World.after),
    "keep": (lambda w: w.d.keep(w.chosen), World.after),
    "project_out": (lambda w: w.d.project_out(w.chosen, "input") + w.d.project_out(w.chosen, "output"), World.after),
    "rewire": (lambda w: w.d.rewire([((OUT, 1), (OUT, 2))], {(OUT, 3): [0.5] * 32}, calibrate_on=w.tokens), World.after),
    "edited_model": (lambda w: w.d.edited_model(w.chosen), lambda w, model: model(w.tokens)),
    "save": (lambda w: w.d.save(w.folder / "again"), lambda w, folder: Decomposition.load(folder, w.model).state()),
    "load": (lambda w: Decomposition.load(w.saved, w.model), World.trainable),
    "share_left": (lambda w: [w.d.share_left(name) for name in w.d.sites], None),
    "repr": (lambda w: repr(w.d) + repr(w.d.sites[IN]), None),
    "census": (lambda w: spd_lens.census(w.d, w.tokens, {"one": torch.ones(4, dtype=torch.long, device="cpu")}), None),
    "verify": (lambda w: spd_lens.verify(w.d, w.tokens), None),
    "advise": (lambda w: spd_lens.advise(w.d, w.tokens), None),
    "describe": (lambda w: spd_lens.describe(w.d, w.tokens, w.chosen), None),
    "pair_attention": (lambda w: spd_lens.pair_attention(w.d, w.tokens[:1], 0), None),
    "attribution": (lambda w: spd_lens.attribution(w.d, w.tokens, answer_logit(3)), None),
    "attribution_patching": (lambda w: spd_lens.attribution_patching(w.d, w.tokens, w.tokens.flip(0), answer_logit(3)), None),
    "activation_patching": (
        lambda w: spd_lens.activation_patching(w.d, w.tokens, w.tokens.flip(0), answer_logit(3), w.chosen, progress=False),
        None,
    ),
    "ablation_effects": (
        lambda w: spd_lens.ablation_effects(w.d, w.tokens, answer_logit(3), w.chosen, per_position=True, progress=False),
        None,
    ),
    "cut_costs": (lambda w: spd_lens.cut_costs(w.d, w.tokens, w.chosen), None),
    "circuit_graph": (lambda w: spd_lens.circuit_graph(w.d, w.tokens[:1], answer_logit(3), 8, 12), None),
    "token_labels": (lambda w: spd_lens.token_labels(w.model, w.tokens[0]), None),
    "write_report": (lambda w: decomposition_page(w.d, w.tokens, most=4), None),  # which writes this page
}
NO_FIGURES = {  # classes and what touches no tensor
    "answer_logit", "name_tokens", "viz", "tokens", "parameters", "state", "trace", "importance_logits", "run_many", "first_layer", "check_chosen", "check_masks",
}  # fmt: skip


def test_every_public_name_is_tried():
    functions = {name for name in spd_lens.__all__ if isfunction(getattr(spd_lens, name))}
    methods = {name for name, _ in getmembers(Decomposition, isfunction) if not name.startswith("_")}
    assert functions | methods - NO_FIGURES <= set(CALLS) | NO_FIGURES | {"diagnose"}


def leaves(value):
    """Everything in a result that can be compared."""
    if isinstance(value, Tensor):
        assert not value.is_inference()
        return [value.detach()]
    if isinstance(value, pd.DataFrame):
        return [value.to_csv()]
    if isinstance(value, dict):
        return [leaf for key, one in value.items() for leaf in [key, *leaves(one)]]
    if isinstance(value, (list, tuple)):
        return [leaf for one in value for leaf in leaves(one)]
    if hasattr(value, "__dataclass_fields__"):
        return [leaf for name in value.__dataclass_fields__ for leaf in leaves(getattr(value, name))]
    return [value]


def same(found, expected):
    found, expected = leaves(found), leaves(expected)
    assert len(found) == len(expected)
    for one, other in zip(found, expected):
        if isinstance(one, Tensor):
            assert one.dtype == other.dtype and one.device == other.device
            torch.testing.assert_close(one, other, rtol=0, atol=0)
        else:
            assert one == other or (one != one and other != other)


BUILDS = {"Bridge": zoo.native, **({} if zoo.HookedTransformer is None else {"HT": lambda: zoo.hooked(normalization_type="LN")})}


@pytest.fixture(scope="module", params=list(BUILDS))
def world(request, tmp_path_factory):
    model = BUILDS[request.param]()
    d = spd_lens.decompose(model, zoo.tokens(8), SHORT.replace(steps=6), progress=False)
    return World(d, tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def expected(world):
    """In plain daylight, each once."""
    found = {}

    def of(name):
        if name not in found:
            call, look = CALLS[name]
            made = call(world)
            found[name] = made if look is None else look(world, made)
        return found[name]

    return of


@pytest.mark.parametrize("mode", list(MODES))
@pytest.mark.parametrize("name", list(CALLS))
@pytest.mark.filterwarnings("ignore:.*subcomponents for a matrix of rank", "ignore:In CPU autocast")
def test_the_same_figures_in_every_mode(world, expected, name, mode):
    wanted = expected(name)
    call, look = CALLS[name]
    flags = [p.requires_grad for p in world.model.parameters()]
    with MODES[mode]():
        before = modes()
        made = call(world)
        assert modes() == before
    assert [p.requires_grad for p in world.model.parameters()] == flags
    same(made if look is None else look(world, made), wanted)
