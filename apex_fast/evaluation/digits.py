"""Scores on the digits: a small classifier, and Frechet distance, prompt accuracy and diversity measured with it.

The classifier that ships was made by ``python -m apex_fast.evaluation.digits --output DIGIT_CLASSIFIER.safetensors``
(about half a minute on one core). It sees the training split only; every score is taken against the held-out split.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from apex_fast.data.digits import WORDS, Digits, label_of, prompts_for
from apex_fast.evaluation.benchmark import DIVERSITY_SEEDS, Benchmark
from apex_fast.evaluation.metrics import diversity_ratio, frechet_distance
from apex_fast.sampler import sample
from apex_fast.shipped import ASSETS

CLASSIFIER_PATH = ASSETS / "digit_classifier.safetensors"
"""The classifier that ships with the package."""

DIVERSITY_PROMPT = "a handwritten {}"


class DigitClassifier(nn.Module):
    """Three convolutions and two linear layers on [B, 1, 8, 8] images in [-1, 1]; about 50,000 parameters."""

    feature_size = 32

    def __init__(self) -> None:
        super().__init__()
        self.convolutions = nn.Sequential(
            nn.Conv2d(1, 24, 3, padding=1),
            nn.GELU(),
            nn.Conv2d(24, 48, 3, padding=1),
            nn.GELU(),
            nn.MaxPool2d(2),
            nn.Conv2d(48, 64, 3, padding=1),
            nn.GELU(),
            nn.MaxPool2d(2),
        )
        self.to_features = nn.Linear(64 * 2 * 2, self.feature_size)
        self.to_logits = nn.Linear(self.feature_size, len(WORDS))

    def features(self, images: Tensor) -> Tensor:
        """[B, 32] features before the last activation: the space that the Frechet distance is taken in."""
        return self.to_features(self.convolutions(images).flatten(1))

    def forward(self, images: Tensor) -> Tensor:
        """[B, 10] logits."""
        return self.to_logits(F.gelu(self.features(images)))

    @torch.no_grad()
    def accuracy(self, images: Tensor, labels: Tensor) -> float:
        """Share of ``images`` [B, 1, 8, 8] that are taken for their ``labels`` [B]."""
        return (self(images).argmax(1) == labels).float().mean().item()

    @staticmethod
    def load(path: str | Path = CLASSIFIER_PATH) -> DigitClassifier:
        """Read weights from a safetensors file; the default is the file that ships."""
        if not Path(path).is_file():
            raise FileNotFoundError(
                f"no digit classifier at {path}; make one with: python -m apex_fast.evaluation.digits --output {path}"
            )
        classifier = DigitClassifier()
        classifier.load_state_dict(load_file(path))
        return classifier.eval().requires_grad_(False)

    def save(self, path: str | Path) -> None:
        """Write the weights to a safetensors file."""
        save_file({name: value.contiguous() for name, value in self.state_dict().items()}, path)

    @staticmethod
    def train_new(data: Digits, *, steps: int = 2000, batch_size: int = 128, seed: int = 0) -> DigitClassifier:
        """Train on ``data`` (the training split). The global random state is left as it was."""
        generator = torch.Generator().manual_seed(seed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            classifier = DigitClassifier()
        optimizer = torch.optim.AdamW(classifier.parameters(), lr=2e-3, weight_decay=0.05)
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=4e-3, total_steps=steps)
        for _ in range(steps):
            chosen = torch.randint(len(data), (batch_size,), generator=generator)
            images = _augment(data.images[chosen], generator)
            loss = F.cross_entropy(classifier(images), data.labels[chosen], label_smoothing=0.05)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            scheduler.step()
        return classifier.eval().requires_grad_(False)


def _augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Small random affine maps and a little noise, so that 1,197 images teach features that hold for unseen writers."""
    batch = images.shape[0]
    draws = torch.rand(batch, 5, generator=generator) * 2 - 1
    angle, stretch, slant = draws[:, 0] * 0.2, 1 + draws[:, 1] * 0.1, draws[:, 2] * 0.15
    matrix = torch.zeros(batch, 2, 3)
    matrix[:, 0, 0], matrix[:, 0, 1] = angle.cos() * stretch, slant - angle.sin()
    matrix[:, 1, 0], matrix[:, 1, 1] = angle.sin(), angle.cos() * stretch
    matrix[:, :, 2] = draws[:, 3:] * 0.15
    grid = F.affine_grid(matrix, list(images.shape), align_corners=False)
    # The border of a scan is paper (-1), which grid_sample's zero padding is after the offset.
    moved = F.grid_sample(images + 1, grid, align_corners=False) - 1
    return moved + 0.05 * torch.randn(images.shape, generator=generator)


@lru_cache(maxsize=1)
def shipped_classifier() -> DigitClassifier:
    """The classifier that ships, loaded once."""
    return DigitClassifier.load()


def digit_floor(*, samples: int = 600, seed: int = 0, classifier: DigitClassifier | None = None) -> dict[str, float]:
    """What real images score: training images in place of samples, against the same held-out images, in equal numbers.

    Returns ``frechet``, ``accuracy`` (the classifier's own, on held-out images) and ``diversity``.
    """
    classifier = classifier or shipped_classifier()
    train, test = Digits.load("train"), _held_out(samples)
    chosen = _equal_shares(train, samples, torch.Generator().manual_seed(seed))
    with torch.no_grad():
        distance = frechet_distance(classifier.features(train.images[chosen]), classifier.features(test.images))
    return {
        "frechet": distance,
        "accuracy": classifier.accuracy(test.images, test.labels),
        "diversity": diversity_ratio(train.images[chosen], train.labels[chosen], test.images, test.labels),
    }


def _held_out(samples: int) -> Digits:
    test = Digits.load("test")
    per_class = samples // len(WORDS)
    most = len(test) // len(WORDS)
    if samples % len(WORDS) or not 2 <= per_class <= most:
        raise ValueError(
            f"samples must be a multiple of {len(WORDS)} from {2 * len(WORDS)} to {len(test)} (as many are compared "
            f"with the held-out images), got {samples}"
        )
    chosen = torch.cat([(test.labels == label).nonzero().flatten()[:per_class] for label in range(len(WORDS))])
    return Digits(test.images[chosen], test.labels[chosen])


class DigitsBenchmark(Benchmark):
    """The digits as a benchmark: :func:`apex_fast.evaluation.benchmark.evaluate` draws the noise and the prompts that
    :func:`evaluate_digits` draws, and so finds the same numbers.

    There are 600 held-out scans, so ``real`` takes the first ones of each digit whatever the seed; that decides the
    prompts alone.
    """

    name = "digits"
    sample_shape = (1, 8, 8)
    categories = WORDS
    diversity_prompts = tuple(DIVERSITY_PROMPT.format(word) for word in WORDS)

    def __init__(self, classifier: DigitClassifier | None = None) -> None:
        self.classifier = classifier or shipped_classifier()

    def real(self, count: int, *, seed: int) -> tuple[Tensor, list[str]]:
        test = _held_out(count)
        return test.images, prompts_for(test.labels, torch.Generator().manual_seed(seed))

    def train(self, count: int, *, seed: int) -> tuple[Tensor, list[str]]:
        _held_out(count)  # the same counts are refused
        generator = torch.Generator().manual_seed(seed)
        data = Digits.load("train")
        chosen = _equal_shares(data, count, generator)
        return data.images[chosen], prompts_for(data.labels[chosen], generator)

    def category(self, prompt: str) -> str:
        return WORDS[label_of(prompt)]

    def right(self, images: Tensor, prompts: list[str]) -> Tensor:
        wanted = torch.tensor([label_of(prompt) for prompt in prompts])
        return self._predict(images).argmax(1) == wanted

    @torch.no_grad()
    def _predict(self, images: Tensor) -> Tensor:
        return self.classifier(images)

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        return self.classifier.features(images)

    def real_of(self, prompt: str, count: int, *, seed: int) -> Tensor:
        """Held-out scans of the digit, the first ones whatever the seed; there are 60."""
        test = Digits.load("test")
        members = test.images[test.labels == label_of(prompt)]
        if not 1 <= count <= len(members):
            raise ValueError(f"real_of: there are {len(members)} held-out scans of a digit, got count {count}")
        return members[:count]

    def other_of(self, prompt: str, count: int, *, seed: int) -> Tensor:
        """Training scans of the digit, those of :meth:`train`."""
        images, prompts = self.train(count * len(WORDS), seed=seed)
        wanted = label_of(prompt)
        return images[torch.tensor([label_of(own) == wanted for own in prompts])]

    def noise_source(self, samples: int, *, seed: int) -> torch.Generator:
        generator = torch.Generator().manual_seed(seed)
        prompts_for(_held_out(samples).labels, generator)  # drawn before the noise, as evaluate_digits does
        return generator


def _equal_shares(data: Digits, count: int, generator: torch.Generator) -> Tensor:
    """Positions of ``count`` scans of ``data``, equally many of each digit."""
    labels = ((data.labels == label).nonzero().flatten() for label in range(len(WORDS)))
    return torch.cat(
        [members[torch.randperm(len(members), generator=generator)[: count // len(WORDS)]] for members in labels]
    )


@torch.no_grad()
def evaluate_digits(
    backbone: Any,
    velocity: Callable[..., Tensor] | None = None,
    *,
    num_inference_steps: int = 1,
    samples: int = 600,
    seed: int = 0,
    guidance_scale: float = 1.0,
    negative_prompt: str = "",
    batch_size: int = 200,
    diversity_seeds: int = DIVERSITY_SEEDS,
    classifier: DigitClassifier | None = None,
    **sampling: Any,
) -> dict[str, float]:
    """Generate digits from text and score them against held-out scans.

    backbone: encodes prompts (``encode``) and knows ``sample_shape``.
    velocity: what is sampled from, the backbone itself by default; pass averaged weights here.
    samples: images compared with as many held-out ones, equally many of each digit, under prompts drawn from all
    templates.
    diversity_seeds: images of one prompt per digit, whose spread is compared with that of the held-out images of the
    digit.
    sampling: further arguments of :func:`apex_fast.sample`.

    Returns ``frechet`` (classifier features, lower is better, see :func:`digit_floor`), ``accuracy`` (share
    classified as the digit of the prompt), ``diversity`` (mean pairwise pixel distance over the data's) and
    ``images_per_second`` (sampling alone, text encoded before). The same seed gives the same noise and prompts for
    every model and every number of steps.
    """
    classifier = classifier or shipped_classifier()
    test = _held_out(samples)
    generator = torch.Generator().manual_seed(seed)
    prompts = prompts_for(test.labels, generator)
    repeated = [DIVERSITY_PROMPT.format(word) for word in WORDS for _ in range(diversity_seeds)]
    images, seconds = _generate(
        backbone,
        velocity or backbone,
        prompts + repeated,
        generator,
        batch_size,
        num_inference_steps=num_inference_steps,
        guidance_scale=guidance_scale,
        negative_prompt=negative_prompt,
        **sampling,
    )
    wanted = torch.tensor([label_of(prompt) for prompt in prompts + repeated])
    scored = images.clamp(-1, 1)
    own = slice(samples, None)
    return {
        "frechet": frechet_distance(classifier.features(scored[:samples]), classifier.features(test.images)),
        "accuracy": classifier.accuracy(scored[:samples], wanted[:samples]),
        "diversity": diversity_ratio(scored[own], wanted[own], test.images, test.labels),
        "images_per_second": len(images) / seconds,
    }


def _generate(
    backbone: Any,
    velocity: Callable[..., Tensor],
    prompts: list[str],
    generator: torch.Generator,
    batch_size: int,
    *,
    guidance_scale: float,
    negative_prompt: str,
    **sampling: Any,
) -> tuple[Tensor, float]:
    noise = torch.randn(len(prompts), *backbone.sample_shape, generator=generator)
    condition = backbone.encode(prompts)
    device = condition.prompt_embeds.device
    negative = None if guidance_scale == 1.0 else backbone.encode([negative_prompt])
    # One pass that is not timed: the first call of a shape allocates and, on a GPU, compiles.
    first = slice(0, batch_size)
    velocity(noise[first].to(device), torch.ones(len(noise[first]), device=device), condition.index(first))
    images, seconds = [], 0.0
    for start in range(0, len(prompts), batch_size):
        rows = slice(start, start + batch_size)
        began = time.perf_counter()
        image = sample(
            velocity,
            noise[rows].to(device),
            condition.index(rows),
            guidance_scale=guidance_scale,
            negative_condition=negative,
            generator=generator,
            **sampling,
        )
        # Moving the images to the CPU also waits for the device, so the time is that of finished work.
        images.append(image.float().cpu())
        seconds += time.perf_counter() - began
    return torch.cat(images), seconds


def main() -> None:
    """Train the classifier and write its weights."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--output", type=Path, default=Path("digit_classifier.safetensors"))
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    classifier = DigitClassifier.train_new(Digits.load("train"), seed=arguments.seed)
    classifier.save(arguments.output)
    floor = digit_floor(classifier=classifier)
    print(
        f"{arguments.output}: {arguments.output.stat().st_size} bytes, held-out accuracy {floor['accuracy']:.4f}, "
        f"Frechet distance of real images {floor['frechet']:.3f}"
    )


if __name__ == "__main__":
    main()
