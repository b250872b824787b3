"""A run as files of ComfyUI's core: a LoRA or a diffusion model, a workflow of core nodes, and where to put them.

==========  ============================================================================================
LoRA        ``models/loras/<name>.safetensors``. ComfyUI merges a LoRA into the weights by a map from the file's keys
            to its own weights, and warns "lora key not loaded" of others. For FLUX, SD3 and Z-Image that map has
            diffusers' names: it puts each into its rows of a joined matrix and swaps the halves of the last modulation
            itself, so the file keeps diffusers' matrices and is as small as they are. For Lumina 2 it has not (and
            what it has for Z-Image takes query, key and value for equally wide, which in Lumina 2 they are not), so
            those three become one matrix here: rank 3 r, the up matrix block-diagonal, which is the same sum.
            Qwen-Image has the same names on both sides. ``<layer>.alpha`` goes with every layer: ComfyUI scales by
            alpha / rank of the file, and by 1 where a file has no alpha.
full        ``models/diffusion_models/<name>.safetensors``: the transformer in the native layout
            (:mod:`~apex_fast.export.comfyui_keys`), without text encoders and VAE, which the run did not change
            and which users of these families load as files of their own. Also a LoRA with ``merge``.
always      ``workflow.json`` and ``workflow_api.json`` (:mod:`~apex_fast.export.workflow`), and ``README.md``: where to
            put them, code that queues the workflow, the last grid of the validations, settings and metrics
==========  ============================================================================================

rsLoRA is written with the alpha that gives the same scale. DoRA is refused: ComfyUI divides by another norm than peft.
Nothing here was run in ComfyUI itself; the names are those of its public repository, and the tests apply the files by
their own statement of its map.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from apex_fast.export.card import copy_picture, front_matter_text, metrics_table, settings_table, what
from apex_fast.export.comfyui_keys import check_family, native_state, place
from apex_fast.export.source import Source
from apex_fast.export.stock import merge_adapters
from apex_fast.export.workflow import Workflow, workflow
from apex_fast.lora import WEIGHTS
from apex_fast.training.provenance import README
from apex_fast.training.settings import SettingsError

MAPPED = ("flux", "stable_diffusion_3", "z_image")
"""Families whose LoRA keys ComfyUI's own map has under diffusers' names, behind ``transformer.``."""
NATIVE_PREFIX = "diffusion_model."
"""Before every native name, in LoRA files of any family."""
JOINED = ("to_q", "to_k", "to_v")
"""Layers of Lumina 2 that are one matrix in ComfyUI, in the order of its rows."""


def export_comfyui(source: Source, folder: Path, merge: bool, say: Callable[[str], None]) -> list[Path]:
    """Writes ``source`` into ``folder``, which is there and empty; returns the files.

    merge: for a LoRA, the whole diffusion model with the LoRA in its weights. The adapters of ``source.backbone`` are
        merged into it for good.
    say: is told of sizes that ComfyUI would take for others.

    Raises:
        SettingsError: a family that ComfyUI's core cannot load, or a LoRA that it would not apply as trained.
    """
    try:
        check_family(source.family)
        alone = source.mode == "lora" and not merge
        kind = "loras" if alone else "diffusion_models"
        file = folder / "models" / kind / f"{source.name}.safetensors"
        state = _lora(source) if alone else _diffusion_model(source, say)
    except ValueError as error:
        raise SettingsError(f"export: {error}") from error
    file.parent.mkdir(parents=True)
    save_file(state, file, metadata={**source.metadata, "format": "pt"})
    flow = workflow(source, lora=file.name if alone else None, model=None if alone else file.name)
    files = [file, folder / "workflow.json", folder / "workflow_api.json", folder / README]
    files[1].write_text(json.dumps(flow.graph(), indent=1) + "\n", encoding="utf-8")
    files[2].write_text(json.dumps(flow.prompt(), indent=1) + "\n", encoding="utf-8")
    picture = copy_picture(source, folder)
    files[3].write_text(_readme(source, flow, file.relative_to(folder), merge, picture), encoding="utf-8")
    return files


# ---- a LoRA


def _lora(source: Source) -> dict[str, Tensor]:
    if source.start_lora is not None:
        raise ValueError(
            f"this LoRA belongs on top of {source.record.start_lora}, which the run started from, and ComfyUI would "
            "load it without; write --merge for a diffusion model with both in its weights"
        )
    with safe_open(source.found.folder / WEIGHTS, "pt") as file:
        header = file.metadata() or {}
    settings = json.loads(header.get("lora_adapter_metadata", "{}"))
    # diffusers writes the settings of every part of a pipeline under one roof.
    settings = {k.removeprefix("transformer."): v for k, v in settings.items() if k.startswith("transformer.")}
    if "r" not in settings:
        raise ValueError(
            f"{source.found.folder / WEIGHTS} names no rank and alpha in its header (lora_adapter_metadata)"
        )

    def rows(layer: str) -> int:
        return source.backbone.transformer.get_submodule(layer).weight.shape[0]

    assert source.lora_state is not None
    return lora_file(source.family, source.lora_state, settings, rows)


def lora_file(
    family: str, state: Mapping[str, Tensor], settings: Mapping[str, Any], rows: Callable[[str], int]
) -> dict[str, Tensor]:
    """The tensors of a LoRA under keys that ComfyUI's loader has for ``family``.

    Args:
        state: as in ``pytorch_lora_weights.safetensors``: ``transformer.<layer>.lora_A.weight`` [r, in] and
            ``lora_B.weight`` [out, r] (convolutions with their kernel behind).
        settings: of the adapter, as peft names them: ``r``, ``lora_alpha``, ``use_rslora``, ``use_dora``,
            ``alpha_pattern``.
        rows: rows of a layer's weight; only asked for a part of a joined matrix that the LoRA leaves out.

    Returns:
        ``<key>.lora_A.weight``, ``<key>.lora_B.weight`` in the dtype of ``state``, and ``<key>.alpha``, fp32 scalars.

    Raises:
        ValueError: DoRA or another kind of adapter, or a layer that the family's layout does not have.
    """
    if settings.get("use_dora"):
        raise ValueError(
            "ComfyUI computes DoRA with another norm than peft, so this LoRA would come out otherwise than it was "
            "trained; write --merge for a diffusion model with it in its weights"
        )
    pairs: dict[str, dict[str, Tensor]] = {}
    for key, value in state.items():
        layer, mark, end = key.removeprefix("transformer.").rpartition(".lora_")
        if not mark or end not in ("A.weight", "B.weight"):
            raise ValueError(f"{key} is no matrix of a LoRA (expected <layer>.lora_A.weight or <layer>.lora_B.weight)")
        pairs.setdefault(layer, {})[end[0]] = value
    file: dict[str, Tensor] = {}
    joined: dict[str, dict[int, str]] = {}
    for layer, pair in pairs.items():
        where = place(family, f"{layer}.weight")
        if family in MAPPED:
            _add(file, f"transformer.{layer}", pair["A"], pair["B"], _scale(layer, pair["A"], settings))
        elif where.parts == 1:
            native = where.name.removesuffix(".weight")
            _add(file, NATIVE_PREFIX + native, pair["A"], pair["B"], _scale(layer, pair["A"], settings))
        else:
            joined.setdefault(where.name, {})[where.part] = layer
    for native, layers in joined.items():
        key = NATIVE_PREFIX + native.removesuffix(".weight")
        _add(file, key, *_join(layers, pairs, settings, rows))
    return file


def _add(file: dict[str, Tensor], key: str, down: Tensor, up: Tensor, scale: float) -> None:
    file[f"{key}.lora_A.weight"] = down.contiguous()
    file[f"{key}.lora_B.weight"] = up.contiguous()
    file[f"{key}.alpha"] = torch.tensor(scale * down.shape[0], dtype=torch.float32)


def _scale(layer: str, down: Tensor, settings: Mapping[str, Any]) -> float:
    """What peft multiplies the product of the two matrices of ``layer`` with."""
    alpha = settings["lora_alpha"]
    for pattern, own in (settings.get("alpha_pattern") or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", layer):
            alpha = own
            break
    rank = down.shape[0]
    return alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank)


def _join(
    layers: Mapping[int, str],
    pairs: Mapping[str, Mapping[str, Tensor]],
    settings: Mapping[str, Any],
    rows: Callable[[str], int],
) -> tuple[Tensor, Tensor, float]:
    """Down matrix, up matrix and scale of one adapter for a joined matrix, of which the parts ``layers`` are
    adapted."""
    parent = next(iter(layers.values())).rpartition(".")[0]
    scales = {part: _scale(layer, pairs[layer]["A"], settings) for part, layer in layers.items()}
    common = len(set(scales.values())) == 1
    ups = []
    for part, name in enumerate(JOINED):
        if part not in layers:
            ups.append(torch.zeros(rows(f"{parent}.{name}"), 0))
            continue
        up = pairs[layers[part]]["B"]
        # One alpha serves all: where the scales differ, each goes into its own rows.
        ups.append(up if common else up * scales[part])
    down = torch.cat([pairs[layers[part]]["A"] for part in sorted(layers)])
    return down, torch.block_diag(*ups).to(down.dtype), next(iter(scales.values())) if common else 1.0


# ---- a diffusion model

_PUBLISHED: dict[str, Callable[[Any], dict[str, tuple[Any, Any]]]] = {
    "flux": lambda c: {"in_channels": (c.in_channels, 64), "attention_head_dim": (c.attention_head_dim, 128)},
    "qwen_image": lambda c: {
        "num_attention_heads": (c.num_attention_heads, 24),
        "attention_head_dim": (c.attention_head_dim, 128),
        "joint_attention_dim": (c.joint_attention_dim, 3584),
    },
    "z_image": lambda c: {
        "dim": (c.dim, 3840),
        "n_heads": (c.n_heads, 30),
        "n_refiner_layers": (c.n_refiner_layers, 2),
    },
    "stable_diffusion_3": lambda c: {
        "in_channels": (c.in_channels, 16),
        "attention_head_dim": (c.attention_head_dim, 64),
        # It takes the width over 64 for the number of blocks as well.
        "num_layers": (c.num_layers, c.num_attention_heads),
    },
    "lumina2": lambda c: {
        "hidden_size": (c.hidden_size, 2304),
        "num_attention_heads": (c.num_attention_heads, 24),
        "num_kv_heads": (c.num_kv_heads, 8),
        "num_refiner_layers": (c.num_refiner_layers, 2),
    },
}
"""Sizes that ComfyUI does not read off a file but knows of the published models: (found, needed) by config key."""


def unknown_sizes(family: str, config: Any) -> list[str]:
    """Sizes of a transformer (its diffusers config) that ComfyUI would take for others, in words; empty for the
    published models."""
    sizes = _PUBLISHED[family](config)
    return [f"{key} is {found}, not {needed}" for key, (found, needed) in sizes.items() if found != needed]


def _diffusion_model(source: Source, say: Callable[[str], None]) -> dict[str, Tensor]:
    transformer = source.backbone.transformer
    if source.mode == "lora":
        merge_adapters(source.backbone, source.merged)
    if unknown := unknown_sizes(source.family, transformer.config):
        say(
            f"ComfyUI knows the sizes of the published {source.family} models and would not load this one: "
            + "; ".join(unknown)
        )
    state = {name: value.detach().cpu() for name, value in transformer.state_dict().items()}
    return {name: value.contiguous() for name, value in native_state(source.family, state).items()}


# ---- what to copy where


SNIPPET = """import json
from urllib.request import Request, urlopen

server = "http://127.0.0.1:8188"
folder = "."  # of this file
prompt = {prompt}
seed = 0

with open(f"{{folder}}/workflow_api.json", encoding="utf-8") as file:
    workflow = json.load(file)
for node in workflow.values():
    for name, value in (("text", prompt), ("user_prompt", prompt), ("seed", seed)):
        if name in node["inputs"]:
            node["inputs"][name] = value
body = json.dumps({{"prompt": workflow}}).encode()
with urlopen(Request(f"{{server}}/prompt", body, {{"Content-Type": "application/json"}})) as answer:
    print(json.load(answer))
"""
"""Queues the workflow on a ComfyUI that runs."""


def _readme(source: Source, flow: Workflow, file: Path, merge: bool, picture: str) -> str:
    places = "\n".join(f"| `{name}` | `ComfyUI/models/{folder}/` | {origin} |" for name, folder, origin in flow.files)
    metrics = metrics_table(source)
    parts = [
        front_matter_text(source, merge, ("comfyui",)),
        f"# {source.name} for ComfyUI",
        what(source, merge, rest=""),
        picture,
        "## Use it",
        f"""1. Copy the folder `models/` over the one of ComfyUI: `{file}` goes to `ComfyUI/{file}`.
2. Have the other files of the table there too. Other precisions of them work; choose yours in the loader nodes.
3. Open `workflow.json` (menu, or drop it on the window) and run it. `workflow_api.json` is the same for `POST /prompt`;
   the code below sends it.""",
        f"| file | folder | from |\n| --- | --- | --- |\n{places}",
        flow.note,
        f"```python\n{SNIPPET.format(prompt=json.dumps(source.prompt, ensure_ascii=False))}```",
        "Keys and nodes are those of ComfyUI's public repository; this export was not tried in ComfyUI itself.",
        "## How it was made",
        settings_table(source),
        *(["## Metrics", metrics] if metrics else []),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"
