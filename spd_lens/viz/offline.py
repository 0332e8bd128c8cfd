"""Views that are pages, not figures: CircuitsVis without a network, and plain HTML.

CircuitsVis draws with JavaScript of its own, which its Python package holds (and would rather load from a CDN). It is put on a page once, before
its first view; further views find it there.
"""

import json
from collections.abc import Mapping
from functools import cache
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any
from uuid import uuid4

from spd_lens.storage import write_text
from spd_lens.viz.style import FONT

GROUND = f"background: white; color: #1f2328; font-family: {FONT}; padding: 8px 12px; border-radius: 4px"
MISSING = "CircuitsVis is not on this page any more; run spd_lens.viz.embed() in a cell of its own and show this view again."


@cache
def circuitsvis_script() -> str:
    """CircuitsVis itself, for the head of a page."""
    source = (files("circuitsvis") / "dist" / "cdn" / "iife.js").read_text(encoding="utf-8").replace("</script>", "<\\/script>")
    return f"<script>{source}\nwindow.CircuitsVis = CircuitsVis;</script>"


class Html:
    """Something to look at in a notebook, or to write to a file."""

    def __init__(self, body: str, title: str = ""):
        self.body, self.title = body, title

    def html(self) -> str:
        """For the inside of a page that has what it needs in its head."""
        heading = f'<div style="font-size: 16px; margin-bottom: 6px">{escape(self.title)}</div>' if self.title else ""
        return f'<div style="{GROUND}">{heading}{self.body}</div>'

    def _repr_html_(self) -> str:
        return self.html()

    def save(self, path: str | Path) -> None:
        """A page that opens without a network."""
        write_text(
            Path(path),
            f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escape(self.title)}</title>{self.head()}</head><body>{self.html()}</body></html>',
        )

    def head(self) -> str:
        """What a page needs in its head for it, once."""
        return ""

    def __repr__(self) -> str:
        return f"{type(self).__name__}: {self.title or 'untitled'} (show it in a notebook, or .save('page.html'))"


class CircuitsVisView(Html):
    """One of CircuitsVis' components with its properties."""

    embedded = False  # whether a view of this process has brought the script along

    def __init__(self, title: str, component: str, properties: Mapping[str, Any]):
        place = f"circuitsvis-{uuid4().hex[:12]}"
        given = json.dumps(properties).replace("<", "\\u003c")  # a token may hold </script>
        super().__init__(
            f'<div id="{place}" style="min-height: 40px"></div><script>(function draw(tries) {{'
            f'const place = document.getElementById("{place}"); if (!place) return;'
            f'if (window.CircuitsVis) window.CircuitsVis.render("{place}", window.CircuitsVis.{component}, {given});'
            f"else if (tries) setTimeout(draw, 100, tries - 1); else place.textContent = {json.dumps(MISSING)};"
            f"}})(50);</script>",
            title,
        )

    def head(self) -> str:
        return circuitsvis_script()

    def _repr_html_(self) -> str:
        first, CircuitsVisView.embedded = not CircuitsVisView.embedded, True
        return (self.head() if first else "") + self.html()


def embed() -> Html:
    """Put CircuitsVis on this notebook's page again, e.g. after the output of its first view was cleared."""
    CircuitsVisView.embedded = True
    return Html(circuitsvis_script() + "CircuitsVis is on this page.")
