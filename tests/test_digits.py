"""The digits as a data source and the scores taken on them."""

from __future__ import annotations

import pytest
import torch

from apex_fast.data.digits import TEMPLATES, WORDS, Digits, all_prompts, label_of, prompts_for

pytest.importorskip("sklearn", reason="scikit-learn is not installed: pip install 'apex_fast[data]'")

from apex_fast.evaluation.digits import (  # noqa: E402
    CLASSIFIER_PATH,
    DigitClassifier,
    digit_floor,
    evaluate_digits,
)
from apex_fast.shipped import shipped_folder  # noqa: E402


def test_splits_partition_the_scans():
    train, test = Digits.load("train"), Digits.load("test")
    assert len(train) == 1197 and len(test) == 600
    assert test.labels.bincount().tolist() == [60] * 10
    for split in (train, test):
        assert split.images.shape == (len(split), 1, 8, 8) and split.images.dtype == torch.float32
        assert split.images.min() == -1 and split.images.max() == 1
    # No scan in both: every image of the source occurs once over the two splits.
    together = torch.cat([train.images, test.images]).flatten(1)
    assert len(together.unique(dim=0)) == 1797


def test_the_split_depends_on_the_seed_alone():
    first = Digits.load("test", seed=3)
    torch.manual_seed(99)
    torch.rand(5)
    again = Digits.load("test", seed=3)
    assert torch.equal(first.images, again.images) and torch.equal(first.labels, again.labels)
    assert not torch.equal(first.images, Digits.load("test", seed=4).images)


def test_images_carry_their_own_labels():
    from sklearn.datasets import load_digits

    source = load_digits()
    by_pixels = {tuple(row): int(label) for row, label in zip(source.data.astype(int), source.target, strict=True)}
    test = Digits.load("test")
    pixels = ((test.images + 1) * 8).round().int().flatten(1).tolist()
    assert [by_pixels[tuple(row)] for row in pixels] == test.labels.tolist()


def test_an_unknown_split_is_refused():
    with pytest.raises(ValueError, match="'train' or 'test', got 'validation'"):
        Digits.load("validation")


def test_prompts_name_their_digit_and_cover_every_template():
    labels = torch.arange(10).repeat(200)
    prompts = prompts_for(labels, torch.Generator().manual_seed(0))
    assert [label_of(prompt) for prompt in prompts] == labels.tolist()
    assert set(prompts) == set(all_prompts())
    assert len(all_prompts()) == len(WORDS) * 2 * len(TEMPLATES) == len(set(all_prompts()))
    assert [label_of(prompt) for prompt in all_prompts(7)] == [7] * 20


def test_prompts_repeat_with_the_generator():
    draw = [prompts_for([1, 2, 3, 4], torch.Generator().manual_seed(seed)) for seed in (5, 5, 6)]
    assert draw[0] == draw[1] != draw[2]


def test_prompts_refuse_other_labels():
    with pytest.raises(ValueError, match=r"labels must be in 0\.\.9, got 10"):
        prompts_for([3, 10])


@pytest.mark.parametrize(
    ("prompt", "label"),
    [
        ("a handwritten three", 3),
        ("The Digit 7!", 7),
        ("EIGHT", 8),
        ("a zero (0), as a numeral", 0),
        ("nine of them, not thirteen and not 13", 9),
    ],
)
def test_free_prompts_are_read(prompt, label):
    assert label_of(prompt) == label


@pytest.mark.parametrize(
    ("prompt", "named"),
    [
        ("a cat", "none"),
        ("", "none"),
        ("the number 42", "none"),
        ("someone phoned", "none"),
        ("a five or a 6", "5 and 6"),
    ],
)
def test_prompts_without_one_digit_cannot_be_scored(prompt, named):
    with pytest.raises(ValueError, match=f"exactly one digit, found {named}"):
        label_of(prompt)


# ---- classifier and scores


def test_the_shipped_classifier_reads_held_out_scans():
    test = Digits.load("test")
    classifier = DigitClassifier.load()
    assert CLASSIFIER_PATH.stat().st_size < 300_000
    assert classifier.accuracy(test.images, test.labels) >= 0.99
    assert classifier.accuracy(test.images, (test.labels + 1) % 10) < 0.01
    assert classifier.features(test.images).shape == (600, DigitClassifier.feature_size)


def test_a_new_classifier_learns_and_survives_saving(tmp_path):
    train, test = Digits.load("train"), Digits.load("test")
    state = torch.random.get_rng_state()
    classifier = DigitClassifier.train_new(train, steps=60)
    assert torch.equal(state, torch.random.get_rng_state())
    # Sixty steps are far from the shipped 2,000, and far from the 10 % of guessing.
    assert classifier.accuracy(test.images, test.labels) > 0.7
    classifier.save(tmp_path / "classifier.safetensors")
    loaded = DigitClassifier.load(tmp_path / "classifier.safetensors")
    assert torch.equal(loaded(test.images), classifier(test.images))


def test_a_missing_classifier_says_how_to_make_one(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"python -m apex_fast\.evaluation\.digits --output"):
        DigitClassifier.load(tmp_path / "none.safetensors")


def test_the_floor_is_low_and_real_images_are_as_varied_as_real_images():
    floor = digit_floor()
    assert 0 < floor["frechet"] < 1.5
    assert floor["accuracy"] >= 0.99
    assert 0.95 < floor["diversity"] < 1.08


class _Canned:
    """A stand-in backbone: the condition of a prompt is its digit, so a velocity can answer with chosen pictures."""

    sample_shape = (1, 8, 8)

    def encode(self, prompts):
        from apex_fast.condition import Condition

        labels = torch.tensor([label_of(prompt) for prompt in prompts], dtype=torch.float32)
        return Condition(labels.view(-1, 1, 1))


def _replay(images, labels):
    """The velocity whose endpoint is an image of the asked digit, picked by the noise."""

    def velocity(x_t, t, condition):
        wanted = condition.prompt_embeds.flatten().long()
        picked = []
        for row, label in zip(x_t, wanted, strict=True):
            members = images[labels == label]
            picked.append(members[int(row.sum().abs() * 1e4) % len(members)])
        return (x_t - torch.stack(picked)) / t.view(-1, 1, 1, 1)

    return velocity


def test_replayed_scans_score_as_scans_do():
    train = Digits.load("train")
    scores = evaluate_digits(_Canned(), _replay(train.images, train.labels))
    assert scores["accuracy"] == 1.0
    assert scores["frechet"] < 1.5
    assert 0.9 < scores["diversity"] < 1.1
    assert scores["images_per_second"] > 0


def test_wrong_collapsed_and_noisy_samples_are_each_caught():
    train = Digits.load("train")
    wrong = evaluate_digits(_Canned(), _replay(train.images, (train.labels + 1) % 10))
    assert wrong["accuracy"] < 0.02
    means = torch.stack([train.images[train.labels == label].mean(0) for label in range(10)])
    blurred = evaluate_digits(_Canned(), _replay(means, torch.arange(10)))
    assert blurred["diversity"] < 0.01 and blurred["frechet"] > 5
    noise = evaluate_digits(_Canned(), lambda x_t, t, condition: torch.zeros_like(x_t))
    assert noise["accuracy"] < 0.5 and noise["frechet"] > 20


def test_scores_repeat_with_the_seed():
    train = Digits.load("train")
    velocity = _replay(train.images, train.labels)
    runs = [evaluate_digits(_Canned(), velocity, seed=seed, samples=100) for seed in (1, 1, 2)]
    assert runs[0]["frechet"] == runs[1]["frechet"] != runs[2]["frechet"]
    assert runs[0]["diversity"] == runs[1]["diversity"]


@pytest.mark.parametrize("samples", [0, 15, 610])
def test_uneven_sample_counts_are_refused(samples):
    with pytest.raises(ValueError, match=rf"multiple of 10 from 20 to 600 .*got {samples}"):
        evaluate_digits(_Canned(), lambda x_t, t, condition: x_t, samples=samples)


# ---- the start that ships


@pytest.fixture(scope="module")
def start():
    pytest.importorskip("diffusers", reason="diffusers is not installed: pip install 'apex_fast[train]'")
    from apex_fast.backbones.sana import SanaBackbone

    return SanaBackbone.from_pretrained(shipped_folder("digits_start"))


def test_the_start_is_small_and_holds_no_pickle():
    files = [path for path in shipped_folder("digits_start").rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 4_000_000
    assert {path.suffix for path in files} <= {".safetensors", ".json", ".md"}


def test_the_start_needs_many_steps(start):
    """What tuning has to mend: right digits in one step, but one blur per prompt; varied ones after several."""
    one = evaluate_digits(start, num_inference_steps=1, samples=200)
    eight = evaluate_digits(start, num_inference_steps=8, samples=200)
    assert one["accuracy"] > 0.95 and eight["accuracy"] > 0.9
    assert one["diversity"] < 0.3 and eight["diversity"] > 0.7
    assert eight["frechet"] < 0.4 * one["frechet"]


def test_the_start_reads_prompts_that_it_never_saw(start):
    from apex_fast.sampler import sample

    prompts = [f"show me the number {word}" for word in WORDS for _ in range(10)]
    noise = torch.randn(100, *start.sample_shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        images = sample(start, noise, start.encode(prompts), num_inference_steps=8)
    labels = torch.tensor([label_of(prompt) for prompt in prompts])
    assert DigitClassifier.load().accuracy(images, labels) > 0.9


def test_guidance_pulls_towards_the_prompt(start):
    """The start was trained with some prompts left out, so that the empty prompt means "any digit"."""
    from apex_fast.sampler import sample

    noise = torch.randn(200, *start.sample_shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        images = sample(start, noise, start.encode([""] * 200), num_inference_steps=6)
    found = DigitClassifier.load()(images).argmax(1).bincount(minlength=10)
    assert (found > 0).sum() >= 8, f"the empty prompt should give all sorts of digits, got {found.tolist()}"
    plain, guided = (
        evaluate_digits(start, num_inference_steps=6, samples=100, diversity_seeds=10, guidance_scale=g)
        for g in (1.0, 2.5)
    )
    assert guided["accuracy"] >= plain["accuracy"] and guided["diversity"] < plain["diversity"]
