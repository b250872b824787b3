"""``apex-fast report``: writes the page of a run."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from apex_fast.command import NAME
from apex_fast.reporting.page import GRIDS, render
from apex_fast.reporting.run_files import read_run


def main(arguments: Sequence[str]) -> int:
    """``apex-fast report RUN``: writes the page and names it; 0.

    Raises:
        FileNotFoundError: no such run.
    """
    options = _parser().parse_args(arguments)
    print(write_report(options.run, options.out, grids=options.pictures))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=f"{NAME} report",
        description="Writes one self-contained HTML page of a run: where it stands, alarms, curves, pictures over "
        "time, scores, config and environment. The run may still go on, or have been killed.",
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="output_dir of a run")
    parser.add_argument("--out", type=Path, help="file to write (default RUN/report.html)")
    parser.add_argument(
        "--pictures", type=int, default=GRIDS, metavar="N", help=f"validations shown at most (default {GRIDS})"
    )
    return parser


def write_report(run: str | Path, out: str | Path | None = None, *, grids: int = GRIDS) -> Path:
    """Writes the page of ``run`` to ``out``, by default ``RUN/report.html``; returns the path.

    Raises:
        FileNotFoundError: no such run.
    """
    found = read_run(run)
    path = Path(run) / "report.html" if out is None else Path(out)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.new")
    temporary.write_text(render(found, grids=grids), encoding="utf-8")
    temporary.replace(path)
    return path
