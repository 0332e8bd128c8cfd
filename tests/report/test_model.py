import pytest

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
    with pytest.raises(SPDError, match="cannot take"):
        write_report(trained, tokens, "/proc/nowhere/x.html")
    with pytest.raises(SPDError, match=r"give \[b, s\]"):
        write_report(trained, tokens[0], tmp_path / "x.html")
    assert list(tmp_path.iterdir()) == []
