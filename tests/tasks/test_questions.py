import pytest
import torch

from spd_lens.losses import kl_divergence
from spd_lens.tasks.language import build_model, learn_tokenizer
from spd_lens.tasks.questions import Questions, drift

ASKED = [("The dog saw the", "cat"), ("The quick brown dog saw the", "dog")]


@pytest.fixture(scope="module")
def model():
    return build_model(learn_tokenizer(["The quick brown dog saw the cat."] * 9, 280), 0)


def test_shorter_texts_begin_with_more_bos_and_answers_are_the_token_with_its_space(model):
    asked = Questions.of(model, ASKED)
    bos = model.tokenizer.bos_token_id
    assert (asked.tokens[0] == bos).sum() > (asked.tokens[1] == bos).sum() == 1
    assert [model.to_string(answer) for answer in asked.answers] == [" cat", " dog"]
    p = asked.probabilities(model)
    assert torch.allclose(p, model(asked.tokens)[:, -1].softmax(-1)[[0, 1], asked.answers]) and len(asked[1:]) == 1
    right = Questions(asked.tokens, model(asked.tokens)[:, -1].argmax(-1))
    assert right.accuracy(model) == 1.0


def test_drift_is_the_kl_of_what_hooks_change(model):
    text = Questions.of(model, ASKED).tokens
    assert drift(model, text, []).p99 == 0
    hooks = [("blocks.1.hook_attn_out", lambda x, hook: 0 * x)]
    kl = kl_divergence(model(text), model.run_with_hooks(text, fwd_hooks=hooks)).flatten()
    moved = drift(model, text, hooks)
    assert moved.mean == pytest.approx(float(kl.mean().detach())) and moved.mean < moved.p99 <= float(kl.max().detach()) + 1e-6
