"""What changes when subcomponents are cut, and what a count is worth."""

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from spd_lens.guards import steady
from spd_lens.labels import token_labels
from spd_lens.metrics import LABELS
from spd_lens.viz.style import BLUE, GREEN, GREY, ORANGE, PURPLE, as_text, finish


def answer_bars(answers: Mapping[str, Mapping[str, Mapping[str, float]]]) -> go.Figure:
    """Prompt → what was done to the model → answer → probability: a panel for each prompt, a group of bars for each thing done."""
    titles = [as_text(prompt) for prompt in answers]
    figure = make_subplots(1, len(titles), subplot_titles=titles, shared_yaxes=True, horizontal_spacing=0.06)
    palette = dict(
        zip(sorted({answer for done in answers.values() for p in done.values() for answer in p}), (BLUE, ORANGE, GREEN, PURPLE, GREY))
    )
    shapes = dict(zip(palette, ("", "/", "x", ".", "\\")))
    for column, done in enumerate(answers.values(), start=1):
        for answer, colour in palette.items():
            values = [p.get(answer) for p in done.values()]
            figure.add_bar(x=list(done), y=values, name=f"P({as_text(answer)})", marker=dict(color=colour, pattern_shape=shapes[answer]), showlegend=column == 1,
                           text=["" if value is None else f"{value:.2f}" for value in values], textposition="outside", cliponaxis=False, row=1, col=column,
                           hovertemplate=f"%{{x}}: P({as_text(answer)}) = %{{y:.4f}}<extra></extra>")  # fmt: skip
    figure.update_yaxes(range=[0, 1.08])
    figure.update_yaxes(title="probability of the answer", col=1)
    return finish(figure, "What the model answers", 400, barmode="group", legend=dict(orientation="h", y=-0.2))


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
    return finish(figure, "How many are active, and what cutting all others costs", 190 + 34 * len(runs),
                   legend=dict(orientation="h", y=1.0, yanchor="bottom", x=0.4))  # fmt: skip


def ablation_bars(table: pd.DataFrame, unit: str, most: int = 25) -> go.Figure:
    """What a metric gains or loses when each subcomponent alone is ablated: a table of `spd_lens.ablation_effects` or `attribution`.

    Args:
        table: `site`, `subcomponent`, (`position`,) `effect`.
        unit: of the metric, e.g. `logit of golf`.
        most: the largest |effect| that are shown.
    """
    top = table.reindex(table["effect"].abs().sort_values(ascending=False, kind="stable").index).head(most)
    names = [
        f"{row['site']} · {row['subcomponent']}" + (f" at {row['position']}" if "position" in row else "") for row in top.to_dict("records")
    ]
    figure = go.Figure(go.Bar(y=names, x=top["effect"], orientation="h", marker_color=[BLUE if effect > 0 else ORANGE for effect in top["effect"]],
                              text=[f"{effect:+.3g}" for effect in top["effect"]], textposition="auto", cliponaxis=False, hovertemplate="%{y}: %{x:+.4f}<extra></extra>"))  # fmt: skip
    figure.update_yaxes(autorange="reversed", type="category")
    low, high = min(0.0, *top["effect"]), max(0.0, *top["effect"])
    room = 0.08 * (high - low) or 1.0  # for figures beside short bars
    figure.update_xaxes(title=f"change of the {as_text(unit)} when it is ablated", range=[low - room, high + room])
    return finish(figure, f"What each subcomponent is worth ({len(top)} of {len(table)})", 170 + 24 * len(top))


@steady()
def output_change(model: Any, tokens: Any, hooks: Sequence[Any], position: int = -1, most: int = 12) -> go.Figure:
    """The output's probabilities at one position before and after some hooks, of the tokens that gain or lose most.

    Args:
        model: a HookedTransformer or TransformerBridge.
        tokens: `[1, s]`.
        hooks: `(name, function)` pairs, e.g. `decomposition.ablate(…)`.
        position: where the output is looked at.
        most: how many tokens.
    """
    before, after = (
        model(tokens)[0, position].softmax(-1).cpu(),
        model.run_with_hooks(tokens, fwd_hooks=list(hooks))[0, position].softmax(-1).cpu(),
    )
    top = (after - before).abs().topk(min(most, len(before))).indices.tolist()
    top.sort(key=lambda token: -float(before[token]))
    labels, places = [as_text(label) for label in token_labels(model, top)], list(range(len(top)))
    figure = go.Figure()
    for name, p, colour, pattern in (("before", before, GREY, ""), ("after", after, BLUE, "/")):
        figure.add_bar(y=places, x=p[top].tolist(), orientation="h", name=name, marker=dict(color=colour, pattern_shape=pattern), customdata=labels,
                       text=[f"{value:.3f}" for value in p[top].tolist()], textposition="outside", cliponaxis=False,
                       hovertemplate=f"P(%{{customdata}}) {name}: %{{x:.4f}}<extra></extra>")  # fmt: skip
    figure.update_yaxes(tickmode="array", tickvals=places, ticktext=labels, autorange="reversed", title="next token")
    figure.update_xaxes(title="probability", range=[0, 1.12])
    return finish(
        figure,
        "The output before and after",
        170 + 42 * len(top),
        barmode="group",
        legend=dict(orientation="h", y=1.02, yanchor="bottom", x=0.5),
    )
