"""SANA behind the velocity convention: sign, time, masks, batches, files."""

from __future__ import annotations

import copy
import json

import pytest
import torch

pytest.importorskip("diffusers", reason="diffusers is not installed: pip install 'apex_fast[train]'")
pytest.importorskip("transformers", reason="transformers is not installed: pip install 'apex_fast[train]'")

from apex_fast.backbones.sana import SanaBackbone  # noqa: E402
from apex_fast.condition import Condition  # noqa: E402

TRANSFORMER = {
    "in_channels": 2,
    "out_channels": 2,
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "num_layers": 2,
    "num_cross_attention_heads": 2,
    "cross_attention_head_dim": 8,
    "cross_attention_dim": 16,
    "caption_channels": 12,
    "sample_size": 4,
    "patch_size": 1,
    "interpolation_scale": 1,
}
TEXT_ENCODER = {"d_model": 12, "d_kv": 6, "num_heads": 2, "num_layers": 1, "d_ff": 16, "dropout_rate": 0.0}
PROMPTS = ["a handwritten seven", "the digit 7", "the number three, written by hand"]


def build(**changes) -> SanaBackbone:
    return SanaBackbone.from_config({**TRANSFORMER, **changes}, TEXT_ENCODER, PROMPTS, vocab_size=300)


@pytest.fixture(scope="module")
def backbone() -> SanaBackbone:
    return build()


def draw(batch: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, 2, 4, 4, generator=generator), torch.rand(batch, generator=generator)


# ---- convention


@pytest.mark.parametrize("timestep_scale", [1.0, 0.001])
def test_an_euler_step_is_the_one_of_the_diffusers_scheduler(timestep_scale):
    """diffusers' own sampling loop around the bare transformer and our x + (t' - t) v must walk the same path."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    backbone = build(timestep_scale=timestep_scale)
    condition = backbone.encode(PROMPTS)
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(sigmas=[1.0, 0.7, 0.25])
    x, _ = draw(3)
    for timestep, sigma, following in zip(
        scheduler.timesteps, scheduler.sigmas[:-1], scheduler.sigmas[1:], strict=True
    ):
        with torch.no_grad():
            output = backbone.transformer(
                x,
                encoder_hidden_states=condition.prompt_embeds,
                encoder_attention_mask=condition.prompt_embeds_mask,
                timestep=timestep.expand(3) * timestep_scale,
                return_dict=False,
            )[0]
            velocity = backbone(x, sigma.expand(3), condition)
        expected = scheduler.step(output, timestep, x, return_dict=False)[0]
        ours = x + (following - sigma) * velocity
        torch.testing.assert_close(ours, expected, rtol=0, atol=2e-6)
        x = expected


def test_the_velocity_is_noise_minus_data():
    """The scheduler takes x_sigma to the data in one step when it is given noise minus data: the sign that forward
    promises.
    """
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(sigmas=[0.6])
    (x, _), (z, _) = draw(2), draw(2, seed=1)
    x_sigma = 0.6 * z + 0.4 * x
    landed = scheduler.step(z - x, scheduler.timesteps[0], x_sigma, return_dict=False)[0]
    torch.testing.assert_close(landed, x, rtol=0, atol=1e-6)


def test_time_is_not_rounded_to_the_weights_dtype():
    """0.999 and 1.0 are one number in bf16; the network must tell them apart."""
    backbone = build().to(torch.bfloat16)
    seen = []
    backbone.transformer.time_embed.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    x, _ = draw(2)
    velocity = backbone(x, torch.tensor([0.999, 1.0]), Condition(torch.randn(2, 3, 12)))
    assert velocity.dtype == torch.bfloat16
    torch.testing.assert_close(seen[0], torch.tensor([999.0, 1000.0]))


# ---- conditions


def test_masked_tokens_have_exactly_no_effect(backbone):
    x, t = draw(3)
    condition = backbone.encode(PROMPTS)
    assert not condition.prompt_embeds_mask.all(), "the prompts must need padding for this test to say anything"
    poisoned = torch.where(condition.prompt_embeds_mask.unsqueeze(-1), condition.prompt_embeds, torch.tensor(1e3))
    with torch.no_grad():
        plain = backbone(x, t, condition)
        assert torch.equal(plain, backbone(x, t, Condition(poisoned, condition.prompt_embeds_mask)))
        assert torch.equal(plain, backbone(x, t, Condition(poisoned, condition.prompt_embeds_mask.long() * 7)))
        # ... and the tokens that are kept do have one.
        assert not torch.equal(plain, backbone(x, t, Condition(poisoned)))


def test_masked_tokens_receive_no_gradient(backbone):
    x, t = draw(3)
    condition = backbone.encode(PROMPTS)
    embeds = condition.prompt_embeds.clone().requires_grad_()
    backbone(x, t, Condition(embeds, condition.prompt_embeds_mask)).square().sum().backward()
    received = embeds.grad.abs().sum(-1)
    assert torch.equal(received > 0, condition.prompt_embeds_mask)
    backbone.zero_grad()


def test_a_batch_equals_its_samples_one_by_one(backbone):
    x, t = draw(3)
    condition = backbone.encode(PROMPTS)
    with torch.no_grad():
        together = backbone(x, t, condition)
        single = torch.cat([backbone(x[i : i + 1], t[i : i + 1], condition.index([i])) for i in range(3)])
    torch.testing.assert_close(together, single, rtol=0, atol=2e-6)
    # Times are per sample: another time for the last one leaves the others where they were.
    t[2] = 1 - t[2]
    with torch.no_grad():
        changed = backbone(x, t, condition)
    torch.testing.assert_close(changed[:2], together[:2], rtol=0, atol=2e-6)
    assert not torch.allclose(changed[2], together[2], atol=1e-5)


def test_a_plain_tensor_condition_counts_every_token(backbone):
    x, t = draw(2)
    embeds = torch.randn(2, 5, 12)
    with torch.no_grad():
        masked = backbone(x, t, Condition(embeds, torch.ones(2, 5, dtype=torch.bool)))
        torch.testing.assert_close(backbone(x, t, embeds), masked, rtol=0, atol=1e-6)


def test_the_published_shift_is_visible_to_the_network(backbone):
    """A shift that the network cannot see would leave the shifted branch without anything to say."""
    x, t = draw(3)
    condition = backbone.encode(PROMPTS)
    with torch.no_grad():
        plain = backbone(x, t, condition)
        shifted = backbone(x, t, Condition(-condition.prompt_embeds + 0.5, condition.prompt_embeds_mask))
    assert (plain - shifted).square().mean() > 1e-4 * plain.square().mean()


@pytest.mark.parametrize(("batch", "times", "texts"), [(2, 2, 3), (2, 1, 2), (2, 3, 2)])
def test_batch_sizes_that_do_not_fit_are_refused(backbone, batch, times, texts):
    with pytest.raises(ValueError, match="of one batch size"):
        backbone(torch.zeros(batch, 2, 4, 4), torch.zeros(times), torch.zeros(texts, 3, 12))


# ---- text


def test_encode_pads_masks_and_repeats(backbone):
    condition = backbone.encode([*PROMPTS, ""])
    assert condition.prompt_embeds.shape == (4, 16, 12) and condition.prompt_embeds_mask.shape == (4, 16)
    assert condition.prompt_embeds_mask.dtype == torch.bool
    assert not condition.prompt_embeds.requires_grad
    assert condition.prompt_embeds_mask[3].sum() == 1, "the empty prompt is the end token"
    assert (condition.prompt_embeds_mask.sum(1)[:3] > 1).all()
    # A prompt means the same whatever it is batched with.
    alone = backbone.encode(PROMPTS[:1])
    kept = alone.prompt_embeds_mask[0]
    torch.testing.assert_close(alone.prompt_embeds[0][kept], condition.prompt_embeds[0][kept], rtol=0, atol=1e-6)


def test_any_text_encodes(backbone):
    condition = backbone.encode(["Ünïcode ☃ and a very long prompt " * 10])
    assert condition.prompt_embeds.shape == (1, 16, 12) and condition.prompt_embeds.isfinite().all()
    unknown = backbone.text.tokenizer("☃")["input_ids"]
    assert backbone.text.tokenizer.unk_token_id not in unknown, "bytes cover every character"


def test_one_string_is_not_a_list_of_prompts(backbone):
    with pytest.raises(TypeError, match=r"write \[prompt\]"):
        backbone.encode("the digit 7")


def test_the_text_encoder_is_frozen_until_asked(backbone):
    assert not any(p.requires_grad for p in backbone.text.text_encoder.parameters())
    assert all(p.requires_grad for p in backbone.transformer.parameters())
    trained = build()
    trained.text.text_encoder.requires_grad_(True)
    assert trained.encode(PROMPTS, requires_grad=True).prompt_embeds.requires_grad
    assert not trained.encode(PROMPTS).prompt_embeds.requires_grad
    with torch.no_grad():
        assert not trained.encode(PROMPTS, requires_grad=True).prompt_embeds.requires_grad


# ---- copies and files


def test_a_copy_shares_the_frozen_text_encoder_and_nothing_else():
    backbone = build()
    copied = copy.deepcopy(backbone)
    assert copied.text.text_encoder is backbone.text.text_encoder and copied.text.tokenizer is backbone.text.tokenizer
    before = backbone.transformer.proj_out.weight.detach().clone()
    with torch.no_grad():
        copied.transformer.proj_out.weight.add_(1)
    assert torch.equal(backbone.transformer.proj_out.weight, before)
    copied.eval()
    assert backbone.training
    backbone.text.text_encoder.requires_grad_(True)
    assert copy.deepcopy(backbone).text.text_encoder is not backbone.text.text_encoder


def test_from_config_depends_on_its_seed_alone():
    state = torch.random.get_rng_state()
    first, torch_state = build(), torch.random.get_rng_state()
    assert torch.equal(state, torch_state)
    torch.rand(3)
    second = build()
    for name, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[name]), name


def test_saving_and_loading_changes_nothing(backbone, tmp_path):
    backbone.save_pretrained(tmp_path / "model")
    files = [path.name for path in (tmp_path / "model").rglob("*") if path.is_file()]
    assert not any(name.endswith((".bin", ".pt", ".pth", ".ckpt", ".pkl")) for name in files)
    loaded = SanaBackbone.from_pretrained(tmp_path / "model")
    x, t = draw(3)
    with torch.no_grad():
        expected = backbone(x, t, backbone.encode(PROMPTS))
        assert torch.equal(loaded(x, t, loaded.encode(PROMPTS)), expected)
    assert loaded.sample_shape == backbone.sample_shape == (2, 4, 4)
    assert loaded.max_sequence_length == backbone.max_sequence_length
    half = SanaBackbone.from_pretrained(tmp_path / "model", torch_dtype=torch.bfloat16)
    assert half.transformer.dtype == half.text.text_encoder.dtype == torch.bfloat16


def test_the_parts_are_plain_diffusers_and_transformers(backbone, tmp_path):
    from diffusers import SanaTransformer2DModel

    assert type(backbone.transformer) is SanaTransformer2DModel
    backbone.save_pretrained(tmp_path)
    other = SanaTransformer2DModel.from_pretrained(tmp_path / "transformer")
    x, t = draw(2)
    embeds = torch.randn(2, 3, 12)
    with torch.no_grad():
        expected = backbone(x, t, embeds)
        assert torch.equal(other(x, embeds, 1000 * t, return_dict=False)[0], expected)


def test_a_folder_that_is_not_a_model_says_what_is_missing(backbone, tmp_path):
    with pytest.raises(FileNotFoundError, match="is neither a folder nor a hub id .owner/name.; expected a folder"):
        SanaBackbone.from_pretrained(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="holds neither model_index.json nor config.json"):
        SanaBackbone.from_pretrained(tmp_path)
    folder = tmp_path / "model"
    backbone.save_pretrained(folder)
    weights = next((folder / "transformer").glob("*.safetensors"))
    # A pickle in the place of the weights must not be picked up.
    weights.rename(weights.with_suffix(".bin"))
    with pytest.raises(FileNotFoundError, match=r"no \.safetensors file in .*transformer"):
        SanaBackbone.from_pretrained(folder)
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, "_class_name": "PixArtSigmaPipeline"}))
    with pytest.raises(ValueError, match="PixArtSigmaPipeline, which is not supported: it predicts"):
        SanaBackbone.from_pretrained(folder)
    (folder / "model_index.json").write_text("{")
    with pytest.raises(ValueError, match="not valid JSON"):
        SanaBackbone.from_pretrained(folder)


def test_an_unknown_text_encoder_is_named(backbone, tmp_path):
    backbone.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    index["text_encoder"][1] = "NoSuchEncoder"
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="'NoSuchEncoder', which transformers .* does not have"):
        SanaBackbone.from_pretrained(tmp_path)


# ---- settings that must fit the weights


def test_widths_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="text of width 10, the text encoder gives 12"):
        build(caption_channels=10)


def test_embedded_guidance_must_be_given_and_is_scaled():
    with pytest.raises(ValueError, match="pass embedded_guidance="):
        build(guidance_embeds=True)
    plain = build()
    with pytest.raises(ValueError, match="guidance_embeds is false"):
        SanaBackbone(plain.transformer, text=plain.text, embedded_guidance=4.5)
    from diffusers import SanaTransformer2DModel

    distilled = SanaTransformer2DModel(**TRANSFORMER, guidance_embeds=True, guidance_embeds_scale=0.1)
    backbone = SanaBackbone(distilled, text=plain.text, embedded_guidance=4.5)
    x, t = draw(2)
    embeds = torch.randn(2, 3, 12)
    with torch.no_grad():
        expected = distilled(x, embeds, 1000 * t, guidance=torch.full((2,), 0.45), return_dict=False)[0]
        torch.testing.assert_close(backbone(x, t, embeds), expected, rtol=0, atol=1e-6)


def test_a_vocabulary_below_the_bytes_is_refused():
    with pytest.raises(ValueError, match="at least 259"):
        SanaBackbone.from_config(TRANSFORMER, TEXT_ENCODER, PROMPTS, vocab_size=100)
