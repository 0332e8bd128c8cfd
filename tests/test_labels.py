import pytest
import torch

from spd_lens import SPDError
from spd_lens.labels import name_tokens, readable, token_labels
from tests import zoo


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


def test_names_of_ones_own_for_a_model_without_a_tokenizer():
    model = zoo.native()
    with pytest.raises(SPDError, match="3 names were given and the model's vocabulary has"):
        name_tokens(model, ["a", "b", "c"])
    name_tokens(model, [f"<{i}>\n" for i in range(model.cfg.d_vocab)])
    assert token_labels(model, [3]) == ["<3>↵"] and token_labels(zoo.native(), [3]) == ["3"]
