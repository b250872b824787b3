"""Lumina Image 2.0 (2.6B): the unmodified ``diffusers.Lumina2Transformer2DModel``.

==========  ============================================================================================
time        ``timestep`` = 1 - t, not scaled, embedded as it comes (fp32)
sign        data minus noise: negated here, as the pipeline does
latents     ``[B, C, h, w]``, patched inside; VAE latents ``(z - shift_factor) scaling_factor``
text        Gemma 2, hidden state before the last; positive prompts behind a system prompt, negative ones bare
mask        ``encoder_attention_mask`` [B, L] bool, required; kept tokens come first
guidance    classifier-free, 4.0 away from "", rescaled to the norm of the conditional velocity along the last axis of
            the latents (each row of pixels in each channel)
==========  ============================================================================================
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from apex_fast.backbones.base import Backbone, TeacherGuidance
from apex_fast.backbones.latents import decode_kl, encode_kl
from apex_fast.condition import Condition


class Lumina2Backbone(Backbone):
    """A Lumina Image 2.0 transformer; see :class:`~apex_fast.backbones.base.Backbone`.

    Raises:
        ValueError: other output than input channels, or more tokens than the network has positions for.
    """

    family = "lumina2"
    transformer_class = "Lumina2Transformer2DModel"
    pipeline_class = "Lumina2Pipeline"
    text_parts = ("tokenizer", "text_encoder")
    has_mask = True
    default_sequence_length = 256
    teacher_guidance = TeacherGuidance(scale=4.0, negative_prompt="")
    text_projection = "time_caption_embed.caption_embedder"
    lora_targets = (
        "to_q",
        "to_k",
        "to_v",
        "to_out.0",
        "feed_forward.linear_1",
        "feed_forward.linear_2",
        "feed_forward.linear_3",
        "norm1.linear",
        "norm_out.linear_1",
        "timestep_embedder.linear_1",
        "timestep_embedder.linear_2",
    )

    def __init__(self, transformer: nn.Module, **options: Any) -> None:
        super().__init__(transformer, **options)
        config = transformer.config
        if (config.out_channels or config.in_channels) != config.in_channels:
            raise ValueError(
                f"Lumina2Backbone: expected as many output as input channels, got {config.in_channels} and "
                f"{config.out_channels}; only text-to-image weights are supported"
            )
        # The image takes the position after the last token.
        longest = config.axes_lens[0] - 1
        if self.max_sequence_length > longest:
            raise ValueError(
                f"Lumina2Backbone: this network has positions for {longest} tokens (config.axes_lens), got "
                f"max_sequence_length={self.max_sequence_length}"
            )

    @property
    def text_width(self) -> int:
        return self.transformer.config.cap_feat_dim

    def velocity(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        patch, limits = self.patch, self.transformer.config.axes_lens[1:]
        if any(edge // patch > limit for edge, limit in zip(x_t.shape[-2:], limits, strict=True)):
            raise ValueError(
                f"Lumina2Backbone: latents of at most {patch * limits[0]} x {patch * limits[1]} have positions "
                f"(config.axes_lens), got {list(x_t.shape)}"
            )
        embeds, mask = condition.prompt_embeds, condition.prompt_embeds_mask
        mask = embeds.new_ones(embeds.shape[:2], dtype=torch.bool) if mask is None else mask.ne(0)
        # The network takes the first tokens, as many as the mask keeps, whichever those are.
        if bool((~mask[:, 0]).any() | (mask[:, 1:] & ~mask[:, :-1]).any()):
            raise ValueError(
                "Lumina2Backbone: the mask must keep at least one token of every prompt and keep the first ones; pad "
                "prompts at their end"
            )
        return -self.transformer(
            hidden_states=x_t,
            timestep=1 - t,
            encoder_hidden_states=embeds.to(x_t.dtype),
            encoder_attention_mask=mask,
            return_dict=False,
        )[0]

    def encode_text(self, prompts: list[str], *, negative: bool) -> Condition:
        settings = {
            "device": self.components["text_encoder"].device,
            "max_sequence_length": self.max_sequence_length,
        }
        if negative:
            # Only as the negative half of a guided call does the pipeline leave its system prompt out.
            positive = [""] * len(prompts)
            _, _, embeds, mask = self.pipeline().encode_prompt(positive, True, prompts, **settings)
        else:
            embeds, mask, _, _ = self.pipeline().encode_prompt(prompts, False, **settings)
        return Condition(embeds, mask)

    def encode_latents(self, images: Tensor, generator: torch.Generator | None) -> Tensor:
        return encode_kl(self.components["vae"], images, generator)

    def decode_latents(self, latents: Tensor) -> Tensor:
        return decode_kl(self.components["vae"], latents)

    def guide(self, v_condition: Tensor, v_negative: Tensor, scale: float) -> Tensor:
        """Guidance rescaled to the norm of ``v_condition`` along the last axis; all ``[B, C, h, w]``."""
        combined = v_negative + scale * (v_condition - v_negative)
        return combined * (v_condition.norm(dim=-1, keepdim=True) / combined.norm(dim=-1, keepdim=True))

    def linear_guidance_scale(self, scale: float) -> float | None:
        """1 for no guidance; None for any other: rescaling the norm is not linear."""
        return 1.0 if scale == 1 else None
