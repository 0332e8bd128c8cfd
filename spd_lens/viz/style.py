"""What all pictures share.

Colours are Okabe and Ito's, which survive colour-blindness; heatmaps use cividis, made for the same, or PuOr around zero. Figures have a white
ground of their own, so that they read the same in a dark notebook. Token strings are data from outside: they are escaped wherever they
enter a picture.
"""

from html import escape
from typing import Any

import plotly.graph_objects as go
from jaxtyping import Float
from torch import Tensor

BLUE, ORANGE, GREEN, PURPLE, GREY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#8a8a8a"
SKY, YELLOW, BLACK = "#56B4E9", "#E69F00", "#000000"
PALETTE = (BLUE, ORANGE, GREEN, PURPLE, GREY, SKY, YELLOW, BLACK)
DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot", "solid", "dash")
KINDS = {"W_Q": (BLUE, "circle"), "W_K": (ORANGE, "square"), "W_V": (GREEN, "diamond"), "W_O": (PURPLE, "hexagon"),
         "W_in": (SKY, "triangle-up"), "W_gate": (GREY, "cross"), "W_out": (YELLOW, "triangle-down")}  # fmt: skip
TEMPLATE = "plotly_white"
FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'DejaVu Sans', sans-serif"


def as_text(label: str) -> str:
    """A token or another text from outside, for a place where plotly or a page reads markup (plotly knows no `&quot;`)."""
    return escape(label, quote=False)


def finish(figure: go.Figure, title: str, height: float | int, **layout: Any) -> go.Figure:
    """Title, font, ground and margins."""
    return figure.update_layout(template=TEMPLATE, title=dict(text=title, x=0, xanchor="left", font_size=16), height=height,
                                font=dict(family=FONT, size=13), margin=dict(l=70, r=30, t=70, b=60), **layout)  # fmt: skip


def token_axis(figure: go.Figure, labels: list[str], title: str = "position (token)", **where: Any) -> None:
    """Tokens along x, each with its position, so that equal tokens stay apart."""
    figure.update_xaxes(title=title, tickmode="array", tickvals=list(range(len(labels))), ticktext=[as_text(label) for label in labels],
                        tickangle=-60, tickfont_size=11, **where)  # fmt: skip


def diverging(matrix: Float[Tensor, "i j"]) -> dict[str, Any]:
    """A heatmap's settings for values around zero."""
    limit = float(matrix.nan_to_num().abs().max()) or 1.0
    return dict(zmin=-limit, zmax=limit, colorscale="PuOr")
