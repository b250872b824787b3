"""New models of several families in pixel space, with a text encoder of their own: made, saved, planned, trained."""

from __future__ import annotations

import dataclasses
import io
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import TRANSFORMER

pytest.importorskip("diffusers", reason="diffusers is not installed: pip install 'apex_fast[train]'")
pytest.importorskip("transformers", reason="transformers is not installed: pip install 'apex_fast[train]'")

from apex_fast.backbones.base import Backbone  # noqa: E402
from apex_fast.backbones.loading import backbone_class  # noqa: E402
from apex_fast.backbones.sana import SanaBackbone  # noqa: E402
from apex_fast.generate import generate  # noqa: E402
from apex_fast.planning.blueprint import blueprint, blueprint_of  # noqa: E402
from apex_fast.planning.planner import plan  # noqa: E402
from apex_fast.shift import ConditionShift  # noqa: E402
from apex_fast.training.config import ModelSettings, TrainConfig, load_config  # noqa: E402
from apex_fast.training.loop import Trainer  # noqa: E402
from apex_fast.training.models import load_generator  # noqa: E402
from apex_fast.training.settings import SettingsError  # noqa: E402

EXAMPLE = Path(__file__).parent.parent / "examples" / "digits_qwen_start.yaml"
TEXT_ENCODER = {"d_model": 16, "d_kv": 8, "num_heads": 2, "num_layers": 1, "d_ff": 16, "dropout_rate": 0.0}
PROMPTS = ["a handwritten seven", "the digit 7", "the number three, written by hand"]

SANA = {key: value for key, value in TRANSFORMER.items() if key not in ("mlp_ratio", "dropout")}
QWEN_IMAGE = {
    "in_channels": 4,
    "out_channels": 1,
    "patch_size": 2,
    "num_layers": 2,
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "axes_dims_rope": [4, 6, 6],
    "joint_attention_dim": 16,
}
Z_IMAGE = {
    "in_channels": 1,
    "dim": 32,
    "n_layers": 1,
    "n_refiner_layers": 1,
    "n_heads": 2,
    "n_kv_heads": 2,
    "cap_feat_dim": 16,
    "axes_dims": [4, 6, 6],
    "axes_lens": [1024, 64, 64],
}
LUMINA2 = {
    "sample_size": 8,
    "patch_size": 2,
    "in_channels": 1,
    "hidden_size": 32,
    "num_layers": 1,
    "num_refiner_layers": 1,
    "num_attention_heads": 2,
    "num_kv_heads": 2,
    "multiple_of": 16,
    "axes_dim_rope": (4, 6, 6),
    "axes_lens": (64, 64, 64),
    "cap_feat_dim": 16,
}
# The transformer, and the size where its config states none.
FAMILIES = {"sana": (SANA, None), "qwen_image": (QWEN_IMAGE, 8), "z_image": (Z_IMAGE, 8), "lumina2": (LUMINA2, None)}


def build(family: str, seed: int = 0) -> Backbone:
    transformer, size = FAMILIES[family]
    return backbone_class(family).from_config(
        transformer, TEXT_ENCODER, PROMPTS, vocab_size=300, sample_size=size, seed=seed
    )


def draw(batch: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(batch, 1, 8, 8, generator=generator), torch.rand(batch, generator=generator)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_new_model_is_saved_and_loaded_whole(family, tmp_path):
    backbone = build(family)
    assert backbone.sample_shape == (1, 8, 8) and backbone.vae_scale_factor == 1
    backbone.save_pretrained(tmp_path)
    loaded = Backbone.from_pretrained(tmp_path)
    assert type(loaded) is type(backbone) and loaded.sample_shape == (1, 8, 8)
    x, t = draw(3)
    with torch.no_grad():
        expected = backbone(x, t, backbone.encode(PROMPTS))
        assert expected.shape == x.shape
        assert torch.equal(loaded(x, t, loaded.encode(PROMPTS)), expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_weights_depend_on_the_seed_alone(family):
    state = torch.random.get_rng_state()
    first = build(family).state_dict()
    assert torch.equal(state, torch.random.get_rng_state())
    torch.rand(3)
    again, other = build(family).state_dict(), build(family, seed=1).state_dict()
    assert all(torch.equal(value, again[name]) for name, value in first.items())
    assert any(not torch.equal(value, other[name]) for name, value in first.items())


def test_a_text_encoder_of_its_own_gets_gradients_where_they_are_asked_for():
    backbone = build("qwen_image")
    backbone.text.text_encoder.requires_grad_(True)
    x, t = draw(3)
    backbone(x, t, backbone.encode(PROMPTS, requires_grad=True)).square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in backbone.text.parameters())


@pytest.mark.parametrize(
    ("scale", "bias", "seen"), [(1.0, 0.0, False), (0.5, 0.0, False), (1.0, 0.5, True), (-1.0, 0.0, True)]
)
def test_qwen_image_normalises_its_text_so_that_a_positive_scale_is_not_seen(scale, bias, seen):
    """What the start of this family is there to show; the norm's epsilon leaves a trace."""
    backbone = build("qwen_image").double()
    condition = backbone.encode(PROMPTS)
    condition = type(condition)(condition.prompt_embeds.double(), condition.prompt_embeds_mask)
    x, t = draw(3)
    with torch.no_grad():
        real = backbone(x.double(), t, condition)
        shift = ConditionShift(scale=scale, bias=bias).double()
        change = (backbone(x.double(), t, shift(condition)) - real).norm() / real.norm()
    assert change > 1e-3 if seen else change < 1e-5


# ---- settings that must fit


def test_a_family_that_needs_several_text_encoders_is_refused():
    with pytest.raises(ValueError, match="FluxBackbone.from_config: this family reads several text encoders"):
        backbone_class("flux").from_config({}, TEXT_ENCODER, PROMPTS)


def test_the_size_is_stated_once():
    with pytest.raises(ValueError, match="states no size of its samples; say which one"):
        backbone_class("qwen_image").from_config(QWEN_IMAGE, TEXT_ENCODER, PROMPTS, vocab_size=300)
    with pytest.raises(ValueError, match=r"sample_size=16, but the transformer's config states its own \(8\)"):
        SanaBackbone.from_config(SANA, TEXT_ENCODER, PROMPTS, vocab_size=300, sample_size=16)


# ---- runs


def tiny(tmp_path: Path, **changes: Any) -> TrainConfig:
    """The example, at a size that takes a second."""
    config = load_config(EXAMPLE)
    sizes = {"num_layers": 1, "num_attention_heads": 1, "joint_attention_dim": 16}
    model = dataclasses.replace(
        config.model, transformer={**config.model.transformer, **sizes}, text_encoder=TEXT_ENCODER
    )
    steps = {"max_train_steps": 2, "train_batch_size": 4, "lr_warmup_steps": 1, "logging_steps": 1}
    base = {"model": model, "output_dir": str(tmp_path / "start"), "device": "cpu", **steps}
    return dataclasses.replace(config, **{**base, **changes})


def test_the_qwen_image_example_is_trained_tuned_and_generated_from(tmp_path):
    pytest.importorskip("sklearn")
    assert Trainer(tiny(tmp_path), stream=io.StringIO()).run().finished
    network, _ = load_generator(tmp_path / "start")
    assert network.family == "qwen_image" and network.sample_shape == (1, 8, 8)
    for rank in (None, 2):
        folder = tmp_path / f"tuned-{rank}"
        objective = dataclasses.replace(load_config(EXAMPLE).objective, warmup_steps=1, ramp_steps=1)
        tuned = tiny(
            tmp_path,
            loss="correction",
            train_text_encoder=False,
            proportion_empty_prompts=0.0,
            model=ModelSettings(),
            pretrained_model_name_or_path=str(tmp_path / "start"),
            output_dir=str(folder),
            rank=rank,
            objective=objective,
        )
        assert Trainer(tuned, stream=io.StringIO()).run().finished
        images, _ = generate(folder, ["a handwritten three"], images_per_prompt=2)
        assert images.shape == (2, 1, 8, 8) and images.isfinite().all()


def test_what_does_not_fit_is_said_of_the_section(tmp_path):
    pytest.importorskip("sklearn")
    config = tiny(tmp_path)
    for change, message in (
        ({"sample_size": None}, "model: .*states no size"),
        ({"transformer": {"no_such_argument": 1}}, "model: .*no_such_argument"),
        ({"sample_size": 16}, r"gives samples of the shape \[1, 8, 8\], and this qwen_image model takes \[1, 16, 16\]"),
    ):
        with pytest.raises(SettingsError, match=message):
            Trainer(dataclasses.replace(config, model=dataclasses.replace(config.model, **change)))
    with pytest.raises(SettingsError, match="model.family"):
        load_config(EXAMPLE, ["--model.family", "flux"])


def test_a_new_model_and_one_from_a_folder_are_planned_at_their_size(tmp_path):
    config = tiny(tmp_path)
    new = blueprint_of(config)
    assert (new.family, new.latent_edge, new.tokens) == ("qwen_image", 8, 16)
    build("qwen_image").save_pretrained(tmp_path / "model")
    saved = blueprint(str(tmp_path / "model"))
    assert saved.latent_edge == 8 and saved.own_text and saved.backbone().sample_shape == (1, 8, 8)
    assert plan(config, compare=False).model.latent_edge == 8
