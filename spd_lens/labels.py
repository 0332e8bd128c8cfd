"""Tokens as a person can read them. What a token holds is data from outside: pages escape these labels besides."""

import unicodedata
from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary

from jaxtyping import Int
from torch import Tensor, nn

from spd_lens.errors import SPDError

NAMES: WeakKeyDictionary[nn.Module, tuple[str, ...]] = WeakKeyDictionary()  # of models without a tokenizer
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


def name_tokens(model: Any, names: Sequence[str]) -> None:
    """Give the token ids of a model without a tokenizer names, which every view and table uses from then on.

    Args:
        model: a HookedTransformer or TransformerBridge.
        names: one for each id of the vocabulary.

    Raises:
        SPDError: another number of names than the vocabulary has tokens.
    """
    if len(names) != model.cfg.d_vocab:
        raise SPDError(
            f"{len(names)} names were given and the model's vocabulary has {model.cfg.d_vocab} tokens; give one for each id, in order."
        )
    NAMES[model] = tuple(map(str, names))


def token_labels(model: Any, tokens: Int[Tensor, " n"] | Sequence[int]) -> list[str]:
    """A readable label for each token id: its name (`name_tokens`), its text where the model has a tokenizer, else its number."""
    ids = [int(token) for token in tokens]
    if model in NAMES:
        return [readable(NAMES[model][i]) for i in ids]
    tokenizer = getattr(model, "tokenizer", None)
    return [str(i) for i in ids] if tokenizer is None else [readable(tokenizer.decode([i])) for i in ids]


def short_names(sites: Any) -> dict[str, str]:
    """Site → `Q0`, `out3`."""
    return {name: site.short for name, site in sites.items()}
