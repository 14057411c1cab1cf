"""The table of docs/performance.md, from the records of the benchmarks.

python benchmarks/table.py RESULTS [--write docs/performance.md]
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from bench import Row, spread, verdict
from growth import table

BEGIN, END = "<!-- made by benchmarks/table.py: begin -->", "<!-- end -->"
ORDER = [
    "moments",
    "spectrum",
    "truncated",
    "training_step",
    "sampling",
    "evaluation",
    "start",
    "nothing_to_do",
    "jobs",
]
HEAD = ["what", "peer or limit", "work", "ours", "peer", "ratio", "asked", ""]


def main() -> None:
    """Print the table, or put it between the marks of a page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, help="folder of the records")
    parser.add_argument("--write", type=Path, help="page with the marks")
    options = parser.parse_args()
    records = [json.loads((options.results / f"{name}.json").read_text()) for name in ORDER]
    grown = json.loads((options.results / "growth.json").read_text())
    limits = json.loads((options.results / "limits.json").read_text())
    parts = [_machine(records[0]["machine"], limits["rows"]), *lines(records)]
    text = "\n".join([parts[0], "", *parts[1:], "", "How cost grows with one thing at a time:", "", *growth(grown)])
    if not options.write:
        print(text)
        return
    page = options.write.read_text()
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    options.write.write_text(f"{before}{BEGIN}\n\n{text}\n\n{END}{after}")


def _machine(about: dict[str, Any], limits: list[dict[str, Any]]) -> str:
    memory = about["memory"] / 2**30
    done = "; ".join(f"{row['what']} {row['ratio']:.0f}" for row in limits)
    return (
        f"Measured on {about['cores']} cores of {about['processor']}, {memory:.0f} GiB, {about['system']}, Python "
        f"{about['python']}, torch {about['torch']}, {about['threads']} threads; median [least, greatest]. Its limits, "
        f"in billions a second: {done}."
    )


def growth(record: dict[str, Any]) -> list[str]:
    """Rows of Markdown of ``growth.json``."""
    head, *rows = table(record["points"])
    return ["| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows)]


def lines(records: list[dict[str, Any]]) -> list[str]:
    """Rows of Markdown."""
    rows = [HEAD, ["---"] * len(HEAD)]
    for record in records:
        assert record["size"] == "full", f"{record['benchmark']}: run it with --size full"
        for row in (Row(**one) for one in record["rows"]):
            timed = [spread(values, row.unit) if values else "" for values in (row.ours, row.theirs)]
            cells = [row.what, row.peer, row.work, *timed, f"{row.ratio:.2f}", row.required]
            rows.append([*cells, verdict(row, "**falls short**")])
    return ["| " + " | ".join(cells) + " |" for cells in rows]


if __name__ == "__main__":
    main()
