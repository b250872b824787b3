"""A printed command must work when it is pasted."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from apex_fast.command import command_name


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    program = tmp_path / "bin" / "apex-fast"
    program.parent.mkdir()
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [str(program), "demo"])
    return program


def test_the_program_on_the_path_is_named_plainly(installed: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PATH", str(installed.parent))
    assert command_name() == "apex-fast"


def test_a_program_off_the_path_is_named_by_its_place(installed: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PATH", "/nowhere")
    assert command_name() == "bin/apex-fast"


def test_another_entry_point_falls_back_to_the_name(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "argv", ["-c"])
    assert command_name() == "apex-fast"
