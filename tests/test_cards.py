import pytest
import torch

from spd_lens import SPDConfig, SPDError, decompose
from spd_lens.cards import AROUND, cards_table, describe, ever_active
from tests import zoo


def active_anywhere(d, tokens):
    return {name: (g > 0.5).flatten(0, 1).any(0).nonzero().flatten().tolist() for name, g in d.importances(tokens).items()}


def test_a_card_for_each_that_is_ever_active(trained, tokens):
    cards = describe(trained, tokens)
    assert ever_active(trained, tokens) == active_anywhere(trained, tokens)
    assert [card.key for card in cards] == [(name, c) for name, alive in active_anywhere(trained, tokens).items() for c in alive]
    assert len(cards_table(cards)) == len(cards)


def test_the_figures_are_those_of_a_plain_loop(trained, tokens):
    seen = trained.observe(tokens)
    for card in describe(trained, tokens)[::5]:
        g, inner = seen.importances[card.site][..., card.index], seen.inner[card.site][..., card.index]
        assert card.share_active == pytest.approx(float((g > 0.5).float().mean())) and card.mean_importance == pytest.approx(
            float(g.mean()), rel=1e-4
        )
        assert sum(card.histogram) == tokens.numel()
        best = card.contexts[0]
        strength = torch.where(g > 0.5, inner.abs(), 0.0)
        assert strength[best.sequence, best.position] == strength.max()
        assert best.inner[best.at] == pytest.approx(float(inner[best.sequence, best.position]), rel=1e-4)
        assert best.labels[best.at] == str(int(tokens[best.sequence, best.position])) and len(best.labels) <= 2 * AROUND + 1


def test_contexts_are_neither_neighbours_nor_twice_the_same_text(trained, tokens):
    for card in describe(trained, tokens.repeat(3, 1))[:10]:
        places = [(tuple(tokens.repeat(3, 1)[c.sequence].tolist()), c.position) for c in card.contexts]
        assert all(a[0] != b[0] or abs(a[1] - b[1]) > AROUND for i, a in enumerate(places) for b in places[:i])


def test_what_is_read_and_written_is_in_the_terms_of_its_space(trained, tokens):
    model = trained.model
    for card in describe(trained, tokens, {"blocks.0.attn.W_Q": [0], "blocks.1.attn.W_O": [1], "blocks.1.mlp.W_out": [2]}):
        V, U = trained.components[card.site].V[:, card.index], trained.components[card.site].U[card.index]
        if card.reads_in == "residual stream":
            assert dict(card.reads)[card.reads[0][0]] == pytest.approx(float((model.W_E @ V)[int(card.reads[0][0])]), rel=1e-4)
        if card.writes_in == "residual stream":
            logits = U @ model.W_U
            assert int(card.writes[0][0]) == int(logits.abs().argmax())
        if card.reads_in == "heads":
            assert sum(value for _, value in card.reads) == pytest.approx(1, rel=1e-4)  # four heads, all of them listed


def test_partners_are_those_that_share_a_space_and_come_before_or_after():
    model = zoo.wrapped("llama")  # grouped keys and values, a gate
    d = decompose(model, zoo.tokens(4), SPDConfig(steps=0, subcomponents=40), progress=False)
    cards = {card.key: card for card in describe(d, zoo.tokens(4), {name: [0, 1] for name in d.sites}, most=40)}
    query, out, value = (cards[f"blocks.1.{name}", 0] for name in ("attn.W_Q", "mlp.W_out", "attn.W_V"))
    assert {site for site, _, _ in query.earlier} == {"blocks.0.attn.W_O", "blocks.0.mlp.W_out"} and not query.later
    assert {site for site, _, _ in query.matched} == {"blocks.1.attn.W_K"}
    assert {site for site, _, _ in out.earlier} == {"blocks.1.mlp.W_in", "blocks.1.mlp.W_gate"} and not out.later
    assert {site for site, _, _ in value.later} == {"blocks.1.attn.W_O"}
    site, c, cosine = next(p for p in query.earlier if p[:2] == ("blocks.0.mlp.W_out", 1))
    expected = torch.cosine_similarity(d.components[site].U[c], d.components["blocks.1.attn.W_Q"].V[:, 0], dim=0)
    assert cosine == pytest.approx(float(expected), abs=1e-5)


def test_bad_input(trained, tokens):
    with pytest.raises(SPDError, match="it has 0 …"):
        describe(trained, tokens, {"blocks.0.attn.W_Q": [999]})
    with pytest.raises(SPDError, match=r"give \[b, s\]"):
        describe(trained, tokens[0])
