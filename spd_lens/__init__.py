"""spd_lens: which piece of which weight does this? Stochastic parameter decomposition for TransformerLens models."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from spd_lens.advice import Advice, advise
from spd_lens.attention import PairAttention, pair_attention
from spd_lens.cards import Card, describe
from spd_lens.config import Schedule, SPDConfig
from spd_lens.decomposition import Decomposition, Observation
from spd_lens.diagnostics import Diagnosis, diagnose
from spd_lens.errors import SPDError
from spd_lens.graph import CircuitGraph, answer_logit, circuit_graph
from spd_lens.labels import name_tokens, token_labels
from spd_lens.metrics import Census, Verification, census, verify
from spd_lens.patching import ablation_effects, activation_patching, attribution, attribution_patching, cut_costs
from spd_lens.recovery import Recovery, recovered, similarity
from spd_lens.sites import Site, find_sites
from spd_lens.training import StepResult, decompose

if TYPE_CHECKING:
    from spd_lens import viz
    from spd_lens.report import write_report

__version__ = "0.1.0"
__all__ = [
    "Advice", "Card", "Census", "CircuitGraph", "Decomposition", "Diagnosis", "Observation", "PairAttention", "Recovery", "SPDConfig", "SPDError", "Schedule", "Site",
    "StepResult", "Verification", "ablation_effects", "activation_patching", "advise", "answer_logit", "attribution", "attribution_patching", "census",
    "circuit_graph", "cut_costs", "decompose", "describe", "diagnose", "find_sites", "name_tokens", "pair_attention", "recovered", "similarity", "token_labels", "verify", "viz",
    "write_report",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name == "viz":  # plotting is imported when first used
        return import_module("spd_lens.viz")
    if name == "write_report":
        return import_module("spd_lens.report").write_report
    raise AttributeError(f"module 'spd_lens' has no attribute {name!r}")
