"""The modes that a notebook runs in: whichever holds, a public function gives the same figures, and leaves the mode as it was."""

import ast
import copy
import threading
from contextlib import ExitStack, contextmanager
from inspect import getmembers, isfunction
from pathlib import Path

import pandas as pd
import pytest
import torch
from torch import Tensor

import spd_lens
from spd_lens import Decomposition, SPDConfig, SPDError, answer_logit, viz
from spd_lens.guards import reproducible
from spd_lens.report import decomposition_page
from spd_lens.tasks import induction
from tests import zoo

OUT, IN = "blocks.1.mlp.W_out", "blocks.0.mlp.W_in"
SHORT = SPDConfig(sites=(IN, OUT, "blocks.0.attn.W_[QK]"), steps=3, subcomponents=6, batch_size=2, gate_width=2, retire_at=(0.5,))
pytestmark = pytest.mark.filterwarnings("ignore:.*subcomponents for a matrix of rank", "ignore:In CPU autocast")


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


@contextmanager
def at_once(*entered):
    with ExitStack() as stack:
        for mode in entered:
            stack.enter_context(mode())
        yield


MODES = {  # several at once, since a call takes its time: what one of them breaks shows in their company
    "gradients off, default dtype float64": lambda: at_once(gradients_off, lambda: default_dtype(torch.float64)),
    "inference_mode, autocast, default dtype bfloat16, default device": lambda: at_once(
        torch.inference_mode, lambda: torch.autocast("cpu", torch.bfloat16), lambda: default_dtype(torch.bfloat16), default_device
    ),
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
        self.d, self.model, self.tokens, self.folder = d, d.model, zoo.tokens(2, 6), folder
        self.masks = {name: torch.full((), 0.5) for name in d.sites}
        self.saved = d.save(folder / "saved")
        self.chosen = {IN: [0, 3], OUT: [1]}
        self.hooks = d.ablate(self.chosen)

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
    "look": (lambda w: w.d.look(w.d.batch(w.tokens)), None),
    "batch": (lambda w: w.d.batch(w.tokens).ids, None),
    "masked": (lambda w: w.d.masked(w.d.batch(w.tokens), w.masks, delta=0.3), None),
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
    "census": (lambda w: spd_lens.census(w.d, w.tokens, {"one": torch.ones(2, dtype=torch.long, device="cpu")}), None),
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
    "recovered": (
        lambda w: spd_lens.recovered(w.d, {IN: (w.d.components[IN].V.detach()[:, :2], w.d.components[IN].U.detach()[:2])}, w.tokens),
        None,
    ),
    "similarity": (lambda w: spd_lens.similarity(w.d, w.d, w.tokens), None),
    "cut_costs": (lambda w: spd_lens.cut_costs(w.d, w.tokens, w.chosen), None),
    "output_change": (lambda w: viz.output_change(w.model, w.tokens[:1], w.hooks).to_json(), None),
    "circuit_graph": (lambda w: spd_lens.circuit_graph(w.d, w.tokens[:1], answer_logit(3), 4, 6), None),
    "token_labels": (lambda w: spd_lens.token_labels(w.model, w.tokens[0]), None),
    "write_report": (lambda w: decomposition_page(w.d, w.tokens, most=4), None),  # which writes this page
}
NO_FIGURES = {  # classes and what touches no tensor
    "answer_logit", "name_tokens", "viz", "parameters", "state", "trace", "importance_logits", "run_many", "first_layer", "check_chosen", "check_masks", "check_model",
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


KINDS = ["own", "Bridge"]  # the class that this transformer-lens has of its own, if any


@pytest.fixture(scope="module")
def world(request, tmp_path_factory):
    other = getattr(request, "param", "own") == "Bridge" or zoo.HookedTransformer is None
    model = zoo.native() if other else zoo.hooked(normalization_type="LN")
    with pytest.warns(UserWarning, match="rank"):
        d = spd_lens.decompose(model, zoo.tokens(4, 6), SHORT, progress=False)
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


BY_CLASS = {
    "find_sites",
    "run",
    "hooks",
    "attached",
    "run_with_cache",
    "edited_model",
    "load",
    "attribution",
    "ablation_effects",
}  # what differs


@pytest.mark.parametrize("mode", list(MODES))
@pytest.mark.parametrize(
    ("world", "name"), [(kind, name) for kind in KINDS for name in CALLS if kind == "own" or name in BY_CLASS], indirect=["world"]
)
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


def test_what_is_switched_is_given_back_after_an_error_too(world):
    for mode in MODES.values():
        with mode():
            before = modes()
            with pytest.raises(SPDError, match="is not decomposed here"):
                world.d.ablate({"blocks.0.mlp.W_inn": [0]})
            with pytest.raises(ZeroDivisionError):
                spd_lens.attribution(world.d, world.tokens, lambda logits: 1 / 0)
            assert modes() == before


def test_diagnose_in_every_mode():
    model = induction.build_target(0)
    d = spd_lens.decompose(model, induction.sequences(8, torch.Generator()).tokens, induction.config(steps=0), progress=False)
    test = induction.sequences(16, torch.Generator().manual_seed(1)).select(torch.arange(16))
    wanted = spd_lens.diagnose(d, test.tokens, test.positions, test.answers, induction.SPECIAL, draws=1)
    for mode in MODES.values():
        with mode():
            again = induction.sequences(16, torch.Generator().manual_seed(1))
            assert torch.equal(again.tokens, test.tokens) and torch.equal(again.positions["random"], test.positions["random"])
            found = spd_lens.diagnose(d, test.tokens, test.positions, test.answers, induction.SPECIAL, draws=1)
        same(found, wanted)


def test_run_keeps_the_gradients_that_are_on_and_makes_none_that_are_off(world):
    mask = {IN: torch.ones(6, requires_grad=True)}
    assert world.d.run(world.tokens, mask).requires_grad
    with torch.inference_mode():
        made = world.d.run(world.tokens, {IN: torch.ones(6)})
    assert not made.requires_grad and not made.is_inference()


# --- inference_mode: what was made there ---


def test_tokens_made_in_inference_mode_are_ordinary_tokens(world):
    with torch.inference_mode():
        tokens = world.tokens.clone()
    same(spd_lens.verify(world.d, tokens), spd_lens.verify(world.d, world.tokens))
    spd_lens.decompose(world.model, tokens, SHORT.replace(steps=1), progress=False)


def test_a_model_made_in_inference_mode_is_looked_at_and_not_learnt_on(world):
    with torch.inference_mode():
        model = zoo.native()
    d = Decomposition(model, spd_lens.find_sites(model, list(world.d.sites)), world.d.components, world.d.gates, world.d.config)
    d.observe(world.tokens)
    for call in (lambda: spd_lens.decompose(model, world.tokens, SHORT, progress=False), lambda: spd_lens.verify(d, world.tokens)):
        with pytest.raises(SPDError, match=r"made under torch.inference_mode\(\).*copy.deepcopy\(model\)"):
            call()
    spd_lens.decompose(copy.deepcopy(model), world.tokens, SHORT.replace(steps=1), progress=False)


def test_what_an_importance_function_remembers_of_inference_mode_is_no_inference_tensor(world):
    d = Decomposition.load(world.saved, world.model)
    for gate in d.gates.values():
        gate.alive[0] = 0
    with torch.inference_mode(), d.attached():
        d.model.run_with_hooks(world.tokens, fwd_hooks=[(f"{IN}.hook_spd_ci", lambda tensor, hook: None)])
    inputs = d.trace(world.tokens).inputs
    sum(z.sum() for z in d.importance_logits(inputs)[1].values()).backward()


# --- float64 models ---


@pytest.mark.parametrize("name", sorted({*CALLS} - {"find_sites", "token_labels", "repr"}))
def test_a_float64_model_is_served_in_float64(doubled, name):
    call, look = CALLS[name]
    made = call(doubled)
    found = leaves(made if look is None else look(doubled, made))
    assert not any(one.dtype == torch.float32 for one in found if isinstance(one, Tensor))


@pytest.fixture(scope="module")
def doubled(tmp_path_factory):
    d = spd_lens.decompose(zoo.native().double(), zoo.tokens(4, 6), SHORT, progress=False)
    return World(d, tmp_path_factory.mktemp("doubled"))


def test_a_float64_model_has_the_precision_of_one(doubled):
    d, tokens = doubled.d, doubled.tokens
    original = d.observe(tokens).logits
    whole = d.run(tokens, {name: torch.ones(()) for name in d.sites}, delta=torch.ones(2, 1, 1))
    assert float((whole - original).detach().abs().max()) < 1e-12
    graph = spd_lens.circuit_graph(d, tokens[:1], lambda logits: logits.sum(), 4, 40)
    site, c, p = graph.nodes.loc[0, ["site", "subcomponent", "position"]]
    cut = d.model.run_with_hooks(tokens[:1], fwd_hooks=d.ablate({site: [int(c)]}, positions=[int(p)])).sum()
    assert abs(float(cut.detach()) - graph.metric - graph.nodes.loc[0, "exact"]) < 1e-12


# --- threads ---


def in_thread(work):
    """What it gives or raises, from another thread; a minute at most."""
    found = []

    def run():
        try:
            found.append(work())
        except BaseException as error:
            found.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(60)
    assert found, "the thread waits"
    return found[0]


def test_two_threads_take_turns(world):
    """One of them is held up in the middle of a pass with its hooks on."""
    d, tokens = world.d, world.tokens
    within, clean, zero = threading.Event(), d.observe(tokens).logits, {name: torch.zeros(()) for name in d.sites}
    cut = d.run(tokens, zero)
    found = {}

    def hold(tensor, hook):
        if threading.current_thread() is first:
            within.set()
            found["early"] = other.join(0.3) or "logits" in found

    def one():
        found["cut"] = d.run(tokens, zero)

    def another():
        within.wait(10)
        found["logits"] = d.observe(tokens).logits

    first, other = threading.Thread(target=one), threading.Thread(target=another)
    with d.model.hooks(
        fwd_hooks=[("blocks.1.hook_resid_pre" if "blocks.1.hook_resid_pre" in d.model.hook_dict else "blocks.1.hook_in", hold)]
    ):
        other.start()
        first.start()
        first.join(60)
        other.join(60)
    assert found["early"] is False
    same([found["cut"], found["logits"]], [cut, clean])


def test_another_thread_is_told_of_what_lasts(world):
    d, tokens = world.d, world.tokens
    with d.attached():
        d.observe(tokens)  # this thread may
        assert isinstance(in_thread(lambda: repr(d)), str)  # runs nothing
        error = in_thread(lambda: spd_lens.census(d, tokens))
        assert isinstance(error, SPDError) and "the model is attached" in str(error) and "in another thread" in str(error)
    same(in_thread(lambda: d.observe(tokens).logits), d.observe(tokens).logits)
    said = []
    spd_lens.decompose(
        d.model, tokens, SHORT.replace(steps=1), progress=False, callbacks=[lambda step: said.append(in_thread(lambda: d.observe(tokens)))]
    )
    assert isinstance(said[0], SPDError) and "is being decomposed in another thread" in str(said[0])
    in_thread(lambda: d.observe(tokens).logits)


def test_a_context_that_is_left_anywhere_gives_the_model_back(world):
    def leave_open():
        context = world.d.attached()
        context.__enter__()
        return context

    context = in_thread(leave_open)
    with pytest.raises(SPDError, match="attached"):
        world.d.observe(world.tokens)
    context.__exit__(None, None, None)  # in this thread
    world.d.observe(world.tokens)


def test_deterministic_sums_are_given_back_by_the_last_of_several_threads():
    assert not torch.are_deterministic_algorithms_enabled()
    first, second = reproducible(), reproducible()
    first.__enter__()
    in_thread(second.__enter__)
    first.__exit__(None, None, None)
    assert torch.are_deterministic_algorithms_enabled()  # the other is at work
    in_thread(lambda: second.__exit__(None, None, None))
    assert not torch.are_deterministic_algorithms_enabled() and torch.utils.deterministic.fill_uninitialized_memory


def test_decomposing_in_overlapping_threads_gives_what_it_gives_alone():
    tokens = zoo.tokens(4, 6)

    def work(d):
        return spd_lens.decompose(d, tokens, SHORT.replace(sites="*", steps=3), progress=False).state()

    models, found = [zoo.native(n_layers=1, attn_only=True) for _ in range(2)], {}
    threads = [threading.Thread(target=lambda i=i: found.__setitem__(i, work(models[i]))) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not torch.are_deterministic_algorithms_enabled()
    wanted = work(zoo.native(n_layers=1, attn_only=True))
    for i in range(2):
        same(found[i], wanted)


# --- compiled ---


def compiled_parts():
    def by_method(model):
        model.blocks[0].mlp.compile(backend="eager")

    def wrapped(model):
        model.blocks[0].mlp = torch.compile(model.blocks[0].mlp, backend="eager")

    def forward(model):
        model.blocks[1].forward = torch.compile(model.blocks[1].forward, backend="eager")

    def whole(model):
        model.compile(backend="eager")

    return {"model.blocks.0.mlp": by_method, "model.blocks.0.mlp ": wrapped, "model.blocks.1": forward, "model": whole}


@pytest.mark.parametrize("place", list(compiled_parts()))
def test_a_compiled_part_is_named(place, tokens):
    model = zoo.hooked(normalization_type="LN") if zoo.HookedTransformer is not None else zoo.native()
    d = spd_lens.decompose(model, tokens, SHORT.replace(steps=0), progress=False)
    compiled_parts()[place](model)
    for call in (
        lambda: spd_lens.decompose(model, tokens, SHORT, progress=False),
        lambda: d.run(tokens, {IN: torch.zeros(())}),
        lambda: d.ablate({IN: [0]}),
    ):
        with pytest.raises(SPDError, match=" was compiled") as error:
            call()
        assert (
            str(error.value).replace("._original_component", "").startswith(f"{place.strip()} was")
        )  # a bridge's module lies in what it wraps


def test_what_the_message_says_of_a_compiled_model_mends_it(tokens):
    model = zoo.native()
    with pytest.raises(SPDError, match=r"take model._orig_mod"):
        spd_lens.decompose(torch.compile(model, backend="eager"), tokens, SHORT, progress=False)
    model.blocks[0].mlp.compile(backend="eager")
    with pytest.raises(SPDError, match=r"give copy.deepcopy\(model\)"):
        spd_lens.find_sites(model)
    spd_lens.decompose(copy.deepcopy(model), tokens, SHORT.replace(steps=0), progress=False)


# --- the source ---


MADE = {"zeros", "ones", "tensor", "as_tensor", "arange", "eye", "rand", "randn", "randint", "randperm", "empty", "full", "linspace"}
INTEGERS = {"arange", "randint", "randperm", "tensor", "as_tensor"}  # whose type follows from what they are given


def test_every_tensor_is_made_on_a_named_device_and_of_a_named_type():
    """Else it is of whatever the default device and type are at that moment. `importance` makes its parameters inside `with x.device`, planted models
    are built inside `guards.plainly`."""
    found = []
    for path in Path(spd_lens.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if (
                isinstance(node, ast.Call)
                and isinstance(node.func, ast.Attribute)
                and getattr(node.func.value, "id", "") == "torch"
                and node.func.attr in MADE
            ):
                named = {keyword.arg for keyword in node.keywords}
                needed = set() if path.name == "importance.py" else {"device"}
                needed |= set() if node.func.attr in INTEGERS else {"dtype"}
                if path.name != "planted.py" and None not in named and not needed <= named:
                    found.append(f"{path.name}:{node.lineno} {node.func.attr} without {', '.join(sorted(needed - named))}")
    assert not found
