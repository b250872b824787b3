"""Teaches a text encoder to read: ``python -m apex_fast.training.reading --model MODEL --output FOLDER``.

A small text encoder that flow matching trains along with its network ends as a bag of words: which colour belongs to
which shape shows in the loss only once the network can use it, and the network can use it only once the encoder tells
it. Large models do not have this problem, since their encoders have read much text before. This is that reading, for
prompts whose grammar the project knows: by linear heads on the embeddings, every word of an object has to tell its
colour and its shape, on which side of the other one it is, and how many there are (cross-entropy over
all prompts; the heads are thrown away). 15 seconds of one core. The network of the model stays as it is, and has to
be trained on, with the encoder frozen, before it draws anything right again.

``--model M --check`` says whether a network uses the order of words: by how much its loss on pictures drawn anew rises
when two words of their prompts change places.
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from apex_fast.backbones.base import Backbone
from apex_fast.backbones.own_text import OwnText
from apex_fast.data.shapes import (
    COLOURS,
    COUNTS,
    RELATIONS,
    SHAPES,
    Scene,
    Thing,
    all_prompts,
    draw_prompts,
    parse,
    render,
)
from apex_fast.training.checkpoint import CheckpointError
from apex_fast.training.models import load_found
from apex_fast.training.results import Record, data_set_of, find_result, has_own_text
from apex_fast.training.settings import SettingsError

_OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
HEADS: dict[str, tuple[Any, ...]] = {
    "colour": (None, *COLOURS),
    "shape": SHAPES,
    "side": (None, *RELATIONS),
    "count": (1, *COUNTS.values()),
}
"""What a word has to tell of its object, and the answers that there are. side: where the object is, seen from the other
one. count: how many of it a prompt on counting asks for, else 1."""
ENOUGH = 0.99
"""Share of right answers on every question below which an encoder has not learnt to read."""
NOTHING = -100
"""Class index of a token that says nothing of an object, as cross-entropy ignores it."""


def answers(prompt: str) -> list[tuple[int, int, int, int] | None]:
    """For every word of ``prompt`` the classes of ``HEADS`` of the object that it speaks of; None for the words between
    two objects. ValueError for what is no prompt of the shapes."""
    scene = parse(prompt)
    words = prompt.split()
    if scene.things[0] != scene.things[-1]:
        first = len(str(scene.things[0]).split()) + 1  # and the article
        last = len(words) - len(str(scene.things[1]).split()) - 1
        return [
            _classes(scene, 0) if i < first else _classes(scene, 1) if i >= last else None for i in range(len(words))
        ]
    return [_classes(scene, 0)] * len(words)


def _classes(scene: Scene, position: int) -> tuple[int, int, int, int]:
    thing = scene.things[position]
    side = scene.relation if position == 0 or scene.relation is None else _OPPOSITE[scene.relation]
    count = len(scene.things) if scene.category == "counting" else 1
    colours, shapes, sides, counts = HEADS.values()
    return colours.index(thing.colour), shapes.index(thing.shape), sides.index(side), counts.index(count)


def _questions(text: OwnText, prompts: list[str]) -> tuple[dict[str, Tensor], Tensor]:
    """The tokens of all prompts, and the classes ``[prompts, tokens, heads]`` of their words."""
    tokens = text.tokenizer(
        prompts, padding="max_length", max_length=text.max_sequence_length, truncation=True, return_tensors="pt"
    )
    longest = max(len(ids) for ids in text.tokenizer(prompts)["input_ids"])
    if longest > text.max_sequence_length:
        raise ValueError(
            f"the prompts of the shapes have up to {longest} tokens, and this model reads {text.max_sequence_length}; "
            "make one with a larger max_sequence_length"
        )
    classes = torch.full((*tokens["input_ids"].shape, len(HEADS)), NOTHING)
    for i, prompt in enumerate(prompts):
        asked = answers(prompt)
        for k in range(text.max_sequence_length):
            word = tokens.token_to_word(i, k)
            if word is not None and (found := asked[word]) is not None:
                classes[i, k] = torch.tensor(found)
    return {name: tokens[name] for name in ("input_ids", "attention_mask")}, classes


def read(text: OwnText, *, steps: int = 800, batch_size: int = 128, seed: int = 0) -> dict[str, float]:
    """Makes the encoder of ``text`` new, by ``seed``, and trains it; returns the share of right answers by question.

    text: its encoder is of transformers and saved with the model; on the CPU, in fp32, frozen and in eval mode
        afterwards.

    Raises:
        ValueError: the encoder of a package, which is trained already, fewer than one step or prompt, or prompts that
            are longer than the encoder reads.
    """
    if text.package is not None:
        raise ValueError(f"the text encoder is that of the package {text.package}, which has been trained already")
    if steps < 1 or batch_size < 1:
        raise ValueError(f"steps and batch_size must be at least 1, got {steps} and {batch_size}")
    prompts = all_prompts()
    inputs, classes = _questions(text, prompts)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        encoder: Any = type(text.text_encoder)(text.text_encoder.config)
        heads = nn.ModuleList(nn.Linear(text.width, len(known)) for known in HEADS.values())
        parameters = [*encoder.parameters(), *heads.parameters()]
        optimizer = torch.optim.AdamW(parameters, lr=2e-3, weight_decay=0.01)
        # Up over 50 steps, then down in a straight line.
        factor = lambda step: min((step + 1) / 50, max(0.02, 1 - step / steps))  # noqa: E731
        rate = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        for _ in range(steps):
            chosen = torch.randint(len(prompts), (batch_size,))
            embeds = encoder(**{name: value[chosen] for name, value in inputs.items()}).last_hidden_state
            wanted = classes[chosen]
            loss = torch.stack(
                [
                    nn.functional.cross_entropy(
                        head(embeds).flatten(0, 1), wanted[..., k].flatten(), ignore_index=NOTHING
                    )
                    for k, head in enumerate(heads)
                ]
            ).sum()
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            rate.step()
    text.text_encoder = encoder.requires_grad_(False).eval()
    with torch.no_grad():
        embeds = encoder(**inputs).last_hidden_state
        asked = classes[..., 0] != NOTHING
        return {
            name: (head(embeds).argmax(-1)[asked] == classes[..., k][asked]).float().mean().item()
            for k, (name, head) in enumerate(zip(HEADS, heads, strict=True))
        }


def swapped(scene: Scene) -> Scene:
    """The same words in another order: the colours of two objects exchanged, or where there is a position, that."""
    first, second = scene.things
    if scene.relation is not None:
        return dataclasses.replace(scene, relation=_OPPOSITE[scene.relation])
    things = Thing(first.shape, second.colour), Thing(second.shape, first.colour)
    return dataclasses.replace(scene, things=things)


@torch.no_grad()
def order_gains(
    network: Backbone, *, times: tuple[float, ...] = (0.85, 0.65), count: int = 128, seed: int = 0
) -> dict[tuple[str, float], float]:
    """By how much the flow-matching loss on rendered pictures rises when two words of the prompts change places: 0.2 is
    20 %, and 0 is a network that does not read their order.

    Args:
        network: a model on the shapes, at 32 or 64 pixels.
        times: t of x_t = t z + (1 - t) x. Colours and places are decided early (near 1), shapes later.
        count: pictures of each category, drawn anew by ``seed``.

    Returns:
        By category ("attribute binding", "position" with colours) and time.
    """
    resolution = network.sample_shape[-1] * network.vae_scale_factor
    generator = torch.Generator().manual_seed(seed)
    gains = {}
    for category in ("attribute binding", "position"):
        prompts = [p for p in draw_prompts(4 * count, generator, (category,)) if parse(p).things[0].colour][:count]
        wrong = [swapped(parse(prompt)).prompt() for prompt in prompts]
        x = network.encode_images(render(prompts, generator=generator, resolution=resolution))
        conditions = network.encode(prompts), network.encode(wrong)
        for at in times:
            t, z = torch.full((len(x),), at), torch.randn(x.shape, generator=generator)
            x_t = at * z + (1 - at) * x
            right, other = ((network(x_t, t, c) - (z - x)).square().mean().item() for c in conditions)
            gains[category, at] = other / right - 1
    return gains


def _model_on_shapes(model: str) -> Backbone:
    """A whole small model on the shapes. ValueError for any other."""
    found = find_result(model)
    trained_on = data_set_of(model)
    if trained_on not in ("shapes", None):
        raise ValueError(f"--model: {model} was trained on {trained_on}; a model on the shapes is expected")
    if Record.read(found.folder) is not None or not has_own_text(found.folder):
        raise ValueError(f"--model: {model} is no whole model with a small text encoder of its own")
    return load_found(found)[0]


def main(arguments: list[str] | None = None) -> int:
    """Teaches the text encoder of a small model on the shapes to read its prompts, from scratch, and writes the model
    with it; or says whether its network uses the order of words."""
    parser = argparse.ArgumentParser(prog="python -m apex_fast.training.reading", description=main.__doc__)
    parser.add_argument("--model", required=True, help="folder of a finished run or saved model, or one that ships")
    parser.add_argument("--steps", type=int, default=800, help="of teaching")
    parser.add_argument("--batch-size", type=int, default=128, help="prompts in a step of teaching")
    parser.add_argument("--seed", type=int, default=0)
    either = parser.add_mutually_exclusive_group(required=True)
    either.add_argument("--output", type=Path, help="folder to write; must not be there yet")
    either.add_argument("--check", action="store_true", help="teach nothing: measure the network as it is")
    chosen = parser.parse_args(arguments)
    if chosen.output is not None and chosen.output.exists():
        parser.error(f"--output: {chosen.output} is there already; move it away first")
    began = time.perf_counter()
    try:
        network = _model_on_shapes(chosen.model)
        if chosen.check:
            for (category, t), gain in order_gains(network, seed=chosen.seed).items():
                print(f"{category:18} t = {t:g}: two words exchanged raise the loss by {100 * gain:.2f} %")
            return 0
        assert network.text is not None  # _model_on_shapes
        right = read(network.text, steps=chosen.steps, batch_size=chosen.batch_size, seed=chosen.seed)
    except (ValueError, FileNotFoundError, CheckpointError, SettingsError) as error:
        parser.error(str(error))
    told = ", ".join(f"{name} {share:.3f}" for name, share in right.items())
    print(f"right answers: {told} ({time.perf_counter() - began:.0f} s)")
    if min(right.values()) < ENOUGH:
        print(f"less than {ENOUGH:g} of some question: nothing is written; take more --steps than {chosen.steps}")
        return 1
    network.save_pretrained(chosen.output)
    print(f"{chosen.output}: train the network on with this encoder, frozen (train_text_encoder: false)")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
