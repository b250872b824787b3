"""Which code of an op runs where: instruction sets, the plain torch twins in a kernel's place, refusals, CUDA."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from ops_cases import (
    BF16,
    F32,
    OP_VARIANT_IDS,
    OP_VARIANTS,
    OPS,
    Inputs,
    Op,
    make_inputs,
    upstream_for,
)
from ops_checks import as_list, assert_same_bits, check_all_ops, run
from torch import Tensor

from apex_fast.ops import registration

pytestmark = pytest.mark.usefixtures("one_thread")

every_op = pytest.mark.parametrize(("op", "variant"), OP_VARIANTS, ids=OP_VARIANT_IDS)

# ---- other processes: instruction sets and the twins


def python(code: str | list[str], **environment: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)])
    settings = {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"} | environment
    command = [sys.executable, *(["-c", code] if isinstance(code, str) else code)]
    return subprocess.run(command, env=os.environ | settings, capture_output=True, text=True, timeout=300)


CAPABILITIES = {"default": "DEFAULT", "avx2": "AVX2", "avx512": "AVX512"}


@pytest.mark.parametrize("isa", CAPABILITIES)
def test_instruction_sets(isa: str) -> None:
    """Every op under every instruction set that this processor has, against the float64 twins."""
    best = torch.backends.cpu.get_cpu_capability()
    order = list(CAPABILITIES.values())
    if best not in order or order.index(CAPABILITIES[isa]) > order.index(best):
        pytest.skip(f"this processor has {best}, not {isa}")
    if isa == torch.ops.apex_fast.cpu_isa():
        check_all_ops()
        return
    done = python(
        "import ops_checks, torch; ops_checks.check_all_ops(); print(torch.ops.apex_fast.cpu_isa())",
        APEX_FAST_CPU_ISA=isa,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [isa]


REFERENCE_RUN = """
import warnings
warnings.simplefilter("error")
import ops_cases, ops_checks, torch
for op in ops_cases.OPS:
    for name in (op.name, op.name + "_backward"):
        assert not torch._C._dispatch_has_kernel_for_dispatch_key(f"apex_fast::{name}", "CPU"), name
ops_checks.check_all_ops()
for op in ops_cases.OPS:
    inputs = ops_cases.make_inputs(op, (2, 5))
    upstream = ops_cases.upstream_for(op, inputs)
    leaves = [inputs[n].requires_grad_() for n in op.differentiable if inputs.get(n) is not None]
    outputs = [o for o in ops_checks.as_list(op.public(**inputs)) if o.requires_grad]
    seeds = [torch.ones_like(o, requires_grad=True) for o in outputs]
    first = torch.autograd.grad(outputs, leaves, seeds, create_graph=True)
    try:
        sum(g.square().sum() for g in first).backward()
    except RuntimeError as error:
        assert "cannot be differentiated a second time" in str(error)
    else:
        raise AssertionError(op.name)
print("twins")
"""


def test_reference_mode_runs_the_twins() -> None:
    """The same numbers to rounding, the same autograd and refusals, no compiled kernel, no warning."""
    done = python(REFERENCE_RUN, APEX_FAST_KERNELS="reference")
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["twins"]


def test_the_twins_refuse_the_same_arguments_in_the_same_words() -> None:
    """The refusals of every test file, in a process where the twins stand in for the kernels."""
    files = [str(Path(__file__).with_name(f"test_{op.name}.py")) for op in OPS]
    command = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=short", "-k", "refusals", *files]
    done = python(command, APEX_FAST_KERNELS="reference")
    assert done.returncode == 0, done.stdout
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) > 80


# ---- devices without a kernel


@pytest.fixture
def nobody_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registration, "_told", set())


@pytest.mark.usefixtures("nobody_told")
def test_auto_says_once_per_device_that_the_twins_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registration, "CUDA_OPS", ("interpolate",))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for op, device in (
            ("renoise", "cuda"),
            ("renoise", "cuda"),
            ("interpolate", "cuda"),
            ("renoise", "xpu"),
            ("renoise", "xpu"),
        ):
            registration._announce(op, device, "auto")
    first, second = (str(w.message) for w in caught)
    assert "\n" not in first and "no compiled kernel of renoise for cuda in this build" in first
    # A rebuild would not help: there is no such CUDA kernel to build.
    assert "no CUDA kernel of it" in first and "pip install" not in first and "APEX_FAST_KERNELS=compiled" in first
    assert "for xpu" in second and "there are kernels for cpu and cuda only" in second


@pytest.mark.usefixtures("nobody_told")
def test_compiled_refuses_and_reference_is_silent() -> None:
    message = "apex_fast::renoise has no compiled kernel for cuda in this build, and APEX_FAST_KERNELS=compiled forbids"
    for _ in range(2):
        with pytest.raises(RuntimeError, match=message):
            registration._announce("renoise", "cuda", "compiled")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        registration._announce("renoise", "cuda", "reference")


@pytest.mark.parametrize(
    "op", [*(op + suffix for op in registration.CUDA_OPS for suffix in ("", "_backward")), registration.ONE_PASS]
)
def test_where_a_rebuild_helps_the_command_is_named(op: str) -> None:
    with pytest.raises(RuntimeError, match="Mend: build with CUDA: APEX_FAST_CUDA=on pip install"):
        registration._announce(op, "cuda", "compiled")


def fallback(op: Op, inputs: Inputs) -> object:
    """The kernel that the dispatcher takes on a device that has none of its own."""
    order = [a.name for a in op.dispatcher._schema.arguments if not a.kwarg_only]
    key = torch._C.DispatchKey.CompositeExplicitAutograd
    options = {n: v for n, v in inputs.items() if n not in order}
    with torch.no_grad():
        return op.dispatcher._op_dk(key, *[inputs[n] for n in order], **options)


@pytest.mark.usefixtures("nobody_told")
@every_op
def test_the_dispatchers_fallback_is_the_twin(op: Op, variant: str) -> None:
    inputs = make_inputs(op, (3, 40), variant, velocity=BF16, state=F32)
    with pytest.warns(UserWarning, match=f"no compiled kernel of {op.name} for cpu in this build") as caught:
        outputs = [as_list(fallback(op, inputs)) for _ in range(2)]
    assert len(caught) == 1
    assert_same_bits(outputs[1], as_list(op.twin(**inputs)), op.name)


SETTINGS_RUN = """
import os, torch, apex_fast
x, t = torch.ones(2, 3), torch.ones(2)
def attempt(call):
    try:
        call()
    except RuntimeError as error:
        print(str(error).splitlines()[0])
    else:
        print("no error")
op = torch.ops.apex_fast.interpolate
attempt(lambda: op(x, x, t))
os.environ["APEX_FAST_CPU_ISA"] = "default"
attempt(lambda: op(x, x, t))
attempt(lambda: op.default._op_dk(torch._C.DispatchKey.CompositeExplicitAutograd, x, x, t))
"""


def test_refusals_of_settings() -> None:
    """An instruction set that does not exist, and under ``compiled`` a device without a kernel."""
    done = python(SETTINGS_RUN, APEX_FAST_CPU_ISA="sse4", APEX_FAST_KERNELS="compiled")
    unknown, kernel, twin = done.stdout.splitlines()
    assert "APEX_FAST_CPU_ISA must be default, avx2 or avx512, got 'sse4'; unset it" in unknown
    assert kernel == "no error"
    assert "apex_fast::interpolate has no compiled kernel for cpu in this build" in twin


@pytest.mark.cuda
@every_op
def test_cuda_by_kernel_or_twin(op: Op, variant: str) -> None:
    inputs = make_inputs(op, (3, 5, 701), variant, velocity=BF16, state=F32)
    upstream, wanted = upstream_for(op, inputs), [n for n in op.differentiable if inputs.get(n) is not None]
    here = run(op.public, inputs, wanted, upstream)
    there = run(
        op.public,
        {n: v.cuda() if isinstance(v, Tensor) else v for n, v in inputs.items()},
        wanted,
        [g if g is None else g.cuda() for g in upstream],
    )
    tolerances = {F32: {"rtol": 1e-5, "atol": 1e-5}, BF16: {"rtol": 1e-2, "atol": 1e-5}}
    for a, b in zip(
        [*there.outputs, *there.gradients.values()], [*here.outputs, *here.gradients.values()], strict=True
    ):
        torch.testing.assert_close(a.cpu(), b, **tolerances[b.dtype])
