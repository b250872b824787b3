"""SANA (0.6B, 1.6B, 1.5): the unmodified ``diffusers.SanaTransformer2DModel``.

==========  ============================================================================================
time        ``timestep`` = 1000 t ``config.timestep_scale``, embedded as it comes (fp32)
sign        noise minus data, the library's own
latents     ``[B, C, h, w]``, not packed; DC-AE latents times ``config.scaling_factor``, no mean, no sampling
text        Gemma 2, last hidden state; positive prompts behind an instruction of which only the first token and the
            last ``max_sequence_length - 1`` tokens of the whole are kept; negative prompts without it
mask        ``encoder_attention_mask`` [B, L], 1 = keep
guidance    classifier-free, 4.5 away from ""
==========  ============================================================================================

Text is read by cross-attention after the network's own projection (an MLP) and RMS norm, so a condition shift on the
text embedding is seen.
"""

from __future__ import annotations

import inspect

import torch
from torch import Tensor

from apex_fast.backbones.base import Backbone, TeacherGuidance
from apex_fast.condition import Condition


class SanaBackbone(Backbone):
    """A SANA transformer; see :class:`~apex_fast.backbones.base.Backbone`."""

    family = "sana"
    transformer_class = "SanaTransformer2DModel"
    pipeline_class = "SanaPipeline"
    text_parts = ("tokenizer", "text_encoder")
    has_mask = True
    default_sequence_length = 300
    teacher_guidance = TeacherGuidance(scale=4.5, negative_prompt="")
    text_projection = "caption_norm"
    # The feed-forward of SANA is convolutional: its two 1x1 convolutions mix the channels. One modulation serves all
    # blocks.
    lora_targets = (
        "to_q",
        "to_k",
        "to_v",
        "to_out.0",
        "ff.conv_inverted",
        "ff.conv_point",
        "timestep_embedder.linear_1",
        "timestep_embedder.linear_2",
        "time_embed.linear",
    )

    @property
    def text_width(self) -> int:
        return self.transformer.config.caption_channels

    def velocity(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        config, dtype, mask = self.transformer.config, self.transformer.dtype, condition.prompt_embeds_mask
        guidance = None
        if self.embedded_guidance is not None:
            guidance = torch.full_like(t, self.embedded_guidance * config.guidance_embeds_scale)
        velocity = self.transformer(
            x_t,
            encoder_hidden_states=condition.prompt_embeds.to(dtype),
            encoder_attention_mask=None if mask is None else mask.ne(0),
            timestep=t * (1000.0 * config.timestep_scale),
            guidance=guidance,
            return_dict=False,
        )[0]
        # Weights that predict a variance too have it in the second half of the channels.
        return velocity.chunk(2, dim=1)[0] if velocity.shape[1] == 2 * x_t.shape[1] else velocity

    def encode_text(self, prompts: list[str], *, negative: bool) -> Condition:
        pipeline = self.pipeline()
        default = inspect.signature(type(pipeline).__call__).parameters["complex_human_instruction"].default
        embeds, mask, _, _ = pipeline.encode_prompt(
            prompts,
            do_classifier_free_guidance=False,
            device=self.components["text_encoder"].device,
            max_sequence_length=self.max_sequence_length,
            complex_human_instruction=None if negative else default,
        )
        return Condition(embeds, mask)

    def encode_latents(self, images: Tensor, generator: torch.Generator | None) -> Tensor:
        vae = self.components["vae"]
        return vae.encode(images).latent * vae.config.scaling_factor

    def decode_latents(self, latents: Tensor) -> Tensor:
        vae = self.components["vae"]
        return vae.decode(latents / vae.config.scaling_factor, return_dict=False)[0]
