"""Circuits: which subcomponents act where, and what feeds what."""

from collections.abc import Mapping, Sequence

import pandas as pd
import plotly.graph_objects as go

from spd_lens.graph import CircuitGraph
from spd_lens.viz.style import BLUE, GREEN, KINDS, ORANGE, as_text, finish


def positional_attention_circuit(
    active: Mapping[str, Mapping[str, Sequence[int]]],
    attention: Mapping[str, float],
    ablated: Mapping[str, float],
    columns: Mapping[str, str],
) -> go.Figure:
    """The two-step induction circuit as a picture: which subcomponents act at s1, m and s2, and where attention carries them.

    Args:
        active: position label → site short name → subcomponents active there in most sequences.
        attention: `m→s1` and `s2→m`: mean attention with only active subcomponents kept.
        ablated: site short name → accuracy after cutting its active subcomponents out of the original model.
        columns: position label → what stands there, for the axis.
    """
    at = {label: i for i, label in enumerate(columns)}
    height = {"Q0": 1.0, "K0": 1.35, "V0": 0.65, "Q1": 3.0, "K1": 3.35, "V1": 2.65}
    colours = {"Q": BLUE, "K": ORANGE, "V": GREEN}
    figure = go.Figure()
    for position, label in columns.items():
        figure.add_annotation(x=at[position], y=0.0, text=f"<b>{as_text(position)}</b><br>{as_text(label)}", showarrow=False, font_size=13)
        figure.add_shape(type="line", x0=at[position], x1=at[position], y0=0.3, y1=3.9, line=dict(color="#d5d5d5", width=1), layer="below")
    for layer, (source, target) in enumerate((("s1", "m"), ("m", "s2"))):
        key = f"{target}→{source}"
        y = 2.0 * layer + 1.0
        figure.add_annotation(x=at[target] - 0.08, y=y + 0.78, ax=at[source] + 0.08, ay=y + 0.78, axref="x", ayref="y", text="", showarrow=True, arrowhead=2,
                              arrowwidth=1 + 5 * attention[key], arrowcolor="#444444")  # fmt: skip
        figure.add_annotation(x=(at[source] + at[target]) / 2, y=y + 1.02, showarrow=False, font_size=13,
                              text=f"layer {layer}: {target} attends to {source} with {attention[key]:.2f}")  # fmt: skip
        figure.add_annotation(x=-0.75, y=y, text=f"<b>layer {layer}</b>", showarrow=False, font_size=14)
    for position, sites in active.items():
        for short, indices in sites.items():
            if not indices:
                continue
            text = f"<b>{short}</b>  " + (", ".join(map(str, indices)) if len(indices) <= 4 else f"{len(indices)} of them")
            cut = f"<br>accuracy with {short} cut: {ablated[short]:.2f}" if short in ablated else ""
            figure.add_scatter(x=[at[position]], y=[height[short]], mode="markers", marker=dict(color="white", size=2), showlegend=False,
                               hovertemplate=f"{short} at {position}: subcomponents {', '.join(map(str, indices))}{cut}<extra></extra>")  # fmt: skip
            figure.add_annotation(x=at[position], y=height[short], text=text, showarrow=False, bordercolor=colours[short[0]], borderwidth=2,
                                  borderpad=5, bgcolor="white", font=dict(color="#222222", size=13))  # fmt: skip
    figure.update_xaxes(visible=False, range=[-1.0, len(at) - 0.5])
    figure.update_yaxes(visible=False, range=[-0.35, 4.25])
    return finish(figure, "The circuit: subcomponents active at each position, and the attention between them", 520, showlegend=False)


ORDER = tuple(KINDS)
COLUMN = 0.42  # of the width between two positions is for the nodes that share a place


def circuit_graph(graph: CircuitGraph, most_edges: int = 40) -> go.Figure:
    """The circuit of one prompt: a mark for each subcomponent at its position (larger: ablating it there costs the metric more), a line for each
    edge (wider: stronger; blue: for the metric, dashed orange: against it). Hover a mark, or the middle of a line.

    Args:
        graph: from `spd_lens.circuit_graph`.
        most_edges: the strongest that are drawn.
    """
    edges = graph.edges.head(most_edges)
    drawn = set(zip(edges["site"], edges["subcomponent"], edges["position"])) | set(
        zip(edges["to_site"], edges["to_subcomponent"], edges["to_position"])
    )
    nodes = graph.nodes.loc[[key in drawn for key in zip(graph.nodes["site"], graph.nodes["subcomponent"], graph.nodes["position"])]]
    places = _places(nodes)
    used = sorted(set(nodes["position"]))
    columns = {p: i for i, p in enumerate(used)}
    sites = sorted(set(nodes["site"]), key=lambda name: (int(name.split(".")[1]), ORDER.index(name.rsplit(".", 1)[1])))
    rows = {name: i for i, name in enumerate(sites)}
    at = {key: (columns[key[2]] + offset, float(rows[key[0]])) for key, offset in places.items()}
    at["the metric", 0, -1] = (float(len(used) - 1 if used else 0), len(sites) + 0.4)
    figure = go.Figure()
    largest = float(edges["strength"].abs().max()) if len(edges) else 1.0
    for row in edges.to_dict("records"):
        (x0, y0), (x1, y1) = (
            at[row["site"], row["subcomponent"], row["position"]],
            at[row["to_site"], row["to_subcomponent"], row["to_position"]],
        )
        favours = row["strength"] > 0
        line = dict(width=0.8 + 6 * abs(row["strength"]) / largest, color=BLUE if favours else ORANGE, dash="solid" if favours else "dash")
        figure.add_scatter(x=[x0, x1], y=[y0, y1], mode="lines", line=line, opacity=0.55, hoverinfo="skip", showlegend=False)
        said = (f"{_named(row['site'], row['subcomponent'])} at {row['position']} → {_named(row['to_site'], row['to_subcomponent'])}"
                f"<br>worth to the metric {row['strength']:+.3f}<br>adds to the target: first order {row['part']:+.3f}, by ablation {row['exact']:+.3f}")  # fmt: skip
        figure.add_scatter(x=[(x0 + x1) / 2], y=[(y0 + y1) / 2], mode="markers", marker=dict(size=9, opacity=0), showlegend=False,
                           hovertemplate=said + "<extra></extra>")  # fmt: skip
    heaviest = float(nodes["exact"].abs().max()) if len(nodes) else 1.0
    for kind in ORDER:
        some = [row for row in nodes.to_dict("records") if row["site"].endswith(f".{kind}")]
        if some:
            colour, symbol = KINDS[kind]
            keys = [(row["site"], row["subcomponent"], row["position"]) for row in some]
            figure.add_scatter(
                x=[at[key][0] for key in keys], y=[at[key][1] for key in keys], mode="markers+text", name=kind, text=[f"\u00a0{row['subcomponent']}" for row in some],
                textposition="middle right", textfont_size=11, customdata=[[_named(row["site"], row["subcomponent"]), as_text(graph.labels[row["position"]]), row["position"], row["inner"], row["exact"], row["effect"]] for row in some],
                marker=dict(symbol=symbol, color=colour, size=[9 + 15 * abs(row["exact"]) / heaviest for row in some], line=dict(color="white", width=1)),
                hovertemplate="%{customdata[0]} at %{customdata[2]}, %{customdata[1]}<br>v·x = %{customdata[3]:.3g}<br>the metric when it is cut there: %{customdata[4]:+.3f}"
                              " (first order %{customdata[5]:+.3f})<extra></extra>",
            )  # fmt: skip
    x, y = at["the metric", 0, -1]
    figure.add_annotation(
        x=x,
        y=y,
        text=f"<b>metric {graph.metric:.2f}</b>",
        showarrow=False,
        bgcolor="white",
        bordercolor="#444444",
        borderwidth=1,
        borderpad=4,
    )
    figure.update_xaxes(title="position (token)", tickmode="array", tickvals=list(range(len(used))), tickfont_size=12, showgrid=True,
                        ticktext=[f"{p}: {as_text(graph.labels[p])}" for p in used], range=[-0.6, len(used) - 0.3])  # fmt: skip
    figure.update_yaxes(
        title="matrix",
        tickmode="array",
        tickvals=list(range(len(sites))),
        ticktext=[_short(name) for name in sites],
        range=[-0.6, len(sites) + 0.9],
    )
    agreement = "" if graph.agreement != graph.agreement else f"; first order against ablation: r = {graph.agreement:.2f}"
    title = (
        f"What feeds what ({len(nodes)} of {graph.active} active places, {len(edges)} edges)"
        f"<br><sub>metric {graph.metric:.2f}; these nodes alone {graph.kept:.2f}; without them {graph.cut:.2f}{agreement}</sub>"
    )
    return finish(figure, title, 240 + 46 * len(sites), legend_title="matrix")


def _places(nodes: pd.DataFrame) -> dict[tuple[str, int, int], float]:
    """Of every node how far left or right of its position it is drawn: those that share a matrix and a position stand beside each other."""
    found = {}
    for _, some in nodes.groupby(["site", "position"], sort=False):
        n = len(some)
        for i, row in enumerate(some.to_dict("records")):
            found[row["site"], row["subcomponent"], row["position"]] = 0.0 if n == 1 else COLUMN * (2 * i / (n - 1) - 1)
    return found


def _short(name: str) -> str:
    return f"{name.rsplit('_', 1)[1]}{name.split('.')[1]}" if name.startswith("blocks.") else name


def _named(name: str, c: int) -> str:
    return f"{_short(name)} · {c}" if name.startswith("blocks.") else name
