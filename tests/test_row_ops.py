"""The ops that walk rows of channels, all at once: signatures, instruction sets, and the twins in their place."""

from __future__ import annotations

import inspect
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from row_ops import ROW_OPS, RowOp, check_all_row_ops, leaves_of, make_row_inputs

from apex_fast import ops
from apex_fast.ops import registration

pytestmark = pytest.mark.usefixtures("one_thread")


def python(code: str | list[str], **environment: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)])
    settings = {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"} | environment
    command = [sys.executable, *(["-c", code] if isinstance(code, str) else code)]
    return subprocess.run(command, env=os.environ | settings, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize("name", [*(op.name for op in ROW_OPS), "velocity_head"])
def test_ops_and_twins_have_the_same_arguments(name: str) -> None:
    for op in (name, f"{name}_backward"):
        schema = getattr(torch.ops.apex_fast, op).default._schema
        places = [(registration, f"_fake_{op}"), (registration.reference, op), (ops, op)]
        functions = [getattr(module, function) for module, function in places if hasattr(module, function)]
        assert len(functions) >= 2 or op.startswith("velocity_head")
        for function in functions:
            signature = inspect.signature(function)
            assert list(signature.parameters) == [a.name for a in schema.arguments], function
            for argument in schema.arguments:
                parameter = signature.parameters[argument.name]
                assert (parameter.kind == parameter.KEYWORD_ONLY) == argument.kwarg_only, (function, argument.name)
                default = argument.default_value if argument.has_default_value() else parameter.empty
                found = list(parameter.default) if isinstance(parameter.default, tuple) else parameter.default
                assert found == default, (function, argument.name)


@pytest.mark.parametrize("isa", ("default", "avx2", "avx512"))
def test_instruction_sets(isa: str) -> None:
    """Every op under every instruction set that this processor has, against the float64 twins."""
    order = ["default", "avx2", "avx512"]
    best = torch.backends.cpu.get_cpu_capability().lower()
    if best not in order or order.index(isa) > order.index(best):
        pytest.skip(f"this processor has {best}, not {isa}")
    if isa == torch.ops.apex_fast.cpu_isa():
        check_all_row_ops()
        return
    done = python(
        "import row_ops, torch; row_ops.check_all_row_ops(); print(torch.ops.apex_fast.cpu_isa())",
        APEX_FAST_CPU_ISA=isa,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [isa]


def test_reference_mode_runs_the_twins() -> None:
    """The same numbers to rounding, no compiled kernel; the head is made of the twin then."""
    code = """
import warnings
warnings.simplefilter("error")
import row_ops, torch
for op in row_ops.ROW_OPS:
    for name in (op.name, op.name + "_backward"):
        assert not torch._C._dispatch_has_kernel_for_dispatch_key(f"apex_fast::{name}", "CPU"), name
row_ops.check_all_row_ops()
inputs = row_ops.make_row_inputs(row_ops.MODULATED_LAYER_NORM)
inputs["hidden"].requires_grad_()
from apex_fast import ops
ops.velocity_head(**inputs, weight=torch.ones(3, 7), bias=None).square().sum().backward()
print(bool(inputs["hidden"].grad.any()))
"""
    done = python(code, APEX_FAST_KERNELS="reference")
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["True"]


def test_the_twins_refuse_the_same_arguments_in_the_same_words() -> None:
    files = [str(Path(__file__).with_name(f"test_{op.name}.py")) for op in ROW_OPS]
    command = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=short", "-k", "refusals", *files]
    done = python(command, APEX_FAST_KERNELS="reference")
    assert done.returncode == 0, done.stdout
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) > 30


@pytest.mark.parametrize("op", ROW_OPS, ids=lambda op: op.name)
def test_second_derivatives_are_refused(op: RowOp) -> None:
    inputs = make_row_inputs(op)
    leaves = [inputs[name].requires_grad_() for name in leaves_of(op, inputs)]
    output = op.public(**inputs)[0]
    found = torch.autograd.grad(output.square().sum(), leaves, create_graph=True, allow_unused=True)
    with pytest.raises(RuntimeError, match=f"apex_fast::{op.name} cannot be differentiated a second time"):
        sum(g.square().sum() for g in found if g is not None).backward()
    with pytest.raises(RuntimeError, match=f"{op.name}: forward-mode derivatives are not implemented"):
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(inputs[op.rows].detach(), torch.ones_like(inputs[op.rows]))
            op.public(**inputs | {op.rows: dual})
