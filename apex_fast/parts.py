"""Tensors of which each process holds a part (DTensors, as FSDP2 makes them), and their way to whole tensors and back.

Checkpoints and exports hold whole tensors, so that they do not depend on the number of processes: :func:`whole` gathers
one, :func:`placed` takes this process's rows of one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn


def class_name(module: nn.Module) -> str:
    """The name of a network's own class, without the one that FSDP2 puts in front of it."""
    kinds = type(module).__mro__
    # A sharded module's class is made of torch's FSDPModule and its own, in this order.
    return kinds[2 if hasattr(module, "set_requires_gradient_sync") else 0].__name__


def is_sharded(tensor: object) -> bool:
    """Whether ``tensor`` is a DTensor, of which this process holds a part."""
    return hasattr(tensor, "full_tensor")


@torch.no_grad()
def whole(tensor: torch.Tensor) -> torch.Tensor:
    """``tensor`` with the parts of all processes, detached; a plain tensor as it is. All processes call it together."""
    tensor = tensor.detach()
    return tensor.full_tensor() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


@torch.no_grad()
def placed(saved: Any, own: Any) -> Any:
    """The tree ``saved``, whose tensors are whole, with this process's part of each tensor that is sharded in ``own``.

    ``own`` has the same mappings with the same keys; where it holds plain tensors or none, ``saved`` stays as it is.
    ValueError for a tensor of another shape.
    """
    if isinstance(saved, Mapping) and isinstance(own, Mapping):
        return {key: placed(value, own[key]) if key in own else value for key, value in saved.items()}
    if not isinstance(saved, torch.Tensor) or not is_sharded(own) or is_sharded(saved):
        return saved
    if saved.shape != own.shape:
        raise ValueError(f"a tensor of {list(saved.shape)} was saved where {list(own.shape)} is needed")
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    shape, offset = compute_local_shape_and_global_offset(own.shape, own.device_mesh, own.placements)
    part = saved[tuple(slice(start, start + length) for start, length in zip(offset, shape, strict=True))]
    # A copy of this process's rows alone: the file behind ``saved`` may be mapped, and larger than memory.
    local = part.to(own.to_local().device, copy=True).contiguous()
    return DTensor.from_local(
        local, own.device_mesh, own.placements, run_check=False, shape=own.shape, stride=own.stride()
    )


@torch.no_grad()
def placed_optimizer_state(saved: Mapping[str, Any], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """``saved``, an optimizer's ``state_dict`` with whole tensors, as ``optimizer.load_state_dict`` takes it here: what
    has the shape of a sharded parameter (AdamW's moments) is cut like that parameter."""
    groups = zip(saved["param_groups"], optimizer.param_groups, strict=False)
    parameters = {
        number: parameter
        for there, here in groups
        for number, parameter in zip(there["params"], here["params"], strict=False)
    }
    state = {}
    for number, values in saved["state"].items():
        parameter = parameters.get(number)
        shape = None if parameter is None else parameter.shape
        alike = {name for name, value in values.items() if getattr(value, "shape", None) == shape}
        state[number] = {name: placed(v, parameter) if name in alike else v for name, v in values.items()}
    return {**saved, "state": state}
