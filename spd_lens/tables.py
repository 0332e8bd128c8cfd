"""Results as tables: in a notebook (`_repr_html_`), in a terminal (`repr`), and in rich's console (`__rich__`)."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING

import pandas as pd

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table


@dataclass(frozen=True, eq=False)
class Shown:
    """A table with what has to be said above and below it.

    Attributes:
        title: what it is of.
        frame: with a named index; figures as they are to be read.
        note: what a reader has to know; empty where there is nothing.
    """

    title: str
    frame: pd.DataFrame
    note: str = ""


class Tabular(ABC):
    """What shows itself as a table, wherever it is looked at."""

    @abstractmethod
    def _shown(self) -> Shown: ...

    def _repr_html_(self) -> str:
        shown = self._shown()
        note = f"<div>{escape(shown.note)}</div>" if shown.note else ""
        return f"<div><b>{escape(shown.title)}</b></div>{shown.frame.reset_index().to_html(border=0, index=False)}{note}"

    def __repr__(self) -> str:
        shown = self._shown()
        return "\n".join(part for part in (shown.title, shown.frame.to_string(), shown.note) if part)

    def __rich__(self) -> "Table":
        shown = self._shown()
        table = rich_table(shown.frame, shown.title)
        table.caption, table.caption_justify = shown.note or None, "left"
        return table


def rich_table(frame: pd.DataFrame, title: str) -> "Table":
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(title), title_justify="left", title_style="bold")
    table.add_column(Text(str(frame.index.name or "")), no_wrap=True)
    for column in frame.columns:
        table.add_column(Text(str(column)), justify="right", no_wrap=True)
    for row, values in frame.iterrows():
        table.add_row(*(Text(str(cell)) for cell in (row, *values)))  # tokens and names are no markup
    return table


def print_table(console: "Console", frame: pd.DataFrame, title: str) -> None:
    """No cell is cut: a line that is too long is broken by the terminal."""
    from rich.measure import Measurement

    table = rich_table(frame, title)
    console.width = max(console.width, Measurement.get(console, console.options.update(width=1000), table).maximum)
    console.print(table)
