import pytest
import torch

from spd_lens import viz
from spd_lens.metrics import LABELS

HOSTILE = ["</script>", "<img onerror=alert(1)>", "a\nb", "", "\u202e"]


def importances():
    g = torch.zeros(2, 5, 3)
    g[1, 2, 1] = 0.8
    return {"blocks.0.attn.W_Q": g}


def test_the_heatmap_shows_ever_active_subcomponents_of_that_sequence():
    figure = viz.importance_heatmap(importances(), HOSTILE, {"blocks.0.attn.W_Q": "Q0"}, sequence=1)
    assert list(figure.data[0].y) == ["Q0 · 1"] and figure.data[0].z[0][2] == pytest.approx(0.8)
    assert figure.layout.title.text and figure.layout.xaxis.title.text and figure.layout.yaxis.title.text
    assert list(viz.importance_heatmap(importances(), HOSTILE).data[0].y) == ["none active"]


def test_tokens_are_escaped():
    page = viz.importance_heatmap(importances(), HOSTILE, sequence=1).to_json()
    assert "<img" not in page and "</script>" not in page


def test_census_bars_put_the_paper_beside():
    own = {"Q0": {"s1": 0.1, "m": 1.0}, "K0": {"s1": 1.0, "m": 0.0}}
    figure = viz.census_bars(own, own, ("s1", "m"), "KL hard 1")
    assert len(figure.data) == 4 and "KL hard 1" in figure.layout.title.text
    assert len(viz.census_bars(own, None, ("s1", "m"), "").data) == 2


def test_the_positional_form_is_causal_and_centred_and_marks_the_key_before():
    form = viz.positional_form(torch.arange(16.0).view(4, 4))
    shown = torch.tensor(form.data[0].z)
    assert torch.equal(shown.isnan(), torch.ones(4, 4).triu(1).bool()) and torch.allclose(shown.nansum(1), torch.zeros(4))
    assert list(zip(form.data[1].y, form.data[1].x)) == [(1, 0), (2, 1), (3, 2)]
    assert form.layout.title.text and form.layout.xaxis.title.text and form.layout.yaxis.title.text


def test_a_count_stands_beside_what_it_costs_to_cut_the_rest():
    run = {"distinct": 12.0, **{LABELS[name]: kl for name, kl in (("kl_hard", 1e-3), ("kl_alive_only", 2e-3), ("kl_adversarial", 3e-2))}}
    figure = viz.count_against_kl({"seed 0": run, "seed 1": run})
    assert list(figure.data[0].x) == [12, 12] and [trace.x[0] for trace in figure.data[1:]] == [1e-3, 2e-3, 3e-2]
    assert [trace.name for trace in figure.data[1:]] == ["KL, hard", "KL, alive-only", "KL, adversarial"]


def test_training_curves():
    history = [{"step": s, "total": 1.0, "faithfulness": 0.1 / s, "stochastic": 0.2 / s, "active": {"a": 1.0, "b": 2.0}} for s in (1, 2)]
    assert [trace.name for trace in viz.training_curves(history, {"a": "A"}).data] == ["faithfulness", "stochastic", "A", "b"]
    many = [{"step": 1, "total": 1.0, "active": {str(i): 1.0 for i in range(9)}}]
    assert viz.training_curves(many).data[-1].y == (9.0,)
    assert viz.training_curves([]).layout.title.text == "Training"


def test_the_circuit_names_what_is_active_where():
    figure = viz.positional_attention_circuit(
        {"s1": {"K0": [2], "Q0": []}, "m": {"V1": [1, 2, 3, 4, 5]}, "s2": {}}, {"m→s1": 0.5, "s2→m": 0.9}, {"K0": 0.1},
        {"s1": "s", "m": "m", "s2": "s"},
    )  # fmt: skip
    texts = " ".join(annotation.text for annotation in figure.layout.annotations)
    assert "<b>K0</b>  2" in texts and "5 of them" in texts and "0.50" in texts and "Q0" not in texts


def test_bench_growth_names_each_axis_with_its_exponents():
    def axis(name):
        points = [{name: n, "seconds": 0.1 * n, "memory_mb": 2.0 * n} for n in (8, 16)]
        return {
            "axis": name,
            "exponent_time": 1.0,
            "exponent_memory": None,
            "from": 8,
            "to": 16,
            "base": {"device": "cpu"},
            "points": points,
        }

    figure = viz.bench_growth_lines([axis("batch"), axis("layers")])
    names = [trace.name for trace in figure.data if trace.showlegend]
    assert "batch 8 … 16: time n<sup>1.00</sup>, memory n<sup>?</sup>" in names and len(names) == 4  # and two grey ones to read slopes by
    assert list(figure.data[2].x) == [1, 2] and list(viz.bench_growth_lines([axis("batch")]).data[2].x) == [8, 16]
