import pytest
import torch

from spd_lens.labels import readable, token_labels


@pytest.mark.parametrize(
    "token, shown",
    [(" cat", "·cat"), ("\n", "↵"), ("a\tb", "a⇥b"), ("", "∅"), ("\u202e", "\\u202e"), ("\u200b", "\\u200b"), ("é", "é"), ("\x00", "\\u0000"), ("日本", "日本"), ("\u00a0", "\\u00a0")],
)  # fmt: skip
def test_everything_in_a_token_is_visible(token, shown):
    assert readable(token) == shown


def test_tokens_are_numbers_where_there_is_no_tokenizer(model):
    assert token_labels(model, torch.tensor([3, 7])) == ["3", "7"]


def test_tokens_are_text_where_there_is_one(athlete_model):
    ids = athlete_model.to_tokens("Tiger Woods plays")[0]
    assert token_labels(athlete_model, ids)[-2:] == ["·Woods", "·plays"]
