"""docs/training.md: its ten commands work one after the other, its links lead somewhere, its keys exist."""

from __future__ import annotations

import dataclasses
import re
import shlex
from pathlib import Path

import pytest

pytest.importorskip("yaml")
pytest.importorskip("peft")
pytest.importorskip("diffusers")

from backbone_cases import LENGTHS
from tiny_runs import make_pipeline

from apex_fast.cli import main
from apex_fast.training.config import TrainConfig
from apex_fast.training.settings import keys_of

GUIDE = Path(__file__).parent.parent / "docs" / "training.md"
SMALL = {
    "dataset_name": "pictures",
    "resolution": "32",
    "max_train_steps": "4",
    "train_batch_size": "2",
    "gradient_accumulation_steps": "2",
    "rank": "4",
    "lr_warmup_steps": "1",
    "validation_prompts": '["a red circle on white"]',
    "validation_steps": "2",
    "checkpointing_steps": "2",
    "logging_steps": "1",
}
"""Values that make the config of the first command small; all other keys stay as they were written."""


def block(heading: str) -> list[str]:
    """The commands of the first code block below a heading, without their comments."""
    text = GUIDE.read_text(encoding="utf-8").split(f"## {heading}\n", 1)[1]
    (code, *_) = re.findall(r"^```bash\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    return [line.partition("  #")[0].strip() for line in code.splitlines() if line.strip()]


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_the_ten_commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    make_pipeline(tmp_path, "qwen_image").rename(tmp_path / "tiny")
    commands = [line for line in block("In ten commands") if line.startswith("apex-fast ")]
    assert len(commands) == 9, "with the installation they are ten"
    for line in commands:
        words = shlex.split(line)[1:]
        if words[0] == "init":
            words += ["--model", str(tmp_path / "tiny")]
        elif words[0] == "generate":
            words += ["--n", "1"]
        assert main(words) == 0, (line, capsys.readouterr())
        if words[0] == "init":
            config = tmp_path / "run.yaml"
            text = config.read_text(encoding="utf-8")
            for key, value in SMALL.items():
                text, count = re.subn(rf"(?m)^{key}: [^#\n]*", f"{key}: {value} ", text)
                assert count == 1, key
            # The tiny text encoder knows no more tokens, and random weights see no shift worth the name.
            config.write_text(f"{text}\nmax_sequence_length: {LENGTHS['qwen_image']}\nprobe: false\ndevice: cpu\n")
    run = tmp_path / "runs" / "run"
    for name in ("report.html", "samples/step-000004.png", "export/comfyui", "tensorboard", "generated"):
        assert (run / name).exists(), name
    said = capsys.readouterr()
    assert "finished at step 4" in said.err and "cache" in said.err


def test_every_link_leads_somewhere() -> None:
    text = GUIDE.read_text(encoding="utf-8")
    headings = re.findall(r"(?m)^#+ (.*)$", text)
    anchors = {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}
    links = re.findall(r"\]\(([^)\s]+)\)", text)
    assert len(links) > 10
    for link in links:
        place, _, anchor = link.partition("#")
        if place:
            assert (GUIDE.parent / place).exists(), link
        else:
            assert anchor in anchors, link


def test_every_alarm_has_its_section() -> None:
    from apex_fast.training.alarms import AlarmSettings

    headings = {heading.lower() for heading in re.findall(r"(?m)^### (.*)$", GUIDE.read_text(encoding="utf-8"))}
    names = {field.name for field in dataclasses.fields(AlarmSettings) if field.default is dataclasses.MISSING}
    assert {"non_finite", "branch_difference"} <= names
    assert {name.replace("_", " ") for name in names} <= headings


def test_the_keys_that_it_names_exist() -> None:
    known = set(keys_of(TrainConfig))
    text = GUIDE.read_text(encoding="utf-8")
    named = set(re.findall(r"`([a-z0-9_]+(?:\.[a-z0-9_]+)*):(?: [^`]*)?`", text))
    # Keys of accelerate, and the beginnings of what programs print.
    foreign = {name for name in named if name.startswith("fsdp") or name in ("exitcode", "pipe", "hub", "careful")}
    assert len(named) > 25
    assert named - foreign <= known, sorted(named - foreign - known)


def test_no_line_is_too_long() -> None:
    lines = GUIDE.read_text(encoding="utf-8").splitlines()
    assert [line for line in lines if len(line) > 120 and not line.startswith("|")] == []
