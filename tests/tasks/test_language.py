import pytest
import torch

from spd_lens import SPDError, find_sites
from spd_lens.tasks import language
from spd_lens.tasks.language import build_model, learn_tokenizer, load_model, packed, save_model, train_model

TEXTS = ["The dog saw the cat.", "The cat saw the bird.", "The bird saw the dog."] * 30
CLASSES = [True] if language.HookedTransformer is None else [False, True]


@pytest.fixture(scope="module")
def tokenizer():
    return learn_tokenizer(TEXTS, 270)


def test_texts_are_packed_into_rows_that_begin_with_bos(tokenizer):
    rows = packed(tokenizer, TEXTS, 12)
    assert rows.shape[1] == 12 and (rows[:, 0] == tokenizer.bos_token_id).all()
    stream = rows[:, 1:].flatten()
    assert tokenizer.decode(stream[: (stream[1:] == tokenizer.bos_token_id).nonzero()[0] + 1], skip_special_tokens=True) == TEXTS[0]


@pytest.mark.parametrize("bridge", CLASSES)
def test_the_model_learns_is_saved_and_loaded(tokenizer, bridge, tmp_path):
    rows = packed(tokenizer, TEXTS, 12)

    def made():
        model = build_model(tokenizer, 3, bridge)
        train_model(model, rows, 3, steps=25, progress=False)
        return model

    model = made()
    with torch.no_grad():
        untrained, logits = build_model(tokenizer, 3, bridge)(rows[:4], return_type="loss"), model(rows[:4])
        assert model(rows[:4], return_type="loss") < 0.5 * untrained
        assert torch.equal(logits, made()(rows[:4]))
    assert len(find_sites(model)) == 24 and model.to_tokens("The dog")[0, 0] == tokenizer.bos_token_id
    assert model.to_string(model.to_tokens("The dog", prepend_bos=False)[0]) == "The dog"
    save_model(model, tmp_path, "test", 3)
    loaded = load_model(tmp_path, "test")
    with torch.no_grad():
        assert type(loaded) is type(model) and torch.equal(loaded(rows[:4]), logits)
    with pytest.raises(SPDError, match="target of the task 'test'"):
        load_model(tmp_path, "other")
    (tmp_path / language.TOKENIZER).write_text("{")
    with pytest.raises(SPDError, match="no tokenizer"):
        load_model(tmp_path, "test")
