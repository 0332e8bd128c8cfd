import random
from collections import Counter

import pytest

from spd_lens import SPDError
from spd_lens.tasks import athletes
from spd_lens.tasks.athletes import (
    ATHLETES,
    INVERSE,
    PHRASINGS,
    documents,
    inverse_questions,
    load_target,
    questions,
    save_target,
    train_target,
)
from spd_lens.tasks.language import learn_tokenizer
from spd_lens.tasks.questions import Questions


def test_every_athlete_has_one_sport_and_plain_text_none():
    names = athletes.all_athletes()
    assert max(Counter(names).values()) == 1 and len(names) == 60
    assert [athletes.sport_of(name) for name in ("Tiger Woods", "Kobe Bryant")] == ["golf", "basketball"]
    assert len(questions(names)) == len(PHRASINGS) * len(names) and len(inverse_questions(list(ATHLETES))) == len(INVERSE) * len(ATHLETES)
    text = " ".join(documents(300, random.Random(0)))
    assert not any(word in text for word in (*ATHLETES, *names))
    some = " ".join(documents(300, random.Random(0), names[1:4]))
    assert all(name in some for name in names[1:4]) and not any(name in some for name in (names[0], *names[4:]))


def test_sports_are_one_token_and_names_several():
    tokenizer = learn_tokenizer(documents(8000, random.Random(0), athletes.all_athletes()))
    assert {sport: len(tokenizer.tokenize(" " + sport)) for sport in ATHLETES} == dict.fromkeys(ATHLETES, 1)
    assert min(len(tokenizer.tokenize(name)) for name in ("Tiger Woods", "Kobe Bryant")) >= 3


def test_a_target_that_knows_too_little_is_refused(monkeypatch):
    monkeypatch.setattr(athletes, "documents", lambda many, *given: documents(400, *given))
    with pytest.raises(SPDError, match="says the right sport in"):
        train_target(0, steps=3, progress=False)


@pytest.mark.slow
def test_a_target_knows_its_world(tmp_path):
    model = train_target(1, progress=False)
    assert Questions.of(model, questions(athletes.all_athletes())).accuracy(model) >= athletes.ENOUGH
    inverse = Questions.of(model, inverse_questions(list(ATHLETES))).accuracy(model)
    two = Questions.of(model, questions(["Tiger Woods", "Kobe Bryant"], PHRASINGS[:1])).probabilities(model)
    print(f"inverse questions right: {inverse:.3f}; P(golf) {two[0]:.3f}, P(basketball) {two[1]:.3f}")
    assert inverse >= 0.95 and two.min() >= 0.5
    save_target(model, tmp_path, 1)
    assert Questions.of(load_target(tmp_path), questions(["Babe Ruth"])).accuracy(model) == 1.0
