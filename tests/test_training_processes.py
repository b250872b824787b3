"""Two real processes train like one with the same global batch, save together, and go on in any number of processes."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("yaml")
pytest.importorskip("accelerate", reason="accelerate is not installed: pip install 'apex_fast[train]'")
pytest.importorskip("peft", reason="peft is not installed: pip install 'apex_fast[train]'")

import training_worker
from PIL import Image
from safetensors.torch import load_file
from tiny_runs import TEXT_ENCODER, TRANSFORMER, keys, losses, make_pipeline, pipeline_keys

from apex_fast.training import checkpoint
from apex_fast.training.config import load_config
from apex_fast.training.loop import Trainer

pytestmark = pytest.mark.usefixtures("one_thread")

# One sample in each of two processes. With this epsilon AdamW moves a weight whose gradient is rounding by rounding.
COMMON = (
    *("--max_train_steps", "4", "--checkpointing_steps", "2", "--adam_epsilon", "0.01", "--learning_rate", "0.02"),
    *("--report_to", "none", "--probe", "false", "--checkpoints_total_limit", "null"),
)
TRAINED_SHIFT = ("--shift.mode", "diagonal", "--shift.trainable", "true")
ACCUMULATED = ("--gradient_accumulation_steps", "2")
EMPTY = ("--proportion_empty_prompts", "0.3")

REFERENCES = {
    "full-ema": ("full", ("--real_branch", "ema", *TRAINED_SHIFT, *EMPTY)),
    "full-frozen": ("full", ("--real_branch", "frozen", *ACCUMULATED)),
    "full-live": ("full", ("--real_branch", "live", "--ema_decay", "[0.5, 0.9]")),
    # The attention has ReLUs, at whose kink rounding decides; with this seed no sample comes that close.
    "full-flow": ("full", ("--loss", "flow_matching", "--seed", "1")),
    "half-frozen": ("half", ("--mixed_precision", "fp16")),
    "lora-frozen": ("lora", ("--real_branch", "frozen")),
    "lora-ema": ("lora", ("--real_branch", "ema", *TRAINED_SHIFT)),
}
"""Runs in one process: what is trained, and with what."""

CHECKPOINTED = ("--gradient_checkpointing", "true")
WATCHED = (
    *("--validation_prompts", "a handwritten three", "--validation_steps", "1", "--validation_images_per_prompt", "1"),
    *("--validation_num_inference_steps", "1", "--validation_base_inference_steps", "2"),
)
CASES = {
    "full-ema-ddp-sequential": WATCHED,
    "full-ema-fsdp2-sequential": (*CHECKPOINTED, *WATCHED),
    "full-ema-fsdp2-retain": WATCHED,
    "full-frozen-ddp-joint": CHECKPOINTED,
    "full-frozen-fsdp2-retain": (),
    "full-live-ddp-retain": (),
    "full-live-fsdp2-joint": (),
    "full-flow-ddp-sequential": (),
    "half-frozen-ddp-retain": (),
    "half-frozen-fsdp2-sequential": (),
    "lora-frozen-ddp-sequential": CHECKPOINTED,
    "lora-frozen-fsdp2-joint": (),
    "lora-ema-ddp-joint": (),
    "lora-ema-fsdp2-sequential": CHECKPOINTED,
}
"""reference-way-schedule: the same in two processes, and what is added that must change nothing."""

KEPT_WHOLE = "full-ema-fsdp2-retain"
"""The case that FSDP2 leaves whole between forward and backward, as accelerate's config can ask for."""

RESUMED = {
    "one-to-ddp": ("full-ema", "one", "ddp"),
    "one-to-fsdp2": ("full-ema", "one", "fsdp2"),
    "ddp-to-fsdp2": ("full-ema", "full-ema-ddp-sequential", "fsdp2"),
    "fsdp2-to-ddp": ("lora-ema", "lora-ema-fsdp2-sequential", "ddp"),
}
"""reference, whose checkpoint of step 2, and how it goes on from there in two processes."""


class Models:
    """The models of this file and the runs on them."""

    def __init__(self, folder: Path) -> None:
        from apex_fast.backbones.sana import SanaBackbone
        from apex_fast.data.digits import all_prompts

        self.folder, self.full = folder, folder / "start"
        # Dropout draws other masks in every process; everything else must agree.
        network = {**TRANSFORMER, "dropout": 0.0}
        SanaBackbone.from_config(network, TEXT_ENCODER, all_prompts(), vocab_size=300).save_pretrained(self.full)
        self.lora = make_pipeline(folder / "pipeline", "sana")
        # SANA's linear attention is not for fp16.
        self.half = make_pipeline(folder / "half", "qwen_image")

    def keys(self, kind: str, name: str, *more: str) -> list[str]:
        if kind == "full":
            return keys(self.full, self.folder / name, *COMMON, "--train_batch_size", "1", *more)
        # What begins at zero has next to no gradient in so few steps.
        adapter = ("--rank", "2", "--learning_rate", "0.5", "--adam_epsilon", "1.0")
        return pipeline_keys(
            getattr(self, kind), self.folder / name, *COMMON, *adapter, "--train_batch_size", "1", *more
        )


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    return Models(tmp_path_factory.mktemp("processes"))


@pytest.fixture(scope="module")
def one_process(models: Models) -> Path:
    """The folder with the runs of REFERENCES, each under its name, in this process and with the whole batch."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for name, (kind, more) in REFERENCES.items():
        Trainer(load_config(None, models.keys(kind, name, *more, "--train_batch_size", "2"))).run()
    torch.set_num_threads(threads)
    return models.folder


def launch(arguments: list[str]) -> list[str]:
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", *arguments]


ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", "TOKENIZERS_PARALLELISM": "false"}


@pytest.fixture(scope="module")
def two_processes(models: Models, one_process: Path) -> Path:
    """The same folder with the runs of CASES and RESUMED beside them, from one launch."""
    cases = []
    for name, added in CASES.items():
        *reference, way, schedule = name.split("-")
        kind, more = REFERENCES["-".join(reference)]
        words = (*more, "--distributed", way, "--schedule", schedule, *added)
        cases.append({"keys": models.keys(kind, name, *words)})
    for name, (reference, source, way) in RESUMED.items():
        kind, more = REFERENCES[reference]
        source = reference if source == "one" else source
        copy = [str(models.folder / source / "checkpoint-2"), str(models.folder / name / "checkpoint-2")]
        words = (*more, "--distributed", way, "--resume_from_checkpoint", "latest")
        cases.append({"copy": copy, "keys": models.keys(kind, name, *words)})
    cases.append({"keys": models.keys("full", "full-ema"), "error": str(models.folder / "taken")})
    for way, rank in FULL_DISKS.items():
        error = str(models.folder / f"disk-{way}")
        words = models.keys("full", f"disk-{way}", "--distributed", way, "--distributed_timeout", "60")
        cases.append({"keys": words, "error": error, "full_disk": rank})
    for way in ("ddp", "fsdp2"):
        cases.append({"keys": models.keys("full", f"whole-{way}", *OFTEN, "--distributed", way)})
    # Last: its variables stay.
    whole = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_RESHARD_AFTER_FORWARD": "false"}
    cases.sort(key=lambda case: any(word.endswith(f"/{KEPT_WHOLE}") for word in case["keys"]))
    cases[-1]["environment"] = whole
    file = models.folder / "cases.json"
    file.write_text(json.dumps(cases))
    run = subprocess.run(
        launch([training_worker.__file__, str(file)]), env=ENVIRONMENT, capture_output=True, text=True, timeout=300
    )
    assert run.returncode == 0, run.stderr[-4000:]
    return models.folder


FULL_DISKS = {"ddp": 1, "fsdp2": 0}
"""Way of spreading, and which process has no space left."""

STATES = ("ema", "objective", "real_branch", "optimizer")


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Everything that a checkpoint holds of the run, whichever files it lies in, without random states."""
    found = {}
    for file in (folder / "model").rglob("*.safetensors"):
        found |= {f"model.{file.parent.name}.{name}": value for name, value in load_file(file).items()}

    def collect(value: object, path: str) -> None:
        if isinstance(value, torch.Tensor):
            found[path] = value
        elif isinstance(value, dict):
            for key, one in value.items():
                collect(one, f"{path}.{key}")

    for name in STATES:
        collect(checkpoint.load_state(folder, name), name)
    return found


def assert_equal_to_rounding(found: Path, expected: Path, start: Path, rounding: float = 4e-3) -> None:
    """Everything moved from the checkpoint ``start`` to the same place."""
    ours, theirs, before = tensors(found), tensors(expected), tensors(start)
    assert ours.keys() == theirs.keys() and len(theirs) > 40
    moved = 0
    for name, value in theirs.items():
        assert ours[name].shape == value.shape and ours[name].dtype == value.dtype, name
        way = (value.double() - before[name].double()).abs().max().item() if value.numel() else 0.0
        moved += way > 1e-4
        error = (ours[name].double() - value.double()).abs().max().item() if value.numel() else 0.0
        assert error <= rounding * (way + 5e-4), f"{name} moved by {way:.1e} and differs by {error:.1e}"
    assert moved > len(theirs) / 4


@pytest.mark.parametrize("case", CASES)
def test_two_processes_train_like_one(case: str, two_processes: Path) -> None:
    reference = two_processes / "-".join(case.split("-")[:2])
    rounding = 0.02 if "half" in case else 4e-3
    expected, start = reference / "checkpoint-4", reference / "checkpoint-2"
    assert_equal_to_rounding(two_processes / case / "checkpoint-4", expected, start, rounding)
    # and so they say: the numbers are means over the processes
    if "flow" not in case:
        there, here = losses(reference), losses(two_processes / case)
        assert [line[0] for line in here] == [1, 2, 3, 4]
        assert torch.allclose(torch.tensor(here), torch.tensor(there), rtol=rounding)


@pytest.mark.parametrize("case", ["full-ema-ddp-sequential", "full-ema-fsdp2-sequential", KEPT_WHOLE])
def test_validations_draw_the_pictures_of_one_process(case: str, two_processes: Path, models: Models) -> None:
    """and, with the test above, change nothing"""
    folder = two_processes / case / "samples"
    assert {p.name for p in folder.iterdir()} >= {f"step-00000{step}.png" for step in (1, 2, 3, 4)}
    words = models.keys("full", f"pictures-{case}", *REFERENCES["full-ema"][1], *WATCHED, "--train_batch_size", "2")
    Trainer(load_config(None, words)).run(until=1)
    there = models.folder / f"pictures-{case}" / "samples"
    for name in ("step-000001.png",):
        ours, theirs = (np.asarray(Image.open(place / name)).astype(int) for place in (folder, there))
        assert np.abs(ours - theirs).max() <= 1
    ours, theirs = (load_file(place / "start.safetensors")["images"].int() for place in (folder, there))
    assert (ours - theirs).abs().max() <= 1


@pytest.mark.parametrize("case", RESUMED)
def test_a_run_goes_on_in_another_number_of_processes(case: str, two_processes: Path) -> None:
    reference = two_processes / RESUMED[case][0]
    assert_equal_to_rounding(
        two_processes / case / "checkpoint-4", reference / "checkpoint-4", reference / "checkpoint-2"
    )


@pytest.mark.parametrize("case", ["full-ema-fsdp2-sequential", "lora-ema-fsdp2-sequential", "full-ema-ddp-sequential"])
def test_one_process_goes_on_where_two_were(case: str, two_processes: Path, models: Models) -> None:
    name = case.rsplit("-", 2)[0]
    kind, more = REFERENCES[name]
    shutil.copytree(two_processes / case / "checkpoint-2", two_processes / f"{case}-one" / "checkpoint-2")
    words = models.keys(kind, f"{case}-one", *more, "--train_batch_size", "2", "--resume_from_checkpoint", "latest")
    trainer = Trainer(load_config(None, words))
    assert trainer.step == 2 and trainer.run().finished
    reference = two_processes / name
    found = two_processes / f"{case}-one" / "checkpoint-4"
    assert_equal_to_rounding(found, reference / "checkpoint-4", reference / "checkpoint-2")


def test_a_sharded_checkpoint_is_shared_out_and_diffusers_reads_it(two_processes: Path) -> None:
    import diffusers

    folder = two_processes / "full-ema-fsdp2-sequential" / "checkpoint-4"
    sizes = {}
    for name in ("ema", "optimizer", "real_branch", "model/transformer/diffusion_pytorch_model"):
        parts = [folder / f"{name}-0000{i}-of-00002.safetensors" for i in (1, 2)]
        assert all(part.is_file() for part in parts)
        first, second = (load_file(part) for part in parts)
        assert not first.keys() & second.keys()
        sizes[name] = [sum(v.numel() for v in part.values()) for part in (first, second)]
    assert all(max(pair) < 1.5 * min(pair) for pair in sizes.values()), sizes
    assert checkpoint.damage(folder, contents=True) is None
    network = diffusers.SanaTransformer2DModel.from_pretrained(folder / "model" / "transformer")
    found = tensors(folder)
    assert all(torch.equal(found[f"model.transformer.{name}"], value) for name, value in network.state_dict().items())
    index = json.loads((folder / "model" / "model_index.json").read_text())
    assert index["transformer"] == ["diffusers", "SanaTransformer2DModel"]


def test_what_a_sharded_run_leaves_can_be_generated_with(two_processes: Path, models: Models) -> None:
    from apex_fast.training.models import load_generator

    finished, _ = load_generator(two_processes / "full-ema-fsdp2-sequential")
    newest, _ = load_generator(two_processes / "full-ema-fsdp2-sequential" / "checkpoint-4")
    assert type(finished.transformer).__name__ == "SanaTransformer2DModel"
    for (name, a), b in zip(finished.transformer.named_parameters(), newest.transformer.parameters(), strict=True):
        assert torch.equal(a, b), name
    adapted, _ = load_generator(two_processes / "lora-ema-fsdp2-sequential")
    average = checkpoint.load_state(two_processes / "lora-ema-fsdp2-sequential" / "checkpoint-4", "ema")["average"]
    own = dict(adapted.named_parameters())
    assert average and all(torch.equal(own[name], value) for name, value in average.items())


# ---- errors


def test_what_the_main_process_finds_is_told_once_and_ends_all(two_processes: Path) -> None:
    told, other = ((two_processes / f"taken-{rank}").read_text() for rank in (0, 1))
    assert told.startswith("told here: SettingsError: output_dir: ") and "already holds a run" in told
    assert told == f"told here: {other}"


@pytest.mark.parametrize("way", FULL_DISKS)
def test_a_save_that_fails_in_one_process_fails_in_all(way: str, two_processes: Path) -> None:
    failing, other = FULL_DISKS[way], 1 - FULL_DISKS[way]
    told, quoted = ((two_processes / f"disk-{way}-{rank}").read_text() for rank in (failing, other))
    assert told.startswith("told here: CheckpointError") and "whole are checkpoint-2" in told
    assert quoted.startswith("CheckpointError") and "there is no space for it" in quoted
    assert [p.name for p in (two_processes / f"disk-{way}").iterdir() if "checkpoint" in p.name] == ["checkpoint-2"]


# ---- signals and losses


def start_run(words: list[str], **environment: str) -> subprocess.Popen[str]:
    command = launch(["-m", "apex_fast.cli", "train", *words])
    return subprocess.Popen(
        command, env={**ENVIRONMENT, **environment}, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )


def process_of(rank: int, launcher: subprocess.Popen[str]) -> int:
    """The id of the process that torchrun has started as ``rank``."""
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit():
            continue
        try:
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            variables = (folder / "environ").read_bytes().split(b"\0")
        except OSError:
            continue  # it has ended in the meantime
        if parent == launcher.pid and f"RANK={rank}".encode() in variables:
            return int(folder.name)
    raise AssertionError(f"torchrun has no process of rank {rank}")


def wait_for_steps(folder: Path, beyond: int, launcher: subprocess.Popen[str]) -> None:
    end = time.monotonic() + 120
    while time.monotonic() < end:
        if (folder / "metrics.jsonl").is_file() and len(losses(folder)) > beyond:
            return
        assert launcher.poll() is None, launcher.communicate()[1][-3000:]
        time.sleep(0.05)
    raise AssertionError(f"no step after {beyond} in time")


def test_a_preempted_or_broken_run_ends_and_goes_on(models: Models, one_process: Path) -> None:
    """SIGTERM to one process, SIGTERM to the launcher, kill -9 of one process: each time the job ends, and the next
    part goes on from what was saved, another way of spreading included."""
    folder = models.folder / "preempted"
    endless = ("--max_train_steps", "1000000", "--checkpointing_steps", "null", "--real_branch", "ema")
    resume = ("--resume_from_checkpoint", "latest")
    more = (*endless, "--distributed_timeout", "60")

    launcher = start_run(models.keys("full", "preempted", *more))
    wait_for_steps(folder, 2, launcher)
    os.kill(process_of(1, launcher), signal.SIGTERM)
    _, error = launcher.communicate(timeout=90)
    last = losses(folder)[-1][0]
    assert f"stopped at step {last}" in error and "to go on: apex-fast train" in error, error[-3000:]
    assert "exitcode  : 143" in error
    assert [p.name for p in checkpoint.checkpoints(folder)] == [f"checkpoint-{last}"]

    # as accelerate launch passes its config file on
    sharding = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_RESHARD_AFTER_FORWARD": "true"}
    sharding["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "true"
    launcher = start_run(models.keys("full", "preempted", *more, *resume), **sharding)
    wait_for_steps(folder, last, launcher)
    launcher.send_signal(signal.SIGTERM)
    _, error = launcher.communicate(timeout=90)
    assert launcher.returncode != 0 and f"going on from step {last}" in error
    assert "2 processes (cpu), a part of the network in each" in error
    newer = losses(folder)[-1][0]
    assert newer > last and f"stopped at step {newer}" in error, error[-3000:]
    assert checkpoint.checkpoints(folder)[-1].name == f"checkpoint-{newer}"
    assert checkpoint.damage(folder / f"checkpoint-{newer}", contents=True) is None

    launcher = start_run(models.keys("full", "preempted", *more, *resume))
    wait_for_steps(folder, newer, launcher)
    os.kill(process_of(1, launcher), signal.SIGKILL)
    begun = time.monotonic()
    _, error = launcher.communicate(timeout=90)
    assert launcher.returncode != 0 and time.monotonic() - begun < 60
    assert "another process of this run is gone" in error or "Signal 9 (SIGKILL)" in error, error[-3000:]
    assert checkpoint.checkpoints(folder)[-1].name == f"checkpoint-{newer}"


@pytest.mark.slow
def test_a_process_that_stands_still_ends_the_job(models: Models) -> None:
    """No signal and no closed connection tells of it: the time that processes wait for each other does."""
    more = ("--max_train_steps", "1000000", "--checkpointing_steps", "null", "--distributed_timeout", "8")
    launcher = start_run(models.keys("full", "stopped", *more))
    wait_for_steps(models.folder / "stopped", 2, launcher)
    stopped = process_of(1, launcher)
    os.kill(stopped, signal.SIGSTOP)
    try:
        _, error = launcher.communicate(timeout=150)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(stopped, signal.SIGKILL)
    assert launcher.returncode != 0 and "another process of this run is gone or did not answer" in error, error[-3000:]


OFTEN = (
    "--max_train_steps",
    "40",
    "--checkpointing_steps",
    "2",
    "--real_branch",
    "ema",
    "--checkpoints_total_limit",
    "3",
)


def same_bits(a: Path, b: Path) -> None:
    ours, theirs = tensors(a), tensors(b)
    assert ours.keys() == theirs.keys()
    different = [name for name, value in theirs.items() if not torch.equal(ours[name], value)]
    assert not different, f"{len(different)} of {len(theirs)} differ, e.g. {different[:3]}"


@pytest.mark.parametrize(
    ("way", "kills"),
    [("ddp", 1), pytest.param("ddp", 8, marks=pytest.mark.long), pytest.param("fsdp2", 8, marks=pytest.mark.long)],
)
def test_kills_at_random_moments_change_no_number(way: str, kills: int, models: Models, two_processes: Path) -> None:
    draws, hits, folder = random.Random(kills), 0, models.folder / f"killed-{way}-{kills}"
    words = models.keys("full", folder.name, *OFTEN, "--distributed", way)

    def started() -> subprocess.Popen[str]:
        resume = ("--resume_from_checkpoint", "latest") if checkpoint.checkpoints(folder) else ()
        return start_run([*words, *(resume or ("--overwrite_output_dir", "true"))])

    metrics = folder / "metrics.jsonl"
    for _ in range(kills):
        if checkpoint.checkpoints(folder) and checkpoint.step_of(checkpoint.checkpoints(folder)[-1]) == 40:
            break
        # A run that begins writes the file anew.
        before, launcher = metrics.stat().st_mtime_ns if metrics.is_file() else 0, started()
        end = time.monotonic() + 120
        while not metrics.is_file() or metrics.stat().st_mtime_ns == before:
            assert launcher.poll() is None and time.monotonic() < end, launcher.communicate()[1][-3000:]
            time.sleep(0.02)
        time.sleep(draws.uniform(0.0, 1.5))
        with contextlib.suppress(ProcessLookupError, AssertionError):
            os.kill(process_of(draws.randrange(2), launcher), signal.SIGKILL)
        launcher.communicate(timeout=90)
        hits += launcher.returncode != 0
    assert hits, "no process was killed, so nothing was tried"
    launcher = started()
    _, error = launcher.communicate(timeout=120)
    assert launcher.returncode == 0, error[-3000:]
    same_bits(folder / "checkpoint-40", two_processes / f"whole-{way}" / "checkpoint-40")
