"""Stable Diffusion 3 and 3.5 (medium, large): the unmodified ``diffusers.SD3Transformer2DModel``.

==========  ============================================================================================
time        ``timestep`` = 1000 t, embedded as it comes (fp32)
sign        noise minus data, the library's own
latents     ``[B, C, h, w]``, patched inside; VAE latents ``(z - shift_factor) scaling_factor``
text        two CLIP encoders side by side (77 tokens), then T5 (``max_sequence_length`` tokens, zeros where it is
            not loaded), and both pooled CLIP embeddings
mask        none: the network sees padding, so the number of tokens is fixed
guidance    classifier-free, 7.0 away from ""
==========  ============================================================================================

Of the last block's text stream only keys and values reach the image, so its queries have no gradient. 3.5 medium has
a second attention over the image alone in its first blocks; it is the same class and needs nothing else.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from apex_fast.backbones.base import Backbone, TeacherGuidance
from apex_fast.backbones.latents import decode_kl, encode_kl
from apex_fast.condition import Condition


class StableDiffusion3Backbone(Backbone):
    """A Stable Diffusion 3 transformer; see :class:`~apex_fast.backbones.base.Backbone`.

    The third text encoder (T5) may be missing, as the pipeline allows: its tokens are zeros then.

    Raises:
        ValueError: weights with other output than input channels.
    """

    family = "stable_diffusion_3"
    transformer_class = "SD3Transformer2DModel"
    pipeline_class = "StableDiffusion3Pipeline"
    text_parts = ("tokenizer", "text_encoder", "tokenizer_2", "text_encoder_2", "tokenizer_3", "text_encoder_3")
    has_mask = False
    default_sequence_length = 256
    teacher_guidance = TeacherGuidance(scale=7.0, negative_prompt="")
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
        "norm1.linear",
        "norm1_context.linear",
        "norm_out.linear",
        "timestep_embedder.linear_1",
        "timestep_embedder.linear_2",
    )

    def __init__(self, transformer: nn.Module, **options: Any) -> None:
        super().__init__(transformer, **options)
        config = transformer.config
        if config.out_channels != config.in_channels:
            raise ValueError(
                f"StableDiffusion3Backbone: expected as many output as input channels, got {config.in_channels} and "
                f"{config.out_channels}; only text-to-image weights are supported"
            )
        if self.components.get("text_encoder") is not None and self.components.get("text_encoder_3") is None:
            self.text_parts = ("tokenizer", "text_encoder", "tokenizer_2", "text_encoder_2")
        tokenizer = self.components.get("tokenizer")
        # 77 is CLIP's length. Kept here because the tokenizers may be freed.
        self._clip_tokens = 77 if tokenizer is None else tokenizer.model_max_length

    @property
    def text_width(self) -> int:
        return self.transformer.config.joint_attention_dim

    @property
    def token_count(self) -> int:
        """CLIP's tokens and ``max_sequence_length`` of T5."""
        return self.max_sequence_length + (self._clip_tokens if self.text is None else 0)

    def velocity(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        if condition.pooled_prompt_embeds is None:
            raise ValueError(
                "StableDiffusion3Backbone: the condition needs pooled_prompt_embeds, as "
                "StableDiffusion3Backbone.encode makes them"
            )
        return self.transformer(
            hidden_states=x_t,
            encoder_hidden_states=condition.prompt_embeds.to(x_t.dtype),
            pooled_projections=condition.pooled_prompt_embeds.to(x_t.dtype),
            timestep=1000 * t,
            return_dict=False,
        )[0]

    def encode_text(self, prompts: list[str], *, negative: bool) -> Condition:
        pipeline = self.pipeline()
        embeds, _, pooled, _ = pipeline.encode_prompt(
            prompts,
            None,
            None,
            device=self.components["text_encoder"].device,
            do_classifier_free_guidance=False,
            max_sequence_length=self.max_sequence_length,
        )
        masks = []
        for name, length in (("tokenizer", self._clip_tokens), ("tokenizer_3", self.max_sequence_length)):
            if name in self.text_parts:
                tokens = self.components[name](
                    prompts, padding="max_length", max_length=length, truncation=True, return_tensors="pt"
                )
                masks.append(tokens.attention_mask.bool())
            else:
                masks.append(torch.zeros(len(prompts), length, dtype=torch.bool))
        return Condition(embeds, torch.cat(masks, dim=1).to(embeds.device), pooled)

    def encode_latents(self, images: Tensor, generator: torch.Generator | None) -> Tensor:
        return encode_kl(self.components["vae"], images, generator)

    def decode_latents(self, latents: Tensor) -> Tensor:
        return decode_kl(self.components["vae"], latents)

    def parameters_without_gradient(self) -> set[str]:
        last = f"transformer_blocks.{len(self.transformer.transformer_blocks) - 1}."
        ends = tuple(last + part for part in ("attn.add_q_proj.", "attn.norm_added_q."))
        return {name for name, _ in self.transformer.named_parameters() if name.startswith(ends)}
