"""The options of ``apex-fast eval``, and which of them go together."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from apex_fast.command import NAME
from apex_fast.data.shipped import SHIPPED

DEFAULTS = {"nfe": [1, 4, 50], "guidance_scale": [1.0], "seeds": 1, "samples": 600}
"""Of options that not every way of scoring takes."""


def hyphens(word: str) -> str:
    """``--guidance_scale`` as ``--guidance-scale``: both spellings are accepted everywhere."""
    name, equals, value = word.partition("=")
    return name.replace("_", "-") + equals + value if word.startswith("--") else word


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=f"{NAME} eval",
        description="Scores a run on its benchmark, or any model by the pictures that it draws from prompts.",
    )
    parser.add_argument(
        "model",
        metavar="RUN",
        nargs="?",
        help="folder of a run, a checkpoint or a saved model, or one that ships (digits_start, shapes_start, ...); "
        "with --prompts also a diffusers folder or a hub id",
    )
    parser.add_argument(
        "--nfe",
        type=_list_of(int, lambda value: value >= 1, "numbers of steps such as 1,4,50"),
        help="numbers of sampling steps, with commas (default 1,4,50)",
    )
    parser.add_argument(
        "--guidance-scale",
        type=_list_of(float, lambda value: value == value, "guidance scales such as 1,3"),
        help="classifier-free guidance as the model's own pipeline counts it, one or several with commas: every number "
        "of steps with each (default 1, none)",
    )
    parser.add_argument("--negative-prompt", help="what guidance leads away from (default: the model's own, or none)")
    parser.add_argument(
        "--stochasticity",
        type=float,
        help="share of new noise between the steps: 0 is Euler, 1 noises anew (default 0); on a benchmark",
    )
    parser.add_argument("--seeds", type=int, help="how many seeds; intervals need two or more (default 1)")
    parser.add_argument("--seed", type=int, default=0, help="the first of them (default 0)")
    parser.add_argument("--against", metavar="TEACHER", help="another model, scored the same way and compared with")
    parser.add_argument("--base", help="where the model that the run started from is now, if it was moved")
    parser.add_argument(
        "--lora", help="a LoRA for RUN: a .safetensors file, or the folder of a run or an export of one"
    )
    parser.add_argument("--out", type=Path, help="JSON to write, .md and .png beside it (default: RUN/eval.json)")
    parser.add_argument("--device", default="auto", help="auto (default: cuda if there is one, else cpu), cpu, cuda:N")

    own = parser.add_argument_group("on a benchmark")
    own.add_argument(
        "--benchmark", choices=tuple(SHIPPED), help="default: the data set of the run, or what its samples can only be"
    )
    own.add_argument("--samples", type=int, help="pictures to compare with as many real ones (default 600)")
    own.add_argument("--batch-size", type=int, help="pictures made together (default 200; with --prompts 1)")
    own.add_argument(
        "--real-data",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="a row for real pictures, which is as good as a model can be (default: yes)",
    )

    pictures = parser.add_argument_group("by pictures")
    pictures.add_argument(
        "--prompts", metavar="FILE", help="draw these: a file with one a line, JSON lines, or a folder of text files"
    )
    pictures.add_argument(
        "--pictures", metavar="FOLDER", help="score pictures that are there (layout plain, geneval, dpg or any)"
    )
    pictures.add_argument("--n", type=int, help="pictures of each prompt; of --pictures, in each file (default 1)")
    pictures.add_argument("--clip-model", metavar="PATH", help="CLIP score by this local CLIPModel of transformers")
    pictures.add_argument(
        "--fid-real", metavar="FOLDER", help="Frechet distance, precision and recall to the pictures in this folder"
    )
    pictures.add_argument(
        "--fid-weights", metavar="FILE", help="FID: the TorchScript file inception-2015-12-05.pt on this machine"
    )
    pictures.add_argument(
        "--fid-model", metavar="PATH", help="a local vision model of transformers instead (the distance is no FID then)"
    )
    pictures.add_argument("--height", type=int, help="in pixels (default: as trained)")
    pictures.add_argument("--width", type=int, help="in pixels (default: as trained)")
    parser.add_argument("--resolution", type=int, help="edge of the pictures in pixels (default: the model's)")
    return parser


def _list_of(kind: Callable[[str], Any], allowed: Callable[[Any], bool], such: str) -> Callable[[str], list[Any]]:
    def parse(text: str) -> list[Any]:
        try:
            values = [kind(part) for part in text.split(",")]
        except ValueError:
            values = []
        if not values or not all(map(allowed, values)) or len(set(values)) < len(values):
            raise argparse.ArgumentTypeError(f"expected {such}, each once, got {text!r}")
        return values

    return parse


def check(options: argparse.Namespace) -> None:
    """ValueError for options that do not go together, before anything is loaded."""
    for name in ("seeds", "batch_size", "n"):
        if (value := getattr(options, name)) is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {value}")
    if options.stochasticity is not None and not 0 <= options.stochasticity <= 1:
        raise ValueError(f"--stochasticity must lie in [0, 1], got {options.stochasticity}")
    if options.out is not None and (options.out.is_dir() or options.out.suffix in (".md", ".png")):
        raise ValueError(
            f"--out {options.out}: expected the JSON file to write, such as eval.json; the card and the plot go beside "
            "it"
        )
    by_pictures = options.prompts is not None or options.pictures is not None
    measures = [name for name in ("clip_model", "fid_real") if getattr(options, name) is not None]
    if options.model is None and options.pictures is None:
        raise ValueError("say what to score: a RUN, or --pictures FOLDER")
    if options.model is not None and options.pictures is not None:
        raise ValueError(
            "--pictures scores pictures that are there, and RUN would draw new ones; leave one of them out"
        )
    if not by_pictures:
        for name in ("clip_model", "fid_real", "fid_weights", "fid_model", "n", "height", "width"):
            if getattr(options, name) is not None:
                raise ValueError(f"--{name.replace('_', '-')} is for --prompts FILE or --pictures FOLDER")
        return
    if not measures:
        raise ValueError("say what to score the pictures by: --clip-model PATH, --fid-real FOLDER, or both")
    if (options.fid_real is None) != (options.fid_weights is None and options.fid_model is None):
        raise ValueError("--fid-real FOLDER goes with --fid-weights FILE, or with --fid-model PATH")
    if options.fid_weights is not None and options.fid_model is not None:
        raise ValueError("--fid-weights is for FID, --fid-model for another distance; leave one of them out")
    for name in ("benchmark", "stochasticity", "samples"):
        if getattr(options, name) is not None:
            raise ValueError(f"--{name} is for a benchmark; leave it out with --prompts or --pictures")
    if options.pictures is not None:
        drawing = ("nfe", "guidance_scale", "negative_prompt", "seeds", "height", "width", "resolution")
        for name in ("against", "lora", "base", "batch_size", *drawing):
            if getattr(options, name) is not None:
                raise ValueError(f"--{name.replace('_', '-')} is for drawing; leave it out with --pictures")
    elif options.resolution is not None and (options.height is not None or options.width is not None):
        raise ValueError("write --resolution, or --height and --width")
