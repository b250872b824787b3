"""Qwen-Image (20B): the unmodified ``diffusers.QwenImageTransformer2DModel``.

==========  ============================================================================================
time        ``timestep`` = t (the embedding multiplies by 1000); forward casts it to the dtype of the weights,
            so in bf16 0.999 would be 1: it gets the exact time back
sign        noise minus data, the library's own
latents     2 x 2 packed to ``[B, h w / 4, 4 C]`` with ``img_shapes`` [[(1, h / 2, w / 2)]] per sample; VAE latents
            ``(z - latents_mean) / latents_std`` of one frame
text        Qwen2.5-VL, last hidden state behind a template whose first 34 tokens are dropped; as long as the
            longest prompt
mask        ``encoder_hidden_states_mask`` [B, L], 1 = keep; None where all are kept, as in the pipeline
guidance    true guidance at 4.0, only if there is a negative prompt; the result is rescaled per packed token to
            the norm of the conditional velocity
==========  ============================================================================================

Two streams that attend to each other; of the last block's text stream only keys and values reach the image, so the
rest of it has no gradient.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from apex_fast.backbones.base import Backbone, TeacherGuidance
from apex_fast.backbones.latents import pack, unpack
from apex_fast.condition import Condition


class QwenImageBackbone(Backbone):
    """A Qwen-Image transformer; see :class:`~apex_fast.backbones.base.Backbone`.

    Raises:
        ValueError: weights of the editing and layered variants, or of one that embeds a guidance scale.
    """

    family = "qwen_image"
    transformer_class = "QwenImageTransformer2DModel"
    pipeline_class = "QwenImagePipeline"
    text_parts = ("tokenizer", "text_encoder")
    has_mask = True
    default_sequence_length = 512
    teacher_guidance = TeacherGuidance(scale=4.0, negative_prompt=None)
    text_projection = "txt_in"
    lora_targets = (
        "to_q",
        "to_k",
        "to_v",
        "to_out.0",
        "add_q_proj",
        "add_k_proj",
        "add_v_proj",
        "to_add_out",
        "img_mlp.net.0.proj",
        "img_mlp.net.2",
        "txt_mlp.net.0.proj",
        "txt_mlp.net.2",
        "img_mod.1",
        "txt_mod.1",
        "norm_out.linear",
        "timestep_embedder.linear_1",
        "timestep_embedder.linear_2",
    )

    def __init__(self, transformer: nn.Module, **options: Any) -> None:
        if type(transformer).__name__ == self.transformer_class and transformer.config.guidance_embeds:
            raise ValueError(
                "QwenImageBackbone: config.guidance_embeds is true, and diffusers' own forward cannot run such weights"
            )
        super().__init__(transformer, **options)
        variants = {
            "zero_cond_t": "an editing model, which is conditioned on images too",
            "use_additional_t_cond": "a layered model, which makes stacks of layers",
            "use_layer3d_rope": "a layered model, which makes stacks of layers",
        }
        for key, what in variants.items():
            if getattr(transformer.config, key, False):
                raise ValueError(
                    f"QwenImageBackbone: config.{key} marks {what}; only text-to-image weights are supported"
                )

    @property
    def text_width(self) -> int:
        return self.transformer.config.joint_attention_dim

    @property
    def latent_channels(self) -> int:
        return self.transformer.config.in_channels // 4

    @property
    def sample_shape(self) -> tuple[int, int, int]:
        """(C, h, w) of 1024 x 1024 pixels, the pipeline's default: the network states no size. Of a model with a text
        encoder of its own, what it was made for."""
        edge = self.sample_size or 128
        return self.latent_channels, edge, edge

    def velocity(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        height, width = x_t.shape[-2:]
        mask = condition.prompt_embeds_mask
        # As the pipeline: attention without a mask is the faster one. It reads one number back from the device, which
        # a graph that is being compiled cannot.
        if mask is not None and not torch.compiler.is_compiling() and bool(mask.all()):
            mask = None
        with self.exact_time(self.transformer.time_text_embed, t):
            tokens = self.transformer(
                hidden_states=pack(x_t),
                encoder_hidden_states=condition.prompt_embeds.to(x_t.dtype),
                encoder_hidden_states_mask=None if mask is None else mask.ne(0),
                timestep=t,
                img_shapes=[[(1, height // 2, width // 2)]] * x_t.shape[0],
                return_dict=False,
            )[0]
        return unpack(tokens, height, width)

    def encode_text(self, prompts: list[str], *, negative: bool) -> Condition:
        embeds, mask = self.pipeline().encode_prompt(
            prompts, device=self.components["text_encoder"].device, max_sequence_length=self.max_sequence_length
        )
        # None stands for "all"; a mask says the same and can be joined with others'.
        return Condition(embeds, embeds.new_ones(embeds.shape[:2], dtype=torch.bool) if mask is None else mask)

    def encode_latents(self, images: Tensor, generator: torch.Generator | None) -> Tensor:
        vae = self.components["vae"]
        sample = vae.encode(images.unsqueeze(2)).latent_dist.sample(generator)
        mean, std = self._latent_statistics(sample)
        return ((sample - mean) / std).squeeze(2)

    def decode_latents(self, latents: Tensor) -> Tensor:
        vae = self.components["vae"]
        frames = latents.unsqueeze(2)
        mean, std = self._latent_statistics(frames)
        return vae.decode(frames * std + mean, return_dict=False)[0].squeeze(2)

    def _latent_statistics(self, like: Tensor) -> tuple[Tensor, Tensor]:
        config = self.components["vae"].config
        values = (config.latents_mean, config.latents_std)
        mean, std = (torch.tensor(v, device=like.device, dtype=like.dtype).view(1, -1, 1, 1, 1) for v in values)
        return mean, std

    def guide(self, v_condition: Tensor, v_negative: Tensor, scale: float) -> Tensor:
        """Guidance rescaled per packed token to the norm of ``v_condition``; all ``[B, C, h, w]``."""
        condition, negative = pack(v_condition), pack(v_negative)
        combined = negative + scale * (condition - negative)
        norms = condition.norm(dim=-1, keepdim=True) / combined.norm(dim=-1, keepdim=True)
        return unpack(combined * norms, *v_condition.shape[-2:])

    def linear_guidance_scale(self, scale: float) -> float | None:
        """1 for no guidance; None for any other: rescaling the norm is not linear."""
        return 1.0 if scale == 1 else None

    def parameters_without_gradient(self) -> set[str]:
        last = f"transformer_blocks.{len(self.transformer.transformer_blocks) - 1}."
        parts = ("attn.add_q_proj.", "attn.norm_added_q.", "attn.to_add_out.", "txt_mlp.")
        ends = tuple(last + part for part in parts)
        return {name for name, _ in self.transformer.named_parameters() if name.startswith(ends)}
