"""The table of docs/performance.md, from the records of the benchmarks.

python benchmarks/table.py benchmarks/results [--write docs/performance.md]

All records are kept beside the benchmarks, so a new one of some leaves the rows of the others as they are.
"""

from __future__ import annotations

import argparse
import json
import sys
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
    "main_job",
    "jobs",
]
HEAD = ["what", "peer or limit", "work", "ours", "peer", "ratio", "asked", ""]


def main() -> None:
    """Print the table, or put it between the marks of a page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, help="folder of the records")
    parser.add_argument("--write", type=Path, help="page with the marks")
    options = parser.parse_args()
    missing = [name for name in [*ORDER, "growth", "limits"] if not (options.results / f"{name}.json").exists()]
    if missing:
        sys.exit(f"table: {options.results} has no record of {', '.join(missing)}: run them with --output there")
    records = [json.loads((options.results / f"{name}.json").read_text()) for name in ORDER]
    grown = json.loads((options.results / "growth.json").read_text())
    limits = json.loads((options.results / "limits.json").read_text())
    if len({_where(record["machine"]) for record in [*records, grown, limits]}) > 1:
        sys.exit(f"table: {options.results}: the records are of several machines or versions of torch: run all on one")
    parts = [_machine(records[0]["machine"], limits["rows"]), *lines(records)]
    text = "\n".join([parts[0], "", *parts[1:], "", "How cost grows with one thing at a time:", "", *growth(grown)])
    if not options.write:
        print(text)
        return
    page = options.write.read_text()
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    options.write.write_text(f"{before}{BEGIN}\n\n{text}\n\n{END}{after}")


def _where(about: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(about[name] for name in ("processor", "cores", "system", "python", "torch"))


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
