import pytest
import torch

from spd_lens import SPDConfig, SPDError
from spd_lens.batches import SAMPLE_OUTPUTS, SAMPLE_TOKENS, Batches
from tests import zoo


def test_a_tensor_is_drawn_from(model):
    data = Batches(model, zoo.tokens(7), SPDConfig(batch_size=4))
    generator = torch.Generator().manual_seed(0)
    batch = data.take(0, generator)
    assert batch.shape == (4, 11) and all(any(torch.equal(row, own) for own in data.whole) for row in batch)
    assert len(data.example) == 4 and len(data.sample) == 7


@pytest.mark.parametrize("positions, many", [("all", SAMPLE_OUTPUTS // 11), ("last", SAMPLE_TOKENS // 11)])
def test_the_sample_has_enough_outputs_of_not_too_many_tokens(model, positions, many):
    data = Batches(model, zoo.tokens(SAMPLE_TOKENS // 10), SPDConfig(output_positions=positions))
    assert data.sample.shape == (many, 11)


def test_the_sample_of_an_iterable_loses_no_batch(model):
    given = [zoo.tokens(200, seed=seed) for seed in range(35)]
    data = Batches(model, iter(given), SPDConfig())
    assert 0 <= len(data.sample) - SAMPLE_OUTPUTS // 11 < 200
    assert torch.equal(data.sample, torch.cat(given)[: len(data.sample)]) and torch.equal(data.example, given[0])
    assert all(torch.equal(data.take(step, None), batch) for step, batch in enumerate(given))
    with pytest.raises(SPDError, match=f"ended after {len(given)} of 2400 steps"):
        data.take(len(given), None)


def test_no_more_is_asked_for_than_there_are_steps(model):
    asked = []

    def batches():
        for seed in range(100):
            asked.append(seed)
            yield zoo.tokens(2, seed=seed)

    Batches(model, batches(), SPDConfig(steps=3))
    assert asked == [0, 1, 2]


def test_batches_of_another_length_are_left_out_of_the_sample(model):
    data = Batches(model, iter([zoo.tokens(2, 5), zoo.tokens(3, 7), zoo.tokens(4, 5)]), SPDConfig(steps=3))
    assert data.sample.shape == (6, 5)
    assert [len(data.take(step, None)) for step in range(3)] == [2, 3, 4]


def test_resuming_skips_what_was_used(model):
    given = [zoo.tokens(2, seed=seed) for seed in range(6)]
    data = Batches(model, iter(given), SPDConfig(steps=6))
    data.skip(4)
    assert torch.equal(data.take(4, None), given[4])
