"""Scores on a benchmark: the digits' own numbers, pictures that are replayed, wrong, blurred or noise, and the cost."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("sklearn", reason="scikit-learn is not installed: pip install 'apex_fast[data]'")

from apex_fast.condition import Condition
from apex_fast.data.digits import WORDS, Digits, label_of
from apex_fast.evaluation.benchmark import evaluate, floor, open_benchmark
from apex_fast.evaluation.cost import peak_extra_bytes, weight_bytes
from apex_fast.evaluation.digits import DigitsBenchmark, digit_floor, evaluate_digits
from apex_fast.shipped import shipped_folder

BENCHMARK = DigitsBenchmark()
SAME = ("frechet", "accuracy", "diversity")


@pytest.fixture(scope="module")
def start():
    pytest.importorskip("diffusers", reason="diffusers is not installed: pip install 'apex_fast[train]'")
    from apex_fast.backbones.sana import SanaBackbone

    return SanaBackbone.from_pretrained(shipped_folder("digits_start"))


class Replay:
    """A network whose one step is a picture of the asked digit, out of ``images`` with ``labels``, picked by the noise;
    it counts what it is asked."""

    sample_shape = (1, 8, 8)

    def __init__(self, images, labels):
        self.images, self.labels = images, labels
        self.encoded, self.rows = [], 0

    def encode(self, prompts):
        self.encoded.append(prompts)
        return Condition(torch.tensor([float(label_of(p)) if p else -1.0 for p in prompts]).view(-1, 1, 1))

    def __call__(self, x_t, t, condition):
        self.rows += len(x_t)
        picked = []
        for row, label in zip(x_t, condition.prompt_embeds.flatten().long(), strict=True):
            members = self.images[self.labels == label] if label >= 0 else self.images
            picked.append(members[int(row.sum().abs() * 1e4) % len(members)])
        return (x_t - torch.stack(picked)) / t.view(-1, 1, 1, 1)


def replay(shift: int = 0) -> Replay:
    train = Digits.load("train")
    return Replay(train.images, (train.labels + shift) % 10)


@pytest.mark.parametrize(
    ("samples", "options"),
    [(200, {}), (40, {"num_inference_steps": 2, "guidance_scale": 2.0, "diversity_seeds": 5, "batch_size": 32})],
)
def test_the_digits_keep_their_numbers(start, samples, options):
    """The published ones are of evaluate_digits; both have to draw the same prompts and the same noise."""
    old = evaluate_digits(start, samples=samples, seed=3, **options)
    new = evaluate(start, BENCHMARK, samples=samples, seed=3, cost=False, **options)
    assert {name: new[name] for name in SAME} == pytest.approx({name: old[name] for name in SAME}, rel=1e-4)


def test_the_floor_is_that_of_the_digits():
    for seed in (0, 1):
        old, new = digit_floor(samples=200, seed=seed), floor(BENCHMARK, samples=200, seed=seed)
        assert {name: new[name] for name in SAME} == pytest.approx({name: old[name] for name in SAME}, rel=1e-6)
    assert min(new["precision"], new["recall"]) > 0.7


def test_replayed_scans_score_as_scans_do():
    scores = evaluate(replay(), BENCHMARK, cost=False)
    real = floor(BENCHMARK)
    assert scores["accuracy"] == 1.0 and scores["frechet"] < real["frechet"] + 1
    assert 0.9 < scores["diversity"] < 1.1 and min(scores["precision"], scores["recall"]) > 0.75
    assert set(scores["accuracy_by_category"]) == set(WORDS)
    assert "peak_bytes" not in scores


def test_wrong_collapsed_and_noisy_pictures_are_each_caught():
    wrong = evaluate(replay(1), BENCHMARK, cost=False)
    assert wrong["accuracy"] < 0.02 and wrong["frechet"] < 2, "wrong digits are digits"
    train = Digits.load("train")
    means = torch.stack([train.images[train.labels == label].mean(0) for label in range(10)])
    blurred = evaluate(Replay(means, torch.arange(10)), BENCHMARK, cost=False)
    assert blurred["diversity"] < 0.01 and blurred["frechet"] > 5 and blurred["recall"] < 0.02
    noise = torch.randn(100, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    noisy = evaluate(Replay(noise, torch.arange(100) % 10), BENCHMARK, cost=False)
    assert noisy["accuracy"] < 0.5 and noisy["precision"] < 0.5 < floor(BENCHMARK)["precision"]


def test_one_wrong_category_shows_where():
    train = Digits.load("train")
    labels = torch.where(train.labels == 4, 5, torch.where(train.labels == 5, 4, train.labels))
    scores = evaluate(Replay(train.images, labels), BENCHMARK, samples=200, cost=False)
    by = scores["accuracy_by_category"]
    assert by["four"] == by["five"] == 0 and min(by[w] for w in WORDS if w not in ("four", "five")) == 1
    assert scores["accuracy"] == pytest.approx(0.8)


def test_guidance_asks_for_the_negative_prompt_and_costs_a_second_pass():
    plain, guided = replay(), replay()
    evaluate(plain, BENCHMARK, samples=100, diversity_seeds=2, cost=False)
    evaluate(guided, BENCHMARK, samples=100, diversity_seeds=2, cost=False, guidance_scale=2.0)
    assert [""] not in plain.encoded and [""] in guided.encoded
    # Both begin with one pass of the first batch that is not timed.
    assert plain.rows == 2 * 120 and guided.rows == 3 * 120


def test_every_text_is_encoded_once():
    network = replay()
    evaluate(network, BENCHMARK, samples=200, cost=False)
    assert len(network.encoded) == 1 and len(set(network.encoded[0])) == len(network.encoded[0])


def test_options_of_the_sampler_arrive(start):
    few = {"samples": 20, "diversity_seeds": 2, "cost": False, "num_inference_steps": 2}
    plain, renoised, heun = (
        evaluate(start, BENCHMARK, **few, **more) for more in ({}, {"stochasticity": 1.0}, {"method": "heun"})
    )
    assert len({scores["frechet"] for scores in (plain, renoised, heun)}) == 3


def test_averaged_weights_may_be_passed():
    network = replay()
    right = evaluate(replay(1), BENCHMARK, velocity=network, samples=100, diversity_seeds=2, cost=False)
    assert right["accuracy"] == 1.0


def test_the_cost_of_a_picture(start):
    one = evaluate(start, BENCHMARK, samples=20, diversity_seeds=2)
    many = evaluate(start, BENCHMARK, samples=20, diversity_seeds=2, num_inference_steps=12)
    for scores in (one, many):
        assert 0 < scores["network_seconds"] and scores["images_per_second"] > 0
    assert many["network_seconds"] > 3 * one["network_seconds"]
    weights = weight_bytes(start)
    assert weights == sum(p.numel() * p.element_size() for p in {*start.parameters(), *start.buffers()})
    # More steps take no more memory, and a picture of 64 values takes little beside the weights.
    assert weights < one["peak_bytes"] < 2 * weights
    assert many["peak_bytes"] == pytest.approx(one["peak_bytes"], rel=0.1)


def test_memory_is_the_peak_and_not_the_sum():
    def call():
        for _ in range(5):
            torch.ones(1000, 1000)

    assert 4_000_000 <= peak_extra_bytes(call, torch.device("cpu")) < 8_000_000


def test_a_network_of_another_shape_is_refused():
    network = replay()
    network.sample_shape = (3, 32, 32)
    with pytest.raises(
        ValueError, match=r"digits has pictures of the shape \[1, 8, 8\], and this network makes \[3, 32"
    ):
        evaluate(network, BENCHMARK)


def test_benchmarks_by_name():
    assert open_benchmark("digits").sample_shape == open_benchmark("digits", 8).sample_shape == (1, 8, 8)
    with pytest.raises(ValueError, match="the benchmarks are digits, .*got 'faces'"):
        open_benchmark("faces")
    with pytest.raises(ValueError, match="digits has pictures of 8 pixels, got 16"):
        open_benchmark("digits", 16)


def test_real_pictures_of_one_prompt():
    images = BENCHMARK.real_of("a handwritten seven", 10, seed=0)
    assert images.shape == (10, 1, 8, 8) and BENCHMARK.right(images, ["the digit 7"] * 10).float().mean() > 0.8
    other = BENCHMARK.other_of("a handwritten seven", 10, seed=0)
    assert other.shape == images.shape and not torch.equal(other, images)
    with pytest.raises(ValueError, match="there are 60 held-out scans of a digit, got count 61"):
        BENCHMARK.real_of("a handwritten seven", 61, seed=0)
