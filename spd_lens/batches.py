"""Batches of tokens for the trainer."""

import itertools
from collections import deque
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from spd_lens.config import SPDConfig
from spd_lens.errors import SPDError
from spd_lens.tokens import Batch, is_text, joined, take_in

SAMPLE_OUTPUTS, SAMPLE_TOKENS = (
    1 << 13,
    1 << 16,
)  # on which the curvature is measured, and the need for each subcomponent: no more of either


class Batches:
    """Drawn from one tensor, or taken from an iterable.

    Attributes:
        whole: the tensor; None for an iterable.
        example: the first batch.
        sample: the first sequences, of the first one's length, until there are enough of them. Of an iterable none of them is lost.
    """

    def __init__(self, model: Any, tokens: Any, config: SPDConfig, attention_mask: Any = None):
        self.model, self.config = model, config
        one = isinstance(tokens, (Tensor, np.ndarray, Mapping, Batch)) or is_text(tokens)
        self.whole = take_in(model, tokens, attention_mask) if one else None
        if not one and attention_mask is not None:
            raise SPDError(
                "an attention_mask was given beside an iterable of batches; give each batch as a dict with input_ids and attention_mask."
            )
        if self.whole is not None:
            self.example, self.sample = self.whole[: config.batch_size], self.whole[: self._enough(self.whole)]
            return
        self.iterator, self.pending = iter(tokens), deque()
        for batch in itertools.islice(self.iterator, max(1, config.steps)):
            self.pending.append(take_in(model, batch))
            if sum(map(len, self.pending)) >= self._enough(self.pending[0]):
                break
        if not self.pending:
            raise SPDError("tokens are an iterable without a single batch; give batches of [b, s], or one tensor [N, s].")
        self.example = self.pending[0]
        self.sample = joined([batch for batch in self.pending if batch.shape[1] == self.example.shape[1]])

    def _enough(self, tokens: Batch) -> int:
        """How many sequences of these tokens' length make a sample."""
        length = tokens.shape[1]
        outputs = 1 if self.config.output_positions == "last" else length
        return max(1, min(SAMPLE_OUTPUTS // outputs, SAMPLE_TOKENS // length))

    def skip(self, steps: int) -> None:
        """On resuming: batches of an iterable that were used before the interruption."""
        if self.whole is None:
            for step in range(steps):
                self.take(step, None)

    def take(self, step: int, generator: torch.Generator | None) -> Batch:
        if self.whole is not None:
            rows = torch.randint(len(self.whole), (self.config.batch_size,), generator=generator, device=self.whole.device)
            return self.whole[rows]
        if self.pending:
            return self.pending.popleft()
        batch = next(self.iterator, None)
        if batch is None:
            raise SPDError(f"the batches ended after {step} of {self.config.steps} steps; give more, or set steps={step}.")
        return take_in(self.model, batch)
