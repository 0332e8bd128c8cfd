"""Sequences of tokens as one batch, whatever they were given as, with their padding known.

1. `take_in` makes a `Batch` of an integer tensor, a numpy array, a tokenizer's dict, a text or several texts.
2. Inside, every sequence begins at position 0 and its padding comes behind it: a causal model never looks there, so each text gets what it gets
   alone. Where a person's padding is on the left, `Batch.given` puts results back into their layout, and `Batch.aligned` takes theirs.
3. What is counted or averaged is taken at real positions alone: `Batch.real`, `Batch.weights`, `Batch.outputs`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any
from weakref import WeakSet

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor, nn

from spd_lens.errors import SPDError
from spd_lens.sites import is_causal, model_device

TokensLike = Any  # an integer tensor or array [b, s], a tokenizer's dict, a `Batch`; a text or several, where the model has a tokenizer

IDS = ("input_ids", "tokens")  # what a mapping calls its token ids: the tokenizers, TransformerLens' `tokenize_and_concatenate`
TEXT_OPTIONS = ("prepend_bos", "padding_side", "truncate")  # of the model's own to_tokens
TOLERANCE = 1e-3  # of the logits' largest value, between a text alone and the same text padded
PADS_RIGHT: WeakSet[nn.Module] = WeakSet()  # models that were seen to give a padded text what it gets alone
CHANGES_INPUTS = ("position_ids", "inputs_embeds", "decoder_input_ids", "pixel_values")  # keys of a dict that we would have to pass on


@dataclass(frozen=True, eq=False)
class Batch:
    """Sequences that run together.

    Attributes:
        ids: `[b, s]`, each sequence from position 0 on, padding behind it.
        lengths: `[b]`, real tokens of each; None: no padding.
        offsets: `[b]`, how many padded positions stood before each in the tokens as they were given; None: none.
    """

    ids: Int[Tensor, "b s"]
    lengths: Int[Tensor, " b"] | None = None
    offsets: Int[Tensor, " b"] | None = None

    @classmethod
    def of(cls, tokens: "Batch | Tensor") -> "Batch":
        """A tensor of sequences of one length is a batch without padding; a batch stays what it is."""
        return tokens if isinstance(tokens, Batch) else cls(tokens)

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def shape(self) -> torch.Size:
        return self.ids.shape

    @property
    def device(self) -> torch.device:
        return self.ids.device

    @cached_property
    def real(self) -> Bool[Tensor, "b s"] | None:
        """Where there are tokens and no padding; None: everywhere."""
        if self.lengths is None:
            return None
        return torch.arange(self.ids.shape[1], device=self.device) < self.lengths[:, None]

    @cached_property
    def last(self) -> Int[Tensor, " b"]:
        """The last real position of each sequence."""
        return torch.full_like(self.ids[:, 0], self.shape[1] - 1) if self.lengths is None else self.lengths - 1

    @cached_property
    def numel(self) -> int:
        """How many real tokens there are."""
        return self.ids.numel() if self.lengths is None else int(self.lengths.sum())

    @property
    def model_arguments(self) -> dict[str, Tensor]:
        """What the model has to be told of the padding."""
        return {} if self.real is None else {"attention_mask": self.real.long()}

    @property
    def given_arguments(self) -> dict[str, Tensor]:
        """The same for the tokens in the layout that they were given in."""
        return {} if self.real is None else {"attention_mask": self.given(self.real).long()}

    def outputs(self, positions: str) -> int:
        """How many outputs are compared: of `all` real positions, or of the `last` of each sequence."""
        return len(self) if positions == "last" else self.numel

    def weights(self, positions: str) -> Float[Tensor, "b n"] | None:
        """1 at the compared outputs, 0 at padding; None: all are compared."""
        return None if positions == "last" or self.real is None else self.real.float()

    def mean(self, values: Float[Tensor, "*more b n"], positions: str) -> Float[Tensor, "*more"]:
        """The mean over the compared outputs."""
        weights = self.weights(positions)
        if weights is None:
            return values.flatten(-2).mean(-1)
        real = weights.to(values.dtype)
        return torch.where(real > 0, values, torch.zeros_like(values)).flatten(-2).sum(-1) / real.sum()

    def rows(self, values: Tensor) -> Tensor:
        """`[b, s, …] → [n, …]`: what stands at the real positions."""
        return values.flatten(0, 1) if self.real is None else values[self.real]

    def blanked(self, values: Shaped[Tensor, "b s *more"]) -> Shaped[Tensor, "b s *more"]:
        """0 (False) at padded positions, and unchanged elsewhere."""
        if self.real is None:
            return values
        return values.masked_fill(~self.real.view(*self.real.shape, *[1] * (values.ndim - 2)), 0)

    def compared(self, logits: Float[Tensor, "*more s v"], positions: str) -> Float[Tensor, "*more n v"]:
        """The outputs that count, of logits `[b, s, v]`, or `[variants·b, s, v]` of variants stacked along the batch."""
        if positions != "last" or logits.shape[-2] == 1:
            return logits
        if self.lengths is None:
            return logits[..., -1:, :]
        last = self.last.repeat(len(logits) // len(self))
        return logits[torch.arange(len(logits), device=logits.device), last][:, None]

    # --- parts and copies ---

    def __getitem__(self, rows: Any) -> "Batch":
        """Some of the sequences."""
        return Batch(self.ids[rows], *(None if part is None else part[rows] for part in (self.lengths, self.offsets)))

    def split(self, rows: int) -> list["Batch"]:
        """`rows` sequences at a time."""
        return [self[start : start + rows] for start in range(0, len(self), rows)]

    def repeated(self, times: int) -> "Batch":
        """The same sequences so many times over."""
        return Batch(self.ids.repeat(times, 1), *(None if part is None else part.repeat(times) for part in (self.lengths, self.offsets)))

    def alone(self, row: int = 0, most: int | None = None) -> "Batch":
        """One sequence without its padding, of it the first `most` tokens."""
        length = self.shape[1] if self.lengths is None else int(self.lengths[row])
        return Batch(self.ids[row : row + 1, : min(length, most or length)])

    def copy(self) -> "Batch":
        """The same in memory of its own."""
        return Batch(*(None if part is None else part.clone() for part in (self.ids, self.lengths, self.offsets)))  # pyright: ignore

    def to(self, device: torch.device) -> "Batch":
        return Batch(*(None if part is None else part.to(device) for part in (self.ids, self.lengths, self.offsets)))  # pyright: ignore

    # --- between this layout and that of the tokens as they were given ---

    def given(self, values: Shaped[Tensor, "b s *more"]) -> Shaped[Tensor, "b s *more"]:
        """From here to the positions of the tokens as they were given; what lands at padding has no meaning."""
        return values if self.offsets is None else _rolled(values, -self.offsets)

    def aligned(self, values: Tensor) -> Tensor:
        """From the positions of the tokens as they were given to here; what is the same at every position stays as it is."""
        if self.offsets is None or values.ndim < 2 or values.shape[1 if values.ndim > 2 else 0] == 1:
            return values
        whole = values if values.ndim > 2 else values[None]
        return _rolled(whole.expand(len(self), *whole.shape[1:]), self.offsets)

    def position(self, index: Int[Tensor, " b"]) -> Int[Tensor, " b"]:
        """Where a position of each sequence, as they were given, is here."""
        return index if self.offsets is None else index - self.offsets


def joined(batches: Sequence[Batch]) -> Batch:
    """Batches of equally long rows, one below the other."""
    padded = any(batch.lengths is not None for batch in batches)
    lengths = torch.cat([batch.last + 1 for batch in batches]) if padded else None
    return Batch(torch.cat([batch.ids for batch in batches]), lengths)


def _rolled(values: Tensor, by: Int[Tensor, " b"]) -> Tensor:
    """Row i of `[b, s, …]` moved to the left by `by[i]`, around the end."""
    s = values.shape[1]
    at = (torch.arange(s, device=values.device) + by[:, None].to(values.device)) % s
    return values.gather(1, at.view(*at.shape, *[1] * (values.ndim - 2)).expand_as(values))


# --- taking in ---


def is_text(tokens: Any) -> bool:
    """Whether it is a text, or a list of texts."""
    return isinstance(tokens, str) or (isinstance(tokens, (list, tuple)) and len(tokens) > 0 and all(isinstance(t, str) for t in tokens))


def take_in(model: Any, tokens: TokensLike, attention_mask: Any = None, **options: Any) -> Batch:
    """Checked tokens on the model's device.

    Args:
        tokens: an integer tensor or numpy array `[b, s]`; a dict with `input_ids` (and `attention_mask`), as a tokenizer returns it; a text or a
            list of texts, where the model has a tokenizer; a `Batch`.
        attention_mask: `[b, s]`, 1 at tokens and 0 at padding before or behind them. None: padding is known where texts or a dict with a mask
            are given; in a tensor, tokens that the model's tokenizer pads with are padding at the end of its padding side
            (`transformer_lens.utilities.get_attention_mask`).
        options: the model's own for texts: `prepend_bos`, `padding_side`, `truncate`.

    Raises:
        SPDError: what is given is no batch that this model can read.
    """
    if isinstance(tokens, Batch):
        if attention_mask is not None:
            raise SPDError("a Batch knows its padding; give its attention_mask where the batch is made.")
        _checked_ids(model, tokens.ids)
        return tokens.to(model_device(model))
    if isinstance(tokens, Mapping):
        tokens, attention_mask = _of_mapping(tokens, attention_mask)
    if is_text(tokens):
        return _of_texts(model, tokens, attention_mask, options)
    ids = _checked_ids(model, tokens)
    mask = None if attention_mask is None else _checked_mask(attention_mask, ids)
    found = _padded_by_tokenizer(model, ids)
    mask = found if mask is None else mask
    if mask is None or (bool(mask.all()) and (found is None or bool(found.all()))):
        return Batch(ids)
    return _checked_padding(model, _aligned(ids, mask))


def called_with(model: Any, args: Sequence[Any], arguments: Mapping[str, Any]) -> Batch | None:
    """What a model's own `forward` was called with; None where that is no tokens (a residual stream, say) or cannot be told."""
    given = args[0] if args else arguments.get("input", arguments.get("input_ids"))
    mask = arguments.get("attention_mask")
    if not is_text(given) and (not isinstance(given, Tensor) or given.ndim != 2 or given.is_floating_point()):
        return None
    if isinstance(mask, Tensor):
        mask = mask[:, -given.shape[1] :] if mask.ndim == 2 and isinstance(given, Tensor) else None
    texts = {key: arguments[key] for key in TEXT_OPTIONS if arguments.get(key) is not None}
    try:
        return take_in(model, given, mask, **texts)
    except SPDError:
        return None


def _of_mapping(given: Mapping[str, Any], attention_mask: Any) -> tuple[Any, Any]:
    name = next((name for name in IDS if name in given), None)
    if name is None:
        raise SPDError(f"tokens were given as a dict with {', '.join(map(str, given)) or 'nothing in it'}; it has to hold input_ids "
                       "(and may hold an attention_mask), as a tokenizer returns it. Of a DatasetDict give a split.")  # fmt: skip
    ids = given[name]
    if isinstance(ids, list) and ids and isinstance(ids[0], Tensor):
        raise SPDError(f"{name} is a list of {len(ids)} tensors {list(ids[0].shape)}, as a DataLoader makes of a dataset without a format "
                       "(columns, not rows); call dataset.set_format('torch') first.")  # fmt: skip
    if changing := [key for key in CHANGES_INPUTS if given.get(key) is not None]:
        raise SPDError(f"tokens were given as a dict with {', '.join(changing)}, which would change what the model reads; give input_ids and attention_mask alone.")  # fmt: skip
    kinds = given.get("token_type_ids")
    if kinds is not None and bool(np.any(np.asarray(kinds) != 0)):
        raise SPDError(
            "tokens were given as a dict with token_type_ids of a second segment, which are not passed to the model; give one segment."
        )
    mask = given.get("attention_mask") if attention_mask is None else attention_mask
    if isinstance(ids, list) and ids and all(isinstance(row, list) and row for row in ids):  # as a tokenizer gives without return_tensors
        rows = [torch.tensor(row, device="cpu") for row in ids]
        if mask is None or len({len(row) for row in ids}) > 1:
            mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
        ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    return ids, mask


def _of_texts(model: Any, texts: str | Sequence[str], attention_mask: Any, options: Mapping[str, Any]) -> Batch:
    if getattr(model, "tokenizer", None) is None:
        raise SPDError("text was given, but the model has no tokenizer; give token ids [b, s].")
    if attention_mask is not None:
        raise SPDError("text was given with an attention_mask; of texts the padding is known, leave attention_mask out.")
    texts = [texts] if isinstance(texts, str) else list(texts)
    ids = _checked_ids(model, model.to_tokens(texts, **options))
    if len(texts) == 1:
        return Batch(ids)
    lengths = torch.tensor([model.to_tokens(text, **options).shape[1] for text in texts], device=ids.device)
    side = options.get("padding_side") or getattr(model.tokenizer, "padding_side", "right")
    at = torch.arange(ids.shape[1], device=ids.device)
    mask = at < lengths[:, None] if side == "right" else at >= ids.shape[1] - lengths[:, None]
    return Batch(ids) if bool(mask.all()) else _checked_padding(model, _aligned(ids, mask))


def _checked_ids(model: Any, tokens: Any) -> Int[Tensor, "b s"]:
    """Token ids that the model can read, on its device."""
    if isinstance(tokens, np.ndarray):
        if tokens.dtype.kind not in "iu":
            raise SPDError(f"tokens are a numpy array of {tokens.dtype}; token ids are integers.")
        tokens = torch.from_numpy(np.ascontiguousarray(tokens).astype(np.int64))
    if not isinstance(tokens, Tensor):
        raise SPDError(f"tokens were given as {type(tokens).__name__}; give an integer tensor [b, s].")
    if tokens.is_floating_point() or tokens.is_complex() or tokens.dtype == torch.bool:
        raise SPDError(f"tokens are {tokens.dtype}; token ids are integers. Use tokens.long() if they are whole numbers.")
    if tokens.ndim != 2:
        mend = "tokens[None]" if tokens.ndim == 1 else "tokens.flatten(0, -2)"
        raise SPDError(f"tokens have shape {list(tokens.shape)}; give [b, s], e.g. {mend}.")
    if tokens.numel() == 0:
        raise SPDError(f"tokens are empty (shape {list(tokens.shape)}); give at least one sequence of one token.")
    context, vocabulary = model.cfg.n_ctx, model.cfg.d_vocab
    if tokens.shape[1] > context:
        raise SPDError(f"tokens have {tokens.shape[1]} positions and the model's n_ctx is {context}; cut the sequences.")
    tokens = tokens.to(model_device(model), torch.long).contiguous()
    low, high = int(tokens.min()), int(tokens.max())
    if low < 0 or high >= vocabulary:
        raise SPDError(f"token ids run from {low} to {high}; the model's vocabulary is 0 … {vocabulary - 1}. Another tokenizer's?")
    return tokens


def _checked_mask(attention_mask: Any, ids: Tensor) -> Bool[Tensor, "b s"]:
    mask = torch.as_tensor(attention_mask, device=ids.device) if isinstance(attention_mask, (np.ndarray, list, tuple)) else attention_mask
    if not isinstance(mask, Tensor) or mask.shape != ids.shape:
        given = f"shape {list(mask.shape)}" if isinstance(mask, Tensor) else f"a {type(mask).__name__}"
        raise SPDError(
            f"attention_mask has {given}; it has to be a tensor of the tokens' shape {list(ids.shape)}, 1 at tokens and 0 at padding."
        )
    if not bool(((mask == 0) | (mask == 1)).all()):
        raise SPDError("attention_mask holds other values than 0 and 1; it is 1 at tokens and 0 at padding.")
    mask = mask.to(ids.device).bool()
    starts = (mask[:, 1:] & ~mask[:, :-1]).sum(1) + mask[:, 0].long()
    if len(wrong := torch.nonzero(starts != 1)):
        n = int(wrong[0])
        what = "no token at all" if not bool(mask[n].any()) else "gaps between its tokens"
        raise SPDError(f"attention_mask leaves sequence {n} {what}; padding stands before a sequence's tokens or behind them. Leave out what is empty.")  # fmt: skip
    return mask


def _padded_by_tokenizer(model: Any, ids: Tensor) -> Bool[Tensor, "b s"] | None:
    """Where the model's tokenizer would have padded, by TransformerLens' own rule; None: it does not pad, or nothing is."""
    tokenizer = getattr(model, "tokenizer", None)
    pad = getattr(tokenizer, "pad_token_id", None)
    if tokenizer is None or not isinstance(pad, int):
        return None
    is_pad = ids == pad
    left = getattr(tokenizer, "padding_side", "right") == "left"
    run = is_pad.long().cumprod(1) if left else is_pad.flip(1).long().cumprod(1).flip(1)
    padded = run.bool()
    if left and getattr(tokenizer, "bos_token_id", None) == pad and getattr(model.cfg, "default_prepend_bos", True):
        first = padded.sum(1) - 1  # the beginning of the text has the same id
        padded[torch.arange(len(ids), device=ids.device)[first >= 0], first[first >= 0]] = False
    if bool(padded.all(1).any()):
        n = int(torch.nonzero(padded.all(1))[0])
        raise SPDError(
            f"sequence {n} holds nothing but the token {pad}, which the model's tokenizer pads with; leave it out, or give attention_mask=."
        )
    return ~padded if bool(padded.any()) else None


def _aligned(ids: Tensor, mask: Bool[Tensor, "b s"]) -> Batch:
    """Each sequence moved to the beginning; where it was, kept."""
    lengths, offsets = mask.sum(1), mask.long().argmax(1)
    return Batch(_rolled(ids, offsets), lengths, offsets) if bool(offsets.any()) else Batch(ids, lengths)


@torch.no_grad()
def _checked_padding(model: Any, batch: Batch) -> Batch:
    """Once a model: a padded text has to get what the text alone gets."""
    if model in PADS_RIGHT or batch.lengths is None:
        return batch
    row = int(batch.lengths.argmin())
    alone, one = batch.alone(row), batch[row : row + 1]
    with_padding = model(one.ids, return_type="logits", **one.model_arguments)[:, : alone.shape[1]]
    clean = model(alone.ids, return_type="logits")
    if float((with_padding - clean).abs().max()) > TOLERANCE * max(1.0, float(clean.abs().max())):
        why = "" if is_causal(model) else " (HookedTransformer does so where attention looks both ways)"
        raise SPDError(
            f"this model gives a padded text other outputs than the text alone{why}; give texts of one length, or one at a time."
        )
    PADS_RIGHT.add(model)
    return batch
