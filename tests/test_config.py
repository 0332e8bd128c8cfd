import json

import numpy as np
import pytest
import torch

from spd_lens import Schedule, SPDConfig, SPDError


def test_unknown_names_are_refused_with_the_nearest():
    with pytest.raises(SPDError, match="no 'subcomponent'; nearest: subcomponents"):
        SPDConfig(subcomponent=3)


@pytest.mark.parametrize(
    "given, message",
    [
        (dict(subcomponents=0), "at least 1"),
        (dict(subcomponents=-4), "at least 1"),
        (dict(subcomponents={"*": 0}), "at least 1"),
        (dict(steps=-1), "at least 0"),
        (dict(batch_size=0), "at least 1"),
        (dict(importance="atention"), "nearest: attention"),
        (dict(init="zero"), "allowed: fisher, svd, random"),
        (dict(output_positions="first"), "output_positions"),
        (dict(frequency_scale=0.0), "above 0"),
        (dict(retire_at=(0.3, 1.0)), r"retire_at was given as \(0.3, 1.0\); its fractions of training"),
        (dict(retire_at=0.3), "retire_at was given as 0.3; it has to be a list"),
        (dict(retire_tolerance=-1), "retire_tolerance was given as -1.0; it has to be at least 0"),
        (dict(learning_rate=((0.5, 1.0), (0.2, 1.0))), "rise"),
        (dict(learning_rate="fast"), "schedule"),
        (dict(learning_rate=((0, 1e-3), (1, -1e-3))), r"learning_rate was given as .*; no value of it may be below 0"),
        (dict(weights={"price": -1e-3}), r"the weight of price was given as \(\(0.0, -0.001\),\); no value"),
        (dict(learning_rate=((0.0, 1.0), (float("nan"), 1.0), (1.0, 1.0))), "finite"),
        (dict(learning_rate=10**400), "schedule"),
        (dict(learning_rate={"points": 3}), "schedule"),
        (dict(learning_rate={"shape": "linear"}), "hold its points"),
        (dict(weights={"stochastic": {"points": [[0, 1]], "colour": 3}}), "hold its points"),
        (dict(weights=3), "weights was given as 3; it has to be a mapping"),
        (dict(sites=5), "sites was given as 5; it has to be text or a list"),
        (dict(sites=["*", 5]), "sites was given"),
        (dict(steps="6"), "steps was given as '6'; it has to be a whole number of at least 0"),
        (dict(steps=True), "steps was given as True"),
        (dict(seed=1 << 70), "seed was given"),
        (dict(gate_bias=float("inf")), "gate_bias was given as inf; it has to be a finite number"),
        (dict(layerwise_sites=0), "layerwise_sites was given as 0; it has to be a whole number of at least 1 or None"),
        (dict(device=0), "device was given as 0; it has to be text or None"),
    ],
)
def test_bad_values_say_what_is_allowed(given, message):
    with pytest.raises(SPDError, match=message):
        SPDConfig(**given)


def test_numbers_and_devices_of_numpy_and_torch_are_numbers_and_names():
    odd = SPDConfig(
        steps=np.int64(2), seed=torch.tensor(3), gate_bias=np.float32(0.5), learning_rate=np.float32(0.25), device=torch.device("cpu"),
        exact=np.bool_(False), retire_at=np.array([0.25, 0.5]), subcomponents={"*": np.uint8(3)}, minimality_power=torch.tensor([[0.0, 0.5], [1.0, 0.25]]),
        weights={"stochastic": np.float64(0.5), "plain": ((0, np.float16(0.5)),)},
    )  # fmt: skip
    usual = SPDConfig(
        steps=2, seed=3, gate_bias=0.5, learning_rate=0.25, device="cpu", exact=False, retire_at=(0.25, 0.5), subcomponents={"*": 3},
        minimality_power=((0.0, 0.5), (1.0, 0.25)), weights={"stochastic": 0.5, "plain": ((0, 0.5),)},
    )  # fmt: skip
    assert odd == usual and repr(odd) == repr(usual) and json.dumps(odd.to_json()) == json.dumps(usual.to_json())
    assert Schedule.of(np.float32(0.5)) == Schedule.of(0.5)


@pytest.mark.parametrize("given", [dict(steps=np.float32(2.0)), dict(steps=torch.tensor([2])), dict(steps=np.bool_(True)), dict(seed=2.0)])
def test_numbers_of_another_kind_stay_refused(given):
    with pytest.raises(SPDError, match="it has to be a whole number"):
        SPDConfig(**given)


def test_frozen():
    with pytest.raises(AttributeError):
        SPDConfig().steps = 3


def test_schedules_are_joined_by_lines_steps_and_cosines():
    line = Schedule(((0.0, 1.0), (0.5, 2.0), (0.5, 5.0), (1.0, 5.0)))
    assert [line.at(f) for f in (0, 0.25, 0.4999, 0.5, 1)] == pytest.approx([1, 1.5, 1.9998, 5, 5], abs=1e-3)
    cosine = Schedule(((0.0, 1.0), (1.0, 0.0)), "cosine")
    assert [cosine.at(f) for f in (0, 0.5, 1)] == pytest.approx([1, 0.5, 0])
    assert Schedule.of(3).at(0.7) == 3
    assert cosine.times(2) == Schedule(((0.0, 2.0), (1.0, 0.0)), "cosine")


def test_json_round_trip():
    for config in (SPDConfig(), SPDConfig.paper(), SPDConfig(subcomponents={"*Q": 3, "*": 4}, seed=5)):
        assert SPDConfig.from_json(json.loads(json.dumps(config.to_json()))) == config


def test_the_papers_settings():
    paper = SPDConfig.paper()
    assert (paper.steps, paper.batch_size, paper.subcomponents, paper.gate_width) == (100_000, 1024, 100, 16)
    assert {name: weight.at(0) for name, weight in paper.weights.items()} == {
        "faithfulness": 1000, "plain": 0.5, "stochastic": 1, "layerwise": 1, "minimality": 0.02,
    }  # fmt: skip
    assert (paper.minimality_power.at(0), paper.minimality_power.at(1)) == (0.9, pytest.approx(0.1))
    assert (paper.learning_rate.at(0), paper.learning_rate.at(1)) == (1e-3, pytest.approx(0))
    assert (paper.masks, paper.init, paper.output_positions) == ("uniform", "random", "last")
    assert (paper.scaled_rate, paper.retire_at, paper.exact) == (False, (), False)


def test_the_recipe_for_pieces():
    config = SPDConfig.pieces(steps=7)
    assert (config.init, config.steps, config.exact) == ("positions", 7, False) and "frequency" not in config.weights
    price = config.weights["price"]
    assert price.at(0) == pytest.approx(100 * price.at(1)) and price.at(0.5) == pytest.approx((price.at(0) * price.at(1)) ** 0.5)
    assert SPDConfig.from_json(config.to_json()) == config
    with pytest.raises(SPDError, match="merge_at was given as"):
        SPDConfig(merge_at=(0.3, 1.0))


def test_a_whole_number_is_a_number():
    config = SPDConfig(gate_bias=2, distance_decay=0, frequency_scale=1)
    assert [type(config.gate_bias), type(config.distance_decay), type(config.frequency_scale)] == [float] * 3
