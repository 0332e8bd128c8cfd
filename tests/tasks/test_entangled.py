import json

import pytest
import torch

from spd_lens import SPDConfig
from spd_lens.report import entangled_page
from spd_lens.tasks import entangled, surgery
from spd_lens.tasks.entangled import run, setting

pytestmark = [pytest.mark.usefixtures("small"), pytest.mark.xdist_group("worlds")]  # one worker trains the small targets

QUICK = SPDConfig.targeted(steps=6, subcomponents=6, batch_size=4, gate_width=4)


@pytest.fixture(scope="module")
def outcome(fruit_model, small):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(entangled, "BACKGROUND", 150)
        patch.setattr(entangled, "TEXT", 8)
        for name, value in {"POOL": 6, "MOST": 3}.items():
            patch.setattr(surgery, name, value)
        yield run(fruit_model, QUICK, {"target": 1.0}, progress=False)


def test_the_background_says_nothing_of_the_three_nor_of_held_out_pairs(fruit_model):
    s = setting(fruit_model, 0)
    text = " ".join(fruit_model.tokenizer.batch_decode(torch.cat([s.background, s.text])))
    assert "red apple" not in text and "colour red" not in text and "every apple" not in text and "every pear" in text
    for questions in (s.sharing, s.apart):
        assert len(questions) and questions.accuracy(fruit_model) == 1.0
        for row in questions.tokens:
            asked = fruit_model.tokenizer.decode(row).split("The ")[-1].removesuffix(" tastes")
            assert f"The {asked} tastes" not in text
    assert list(s.asked) == ["red apple", "red", "apple"] and s.together.accuracy(fruit_model) == 1.0
    assert torch.equal(s.others("red").answers, s.together.answers[[0, 2]])


def test_the_outcome_counts_and_cuts_what_it_says(outcome):
    results = json.loads(json.dumps(outcome.results()))
    assert results["cuts"].keys() == results["active"].keys() == {"red apple", "red", "apple"}
    table, s = outcome.told_apart_table(), outcome.setting
    for concept, own in outcome.active.items():
        assert table["active"][concept] == len(own) >= table["on it alone"][concept]
        hooks = outcome.decomposition.ablate(entangled.grouped(outcome.cuts[concept]))
        assert outcome.effects[concept].answers["red"][1] == pytest.approx(float(s.asked["red"].probabilities(s.model, hooks)))
    assert set(entangled.goals({"seed 0": outcome.figures()})) >= {"red apple: fall", "red: subcomponents"}
    page = entangled_page(outcome)
    assert "Told apart?" in page and "adversarial" in page
