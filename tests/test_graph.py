import pytest
import torch

from spd_lens import SPDConfig, SPDError, decompose
from spd_lens.graph import answer_logit, circuit_graph
from tests import zoo

MODELS = {"native": lambda: zoo.native(), "llama": lambda: zoo.wrapped("llama"), "neox": lambda: zoo.wrapped("neox")}


@pytest.fixture(scope="module", params=MODELS)
def case(request):
    model = MODELS[request.param]()
    d = decompose(model, zoo.tokens(4), SPDConfig(steps=0, subcomponents=40), progress=False)
    tokens, metric = zoo.tokens(1), answer_logit(7)
    return d, tokens, metric, circuit_graph(d, tokens, metric, most_nodes=12, most_edges=1000)


def test_nodes_are_active_and_their_effect_is_that_of_ablating_them(case):
    d, tokens, metric, graph = case
    seen, before = d.observe(tokens), float(metric(d.model(tokens)))
    assert len(graph.nodes) == 12 and graph.metric == pytest.approx(before, abs=1e-5)
    for row in graph.nodes.head(4).to_dict("records"):
        assert seen.importances[row["site"]][0, row["position"], row["subcomponent"]] > 0.5
        hooks = d.ablate({row["site"]: [row["subcomponent"]]}, positions=[row["position"]])
        assert float(metric(d.model.run_with_hooks(tokens, fwd_hooks=hooks))) - before == pytest.approx(row["exact"], abs=2e-5)


def test_an_edge_is_what_the_target_loses_when_all_else_is_held(case):
    """By hand: every other site's output is put back to what it was."""
    d, tokens, _, graph = case
    seen = d.observe(tokens)
    kept = {name: [] for name in d.sites}
    d._forward(tokens, {name: (lambda p, name=name: kept[name].append(p.y)) for name in d.sites})
    edges = graph.edges[graph.edges["to_site"] != "the metric"]
    for row in edges.head(6).to_dict("records"):
        read = {}

        def hold(passage, name, row=row, read=read):
            read[name] = passage.x
            y = kept[name][0].clone()
            if name == row["site"]:
                taken = seen.inner[name][0, row["position"], row["subcomponent"]] * d.components[name].U[row["subcomponent"]]
                y[..., 0, row["position"], :] -= taken
            return y

        with torch.no_grad():
            d._forward(tokens, {name: (lambda p, name=name, hold=hold: hold(p, name)) for name in d.sites})
            after = read[row["to_site"]][0, row["to_position"]] @ d.components[row["to_site"]].V[:, row["to_subcomponent"]]
        before = seen.inner[row["to_site"]][0, row["to_position"], row["to_subcomponent"]]
        assert float(before - after) == pytest.approx(row["exact"], abs=1e-4)


def test_edges_point_forward_and_first_order_agrees_with_ablation(case):
    d, _, _, graph = case
    order = {name: i for i, name in enumerate(d.sites)}
    for row in graph.edges.to_dict("records"):
        assert row["to_site"] == "the metric" or (order[row["site"]] < order[row["to_site"]] and row["position"] <= row["to_position"])
    assert graph.agreement > 0.9  # little is far from linear at this size


def test_the_whole_is_tested_too(case):
    d, tokens, metric, graph = case
    masks = {name: torch.zeros(1, tokens.shape[1], 40) for name in d.sites}
    hooks = []
    for row in graph.nodes.to_dict("records"):
        masks[row["site"]][0, row["position"], row["subcomponent"]] = 1
        hooks += d.ablate({row["site"]: [row["subcomponent"]]}, positions=[row["position"]])
    with torch.no_grad():
        assert graph.kept == pytest.approx(float(metric(d.run(tokens, masks))), abs=1e-5)
        assert graph.cut == pytest.approx(float(metric(d.model.run_with_hooks(tokens, fwd_hooks=hooks))), abs=1e-5)
    assert "edges" in repr(graph)


def test_bad_input(untrained, trained, tokens):
    with pytest.raises(SPDError, match="3 prompts were given"):
        circuit_graph(trained, tokens, answer_logit(1))
    with pytest.raises(SPDError, match="no gradient"):
        circuit_graph(trained, tokens[:1], lambda logits: float(logits[0, -1, 0]))
    silent = decompose(trained.model, tokens, SPDConfig(steps=0, subcomponents=40, gate_bias=-9.0), progress=False)
    with pytest.raises(SPDError, match="no circuit to draw"):
        circuit_graph(silent, tokens[:1], answer_logit(1))
