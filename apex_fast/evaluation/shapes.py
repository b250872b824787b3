"""Scores on the shapes: what a picture shows, read by image analysis without a network, and features for distances.

How a picture is read (:func:`describe`), with scikit-image and scipy:

1. The background is the colour that most of the picture has. It has to be a plain grey.
2. Every pixel that differs from it gets the hue that it is mixed from; mixing with grey, as edges do, does not change
   a hue. Connected pixels of one hue are an object, or a speck where they are very few.
3. The colour of an object is that of its strongest pixels, and is named after the nearest of the six in CIELAB.
4. With this colour and the background, each pixel around is covered by a share between 0 and 1. From the central
   moments of the cover come two numbers that no rotation changes: the third-order one is 0 but for triangles, the
   fourth-order one is 0 but for squares (Flusser, *On the independence of rotation moment invariants*, 2000). They name
   the shape. Blur by a round kernel changes neither, so it is judged apart, by the width of the edge.
5. An object is clear if its numbers lie near those of its shape, if its outline (at a cover of a half) is as full and
   as round as that of its shape, its edge is narrow, its colour even and near to the name. Anything else that is larger
   than a speck is something unclear.

A picture is right (:func:`right`) if it shows what the prompt asks for and nothing else: every object clear, as many of
each shape and, where it is named, colour as asked, and where asked. GenEval (arXiv 2310.11513 and its evaluation code),
which finds objects with a detector and classifies their colours, is less strict: there, other objects may be in the
picture, except more of the same in counting, and what is left of something may be as far above it. Here nothing else
may be in it, clear or unclear, and the named direction has to be the larger one.

Measured on rendered and on spoilt pictures by ``python -m apex_fast.evaluation.shapes --check``. The network for the
features was made by ``python -m apex_fast.evaluation.shapes --train-features --output SHAPES_FEATURES.safetensors``.
"""

from __future__ import annotations

import argparse
import itertools
import math
import time
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from apex_fast.data.shapes import (
    CATEGORIES,
    COLOURS,
    NOISE,
    RELATIONS,
    RESOLUTIONS,
    SHAPES,
    Scene,
    Shapes,
    Thing,
    draw_prompts,
    parse,
    render,
    render_scenes,
)
from apex_fast.evaluation.benchmark import RenderedBenchmark
from apex_fast.evaluation.metrics import frechet_distance
from apex_fast.extras import require

FEATURES_PATH = Path(__file__).parent.parent / "assets" / "shapes_features_32.safetensors"
"""The network for features that ships with the package."""

# Lengths are in pixels, areas in pixels of a picture with an edge of 32; colours are RGB in [0, 1].
SPECK = 6.0
"""An area below this is a speck: ignored, as long as all of them together stay below ``ALL_SPECKS``."""
ALL_SPECKS = 16.0
SMALLEST = 18.0
"""An area from which on a thing can be an object (the smallest triangle covers 27)."""
WIDEST_EDGE = 3.0
"""The width of an edge, taken as a linear ramp. Rendered ones are 1 wide, a Gaussian of deviation s makes 2.8 s."""
COLOUR_DISTANCE = 25.0
"""To the colour that a name stands for, in CIELAB. Rendered ones are at most 20 off; the closest names are 44 apart."""
UNEVENNESS = 0.12
"""Mean distance of an object's strongest pixels to their median; the renderer's noise makes 0.05."""
FOREGROUND = 0.25
"""What differs from the background by less, in RGB, counts as background. Rendered objects differ by 0.4 or more."""

_GREY = 0.12
_BACKGROUND_SHARE = 0.5
_BACKGROUND_RANGE = (0.15, 0.85)


@dataclass(frozen=True)
class Found:
    """Something in a picture.

    shape, colour: names, or None where unclear. centre: (x, y) in pixels from the left upper corner. area: in pixels.
    solidity: the share of its convex hull that the outline fills. problem: why it is no clear object, or None.
    """

    shape: str | None
    colour: str | None
    centre: tuple[float, float]
    area: float
    solidity: float
    problem: str | None = None

    def __str__(self) -> str:
        name = f"{self.colour or 'uncoloured'} {self.shape or 'thing'} at {self.centre[0]:.1f}, {self.centre[1]:.1f}"
        return name if self.problem is None else f"{name}: {self.problem}"


@dataclass(frozen=True)
class _Form:
    """What the numbers of a shape may be, see :func:`_shape_of`; far enough from the other shapes' to be no other."""

    third: tuple[float, float]
    fourth: tuple[float, float]
    spread: tuple[float, float]
    roundness: tuple[float, float]

    def fits(self, third: float, fourth: float, spread: float, roundness: float) -> bool:
        """Whether all numbers are in their ranges."""
        pairs = ((self.third, third), (self.fourth, fourth), (self.spread, spread), (self.roundness, roundness))
        return all(low <= value <= high for (low, high), value in pairs)


# Ideal values are 1 for what a number is scaled by: third order of a triangle, fourth order of a square, spread (moment
# of inertia) and roundness of a circle. The spread of a square is 1.05 and that of a triangle 1.21, their roundness is
# 0.79 and 0.60; pixels blunt the corners of small ones, to 0.90 and 0.77 at most.
_FORMS = {
    "circle": _Form(third=(0.0, 0.35), fourth=(0.0, 0.45), spread=(0.95, 1.10), roundness=(0.94, 1.01)),
    "square": _Form(third=(0.0, 0.35), fourth=(0.60, 1.60), spread=(1.0, 1.17), roundness=(0.72, 0.94)),
    "triangle": _Form(third=(0.65, 1.50), fourth=(0.0, 0.80), spread=(1.15, 1.40), roundness=(0.55, 0.84)),
}
_THIRD_OF_TRIANGLE = 0.1 / (3 * math.sqrt(3) / 4) ** 1.5
_FOURTH_OF_SQUARE = 1 / 60
_SPREAD_OF_CIRCLE = 1 / (2 * math.pi)
_MOST_OBLONG = 0.15
_LEAST_SOLID = 0.90


def describe(image: Tensor) -> list[Found]:
    """What is in a picture ``[3, H, W]`` in [-1, 1], specks left out, from the largest to the smallest thing.

    A picture without a plain grey background is one unclear thing.
    """
    if image.dim() != 3 or image.shape[0] != 3:
        raise ValueError(f"describe: expected one picture [3, H, W], got {list(image.shape)}")
    pixels = ((image.detach().cpu().to(torch.float64) + 1) / 2).clamp(0, 1).permute(1, 2, 0).numpy()
    height, width = pixels.shape[:2]
    whole = ((width / 2, height / 2), float(height * width), 0.0)
    if not np.isfinite(pixels).all():
        return [Found(None, None, *whole, "pixels that are no numbers")]
    background = _background(pixels)
    if background is None:
        return [Found(None, None, *whole, "no plain grey background")]
    return _things(pixels, background)


def _background(pixels: np.ndarray) -> np.ndarray | None:
    """RGB [3] of the background, or None where most of the picture is not of one grey."""
    colour = np.median(pixels.reshape(-1, 3), axis=0)
    for _ in range(2):
        near = np.linalg.norm(pixels - colour, axis=2) < FOREGROUND
        if near.mean() < _BACKGROUND_SHARE:
            return None
        colour = pixels[near].mean(axis=0)
    low, high = _BACKGROUND_RANGE
    grey = colour.mean()
    return colour if np.linalg.norm(colour - grey) < _GREY / 2 and low < grey < high else None


@lru_cache(maxsize=1)
def _palette() -> tuple[np.ndarray, np.ndarray]:
    """Directions of the colours away from grey ``[6, 3]``, and the colours in CIELAB ``[6, 3]``."""
    colours = np.array(list(COLOURS.values()))
    chroma = colours - colours.mean(axis=1, keepdims=True)
    lab = require("skimage.color", "data").rgb2lab(colours[None])[0]
    return chroma / np.linalg.norm(chroma, axis=1, keepdims=True), lab


def _things(pixels: np.ndarray, background: np.ndarray) -> list[Found]:
    """Everything that is larger than a speck; the specks are one thing where they are too many."""
    measure, ndimage = require("skimage.measure", "data"), require("scipy.ndimage", "data")
    unit = pixels.shape[0] * pixels.shape[1] / 32**2
    offset = pixels - background
    distance = np.linalg.norm(offset, axis=2)
    chroma = offset - offset.mean(axis=2, keepdims=True)
    directions, _ = _palette()
    hue = (chroma @ directions.T).argmax(axis=2) + 1
    hue[np.linalg.norm(chroma, axis=2) < _GREY] = len(directions) + 1
    hue[distance < FOREGROUND] = 0
    labels = measure.label(hue, background=0, connectivity=1)
    sizes = np.bincount(labels.ravel())
    large = np.flatnonzero(sizes >= SPECK * unit)
    large = large[large > 0]
    of_large = np.isin(labels, large)
    found = []
    for label in large[np.argsort(-sizes[large], kind="stable")]:
        own = labels == label
        others = of_large & ~own
        # The faint pixels around belong to the object too, unless they are another one's. How far a soft edge reaches
        # is looked for in a wider ring, from which the edges of the others are left out.
        around = ndimage.binary_dilation(own, iterations=2) & ~others
        wide = ndimage.binary_dilation(own, iterations=5) & ~ndimage.binary_dilation(others, iterations=2) | around
        found.append(_thing(pixels, background, own, around, wide, unit))
    specks = (labels > 0) & ~of_large
    if specks.sum() >= ALL_SPECKS * unit:
        y, x = np.nonzero(specks)
        centre = (float(x.mean()) + 0.5, float(y.mean()) + 0.5)
        found.append(Found(None, None, centre, float(specks.sum()), 0.0, "too many specks"))
    return found


def _thing(
    pixels: np.ndarray, background: np.ndarray, own: np.ndarray, around: np.ndarray, wide: np.ndarray, unit: float
) -> Found:
    """One connected region ``own``, read within ``around``, its edge within ``wide``; unit: pixels in an area of 1."""
    strength = np.linalg.norm(pixels[own] - background, axis=1)
    core = pixels[own][strength >= 0.85 * np.quantile(strength, 0.8)]
    colour = np.median(core, axis=0)
    contrast = colour - background
    everywhere = ((pixels - background) @ contrast / (contrast @ contrast)).clip(0, 1)
    cover = everywhere * around
    # Noise far from the centre weighs most in the moments, so what is nearly nothing or nearly all counts as such.
    cover = np.where(cover < 0.12, 0.0, np.where(cover > 0.88, 1.0, cover))
    y, x = np.nonzero(around)
    weight = cover[y, x]
    area = weight.sum()
    centre_x, centre_y = (weight * x).sum() / area, (weight * y).sum() / area
    centre = (float(centre_x) + 0.5, float(centre_y) + 0.5)
    name = _colour_of(colour)
    shape, solidity, problem = _shape_of(cover, (x - centre_x) + 1j * (y - centre_y), weight, everywhere * wide)
    if area < SMALLEST * unit:
        problem = "smaller than any object"
    elif name is None:
        problem = "a colour that is none of the names"
    elif np.linalg.norm(core - colour, axis=1).mean() > UNEVENNESS:
        problem = "an uneven colour"
    return Found(shape, name, centre, float(area), solidity, problem)


def _colour_of(colour: np.ndarray) -> str | None:
    """The name that is nearest to RGB [3] in CIELAB, or None where none is near."""
    lab = require("skimage.color", "data").rgb2lab(colour[None, None])[0, 0]
    away = np.linalg.norm(_palette()[1] - lab, axis=1)
    nearest = int(away.argmin())
    return list(COLOURS)[nearest] if away[nearest] <= COLOUR_DISTANCE else None


def _shape_of(
    cover: np.ndarray, place: np.ndarray, weight: np.ndarray, wide: np.ndarray
) -> tuple[str | None, float, str | None]:
    """Shape, solidity and problem of a cover ``[H, W]``, given also as weights at complex places from its centre, and
    in a ``wide`` surrounding."""
    measure, spatial = require("skimage.measure", "data"), require("scipy.spatial", "data")
    area = weight.sum()
    square = place * place
    inertia = (weight * (place * place.conj()).real).sum() / area**2
    oblong = abs((weight * square).sum()) / area**2 / inertia
    third = abs((weight * square * place).sum()) / area**2.5 / _THIRD_OF_TRIANGLE
    fourth = abs((weight * square * square).sum()) / area**3 / _FOURTH_OF_SQUARE
    outlines = measure.find_contours(np.pad(cover, 1), 0.5)
    outline = max(outlines, key=len, default=np.zeros((0, 2)))
    if len(outline) < 8:
        return None, 0.0, "no outline"
    hull = spatial.ConvexHull(outline)
    # In two dimensions scipy's volume is the area, and its area the perimeter.
    roundness = 4 * math.pi * hull.volume / hull.area**2
    y, x = outline[:, 0], outline[:, 1]
    solidity = float(abs(x[:-1] @ y[1:] - x[1:] @ y[:-1]) / 2 / hull.volume)
    # A linear ramp spends 0.6 of its width between a cover of 0.2 and one of 0.8.
    edge = ((wide > 0.2) & (wide < 0.8)).sum() / hull.area / 0.6
    if edge > WIDEST_EDGE:
        return None, solidity, "a blurred edge"
    if solidity < _LEAST_SOLID or oblong > _MOST_OBLONG:
        return None, solidity, "no clear shape"
    for shape, form in _FORMS.items():
        if form.fits(third, fourth, inertia / _SPREAD_OF_CIRCLE, roundness):
            return shape, solidity, None
    return None, solidity, "no clear shape"


def right(images: Tensor, prompts: list[str]) -> Tensor:
    """``[N]`` bool: whether each picture of ``images`` ``[N, 3, H, W]`` in [-1, 1] shows what its prompt asks for.

    Raises:
        ValueError: not one prompt for each picture, or a prompt that :func:`apex_fast.data.shapes.parse` does not know.
    """
    if images.dim() != 4 or images.shape[1] != 3 or len(images) != len(prompts):
        raise ValueError(
            f"right: expected pictures [N, 3, H, W] and N prompts, got {list(images.shape)} and {len(prompts)} prompts"
        )
    scenes = [parse(prompt) for prompt in prompts]
    pictures = images.detach().cpu()
    good = [_shows(describe(picture), scene) for picture, scene in zip(pictures, scenes, strict=True)]
    return torch.tensor(good, dtype=torch.bool)


def _shows(found: list[Found], scene: Scene) -> bool:
    """Whether these are the things of a scene, in some order, and no other."""
    if len(found) != len(scene.things) or any(thing.problem is not None for thing in found):
        return False
    return any(
        all(map(_is, order, scene.things)) and (scene.relation is None or _holds(scene.relation, *order))
        for order in itertools.permutations(found)
    )


def _is(found: Found, thing: Thing) -> bool:
    return found.shape == thing.shape and thing.colour in (None, found.colour)


def _holds(relation: str, first: Found, second: Found) -> bool:
    """Whether ``first`` is there as seen from ``second``, more than in any other direction."""
    right_of, below = first.centre[0] - second.centre[0], first.centre[1] - second.centre[1]
    along, across = (right_of, below) if relation.endswith("of") else (below, right_of)
    return (-along if relation in ("left of", "above") else along) > abs(across)


class ShapesFeatures(nn.Module):
    """Four convolutions and two linear layers on ``[B, 3, 32, 32]`` pictures in [-1, 1], about 93,000 parameters.

    Trained to say what :func:`describe` finds: how many objects there are of each colour and shape, how much of the
    picture each shape covers, where the objects are, and how bright the background is. Pictures with an edge of 64 are
    averaged over 2 x 2 pixels before, so detail that only 64 pixels show is not in the features.
    """

    feature_size = 64
    targets = len(SHAPES) * len(COLOURS) + 3 * len(SHAPES) + 1

    def __init__(self) -> None:
        super().__init__()
        self.convolutions = nn.Sequential(
            nn.Conv2d(3, 24, 3, padding=1),
            nn.GELU(),
            nn.Conv2d(24, 32, 3, stride=2, padding=1),
            nn.GELU(),
            nn.Conv2d(32, 48, 3, stride=2, padding=1),
            nn.GELU(),
            nn.Conv2d(48, 48, 3, stride=2, padding=1),
            nn.GELU(),
        )
        self.to_features = nn.Linear(48 * 4 * 4, self.feature_size)
        self.to_targets = nn.Linear(self.feature_size, self.targets)

    def features(self, images: Tensor) -> Tensor:
        """``[B, 64]`` before the last activation, for pictures ``[B, 3, R, R]`` with R a multiple of 32."""
        edge = images.shape[-1]
        if images.dim() != 4 or images.shape[1] != 3 or images.shape[2] != edge or edge % 32:
            raise ValueError(f"features: expected pictures [N, 3, 32, 32] or [N, 3, 64, 64], got {list(images.shape)}")
        if edge != 32:
            images = F.avg_pool2d(images, edge // 32)
        return self.to_features(self.convolutions(images).flatten(1))

    def forward(self, images: Tensor) -> Tensor:
        """``[B, targets]``: see :func:`_targets_of`."""
        return self.to_targets(F.gelu(self.features(images)))

    @staticmethod
    def load(path: str | Path = FEATURES_PATH) -> ShapesFeatures:
        """Read weights from a safetensors file; the default is the file that ships."""
        if not Path(path).is_file():
            raise FileNotFoundError(
                f"no network for features at {path}; make one with: "
                f"python -m apex_fast.evaluation.shapes --train-features --output {path}"
            )
        network = ShapesFeatures()
        network.load_state_dict(load_file(path))
        return network.eval().requires_grad_(False)

    def save(self, path: str | Path) -> None:
        """Write the weights to a safetensors file."""
        save_file({name: value.contiguous() for name, value in self.state_dict().items()}, path)

    @staticmethod
    def train_new(*, pictures: int = 12_000, steps: int = 2000, batch_size: int = 128, seed: int = 0) -> ShapesFeatures:
        """Train on new pictures of the training split. The global random state is left as it was."""
        data = Shapes.load("train", count=pictures, resolution=32, seed=1_000_000 + seed)
        targets = torch.stack([_targets_of(image) for image in data.images])
        generator = torch.Generator().manual_seed(seed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            network = ShapesFeatures()
        optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3, weight_decay=0.02)
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-3, total_steps=steps)
        for _ in range(steps):
            chosen = torch.randint(len(data), (batch_size,), generator=generator)
            loss = F.mse_loss(network(data.images[chosen]), targets[chosen])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            scheduler.step()
        return network.eval().requires_grad_(False)


def _targets_of(image: Tensor) -> Tensor:
    """What the network for features has to say of a picture ``[3, 32, 32]``.

    Counts by shape and colour (18), then for each shape its share of the picture times 10 and the sums of its objects'
    places in [-1, 1] (9), then the mean brightness of the background in [-1, 1] times 2 (1).
    """
    counts, sums = torch.zeros(len(SHAPES), len(COLOURS)), torch.zeros(len(SHAPES), 3)
    for found in describe(image):
        if found.problem is None:
            shape = SHAPES.index(found.shape)
            counts[shape, list(COLOURS).index(found.colour)] += 1
            sums[shape] += torch.tensor([found.area / 102.4, found.centre[0] / 16 - 1, found.centre[1] / 16 - 1])
    # Less than half of a picture is objects, so the median is the background's.
    brightness = 2 * image.mean(0).median()
    return torch.cat([counts.flatten(), sums.flatten(), brightness[None]])


@lru_cache(maxsize=1)
def shipped_features() -> ShapesFeatures:
    """The network for features that ships, loaded once."""
    return ShapesFeatures.load()


class ShapesBenchmark(RenderedBenchmark):
    """The shapes at 32 or 64 pixels; what a picture shows is decided by :func:`right`.

    All real pictures are rendered when asked for, the same ones for the same arguments.
    """

    name = "shapes"
    categories = CATEGORIES
    diversity_prompts = (
        "a circle",
        "a triangle",
        "a circle and a square",
        "a square and a triangle",
        "two circles",
        "three red squares",
        "four triangles",
        "a green circle",
        "a blue triangle",
        "a circle above a square",
        "a yellow square left of a purple triangle",
        "a red circle and a cyan square",
    )

    def load(self, split: str, count: int, seed: int) -> Shapes:
        """See :meth:`Shapes.load`."""
        return Shapes.load(split, count=count, resolution=self.resolution, seed=seed)

    def category(self, prompt: str) -> str:
        """One of ``CATEGORIES``."""
        return parse(prompt).category

    def right(self, images: Tensor, prompts: list[str]) -> Tensor:
        """See :func:`right`."""
        return right(images, prompts)

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """``[N, 64]`` of the network that ships, on the CPU; see :class:`ShapesFeatures`."""
        network = shipped_features()
        return torch.cat([network.features(part) for part in images.detach().float().cpu().split(500)])

    def real_of(self, prompt: str, count: int, *, seed: int) -> Tensor:
        """Rendered pictures of one prompt."""
        generator = torch.Generator().manual_seed(seed)
        return render([prompt] * count, generator=generator, resolution=self.resolution)


def _other(of: tuple[str, ...], but: set[str | None], generator: torch.Generator) -> str:
    """Any of some names but a few."""
    left = [name for name in of if name not in but]
    return left[int(torch.randint(len(left), (), generator=generator))]


def _changed(scene: Scene, change: str, generator: torch.Generator) -> Scene | None:
    """A scene that is not what ``scene`` asks for, in one respect; None where there is no such respect."""
    things, first = scene.things, scene.things[0]
    colours = {thing.colour for thing in things}
    if change == "wrong colour" and first.colour is not None:
        recoloured = Thing(first.shape, _other(tuple(COLOURS), colours, generator))
        return Scene(scene.category, (recoloured, *things[1:]), scene.relation)
    if change == "colours swapped" and len(colours) == 2:
        pair = (Thing(first.shape, things[1].colour), Thing(things[1].shape, first.colour))
        return Scene(scene.category, pair, scene.relation)
    if change == "wrong shape":
        reshaped = Thing(_other(SHAPES, {first.shape}, generator), first.colour)
        return Scene(scene.category, (reshaped, *things[1:]), scene.relation)
    if change == "object missing" and len(things) > 1:
        return Scene(scene.category, things[1:])
    if change == "object added" and len(things) < 4:
        return Scene(scene.category, (*things, Thing(_other(SHAPES, set(), generator))))
    if change == "wrong position" and scene.relation is not None:
        return Scene(scene.category, things, _other(RELATIONS, {scene.relation}, generator))
    return None


CHANGES = ("wrong colour", "colours swapped", "wrong shape", "object missing", "object added", "wrong position")
"""Pictures of another scene than the one that is asked for."""
SPOILT = ("blur 2", "blur 3", "mean of 64", "blend", "no colour", "noise alone", "background alone")
"""Pictures that show nothing clearly; blurs are Gaussian, with their deviation in pixels."""
HARMLESS = ("rendered", "blur 0.7", "more noise", "paler")
"""Pictures that are right."""
_MEAN_OF = 64


def spoil(kind: str, prompts: list[str], *, resolution: int, generator: torch.Generator) -> tuple[Tensor, list[str]]:
    """Rendered pictures with a flaw, and those of ``prompts`` that they are to be judged by.

    Args:
        kind: one of ``CHANGES``, ``SPOILT`` or ``HARMLESS``. A change leaves out the prompts that cannot have it: where
            no colour or position is named, nothing can be missing or, of four objects, none can be added.

    Raises:
        ValueError: another kind.
    """
    if kind not in (*CHANGES, *SPOILT, *HARMLESS):
        raise ValueError(f"the kinds are {', '.join((*CHANGES, *SPOILT, *HARMLESS))}, got {kind!r}")
    if kind in CHANGES:
        changed = [(_changed(parse(prompt), kind, generator), prompt) for prompt in prompts]
        left = [(scene, prompt) for scene, prompt in changed if scene is not None]
        if not left:
            return torch.empty(0, 3, resolution, resolution), []
        images = render_scenes([scene for scene, _ in left], generator=generator, resolution=resolution)
        return images, [prompt for _, prompt in left]
    if kind == "mean of 64":
        means = [render([prompt] * _MEAN_OF, generator=generator, resolution=resolution).mean(0) for prompt in prompts]
        return torch.stack(means), prompts
    images = render(prompts, generator=generator, resolution=resolution)
    noise = torch.randn(images.shape, generator=generator)
    if kind.startswith("blur"):
        blur = require("scipy.ndimage", "data").gaussian_filter
        deviation = float(kind.split()[1])
        images = torch.from_numpy(blur(images.numpy(), (0, 0, deviation, deviation), mode="nearest"))
    elif kind == "blend":
        images = (images + render(prompts, generator=generator, resolution=resolution).roll(1, 0)) / 2
    elif kind == "no colour":
        images = images.mean(1, keepdim=True).expand(-1, 3, -1, -1)
    elif kind == "noise alone":
        images = noise.clamp(-1, 1)
    elif kind == "background alone":
        images = (torch.rand(len(prompts), 1, 1, 1, generator=generator) - 0.5 + 2 * NOISE * noise).clamp(-1, 1)
    elif kind == "more noise":
        images = (images + 2 * NOISE * noise).clamp(-1, 1)
    elif kind == "paler":
        images = 0.9 * images
    return images, prompts


def check(
    per_category: int, *, resolution: int, others: int = 100, seed: int = 0
) -> dict[str, dict[str, float | None]]:
    """Share of pictures that :func:`right` accepts, by kind (see :func:`spoil`) and category.

    None where a category has no such pictures. ``per_category``: how many rendered pictures of each category;
    ``others``: how many of each other kind, but for those that cannot be changed so.
    """
    rates: dict[str, dict[str, float | None]] = {}
    for number, kind in enumerate((*HARMLESS, *CHANGES, *SPOILT)):
        generator = torch.Generator().manual_seed(1_000 * seed + number)
        count = per_category if kind == "rendered" else others
        prompts = draw_prompts(count * len(CATEGORIES), generator)
        images, judged = spoil(kind, prompts, resolution=resolution, generator=generator)
        accepted = right(images, judged).tolist()
        rates[kind] = {}
        for category in CATEGORIES:
            own = [good for good, prompt in zip(accepted, judged, strict=True) if parse(prompt).category == category]
            rates[kind][category] = sum(own) / len(own) if own else None
    return rates


def distances(*, resolution: int, pictures: int = 600, seed: int = 0) -> dict[str, float]:
    """Frechet distance of harmless and of spoilt pictures to as many held-out ones of the same prompts."""
    benchmark = ShapesBenchmark(resolution)
    real, prompts = benchmark.real(pictures, seed=seed)
    reference, found = benchmark.features(real), {}
    # Without the means, whose rendering takes minutes.
    for number, kind in enumerate(kind for kind in (*HARMLESS, *SPOILT) if kind != "mean of 64"):
        generator = torch.Generator().manual_seed(1_000 * seed + 500 + number)
        images, _ = spoil(kind, prompts, resolution=resolution, generator=generator)
        found[kind] = frechet_distance(benchmark.features(images), reference)
    return found


def _print_check(resolution: int, per_category: int, seed: int) -> None:
    began = time.perf_counter()
    rates = check(per_category, resolution=resolution, seed=seed)
    print(f"{resolution} pixels: share accepted ({time.perf_counter() - began:.0f} s)")
    print(" " * 17 + "".join(f"{category:>18}" for category in CATEGORIES))
    for kind, row in rates.items():
        print(f"{kind:<17}" + "".join(f"{'-' if rate is None else f'{rate:.3f}':>18}" for rate in row.values()))
    apart = ", ".join(
        f"{kind} {distance:.2f}" for kind, distance in distances(resolution=resolution, seed=seed).items()
    )
    print(f"Frechet distance to 600 held-out pictures: {apart}")


def main() -> None:
    """Check the scorer on rendered and on spoilt pictures, or train the network for features."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--check", action="store_true", help="print what the scorer accepts")
    parser.add_argument("--per-category", type=int, default=1000, help="rendered pictures at 32 pixels (a fifth at 64)")
    parser.add_argument("--train-features", action="store_true", help="train the network for features")
    parser.add_argument("--output", type=Path, default=Path("shapes_features_32.safetensors"))
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    if not (arguments.check or arguments.train_features):
        parser.error("nothing to do: give --check, --train-features or both")
    if arguments.check:
        for resolution, count in zip(RESOLUTIONS, (arguments.per_category, arguments.per_category // 5), strict=True):
            _print_check(resolution, count, arguments.seed)
    if arguments.train_features:
        network = ShapesFeatures.train_new(seed=arguments.seed)
        network.save(arguments.output)
        a, b = (Shapes.load("test", count=600, seed=seed).images for seed in (1, 2))
        with torch.no_grad():
            distance = frechet_distance(network.features(a), network.features(b))
        size = arguments.output.stat().st_size
        print(f"{arguments.output}: {size} bytes, Frechet distance of real pictures {distance:.3f} (600 against 600)")


if __name__ == "__main__":
    main()
