"""Tokens as a person can read them. What a token holds is data from outside: pages escape these labels besides."""

import unicodedata
from collections.abc import Sequence
from typing import Any

from jaxtyping import Int
from torch import Tensor

SHOWN = {" ": "·", "\n": "↵", "\t": "⇥", "\r": "␍", "": "∅"}


def readable(token: str) -> str:
    """One token with everything visible: spaces as ·, newlines as ↵, tabs as ⇥, the empty string as ∅; controls, marks of direction and of
    zero width, and undecodable bytes by their code."""
    return SHOWN.get(token) or "".join(_visible(character) for character in token)


def _visible(character: str) -> str:
    if character in SHOWN:
        return SHOWN[character]
    hidden = unicodedata.category(character)[0] in "CZ" or (
        unicodedata.category(character) == "Mn" and unicodedata.combining(character) == 0
    )
    return f"\\u{ord(character):04x}" if hidden else character


def token_labels(model: Any, tokens: Int[Tensor, " n"] | Sequence[int]) -> list[str]:
    """A readable label for each token id: its text where the model has a tokenizer, else its number."""
    ids = [int(token) for token in tokens]
    tokenizer = getattr(model, "tokenizer", None)
    return [str(i) for i in ids] if tokenizer is None else [readable(tokenizer.decode([i])) for i in ids]


def short_names(sites: Any) -> dict[str, str]:
    """Site → `Q0`, `out3`."""
    return {name: site.short for name, site in sites.items()}
