"""One-step samples of the same noise over the steps of a run."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from apex_fast.data.digits import WORDS
from apex_fast.demo.results import Size
from apex_fast.evaluation import report
from apex_fast.training.loop import Trainer

PROMPT = "a handwritten {}"
PICTURE_SEED = 7


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
