"""What the probe says of a shift before training, beside what training with that shift reaches: the table of
docs/probe.md.

    apex-fast train examples/digits_qwen_start.yaml
    python benchmarks/probe_against_training.py --qwen-start runs/digits_qwen_start --jsonl runs/probe/rows.jsonl

Every row is one short run of the demo's recipe (``apex_fast/assets/digits_demo.yaml``) from a start on the digits,
with another shift, site or real branch, scored in one sampling step. A row takes one to two minutes on one core.
Rows that the file has are not run again, so an interrupted table is continued by the same command. ``--table`` prints
what is there and trains nothing; the probe's columns are measured anew each time, since its thresholds may have moved.
"""

from __future__ import annotations

import argparse
import dataclasses
import io
import json
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from apex_fast.backbones.base import Backbone
from apex_fast.data.digits import WORDS
from apex_fast.demo import RECIPE
from apex_fast.evaluation.digits import evaluate_digits
from apex_fast.finite import NonFiniteLossError
from apex_fast.probing import ProbeRow, probe
from apex_fast.training.config import TrainConfig, load_config
from apex_fast.training.loop import Trainer
from apex_fast.training.models import load_pretrained, pretrained_source

EVALUATED = (1, 4)
"""Sampling steps that are scored; the table shows the first."""


@dataclass(frozen=True)
class Row:
    """One run. ``start`` is sana or qwen; ``rank`` of the LoRA, None tunes all parameters; ``correction_weight``, None
    is the recipe's."""

    start: str
    site: str
    scale: float
    bias: float
    real_branch: str = "frozen"
    rank: int | None = None
    correction_weight: float | None = None

    @property
    def name(self) -> str:
        """As the jsonl file knows it."""
        way = "full" if self.rank is None else f"lora{self.rank}"
        weight = "" if self.correction_weight is None else f" weight {self.correction_weight:g}"
        return f"{self.start} {way} {self.site} {self.scale:g} {self.bias:g} {self.real_branch}{weight}"


# In the order in which they are run; the table sorts them.
ROWS = (
    Row("qwen", "raw", -1, 0.5),
    Row("qwen", "raw", 0.5, 0),
    Row("sana", "raw", -1, 0.5),
    Row("sana", "raw", 1, 0),
    Row("sana", "projected", 1, 50),
    # Under a live real branch the correction of an invisible shift is nothing at all.
    Row("qwen", "raw", 0.5, 0, "live"),
    Row("qwen", "raw", -1, 0.5, "live"),
    Row("sana", "raw", 1, 0, "live"),
    # The recipe's weight is for a frozen branch; a live one that follows its own pictures needs a lighter hand.
    Row("sana", "raw", -1, 0.5, "live", correction_weight=0.5),
    Row("sana", "raw", 1, 0, "live", correction_weight=0.5),
    Row("qwen", "raw", -1, 0.5, "live", correction_weight=0.5),
    Row("qwen", "raw", 0.5, 0, "live", correction_weight=0.5),
    Row("sana", "raw", 0.5, 0),
    Row("sana", "raw", -1, 0.5, rank=16),
    Row("sana", "raw", 1, 0, rank=16),
)


def run_row(row: Row, start: str, *, steps: int, seed: int) -> dict[str, Any]:
    """Trains and scores one row; the record of the jsonl file."""
    begun = time.monotonic()
    record: dict[str, Any] = {"row": row.name, **dataclasses.asdict(row), "steps": steps, "seed": seed}
    with tempfile.TemporaryDirectory(prefix="probe-against-training-") as folder:
        trainer = Trainer(run_config(row, start, folder, steps=steps, seed=seed), stream=io.StringIO())
        try:
            result = trainer.run()
        except NonFiniteLossError as error:
            return {**record, "failed": str(error), "seconds": time.monotonic() - begun}
        if not result.finished:  # Ctrl-C: a row counts whole or not at all
            raise SystemExit(result.exit_code)
        record["scores"] = {str(n): trainer.score(n) for n in EVALUATED}
        lines = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    strength = {line["step"]: line["dv_relative"] for line in lines if "dv_relative" in line}
    believed = min(step for step in strength if step >= steps // 10)
    return {**record, "dv_relative": strength[believed], "seconds": time.monotonic() - begun}


def run_config(row: Row, start: str, folder: str, *, steps: int, seed: int) -> TrainConfig:
    """The demo's recipe with the shift, the real branch and the length of this table."""
    recipe = load_config(RECIPE)
    weight = recipe.objective.correction_weight if row.correction_weight is None else row.correction_weight
    # A run refuses what its probe calls invisible, and that is what is to be trained here.
    unprobed = {"probe": False} if hasattr(recipe, "probe") else {}
    return dataclasses.replace(
        recipe,
        output_dir=folder,
        pretrained_model_name_or_path=start,
        real_branch=row.real_branch,
        rank=row.rank,
        shift=dataclasses.replace(recipe.shift, scale=float(row.scale), bias=float(row.bias), site=row.site),
        # The recipe's hundred steps of warm-up would be a quarter of so short a run.
        objective=dataclasses.replace(
            recipe.objective, warmup_steps=steps // 10, ramp_steps=steps // 10, correction_weight=weight
        ),
        max_train_steps=steps,
        seed=seed,
        validation_steps=None,
        checkpointing_steps=None,
        **unprobed,
    )


def probed(row: Row, backbone: Backbone) -> ProbeRow:
    """What ``apex-fast probe`` says of the row's shift on its start."""
    prompts = [f"a handwritten {word}" for word in WORDS]
    report = probe(backbone, prompts, scales=(row.scale,), biases=(row.bias,), sites=(row.site,))
    return report.rows[0]


HEADER = (
    "start, tuning",
    "real branch",
    "site",
    "a",
    "b",
    "change",
    "verdict",
    "dv / v",
    "distance",
    "accuracy",
    "diversity",
)


def table(records: Sequence[Mapping[str, Any]], starts: Mapping[str, str]) -> list[str]:
    """Lines of markdown: the starts at one step, then the rows by start, way, real branch and the probe's change."""
    lines = ["| " + " | ".join(HEADER) + " |", "| --- | --- | --- |" + " ---: |" * 3 + " --- |" + " ---: |" * 4]
    for start in dict.fromkeys(record["start"] for record in records):
        backbone = load_pretrained(pretrained_source(starts[start])).eval()
        untrained = evaluate_digits(backbone, num_inference_steps=1)
        lines.append(_line([f"{start}, untrained", "", "", "", "", "", "", "", *_scores(untrained)]))
        of_start = [record for record in records if record["start"] == start]
        probes = {record["row"]: probed(row_of(record), backbone) for record in of_start}

        def order(record: Mapping[str, Any], probes: Mapping[str, ProbeRow] = probes) -> tuple[Any, ...]:
            return record["rank"] is not None, record["real_branch"], probes[record["row"]].mean_change

        for record in sorted(of_start, key=order):
            row, seen = row_of(record), probes[record["row"]]
            way = "full" if row.rank is None else f"LoRA {row.rank}"
            cells = [f"{start}, {way}", row.real_branch, row.site, f"{row.scale:g}", f"{row.bias:g}"]
            cells += [f"{seen.mean_change:.2g}", seen.verdict]
            if "failed" in record:
                cells += ["", "not finite", "", ""]
            else:
                cells += [f"{record['dv_relative']:.2g}", *_scores(record["scores"]["1"])]
            lines.append(_line(cells))
    return lines


def row_of(record: Mapping[str, Any]) -> Row:
    """The row that a record of the file is of."""
    # A field that a record is older than has its default.
    return Row(**{field.name: record[field.name] for field in dataclasses.fields(Row) if field.name in record})


def _scores(values: Mapping[str, float]) -> list[str]:
    return [f"{values['frechet']:.2f}", f"{values['accuracy']:.3f}", f"{values['diversity']:.2f}"]


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--qwen-start", default="runs/digits_qwen_start", metavar="RUN")
    parser.add_argument("--jsonl", type=Path, default=Path("runs/probe_against_training.jsonl"), metavar="FILE")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", metavar="TEXT", help="only rows whose name contains this")
    parser.add_argument("--table", action="store_true", help="print the table of what the file has; train nothing")
    options = parser.parse_args(arguments)
    starts = {"sana": "digits_start", "qwen": options.qwen_start}
    done = []
    if options.jsonl.is_file():
        done = [json.loads(line) for line in options.jsonl.read_text(encoding="utf-8").splitlines()]
    have = {(record["row"], record["steps"], record["seed"]) for record in done}
    options.jsonl.parent.mkdir(parents=True, exist_ok=True)
    for row in ROWS:
        if options.table or options.only not in row.name or (row.name, options.steps, options.seed) in have:
            continue
        record = run_row(row, starts[row.start], steps=options.steps, seed=options.seed)
        with options.jsonl.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        done.append(record)
        print(f"{row.name}: {record.get('failed') or record['scores']['1']}", flush=True)
    shown = [record for record in done if (record["steps"], record["seed"]) == (options.steps, options.seed)]
    print("\n".join(table([record for record in shown if options.only in record["row"]], starts)))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
