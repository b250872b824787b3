"""``apex-fast demo``: from a network that needs many steps to one that needs one, on real scans, in minutes on two CPU
cores.

It scores the start that ships, tunes it, runs the unshifted control on a smaller budget, and writes the table, the
pictures, a report page and ``metrics.json`` into one folder.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import platform
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from apex_fast.command import command_name
from apex_fast.data.digits import WORDS, Digits
from apex_fast.evaluation import report
from apex_fast.evaluation.digits import digit_floor, evaluate_digits
from apex_fast.sampler import sample
from apex_fast.training.config import TrainConfig, load_config
from apex_fast.training.loop import Trainer
from apex_fast.training.models import load_generator
from apex_fast.training.state import claim_folder

RECIPE = Path(__file__).parent / "assets" / "digits_demo.yaml"
"""The run of the demo; ``examples/digits_demo.yaml`` is the same file, to be read and changed."""

MARKER = ".apex-fast-demo"
"""File that a demo puts into its folder before anything else: only such a folder may the next demo overwrite."""

PROMPT = "a handwritten {}"
SEEDS_PER_PROMPT = 4
PICTURE_SEED = 7

TARGET_FRECHET_RATIO, TARGET_ACCURACY, TARGET_DIVERSITY = 0.25, 0.95, 0.8


@dataclass(frozen=True)
class Size:
    """How much of everything: the demo proper, and ``--quick`` for tests."""

    control_share: float = 0.4
    samples: int = 600
    diversity_seeds: int = 24
    strip: tuple[float, ...] = (0.0, 0.05, 0.1, 0.2, 0.35, 0.5, 0.75, 1.0)
    steps: tuple[int, ...] = (1, 4, 50)
    max_train_steps: int | None = None
    check_targets: bool = True


QUICK = Size(
    control_share=0.5, samples=40, diversity_seeds=2, strip=(0.0, 0.5, 1.0), max_train_steps=6, check_targets=False
)


@dataclass
class Results:
    """What the demo measured; scores are dicts with frechet, accuracy, diversity (and images_per_second)."""

    start: dict[int, dict[str, float]] = field(default_factory=dict)
    tuned: dict[str, float] = field(default_factory=dict)
    tuned_at_control_budget: dict[str, float] = field(default_factory=dict)
    control: dict[str, float] = field(default_factory=dict)
    floor: dict[str, float] = field(default_factory=dict)
    steps: int = 0
    control_steps: int = 0
    training_seconds: float = 0.0
    seconds: float = 0.0

    @property
    def speedup(self) -> float:
        """Images a second in one step over those in the largest number of steps."""
        return self.tuned["images_per_second"] / self.start[max(self.start)]["images_per_second"]

    def targets(self) -> list[tuple[str, bool]]:
        """What the demo is to reach, with the numbers, and whether it did."""
        bound = TARGET_FRECHET_RATIO * self.start[1]["frechet"]
        wanted_diversity = TARGET_DIVERSITY
        tuned = self.tuned
        return [
            (
                f"one-step Frechet distance {tuned['frechet']:.2f}, wanted at most {bound:.2f} "
                f"({TARGET_FRECHET_RATIO:g} of the start's {self.start[1]['frechet']:.2f})",
                tuned["frechet"] <= bound,
            ),
            (
                f"prompt accuracy {tuned['accuracy']:.3f}, wanted at least {TARGET_ACCURACY:g}",
                tuned["accuracy"] >= TARGET_ACCURACY,
            ),
            (
                f"diversity {tuned['diversity']:.2f} of the data's, wanted at least {wanted_diversity:g}",
                tuned["diversity"] >= wanted_diversity,
            ),
        ]

    def metrics(self) -> dict[str, Any]:
        """The content of ``metrics.json``."""

        def scores(values: dict[str, float]) -> dict[str, float]:
            return {name: round(float(values[name]), 5) for name in ("frechet", "accuracy", "diversity")}

        return {
            "start": {str(steps): scores(values) for steps, values in self.start.items()},
            "tuned": {"1": scores(self.tuned)},
            "control": {"1": scores(self.control)},
            "floor": scores(self.floor),
            "speedup": round(self.speedup, 2),
            "seconds": round(self.seconds, 1),
        }

    def table(self) -> tuple[list[str], list[list[str]]]:
        """Header and rows of the table that is printed and shown on the page."""

        def row(name: str, steps: str, values: dict[str, float]) -> list[str]:
            speed = f"{values['images_per_second']:,.0f}" if "images_per_second" in values else ""
            return [
                name,
                steps,
                f"{values['frechet']:.2f}",
                f"{values['accuracy']:.3f}",
                f"{values['diversity']:.2f}",
                speed,
            ]

        header = ["model", "steps", "Frechet distance", "prompt accuracy", "diversity", "images/s"]
        rows = [row("start", str(steps), values) for steps, values in self.start.items()]
        rows.append(row(f"control: no shift, after {self.control_steps} training steps", "1", self.control))
        if self.control_steps != self.steps:
            rows.append(
                row(f"tuned, after the same {self.control_steps} training steps", "1", self.tuned_at_control_budget)
            )
        rows.append(row(f"tuned, after {self.steps} training steps", "1", self.tuned))
        rows.append(row("real data (the floor)", "", self.floor))
        return header, rows


class Strip:
    """A trainer callback: at chosen steps it draws the same noise again and scores one step."""

    def __init__(self, steps: Sequence[int], score_fully_at: int, size: Size) -> None:
        self.steps, self.score_fully_at, self.size = sorted(set(steps)), score_fully_at, size
        self.images: dict[int, Tensor] = {}
        self.evaluations: list[dict[str, float]] = []
        self.full: dict[str, float] = {}
        self.seconds = 0.0
        self.prompts = [PROMPT.format(word) for word in WORDS]

    def __call__(self, trainer: Trainer) -> None:
        fully = trainer.step == self.score_fully_at
        if trainer.step not in self.steps and not fully:
            return
        begun = time.monotonic()
        if trainer.step in self.steps and trainer.step not in self.images:
            self.images[trainer.step] = trainer.draw(self.prompts, num_inference_steps=1, seed=PICTURE_SEED)
            seeds = self.size.diversity_seeds if fully else 2
            scores = trainer.score(1, samples=self.size.samples, diversity_seeds=seeds)
            self.evaluations.append({"step": trainer.step, **scores})
            if fully:
                self.full = scores
        elif fully:
            self.full = trainer.score(1, samples=self.size.samples, diversity_seeds=self.size.diversity_seeds)
        self.seconds += time.monotonic() - begun

    def picture(self, title: str, subtitle: str) -> Any:
        steps = sorted(self.images)
        chosen = [3, 5, 7, 8, 2, 4]
        rows = [report.Row(f'"{self.prompts[k]}"', "", torch.stack([self.images[s][k] for s in steps])) for k in chosen]
        names = ["start" if s == 0 else f"step {s}" for s in steps]
        return report.sample_picture(rows, names, per_column=1, title=title, subtitle=subtitle, tile=96)


def _pictures_of(network: Any, num_inference_steps: int) -> Tensor:
    """Four seeds of every prompt, in the order of the picture; the same noise for every network and number of steps."""
    prompts = [PROMPT.format(word) for word in WORDS for _ in range(SEEDS_PER_PROMPT)]
    noise = torch.randn(len(prompts), *network.sample_shape, generator=torch.Generator().manual_seed(PICTURE_SEED))
    noise = noise.to(network.transformer.device)
    with torch.no_grad():
        return sample(network, noise, network.encode(prompts), num_inference_steps=num_inference_steps).float().cpu()


def _real_pictures() -> Tensor:
    held_out = Digits.load("test")
    picked = [(held_out.labels == label).nonzero().flatten()[:SEEDS_PER_PROMPT] for label in range(len(WORDS))]
    return held_out.images[torch.cat(picked)]


def _facts(scores: dict[str, float]) -> str:
    return f"distance {scores['frechet']:.2f} · accuracy {scores['accuracy']:.2f} · diversity {scores['diversity']:.2f}"


def _sizes(network: Any) -> str:
    """Parameters of the parts, such as "0.70 M parameter transformer, 0.09 M text encoder"."""

    def million(part: torch.nn.Module) -> str:
        return f"{sum(p.numel() for p in part.parameters()) / 1e6:.2f} M"

    return f"{million(network.transformer)} parameter transformer, {million(network.text)} text encoder"


def _claim(config: TrainConfig) -> None:
    """Clears the folders of both runs, or refuses them, now and not after minutes of work; leaves the marker."""
    claim_folder(config)
    claim_folder(_control(config))
    folder = Path(config.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MARKER).write_text("`apex-fast demo` wrote this folder and may overwrite it.\n", encoding="utf-8")


def _control(config: TrainConfig) -> TrainConfig:
    """The same run without a shift: c_fake = c."""
    shift = dataclasses.replace(
        config.shift, mode="scalar", scale=1.0, bias=0.0, trainable=False, train_scale=None, train_bias=None
    )
    return dataclasses.replace(
        config,
        shift=shift,
        probe=False,  # that it is not seen is the point
        output_dir=str(Path(config.output_dir) / "control"),
        validation_steps=None,
        checkpointing_steps=None,
    )


def run_demo(
    output_dir: str | Path = "runs/demo",
    *,
    quick: bool = False,
    start: str | None = None,
    seed: int | None = None,
) -> int:
    """Runs the demo into ``output_dir`` and returns the exit code: 0 if the three targets were reached (or ``quick``),
    1 if not, 128 + signal if it was stopped.

    start: another start than the one that ships. quick: a few steps, to see that everything works.

    A folder that an earlier demo wrote is overwritten. Raises SettingsError if it holds another run.
    """
    begun = time.monotonic()
    say = functools.partial(print, flush=True)
    size = QUICK if quick else Size()
    folder = Path(output_dir)
    config = _config(folder, size, start, seed)
    steps = config.max_train_steps
    results = Results(steps=steps, control_steps=max(1, round(steps * size.control_share)))
    network, _ = load_generator(config.pretrained_model_name_or_path or "")
    _claim(config)
    say(
        f"apex-fast demo: a text-to-image network ({_sizes(network)}), trained on 1,197 scanned digits, learns to draw "
        "in one step.\n"
        f"Everything goes to {folder}/. {torch.get_num_threads()} threads.\n"
    )

    say(f"1/4  scoring the start at {', '.join(map(str, size.steps))} steps")
    options = {"samples": size.samples, "diversity_seeds": size.diversity_seeds}
    results.floor = digit_floor(samples=size.samples)
    pictures = {}
    for number in size.steps:
        results.start[number] = evaluate_digits(network, num_inference_steps=number, **options)
        say(f"     {number:3d} step{'s' if number > 1 else ' '}  {_facts(results.start[number])}")
    pictures["start 1"], pictures["start n"] = _pictures_of(network, 1), _pictures_of(network, size.steps[-1])

    say(f"\n2/4  tuning, {steps} training steps")
    strip = Strip([round(share * steps) for share in size.strip], results.control_steps, size)
    trainer = Trainer(config, callbacks=[strip], label="tune", stream=sys.stdout)
    done = trainer.run()
    if not done.finished:
        return done.exit_code
    results.training_seconds = done.seconds - strip.seconds
    phases = trainer.phases()
    results.tuned_at_control_budget = strip.full
    tuned, _ = load_generator(folder)
    results.tuned = evaluate_digits(tuned, num_inference_steps=1, **options)
    pictures["tuned"] = _pictures_of(tuned, 1)

    say(f"\n3/4  the control: the same without a shift, {results.control_steps} training steps")
    control_trainer = Trainer(_control(config), label="control", stream=sys.stdout)
    done = control_trainer.run(until=results.control_steps)
    if done.step < results.control_steps:
        return done.exit_code
    results.training_seconds += done.seconds
    with control_trainer.undisturbed() as control:
        results.control = evaluate_digits(control, num_inference_steps=1, **options)
        pictures["control"] = _pictures_of(control, 1)

    say("\n4/4  drawing the report\n")
    commands = _write(folder, results, pictures, strip, phases, size, begun)
    header, rows = results.table()
    say(report.text_table(header, rows))
    say(f"\none step instead of {size.steps[-1]}: {results.speedup:.0f} times as many images a second")
    say(f"{results.seconds:.0f} s in all, {results.training_seconds:.0f} s of them training\n")
    reached = True
    if size.check_targets:
        for what, good in results.targets():
            say(f"{'reached    ' if good else 'NOT REACHED'}  {what}")
            reached &= good
        if not reached:
            say("not every target was reached, so this ends with exit code 1")
    else:
        say("--quick trains a few steps only, so the targets are not checked")
    say("\nLook at it, and what to type next:\n" + "\n".join(f"  {line}" for line in commands))
    return 0 if reached else 1


def _config(folder: Path, size: Size, start: str | None, seed: int | None) -> TrainConfig:
    overrides = ["--output_dir", str(folder)]
    # details.json: written at the end of a demo, also by versions that left no marker.
    if (folder / MARKER).exists() or (folder / "details.json").exists():
        overrides.append("--overwrite_output_dir")
    if start is not None:
        overrides += ["--pretrained_model_name_or_path", start]
    if seed is not None:
        overrides += ["--seed", str(seed)]
    if size.max_train_steps is not None:
        overrides += [
            "--max_train_steps",
            str(size.max_train_steps),
            "--objective.warmup_steps",
            "2",
            "--objective.ramp_steps",
            "2",
        ]
    return load_config(RECIPE, overrides)


def _write(
    folder: Path,
    results: Results,
    pictures: dict[str, Tensor],
    strip: Strip,
    phases: list[tuple[int, str]],
    size: Size,
    begun: float,
) -> list[str]:
    """All files of the report; returns the lines that say what to do next."""
    many = size.steps[-1]
    rows = [
        report.Row("real data", "held out from training", _real_pictures()),
        report.Row(f"start, {many} steps", _facts(results.start[many]), pictures["start n"]),
        report.Row("start, 1 step", _facts(results.start[1]), pictures["start 1"]),
        report.Row("control, 1 step", _facts(results.control), pictures["control"]),
        report.Row("tuned, 1 step", _facts(results.tuned), pictures["tuned"], emphasis=True),
    ]
    subtitle = (
        f'Text to image: "{PROMPT.format("zero")}" ... "{PROMPT.format("nine")}", four seeds each. '
        f"The control is the same training without the condition shift, {results.control_steps} of {results.steps} "
        "steps."
    )
    samples, over_training, curves = folder / "samples.png", folder / "training.png", folder / "losses.png"
    report.sample_picture(
        rows, WORDS, per_column=SEEDS_PER_PROMPT, title=f"One step instead of {many}", subtitle=subtitle
    ).save(samples)
    strip.picture(
        "One-step samples during tuning", "The same noise at every column. It gets worse before it gets better."
    ).save(over_training)
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    report.loss_curves(
        curves,
        records,
        {
            "loss_fake": "L_fake (shifted branch)",
            "loss_correction": "|velocity correction|²",
            "loss_supervised": "L_sup (flow matching on data)",
        },
        phases=phases,
        evaluations=strip.evaluations,
    )
    results.seconds = time.monotonic() - begun
    (folder / "metrics.json").write_text(json.dumps(results.metrics(), indent=2) + "\n", encoding="utf-8")
    details = {**dataclasses.asdict(results), "over_training": strip.evaluations, "speedup": results.speedup}
    (folder / "details.json").write_text(json.dumps(details, indent=2) + "\n", encoding="utf-8")
    page = folder / "report.html"
    place = shlex.quote(str(folder))
    commands = [
        f'{command_name()} generate {place} --prompt "a handwritten three"',
        f"{command_name()} train examples/digits_full.yaml      # the longer run",
        f"{samples}  {page}      # open them in a picture viewer and a browser",
    ]
    header, table = results.table()
    report.report_page(
        page,
        title=f"One step instead of {many}",
        lead=(
            "A small SANA transformer that draws handwritten digits from text needed many sampling steps. Tuned with "
            "the velocity "
            "correction under a shifted condition (APEX, arXiv 2604.12322) it needs one."
        ),
        header=header,
        rows=table,
        targets=results.targets() if size.check_targets else [],
        pictures=[
            (
                samples,
                "Samples",
                "Rows: models. Columns: prompts, four seeds each; the generated rows start from the same noise.",
            ),
            (
                over_training,
                "During tuning",
                "One-step samples of the same noise, from the start to the tuned network.",
            ),
            (curves, "Losses", "The shaded bands are warm-up and ramp. The losses are averages over a batch."),
        ],
        notes=[
            "Frechet distance: between Gaussians fitted to the features of a digit classifier, generated against "
            "held-out scans. Lower is "
            "better; the floor is what real training scans score.",
            "Prompt accuracy: the share of samples that the classifier takes for the digit of their prompt.",
            "Diversity: mean distance between samples of one prompt, as a share of the same among real scans. 1 is "
            "the data's.",
            f"Images/s: sampling alone on this machine, {torch.get_num_threads()} threads; one step makes "
            f"{results.speedup:.0f} times as many as {many} steps.",
            "One seed each: runs differ by some tenths of distance.",
        ],
        commands=commands[:2],
        facts={
            "tuning": f"{results.steps} steps",
            "control": f"{results.control_steps} steps",
            "training": f"{results.training_seconds:.0f} s for both",
            "in all": f"{results.seconds:.0f} s",
            "machine": f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}",
        },
    )
    return commands
