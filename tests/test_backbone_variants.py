"""Tiny pipelines, and what is refused: weights of other kinds than text to image, other model classes, sizes without
positions.
"""

from __future__ import annotations

import time

import pytest
import torch
from backbone_cases import LENGTHS, PROMPTS, assert_close, draw

import apex_fast as af
from apex_fast.backbones.base import Backbone
from apex_fast.backbones.loading import backbone_class
from apex_fast.backbones.tiny import TINY_FAMILIES, save_tiny_pipeline, tiny_pipeline
from apex_fast.condition import Condition

pytestmark = pytest.mark.usefixtures("one_thread")


def wrap(family: str, *, options: dict | None = None, **transformer) -> Backbone:
    """A backbone over a tiny pipeline in memory."""
    pipeline = tiny_pipeline(family, **transformer)
    components = {name: part for name, part in pipeline.components.items() if name != "transformer"}
    return backbone_class(family)(pipeline.transformer, components=components, **(options or {}))


# ---- tiny pipelines


@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_tiny_pipelines_are_real_quick_and_depend_on_their_seed_alone(family):
    tiny_pipeline(family)
    state = torch.random.get_rng_state()
    start = time.process_time()
    pipeline = tiny_pipeline(family)
    assert time.process_time() - start < 1.0
    assert torch.equal(state, torch.random.get_rng_state())
    torch.rand(3)
    again, other = tiny_pipeline(family), tiny_pipeline(family, seed=1)
    assert type(pipeline).__module__.startswith("diffusers.")
    for name in ("transformer", "text_encoder", "vae"):
        first, second, third = (getattr(p, name).state_dict() for p in (pipeline, again, other))
        assert all(torch.equal(v, second[k]) for k, v in first.items()), name
        assert any(not torch.equal(v, third[k]) for k, v in first.items()), name
    kinds = [kind for kind in pipeline.transformer._no_split_modules if "Block" in kind]
    blocks = [type(m).__name__ for m in pipeline.transformer.modules()]
    assert kinds and all(blocks.count(kind) >= 2 for kind in kinds), "two blocks of each kind"
    assert not any(part.training for part in (pipeline.transformer, pipeline.text_encoder, pipeline.vae))


@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_the_velocity_of_a_tiny_network_depends_on_all_of_its_inputs(family):
    backbone = wrap(family, options={"max_sequence_length": LENGTHS[family]})
    x, t, condition = draw(backbone), torch.tensor([0.9, 0.3]), backbone.encode(PROMPTS)
    with torch.no_grad():
        velocity = backbone(x, t, condition)
        others = {
            "x": backbone(x + 0.3 * draw(backbone, seed=1), t, condition),
            "t": backbone(x, t - 0.2, condition),
            "text": backbone(x, t, backbone.encode(["the sea in the morning", "hello"])),
        }
    assert 0.1 < velocity.std() < 10
    for name, other in others.items():
        assert (other - velocity).norm() > 0.01 * velocity.norm(), name


@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_tiny_pipelines_come_in_other_sizes(family):
    options = {"max_sequence_length": LENGTHS[family]}
    backbone = wrap(family, options=options, layers=1, heads=3, text_width=48, latent_channels=8)
    condition = backbone.encode(PROMPTS)
    assert backbone.latent_shape(32, 32)[0] == 8 and condition.prompt_embeds.shape[2] == backbone.text_width == 48
    images = torch.zeros(2, 3, 32, 32)
    latents = backbone.encode_images(images, torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert backbone(latents, torch.tensor([0.9, 0.3]), condition).isfinite().all()
    assert backbone.decode(latents).shape == images.shape


def test_unknown_families_are_refused():
    with pytest.raises(ValueError, match="family must be one of sana, qwen_image, .* got 'sdxl'"):
        tiny_pipeline("sdxl")


def test_saved_tiny_pipelines_hold_safetensors_only(tmp_path):
    folder = save_tiny_pipeline("z_image", tmp_path / "model")
    names = [path.name for path in folder.rglob("*") if path.is_file()]
    assert "model_index.json" in names and any(name.endswith(".safetensors") for name in names)
    assert not any(name.endswith((".bin", ".pt", ".pth", ".ckpt", ".pkl")) for name in names)


# ---- weights that are refused


@pytest.mark.parametrize(
    ("family", "config", "message"),
    [
        ("qwen_image", {"zero_cond_t": True}, "zero_cond_t marks an editing model"),
        ("qwen_image", {"use_additional_t_cond": True}, "use_additional_t_cond marks a layered model"),
        ("qwen_image", {"use_layer3d_rope": True}, "use_layer3d_rope marks a layered model"),
        ("qwen_image", {"guidance_embeds": True}, "guidance_embeds is true, and diffusers' own forward cannot run"),
        ("flux", {"in_channels": 32, "out_channels": 16}, "32 input and 16 output channels: .*Fill, Canny, Depth"),
        ("z_image", {"siglip_feat_dim": 16}, "siglip_feat_dim marks the variant that takes images"),
        ("z_image", {"all_patch_size": (4,)}, "expected weights for patches of 2 x 2"),
        ("stable_diffusion_3", {"in_channels": 8}, "as many output as input channels, got 8 and 4"),
        ("lumina2", {"out_channels": 8}, "as many output as input channels, got 4 and 8"),
        ("sana", {"guidance_embeds": True}, "pass embedded_guidance="),
    ],
)
def test_variants_that_are_not_text_to_image_are_refused(family, config, message):
    with pytest.raises(ValueError, match=message):
        wrap(family, **config)


def test_the_wrong_transformer_is_refused():
    transformer = tiny_pipeline("flux").transformer
    with pytest.raises(ValueError, match="expected a diffusers SD3Transformer2DModel, got FluxTransformer2DModel"):
        backbone_class("stable_diffusion_3")(transformer)


def test_pixart_is_refused_with_the_reason_and_the_list(tmp_path):
    from diffusers import PixArtTransformer2DModel

    PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=1,
        cross_attention_dim=16,
        sample_size=8,
        caption_channels=16,
    ).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="predicts noise on a variance-preserving schedule") as error:
        Backbone.from_pretrained(tmp_path)
    for family in TINY_FAMILIES:
        assert family in str(error.value)


# ---- variants that work


def test_flux_without_embedded_guidance_has_none():
    """schnell"""
    backbone = wrap("flux", options={"max_sequence_length": 16}, guidance_embeds=False)
    assert backbone.embedded_guidance is None and backbone.teacher_guidance.embedded is None
    with torch.no_grad():
        assert backbone(draw(backbone), torch.tensor([1.0, 0.5]), backbone.encode(PROMPTS)).isfinite().all()


@pytest.mark.parametrize("config", [{"dual_attention_layers": ()}, {"qk_norm": None, "dual_attention_layers": ()}])
def test_stable_diffusion_3_without_dual_attention_or_norms(config):
    """3.0, and 3.5 large."""
    backbone = wrap("stable_diffusion_3", options={"max_sequence_length": 16}, **config)
    x = draw(backbone).requires_grad_()
    backbone(x, torch.tensor([1.0, 0.5]), backbone.encode(PROMPTS)).square().mean().backward()
    unused = {n for n, p in backbone.transformer.named_parameters() if p.grad is None or not p.grad.any()}
    assert unused == backbone.parameters_without_gradient() != set()


def test_stable_diffusion_3_without_t5_uses_zeros_that_the_shift_leaves_alone():
    pipeline = tiny_pipeline("stable_diffusion_3")
    left_out = ("transformer", "text_encoder_3", "tokenizer_3")
    components = {name: part for name, part in pipeline.components.items() if name not in left_out}
    backbone = backbone_class("stable_diffusion_3")(pipeline.transformer, components=components, max_sequence_length=16)
    condition = backbone.encode(PROMPTS)
    assert condition.prompt_embeds.shape[1] == backbone.token_count == 77 + 16
    assert not condition.prompt_embeds[:, 77:].any() and not condition.prompt_embeds_mask[:, 77:].any()
    shifted = af.ConditionShift()(condition)
    assert not shifted.prompt_embeds[:, 77:].any() and not torch.equal(shifted.prompt_embeds, condition.prompt_embeds)


@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("family", ["qwen_image", "stable_diffusion_3"])
def test_parameters_without_gradient_are_the_last_blocks(family, layers):
    backbone = wrap(family, layers=layers, options={"max_sequence_length": 16})
    names = backbone.parameters_without_gradient()
    assert names and all(name.startswith(f"transformer_blocks.{layers - 1}.") for name in names)


def test_a_mask_that_keeps_everything_is_none_for_qwen(monkeypatch):
    """As in the pipeline, whose attention is faster without one; both give the same velocity."""
    backbone = wrap("qwen_image", options={"max_sequence_length": 24})
    x, t, condition = draw(backbone, 1), torch.tensor([0.8]), backbone.encode(PROMPTS[:1])
    masks = []
    forward = backbone.transformer.forward
    monkeypatch.setattr(
        backbone.transformer, "forward", lambda **kw: masks.append(kw["encoder_hidden_states_mask"]) or forward(**kw)
    )
    with torch.no_grad():
        plain = backbone(x, t, condition)
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
        masked = backbone(x, t, condition)
    assert masks[0] is None and masks[1].all()
    assert_close(masked, plain)


# ---- more than there are positions for


def test_lengths_and_sizes_without_positions_are_refused():
    with pytest.raises(ValueError, match="positions for 299 tokens .* got max_sequence_length=300"):
        wrap("lumina2", options={"max_sequence_length": 300})
    for family in ("lumina2", "z_image"):
        backbone = wrap(family, options={"max_sequence_length": 48}, axes_lens=[300, 4, 8])
        condition, t = backbone.encode(PROMPTS), torch.tensor([0.9, 0.3])
        with torch.no_grad():
            backbone(torch.randn(2, 4, 8, 16), t, condition)
        with pytest.raises(ValueError, match="latents of at most 8 x 16 have positions"):
            backbone(torch.randn(2, 4, 16, 8), t, condition)
    backbone = wrap("stable_diffusion_3", options={"max_sequence_length": 16}, pos_embed_max_size=8)
    with pytest.raises(ValueError, match="pos_embed_max_size"):
        backbone(torch.randn(2, 4, 18, 8), t, backbone.encode(PROMPTS))


def test_masks_that_the_network_would_misread_are_refused():
    x, t = torch.randn(2, 4, 4, 4), torch.tensor([0.9, 0.3])
    embeds, hole = torch.randn(2, 3, 32), torch.tensor([[True, False, True], [True, True, True]])
    empty = torch.tensor([[False, False, False], [True, True, True]])
    lumina = wrap("lumina2", options={"max_sequence_length": 48})
    for mask in (hole, empty):
        with pytest.raises(ValueError, match="keep at least one token of every prompt and keep the first ones"):
            lumina(x, t, Condition(embeds, mask))
    z_image = wrap("z_image")
    with pytest.raises(ValueError, match="every prompt needs a token that its mask keeps"):
        z_image(x, t, Condition(embeds, empty))
    # Z-Image gets the kept tokens themselves, so a hole is no trouble.
    closed = torch.where(torch.tensor([[[True], [False], [False]], [[False]] * 3]), embeds[:, [0, 2, 2]], embeds)
    closed[0, 1] = embeds[0, 2]
    with torch.no_grad():
        shorter = Condition(closed, torch.tensor([[True, True, False], [True, True, True]]))
        assert torch.equal(z_image(x, t, Condition(embeds, hole)), z_image(x, t, shorter))
