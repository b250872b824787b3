"""Fused ops inside unmodified networks, for as long as a context lasts::

    with fusion.fused(backbone, objective.shift):
        objective.backward(backbone, x, condition, step=step)

Two parts of a network are touched, and a family gets those that it has:

===================  =============================  =================================================================
part                 families                       what changes
===================  =============================  =================================================================
text path            SANA, Qwen-Image               the shifted condition c_fake is not written: the network gets the
                                                    original one and applies the shift behind its first linear layer
                                                    (SANA) or inside its first norm (Qwen-Image)
velocity head        SANA, Qwen-Image               final norm, modulation and projection keep the hidden state and
                                                    its row statistics for backward, nothing else
===================  =============================  =================================================================

Only ``forward`` of single module instances is replaced: classes, parameters and state-dict keys stay, and the context
takes everything back, after an exception too. Whatever a part cannot do it leaves to the module's own forward: a layer
that an adapter or a quantised class has taken the place of, mixed dtypes, autocast. Modules that carry hooks or a
forward of their own already are not touched. A network that is checkpointed as a whole needs its backward inside the
context too; checkpointed blocks do not.

What it is worth depends on what is trained. The head frees two hidden states per call in full tuning, one under LoRA
with adapters on the embedding of the time, and none without those, where what is left is time. The text path frees
c_fake, and in Qwen-Image's norm its fp32 copies as well; in SANA it costs as much time as it saves. Where an op has no
compiled kernel its plain torch twin runs, which is slower than the network as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import MethodType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from . import ops
from .condition import Condition
from .shift import ConditionShift, ShiftedCondition

if TYPE_CHECKING:
    from .backbones.base import Backbone

TEXT_PATH, HEAD = "text path", "velocity head"

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


@dataclass
class _Modulated:
    """What the final norm hands to the projection in place of its output."""

    hidden: Tensor
    scale: Tensor
    shift: Tensor
    eps: float

    def output(self) -> Tensor:
        return ops.modulated_layer_norm(self.hidden, self.scale, self.shift, self.eps)[0]


class Fusion:
    """What :func:`fused` has put in place, in ``parts``: some of ``"text path"`` and ``"velocity head"``."""

    def __init__(self) -> None:
        self.parts: tuple[str, ...] = ()
        self.active = True
        self.shifted: ShiftedCondition | None = None  # what the running call reads its text under
        self._row_sums: dict[int, tuple[Tensor, int, Tensor]] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> Fusion:
        # A copy of a network that is made inside the context is fused as the network is, and ends with it.
        return self

    @contextmanager
    def instruction(self, condition: Condition) -> Iterator[Condition]:
        """For the length of one call of the network: the condition to give it, the shift applied inside."""
        if not isinstance(condition, ShiftedCondition) or not self.active or TEXT_PATH not in self.parts:
            yield condition.written()
            return
        found, self.shifted = self.shifted, condition
        try:
            yield condition.condition
        finally:
            self.shifted = found

    def row_sums(self, weight: Tensor) -> Tensor:
        """W 1 in fp32; kept for weights that are not trained, which would be read for nothing at every step."""
        dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
        if weight.requires_grad or weight.is_inference() or torch.is_inference_mode_enabled():
            return weight.sum(1, dtype=dtype)
        known = self._row_sums.get(id(weight))
        if known is None or known[0] is not weight or known[1] != weight._version:
            self._row_sums[id(weight)] = known = (weight, weight._version, weight.sum(1, dtype=dtype))
        return known[2]


@contextmanager
def fused(backbone: Backbone | nn.Module, shift: nn.Module | None = None) -> Iterator[Fusion]:
    """Runs the calls of ``backbone`` in its body through the fused ops; results are equal to rounding.

    Args:
        backbone: a SANA or Qwen-Image :class:`~apex_fast.Backbone`, or a DistributedDataParallel around one.
        shift: the :class:`~apex_fast.ConditionShift` of the objective. Inside the context it returns a
            :class:`~apex_fast.shift.ShiftedCondition` for a Condition: the original and the instruction to shift it,
            which this backbone follows without writing the result and which every other network reads as any
            Condition. A diagonal shift does not pass through SANA's linear layer, so there it is applied as ever, and
            so is a shift of another class or at the site "projected". None leaves the text path alone.

    Yields:
        :class:`Fusion`, whose ``parts`` name what was put in place.

    Raises:
        TypeError: no backbone.
        ValueError: a family without fused parts; run it without this context.
        RuntimeError: this backbone or this shift is in such a context already.
    """
    network = backbone.module if isinstance(backbone, nn.parallel.DistributedDataParallel) else backbone
    family = getattr(network, "family", None)
    if not isinstance(network, nn.Module) or family is None:
        raise TypeError(f"fused: expected an apex_fast.Backbone, got {type(backbone).__name__}")
    if family not in _TEXT_PATHS:
        raise ValueError(
            f"fused: no part of a {family} network is fused, only of {', '.join(_TEXT_PATHS)}; run it without this "
            "context"
        )
    if network.fusion is not None or (shift is not None and "forward" in shift.__dict__):
        raise RuntimeError("fused: this backbone or this shift is fused already; leave that context first")

    fusion = Fusion()
    transformer = network.transformer
    replaced: list[nn.Module] = []

    def replace(module: nn.Module, forward: Callable[..., Any]) -> None:
        module.forward = MethodType(forward, module)  # a method, so that a copy of the module has its own
        replaced.append(module)

    name, forward, scalar_only = _TEXT_PATHS[family]
    first = getattr(transformer, name)
    takes_shift = type(shift) is ConditionShift and shift.site == "raw" and not (scalar_only and shift.mode != "scalar")
    parts = []
    if takes_shift and _untouched(first):
        parts.append(TEXT_PATH)
        replace(first, forward(fusion))
        replace(shift, _deferred(fusion))
    if _untouched(transformer.norm_out, transformer.proj_out, transformer.norm_out.norm):
        parts.append(HEAD)
        replace(transformer.norm_out, _NORMS[family](fusion))
        replace(transformer.proj_out, _projection(fusion))
    fusion.parts = tuple(parts)
    network.fusion = fusion
    try:
        yield fusion
    finally:
        network.fusion = None
        fusion.active = False
        for module in replaced:
            del module.forward


def _untouched(*modules: nn.Module) -> bool:
    return not any("forward" in m.__dict__ or any(getattr(m, name, None) for name in _HOOKS) for m in modules)


def _own(module: nn.Module, *args: Any) -> Any:
    return type(module).forward(module, *args)


def _deferred(fusion: Fusion) -> Callable[..., Any]:
    def forward(self: ConditionShift, condition: Tensor | Condition) -> Tensor | Condition:
        if not fusion.active or not isinstance(condition, Condition) or isinstance(condition, ShiftedCondition):
            return _own(self, condition)
        self.check(condition)
        return ShiftedCondition(condition, self)

    return forward


# ---- the text path


def _is_plain(linear: nn.Module, value: Tensor) -> bool:
    """Whether ``linear`` computes ``value W^T + b`` in the dtype of both and nothing else."""
    weight = getattr(linear, "weight", None)
    return (
        type(linear) is nn.Linear
        and value.dtype == weight.dtype
        and not torch.is_autocast_enabled(weight.device.type)
        and not torch.nn.utils.parametrize.is_parametrized(linear)
    )


def _sana_text(fusion: Fusion) -> Callable[..., Tensor]:
    def forward(self: nn.Module, caption: Tensor) -> Tensor:
        shifted = fusion.shifted if fusion.active else None
        if shifted is None:
            return _own(self, caption)
        shift, tokens, linear = shifted.shift, shifted.shifted_tokens(), self.linear_1
        if not _is_plain(linear, caption) or not _untouched(linear):
            return _own(self, ops.condition_shift(caption, shift.scale, shift.bias, mask=tokens))
        _, hidden = ops.projected_condition_shift(
            nn.functional.linear(caption, linear.weight),
            shift.scale,
            shift.bias,
            fusion.row_sums(linear.weight),
            linear_bias=linear.bias,
            mask=tokens,
            output_mask=(False, True),
        )
        return self.linear_2(self.act_1(hidden))

    return forward


def _qwen_text(fusion: Fusion) -> Callable[..., Tensor]:
    def forward(self: nn.Module, hidden: Tensor) -> Tensor:
        shifted = fusion.shifted if fusion.active else None
        if shifted is None:
            return _own(self, hidden)
        shift, tokens = shifted.shift, shifted.shifted_tokens()
        if self.weight is None or self.bias is not None or self.weight.dtype != hidden.dtype:
            return _own(self, ops.condition_shift(hidden, shift.scale, shift.bias, mask=tokens))
        return ops.condition_shift_rms_norm(
            hidden, shift.scale, shift.bias, self.weight, self.eps, mask=tokens, output_mask=(False, True)
        )[1]

    return forward


# the module that reads the text first, its forward, and whether the shift must be two single numbers for it
_TEXT_PATHS: dict[str, tuple[str, Callable[[Fusion], Callable[..., Tensor]], bool]] = {
    "sana": ("caption_projection", _sana_text, True),
    "qwen_image": ("txt_norm", _qwen_text, False),
}


# ---- the velocity head


def _has_no_parameters(norm: nn.Module) -> bool:
    return isinstance(norm, nn.LayerNorm) and norm.weight is None and norm.bias is None


def _sana_norm(fusion: Fusion) -> Callable[..., Any]:
    def forward(self: nn.Module, hidden: Tensor, temb: Tensor, scale_shift_table: Tensor) -> Any:
        if not fusion.active or not _has_no_parameters(self.norm):
            return _own(self, hidden, temb, scale_shift_table)
        shift, scale = (scale_shift_table[None] + temb[:, None].to(scale_shift_table.device)).unbind(1)
        return _Modulated(hidden, scale, shift, self.norm.eps)

    return forward


def _qwen_norm(fusion: Fusion) -> Callable[..., Any]:
    def forward(self: nn.Module, hidden: Tensor, conditioning: Tensor) -> Any:
        if not fusion.active or not _has_no_parameters(self.norm):
            return _own(self, hidden, conditioning)
        scale, shift = self.linear(self.silu(conditioning).to(hidden.dtype)).chunk(2, dim=1)
        return _Modulated(hidden, scale, shift, self.norm.eps)

    return forward


_NORMS: dict[str, Callable[[Fusion], Callable[..., Any]]] = {"sana": _sana_norm, "qwen_image": _qwen_norm}


def _projection(fusion: Fusion) -> Callable[..., Tensor]:
    def forward(self: nn.Module, state: Tensor | _Modulated) -> Tensor:
        if not isinstance(state, _Modulated):
            return _own(self, state)
        if not _is_plain(self, state.hidden):
            return _own(self, state.output())
        return ops.velocity_head(state.hidden, state.scale, state.shift, self.weight, self.bias, state.eps)

    return forward
