"""The part of a forward pass that a replaced matrix changes: the blocks from its layer on, and of the unembedding the positions
that are compared.

1. `recorded` keeps what every block returns in the clean pass.
2. `resumed` lets the blocks before a layer return that again instead of computing it.
3. `compared_only` lets the unembedding see the last position alone, where that is all that is compared.

All three borrow: afterwards the model is as it was.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from spd_lens.tokens import Batch

LOGITS = 1 << 27  # numbers: 0.5 GiB; a divergence takes a few times as much
Outputs = list[Any]  # one a block: its tensor, or the tuple that its class returns


@contextmanager
def recorded(model: Any) -> Iterator[Outputs]:
    """A list that holds, after a forward pass inside, what each block returned."""
    outputs: Outputs = [None] * len(model.blocks)
    handles = [block.register_forward_hook(_keep(outputs, i)) for i, block in enumerate(model.blocks)]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


def _keep(outputs: Outputs, index: int) -> Callable[..., None]:
    def keep(module: Any, arguments: Any, output: Any) -> None:
        outputs[index] = output

    return keep


def repeated(output: Any, batch: int, times: int) -> Any:
    """What a block would return for the batch `times` times over."""
    if isinstance(output, Tensor) and output.ndim and output.shape[0] == batch and times > 1:
        return output.repeat(times, *[1] * (output.ndim - 1))
    if isinstance(output, (tuple, list)):
        return type(output)(repeated(part, batch, times) for part in output)
    return output


@contextmanager
def resumed(model: Any, output: Any, layer: int) -> Iterator[None]:
    """The blocks before `layer` return `output` without computing anything; only what the last of them returns is read."""
    blocks = list(model.blocks)[:layer]
    before = [block.__dict__.get("forward") for block in blocks]
    try:
        for block in blocks:
            block.__dict__["forward"] = lambda *_, **__: output
        yield
    finally:
        for block, forward in zip(blocks, before):
            block.__dict__.pop("forward", None)
            if forward is not None:
                block.__dict__["forward"] = forward


def rows_at_once(model: Any, length: int, most: int) -> int:
    """How many sequences of this length to run together, so that their logits over the whole vocabulary stay within `LOGITS` numbers."""
    return max(1, min(most, LOGITS // (length * model.cfg.d_vocab)))


@contextmanager
def compared_only(model: Any, batch: Batch, positions: str) -> Iterator[None]:
    """The unembedding computes no more than is compared: where that is the last position, `[b, 1, vocabulary]`. What runs may be the batch
    several times over."""

    def last(module: Any, arguments: tuple) -> tuple:
        x, *rest = arguments
        return (batch.compared(x, "last"), *rest)

    unembed = getattr(model, "unembed", None)
    wanted = positions == "last" and isinstance(unembed, torch.nn.Module)
    handle = unembed.register_forward_pre_hook(last) if wanted else None  # pyright: ignore
    try:
        yield
    finally:
        if handle is not None:
            handle.remove()
