"""spd_lens: which piece of which weight does this? Stochastic parameter decomposition for TransformerLens models."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from spd_lens.config import Schedule, SPDConfig
from spd_lens.decomposition import Decomposition, Observation
from spd_lens.diagnostics import Diagnosis, diagnose
from spd_lens.errors import SPDError
from spd_lens.metrics import Census, Verification, census, verify
from spd_lens.patching import ablation_effects, activation_patching, attribution, attribution_patching
from spd_lens.sites import Site, find_sites
from spd_lens.training import StepResult, decompose

if TYPE_CHECKING:
    from spd_lens import viz

__version__ = "0.1.0"
__all__ = ["Census", "Decomposition", "Diagnosis", "Observation", "SPDConfig", "SPDError", "Schedule", "Site", "StepResult", "Verification",
           "ablation_effects", "activation_patching", "attribution", "attribution_patching", "census", "decompose", "diagnose", "find_sites", "verify", "viz"]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name == "viz":  # plotting is imported when first used
        return import_module("spd_lens.viz")
    raise AttributeError(f"module 'spd_lens' has no attribute {name!r}")
