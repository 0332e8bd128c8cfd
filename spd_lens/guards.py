"""What is borrowed for a while and given back, also after an exception: torch's modes, the model, its gradients, torch's order of sums, Ctrl-C.

A notebook may have switched gradients off, be in `inference_mode` or under autocast, and may call from several threads. `steady` stands on every public
function that computes: its numbers are the same in all of these, and the mode is the same afterwards.
"""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import wraps
from inspect import signature
from typing import Any, ParamSpec, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from spd_lens.errors import SPDError

Given = ParamSpec("Given")
Result = TypeVar("Result")

MODEL = ("model", "d", "decomposition", "self", "circuit")  # arguments by which a function reaches its model
TICK = 0.1  # seconds between two looks at whose turn it is

# --- torch's modes ---


def steady(
    gradients: bool | None = False, lasting: str | None = None, shared: bool = False
) -> Callable[[Callable[Given, Result]], Callable[Given, Result]]:  # fmt: skip
    """Of a function: outside of `inference_mode`, without autocast, the model for this thread alone.

    Args:
        gradients: on or off while it runs; None: as they are (off in `inference_mode`).
        lasting: as in `alone`.
        shared: no pass is run and nothing is read that one changes: other threads may go on.

    Raises:
        SPDError: gradients are needed of what was made in `inference_mode`, or as in `alone`.
    """

    def decorate(function: Callable[Given, Result]) -> Callable[Given, Result]:
        at, name = next(((i, n) for i, n in enumerate(signature(function).parameters) if n in MODEL), (0, ""))

        @wraps(function)
        def inside(*args: Given.args, **kwargs: Given.kwargs) -> Result:
            model = _model_of(kwargs.get(name, args[at] if name and at < len(args) else None))
            with ExitStack() as stack:
                if torch.is_inference_mode_enabled():
                    stack.enter_context(torch.inference_mode(False))  # which switches gradients on
                    stack.enter_context(torch.no_grad())
                if gradients is not None:
                    stack.enter_context(torch.enable_grad() if gradients else torch.no_grad())
                if model is not None:
                    stack.enter_context(_exact_products(model))
                    if not shared:
                        stack.enter_context(alone(model, lasting))
                    if gradients:
                        _expect_differentiable(model)
                return function(*map(_tracked, args), **{key: _tracked(value) for key, value in kwargs.items()})  # pyright: ignore

        return inside

    return decorate


def _model_of(holder: Any) -> nn.Module | None:
    """The model, or that of a decomposition or of what holds one; None of anything else."""
    for name in ("decomposition", "model"):
        if not isinstance(holder, nn.Module):
            holder = getattr(holder, name, holder)
    return holder if isinstance(holder, nn.Module) else None


def _exact_products(model: nn.Module) -> torch.autocast:
    """Autocast off: `W - V·U` of products in bfloat16 would be a figure of their rounding."""
    parameter = next(model.parameters(), None)
    kind = "cpu" if parameter is None or not torch.amp.is_autocast_available(parameter.device.type) else parameter.device.type
    return torch.autocast(kind, enabled=False)


def _expect_differentiable(model: nn.Module) -> None:
    if any(parameter.is_inference() for parameter in model.parameters()):
        raise SPDError("the model was made under torch.inference_mode(), and nothing can be differentiated through its weights; make it outside, "
                       "or give copy.deepcopy(model), called outside.")  # fmt: skip


def _tracked(value: Any) -> Any:
    """Tensors made in `inference_mode`, alone or by name, as ordinary ones: autograd refuses them."""
    if isinstance(value, Tensor):
        return value.clone() if value.is_inference() else value
    if type(value) is dict:
        return {key: _tracked(one) for key, one in value.items()}
    return value


# --- one thread at a time ---


class _Turn:
    """Whose turn it is with a model."""

    def __init__(self) -> None:
        self.condition = threading.Condition()
        self.thread: int | None = None
        self.depth = 0
        self.lasting: str | None = None


_TURNS: WeakKeyDictionary[nn.Module, _Turn] = WeakKeyDictionary()
_TURNS_LOCK = threading.Lock()


@contextmanager
def alone(model: nn.Module, lasting: str | None = None) -> Iterator[None]:
    """The model for this thread alone, since hooks are on it for everybody; a thread may enter again. Other threads wait until a call has
    ended. Nobody waits for what lasts as long as a person's code wants (a deadlock, if that waits for the thread that waits).

    Args:
        lasting: what is done to the model, where it lasts.

    Raises:
        SPDError: another thread does what lasts.
    """
    with _TURNS_LOCK:
        turn = _TURNS.setdefault(model, _Turn())
    with turn.condition:
        while turn.thread not in (None, threading.get_ident()):
            if turn.lasting is not None:
                raise SPDError(f"the model is {turn.lasting} in another thread, which would change what is seen here; wait for its end, or give this "
                               "thread a model of its own (copy.deepcopy, and Decomposition.load).")  # fmt: skip
            turn.condition.wait(TICK)
        before = turn.lasting
        turn.thread, turn.depth, turn.lasting = threading.get_ident(), turn.depth + 1, lasting or before
    try:
        yield
    finally:
        with turn.condition:
            turn.depth, turn.lasting = turn.depth - 1, before
            if not turn.depth:
                turn.thread = None
                turn.condition.notify_all()


# --- steps in double precision ---


def double(t: Tensor) -> Tensor:
    """In float64: on the CPU where the device has none (Apple's GPUs)."""
    try:
        return t.double()
    except TypeError:
        return t.cpu().to(torch.float64)


def back(t: Tensor, like: Tensor) -> Tensor:
    """What came of a step in double, in the type and on the device of `like`; a device without float64 has to be given no float64."""
    return t.to(like.dtype).to(like.device)


# --- what is switched for everybody ---


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


_ORDERED: list[tuple[bool, bool, bool]] = []  # what held before, once for each that is at work
_ORDERED_LOCK = threading.Lock()


def _order(deterministic: bool, warn_only: bool, filled: bool) -> None:
    torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
    torch.utils.deterministic.fill_uninitialized_memory = filled  # pyright: ignore


@contextmanager
def reproducible() -> Iterator[None]:
    """Sums in a fixed order, so that the same seed gives the same bits (on a CPU: the backward of indexing adds in any order). It holds for the whole
    process: the first to come switches it on, and the last to leave, in whichever thread, gives back what the first found."""
    with _ORDERED_LOCK:
        now = (torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled(),
               torch.utils.deterministic.fill_uninitialized_memory)  # fmt: skip  # pyright: ignore
        _ORDERED.append(_ORDERED[0] if _ORDERED else now)
        _order(True, True, False)
    try:
        yield
    finally:
        with _ORDERED_LOCK:
            before = _ORDERED.pop()
            if not _ORDERED:
                _order(*before)


_SEEDED_LOCK = threading.Lock()


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """torch's own stream, which is everybody's, begun at `seed`; it goes on afterwards as if it had not been. One thread at a time."""
    with _SEEDED_LOCK, torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


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


@contextmanager
def plainly() -> Iterator[None]:
    """Tensors that are made without saying where and of what type are float32 on the CPU, whatever the defaults are."""
    before = torch.get_default_dtype()
    with torch.device("cpu"):
        torch.set_default_dtype(torch.float32)
        try:
            yield
        finally:
            torch.set_default_dtype(before)
