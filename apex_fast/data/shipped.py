"""The data sets that need no download: scanned digits that scikit-learn ships, and pictures that the project renders.

They come in the space of the network (no VAE) and with all the prompts there can be, which are encoded once.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from apex_fast.training.batches import TextImages

DEFAULT_COUNT = 20_000
"""Rendered pictures of a run that does not say how many; 245 MB at 32 pixels."""


@dataclass(frozen=True)
class Shipped:
    """What a data set offers.

    resolutions: edges in pixels, the first of them where nothing is said. channels: of a picture.
    """

    resolutions: tuple[int, ...]
    channels: int


DIGITS = "digits"
"""Name of the data set that ships with scikit-learn, the default."""

SHIPPED = {DIGITS: Shipped((8,), 1), "shapes": Shipped((32, 64), 3), "scenes": Shipped((32, 64), 3)}
"""By the name that ``dataset_name`` has for it."""


def load_shipped(name: str, *, resolution: int | None = None, count: int | None = None) -> TextImages:
    """The training split of one of them.

    Args:
        resolution: edge of the pictures in pixels; None is the first that the data set offers.
        count: how many pictures; None is all (digits) or ``DEFAULT_COUNT``.

    Raises:
        ValueError: a data set, a resolution or a count that there is not.
    """
    offered = _offer(name).resolutions
    resolution = offered[0] if resolution is None else resolution
    if resolution not in offered:
        raise ValueError(f"{name} has pictures of {' or '.join(map(str, offered))} pixels, got resolution {resolution}")
    if count is not None and count < 1:
        raise ValueError(f"{name}: at least one picture is needed, got {count}")
    if name == DIGITS:
        return _digits(count)
    from apex_fast.data import scenes, shapes
    from apex_fast.training.batches import TextImages

    count = DEFAULT_COUNT if count is None else count
    if name == "scenes":
        drawn = scenes.Scenes.load("train", count=count, resolution=resolution)
        # Of all prompts there can be, those that stand beside a picture: encoding the others would take hours.
        vocabulary = list(dict.fromkeys(drawn.prompts))
        return TextImages(drawn.images, lambda chosen, _: [drawn.prompts[i] for i in chosen.tolist()], vocabulary)
    data = shapes.Shapes.load("train", count=count, resolution=resolution, turn=shapes.TRAINING_TURN)
    return TextImages(data.images, lambda chosen, _: [data.prompts[i] for i in chosen.tolist()], shapes.all_prompts())


def few_prompts(name: str) -> list[str]:
    """Eight of its prompts, with every kind among them, without a picture being rendered.

    ValueError as :func:`load_shipped`.
    """
    _offer(name)
    data = importlib.import_module(f"apex_fast.data.{name}")
    if name == DIGITS:
        prompts = data.all_prompts()
        return prompts[:: len(prompts) // 8][:8]
    return data.draw_prompts(8, torch.Generator().manual_seed(0))  # kinds in turn


def _offer(name: str) -> Shipped:
    if name not in SHIPPED:
        raise ValueError(f"the data sets that ship are {', '.join(SHIPPED)}, got {name!r}")
    return SHIPPED[name]


def _digits(count: int | None) -> TextImages:
    from apex_fast.data.digits import Digits, all_prompts, prompts_for
    from apex_fast.training.batches import TextImages

    digits = Digits.load("train")
    if count is not None:
        if count > len(digits):
            raise ValueError(f"digits has {len(digits)} pictures for training, got {count}")
        # In their own order the scans of one writer follow each other.
        chosen = torch.randperm(len(digits), generator=torch.Generator().manual_seed(0))[:count]
        digits = Digits(digits.images[chosen], digits.labels[chosen])
    labels = digits.labels
    return TextImages(digits.images, lambda chosen, generator: prompts_for(labels[chosen], generator), all_prompts())
