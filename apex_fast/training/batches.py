"""Training batches: true epochs in a reproducible order that can be entered anywhere, and text encoded once where that
is possible.

A batch holds samples of one size, a *bucket*. Every bucket is an endless stream of its own epochs: in each of them
every sample of the bucket stands exactly once, shuffled by (seed, epoch, bucket). Batches are cut from that stream, so
what does not fill a batch at the end of an epoch is the beginning of the bucket's first batch in the next one: it comes
later, and nothing is dropped or comes twice. In epoch e of the run a bucket gives as many whole batches as its epochs
up to e fill, and the batches of all buckets follow one another in an order shuffled by (seed, e). So after e epochs
every sample was seen e times, except for fewer than one batch in each bucket, which were seen e - 1 times and come
next. (A bucket of fewer samples than a batch gives none in some epochs, and then a batch in which its samples repeat:
:meth:`Batches.warnings` says so.)

With several processes all of this is about the *global* batch, the samples of all of them: each process works out the
same one, draws the prompts for all of it, and takes its own rows. A run therefore sees the same over any number of
processes with the same global batch, and can go on with another number.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Protocol

import torch
from torch import Tensor

from apex_fast.command import command_name
from apex_fast.condition import Condition, condition_tensors
from apex_fast.training.settings import SettingsError


class EpochOrder:
    """The order of ``length`` samples over endless epochs: every epoch holds each sample once, shuffled by (seed,
    epoch).

    Positions count samples from the start of training, so a batch may straddle two epochs and a run can go on from any
    number. stream: tells the orders of several buckets of one run apart.
    """

    def __init__(self, length: int, seed: int, stream: int = 0) -> None:
        if length < 1:
            raise ValueError(f"EpochOrder: the data set holds no samples (length {length})")
        self.length, self.seed, self.stream = length, seed, stream
        self._epoch, self._order = -1, torch.empty(0, dtype=torch.int64)

    def _permutation(self, epoch: int) -> Tensor:
        if epoch != self._epoch:
            self._epoch, self._order = epoch, shuffled(self.length, self.seed, epoch, self.stream)
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


def shuffled(length: int, seed: int, epoch: int, stream: int) -> Tensor:
    """A permutation [length] that depends on the other three numbers alone."""
    # The factors are primes; stream 0 is the order that one bucket has always had.
    mixed = (seed * 1_000_003 + epoch + stream * 2_305_843_009_213_693_951) % (1 << 63)
    return torch.randperm(length, generator=torch.Generator().manual_seed(mixed))


class BatchOrder:
    """Endless batches of ``batch`` samples, each of one bucket; the module says in which order.

    buckets: as :class:`Samples` has them; empty ones are allowed.
    """

    def __init__(self, buckets: list[Tensor], batch: int, seed: int) -> None:
        self.buckets, self.batch, self.seed = [bucket for bucket in buckets if len(bucket)], batch, seed
        self.sizes = [len(bucket) for bucket in self.buckets]
        if not self.sizes:
            raise ValueError("BatchOrder: the data set holds no samples")
        self._orders = [EpochOrder(size, seed, stream) for stream, size in enumerate(self.sizes)]
        self._begin(0, [0] * len(self.sizes), 0)

    def _begin(self, epoch: int, start: list[int], done: int) -> None:
        """Plans ``epoch``, entered when each bucket had given ``start`` samples, and skips ``done`` of its batches."""
        while True:
            counts = [((epoch + 1) * size - given) // self.batch for size, given in zip(self.sizes, start, strict=True)]
            if any(counts):
                break
            epoch += 1
        plan = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
        if len(counts) > 1:
            plan = plan[shuffled(len(plan), self.seed, epoch, len(counts))]
        self._epoch, self._plan, self._start, self._done = epoch, plan, list(start), done
        given = torch.bincount(plan[:done], minlength=len(counts)).tolist()
        self._given = [first + self.batch * n for first, n in zip(start, given, strict=True)]

    def peek(self) -> Tensor:
        """The indices [batch] that :meth:`next` returns next."""
        if self._done == len(self._plan):
            self._begin(self._epoch + 1, self._given, 0)
        bucket = int(self._plan[self._done])
        return self.buckets[bucket][self._orders[bucket].take(self._given[bucket], self.batch)]

    def next(self) -> Tensor:
        """Indices [batch] of the next batch."""
        chosen = self.peek()
        self._given[int(self._plan[self._done])] += self.batch
        self._done += 1
        return chosen

    @property
    def position(self) -> int:
        """Samples given since the start of the run."""
        return sum(self._given)

    def seek(self, position: int) -> None:
        """Goes to where about ``position`` samples have been given: exactly there with one bucket, at the start of that
        epoch with several."""
        epoch = position // sum(self.sizes)
        self._begin(epoch, [position] if len(self.sizes) == 1 else [epoch * size for size in self.sizes], 0)

    def state_dict(self) -> dict[str, Any]:
        """The whole position, in numbers that JSON holds."""
        return {
            "sizes": list(self.sizes),
            "batch": self.batch,
            "epoch": self._epoch,
            "start": list(self._start),
            "done": self._done,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from there. With another ``batch`` the rest of the epoch is cut anew, so that each bucket goes on at
        its next sample. With other buckets, so other data, see :meth:`seek`."""
        batch, self.batch = self.batch, state["batch"]
        if list(state["sizes"]) == self.sizes:
            self._begin(state["epoch"], state["start"], state["done"])
            if batch != self.batch:
                self.batch = batch
                self._begin(self._epoch, self._given, 0)
            return
        # As many samples as had been given by then.
        self.batch = batch
        self.seek(sum(state["start"]) + state["done"] * state["batch"])


def check_same_data(found: list[Any]) -> None:
    """SettingsError unless all processes found the same data, of which ``found`` has a description for each.

    Each takes its rows of batches that all work out alike: over different data they would train on some samples twice
    and on others never, and nobody would see it.
    """
    if different := [rank for rank, one in enumerate(found) if one != found[0]]:
        raise SettingsError(
            f"dataset_name: of {len(found)} processes, number {', '.join(map(str, different))} found other pictures or "
            "captions than number 0: a file or a connection failed in some of them, or they see other folders. Start "
            f"the run again, or encode the data once for all of them: {command_name()} cache CONFIG"
        )


class Samples(Protocol):
    """What a run trains on: pictures in the space of the network, with their prompts.

    Attributes:
        buckets: indices (int64) of the samples of each size; one entry where all are of one size. Every sample is in
            exactly one.
        vocabulary: all prompts there can be, if they are few enough to encode once; else None.
    """

    @property
    def buckets(self) -> list[Tensor]: ...

    @property
    def vocabulary(self) -> list[str] | None: ...

    def __len__(self) -> int: ...

    def images(self, chosen: Tensor) -> Tensor:
        """``[B, C, h, w]`` on the CPU of ``chosen`` ``[B]``, which are all of one bucket."""
        ...

    def prompts(self, chosen: Tensor, generator: torch.Generator) -> list[str]:
        """A prompt for each of ``chosen``; one that is drawn is drawn from ``generator``."""
        ...


class TextTable(Protocol):
    """Conditions of prompts that were encoded before.

    Attributes:
        bytes: what they take.
    """

    @property
    def bytes(self) -> int: ...

    def holds(self, prompts: Iterable[str]) -> bool:
        """Whether all ``prompts`` are in the table."""
        ...

    def __call__(self, prompts: list[str]) -> Condition:
        """The condition of ``prompts`` on the device. KeyError for one that is not in the table."""
        ...

    def example(self, count: int) -> Condition:
        """The condition of the first ``count`` prompts (or of all, if there are fewer) on the device."""
        ...


class TextImages:
    """Samples in memory.

    pixels: ``[N, ...]``, or N tensors ``[C, h, w]`` of several sizes. prompts: draws prompts for chosen samples.
    vocabulary: as in :class:`Samples`.
    """

    def __init__(
        self,
        pixels: Tensor | list[Tensor],
        prompts: Callable[[Tensor, torch.Generator], list[str]],
        vocabulary: list[str] | None = None,
    ) -> None:
        self._prompts, self.vocabulary = prompts, vocabulary
        if isinstance(pixels, Tensor):
            self._parts, self.buckets = [pixels], [torch.arange(len(pixels))]
        else:
            members: dict[tuple[int, ...], list[int]] = {}
            for index, one in enumerate(pixels):
                members.setdefault(tuple(one.shape), []).append(index)
            # By size, not by who came first: the order of buckets must not depend on the order of samples.
            chosen = [members[shape] for shape in sorted(members)]
            self.buckets = [torch.tensor(part) for part in chosen]
            self._parts = [torch.stack([pixels[i] for i in part]) for part in chosen]
        count = sum(len(part) for part in self.buckets)
        # Of each sample: its bucket, and its row there.
        self._bucket, self._row = torch.empty(count, dtype=torch.int64), torch.empty(count, dtype=torch.int64)
        for number, part in enumerate(self.buckets):
            self._bucket[part], self._row[part] = number, torch.arange(len(part))

    def __len__(self) -> int:
        return len(self._row)

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        """The shape of a sample of each bucket."""
        return [tuple(part.shape[1:]) for part in self._parts]

    @property
    def bytes(self) -> int:
        """What the pixels take."""
        return sum(part.numel() * part.element_size() for part in self._parts)

    def images(self, chosen: Tensor) -> Tensor:
        """See :class:`Samples`. ValueError for samples of several sizes."""
        if len(numbers := self._bucket[chosen].unique()) > 1:
            raise ValueError(f"TextImages.images: samples of {len(numbers)} sizes cannot be one batch")
        return self._parts[int(numbers[0]) if len(numbers) else 0][self._row[chosen]]

    def prompts(self, chosen: Tensor, generator: torch.Generator) -> list[str]:
        """See :class:`Samples`."""
        return self._prompts(chosen, generator)


class PromptTable:
    """A :class:`TextTable` in memory: prompts that are known before the run, each encoded once.

    It is kept on ``device`` up to ``TABLE_ON_DEVICE`` bytes, else on the CPU, from where rows are fetched.
    """

    def __init__(self, encode: Callable[[list[str]], Condition], prompts: Iterable[str], device: torch.device) -> None:
        unique = list(dict.fromkeys(prompts))
        self._rows = {prompt: i for i, prompt in enumerate(unique)}
        self.device, condition = device, encode(unique)
        self.bytes = sum(part.numel() * part.element_size() for part in condition_tensors(condition))
        self._condition = condition.to(device if self.bytes <= TABLE_ON_DEVICE else torch.device("cpu"))

    def holds(self, prompts: Iterable[str]) -> bool:
        """See :class:`TextTable`."""
        return all(prompt in self._rows for prompt in prompts)

    def __call__(self, prompts: list[str]) -> Condition:
        """See :class:`TextTable`."""
        rows = torch.tensor([self._rows[p] for p in prompts], device=self._condition.device)
        return self._condition.index(rows).to(self.device)

    def example(self, count: int) -> Condition:
        """See :class:`TextTable`."""
        return self._condition.index(slice(0, count)).to(self.device)


TABLE_ON_DEVICE = 256 << 20
"""Bytes of embeddings up to which they are kept on the device of the run."""


class Batches:
    """Batches of (images, condition) for a trainer: order, prompts and position in one place.

    encode: prompts -> Condition. batch_size: samples of a batch in this process. empty_share: share of prompts replaced
        by the empty one. cached: the text encoder is frozen and the data set has a vocabulary, so each prompt is
        encoded once. table: prompts that are encoded already. process: (rank, number of processes).
    """

    def __init__(
        self,
        data: Samples,
        encode: Callable[[list[str]], Condition],
        *,
        batch_size: int,
        seed: int,
        device: torch.device,
        cached: bool,
        empty_share: float = 0.0,
        table: TextTable | None = None,
        process: tuple[int, int] = (0, 1),
    ) -> None:
        self.data, self.encode, self.batch_size, self.device = data, encode, batch_size, device
        rank, processes = process
        if not 0 <= rank < processes:
            raise ValueError(f"Batches: process must be (rank, number of processes), got {process}")
        self.order = BatchOrder(data.buckets, batch_size * processes, seed)
        self._rows = slice(rank * batch_size, (rank + 1) * batch_size)
        self.empty_share = empty_share
        self.generator = torch.Generator().manual_seed(seed)
        self.table = table
        if table is None and cached and data.vocabulary is not None:
            self.table = PromptTable(encode, [*data.vocabulary, ""], device)

    def next(self) -> tuple[Tensor, Condition]:
        """Images [B, ...] on the device and the condition of a prompt drawn for each: this process's rows of the global
        batch."""
        chosen = self.order.next()
        prompts = self.data.prompts(chosen, self.generator)
        if self.empty_share > 0:
            dropped = torch.rand(len(prompts), generator=self.generator) < self.empty_share
            prompts = ["" if drop else prompt for prompt, drop in zip(prompts, dropped.tolist(), strict=True)]
        images, prompts = self.data.images(chosen[self._rows]).to(self.device), prompts[self._rows]
        if self.table is not None and self.table.holds(prompts):
            return images, self.table(prompts)
        return images, self.encode(prompts)

    def warnings(self) -> list[str]:
        """What to know about the buckets before a run; a line for each."""
        small = [size for size in self.order.sizes if size < self.order.batch]
        if not small or len(self.order.sizes) == 1:
            return []
        return [
            f"aspect_buckets: {len(small)} of {len(self.order.sizes)} buckets ({sum(small)} of {len(self.data)} "
            f"pictures) hold fewer samples than the {self.order.batch} of a batch. Such a bucket comes once in several "
            "epochs, and its pictures are then more than once in one batch; a smaller batch, a smaller "
            "max_aspect_ratio or a larger aspect_bucket_step avoids it"
        ]

    @property
    def position(self) -> int:
        """Samples of all processes since the start of the run."""
        return self.order.position

    @property
    def epoch(self) -> float:
        """Epochs done, as a fraction."""
        return self.position / len(self.data)

    def state_dict(self) -> dict[str, Any]:
        """The position in the data, in numbers that JSON holds. ``generator``, which draws prompts, is apart."""
        return self.order.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from there: exactly, on any number of processes, as long as the data is the same."""
        self.order.load_state_dict(state)
