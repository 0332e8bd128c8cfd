"""One subcomponent, or one matrix's: what it reads and writes, where it acts, its vectors."""

import math
from collections.abc import Sequence

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from spd_lens.cards import BINS, Card, Context
from spd_lens.decomposition import Decomposition
from spd_lens.errors import SPDError
from spd_lens.masks import THRESHOLD
from spd_lens.viz.offline import Html
from spd_lens.viz.style import BLUE, GREY, ORANGE, as_text, diverging, finish

UNITS = {"residual stream": "dot product with the token's vector", "heads": "share of the squared norm", "neurons": "entry of the vector"}


def reads_and_writes(card: Card) -> go.Figure:
    """What a subcomponent reads and writes, in the terms of the spaces that it lies between, and how its importance is spread."""
    titles = (f"reads: {_space(card.reads_in, 'v·W_E')}", f"writes: {_space(card.writes_in, 'u·W_U')}", "importance g of all positions")
    figure = make_subplots(1, 3, subplot_titles=titles, horizontal_spacing=0.12)
    for column, (pairs, space) in enumerate(((card.reads, card.reads_in), (card.writes, card.writes_in)), start=1):
        labels, values = [as_text(label) for label, _ in pairs], [value for _, value in pairs]
        places = list(range(len(pairs)))  # two tokens may look alike
        figure.add_bar(y=places, x=values, orientation="h", marker_color=[BLUE if value > 0 else ORANGE for value in values], showlegend=False, row=1, col=column,
                       customdata=labels, hovertemplate="%{customdata}: %{x:.3f}<extra></extra>")  # fmt: skip
        figure.update_yaxes(tickmode="array", tickvals=places, ticktext=labels, range=[max(len(places), 4) - 0.5, -0.5], row=1, col=column)
        figure.update_xaxes(title=UNITS[space], row=1, col=column)
    figure.add_bar(x=[(i + 0.5) / BINS for i in range(BINS)], y=[n or None for n in card.histogram], width=1 / BINS, marker_color=GREY, showlegend=False, row=1, col=3,
                   hovertemplate="g ≈ %{x:.3f}: %{y} positions<extra></extra>")  # fmt: skip
    figure.update_yaxes(
        type="log",
        exponentformat="power",
        dtick=1,
        range=[-0.3, math.log10(max(card.histogram) + 1) + 0.3],
        title="positions (log scale)",
        row=1,
        col=3,
    )
    figure.update_xaxes(title="g", range=[0, 1], row=1, col=3)
    return finish(figure, f"{card.short} ({card.site}): active at {card.share_active:.2%} of the positions", 360)


def contexts(card: Card) -> Html:
    """Where a subcomponent is active and reads most: a line a place, tokens coloured by v·x (blue up, orange down), underlined where it is active."""
    lines = "".join(f"<li>{context_line(context)}</li>" for context in card.contexts) or "<li>active nowhere in these tokens</li>"
    return Html(
        f'<ol style="line-height: 2; margin: 0; padding-left: 1.6em">{lines}</ol>',
        f"{card.short}: where it reads most, v·x (underlined: active, g > {THRESHOLD})",
    )


def context_line(context: Context) -> str:
    """One context as HTML; tokens come out as text."""
    limit = max(map(abs, context.inner)) or 1.0
    spans = []
    for i, (label, inner, g) in enumerate(zip(context.labels, context.inner, context.importances)):
        red, green, blue = (0, 114, 178) if inner > 0 else (213, 94, 0)
        style = f"background: rgba({red},{green},{blue},{0.45 * abs(inner) / limit:.2f}); padding: 1px 2px; border-radius: 3px"
        style += "; text-decoration: underline" if g > THRESHOLD else ""
        style += "; font-weight: 700; outline: 1px solid #57606a" if i == context.at else ""
        spans.append(f'<bdi style="{style}" title="v·x {inner:.3g}, g {g:.2f}">{as_text(label)}</bdi>')
    return f'<span style="color: #57606a">{context.sequence}:{context.position}</span> ' + " ".join(spans)


def weights(d: Decomposition, site: str, chosen: Sequence[int] | None = None) -> go.Figure:
    """V and U of one matrix, a row a subcomponent, each row scaled to length 1 (their common length is in the hover text).

    Args:
        d: the decomposition.
        site: its name, e.g. `blocks.0.attn.W_Q`.
        chosen: indices; None: the 32 with the largest |v|·|u|.

    Raises:
        SPDError: an unknown site or subcomponent.
    """
    d.check_chosen({site: chosen or []})
    components = d.components[site]
    V, U = components.V.detach().T, components.U.detach()
    size = V.norm(dim=1) * U.norm(dim=1)
    rows = list(chosen) if chosen is not None else size.argsort(descending=True)[:32].tolist()
    if not rows:
        raise SPDError(f"{site}: no subcomponent was chosen; give some indices, or leave chosen out.")
    names = [str(c) for c in rows]
    sizes = [[f"{float(size[c]):.3g}"] for c in rows]
    figure = make_subplots(
        1, 2, subplot_titles=(f"v: what is read, {V.shape[1]} wide", f"u: what is written, {U.shape[1]} wide"), horizontal_spacing=0.1
    )
    for column, matrix in enumerate((V[rows], U[rows]), start=1):
        unit = (matrix / matrix.norm(dim=1, keepdim=True).clamp_min(1e-30)).cpu()
        figure.add_heatmap(z=unit.numpy(), y=names, **diverging(unit), colorbar=dict(title="entry", x=1.02), showscale=column == 2,
                           customdata=[size * unit.shape[1] for size in sizes], row=1, col=column,
                           hovertemplate="subcomponent %{y}, entry %{x}: %{z:.3f}<br>|v|·|u| = %{customdata}<extra></extra>")  # fmt: skip
    figure.update_yaxes(autorange="reversed", type="category")
    figure.update_yaxes(title="subcomponent", col=1)
    figure.update_xaxes(title="dimension")
    return finish(figure, f"V and U of {site}, rows of length 1", 210 + 16 * len(rows))


def _space(space: str, product: str) -> str:
    return f"tokens, {product}" if space == "residual stream" else space
