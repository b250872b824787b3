"""What a network is conditioned on: text embeddings with their padding mask, or a plain tensor.

The objective and the sampler accept both. A plain Tensor reaches the velocity callable as a Tensor, a
:class:`Condition` as a :class:`Condition`; the functions at the end of this file are how the library handles either
without asking which it has.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Condition:
    """Text embeddings as diffusers pipelines name them.

    Args:
        prompt_embeds: ``[B, L, D]``, floating point: one embedding per token.
        prompt_embeds_mask: ``[B, L]``, bool or integer, nonzero = keep. None means that every token counts.
        pooled_prompt_embeds: ``[B, P]``, floating point: one embedding per prompt, for networks that take one (SD3,
            Flux).

    Raises:
        TypeError: a field is not a tensor or has the wrong kind of dtype.
        ValueError: the shapes do not fit each other.
    """

    prompt_embeds: Tensor
    prompt_embeds_mask: Tensor | None = None
    pooled_prompt_embeds: Tensor | None = None

    def __post_init__(self) -> None:
        embeds, mask, pooled = self.prompt_embeds, self.prompt_embeds_mask, self.pooled_prompt_embeds
        if not isinstance(embeds, Tensor) or not embeds.is_floating_point():
            raise TypeError(f"Condition: prompt_embeds must be a floating-point tensor, got {_kind(embeds)}")
        if embeds.dim() != 3:
            raise ValueError(
                f"Condition: prompt_embeds must be [batch, tokens, channels], got {list(embeds.shape)}; "
                "pass a plain tensor as the condition if it has no token axis"
            )
        if mask is not None:
            if not isinstance(mask, Tensor) or mask.is_floating_point() or mask.is_complex():
                raise TypeError(
                    "Condition: prompt_embeds_mask must be a bool or integer tensor (nonzero = keep), "
                    f"got {_kind(mask)}"
                )
            if mask.shape != embeds.shape[:2]:
                raise ValueError(
                    f"Condition: prompt_embeds_mask must be [batch, tokens] = {list(embeds.shape[:2])}, "
                    f"got {list(mask.shape)}"
                )
        if pooled is not None:
            if not isinstance(pooled, Tensor) or not pooled.is_floating_point():
                raise TypeError(f"Condition: pooled_prompt_embeds must be a floating-point tensor, got {_kind(pooled)}")
            if pooled.dim() != 2 or pooled.shape[0] != embeds.shape[0]:
                raise ValueError(
                    f"Condition: pooled_prompt_embeds must be [batch, channels] with batch {embeds.shape[0]}, "
                    f"got {list(pooled.shape)}"
                )

    def __len__(self) -> int:
        return self.prompt_embeds.shape[0]

    @property
    def batch_size(self) -> int:
        """Number of prompts, B."""
        return len(self)

    @property
    def device(self) -> torch.device:
        """Where the embeddings live."""
        return self.prompt_embeds.device

    def written(self) -> Condition:
        """The condition with its embeddings in memory: itself.

        Under :func:`apex_fast.fusion.fused` a shift hands out conditions that are not written yet; a network that reads
        their embeddings more than once asks for this first.
        """
        return self

    def _join(self, conditions: Sequence[Condition]) -> Condition | None:
        """For subclasses: the conditions joined in a way of their own, or None."""
        return None

    def _map(self, embeddings: Callable[[Tensor], Tensor], mask: Callable[[Tensor], Tensor]) -> Condition:
        return Condition(
            embeddings(self.prompt_embeds),
            None if self.prompt_embeds_mask is None else mask(self.prompt_embeds_mask),
            None if self.pooled_prompt_embeds is None else embeddings(self.pooled_prompt_embeds),
        )

    def to(
        self,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        *,
        non_blocking: bool = False,
    ) -> Condition:
        """The same condition on ``device``, its embeddings in ``dtype`` (``to(torch.bfloat16)`` works too).

        The mask keeps its dtype.
        """
        if isinstance(device, torch.dtype):
            device, dtype = None, device
        return self._map(
            lambda embeds: embeds.to(device=device, dtype=dtype, non_blocking=non_blocking),
            lambda mask: mask.to(device=device, non_blocking=non_blocking),
        )

    def index(self, index: Tensor | slice | Sequence[int]) -> Condition:
        """The prompts that ``index`` picks: a slice, a list or a tensor of positions, or a bool tensor ``[B]``."""
        if isinstance(index, int):
            raise TypeError(f"Condition.index keeps the batch axis: pass a slice or a list, such as [{index}]")
        picked = index if isinstance(index, Tensor | slice) else list(index)
        return self._map(lambda embeds: embeds[picked], lambda mask: mask[picked])

    def detach(self) -> Condition:
        """The same values without their autograd history."""
        return self._map(Tensor.detach, Tensor.detach)

    @staticmethod
    def cat(conditions: Sequence[Condition]) -> Condition:
        """Joins conditions along the batch axis.

        Where token lengths differ the shorter ones are padded at the end with zeros that the mask leaves out; a missing
        mask counts as "keep every token" and is made where another condition has one or padding was needed.

        Raises:
            ValueError: nothing to join, different channel counts, or ``pooled_prompt_embeds`` in some but not in
                others.
        """
        if not conditions:
            raise ValueError("Condition.cat needs at least one condition")
        for condition in conditions:
            joined = condition._join(conditions)
            if joined is not None:
                return joined
        channels = [list(c.prompt_embeds.shape[2:]) for c in conditions]
        if any(shape != channels[0] for shape in channels):
            raise ValueError(
                f"Condition.cat: prompt_embeds must agree in channels, got {[shape[0] for shape in channels]}"
            )
        pooled = [c.pooled_prompt_embeds for c in conditions]
        if any((p is None) != (pooled[0] is None) for p in pooled):
            raise ValueError(
                "Condition.cat: either all or none of the conditions must have pooled_prompt_embeds, "
                f"got {['missing' if p is None else 'present' for p in pooled]}"
            )
        lengths = [c.prompt_embeds.shape[1] for c in conditions]
        length = max(lengths)
        given = [c.prompt_embeds_mask for c in conditions]
        mask = None
        if any(m is not None for m in given) or any(n != length for n in lengths):
            # bool only if nobody brought integers: a network that multiplies by its mask must get numbers back
            integer = [m.dtype for m in given if m is not None and m.dtype != torch.bool]
            dtype = integer[0] if integer else torch.bool
            rows = []
            for condition, m in zip(conditions, given, strict=True):
                kept = condition.prompt_embeds.new_ones(condition.prompt_embeds.shape[:2], dtype=dtype)
                rows.append(_pad_tokens(kept if m is None else m.to(dtype), length))
            mask = torch.cat(rows)
        return Condition(
            torch.cat([_pad_tokens(c.prompt_embeds, length) for c in conditions]),
            mask,
            None if pooled[0] is None else torch.cat([p for p in pooled if p is not None]),
        )


def _kind(value: object) -> str:
    return f"a tensor of {value.dtype}" if isinstance(value, Tensor) else type(value).__name__


def _pad_tokens(values: Tensor, length: int) -> Tensor:
    missing = length - values.shape[1]
    if missing == 0:
        return values
    return torch.cat([values, values.new_zeros(values.shape[0], missing, *values.shape[2:])], dim=1)


# ---- "Tensor or Condition": what the objective and the sampler need of either


def condition_tensors(condition: Tensor | Condition) -> list[Tensor]:
    """The tensors that a condition holds; the first has the batch axis that all share.

    Raises:
        TypeError: ``condition`` is neither a Tensor nor a Condition.
    """
    if isinstance(condition, Tensor):
        return [condition]
    if isinstance(condition, Condition):
        parts = (condition.prompt_embeds, condition.prompt_embeds_mask, condition.pooled_prompt_embeds)
        return [part for part in parts if part is not None]
    raise TypeError(f"a condition must be a Tensor or an apex_fast.Condition, got {type(condition).__name__}")


def batch_size(condition: Tensor | Condition) -> int:
    """B of a condition."""
    first = condition_tensors(condition)[0]
    if first.dim() == 0:
        raise ValueError("a condition needs a batch axis, got a 0-d tensor")
    return first.shape[0]


def concatenate(conditions: Sequence[Tensor | Condition]) -> Tensor | Condition:
    """Joins conditions of one kind along the batch axis.

    Conditions are padded to a common length, plain tensors must agree in shape.

    Raises:
        TypeError: Tensors and Conditions are mixed.
        ValueError: plain tensors whose shapes differ beyond the batch axis.
    """
    if all(isinstance(c, Condition) for c in conditions):
        return Condition.cat(conditions)  # type: ignore[arg-type]
    if not all(isinstance(c, Tensor) for c in conditions):
        raise TypeError(
            "conditions of one call must all be Tensors or all Conditions, "
            f"got {[type(c).__name__ for c in conditions]}"
        )
    shapes = [list(c.shape[1:]) for c in conditions]  # type: ignore[union-attr]
    if any(shape != shapes[0] for shape in shapes):
        raise ValueError(
            f"plain tensor conditions must agree in shape beyond the batch axis to share one call, got {shapes}; "
            "apex_fast.Condition pads token lengths"
        )
    return torch.cat(list(conditions))  # type: ignore[arg-type]


def expand_batch(condition: Tensor | Condition, batch: int, name: str = "condition") -> Tensor | Condition:
    """``condition`` for ``batch`` samples: as it is if it has that many, repeated if it has one.

    Raises:
        ValueError: any other batch size.
    """
    size = batch_size(condition)
    if size == batch:
        return condition
    if size != 1:
        raise ValueError(f"{name} must have batch size {batch} (or 1, to be repeated), got {size}")
    if isinstance(condition, Condition):
        return condition._map(
            lambda embeds: embeds.expand(batch, *embeds.shape[1:]), lambda mask: mask.expand(batch, -1)
        )
    return condition.expand(batch, *condition.shape[1:])
