"""The pictures and the page of the demo."""

from __future__ import annotations

import dataclasses
import json
import platform
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from apex_fast.command import command_name
from apex_fast.data.digits import WORDS, Digits
from apex_fast.demo.results import Results, Size
from apex_fast.demo.seen import Asked
from apex_fast.demo.shown import Look, Shown, picture_of, told
from apex_fast.demo.strip import PICTURE_SEED, PROMPT, Strip
from apex_fast.evaluation import report
from apex_fast.sampler import sample
from apex_fast.shipped import TO_TRY, typed

SEEDS_PER_PROMPT = 4


def pictures_of(network: Any, num_inference_steps: int) -> Tensor:
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


def facts(scores: dict[str, float]) -> str:
    return f"distance {scores['frechet']:.2f} · accuracy {scores['accuracy']:.2f} · diversity {scores['diversity']:.2f}"


def write(
    folder: Path,
    results: Results,
    pictures: dict[str, Tensor],
    strip: Strip,
    phases: list[tuple[int, str]],
    size: Size,
    begun: float,
    shown: Shown,
    look: Look,
    asked: Sequence[Asked],
) -> list[str]:
    """All files of the report; returns the lines that say what to do next."""
    many = size.steps[-1]
    rows = [
        report.Row("real data", "held out from training", _real_pictures()),
        report.Row(f"start, {many} steps", facts(results.start[many]), pictures["start n"]),
        report.Row("start, 1 step", facts(results.start[1]), pictures["start 1"]),
        report.Row("control, 1 step", facts(results.control), pictures["control"]),
        report.Row("tuned, 1 step", facts(results.tuned), pictures["tuned"], emphasis=True),
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
    shipped = folder / "shipped.png"
    picture_of(look, shown).save(shipped)
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
    place = typed(folder)
    # A folder of that name would be meant as well, and the command refuses to guess.
    to_try = shown.generator if Path(TO_TRY).exists() else TO_TRY
    commands = [
        f'{command_name()} generate {place} --prompt "a handwritten three"',
        f'{command_name()} generate {to_try} --prompt "{shown.prompts[1]}"      # the one that ships; write your own',
        f"{command_name()} train examples/digits_full.yaml      # the longer run",
        f"{samples}  {shipped}  {page}      # open them in a picture viewer and a browser",
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
                "Samples, trained just now",
                "Rows: models. Columns: prompts, four seeds each; the generated rows start from the same noise.",
            ),
            (shipped, "Shipped, trained before", ". ".join(told(look, shown)) + "."),
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
            *(f"The probe on a small Qwen-Image, before any training. {answer.told}." for answer in asked),
        ],
        commands=commands[:-1],
        facts={
            "tuning": f"{results.steps} steps",
            "control": f"{results.control_steps} steps",
            "training": f"{results.training_seconds:.0f} s for both",
            "in all": f"{results.seconds:.0f} s",
            "machine": f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}",
        },
    )
    return commands
