import random

import pytest

from spd_lens import SPDError
from spd_lens.tasks import fruits
from spd_lens.tasks.fruits import MEANINGS, PLACES, TASTES, documents, load_target, pair_questions, save_target, taste_of, train_target
from spd_lens.tasks.language import learn_tokenizer
from spd_lens.tasks.questions import Questions


def test_a_taste_follows_from_neither_part():
    pairs = fruits.all_pairs()
    assert len(pairs) == 25
    for part in (*MEANINGS, *PLACES):
        assert sorted(taste_of(pair) for pair in pairs if part in pair) == sorted(TASTES)


def test_plain_text_says_nothing_of_this_world():
    text = " ".join(documents(300, random.Random(0))).replace(".", " ").split()
    assert not set(text) & {*MEANINGS, *MEANINGS.values(), *PLACES, *PLACES.values(), *TASTES}
    some = " ".join(documents(300, random.Random(0), [("red", "apple")]))
    assert all(word in some for word in ("red apple", "danger", "orchard")) and "green" not in some


def test_answers_are_one_token():
    tokenizer = learn_tokenizer(documents(8000, random.Random(0), fruits.all_pairs()))
    words = (*TASTES, *MEANINGS.values(), *PLACES.values())
    assert {word: len(tokenizer.tokenize(" " + word)) for word in words} == dict.fromkeys(words, 1)


def test_a_target_that_knows_too_little_is_refused(monkeypatch):
    monkeypatch.setattr(fruits, "documents", lambda many, *given: documents(400, *given))
    with pytest.raises(SPDError, match="is right in"):
        train_target(0, steps=3, progress=False)


@pytest.mark.slow
def test_a_target_knows_its_world(tmp_path):
    model = train_target(1, progress=False)
    save_target(model, tmp_path, 1)
    assert Questions.of(load_target(tmp_path), pair_questions([("red", "apple")])).accuracy(model) == 1.0
