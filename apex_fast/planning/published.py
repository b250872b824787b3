"""Models that can be planned by their hub id alone, without a download."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

_GEMMA_2_2B = 2_614_341_888
_QWEN_2_5_VL_7B = 8_292_166_656
_QWEN_3_4B = 4_022_468_096
_T5_XXL = 4_762_310_656
_CLIP_L = 123_060_480
_CLIP_G = 694_659_840
_DC_AE = 312_250_275
_KL_VAE = 83_819_683
_QWEN_VAE = 126_892_531

# Structures of the VAEs, of the sizes above. The values that latents are scaled by are the classes' own: they change no
# byte.
_DC_AE_CONFIG = {
    "_class_name": "AutoencoderDC",
    "encoder_block_types": ("ResBlock",) * 3 + ("EfficientViTBlock",) * 3,
    "decoder_block_types": ("ResBlock",) * 3 + ("EfficientViTBlock",) * 3,
    "downsample_block_type": "Conv",
    "upsample_block_type": "interpolate",
}
_KL_VAE_CONFIG = {
    "_class_name": "AutoencoderKL",
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "latent_channels": 16,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
    "shift_factor": 0.0,
}
_QWEN_VAE_CONFIG = {"_class_name": "AutoencoderKLQwenImage"}
_VAES = {"sana": _DC_AE_CONFIG, "qwen_image": _QWEN_VAE_CONFIG}


@dataclass(frozen=True)
class Published:
    """What planning needs to know of a published model.

    Attributes:
        family: key of ``apex_fast.backbones.loading.FAMILIES``.
        transformer: arguments of the transformer's class that differ from its defaults.
        parameters: of the transformer as its publishers name the model, in 1e9 (to the last digit that they give).
        vae_scale_factor: image pixels per latent pixel.
        resolution: pixels of the edge of a square image that the model is made for.
        text_encoder_parameters, vae_parameters: of the parts that are not trained; approximate.
        unverified: what of this could not be compared with the published files.
        guided: whether its users sample with classifier-free guidance (two passes a step). False for models that are
            distilled to go without, whatever the pipeline's own default is; in a config that is guidance_scale 1, or 0
            in the convention of Z-Image.
    """

    family: str
    transformer: Mapping[str, Any]
    parameters: float
    vae_scale_factor: int
    resolution: int
    text_encoder_parameters: int
    vae_parameters: int
    unverified: tuple[str, ...] = field(default=("sizes of text encoders and VAE",))
    guided: bool = True

    @property
    def vae(self) -> Mapping[str, Any]:
        """Configuration of the VAE, its class under ``_class_name``."""
        return _VAES.get(self.family, _KL_VAE_CONFIG)


_SANA_0_6B = {
    "num_layers": 28,
    "num_attention_heads": 36,
    "num_cross_attention_heads": 16,
    "cross_attention_head_dim": 72,
    "cross_attention_dim": 1152,
}
_SD_3_5 = {"qk_norm": "rms_norm"}
_SIZES = "sizes of text encoders and VAE"

# Where the arguments are empty the class's defaults are the published configuration. The others were compared with
# copies of the published config.json in public repositories; `unverified` says what was not.
PUBLISHED: dict[str, Published] = {
    "Efficient-Large-Model/Sana_600M_512px_diffusers": Published(
        "sana",
        {**_SANA_0_6B, "sample_size": 16},
        0.6,
        32,
        512,
        _GEMMA_2_2B,
        _DC_AE,
        ("sample_size (from the name; the 1024 px configuration was seen)", _SIZES),
    ),
    "Efficient-Large-Model/Sana_600M_1024px_diffusers": Published(
        "sana", _SANA_0_6B, 0.6, 32, 1024, _GEMMA_2_2B, _DC_AE
    ),
    "Efficient-Large-Model/Sana_1600M_1024px_diffusers": Published("sana", {}, 1.6, 32, 1024, _GEMMA_2_2B, _DC_AE),
    "Qwen/Qwen-Image": Published("qwen_image", {}, 20, 8, 1024, _QWEN_2_5_VL_7B, _QWEN_VAE),
    "black-forest-labs/FLUX.1-dev": Published(
        "flux", {"guidance_embeds": True}, 12, 8, 1024, _T5_XXL + _CLIP_L, _KL_VAE, guided=False
    ),
    "stabilityai/stable-diffusion-3.5-medium": Published(
        "stable_diffusion_3",
        {
            **_SD_3_5,
            "num_layers": 24,
            "num_attention_heads": 24,
            "caption_projection_dim": 1536,
            "pos_embed_max_size": 384,
            "dual_attention_layers": tuple(range(13)),
        },
        2.2,
        8,
        1024,
        _T5_XXL + _CLIP_L + _CLIP_G,
        _KL_VAE,
    ),
    "stabilityai/stable-diffusion-3.5-large": Published(
        "stable_diffusion_3",
        {
            **_SD_3_5,
            "num_layers": 38,
            "num_attention_heads": 38,
            "caption_projection_dim": 2432,
            "pos_embed_max_size": 192,
        },
        8.1,
        8,
        1024,
        _T5_XXL + _CLIP_L + _CLIP_G,
        _KL_VAE,
    ),
    "Tongyi-MAI/Z-Image-Turbo": Published(
        "z_image", {"axes_lens": (1536, 512, 512)}, 6, 8, 1024, _QWEN_3_4B, _KL_VAE, guided=False
    ),
    "Tongyi-MAI/Z-Image": Published(
        "z_image",
        {"axes_lens": (1536, 512, 512)},
        6,
        8,
        1024,
        _QWEN_3_4B,
        _KL_VAE,
        ("that it has the configuration of Z-Image-Turbo", _SIZES),
    ),
    "Alpha-VLLM/Lumina-Image-2.0": Published("lumina2", {"cap_feat_dim": 2304}, 2.6, 8, 1024, _GEMMA_2_2B, _KL_VAE),
}
