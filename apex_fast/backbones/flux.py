"""FLUX.1 (dev, schnell, Krea; 12B): the unmodified ``diffusers.FluxTransformer2DModel``.

==========  ============================================================================================
time        ``timestep`` = t (forward multiplies by 1000 after casting it to the dtype of the weights, so in bf16
            0.999 would be 1: it gets the exact time back)
sign        noise minus data, the library's own
latents     2 x 2 packed to ``[B, h w / 4, 4 C]`` with row and column of each token in ``img_ids``; VAE latents
            ``(z - shift_factor) scaling_factor``
text        T5, always ``max_sequence_length`` tokens, with ``txt_ids`` zero, and CLIP's pooled embedding
mask        none: the network sees padding, so the number of tokens is fixed
guidance    an input of the network where ``config.guidance_embeds`` (dev: 3.5), none where not (schnell); no
            classifier-free guidance
==========  ============================================================================================
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from apex_fast.backbones.base import Backbone, TeacherGuidance
from apex_fast.backbones.latents import decode_kl, encode_kl, pack, unpack
from apex_fast.condition import Condition


class FluxBackbone(Backbone):
    """A FLUX.1 transformer; see :class:`~apex_fast.backbones.base.Backbone`.

    Raises:
        ValueError: weights that take image inputs beside the latents (Fill, Canny, Depth).
    """

    family = "flux"
    transformer_class = "FluxTransformer2DModel"
    pipeline_class = "FluxPipeline"
    text_parts = ("tokenizer", "text_encoder", "tokenizer_2", "text_encoder_2")
    has_mask = False
    default_sequence_length = 512
    teacher_guidance = TeacherGuidance(embedded=3.5)
    text_projection = "context_embedder"
    lora_targets = (
        "to_q",
        "to_k",
        "to_v",
        "to_out.0",
        "add_q_proj",
        "add_k_proj",
        "add_v_proj",
        "to_add_out",
        "ff.net.0.proj",
        "ff.net.2",
        "ff_context.net.0.proj",
        "ff_context.net.2",
        "proj_mlp",
        "norm1.linear",
        "norm1_context.linear",
        "norm.linear",
        "norm_out.linear",
        "timestep_embedder.linear_1",
        "timestep_embedder.linear_2",
    )

    def __init__(self, transformer: nn.Module, **options: Any) -> None:
        super().__init__(transformer, **options)
        config = transformer.config
        if (config.out_channels or config.in_channels) != config.in_channels:
            raise ValueError(
                f"FluxBackbone: {config.in_channels} input and {config.out_channels} output channels: these weights "
                "take images beside the latents (Fill, Canny, Depth); only text-to-image weights are supported"
            )
        if not config.guidance_embeds:
            self.teacher_guidance = TeacherGuidance()
        # By whole names: the network's last layer is called proj_out as well.
        blocks = range(len(transformer.single_transformer_blocks))
        self.lora_targets = (*type(self).lora_targets, *(f"single_transformer_blocks.{i}.proj_out" for i in blocks))

    @property
    def text_width(self) -> int:
        return self.transformer.config.joint_attention_dim

    @property
    def latent_channels(self) -> int:
        return self.transformer.config.in_channels // 4

    @property
    def patch(self) -> int:
        """2: latents are packed ahead of the network, whose own ``patch_size`` is 1."""
        return 2

    @property
    def sample_shape(self) -> tuple[int, int, int]:
        """(C, h, w) of 1024 x 1024 pixels, the pipeline's default: the network states no size."""
        return self.latent_channels, 128, 128

    def velocity(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        if condition.pooled_prompt_embeds is None:
            raise ValueError(
                "FluxBackbone: the condition needs pooled_prompt_embeds, as FluxBackbone.encode makes them"
            )
        batch, _, height, width = x_t.shape
        # fp32 also for bf16 weights: bf16 has no whole numbers above 256 in steps of one.
        rows, columns = (torch.arange(edge // 2, device=x_t.device, dtype=torch.float32) for edge in (height, width))
        grid = torch.meshgrid(rows, columns, indexing="ij")
        guidance = None
        if self.embedded_guidance is not None:
            guidance = torch.full((batch,), self.embedded_guidance, device=x_t.device, dtype=torch.float32)
        with self.exact_time(self.transformer.time_text_embed, 1000 * t):
            tokens = self.transformer(
                hidden_states=pack(x_t),
                encoder_hidden_states=condition.prompt_embeds.to(x_t.dtype),
                pooled_projections=condition.pooled_prompt_embeds.to(x_t.dtype),
                timestep=t,
                guidance=guidance,
                txt_ids=torch.zeros(condition.prompt_embeds.shape[1], 3, device=x_t.device),
                img_ids=torch.stack([torch.zeros_like(grid[0]), *grid], dim=-1).reshape(-1, 3),
                return_dict=False,
            )[0]
        return unpack(tokens, height, width)

    def encode_text(self, prompts: list[str], *, negative: bool) -> Condition:
        embeds, pooled, _ = self.pipeline().encode_prompt(
            prompts, device=self.components["text_encoder"].device, max_sequence_length=self.max_sequence_length
        )
        tokens = self.components["tokenizer_2"](
            prompts, padding="max_length", max_length=self.max_sequence_length, truncation=True, return_tensors="pt"
        )
        return Condition(embeds, tokens.attention_mask.bool().to(embeds.device), pooled)

    def encode_latents(self, images: Tensor, generator: torch.Generator | None) -> Tensor:
        return encode_kl(self.components["vae"], images, generator)

    def decode_latents(self, latents: Tensor) -> Tensor:
        return decode_kl(self.components["vae"], latents)
