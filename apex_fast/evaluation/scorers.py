"""What ``apex-fast eval`` scores with: a benchmark of the project, or networks in local files that look at pictures."""

from __future__ import annotations

import argparse
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from apex_fast.data.shipped import SHIPPED
from apex_fast.evaluation.benchmark import Benchmark, evaluate, floor, open_benchmark, picture_shape
from apex_fast.evaluation.layouts import read_prompts
from apex_fast.evaluation.metrics import NEIGHBOURS, frechet_distance, precision_recall
from apex_fast.evaluation.pictures import (
    ClipScore,
    Features,
    Picture,
    clip_score,
    features_of,
    inception_features,
    read_folder,
    vision_features,
)
from apex_fast.evaluation.table import COSTS, Column
from apex_fast.generate import Generator, generate_files
from apex_fast.training.results import data_set_of
from apex_fast.training.settings import SettingsError
from apex_fast.training.timing import peak_bytes


@dataclass(frozen=True)
class Way:
    """How pictures are sampled."""

    steps: int
    guidance: float


class Scorer(ABC):
    """Scores of one model in one way of sampling and for one seed.

    Attributes:
        title: what is scored, for the head of the table.
        columns: of the table.
        categories: what accuracy is reported by.
        plotted: (key, heading, logarithmic) of the plot.
        notes: what the columns mean.
    """

    title: str
    columns: tuple[Column, ...]
    categories: tuple[str, ...] = ()
    plotted: tuple[tuple[str, str, bool], ...]
    notes: tuple[str, ...]
    facts: dict[str, Any]

    @abstractmethod
    def score(self, model: Generator, name: str, way: Way, seed: int, *, cost: bool) -> dict[str, Any]:
        """The scores, by key; with ``cost`` those of a picture's cost, too."""

    def real(self, seed: int) -> dict[str, Any] | None:
        """What real data score, or None."""
        return None


class OnBenchmark(Scorer):
    """Scores on one of the benchmarks."""

    def __init__(self, benchmark: Benchmark, options: argparse.Namespace) -> None:
        self.benchmark, self.options = benchmark, options
        edge = benchmark.sample_shape[-1]
        self.title = f"{benchmark.name}, {edge} x {edge}"
        self.categories = benchmark.categories
        self.columns = (
            Column("accuracy", "accuracy"),
            Column("frechet", "Frechet distance"),
            Column("precision", "precision"),
            Column("recall", "recall"),
            Column("diversity", "diversity"),
            *COSTS,
        )
        self.plotted = (("accuracy", "prompt accuracy", False), ("frechet", "Frechet distance (log)", True))
        self.facts = {"benchmark": benchmark.name, "resolution": edge, "samples": options.samples}
        self.notes = (
            "accuracy: share of the pictures that show what their prompt asks",
            "Frechet distance, precision and recall (k-NN, k = 3): against as many held-out pictures, in the features "
            "of the benchmark's own small network; lower, higher and higher are better",
            "diversity: spread of the pictures of one prompt over seeds, as a share of that of real pictures",
            "ms/picture: one picture alone, from its text to its pixels; ms network: its sampling alone; images/s: in "
            f"batches of {self._batch}, sampled and decoded; peak MB: weights, text encoder and VAE included, and the "
            "most that one picture takes besides",
        )

    @property
    def _batch(self) -> int:
        return self.options.batch_size or 200

    def score(self, model: Generator, name: str, way: Way, seed: int, *, cost: bool) -> dict[str, Any]:
        sampling = {} if self.options.stochasticity is None else {"stochasticity": self.options.stochasticity}
        return evaluate(
            model.network,
            self.benchmark,
            num_inference_steps=way.steps,
            samples=self.options.samples,
            seed=seed,
            guidance_scale=way.guidance,
            negative_prompt=self.options.negative_prompt or "",
            batch_size=self._batch,
            cost=cost,
            **sampling,
        )

    def real(self, seed: int) -> dict[str, Any] | None:
        return floor(self.benchmark, samples=self.options.samples, seed=seed) if self.options.real_data else None


class ByPictures(Scorer):
    """Scores of pictures by local networks; those that a model draws stay in a folder, and are not drawn twice."""

    def __init__(self, options: argparse.Namespace, folder: Path, device: torch.device) -> None:
        self.options, self.folder, self.device = options, folder, device
        self.prompts = None if options.prompts is None else read_prompts(options.prompts)
        self.clip = None if options.clip_model is None else ClipScore(options.clip_model, device)
        self.features: Features | None = None
        self.distance = "fid"
        columns, plotted, notes = [], [], []
        if self.clip is not None:
            columns.append(Column("clip_score", "CLIP score", 2))
            plotted.append(("clip_score", "CLIP score", False))
            notes.append(f"CLIP score: 100 max(cos, 0) of picture and prompt by {options.clip_model}")
        self.facts: dict[str, Any] = {"clip_model": options.clip_model, "prompts": options.prompts}
        if options.fid_real is not None:
            heading = "FID"
            if options.fid_weights is not None:
                self.features = inception_features(options.fid_weights, device)
            else:
                self.features = vision_features(options.fid_model, device)
                self.distance, heading = "frechet", "Frechet distance"
                notes.append(f"Frechet distance: in the features of {options.fid_model}, not of Inception, so no FID")
            real = read_folder(options.fid_real)
            drawn = None if self.prompts is None else len(self.prompts) * (options.n or 1)
            if min(len(real), len(real) if drawn is None else drawn) <= NEIGHBOURS:
                raise ValueError(
                    f"--fid-real compares distributions: expected more than {NEIGHBOURS} pictures on both sides (in "
                    f"earnest, thousands), got {len(real)} real ones"
                    + ("" if drawn is None else f" and {drawn} to draw")
                )
            self.of_real = features_of(self.features, real)
            columns += [Column(self.distance, heading), Column("precision", "precision"), Column("recall", "recall")]
            plotted.append((self.distance, heading, True))
            notes.append(
                f"{heading}, precision and recall (k-NN, k = 3): against the {len(real)} pictures in "
                f"{options.fid_real}, in {self.of_real.shape[1]} features; compare equal numbers of pictures only"
            )
            self.facts |= {
                "fid_real": options.fid_real,
                "fid_weights": options.fid_weights,
                "fid_model": options.fid_model,
                "real_pictures": len(real),
            }
        if options.pictures is None:
            columns += [COSTS[0], COSTS[3]]
            kind = "of the GPU's memory" if device.type == "cuda" else "resident memory of the process so far"
            notes.append(
                "ms/picture: from the texts to PNG files, text encoders and transformer loaded once before, batches of "
                f"{options.batch_size or 1}; peak MB: {kind}"
            )
        self.title = f"the pictures in {options.pictures}" if options.pictures else f"the prompts of {options.prompts}"
        self.columns, self.plotted, self.notes = tuple(columns), tuple(plotted), tuple(notes)

    def score(self, model: Generator, name: str, way: Way, seed: int, *, cost: bool) -> dict[str, Any]:
        assert self.prompts is not None
        options, count = self.options, self.options.n or 1
        folder = self.folder / f"{name}-{way.steps}-steps-guidance-{way.guidance:g}-seed-{seed}"
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        began = time.perf_counter()
        drawn = generate_files(
            model,
            self.prompts,
            folder,
            images_per_prompt=count,
            batch_size=options.batch_size or 1,
            num_inference_steps=way.steps,
            guidance_scale=way.guidance,
            negative_prompt=options.negative_prompt,
            height=options.height or options.resolution,
            width=options.width or options.resolution,
            # No two pictures of an evaluation have one seed.
            seed=seed * count * len(self.prompts),
            device=self.device,
        )
        seconds = time.perf_counter() - began
        # Before the networks that measure take memory too.
        costs: dict[str, Any] = {"peak_bytes": peak_bytes(self.device)} if cost and drawn.new else {}
        if costs and not drawn.kept:
            costs["seconds_per_picture"] = seconds / drawn.new
        return {**self.measure(read_folder(folder)), **costs}

    def measure(self, pictures: Sequence[Picture]) -> dict[str, Any]:
        """The scores of pictures that are there."""
        scores: dict[str, Any] = {"pictures": len(pictures)}
        if self.clip is not None:
            before = self.clip.cut
            scores["clip_score"] = clip_score(self.clip, pictures)
            if cut := self.clip.cut - before:
                print(f"careful: {cut} of {len(pictures)} texts are longer than the CLIP model reads", file=sys.stderr)
        if self.features is not None:
            found = features_of(self.features, pictures)
            scores[self.distance] = frechet_distance(found, self.of_real)
            scores["precision"], scores["recall"] = precision_recall(self.of_real, found)
        return scores


# ---- which benchmark


def benchmark_of(options: argparse.Namespace, model: Generator) -> Benchmark:
    """The benchmark that was asked for, the run's own, or the only one that has samples of the model's shape.

    Raises:
        SettingsError: none of these.
    """
    shape = picture_shape(model.network)
    makes = f"{model.phrase} makes pictures of the shape {list(shape)}"
    fitting = [n for n, data in SHIPPED.items() if shape in [(data.channels, e, e) for e in data.resolutions]]
    trained = None if options.benchmark else data_set_of(options.model)
    name = options.benchmark or (trained if trained in SHIPPED else None)
    if name is None and len(fitting) == 1:
        name = fitting[0]
    if not fitting:
        raise SettingsError(
            f"eval scores {', '.join(SHIPPED)}, and {makes}, which none of them has. Score its pictures of your own "
            "prompts: --prompts FILE with --clip-model PATH, or with --fid-real FOLDER"
        )
    if name is None:
        known = "nothing says what it was trained on" if trained is None else f"it was trained on {trained}"
        raise SettingsError(
            f"{makes}, which {' and '.join(fitting)} have, and {known}; name one of them with --benchmark, or score "
            "its pictures of your own prompts: --prompts FILE with --clip-model PATH, or with --fid-real FOLDER"
        )
    if name not in fitting:
        raise SettingsError(f"{makes}, and those of the benchmark {name} are others; it fits {', '.join(fitting)}")
    if options.resolution not in (None, shape[-1]):
        raise SettingsError(f"--resolution {options.resolution}: {model.phrase} makes pictures of {shape[-1]} pixels")
    return open_benchmark(name, shape[-1])
