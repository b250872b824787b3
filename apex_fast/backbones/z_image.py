"""Z-Image (6B): the unmodified ``diffusers.ZImageTransformer2DModel``.

==========  ============================================================================================
time        ``t`` = 1 - t (the network multiplies by ``config.t_scale``, 1000), embedded as it comes (fp32)
sign        data minus noise: negated here, as the pipeline does
latents     a list with one ``[C, 1, h, w]`` per sample, patched inside; VAE latents
            ``(z - shift_factor) scaling_factor``
text        Qwen3, hidden state before the last, behind its chat template; a list of ``[L_i, D]`` of true lengths
mask        none needed: only the kept tokens go in (the network pads each prompt to a multiple of 32 with a token
            of its own, which belongs to the network and not to the condition)
guidance    classifier-free, ``v + s (v - v_negative)`` with s = 5.0 away from "": on the line that other
            families parametrise with 1 + s; s = 0 is none
==========  ============================================================================================
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from apex_fast.backbones.base import Backbone, TeacherGuidance
from apex_fast.backbones.latents import decode_kl, encode_kl
from apex_fast.condition import Condition
from apex_fast.shift import SitedCondition

PROMPT_MULTIPLE = 32
"""Tokens that the network pads each prompt to a multiple of."""


class ZImageBackbone(Backbone):
    """A Z-Image transformer; see :class:`~apex_fast.backbones.base.Backbone`.

    Raises:
        ValueError: weights of the variant that takes image inputs (SigLIP), or without patches of 2 x 2.
    """

    family = "z_image"
    transformer_class = "ZImageTransformer2DModel"
    pipeline_class = "ZImagePipeline"
    text_parts = ("tokenizer", "text_encoder")
    has_mask = True
    default_sequence_length = 512
    teacher_guidance = TeacherGuidance(scale=5.0, negative_prompt="")
    text_projection = "cap_embedder"
    lora_targets = (
        "to_q",
        "to_k",
        "to_v",
        "to_out.0",
        "feed_forward.w1",
        "feed_forward.w2",
        "feed_forward.w3",
        "t_embedder.mlp.0",
        "t_embedder.mlp.2",
    )

    def __init__(self, transformer: nn.Module, **options: Any) -> None:
        super().__init__(transformer, **options)
        config = transformer.config
        if getattr(config, "siglip_feat_dim", None) is not None:
            raise ValueError(
                "ZImageBackbone: config.siglip_feat_dim marks the variant that takes images too (Omni); only "
                "text-to-image weights are supported"
            )
        if (2, 1) not in zip(config.all_patch_size, config.all_f_patch_size, strict=True):
            raise ValueError(
                "ZImageBackbone: expected weights for patches of 2 x 2 in one frame, got "
                f"all_patch_size={tuple(config.all_patch_size)} and all_f_patch_size={tuple(config.all_f_patch_size)}"
            )

        # By their full names: in the blocks the linear layer is the first of the modulation, in the final layer it is
        # the second, and the first has no weights.
        modulation = [
            name
            for name, module in transformer.named_modules()
            if isinstance(module, nn.Linear) and "adaLN_modulation" in name
        ]
        self.lora_targets = (*type(self).lora_targets, *modulation)

    @property
    def text_width(self) -> int:
        return self.transformer.config.cap_feat_dim

    @property
    def patch(self) -> int:
        """2, the patches that the pipeline uses."""
        return 2

    @property
    def sample_shape(self) -> tuple[int, int, int]:
        """(C, h, w) of 1024 x 1024 pixels, the pipeline's default: the network states no size. Of a model with a text
        encoder of its own, what it was made for."""
        edge = self.sample_size or 128
        return self.latent_channels, edge, edge

    def velocity(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        limits = self.transformer.config.axes_lens[1:]
        if any(edge // 2 > limit for edge, limit in zip(x_t.shape[-2:], limits, strict=True)):
            raise ValueError(
                f"ZImageBackbone: latents of at most {2 * limits[0]} x {2 * limits[1]} have positions "
                f"(config.axes_lens), got {list(x_t.shape)}"
            )
        embeds, mask = condition.prompt_embeds.to(x_t.dtype), condition.prompt_embeds_mask
        if mask is None:
            prompts = list(embeds.unbind())
        else:
            mask = mask.ne(0)
            lengths = mask.sum(1).tolist()
            if 0 in lengths:
                raise ValueError(
                    f"ZImageBackbone: every prompt needs a token that its mask keeps, got {lengths} kept tokens; the "
                    'empty prompt is encode([""])'
                )
            prompts = list(embeds[mask].split(lengths))
        outputs = self.transformer(
            list(x_t.unsqueeze(2).unbind()), 1 - t, prompts, patch_size=2, f_patch_size=1, return_dict=False
        )[0]
        return -torch.stack(list(outputs)).squeeze(2)

    def projected_tokens(self, shifted: SitedCondition, projected: Tensor) -> Tensor | None:
        """The prompts come one behind the other ``[N, D]``, each padded; what is shifted of the padding, the network
        overwrites with its own token."""
        if shifted.tokens is None:
            return None
        mask = shifted.condition.prompt_embeds_mask
        kept = torch.ones_like(shifted.tokens) if mask is None else mask.ne(0)
        parts = [
            nn.functional.pad(tokens[keep], (0, -int(keep.sum()) % PROMPT_MULTIPLE))
            for tokens, keep in zip(shifted.tokens, kept, strict=True)
        ]
        return torch.cat(parts)

    def encode_text(self, prompts: list[str], *, negative: bool) -> Condition:
        embeds, _ = self.pipeline().encode_prompt(
            prompts,
            device=self.components["text_encoder"].device,
            do_classifier_free_guidance=False,
            max_sequence_length=self.max_sequence_length,
        )
        mask = [torch.ones(len(e), dtype=torch.bool, device=e.device) for e in embeds]
        return Condition(pad_sequence(embeds, batch_first=True), pad_sequence(mask, batch_first=True))

    def encode_latents(self, images: Tensor, generator: torch.Generator | None) -> Tensor:
        return encode_kl(self.components["vae"], images, generator)

    def decode_latents(self, latents: Tensor) -> Tensor:
        return decode_kl(self.components["vae"], latents)

    def guide(self, v_condition: Tensor, v_negative: Tensor, scale: float) -> Tensor:
        """``v + s (v - v_negative)``; all ``[B, C, h, w]``."""
        return v_condition + scale * (v_condition - v_negative)

    def linear_guidance_scale(self, scale: float) -> float | None:
        """1 + s."""
        return 1.0 + scale
