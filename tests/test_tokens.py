"""Padding: texts of different lengths give what each gives alone, on either side, on both classes, in every public function."""

from functools import cache

import numpy as np
import pandas as pd
import pytest
import torch
from transformers import BatchEncoding

import spd_lens
from spd_lens import SPDConfig, SPDError, decompose, masks
from spd_lens.tokens import Batch, take_in
from spd_lens.training import Trainer, initialised
from tests import zoo

PAD = 2
LENGTHS = (6, 11, 9)
NAMES = [name for name in ("HT-standard", "HT-rotary", "HT-shortformer", "HT-split", "Bridge-native", "Bridge-gpt2", "Bridge-llama-processed",
                           "Bridge-neox-use_attn_result") if name in zoo.ALL]  # fmt: skip
FEW = [name for name in ("HT-standard", "Bridge-gpt2-processed") if name in zoo.ALL]
SIDES = ("right", "left")


def texts():
    rows = torch.randint(3, zoo.VOCABULARY, (len(LENGTHS), max(LENGTHS)), generator=torch.Generator().manual_seed(0))
    return [row[None, :n] for row, n in zip(rows, LENGTHS)]


def padded(side, pad=PAD, more=0):
    """The texts as one batch and its attention mask."""
    width = max(LENGTHS) + more
    ids, mask = torch.full((len(LENGTHS), width), pad), torch.zeros(len(LENGTHS), width, dtype=torch.long)
    for i, text in enumerate(texts()):
        at = slice(0, text.shape[1]) if side == "right" else slice(width - text.shape[1], width)
        ids[i, at], mask[i, at] = text[0], 1
    return ids, mask


@cache
def scrambled(name, **config):
    """Random components and importance functions, so that nothing is what it is by being at its start."""
    options = {"steps": 0, "subcomponents": 12, "init": "random", "gate_width": 4, **config}
    d = decompose(zoo.ALL[name](), zoo.tokens(4), SPDConfig(**options), progress=False)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in d.parameters():
            parameter.add_(0.3 * parameter.std(correction=0) * torch.randn(parameter.shape, generator=generator))
        for gate in d.gates.values():
            gate.get_parameter("b2" if config.get("importance") == "scalar" else "mlps.b2").sub_(0.7)
    return d


def real_of(value, mask, i):
    return value[i][mask[i].bool()]


def close(a, b, tolerance=2e-5):
    torch.testing.assert_close(a, b, atol=tolerance, rtol=1e-4)


# --- looking and running ---


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("name", NAMES)
def test_observe_and_run_give_each_text_what_it_gets_alone(name, side):
    d, (ids, mask) = scrambled(name), padded(side)
    seen = d.observe(ids, attention_mask=mask)
    assert torch.equal(seen.real, mask.bool())
    hard = masks.hard(seen.importances)
    out = d.run(ids, hard, delta=0.5, attention_mask=mask)
    for i, text in enumerate(texts()):
        alone = d.observe(text)
        close(real_of(seen.logits, mask, i), alone.logits[0])
        for site in d.sites:
            close(real_of(seen.inner[site], mask, i), alone.inner[site][0])
            close(real_of(seen.importances[site], mask, i), alone.importances[site][0])
            assert not seen.importances[site][i][~mask[i].bool()].any()
        close(real_of(out, mask, i), d.run(text, masks.hard(alone.importances), delta=0.5)[0])


@pytest.mark.parametrize("importance", ["scalar", "vector", "attention"])
def test_every_importance_function_leaves_padding_out(importance):
    d, (ids, mask) = scrambled(FEW[0], importance=importance), padded("left")
    seen = d.importances(ids, attention_mask=mask)
    for i, text in enumerate(texts()):
        for site, g in d.importances(text).items():
            close(real_of(seen[site], mask, i), g[0])


def test_an_importance_function_that_looks_both_ways_does_not_look_at_padding():
    d, (ids, mask) = scrambled("Bridge-native-bidirectional"), padded("left")
    seen = d.importances(ids, attention_mask=mask)
    for i, text in enumerate(texts()):
        for site, g in d.importances(text).items():
            close(real_of(seen[site], mask, i), g[0])


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("name", NAMES)
def test_the_cache_and_the_model_that_is_attached_to(name, side):
    d, (ids, mask) = scrambled(name), padded(side)
    own, _ = d.model.run_with_cache(ids, attention_mask=mask)
    logits, cache = d.run_with_cache(ids, attention_mask=mask)
    with d.attached():
        _, inside = d.model.run_with_cache(ids, attention_mask=mask)
    close(logits, own)
    for i, text in enumerate(texts()):
        alone = d.observe(text)
        for site in d.sites:
            for found in (cache, inside):
                close(real_of(found[f"{site}.hook_spd_ci"], mask, i), alone.importances[site][0])
                assert float(found[f"{site}.hook_spd_ci"][i][~mask[i].bool()].sum()) < 1e-30
            close(real_of(cache[f"{site}.hook_spd_acts"], mask, i), alone.inner[site][0])


# --- counting and cutting ---


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("positions", ["all", "last"])
@pytest.mark.parametrize("name", FEW)
def test_census_and_verify_are_the_means_over_real_positions(name, positions, side):
    d, (ids, mask) = scrambled(name, output_positions=positions, sites=("blocks.1.attn.W_[QO]", "blocks.0.mlp.W_in")), padded(side)
    counted, checked = spd_lens.census(d, ids, attention_mask=mask), spd_lens.verify(d, ids, attention_mask=mask)
    alone = [(spd_lens.census(d, text), spd_lens.verify(d, text), text.shape[1]) for text in texts()]
    total = sum(LENGTHS)
    for site in d.sites:
        assert counted.mean_active[site]["all"] == pytest.approx(sum(c.mean_active[site]["all"] * n for c, _, n in alone) / total)
        assert torch.equal(counted.alive[site], torch.stack([c.alive[site] for c, _, _ in alone]).any(0))
        assert checked.l0[site] == pytest.approx(sum(v.l0[site] * n for _, v, n in alone) / total)
    for field in ("kl_plain", "kl_hard", "kl_importance"):
        shares = [n / total if positions == "all" else 1 / len(alone) for *_, n in alone]
        assert getattr(checked, field) == pytest.approx(sum(getattr(v, field) * w for (_, v, _), w in zip(alone, shares)), rel=1e-3)


@pytest.mark.parametrize("side", SIDES)
def test_what_stands_at_padding_changes_no_figure(side):
    d = scrambled(FEW[0])
    (ids, mask), (other, _) = padded(side, pad=2), padded(side, pad=17)
    first, second = (spd_lens.verify(d, tokens, attention_mask=mask).as_dict() for tokens in (ids, other))
    for of_sites in ("l0", "distinct", "width"):
        assert first.pop(of_sites) == pytest.approx(second.pop(of_sites))
    assert first == pytest.approx(second, rel=1e-4)
    one, two = (spd_lens.describe(d, tokens, attention_mask=mask) for tokens in (ids, other))
    assert one == two


@pytest.mark.parametrize("side", SIDES)
def test_positions_of_a_census_are_those_of_the_tokens_as_given(side):
    d, (ids, mask) = scrambled(FEW[0]), padded(side)
    last = torch.tensor([int(torch.nonzero(row)[-1]) for row in mask])
    counted = spd_lens.census(d, ids, {"last": last}, attention_mask=mask)
    for site in d.sites:
        alone = [float((d.importances(text)[site][0, -1] > 0.5).sum()) for text in texts()]
        assert counted.mean_active[site]["last"] == pytest.approx(sum(alone) / len(alone))
    with pytest.raises(SPDError, match="which is padding"):
        spd_lens.census(d, ids, {"there": 0 * last + (ids.shape[1] - 1 if side == "right" else 0)}, attention_mask=mask)


@pytest.mark.parametrize("side", SIDES)
def test_cards_show_the_tokens_alone(side):
    d, (ids, mask) = scrambled(FEW[0]), padded(side)
    cards = spd_lens.describe(d, ids, attention_mask=mask)
    alone = {(card.site, card.index): [] for card in cards}
    for text in texts():
        for card in spd_lens.describe(d, text):
            alone[card.key].append((card, text.shape[1]))
    assert len(alone) == len(cards) > 10
    for card in cards:
        parts = alone[card.key]
        assert card.share_active == pytest.approx(sum(c.share_active * n for c, n in parts) / sum(LENGTHS))
        assert sum(card.histogram) == sum(LENGTHS)
        for context in card.contexts:
            assert ids[context.sequence, context.position] == int(context.labels[context.at]) and mask[context.sequence, context.position]
            assert len(context.labels) <= LENGTHS[context.sequence] and len(context.labels) == len(context.inner) == len(
                context.importances
            )


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("positions", ["all", "last"])
def test_cut_costs(positions, side):
    d, (ids, mask) = scrambled(FEW[-1], output_positions=positions), padded(side)
    chosen = {site: [0, 1] for site in list(d.sites)[-3:]}
    costs = spd_lens.cut_costs(d, ids, chosen, attention_mask=mask)
    alone = [spd_lens.cut_costs(d, text, chosen) for text in texts()]
    shares = [n / sum(LENGTHS) if positions == "all" else 1 / len(LENGTHS) for n in LENGTHS]
    for one, cost in costs.items():
        assert cost == pytest.approx(sum(a[one] * w for a, w in zip(alone, shares)), rel=1e-3, abs=1e-7)


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("name", FEW)
def test_attribution_and_ablation_by_position(name, side):
    d, (ids, mask) = scrambled(name), padded(side)

    def metric(logits):
        return logits[mask.bool()][:, 5].sum()

    keys = ["site", "subcomponent", "position"]
    chosen = {next(iter(d.sites)): [0, 1], list(d.sites)[-1]: [2]}
    for measure, more in ((spd_lens.attribution, {}), (spd_lens.ablation_effects, {"chosen": chosen, "progress": False})):
        found = measure(d, ids, metric, per_position=True, attention_mask=mask, **more).set_index(keys)["effect"]
        total = 0 * found
        for i, text in enumerate(texts()):
            effect = measure(d, text, lambda logits: logits[0, :, 5].sum(), per_position=True, **more)
            effect["position"] += int(torch.nonzero(mask[i])[0])
            total = total.add(effect.set_index(keys)["effect"], fill_value=0)
        pd.testing.assert_series_equal(found.sort_index(), total.sort_index(), atol=1e-4, rtol=1e-3, check_names=False)
        with pytest.raises(SPDError, match="padding"):
            measure(d, ids, lambda logits: logits[..., 5].mean(), attention_mask=mask, **more)


def test_a_prompt_is_drawn_without_its_padding():
    d = scrambled(FEW[0])
    text = texts()[0]
    ids, mask = (part[:1] for part in padded("left"))
    metric = spd_lens.answer_logit(7)
    one, alone = spd_lens.circuit_graph(d, ids, metric, attention_mask=mask), spd_lens.circuit_graph(d, text, metric)
    pd.testing.assert_frame_equal(one.nodes, alone.nodes, atol=1e-4)
    assert one.labels == alone.labels
    shown, single = (spd_lens.pair_attention(d, t, 0, pairs=[(0, 1)], attention_mask=m) for t, m in ((ids, mask), (text, None)))
    close(shown.alone, single.alone)


def test_a_report_of_padded_tokens(tmp_path):
    d, (ids, mask) = scrambled(FEW[0]), padded("left")
    spd_lens.write_report(d, ids, tmp_path / "r.html", attention_mask=mask, progress=False)
    assert "3 sequences of 6 to 11 tokens" in (tmp_path / "r.html").read_text()


# --- learning ---


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("positions", ["all", "last"])
def test_losses_of_a_step_are_those_of_the_texts_alone(positions, side):
    """Plain masks, since drawn ones differ; every penalty, since all of them count positions."""
    weights = {"plain": 1.0, "alive": 0.5, "minimality": 0.1, "price": 0.2, "frequency": 0.3, "faithfulness": 1.0}
    config = SPDConfig(steps=5, subcomponents=12, gate_width=4, weights=weights, output_positions=positions, tokens_per_pass=22)
    model = zoo.ALL[FEW[0]]()
    sites = spd_lens.find_sites(model, "*")
    batch = take_in(model, *padded(side))

    def step(tokens):
        trainer = Trainer(initialised(model, sites, texts()[0], config))
        losses = trainer.step(tokens).losses
        return losses, [p.grad for p in trainer.decomposition.parameters()]

    losses, _ = step(batch)
    alone = [step(text)[0] for text in texts()]
    total = sum(LENGTHS)
    for name in ("plain", "alive"):
        shares = [n / total if positions == "all" else 1 / len(LENGTHS) for n in LENGTHS]
        assert float(losses[name]) == pytest.approx(sum(float(a[name]) * w for a, w in zip(alone, shares)), rel=1e-3)
    assert float(losses["minimality"]) == pytest.approx(sum(float(a["minimality"]) * n for a, n in zip(alone, LENGTHS)) / total, rel=1e-3)
    outputs = total if positions == "all" else len(LENGTHS)
    assert float(losses["price"]) == pytest.approx(float(losses["minimality"]) * total / outputs, rel=1e-4)


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("name", FEW)
def test_training_does_not_see_what_stands_at_padding(name, side):
    config = SPDConfig(sites=("blocks.1.attn.W_[QO]",), steps=4, subcomponents=12, gate_width=4, batch_size=3, retire_at=(0.5,), seed=1)

    def learnt(pad):
        ids, mask = padded(side, pad)
        with pytest.warns(UserWarning, match="rank"):
            return decompose(zoo.ALL[name](), ids, config, attention_mask=mask, progress=False)

    first, second = learnt(2), learnt(17)
    for key, value in first.state().items():
        assert torch.isfinite(value).all()
        close(value, second.state()[key], 1e-4)
    for site, losses in first.history[-1].items():
        assert losses == pytest.approx(second.history[-1][site], rel=1e-3, abs=1e-6)


def test_the_compared_outputs():
    logits, batch = torch.randn(4, 5, 7), Batch(torch.zeros(2, 5, dtype=torch.long))
    assert batch.compared(logits, "all").shape == (4, 5, 7)
    assert torch.equal(batch.compared(logits, "last"), logits[:, 4:])
    padded = Batch(batch.ids, torch.tensor([2, 5]))
    assert torch.equal(padded.compared(logits, "last"), logits[[0, 1, 2, 3], [1, 4, 1, 4]][:, None])
    assert (padded.outputs("all"), padded.outputs("last"), padded.numel) == (7, 2, 7)


# --- taking in ---


TEXTS = ["w1 w2 w3", "w5 w6 w7 w8 w9 w10 w11", "w20 w21"]


@pytest.mark.parametrize("pad", ["<pad>", "<bos>", "<eos>"])
@pytest.mark.parametrize("side", SIDES)
def test_padding_of_texts_dicts_and_the_models_own_tokens_is_found(side, pad):
    model = zoo.reading(side, pad)
    own = model.to_tokens(TEXTS)
    lengths = [model.to_tokens(text).shape[1] for text in TEXTS]
    mask = torch.tensor([[1] * n + [0] * (own.shape[1] - n) if side == "right" else [0] * (own.shape[1] - n) + [1] * n for n in lengths])
    given = [TEXTS, tuple(TEXTS), own, own.numpy(), own.int(), {"input_ids": own, "attention_mask": mask},
             BatchEncoding({"input_ids": own.numpy(), "attention_mask": mask.numpy()}), {"input_ids": own}, own.T.contiguous().T]  # fmt: skip
    for tokens in given:
        batch = take_in(model, tokens)
        assert batch.lengths.tolist() == lengths, type(tokens)
        assert all(torch.equal(batch.alone(i).ids, model.to_tokens(text)) for i, text in enumerate(TEXTS))
        assert torch.equal(batch.given(batch.real), mask.bool())
        assert torch.equal(batch.given(batch.ids), own)


def test_a_mask_that_is_given_has_the_last_word():
    model = zoo.reading("right")
    own = model.to_tokens(TEXTS)
    assert take_in(model, own).numel < own.numel()
    assert take_in(model, own, torch.ones_like(own)).numel == own.numel()


def test_a_text_that_ends_with_the_token_of_padding_is_whole():
    model = zoo.reading("right", "<eos>")
    assert take_in(model, ["w1 w2 <eos>", "w1"]).lengths.tolist() == [4, 2]


@pytest.mark.parametrize("side", SIDES)
def test_options_of_the_models_own_reach_it(side):
    d = decompose(zoo.reading("right"), zoo.tokens(4), SPDConfig(steps=0, subcomponents=40), progress=False)
    for options in (
        {},
        {"prepend_bos": False},
        {"prepend_bos": True, "padding_side": side},
        {"return_type": "loss"},
        {"names_filter": "hook_embed"},
    ):
        (own, cache), (got, ours) = d.model.run_with_cache(TEXTS, **options), d.run_with_cache(TEXTS, **options)
        close(got, own)
        assert set(ours) - set(cache) == {key for key in ours if key.endswith(("hook_spd_acts", "hook_spd_ci"))}
        for key in cache:
            close(ours[key], cache[key])
    alone = d.observe(TEXTS[0])
    _logits, cache = d.run_with_cache(TEXTS, padding_side=side)
    n = alone.logits.shape[1]
    for site in d.sites:
        found = cache[f"{site}.hook_spd_ci"][0]
        close(found[:n] if side == "right" else found[-n:], alone.importances[site][0])


def test_what_is_no_batch_is_told():
    model, (ids, mask) = zoo.reading("right"), padded("right")
    none = mask.clone()
    none[1] = 0
    gaps = mask.clone()
    gaps[1, 3] = 0
    for tokens, attention_mask, said in (
        ({"ids": ids}, None, "has to hold input_ids"),
        ({"input_ids": ids, "position_ids": ids}, None, "position_ids, which would change"),
        ({"input_ids": ids, "token_type_ids": mask}, None, "give one segment"),
        (ids, mask[:, :-1], "of the tokens' shape"),
        (ids, 2 * mask, "other values than 0 and 1"),
        (ids, none, "no token at all"),
        (ids, gaps, "gaps between its tokens"),
        (TEXTS, mask, "leave attention_mask out"),
        (Batch(ids), mask, "knows its padding"),
        (torch.full((2, 3), PAD), None, "nothing but the token 2"),
        (np.ones((2, 3)), None, "token ids are integers"),
        ([[1, 2]], None, "give an integer tensor"),
    ):
        with pytest.raises(SPDError, match=said):
            take_in(model, tokens, attention_mask)
    with pytest.raises(SPDError, match="as a dict with input_ids and attention_mask"):
        decompose(model, [ids], SPDConfig(steps=1, subcomponents=4), attention_mask=mask, progress=False)


@pytest.mark.skipif("HT-bidirectional" not in zoo.ALL, reason="transformer-lens 4 has no HookedTransformer")
def test_a_model_that_does_not_leave_padding_out_is_refused():
    with pytest.raises(SPDError, match="gives a padded text other outputs"):
        scrambled("HT-bidirectional").observe(*padded("right"))
