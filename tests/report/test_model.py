import pytest
import torch

from spd_lens import SPDError, write_report
from spd_lens.report import decomposition_page
from spd_lens.report.model import subcomponents


def test_trust_stands_before_the_count(trained, tokens):
    page = decomposition_page(trained, tokens)
    places = [
        page.index(f"<h2>{heading}")
        for heading in ("Can the count be trusted?", "Active subcomponents", "The circuit of one prompt", "Subcomponents")
    ]
    assert places == sorted(places)
    for check in ("KL, hard", "KL, alive-only", "KL, adversarial"):
        assert check in page
    assert "Warning: faithfulness" in page  # 12 steps of 12 subcomponents leave half of each matrix


def test_of_too_many_the_most_active_have_cards(trained, tokens):
    few = subcomponents(trained, tokens, most=5)
    all_of_them = subcomponents(trained, tokens)
    assert len(few[2].cards) == 5 < len(all_of_them[2].cards) and "The 5 of" in few[1]
    least = min(card.share_active for card in few[2].cards)
    others = {card.key for card in all_of_them[2].cards} - {card.key for card in few[2].cards}
    assert all(card.share_active <= least for card in all_of_them[2].cards if card.key in others)
    assert set(all_of_them[2].costs) == {card.key for card in all_of_them[2].cards}


def test_the_most_active_are_so_on_all_tokens(trained, tokens, monkeypatch):
    rare, common = ("blocks.1.mlp.W_out", 1), ("blocks.0.attn.W_Q", 0)

    def importances(batch):
        g = {name: torch.zeros(*batch.shape, c.C) for name, c in trained.components.items()}
        first = (batch[:, :1] == 0).float()
        g[rare[0]][..., rare[1]], g[common[0]][..., common[1]] = first, 1 - first
        return g

    many = torch.ones(364, 3, dtype=torch.long)
    many[:64] = 0  # the rare one comes first
    monkeypatch.setattr(trained, "importances", importances)
    (_, _, shown) = subcomponents(trained, many, most=1)
    assert [card.key for card in shown.cards] == [common]


def test_contexts_in_other_tokens_are_said_to_be_so(trained, tokens):
    assert "of more text" in subcomponents(trained, tokens, contexts=tokens[:1], most=2)[1]
    assert "of more text" not in subcomponents(trained, tokens, most=2)[1]


def test_a_decomposition_without_anything_active_has_a_page(trained, tokens):
    gates = list(trained.gates.values())
    kept = [gate.alive.clone() for gate in gates]
    try:
        for gate in gates:
            gate.alive.zero_()
        page = decomposition_page(trained, tokens)
    finally:
        for gate, alive in zip(gates, kept):
            gate.alive.copy_(alive)
    assert "Warning: nothing active" in page and "None is active" in page and "there is no circuit to draw" in page


def test_bad_input(trained, tokens, tmp_path):
    with pytest.raises(SPDError, match="prompts were given"):
        write_report(trained, tokens, tmp_path / "x.html", prompt=tokens)
    with pytest.raises(SPDError, match="most was given as 0"):
        write_report(trained, tokens, tmp_path / "x.html", most=0)
    with pytest.raises(SPDError, match="cannot take"):
        write_report(trained, tokens, "/proc/nowhere/x.html")
    with pytest.raises(SPDError, match=r"give \[b, s\]"):
        write_report(trained, tokens[0], tmp_path / "x.html")
    assert list(tmp_path.iterdir()) == []
