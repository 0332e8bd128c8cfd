"""DataFrames in the terminal."""

import pandas as pd
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table


def print_table(console: Console, frame: pd.DataFrame, title: str) -> None:
    """No cell is cut: a line that is too long is broken by the terminal."""
    table = Table(title=title, title_justify="left", title_style="bold")
    table.add_column(str(frame.index.name or ""), no_wrap=True)
    for column in frame.columns:
        table.add_column(str(column), justify="right", no_wrap=True)
    for row, values in frame.iterrows():
        table.add_row(str(row), *map(str, values))
    needed = Measurement.get(console, console.options.update(width=1000), table).maximum
    console.width = max(console.width, needed)
    console.print(table)
