"""The condition shift c_fake = A c + b (APEX, arXiv 2604.12322, Eq. 9), and where it is applied.

A shift has a *site*. At ``"raw"`` the text embedding that enters the network is shifted. At ``"projected"`` it is what
the network's own text projection makes of it: the shift hands out a :class:`SitedCondition`, the original condition
with the instruction, and a :class:`~apex_fast.Backbone` follows it by a hook that lives as long as the call. Which site
a network sees is what :func:`apex_fast.probe` measures.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from . import ops
from .condition import Condition

SITES = ("raw", "projected")


class ConditionShift(nn.Module):
    """Turns a condition into the one under which the network learns what the generator makes now (Eq. 9).

    The shift is only useful if the network can see it. A positive scale without bias, ahead of a normalisation, is
    invisible; the default, scale -1 and bias 0.5, turns the embedding around and is seen by every network that reads
    its text.

    Args:
        mode: ``"scalar"``: A and b are one number each; ``"diagonal"``: one number per channel, which needs ``dim``.
        scale: initial A.
        bias: initial b, in the units of the embedding.
        dim: channels D of the embedding (``prompt_embeds.shape[-1]``); only with ``mode="diagonal"``.
        trainable: whether A and b get gradients (they come from L_fake alone).
        train_scale, train_bias: the same one by one; None follows ``trainable``.
        shift_pooled: whether ``pooled_prompt_embeds`` are shifted as well, so that no path of the text into the network
            stays unshifted.
        pooled_dim: channels P of the pooled embedding; needed with ``mode="diagonal"``, ``shift_pooled=True`` and a
            pooled embedding.
        site: ``"raw"``: the text embedding. ``"projected"``: behind the network's own text projection, for backbones
            (``Backbone.text_projection``); b is in the units there, and ``dim`` is ``backbone.site_width(site)``.
            Pooled embeddings have no such place and are shifted raw.

    Raises:
        ValueError: an unknown mode or site, or ``dim`` missing or out of place.
    """

    def __init__(
        self,
        mode: Literal["scalar", "diagonal"] = "scalar",
        scale: float = -1.0,
        bias: float = 0.5,
        dim: int | None = None,
        trainable: bool = False,
        train_scale: bool | None = None,
        train_bias: bool | None = None,
        shift_pooled: bool = True,
        pooled_dim: int | None = None,
        site: Literal["raw", "projected"] = "raw",
    ) -> None:
        super().__init__()
        if site not in SITES:
            raise ValueError(f"ConditionShift: site must be one of {', '.join(SITES)}, got {site!r}")
        if mode not in ("scalar", "diagonal"):
            raise ValueError(f'ConditionShift: mode must be "scalar" or "diagonal", got {mode!r}')
        if mode == "diagonal" and (dim is None or dim < 1):
            raise ValueError(
                'ConditionShift: mode "diagonal" needs dim, the channels of the embedding (prompt_embeds.shape[-1]), '
                f"got {dim}"
            )
        if mode == "scalar" and (dim is not None or pooled_dim is not None):
            raise ValueError(
                'ConditionShift: dim and pooled_dim belong to mode "diagonal"; leave them out for "scalar"'
            )
        self.mode = mode
        self.site = site
        self.shift_pooled = shift_pooled
        train_scale = trainable if train_scale is None else train_scale
        train_bias = trainable if train_bias is None else train_bias

        def parameter(value: float, channels: int | None, train: bool) -> nn.Parameter:
            shape = () if channels is None else (channels,)
            return nn.Parameter(torch.full(shape, float(value), dtype=torch.float32), requires_grad=train)

        self.scale = parameter(scale, dim, train_scale)
        self.bias = parameter(bias, dim, train_bias)
        # In scalar mode one number serves both embeddings; per channel the pooled one has channels of its own.
        own = pooled_dim is not None and shift_pooled
        self.pooled_scale = parameter(scale, pooled_dim, train_scale) if own else None
        self.pooled_bias = parameter(bias, pooled_dim, train_bias) if own else None

    def forward(self, condition: Tensor | Condition) -> Tensor | Condition:
        """Shifts a Tensor ``[..., D]`` into a Tensor, a Condition into a Condition; masked tokens stay as they are.

        At the site "projected" the result is a :class:`SitedCondition`, which only a Backbone can read.

        Raises:
            TypeError: the condition is not floating point, or neither Tensor nor Condition.
            ValueError: the channels do not fit the diagonal, or the shift lives on another device; a Tensor at the site
                "projected".
        """
        if isinstance(condition, Tensor):
            if self.site != "raw":
                raise ValueError(
                    f'ConditionShift: at the site "{self.site}" a network applies the shift itself, and a plain Tensor '
                    "cannot tell it to; pass an apex_fast.Condition"
                )
            return self._shift(condition, self.scale, self.bias, None, "condition")
        if not isinstance(condition, Condition):
            raise TypeError(f"ConditionShift: expected a Tensor or a Condition, got {type(condition).__name__}")
        pooled = condition.pooled_prompt_embeds
        if pooled is not None and self.shift_pooled:
            scale, bias = self.scale, self.bias
            if self.mode == "diagonal":
                if self.pooled_scale is None or self.pooled_bias is None:
                    raise ValueError(
                        "ConditionShift: a diagonal shift needs pooled_dim to shift pooled_prompt_embeds "
                        f"(here {pooled.shape[-1]}); shift_pooled=False leaves them as they are"
                    )
                scale, bias = self.pooled_scale, self.pooled_bias
            pooled = self._shift(pooled, scale, bias, None, "pooled_prompt_embeds")
        embeds, mask = condition.prompt_embeds, condition.prompt_embeds_mask
        if self.site != "raw":
            return SitedCondition(Condition(embeds, mask, pooled), self)
        return Condition(self._shift(embeds, self.scale, self.bias, mask, "prompt_embeds"), mask, pooled)

    def check(self, condition: Condition) -> None:
        """Raises what shifting the embeddings of ``condition`` would raise, without shifting them."""
        self._check(condition.prompt_embeds, self.scale, "prompt_embeds")

    def _check(self, values: Tensor, scale: Tensor, name: str) -> None:
        if not values.is_floating_point():
            raise TypeError(
                f"ConditionShift: {name} must be floating point, got {values.dtype}; shift embeddings, not labels or "
                "token ids"
            )
        if scale.device != values.device:
            raise ValueError(
                f"ConditionShift: the shift is on {scale.device} but {name} on {values.device}; move it once: "
                f'shift.to("{values.device}")'
            )
        if scale.dim() and values.shape[-1] != scale.shape[0]:
            raise ValueError(
                f"ConditionShift: {name} has {values.shape[-1]} channels but the diagonal was made for {scale.shape[0]}"
            )

    def _shift(self, values: Tensor, scale: Tensor, bias: Tensor, mask: Tensor | None, name: str) -> Tensor:
        self._check(values, scale, name)
        return ops.condition_shift(values, scale, bias, mask=mask)

    def extra_repr(self) -> str:
        def text(value: Tensor) -> str:
            return f"{value.item():g}" if value.dim() == 0 else f"[{value.numel()}]"

        return (
            f"mode={self.mode}, scale={text(self.scale)}, bias={text(self.bias)}, site={self.site}, "
            f"shift_pooled={self.shift_pooled}"
        )


class _Instruction(Condition):
    """An original condition and a shift that is not applied yet.

    Args:
        condition: the original.
        shift: what is to be applied.
        tokens: ``[B, L]`` bool, the tokens that are shifted; None is the condition's mask, or every token without one.
    """

    def __init__(self, condition: Condition, shift: ConditionShift, tokens: Tensor | None = None) -> None:
        # a frozen dataclass, whose fields are properties here
        for name, value in (("condition", condition), ("shift", shift), ("tokens", tokens)):
            object.__setattr__(self, name, value)

    def shifted_tokens(self) -> Tensor | None:
        """``[B, L]``, nonzero where a token is shifted; None stands for all."""
        return self.condition.prompt_embeds_mask if self.tokens is None else self.tokens

    @property
    def prompt_embeds_mask(self) -> Tensor | None:  # type: ignore[override]
        return self.condition.prompt_embeds_mask

    def __len__(self) -> int:
        return len(self.condition)

    @property
    def device(self) -> torch.device:
        return self.condition.device

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.condition!r}, {self.shift!r})"

    def _instruct(self, conditions: Sequence[Condition]) -> _Instruction:
        """The instruction for all rows of ``conditions``, of which those that are no instruction stay unshifted."""
        joined = Condition.cat([c.condition if isinstance(c, _Instruction) else c for c in conditions])
        length = joined.prompt_embeds.shape[1]
        rows = []
        for c in conditions:
            original = c.condition if isinstance(c, _Instruction) else c
            batch, tokens = original.prompt_embeds.shape[:2]
            row = torch.zeros(batch, length, dtype=torch.bool, device=original.device)
            if isinstance(c, _Instruction):
                kept = c.shifted_tokens()
                row[:, :tokens] = True if kept is None else kept.ne(0)
            rows.append(row)
        return type(self)(joined, self.shift, torch.cat(rows))


class ShiftedCondition(_Instruction):
    """``shift(condition)`` that is not in memory yet: the original condition, and the shift as an instruction.

    A network that applies the shift inside its own text path takes ``condition``, ``shift`` and :meth:`shifted_tokens`;
    for any other it is a Condition like all, whose embeddings are computed when they are read, each time anew, so that
    a recomputation in backward finds what its forward found. :func:`apex_fast.fusion.fused` makes them.
    """

    def written(self) -> Condition:
        """The shifted condition, computed."""
        if self.tokens is None:
            return type(self.shift).forward(self.shift, self.condition)
        embeds = ops.condition_shift(self.condition.prompt_embeds, self.shift.scale, self.shift.bias, mask=self.tokens)
        return Condition(embeds, self.condition.prompt_embeds_mask)

    @property
    def prompt_embeds(self) -> Tensor:  # type: ignore[override]
        return self.written().prompt_embeds

    @property
    def pooled_prompt_embeds(self) -> Tensor | None:  # type: ignore[override]
        return None if self.condition.pooled_prompt_embeds is None else self.written().pooled_prompt_embeds

    def _join(self, conditions: Sequence[Condition]) -> Condition | None:
        shifts = {id(c.shift) for c in conditions if isinstance(c, ShiftedCondition)}
        pooled = any((c.condition if isinstance(c, ShiftedCondition) else c).pooled_prompt_embeds is not None
                     for c in conditions)  # fmt: skip
        if len(shifts) > 1 or pooled:
            return Condition.cat([c.written() for c in conditions])
        return self._instruct(conditions)


class SitedCondition(_Instruction):
    """A condition that a Backbone shifts behind its own text projection (site "projected").

    Its ``condition`` holds the text embeddings as they were and the pooled ones shifted already. The shifted tokens
    exist in the network alone, so reading ``prompt_embeds`` is an error: a network that does not know of sites would
    otherwise answer under the unshifted condition.
    """

    @property
    def prompt_embeds(self) -> Tensor:  # type: ignore[override]
        raise TypeError(
            f'the condition shift has the site "{self.shift.site}", which an apex_fast.Backbone applies inside the '
            'network; there is no shifted embedding to read. For another network use ConditionShift(site="raw")'
        )

    def written(self) -> Condition:
        """TypeError, as reading ``prompt_embeds``."""
        return Condition(self.prompt_embeds)

    @property
    def pooled_prompt_embeds(self) -> Tensor | None:  # type: ignore[override]
        return self.condition.pooled_prompt_embeds

    def _map(self, embeddings: Callable[[Tensor], Tensor], mask: Callable[[Tensor], Tensor]) -> SitedCondition:
        tokens = None if self.tokens is None else mask(self.tokens)
        return SitedCondition(self.condition._map(embeddings, mask), self.shift, tokens)

    def _join(self, conditions: Sequence[Condition]) -> Condition:
        others = [c for c in conditions if isinstance(c, _Instruction)]
        if any(not isinstance(c, SitedCondition) or c.shift is not self.shift for c in others):
            raise ValueError("one call of a network can follow one condition shift, and these conditions carry several")
        return self._instruct(conditions)
