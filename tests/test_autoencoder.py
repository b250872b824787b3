"""Small VAEs of the project's own, and models made new that work in their latents."""

from __future__ import annotations

import json

import pytest
import torch

from apex_fast.backbones.base import Backbone
from apex_fast.backbones.loading import backbone_class, own_vae
from apex_fast.data import shapes
from apex_fast.evaluation.benchmark import evaluate, open_benchmark
from apex_fast.evaluation.cost import weight_bytes
from apex_fast.generate import generate
from apex_fast.training import autoencoder
from apex_fast.training.config import load_config
from apex_fast.training.loop import Trainer

TEXT = {"d_model": 32, "d_kv": 8, "num_heads": 2, "num_layers": 1, "d_ff": 32}
TRANSFORMERS = {
    "sana": {
        "in_channels": 4,
        "out_channels": 4,
        "sample_size": 8,
        "patch_size": 2,
        "interpolation_scale": 1,
        "num_layers": 1,
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "num_cross_attention_heads": 2,
        "cross_attention_head_dim": 16,
        "cross_attention_dim": 32,
        "caption_channels": 32,
    },
    "qwen_image": {
        "in_channels": 16,
        "out_channels": 4,
        "patch_size": 2,
        "num_layers": 1,
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "axes_dims_rope": [4, 6, 6],
        "joint_attention_dim": 32,
    },
}


@pytest.fixture(scope="module")
def pictures() -> torch.Tensor:
    return shapes.Shapes.load(count=96, resolution=32).images


@pytest.fixture(scope="module", params=autoencoder.FAMILIES)
def fitted(request, pictures, tmp_path_factory):
    """(family, folder, errors) of a VAE after a few steps."""
    family = request.param
    state = torch.get_rng_state()
    monkey = pytest.MonkeyPatch()
    made = autoencoder.new_vae
    monkey.setattr(autoencoder, "new_vae", lambda name: made(name, latent_channels=4))
    vae, errors = autoencoder.train_vae(pictures, family, steps=12, batch_size=8)
    monkey.undo()
    assert torch.equal(torch.get_rng_state(), state)
    folder = tmp_path_factory.mktemp(family)
    vae.save_pretrained(folder, safe_serialization=True)
    return family, folder, errors


def test_it_learns_and_its_latents_have_a_spread_of_one(fitted, pictures) -> None:
    family, folder, errors = fitted
    untrained = autoencoder.new_vae(family, latent_channels=4)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        latents, _ = autoencoder._encode(untrained, pictures, generator)
        before = (autoencoder._decode(untrained, latents) - pictures).abs().mean().item()
    assert errors["absolute_error"] < 0.9 * before
    backbone = _model(family, folder)
    latents = backbone.encode_images(pictures, generator)
    assert latents.shape == (96, 4, 8, 8)
    assert latents.std().item() == pytest.approx(1.0, abs=0.05)
    assert (backbone.decode(latents) - pictures).abs().mean().item() == pytest.approx(errors["absolute_error"], rel=0.2)


def _model(family: str, vae) -> Backbone:
    size = 8 if family == "qwen_image" else None
    return backbone_class(family).from_config(
        TRANSFORMERS[family], TEXT, shapes.all_prompts(), max_sequence_length=12, sample_size=size, vae=vae
    )


def test_a_model_with_a_vae_is_saved_and_read_back(fitted, pictures, tmp_path) -> None:
    family, folder, _ = fitted
    backbone = _model(family, folder)
    assert backbone.vae_scale_factor == autoencoder.DOWN
    assert backbone.latent_shape(32, 32) == backbone.sample_shape == (4, 8, 8)
    backbone.save_pretrained(tmp_path / "model")
    index = json.loads((tmp_path / "model" / "model_index.json").read_text())
    assert index["vae"] == ["diffusers", type(backbone.components["vae"]).__name__]
    again = Backbone.from_pretrained(str(tmp_path / "model"))
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(again.decode(latents), backbone.decode(latents))
    assert not any(p.requires_grad for p in again.components["vae"].parameters())
    # The VAE is no part of what is trained.
    assert {name.split(".")[0] for name, _ in again.named_parameters()} == {"transformer", "text"}


def test_a_run_trains_in_the_latents_and_draws_pictures(fitted, tmp_path) -> None:
    family, folder, _ = fitted
    config = {
        "output_dir": str(tmp_path / "run"),
        "dataset_name": "shapes",
        "max_train_samples": 64,
        "loss": "flow_matching",
        "device": "cpu",
        "model": {
            "family": family,
            "transformer": TRANSFORMERS[family],
            "text_encoder": TEXT,
            "max_sequence_length": 12,
            "sample_size": 8 if family == "qwen_image" else None,
            "vae": str(folder),
        },
        "train_text_encoder": True,
        "max_train_steps": 2,
        "train_batch_size": 4,
    }
    (tmp_path / "run.yaml").write_text(json.dumps(config))  # JSON is YAML
    trainer = Trainer(load_config(tmp_path / "run.yaml"))
    trainer.run()
    assert trainer.sample_shape == (4, 8, 8)
    assert trainer.draw(["a red circle"], num_inference_steps=2).shape == (1, 3, 32, 32)
    images, _ = generate(tmp_path / "run", ["a red circle"], images_per_prompt=2)
    assert images.shape == (2, 3, 32, 32)


def test_what_cannot_be_is_refused(fitted, pictures, tmp_path) -> None:
    family, folder, _ = fitted
    other = next(name for name in autoencoder.FAMILIES if name != family)
    with pytest.raises(ValueError, match="decodes with"):
        own_vae(folder, backbone_class(other))
    with pytest.raises(FileNotFoundError, match=r"apex_fast\.training\.autoencoder"):
        own_vae(tmp_path, backbone_class(family))
    with pytest.raises(ValueError, match="family must be one of"):
        autoencoder.new_vae("flux")
    with pytest.raises(ValueError, match="multiples of 4"):
        autoencoder.train_vae(pictures[:, :, :30], family, steps=1)
    for few in ({"steps": 0}, {"steps": 1, "batch_size": 0}):
        with pytest.raises(ValueError, match="at least one step"):
            autoencoder.train_vae(pictures, family, **few)
    with pytest.raises(SystemExit):
        autoencoder.main(["--resolution", "48", "--output", str(tmp_path / "vae")])


@pytest.mark.parametrize("steps", [1, 2, 10, 11])
def test_few_steps_have_a_schedule_too(pictures, steps) -> None:
    """A tenth of them, over which the rate rises, is none or one."""
    vae, errors = autoencoder.train_vae(pictures[:8], "sana", steps=steps, batch_size=2)
    assert 0 < errors["absolute_error"] < 10
    assert all(p.isfinite().all() for p in vae.parameters())


def test_latents_are_decoded_before_they_are_scored(fitted) -> None:
    family, folder, _ = fitted
    backbone = _model(family, folder).eval()
    benchmark = open_benchmark("shapes", 32)
    scores = evaluate(backbone, benchmark, samples=60, diversity_seeds=2)
    # An untrained network: noise, decoded. In the latents' own shape nothing could be scored at all.
    assert scores["frechet"] > 10 and scores["accuracy"] < 0.2
    assert scores["seconds_per_picture"] > scores["network_seconds"]
    modules = (backbone.transformer, backbone.text, backbone.components["vae"])
    assert scores["peak_bytes"] > sum(weight_bytes(module) for module in modules)
    with pytest.raises(ValueError, match=r"\[3, 64, 64\]"):
        evaluate(backbone, open_benchmark("shapes", 64), samples=60)
