"""The measured rows: CSV files in `results/`, Markdown tables."""

from __future__ import annotations

import csv
from pathlib import Path

RESULTS = Path(__file__).parent / "results"


def read(name: str) -> list[dict[str, str]]:
    """The rows of a CSV file; none where it does not exist."""
    path = RESULTS / f"{name}.csv"
    if not path.exists():
        return []
    with path.open() as file:
        return list(csv.DictReader(file))


def where(row: dict[str, str]) -> str:
    return f"{row['machine']}, torch {row['torch']}, {row['date']}"


def picture(name: str, device: str) -> str:
    """Its file, without the ending."""
    return name if device == "cpu" else f"{name}_{device}"


def write(name: str, rows: list[dict[str, str]]) -> Path:
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.csv"
    columns = list(dict.fromkeys(column for row in rows for column in row))
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=columns, restval="")
        writer.writeheader()
        writer.writerows(rows)
    return path


def markdown(rows: list[dict[str, str]], columns: list[str]) -> str:
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    lines += ["| " + " | ".join(row.get(c, "") for c in columns) + " |" for row in rows]
    return "\n".join(lines)
