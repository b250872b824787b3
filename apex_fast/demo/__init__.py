"""``apex-fast demo``: from a network that needs many steps to one that needs one, on real scans, in minutes on two CPU
cores.

It draws with a one-step generator that ships, which took longer to train than a demo may (:mod:`apex_fast.demo.shown`),
and shows a shift that the probe refuses (:mod:`apex_fast.demo.seen`).
Then it scores the start that ships, tunes it, runs the unshifted control on a smaller budget
(:mod:`apex_fast.demo.results` has the numbers), and writes the table, the pictures, a report page and ``metrics.json``
into one folder (:mod:`apex_fast.demo.page`).
"""

from __future__ import annotations

import dataclasses
import functools
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import torch

from apex_fast.demo.page import facts, pictures_of, write
from apex_fast.demo.results import QUICK, Results, Size
from apex_fast.demo.seen import MODEL as PROBED
from apex_fast.demo.seen import both
from apex_fast.demo.shown import Shown, look, told
from apex_fast.demo.strip import Strip
from apex_fast.evaluation import report
from apex_fast.evaluation.digits import digit_floor, evaluate_digits
from apex_fast.training.config import TrainConfig, load_config
from apex_fast.training.loop import Trainer
from apex_fast.training.models import load_generator
from apex_fast.training.state import claim_folder

RECIPE = Path(__file__).parent.parent / "assets" / "digits_demo.yaml"
"""The run of the demo; ``examples/digits_demo.yaml`` is the same file, to be read and changed."""

MARKER = ".apex-fast-demo"
"""File that a demo puts into its folder before anything else: only such a folder may the next demo overwrite."""


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

    say("1/6  drawing with a one-step generator that ships: trained before, for longer than a demo may take")
    shown = Shown(prompts=Shown.prompts[: size.shown_prompts])
    seen = look(shown)
    for line in told(seen, shown):
        say(f"     {line}")

    say(f"\n2/6  asking the probe which shifts a network sees ({PROBED}, which ships), before anything is trained")
    asked = both()
    for answer in asked:
        say(textwrap.indent(textwrap.fill(answer.told, 100), "     "))

    say(f"\n3/6  scoring the start at {', '.join(map(str, size.steps))} steps")
    options = {"samples": size.samples, "diversity_seeds": size.diversity_seeds}
    results.floor = digit_floor(samples=size.samples)
    pictures = {}
    for number in size.steps:
        results.start[number] = evaluate_digits(network, num_inference_steps=number, **options)
        say(f"     {number:3d} step{'s' if number > 1 else ' '}  {facts(results.start[number])}")
    pictures["start 1"], pictures["start n"] = pictures_of(network, 1), pictures_of(network, size.steps[-1])

    say(f"\n4/6  tuning, {steps} training steps")
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
    pictures["tuned"] = pictures_of(tuned, 1)

    say(f"\n5/6  the control: the same without a shift, {results.control_steps} training steps")
    control_trainer = Trainer(_control(config), label="control", stream=sys.stdout)
    done = control_trainer.run(until=results.control_steps)
    if done.step < results.control_steps:
        return done.exit_code
    results.training_seconds += done.seconds
    with control_trainer.undisturbed() as control:
        results.control = evaluate_digits(control, num_inference_steps=1, **options)
        pictures["control"] = pictures_of(control, 1)

    say("\n6/6  drawing the report\n")
    commands = write(folder, results, pictures, strip, phases, size, begun, shown, seen, asked)
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
