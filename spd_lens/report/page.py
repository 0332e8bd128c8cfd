"""Sections → one HTML page. Tokens and every other text from outside come out as text: escaped in tables, and as JSON that `page.js` turns into
text nodes."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from importlib.resources import files
from math import isfinite
from typing import Any

import pandas as pd
import plotly.graph_objects as go
import plotly.io
from plotly.offline import get_plotlyjs

from spd_lens.cards import Card, Context
from spd_lens.interventions import One
from spd_lens.masks import THRESHOLD
from spd_lens.viz.style import KINDS

REPORT_BYTES = 12_000_000  # of a page: plotly itself, our figures, the cards
DIGITS = 4  # of a figure on a card

Section = tuple[str, str, Any]  # heading; explanation; a plotly figure, a DataFrame, `Cards`, or None


@dataclass(frozen=True, eq=False)
class Cards:
    """An index of subcomponents with search and sort, and a card for each; one to a page.

    Attributes:
        cards: one each.
        costs: (site, index) → KL in nats when it alone is cut out of the original weights (`patching.cut_costs`).
    """

    cards: Sequence[Card]
    costs: Mapping[One, float]


def page(title: str, lead: str, sections: Sequence[Section]) -> str:
    """One self-contained page: no request leaves it.

    Args:
        title, lead: plain text.
        sections: (heading, explanation, content); a heading that begins with "Warning" is shown as one. Texts are escaped here.
    """
    parts, script = [], ""
    for number, (heading, explanation, content) in enumerate(sections):
        shown = ""
        match content:
            case go.Figure():
                shown = plotly.io.to_html(content, include_plotlyjs=False, full_html=False, div_id=f"figure-{number}",
                                          config={"displaylogo": False, "responsive": True})  # fmt: skip
            case pd.DataFrame():
                shown = f'<div class="scroll">{content.reset_index().to_html(border=0, escape=True, index=False)}</div>'
            case Cards():
                shown = f'<div id="subcomponents"></div><script type="application/json" id="cards">{_json(content)}</script>'
                script = f"<script>{_file('page.js')}</script>"
        kind = "warn" if heading.startswith("Warning") else "note"
        parts.append(f'<section><h2>{escape(heading)}</h2><p class="{kind}">{escape(explanation)}</p>{shown}</section>')
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{_file('page.css')}</style><script>{get_plotlyjs()}</script></head>"
        f"<body><h1>{escape(title)}</h1><p>{escape(lead)}</p><main>{''.join(parts)}</main>{script}</body></html>"
    )


def _file(name: str) -> str:
    return (files("spd_lens.report") / name).read_text(encoding="utf-8")


def _json(shown: Cards) -> str:
    kinds, names = list(KINDS), {card.key: card.short for card in shown.cards}
    data = {
        "threshold": THRESHOLD,
        "cards": [
            {**_card(card, kinds.index(card.site.rsplit(".", 1)[1]), names), "cost": _rounded(shown.costs[card.key])}
            for card in shown.cards
        ],
    }
    return json.dumps(data, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")  # a token may hold </script>


def _card(card: Card, order: int, names: Mapping[One, str]) -> dict[str, Any]:
    def partners(found: Sequence[tuple[str, int, float]]) -> list[tuple[str, float | None]]:
        return [(names.get((site, c), f"{site} · {c}"), _rounded(cosine)) for site, c, cosine in found]

    return {
        "name": card.short, "site": card.site, "layer": int(card.site.split(".")[1]), "order": order, "index": card.index,
        "share": _rounded(card.share_active), "mean": _rounded(card.mean_importance), "histogram": card.histogram,
        "reads": [(label, _rounded(value)) for label, value in card.reads], "reads_in": card.reads_in,
        "writes": [(label, _rounded(value)) for label, value in card.writes], "writes_in": card.writes_in,
        "earlier": partners(card.earlier), "later": partners(card.later), "matched": partners(card.matched),
        "contexts": [_context(context) for context in card.contexts],
    }  # fmt: skip


def _context(context: Context) -> dict[str, Any]:
    return {
        "sequence": context.sequence, "position": context.position, "at": context.at, "labels": context.labels,
        "inner": list(map(_rounded, context.inner)), "g": list(map(_rounded, context.importances)),
    }  # fmt: skip


def _rounded(value: float) -> float | None:
    return float(f"{value:.{DIGITS}g}") if isfinite(value) else None
