"""What happened in training."""

from collections.abc import Mapping, Sequence
from typing import Any

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from spd_lens.viz.style import BLUE, DASHES, PALETTE, finish


def training_curves(history: Sequence[Mapping[str, Any]], names: Mapping[str, str] | None = None) -> go.Figure:
    """Every loss (unweighted) and the number of active subcomponents per position, over training steps; `names`: site → short."""
    figure = make_subplots(1, 2, subplot_titles=("losses (KL in nats; others in their own units)", "active subcomponents per position"))
    steps = [line["step"] for line in history]
    losses = [key for key in (history[-1] if history else {}) if key not in ("step", "total", "active")]
    for name, colour, dash in zip(losses, PALETTE, DASHES):
        figure.add_scatter(x=steps, y=[line.get(name) for line in history], name=name, line=dict(color=colour, dash=dash), row=1, col=1, legendgroup="losses", legendgrouptitle_text="losses")  # fmt: skip
    for site, colour, dash in zip(history[-1]["active"] if history and len(history[-1]["active"]) <= 8 else [], PALETTE, DASHES):
        figure.add_scatter(
            x=steps,
            y=[line["active"][site] for line in history],
            name=(names or {}).get(site, site),
            line=dict(color=colour, dash=dash),
            legendgroup="active",
            legendgrouptitle_text="active",
            row=1,
            col=2,
        )
    if history and len(history[-1]["active"]) > 8:
        figure.add_scatter(x=steps, y=[sum(line["active"].values()) for line in history], name="all sites", line_color=BLUE, row=1, col=2,
                           legendgroup="active", legendgrouptitle_text="active")  # fmt: skip
    figure.update_yaxes(type="log", exponentformat="power", col=1)
    figure.update_yaxes(rangemode="tozero", col=2)
    figure.update_xaxes(title="step")
    return finish(figure, "Training", 400)
