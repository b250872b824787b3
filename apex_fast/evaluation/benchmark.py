"""What a benchmark is, and how a network is scored on one.

A benchmark has pictures with prompts that were held out from training, says of a picture whether it shows what a prompt
asks, and has a small fixed network whose features pictures are compared in. :func:`evaluate` draws as many pictures as
there are held-out ones, under the same prompts, and a few more of single prompts over many seeds, and takes from them:

==================== ==================================================================================
frechet              Frechet distance to the held-out pictures, in the benchmark's features
accuracy             share of the pictures that show what their prompt asks; also by category
precision, recall    k-NN, in the same features (:func:`apex_fast.evaluation.metrics.precision_recall`)
diversity            spread of the pictures of one prompt, as a share of the spread of real ones
==================== ==================================================================================

and what drawing costs (:mod:`apex_fast.evaluation.cost`). :func:`floor` is what real pictures score: those of the
training split in place of drawn ones. All draws depend on the seed alone, not on the model, the number of steps or the
guidance, so that two rows of a table differ by what was evaluated only.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor

from apex_fast.data.shipped import SHIPPED
from apex_fast.evaluation.cost import cost_of_one_picture
from apex_fast.evaluation.metrics import frechet_distance, mean_pairwise_distance, precision_recall
from apex_fast.sampler import sample
from apex_fast.velocities import Velocity

DIVERSITY_SEEDS = 24
"""Pictures of each diversity prompt."""


class Benchmark(ABC):
    """Held-out pictures with prompts, and what scores others against them.

    Attributes:
        name: as ``dataset_name`` has it.
        sample_shape: (C, H, W) of a picture.
        categories: what accuracy is reported by.
        diversity_prompts: a few prompts, each drawn with many seeds.
    """

    name: str
    sample_shape: tuple[int, int, int]
    categories: tuple[str, ...]
    diversity_prompts: tuple[str, ...]

    @abstractmethod
    def real(self, count: int, *, seed: int) -> tuple[Tensor, list[str]]:
        """Held-out pictures ``[count, C, H, W]`` fp32 in [-1, 1] and their prompts, the categories in equal shares.

        Raises:
            ValueError: a count that there are no such shares of.
        """

    @abstractmethod
    def train(self, count: int, *, seed: int) -> tuple[Tensor, list[str]]:
        """The same of the training split."""

    @abstractmethod
    def category(self, prompt: str) -> str:
        """Which of ``categories`` a prompt belongs to."""

    @abstractmethod
    def right(self, images: Tensor, prompts: list[str]) -> Tensor:
        """``[N]`` bool on the CPU: whether the picture shows what its prompt asks; images ``[N, C, H, W]`` in
        [-1, 1]."""

    @abstractmethod
    def features(self, images: Tensor) -> Tensor:
        """``[N, D]`` of a small fixed network, for images ``[N, C, H, W]`` in [-1, 1]."""

    @abstractmethod
    def real_of(self, prompt: str, count: int, *, seed: int) -> Tensor:
        """Real pictures ``[count, C, H, W]`` of one prompt."""

    def other_of(self, prompt: str, count: int, *, seed: int) -> Tensor:
        """As many other real pictures of it, for what real pictures score."""
        return self.real_of(prompt, count, seed=seed + 1)

    def noise_source(self, samples: int, *, seed: int) -> torch.Generator:
        """Where the noise of an evaluation comes from, on the CPU."""
        return torch.Generator().manual_seed(seed)


class RenderedBenchmark(Benchmark):
    """A benchmark whose pictures the project renders, at any of the resolutions of its data set.

    Raises:
        ValueError: another resolution.
    """

    def __init__(self, resolution: int = 32) -> None:
        offered = SHIPPED[self.name].resolutions
        if resolution not in offered:
            raise ValueError(f"the {self.name} have {' or '.join(map(str, offered))} pixels, got {resolution}")
        self.resolution = resolution
        self.sample_shape = (3, resolution, resolution)

    @abstractmethod
    def load(self, split: str, count: int, seed: int) -> Any:
        """``count`` pictures of a split, with ``images`` and ``prompts``, the categories in turn."""

    def real(self, count: int, *, seed: int) -> tuple[Tensor, list[str]]:
        """Pictures of the test split and their prompts; ``count`` has to be a multiple of the number of categories."""
        return self._split("test", count, seed)

    def train(self, count: int, *, seed: int) -> tuple[Tensor, list[str]]:
        """Pictures of the training split and their prompts, as :meth:`real`."""
        return self._split("train", count, seed)

    def _split(self, split: str, count: int, seed: int) -> tuple[Tensor, list[str]]:
        shares = len(self.categories)
        if count < 1 or count % shares:
            raise ValueError(
                f"the {shares} categories of the {self.name} have equal shares, so the number of pictures has to be a "
                f"multiple of {shares}, got {count}"
            )
        data = self.load(split, count, seed)
        return data.images, data.prompts


def open_benchmark(name: str, resolution: int | None = None) -> Benchmark:
    """The benchmark of that name, for pictures with an edge of ``resolution`` pixels (None: the data set's first).

    Raises:
        ValueError: there is none, or not at that resolution.
        ImportError: a package that it needs is not installed; the message names the extra.
    """
    if name not in SHIPPED:
        raise ValueError(f"the benchmarks are {', '.join(SHIPPED)}, got {name!r}")
    offered = SHIPPED[name].resolutions
    resolution = offered[0] if resolution is None else resolution
    if resolution not in offered:
        raise ValueError(
            f"the benchmark {name} has pictures of {' or '.join(map(str, offered))} pixels, got {resolution}"
        )
    if name == "digits":
        from apex_fast.evaluation.digits import DigitsBenchmark

        return DigitsBenchmark()
    if name == "shapes":
        from apex_fast.evaluation.shapes import ShapesBenchmark

        return ShapesBenchmark(resolution)
    from apex_fast.evaluation.scenes import ScenesBenchmark

    return ScenesBenchmark(resolution)


@torch.no_grad()
def evaluate(
    network: Any,
    benchmark: Benchmark,
    *,
    num_inference_steps: int = 1,
    samples: int = 600,
    seed: int = 0,
    guidance_scale: float = 1.0,
    negative_prompt: str = "",
    velocity: Velocity | None = None,
    batch_size: int = 200,
    diversity_seeds: int = DIVERSITY_SEEDS,
    cost: bool = True,
    **sampling: Any,
) -> dict[str, Any]:
    """Draws pictures of a benchmark's prompts and scores them.

    Args:
        network: encodes prompts (``encode``), knows ``sample_shape`` and is called for the velocity, in eval mode. Its
            samples are pictures, or latents that its own VAE decodes (:class:`~apex_fast.backbones.base.Backbone`).
        samples: pictures compared with as many held-out ones, under the prompts of those.
        seed: of the held-out pictures, the prompts and the noise.
        guidance_scale, negative_prompt: classifier-free guidance; 1 is none. Of a backbone, the scale counts as in its
            family's pipeline, and the two velocities are combined as there.
        velocity: what is sampled from, the network itself by default; pass averaged weights here.
        batch_size: pictures drawn together; what is random besides their noise depends on it.
        diversity_seeds: pictures of each of ``benchmark.diversity_prompts``, at least 2.
        cost: measure what one picture costs, too.
        sampling: further arguments of :func:`apex_fast.sample`, such as ``stochasticity`` or ``times``.

    Returns:
        ``frechet`` (lower is better; compare equal numbers of samples only), ``accuracy``, ``accuracy_by_category``,
        ``precision``, ``recall``, ``diversity`` (1: as the data), ``images_per_second`` (batches, sampled
        and decoded); with ``cost`` also ``seconds_per_picture`` (one picture, from its text to its pixels),
        ``network_seconds`` (one picture, its sampling alone) and ``peak_bytes`` (of one picture), see
        :func:`apex_fast.evaluation.cost.cost_of_one_picture`.

    Raises:
        ValueError: the network makes pictures of another shape, or none that are finite; a number of samples that the
            benchmark has not.
    """
    if picture_shape(network) != tuple(benchmark.sample_shape):
        raise ValueError(
            f"the benchmark {benchmark.name} has pictures of the shape {list(benchmark.sample_shape)}, and this "
            f"network makes {list(picture_shape(network))}"
        )
    real, prompts = benchmark.real(samples, seed=seed)
    repeated = [prompt for prompt in benchmark.diversity_prompts for _ in range(diversity_seeds)]
    generator = benchmark.noise_source(samples, seed=seed)
    sampler = Sampler(
        network,
        velocity or network,
        num_inference_steps=num_inference_steps,
        guidance_scale=guidance_scale,
        negative_prompt=negative_prompt,
        **sampling,
    )
    noise = torch.randn(samples + len(repeated), *network.sample_shape, generator=generator)
    images, seconds = sampler.batches(noise, prompts + repeated, batch_size, generator)
    scores: dict[str, Any] = {
        # First: it refuses pictures that are not finite.
        **_distances(benchmark, images[:samples], real),
        **_accuracies(benchmark, images[:samples], prompts),
        "diversity": _diversity(benchmark, images[samples:], samples, seed),
        "images_per_second": len(images) / seconds,
    }
    if cost:
        scores |= cost_of_one_picture(
            sampler, prompts[0], network.sample_shape, network, velocity, *getattr(network, "components", {}).values()
        )
    return scores


def picture_shape(network: Any) -> tuple[int, int, int]:
    """(C, H, W) of the pictures that ``network`` makes: of its samples, or of what its VAE decodes them to."""
    channels, height, width = network.sample_shape
    factor = getattr(network, "vae_scale_factor", 1)
    return (channels, height, width) if factor == 1 else (3, height * factor, width * factor)


def _distances(benchmark: Benchmark, images: Tensor, real: Tensor) -> dict[str, float]:
    """``frechet``, ``precision`` and ``recall`` of pictures ``[N, C, H, W]`` against as many real ones."""
    features, of_real = benchmark.features(images), benchmark.features(real)
    distance = frechet_distance(features, of_real)
    precision, recall = precision_recall(of_real, features)
    return {"frechet": distance, "precision": precision, "recall": recall}


def _accuracies(benchmark: Benchmark, images: Tensor, prompts: list[str]) -> dict[str, Any]:
    """``accuracy`` and ``accuracy_by_category`` of pictures ``[N, C, H, W]`` of ``prompts``."""
    right = benchmark.right(images, prompts)
    found: dict[str, list[float]] = {}
    for prompt, good in zip(prompts, right.tolist(), strict=True):
        found.setdefault(benchmark.category(prompt), []).append(float(good))
    shares = {name: sum(found[name]) / len(found[name]) for name in benchmark.categories if name in found}
    return {"accuracy": right.float().mean().item(), "accuracy_by_category": shares}


def floor(benchmark: Benchmark, *, samples: int = 600, seed: int = 0) -> dict[str, Any]:
    """What real pictures score: pictures of the training split in place of drawn ones, in equal numbers.

    ``accuracy`` is that of held-out pictures under their own prompts, the scorer's own; everything else as
    :func:`evaluate` returns it, without costs.
    """
    real, prompts = benchmark.real(samples, seed=seed)
    images, _ = benchmark.train(samples, seed=seed)
    count = _real_of_each(benchmark, samples)
    again = [benchmark.other_of(prompt, count, seed=seed) for prompt in benchmark.diversity_prompts]
    return {
        **_distances(benchmark, images, real),
        **_accuracies(benchmark, real, prompts),
        "diversity": _diversity(benchmark, torch.cat(again), samples, seed),
    }


def _real_of_each(benchmark: Benchmark, samples: int) -> int:
    """Real pictures of each diversity prompt, for the spread that others are compared with."""
    return max(2, samples // len(benchmark.diversity_prompts))


def _diversity(benchmark: Benchmark, images: Tensor, samples: int, seed: int) -> float:
    """Mean over the diversity prompts of the mean pairwise distance in pixels over that of real pictures; images: as
    many of each prompt, in order."""
    ratios = []
    for prompt, own in zip(benchmark.diversity_prompts, images.chunk(len(benchmark.diversity_prompts)), strict=True):
        real = benchmark.real_of(prompt, _real_of_each(benchmark, samples), seed=seed)
        ratios.append(mean_pairwise_distance(own) / mean_pairwise_distance(real))
    return sum(ratios) / len(ratios)


class Sampler:
    """Pictures from texts by one network, always with the same settings (those of :func:`evaluate`)."""

    def __init__(
        self,
        network: Any,
        velocity: Velocity,
        *,
        num_inference_steps: int,
        guidance_scale: float,
        negative_prompt: str,
        **sampling: Any,
    ) -> None:
        # Here, since training imports what scores its validations.
        from apex_fast.backbones.base import Backbone
        from apex_fast.training.guidance import combine

        self.network, self.velocity = network, velocity
        guide = None
        if isinstance(network, Backbone):
            guidance_scale, guide = combine(network, guidance_scale)
        self.options = {"num_inference_steps": num_inference_steps, "guidance_scale": guidance_scale, **sampling}
        if guide is not None:
            self.options["guide"] = guide
        self.negative_prompt = None if guidance_scale == 1.0 and guide is None else negative_prompt

    def encode(self, prompts: list[str]) -> tuple[Any, Any]:
        """The conditions of ``prompts``, each text encoded once, and of the negative prompt (None without guidance)."""
        once = {prompt: row for row, prompt in enumerate(dict.fromkeys(prompts))}
        condition = self.network.encode(list(once)).index([once[prompt] for prompt in prompts])
        return condition, None if self.negative_prompt is None else self.network.encode([self.negative_prompt])

    def sample(self, noise: Tensor, condition: Any, negative: Any, generator: torch.Generator | None) -> Tensor:
        """Samples in fp32 on the CPU, latents where the network works in such; that they are there means that the
        device is done."""
        samples = sample(
            self.velocity,
            noise.to(condition.device),
            condition,
            negative_condition=negative,
            generator=generator,
            **self.options,
        )
        return samples.float().cpu()

    def draw(self, noise: Tensor, condition: Any, negative: Any, generator: torch.Generator | None) -> Tensor:
        """Pictures in fp32 on the CPU, in [-1, 1]."""
        return self.decode(self.sample(noise, condition, negative, generator))

    def decode(self, samples: Tensor) -> Tensor:
        """What samples show, in fp32 on the CPU, in [-1, 1]."""
        decode = getattr(self.network, "decode", None)
        return (samples if decode is None else decode(samples)).detach().float().cpu().clamp(-1, 1)

    def batches(
        self, noise: Tensor, prompts: list[str], batch_size: int, generator: torch.Generator
    ) -> tuple[Tensor, float]:
        """Pictures of all prompts, and the seconds that sampling took; texts are encoded before."""
        condition, negative = self.encode(prompts)
        # One pass that is not timed: the first call of a shape allocates and, on a GPU, compiles.
        first = slice(0, batch_size)
        ones = torch.ones(len(noise[first]), device=condition.device)
        drawn = self.velocity(noise[first].to(condition.device), ones, condition.index(first))
        self.decode(drawn)
        images, seconds = [], 0.0
        for start in range(0, len(prompts), batch_size):
            rows = slice(start, start + batch_size)
            began = time.perf_counter()
            images.append(self.draw(noise[rows], condition.index(rows), negative, generator))
            seconds += time.perf_counter() - began
        return torch.cat(images), seconds
