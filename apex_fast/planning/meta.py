"""What an accelerator does to memory and the meta device does not: fused operations, and autocast."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

_LOWERED = {
    F.linear,
    F.bilinear,
    F.conv1d,
    F.conv2d,
    F.conv3d,
    torch.conv1d,
    torch.conv2d,
    torch.conv3d,
    torch.matmul,
    torch.Tensor.matmul,
    torch.Tensor.__matmul__,
    torch.bmm,
    torch.Tensor.bmm,
    torch.mm,
    torch.Tensor.mm,
    torch.addmm,
    torch.baddbmm,
    torch.einsum,
    F.scaled_dot_product_attention,
}
_RAISED = {
    F.layer_norm,
    F.group_norm,
    F.softmax,
    torch.softmax,
    torch.Tensor.softmax,
    F.mse_loss,
    torch.layer_norm,
    torch.exp,
    torch.Tensor.exp,
    torch.pow,
    torch.Tensor.pow,
    torch.Tensor.__pow__,
    torch.rsqrt,
    torch.Tensor.rsqrt,
    torch.norm,
    torch.Tensor.norm,
    torch.sum,
    torch.Tensor.sum,
    torch.cumsum,
    torch.Tensor.cumsum,
}


class AcceleratorOnMeta(TorchFunctionMode):
    """Within this context meta tensors are treated as CUDA treats its own.

    Attention, RMS norm and dropout take the fused kernels, where the meta device would write out every intermediate
    (the matrix of attention weights among them).
    ``torch.autocast("cpu", ...)``, which knows nothing of meta tensors, casts them as CUDA's autocast does.
    Other tensors are left alone.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.Tensor.backward and not any((*args[1:], *kwargs.values())):
            # While torch handles a function for a mode, that mode is off, and checkpointed blocks are recomputed in
            # there. A graph edge is no tensor, so this call is not handed to a mode again.
            edge = torch.autograd.graph.get_gradient_edge(args[0])
            with self:
                return torch.autograd.backward(edge)
        if func in (torch.tensor, torch.as_tensor) and args and not isinstance(args[0], Tensor):
            made = func(*args, **kwargs)
            # Made from numbers, which LiveBytes sees only if the tensor comes from the CPU.
            return func(*args, **{**kwargs, "device": "cpu"}).to("meta") if made.is_meta else made
        if func in _LOWERED and _first_is_meta(args, kwargs):
            if torch.is_autocast_enabled("cpu"):
                args, kwargs = _cast(args, kwargs, torch.get_autocast_dtype("cpu"))
            if func is F.scaled_dot_product_attention:
                return _fused_attention(*args, **kwargs)
        elif func is F.rms_norm and _first_is_meta(args, kwargs):
            return _rms_norm(*args, **kwargs)
        elif func is F.dropout and _first_is_meta(args, kwargs):
            return _dropout(*args, **kwargs)
        elif func in _RAISED and torch.is_autocast_enabled("cpu") and _first_is_meta(args, kwargs):
            args, kwargs = _cast(args, kwargs, torch.float32)
        return func(*args, **kwargs)


def _first_is_meta(args: Any, kwargs: dict[str, Any]) -> bool:
    # einsum's first argument is its equation
    found = next((a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)), None)
    return found is not None and found.is_meta


def _cast(args: Any, kwargs: dict[str, Any], dtype: torch.dtype) -> tuple[Any, dict[str, Any]]:
    def cast(value: Any) -> Any:
        if isinstance(value, Tensor) and value.is_meta and value.is_floating_point() and value.dtype != torch.float64:
            return value.to(dtype)
        return value

    return tuple(map(cast, args)), {name: cast(value) for name, value in kwargs.items()}


def _fused_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    if enable_gqa and key.shape[-3] != query.shape[-3]:
        groups = query.shape[-3] // key.shape[-3]
        key, value = key.repeat_interleave(groups, -3), value.repeat_interleave(groups, -3)
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        # as torch does ahead of its fused kernels: 0 where attended, -inf elsewhere
        attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill_(attn_mask.logical_not(), -torch.inf)
    shape = query.shape[:-1] + value.shape[-1:]
    if query.dim() == 3:
        query, key, value = query.unsqueeze(0), key.unsqueeze(0), value.unsqueeze(0)
    out = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, 0.0, is_causal, attn_mask=attn_mask, scale=scale
    )[0]
    return out.reshape(shape)


def _rms_norm(input: Tensor, normalized_shape: Any, weight: Tensor | None = None, eps: float | None = None) -> Tensor:
    return _FusedRMSNorm.apply(input, weight, len(normalized_shape))


class _FusedRMSNorm(torch.autograd.Function):
    """Shapes of the fused kernel: one fp32 number per row is kept beside the input."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, axes: int) -> Tensor:
        rows = x.new_empty(x.shape[: x.dim() - axes], dtype=torch.float32)
        ctx.save_for_backward(x, weight, rows)
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None]:
        x, weight, _ = ctx.saved_tensors
        wanted = weight is not None and ctx.needs_input_grad[1]
        return torch.empty_like(x), torch.empty_like(weight) if wanted else None, None


def _dropout(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    return torch.native_dropout(input, p, True)[0] if training and p > 0 else input
