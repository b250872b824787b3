"""The processes of a run: how many there are, what each is, and how they agree.

A run is started by ``accelerate launch``, by ``torchrun`` or plainly, which is one process. `accelerate` says what the
launch means: its ``Accelerator`` reads the environment and its config file, makes the process group, gives each process
its device, and says whether the network is replicated (DistributedDataParallel) or sharded (FSDP2). What it would do
to the network in ``accelerator.prepare`` is done by :mod:`apex_fast.training.distributed` instead: a step of the
objective calls its network three to five times and runs up to three backwards, and prepare's wrapping assumes one of
each (autocast with a cache that outlives a graph, outputs cast to fp32, gradient flags of one accumulation counter).
For the same reason gradients are accumulated, scaled, clipped and applied by the trainer itself; an accumulation, a
precision or a checkpointing of activations that the launcher's config asks for and the run's config does not is an
error that names both, never a silent choice.

The processes agree by a second group on the CPU (gloo): whether to stop, what a file on the disk said, whether a
checkpoint was written by all. Messages are JSON; nothing is unpickled. Waiting there does not wait for a GPU. Both
groups give up after ``distributed_timeout`` seconds, so that a process that is gone ends the others with an error
instead of letting them wait for ever.

The *main* process is the first of all. It alone prints, writes metrics and pictures, and looks after the folder of the
run, which all processes must see under one path when a checkpoint is sharded.
"""

from __future__ import annotations

import contextlib
import datetime
import io
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from apex_fast.extras import require
from apex_fast.training.checkpoint import CheckpointError
from apex_fast.training.models import device_of
from apex_fast.training.settings import SettingsError

WAYS = ("auto", "ddp", "fsdp2")
_KNOWN = {kind.__name__: kind for kind in (SettingsError, CheckpointError, FileNotFoundError)}
"""Errors of the user, which one process may meet on behalf of all."""


class ProcessLostError(RuntimeError):
    """Another process of the run has failed, is gone, or did not answer in time."""


class Silence(io.TextIOBase):
    """A stream that takes every text and shows none: where the processes write that are not the main one."""

    def write(self, text: str) -> int:
        return len(text)


class NoMetrics:
    """In place of a metrics file, where nothing is written."""

    def write(self, step: int, values: Mapping[str, Any]) -> None: ...

    def close(self) -> None: ...


@dataclass
class Processes:
    """This process among those of a run.

    Attributes:
        rank, world: its number, from 0, and how many there are.
        device: where it computes.
        way: how the network is spread: "one" (there is one process), "ddp" or "fsdp2".
        accelerator: accelerate's view of the launch; None where a trainer was built without it.
        shard_options: of :func:`apex_fast.training.distributed.shard`, from the launcher's config.
        notes: what the run should say about the launch.
    """

    rank: int = 0
    world: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    way: str = "one"
    accelerator: Any = None
    shard_options: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    _control: Any = None
    _failure: Exception | None = None

    @property
    def is_main(self) -> bool:
        """Whether this is the process that prints and writes."""
        return self.rank == 0

    @property
    def sharded(self) -> bool:
        """Whether each process holds a part of the network, so that all must take part wherever it runs."""
        return self.way == "fsdp2"

    # ---- agreeing

    def gather(self, value: Any) -> list[Any]:
        """What every process passed, by rank; values that JSON can hold.

        Raises:
            ProcessLostError: a process did not answer.
        """
        if self.world == 1:
            return [value]
        mine = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        with lost_processes():
            sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self.world)]
            dist.all_gather(sizes, torch.tensor([mine.numel()]), group=self._control)
            most = max(int(size) for size in sizes)
            texts = [torch.zeros(most, dtype=torch.uint8) for _ in range(self.world)]
            dist.all_gather(texts, torch.nn.functional.pad(mine, (0, most - mine.numel())), group=self._control)
        return [json.loads(bytes(text[: int(size)].tolist()).decode()) for text, size in zip(texts, sizes, strict=True)]

    def from_main(self, value: Any = None) -> Any:
        """What the main process passed; a value that JSON can hold."""
        return self.gather(value if self.is_main else None)[0]

    def barrier(self) -> None:
        """Waits until all processes are here."""
        self.gather(None)

    def largest(self, number: int) -> int:
        """The largest of the numbers that the processes passed: one small exchange on the CPU."""
        if self.world == 1:
            return number
        found = torch.tensor([number])
        with lost_processes():
            dist.all_reduce(found, op=dist.ReduceOp.MAX, group=self._control)
        return int(found)

    def on_main(self, work: Callable[[], Any]) -> Any:
        """Does ``work`` in the main process and returns its result, which JSON must hold, in all of them.

        An error in it is raised everywhere; that of the main process is the one to be told (``error.told_elsewhere`` is
        set on the others).
        """
        if self.world == 1:
            return work()
        result, error = None, None
        if self.is_main:
            try:
                result = work()
            except Exception as caught:
                error = caught
        told = None if error is None else [_name_of(error), str(error)]
        value, told = self.from_main([result, told])
        if error is not None:
            raise error
        if told is not None:
            raise _told_elsewhere(*told)
        return value

    def together(self, work: Callable[[], Any]) -> list[Any]:
        """Does ``work`` in every process and returns all results, by rank; JSON must hold them. If it failed anywhere,
        each process raises: its own error, or one that quotes the first of the others (``error.told_elsewhere``).
        """
        if self.world == 1:
            return [work()]
        result, error = None, None
        try:
            result = work()
        except Exception as caught:
            error = caught
        found = self.gather([result, None if error is None else [_name_of(error), str(error)]])
        if error is not None:
            raise error
        failed = next(((rank, *told) for rank, (_, told) in enumerate(found) if told is not None), None)
        if failed is not None:
            rank, kind, text = failed
            raise _told_elsewhere(kind, f"process {rank}: {text}")
        return [value for value, _ in found]

    def later(self, work: Callable[[], Any]) -> None:
        """Does ``work``, which no other process waits for. If it fails where the network is sharded, the error waits
        for :meth:`raise_late`: the others go on to gather what this process holds a part of."""
        try:
            work()
        except Exception as error:
            if not self.sharded:
                raise
            self._failure = self._failure or error

    def raise_late(self) -> None:
        """Raises the first error of :meth:`later` since the last call."""
        error, self._failure = self._failure, None
        if error is not None:
            raise error

    # ---- numbers of a step

    @torch.no_grad()
    def mean(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Means of 0-d tensors over the processes, on their device; every process passes the same names."""
        if self.world == 1 or not values:
            return dict(values)
        stacked = torch.stack([value.detach().float().reshape(()) for value in values.values()]).to(self.device)
        with lost_processes():
            dist.all_reduce(stacked)
        return dict(zip(values, (stacked / self.world).unbind(), strict=True))

    def rows(self, count: int) -> slice:
        """This process's rows of a global batch, ``count`` of them."""
        return slice(self.rank * count, (self.rank + 1) * count)

    def mesh(self) -> Any:
        """All processes in one row, for what is sharded over them."""
        from torch.distributed.device_mesh import init_device_mesh

        return init_device_mesh(self.device.type, (self.world,))

    def leave(self, code: int) -> None:
        """Ends this process of several with the exit code ``code``, when all are here; in one process it returns.

        The interpreter is not taken down in order: a thread of a process group that is still alive then can abort it
        (seen with gloo, once in ten runs), and a run that has finished would be reported as failed.
        """
        if self.world == 1:
            return
        with contextlib.suppress(ProcessLostError):  # nothing is left to be lost
            self.barrier()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _name_of(error: BaseException) -> str:
    return next((name for name, kind in _KNOWN.items() if isinstance(error, kind)), type(error).__name__)


def _told_elsewhere(kind: str, message: str) -> BaseException:
    error = _KNOWN.get(kind, ProcessLostError)(message)
    error.told_elsewhere = True  # type: ignore[attr-defined]
    return error


@contextlib.contextmanager
def lost_processes() -> Iterator[None]:
    """Turns what torch says of a process that is gone into a ProcessLostError."""
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, ProcessLostError) or not _of_a_lost_process(error):
            raise
        reason = str(error).strip().splitlines()[0][:200]
        raise ProcessLostError(
            "another process of this run is gone or did not answer in time (distributed_timeout), so the run ends "
            "here. Its own last words say why; all steps since the last checkpoint are lost, and "
            f"--resume_from_checkpoint latest goes on from there. torch says: {reason}"
        ) from error


def _of_a_lost_process(error: RuntimeError) -> bool:
    if isinstance(error, dist.DistBackendError | dist.DistNetworkError | dist.DistStoreError):
        return True
    text = str(error)
    return any(words in text for words in ("gloo/", "Connection closed by peer", "Timed out waiting", "pair closure"))


# ---- the launch


def start(
    device: str, *, mixed_precision: str, accumulation: int, distributed: str, timeout: float, checkpointing: bool
) -> Processes:
    """The processes that this one was launched with; arguments are the keys of a run's config.

    Raises:
        SettingsError: the launch and the config contradict each other, or ask for what the trainer does not do.
        ImportError: no accelerate.
    """
    accelerate = require("accelerate", extra="train")
    chosen = device_of(device)
    launched = "LOCAL_RANK" in os.environ or (dist.is_available() and dist.is_initialized())
    if launched and chosen.index is not None:
        raise SettingsError(
            f"device: {device}: each launched process takes the GPU of its own number; write device: auto, and choose "
            "GPUs by CUDA_VISIBLE_DEVICES"
        )
    sharding = _wants_sharding(distributed, checkpointing)
    _check_precision(mixed_precision)
    asked = int(os.environ.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS") or 1)
    if asked not in (1, accumulation):
        raise SettingsError(
            f"gradient_accumulation_steps: {accumulation}, and accelerate's config has {asked}; the trainer "
            f"accumulates by itself: write gradient_accumulation_steps: {asked} in the run's config, or 1 in "
            "accelerate's"
        )
    if not launched:
        # For cards without peer-to-peer accelerate refuses to start unless these are set; one process has no peers.
        os.environ.setdefault("NCCL_P2P_DISABLE", "1")
        os.environ.setdefault("NCCL_IB_DISABLE", "1")
    handler = accelerate.InitProcessGroupKwargs(timeout=datetime.timedelta(seconds=timeout))
    # A process that had an Accelerator on a GPU before cannot have one on the CPU; alone it needs neither.
    fresh = not accelerate.state.is_initialized() or accelerate.PartialState().device.type == "cpu"
    try:
        accelerator = accelerate.Accelerator(
            cpu=chosen.type == "cpu" and (launched or fresh), kwargs_handlers=[handler]
        )
    except (ValueError, NotImplementedError) as error:
        raise SettingsError(f"accelerate refuses this launch: {error}") from error
    # By this variable, which accelerate sets by default, transformers leaves the weights of its models out in all
    # processes but the first, for accelerate to send them round later. Here nobody would.
    os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"
    kinds = accelerate.DistributedType
    supported = (kinds.NO, kinds.MULTI_CPU, kinds.MULTI_GPU, kinds.FSDP)
    if accelerator.distributed_type not in supported:
        raise SettingsError(
            f"accelerate's config asks for {accelerator.distributed_type.value}; this trainer runs in one process, by "
            "DistributedDataParallel (MULTI_GPU) or by FSDP with fsdp_version: 2"
        )
    made = Processes(
        rank=accelerator.process_index,
        world=accelerator.num_processes,
        device=accelerator.device if launched else chosen,
        accelerator=accelerator,
    )
    if "TORCHELASTIC_RUN_ID" in os.environ and "TORCH_ELASTIC_SHUTDOWN_TIMEOUT" not in os.environ:
        made.notes.append(
            "SIGTERM to the launcher kills its processes after 30 s; set TORCH_ELASTIC_SHUTDOWN_TIMEOUT to the seconds "
            "that a step and a checkpoint take"
        )
    if made.world == 1:
        if sharding is not None:
            made.notes.append("distributed: fsdp2, but there is one process: nothing is sharded")
        return made
    made.way = "ddp" if sharding is None else "fsdp2"
    made.shard_options = sharding or {}
    if made.device.type == "cuda":
        torch.cuda.set_device(made.device)
    made._control = dist.new_group(backend="gloo", timeout=datetime.timedelta(seconds=timeout))
    return made


def _wants_sharding(distributed: str, checkpointing: bool) -> dict[str, Any] | None:
    """Options of ``shard``, or None where the network is replicated."""
    plugged = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() in ("true", "1")
    if distributed == "ddp" and plugged:
        raise SettingsError(
            "distributed: ddp, and accelerate's config has FSDP; write distributed: auto (or fsdp2), or "
            "distributed_type: MULTI_GPU in accelerate's config"
        )
    if not plugged:
        return {} if distributed == "fsdp2" else None
    version = os.environ.get("FSDP_VERSION", "1")
    if version != "2":
        raise SettingsError(
            f"accelerate's config has FSDP with fsdp_version: {version}; this trainer shards by FSDP2: write "
            "fsdp_version: 2 there (`accelerate to-fsdp2` rewrites a config)"
        )
    if _flag("FSDP_OFFLOAD_PARAMS"):
        raise SettingsError(
            "accelerate's config has fsdp_offload_params: true, which this trainer does not do; write false there"
        )
    if _flag("FSDP_ACTIVATION_CHECKPOINTING") and not checkpointing:
        raise SettingsError(
            "accelerate's config has fsdp_activation_checkpointing: true, and the run's config has "
            "gradient_checkpointing: false; write gradient_checkpointing: true in the run's config, where it belongs"
        )
    return {} if _flag("FSDP_RESHARD_AFTER_FORWARD", "true") else {"reshard_after_forward": False}


def _flag(name: str, default: str = "false") -> bool:
    return os.environ.get(name, default).lower() in ("true", "1", "yes", "full_shard")


def _check_precision(mixed_precision: str) -> None:
    launched = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    # accelerate passes "no" on where nobody chose; then the run's config says what holds.
    if launched not in ("no", "", mixed_precision):
        raise SettingsError(
            f"mixed_precision: {mixed_precision}, and accelerate's config has mixed_precision: {launched}; write the "
            "same in both, or 'no' in accelerate's"
        )
