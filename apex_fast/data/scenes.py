"""Real drawings composed into scenes, with prompts: a text-to-image benchmark that needs no download.

Sixty things (animals, food, objects) have two to six drawings each, by two hands: Twemoji and Noto Emoji. They ship as
one atlas of small pictures (``assets/scenes_atlas.png``, with attribution in ``scenes_atlas.LICENSE.md``). A prompt
belongs to one of four categories, and each may name the colour behind it or leave it open:

================ ==========================================================
single object    "a cat", "an ice cream on pink"
two objects      "a cat and a dog", "a red apple and a rocket on white"
counting         "two cats", "two cats on green"
position         "a red apple left of a cat", "a tree above a fish on blue"
================ ==========================================================

What a prompt leaves open is drawn: which drawings, their size, place and turn, whether they are mirrored, the shade of
the background and, where it is not named, its colour. So one prompt has many right pictures, and their mean, a blur,
is none of them. :func:`parse` reads a prompt back, which is what a scorer compares a picture with
(:mod:`apex_fast.evaluation.scenes`).

How a picture is made: the things get drawings and sizes, then places are drawn until the boxes of no two overlap, none
leaves the picture and a named position holds. A drawing is sampled bilinearly from its tile (20 pixels for pictures of
32, the whole 40 for pictures of 64, so that a tile is at most enlarged by a third) and laid over the background with
its own transparency.

How the splits are made: a combination is the things together with the background ("cat, dog, blue", whatever their
positions). A thing alone and two of a kind are held out on two of the eight backgrounds each, all backgrounds equally
often; of the pairs of different things a tenth belongs to the test split on every background, and of the others a tenth
of the combinations. Hashes of the words decide. A prompt that names no background is in the test split only where every
background of its things is, and a training picture never gets an open background that would make a held-out
combination. So the training split holds every thing, every background and every relation, as often as the test split
does, and none of the combinations that the test split asks for.

The atlas was made by ``python -m apex_fast.data.scenes --make-atlas TWITTER GOOGLE``, with the folders of the unpacked
npm packages ``emoji-datasource-twitter`` and ``emoji-datasource-google`` (16.0.0).
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import itertools
import json
import math
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from apex_fast.extras import require

THINGS = {
    "cat": "1f408 1f431",
    "dog": "1f415 1f436",
    "horse": "1f40e 1f434",
    "cow": "1f404 1f42e",
    "pig": "1f416 1f437",
    "rabbit": "1f407 1f430",
    "tiger": "1f405 1f42f",
    "monkey": "1f412 1f435",
    "panda": "1f43c",
    "fox": "1f98a",
    "frog": "1f438",
    "elephant": "1f418",
    "penguin": "1f427",
    "owl": "1f989",
    "chick": "1f424 1f425",
    "turtle": "1f422",
    "snail": "1f40c",
    "fish": "1f41f 1f420",
    "whale": "1f433 1f40b",
    "octopus": "1f419",
    "crab": "1f980",
    "bee": "1f41d",
    "butterfly": "1f98b",
    "ladybug": "1f41e",
    "snake": "1f40d",
    "red apple": "1f34e",
    "green apple": "1f34f",
    "banana": "1f34c",
    "strawberry": "1f353",
    "watermelon": "1f349",
    "pineapple": "1f34d",
    "carrot": "1f955",
    "mushroom": "1f344",
    "pizza": "1f355",
    "hamburger": "1f354",
    "donut": "1f369",
    "cake": "1f370 1f382",
    "ice cream": "1f366 1f368",
    "car": "1f697 1f699",
    "rocket": "1f680",
    "plane": "2708-fe0f",
    "sailboat": "26f5",
    "house": "1f3e0 1f3e1",
    "balloon": "1f388",
    "gift": "1f381",
    "umbrella": "2602-fe0f 2614 1f302",
    "crown": "1f451",
    "star": "2b50",
    "red heart": "2764-fe0f",
    "blue heart": "1f499",
    "moon": "1f319",
    "sun": "2600-fe0f 1f31e",
    "tree": "1f333 1f332",
    "cactus": "1f335",
    "sunflower": "1f33b",
    "soccer ball": "26bd",
    "basketball": "1f3c0",
    "ghost": "1f47b",
    "snowman": "26c4 2603-fe0f",
    "book": "1f4d5 1f4d7 1f4d8",
}
"""The names, and the code points (as the image files are called) of the emoji that show the thing."""
NAMES = tuple(THINGS)
BACKGROUNDS = {
    "white": (0.96, 0.96, 0.96),
    "grey": (0.45, 0.45, 0.45),
    "red": (0.55, 0.05, 0.08),
    "yellow": (0.94, 0.96, 0.36),
    "green": (0.08, 0.42, 0.20),
    "blue": (0.10, 0.18, 0.62),
    "purple": (0.42, 0.14, 0.55),
    "pink": (0.95, 0.45, 0.72),
}
"""RGB in [0, 1], apart from the colours that the drawings are full of; a background is off by at most
``BACKGROUND_SPREAD`` in each channel."""
BACKGROUND_SPREAD = 0.04
RELATIONS = ("left of", "right of", "above", "below")
CATEGORIES = ("single object", "two objects", "counting", "position")
RESOLUTIONS = (32, 64)
SPLITS = ("train", "test")
HELD_OUT = 10
"""One in so many pairs of different things is held out, and of the combinations of the others."""
HELD_OUT_BACKGROUNDS = 2
"""On so many backgrounds a thing alone is held out, and two of a kind."""

ATLAS = Path(__file__).parent.parent / "assets" / "scenes_atlas.png"
TILE = 40
"""Edge of a tile of the atlas in pixels; the drawing's longer side is two pixels shorter, in the middle of it."""

_COLUMNS = 14
_PLURALS = {
    "fish": "fish",
    "fox": "foxes",
    "octopus": "octopuses",
    "butterfly": "butterflies",
    "strawberry": "strawberries",
    "cactus": "cacti",
    "snowman": "snowmen",
}
_SIZES = {1: (15.0, 26.0), 2: (11.0, 14.5)}
"""The longer side of a drawing in pixels of a picture with an edge of 32, by the number of things."""
_TURN = math.radians(12)
"""A drawing is turned by at most so much, either way."""
_MARGIN = 0.5
"""Pixels (at an edge of 32) that stay free between two boxes and towards the edge."""
_SLANT = 1.25
"""A named direction is at least so much longer than the other one, so that "left of" is never half "above"."""
_CANDIDATES = 64
_AT_ONCE = 2048


@dataclass(frozen=True)
class Scene:
    """What a prompt asks for.

    things: the names of everything that is to be there, and nothing else is. relation: where the first of two is, seen
    from the second; background: the name of its colour. Both are None where the prompt does not say.
    """

    category: str
    things: tuple[str, ...]
    relation: str | None = None
    background: str | None = None

    def prompt(self) -> str:
        """The prompt, in words."""
        first = self.things[0]
        if self.category == "counting":
            words = f"two {_plural(first)}"
        elif len(self.things) == 1:
            words = _one(first)
        else:
            words = f"{_one(first)} {self.relation or 'and'} {_one(self.things[1])}"
        return words if self.background is None else f"{words} on {self.background}"

    def in_split(self, split: str) -> bool:
        """Whether the prompt may be asked in ``split`` (see the module): with an open background, whether there is a
        background for a training picture, or none but held-out ones for a test picture."""
        free = any(not held_out(self.things, b) for b in ([self.background] if self.background else BACKGROUNDS))
        return free == (split == "train")


def held_out(things: tuple[str, ...], background: str) -> bool:
    """Whether pictures of ``things`` on ``background`` are in the test split alone; the order does not matter."""
    return background in _held_out_backgrounds(tuple(sorted(things)))


@functools.cache
def _held_out_backgrounds(things: tuple[str, ...]) -> frozenset[str]:
    colours = list(BACKGROUNDS)
    if len(set(things)) == 1:
        # By rank and not by the hash itself, so that every background is held out equally often.
        first = _ranks(len(things))[things[0]]
        return frozenset(colours[(first + 3 * k) % len(colours)] for k in range(HELD_OUT_BACKGROUNDS))
    if _hash(*things) % HELD_OUT == 0:
        return frozenset(colours)
    return frozenset(b for b in colours if _hash(*things, b) % HELD_OUT == 0)


@functools.cache
def _ranks(count: int) -> dict[str, int]:
    """The place of every thing in an order that has nothing to do with what it is; another one for each ``count``."""
    return {name: rank for rank, name in enumerate(sorted(NAMES, key=lambda name: _hash(name, str(count))))}


def _hash(*words: str) -> int:
    return int.from_bytes(hashlib.sha256("|".join(words).encode()).digest()[:8], "big")


def _plural(name: str) -> str:
    return _PLURALS.get(name, f"{name}s")


def _one(name: str) -> str:
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def _every_scene() -> Iterator[Scene]:
    for background in (None, *BACKGROUNDS):
        for name in NAMES:
            yield Scene("single object", (name,), None, background)
            yield Scene("counting", (name, name), None, background)
        for pair in itertools.permutations(NAMES, 2):
            yield Scene("two objects", pair, None, background)
            for relation in RELATIONS:
                yield Scene("position", pair, relation, background)


def all_prompts() -> list[str]:
    """Every prompt there is, in a fixed order: some 160,000, so encode those of the pictures at hand instead."""
    return [scene.prompt() for scene in _every_scene()]


def _words() -> re.Pattern[str]:
    one = "|".join(sorted(NAMES, key=len, reverse=True))
    two = "|".join(sorted(map(_plural, NAMES), key=len, reverse=True))
    between = "|".join(("and", *RELATIONS))
    return re.compile(
        rf"(?:two (?P<two>{two})|an? (?P<first>{one})(?: (?P<between>{between}) an? (?P<second>{one}))?)"
        rf"(?: on (?P<background>{'|'.join(BACKGROUNDS)}))?"
    )


_PROMPT = _words()
_SINGULAR = {_plural(name): name for name in NAMES}


def parse(prompt: str) -> Scene:
    """What ``prompt`` asks for; blanks and capitals do not matter, nor "a" for "an".

    Raises:
        ValueError: no prompt of this benchmark.
    """
    found = _PROMPT.fullmatch(re.sub(r"\s+", " ", prompt.strip().lower()).removesuffix("."))
    if found is None or (found["second"] is not None and found["first"] == found["second"]):
        raise ValueError(
            f"no prompt of the scenes: {prompt!r}; expected such as 'a cat', 'two cats on green', 'a cat and a dog on "
            f"white' or 'a red apple left of a cat on blue', with two different things in a pair, the things "
            f"{', '.join(NAMES)}, the positions {', '.join(RELATIONS)} and the backgrounds {', '.join(BACKGROUNDS)}"
        )
    background = found["background"]
    if found["two"]:
        return Scene("counting", (_SINGULAR[found["two"]],) * 2, None, background)
    if found["second"] is None:
        return Scene("single object", (found["first"],), None, background)
    pair = (found["first"], found["second"])
    if found["between"] == "and":
        return Scene("two objects", pair, None, background)
    return Scene("position", pair, found["between"], background)


def draw_prompts(count: int, generator: torch.Generator, *, split: str | None = None) -> list[str]:
    """``count`` prompts: the categories in turn, so that their shares are equal.

    Things and relations are drawn alike, and half of the draws name a background. split: "train" or "test" leaves out
    the prompts of the other split (of the test prompts fewer leave the background open, and none of a single object or
    of counting); None takes all.

    Raises:
        ValueError: another split.
    """
    _check_split(split, "draw_prompts")
    # One draw per prompt from torch would take longer than all the rest.
    draw = random.Random(int(torch.randint(1 << 62, (), generator=generator)))
    colours, chosen = list(BACKGROUNDS), []
    while len(chosen) < count:
        category = CATEGORIES[len(chosen) % len(CATEGORIES)]
        if category == "single object":
            things: tuple[str, ...] = (draw.choice(NAMES),)
        elif category == "counting":
            things = (draw.choice(NAMES),) * 2
        else:
            things = tuple(draw.sample(NAMES, 2))
        relation = draw.choice(RELATIONS) if category == "position" else None
        scene = Scene(category, things, relation, draw.choice(colours) if draw.random() < 0.5 else None)
        if split is None or scene.in_split(split):
            chosen.append(scene.prompt())
    return chosen


def _check_split(split: str | None, where: str) -> None:
    if split is not None and split not in SPLITS:
        raise ValueError(f"{where}: split must be 'train' or 'test', got {split!r}")


@dataclass(frozen=True)
class Scenes:
    """Pictures with the prompts that they were made for.

    images: ``[N, 3, resolution, resolution]`` fp32 in [-1, 1]. prompts: N strings.
    """

    images: Tensor
    prompts: list[str]

    @staticmethod
    def load(split: str = "train", *, count: int = 20_000, resolution: int = 32, seed: int = 0) -> Scenes:
        """``count`` pictures of a split, the categories in equal shares; no combination is in both splits.

        The same arguments give the same pictures. More pictures of a split begin with the fewer ones' prompts but are
        other pictures.

        Raises:
            ValueError: another split or resolution, or no picture asked for.
            ImportError: without pillow; the message names the extra.
        """
        if split not in SPLITS:
            raise ValueError(f"Scenes.load: split must be 'train' or 'test', got {split!r}")
        generator = torch.Generator().manual_seed(2 * seed + (split == "test"))
        prompts = draw_prompts(count, generator, split=split)
        return Scenes(render(prompts, generator=generator, resolution=resolution, split=split), prompts)

    def __len__(self) -> int:
        return len(self.prompts)


# ---- pictures


@dataclass(frozen=True)
class Atlas:
    """The drawings.

    tiles: by resolution of the pictures that they serve, ``[n, 4, edge, edge]`` fp32 in [0, 1], the colours multiplied
    by the opacity in the last channel. members: by name, the numbers of its tiles. box: ``[n, 2]`` width and height of
    a drawing, where its longer side is 1.
    """

    tiles: dict[int, Tensor]
    members: dict[str, Tensor]
    box: Tensor


@functools.lru_cache(maxsize=1)
def atlas() -> Atlas:
    """The atlas that ships, read once.

    Raises:
        ImportError: without pillow; the message names the extra.
        FileNotFoundError: it is not in this installation.
    """
    index = ATLAS.with_suffix(".json")
    for path in (ATLAS, index):
        if not path.is_file():
            raise FileNotFoundError(
                f"the drawings of the scenes are not in this installation ({path}); install the package again, or make "
                "them with: python -m apex_fast.data.scenes --make-atlas FOLDER..."
            )
    with require("PIL.Image", extra="data").open(ATLAS) as file:
        picture = file.convert("RGBA")
    width, height = picture.size
    rgba = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8).float().div(255)
    rgba = rgba.view(height // TILE, TILE, width // TILE, TILE, 4).permute(0, 2, 4, 1, 3).reshape(-1, 4, TILE, TILE)
    entries = json.loads(index.read_text(encoding="utf-8"))["tiles"]
    rgba = rgba[: len(entries)]
    whole = torch.cat([rgba[:, :3] * rgba[:, 3:], rgba[:, 3:]], dim=1)
    seen = rgba[:, 3] > 0
    box = torch.stack([seen.any(1).sum(1), seen.any(2).sum(1)], dim=1).float() / (TILE - 2)
    members = {name: torch.tensor([i for i, e in enumerate(entries) if e["name"] == name]) for name in NAMES}
    return Atlas({64: whole, 32: F.avg_pool2d(whole, 2)}, members, box)


def render(prompts: list[str], *, generator: torch.Generator, resolution: int = 32, split: str | None = None) -> Tensor:
    """One picture for each prompt, ``[N, 3, resolution, resolution]`` fp32 in [-1, 1].

    Args:
        generator: the source of everything that the prompts leave open.
        split: "train" or "test" draws the background that a prompt leaves open from those that its things have in this
            split, if they have any; None from all.

    Raises:
        ValueError: a prompt that is none, no prompt, another split, or another resolution than 32 or 64.
        ImportError: without pillow; the message names the extra.
    """
    if resolution not in RESOLUTIONS:
        raise ValueError(f"the scenes are rendered at {' or '.join(map(str, RESOLUTIONS))} pixels, got {resolution}")
    if not prompts:
        raise ValueError("the scenes need at least one prompt, got none")
    _check_split(split, "render")
    scenes = [parse(prompt) for prompt in prompts]
    images = torch.empty(len(scenes), 3, resolution, resolution)
    for start in range(0, len(scenes), _AT_ONCE):
        part = scenes[start : start + _AT_ONCE]
        for count in sorted({len(scene.things) for scene in part}):
            chosen = [i for i, scene in enumerate(part) if len(scene.things) == count]
            drawn = _render([part[i] for i in chosen], generator, resolution, split)
            images[torch.tensor(chosen) + start] = drawn
    return images


@dataclass(frozen=True)
class Layout:
    """Where the things of B scenes of n things each are.

    tile: ``[B, n]`` their drawings. centre: ``[B, n, 2]`` (x, y) in pixels of an edge of 32. size: ``[B, n]`` their
    longer sides in the same unit. turn: ``[B, n]`` radians. mirror: ``[B, n]``, 1 or -1. background: ``[B, 3]`` RGB in
    [0, 1].
    """

    tile: Tensor
    centre: Tensor
    size: Tensor
    turn: Tensor
    mirror: Tensor
    background: Tensor


def _render(scenes: list[Scene], generator: torch.Generator, resolution: int, split: str | None) -> Tensor:
    """Pictures of scenes that all have the same number of things."""
    return compose(lay_out(scenes, generator, split), resolution)


def lay_out(scenes: list[Scene], generator: torch.Generator, split: str | None = None) -> Layout:
    """Draws what scenes of equally many things leave open; see :func:`render`."""
    batch, count = len(scenes), len(scenes[0].things)
    draws = torch.rand(batch, count, 4, generator=generator)
    members = atlas().members
    tile = torch.tensor(
        [
            [int(members[name][int(draws[i, k, 0] * len(members[name]))]) for k, name in enumerate(scene.things)]
            for i, scene in enumerate(scenes)
        ]
    )
    low, high = _SIZES[count]
    size = low + (high - low) * draws[..., 1]
    turn = _TURN * (2 * draws[..., 2] - 1)
    mirror = torch.where(draws[..., 3] < 0.5, -1.0, 1.0)
    # The box around the turned drawing, as if it were an ellipse: hardly one fills its corners.
    width, height = (atlas().box[tile] * size[..., None]).unbind(-1)
    cos, sin = turn.cos(), turn.sin()
    half = torch.stack([torch.hypot(width * cos, height * sin), torch.hypot(width * sin, height * cos)], dim=-1) / 2
    centre = _places(scenes, half, generator)
    return Layout(tile, centre, size, turn, mirror, _backgrounds(scenes, generator, split))


def _places(scenes: list[Scene], half: Tensor, generator: torch.Generator) -> Tensor:
    """Centres ``[B, n, 2]`` (x, y) at which no two boxes overlap and every named position holds."""
    batch, count, _ = half.shape
    centre = torch.empty(batch, count, 2)
    left = torch.arange(batch)
    while len(left):
        reach = (half[left] + _MARGIN)[:, None]
        room = torch.rand(len(left), _CANDIDATES, count, 2, generator=generator)
        places = reach + room * (32 - 2 * reach)
        good = torch.ones(len(left), _CANDIDATES, dtype=torch.bool)
        if count == 2:
            away = places[:, :, 0] - places[:, :, 1]
            needed = (half[left].sum(1) + _MARGIN)[:, None]
            good &= (away.abs() > needed).any(-1)
            dx, dy = away.unbind(-1)
            for relation in RELATIONS:
                rows = torch.tensor([scenes[i].relation == relation for i in left.tolist()])
                good &= ~rows[:, None] | holds(relation, dx, dy, _SLANT)
        found, first = good.max(1)
        centre[left[found]] = places[found, first[found]]
        left = left[~found]
    return centre


def holds(relation: str, dx: Tensor, dy: Tensor, slant: float = 1.0) -> Tensor:
    """Whether the first of two is ``relation`` the second, where it lies (dx, dy) from it (y points down): the named
    direction is right, and ``slant`` times as long as the other one."""
    along, across = (dx, dy) if relation.endswith("of") else (dy, dx)
    along = -along if relation in ("left of", "above") else along
    return along > slant * across.abs()


def _backgrounds(scenes: list[Scene], generator: torch.Generator, split: str | None) -> Tensor:
    """RGB ``[B, 3]`` in [0, 1]."""
    table, names = torch.tensor(list(BACKGROUNDS.values())), list(BACKGROUNDS)
    draws = torch.rand(len(scenes), generator=generator).tolist()
    drawn = []
    for scene, draw in zip(scenes, draws, strict=True):
        if scene.background is not None:
            drawn.append(names.index(scene.background))
            continue
        offered = range(len(names))
        if split is not None:
            offered = [i for i in offered if held_out(scene.things, names[i]) == (split == "test")] or offered
        drawn.append(offered[int(draw * len(offered))])
    spread = BACKGROUND_SPREAD * (2 * torch.rand(len(scenes), 3, generator=generator) - 1)
    return (table[drawn] + spread).clamp(0, 1)


def compose(layout: Layout, resolution: int) -> Tensor:
    """The pictures of a layout, ``[B, 3, resolution, resolution]`` fp32 in [-1, 1]."""
    tiles = atlas().tiles[resolution]
    batch, count = layout.tile.shape
    picture = layout.background[:, :, None, None].expand(batch, 3, resolution, resolution).clone()
    axis = (torch.arange(resolution) + 0.5) * (32 / resolution)
    for k in range(count):
        # Half of the tile's edge in pixels of the picture: the longer side of the drawing does not fill the tile.
        reach = (layout.size[:, k] / 2 * (TILE / (TILE - 2)))[:, None, None]
        dx = (axis - layout.centre[:, k, :1])[:, None, :]
        dy = (axis - layout.centre[:, k, 1:])[:, :, None]
        cos, sin = layout.turn[:, k, None, None].cos(), layout.turn[:, k, None, None].sin()
        u = (cos * dx + sin * dy) / reach * layout.mirror[:, k, None, None]
        v = (cos * dy - sin * dx) / reach
        drawn = F.grid_sample(tiles[layout.tile[:, k]], torch.stack([u, v], dim=-1), align_corners=False)
        picture = drawn[:, :3] + (1 - drawn[:, 3:]) * picture
    return picture.clamp(0, 1) * 2 - 1


# ---- the atlas


def make_atlas(folders: list[Path], output: Path = ATLAS) -> None:
    """Cuts the drawings out of unpacked npm packages and writes the atlas, and beside it a JSON file that names the
    name, code point and set of every tile.

    folders: packages ``emoji-datasource-*`` with ``img/<set>/64/<code point>.png``.

    Raises:
        FileNotFoundError: a folder without them.
    """
    image = require("PIL.Image", extra="data")
    tiles, entries, sets = [], [], {}
    for folder in folders:
        package = folder / "package.json"
        if not package.is_file():
            raise FileNotFoundError(f"make_atlas: {folder} has no package.json; expected an unpacked npm package")
        facts = json.loads(package.read_text(encoding="utf-8"))
        kind = facts["name"].removeprefix("emoji-datasource-")
        sets[kind] = f"{facts['name']} {facts['version']}"
        for name, code in ((name, code) for name, codes in THINGS.items() for code in codes.split()):
            path = folder / "img" / kind / "64" / f"{code}.png"
            if not path.is_file():
                raise FileNotFoundError(f"make_atlas: {path} is missing ({name}); is {folder} the whole package?")
            with image.open(path) as file:
                tiles.append(_tile(file.convert("RGBA"), image))
            entries.append({"name": name, "codepoint": code, "set": kind})
    rows = -(-len(tiles) // _COLUMNS)
    sheet = image.new("RGBA", (_COLUMNS * TILE, rows * TILE))
    for number, tile in enumerate(tiles):
        sheet.paste(tile, (number % _COLUMNS * TILE, number // _COLUMNS * TILE))
    sheet.save(output, optimize=True)
    lines = ",\n".join("    " + json.dumps(entry) for entry in entries)
    head = json.dumps({"tile": TILE, "columns": _COLUMNS, "sets": sets}, indent=2)[:-2]
    output.with_suffix(".json").write_text(f'{head},\n  "tiles": [\n{lines}\n  ]\n}}\n', encoding="utf-8")


def _tile(drawing: Any, image: Any) -> Any:
    """The drawing without its empty margin, its longer side two pixels shorter than the tile, in the middle."""
    # A trace of opacity at the edge is no part of the drawing.
    drawing = drawing.crop(drawing.getchannel("A").point(lambda a: 255 if a > 8 else 0).getbbox())
    scale = (TILE - 2) / max(drawing.size)
    width, height = (max(1, round(edge * scale)) for edge in drawing.size)
    # Pillow weighs the colours with the opacity where it resizes RGBA.
    drawing = drawing.resize((width, height), image.Resampling.LANCZOS)
    tile = image.new("RGBA", (TILE, TILE))
    tile.paste(drawing, ((TILE - width) // 2, (TILE - height) // 2))
    return tile


def main() -> None:
    """Make the atlas of drawings from unpacked npm packages (emoji-datasource-twitter, emoji-datasource-google)."""
    parser = argparse.ArgumentParser(prog="python -m apex_fast.data.scenes", description=main.__doc__)
    parser.add_argument("--make-atlas", nargs="+", type=Path, metavar="FOLDER", required=True)
    parser.add_argument("--output", type=Path, default=ATLAS, help="PNG file (default: the one that ships)")
    arguments = parser.parse_args()
    make_atlas(arguments.make_atlas, arguments.output)
    print(f"{arguments.output}: {arguments.output.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
