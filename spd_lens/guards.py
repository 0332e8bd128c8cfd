"""What is borrowed for a while and given back, also after an exception: the model's gradients, torch's order of sums, Ctrl-C."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def frozen(model: Any) -> Iterator[None]:
    """The model without gradients of its own; given back as it was."""
    wanted = [p for p in model.parameters() if p.requires_grad]
    try:
        for parameter in wanted:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in wanted:
            parameter.requires_grad_(True)


@contextmanager
def reproducible() -> Iterator[None]:
    """Sums in a fixed order, so that the same seed gives the same bits (on a CPU: the backward of indexing adds in any order)."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    filled = torch.utils.deterministic.fill_uninitialized_memory  # pyright: ignore
    try:
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # pyright: ignore
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        torch.utils.deterministic.fill_uninitialized_memory = filled  # pyright: ignore


@contextmanager
def interrupts_wait() -> Iterator[Callable[[], bool]]:
    """Ctrl-C waits for the end of the step, so that a whole step is kept; a second one does not wait."""
    pressed: list[int] = []

    def press(number: int, frame: Any) -> None:
        if pressed:
            raise KeyboardInterrupt
        pressed.append(number)

    if threading.current_thread() is not threading.main_thread():  # signals go to the main thread
        yield lambda: False
        return
    before = signal.signal(signal.SIGINT, press)
    try:
        yield lambda: bool(pressed)
    finally:
        signal.signal(signal.SIGINT, before or signal.default_int_handler)


def out_of_memory(error: RuntimeError) -> bool:
    """Whether torch could not get the memory that it asked for; on a CPU it says so only in words."""
    return isinstance(error, torch.OutOfMemoryError) or "allocate memory" in str(error)
