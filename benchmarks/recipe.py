"""The search for the recipe: ``python benchmarks/recipe.py run``, ``table`` and ``plot``; see :mod:`benchmarks.search`.

run     trains and scores what the trials files (benchmarks/trials/*.yaml) ask for and the results have no row of. The
        same command goes on after a kill, a stop or a change of the files.
table   writes the rows as tables into docs/recipe.md, between <!-- table: SUITE --> and <!-- end -->; --check says
        whether they are what the rows say
plot    draws quality against training steps and seconds, and against the batch, into docs/images

    python benchmarks/recipe.py run --trials benchmarks/trials/digits_sana.yaml --only 'unshifted*' --max-minutes 50
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from apex_fast.training.settings import SettingsError
from benchmarks.search import pictures, runner, tables
from benchmarks.search.rows import Results
from benchmarks.search.trials import ROOT, TRIALS, Suite, load_suites

DOCS = ROOT / "docs"
REMEDY = "; write it with: python benchmarks/recipe.py table"


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--trials", type=Path, nargs="+", metavar="FILE", help="default: all of benchmarks/trials")
    shared.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    shared.add_argument("--results", type=Path, default=runner.RESULTS, metavar="FOLDER")
    queue = commands.add_parser("run", parents=[shared], help="run what is left")
    queue.add_argument("--only", metavar="GLOB", help="only trials (or TRIAL-seed-N, SUITE/TRIAL) of this name")
    queue.add_argument("--jobs", type=int, default=1, help="processes at a time (1)")
    queue.add_argument("--threads", type=int, help="of each; default: OMP_NUM_THREADS, or the cores shared out")
    queue.add_argument("--max-minutes", type=float, metavar="M", help="then save and stop")
    queue.add_argument("--dry-run", action="store_true", help="only say what is left, and how long it may take")
    queue.add_argument("--retry", action="store_true", help="run trials again that failed")
    queue.add_argument("--runs", type=Path, default=runner.RUNS, metavar="FOLDER", help=f"default: {runner.RUNS}")
    document = commands.add_parser("table", parents=[shared], help="write the tables into a document")
    document.add_argument("--docs", type=Path, default=DOCS / "recipe.md", metavar="FILE")
    document.add_argument("--check", action="store_true", help="only say whether the document is up to date")
    images = commands.add_parser("plot", parents=[shared], help="draw the plots")
    images.add_argument("--images", type=Path, default=DOCS / "images", metavar="FOLDER")
    options = parser.parse_args(arguments)
    if options.trials is None:
        options.trials = sorted(TRIALS.glob("*.yaml"))
    if options.command == "run" and (options.jobs < 1 or (options.threads is not None and options.threads < 1)):
        parser.error("--jobs and --threads are at least 1")
    return options


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    device = runner.device_of(options.device)
    try:
        suites = load_suites(options.trials)
        return _COMMANDS[options.command](options, suites, device)
    except (SettingsError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2


def run(options: argparse.Namespace, suites: list[Suite], device: str) -> int:
    work = runner.Queue(
        suites,
        device=device,
        only=options.only,
        runs=options.runs,
        results=options.results,
        retry=options.retry,
        say=lambda message: print(message, flush=True),
    )
    if not work.jobs:
        raise SettingsError(f"--only {options.only}: there is no such trial")
    if options.dry_run:
        print("\n".join(work.describe(options.jobs)))
        return 0
    return work.run(jobs=options.jobs, threads=options.threads, max_minutes=options.max_minutes)


def with_rows(options: argparse.Namespace, suites: list[Suite], device: str) -> list[tuple[Suite, Results]]:
    """The suites that have results."""
    files = [(suite, runner.results_path(suite.name, device, options.results)) for suite in suites]
    found = [(suite, Results(path)) for suite, path in files if path.is_file()]
    if not found:
        raise SettingsError(f"no results in {options.results / device / 'recipe'}: `run` makes them")
    return found


def table(options: argparse.Namespace, suites: list[Suite], device: str) -> int:
    made = {suite.name: tables.tables(suite, results) for suite, results in with_rows(options, suites, device)}
    same = tables.update(options.docs, made, check=options.check)
    if options.check:
        print(f"{options.docs} {'is' if same else 'is NOT'} what the results say" + REMEDY * (not same))
        return 0 if same else 1
    print(f"{options.docs}: {'nothing has changed' if same else 'written'}")
    return 0


def plot(options: argparse.Namespace, suites: list[Suite], device: str) -> int:
    for suite, results in with_rows(options, suites, device):
        for path in pictures.draw(suite, results, options.images):
            print(path)
    return 0


_COMMANDS = {"run": run, "table": table, "plot": plot}


if __name__ == "__main__":
    raise SystemExit(main())
