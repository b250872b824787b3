"""benchmarks/probe_against_training.py: that a row is trained once, as the table says, and shown beside its verdict."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

pytest.importorskip("diffusers", reason="diffusers is not installed: pip install 'apex_fast[train]'")
pytest.importorskip("sklearn", reason="scikit-learn is not installed: pip install 'apex_fast[data]'")

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import probe_against_training as script  # noqa: E402


def test_rows_are_told_apart_by_their_names():
    assert len({row.name for row in script.ROWS}) == len(script.ROWS)
    for row in script.ROWS:
        config = script.run_config(row, "digits_start", "nowhere", steps=400, seed=3)
        shift = config.shift
        assert (shift.scale, shift.bias, shift.site) == (row.scale, row.bias, row.site)
        assert (config.real_branch, config.rank, config.max_train_steps, config.seed) == (
            row.real_branch,
            row.rank,
            400,
            3,
        )


def test_a_row_is_trained_once_and_shown_beside_its_verdict(tmp_path, capsys):
    file = tmp_path / "rows.jsonl"
    arguments = ["--only", "sana full raw 1 0 frozen", "--steps", "2", "--jsonl", str(file)]
    assert script.main(arguments) == 0
    first = capsys.readouterr().out
    [record] = [json.loads(line) for line in file.read_text().splitlines()]
    assert script.row_of(record) == script.Row("sana", "raw", 1, 0)
    # Two steps move little: the distance is still the start's.
    assert 10 < record["scores"]["1"]["frechet"] < 30 and record["dv_relative"] > 0
    assert script.main(arguments) == 0
    second = capsys.readouterr().out
    assert len(file.read_text().splitlines()) == 1
    table = [line for line in first.splitlines() if line.startswith("|")]
    assert table == [line for line in second.splitlines() if line.startswith("|")]
    assert len(table) == 4 and "untrained" in table[2] and " invisible " in table[3]
    cells = {len(line.split("|")) for line in table}
    assert cells == {len(script.HEADER) + 2}
