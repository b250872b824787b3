"""Training batches: real epochs in a reproducible order that can be entered anywhere, and text encoded once where that
is possible."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from apex_fast.condition import Condition, condition_tensors


class EpochOrder:
    """The order of ``length`` samples over endless epochs: every epoch holds each sample once, shuffled by (seed,
    epoch).

    Positions count samples from the start of training, so a batch may straddle two epochs and a run can go on from any
    number.
    """

    def __init__(self, length: int, seed: int) -> None:
        if length < 1:
            raise ValueError(f"EpochOrder: the data set holds no samples (length {length})")
        self.length, self.seed = length, seed
        self._epoch, self._order = -1, torch.empty(0, dtype=torch.int64)

    def _permutation(self, epoch: int) -> Tensor:
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed((self.seed * 1_000_003 + epoch) % (1 << 63))
            self._epoch, self._order = epoch, torch.randperm(self.length, generator=generator)
        return self._order

    def take(self, position: int, count: int) -> Tensor:
        """Indices [count] of the samples at ``position`` and after."""
        parts = []
        while count > 0:
            epoch, offset = divmod(position, self.length)
            part = self._permutation(epoch)[offset : offset + count]
            parts.append(part)
            position, count = position + len(part), count - len(part)
        return torch.cat(parts) if parts else torch.empty(0, dtype=torch.int64)


@dataclass(frozen=True)
class TextImages:
    """A data set: images [N, ...] and a function that draws prompts for chosen samples.

    ``vocabulary``: all prompts there can be, if they are few enough to encode once; else None.
    """

    images: Tensor
    prompts: Callable[[Tensor, torch.Generator], list[str]]
    vocabulary: list[str] | None = None

    def __len__(self) -> int:
        return len(self.images)


def load_digits() -> TextImages:
    """The training split of the scanned digits."""
    from apex_fast.data.digits import Digits, all_prompts, prompts_for

    digits = Digits.load("train")
    return TextImages(
        digits.images, lambda chosen, generator: prompts_for(digits.labels[chosen], generator), all_prompts()
    )


class PromptTable:
    """Conditions of prompts that are known before the run, each encoded once.

    It is kept on ``device`` up to ``TABLE_ON_DEVICE`` bytes, else on the CPU, from where rows are fetched.
    """

    def __init__(self, encode: Callable[[list[str]], Condition], prompts: Iterable[str], device: torch.device) -> None:
        unique = list(dict.fromkeys(prompts))
        self._rows = {prompt: i for i, prompt in enumerate(unique)}
        self.device, condition = device, encode(unique)
        self.bytes = sum(part.numel() * part.element_size() for part in condition_tensors(condition))
        self.condition = condition.to(device if self.bytes <= TABLE_ON_DEVICE else torch.device("cpu"))

    def holds(self, prompts: Iterable[str]) -> bool:
        """Whether all ``prompts`` are in the table."""
        return all(prompt in self._rows for prompt in prompts)

    def __call__(self, prompts: list[str]) -> Condition:
        """The condition of ``prompts`` on the device. KeyError for one that is not in the table."""
        rows = torch.tensor([self._rows[p] for p in prompts], device=self.condition.device)
        return self.condition.index(rows).to(self.device)


TABLE_ON_DEVICE = 256 << 20
"""Bytes of embeddings up to which they are kept on the device of the run."""


class Batches:
    """Batches of (images, condition) for a trainer: order, prompts and position in one place.

    encode: prompts -> Condition. empty_share: share of prompts replaced by the empty one. cached: the text encoder is
        frozen and the data set has a vocabulary, so each prompt is encoded once. table: prompts that are encoded
        already.
    """

    def __init__(
        self,
        data: TextImages,
        encode: Callable[[list[str]], Condition],
        *,
        batch_size: int,
        seed: int,
        device: torch.device,
        cached: bool,
        empty_share: float = 0.0,
        table: PromptTable | None = None,
    ) -> None:
        self.data, self.encode, self.batch_size, self.device = data, encode, batch_size, device
        self.order = EpochOrder(len(data), seed)
        self.position, self.empty_share = 0, empty_share
        self.generator = torch.Generator().manual_seed(seed)
        self.table = table
        if table is None and cached and data.vocabulary is not None:
            self.table = PromptTable(encode, [*data.vocabulary, ""], device)

    def next(self) -> tuple[Tensor, Condition]:
        """Images [B, ...] on the device and the condition of a prompt drawn for each."""
        chosen = self.order.take(self.position, self.batch_size)
        self.position += self.batch_size
        prompts = self.data.prompts(chosen, self.generator)
        if self.empty_share > 0:
            dropped = torch.rand(len(prompts), generator=self.generator) < self.empty_share
            prompts = ["" if drop else prompt for prompt, drop in zip(prompts, dropped.tolist(), strict=True)]
        images = self.data.images[chosen].to(self.device)
        if self.table is not None and self.table.holds(prompts):
            return images, self.table(prompts)
        return images, self.encode(prompts)

    @property
    def epoch(self) -> float:
        """Epochs done, as a fraction."""
        return self.position / len(self.data)
