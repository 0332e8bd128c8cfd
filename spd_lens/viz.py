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
from spd_lens.metrics import LABELS

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


def positional_form(form: Tensor) -> go.Figure:
    """A causal position × position form of scores, each row less its mean over the keys `j ≤ i`, with the diagonal `j = i - 1` marked."""
    visible = torch.ones_like(form).tril()
    centred = (form - (form * visible).sum(1, keepdim=True) / visible.sum(1, keepdim=True)).masked_fill(visible == 0, torch.nan)
    figure = bilinear_form(centred, "Q0×K0, by position: what the active subcomponents add up to", "query at", "s at")
    before = [i - 1 for i in range(1, len(form))]
    figure.add_scatter(x=before, y=[j + 1 for j in before], mode="markers", marker=dict(symbol="circle-open", size=6, color=GREEN, line_width=1),
                       name="one before", hoverinfo="skip", showlegend=True)  # fmt: skip
    return figure.update_layout(height=620, legend=dict(orientation="h", y=1.06, x=0.5, xanchor="center"))


def count_against_kl(found: Mapping[str, Mapping[str, float | int]]) -> go.Figure:
    """Runs by their number of distinct subcomponents and what it costs to cut the others, hard, alive-only and adversarially."""
    marks = {"kl_hard": (BLUE, "circle"), "kl_alive_only": (ORANGE, "square"), "kl_adversarial": (PURPLE, "diamond")}
    runs = list(found)
    figure = make_subplots(1, 2, shared_yaxes=True, column_widths=[0.35, 0.65], horizontal_spacing=0.03)
    figure.add_bar(y=runs, x=[found[run]["distinct"] for run in runs], orientation="h", marker_color=GREY, showlegend=False, row=1, col=1,
                   text=[f"{found[run]['distinct']:.0f}" for run in runs], textposition="auto", hovertemplate="%{y}: %{x}<extra></extra>")  # fmt: skip
    for name, (colour, symbol) in marks.items():
        figure.add_scatter(y=runs, x=[found[run][LABELS[name]] for run in runs], mode="markers", name=LABELS[name].split(":")[0], row=1, col=2,
                           marker=dict(color=colour, symbol=symbol, size=11), hovertemplate="%{y}: %{x:.1e} nats<extra></extra>")  # fmt: skip
    figure.update_xaxes(title="distinct subcomponents", rangemode="tozero", col=1)
    figure.update_xaxes(title="KL, nats per output (log scale)", type="log", exponentformat="power", col=2)
    figure.update_yaxes(autorange="reversed", type="category")
    return _finish(figure, "How many are active, and what cutting all others costs", 190 + 34 * len(runs),
                   legend=dict(orientation="h", y=1.0, yanchor="bottom", x=0.4))  # fmt: skip


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


PRODUCTS, LIMIT = "its matrix products alone, at full speed", dict(symbol="line-ns-open", size=26, line_width=3, color="black")
OWN, OWN_MARK = "the model's own forward + backward", dict(symbol="diamond", size=14, color="white", line_color="black", line_width=2)


def bench_step_bars(lines: Sequence[Mapping[str, Any]]) -> go.Figure:
    """The lines of `spd-lens bench step`: one bar for each, cut into the parts of the step, and its roofline on it."""
    labels = [
        f"{line['model']}: batch {line['batch']}, C {line['subcomponents']},<br>{line['importance']}, {_threads(line)}" for line in lines
    ]
    seconds = [line["cpu_s_per_step"] if line["device"] == "cpu" else 1 / line["steps_per_s"] for line in lines]
    figure = go.Figure()
    for part, colour in zip(lines[0]["shares"], (BLUE, ORANGE, GREEN, PURPLE)):
        shares = [line["shares"][part] for line in lines]
        figure.add_bar(y=labels, x=[share * s for share, s in zip(shares, seconds)], name=part, orientation="h", marker_color=colour,
                       text=[f"{share:.0%}" if share >= 0.04 else "" for share in shares], textposition="inside", insidetextanchor="start",
                       textangle=0, textfont_color="white", hovertemplate=f"{part}: %{{x:.3g}} s<extra></extra>")  # fmt: skip
    marks = [(PRODUCTS, LIMIT, "roofline_s")]
    if any("plain_s" in line for line in lines):
        marks.append((OWN, OWN_MARK, "plain_s"))
    for name, mark, key in marks:
        figure.add_scatter(y=labels, x=[line.get(key) for line in lines], name=name, mode="markers", marker=mark,
                           hovertemplate=f"{name}: %{{x:.3g}} s<extra></extra>")  # fmt: skip
    figure.update_xaxes(title=f"{_clock(lines[0])} of one training step", rangemode="tozero")
    figure.update_yaxes(autorange="reversed")
    best = ", ".join(f"{line['roofline_share']:.0%}" for line in lines)
    return _finish(figure, f"One training step by its parts (matrix products alone would take {best} of it)", 230 + 70 * len(lines),
                   barmode="stack", legend=dict(orientation="h", y=-0.45 if len(lines) < 3 else -0.25, traceorder="normal"))  # fmt: skip


def bench_forward_bars(lines: Sequence[Mapping[str, Any]]) -> go.Figure:
    """The lines of `spd-lens bench forward`: a row of bars for each, the four passes, with the roofline where it is known."""
    passes = {
        "plain": ("the model as it is", GREY, "plain_roofline_s"), "hooks": ("with hooks that do nothing", GREY, "plain_roofline_s"),
        "run": ("Decomposition.run", BLUE, "roofline_s"), "run_with_hooks": ("run_with_hooks(hooks(masks))", BLUE, "roofline_s"),
    }  # fmt: skip
    titles = [
        f"{line['model']}, C = {line['subcomponents']}, {_threads(line)}: run / plain = {line['ratio']:.2f} "
        f"({line['ratio_min']:.2f} … {line['ratio_max']:.2f})" for line in lines
    ]  # fmt: skip
    figure = make_subplots(len(lines), 1, shared_xaxes=True, subplot_titles=titles, vertical_spacing=0.16 / len(lines))
    labels = [label for label, _, _ in passes.values()]
    for row, line in enumerate(lines, start=1):
        figure.add_bar(y=labels, x=[line[f"{name}_s"] for name in passes], orientation="h", marker_color=[colour for _, colour, _ in passes.values()],
                       text=[f"{line[f'{name}_s']:.3g} s" for name in passes], textposition="auto", textangle=0, showlegend=False, row=row, col=1,
                       hovertemplate="%{y}: %{x:.3g} s<extra></extra>")  # fmt: skip
        figure.add_scatter(y=labels, x=[line[key] for _, _, key in passes.values()], mode="markers", marker=LIMIT,
                           name=PRODUCTS, showlegend=row == 1, row=row, col=1,
                           hovertemplate=f"{PRODUCTS}: %{{x:.3g}} s<extra></extra>")  # fmt: skip
    figure.update_yaxes(autorange="reversed")
    figure.update_xaxes(title=f"{_clock(lines[0])} of one forward pass", row=len(lines), col=1)
    figure.update_xaxes(rangemode="tozero")
    shape = f"{lines[0]['layers']} layers, width {lines[0]['width']}, batch {lines[0]['batch']} × {lines[0]['length']} tokens"
    return _finish(figure, f"The forward pass, {lines[0]['sites']} matrices replaced ({shape})", 170 + 190 * len(lines),
                   legend=dict(orientation="h", y=-0.3 / len(lines)))  # fmt: skip


def bench_growth_lines(axes: Sequence[Mapping[str, Any]]) -> go.Figure:
    """What `spd_lens.bench.grown` gives for one or more axes, as lines on log-log axes: time at the left, memory at the right."""
    alone = len(axes) == 1
    figure = make_subplots(1, 2, subplot_titles=("time", "memory"), horizontal_spacing=0.11)
    palette, symbols = (BLUE, ORANGE, GREEN, PURPLE, "#000000"), ("circle", "square", "diamond", "triangle-up", "x")
    first, most = axes[0]["points"][0], max(axis["to"] / axis["from"] for axis in axes)
    for column, key in ((1, "seconds"), (2, "memory_mb")):
        start = first[axes[0]["axis"]] if alone else 1
        values = [point[key] for axis in axes for point in axis["points"] if point[key] > 0]
        for power, name, dash in ((1, "grows as n", "dash"), (2, "grows as n²", "dot")):
            reached = min(most, (max(values, default=1) / (first[key] or 1)) ** (1 / power) * 1.2)  # no higher than what was measured
            figure.add_scatter(x=[start, start * reached], y=[first[key], first[key] * reached**power], name=name, mode="lines", hoverinfo="skip",
                               line=dict(color=GREY, dash=dash, width=1.5), showlegend=column == 1, row=1, col=column)  # fmt: skip
        for axis, colour, symbol in zip(axes, palette, symbols):
            name, unit = axis["axis"], 1 if alone else axis["from"]
            said = f"{name} {axis['from']} … {axis['to']}: time {_power(axis['exponent_time'])}, memory {_power(axis['exponent_memory'])}"
            figure.add_scatter(x=[point[name] / unit for point in axis["points"]], y=[point[key] for point in axis["points"]], name=said,
                               mode="lines+markers", line_color=colour, marker=dict(symbol=symbol, size=9), legendgroup=name,
                               customdata=[point[name] for point in axis["points"]], showlegend=column == 1, row=1, col=column,
                               hovertemplate=f"{name} %{{customdata}}: %{{y:.3g}}<extra></extra>")  # fmt: skip
        shown = [digit * 10.0**power for power in range(-6, 8) for digit in (1, 2, 5)]
        figure.update_yaxes(tickvals=shown, ticktext=[f"{value:,.6g}" for value in shown], col=column)
    ticks = sorted({point[axis["axis"]] / (1 if alone else axis["from"]) for axis in axes for point in axis["points"]})
    words = [f"{tick:g}" if alone else f"{tick:g}×" for tick in ticks]
    figure.update_xaxes(type="log", title=f"{axes[0]['axis']}" if alone else "size, in times the base", tickvals=ticks, ticktext=words)
    figure.update_yaxes(type="log")
    figure.update_yaxes(title=f"{_clock(axes[0]['base'])}", col=1)
    figure.update_yaxes(title="peak memory above idle, MB", col=2)
    return _finish(figure, "Growth, on log-log axes; exponents are slopes fitted to all points of a line", 520 + 22 * len(axes),
                   legend=dict(orientation="h", y=-0.2, traceorder="normal"))  # fmt: skip


def _power(exponent: float | None) -> str:
    return "n<sup>?</sup>" if exponent is None else f"n<sup>{exponent:.2f}</sup>"


def _clock(line: Mapping[str, Any]) -> str:
    return "CPU seconds" if line["device"] == "cpu" else "seconds"


def _threads(line: Mapping[str, Any]) -> str:
    return f"{line['threads']} thread{'s' if line['threads'] > 1 else ''}" if line["device"] == "cpu" else line["device"]


def answer_bars(answers: Mapping[str, Mapping[str, Mapping[str, float]]]) -> go.Figure:
    """Prompt → what was done to the model → answer → probability: a panel for each prompt, a group of bars for each thing done."""
    titles = [escape(prompt) for prompt in answers]
    figure = make_subplots(1, len(titles), subplot_titles=titles, shared_yaxes=True, horizontal_spacing=0.06)
    palette = dict(
        zip(sorted({answer for done in answers.values() for p in done.values() for answer in p}), (BLUE, ORANGE, GREEN, PURPLE, GREY))
    )
    shapes = dict(zip(palette, ("", "/", "x", ".", "\\")))
    for column, done in enumerate(answers.values(), start=1):
        for answer, colour in palette.items():
            values = [p.get(answer) for p in done.values()]
            figure.add_bar(x=list(done), y=values, name=f"P({escape(answer)})", marker=dict(color=colour, pattern_shape=shapes[answer]), showlegend=column == 1,
                           text=["" if value is None else f"{value:.2f}" for value in values], textposition="outside", cliponaxis=False, row=1, col=column,
                           hovertemplate=f"%{{x}}: P({escape(answer)}) = %{{y:.4f}}<extra></extra>")  # fmt: skip
    figure.update_yaxes(range=[0, 1.08])
    figure.update_yaxes(title="probability of the answer", col=1)
    return _finish(figure, "What the model answers", 400, barmode="group", legend=dict(orientation="h", y=-0.2))
