"""Where the weights of a diffusers transformer lie in the layout that ComfyUI loads: names, joined matrices, halves.

ComfyUI runs a family in the layout of the repository that the model was first published in. Three things differ from
diffusers, all of them along the rows of a matrix (the first axis) and its bias:

==========  ============================================================================================
names       ``transformer_blocks.0.norm1.linear`` is FLUX's ``double_blocks.0.img_mod.lin``
joined      query, key and value (in FLUX's single blocks the feed-forward too) are one matrix, rows upon rows
swapped     the last modulation of FLUX and SD3, and that of the text in SD3's last block, is (shift, scale) there and
            (scale, shift) in diffusers
==========  ============================================================================================

Qwen-Image has one layout. SANA has none here: ComfyUI itself cannot load it. The layouts are those that diffusers'
own single-file loaders read, which is what the tests hold them to.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

Layers = dict[str, tuple[str, int, int]]
"""diffusers layer: native layer, which part of its rows, of how many."""


@dataclass(frozen=True)
class Place:
    """Where one tensor lies.

    Attributes:
        name: of the native tensor.
        part, parts: it is part ``part`` (from 0) of the ``parts`` that are stacked along its rows.
        swapped: its two halves have changed places.
    """

    name: str
    part: int = 0
    parts: int = 1
    swapped: bool = False


@dataclass(frozen=True)
class Layout:
    """The native layout of a family.

    Attributes:
        blocks: diffusers' name of a list of blocks: its native name, and the layers in a block.
        outside: layers outside of the blocks.
        tensors: tensors that are no weight or bias of a layer.
        swapped: layers of ``outside`` whose halves change places.
        swapped_in_last: the same for layers of the last block of each list.
        same: the layout is the one that diffusers has, and nothing else is filled in.
    """

    blocks: dict[str, tuple[str, Layers]] = field(default_factory=dict)
    outside: dict[str, str] = field(default_factory=dict)
    tensors: dict[str, str] = field(default_factory=dict)
    swapped: tuple[str, ...] = ()
    swapped_in_last: tuple[str, ...] = ()
    same: bool = False


def _layers(plain: dict[str, str], joined: dict[str, tuple[str, ...]]) -> Layers:
    places: Layers = {ours: (native, 0, 1) for ours, native in plain.items()}
    for native, parts in joined.items():
        places.update({ours: (native, i, len(parts)) for i, ours in enumerate(parts)})
    return places


_QKV = ("attn.to_q", "attn.to_k", "attn.to_v")
_ADDED_QKV = ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj")


def _flux() -> Layout:
    plain = {}
    for stream, norm, attention, out, feed_forward in (
        ("img", "norm1", "norm_{}", "to_out.0", "ff"),
        ("txt", "norm1_context", "norm_added_{}", "to_add_out", "ff_context"),
    ):
        plain |= {
            f"{norm}.linear": f"{stream}_mod.lin",
            f"attn.{attention.format('q')}": f"{stream}_attn.norm.query_norm",
            f"attn.{attention.format('k')}": f"{stream}_attn.norm.key_norm",
            f"attn.{out}": f"{stream}_attn.proj",
            f"{feed_forward}.net.0.proj": f"{stream}_mlp.0",
            f"{feed_forward}.net.2": f"{stream}_mlp.2",
        }
    double = _layers(plain, {"img_attn.qkv": _QKV, "txt_attn.qkv": _ADDED_QKV})
    single = _layers(
        {
            "norm.linear": "modulation.lin",
            "attn.norm_q": "norm.query_norm",
            "attn.norm_k": "norm.key_norm",
            "proj_out": "linear2",
        },
        {"linear1": (*_QKV, "proj_mlp")},
    )
    outside = {
        "x_embedder": "img_in",
        "context_embedder": "txt_in",
        "norm_out.linear": "final_layer.adaLN_modulation.1",
        "proj_out": "final_layer.linear",
    }
    for ours, native in (("timestep", "time"), ("text", "vector"), ("guidance", "guidance")):
        for i, end in ((1, "in_layer"), (2, "out_layer")):
            outside[f"time_text_embed.{ours}_embedder.linear_{i}"] = f"{native}_in.{end}"
    return Layout(
        blocks={
            "transformer_blocks": ("double_blocks", double),
            "single_transformer_blocks": ("single_blocks", single),
        },
        outside=outside,
        swapped=("norm_out.linear",),
    )


def _stable_diffusion_3() -> Layout:
    plain = {}
    for stream, norm, attention, out, feed_forward in (
        ("x_block", "norm1", "norm_{}", "to_out.0", "ff"),
        ("context_block", "norm1_context", "norm_added_{}", "to_add_out", "ff_context"),
    ):
        plain |= {
            f"{norm}.linear": f"{stream}.adaLN_modulation.1",
            f"attn.{attention.format('q')}": f"{stream}.attn.ln_q",
            f"attn.{attention.format('k')}": f"{stream}.attn.ln_k",
            f"attn.{out}": f"{stream}.attn.proj",
            f"{feed_forward}.net.0.proj": f"{stream}.mlp.fc1",
            f"{feed_forward}.net.2": f"{stream}.mlp.fc2",
        }
    # The second attention of 3.5 medium's first blocks, over the image alone.
    plain |= {
        "attn2.norm_q": "x_block.attn2.ln_q",
        "attn2.norm_k": "x_block.attn2.ln_k",
        "attn2.to_out.0": "x_block.attn2.proj",
    }
    joined = {
        "x_block.attn.qkv": _QKV,
        "context_block.attn.qkv": _ADDED_QKV,
        "x_block.attn2.qkv": ("attn2.to_q", "attn2.to_k", "attn2.to_v"),
    }
    outside = {
        "pos_embed.proj": "x_embedder.proj",
        "context_embedder": "context_embedder",
        "norm_out.linear": "final_layer.adaLN_modulation.1",
        "proj_out": "final_layer.linear",
    }
    for ours, native in (("timestep", "t"), ("text", "y")):
        for i, end in ((1, 0), (2, 2)):
            outside[f"time_text_embed.{ours}_embedder.linear_{i}"] = f"{native}_embedder.mlp.{end}"
    return Layout(
        blocks={"transformer_blocks": ("joint_blocks", _layers(plain, joined))},
        outside=outside,
        tensors={"pos_embed.pos_embed": "pos_embed"},
        swapped=("norm_out.linear",),
        # The last block reads its text and changes it no more, so its modulation is one of two parts, not of six.
        swapped_in_last=("norm1_context.linear",),
    )


def _z_image() -> Layout:
    names = ["attention_norm1", "attention_norm2", "ffn_norm1", "ffn_norm2", "adaLN_modulation.0"]
    names += [f"feed_forward.w{i}" for i in (1, 2, 3)]
    plain = {name: name for name in names} | {
        "attention.to_out.0": "attention.out",
        "attention.norm_q": "attention.q_norm",
        "attention.norm_k": "attention.k_norm",
    }
    block = _layers(plain, {"attention.qkv": ("attention.to_q", "attention.to_k", "attention.to_v")})
    outside = {
        "all_x_embedder.2-1": "x_embedder",
        "all_final_layer.2-1.linear": "final_layer.linear",
        "all_final_layer.2-1.adaLN_modulation.1": "final_layer.adaLN_modulation.1",
    }
    outside |= {name: name for name in ("cap_embedder.0", "cap_embedder.1", "t_embedder.mlp.0", "t_embedder.mlp.2")}
    return Layout(
        blocks={name: (name, block) for name in ("layers", "noise_refiner", "context_refiner")},
        outside=outside,
        tensors={name: name for name in ("x_pad_token", "cap_pad_token")},
    )


def _lumina2() -> Layout:
    plain = {
        "attn.to_out.0": "attention.out",
        "attn.norm_q": "attention.q_norm",
        "attn.norm_k": "attention.k_norm",
        "norm2": "attention_norm2",
        "ffn_norm1": "ffn_norm1",
        "ffn_norm2": "ffn_norm2",
    }
    plain |= {f"feed_forward.linear_{i}": f"feed_forward.w{i}" for i in (1, 2, 3)}
    joined = {"attention.qkv": _QKV}
    modulated = {"norm1.linear": "adaLN_modulation.1", "norm1.norm": "attention_norm1"}
    block = _layers(plain | modulated, joined)
    return Layout(
        blocks={
            "layers": ("layers", block),
            "noise_refiner": ("noise_refiner", block),
            # It sees the text alone and no time.
            "context_refiner": ("context_refiner", _layers(plain | {"norm1": "attention_norm1"}, joined)),
        },
        outside={
            "x_embedder": "x_embedder",
            "time_caption_embed.timestep_embedder.linear_1": "t_embedder.mlp.0",
            "time_caption_embed.timestep_embedder.linear_2": "t_embedder.mlp.2",
            "time_caption_embed.caption_embedder.0": "cap_embedder.0",
            "time_caption_embed.caption_embedder.1": "cap_embedder.1",
            "norm_out.linear_1": "final_layer.adaLN_modulation.1",
            "norm_out.linear_2": "final_layer.linear",
        },
    )


LAYOUTS: dict[str, Layout] = {
    "qwen_image": Layout(same=True),
    "flux": _flux(),
    "z_image": _z_image(),
    "stable_diffusion_3": _stable_diffusion_3(),
    "lumina2": _lumina2(),
}
"""By family; the families that ComfyUI itself loads."""

_BLOCK = re.compile(r"([a-z_]+)\.(\d+)\.(.+)")


def check_family(family: str) -> None:
    """Raises ValueError for a family that ComfyUI itself cannot load, with what to do instead."""
    if family not in LAYOUTS:
        raise ValueError(
            f"ComfyUI itself loads {', '.join(LAYOUTS)}, not {family}: it has no network of that kind, so no file "
            "could be loaded without a custom node; use --format diffusers"
        )


def place(family: str, name: str, *, last_block: int | None = None) -> Place:
    """Where the tensor ``name`` of the diffusers transformer (``<layer>.weight`` or ``.bias``) lies.

    Args:
        family: a key of ``LAYOUTS``.
        last_block: index of the last of ``transformer_blocks``, which SD3 lays out in another way.

    Raises:
        ValueError: the layout has no place for it.
    """
    layout = LAYOUTS[family]
    if layout.same:
        return Place(name)
    if name in layout.tensors:
        return Place(layout.tensors[name])
    layer, _, end = name.rpartition(".")
    block = _BLOCK.fullmatch(layer)
    if block is not None and block[1] in layout.blocks:
        native, layers = layout.blocks[block[1]]
        if block[3] in layers and end in ("weight", "bias"):
            inner, part, parts = layers[block[3]]
            # FLUX calls the weight of a norm over queries or keys its scale.
            end = "scale" if inner.endswith(("query_norm", "key_norm")) else end
            swapped = block[3] in layout.swapped_in_last and int(block[2]) == last_block
            return Place(f"{native}.{block[2]}.{inner}.{end}", part, parts, swapped)
    if layer in layout.outside and end in ("weight", "bias"):
        return Place(f"{layout.outside[layer]}.{end}", swapped=layer in layout.swapped)
    raise ValueError(
        f"{name} has no place in the layout of {family} that ComfyUI loads; is the model of another kind than the "
        "family's published ones, or has diffusers renamed it?"
    )


def swap_halves(value: Tensor) -> Tensor:
    """``value`` with the two halves of its rows in each other's place."""
    return torch.cat(value.chunk(2)[::-1])


def native_state(family: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict of a diffusers transformer in the native layout, bit for bit, in the same dtypes.

    What keeps its rows is the tensor that came, not a copy.

    Raises:
        ValueError: a tensor without a place, or a joined matrix of which a part is missing.
    """
    blocks = [int(m[1]) for name in state if (m := re.match(r"transformer_blocks\.(\d+)\.", name))]
    found: dict[str, dict[int, Tensor]] = {}
    expected: dict[str, int] = {}
    for name, value in state.items():
        where = place(family, name, last_block=max(blocks, default=None))
        found.setdefault(where.name, {})[where.part] = swap_halves(value) if where.swapped else value
        expected[where.name] = where.parts
    native = {}
    for name, parts in found.items():
        if len(parts) != expected[name]:
            raise ValueError(f"{name} joins {expected[name]} matrices of the diffusers model, and {len(parts)} came")
        native[name] = parts[0] if len(parts) == 1 else torch.cat([parts[i] for i in range(len(parts))])
    return native
