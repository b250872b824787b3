"""The rendered shapes, and the scorer that reads them: what it accepts, what it refuses, and why."""

from __future__ import annotations

import collections
import hashlib
import math

import pytest
import torch
import torch.nn.functional as F

from apex_fast.data.shapes import (
    CATEGORIES,
    COLOURS,
    SHAPES,
    Scene,
    Shapes,
    Thing,
    all_prompts,
    draw_prompts,
    parse,
    render,
    render_scenes,
)
from apex_fast.data.shipped import load_shipped
from apex_fast.evaluation.metrics import frechet_distance

pytest.importorskip("skimage", reason="the scorer of the shapes needs scikit-image: pip install 'apex_fast[data]'")

from apex_fast.evaluation.shapes import (  # noqa: E402
    CHANGES,
    FEATURES_PATH,
    HARMLESS,
    SPOILT,
    ShapesBenchmark,
    ShapesFeatures,
    check,
    describe,
    right,
)


def _picture(resolution: int = 32, grey: float = 0.5) -> torch.Tensor:
    """A grey picture in [0, 1]."""
    return torch.full((3, resolution, resolution), grey)


def _paint(picture: torch.Tensor, inside: torch.Tensor, colour: str) -> None:
    picture[:, inside] = torch.tensor(COLOURS[colour])[:, None]


def _axes(resolution: int = 32) -> tuple[torch.Tensor, torch.Tensor]:
    axis = torch.arange(resolution) + 0.5
    return axis[:, None].expand(-1, resolution), axis[None, :].expand(resolution, -1)


# The renderer.


def test_every_prompt_reads_back_and_belongs_to_a_category():
    prompts = all_prompts()
    assert len(prompts) == len(set(prompts))
    assert {parse(prompt).category for prompt in prompts} == set(CATEGORIES)
    assert all(parse(prompt).prompt() == prompt for prompt in prompts)
    assert parse("  A blue  Square left of a green triangle. ") == Scene(
        "position", (Thing("square", "blue"), Thing("triangle", "green")), "left of"
    )
    with pytest.raises(ValueError, match="no prompt of the shapes: 'a pink circle'"):
        parse("a pink circle")


def test_drawn_prompts_have_equal_shares_and_follow_the_generator():
    prompts = draw_prompts(120, torch.Generator().manual_seed(1))
    assert prompts == draw_prompts(120, torch.Generator().manual_seed(1))
    assert set(collections.Counter(parse(prompt).category for prompt in prompts).values()) == {20}


def test_training_has_more_of_what_has_more_prompts():
    prompts = load_shipped("shapes", count=56).prompts(torch.arange(56), torch.Generator())
    assert collections.Counter(parse(prompt).category for prompt in prompts) == {
        "single object": 4,
        "two objects": 4,
        "counting": 8,
        "colours": 8,
        "position": 16,
        "attribute binding": 16,
    }


def test_pictures_repeat_and_differ_by_split_and_seed():
    first = Shapes.load("train", count=12, seed=3)
    assert first.images.shape == (12, 3, 32, 32) and first.images.abs().max() <= 1 and len(first) == 12
    assert torch.equal(first.images, Shapes.load("train", count=12, seed=3).images)
    for other in (Shapes.load("test", count=12, seed=3), Shapes.load("train", count=12, seed=4)):
        assert not torch.equal(first.images, other.images)
    assert Shapes.load("test", count=6, resolution=64).images.shape == (6, 3, 64, 64)


def test_the_pictures_are_still_those_that_published_scores_were_taken_on():
    """A change of the renderer would make every score one of another data set."""
    data = Shapes.load("train", count=60, seed=0)
    assert hashlib.sha256("\n".join(data.prompts).encode()).hexdigest()[:16] == "38234c0b15a34258"
    weights = torch.linspace(-1, 1, data.images[0].numel(), dtype=torch.float64)
    sums = data.images.flatten(1).double() @ weights
    assert sums[:4].tolist() == pytest.approx([-72.897, 45.458, 50.568, 25.49], abs=0.01)


def test_the_renderer_refuses_what_it_cannot_draw():
    generator = torch.Generator()
    with pytest.raises(ValueError, match="at 32 or 64 pixels, got 48"):
        render(["a circle"], generator=generator, resolution=48)
    with pytest.raises(ValueError, match="at least one prompt"):
        render([], generator=generator)
    with pytest.raises(ValueError, match="1 to 4 objects in a picture, got 5"):
        render_scenes([Scene("counting", (Thing("circle"),) * 5)], generator=generator)
    with pytest.raises(ValueError, match="split must be 'train' or 'test'"):
        Shapes.load("validation")


# What the scorer says of pictures that were made here, without the renderer.


@pytest.mark.parametrize("resolution", [32, 64])
def test_a_painted_square_and_circle_are_found_where_they_are(resolution: int):
    scale = resolution / 32
    y, x = _axes(resolution)
    picture = _picture(resolution)
    _paint(picture, ((x - 8 * scale).abs() < 4 * scale) & ((y - 10 * scale).abs() < 4 * scale), "yellow")
    _paint(picture, (x - 22 * scale).square() + (y - 20 * scale).square() < (6 * scale) ** 2, "purple")
    circle, square = describe(picture * 2 - 1)
    assert (circle.shape, circle.colour, circle.problem) == ("circle", "purple", None)
    assert (square.shape, square.colour, square.problem) == ("square", "yellow", None)
    assert circle.centre == pytest.approx((22 * scale, 20 * scale), abs=0.1)
    assert square.centre == pytest.approx((8 * scale, 10 * scale), abs=0.1)
    assert square.area == pytest.approx(64 * scale**2, rel=0.01)
    assert circle.area == pytest.approx(math.pi * 36 * scale**2, rel=0.03)
    assert str(square).startswith("yellow square at ")


def test_the_larger_direction_is_the_position():
    y, x = _axes()
    picture = _picture()
    _paint(picture, ((x - 7).abs() < 4) & ((y - 10).abs() < 4), "red")
    _paint(picture, (x - 22).square() + (y - 20).square() < 36, "blue")
    images = (picture * 2 - 1)[None]
    judged = {
        prompt: bool(right(images, [prompt]))
        for prompt in (
            "a red square left of a blue circle",
            "a blue circle right of a red square",
            "a square left of a circle",
            "a red square and a blue circle",
            "a circle and a square",
            "a red square above a blue circle",
            "a red square right of a blue circle",
            "a circle left of a square",
            "a blue square left of a red circle",
            "a square",
            "two squares",
        )
    }
    assert [prompt for prompt, good in judged.items() if good] == list(judged)[:5]


def test_what_is_no_clear_object_is_named():
    y, x = _axes()
    round_ = (x - 16).square() + (y - 16).square()

    def problem(inside: torch.Tensor, colour: tuple[float, ...] = COLOURS["red"], ground: float = 0.5) -> str | None:
        picture = _picture(grey=ground)
        picture[:, inside] = torch.tensor(colour)[:, None]
        (found,) = describe(picture * 2 - 1)
        return found.problem

    assert problem(round_ < 49) is None
    assert problem((round_ < 64) & (round_ > 16)) == "no clear shape"  # a ring
    assert problem(((x - 16).abs() < 9) & ((y - 16).abs() < 4)) == "no clear shape"  # an oblong
    cross = ((x - 16).abs() < 2) & ((y - 16).abs() < 8) | ((x - 16).abs() < 8) & ((y - 16).abs() < 2)
    assert problem(cross) == "no clear shape"
    assert problem((round_ < 49) & (x < 16)) == "no clear shape"  # half a circle
    assert problem(((x - 16).abs() < 2) & ((y - 16).abs() < 2)) == "smaller than any object"
    assert problem(round_ < 49, (1.0, 0.5, 0.5)) == "a colour that is none of the names"
    assert problem(round_ < 49, (0.0, 0.0, 0.0)) == "a colour that is none of the names"
    assert problem(round_ < 49, ground=0.99) == "no plain grey background"
    assert problem(round_ < 400) == "no plain grey background"


def test_specks_are_ignored_unless_they_are_many():
    y, x = _axes()
    picture = _picture()
    _paint(picture, (x - 16).square() + (y - 16).square() < 49, "green")
    picture[:, 2:4, 2:4] = 0.0
    assert right((picture * 2 - 1)[None], ["a green circle"]).all()
    picture[:, 1:31:3, 1] = 0.0
    picture[:, 1:31:3, 30] = 0.0
    assert [thing.problem for thing in describe(picture * 2 - 1)] == [None, "too many specks"]
    assert not right((picture * 2 - 1)[None], ["a green circle"]).any()


def test_pixels_that_are_no_numbers_are_wrong():
    images = render(["a circle"], generator=torch.Generator().manual_seed(0))
    assert right(images, ["a circle"]).all()
    images[0, 0, 0, 0] = math.nan
    assert not right(images, ["a circle"]).any()


def test_the_scorer_says_what_it_expects():
    images = torch.zeros(2, 3, 32, 32)
    with pytest.raises(ValueError, match=r"expected pictures \[N, 3, H, W\] and N prompts"):
        right(images, ["a circle"])
    with pytest.raises(ValueError, match="no prompt of the shapes"):
        right(images, ["a circle", "a cat"])
    with pytest.raises(ValueError, match=r"one picture \[3, H, W\]"):
        describe(images)


# The scorer on rendered and on spoilt pictures; the command with --check does it at length.


@pytest.mark.parametrize(("resolution", "per_category", "others"), [(32, 60, 12), (64, 20, 6)])
def test_truth_is_accepted_and_everything_else_refused(resolution: int, per_category: int, others: int):
    rates = check(per_category, resolution=resolution, others=others, seed=11)
    assert set(rates) == {*HARMLESS, *CHANGES, *SPOILT}
    assert min(rates["rendered"].values()) >= 0.98
    for kind in HARMLESS:
        assert min(rates[kind].values()) >= 0.9, kind
    for kind in (*CHANGES, *SPOILT):
        some = [rate for rate in rates[kind].values() if rate is not None]
        # One picture of all may pass: half of a strong colour can be another object's weak one.
        assert some and sum(some) * others <= 1, kind


def test_every_shape_and_colour_is_told_apart():
    things = [Thing(shape, colour) for shape in SHAPES for colour in COLOURS]
    images = render([f"a {thing}" for thing in things], generator=torch.Generator().manual_seed(5))
    for image, thing in zip(images, things, strict=True):
        (found,) = describe(image)
        assert (found.shape, found.colour, found.problem) == (thing.shape, thing.colour, None)


# The features and the benchmark.


def test_the_features_rank_pictures_by_how_far_they_are_from_real_ones():
    benchmark = ShapesBenchmark()
    real, _ = benchmark.real(600, seed=1)
    other, _ = benchmark.train(600, seed=2)
    reference = benchmark.features(real)
    assert reference.shape == (600, ShapesFeatures.feature_size)

    def distance(images: torch.Tensor) -> float:
        return frechet_distance(benchmark.features(images), reference)

    def blurred(deviation: float) -> torch.Tensor:
        reach = torch.arange(-6, 7.0)
        kernel = torch.exp(-(reach**2) / (2 * deviation**2))
        kernel = (kernel / kernel.sum()).expand(3, 1, -1)
        rows = F.conv2d(F.pad(other, (6, 6, 6, 6), mode="replicate"), kernel[:, :, None, :], groups=3)
        return F.conv2d(rows, kernel[:, :, :, None], groups=3)

    smaller = F.interpolate(F.pad(other, (4, 4, 4, 4), mode="replicate"), 32, mode="bilinear", antialias=True)
    floor = distance(other)
    assert floor * 2 < distance(blurred(0.7)) < distance(blurred(1.2)) < distance(blurred(2.0))
    assert floor * 2 < distance(smaller)
    one_prompt = benchmark.real_of("a red circle", 600, seed=0)
    assert floor * 2 < distance(one_prompt)


def test_pictures_of_64_pixels_are_averaged_for_the_features():
    benchmark = ShapesBenchmark(64)
    images, _ = benchmark.real(12, seed=0)
    assert torch.equal(benchmark.features(images), ShapesBenchmark(32).features(F.avg_pool2d(images, 2)))
    with pytest.raises(ValueError, match=r"\[N, 3, 32, 32\] or \[N, 3, 64, 64\]"):
        benchmark.features(torch.zeros(1, 3, 48, 48))


def test_the_network_for_features_is_small_trains_and_comes_back_from_its_file(tmp_path):
    assert FEATURES_PATH.stat().st_size <= 400_000
    state = torch.get_rng_state()
    network = ShapesFeatures.train_new(pictures=24, steps=3, batch_size=8)
    assert torch.equal(state, torch.get_rng_state())
    network.save(tmp_path / "network.safetensors")
    images = render(["a circle"] * 2, generator=torch.Generator().manual_seed(0))
    assert torch.equal(ShapesFeatures.load(tmp_path / "network.safetensors")(images), network(images))
    with pytest.raises(FileNotFoundError, match="--train-features --output"):
        ShapesFeatures.load(tmp_path / "nothing.safetensors")


@pytest.mark.parametrize("resolution", [32, 64])
def test_the_benchmark_has_held_out_pictures_in_equal_shares(resolution: int):
    benchmark = ShapesBenchmark(resolution)
    images, prompts = benchmark.real(18, seed=4)
    assert tuple(images.shape[1:]) == benchmark.sample_shape == (3, resolution, resolution)
    assert set(collections.Counter(map(benchmark.category, prompts)).values()) == {3}
    again, _ = benchmark.real(18, seed=4)
    training, _ = benchmark.train(18, seed=4)
    assert torch.equal(images, again) and not torch.equal(images, training)
    assert benchmark.right(images, prompts).all()
    with pytest.raises(ValueError, match="a multiple of 6, got 20"):
        benchmark.real(20, seed=0)


def test_the_diversity_prompts_are_of_every_category():
    benchmark = ShapesBenchmark()
    assert {benchmark.category(prompt) for prompt in benchmark.diversity_prompts} == set(CATEGORIES)
    prompt = benchmark.diversity_prompts[-1]
    images = benchmark.real_of(prompt, 6, seed=0)
    assert images.shape == (6, 3, 32, 32) and benchmark.right(images, [prompt] * 6).all()
    with pytest.raises(ValueError, match="32 or 64 pixels, got 16"):
        ShapesBenchmark(16)
