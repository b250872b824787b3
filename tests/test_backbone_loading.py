"""Models by path or id: what is loaded, what is left out, what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from backbone_cases import PROMPTS, draw, load_tiny

import apex_fast as af
from apex_fast.backbones import loading
from apex_fast.backbones.loading import FAMILIES, backbone_class
from apex_fast.backbones.sana import SanaBackbone


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return lambda family: load_tiny(family, tmp_path_factory)


def test_the_table_of_families_names_what_the_families_are():
    import diffusers

    for name, family in FAMILIES.items():
        cls = backbone_class(name)
        assert (cls.family, cls.__name__) == (name, family.backbone)
        assert (cls.pipeline_class, cls.transformer_class) == (family.pipeline, family.transformer)
        assert hasattr(diffusers, family.pipeline) and hasattr(diffusers, family.transformer)
    with pytest.raises(ValueError, match="no such family: 'pixart'; expected one of sana, "):
        backbone_class("pixart")


@pytest.mark.parametrize("family", FAMILIES)
def test_parts_can_be_left_out_and_their_calls_then_say_so(tiny, family):
    whole = tiny(family)
    options = {"max_sequence_length": whole.max_sequence_length}
    bare = af.Backbone.from_pretrained(whole.folder, load_text_encoders=False, load_vae=False, **options)
    assert type(bare) is type(whole)
    assert not any(isinstance(part, torch.nn.Module) for part in bare.components.values())
    assert bare.vae_scale_factor == whole.vae_scale_factor and bare.size_multiple == whole.size_multiple
    x, t, condition = draw(whole), torch.tensor([0.2, 1.0]), whole.encode(PROMPTS)
    with torch.no_grad():
        assert torch.equal(bare(x, t, condition), whole(x, t, condition))
    with pytest.raises(RuntimeError, match="needed to encode prompts, and was not loaded; load the model with its"):
        bare.encode(PROMPTS)
    with pytest.raises(RuntimeError, match="needed to decode latents, and was dropped by load_vae=False"):
        bare.decode(x)


def test_freeing_parts_drops_them(tiny):
    backbone = af.Backbone.from_pretrained(tiny("sana").folder)
    factor = backbone.vae_scale_factor
    backbone.free_text_encoders()
    backbone.free_vae()
    assert "text_encoder" not in backbone.components and "vae" not in backbone.components
    assert backbone.vae_scale_factor == factor
    with pytest.raises(RuntimeError, match=r"was dropped by free_text_encoders\(\)"):
        backbone.encode(PROMPTS)
    with pytest.raises(RuntimeError, match=r"was dropped by free_vae\(\)"):
        backbone.encode_images(torch.zeros(1, 3, 32, 32))
    pipeline = backbone.pipeline()
    assert pipeline.vae is None and pipeline.transformer is backbone.transformer


def test_only_the_transformer_is_what_is_trained_and_saved(tiny):
    backbone = tiny("qwen_image")
    names = {name for name, _ in backbone.named_parameters()}
    assert names == {f"transformer.{name}" for name, _ in backbone.transformer.named_parameters()}
    assert not any(p.requires_grad for p in backbone.components["text_encoder"].parameters())
    assert not any(p.requires_grad for p in backbone.components["vae"].parameters())
    assert not backbone.components["text_encoder"].training


def test_dtype_holds_for_all_parts(tiny):
    backbone = af.Backbone.from_pretrained(tiny("sana").folder, torch_dtype=torch.bfloat16)
    parts = (backbone.transformer, backbone.components["text_encoder"], backbone.components["vae"])
    assert {part.dtype for part in parts} == {torch.bfloat16}
    # A cast afterwards is the transformer's alone, as for any module.
    assert backbone.to(torch.float32).transformer.dtype == torch.float32
    assert backbone.components["vae"].dtype == torch.bfloat16


def test_a_lone_transformer_is_a_model_without_text_and_vae(tiny):
    whole = tiny("sana")
    lone = af.Backbone.from_pretrained(whole.folder / "transformer")
    assert type(lone) is SanaBackbone and not lone.components
    x, t, condition = draw(whole), torch.tensor([0.2, 1.0]), whole.encode(PROMPTS)
    with torch.no_grad():
        assert torch.equal(lone(x, t, condition), whole(x, t, condition))


def test_a_subclass_refuses_another_family(tiny):
    with pytest.raises(ValueError, match="is a qwen_image model; write QwenImageBackbone or Backbone.from_pretrained"):
        SanaBackbone.from_pretrained(tiny("qwen_image").folder)


def copied(tiny, tmp_path: Path, **changes) -> Path:
    folder = tmp_path / "model"
    shutil.copytree(tiny("sana").folder, folder)
    index = json.loads((folder / loading.INDEX).read_text())
    (folder / loading.INDEX).write_text(json.dumps({**index, **changes}))
    return folder


def test_code_that_comes_with_a_model_is_never_run(tiny, tmp_path):
    folder = copied(tiny, tmp_path, text_encoder=["my_module", "MyEncoder"])
    (folder / "my_module.py").write_text("raise SystemExit('was run')")
    with pytest.raises(ValueError, match="wants text_encoder from 'my_module'; only classes of diffusers and"):
        af.Backbone.from_pretrained(folder)
    shutil.rmtree(folder)
    folder = copied(tiny, tmp_path, _class_name=["pipeline", "SanaPipeline"])
    with pytest.raises(ValueError, match="wants code that comes with the model to be run"):
        af.Backbone.from_pretrained(folder)


@pytest.mark.parametrize("part", ["transformer", "text_encoder", "vae"])
def test_only_safetensors_are_read(tiny, tmp_path, part):
    folder = copied(tiny, tmp_path)
    weights = next((folder / part).glob("*.safetensors"))
    weights.rename(weights.with_suffix(".bin"))
    with pytest.raises(FileNotFoundError, match=rf"no \.safetensors file in .*{part}; other weight formats are not"):
        af.Backbone.from_pretrained(folder)
    shutil.rmtree(folder / part)
    with pytest.raises(FileNotFoundError, match=f"{part} is missing; expected a folder as save_pretrained"):
        af.Backbone.from_pretrained(folder)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("PixArtSigmaPipeline", "it predicts noise on a variance-preserving schedule"),
        ("StableDiffusionXLPipeline", "it predicts noise"),
        ("QwenImageEditPipeline", "it is conditioned on images too"),
        ("NoSuchPipeline", r"NoSuchPipeline, which is not supported\. Supported: SanaPipeline \(sana\), QwenImage"),
    ],
)
def test_what_is_not_supported_is_refused_with_the_reason(tiny, tmp_path, name, message):
    with pytest.raises(ValueError, match=message):
        af.Backbone.from_pretrained(copied(tiny, tmp_path, _class_name=name))


def test_a_place_that_holds_no_model_is_named(tmp_path, monkeypatch):
    for place in (tmp_path / "nowhere", "./nowhere", "nowhere"):
        with pytest.raises(FileNotFoundError, match="is neither a folder nor a hub id"):
            af.Backbone.from_pretrained(place)
    with pytest.raises(FileNotFoundError, match="holds neither model_index.json nor config.json"):
        af.Backbone.from_pretrained(tmp_path)
    import huggingface_hub

    def offline(*arguments, **options):
        raise huggingface_hub.errors.LocalEntryNotFoundError("offline")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", offline)
    with pytest.raises(FileNotFoundError, match="owner/name is no folder here, and the hub cannot be reached for it"):
        af.Backbone.from_pretrained("owner/name")


def test_quantisation_by_name(tiny):
    with pytest.raises(ValueError, match='must be "int8", "nf4" or a quantisation object of diffusers'):
        af.Backbone.from_pretrained(tiny("sana").folder, quantization_config="fp4")
    if not torch.cuda.is_available():
        with pytest.raises((ValueError, ImportError), match="runs on a GPU only|bitsandbytes is needed here"):
            af.Backbone.from_pretrained(tiny("sana").folder, quantization_config="nf4")
