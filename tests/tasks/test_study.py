import json

import pytest

from spd_lens import SPDError
from spd_lens.config import DEFAULT_WEIGHTS
from spd_lens.tasks import induction, study

CONFIG = induction.config(seed=4)


def test_seeds_begin_with_the_configs():
    runs = study.over_seeds(3, CONFIG)
    assert [(name, config.seed) for name, config in runs.items()] == [("seed 4", 4), ("seed 5", 5), ("seed 6", 6)]
    assert runs["seed 4"] == CONFIG


def test_every_part_of_the_recipe_can_be_switched_off():
    runs = study.without([], CONFIG)
    assert list(runs) == ["whole", *(f"without {part}" for part in study.PARTS)] and runs["whole"] == CONFIG
    assert all(config != CONFIG for name, config in runs.items() if name != "whole")
    assert set(runs["without price"].weights) == set(DEFAULT_WEIGHTS) - {"price"}
    assert runs["without fisher"].init == "svd" and runs["without fisher"].weights == CONFIG.weights
    assert list(study.without(["exact"], CONFIG)) == ["whole", "without exact"]
    assert set(DEFAULT_WEIGHTS) - set(study.PARTS) == {"faithfulness", "stochastic"}  # the method itself


def test_varied_keeps_the_kind_of_number():
    runs = study.varied("retire_tolerance", ["1e-5", "0.01"], CONFIG)
    assert [config.retire_tolerance for config in runs.values()] == [1e-5, 0.01]
    assert study.varied("gate_width", ["3"], CONFIG)["gate_width 3"].gate_width == 3
    cheaper = study.varied("price", ["0.5"], CONFIG)["price × 0.5"].weights
    assert cheaper["price"].at(0) == CONFIG.weights["price"].at(0) / 2 and cheaper["alive"] == CONFIG.weights["alive"]
    with pytest.raises(SPDError, match="gate_bias was given as 'three'; it has to be a number"):
        study.varied("gate_bias", ["three"], CONFIG)


def test_the_table_has_median_and_range_over_seeds_alone():
    found = {f"seed {seed}": {"distinct": float(count), "accuracy, hard masks": 0.9995} for seed, count in enumerate((14, 12, 19))}
    table = study.table(found)
    assert list(table) == ["seed 0", "seed 1", "seed 2", "median", "range", "paper", "replication", "goal"]
    assert table.loc["distinct"].tolist() == ["14", "12", "19", "14", "12 … 19", "16", "161", "≤ 18"]
    assert table.loc["accuracy, hard masks", "median"] == "0.9995"
    assert "median" not in study.table({"whole": found["seed 0"], "without price": found["seed 1"]})


def test_goals_are_of_figures_that_there_are():
    """A figure of another name would silently stand without its goal."""
    from spd_lens import decompose

    d = decompose(induction.build_target(0), induction.batches(8, 0), induction.config(steps=0), progress=False)
    figures = induction.measure(d, 0, {"decomposition": 1.0}, many=64).figures()
    assert set(study.GOALS) <= set(figures)


def test_only_a_run_of_the_same_settings_is_finished(tmp_path):
    path = tmp_path / "results.json"
    assert study.finished(path, CONFIG) is None
    path.write_text(json.dumps({"config": CONFIG.to_json(), "figures": {"distinct": 3}, "more": 1}))
    assert study.finished(path, CONFIG) == {"distinct": 3}
    assert study.finished(path, CONFIG.replace(steps=7)) is None
    path.write_text('{"config": {}}')
    with pytest.raises(SPDError, match="lacks 'figures'"):
        study.finished(path, CONFIG)
