"""Tables for people who read them on a terminal or in a log."""

from __future__ import annotations


def print_table(columns: list[str], rows: list[list[str]]) -> None:
    """Print rows of cells under the names of their columns."""
    from rich import box
    from rich import print as show
    from rich.table import Table

    table = Table(*columns, box=box.SIMPLE_HEAD, pad_edge=False)
    for row in rows:
        table.add_row(*row)
    show(table)
