"""examples/raw_ops_loop.py: it trains, with the ops alone."""

from __future__ import annotations

import ast
import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

SOURCE = Path(__file__).resolve().parents[1] / "examples" / "raw_ops_loop.py"


@pytest.fixture(scope="module")
def example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("raw_ops_loop", SOURCE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class _Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.ops: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "apex_fast":
            self.ops.append(function._schema.name.removeprefix("apex_fast::"))
        return function(*args, **(kwargs or {}))


def test_a_short_run_improves_one_step_samples_several_fold(example, capsys):
    before, after = example.main(start_steps=300, steps=400, batch=128)
    assert before > 0.5  # a flow-matching start is no one-step generator
    assert after < before / 4
    assert "energy distance" in capsys.readouterr().out


def test_it_repeats(example, capsys):
    short = {"start_steps": 3, "steps": 5, "batch": 16}
    assert example.main(**short) == example.main(**short)


def test_a_step_and_the_evaluation_run_the_ops(example):
    net, embeddings = example.VelocityNet(), torch.randn(example.CONDITIONS, example.WIDTH)
    generator = torch.Generator().manual_seed(0)
    x, c = torch.randn(8, 2), torch.randn(8, example.WIDTH)
    with _Recorder() as recorder:
        example.correction_step(net, net, x, c, 1.0, generator).backward()
        example.one_step_distance(net, embeddings, count=4)
    assert {
        "renoise",
        "condition_shift",
        "shifted_velocity_loss",
        "shifted_velocity_loss_backward",
        "interpolate",
        "mixed_velocity_loss",
        "mixed_velocity_loss_backward",
        "sampler_step",
    } <= set(recorder.ops)


def test_the_correction_reaches_the_generator(example):
    """With weight 0 the generator pass gets no gradient; the difference is the correction's alone."""
    net, real = example.VelocityNet(), example.VelocityNet()
    x, c = torch.randn(8, 2), torch.randn(8, example.WIDTH)
    gradients = []
    for weight in (0.0, 1.0):
        net.zero_grad()
        example.correction_step(net, real, x, c, weight, torch.Generator().manual_seed(0)).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in net.parameters()]))
    assert (gradients[0] - gradients[1]).norm() > 1e-3 * gradients[0].norm()


def test_nothing_of_the_library_but_its_ops_is_used():
    names = set()
    for node in ast.walk(ast.parse(SOURCE.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module)
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "apex_fast":
            pytest.fail(f"the example uses apex_fast.{node.attr}")
    assert {name for name in names if name.startswith("apex_fast")} == {"apex_fast"}
