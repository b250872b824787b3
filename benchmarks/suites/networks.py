"""The networks of the suites ``step`` and ``sampler``: real diffusers transformers with random weights."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from apex_fast.backbones.base import Backbone
from apex_fast.backbones.loading import backbone_class
from apex_fast.condition import Condition
from apex_fast.extras import require
from apex_fast.planning.published import PUBLISHED


@dataclass(frozen=True)
class Settings:
    """What to run. ``only``: networks whose name contains this."""

    dtype: str
    device: str = "cpu"
    quick: bool = False
    only: str = ""

    @property
    def rounds(self) -> int:
        return 2 if self.quick else 5


@dataclass(frozen=True)
class Network:
    """A transformer and the batches that it is measured with.

    Attributes:
        family: key of ``apex_fast.backbones.loading.FAMILIES``.
        transformer: arguments of its class.
        edges: latent pixels of the edge of a sample, smallest first.
        batch, tokens: samples, and text tokens of each.
        modes: what is trained, see :mod:`benchmarks.suites.step`.
        rank: of the LoRA.
        checkpointing: whether blocks are recomputed in backward.
    """

    name: str
    family: str
    transformer: dict[str, Any]
    edges: tuple[int, ...]
    batch: int
    tokens: int
    modes: tuple[str, ...] = ("full", "full, frozen copy", "lora")
    rank: int = 16
    checkpointing: bool = False
    options: dict[str, Any] = field(default_factory=dict)

    def build(self, dtype: torch.dtype, device: str) -> Backbone:
        """The backbone in ``dtype``, all of it trained, the same weights at every call."""
        family = backbone_class(self.family)
        cls = getattr(require("diffusers", extra="train"), family.transformer_class)
        before = torch.get_default_dtype()
        # In place and in its dtype, since a 20B model in fp32 on the host would not fit.
        torch.set_default_dtype(dtype)
        try:
            with torch.random.fork_rng(), torch.device(device):
                torch.manual_seed(0)
                transformer = cls(**self.transformer)
                for parameter in transformer.parameters():
                    # Layers that start at zero would make a velocity that does not depend on anything before them.
                    if not parameter.is_meta and not parameter.detach().any():
                        nn.init.normal_(parameter, std=0.02)
        finally:
            torch.set_default_dtype(before)
        backbone = family(transformer, max_sequence_length=self.tokens, **self.options)
        unused = backbone.parameters_without_gradient()
        for name, parameter in transformer.named_parameters():
            parameter.requires_grad_(name not in unused)
        if self.checkpointing:
            backbone.enable_gradient_checkpointing()
        return backbone

    def batch_of(self, backbone: Backbone, edge: int, device: str) -> tuple[Tensor, Condition]:
        """Latents ``[B, C, edge, edge]`` in fp32 and a condition, a quarter of whose tokens are padding."""
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(self.batch, backbone.latent_channels, edge, edge, generator=generator).to(device)
        embeds = torch.randn(self.batch, self.tokens, backbone.text_width, generator=generator)
        mask = (torch.arange(self.tokens) < self.tokens - self.tokens // 4).repeat(self.batch, 1)
        return x, Condition(embeds.to(device, backbone.transformer.dtype), mask.to(device))


def _sana(layers: int, heads: int, head: int, text: int) -> dict[str, Any]:
    width = heads * head
    return {
        "num_layers": layers,
        "num_attention_heads": heads,
        "attention_head_dim": head,
        "num_cross_attention_heads": heads,
        "cross_attention_head_dim": head,
        "cross_attention_dim": width,
        "caption_channels": text,
        "sample_size": 32,
    }


def _qwen_image(layers: int, heads: int, text: int, rope: tuple[int, int, int]) -> dict[str, Any]:
    return {
        "num_layers": layers,
        "attention_head_dim": sum(rope),
        "num_attention_heads": heads,
        "joint_attention_dim": text,
        "axes_dims_rope": rope,
    }


def networks(device: str, quick: bool) -> tuple[Network, ...]:
    """What is measured: small networks on a CPU, SANA 0.6B and the 20B configuration of Qwen-Image on a GPU."""
    if quick:
        rope = (4, 6, 6)
        return (
            Network("sana tiny", "sana", _sana(2, 2, 16, 32), edges=(4, 8), batch=2, tokens=8, rank=4),
            Network(
                "qwen_image tiny", "qwen_image", _qwen_image(2, 2, 32, rope), edges=(8,), batch=2, tokens=8, rank=4
            ),
        )
    if device == "cpu":
        rope = (16, 24, 24)
        return (
            Network("sana small", "sana", _sana(4, 8, 32, 256), edges=(8, 16, 32), batch=2, tokens=32),
            Network(
                "qwen_image small", "qwen_image", _qwen_image(4, 4, 256, rope), edges=(16, 32, 64), batch=2, tokens=32
            ),
        )
    sana = PUBLISHED["Efficient-Large-Model/Sana_600M_1024px_diffusers"]
    qwen = PUBLISHED["Qwen/Qwen-Image"]
    return (
        Network("sana 0.6B", "sana", dict(sana.transformer), edges=(16, 32), batch=8, tokens=300, rank=64),
        Network(
            "qwen_image 20B",
            "qwen_image",
            dict(qwen.transformer),
            edges=(64, 128),
            batch=1,
            tokens=512,
            modes=("lora",),
            rank=64,
            checkpointing=True,
        ),
    )
