"""The lines of `spd-lens bench` as pictures."""

from collections.abc import Mapping, Sequence
from typing import Any

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from spd_lens.viz.style import BLUE, GREEN, GREY, ORANGE, PURPLE, finish

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
    return finish(figure, f"One training step by its parts (matrix products alone would take {best} of it)", 230 + 70 * len(lines),
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
    return finish(figure, f"The forward pass, {lines[0]['sites']} matrices replaced ({shape})", 170 + 190 * len(lines),
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
    return finish(figure, "Growth, on log-log axes; exponents are slopes fitted to all points of a line", 520 + 22 * len(axes),
                   legend=dict(orientation="h", y=-0.2, traceorder="normal"))  # fmt: skip


def _power(exponent: float | None) -> str:
    return "n<sup>?</sup>" if exponent is None else f"n<sup>{exponent:.2f}</sup>"


def _clock(line: Mapping[str, Any]) -> str:
    return "CPU seconds" if line["device"] == "cpu" else "seconds"


def _threads(line: Mapping[str, Any]) -> str:
    return f"{line['threads']} thread{'s' if line['threads'] > 1 else ''}" if line["device"] == "cpu" else line["device"]
