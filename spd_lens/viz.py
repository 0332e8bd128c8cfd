"""Results → plotly figures. The only file that draws.

Colours are Okabe and Ito's, which survive colour-blindness; heatmaps use cividis, made for the same. Token strings are data from
outside: they are escaped wherever they enter a page.
"""

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import plotly.graph_objects as go
import torch
from plotly.subplots import make_subplots
from torch import Tensor

from spd_lens.masks import THRESHOLD

BLUE, ORANGE, GREEN, PURPLE, GREY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#8a8a8a"
TEMPLATE = "plotly_white"
FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'DejaVu Sans', sans-serif"


def _finish(figure: go.Figure, title: str, height: int, **layout: Any) -> go.Figure:
    figure.update_layout(template=TEMPLATE, title=dict(text=title, x=0, xanchor="left", font_size=16), height=height,
                         font=dict(family=FONT, size=13), margin=dict(l=70, r=30, t=60, b=60), **layout)  # fmt: skip
    return figure


def importance_heatmap(
    importances: Mapping[str, Tensor], labels: Sequence[str], names: Mapping[str, str] | None = None, sequence: int = 0
) -> go.Figure:
    """Causal importance of every subcomponent that is ever active in one sequence, over its positions.

    Args:
        importances: site → `[b, s, C]`.
        labels: one per position, e.g. the tokens.
        names: site → short name, e.g. `Q0`.
        sequence: which of the batch.
    """
    rows, texts = [], []
    for name, g in importances.items():
        for c in torch.nonzero((g[sequence] > THRESHOLD).any(0)).flatten().tolist():
            rows.append(g[sequence, :, c])
            texts.append(f"{(names or {}).get(name, name)} · {c}")
    shown = [escape(label) for label in labels]
    figure = go.Figure(
        go.Heatmap(
            z=torch.stack(rows).cpu().numpy() if rows else [[0.0] * len(shown)], x=list(range(len(shown))), y=texts or ["none active"],
            zmin=0, zmax=1, colorscale="Cividis", xgap=1, ygap=1, colorbar=dict(title="importance g"), customdata=[shown] * max(1, len(rows)),
            hovertemplate="%{y}<br>position %{x}: %{customdata}<br>g = %{z:.3f}<extra></extra>",
        )
    )  # fmt: skip
    figure.update_xaxes(
        title="position (token)", tickmode="array", tickvals=list(range(len(shown))), ticktext=shown, tickangle=-60, tickfont_size=10
    )
    figure.update_yaxes(title="subcomponent", autorange="reversed", type="category")
    return _finish(figure, "Causal importance over one sequence", 170 + 26 * max(1, len(rows)))


def census_bars(
    mean_active: Mapping[str, Mapping[str, float]], paper: Mapping[str, Mapping[str, float]] | None, positions: Sequence[str], checks: str
) -> go.Figure:
    """Mean number of active subcomponents per site and position, with published figures beside where there are any.

    `checks` (`Verification.beside_a_count`) goes into the title: no count without it.
    """
    colours = dict(zip(positions, (BLUE, ORANGE, GREEN, GREY, PURPLE)))
    figure = make_subplots(
        1,
        2 if paper else 1,
        shared_yaxes=True,
        subplot_titles=("this decomposition", "the paper") if paper else ("",),
        horizontal_spacing=0.05,
    )
    for column, source in enumerate([mean_active] + ([paper] if paper else []), start=1):
        for position in positions:
            values = [source[site][position] for site in source]
            figure.add_bar(x=list(source), y=values, name=position, marker_color=colours[position], showlegend=column == 1, row=1, col=column,
                           hovertemplate=f"%{{x}} at {position}: %{{y:.3f}}<extra></extra>")  # fmt: skip
    figure.update_yaxes(title="mean active (g > 0.5)", col=1)
    figure.update_xaxes(title="site")
    return _finish(
        figure,
        f"Active subcomponents by position ({checks})",
        380,
        barmode="group",
        legend=dict(title="position", orientation="h", y=-0.25),
    )


def training_curves(history: Sequence[Mapping[str, Any]], names: Mapping[str, str] | None = None) -> go.Figure:
    """Every loss (unweighted) and the number of active subcomponents per position, over training steps; `names`: site → short."""
    figure = make_subplots(1, 2, subplot_titles=("losses (KL in nats; others in their own units)", "active subcomponents per position"))
    steps = [line["step"] for line in history]
    losses = [key for key in (history[-1] if history else {}) if key not in ("step", "total", "active")]
    palette = (BLUE, ORANGE, GREEN, PURPLE, GREY, "#56B4E9", "#E69F00", "#000000")
    dashes = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot", "solid", "dash")
    for name, colour, dash in zip(losses, palette, dashes):
        figure.add_scatter(x=steps, y=[line.get(name) for line in history], name=name, line=dict(color=colour, dash=dash), row=1, col=1)
    for site, colour, dash in zip(history[-1]["active"] if history and len(history[-1]["active"]) <= 8 else [], palette, dashes):
        figure.add_scatter(
            x=steps,
            y=[line["active"][site] for line in history],
            name=(names or {}).get(site, site),
            line=dict(color=colour, dash=dash),
            row=1,
            col=2,
        )
    if history and len(history[-1]["active"]) > 8:
        figure.add_scatter(x=steps, y=[sum(line["active"].values()) for line in history], name="all sites", line_color=BLUE, row=1, col=2)
    figure.update_yaxes(type="log", exponentformat="power", col=1)
    figure.update_yaxes(rangemode="tozero", col=2)
    figure.update_xaxes(title="step")
    return _finish(figure, "Training", 400)


def bilinear_form(matrix: Tensor, title: str, rows: str, columns: str) -> go.Figure:
    """A position × position (or token × token) form, diverging around zero."""
    limit = float(matrix.abs().max()) or 1.0
    figure = go.Figure(go.Heatmap(z=matrix.cpu().numpy(), zmin=-limit, zmax=limit, colorscale="PuOr", colorbar=dict(title="score"),
                                  hovertemplate=f"{rows} %{{y}}, {columns} %{{x}}: %{{z:.2f}}<extra></extra>"))  # fmt: skip
    figure.update_yaxes(title=rows, autorange="reversed", scaleanchor="x", constrain="domain")
    figure.update_xaxes(title=columns, constrain="domain")
    return _finish(figure, title, 460)


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
        figure.add_annotation(x=at[position], y=0.0, text=f"<b>{escape(position)}</b><br>{escape(label)}", showarrow=False, font_size=13)
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
    return _finish(figure, "The circuit: subcomponents active at each position, and the attention between them", 520, showlegend=False)
