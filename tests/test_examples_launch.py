"""The examples for launchers: accelerate reads them as they are meant, the trainer agrees, the Slurm script works."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("yaml")
pytest.importorskip("accelerate")

from apex_fast.training import processes

EXAMPLES = Path(__file__).parent.parent / "examples"
CONFIGS = {"ddp_8gpu": "MULTI_GPU", "fsdp2_8gpu": "FSDP"}


def environment_of(name: str) -> tuple[Any, dict[str, str]]:
    """The options of `accelerate launch` with this file, and what it sets for the processes that it starts."""
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_multi_gpu_env

    file = str(EXAMPLES / "accelerate" / f"{name}.yaml")
    words = ["--config_file", file, "-m", "apex_fast.cli", "train", "run.yaml"]
    options, _, _ = _validate_launch_command(launch_command_parser().parse_args(words))
    return options, {k: v for k, v in prepare_multi_gpu_env(options).items() if os.environ.get(k) != v}


@pytest.mark.parametrize("name", CONFIGS)
def test_accelerate_reads_the_config(name: str) -> None:
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(EXAMPLES / "accelerate" / f"{name}.yaml"))
    assert config.distributed_type.value == CONFIGS[name]
    assert config.num_processes == 8 and config.num_machines == 1 and config.mixed_precision == "no"


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("precision", ["no", "bf16", "fp16"])
def test_the_trainer_takes_what_accelerate_sets(name: str, precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    options, environment = environment_of(name)
    assert options.num_processes == 8 and options.module
    for key, value in environment.items():
        monkeypatch.setenv(key, value)
    processes._check_precision(precision)
    sharding = processes._wants_sharding("auto", checkpointing=False)
    assert sharding == ({} if name == "fsdp2_8gpu" else None)
    kept = {"fsdp2_8gpu": "ddp", "ddp_8gpu": None}[name]
    if kept is not None:
        with pytest.raises(processes.SettingsError, match="accelerate's config has FSDP"):
            processes._wants_sharding(kept, checkpointing=False)


def test_the_commands_in_the_files_name_the_files() -> None:
    for name in CONFIGS:
        text = (EXAMPLES / "accelerate" / f"{name}.yaml").read_text()
        assert f"--config_file examples/accelerate/{name}.yaml -m apex_fast.cli train" in text


# ---- Slurm

SCRIPT = EXAMPLES / "slurm" / "train.sbatch"
FAKES = {
    "scontrol": 'if [ "$1" = show ]; then echo node-a; echo node-b; else echo "scontrol $*" >> "$LOG"; fi',
    "srun": 'shift; SLURM_NODEID=1 exec "$@"',
    "accelerate": """trap 'sleep 0.3; echo saved >> "$LOG"; exit 143' TERM
echo "$MASTER_ADDR $*" >> "$LOG"
while [ -n "${UNTIL_TERM:-}" ]; do sleep 0.05; done
exit "${CODE:-0}\"""",
}


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Stand-ins for a cluster's commands; what they were asked is in the file that is returned."""
    if shutil.which("bash") is None:
        pytest.skip("no bash on this machine")
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, body in FAKES.items():
        (folder / name).write_text(f"#!/bin/bash\n{body}\n")
        (folder / name).chmod(stat.S_IRWXU)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    for key, value in {
        "LOG": str(tmp_path / "log"),
        "SLURM_JOB_ID": "41234",
        "SLURM_JOB_NODELIST": "node-[a-b]",
        "SLURM_NNODES": "2",
        "SLURM_GPUS_ON_NODE": "8",
    }.items():
        monkeypatch.setenv(key, value)
    return tmp_path / "log"


def submit(*words: str, code: int = 0) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", str(SCRIPT), *words], capture_output=True, text=True, timeout=60, env={**os.environ, "CODE": str(code)}
    )


def test_the_script_is_whole() -> None:
    subprocess.run(["bash", "-n", str(SCRIPT)], check=True)
    assert os.access(EXAMPLES / "accelerate" / "ddp_8gpu.yaml", os.R_OK)


def test_a_job_begins_and_goes_on(cluster: Path, tmp_path: Path) -> None:
    run = tmp_path / "run with a space"
    assert submit("run.yaml", str(run)).returncode == 0
    begun = cluster.read_text()
    assert begun.startswith("node-a launch --config_file examples/accelerate/ddp_8gpu.yaml")
    for words in ("--num_machines 2", "--num_processes 16", "--machine_rank 1", "--main_process_ip node-a"):
        assert words in begun
    assert begun.rstrip().endswith(f"-m apex_fast.cli train run.yaml --output_dir {run}")
    (run / "checkpoint-100").mkdir(parents=True)
    assert submit("run.yaml", str(run), "examples/accelerate/fsdp2_8gpu.yaml").returncode == 0
    assert cluster.read_text().splitlines()[-1].endswith(f"--output_dir {run} --resume_from_checkpoint latest")
    assert "fsdp2_8gpu.yaml" in cluster.read_text().splitlines()[-1]


def test_a_job_that_was_killed_before_its_first_checkpoint_goes_on_too(cluster: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").touch()
    assert submit("run.yaml", str(tmp_path / "run")).returncode == 0
    assert cluster.read_text().rstrip().endswith("--resume_from_checkpoint latest")


def test_an_error_is_for_a_person(cluster: Path, tmp_path: Path) -> None:
    (tmp_path / "run" / "checkpoint-100").mkdir(parents=True)
    done = submit("run.yaml", str(tmp_path / "run"), code=1)
    assert done.returncode == 1 and "ended with exit code 1" in done.stdout
    assert "requeue" not in cluster.read_text()


@pytest.mark.parametrize("left", [[], ["model"]])
def test_a_job_that_is_out_of_time_saves_and_is_put_into_the_queue_again(
    cluster: Path, tmp_path: Path, left: list[str]
) -> None:
    for name in left:
        (tmp_path / "run" / name).mkdir(parents=True)
    environment = {**os.environ, "UNTIL_TERM": "1"}
    command = ["bash", str(SCRIPT), "run.yaml", str(tmp_path / "run")]
    job = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    end = time.monotonic() + 60
    while not cluster.is_file() or not cluster.read_text():
        assert time.monotonic() < end and job.poll() is None, job.communicate()
        time.sleep(0.02)
    job.terminate()
    output, error = job.communicate(timeout=60)
    assert job.returncode == 143, (output, error)
    assert "saved" in cluster.read_text(), "the run was given the time to save"
    assert ("scontrol requeue 41234" in cluster.read_text()) == (not left)


def test_wrong_usage() -> None:
    done = subprocess.run(["bash", str(SCRIPT), "run.yaml"], capture_output=True, text=True, timeout=60)
    assert done.returncode != 0 and "usage: sbatch train.sbatch CONFIG.yaml OUTPUT_DIR" in done.stderr
