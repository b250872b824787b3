"""Two real processes give the parameters of one with the whole batch: every schedule, full and LoRA, DDP and FSDP2."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("diffusers", reason="diffusers is not installed: pip install 'apex_fast[train]'")
pytest.importorskip("peft", reason="peft is not installed: pip install 'apex_fast[train]'")

import distributed_worker
from safetensors.torch import load_file

import apex_fast as af
from apex_fast.training import distributed

SCHEDULES = ("sequential", "retain", "joint")
CASES = [
    *itertools.product(("sana",), ("full", "lora"), ("ddp", "fsdp"), SCHEDULES, ("plain", "checkpointed")),
    # two streams, parameters without a gradient, a mask that not every process has the same of
    *itertools.product(("qwen_image",), ("full", "lora"), ("ddp", "fsdp"), ("sequential",), ("checkpointed",)),
    # pooled embeddings
    ("stable_diffusion_3", "full", "fsdp", "sequential", "plain"),
    ("stable_diffusion_3", "lora", "ddp", "joint", "plain"),
]


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The parameters that every case left, from one launch."""
    out = tmp_path_factory.mktemp("distributed")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    worker = Path(distributed_worker.__file__)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [*command, str(worker), str(out), *map(":".join, CASES)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    return out


@pytest.fixture(scope="module")
def one_process():
    known: dict[tuple[str, str], dict[str, torch.Tensor]] = {}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)

    def trained(family: str, mode: str) -> dict[str, torch.Tensor]:
        if (family, mode) not in known:
            known[family, mode] = distributed_worker.train(f"{family}:{mode}:one:sequential:plain")
        return known[family, mode]

    yield trained
    torch.set_num_threads(threads)


@pytest.mark.parametrize("case", CASES, ids=":".join)
def test_two_processes_are_one(case, two_processes, one_process):
    family, mode = case[:2]
    expected = one_process(family, mode)
    found = load_file(two_processes / f"{'-'.join(case)}.safetensors")
    assert found.keys() == expected.keys()
    start = dict(distributed_worker.make(family, mode).named_parameters())
    start |= {f"shift.{name}": p for name, p in af.ConditionShift().named_parameters()}
    moved = 0
    for name, value in expected.items():
        way = (value - start[name]).abs().max().item()
        moved += way > 1e-4
        error = (found[name] - value).abs().max().item()
        assert error <= 2e-3 * way + 2e-7, f"{name} moved by {way:.1e} and differs by {error:.1e}"
    assert moved > len(expected) / 2


def test_a_share_of_the_batch_gives_other_parameters(one_process, monkeypatch):
    """What would pass for equal is not: without the exchange a process would be here."""
    expected = one_process("sana", "full")
    whole = distributed_worker.samples
    monkeypatch.setattr(distributed_worker, "samples", lambda b: (whole(b)[0].flip(0), whole(b)[1]))
    other = distributed_worker.train("sana:full:one:sequential:plain")
    start = dict(distributed_worker.make("sana", "full").named_parameters())
    name = max(start, key=lambda n: (expected[n] - start[n]).abs().max())
    assert (other[name] - expected[name]).abs().max() > 0.05 * (expected[name] - start[name]).abs().max()


def test_without_a_process_group_it_says_what_to_do():
    backbone = distributed_worker.make("sana", "full")
    for spread in (distributed.replicate, distributed.shard):
        with pytest.raises(RuntimeError, match="torchrun or accelerate launch"):
            spread(af.Velocities(backbone), backbone)


@pytest.fixture
def alone(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_what_would_hang_or_train_nothing_is_refused(alone):
    backbone = distributed_worker.make("qwen_image", "full")
    with pytest.raises(ValueError, match="generator of these roles is a function"):
        distributed.replicate(af.Velocities(lambda x, t, c: backbone(x, t, c)), backbone)
    backbone.requires_grad_(True)
    with pytest.raises(ValueError, match="parameters_without_gradient"):
        distributed.replicate(af.Velocities(backbone), backbone)
