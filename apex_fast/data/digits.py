"""The scanned handwritten digits that scikit-learn ships, as text and image pairs.

1,797 scans by 13 writers, reduced to 8 x 8 pixels: the test part of the UCI set "Optical Recognition of Handwritten
Digits" (E. Alpaydin and C. Kaynak), which scikit-learn carries, so nothing is downloaded. Each image gets a sentence
that names its digit, so a model trained on them is a text-to-image model, if a small one.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch import Tensor

from apex_fast.extras import require

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
"""The English names of the ten classes, by label."""

TEMPLATES = (
    "a handwritten {}",
    "the digit {}",
    "a scan of the number {}",
    "the number {}, written by hand",
    "a picture of the digit {}",
    "a small grey image of the numeral {}",
    "somebody wrote the number {} with a pen",
    "handwriting: {}",
    "a scanned {} from an old form",
    "{}",
)
"""Sentences around a digit; each is used with the word and with the numeral."""

TEST_PER_CLASS = 60
"""Held-out images of each class: equal shares, so that a set of prompts with equal shares is comparable to them."""


@dataclass(frozen=True)
class Digits:
    """One split of the digits.

    images: [N, 1, 8, 8] fp32 in [-1, 1] (-1 is paper, 1 is ink). labels: [N] int64 in 0..9.
    """

    images: Tensor
    labels: Tensor

    @staticmethod
    def load(split: str = "train", seed: int = 0) -> Digits:
        """Read one split: ``test`` holds 60 images of each class (600), ``train`` the other 1,197.

        The split depends on ``seed`` alone. The order inside a split is fixed too; shuffling is the caller's.

        Raises ValueError for another split name and ImportError (naming the extra) without scikit-learn.
        """
        if split not in ("train", "test"):
            raise ValueError(f"Digits.load: split must be 'train' or 'test', got {split!r}")
        bunch = require("sklearn.datasets", extra="data").load_digits()
        images = torch.tensor(bunch.images, dtype=torch.float32).div(8.0).sub(1.0).unsqueeze(1)
        labels = torch.tensor(bunch.target, dtype=torch.int64)
        generator = torch.Generator().manual_seed(seed)
        held_out = torch.zeros(len(labels), dtype=torch.bool)
        for label in range(len(WORDS)):
            members = (labels == label).nonzero().flatten()
            held_out[members[torch.randperm(len(members), generator=generator)[:TEST_PER_CLASS]]] = True
        chosen = held_out if split == "test" else ~held_out
        return Digits(images[chosen], labels[chosen])

    def __len__(self) -> int:
        return len(self.labels)

    def prompts(self, generator: torch.Generator | None = None) -> list[str]:
        """A prompt for each image, drawn anew at every call."""
        return prompts_for(self.labels, generator)


def all_prompts(label: int | None = None) -> list[str]:
    """Every prompt that :func:`prompts_for` can return, for one label or for all, in a fixed order.

    There are few enough (20 per label) to encode them once and look the embeddings up.
    """
    labels = range(len(WORDS)) if label is None else (label,)
    return [t.format(name) for k in labels for t in TEMPLATES for name in (WORDS[k], str(k))]


def prompts_for(labels: Tensor | list[int], generator: torch.Generator | None = None) -> list[str]:
    """Draw a prompt for each label: a template, with the digit as a word or as a numeral, all equally likely.

    labels: [N] integers in 0..9. Returns N strings.
    """
    labels = [int(k) for k in labels]
    wrong = [k for k in labels if not 0 <= k < len(WORDS)]
    if wrong:
        raise ValueError(f"prompts_for: labels must be in 0..9, got {wrong[0]}")
    draws = torch.randint(2 * len(TEMPLATES), (len(labels),), generator=generator).tolist()
    return [
        TEMPLATES[draw // 2].format(WORDS[label] if draw % 2 == 0 else str(label))
        for label, draw in zip(labels, draws, strict=True)
    ]


def label_of(prompt: str) -> int:
    """The digit that a free prompt asks for: "a handwritten three" -> 3. Only scoring needs it; generation takes any
    text.

    A digit counts where it stands as a word of its own, in either spelling ("thirteen" and "13" hold none). Raises
    ValueError unless exactly one digit is named.
    """
    found = set()
    for word in re.findall(r"[a-z]+|[0-9]+", prompt.lower()):
        if word in WORDS:
            found.add(WORDS.index(word))
        elif len(word) == 1 and word.isdigit():
            found.add(int(word))
    if len(found) != 1:
        named = "none" if not found else " and ".join(str(k) for k in sorted(found))
        raise ValueError(
            f"cannot score the prompt {prompt!r}: expected it to name exactly one digit, found {named}. "
            'Write the digit as a word or a numeral, e.g. "a handwritten three"'
        )
    return found.pop()
