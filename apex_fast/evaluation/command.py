"""``apex-fast eval``: scores of a run at several numbers of steps, over several seeds, as a table, a plot and a block
for a model card.

Two kinds of models are scored. One that makes the pictures of a benchmark itself (digits, shapes, scenes) is scored on
that benchmark (:mod:`apex_fast.evaluation.benchmark`). Any other draws the prompts of a file, and its pictures are
scored by networks in local files (:mod:`apex_fast.evaluation.pictures`); a folder of pictures that are there already is
scored the same way. Both fill rows of one table (:mod:`apex_fast.evaluation.table`): a row for each number of steps and
each guidance scale, with the mean over the seeds and its interval, printed as soon as it is done.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from apex_fast.command import NAME
from apex_fast.evaluation.benchmark import picture_shape
from apex_fast.evaluation.options import DEFAULTS, check, hyphens, parser
from apex_fast.evaluation.pictures import read_folder
from apex_fast.evaluation.scorers import ByPictures, OnBenchmark, Scorer, Way, benchmark_of
from apex_fast.evaluation.table import (
    COSTS,
    Comparison,
    Printer,
    Row,
    category_table,
    compare,
    comparison_table,
    markdown,
    plot,
)
from apex_fast.generate import Generator, exported_base, open_generator
from apex_fast.shipped import is_shipped, local_folder
from apex_fast.training import environment
from apex_fast.training.memory import release
from apex_fast.training.models import device_of, is_hub_id

RUN, TEACHER = "run", "teacher"
"""How the rows call the model and the one of ``--against``."""
REAL = "real data (the floor)"


def main(arguments: Sequence[str], *, offline: Callable[..., None]) -> int:
    """``apex-fast eval``: prints the table and writes it; 0, or 2 for options or a model that cannot be scored so.

    Args:
        offline: called with the models before they are loaded; keeps libraries from asking a hub where none of them
            needs it.

    Raises:
        SettingsError, FileNotFoundError, CheckpointError, ImportError: as what loads and scores; the command line tells
            them in one line.
    """
    options = parser().parse_args([hyphens(word) for word in arguments])
    try:
        check(options)
        for name, value in DEFAULTS.items():
            if getattr(options, name) is None:
                setattr(options, name, value)
        named = [(options.model, options.base), (options.against, None)]
        offline(*(base or exported_base(model) or model for model, base in named if model is not None))
        out = options.out or _place(options.model) / "eval.json"
        partial = out.with_suffix(".partial.json")
        report = run(options, shlex.join([NAME, "eval", *arguments]), partial)
    except ValueError as error:
        print(f"{NAME} eval: {error}", file=sys.stderr)
        return 2
    for path in report.write(out):
        print(path)
    partial.unlink(missing_ok=True)
    return 0


def _place(model: str | None) -> Path:
    return (None if model is None else local_folder(model)) or Path(".")


@dataclass
class Report:
    """What was measured, and the writing of it."""

    command: str
    model: str
    against: str | None
    scorer: Scorer
    seeds: list[int]
    rows: list[Row]
    comparisons: list[Comparison]
    environment: dict[str, Any]

    def as_json(self) -> dict[str, Any]:
        """``scores`` and ``floor`` hold means alone (``scores``: of the run under the first guidance, by steps), and
        ``rows`` everything."""
        own = [row for row in self.rows if row.model == RUN]
        plain = [row for row in own if row.guidance == own[0].guidance]
        return {
            "model": self.model,
            "against": self.against,
            "command": self.command,
            **self.scorer.facts,
            "seeds": self.seeds,
            "environment": self.environment,
            "scores": {str(row.steps): row.means() for row in plain if row.steps is not None},
            "floor": next((row.means() for row in self.rows if row.model == REAL), None),
            "rows": [row.as_json() for row in self.rows],
            "comparisons": [comparison.as_json() for comparison in self.comparisons],
        }

    def write(self, path: Path) -> list[Path]:
        """Writes the JSON, the block for a model card and the plot; returns their paths, the JSON last."""
        path.parent.mkdir(parents=True, exist_ok=True)
        picture = None
        if any(row.steps is not None for row in self.rows):
            real = next((row for row in self.rows if row.model == REAL), None)
            picture = plot(path.with_suffix(".png"), self.rows, self.scorer.plotted, real)
        card = path.with_suffix(".md")
        card.write_text(self._markdown(picture), encoding="utf-8")
        path.write_text(json.dumps(self.as_json(), indent=2) + "\n", encoding="utf-8")
        return [*([picture] if picture is not None else []), card, path]

    def _markdown(self, picture: Path | None) -> str:
        versions = ", ".join(f"{name} {version}" for name, version in self.environment["versions"].items())
        seeds = f"seed {self.seeds[0]}"
        if len(self.seeds) > 1:
            seeds = (
                f"seeds {self.seeds[0]} to {self.seeds[-1]} (mean ± half of the 95 % interval over seeds, Student's t)"
            )
        compared = "" if self.against is None else f" Teacher: {self.against}."
        lead = (
            f"`{self.command}`: {self.model}; {seeds}.{compared} On {self.environment['device_name']}, "
            f"{self.environment['threads']} threads, with {versions}."
        )
        return markdown(
            f"Evaluation: {self.scorer.title}",
            lead,
            self.rows,
            self.scorer.columns,
            self.scorer.categories,
            self.comparisons,
            self.scorer.notes,
            None if picture is None else picture.name,
        )


def run(options: argparse.Namespace, command: str = "", partial: Path | None = None) -> Report:
    """Scores what ``options`` ask for and prints the tables.

    Args:
        partial: file that gets every row as soon as it is there, so that an evaluation that is stopped has not been for
            nothing.

    Raises:
        ValueError: the model or the options do not fit the benchmark.
        SettingsError: nothing says which benchmark it is.
        FileNotFoundError, CheckpointError, ImportError: as what loads and scores.
    """
    device = device_of(options.device)
    seeds = [options.seed + k for k in range(options.seeds)]
    surroundings = environment.collect(device)
    if options.pictures is not None:
        return _score_folder(options, command, surroundings, device)
    model = open_generator(options.model, lora=options.lora, base=options.base)
    scorer: Scorer
    if options.prompts is not None:
        folder = (options.out.parent if options.out else _place(options.model)) / "eval_pictures"
        scorer = ByPictures(options, folder, device)
    else:
        scorer = OnBenchmark(benchmark_of(options, model), options)
        model.network.to(device)
    ways = [Way(steps, guidance) for guidance in options.guidance_scale for steps in options.nfe]
    if options.against is not None:
        _look_at_teacher(options, scorer)
    names = [RUN, TEACHER] if options.against is not None else [RUN]
    labels = [Row(name, way.steps, way.guidance).label for name in names for way in ways]
    phrase = model.phrase
    print(f"{phrase} on {scorer.title}; {_seeds(seeds)}; {device}", flush=True)
    printer = Printer(scorer.columns, [*labels, REAL], len(seeds))
    printer.header()
    finished: list[Row] = []

    def keep(row: Row) -> None:
        finished.append(row)
        if partial is not None:
            partial.parent.mkdir(parents=True, exist_ok=True)
            kept = {"command": command, "seeds": seeds, "rows": [one.as_json() for one in finished]}
            partial.write_text(json.dumps(kept, indent=2) + "\n", encoding="utf-8")

    rows = _rows(scorer, model, RUN, ways, seeds, printer, keep)
    against = None
    if options.against is not None:
        del model
        release()
        teacher = open_generator(options.against)
        against = teacher.phrase
        if options.prompts is None:
            teacher.network.to(device)
        rows += _rows(scorer, teacher, TEACHER, ways, seeds, printer, keep)
    real = [scores for seed in seeds if (scores := scorer.real(seed)) is not None]
    if real:
        rows.append(Row(REAL, None, None, real))
        printer.row(rows[-1])
    comparisons = _comparisons(rows)
    _print_table(*category_table(rows, scorer.categories))
    if comparisons:
        print(f"\nteacher: {against}")
        _print_table(*comparison_table(comparisons))
    return Report(command, phrase, against, scorer, seeds, rows, comparisons, surroundings)


def _look_at_teacher(options: argparse.Namespace, scorer: Scorer) -> None:
    """A teacher that is not there or makes other pictures is told before the run is scored for minutes.

    Raises:
        FileNotFoundError, SettingsError: as :func:`open_generator`, and for a path that is not there.
        ValueError: its pictures are not the benchmark's.
    """
    if not isinstance(scorer, OnBenchmark):
        here = is_shipped(options.against) or Path(options.against).exists()
        if not here and not is_hub_id(options.against):
            raise FileNotFoundError(f"--against {options.against}: there is no such folder; write a run or a model")
        return
    teacher = open_generator(options.against)
    found, wanted = picture_shape(teacher.network), tuple(scorer.benchmark.sample_shape)
    if found != wanted:
        raise ValueError(
            f"--against {options.against}: it makes pictures of the shape {list(found)}, and those of "
            f"{scorer.benchmark.name} have {list(wanted)}"
        )


def _seeds(seeds: list[int]) -> str:
    return f"seed {seeds[0]}" if len(seeds) == 1 else f"seeds {seeds[0]} to {seeds[-1]}"


def _rows(
    scorer: Scorer,
    model: Generator,
    name: str,
    ways: Sequence[Way],
    seeds: Sequence[int],
    printer: Printer,
    keep: Callable[[Row], None],
) -> list[Row]:
    rows = []
    for way in ways:
        by_seed: list[dict[str, Any]] = []
        cost: dict[str, float] = {}
        for seed in seeds:
            # Times do not depend on the seed.
            scores = scorer.score(model, name, way, seed, cost=seed == seeds[0])
            costs = {column.key: scores.pop(column.key) for column in COSTS if column.key in scores}
            cost = cost or costs
            by_seed.append(scores)
        rows.append(Row(name, way.steps, way.guidance, by_seed, cost))
        keep(rows[-1])
        printer.row(rows[-1])
    return rows


def _comparisons(rows: Sequence[Row]) -> list[Comparison]:
    """Every row of the run against the teacher's of its largest number of steps, under each guidance."""
    teacher = [row for row in rows if row.model == TEACHER]
    most = max((row.steps or 0 for row in teacher), default=0)
    best = [row for row in teacher if row.steps == most]
    return [compare(row, other) for other in best for row in rows if row.model == RUN]


def _print_table(header: list[str], lines: list[list[str]]) -> None:
    from apex_fast.evaluation.report import text_table

    if lines:
        print("\n" + text_table(header, lines), flush=True)


def _score_folder(
    options: argparse.Namespace, command: str, surroundings: dict[str, Any], device: torch.device
) -> Report:
    scorer = ByPictures(options, Path("."), device)
    pictures = read_folder(options.pictures, scorer.prompts, images_per_file=options.n)
    print(f"{len(pictures)} pictures in {options.pictures}; {device}", flush=True)
    printer = Printer(scorer.columns, [RUN], 1)
    printer.header()
    row = Row("pictures", None, None, [scorer.measure(pictures)])
    printer.row(row)
    return Report(command, f"the pictures in {options.pictures}", None, scorer, [0], [row], [], surroundings)
