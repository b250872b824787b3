"""The order of batches: true epochs, buckets, several processes, and going on from any position."""

from __future__ import annotations

import json
from collections import Counter

import pytest
import torch

from apex_fast.condition import Condition
from apex_fast.training.batches import Batches, BatchOrder, EpochOrder, PromptTable, TextImages, check_same_data
from apex_fast.training.settings import SettingsError

CPU = torch.device("cpu")


def buckets_of(*sizes: int) -> list[torch.Tensor]:
    """Buckets of these sizes, their samples not in one piece."""
    indices = torch.randperm(sum(sizes), generator=torch.Generator().manual_seed(1))
    return [part.sort().values for part in indices.split(list(sizes))]


def drawn(order: BatchOrder, count: int) -> list[list[int]]:
    return [order.next().tolist() for _ in range(count)]


LAYOUTS = [((7,), 3), ((8,), 4), ((5,), 1), ((3,), 8), ((9, 4, 2), 2), ((9, 4, 2), 1), ((5, 5), 4), ((6, 1), 3)]


@pytest.mark.parametrize(("sizes", "batch"), LAYOUTS)
def test_every_epoch_of_a_bucket_has_every_sample_once(sizes: tuple[int, ...], batch: int) -> None:
    buckets = buckets_of(*sizes)
    order = BatchOrder(buckets, batch, seed=3)
    streams: list[list[int]] = [[] for _ in sizes]
    homes = {int(i): number for number, bucket in enumerate(buckets) for i in bucket}
    while order.position < 6 * sum(sizes):
        chosen = order.next().tolist()
        home = {homes[i] for i in chosen}
        assert len(chosen) == batch and len(home) == 1, "a batch is of one bucket"
        streams[home.pop()] += chosen
    for bucket, stream in zip(buckets, streams, strict=True):
        epochs = [stream[i : i + len(bucket)] for i in range(0, len(stream) - len(bucket) + 1, len(bucket))]
        assert epochs
        for epoch in epochs:
            assert sorted(epoch) == bucket.tolist()
        if len(bucket) > 3:
            assert len({tuple(epoch) for epoch in epochs}) == len(epochs), "every epoch has an order of its own"


@pytest.mark.parametrize(("sizes", "batch"), LAYOUTS)
def test_no_sample_is_ahead_of_the_run_and_less_than_a_batch_of_each_bucket_behind(
    sizes: tuple[int, ...], batch: int
) -> None:
    order, buckets = BatchOrder(buckets_of(*sizes), batch, seed=0), buckets_of(*sizes)
    seen: Counter[int] = Counter()
    for epochs in range(1, 12):
        # All that is planned for the epochs before this one.
        while (chosen := order.peek()) is not None and order.state_dict()["epoch"] < epochs:
            seen.update(chosen.tolist())
            order.next()
        for bucket in buckets:
            counts = [seen[i] for i in bucket.tolist()]
            assert max(counts) <= epochs, "nothing is repeated before the rest was there"
            assert epochs * len(bucket) - sum(counts) < batch, "what is carried is less than a batch"


def test_one_bucket_is_the_order_of_its_epochs() -> None:
    order = BatchOrder([torch.arange(11)], 4, seed=3)
    assert sum(drawn(order, 11), []) == EpochOrder(11, seed=3).take(0, 44).tolist()


def test_the_order_depends_on_seed_and_epoch_and_mixes_the_buckets() -> None:
    buckets = [torch.arange(40), torch.arange(40, 80)]
    first, again, other = (drawn(BatchOrder(buckets, 4, seed), 60) for seed in (0, 0, 1))
    assert first == again != other
    kinds = [batch[0] >= 40 for batch in first]
    assert kinds[:20].count(True) == kinds[20:40].count(True) == 10
    assert kinds[:20] != kinds[20:40], "the buckets' turns are shuffled in every epoch"
    assert 4 < sum(a != b for a, b in zip(kinds, kinds[1:], strict=False)), "and not one bucket after the other"


@pytest.mark.parametrize(("sizes", "batch"), [((7,), 3), ((9, 4, 2), 2), ((3,), 8), ((6, 1), 3)])
def test_a_run_goes_on_exactly_from_every_position(sizes: tuple[int, ...], batch: int) -> None:
    whole = drawn(BatchOrder(buckets_of(*sizes), batch, seed=2), 30)
    order = BatchOrder(buckets_of(*sizes), batch, seed=2)
    for position in range(30):
        state = json.loads(json.dumps(order.state_dict()))
        resumed = BatchOrder(buckets_of(*sizes), batch, seed=2)
        resumed.load_state_dict(state)
        assert resumed.position == order.position == position * batch
        assert drawn(resumed, 30 - position) == whole[position:]
        assert order.next().tolist() == whole[position]


@pytest.mark.parametrize("sizes", [(11,), (9, 4, 2)])
def test_another_global_batch_goes_on_without_repeating_or_skipping(sizes: tuple[int, ...]) -> None:
    """From every position of batches of 2 to batches of 3, and back."""
    buckets = buckets_of(*sizes)
    for position in range(12):
        order = BatchOrder(buckets, 2, seed=5)
        chosen = drawn(order, position)
        for batch in (3, 2):
            resumed = BatchOrder(buckets, batch, seed=5)
            resumed.load_state_dict(order.state_dict())
            assert resumed.position == order.position
            order = resumed
            chosen += drawn(order, 7)
        chosen += drawn(order, 10)
        seen = Counter(sum(chosen, []))
        for bucket in buckets:
            stream = [i for batch in chosen for i in batch if i in bucket.tolist()]
            for start in range(0, len(stream) - len(bucket) + 1, len(bucket)):
                assert sorted(stream[start : start + len(bucket)]) == bucket.tolist()
            counts = [seen[i] for i in bucket.tolist()]
            assert max(counts) - min(counts) <= 1


def test_other_data_starts_the_epoch_anew_and_keeps_the_place_of_one_bucket() -> None:
    order = BatchOrder([torch.arange(10)], 4, seed=0)
    drawn(order, 6)
    grown = BatchOrder([torch.arange(11)], 4, seed=0)
    grown.load_state_dict(order.state_dict())
    assert grown.position == 24
    assert grown.next().tolist() == EpochOrder(11, seed=0).take(24, 4).tolist()
    split = BatchOrder([torch.arange(6), torch.arange(6, 10)], 4, seed=0)
    split.load_state_dict(order.state_dict())
    assert split.position == 20
    assert grown.state_dict() != split.state_dict()


# ---- batches of several processes


class Recorder:
    """Samples that say which of them were asked for, and prompts that are drawn."""

    vocabulary = None

    def __init__(self, *sizes: int) -> None:
        self.buckets = buckets_of(*sizes)
        self.homes = {int(i): number for number, bucket in enumerate(self.buckets) for i in bucket}

    def __len__(self) -> int:
        return len(self.homes)

    def images(self, chosen: torch.Tensor) -> torch.Tensor:
        assert len({self.homes[i] for i in chosen.tolist()}) == 1
        return chosen.float()

    def prompts(self, chosen: torch.Tensor, generator: torch.Generator) -> list[str]:
        numbers = torch.randint(1000, (len(chosen),), generator=generator).tolist()
        return [f"{i} as {number}" for i, number in zip(chosen.tolist(), numbers, strict=True)]


def batches_of(sizes: tuple[int, ...], batch_size: int, process: tuple[int, int] = (0, 1)) -> Batches:
    return Batches(
        Recorder(*sizes),
        lambda prompts: prompts,  # type: ignore[arg-type, return-value]
        batch_size=batch_size,
        seed=4,
        device=CPU,
        cached=False,
        empty_share=0.3,
        process=process,
    )


@pytest.mark.parametrize("sizes", [(10,), (13, 7, 12)])
@pytest.mark.parametrize("world", [1, 2, 3, 6])
def test_processes_share_one_global_batch(sizes: tuple[int, ...], world: int) -> None:
    """Pictures, drawn prompts and dropped ones: those of one process, whatever their number."""
    alone = batches_of(sizes, 6)
    several = [batches_of(sizes, 6 // world, (rank, world)) for rank in range(world)]
    for _ in range(20):
        images, prompts = alone.next()
        parts = [one.next() for one in several]
        assert torch.cat([part[0] for part in parts]).equal(images)
        assert sum((part[1] for part in parts), []) == prompts
        assert {one.position for one in several} == {alone.position}
    assert "" in prompts or any("" in alone.next()[1] for _ in range(5)), "prompts were dropped"


@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1), (2, 3), (3, 1)])
def test_a_run_goes_on_with_another_number_of_processes(before: int, after: int) -> None:
    sizes = (13, 7, 12)
    whole = batches_of(sizes, 6)
    expected = [whole.next() for _ in range(12)]
    for position in range(12):
        first = [batches_of(sizes, 6 // before, (rank, before)) for rank in range(before)]
        for one in first:
            for _ in range(position):
                one.next()
        state = json.loads(json.dumps(first[-1].state_dict()))
        draws = first[-1].generator.get_state()
        second = [batches_of(sizes, 6 // after, (rank, after)) for rank in range(after)]
        for one in second:
            one.load_state_dict(state)
            one.generator.set_state(draws)
        for images, prompts in expected[position:]:
            parts = [one.next() for one in second]
            assert torch.cat([part[0] for part in parts]).equal(images)
            assert sum((part[1] for part in parts), []) == prompts


def test_a_rank_outside_of_the_processes_is_refused() -> None:
    with pytest.raises(ValueError, match=r"process must be \(rank, number of processes\), got \(2, 2\)"):
        batches_of((10,), 2, (2, 2))


def test_buckets_smaller_than_a_batch_are_said() -> None:
    assert batches_of((13, 7, 2), 2).warnings() == []
    assert batches_of((3,), 6).warnings() == [], "one bucket is not a matter of buckets"
    (line,) = batches_of((13, 7, 2), 4, (0, 2)).warnings()
    assert line.startswith("aspect_buckets: 2 of 3 buckets (9 of 22 pictures) hold fewer samples than the 8 of a batch")


def test_processes_that_found_other_data_are_told() -> None:
    digest = {"count": 3, "names": "a", "captions": "b"}
    check_same_data([[digest, [2, 1]]] * 3)
    with pytest.raises(
        SettingsError, match="of 3 processes, number 1, 2 found other pictures or captions than number 0"
    ):
        check_same_data([[digest, [2, 1]], [digest, [3]], [{**digest, "count": 4}, [2, 1]]])


# ---- samples in memory


def test_samples_of_several_sizes_are_sorted_into_buckets() -> None:
    shapes = [(1, 4, 6), (1, 6, 4), (1, 4, 6), (1, 4, 4), (1, 6, 4)]
    pixels = [torch.full(shape, float(i)) for i, shape in enumerate(shapes)]
    data = TextImages(pixels, lambda chosen, _: [f"number {i}" for i in chosen.tolist()])
    assert [bucket.tolist() for bucket in data.buckets] == [[3], [0, 2], [1, 4]]
    assert data.shapes == [(1, 4, 4), (1, 4, 6), (1, 6, 4)] and len(data) == 5
    assert data.bytes == 4 * sum(one.numel() for one in pixels)
    images = data.images(torch.tensor([4, 1, 4]))
    assert images.shape == (3, 1, 6, 4) and images[:, 0, 0, 0].tolist() == [4, 1, 4]
    with pytest.raises(ValueError, match="samples of 2 sizes cannot be one batch"):
        data.images(torch.tensor([0, 1]))
    assert data.prompts(torch.tensor([2, 0]), torch.Generator()) == ["number 2", "number 0"]
    batches = Batches(data, lambda prompts: prompts, batch_size=1, seed=0, device=CPU, cached=False)  # type: ignore
    for _ in range(10):
        images, (prompt,) = batches.next()
        assert prompt == f"number {int(images[0, 0, 0, 0])}"
    reordered = TextImages(pixels[::-1], lambda *_: [])
    assert reordered.shapes == data.shapes, "the order of the buckets is that of their sizes"


def test_nothing_to_train_on_is_an_error() -> None:
    data = TextImages([], lambda *_: [])
    with pytest.raises(ValueError, match="holds no samples"):
        Batches(data, lambda prompts: prompts, batch_size=1, seed=0, device=CPU, cached=False)  # type: ignore


def test_a_prompt_table_gives_examples() -> None:
    table = PromptTable(
        lambda prompts: Condition(torch.arange(len(prompts) * 2.0).view(-1, 1, 2)), ["a", "b", "a", "c"], CPU
    )
    assert table.bytes == 24 and table.holds(["c", "a"]) and not table.holds(["d"])
    assert table.example(2).prompt_embeds.flatten().tolist() == [0, 1, 2, 3]
    assert table.example(9).batch_size == 3
    assert table(["c", "a"]).prompt_embeds.flatten().tolist() == [4, 5, 0, 1]
