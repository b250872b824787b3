"""What ComfyUI's loader makes of a LoRA file, in few lines: the facts of its public repository (``comfy/lora.py``,
``comfy/utils.py``, ``comfy/weight_adapter/lora.py``, ``comfy/model_detection.py``) as of 2026, stated once more and
independently of the tables that the export is written with.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Target:
    """A native weight, the rows of it (start, count) that a key stands for, and what is done to the difference."""

    name: str
    rows: tuple[int, int] | None = None
    function: Callable[[Tensor], Tensor] | None = None


def swap_scale_shift(value: Tensor) -> Tensor:
    half = value.shape[0] // 2
    return torch.cat([value[half:], value[:half]])


def key_map(family: str, state: dict[str, Tensor]) -> dict[str, Target]:
    """Keys that the loader knows for a native ``state``."""
    known = {f"diffusion_model.{n.removesuffix('.weight')}": Target(n) for n in state if n.endswith(".weight")}
    if family == "qwen_image":
        for name in state:
            if name.endswith(".weight"):
                known[f"transformer.{name.removesuffix('.weight')}"] = Target(name)
    named = {"flux": _flux, "stable_diffusion_3": _sd3, "z_image": _z_image, "lumina2": _z_image}.get(family)
    if named is not None:
        known |= {f"transformer.{key}": target for key, target in named(state).items()}
    return known


def _flux(state: dict[str, Tensor]) -> dict[str, Target]:
    hidden = state["img_in.weight"].shape[0]
    found = {}
    for i in range(_count(state, "double_blocks")):
        ours, native = f"transformer_blocks.{i}", f"double_blocks.{i}"
        for stream, names in (("img", ("to_q", "to_k", "to_v")), ("txt", ("add_q_proj", "add_k_proj", "add_v_proj"))):
            for j, name in enumerate(names):
                found[f"{ours}.attn.{name}"] = Target(f"{native}.{stream}_attn.qkv.weight", (j * hidden, hidden))
        for key, name in {
            "attn.to_out.0": "img_attn.proj",
            "attn.to_add_out": "txt_attn.proj",
            "norm1.linear": "img_mod.lin",
            "norm1_context.linear": "txt_mod.lin",
            "ff.net.0.proj": "img_mlp.0",
            "ff.net.2": "img_mlp.2",
            "ff_context.net.0.proj": "txt_mlp.0",
            "ff_context.net.2": "txt_mlp.2",
        }.items():
            found[f"{ours}.{key}"] = Target(f"{native}.{name}.weight")
    for i in range(_count(state, "single_blocks")):
        ours, native = f"single_transformer_blocks.{i}", f"single_blocks.{i}"
        for j, name in enumerate(("to_q", "to_k", "to_v")):
            found[f"{ours}.attn.{name}"] = Target(f"{native}.linear1.weight", (j * hidden, hidden))
        found[f"{ours}.proj_mlp"] = Target(f"{native}.linear1.weight", (3 * hidden, 4 * hidden))
        found[f"{ours}.norm.linear"] = Target(f"{native}.modulation.lin.weight")
        found[f"{ours}.proj_out"] = Target(f"{native}.linear2.weight")
    for key, name in {
        "proj_out": "final_layer.linear",
        "x_embedder": "img_in",
        "context_embedder": "txt_in",
        "time_text_embed.timestep_embedder.linear_1": "time_in.in_layer",
        "time_text_embed.timestep_embedder.linear_2": "time_in.out_layer",
        "time_text_embed.text_embedder.linear_1": "vector_in.in_layer",
        "time_text_embed.text_embedder.linear_2": "vector_in.out_layer",
        "time_text_embed.guidance_embedder.linear_1": "guidance_in.in_layer",
        "time_text_embed.guidance_embedder.linear_2": "guidance_in.out_layer",
    }.items():
        found[key] = Target(f"{name}.weight")
    found["norm_out.linear"] = Target("final_layer.adaLN_modulation.1.weight", function=swap_scale_shift)
    return found


def _sd3(state: dict[str, Tensor]) -> dict[str, Target]:
    # The loader takes the width over 64 for the number of blocks; here the blocks are counted.
    hidden, depth = state["x_embedder.proj.weight"].shape[0], _count(state, "joint_blocks")
    found = {}
    for i in range(depth):
        ours, native = f"transformer_blocks.{i}", f"joint_blocks.{i}"
        for names, fused in (
            (("attn.to_q", "attn.to_k", "attn.to_v"), "x_block.attn.qkv"),
            (("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"), "context_block.attn.qkv"),
            (("attn2.to_q", "attn2.to_k", "attn2.to_v"), "x_block.attn2.qkv"),
        ):
            for j, name in enumerate(names):
                found[f"{ours}.{name}"] = Target(f"{native}.{fused}.weight", (j * hidden, hidden))
        for key, name in {
            "norm1_context.linear": "context_block.adaLN_modulation.1",
            "attn.to_add_out": "context_block.attn.proj",
            "ff_context.net.0.proj": "context_block.mlp.fc1",
            "ff_context.net.2": "context_block.mlp.fc2",
            "norm1.linear": "x_block.adaLN_modulation.1",
            "attn.to_out.0": "x_block.attn.proj",
            "attn2.to_out.0": "x_block.attn2.proj",
            "ff.net.0.proj": "x_block.mlp.fc1",
            "ff.net.2": "x_block.mlp.fc2",
        }.items():
            found[f"{ours}.{key}"] = Target(f"{native}.{name}.weight")
    for key, name in {
        "context_embedder": "context_embedder",
        "pos_embed.proj": "x_embedder.proj",
        "proj_out": "final_layer.linear",
        "time_text_embed.timestep_embedder.linear_1": "t_embedder.mlp.0",
        "time_text_embed.timestep_embedder.linear_2": "t_embedder.mlp.2",
        "time_text_embed.text_embedder.linear_1": "y_embedder.mlp.0",
        "time_text_embed.text_embedder.linear_2": "y_embedder.mlp.2",
    }.items():
        found[key] = Target(f"{name}.weight")
    last = depth - 1
    found["norm_out.linear"] = Target("final_layer.adaLN_modulation.1.weight", function=swap_scale_shift)
    found[f"transformer_blocks.{last}.norm1_context.linear"] = Target(
        f"joint_blocks.{last}.context_block.adaLN_modulation.1.weight", function=swap_scale_shift
    )
    return found


def _z_image(state: dict[str, Tensor]) -> dict[str, Target]:
    # The loader applies this map to Lumina 2 as well, where neither the names nor the widths fit.
    width = state["cap_embedder.1.weight"].shape[0]
    found = {}
    for blocks in ("layers", "context_refiner", "noise_refiner"):
        for i in range(_count(state, blocks)):
            block = f"{blocks}.{i}"
            for j, name in enumerate(("to_q", "to_k", "to_v")):
                found[f"{block}.attention.{name}"] = Target(f"{block}.attention.qkv.weight", (j * width, width))
            found[f"{block}.attention.to_out.0"] = Target(f"{block}.attention.out.weight")
            same = ["feed_forward.w1", "feed_forward.w2", "feed_forward.w3"]
            if blocks != "context_refiner":
                same.append("adaLN_modulation.0")
            found |= {f"{block}.{name}": Target(f"{block}.{name}.weight") for name in same}
    found["all_final_layer.2-1.linear"] = Target("final_layer.linear.weight")
    found["all_final_layer.2-1.adaLN_modulation.1"] = Target("final_layer.adaLN_modulation.1.weight")
    found["all_x_embedder.2-1"] = Target("x_embedder.weight")
    for name in ("cap_embedder.1", "t_embedder.mlp.0", "t_embedder.mlp.2"):
        found[name] = Target(f"{name}.weight")
    return found


def _count(state: dict[str, Tensor], blocks: str) -> int:
    return 1 + max((int(n.split(".")[1]) for n in state if n.startswith(f"{blocks}.")), default=-1)


def load_lora(family: str, state: dict[str, Tensor], lora: dict[str, Tensor]) -> tuple[dict[str, Tensor], set[str]]:
    """``state`` with ``lora`` in its weights at strength 1, and the keys that were not understood."""
    patched = {name: value.clone() for name, value in state.items()}
    used = set()
    for key, target in key_map(family, state).items():
        up, down, alpha = (f"{key}.{end}" for end in ("lora_B.weight", "lora_A.weight", "alpha"))
        if up not in lora:
            continue
        used |= {up, down} | ({alpha} & lora.keys())
        scale = lora[alpha].item() / lora[down].shape[0] if alpha in lora else 1.0
        weight = patched[target.name]
        if target.rows is not None:
            weight = weight.narrow(0, *target.rows)
        difference = (lora[up].float().flatten(1) @ lora[down].float().flatten(1)).reshape(weight.shape)
        difference = scale * difference
        weight += target.function(difference) if target.function is not None else difference
    return patched, lora.keys() - used


def detect(state: dict[str, Tensor]) -> str | None:
    """The family that the loader takes a native state dict for, by the first of its rules that fits."""
    if "joint_blocks.0.context_block.attn.qkv.weight" in state:
        return "stable_diffusion_3"
    if "double_blocks.0.img_attn.norm.key_norm.scale" in state and "img_in.weight" in state:
        return "flux"
    if "cap_embedder.1.weight" in state and "noise_refiner.0.attention.k_norm.weight" in state:
        width = state["cap_embedder.1.weight"].shape[0]
        if width == 3840:
            return "z_image" if "cap_pad_token" in state else None
        return "lumina2" if width == 2304 else None
    return "qwen_image" if "txt_norm.weight" in state else None
