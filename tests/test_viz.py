import json
import re
from dataclasses import replace

import pandas as pd
import plotly.graph_objects as go
import pytest
import torch

from spd_lens import SPDError, ablation_effects, answer_logit, circuit_graph, describe, pair_attention, viz
from spd_lens.diagnostics import Match, PositionalAlignment
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


# --- every view on what the library gives ---


@pytest.fixture(scope="module")
def views(trained, tokens):
    one, metric = tokens[:1], answer_logit(7)
    seen, pairs = trained.observe(one), pair_attention(trained, one, 0)
    labels = (HOSTILE * 3)[: one.shape[1]]
    card = describe(trained, one)[0]
    contexts = tuple(replace(c, labels=tuple((HOSTILE * 4)[: len(c.labels)])) for c in card.contexts)
    card = replace(card, contexts=contexts, reads=tuple((label, 1.0) for label in HOSTILE), reads_in="residual stream")
    graph = replace(circuit_graph(trained, one, metric, most_nodes=8), labels=tuple(labels))
    i = torch.arange(6.0)
    alignment = PositionalAlignment(
        [0], [1, 2], torch.randn(1, 2, 6, 6), torch.randn(6, 6), i[2:].long(), torch.tensor([[0.6, 0.3]]), 1.0, 0.9, 1.0, 0.8
    )
    return {
        "heatmap": viz.importance_heatmap(seen.importances, labels),
        "coloured": viz.coloured_tokens(seen.importances, labels),
        "by layer": viz.active_by_layer(seen.importances, labels, "KL hard 1"),
        "mean": viz.mean_importance(seen.importances),
        "density": viz.importance_density(seen.importances),
        "pairs": viz.subcomponent_attention(replace(pairs, labels=tuple(labels))),
        "patterns": viz.attention_patterns(replace(pairs, labels=tuple(labels))),
        "alignment": viz.positional_alignment(alignment),
        "match": viz.match_bars(Match([0], [1, 2], 0.9, 1.0, 0.8, torch.tensor([0.5, 0.1]), torch.tensor([1, 9]), torch.tensor([1, 4]))),
        "card": viz.reads_and_writes(card),
        "contexts": viz.contexts(card),
        "weights": viz.weights(trained, "blocks.0.attn.W_Q"),
        "ablation": viz.ablation_bars(
            ablation_effects(trained, one, metric, {"blocks.0.attn.W_Q": [0, 1]}, progress=False), "logit of <b>"
        ),
        "output": viz.output_change(trained.model, one, trained.ablate({"blocks.0.attn.W_Q": [0]})),
        "circuit": viz.circuit_graph(graph),
    }


def test_every_view_has_a_title_and_every_axis_one_or_ticks_that_say_it(views):
    for name, view in views.items():
        if isinstance(view, viz.Html):
            assert view.title, name
            continue
        assert view.layout.title.text, name
        titles = [axis.title.text for kind in ("xaxes", "yaxes") for axis in getattr(view, f"select_{kind}")()]
        assert sum(map(bool, titles)) >= 2 or name in ("card", "ablation"), name


def test_hostile_tokens_come_out_as_text_in_every_view(views):
    for name, view in views.items():
        page = view.html() if isinstance(view, viz.Html) else view.to_html(include_plotlyjs=False)
        assert "<img" not in page and page.count("</script>") == page.count("<script"), name


def test_a_circuitsvis_view_brings_its_script_once_and_asks_nobody(views, tmp_path, monkeypatch):
    monkeypatch.setattr(viz.CircuitsVisView, "embedded", False)
    first, second = (views["pairs"]._repr_html_() for _ in range(2))
    assert len(first) > 1_000_000 > 100_000 > len(second) and "CircuitsVis.render" in second
    assert "https://unpkg" not in first and not re.search(r"<script[^>]*src=", first)
    assert len(viz.embed().html()) > 1_000_000
    views["pairs"].save(tmp_path / "pairs.html")
    assert (tmp_path / "pairs.html").read_text().count("window.CircuitsVis = CircuitsVis") == 1


def test_coloured_tokens_hold_each_active_subcomponent():
    view = viz.coloured_tokens(importances(), HOSTILE, {"blocks.0.attn.W_Q": "Q0"}, sequence=1)
    given = json.JSONDecoder().raw_decode(view.body.split("ColoredTokensMulti, ")[1])[0]
    assert (
        given["labels"] == ["Q0 · 1"]
        and given["tokens"] == [f"{label}\u2009" for label in HOSTILE]
        and given["values"][2] == [pytest.approx(0.8)]
    )


def test_active_by_layer_counts():
    figure = viz.active_by_layer(importances(), HOSTILE, "KL hard 1e-3", sequence=1)
    assert figure.data[0].z.tolist() == [[0, 0, 1, 0, 0]] and "KL hard 1e-3" in figure.layout.title.text


def test_means_are_sorted_and_densities_add_up_to_one():
    assert list(viz.mean_importance(importances()).data[0].y) == pytest.approx([0.08, 1e-6, 1e-6])
    density = viz.importance_density(importances()).data[0]
    assert sum(value or 0 for value in density.y) == pytest.approx(1) and density.name == "W_Q"


def test_the_diagonal_one_before_is_told_apart(views):
    bars = [trace for trace in views["alignment"].data if isinstance(trace, go.Bar)]
    assert len(bars) == 2 and bars[0].marker.color[1] == "#009E73" and "60%" in views["alignment"].layout.annotations[0].text


def test_weights_are_rows_of_length_one_and_refuse_what_is_not_there(views, trained):
    assert torch.tensor(views["weights"].data[0].z).norm(dim=1) == pytest.approx(torch.ones(12), abs=1e-4)
    with pytest.raises(SPDError, match="it has 0 …"):
        viz.weights(trained, "blocks.0.attn.W_Q", [99])
    with pytest.raises(SPDError, match="no subcomponent was chosen"):
        viz.weights(trained, "blocks.0.attn.W_Q", [])


def test_bars_are_ranked_by_size():
    table = pd.DataFrame({"site": ["a", "b"], "subcomponent": [0, 1], "position": [2, 3], "effect": [0.1, -2.0]})
    bars = viz.ablation_bars(table, "logit").data[0]
    assert list(bars.y) == ["b · 1 at 3", "a · 0 at 2"] and list(bars.x) == [-2.0, 0.1]


def test_the_circuit_draws_a_mark_a_node_and_a_line_an_edge(trained, tokens):
    graph = circuit_graph(trained, tokens[:1], answer_logit(7), most_nodes=8)
    figure = viz.circuit_graph(graph)
    lines = [trace for trace in figure.data if trace.mode == "lines"]
    assert len(lines) == min(40, len(graph.edges)) and f"{graph.kept:.2f}" in figure.layout.title.text
    assert {trace.line.dash for trace in lines} <= {"solid", "dash"}
