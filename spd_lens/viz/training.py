"""What happened in training."""

from collections.abc import Mapping, Sequence
from typing import Any

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from spd_lens.viz.style import BLUE, DASHES, PALETTE, finish


def training_curves(history: Sequence[Mapping[str, Any]], names: Mapping[str, str] | None = None) -> go.Figure:
    """Every loss (unweighted) and the number of active subcomponents per position, over training steps; `names`: site → short."""
    figure = make_subplots(1, 2, horizontal_spacing=0.14, subplot_titles=("losses", "active"))
    steps = [line["step"] for line in history]
    losses = [key for key in (history[-1] if history else {}) if key not in ("step", "total", "active")]
    for name, colour, dash in zip(losses, PALETTE, DASHES):
        figure.add_scatter(x=steps, y=[line.get(name) for line in history], name=name, line=dict(color=colour, dash=dash), row=1, col=1)
    for site, colour, dash in zip(history[-1]["active"] if history and len(history[-1]["active"]) <= 8 else [], PALETTE, DASHES):
        figure.add_scatter(
            x=steps,
            y=[line["active"][site] for line in history],
            name=(names or {}).get(site, site),
            line=dict(color=colour, dash=dash),
            legend="legend2",
            row=1,
            col=2,
        )
    if history and len(history[-1]["active"]) > 8:
        figure.add_scatter(
            x=steps,
            y=[sum(line["active"].values()) for line in history],
            name="all matrices",
            line_color=BLUE,
            legend="legend2",
            row=1,
            col=2,
        )
    figure.update_yaxes(type="log", exponentformat="power", title="KL in nats; others in their own units", col=1)
    figure.update_yaxes(rangemode="tozero", title="subcomponents per position (g > 0.5)", col=2)
    figure.update_xaxes(title="step")
    beside: Any = dict(x=1.02, xanchor="left", yanchor="top")
    return finish(
        figure, "Training", 440, legend=dict(title="loss", y=1.0, **beside), legend2=dict(title="matrix", y=0.48, **beside), showlegend=True
    )
