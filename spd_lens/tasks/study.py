"""Several runs of a task, most of all the induction task, that answer a question together: over seeds, with parts of the recipe off, with one setting varied.

A study is a mapping from a run's name to its `SPDConfig`, whose seed is the target's too; what its runs found (`Outcome.figures`) becomes one table.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict

import pandas as pd

from spd_lens.config import SPDConfig
from spd_lens.errors import SPDError, nearest
from spd_lens.metrics import LABELS
from spd_lens.schema import check, parse
from spd_lens.tasks.induction import OWN_POSITION, PAPER

Study = dict[str, SPDConfig]


class _Results(TypedDict):
    """What is read of a run's `results.json`."""

    config: dict[str, Any]
    figures: dict[str, float]


PARTS: dict[str, dict[str, Any]] = {  # part of the default recipe → the changes that switch it off
    "fisher": {"init": "svd"},
    "svd": {"init": "random"},
    "scaled_rate": {"scaled_rate": False},
    "mixed": {"masks": "uniform"},
    "annealing": {"minimality_power": 1.0},
    "retirement": {"retire_at": ()},
    "exact": {"exact": False},
    **{loss: {} for loss in ("layerwise", "adversarial", "alive", "frequency", "price")},  # its weight
}

GOALS = {  # figure → the paper's (arXiv 2511.08854, Table 1), a public replication's, and what we set out to reach
    "distinct": ("16", "161", "≤ 18"), "distinct without s first": ("", "", "≤ 16"),
    **{f"distinct {site}": ("1", count, "≤ 2") for site, count in zip(("Q0", "K0", "V0", "Q1", "K1"), ("15", "21", "37", "1", "6"))},
    "distinct V1": ("11", "", ""),
    **{f"{site} active at {at}": (f"{PAPER[site][at]:.3f}", "", "≥ 0.95") for site, at in OWN_POSITION.items()},
    **{f"{site} active at random": (f"{PAPER[site]['random']:.3f}", "", "≤ 0.1") for site in PAPER},
    LABELS["faithfulness"]: ("3e-9", "1.6e-10", "≤ 1e-9"), LABELS["kl_stochastic"]: ("", "2.9e-4", "≤ 1e-3"),
    LABELS["kl_layerwise"]: ("1e-4", "1.1e-4", "≤ 1e-4"), LABELS["kl_hard"]: ("", "", "≤ 1e-3"), LABELS["kl_alive_only"]: ("", "", "≤ 1e-3"),
    LABELS["kl_adversarial"]: ("", "", "≤ 0.1"), "accuracy, hard masks": ("", "", "≥ 0.999"), "seconds, decomposition": ("", "", "≤ 180"),
}  # fmt: skip


def over_seeds(many: int, config: SPDConfig) -> Study:
    """`many` seeds from the config's on."""
    if many < 1:
        raise SPDError(f"seeds was given as {many}; it has to be at least 1.")
    return {f"seed {seed}": config.replace(seed=seed) for seed in range(config.seed, config.seed + many)}


def without(parts: Sequence[str], config: SPDConfig) -> Study:
    """The recipe whole, and without each of these parts; all of `PARTS` where none is named."""
    study = {"whole": config}
    for part in parts or PARTS:
        if part not in PARTS:
            raise SPDError(f"the recipe has no part {part!r}; {nearest(part, PARTS)}.")
        left = {name: weight for name, weight in config.weights.items() if name != part}
        study[f"without {part}"] = config.replace(weights=left, **PARTS[part])
    return study


def varied(setting: str, values: Sequence[str], config: SPDConfig) -> Study:
    """One number of the config at these values; or the weight of one loss times these factors."""
    numbers = [name for name, value in config.to_json().items() if isinstance(value, (int, float)) and not isinstance(value, bool)]
    if setting not in (*numbers, *config.weights):
        raise SPDError(f"{setting!r} is neither a setting that is one number nor a loss; {nearest(setting, [*numbers, *config.weights])}.")
    kind, study = int if isinstance(getattr(config, setting, None), int) else float, {}
    for value in values:
        try:
            number = kind(value)
        except ValueError:
            raise SPDError(f"{setting} was given as {value!r}; it has to be a {'whole ' * (kind is int)}number.") from None
        if setting in config.weights:
            study[f"{setting} × {value}"] = config.replace(weights={**config.weights, setting: config.weights[setting].times(number)})
        else:
            study[f"{setting} {value}"] = config.replace(**{setting: number})
    return study


def finished(results: Path, config: SPDConfig) -> dict[str, float | int] | None:
    """The figures in a `results.json` that a run with this config wrote; None where there is none such."""
    if not results.exists():
        return None
    saved = parse(results.read_bytes(), str(results))
    check(str(results), saved, _Results)
    return saved["figures"] if saved["config"] == json.loads(json.dumps(config.to_json())) else None


def table(found: Mapping[str, Mapping[str, float | int]], goals: Mapping[str, tuple[str, str, str]] = GOALS) -> pd.DataFrame:
    """A row per figure, a column per run; where they are several runs of one thing (`seed …`), also median and range; and the goals."""
    frame = pd.DataFrame(found)
    shown = frame.map(_number)
    if len(found) > 1 and all(name.startswith("seed ") for name in found):
        shown["median"] = frame.median(axis=1).map(_number)
        shown["range"] = frame.min(axis=1).map(_number) + " … " + frame.max(axis=1).map(_number)
    for column, heading in enumerate(("paper", "replication", "goal")):
        shown[heading] = [goals.get(str(name), ("",) * 3)[column] for name in frame.index]
    return shown.rename_axis("figure")


def _number(value: float | int) -> str:
    if value == round(value) and abs(value) < 1e6:
        return f"{value:.0f}"
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.4f}" if abs(value) >= 0.01 else f"{value:.1e}"
