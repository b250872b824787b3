"""One network over several processes: a replica in each (DistributedDataParallel), or a shard in each (FSDP2).

A step of the objective calls its network three to five times and runs up to three backwards, and gradients must cross
the processes once, in the last of them. :func:`replicate` and :func:`shard` put the network's roles in place and return
the ``no_sync`` that ``objective.backward(..., no_sync=)`` takes for all but that last one::

    velocities = Velocities.from_module(backbone, real="frozen")  # or lora_velocities(backbone)
    no_sync = distributed.replicate(velocities, backbone)         # or distributed.shard(velocities, backbone)
    optimizer = AdamW([p for p in backbone.parameters() if p.requires_grad])
    for step, (x, condition) in enumerate(my_share_of_the_data):
        objective.backward(velocities, x, condition, step=step, no_sync=no_sync)
        distributed.average_gradients(objective.shift.parameters())

The roles come first: a real branch that is a copy has to be made from a network that is whole. With the same number of
samples in every process the gradients are those of one process with the whole batch, to rounding; the tests hold every
schedule to that, for full tuning and LoRA, with and without gradient checkpointing, in two real processes.

The real branch is only read, so it stays outside of DistributedDataParallel; under :func:`shard` a copy is sharded like
the network. What FSDP2's ``no_sync`` costs is memory: the gradients that wait for the last backward are whole, one more
copy of the trained parameters. ``reduce_every_backward=True`` exchanges them at once instead. FSDP2 settles its state
in its first forward, and a step may begin without gradient: :func:`prime` runs one forward and backward at set-up.

Under FSDP2 parameters, gradients, moments and averages are DTensors, each process holding its rows;
:mod:`apex_fast.parts` leads from there to plain tensors and back, and :func:`clip_grad_norm_` has the norm of it all.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from apex_fast.backbones.base import Backbone
from apex_fast.condition import Condition
from apex_fast.parts import is_sharded, whole
from apex_fast.training.models import Autocast
from apex_fast.velocities import Velocities

NoSync = Callable[[], AbstractContextManager]


def replicate(velocities: Velocities, backbone: Backbone, **options: Any) -> NoSync:
    """Keeps a whole network in every process and averages its gradients.

    ``velocities.generator`` (and with it the shifted branch) becomes a DistributedDataParallel around ``backbone``; the
    real branch stays what it is. Parameters are made equal to those of the first process.

    Args:
        velocities: the roles of ``backbone``, whose generator is the backbone itself, or it under autocast.
        options: of ``torch.nn.parallel.DistributedDataParallel``, such as ``device_ids`` or ``bucket_cap_mb``.

    Returns:
        ``no_sync`` for ``objective.backward``.

    Raises:
        RuntimeError: no process group.
        ValueError: another generator than the backbone, or a parameter that no output depends on and that is to be
            trained: every backward would wait for its gradient.
    """
    _check(velocities, backbone, "replicate")
    waiting = [
        name
        for name, parameter in backbone.transformer.named_parameters()
        if parameter.requires_grad and name in backbone.parameters_without_gradient()
    ]
    if waiting:
        raise ValueError(
            f"replicate: no output of this {backbone.family} network depends on {waiting[:3]}; freeze what "
            "backbone.parameters_without_gradient() names before the roles are made"
        )
    wrapper: Any = nn.parallel.DistributedDataParallel
    if not options.get("broadcast_buffers", True) and "forward_sync_buffers" in inspect.signature(wrapper).parameters:
        options["forward_sync_buffers"] = options.pop("broadcast_buffers")  # its name from torch 2.13 on
    wrapped = wrapper(velocities.generator, **options)
    velocities.generator = wrapped
    return wrapped.no_sync


def shard(velocities: Velocities, backbone: Backbone, *, reduce_every_backward: bool = False, **options: Any) -> NoSync:
    """Spreads the parameters over the processes, block by block (FSDP2), those of a copied real branch too.

    ``backbone`` stays the callable; its parameters become DTensors, so make the optimizer after this. Names and classes
    of modules stay, FSDP2 adds a base class of its own to each block.

    Args:
        velocities: the roles of ``backbone``, made before.
        reduce_every_backward: exchange the gradients in each backward of a step: more traffic, and one copy of the
            trained parameters less while they wait.
        options: of ``torch.distributed.fsdp.fully_shard``, such as ``mesh``, ``mp_policy`` or ``offload_policy``.

    Returns:
        ``no_sync`` for ``objective.backward``.

    Raises:
        RuntimeError: no process group.
        ValueError: another generator than the backbone.
    """
    _check(velocities, backbone, "shard")
    copies = [_bare(role) for role in (backbone, velocities.real)]
    for network in (copy for copy in copies if isinstance(copy, Backbone)):
        # Left to itself FSDP2 keeps the outermost parameters whole after a forward, for the backward that follows. A
        # branch that is only read has none, and what then writes to its parts (an average) would not be seen.
        keeps = options.get("reshard_after_forward") is False and network is backbone
        _shard(network.transformer, {**options, "reshard_after_forward": not keeps})

    @contextmanager
    def no_sync() -> Iterator[None]:
        backbone.transformer.set_requires_gradient_sync(False)
        try:
            yield
        finally:
            backbone.transformer.set_requires_gradient_sync(True)

    return nullcontext if reduce_every_backward else no_sync


def _shard(transformer: nn.Module, options: dict[str, Any]) -> None:
    from torch.distributed.fsdp import fully_shard

    for blocks in transformer.children():
        if isinstance(blocks, nn.ModuleList):
            for block in blocks:
                fully_shard(block, **options)
    fully_shard(transformer, **options)


def _bare(role: Any) -> Any:
    return role.module if isinstance(role, Autocast) else role


def _check(velocities: Velocities, backbone: Backbone, what: str) -> None:
    if not dist.is_available() or not dist.is_initialized():
        raise RuntimeError(
            f"{what}: there is no process group; start with torchrun or accelerate launch and call "
            "torch.distributed.init_process_group first"
        )
    if _bare(velocities.generator) is not backbone:
        raise ValueError(
            f"{what}: the generator of these roles is a {type(velocities.generator).__name__}, not the backbone; make "
            "the roles of the bare backbone and wrap it here"
        )


@torch.no_grad()
def average_gradients(parameters: Iterable[torch.Tensor], group: dist.ProcessGroup | None = None) -> None:
    """Averages the gradients of parameters that live outside the wrapped network, such as a trainable shift's, over the
    processes; after ``objective.backward`` and before the optimizer's step. Parameters that need none are passed over.

    A missing gradient counts as zero, so that all processes exchange the same things.
    """
    for parameter in parameters:
        if not parameter.requires_grad:
            continue
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        dist.all_reduce(parameter.grad, group=group)
        parameter.grad /= dist.get_world_size(group)


def reshard(network: nn.Module) -> None:
    """Lets go of the whole parameters that a forward without backward has left in a sharded ``network``; before and
    after its parts are written to."""
    from torch.distributed.fsdp import FSDPModule

    for module in network.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def prime(velocities: Velocities, x: torch.Tensor, condition: Condition) -> None:
    """One forward with gradient and its backward through the generator, whose gradients are dropped: what a wrapper
    settles in its first forward is settled for training, however the first step begins.

    Args:
        x: ``[B, ...]`` of the run's shape, such as zeros; condition: of as many samples. Random states and gradients
            are as before afterwards.
    """
    devices = [x.device] if x.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), torch.enable_grad():
        velocity = velocities.generator(x, torch.full((x.shape[0],), 0.5, device=x.device), condition)
        (velocity.float() * 0).sum().backward()
    generator: Any = velocities.generator
    for parameter in generator.parameters():
        parameter.grad = None


@torch.no_grad()
def clip_grad_norm_(parameters: Iterable[nn.Parameter], limit: float) -> torch.Tensor:
    """Scales the gradients of all ``parameters`` down to the norm ``limit``, those sharded over the processes and plain
    ones as one vector, and returns their norm before: a plain 0-d tensor, the same in every process.

    Gradients of plain parameters must be equal in all processes already (:func:`average_gradients`).
    """
    parameters = list(parameters)
    sharded = [p for p in parameters if is_sharded(p)]
    if not sharded:
        return torch.nn.utils.clip_grad_norm_(parameters, limit).detach()
    plain = [p for p in parameters if not is_sharded(p)]
    norms = [
        whole(torch.nn.utils.get_total_norm([p.grad for p in kind if p.grad is not None])) for kind in (sharded, plain)
    ]
    norm = torch.linalg.vector_norm(torch.stack([value.to(norms[0].device) for value in norms]))
    for kind in (sharded, plain):
        if kind:
            torch.nn.utils.clip_grads_with_norm_(kind, limit, norm)
    return norm
