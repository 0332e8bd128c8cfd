"""Batches of tokens for the trainer, from what `decompose` was given:

1. one batch of everything (a tensor, a dict with `input_ids`): each step draws rows of it;
2. a stream of batches (a list, a DataLoader, a generator): each step takes the next one, and what can be gone through again is, as often as
   the steps need;
3. a dataset of Hugging Face, map-style or streaming: `config.batch_size` of its rows, in its order, make a batch of such a stream.
"""

import itertools
import operator
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from spd_lens.config import SPDConfig
from spd_lens.errors import SPDError
from spd_lens.tokens import IDS, Batch, joined, take_in

SAMPLE_OUTPUTS, SAMPLE_TOKENS = (
    1 << 13,
    1 << 16,
)  # on which the curvature is measured, and the need for each subcomponent: no more of either


class Batches:
    """Drawn from one tensor, or taken from a stream.

    Attributes:
        whole: the tensor; None for a stream.
        example: a batch; of a stream the first of the length that most sequences have.
        sample: the first sequences of that length, until there are enough of them. Of a stream none of them is lost.
        reach: the longest sequence seen so far.
        again: whether the stream can be gone through more than once.
    """

    def __init__(self, model: Any, tokens: Any, config: SPDConfig, attention_mask: Any = None):
        self.model, self.config, self.fetched, self.again = model, config, 0, True
        if _is_masked_pair(tokens):
            raise SPDError(f"tokens are a pair of tensors {list(tokens[0].shape)}, and the second holds 0 and 1 alone; it would be taken for a batch of "
                           "tokens. Give {'input_ids': …, 'attention_mask': …}.")  # fmt: skip
        self.whole = take_in(model, tokens, attention_mask) if _is_one(tokens) else None
        if self.whole is None and attention_mask is not None:
            raise SPDError(
                "an attention_mask was given beside an iterable of batches; give each batch as a dict with input_ids and attention_mask."
            )
        if self.whole is not None:
            self.example, self.sample = self.whole[: config.batch_size], self.whole[: self._enough(self.whole)]
            self.reach = self.whole.shape[1]
            return
        self.source: Iterable[Any] = _Rows(tokens, config.batch_size) if _is_dataset(tokens) else tokens
        self.iterator, self.pending = iter(self.source), deque[Batch]()
        self.again = self.iterator is not self.source
        known = operator.length_hint(self.source, config.steps) if not self.again else config.steps
        for _ in range(max(1, config.steps)):
            if not self._fetch():
                known = known if self.again else len(self.pending)
                break
            if sum(map(len, self.pending)) >= self._enough(self.pending[0]):
                break
        if not self.pending:
            raise SPDError("tokens are an iterable without a single batch; give batches of [b, s], or one tensor [N, s].")
        if known < config.steps:
            raise SPDError(f"there are {known} batches for {config.steps} steps, and an iterator cannot be gone through again; give more, "
                           f"a list or a DataLoader of them, which can, or set steps={known}.")  # fmt: skip
        lengths = Counter(length for batch in self.pending for length in [batch.shape[1]] * len(batch))
        usual = [batch for batch in self.pending if batch.shape[1] == lengths.most_common(1)[0][0]]
        self.example, self.sample, self.reach = usual[0], joined(usual), max(lengths)

    def _enough(self, tokens: Batch) -> int:
        """How many sequences of these tokens' length make a sample."""
        length = tokens.shape[1]
        outputs = 1 if self.config.output_positions == "last" else length
        return max(1, min(SAMPLE_OUTPUTS // outputs, SAMPLE_TOKENS // length))

    def skip(self, steps: int) -> None:
        """On resuming: batches of a stream that were used before the interruption."""
        for step in range(steps if self.whole is None else 0):
            if not self.ready():
                raise SPDError(
                    f"the batches end after {step}, and the checkpoint is of step {steps}; resume with the ones that it was made with."
                )
            self.pending.popleft()

    def ready(self) -> bool:
        """Whether there is a batch for another step. Of a stream it is fetched here, so that `take` cannot fail."""
        if self.whole is None and not self.pending and not self._fetch() and self.again:
            self.iterator = iter(self.source)
            self._fetch()
        return self.whole is not None or bool(self.pending)

    def take(self, generator: torch.Generator | None) -> Batch:
        """The batch of the next step, where there is one (`ready`)."""
        if self.whole is None:
            return self.pending.popleft()
        rows = torch.randint(len(self.whole), (self.config.batch_size,), generator=generator, device=self.whole.device)
        return self.whole[rows]

    def _fetch(self) -> bool:
        """One more batch of this pass over the stream; False at its end."""
        for batch in self.iterator:
            self.fetched += 1
            try:
                self.pending.append(self._checked(batch))
            except SPDError as error:
                raise SPDError(f"batch {self.fetched} of the stream: {error}") from None
            return True
        return False

    def _checked(self, batch: Any) -> Batch:
        parts: Any = batch if isinstance(batch, (list, tuple)) else ()
        if any(isinstance(part, (Tensor, Mapping)) for part in parts):  # as those of a TensorDataset come
            if len(parts) > 1:
                raise SPDError(
                    f"it is a {type(batch).__name__} of {len(parts)}; give the token ids [b, s] alone, or a dict with input_ids."
                )
            batch = parts[0]
        if isinstance(batch, (Tensor, np.ndarray)) and batch.ndim == 1:
            raise SPDError(f"it is a single sequence, of shape {list(batch.shape)}; give batches [b, s], e.g. torch.utils.data.DataLoader(sequences, "
                           "batch_size=…).")  # fmt: skip
        return take_in(self.model, batch).copy()  # a stream may write its next batch into the same memory


def _is_one(tokens: Any) -> bool:
    """Whether this is one batch of everything, and no stream. What is neither is refused as a batch."""
    if isinstance(tokens, (list, tuple)) and tokens:
        first = tokens[0]
        of_numbers = isinstance(first, (list, tuple)) and bool(first) and isinstance(first[0], int)
        return of_numbers or isinstance(first, (str, int))
    return isinstance(tokens, (Tensor, np.ndarray, Mapping, str, Batch)) or not (
        hasattr(tokens, "__iter__") or hasattr(tokens, "__getitem__")
    )


def _is_masked_pair(tokens: Any) -> bool:
    """Ids and their attention mask, which a stream of two batches cannot be told from but by its numbers."""
    if not isinstance(tokens, tuple) or len(tokens) != 2 or not all(isinstance(part, Tensor) for part in tokens):
        return False
    ids, mask = tokens
    return ids.shape == mask.shape and bool(mask.numel()) and bool(((mask == 0) | (mask == 1)).all()) and bool((ids > 1).any())


def _is_dataset(tokens: Any) -> bool:
    """Of Hugging Face `datasets`, map-style or streaming."""
    return hasattr(tokens, "column_names") and hasattr(tokens, "features")


@dataclass(frozen=True, eq=False)
class _Rows:
    """A dataset's rows as batches. Those left over at the end of a pass are left out, unless they are all there is."""

    dataset: Any
    size: int

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        rows = iter(self.dataset)
        for number in itertools.count():
            batch = list(itertools.islice(rows, self.size))
            if not batch or (number and len(batch) < self.size):
                return
            yield _collated(batch)


def _collated(rows: list[Mapping[str, Any]]) -> dict[str, Tensor]:
    """`input_ids` and `attention_mask` `[b, s]`; shorter rows are padded on the right."""
    name = next((name for name in IDS if name in rows[0]), None)
    if name is None:
        raise SPDError(f"the dataset has the columns {', '.join(rows[0])}; token ids are looked for in {' or '.join(IDS)}. Tokenise it first: "
                       "transformer_lens.utilities.tokenize_and_concatenate(dataset, model.tokenizer, max_length=model.cfg.n_ctx).")  # fmt: skip
    ids = [torch.as_tensor(row[name], device="cpu") for row in rows]
    real = [torch.as_tensor(row.get("attention_mask", torch.ones_like(one)), device="cpu") for row, one in zip(rows, ids)]

    def padded(sequences: list[Tensor]) -> Tensor:
        return torch.nn.utils.rnn.pad_sequence(sequences, batch_first=True)

    return {"input_ids": padded(ids), "attention_mask": padded(real)}
