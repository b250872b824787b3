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
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from apex_fast.command import NAME
from apex_fast.data.shipped import SHIPPED
from apex_fast.evaluation.benchmark import Benchmark, evaluate, floor, open_benchmark, picture_shape
from apex_fast.evaluation.layouts import read_prompts
from apex_fast.evaluation.metrics import NEIGHBOURS, frechet_distance, precision_recall
from apex_fast.evaluation.pictures import (
    ClipScore,
    Features,
    Picture,
    clip_score,
    features_of,
    inception_features,
    read_folder,
    vision_features,
)
from apex_fast.evaluation.table import (
    COSTS,
    Column,
    Comparison,
    Printer,
    Row,
    category_table,
    compare,
    comparison_table,
    markdown,
    plot,
)
from apex_fast.generate import Generator, exported_base, generate_files, open_generator
from apex_fast.shipped import is_shipped
from apex_fast.training import environment
from apex_fast.training.memory import release
from apex_fast.training.models import device_of, is_hub_id
from apex_fast.training.settings import SettingsError, read_yaml
from apex_fast.training.timing import peak_bytes

RUN, TEACHER = "run", "teacher"
"""How the rows call the model and the one of ``--against``."""
REAL = "real data (the floor)"
DEFAULTS = {"nfe": [1, 4, 50], "guidance_scale": [1.0], "seeds": 1, "samples": 600}
"""Of options that not every way of scoring takes."""


def main(arguments: Sequence[str], *, offline: Callable[..., None]) -> int:
    """``apex-fast eval``: prints the table and writes it; 0, or 2 for options or a model that cannot be scored so.

    Args:
        offline: called with the models before they are loaded; keeps libraries from asking a hub where none of them
            needs it.

    Raises:
        SettingsError, FileNotFoundError, CheckpointError, ImportError: as what loads and scores; the command line tells
            them in one line.
    """
    options = _parser().parse_args([_hyphens(word) for word in arguments])
    try:
        _check(options)
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


def _hyphens(word: str) -> str:
    """``--guidance_scale`` as ``--guidance-scale``: both spellings are accepted everywhere."""
    name, equals, value = word.partition("=")
    return name.replace("_", "-") + equals + value if word.startswith("--") else word


def _place(model: str | None) -> Path:
    return Path(model) if model is not None and Path(model).is_dir() else Path(".")


# ---- options


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=f"{NAME} eval",
        description="Scores a run on its benchmark, or any model by the pictures that it draws from prompts.",
    )
    parser.add_argument(
        "model",
        metavar="RUN",
        nargs="?",
        help="folder of a run, a checkpoint or a saved model, or digits_start; with --prompts also a diffusers folder "
        "or a hub id",
    )
    parser.add_argument(
        "--nfe",
        type=_list_of(int, lambda value: value >= 1, "numbers of steps such as 1,4,50"),
        help="numbers of sampling steps, with commas (default 1,4,50)",
    )
    parser.add_argument(
        "--guidance-scale",
        type=_list_of(float, lambda value: value == value, "guidance scales such as 1,3"),
        help="classifier-free guidance as the model's own pipeline counts it, one or several with commas: every number "
        "of steps with each (default 1, none)",
    )
    parser.add_argument("--negative-prompt", help="what guidance leads away from (default: the model's own, or none)")
    parser.add_argument(
        "--stochasticity",
        type=float,
        help="share of new noise between the steps: 0 is Euler, 1 noises anew (default 0); on a benchmark",
    )
    parser.add_argument("--seeds", type=int, help="how many seeds; intervals need two or more (default 1)")
    parser.add_argument("--seed", type=int, default=0, help="the first of them (default 0)")
    parser.add_argument("--against", metavar="TEACHER", help="another model, scored the same way and compared with")
    parser.add_argument("--base", help="where the model that the run started from is now, if it was moved")
    parser.add_argument(
        "--lora", help="a LoRA for RUN: a .safetensors file, or the folder of a run or an export of one"
    )
    parser.add_argument("--out", type=Path, help="JSON to write, .md and .png beside it (default: RUN/eval.json)")
    parser.add_argument("--device", default="auto", help="auto (default: cuda if there is one, else cpu), cpu, cuda:N")

    own = parser.add_argument_group("on a benchmark")
    own.add_argument(
        "--benchmark", choices=tuple(SHIPPED), help="default: the data set of the run, or what its samples can only be"
    )
    own.add_argument("--samples", type=int, help="pictures to compare with as many real ones (default 600)")
    own.add_argument("--batch-size", type=int, help="pictures made together (default 200; with --prompts 1)")
    own.add_argument(
        "--real-data",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="a row for real pictures, which is as good as a model can be (default: yes)",
    )

    pictures = parser.add_argument_group("by pictures")
    pictures.add_argument(
        "--prompts", metavar="FILE", help="draw these: a file with one a line, JSON lines, or a folder of text files"
    )
    pictures.add_argument(
        "--pictures", metavar="FOLDER", help="score pictures that are there (layout plain, geneval, dpg or any)"
    )
    pictures.add_argument("--n", type=int, help="pictures of each prompt; of --pictures, in each file (default 1)")
    pictures.add_argument("--clip-model", metavar="PATH", help="CLIP score by this local CLIPModel of transformers")
    pictures.add_argument(
        "--fid-real", metavar="FOLDER", help="Frechet distance, precision and recall to the pictures in this folder"
    )
    pictures.add_argument(
        "--fid-weights", metavar="FILE", help="FID: the TorchScript file inception-2015-12-05.pt on this machine"
    )
    pictures.add_argument(
        "--fid-model", metavar="PATH", help="a local vision model of transformers instead (the distance is no FID then)"
    )
    pictures.add_argument("--height", type=int, help="in pixels (default: as trained)")
    pictures.add_argument("--width", type=int, help="in pixels (default: as trained)")
    parser.add_argument("--resolution", type=int, help="edge of the pictures in pixels (default: the model's)")
    return parser


def _list_of(kind: Callable[[str], Any], allowed: Callable[[Any], bool], such: str) -> Callable[[str], list[Any]]:
    def parse(text: str) -> list[Any]:
        try:
            values = [kind(part) for part in text.split(",")]
        except ValueError:
            values = []
        if not values or not all(map(allowed, values)) or len(set(values)) < len(values):
            raise argparse.ArgumentTypeError(f"expected {such}, each once, got {text!r}")
        return values

    return parse


def _check(options: argparse.Namespace) -> None:
    """ValueError for options that do not go together, before anything is loaded."""
    for name in ("seeds", "batch_size", "n"):
        if (value := getattr(options, name)) is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {value}")
    if options.stochasticity is not None and not 0 <= options.stochasticity <= 1:
        raise ValueError(f"--stochasticity must lie in [0, 1], got {options.stochasticity}")
    if options.out is not None and (options.out.is_dir() or options.out.suffix in (".md", ".png")):
        raise ValueError(
            f"--out {options.out}: expected the JSON file to write, such as eval.json; the card and the plot go beside "
            "it"
        )
    by_pictures = options.prompts is not None or options.pictures is not None
    measures = [name for name in ("clip_model", "fid_real") if getattr(options, name) is not None]
    if options.model is None and options.pictures is None:
        raise ValueError("say what to score: a RUN, or --pictures FOLDER")
    if options.model is not None and options.pictures is not None:
        raise ValueError(
            "--pictures scores pictures that are there, and RUN would draw new ones; leave one of them out"
        )
    if not by_pictures:
        for name in ("clip_model", "fid_real", "fid_weights", "fid_model", "n", "height", "width"):
            if getattr(options, name) is not None:
                raise ValueError(f"--{name.replace('_', '-')} is for --prompts FILE or --pictures FOLDER")
        return
    if not measures:
        raise ValueError("say what to score the pictures by: --clip-model PATH, --fid-real FOLDER, or both")
    if (options.fid_real is None) != (options.fid_weights is None and options.fid_model is None):
        raise ValueError("--fid-real FOLDER goes with --fid-weights FILE, or with --fid-model PATH")
    if options.fid_weights is not None and options.fid_model is not None:
        raise ValueError("--fid-weights is for FID, --fid-model for another distance; leave one of them out")
    for name in ("benchmark", "stochasticity", "samples"):
        if getattr(options, name) is not None:
            raise ValueError(f"--{name} is for a benchmark; leave it out with --prompts or --pictures")
    if options.pictures is not None:
        drawing = ("nfe", "guidance_scale", "negative_prompt", "seeds", "height", "width", "resolution")
        for name in ("against", "lora", "base", "batch_size", *drawing):
            if getattr(options, name) is not None:
                raise ValueError(f"--{name.replace('_', '-')} is for drawing; leave it out with --pictures")
    elif options.resolution is not None and (options.height is not None or options.width is not None):
        raise ValueError("write --resolution, or --height and --width")


# ---- what there is to score


@dataclass(frozen=True)
class Way:
    """How pictures are sampled."""

    steps: int
    guidance: float


class Scorer(ABC):
    """Scores of one model in one way of sampling and for one seed.

    Attributes:
        title: what is scored, for the head of the table.
        columns: of the table.
        categories: what accuracy is reported by.
        plotted: (key, heading, logarithmic) of the plot.
        notes: what the columns mean.
    """

    title: str
    columns: tuple[Column, ...]
    categories: tuple[str, ...] = ()
    plotted: tuple[tuple[str, str, bool], ...]
    notes: tuple[str, ...]
    facts: dict[str, Any]

    @abstractmethod
    def score(self, model: Generator, name: str, way: Way, seed: int, *, cost: bool) -> dict[str, Any]:
        """The scores, by key; with ``cost`` those of a picture's cost, too."""

    def real(self, seed: int) -> dict[str, Any] | None:
        """What real data score, or None."""
        return None


class OnBenchmark(Scorer):
    """Scores on one of the benchmarks."""

    def __init__(self, benchmark: Benchmark, options: argparse.Namespace) -> None:
        self.benchmark, self.options = benchmark, options
        edge = benchmark.sample_shape[-1]
        self.title = f"{benchmark.name}, {edge} x {edge}"
        self.categories = benchmark.categories
        self.columns = (
            Column("accuracy", "accuracy"),
            Column("frechet", "Frechet distance"),
            Column("precision", "precision"),
            Column("recall", "recall"),
            Column("diversity", "diversity"),
            *COSTS,
        )
        self.plotted = (("accuracy", "prompt accuracy", False), ("frechet", "Frechet distance (log)", True))
        self.facts = {"benchmark": benchmark.name, "resolution": edge, "samples": options.samples}
        self.notes = (
            "accuracy: share of the pictures that show what their prompt asks",
            "Frechet distance, precision and recall (k-NN, k = 3): against as many held-out pictures, in the features "
            "of the benchmark's own small network; lower, higher and higher are better",
            "diversity: spread of the pictures of one prompt over seeds, as a share of that of real pictures",
            "ms/picture: one picture alone, from its text to its pixels; ms network: its sampling alone; images/s: in "
            f"batches of {self._batch}, sampled and decoded; peak MB: weights, text encoder and VAE included, and the "
            "most that one picture takes besides",
        )

    @property
    def _batch(self) -> int:
        return self.options.batch_size or 200

    def score(self, model: Generator, name: str, way: Way, seed: int, *, cost: bool) -> dict[str, Any]:
        sampling = {} if self.options.stochasticity is None else {"stochasticity": self.options.stochasticity}
        return evaluate(
            model.network,
            self.benchmark,
            num_inference_steps=way.steps,
            samples=self.options.samples,
            seed=seed,
            guidance_scale=way.guidance,
            negative_prompt=self.options.negative_prompt or "",
            batch_size=self._batch,
            cost=cost,
            **sampling,
        )

    def real(self, seed: int) -> dict[str, Any] | None:
        return floor(self.benchmark, samples=self.options.samples, seed=seed) if self.options.real_data else None


class ByPictures(Scorer):
    """Scores of pictures by local networks; those that a model draws stay in a folder, and are not drawn twice."""

    def __init__(self, options: argparse.Namespace, folder: Path, device: torch.device) -> None:
        self.options, self.folder, self.device = options, folder, device
        self.prompts = None if options.prompts is None else read_prompts(options.prompts)
        self.clip = None if options.clip_model is None else ClipScore(options.clip_model, device)
        self.features: Features | None = None
        self.distance = "fid"
        columns, plotted, notes = [], [], []
        if self.clip is not None:
            columns.append(Column("clip_score", "CLIP score", 2))
            plotted.append(("clip_score", "CLIP score", False))
            notes.append(f"CLIP score: 100 max(cos, 0) of picture and prompt by {options.clip_model}")
        self.facts: dict[str, Any] = {"clip_model": options.clip_model, "prompts": options.prompts}
        if options.fid_real is not None:
            heading = "FID"
            if options.fid_weights is not None:
                self.features = inception_features(options.fid_weights, device)
            else:
                self.features = vision_features(options.fid_model, device)
                self.distance, heading = "frechet", "Frechet distance"
                notes.append(f"Frechet distance: in the features of {options.fid_model}, not of Inception, so no FID")
            real = read_folder(options.fid_real)
            drawn = None if self.prompts is None else len(self.prompts) * (options.n or 1)
            if min(len(real), len(real) if drawn is None else drawn) <= NEIGHBOURS:
                raise ValueError(
                    f"--fid-real compares distributions: expected more than {NEIGHBOURS} pictures on both sides (in "
                    f"earnest, thousands), got {len(real)} real ones"
                    + ("" if drawn is None else f" and {drawn} to draw")
                )
            self.of_real = features_of(self.features, real)
            columns += [Column(self.distance, heading), Column("precision", "precision"), Column("recall", "recall")]
            plotted.append((self.distance, heading, True))
            notes.append(
                f"{heading}, precision and recall (k-NN, k = 3): against the {len(real)} pictures in "
                f"{options.fid_real}, in {self.of_real.shape[1]} features; compare equal numbers of pictures only"
            )
            self.facts |= {
                "fid_real": options.fid_real,
                "fid_weights": options.fid_weights,
                "fid_model": options.fid_model,
                "real_pictures": len(real),
            }
        if options.pictures is None:
            columns += [COSTS[0], COSTS[3]]
            kind = "of the GPU's memory" if device.type == "cuda" else "resident memory of the process so far"
            notes.append(
                "ms/picture: from the texts to PNG files, text encoders and transformer loaded once before, batches of "
                f"{options.batch_size or 1}; peak MB: {kind}"
            )
        self.title = f"the pictures in {options.pictures}" if options.pictures else f"the prompts of {options.prompts}"
        self.columns, self.plotted, self.notes = tuple(columns), tuple(plotted), tuple(notes)

    def score(self, model: Generator, name: str, way: Way, seed: int, *, cost: bool) -> dict[str, Any]:
        assert self.prompts is not None
        options, count = self.options, self.options.n or 1
        folder = self.folder / f"{name}-{way.steps}-steps-guidance-{way.guidance:g}-seed-{seed}"
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        began = time.perf_counter()
        drawn = generate_files(
            model,
            self.prompts,
            folder,
            images_per_prompt=count,
            batch_size=options.batch_size or 1,
            num_inference_steps=way.steps,
            guidance_scale=way.guidance,
            negative_prompt=options.negative_prompt,
            height=options.height or options.resolution,
            width=options.width or options.resolution,
            # No two pictures of an evaluation have one seed.
            seed=seed * count * len(self.prompts),
            device=self.device,
        )
        seconds = time.perf_counter() - began
        # Before the networks that measure take memory too.
        costs: dict[str, Any] = {"peak_bytes": peak_bytes(self.device)} if cost and drawn.new else {}
        if costs and not drawn.kept:
            costs["seconds_per_picture"] = seconds / drawn.new
        return {**self.measure(read_folder(folder)), **costs}

    def measure(self, pictures: Sequence[Picture]) -> dict[str, Any]:
        """The scores of pictures that are there."""
        scores: dict[str, Any] = {"pictures": len(pictures)}
        if self.clip is not None:
            before = self.clip.cut
            scores["clip_score"] = clip_score(self.clip, pictures)
            if cut := self.clip.cut - before:
                print(f"careful: {cut} of {len(pictures)} texts are longer than the CLIP model reads", file=sys.stderr)
        if self.features is not None:
            found = features_of(self.features, pictures)
            scores[self.distance] = frechet_distance(found, self.of_real)
            scores["precision"], scores["recall"] = precision_recall(self.of_real, found)
        return scores


# ---- the work


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
        scorer = OnBenchmark(_benchmark_of(options, model), options)
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


# ---- which benchmark


def _benchmark_of(options: argparse.Namespace, model: Generator) -> Benchmark:
    """The benchmark that was asked for, the run's own, or the only one that has samples of the model's shape.

    Raises:
        SettingsError: none of these.
    """
    shape = picture_shape(model.network)
    makes = f"{model.phrase} makes pictures of the shape {list(shape)}"
    fitting = [n for n, data in SHIPPED.items() if shape in [(data.channels, e, e) for e in data.resolutions]]
    trained = None if options.benchmark else _data_set_of(options.model)
    name = options.benchmark or (trained if trained in SHIPPED else None)
    if name is None and len(fitting) == 1:
        name = fitting[0]
    if not fitting:
        raise SettingsError(
            f"eval scores {', '.join(SHIPPED)}, and {makes}, which none of them has. Score its pictures of your own "
            "prompts: --prompts FILE with --clip-model PATH, or with --fid-real FOLDER"
        )
    if name is None:
        known = "nothing says what it was trained on" if trained is None else f"it was trained on {trained}"
        raise SettingsError(
            f"{makes}, which {' and '.join(fitting)} have, and {known}; name one of them with --benchmark, or score "
            "its pictures of your own prompts: --prompts FILE with --clip-model PATH, or with --fid-real FOLDER"
        )
    if name not in fitting:
        raise SettingsError(f"{makes}, and those of the benchmark {name} are others; it fits {', '.join(fitting)}")
    if options.resolution not in (None, shape[-1]):
        raise SettingsError(f"--resolution {options.resolution}: {model.phrase} makes pictures of {shape[-1]} pixels")
    return open_benchmark(name, shape[-1])


def _data_set_of(model: str) -> str | None:
    """``dataset_name`` of the run that ``model`` is or lies in; of a start that ships, what its name begins with."""
    folder = Path(model)
    if not folder.exists():
        return next((name for name in SHIPPED if model.startswith(f"{name}_")), None)
    for place in (folder, folder.parent, folder.parent.parent):
        if (place / "config.yaml").is_file():
            # What it says does not have to be all that this version understands.
            name = read_yaml(place / "config.yaml").get("dataset_name")
            return name if isinstance(name, str) else None
    return None
