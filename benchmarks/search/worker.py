"""One trial with one seed, in a process of its own: ``python benchmarks/search/worker.py FOLDER``.

The queue has written ``FOLDER/trial.json`` (the settings and how to score). This process trains, or goes on, and ends
with ``FOLDER/row.json``; a run that fails or diverges is a row as well. It ends with 128 + signal if it was asked to
stop, after a checkpoint, and at once when standard input ends, since nobody is left then to take its row.

Besides the trainer's own files the folder has ``measured.jsonl``: the scores on the way and what a step costs, each as
soon as it is known, so that a run that goes on does not lack what the part before it has measured.
"""

from __future__ import annotations

import datetime
import json
import os
import signal
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

from apex_fast.evaluation.benchmark import Benchmark, evaluate, floor, open_benchmark
from apex_fast.training import environment
from apex_fast.training.checkpoint import CheckpointError
from apex_fast.training.config import TrainConfig
from apex_fast.training.loop import Trainer
from apex_fast.training.settings import build
from apex_fast.training.setup import load_backbone
from benchmarks import machine
from benchmarks.search import measure
from benchmarks.search.rows import append, read_lines
from benchmarks.search.trials import DATA, ROW, START, TRIAL

MEASURED = "measured.jsonl"
CURVE_POINTS = 10
CURVE_SEEDS = 4
"""Pictures of each diversity prompt in the scores on the way."""


class Stopped(Exception):
    """The run was asked to stop; it has saved a checkpoint."""

    def __init__(self, exit_code: int) -> None:
        super().__init__(exit_code)
        self.exit_code = exit_code


class Failed(Exception):
    """The trial has ended without a network that could be scored."""


class Watch:
    """A trainer callback: scores the network at every tenth of the run, and measures some steps."""

    def __init__(
        self, folder: Path, benchmark: Benchmark, samples: int, seed: int, foreign: list[torch.Tensor]
    ) -> None:
        self.file, self.benchmark, self.samples, self.seed = folder / MEASURED, benchmark, samples, seed
        self.foreign = foreign
        self._meter: measure.StepMeter | None = None
        self._measured = any("passes" in line for line in read_lines(self.file))
        self._begun: int | None = None

    def __call__(self, trainer: Trainer) -> None:
        with trainer.timer.aside():
            self._measure(trainer)
            if trainer.step in curve_steps(trainer.config.max_train_steps):
                self._score(trainer)

    def _measure(self, trainer: Trainer) -> None:
        if self._measured:
            return
        if self._meter is None:
            self._meter, self._begun = measure.StepMeter(trainer, self.foreign), trainer.step
        last = trainer.config.max_train_steps
        if self._meter.running:
            if self._meter.steps >= measure.steps_of(trainer.config) or trainer.step >= last:
                append(self.file, [{"step": trainer.step, **self._meter.end()}])
                self._measured = True
            return
        # Once the correction has its weight, unless the run ends before; or where it goes on after that.
        wanted = min(trainer.course.settled + 1, max(last - measure.steps_of(trainer.config), 0))
        if trainer.step == max(wanted, self._begun) and trainer.step < last:
            self._meter.begin()

    def _score(self, trainer: Trainer) -> None:
        if any(line["step"] == trainer.step and "frechet" in line for line in read_lines(self.file)):
            return
        with trainer.undisturbed() as network:
            scores = evaluate(
                network,
                self.benchmark,
                num_inference_steps=1,
                samples=self.samples,
                seed=self.seed,
                diversity_seeds=CURVE_SEEDS,
                cost=False,
            )
        kept = {name: _rounded(scores[name]) for name in ("frechet", "accuracy", "diversity")}
        append(self.file, [{"step": trainer.step, **kept}])


def curve_steps(total: int) -> set[int]:
    """The steps that are scored on the way, the end included."""
    return {round(total * k / CURVE_POINTS) for k in range(CURVE_POINTS + 1)}


def label(num_inference_steps: int, *, renoise: bool = False, guidance_scale: float = 1.0) -> str:
    """Key of a score: "2" (Euler), "2 renoise", "50 guided 3"."""
    guided = "" if guidance_scale == 1.0 else f" guided {guidance_scale:g}"
    return f"{num_inference_steps}{' renoise' if renoise else ''}{guided}"


def run_trial(folder: Path, asked: dict[str, Any]) -> dict[str, Any]:
    """Trains and scores; what the row has of it.

    Raises:
        Stopped, Failed, and whatever the trainer raises.
    """
    scoring, seed = asked["evaluation"], asked["seed"]
    benchmark = open_benchmark(scoring["benchmark"], scoring["resolution"])
    if asked["trial"] == START:
        return {"scores": _score_start(asked, benchmark)}
    # What scores is loaded before anything is counted, and is not part of what training holds.
    pictures, prompts = benchmark.real(asked["curve_samples"], seed=seed)
    benchmark.features(pictures)
    benchmark.right(pictures, prompts)
    foreign = measure.living_tensors()
    callback = Watch(folder, benchmark, asked["curve_samples"], seed, foreign)
    trainer = _trainer(folder, asked, callback)
    result = trainer.run()
    if not result.finished:
        if trainer.alarms.halt is not None:
            raise Failed(f"an alarm stopped it at step {result.step}: {trainer.alarms.halt.line}")
        raise Stopped(result.exit_code)
    scores: dict[str, Any] = {}
    with trainer.undisturbed() as network:
        for count in scoring["nfe"]:
            for renoise in (False, True) if count > 1 else (False,):
                scores[label(count, renoise=renoise)] = _rounded(
                    evaluate(
                        network,
                        benchmark,
                        num_inference_steps=count,
                        samples=scoring["samples"],
                        seed=seed,
                        stochasticity=float(renoise),
                    )
                )
    return {**costs(folder), "scores": scores}


def _trainer(folder: Path, asked: dict[str, Any], callback: Watch) -> Trainer:
    """The trainer of a run, new or where it was."""
    keys = {"output_dir": str(folder), "checkpointing_steps": max(1, asked["settings"]["max_train_steps"] // 20)}
    values = {**asked["settings"], **keys, "checkpoints_total_limit": 1, "device": asked["device"]}
    # At every tenth of the run there is a line, so that the seconds up to there are known.
    tenth = max(1, asked["settings"]["max_train_steps"] // CURVE_POINTS)
    values["logging_steps"] = max(divisor for divisor in range(1, max(1, tenth // 20) + 1) if tenth % divisor == 0)
    begun = (folder / "metrics.jsonl").exists() or any(folder.glob("checkpoint-*"))
    config = build(TrainConfig, {**values, "resume_from_checkpoint": "latest" if begun else None}, source=TRIAL)
    try:
        return Trainer(config, callbacks=[callback], stream=sys.stdout)
    except CheckpointError as error:
        print(f"the run cannot go on from its checkpoint and begins again: {error}", flush=True)
        (folder / MEASURED).unlink(missing_ok=True)
        anew = {**values, "resume_from_checkpoint": None, "overwrite_output_dir": True}
        return Trainer(build(TrainConfig, anew, source=TRIAL), callbacks=[callback], stream=sys.stdout)


def _score_start(asked: dict[str, Any], benchmark: Benchmark) -> dict[str, Any]:
    config = build(TrainConfig, {**asked["settings"], "device": asked["device"]}, source=TRIAL)
    network = load_backbone(config, []).to(asked["device"]).eval()
    scoring = asked["evaluation"]
    options = {"samples": scoring["samples"], "seed": asked["seed"]}
    scores = {DATA: _rounded(floor(benchmark, **options))}
    for scale in scoring["guidance_scale"]:
        for count in scoring["nfe"]:
            found = evaluate(network, benchmark, num_inference_steps=count, guidance_scale=scale, **options)
            scores[label(count, guidance_scale=scale)] = _rounded(found)
    return scores


def costs(folder: Path) -> dict[str, Any]:
    """``seconds`` of training alone, ``curve`` and what was measured of a step, from the files of the run."""
    seconds, before, after = 0.0, 0, {0: 0.0}
    for line in read_lines(folder / "metrics.jsonl"):
        if "seconds/step" in line:
            seconds += line["seconds/step"] * (line["step"] - before)
            before = line["step"]
            after[before] = seconds
    lines = read_lines(folder / MEASURED)
    points = {line["step"]: line for line in lines if "frechet" in line}
    curve = []
    for step in sorted(points):
        nearest = max(known for known in after if known <= step)
        curve.append({**points[step], "seconds": round(after[nearest], 3)})
    step_costs = next((line for line in reversed(lines) if "passes" in line), {})
    return {
        "seconds": round(seconds, 3),
        **{name: step_costs.get(name) for name in ("passes", "copies", "peak_bytes")},
        "curve": curve,
    }


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _rounded(below) for name, below in value.items()}
    return float(f"{value:.6g}") if isinstance(value, float) else value


def _end_with_the_queue() -> None:
    """Ends this process when the other end of standard input is gone."""

    def wait() -> None:
        while os.read(0, 1):
            pass
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=wait, daemon=True).start()


def main(folder: Path) -> int:
    _end_with_the_queue()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    return work(folder)


def work(folder: Path) -> int:
    """Runs the trial in ``folder`` to its row; the exit code, 0 if there is one now."""
    asked, begun = json.loads((folder / TRIAL).read_text(encoding="utf-8")), time.monotonic()
    try:
        found = run_trial(folder, asked)
    except Stopped as stop:
        return stop.exit_code
    except (ImportError, SyntaxError, OSError, MemoryError):
        raise  # of the installation, the machine or a start that is not there, not of the trial
    except Exception as error:  # whatever a trial dies of, the others go on
        traceback.print_exc()
        kind = "" if isinstance(error, Failed) else f"{type(error).__name__}: "
        found = {"failed": f"{kind}{error}".strip(), **costs(folder)}
    about = environment.collect(torch.device(asked["device"]))
    row = {
        **{name: asked[name] for name in ("suite", "trial", "seed", "why", "set", "evaluation")},
        "steps": 0 if asked["trial"] == START else asked["settings"]["max_train_steps"],
        "batch": asked["settings"]["train_batch_size"] * asked["settings"]["gradient_accumulation_steps"],
        **found,
        "wall_seconds": round(time.monotonic() - begun, 3),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": machine.commit(),
        "versions": about["versions"],
        "device": about["device_name"],
        "threads": about["threads"],
        "load": round(machine.load_average(), 2),
    }
    temporary = folder / f"{ROW}.new"
    temporary.write_text(json.dumps(row) + "\n", encoding="utf-8")
    temporary.replace(folder / ROW)
    return 0


if __name__ == "__main__":
    raise SystemExit(main(Path(sys.argv[1])))
