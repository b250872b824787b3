"""Whole diffusers pipelines of random parts, small enough to run anywhere in a second and built without a download.

Every part is the real class of its family (tokenizer, text encoders, VAE, transformer, scheduler), only smaller, so
that loading, encoding, training and generation take the paths that they take with the real weights. What comes out is
noise. Used by ``--smoke`` runs, by the examples and by the tests.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from apex_fast.extras import require

_SENTENCES = (
    "a photo of a red cat on a wooden chair",
    "two small birds above the sea in the morning",
    "an old map with blue and green lines",
    "the word hello written by hand on a white wall",
)

# Width of a head is fixed because the rotary embedding of most families splits it in three fixed parts.
_HEAD = 16
_ROPE = (4, 6, 6)


def tiny_pipeline(
    family: str,
    *,
    seed: int = 0,
    layers: int = 2,
    heads: int = 2,
    text_width: int = 32,
    latent_channels: int = 4,
    **transformer: Any,
) -> Any:
    """The stock diffusers pipeline of ``family`` over random parts in fp32.

    Args:
        family: one of ``TINY_FAMILIES``.
        seed: of the weights. The global random state is left as it was.
        layers: transformer blocks of each kind (FLUX: so many of two streams and so many of one).
        heads: attention heads of 16 channels each.
        text_width: channels of the text embeddings, at least 24 and a multiple of 16.
        latent_channels: channels of the latents.
        transformer: further arguments of the transformer's class, such as ``guidance_embeds=False``.

    Images of 32 x 32 pixels suit every family.

    Raises:
        ValueError: an unknown family.
    """
    if family not in _BUILDERS:
        raise ValueError(f"tiny_pipeline: family must be one of {', '.join(TINY_FAMILIES)}, got {family!r}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        build = _BUILDERS[family]
        pipeline = build(layers=layers, heads=heads, text=text_width, latents=latent_channels, extra=transformer)
        _wake(pipeline.transformer)
    for part in pipeline.components.values():
        if isinstance(part, nn.Module):
            part.eval().requires_grad_(part is pipeline.transformer)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def save_tiny_pipeline(family: str, folder: str | Path, seed: int = 0, **sizes: Any) -> Path:
    """:func:`tiny_pipeline` written to ``folder`` with ``save_pretrained``; returns the folder."""
    tiny_pipeline(family, seed=seed, **sizes).save_pretrained(folder, safe_serialization=True)
    return Path(folder)


def _wake(transformer: nn.Module) -> None:
    # Some families start with layers at zero, and a velocity that is zero or ignores its text shows no mistake.
    for parameter in transformer.parameters():
        if not parameter.detach().any():
            nn.init.normal_(parameter, std=0.05)
    # The published initialisation of time and modulation layers is far smaller than what training makes of them.
    for name, module in transformer.named_modules():
        if isinstance(module, nn.Linear) and any(key in name for key in ("time", "t_embedder", "mod", "norm")):
            with torch.no_grad():
                module.weight.mul_(2.0)


# ---- tokenizers and text encoders


def _tokenizer(
    texts: tuple[str, ...], *, template: str = "$A", length: int = 512, special: tuple[str, ...] = ()
) -> Any:
    """Byte-level BPE trained until the words of ``texts`` and a few sentences are single tokens."""
    tokenizers = require("tokenizers", extra="train")
    transformers = require("transformers", extra="train")
    # The end token must not get the id 2: CLIP's pooling treats that one as the mark of old checkpoints.
    names = ["<pad>", "<unk>", "<bos>", "<eos>", *special]
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=1536,
        special_tokens=names,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([*_SENTENCES, *texts], trainer)
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single=template, special_tokens=[(name, tokenizer.token_to_id(name)) for name in ("<bos>", "<eos>")]
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        unk_token="<unk>",
        bos_token="<bos>",
        eos_token="<eos>",
        model_max_length=length,
    )


def _gemma(tokenizer: Any, width: int) -> nn.Module:
    transformers = require("transformers", extra="train")
    return transformers.Gemma2Model(
        transformers.Gemma2Config(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=2 * width,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=_HEAD,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )


def _t5(tokenizer: Any, width: int) -> nn.Module:
    transformers = require("transformers", extra="train")
    return transformers.T5EncoderModel(
        transformers.T5Config(
            vocab_size=len(tokenizer),
            d_model=width,
            d_ff=2 * width,
            d_kv=_HEAD,
            num_layers=2,
            num_heads=2,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )


def _clip(tokenizer: Any, width: int, *, projection: bool) -> nn.Module:
    transformers = require("transformers", extra="train")
    config = transformers.CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=2,
        projection_dim=width,
        max_position_embeddings=tokenizer.model_max_length,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return transformers.CLIPTextModelWithProjection(config) if projection else transformers.CLIPTextModel(config)


# ---- VAEs and schedulers


def _autoencoder_kl(latents: int, levels: int = 2) -> nn.Module:
    diffusers = require("diffusers", extra="train")
    return diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=(8,) * levels,
        layers_per_block=1,
        latent_channels=latents,
        norm_num_groups=4,
        use_quant_conv=False,
        use_post_quant_conv=False,
        scaling_factor=0.3611,
        shift_factor=0.1159,
    )


def _flow_scheduler(**settings: Any) -> Any:
    return require("diffusers", extra="train").FlowMatchEulerDiscreteScheduler(**settings)


# ---- families


def _sana(*, layers: int, heads: int, text: int, latents: int, extra: dict[str, Any]) -> Any:
    diffusers = require("diffusers", extra="train")
    # The instruction that the pipeline puts before a prompt is tokenized into words, as with the real tokenizer.
    instruction = inspect.signature(diffusers.SanaPipeline.__call__).parameters["complex_human_instruction"].default
    tokenizer = _tokenizer(tuple(instruction), template="<bos> $A")
    width = heads * _HEAD
    transformer = diffusers.SanaTransformer2DModel(
        **{
            "in_channels": latents,
            "out_channels": latents,
            "num_attention_heads": heads,
            "attention_head_dim": _HEAD,
            "num_layers": layers,
            "num_cross_attention_heads": heads,
            "cross_attention_head_dim": _HEAD,
            "cross_attention_dim": width,
            "caption_channels": text,
            "sample_size": 8,
            "patch_size": 1,
            **extra,
        }
    )
    blocks, channels = ("ResBlock", "ResBlock", "EfficientViTBlock"), (8, 8, 16)
    vae = diffusers.AutoencoderDC(
        in_channels=3,
        latent_channels=latents,
        attention_head_dim=8,
        encoder_block_types=blocks,
        decoder_block_types=blocks,
        encoder_block_out_channels=channels,
        decoder_block_out_channels=channels,
        encoder_layers_per_block=(1, 1, 1),
        decoder_layers_per_block=(1, 1, 1),
        encoder_qkv_multiscales=((), (), (5,)),
        decoder_qkv_multiscales=((), (), (5,)),
        scaling_factor=0.41407,
    )
    scheduler = diffusers.DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0, final_sigmas_type="zero"
    )
    return diffusers.SanaPipeline(
        tokenizer=tokenizer,
        text_encoder=_gemma(tokenizer, text),
        vae=vae,
        transformer=transformer,
        scheduler=scheduler,
    )


def _qwen_image(*, layers: int, heads: int, text: int, latents: int, extra: dict[str, Any]) -> Any:
    diffusers = require("diffusers", extra="train")
    transformers = require("transformers", extra="train")
    # The pipeline drops the first 34 tokens of its template: they must be words here as well.
    template = diffusers.QwenImagePipeline(None, None, None, None, None).prompt_template_encode
    tokenizer = _tokenizer((template,), length=2048, special=("<|im_start|>", "<|im_end|>"))
    rope = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1e6}
    encoder = transformers.Qwen2_5_VLForConditionalGeneration(
        transformers.Qwen2_5_VLConfig(
            text_config={
                "vocab_size": len(tokenizer),
                "hidden_size": text,
                "intermediate_size": 2 * text,
                "num_hidden_layers": 2,
                # The sections of its rotary embedding are for heads of this width.
                "num_attention_heads": text // _HEAD,
                "num_key_value_heads": 1,
                "rope_parameters": rope,
                "bos_token_id": tokenizer.bos_token_id,
                "eos_token_id": tokenizer.eos_token_id,
            },
            vision_config={
                "depth": 1,
                "hidden_size": 16,
                "intermediate_size": 16,
                "num_heads": 2,
                "out_hidden_size": text,
            },
        )
    )
    transformer = diffusers.QwenImageTransformer2DModel(
        **{
            "patch_size": 2,
            "in_channels": 4 * latents,
            "out_channels": latents,
            "num_layers": layers,
            "attention_head_dim": _HEAD,
            "num_attention_heads": heads,
            "joint_attention_dim": text,
            "axes_dims_rope": _ROPE,
            **extra,
        }
    )
    vae = diffusers.AutoencoderKLQwenImage(
        base_dim=8,
        z_dim=latents,
        dim_mult=[1, 2],
        num_res_blocks=1,
        temperal_downsample=[False],
        latents_mean=[0.1 * (i + 1) * (-1) ** i for i in range(latents)],
        latents_std=[1.0 + 0.25 * i for i in range(latents)],
    )
    scheduler = _flow_scheduler(
        base_shift=0.5,
        max_shift=0.9,
        max_image_seq_len=8192,
        shift=1.0,
        shift_terminal=0.02,
        use_dynamic_shifting=True,
    )
    return diffusers.QwenImagePipeline(
        scheduler=scheduler, vae=vae, text_encoder=encoder, tokenizer=tokenizer, transformer=transformer
    )


def _flux(*, layers: int, heads: int, text: int, latents: int, extra: dict[str, Any]) -> Any:
    diffusers = require("diffusers", extra="train")
    clip_tokenizer = _tokenizer((), template="<bos> $A <eos>", length=32)
    t5_tokenizer = _tokenizer((), template="$A <eos>")
    pooled = text - 8
    transformer = diffusers.FluxTransformer2DModel(
        **{
            "patch_size": 1,
            "in_channels": 4 * latents,
            "num_layers": layers,
            "num_single_layers": layers,
            "attention_head_dim": _HEAD,
            "num_attention_heads": heads,
            "joint_attention_dim": text,
            "pooled_projection_dim": pooled,
            "guidance_embeds": True,
            "axes_dims_rope": _ROPE,
            **extra,
        }
    )
    return diffusers.FluxPipeline(
        scheduler=_flow_scheduler(shift=3.0, use_dynamic_shifting=True),
        vae=_autoencoder_kl(latents),
        text_encoder=_clip(clip_tokenizer, pooled, projection=False),
        tokenizer=clip_tokenizer,
        text_encoder_2=_t5(t5_tokenizer, text),
        tokenizer_2=t5_tokenizer,
        transformer=transformer,
    )


def _z_image(*, layers: int, heads: int, text: int, latents: int, extra: dict[str, Any]) -> Any:
    diffusers = require("diffusers", extra="train")
    transformers = require("transformers", extra="train")
    tokenizer = _tokenizer(("user\n", "assistant\n"), special=("<|im_start|>", "<|im_end|>"))
    tokenizer.chat_template = (
        "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    encoder = transformers.Qwen3Model(
        transformers.Qwen3Config(
            vocab_size=len(tokenizer),
            hidden_size=text,
            intermediate_size=2 * text,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=_HEAD,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )
    transformer = diffusers.ZImageTransformer2DModel(
        **{
            "in_channels": latents,
            "dim": heads * _HEAD,
            "n_layers": layers,
            "n_refiner_layers": 1,
            "n_heads": heads,
            "n_kv_heads": heads,
            "cap_feat_dim": text,
            "axes_dims": list(_ROPE),
            "axes_lens": [1024, 64, 64],
            **extra,
        }
    )
    return diffusers.ZImagePipeline(
        scheduler=_flow_scheduler(shift=3.0),
        vae=_autoencoder_kl(latents),
        text_encoder=encoder,
        tokenizer=tokenizer,
        transformer=transformer,
    )


def _stable_diffusion_3(*, layers: int, heads: int, text: int, latents: int, extra: dict[str, Any]) -> Any:
    diffusers = require("diffusers", extra="train")
    clip_tokenizer = _tokenizer((), template="<bos> $A <eos>", length=77)
    t5_tokenizer = _tokenizer((), template="$A <eos>")
    # Two CLIP encoders side by side, together no wider than the T5 embeddings that they are padded to.
    small, large = text // 4, text // 2
    transformer = diffusers.SD3Transformer2DModel(
        **{
            "sample_size": 16,
            "patch_size": 2,
            "in_channels": latents,
            "out_channels": latents,
            "num_layers": layers,
            "attention_head_dim": _HEAD,
            "num_attention_heads": heads,
            "joint_attention_dim": text,
            "caption_projection_dim": heads * _HEAD,
            "pooled_projection_dim": small + large,
            "pos_embed_max_size": 32,
            # As in 3.5 medium: the first blocks have a second attention over the image alone.
            "dual_attention_layers": (0,),
            "qk_norm": "rms_norm",
            **extra,
        }
    )
    return diffusers.StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=_flow_scheduler(shift=3.0),
        vae=_autoencoder_kl(latents),
        text_encoder=_clip(clip_tokenizer, small, projection=True),
        tokenizer=clip_tokenizer,
        text_encoder_2=_clip(clip_tokenizer, large, projection=True),
        tokenizer_2=clip_tokenizer,
        text_encoder_3=_t5(t5_tokenizer, text),
        tokenizer_3=t5_tokenizer,
    )


def _lumina2(*, layers: int, heads: int, text: int, latents: int, extra: dict[str, Any]) -> Any:
    diffusers = require("diffusers", extra="train")
    system = diffusers.Lumina2Pipeline(None, None, None, None, None).system_prompt
    tokenizer = _tokenizer((system, " <Prompt Start> "), template="<bos> $A")
    transformer = diffusers.Lumina2Transformer2DModel(
        **{
            "sample_size": 4,
            "patch_size": 2,
            "in_channels": latents,
            "hidden_size": heads * _HEAD,
            "num_layers": layers,
            "num_refiner_layers": 1,
            "num_attention_heads": heads,
            "num_kv_heads": max(1, heads // 2),
            "multiple_of": 16,
            "axes_dim_rope": _ROPE,
            "axes_lens": (300, 64, 64),
            "cap_feat_dim": text,
            **extra,
        }
    )
    return diffusers.Lumina2Pipeline(
        transformer=transformer,
        scheduler=_flow_scheduler(shift=6.0),
        # This pipeline takes the factor 8 for granted.
        vae=_autoencoder_kl(latents, levels=4),
        text_encoder=_gemma(tokenizer, text),
        tokenizer=tokenizer,
    )


_BUILDERS: dict[str, Callable[..., Any]] = {
    "sana": _sana,
    "qwen_image": _qwen_image,
    "flux": _flux,
    "z_image": _z_image,
    "stable_diffusion_3": _stable_diffusion_3,
    "lumina2": _lumina2,
}

TINY_FAMILIES = tuple(_BUILDERS)
