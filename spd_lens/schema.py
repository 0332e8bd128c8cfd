"""What settings and files may hold, written as type annotations and checked all the way down before anything is used."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from reprlib import Repr
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints, is_typeddict

import numpy as np
import torch

from spd_lens.errors import SPDError

LARGEST = 1 << 53  # of whole numbers: every reader of JSON has them exactly so far
LONGEST = 1 << 25  # bytes of JSON: far above the history of a thousand sites, far below a computer's memory

_brief = Repr()
_brief.maxstring = _brief.maxother = 100
brief = _brief.repr  # of what was given: an error about a million letters need not hold them all


@dataclass(frozen=True)
class Least:
    """In `Annotated[int, Least(1)]`: the lowest value allowed."""

    value: int


Natural = Annotated[int, Least(0)]
Count = Annotated[int, Least(1)]
Size = Annotated[float, Least(0)]


def check(where: str, given: Any, kind: Any) -> None:
    """Hold `given` against the annotation `kind`: plain types, `Literal`, unions, lists, mappings, `TypedDict`s, those above.

    Raises:
        SPDError: it is of another kind; the place in it is named, what was given there and what is allowed.
    """
    origin, parts = get_origin(kind), get_args(kind)
    if is_typeddict(kind):
        fits = isinstance(given, dict)
        for name, part in get_type_hints(kind, include_extras=True).items() if fits else ():
            if name not in given:
                raise SPDError(f"{where} lacks {name!r}: {_named(part)}.")
            check(f"{where}: {name}", given[name], part)
    elif origin in (dict, Mapping):
        fits = isinstance(given, Mapping)
        for name, value in given.items() if fits else ():
            check(f"{where}: a name", name, parts[0])
            check(f"{where}: {brief(name)}", value, parts[1])
    elif origin in (list, Sequence):
        fits = isinstance(given, Sequence) and not isinstance(given, str)
        for at, value in enumerate(given) if fits else ():
            check(f"{where}[{at}]", value, parts[0])
    elif origin in (Union, UnionType):
        fits = any(_passes(given, part) for part in parts)
    elif origin is Annotated:
        fits = _passes(given, parts[0]) and given >= parts[1].value
    elif origin is Literal:
        fits = any(type(given) is type(part) and given == part for part in parts)
    elif kind is int:
        fits = type(given) is int and abs(given) <= LARGEST
    elif kind is float:
        fits = _passes(given, int) or (isinstance(given, float) and math.isfinite(given))
    else:
        fits = kind is Any or isinstance(given, kind)
    if not fits:
        raise SPDError(f"{where} was given as {brief(given)}; it has to be {_named(kind)}.")


def plain(given: Any) -> Any:
    """numpy's and torch's numbers, arrays and devices as Python's own, also inside of lists and mappings; anything else as it is."""
    match given:
        case np.generic() | np.ndarray() | torch.Tensor():
            return given.tolist()
        case torch.device():
            return str(given)
        case list() | tuple():
            return type(given)(map(plain, given)) if type(given) in (list, tuple) else given
        case Mapping():
            return {plain(name): plain(value) for name, value in given.items()}
    return given


def _passes(given: Any, kind: Any) -> bool:
    try:
        check("", given, kind)
    except SPDError:
        return False
    return True


def _named(kind: Any) -> str:
    origin, parts = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        return " or ".join(map(_named, parts))
    if origin is Annotated:
        return f"{_named(parts[0])} of at least {parts[1].value}"
    if origin is Literal:
        return " or ".join(map(repr, parts))
    if origin in (dict, Mapping):
        return f"a mapping from text to {_named(parts[1])}"
    if origin in (list, Sequence):
        return f"a list, every entry {_named(parts[0])}"
    plain = {int: "a whole number", float: "a finite number", bool: "true or false", str: "text", NoneType: "None", Any: "anything"}
    return plain.get(kind, "an object")


def parse(text: bytes | str, where: str) -> Any:
    """JSON from an unknown hand.

    Raises:
        SPDError: it is longer than any of ours, is no whole JSON, or gives a name twice.
    """
    if len(text) > LONGEST:
        raise SPDError(f"{where} is longer than {LONGEST >> 20} MiB, which no description of ours is; it was made by another program.")
    try:
        return json.loads(text if isinstance(text, str) else text.decode(), object_pairs_hook=_once_each)
    except (ValueError, RecursionError) as error:
        raise SPDError(f"{where} is no whole JSON file ({error}).") from error


def _once_each(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    named = dict(pairs)
    if len(named) < len(pairs):
        raise ValueError("a name is given twice")
    return named
