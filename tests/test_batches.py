import inspect

import datasets
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset
from tqdm import tqdm

from spd_lens import SPDConfig, SPDError, decompose
from spd_lens.batches import SAMPLE_OUTPUTS, SAMPLE_TOKENS, Batches
from tests import zoo


def taken(data):
    assert data.ready()
    return data.take(None)


def same(batches, given):
    return len(batches) == len(given) and all(torch.equal(a.ids, b) for a, b in zip(batches, given))


def test_a_tensor_is_drawn_from(model):
    data = Batches(model, zoo.tokens(7), SPDConfig(batch_size=4))
    generator = torch.Generator().manual_seed(0)
    batch = data.take(generator)
    assert batch.shape == (4, 11) and all(any(torch.equal(row, own) for own in data.whole.ids) for row in batch.ids)
    assert len(data.example) == 4 and len(data.sample) == 7


@pytest.mark.parametrize("positions, many", [("all", SAMPLE_OUTPUTS // 11), ("last", SAMPLE_TOKENS // 11)])
def test_the_sample_has_enough_outputs_of_not_too_many_tokens(model, positions, many):
    data = Batches(model, zoo.tokens(SAMPLE_TOKENS // 10), SPDConfig(output_positions=positions))
    assert data.sample.shape == (many, 11)


def test_the_sample_of_a_stream_loses_no_batch(model):
    given = [zoo.tokens(200, seed=seed) for seed in range(35)]
    data = Batches(model, (batch for batch in given), SPDConfig())
    assert 0 <= len(data.sample) - SAMPLE_OUTPUTS // 11 < 200
    assert torch.equal(data.sample.ids, torch.cat(given)[: len(data.sample)]) and torch.equal(data.example.ids, given[0])
    assert same([taken(data) for _ in given], given)
    assert not data.ready() and not data.ready()


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
    assert [len(taken(data)) for _ in range(3)] == [2, 3, 4]


def test_the_first_batch_is_not_taken_for_all(model):
    """A short one, or one of few sequences: the sample is of the usual length, and positions reach as far as the longest."""
    given = [zoo.tokens(1, 3), zoo.tokens(4, 11), zoo.tokens(4, 11, seed=1), zoo.tokens(1, 17)]
    data = Batches(model, given, SPDConfig(steps=4))
    assert torch.equal(data.sample.ids, torch.cat(given[1:3])) and torch.equal(data.example.ids, given[1]) and data.reach == 17
    assert same([taken(data) for _ in range(4)], given)
    d = decompose(model, given, SPDConfig(steps=4, subcomponents=33, gate_width=2, sites="blocks.0.attn.W_Q"), progress=False)
    assert d.gates["blocks.0.attn.W_Q"].context == 17


def test_resuming_skips_what_was_used(model):
    given = [zoo.tokens(2, seed=seed) for seed in range(6)]
    data = Batches(model, iter(given), SPDConfig(steps=6))
    data.skip(4)
    assert torch.equal(taken(data).ids, given[4])
    with pytest.raises(SPDError, match="the batches end after 6, and the checkpoint is of step 7; resume with the ones"):
        Batches(model, iter(given), SPDConfig(steps=6)).skip(7)


# --- streams of every kind ---

KINDS = {
    "list": lambda x: list(x.split(4)),
    "tuple": lambda x: x.split(4),
    "loader": lambda x: DataLoader(x, batch_size=4),
    "loader of lists": lambda x: DataLoader(TensorDataset(x), batch_size=4),
    "dicts": lambda x: [{"input_ids": part, "attention_mask": torch.ones_like(part)} for part in x.split(4)],
    "lists of dicts": lambda x: [[{"input_ids": part}] for part in x.split(4)],
    "TransformerLens' name": lambda x: [{"tokens": part} for part in x.split(4)],
    "HF": lambda x: datasets.Dataset.from_dict({"input_ids": x.tolist()}),
    "HF torch": lambda x: datasets.Dataset.from_dict({"tokens": x.tolist(), "n": [0] * 8}).with_format("torch"),
    "HF streaming": lambda x: datasets.Dataset.from_dict({"input_ids": x.tolist()}).to_iterable_dataset(),
    "HF loader": lambda x: DataLoader(datasets.Dataset.from_dict({"input_ids": x.tolist()}).with_format("torch"), batch_size=4),
    "HF generated": lambda x: datasets.Dataset.from_list([{"input_ids": row, "text": ""} for row in x.tolist()]).to_iterable_dataset(3),
}


@pytest.mark.parametrize("kind", KINDS)
def test_what_can_be_gone_through_again_is(model, kind):
    x = zoo.tokens(8)
    data = Batches(model, KINDS[kind](x), SPDConfig(steps=5, batch_size=4))
    assert torch.equal(data.sample.ids, x)
    assert same([taken(data) for _ in range(5)], [x[:4], x[4:], x[:4], x[4:], x[:4]])
    later = Batches(model, KINDS[kind](x), SPDConfig(steps=5, batch_size=4))
    later.skip(3)
    assert same([taken(later), taken(later)], [x[4:], x[:4]])


def test_a_dict_is_one_batch_of_everything(model):
    data = Batches(model, {"input_ids": zoo.tokens(7)}, SPDConfig(batch_size=4))
    assert torch.equal(data.whole.ids, zoo.tokens(7))


def test_rows_left_over_are_left_out_unless_they_are_all(model):
    def of(many, size):
        rows = datasets.Dataset.from_dict({"input_ids": zoo.tokens(many).tolist()})
        data = Batches(model, rows, SPDConfig(steps=4, batch_size=size))
        return [len(taken(data)) for _ in range(4)]

    assert of(9, 4) == [4] * 4 and of(3, 4) == [3] * 4


@pytest.mark.parametrize("once", [lambda given: map(torch.clone, given), lambda given: tqdm(iter(given), total=90, disable=True)])
def test_what_cannot_be_gone_through_again_ends(model, once):
    """An iterator; and what begins anew by its looks, and is empty then. Neither says truly how much it holds."""
    data = Batches(model, once([zoo.tokens(200, seed=seed) for seed in range(9)]), SPDConfig(steps=90))
    for _ in range(9):
        taken(data)
    assert not data.ready()


@pytest.mark.parametrize("short", [iter, lambda given: iter(DataLoader(torch.cat(given), batch_size=2)), lambda given: (x for x in given)])
def test_an_iterator_that_is_known_to_end_is_told_of_before(model, short):
    with pytest.raises(SPDError, match="there are 3 batches for 6 steps, .* set steps=3"):
        Batches(model, short([zoo.tokens(2)] * 3), SPDConfig(steps=6))
    assert Batches(model, short([zoo.tokens(2)] * 3), SPDConfig(steps=3)).ready()


def test_a_long_iterator_that_says_its_length_is_told_of_before(model):
    with pytest.raises(SPDError, match="there are 3 batches for 6 steps"):
        Batches(model, iter([zoo.tokens(SAMPLE_OUTPUTS)] * 3), SPDConfig(steps=6))


def test_a_stream_may_write_into_the_same_memory(model):
    def batches():
        memory = torch.empty(2, 11, dtype=torch.long)
        for seed in range(4):
            yield memory.copy_(zoo.tokens(2, seed=seed))

    data = Batches(model, batches(), SPDConfig(steps=4))
    assert same([taken(data) for _ in range(4)], [zoo.tokens(2, seed=seed) for seed in range(4)])


@pytest.mark.parametrize(
    "given, message",
    [
        (5, "tokens were given as int"),
        ([5, 6], "tokens were given as list"),
        ([], "without a single batch"),
        ([zoo.tokens(2), zoo.tokens(2) + 45], "batch 2 of the stream: token ids run from"),
        ([[zoo.tokens(2), zoo.tokens(2)]], "batch 1 of the stream: it is a list of 2; give the token ids"),
        ((zoo.tokens(2), torch.ones(2, 11, dtype=torch.long)), "the second holds 0 and 1 alone; .* 'attention_mask'"),
        (zoo.tokens(2).unbind(), r"batch 1 of the stream: it is a single sequence, of shape \[11\]; .*DataLoader"),
        (TensorDataset(zoo.tokens(2)), r"batch 1 of the stream: it is a single sequence, of shape \[11\]; .*DataLoader"),
        ({"train": zoo.tokens(2)}, r"a dict with train; it has to hold input_ids .* Of a DatasetDict give a split"),
        (datasets.DatasetDict(train=datasets.Dataset.from_dict({"input_ids": [[1]]})), "a dict with train; it has to hold input_ids"),
        (datasets.Dataset.from_dict({"text": ["a"], "n": [1]}), "columns text, n; .*Tokenise it first: .*tokenize_and_concatenate"),
        (
            datasets.Dataset.from_dict({"text": ["a"]}).to_iterable_dataset(),
            "columns text; token ids are looked for in input_ids or tokens",
        ),
        (DataLoader(datasets.Dataset.from_dict({"input_ids": zoo.tokens(4).tolist()}), batch_size=4), "list of 11 tensors .*set_format"),
    ],
)
def test_what_is_no_batch_is_told_before(model, given, message):
    with pytest.raises(SPDError, match=message):
        Batches(model, given, SPDConfig(steps=6, batch_size=4))


def test_the_named_way_to_tokenise_is_there():
    from transformer_lens.utilities import tokenize_and_concatenate

    assert "max_length" in inspect.signature(tokenize_and_concatenate).parameters


def test_rows_of_several_lengths_are_padded_and_known_to_be():
    model = zoo.native()
    rows = datasets.Dataset.from_dict({"input_ids": [[1, 2], [3], [4, 5], [6]]})
    data = Batches(model, rows, SPDConfig(steps=3, batch_size=2))
    assert data.sample.lengths.tolist() == [2, 1, 2, 1] and data.take(None).numel == 3
    loose = {"input_ids": [[1, 2], [3]], "attention_mask": [[1, 1], [1]]}  # as a tokenizer gives without padding
    assert Batches(model, loose, SPDConfig()).whole.lengths.tolist() == [2, 1]
    ids, mask = torch.tensor([[1, 2], [3, 0]]), torch.tensor([[1, 1], [1, 0]])
    for given, more in (
        ({"input_ids": ids, "attention_mask": mask}, None),
        (ids, mask),
        ([{"input_ids": ids, "attention_mask": mask}], None),
    ):
        data = Batches(model, given, SPDConfig(steps=1), more)
        assert (data.example if data.whole is None else data.whole).lengths.tolist() == [2, 1]
