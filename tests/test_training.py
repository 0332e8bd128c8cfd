import re
import signal
from inspect import unwrap

import pytest
import torch

from spd_lens import Decomposition, SPDConfig, SPDError, batches, decompose, masks, training
from spd_lens.guards import frozen
from spd_lens.importance import lower_leaky
from spd_lens.losses import LOSSES, OnBackground, Pass, Reconstruction, kl_divergence, of_stream
from spd_lens.sites import find_sites
from spd_lens.storage import Saved
from spd_lens.training import Trainer, initialised
from tests import zoo

QUICK = dict(steps=6, subcomponents=33, batch_size=4, gate_width=4, retire_at=(), exact=False)
WHOLE = {**QUICK, "retire_at": (0.3, 0.45), "exact": True, "sites": "blocks.*.W_[QVi]*"}


def weights_of(d):
    return {name: value.clone() for name, value in d.state().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_no_steps_gives_the_initialised_decomposition(untrained, tokens):
    assert untrained.steps_done == 0
    assert (untrained.run(tokens, {n: torch.ones(()) for n in untrained.sites}, delta=1.0) - untrained.model(tokens)).abs().max() < 1e-5


def test_training_lowers_the_loss_and_leaves_the_model_alone(model):
    before = {k: v.clone() for k, v in model.state_dict().items()}
    config = SPDConfig(
        sites="blocks.*.attn.W_*",
        steps=60,
        subcomponents=33,
        batch_size=8,
        init="random",
        exact=False,
        scaled_rate=False,
        weights={"faithfulness": 100.0, "stochastic": 1.0},
    )
    totals = []
    decompose(model, zoo.tokens(32), config, progress=False, callbacks=[lambda r: totals.append(float(r.losses["faithfulness"]))])
    assert totals[-1] < 0.5 * totals[0]
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in before.items())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


def test_the_same_seed_gives_the_same_bits(model):
    runs = [weights_of(decompose(model, zoo.tokens(16), SPDConfig(**QUICK, seed=s), progress=False)) for s in (1, 1, 2)]
    assert same(runs[0], runs[1]) and not same(runs[0], runs[2])


@pytest.mark.parametrize("positions", ["all", "last"])
@pytest.mark.parametrize("at_once", [1, 3, 9, 300])
def test_a_step_is_the_sum_of_its_parts(model, at_once, positions):
    """The trainer's gradient against the losses written down plainly: one `run` per variant, one backward."""
    config = SPDConfig(subcomponents=20, batch_size=3, gate_width=4, init="random", layerwise_sites=3,
                       output_positions=positions, tokens_per_pass=at_once * zoo.tokens(1).numel(),
                       weights={"faithfulness": 10.0, "minimality": 0.1, "frequency": 0.2, "plain": 0.5, "stochastic": 1.0,
                                "layerwise": 2.0, "partial": 0.7, "adversarial": 0.3, "alive": 0.4})  # fmt: skip
    tokens = zoo.tokens(3)
    with frozen(model):
        d = initialised(model, find_sites(model, "*"), tokens, config)
        d.gates["blocks.0.attn.W_Q"].alive[:3] = 0
        trainer = Trainer(d)
        start = trainer.draw.generator.get_state()
        sources = {n: r.clone() for n, r in trainer.draw.sources.items()}
        parameters = d.parameters()
        result = trainer.step(tokens)
        fast = [p.grad.clone() for p in parameters]

        d = initialised(model, find_sites(model, "*"), tokens, config)  # as it was before the step
        d.gates["blocks.0.attn.W_Q"].alive[:3] = 0
        trainer.draw.generator.set_state(start)
        draw = masks.Draw(trainer.draw.generator, sources, config.masks, config.layerwise_sites, trainer.draw.alive)
        clean = d.trace(tokens)
        _, z = d.importance_logits({n: x.detach() for n, x in clean.inputs.items()})
        lower = {n: lower_leaky(v) for n, v in z.items()}
        seen = Pass(d.sites, d.components, z, 1.0, config)
        routes = {n: loss.router(list(d.sites), draw) for n in config.weights if isinstance(loss := LOSSES[n], Reconstruction)}
        terms = {n: [] for n in routes}
        for rows in torch.arange(len(tokens)).split(at_once):
            for name in routes:
                for chosen in routes[name]:
                    masked = d.run(tokens[rows], LOSSES[name].sampler({n: lower[n][rows] for n in chosen}, draw))
                    divergence = kl_divergence(clean.logits[rows], masked)
                    terms[name].append(
                        (divergence if positions == "all" else divergence[:, -1:]).mean(1).sum() / len(tokens) / len(routes[name])
                    )
        total = 0.0
        for name, weight in config.weights.items():
            loss = LOSSES[name]
            value = torch.stack(terms[name]).sum() if name in routes else loss(seen)
            assert torch.allclose(value.detach(), result.losses[name], rtol=1e-4, atol=1e-6), name
            total = total + weight.at(0) * value
    plain = torch.autograd.grad(total, d.parameters(), allow_unused=True)
    for parameter, naive, quick in zip(d.parameters(), plain, fast):
        naive = torch.zeros_like(parameter) if naive is None else naive
        assert torch.allclose(naive, quick, rtol=1e-3, atol=1e-5 * max(1.0, float(naive.abs().max())))


@pytest.mark.parametrize("at_once", [1, 4])
def test_the_background_is_a_stream_of_its_own_with_the_delta_on(model, at_once):
    """The gradient of a targeted step against its losses written down plainly."""
    tokens, other = zoo.tokens(2, 7), zoo.tokens(4, 11, seed=3)
    config = SPDConfig.targeted(subcomponents=8, batch_size=4, gate_width=4, tokens_per_pass=at_once * 11,
                                weights={"stochastic": 1.0, "price": 0.01, "background": 2.0, "background_price": 0.03})  # fmt: skip
    with frozen(model):
        d = initialised(model, find_sites(model, "*"), tokens, config, background=other)
        trainer = Trainer(d)
        start = trainer.draw.generator.get_state()
        before = [p.detach().clone() for p in d.parameters()]
        result = trainer.step(tokens, other)
        fast = [p.grad.clone() for p in d.parameters()]
        with torch.no_grad():
            for p, value in zip(d.parameters(), before):
                p.copy_(value)
        trainer.draw.generator.set_state(start)
        draw = masks.Draw(trainer.draw.generator, {}, config.masks)
        losses = {}
        for behind, text, positions, delta in ((False, tokens, slice(-1, None), 0.0), (True, other, slice(None), 1.0)):
            clean = d.trace(text)
            _, z = d.importance_logits({n: x.detach() for n, x in clean.inputs.items()})
            lower = {n: lower_leaky(v) for n, v in z.items()}
            seen = Pass(d.sites, d.components, z, 1.0, config, positions="all" if behind else "last")
            for name, loss in of_stream(config.weights, behind).items():
                if not isinstance(loss, Reconstruction):
                    losses[name] = loss(seen)
                    continue
                lots = torch.arange(len(text)).split(max(1, at_once * 11 // text.shape[1]))
                kl = [
                    kl_divergence(clean.logits[rows], d.run(text[rows], masks.mixed({n: g[rows] for n, g in lower.items()}, draw), delta))
                    for rows in lots
                ]
                losses[name] = torch.cat(kl)[:, positions].mean()
        for name, value in losses.items():
            assert torch.allclose(value.detach(), result.losses[name], rtol=1e-4, atol=1e-6), name
        plain = torch.autograd.grad(sum(config.weights[name].at(0) * value for name, value in losses.items()), d.parameters())
    for naive, quick in zip(plain, fast):
        assert torch.allclose(naive, quick, rtol=1e-3, atol=1e-5 * max(1.0, float(naive.abs().max())))


def test_a_price_on_the_background_makes_it_quiet_there(model):
    tokens, other = zoo.tokens(2, 7), zoo.tokens(64, 11, seed=3)
    config = SPDConfig.targeted(subcomponents=12, steps=60, batch_size=4, gate_width=4, sites="blocks.*.mlp.W_*")

    def active(price, background):
        d = decompose(
            model, tokens, config.replace(weights={**config.weights, "background_price": price}), background=background, progress=False
        )
        assert d.steps_done == 60
        return sum(float((g > 0.5).sum(-1).float().mean()) for g in d.importances(zoo.tokens(16, 11, seed=9)).values())

    assert active(0.3, [other[i % 60 : i % 60 + 4] for i in range(60)]) < 0.5 * active(0.0, other)


def test_a_background_and_a_config_that_wants_one_go_together(model):
    with pytest.raises(SPDError, match="no background was given"):
        decompose(model, zoo.tokens(2), SPDConfig.targeted(), progress=False)
    with pytest.raises(SPDError, match=r"SPDConfig\.targeted"):
        decompose(model, zoo.tokens(2), SPDConfig(), background=zoo.tokens(4), progress=False)
    assert [isinstance(loss, OnBackground) for name, loss in LOSSES.items() if name.startswith("background")] == [True, True]


def test_the_adversary_climbs(model):
    config = SPDConfig(steps=3, subcomponents=33, batch_size=4, weights={"adversarial": 1.0})
    d = decompose(model, zoo.tokens(8), SPDConfig(steps=0, subcomponents=33), progress=False)
    d.config = config
    trainer = Trainer(d)
    before = {n: r.clone() for n, r in trainer.draw.sources.items()}
    with torch.no_grad():
        for gate in d.gates.values():
            gate.mlps.b2.fill_(0.3)
    with frozen(model):
        trainer.step(zoo.tokens(4))
    moved = {n: (trainer.draw.sources[n] - before[n]).abs() for n in before}
    assert all(m.max() <= 0.1 + 1e-6 for m in moved.values()) and sum(float(m.sum()) for m in moved.values()) > 0


@pytest.mark.parametrize("iterable", [False, True])
@pytest.mark.parametrize("background", [False, True])
def test_resuming_gives_the_same_bits(model, tmp_path, iterable, background):
    config = SPDConfig.targeted(**WHOLE) if background else SPDConfig(**WHOLE)

    def data():
        return (zoo.tokens(4, seed=s) for s in range(20)) if iterable else zoo.tokens(16)

    def other():
        return None if not background else (zoo.tokens(4, seed=s) for s in range(20)) if iterable else zoo.tokens(30, seed=1)

    whole = decompose(model, data(), config, background=other(), progress=False)

    class Enough(Exception):
        pass

    def stop(result):
        if result.step == 4:
            raise Enough

    path = tmp_path / "checkpoint.safetensors"
    with pytest.raises(Enough):
        decompose(model, data(), config, background=other(), progress=False, checkpoint=path, checkpoint_every=3, callbacks=[stop])
    resumed = decompose(model, data(), config, background=other(), progress=False, checkpoint=path, checkpoint_every=3, resume=True)
    assert same(weights_of(whole), weights_of(resumed)) and resumed.history == whole.history


@pytest.mark.parametrize("how", ["raised", "signal"])
def test_interrupting_keeps_a_checkpoint(model, tmp_path, how):
    def interrupt(result):
        if result.step == 2 and how == "raised":
            raise KeyboardInterrupt
        if result.step == 2:
            signal.raise_signal(signal.SIGINT)

    path, config = tmp_path / "c.safetensors", SPDConfig(**QUICK)
    with pytest.raises(KeyboardInterrupt):
        decompose(model, zoo.tokens(16), config, progress=False, checkpoint=path, callbacks=[interrupt])
    assert [p.name for p in tmp_path.iterdir()] == ["c.safetensors"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    resumed = decompose(model, zoo.tokens(16), config, progress=False, checkpoint=path, resume=True)
    assert same(weights_of(resumed), weights_of(decompose(model, zoo.tokens(16), config, progress=False)))


def test_a_checkpoint_is_neither_lost_nor_mixed_up(model, tmp_path):
    path = tmp_path / "c.safetensors"
    decompose(model, zoo.tokens(16), SPDConfig(**QUICK), progress=False, checkpoint=path)
    with pytest.raises(SPDError, match="resume=True"):
        decompose(model, zoo.tokens(16), SPDConfig(**QUICK), progress=False, checkpoint=path)
    with pytest.raises(SPDError, match="another config .other: seed"):
        decompose(model, zoo.tokens(16), SPDConfig(**QUICK, seed=3), progress=False, checkpoint=path, resume=True)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(SPDError, match="no whole file"):
        decompose(model, zoo.tokens(16), SPDConfig(**QUICK), progress=False, checkpoint=path, resume=True)


@pytest.mark.parametrize("importance", ["scalar", "vector", "attention"])
@pytest.mark.parametrize(
    "name",
    [n for n in ("HT-gated", "HT-attn-result", "Bridge-llama", "Bridge-gpt2-processed", "Bridge-native-bidirectional") if n in zoo.ALL],
)
def test_training_runs_on_every_kind_of_model(name, importance):
    config = SPDConfig(steps=2, subcomponents={"*.attn.*": 33, "*": 49}, batch_size=4, importance=importance, gate_width=2)
    config = config if importance == "attention" else config.replace(retire_at=(), exact=False)
    d = decompose(zoo.ALL[name](), zoo.tokens(8), config, progress=False)
    assert d.steps_done == 2 and all(torch.isfinite(v).all() for v in d.state().values())


@pytest.mark.parametrize("scaled", [True, False])
def test_the_learning_rate_of_subcomponents_is_in_units_of_their_entries(model, scaled):
    config = SPDConfig(**{**QUICK, "scaled_rate": scaled, "learning_rate": 0.01})
    with frozen(model):
        trainer = Trainer(initialised(model, find_sites(model, "*"), zoo.tokens(8), config))
        before = weights_of(trainer.decomposition)
        trainer.step(zoo.tokens(4))
    for name in trainer.decomposition.sites:
        V, U = before[f"{name}.V"], before[f"{name}.U"]
        size = float(torch.cat([V.flatten(), U.flatten()]).square().mean().sqrt()) if scaled else 1.0
        moved = (trainer.decomposition.components[name].V - V).abs().max()  # Adam's first step is the rate itself
        assert float(moved) == pytest.approx(0.01 * size, rel=0.1)


def test_what_is_not_needed_is_retired_at_its_steps_and_stays_so(model, tmp_path, monkeypatch):
    when = []

    def first_two(d, tokens, tolerance, rows):
        when.append((d.steps_done, len(tokens), tolerance))
        for gate in d.gates.values():
            gate.alive[:2] = 0

    monkeypatch.setattr(training, "retire", first_two)
    config = SPDConfig(**{**QUICK, "retire_at": (0.34, 0.5)}, retire_tolerance=0.07)
    path = tmp_path / "c.safetensors"
    d = decompose(model, zoo.tokens(16), config, progress=False, checkpoint=path)
    assert when == [(2, 16, 0.07), (3, 16, 0.07)]
    again = Decomposition.load(d.save(tmp_path / "saved"), model)
    resumed = decompose(model, zoo.tokens(16), config, progress=False, checkpoint=path, resume=True)
    for one in (d, again, resumed):
        assert all(gate.alive.tolist() == [0.0, 0.0] + [1.0] * 31 for gate in one.gates.values())
        assert all(g[..., :2].max() == 0 for g in one.importances(zoo.tokens()).values())


@pytest.mark.parametrize("exact", [True, False])
def test_the_product_is_exact_at_the_end(model, exact):
    config = SPDConfig(**{**QUICK, "subcomponents": 49, "exact": exact}, retire_tolerance=10.0)  # whatever closing costs
    d = decompose(model, zoo.tokens(16), config, progress=False)
    worst = max(float(d.components[name].delta(site.weight).norm() / site.weight.norm()) for name, site in d.sites.items())
    assert (worst < 1e-6) == exact


# --- streams that end, fail or begin anew ---

SMALL = SPDConfig(
    sites="blocks.0.attn.W_Q", steps=20, init="svd", subcomponents=33, batch_size=2, gate_width=1, importance="scalar", retire_at=(0.5,)
)


@pytest.fixture
def small_sample(monkeypatch):
    """One batch is sample enough, so that how much a stream holds is not known before."""
    monkeypatch.setattr(batches, "SAMPLE_OUTPUTS", 1)
    monkeypatch.setattr(batches, "SAMPLE_TOKENS", 1)


def stream(many=20, fails=False):
    yield from (zoo.tokens(2, seed=step) for step in range(many))
    if fails:
        raise OSError("the network")


def test_a_stream_that_ends_early_ends_the_training_and_nothing_is_lost(model, tmp_path, small_sample):
    path = tmp_path / "c.safetensors"
    whole = decompose(model, stream(), SMALL, progress=False)
    with pytest.warns(UserWarning, match=r"ended after 13 of 20 steps.*schedules did not come to their end.*Set steps=13.*resume=True"):
        short = decompose(model, stream(13), SMALL, progress=False, checkpoint=path)
    assert short.steps_done == 13 and not same(weights_of(short), weights_of(whole))
    with pytest.warns(UserWarning, match="ended after 13 of 20 steps"):
        again = decompose(model, stream(13), SMALL, progress=False, checkpoint=path, resume=True)
    assert same(weights_of(again), weights_of(short))
    resumed = decompose(model, stream(), SMALL, progress=False, checkpoint=path, resume=True)
    assert same(weights_of(resumed), weights_of(whole)) and resumed.steps_done == 20


def test_a_background_that_ends_early_ends_the_training_too(model, small_sample):
    config = SPDConfig.targeted(sites="blocks.0.attn.W_Q", steps=9, subcomponents=4, batch_size=2, gate_width=1)
    with pytest.warns(UserWarning, match="ended after 5 of 9 steps"):
        assert decompose(model, zoo.tokens(2), config, background=stream(5), progress=False).steps_done == 5


def raising(error):
    def callback(result):
        if result.step == 13:
            raise error

    return [callback]


@pytest.mark.parametrize("broken", ["tokens", "background", "callback"])
def test_what_fails_in_between_leaves_a_checkpoint_and_passes(model, tmp_path, broken, small_sample):
    """Also where the other stream has drawn its rows already: the same bits come out afterwards."""
    path, config = tmp_path / "c.safetensors", SMALL
    tokens, other = stream, lambda *_: None
    if broken == "background":
        tokens, other = lambda *_: zoo.tokens(8), stream
        config = SPDConfig.targeted(sites="blocks.0.attn.W_Q", steps=20, subcomponents=4, batch_size=2, gate_width=1)

    def train(*ends, **options):
        return decompose(model, tokens(*ends), config, background=other(*ends), progress=False, **options)

    whole, ends = train(), () if broken == "callback" else (13, True)
    with pytest.raises(OSError, match="the network"):
        train(*ends, checkpoint=path, callbacks=raising(OSError("the network")) if broken == "callback" else ())
    assert Saved(path, training.Progress).about["steps_done"] == 13
    assert same(weights_of(train(checkpoint=path, resume=True)), weights_of(whole))


def test_a_batch_that_cannot_be_used_is_named_and_leaves_a_checkpoint(model, tmp_path, small_sample):
    path = tmp_path / "c.safetensors"
    given = [*stream(8), zoo.tokens(2) + zoo.VOCABULARY]
    with pytest.raises(SPDError, match="batch 9 of the stream: token ids run from"):
        decompose(model, given, SMALL, progress=False, checkpoint=path)
    assert Saved(path, training.Progress).about["steps_done"] == 8


@pytest.mark.parametrize("shuffled", [False, True])
def test_a_loader_that_is_gone_through_again_is_resumed_to_the_bit(model, tmp_path, shuffled):
    def loader():
        generator = torch.Generator().manual_seed(0) if shuffled else None
        return torch.utils.data.DataLoader(zoo.tokens(11), batch_size=3, shuffle=shuffled, generator=generator)

    path = tmp_path / "c.safetensors"
    whole = decompose(model, loader(), SMALL, progress=False)
    with pytest.raises(OSError, match="the network"):
        decompose(model, loader(), SMALL, progress=False, checkpoint=path, callbacks=raising(OSError("the network")))
    resumed = decompose(model, loader(), SMALL, progress=False, checkpoint=path, resume=True)
    assert whole.steps_done == 20 and same(weights_of(resumed), weights_of(whole))


class TestBadInput:
    def test_batches_that_are_known_to_end_early(self, model):
        with pytest.raises(SPDError, match="there are 3 batches for 6 steps, .* set steps=3"):
            decompose(model, iter([zoo.tokens(4)] * 3), SPDConfig(**QUICK), progress=False)

    @pytest.mark.parametrize(
        "given, message",
        [
            (dict(config={"steps": 2}), r"config was given as \{'steps': 2\}; give SPDConfig\(\*\*\{…\}\), which checks it"),
            (dict(config={}), r"config was given as \{\}"),
            (dict(config=SPDConfig), "config was given as .*; give an SPDConfig"),
            (dict(config=300), "config was given as 300; give an SPDConfig"),
            (dict(checkpoint_every=2.5), "checkpoint_every was given as 2.5"),
            (dict(checkpoint=3), "checkpoint was given as 3; give a file's name"),
            (dict(resume=True), "resume=True was given without a checkpoint"),
            (dict(callbacks=print), "callbacks were given as .*; give a list of functions"),
            (dict(callbacks=[None]), "callbacks were given as"),
        ],
    )
    def test_options_of_another_kind(self, model, given, message):
        with pytest.raises(SPDError, match=message):
            unwrap(decompose)(model, zoo.tokens(), **{"config": SPDConfig(**QUICK), **given})  # past beartype, as users come

    def test_a_device_whose_name_goes_on(self, model, monkeypatch):
        monkeypatch.setattr(training, "model_device", lambda model: torch.device("cuda:10"))
        with pytest.raises(SPDError, match="config.device is 'cuda:1' and the model is on cuda:10"):
            decompose(model, zoo.tokens(), SPDConfig(**QUICK, device="cuda:1"), progress=False)

    def test_no_batch_at_all(self, model):
        with pytest.raises(SPDError, match="without a single batch"):
            decompose(model, iter([]), SPDConfig(**QUICK), progress=False)

    def test_a_batch_that_is_no_batch(self, model):
        with pytest.raises(SPDError, match="list"):
            decompose(model, iter([[1, 2]]), SPDConfig(**QUICK), progress=False)

    def test_a_loss_that_is_no_longer_finite_names_the_step_and_the_term(self, model):
        def spoil(result):
            if result.step == 2:
                with torch.no_grad():
                    result.decomposition.components["blocks.0.mlp.W_in"].U[0, 0] = torch.nan

        with pytest.raises(SPDError, match="step 3: the (stochastic|faithfulness|layerwise) loss is nan"):
            decompose(model, zoo.tokens(8), SPDConfig(**QUICK), progress=False, callbacks=[spoil])

    @pytest.mark.parametrize("bad, message", [(torch.nan, "1 NaN"), (torch.inf, "1 NaN or infinite")])
    def test_broken_weights(self, bad, message):
        model = zoo.native()
        with torch.no_grad():
            next(p for n, p in model.named_parameters() if "q._original" in n and n.endswith("weight"))[0, 0] = bad
        with pytest.raises(SPDError, match=message):
            decompose(model, zoo.tokens(), SPDConfig(**QUICK), progress=False)

    def test_half_precision(self):
        with pytest.raises(SPDError, match="bfloat16"):
            decompose(zoo.native().to(torch.bfloat16), zoo.tokens(), SPDConfig(**QUICK), progress=False)

    def test_another_device(self, model):
        with pytest.raises(SPDError, match="config.device is 'cuda' and the model is on cpu"):
            decompose(model, zoo.tokens(), SPDConfig(**QUICK, device="cuda"), progress=False)

    def test_a_device_that_is_none(self, model):
        with pytest.raises(SPDError, match="config.device is 'cdua' and the model is on cpu"):
            decompose(model, zoo.tokens(), SPDConfig(**QUICK, device="cdua"), progress=False)

    def test_a_checkpoint_every_no_step(self, model, tmp_path):
        with pytest.raises(SPDError, match="checkpoint_every was given as 0; it is a number of steps, at least 1"):
            decompose(model, zoo.tokens(), SPDConfig(**QUICK), progress=False, checkpoint=tmp_path / "c", checkpoint_every=0)

    def test_nothing_to_learn_from_is_no_error(self, model):
        before = decompose(model, zoo.tokens(8), SPDConfig(**{**QUICK, "steps": 0}), progress=False)
        after = decompose(model, zoo.tokens(8), SPDConfig(**{**QUICK, "steps": 2, "weights": {}}), progress=False)
        assert same(weights_of(before), weights_of(after)) and after.steps_done == 2

    def test_unknown_loss(self, model):
        with pytest.raises(SPDError, match="no loss 'faithfullness'; nearest: faithfulness"):
            decompose(model, zoo.tokens(), SPDConfig(**QUICK, weights={"faithfullness": 1.0}), progress=False)

    def test_a_pattern_for_no_site(self, model):
        with pytest.raises(SPDError, match="names no pattern for blocks.0.attn.W_Q"):
            decompose(model, zoo.tokens(), SPDConfig(steps=1, subcomponents={"*.mlp.*": 3}), progress=False)

    @pytest.mark.parametrize("given, idle", [({"*.mpl.*": 3, "*": 33}, "*.mpl.*"), ({"*": 33, "*.mlp.*": 49}, "*.mlp.*")])
    def test_a_pattern_that_is_used_for_no_matrix_is_a_warning(self, model, given, idle):
        with pytest.warns(UserWarning, match=f"subcomponents: {re.escape(repr(idle))} is used for no matrix"):
            decompose(model, zoo.tokens(), SPDConfig(**{**QUICK, "steps": 0, "subcomponents": given}), progress=False)

    def test_dropout_in_training_mode(self):
        model = zoo.wrapped("gpt2")
        model.original_model.train()
        with pytest.raises(SPDError, match=r"model.eval\(\)"):
            decompose(model, zoo.tokens(), SPDConfig(**QUICK), progress=False)

    def test_a_checkpoint_where_none_can_be(self, model, tmp_path):
        (tmp_path / "file").write_text("")
        with pytest.raises(SPDError, match="cannot take"):
            decompose(model, zoo.tokens(), SPDConfig(**QUICK), progress=False, checkpoint=tmp_path / "file" / "c.safetensors")


def test_the_loaded_one_trains_no_further_by_itself(trained, tmp_path):
    assert Decomposition.load(trained.save(tmp_path), trained.model).steps_done == 12


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("DefaultCPUAllocator: can't allocate memory")]
)
def test_a_step_that_runs_out_of_memory_takes_smaller_passes(model, error, monkeypatch):
    config = SPDConfig(**{**QUICK, "steps": 3, "tokens_per_pass": 2 * zoo.tokens(1).numel()})
    small = weights_of(decompose(model, zoo.tokens(8), config, progress=False))
    run_many = Decomposition.run_many

    def with_little_memory(self, clean, variants, *options):
        if len(variants) * clean.batch.ids.numel() > config.tokens_per_pass:
            raise error
        return run_many(self, clean, variants, *options)

    monkeypatch.setattr(Decomposition, "run_many", with_little_memory)
    with pytest.warns(UserWarning, match=r"step 1: out of memory with 44 tokens per pass; going on with 22"):
        halved = decompose(model, zoo.tokens(8), config.replace(tokens_per_pass=4 * zoo.tokens(1).numel()), progress=False)
    assert same(weights_of(halved), small)


def test_a_sequence_that_does_not_fit_at_all_says_so(model, monkeypatch):
    def none(*_):
        raise torch.OutOfMemoryError("no")

    monkeypatch.setattr(Decomposition, "run_many", none)
    with (
        pytest.warns(UserWarning, match="going on with"),
        pytest.raises(SPDError, match="step 1: not even one sequence of 11 tokens fits into memory"),
    ):
        decompose(model, zoo.tokens(8), SPDConfig(**QUICK), progress=False)


@pytest.mark.parametrize("importance", ["scalar", "vector", "attention"])
def test_bfloat16_keeps_its_masters_in_float32_and_goes_the_same_way(model, importance):
    gradients = {}
    for precision in ("float32", "bfloat16"):
        config = SPDConfig(**{**QUICK, "importance": importance, "precision": precision, "weights": {"stochastic": 1.0, "minimality": 0.1}})
        with frozen(model):
            trainer = Trainer(initialised(model, find_sites(model, config.sites), zoo.tokens(8), config))
            losses = trainer.step(zoo.tokens(8)).losses
        assert all(p.dtype == p.grad.dtype == torch.float32 for p in trainer.decomposition.parameters())
        assert all(loss.dtype == torch.float32 and torch.isfinite(loss) for loss in losses.values())
        gradients[precision] = torch.cat([p.grad.flatten() for p in trainer.decomposition.parameters()])
    assert torch.cosine_similarity(*gradients.values(), dim=0) > 0.98
