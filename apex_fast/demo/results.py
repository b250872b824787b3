"""What the demo measures, its table and its verdict."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

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
    shown_prompts: int = 6
    check_targets: bool = True


QUICK = Size(
    control_share=0.5,
    samples=40,
    diversity_seeds=2,
    strip=(0.0, 0.5, 1.0),
    max_train_steps=6,
    shown_prompts=2,
    check_targets=False,
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
