"""Coloured shapes with prompts, rendered by the project: a text-to-image benchmark that needs no download.

A prompt belongs to one of six categories, which are those of GenEval (arXiv 2310.11513) for shapes instead of objects:

=================== ================================================
single object       "a circle"
two objects         "a circle and a square"
counting            "three circles", "two red circles"
colours             "a red circle"
position            "a circle above a square", "a blue square left of a green triangle"
attribute binding   "a red circle and a blue square"
=================== ================================================

What a prompt leaves open is drawn: colours that it does not name, size, place, rotation, the grey of the background and
the noise on it. So one prompt has many right pictures, and their mean, a blur, is none of them. :func:`parse` reads a
prompt back, which is what a scorer compares a picture with (:mod:`apex_fast.evaluation.shapes`).

How a picture is made: the objects of a prompt get sizes (smaller the more there are), then places are drawn until no
two objects touch, none leaves the picture and a named position holds. Each object is drawn over the grey by its signed
distance at the middle of every pixel, with an edge of one pixel; the noise lies on everything.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

SHAPES = ("circle", "square", "triangle")
COLOURS = {
    "red": (0.90, 0.10, 0.10),
    "green": (0.10, 0.70, 0.15),
    "blue": (0.12, 0.20, 0.95),
    "yellow": (0.95, 0.88, 0.10),
    "purple": (0.78, 0.15, 0.85),
    "cyan": (0.10, 0.82, 0.88),
}
"""RGB in [0, 1]; a drawn object is off by at most ``COLOUR_SPREAD`` in each channel."""
COLOUR_SPREAD = 0.06
COUNTS = {"two": 2, "three": 3, "four": 4}
RELATIONS = ("left of", "right of", "above", "below")
CATEGORIES = ("single object", "two objects", "counting", "colours", "position", "attribute binding")
RESOLUTIONS = (32, 64)

BACKGROUND = (0.25, 0.75)
"""The grey of the background in [0, 1], drawn uniformly."""
NOISE = 0.03
"""Standard deviation of the noise on every channel of every pixel, in units of [0, 1]."""

TURN = 15.0
"""The most that an object is turned, in degrees, either way; a triangle that is not turned stands on a side."""

_SIZES = {1: (6.0, 10.0), 2: (4.8, 6.2), 3: (4.3, 5.5), 4: (4.0, 4.8)}
"""Radius in pixels of a picture with an edge of 32, by the number of objects."""
_REACH = 1.15
"""What the corner of a triangle, the longest of the shapes, reaches in radii."""
_MARGIN = 1.5
"""Pixels (at an edge of 32) that stay free between two objects and towards the edge."""
_SLANT = 1.25
"""A named direction is at least so much longer than the other one, so that "left of" is never half "above"."""
_CANDIDATES = 64
_AT_ONCE = 2048


@dataclass(frozen=True)
class Thing:
    """What a prompt says of one object: its shape, and its colour or None where it is left open."""

    shape: str
    colour: str | None = None

    def __str__(self) -> str:
        return self.shape if self.colour is None else f"{self.colour} {self.shape}"


@dataclass(frozen=True)
class Scene:
    """What a prompt asks for.

    things: every object that is to be there, and no other. relation: where the first of two is, seen from the second;
    None where the prompt does not say.
    """

    category: str
    things: tuple[Thing, ...]
    relation: str | None = None

    def prompt(self) -> str:
        """The prompt, in words."""
        first = self.things[0]
        if self.category == "counting":
            word = next(word for word, count in COUNTS.items() if count == len(self.things))
            return f"{word} {first}s"
        if len(self.things) == 1:
            return f"a {first}"
        return f"a {first} {self.relation or 'and'} a {self.things[1]}"


def _all_scenes() -> dict[str, list[Scene]]:
    colours = tuple(COLOURS)
    pairs = [(a, b) for a in SHAPES for b in SHAPES]
    coloured = [Thing(shape, colour) for shape in SHAPES for colour in colours]
    scenes = {
        "single object": [Scene("single object", (Thing(shape),)) for shape in SHAPES],
        "two objects": [Scene("two objects", (Thing(a), Thing(b))) for a, b in pairs if a != b],
        "counting": [
            Scene("counting", (Thing(shape, colour),) * count)
            for count in COUNTS.values()
            for shape in SHAPES
            for colour in (None, *colours)
        ],
        "colours": [Scene("colours", (thing,)) for thing in coloured],
        "position": [
            Scene("position", (a, b), relation)
            for relation in RELATIONS
            for a, b in itertools.chain(
                ((Thing(a), Thing(b)) for a, b in pairs if a != b),
                ((a, b) for a in coloured for b in coloured if a.shape != b.shape and a.colour != b.colour),
            )
        ],
        "attribute binding": [
            Scene("attribute binding", (a, b))
            for a in coloured
            for b in coloured
            if a.shape != b.shape and a.colour != b.colour
        ],
    }
    assert tuple(scenes) == CATEGORIES
    return scenes


SCENES = _all_scenes()
"""Every scene that a prompt can ask for, by category."""
_BY_PROMPT = {scene.prompt(): scene for scenes in SCENES.values() for scene in scenes}


def all_prompts() -> list[str]:
    """Every prompt there is, in a fixed order."""
    return list(_BY_PROMPT)


def parse(prompt: str) -> Scene:
    """What ``prompt`` asks for; blanks and capitals do not matter.

    Raises:
        ValueError: no prompt of this benchmark.
    """
    scene = _BY_PROMPT.get(re.sub(r"\s+", " ", prompt.strip().lower()).removesuffix("."))
    if scene is None:
        raise ValueError(
            f"no prompt of the shapes: {prompt!r}; expected such as 'a red circle', 'three squares', 'a circle and a "
            f"square' or 'a blue square left of a green triangle', with the shapes {', '.join(SHAPES)}, the colours "
            f"{', '.join(COLOURS)} and two different shapes of two different colours (or of none) in a pair"
        )
    return scene


TRAINING_TURN = (
    *("single object", "two objects"),
    *("counting", "colours") * 2,
    *("position", "attribute binding") * 4,
)
"""The categories in the shares that a run trains on. In equal shares each of the 720 prompts on position with
colours would have 1/240 of the pictures that one of the six on two objects has."""


def draw_prompts(count: int, generator: torch.Generator, turn: Sequence[str] = CATEGORIES) -> list[str]:
    """``count`` prompts: the categories of ``turn`` in turn, and any scene of a category alike.

    In half of the prompts on position the colours are left open, and in half of those on counting, although there are
    fewer of these.
    """
    chosen = []
    for index in range(count):
        scenes = SCENES[turn[index % len(turn)]]
        if scenes[0].category in ("position", "counting"):
            wanted = bool(torch.randint(2, (), generator=generator))
            scenes = [scene for scene in scenes if (scene.things[0].colour is None) == wanted]
        chosen.append(scenes[int(torch.randint(len(scenes), (), generator=generator))].prompt())
    return chosen


@dataclass(frozen=True)
class Shapes:
    """Pictures with the prompts that they were made for.

    images: ``[N, 3, resolution, resolution]`` fp32 in [-1, 1]. prompts: N strings.
    """

    images: Tensor
    prompts: list[str]

    @staticmethod
    def load(
        split: str = "train",
        *,
        count: int = 20_000,
        resolution: int = 32,
        seed: int = 0,
        turn: Sequence[str] = CATEGORIES,
    ) -> Shapes:
        """``count`` pictures of a split, with the categories of ``turn`` in turn: by default in equal shares.

        The pictures of both splits are independent draws; the same arguments give the same pictures. More pictures of a
        split begin with the fewer ones' prompts but are other pictures.

        Raises:
            ValueError: another split or resolution, or no picture asked for.
        """
        if split not in ("train", "test"):
            raise ValueError(f"Shapes.load: split must be 'train' or 'test', got {split!r}")
        generator = torch.Generator().manual_seed(2 * seed + (split == "test"))
        prompts = draw_prompts(count, generator, turn)
        return Shapes(render(prompts, generator=generator, resolution=resolution), prompts)

    def __len__(self) -> int:
        return len(self.prompts)


def render(prompts: list[str], *, generator: torch.Generator, resolution: int = 32) -> Tensor:
    """One picture for each prompt, ``[N, 3, resolution, resolution]`` fp32 in [-1, 1].

    Args:
        generator: the source of everything that the prompts leave open.

    Raises:
        ValueError: a prompt that is none, no prompt, or another resolution than 32 or 64.
    """
    return render_scenes([parse(prompt) for prompt in prompts], generator=generator, resolution=resolution)


def render_scenes(scenes: list[Scene], *, generator: torch.Generator, resolution: int = 32) -> Tensor:
    """As :func:`render`, of scenes: also of such that no prompt asks for, with one to four objects.

    Raises:
        ValueError: no scene, one with no or too many objects, or another resolution than 32 or 64.
    """
    if resolution not in RESOLUTIONS:
        raise ValueError(f"the shapes are rendered at {' or '.join(map(str, RESOLUTIONS))} pixels, got {resolution}")
    if not scenes:
        raise ValueError("the shapes need at least one prompt, got none")
    for scene in scenes:
        if len(scene.things) not in _SIZES:
            raise ValueError(f"the shapes have 1 to {max(_SIZES)} objects in a picture, got {len(scene.things)}")
    images = torch.empty(len(scenes), 3, resolution, resolution)
    for start in range(0, len(scenes), _AT_ONCE):
        part = scenes[start : start + _AT_ONCE]
        for count in sorted({len(scene.things) for scene in part}):
            chosen = [i for i, scene in enumerate(part) if len(scene.things) == count]
            drawn = _render([part[i] for i in chosen], generator, resolution)
            images[torch.tensor(chosen) + start] = drawn
    return images


def _render(scenes: list[Scene], generator: torch.Generator, resolution: int) -> Tensor:
    """Pictures of scenes that all have the same number of objects."""
    batch, count = len(scenes), len(scenes[0].things)
    low, high = _SIZES[count]
    radius = low + (high - low) * torch.rand(batch, count, generator=generator)
    centre = _places(scenes, radius, generator)
    turn = math.radians(TURN) * (2 * torch.rand(batch, count, generator=generator) - 1)
    colour = _colours(scenes, generator)
    low, high = BACKGROUND
    grey = low + (high - low) * torch.rand(batch, 1, 1, 1, generator=generator)
    picture = grey.expand(batch, 3, resolution, resolution).clone()
    axis = (torch.arange(resolution) + 0.5) * (32 / resolution)
    y, x = axis[:, None], axis[None, :]
    for k in range(count):
        dx, dy = x - centre[:, k, 0, None, None], y - centre[:, k, 1, None, None]
        cos, sin = turn[:, k, None, None].cos(), turn[:, k, None, None].sin()
        u, v = cos * dx + sin * dy, cos * dy - sin * dx
        distance = torch.empty(batch, resolution, resolution)
        for shape in SHAPES:
            rows = torch.tensor([scene.things[k].shape == shape for scene in scenes])
            distance[rows] = _distance(shape, u[rows], v[rows], radius[rows, k, None, None])
        cover = (0.5 - distance * (resolution / 32)).clamp(0, 1).unsqueeze(1)
        picture = picture * (1 - cover) + colour[:, k, :, None, None] * cover
    picture = picture + NOISE * torch.randn(picture.shape, generator=generator)
    return picture.clamp(0, 1) * 2 - 1


def _distance(shape: str, u: Tensor, v: Tensor, radius: Tensor) -> Tensor:
    """How far outside of the shape a point is (negative inside), in the unit of ``radius``, up to corners."""
    if shape == "circle":
        return (u * u + v * v).sqrt() - 0.9 * radius
    if shape == "square":
        return torch.maximum(u.abs(), v.abs()) - 0.78 * radius
    # An equilateral triangle: each side is half as far from the middle as the corners are.
    slant = math.sqrt(3) / 2
    return torch.maximum(torch.maximum(v, slant * u - 0.5 * v), -slant * u - 0.5 * v) - 0.5 * _REACH * radius


def _places(scenes: list[Scene], radius: Tensor, generator: torch.Generator) -> Tensor:
    """Centres ``[B, n, 2]`` (x, y) at which nothing touches and every named position holds."""
    batch, count = radius.shape
    centre = torch.empty(batch, count, 2)
    left = torch.arange(batch)
    while len(left):
        r = _REACH * radius[left] + _MARGIN / 2
        room = torch.rand(len(left), _CANDIDATES, count, 2, generator=generator)
        places = r[:, None, :, None] + room * (32 - 2 * r[:, None, :, None])
        good = torch.ones(len(left), _CANDIDATES, dtype=torch.bool)
        for i, j in itertools.combinations(range(count), 2):
            apart = (places[:, :, i] - places[:, :, j]).norm(dim=-1)
            good &= apart > (r[:, i] + r[:, j])[:, None]
        if count == 2:
            dx, dy = (places[:, :, 0] - places[:, :, 1]).unbind(-1)
            for relation in RELATIONS:
                along, across = (dx, dy) if relation.endswith("of") else (dy, dx)
                along = -along if relation in ("left of", "above") else along
                rows = torch.tensor([scenes[i].relation == relation for i in left.tolist()])
                good &= ~rows[:, None] | (along > _SLANT * across.abs())
        found, first = good.max(1)
        centre[left[found]] = places[found, first[found]]
        left = left[~found]
    return centre


def _colours(scenes: list[Scene], generator: torch.Generator) -> Tensor:
    """RGB ``[B, n, 3]`` in [0, 1]; a colour that the prompt leaves open is drawn for each object alone."""
    table, names = torch.tensor(list(COLOURS.values())), list(COLOURS)
    count = len(scenes[0].things)
    drawn = torch.randint(len(names), (len(scenes), count), generator=generator)
    for row, scene in enumerate(scenes):
        for k, thing in enumerate(scene.things):
            if thing.colour is not None:
                drawn[row, k] = names.index(thing.colour)
    spread = COLOUR_SPREAD * (2 * torch.rand(len(scenes), count, 3, generator=generator) - 1)
    return (table[drawn] + spread).clamp(0, 1)
