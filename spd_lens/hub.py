"""Models by their name on the hub."""

from typing import Any

from transformer_lens.model_bridge import TransformerBridge

from spd_lens.errors import SPDError

try:
    from transformer_lens import HookedTransformer as Hooked
except ImportError:  # transformer-lens 4.x
    Hooked = None


def load_model(name: str, otherwise: str = "") -> Any:
    """A model of the hub, in the class that this transformer-lens has, on the CPU.

    Args:
        name: as TransformerLens knows it, e.g. `gpt2`.
        otherwise: what else a person can do, for the message.

    Raises:
        SPDError: it is neither in the local cache nor to be had.
    """
    try:
        return TransformerBridge.boot_transformers(name, device="cpu") if Hooked is None else Hooked.from_pretrained(name, device="cpu")
    except (OSError, ValueError, RuntimeError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise SPDError(f"the weights and the tokenizer of {name!r} are missing: they are not in the local cache, and the hub did not give "
                       f"them ({first}). Run this once where the hub can be reached, with HF_HUB_OFFLINE and TRANSFORMERS_OFFLINE unset"
                       f"{otherwise and '; or ' + otherwise}.") from error  # fmt: skip
