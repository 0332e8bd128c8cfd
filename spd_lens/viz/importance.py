"""Where subcomponents are active."""

from collections.abc import Mapping, Sequence

import plotly.graph_objects as go
import torch
from plotly.subplots import make_subplots
from torch import Tensor

from spd_lens.masks import THRESHOLD
from spd_lens.viz.offline import CircuitsVisView
from spd_lens.viz.style import BLUE, DASHES, GREEN, GREY, KINDS, ORANGE, PALETTE, PURPLE, as_text, finish, token_axis


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
    active = _active(importances, names, sequence)
    texts, rows = [text for text, _ in active], [g for _, g in active]
    shown = [as_text(label) for label in labels]
    figure = go.Figure(
        go.Heatmap(
            z=torch.stack(rows).cpu().numpy() if rows else [[0.0] * len(shown)], x=list(range(len(shown))), y=texts or ["none active"],
            zmin=0, zmax=1, colorscale="Cividis", xgap=1, ygap=1, colorbar=dict(title="importance g"), customdata=[shown] * max(1, len(rows)),
            hovertemplate="%{y}<br>position %{x}: %{customdata}<br>g = %{z:.3f}<extra></extra>",
        )
    )  # fmt: skip
    token_axis(figure, list(labels))
    figure.update_yaxes(title="subcomponent", autorange="reversed", type="category")
    return finish(figure, "Causal importance over one sequence", 170 + 26 * max(1, len(rows)))


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
    return finish(
        figure,
        f"Active subcomponents by position<br><sub>{checks}</sub>",
        380,
        barmode="group",
        legend=dict(title="position", orientation="h", y=-0.25),
    )


def coloured_tokens(
    importances: Mapping[str, Tensor], labels: Sequence[str], names: Mapping[str, str] | None = None, sequence: int = 0
) -> CircuitsVisView:
    """The text of one sequence, coloured by the importance of one subcomponent at a time; hover a subcomponent's name, click to hold it.

    Args:
        importances: site → `[b, s, C]`; those that are ever active in the sequence are shown.
        labels: one per position.
        names: site → short name.
        sequence: which of the batch.
    """
    shown = _active(importances, names, sequence)
    values = torch.stack([g for _, g in shown], 1) if shown else torch.zeros(len(labels), 1, dtype=torch.float32, device="cpu")
    apart = [f"{label}\u2009" for label in labels]  # numbers would run into each other
    properties = {"tokens": apart, "values": values.cpu().tolist(), "labels": [text for text, _ in shown] or ["none active"]}
    return CircuitsVisView("Causal importance g (0 to 1) over tokens, one subcomponent at a time", "ColoredTokensMulti", properties)


def active_by_layer(
    importances: Mapping[str, Tensor], labels: Sequence[str], checks: str, names: Mapping[str, str] | None = None, sequence: int = 0
) -> go.Figure:
    """How many subcomponents of each matrix are active (g > 0.5) at each token of one sequence.

    `checks` (`Verification.beside_a_count`) goes into the title: no count without it.
    """
    number = torch.stack([(g[sequence] > THRESHOLD).sum(-1) for g in importances.values()]).cpu()
    shown = [as_text(label) for label in labels]
    rows = [(names or {}).get(name, name) for name in importances]
    few = number.numel() <= 600
    figure = go.Figure(go.Heatmap(z=number.numpy(), x=list(range(len(labels))), y=rows, colorscale="Cividis", xgap=1, ygap=1, zmin=0, texttemplate="%{z}" if few else None,
                                  colorbar=dict(title="active"), customdata=[shown] * len(rows),
                                  hovertemplate="%{y} at position %{x}, %{customdata}: %{z} active<extra></extra>"))  # fmt: skip
    token_axis(figure, list(labels))
    figure.update_yaxes(title="matrix", autorange="reversed", type="category")
    return finish(figure, f"Active subcomponents by matrix and token<br><sub>{checks}</sub>", 190 + 24 * len(rows))


def mean_importance(importances: Mapping[str, Tensor], names: Mapping[str, str] | None = None) -> go.Figure:
    """Each matrix's subcomponents by their mean importance over all positions, largest first: a cliff means that few are needed."""
    figure = go.Figure()
    for number, (name, g) in enumerate(importances.items()):
        values, order = g.flatten(0, 1).mean(0).sort(descending=True)
        figure.add_scatter(x=list(range(1, len(values) + 1)), y=values.clamp_min(1e-6).tolist(), name=(names or {}).get(name, name), mode="lines+markers", customdata=order.tolist(),
                           line=dict(color=PALETTE[number % len(PALETTE)], dash=DASHES[number // len(PALETTE) % len(DASHES)]), marker_size=4,
                           hovertemplate="subcomponent %{customdata}, place %{x}: mean g %{y:.2e}<extra>%{fullData.name}</extra>")  # fmt: skip
    figure.update_xaxes(title="place among the matrix's subcomponents")
    figure.update_yaxes(title="mean g (log scale, from 1e-6)", type="log", exponentformat="power")
    return finish(figure, "Mean importance, sorted", 430, legend_title="matrix", showlegend=True)


def importance_density(importances: Mapping[str, Tensor], bins: int = 40) -> go.Figure:
    """How often each importance occurs, over all positions and subcomponents of each kind of matrix: peaks at 0 and 1 mean a clear choice; what
    lies between is neither in nor out."""
    figure = go.Figure()
    for kind, (colour, symbol) in KINDS.items():
        some = [g.detach().float().flatten().cpu() for name, g in importances.items() if name.endswith(f".{kind}")]
        if some:
            share = torch.histc(torch.cat(some), bins, 0.0, 1.0) / sum(map(len, some))
            figure.add_scatter(x=[(i + 0.5) / bins for i in range(bins)], y=[value or None for value in share.tolist()], name=kind, mode="lines+markers",
                               marker=dict(size=7, symbol=symbol), line=dict(color=colour, width=1), hovertemplate="g ≈ %{x:.2f}: %{y:.1e} of all<extra>%{fullData.name}</extra>")  # fmt: skip
    figure.add_vline(x=THRESHOLD, line=dict(color=GREY, dash="dot"), annotation_text="active above", annotation_position="top right")
    figure.update_xaxes(title="causal importance g", range=[0, 1])
    figure.update_yaxes(title="share of all (log scale)", type="log", exponentformat="power", dtick=1)
    return finish(figure, "Density of importance, over positions and subcomponents", 430, legend_title="matrix", showlegend=True)


def _active(importances: Mapping[str, Tensor], names: Mapping[str, str] | None, sequence: int) -> list[tuple[str, Tensor]]:
    """Of every subcomponent that is active anywhere in the sequence its name and its importance `[s]`."""
    return [
        (f"{(names or {}).get(name, name)} · {c}", g[sequence, :, c])
        for name, g in importances.items()
        for c in torch.nonzero((g[sequence] > THRESHOLD).any(0)).flatten().tolist()
    ]
