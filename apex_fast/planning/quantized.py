"""A base in fewer bits on the meta device."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

_BLOCK = 64  # weights that share one scale in NF4


def quantize(transformer: nn.Module, kind: str) -> None:
    """Gives every linear layer of a frozen meta ``transformer`` weights of 8 or 4 bits.

    The layers stand in for those of torchao (``"int8"``: a byte a weight, scale and zero point for every row) and
    bitsandbytes (``"nf4"``: 4 bits a weight and an fp32 scale for every 64), which need not be installed. Both compute
    with the weight in the dtype of the samples; torchao's is kept for the backward, that of bitsandbytes made again.
    """
    stand_in = {"int8": EightBitLinear, "nf4": FourBitLinear}[kind]
    for name, layer in list(transformer.named_modules()):
        if type(layer) is nn.Linear:
            parent, _, leaf = name.rpartition(".")
            setattr(transformer.get_submodule(parent), leaf, stand_in(layer))


def numel(weight: Tensor) -> int:
    """Numbers that a parameter stands for, packed or not."""
    return weight.numel() * 2 if getattr(weight, "packed_four_bit", False) else weight.numel()


class EightBitLinear(nn.Linear):
    """The memory of a torchao int8 layer, weights only; on the meta device only."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__(layer.in_features, layer.out_features, bias=False, device="meta")
        shape = (layer.out_features, layer.in_features)
        self.weight = nn.Parameter(torch.empty(shape, dtype=torch.int8, device="meta"), requires_grad=False)
        self.bias = layer.bias
        self.register_buffer("scales", torch.empty(shape[0], 1, device="meta"), persistent=False)
        self.register_buffer("zero_points", torch.empty(shape[0], 1, dtype=torch.int8, device="meta"), persistent=False)

    def forward(self, input: Tensor) -> Tensor:
        weight = input.new_empty(self.out_features, self.in_features)
        return nn.functional.linear(input, weight, None if self.bias is None else self.bias.to(input.dtype))


class FourBitLinear(nn.Linear):
    """The memory of a bitsandbytes NF4 layer; on the meta device only, for it has no values to compute with."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__(layer.in_features, layer.out_features, bias=False, device="meta")
        count = layer.weight.numel()
        packed = torch.empty((count + 1) // 2, 1, dtype=torch.uint8, device="meta")
        self.weight = nn.Parameter(packed, requires_grad=False)
        self.weight.packed_four_bit = True  # type: ignore[attr-defined]
        self.bias = layer.bias
        scales = torch.empty((count + _BLOCK - 1) // _BLOCK, dtype=torch.float32, device="meta")
        self.register_buffer("scales", scales, persistent=False)

    def forward(self, input: Tensor) -> Tensor:
        return _FourBitProduct.apply(input, self.bias, self.in_features, self.out_features)


class _FourBitProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, columns: int, rows: int) -> Tensor:
        ctx.shape = (rows, columns)
        return nn.functional.linear(x, x.new_empty(rows, columns), None if bias is None else bias.to(x.dtype))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return grad @ grad.new_empty(ctx.shape), None, None, None
