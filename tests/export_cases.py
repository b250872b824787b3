"""What the export tests share: tiny runs of every family, the code of a model card run as its reader would run it, and
what the library's own sampler makes of the same noise.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("yaml")
pytest.importorskip("peft")
pytest.importorskip("diffusers")

from backbone_cases import LENGTHS  # noqa: E402
from tiny_runs import make_pipeline, pipeline_keys  # noqa: E402

import apex_fast as af  # noqa: E402
from apex_fast.backbones.base import Backbone  # noqa: E402
from apex_fast.training.config import load_config  # noqa: E402
from apex_fast.training.loop import Trainer  # noqa: E402

LORA = ("--rank", "4", "--lora_alpha", "8", "--learning_rate", "1e-2")
PROMPT = "a red circle on white"
_RUNS: dict[tuple[str, str, tuple[str, ...]], Path] = {}


def tiny_run(folders: pytest.TempPathFactory, family: str, mode: str = "lora", *more: str) -> Path:
    """A finished run of a few steps on the tiny pipeline of ``family``, made once: a LoRA, or all parameters."""
    key = (family, mode, more)
    if key not in _RUNS:
        folder = folders.mktemp(f"{family}-{mode}")
        model = make_pipeline(folder, family)
        words = pipeline_keys(
            model,
            folder / "run",
            *(LORA if mode == "lora" else ("--learning_rate", "1e-3")),
            *("--max_sequence_length", str(LENGTHS[family])),
            *("--validation_prompts", PROMPT, "--validation_steps", "4", "--validation_images_per_prompt", "1"),
            *("--objective.warmup_steps", "1", "--max_train_steps", "4", "--checkpointing_steps", "2", *more),
        )
        Trainer(load_config(None, words)).run()
        _RUNS[key] = folder / "run"
    return _RUNS[key]


def code_of(card: Path) -> str:
    """The only Python block of a model card."""
    (block,) = re.findall(r"^```python\n(.*?)^```$", card.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    return block


def run_card(
    card: Path, *, before_call: Callable[[dict[str, Any]], None] | None = None, **variables: Any
) -> tuple[Tensor, Any]:
    """Runs the code of ``card`` in the working directory: the latents that its pipeline decoded, and the picture.

    variables: values for variables that the code defines, put in their place.
    before_call: called with the variables right before the pipeline is.
    """
    tree = ast.parse(code_of(card))
    left = dict(variables)
    for statement in tree.body:
        if isinstance(statement, ast.Assign) and getattr(statement.targets[0], "id", None) in left:
            value = left.pop(statement.targets[0].id)  # type: ignore[attr-defined]
            statement.value = ast.copy_location(ast.parse(repr(value), mode="eval").body, statement.value)
    assert not left, f"the card defines no variables {list(left)}"
    names: dict[str, Any] = {}
    with decoded() as latents:
        for statement in ast.fix_missing_locations(tree).body:
            if before_call is not None and getattr(getattr(statement, "targets", [None])[0], "id", None) == "image":
                before_call(names)
            exec(compile(ast.Module([statement], []), str(card), "exec"), names)
    (found,) = latents
    return found, names["image"]


@contextmanager
def decoded() -> Iterator[list[Tensor]]:
    """Collects what any VAE is given to decode, as latents ``[B, C, h, w]`` in the scale of the VAE."""
    import diffusers

    found: list[Tensor] = []
    with pytest.MonkeyPatch.context() as patch:
        for name in ("AutoencoderKL", "AutoencoderDC", "AutoencoderKLQwenImage"):
            cls = getattr(diffusers, name)

            def recorded(self: Any, z: Tensor, *rest: Any, _decode: Any = cls.decode, **named: Any) -> Any:
                found.append(z.detach().squeeze(2) if z.dim() == 5 else z.detach())
                return _decode(self, z, *rest, **named)

            patch.setattr(cls, "decode", recorded)
        yield found


def own_latents(backbone: Backbone, prompt: str, size: tuple[int, int], **options: Any) -> tuple[Tensor, Tensor]:
    """What ``af.sample`` makes of the noise that a pipeline draws with the seed 0: latents as the VAE gets them, and
    the picture in [-1, 1]."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(1, *backbone.latent_shape(*size), generator=generator)
    if options.pop("same_generator", False):
        options["generator"] = generator
    latents = af.sample(backbone, noise, backbone.encode([prompt]), **options)
    with decoded() as found:
        image = backbone.decode(latents)
    return found[0], image


def pixels_of(image: Any) -> Tensor:
    """``[3, H, W]`` in [0, 255] of a PIL picture."""
    import numpy as np

    return torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1).float()
