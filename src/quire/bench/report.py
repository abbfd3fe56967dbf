"""Benchmark results as a table for people and as JSON for programs. Compare within one report, never across two."""

from __future__ import annotations

import argparse
import json
import platform
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from quire.version import __version__

Row = Mapping[str, Any]


def add_report_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--json", metavar="FILE", help="also write the results as JSON; - prints JSON instead of tables"
    )


def machine() -> dict[str, Any]:
    """Where it was measured. What is told of torch is of a torch that took part: it isn't loaded for this."""
    facts: dict[str, Any] = {
        "quire": __version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
    }
    if (torch := sys.modules.get("torch")) is not None:
        facts["torch"] = torch.__version__
        facts["threads"] = torch.get_num_threads()
        facts["device"] = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    return facts


def report(args: argparse.Namespace, title: str, rows: Sequence[Row], *, data: Row | None = None, **facts: Any) -> None:
    """Prints rows that share their keys as one table, with `facts` below it, and writes both as JSON where asked for.

    `data` is for programs alone: it goes into the JSON and onto no screen.
    """
    if args.json != "-":
        table = Table(title=title)
        for name in rows[0]:
            table.add_column(name, justify="left" if isinstance(rows[0][name], str) else "right")
        for row in rows:
            table.add_row(*(_shown(value) for value in row.values()))
        console = Console(file=sys.stdout)
        console.print(table)
        for name, value in facts.items():
            console.print(f"{name}: {_shown(value)}", highlight=False)
    if args.json:
        found = {"title": title, "rows": list(rows), **facts, "machine": machine(), **(data or {})}
        document = json.dumps(found, indent=1)
        if args.json == "-":
            print(document)
        else:
            with open(args.json, "w", encoding="utf-8") as file:
                file.write(document + "\n")


def _shown(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, Mapping):
        return ", ".join(f"{name}: {_shown(item)}" for name, item in value.items())
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}" if abs(value) < 100 else f"{value:.1f}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
