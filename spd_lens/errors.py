"""The one error of the library: what was given, what is allowed, how to mend it."""

from collections.abc import Iterable
from difflib import get_close_matches


class SPDError(ValueError):
    """Raised before any work starts where that is possible; the model is left as it was."""


def nearest(given: str, allowed: Iterable[str], most: int = 3) -> str:
    """A phrase naming the allowed names closest to `given`, or all of them when none is close."""
    allowed = list(allowed)
    close = get_close_matches(given[:100], allowed, n=most, cutoff=0.5)
    if close:
        return "nearest: " + ", ".join(close)
    shown = ", ".join(allowed[:12]) + (f", … ({len(allowed)} in all)" if len(allowed) > 12 else "")
    return f"allowed: {shown}" if allowed else "there is none"
