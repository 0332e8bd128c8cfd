"""Scores and attention, by position."""

from typing import Any

import plotly.graph_objects as go
import torch
from plotly.subplots import make_subplots
from torch import Tensor

from spd_lens.attention import PairAttention
from spd_lens.diagnostics import Match, PositionalAlignment
from spd_lens.viz.offline import CircuitsVisView
from spd_lens.viz.style import GREEN, GREY, ORANGE, as_text, diverging, finish

LABELLED = 24  # positions of a panel that are labelled; of more, every second, third, …


def bilinear_form(matrix: Tensor, title: str, rows: str, columns: str) -> go.Figure:
    """A position × position (or token × token) form, diverging around zero."""
    figure = go.Figure(go.Heatmap(z=matrix.cpu().numpy(), **diverging(matrix), colorbar=dict(title="score"),
                                  hovertemplate=f"{rows} %{{y}}, {columns} %{{x}}: %{{z:.2f}}<extra></extra>"))  # fmt: skip
    figure.update_yaxes(title=rows, autorange="reversed", scaleanchor="x", constrain="domain")
    figure.update_xaxes(title=columns, constrain="domain")
    return finish(figure, title, 460)


def positional_form(form: Tensor) -> go.Figure:
    """A causal position × position form of scores, each row less its mean over the keys `j ≤ i`, with the diagonal `j = i - 1` marked."""
    figure = bilinear_form(_centred(form), "Q0×K0, by position: what the active subcomponents add up to", "query at", "s at")
    before = [i - 1 for i in range(1, len(form))]
    figure.add_scatter(x=before, y=[j + 1 for j in before], mode="markers", marker=dict(symbol="circle-open", size=6, color=GREEN, line_width=1),
                       name="one before", hoverinfo="skip", showlegend=True)  # fmt: skip
    return figure.update_layout(height=620, legend=dict(orientation="h", y=1.06, x=0.5, xanchor="center"))


def subcomponent_attention(found: PairAttention) -> CircuitsVisView:
    """The patterns that pairs of Q and K subcomponents make alone, beside the full pattern of the heads that they work in; click one to enlarge
    it. Rows are the positions that attend, columns those attended to."""
    heads = sorted(set(found.heads))
    names = [f"h{h}" for h in heads] + [f"q{q}×k{k} h{h}" for (q, k), h in zip(found.pairs, found.heads)]
    (q, k), h = found.pairs[-1], found.heads[-1]
    attention = [*found.full[heads].cpu().tolist(), *found.alone.cpu().tolist()]
    properties = {
        "attention": attention,
        "tokens": list(found.labels),
        "attentionHeadNames": names,
        "maxValue": 1,
        "minValue": 0,
        "maskUpperTri": True,
    }
    return CircuitsVisView(
        f"Attention of layer {found.layer}, 0 to 1. {names[0]}: the whole head {heads[0]}; {names[-1]}: what Q{found.layer}·{q} and K{found.layer}·{k} alone make of head {h}",
        "AttentionHeads",
        properties,
    )


def attention_patterns(found: PairAttention) -> go.Figure:
    """The same as heatmaps side by side: a whole head, and each pair alone in it."""
    heads = sorted(set(found.heads))
    panels = [(f"head {h}, whole", found.full[h]) for h in heads]
    panels += [(f"Q·{q} × K·{k} alone, head {h}", pattern) for (q, k), h, pattern in zip(found.pairs, found.heads, found.alone)]
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    labels = [as_text(label) for label in found.labels]
    names = [f"{i}: {label}" for i, label in enumerate(labels)]
    limit = max(float(pattern[len(pattern) // 8 :].max()) for _, pattern in panels)  # the first positions have few to attend to
    scale = "attention" if limit > 0.9 else f"attention<br>(colours end<br>at {limit:.2g})"
    figure = make_subplots(
        rows, columns, subplot_titles=[title for title, _ in panels], horizontal_spacing=0.08, vertical_spacing=0.28 / rows
    )
    for number, (_, pattern) in enumerate(panels):
        shown = pattern.masked_fill(torch.ones_like(pattern).triu(1).bool(), torch.nan).cpu().numpy()
        where: Any = dict(row=number // columns + 1, col=number % columns + 1)
        figure.add_heatmap(z=shown, zmin=0, zmax=limit, colorscale="Cividis", colorbar=dict(title=scale), showscale=number == 0,
                           x=names, y=names, hovertemplate="%{y} attends to %{x}: %{z:.3f}<extra></extra>", **where)  # fmt: skip
        told = range(0, len(labels), 1 + (len(labels) - 1) // LABELLED)
        ticks = dict(
            type="category", tickmode="array", tickvals=list(told), ticktext=[labels[i] for i in told], tickfont_size=9, showgrid=False
        )
        figure.update_xaxes(**ticks, tickangle=-60, title="attended to" if where["row"] == rows else None, **where)
        figure.update_yaxes(**ticks, autorange="reversed", title="attends" if where["col"] == 1 else None, **where)
    return finish(figure, f"Attention of layer {found.layer}: whole heads, and pairs of subcomponents alone", 110 + 330 * rows)


def positional_alignment(found: PositionalAlignment, most: int = 4) -> go.Figure:
    """What each K0 subcomponent adds, with all of Q0's, to the score of the query at one position for s at another (position × position, each row
    less its mean over visible keys), and below it the mean of that form along each diagonal: an induction circuit peaks one before."""
    share, forms = found.share, found.by_key
    order = share.abs().argsort(descending=True)[:most].tolist()
    columns = max(1, len(order))
    titles = [f"K0·{found.keys[e]}: {float(share[e]):.0%} of the contrast" for e in order] or ["K0 has no active subcomponent"]
    figure = make_subplots(2, columns, subplot_titles=titles, row_heights=[0.62, 0.38], vertical_spacing=0.2, horizontal_spacing=0.07)
    centred = [_centred(forms[e]) for e in order]
    limit = max((float(c.nan_to_num().abs().max()) for c in centred), default=1.0) or 1.0
    for column, form in enumerate(centred, start=1):
        figure.add_heatmap(z=form.cpu().numpy(), zmin=-limit, zmax=limit, colorscale="PuOr", showscale=column == 1, colorbar=dict(title="score", y=0.7, len=0.6),
                           hovertemplate="query at %{y}, s at %{x}: %{z:.2f}<extra></extra>", row=1, col=column)  # fmt: skip
        figure.update_yaxes(autorange="reversed", title="query at" if column == 1 else None, row=1, col=column)
        figure.update_xaxes(title="s at", row=1, col=column)
        offsets = list(range(min(12, len(form))))
        means = [float(form.diagonal(-back).nanmean()) for back in offsets]
        figure.add_bar(x=offsets, y=means, marker_color=[GREEN if back == 1 else GREY for back in offsets], showlegend=False, row=2, col=column,
                       hovertemplate="%{x} before: %{y:.2f}<extra></extra>")  # fmt: skip
        figure.update_xaxes(title="how far before the query", dtick=1, row=2, col=column)
        figure.update_yaxes(title="mean score" if column == 1 else None, row=2, col=column)
    return finish(
        figure,
        f"Positional alignment of K0: is the position before singled out?<br><sub>together they pick s1 in {found.picks_s1:.1%} of the sequences</sub>",
        660,
    )


def match_bars(found: Match) -> go.Figure:
    """How well each K1 subcomponent reads what layer 0 wrote for s: its cosine, and the place of s among all tokens, by cosine and by projection, which
    counts how much is written too (layer 0 may write a little of the same for every token)."""
    names = [f"K1·{k}" for k in found.keys]
    places = [
        f"s is no. {p} by projection, no. {c} by cosine" for p, c in zip(found.rank_by_projection.tolist(), found.rank_by_cosine.tolist())
    ]
    figure = go.Figure(go.Bar(y=names, x=found.cosine.tolist(), orientation="h", width=0.5, marker_color=ORANGE, text=places, textposition="inside",
                              insidetextanchor="start", textfont_color="white", hovertemplate="%{y}: |cos| %{x:.3f}<br>%{text}<extra></extra>"))  # fmt: skip
    figure.update_xaxes(title="|cos| of v with what layer 0 writes for s; on the bar: the place of s among all tokens", range=[0, 1])
    figure.update_yaxes(title="subcomponent", type="category", autorange="reversed")
    title = f"Does K1 read what layer 0 wrote? (Q1 and K1 pick m in {found.picks_m:.1%} of the sequences)"
    return finish(figure, title, 170 + 50 * len(names))


def _centred(form: Tensor) -> Tensor:
    """Each row less its mean over the keys that it sees; the others are nan."""
    visible = torch.ones_like(form).tril()
    return (form - (form * visible).sum(1, keepdim=True) / visible.sum(1, keepdim=True)).masked_fill(visible == 0, torch.nan)
