"""Scores on the scenes: what a picture shows, read by a small network, and features for distances from the same one.

How a picture is read (:class:`SceneReader`). The drawings have too many colours and outlines for plain image analysis,
so a convolutional network was trained on rendered scenes, whose places are known. For every second pixel it says which
of the sixty things has its middle there, if any, and where exactly; for the whole picture, which of the eight
backgrounds it has. A thing is found where that probability has a peak of at least ``CERTAIN``. Pictures of 64 pixels
are averaged to 32 first.

Some of the pictures that it was trained on were spoilt: blurred, several laid over each other, faded, cut into pieces
that were mixed up, drowned in noise. Nothing is to be found in these, so that a blur or a mean picture is not taken for
what it is a blur of.

A picture is right (:func:`right`) if the things that were found are those that the prompt names, each as often and no
other, if a named position holds (the named direction is right and the longer one) and a named background is there.

Measured on rendered and on spoilt pictures by ``python -m apex_fast.evaluation.scenes --check``. The reader that ships
was made by ``python -m apex_fast.evaluation.scenes --train-reader --output SCENES_READER.safetensors``. It has seen all
things on all backgrounds, those of the test split too: it is the measure, and not what is measured.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from apex_fast.data.scenes import (
    BACKGROUNDS,
    CATEGORIES,
    NAMES,
    RELATIONS,
    RESOLUTIONS,
    Layout,
    Scene,
    Scenes,
    compose,
    draw_prompts,
    holds,
    lay_out,
    parse,
    render,
)
from apex_fast.evaluation.benchmark import RenderedBenchmark
from apex_fast.evaluation.metrics import frechet_distance

READER_PATH = Path(__file__).parent.parent / "assets" / "scenes_reader.safetensors"
"""The reader that ships with the package, in half precision."""

CERTAIN = 0.5
"""A thing is found where its probability is at least this."""

_CELL = 2
"""Pixels of a picture of 32 for each answer of the reader, in both directions."""
_NEAR = 2
"""Of two peaks at most so many cells apart, the higher one counts; the middles of two things are further apart."""
_COLOURS = tuple(BACKGROUNDS)
_AT_ONCE = 500


@dataclass(frozen=True)
class Found:
    """Something in a picture.

    name: which of the sixty things. centre: (x, y) in pixels of an edge of 32, from the left upper corner. certainty:
    the reader's, in [``CERTAIN``, 1].
    """

    name: str
    centre: tuple[float, float]
    certainty: float


class _Block(nn.Module):
    """Two convolutions beside the identity."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(*_layer(width, width), *_layer(width, width)[:-1])

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.body(x))


def _layer(width: int, wider: int, stride: int = 1) -> tuple[nn.Module, ...]:
    convolution = nn.Conv2d(width, wider, 3, stride=stride, padding=1, bias=False)
    return convolution, nn.BatchNorm2d(wider), nn.ReLU()


class SceneReader(nn.Module):
    """Reads pictures ``[B, 3, 32, 32]`` in [-1, 1]; some 600,000 parameters."""

    feature_size = 64

    def __init__(self) -> None:
        super().__init__()
        self.fine = nn.Sequential(*_layer(3, 24), *_layer(24, 48, stride=2), _Block(48))
        self.coarse = nn.Sequential(*_layer(48, 96, stride=2), _Block(96), _Block(96), _Block(96))
        self.joined = nn.Sequential(nn.Conv2d(48 + 96, 64, 1, bias=False), nn.BatchNorm2d(64), nn.ReLU())
        # Of each cell: the logit of every thing, and (x, y) of its middle from that of the cell, in cells.
        self.things = nn.Conv2d(64, len(NAMES), 1)
        self.places = nn.Conv2d(64, 2, 1)
        # Means over the quarters of the picture, so that features tell where something is.
        self.whole = nn.Linear(96 * 4, self.feature_size)
        self.summary = nn.Linear(self.feature_size, len(NAMES) + len(BACKGROUNDS))
        # So rare are things among the cells: training starts there, not from a picture that is full of everything.
        nn.init.constant_(self.things.bias, -5.0)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Logits ``[B, 60, 16, 16]``, offsets ``[B, 2, 16, 16]`` and, for the whole picture, the logits ``[B, 68]`` of
        every thing and every background."""
        fine = self.fine(images)
        coarse = self.coarse(fine)
        joined = self.joined(torch.cat([fine, F.interpolate(coarse, scale_factor=2.0, mode="nearest")], dim=1))
        return self.things(joined), self.places(joined), self.summary(self._features(coarse))

    def features(self, images: Tensor) -> Tensor:
        """``[B, 64]``: what precedes the last layer for the whole picture; images ``[B, 3, H, W]`` in [-1, 1], H and W
        32 or 64."""
        return self._features(self.coarse(self.fine(_at_32(images))))

    def _features(self, coarse: Tensor) -> Tensor:
        return F.gelu(self.whole(F.adaptive_avg_pool2d(coarse, 2).flatten(1)))

    @torch.no_grad()
    def read(self, images: Tensor) -> tuple[list[list[Found]], list[str]]:
        """What is in each picture ``[B, 3, H, W]`` in [-1, 1], the most certain first, and the names of the
        backgrounds."""
        things, places, summary = self(_at_32(images))
        best, which = things.sigmoid().max(1)
        highest = F.max_pool2d(best[:, None], 2 * _NEAR + 1, stride=1, padding=_NEAR)[:, 0]
        peaks = (best == highest) & (best >= CERTAIN)
        found: list[list[Found]] = [[] for _ in range(len(images))]
        for row, y, x in peaks.nonzero().tolist():
            dx, dy = places[row, :, y, x].tolist()
            centre = ((x + 0.5 + dx) * _CELL, (y + 0.5 + dy) * _CELL)
            found[row].append(Found(NAMES[int(which[row, y, x])], centre, float(best[row, y, x])))
        colours = [_COLOURS[i] for i in summary[:, len(NAMES) :].argmax(1).tolist()]
        return [sorted(row, key=lambda one: -one.certainty) for row in found], colours

    @staticmethod
    def load(path: str | Path = READER_PATH) -> SceneReader:
        """Read the weights from a safetensors file; the default is the file that ships."""
        if not Path(path).is_file():
            raise FileNotFoundError(
                f"no reader of scenes at {path}; make one with: python -m apex_fast.evaluation.scenes --train-reader "
                f"--output {path}"
            )
        reader = SceneReader()
        reader.load_state_dict(load_file(path))
        return reader.eval().requires_grad_(False)

    def save(self, path: str | Path) -> None:
        """Write the weights to a safetensors file, in half precision."""
        state = {k: v.half() if v.is_floating_point() else v for k, v in self.state_dict().items()}
        save_file({name: value.contiguous() for name, value in state.items()}, path)

    @staticmethod
    def train_new(*, steps: int = 3000, batch_size: int = 64, seed: int = 0, say: bool = False) -> SceneReader:
        """Train on scenes that are rendered for it, a fifth of them spoilt (:func:`_training_batch`). The global random
        state is left as it was.

        The loss of the cells is the focal one of *Objects as Points* (Zhou et al., arXiv 1904.07850, Eq. 1).
        """
        generator = torch.Generator().manual_seed(seed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            reader = SceneReader().to(memory_format=torch.channels_last)
        optimizer = torch.optim.AdamW(reader.parameters(), lr=1e-3, weight_decay=0.02)
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-3, total_steps=steps, pct_start=0.15)
        began, seen = time.perf_counter(), 0.0
        for step in range(1, steps + 1):
            batch = _training_batch(batch_size, generator)
            loss = batch.loss(*reader(batch.images.to(memory_format=torch.channels_last)))
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(reader.parameters(), 5.0)
            optimizer.step()
            scheduler.step()
            seen = loss.item() if step == 1 else 0.98 * seen + 0.02 * loss.item()
            if say and step % 100 == 0:
                print(f"step {step} of {steps}: loss {seen:.3f}, {time.perf_counter() - began:.0f} s", flush=True)
        return reader.to(memory_format=torch.contiguous_format).eval().requires_grad_(False)


def _at_32(images: Tensor) -> Tensor:
    edge = images.shape[-1]
    if images.dim() != 4 or images.shape[1] != 3 or images.shape[2] != edge or edge not in RESOLUTIONS:
        raise ValueError(
            f"the reader of the scenes takes pictures [N, 3, H, W] of {' or '.join(map(str, RESOLUTIONS))} pixels, got "
            f"{list(images.shape)}"
        )
    return images if edge == 32 else F.avg_pool2d(images, edge // 32)


# ---- training


@dataclass(frozen=True)
class _Batch:
    """Pictures and what the reader should say of them.

    heat: ``[B, 60, 16, 16]``, 1 in the cell of a middle and less around it. places: ``[B, 2, 16, 16]``, right where
    ``heat`` is 1. present: ``[B, 60]``. background: ``[B]``, -1 where there is none to name.
    """

    images: Tensor
    heat: Tensor
    places: Tensor
    present: Tensor
    background: Tensor

    def loss(self, things: Tensor, places: Tensor, summary: Tensor) -> Tensor:
        """One number; see :meth:`SceneReader.forward` for what it is of."""
        log_p, log_not_p, p = F.logsigmoid(things), F.logsigmoid(-things), things.sigmoid()
        middle = self.heat == 1
        count = middle.sum().clamp(min=1)
        at_middles = -((1 - p).square() * log_p)[middle].sum()
        elsewhere = -((1 - self.heat).pow(4) * p.square() * log_not_p)[~middle].sum()
        cells = middle.any(1, keepdim=True).expand_as(places)
        distance = (places - self.places)[cells].abs().sum() / count
        presence = F.binary_cross_entropy_with_logits(summary[:, : len(NAMES)], self.present, reduction="sum")
        colour = F.cross_entropy(summary[:, len(NAMES) :], self.background, ignore_index=-1)
        return (at_middles + elsewhere) / count + distance + 0.2 * presence / len(things) + 0.3 * colour


def _training_batch(size: int, generator: torch.Generator) -> _Batch:
    """Rendered scenes of all things, a fifth of them spoilt, all a little off in colour and sharpness."""
    scenes = [parse(prompt) for prompt in draw_prompts(size, generator)]
    images, edge = torch.empty(size, 3, 32, 32), 32 // _CELL
    heat, places = torch.zeros(size, len(NAMES), edge, edge), torch.zeros(size, 2, edge, edge)
    present, background = torch.zeros(size, len(NAMES)), torch.empty(size, dtype=torch.int64)
    for count in (1, 2):
        rows = torch.tensor([i for i, scene in enumerate(scenes) if len(scene.things) == count])
        if not len(rows):
            continue
        group = [scenes[i] for i in rows.tolist()]
        layout = lay_out(group, generator)
        images[rows] = compose(layout, 32)
        table = torch.tensor(list(BACKGROUNDS.values()))
        background[rows] = torch.cdist(layout.background, table).argmin(1)
        which = torch.tensor([[NAMES.index(name) for name in scene.things] for scene in group])
        present[rows] = present[rows].scatter(1, which, 1.0)
        for k in range(count):
            _mark(heat, places, rows, which[:, k], layout.centre[:, k] / _CELL)
    images = _slightly_off(images, generator)
    spoilt = torch.rand(size, generator=generator) < 0.2
    images, named = _spoilt(images, spoilt, generator)
    heat[spoilt], present[spoilt] = 0, 0
    background[~named] = -1
    return _Batch(images, heat, places, present, background)


def _mark(heat: Tensor, places: Tensor, rows: Tensor, which: Tensor, centre: Tensor) -> None:
    """Enters a thing with its middle at ``centre`` ``[n, 2]`` (x, y), in cells, into each of ``rows``."""
    axis = torch.arange(heat.shape[-1])
    cell = centre.floor().clamp(0, len(axis) - 1)
    near = [(-(axis[None] - cell[:, i : i + 1]).square() / 2).exp() for i in (0, 1)]
    bump = near[1][:, :, None] * near[0][:, None, :]
    heat[rows, which] = torch.maximum(heat[rows, which], bump)
    x, y = cell.long().unbind(1)
    places[rows, :, y, x] = centre - cell - 0.5


def _slightly_off(images: Tensor, generator: torch.Generator) -> Tensor:
    """Noise, another brightness and a little softness, each in half of the pictures: what still counts as right."""
    chosen = (torch.rand(len(images), 3, generator=generator) < 0.5).float()[..., None, None, None]
    deviation = 0.08 * torch.rand(len(images), 1, 1, 1, generator=generator)
    gain = 1 + 0.1 * (2 * torch.rand(len(images), 3, 1, 1, generator=generator) - 1)
    images = images + chosen[:, 0] * (_blurred(images, 0.5) - images)
    images = images * (1 + chosen[:, 1] * (gain - 1))
    return images + chosen[:, 2] * deviation * torch.randn(images.shape, generator=generator)


def _blurred(images: Tensor, deviation: float) -> Tensor:
    """Blurred by a Gaussian of this standard deviation in pixels."""
    reach = max(1, round(3 * deviation))
    axis = torch.arange(-reach, reach + 1, dtype=images.dtype)
    weight = (-axis.square() / (2 * deviation**2)).exp()
    kernel = (weight / weight.sum()).expand(3, 1, 1, -1)
    padded = F.pad(images, (reach,) * 4, mode="reflect")
    return F.conv2d(F.conv2d(padded, kernel, groups=3), kernel.transpose(2, 3), groups=3)


def _spoilt(images: Tensor, chosen: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """The pictures with those that are ``chosen`` ``[B]`` spoilt, each in one of five ways, and which of all still have
    a background to name."""
    images, named = images.clone(), torch.ones(len(images), dtype=torch.bool)
    for row in chosen.nonzero().flatten().tolist():
        way = int(torch.randint(5, (), generator=generator))
        strength = float(torch.rand((), generator=generator))
        one = images[row : row + 1]
        if way == 0:
            images[row] = _blurred(one, 1.7 + 2.5 * strength)[0]
        elif way == 1:
            count = int(torch.randint(2, 9, (), generator=generator))
            others = torch.randint(len(images), (count,), generator=generator)
            images[row], named[row] = images[others].mean(0), False
        elif way == 2:
            # Towards the background, which most of the border shows.
            border = torch.cat([one[..., 0, :], one[..., -1, :], one[..., 0], one[..., -1]], dim=-1)
            images[row] += (0.65 + 0.3 * strength) * (border.median(-1).values[..., None, None] - one)[0]
        elif way == 3:
            patch = (4, 8)[int(strength < 0.5)]
            cut = F.unfold(one, patch, stride=patch)
            order = torch.randperm(cut.shape[-1], generator=generator)
            images[row] = F.fold(cut[..., order], 32, patch, stride=patch)[0]
        else:
            noise = torch.randn(one.shape, generator=generator)[0]
            share = 0.5 + 0.5 * strength
            images[row], named[row] = (1 - share) * one[0] + share * noise, share < 0.7
    return images, named


# ---- scores


@lru_cache(maxsize=1)
def shipped_reader() -> SceneReader:
    """The reader that ships, loaded once."""
    return SceneReader.load()


def describe(images: Tensor, reader: SceneReader | None = None) -> tuple[list[list[Found]], list[str]]:
    """What is in pictures ``[N, 3, H, W]`` in [-1, 1], of 32 or 64 pixels; see :meth:`SceneReader.read`."""
    reader = reader or shipped_reader()
    found: list[list[Found]] = []
    colours: list[str] = []
    for part in images.detach().float().cpu().split(_AT_ONCE):
        things, background = reader.read(part)
        found += things
        colours += background
    return found, colours


def right(images: Tensor, prompts: list[str], reader: SceneReader | None = None) -> Tensor:
    """``[N]`` bool: whether each picture ``[N, 3, H, W]`` in [-1, 1] shows what its prompt asks and nothing else.

    Raises:
        ValueError: a prompt that is none, pictures of another size, or not as many as prompts.
    """
    if len(images) != len(prompts):
        raise ValueError(f"right: expected a prompt for each picture, got {len(images)} and {len(prompts)}")
    scenes = [parse(prompt) for prompt in prompts]
    found, colours = describe(images, reader)
    return torch.tensor([_fits(*each) for each in zip(scenes, found, colours, strict=True)], dtype=torch.bool)


def _fits(scene: Scene, found: list[Found], colour: str) -> bool:
    if sorted(one.name for one in found) != sorted(scene.things):
        return False
    if scene.background not in (None, colour):
        return False
    if scene.relation is None:
        return True
    places = {one.name: torch.tensor(one.centre) for one in found}
    dx, dy = places[scene.things[0]] - places[scene.things[1]]
    return bool(holds(scene.relation, dx, dy))


class ScenesBenchmark(RenderedBenchmark):
    """The scenes at 32 or 64 pixels; what a picture shows is decided by :func:`right`.

    Real pictures are rendered for the call, the same for the same arguments. Those of the test split show combinations
    that no training picture has (:mod:`apex_fast.data.scenes`).
    """

    name = "scenes"
    categories = CATEGORIES

    def __init__(self, resolution: int = 32) -> None:
        super().__init__(resolution)
        # Which combinations are held out is decided by a hash, so these are drawn and not written down.
        self.diversity_prompts = tuple(draw_prompts(12, torch.Generator().manual_seed(0), split="test"))

    def load(self, split: str, count: int, seed: int) -> Scenes:
        """See :meth:`Scenes.load`."""
        return Scenes.load(split, count=count, resolution=self.resolution, seed=seed)

    def category(self, prompt: str) -> str:
        """One of ``CATEGORIES``."""
        return parse(prompt).category

    def right(self, images: Tensor, prompts: list[str]) -> Tensor:
        """See :func:`right`."""
        return right(images, prompts)

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """``[N, 64]`` of the reader that ships, on the CPU; see :meth:`SceneReader.features`."""
        reader = shipped_reader()
        return torch.cat([reader.features(part) for part in images.detach().float().cpu().split(_AT_ONCE)])

    def real_of(self, prompt: str, count: int, *, seed: int) -> Tensor:
        """Rendered pictures of one prompt."""
        generator = torch.Generator().manual_seed(seed)
        return render([prompt] * count, generator=generator, resolution=self.resolution, split="test")


# ---- the check


HARMLESS = ("rendered", "a little noise")
CHANGES = ("wrong thing", "thing missing", "thing added", "wrong position", "wrong background")
SPOILT = ("blurred", "more blurred", "mean of the prompt", "blend of two", "mixed-up pieces", "empty", "noise")


def spoil(kind: str, prompts: list[str], *, resolution: int, generator: torch.Generator) -> tuple[Tensor, list[str]]:
    """Pictures of one of the kinds of ``HARMLESS``, ``CHANGES`` and ``SPOILT``, and the prompts to judge them by: those
    of ``prompts`` that this can be done to."""
    if kind in CHANGES:
        pairs = [(scene, _changed(scene, kind, generator)) for scene in map(parse, prompts)]
        kept = [(scene.prompt(), changed.prompt()) for scene, changed in pairs if changed is not None]
        images = render([changed for _, changed in kept], generator=generator, resolution=resolution)
        return images, [prompt for prompt, _ in kept]
    if kind == "empty":
        layouts = [lay_out([parse(prompt)], generator) for prompt in prompts]
        away = [Layout(o.tile, o.centre - 100, o.size, o.turn, o.mirror, o.background) for o in layouts]
        return torch.cat([compose(layout, resolution) for layout in away]), prompts
    if kind == "mean of the prompt":
        real = (render([prompt] * 64, generator=generator, resolution=resolution) for prompt in prompts)
        return torch.stack([images.mean(0) for images in real]), prompts
    images = render(prompts, generator=generator, resolution=resolution)
    scale = resolution / 32
    if kind == "a little noise":
        images = images + 0.05 * torch.randn(images.shape, generator=generator)
    elif kind == "blurred":
        images = _blurred(images, 2.0 * scale)
    elif kind == "more blurred":
        images = _blurred(images, 3.0 * scale)
    elif kind == "blend of two":
        images = (images + images.roll(1, 0)) / 2
    elif kind == "mixed-up pieces":
        patch = resolution // 4
        cut = F.unfold(images, patch, stride=patch)
        cut = torch.stack([one[:, torch.randperm(cut.shape[-1], generator=generator)] for one in cut])
        images = F.fold(cut, resolution, patch, stride=patch)
    elif kind == "noise":
        images = 0.5 * torch.randn(images.shape, generator=generator)
    elif kind != "rendered":
        raise ValueError(f"spoil: expected one of {', '.join((*HARMLESS, *CHANGES, *SPOILT))}, got {kind!r}")
    return images.clamp(-1, 1), prompts


def _changed(scene: Scene, change: str, generator: torch.Generator) -> Scene | None:
    """A scene that is not what ``scene`` asks for, in one respect; None where there is no such respect."""
    things = scene.things
    if change == "wrong thing":
        other = _other(NAMES, things, generator)
        category = "two objects" if scene.category == "counting" else scene.category
        return Scene(category, (other, *things[1:]), scene.relation, scene.background)
    if change == "thing missing" and len(things) > 1:
        return Scene("single object", things[1:], None, scene.background)
    if change == "thing added" and len(things) == 1:
        return Scene("two objects", (*things, _other(NAMES, things, generator)), None, scene.background)
    if change == "wrong position" and scene.relation is not None:
        return Scene("position", things, _other(RELATIONS, (scene.relation,), generator), scene.background)
    if change == "wrong background" and scene.background is not None:
        return Scene(scene.category, things, scene.relation, _other(_COLOURS, (scene.background,), generator))
    return None


def _other(of: tuple[str, ...], but: Iterable[str], generator: torch.Generator) -> str:
    left = [name for name in of if name not in but]
    return left[int(torch.randint(len(left), (), generator=generator))]


def check(
    per_category: int, *, resolution: int, seed: int = 0, reader: SceneReader | None = None
) -> dict[str, dict[str, float | None]]:
    """Share of pictures that :func:`right` accepts, by kind (see :func:`spoil`) and category.

    None where a category has no such pictures. ``per_category``: how many pictures that are to be accepted, of both
    splits; of the other kinds as many up to 100.
    """
    rates: dict[str, dict[str, float | None]] = {}
    for number, kind in enumerate((*HARMLESS, *CHANGES, *SPOILT)):
        generator = torch.Generator().manual_seed(1_000 * seed + number)
        count = per_category if kind in HARMLESS else min(per_category, 100)
        prompts = draw_prompts(count * len(CATEGORIES), generator)
        images, judged = spoil(kind, prompts, resolution=resolution, generator=generator)
        accepted = right(images, judged, reader).tolist()
        rates[kind] = {}
        for category in CATEGORIES:
            own = [good for good, prompt in zip(accepted, judged, strict=True) if parse(prompt).category == category]
            rates[kind][category] = sum(own) / len(own) if own else None
    return rates


def distances(samples: int, *, resolution: int, seed: int = 0) -> dict[str, float]:
    """Frechet distance to held-out pictures of as many others: of the training split, and of the test split as they
    are and spoilt."""
    benchmark = ScenesBenchmark(resolution)
    real = benchmark.features(benchmark.real(samples, seed=2 * seed + 1)[0])
    _, prompts = benchmark.real(samples, seed=2 * seed + 2)
    found = {"training split": benchmark.train(samples, seed=seed)[0]}
    for number, kind in enumerate(("rendered", "a little noise", "blurred", "more blurred", "blend of two", "noise")):
        generator = torch.Generator().manual_seed(1_000 * seed + number)
        found[kind], _ = spoil(kind, prompts, resolution=resolution, generator=generator)
    return {kind: frechet_distance(benchmark.features(images), real) for kind, images in found.items()}


def _print_check(resolution: int, per_category: int, seed: int) -> None:
    began = time.perf_counter()
    rates = check(per_category, resolution=resolution, seed=seed)
    print(f"{resolution} pixels: share accepted ({time.perf_counter() - began:.0f} s)")
    print(" " * 19 + "".join(f"{category:>15}" for category in CATEGORIES))
    for kind, row in rates.items():
        print(f"{kind:<19}" + "".join(f"{'-' if rate is None else f'{rate:.3f}':>15}" for rate in row.values()))
    found = distances(600, resolution=resolution, seed=seed)
    print("Frechet distance of 600: " + ", ".join(f"{kind} {value:.1f}" for kind, value in found.items()))


def main() -> None:
    """Check the scorer on rendered and on spoilt pictures, or train the network that reads them."""
    parser = argparse.ArgumentParser(prog="python -m apex_fast.evaluation.scenes", description=main.__doc__)
    parser.add_argument("--check", action="store_true", help="print what the scorer accepts")
    parser.add_argument("--per-category", type=int, default=1000, help="rendered pictures at 32 pixels (a fifth at 64)")
    parser.add_argument("--train-reader", action="store_true", help="train the network that reads pictures")
    parser.add_argument("--steps", type=int, default=3000, help="of the training")
    parser.add_argument("--output", type=Path, default=Path("scenes_reader.safetensors"))
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    if not (arguments.check or arguments.train_reader):
        parser.error("nothing to do: give --check, --train-reader or both")
    if arguments.train_reader:
        reader = SceneReader.train_new(steps=arguments.steps, seed=arguments.seed, say=True)
        reader.save(arguments.output)
        a, b = (Scenes.load("test", count=600, seed=seed).images for seed in (1, 2))
        with torch.no_grad():
            distance = frechet_distance(reader.features(a), reader.features(b))
        size = arguments.output.stat().st_size
        print(f"{arguments.output}: {size} bytes, Frechet distance of real pictures {distance:.3f} (600 against 600)")
    if arguments.check:
        for resolution, count in zip(RESOLUTIONS, (arguments.per_category, arguments.per_category // 5), strict=True):
            _print_check(resolution, count, arguments.seed)


if __name__ == "__main__":
    main()
