"""The examples that are programs."""

from __future__ import annotations

import re
from pathlib import Path

from tiny_runs import start_process

EXAMPLES = Path(__file__).parent.parent / "examples"


def test_bring_your_own_model() -> None:
    """One-step samples of a plain nn.Module come much closer to their data, and the text stays short to read."""
    path = EXAMPLES / "bring_your_own_model.py"
    output, error = (process := start_process([str(path)])).communicate(timeout=300)
    assert process.returncode == 0, error
    before, after = map(float, re.findall(r"\d\.\d+", output))
    assert before > 0.7 and after < 0.5 * before
    code = [
        line for line in path.read_text().splitlines() if line.strip() and not line.strip().startswith(("#", '"""'))
    ]
    assert len(code) <= 40
