"""Every family against its own pipeline, and what all promise: one convention, exact times, masks, gradients."""

from __future__ import annotations

import copy
import inspect
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from backbone_cases import (
    HEIGHT,
    NEGATIVE,
    PROMPTS,
    WIDTH,
    assert_close,
    count_hooks,
    draw,
    load_tiny,
    run_pipeline,
    with_embeds,
)

import apex_fast as af
from apex_fast.backbones.base import Backbone
from apex_fast.backbones.tiny import TINY_FAMILIES
from apex_fast.condition import Condition

pytestmark = pytest.mark.usefixtures("one_thread")

UNGUIDED = {
    "sana": {"guidance_scale": 1.0},
    "qwen_image": {},
    "flux": {},
    "z_image": {"guidance_scale": 0.0},
    "stable_diffusion_3": {"guidance_scale": 1.0},
    "lumina2": {"guidance_scale": 1.0},
}
# The value that the time embedding of each network must see at time t.
EMBEDDED_TIME = {
    "sana": lambda t: 1000 * t,
    "qwen_image": lambda t: t,
    "flux": lambda t: 1000 * t,
    "z_image": lambda t: 1000 * (1 - t),
    "stable_diffusion_3": lambda t: 1000 * t,
    "lumina2": lambda t: 1 - t,
}


@pytest.fixture(params=TINY_FAMILIES)
def backbone(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Backbone:
    return load_tiny(request.param, tmp_path_factory)


def spy_on_time(model: Backbone) -> list[torch.Tensor]:
    """A list that collects what reaches the sinusoids of the time (and after it of FLUX's guidance)."""
    seen: list[torch.Tensor] = []
    for module in model.transformer.modules():
        if type(module).__name__ in ("Timesteps", "TimestepEmbedder"):
            module.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    return seen


# ---- against the stock pipeline


@pytest.mark.parametrize("sigmas", [[1.0], [1.0, 0.4]])
def test_euler_steps_are_those_of_the_stock_pipeline(backbone, sigmas):
    """Sign, time scale, packing and text, at sigma = 1 and in between, on latents that are not square."""
    noise = draw(backbone)
    expected, grid = run_pipeline(backbone, noise, sigmas, **UNGUIDED[backbone.family])
    assert grid.tolist() == pytest.approx([*sigmas, 0.0])
    ours = af.sample(backbone, noise, backbone.encode(PROMPTS), times=grid)
    assert_close(ours, expected)
    # What would pass for equal is far away from the wrong sign and from the wrong time.
    wrong = af.sample(lambda x, t, c: -backbone(x, t, c), noise, backbone.encode(PROMPTS), times=grid)
    late = af.sample(lambda x, t, c: backbone(x, 1 - t, c), noise, backbone.encode(PROMPTS), times=grid)
    for other in (wrong, late):
        assert (other - expected).abs().max() > 1e-3 * expected.abs().max()


def test_images_are_those_of_the_stock_pipeline(backbone):
    noise = draw(backbone)
    latents, _ = run_pipeline(backbone, noise, [1.0], **UNGUIDED[backbone.family])
    expected, _ = run_pipeline(backbone, noise, [1.0], output_type="pt", **UNGUIDED[backbone.family])
    images = backbone.decode(latents)
    assert images.shape == (2, 3, HEIGHT, WIDTH)
    assert_close((images / 2 + 0.5).clamp(0, 1), expected)


def test_one_step_of_the_pipelines_own_scheduler_starts_at_noise_but_for_two_families(backbone):
    """SANA's solver starts at 0.9997, and Qwen's shift_terminal makes one step 0 / 0; a plain scheduler mends both."""
    pipeline = backbone.pipeline()
    pipeline.set_progress_bar_config(disable=True)
    settings = {"use_resolution_binning": False} if backbone.family == "sana" else {}
    pipeline(PROMPTS[0], height=32, width=32, num_inference_steps=1, output_type="latent", **settings)
    starts_at_one = pipeline.scheduler.sigmas.tolist() == [1.0, 0.0]
    assert starts_at_one == (backbone.family not in ("sana", "qwen_image"))


def stock_text(backbone, prompts, negative):
    """Embeddings, mask and pooled embeddings out of the pipeline's own encode_prompt, called as the pipeline calls it;
    negative ones as the negative half of a guided call where the pipeline has one.
    """
    pipeline, length = backbone.pipeline(), backbone.max_sequence_length
    half = {"prompt": [PROMPTS[0]] * len(prompts), "negative_prompt": prompts} if negative else {"prompt": prompts}
    if backbone.family == "sana":
        default = inspect.signature(type(pipeline).__call__).parameters["complex_human_instruction"].default
        parts = pipeline.encode_prompt(**half, complex_human_instruction=default, max_sequence_length=length)
        return (*(parts[2:] if negative else parts[:2]), None)
    if backbone.family == "lumina2":
        parts = pipeline.encode_prompt(**half, max_sequence_length=length)
        return (*(parts[2:] if negative else parts[:2]), None)
    if backbone.family == "z_image":
        return pipeline.encode_prompt(**half, max_sequence_length=length)[1 if negative else 0], None, None
    if backbone.family == "stable_diffusion_3":
        parts = pipeline.encode_prompt(**half, prompt_2=None, prompt_3=None, max_sequence_length=length)
        return parts[1 if negative else 0], None, parts[3 if negative else 2]
    if backbone.family == "flux":
        embeds, pooled, _ = pipeline.encode_prompt(prompts, max_sequence_length=length)
        return embeds, None, pooled
    return (*pipeline.encode_prompt(prompts, max_sequence_length=length), None)


@pytest.mark.parametrize("negative", [False, True])
@pytest.mark.parametrize("prompts", [PROMPTS, ["", NEGATIVE]])
def test_encode_is_the_pipelines_own(backbone, prompts, negative):
    condition = backbone.encode(prompts, negative=negative)
    embeds, mask, pooled = stock_text(backbone, list(prompts), negative)
    ours, kept = condition.prompt_embeds, condition.prompt_embeds_mask
    assert kept.dtype == torch.bool and kept.shape == ours.shape[:2] and not ours.requires_grad
    if isinstance(embeds, list):
        assert [len(e) for e in embeds] == kept.sum(1).tolist()
        assert all(torch.equal(ours[i][kept[i]], e) for i, e in enumerate(embeds))
    else:
        assert torch.equal(ours, embeds)
        if backbone.has_mask:
            assert torch.equal(kept, torch.ones_like(kept) if mask is None else mask.bool())
    assert kept.sum(1)[0] != kept.sum(1)[1], "true lengths must differ for the masks to say anything"
    if pooled is None:
        assert condition.pooled_prompt_embeds is None
    else:
        assert torch.equal(condition.pooled_prompt_embeds, pooled)


def test_one_prompt_alone_is_the_same_prompt(backbone):
    """Qwen's pipeline gives no mask where nothing is padded; a mask of ones says the same."""
    both, alone = backbone.encode(PROMPTS), backbone.encode(PROMPTS[1:])
    assert alone.prompt_embeds_mask is not None
    kept, mine = both.prompt_embeds_mask[1], alone.prompt_embeds_mask[0]
    assert_close(alone.prompt_embeds[0][mine], both.prompt_embeds[1][kept])
    x, t = draw(backbone), torch.tensor([0.7, 0.2])
    with torch.no_grad():
        assert_close(backbone(x[1:], t[1:], alone), backbone(x, t, both)[1:])


# ---- latents


def test_scaling_of_latents_and_its_inverse_cancel(backbone, monkeypatch):
    """With a VAE that does nothing, encoding and decoding are the affine scaling and its inverse."""
    vae = backbone.components["vae"]
    passed = lambda x: SimpleNamespace(latent=x, latent_dist=SimpleNamespace(sample=lambda generator: x))  # noqa: E731
    monkeypatch.setattr(vae, "encode", passed)
    monkeypatch.setattr(vae, "decode", lambda z, return_dict: (z,))
    values = torch.randn(2, backbone.latent_channels, HEIGHT, WIDTH)
    latents = backbone.encode_images(values)
    assert latents.shape == values.shape and not torch.allclose(latents, values)
    torch.testing.assert_close(backbone.decode(latents), values, rtol=1e-6, atol=1e-6)


def test_encoding_images_depends_on_its_generator_alone(backbone):
    images = torch.rand(2, 3, HEIGHT, WIDTH) * 2 - 1
    first = backbone.encode_images(images, torch.Generator().manual_seed(1))
    state = torch.random.get_rng_state()
    again = backbone.encode_images(images, torch.Generator().manual_seed(1))
    assert torch.equal(first, again) and torch.equal(state, torch.random.get_rng_state())
    assert first.shape == (2, *backbone.latent_shape(HEIGHT, WIDTH)) and first.isfinite().all()


def test_sizes_that_do_not_divide_are_refused(backbone):
    multiple = backbone.size_multiple
    with pytest.raises(ValueError, match=f"multiples of {multiple} pixels high and wide, got 32 x {multiple + 1}"):
        backbone.latent_shape(32, multiple + 1)
    with pytest.raises(ValueError, match="multiples of"):
        backbone.encode_images(torch.zeros(1, 3, multiple + 1, multiple))
    if backbone.patch > 1:
        channels, h, w = backbone.latent_shape(HEIGHT, WIDTH)
        with pytest.raises(ValueError, match=f"multiple of {backbone.patch} high and wide"):
            backbone(torch.zeros(2, channels, h + 1, w), torch.zeros(2), backbone.encode(PROMPTS))


@pytest.mark.parametrize("size", [(16, 16), (32, 80), (96, 48)])
def test_any_aspect_ratio_runs_and_matters(backbone, size):
    """Height and width are not confused: the velocity of a transposed input is not the transposed velocity."""
    x, t, condition = draw(backbone, 1, *size), torch.tensor([0.6]), backbone.encode(PROMPTS[:1])
    with torch.no_grad():
        velocity = backbone(x, t, condition)
        turned = backbone(x.mT, t, condition).mT
    assert velocity.shape == x.shape and velocity.isfinite().all()
    assert (velocity - turned).abs().max() > 1e-3 * velocity.abs().max()


# ---- conditions


def test_padding_changes_nothing_where_the_network_has_a_mask(backbone):
    if not backbone.has_mask:
        pytest.skip("this network takes no mask")
    x, t, condition = draw(backbone), torch.tensor([0.9, 0.3]), backbone.encode(PROMPTS)
    embeds, mask = condition.prompt_embeds, condition.prompt_embeds_mask
    assert not mask.all(), "something must be padded"
    poisoned = torch.where(mask.unsqueeze(-1), embeds, torch.tensor(50.0))
    longer = torch.cat([embeds, torch.full_like(embeds[:, :5], -7.0)], dim=1)
    longer_mask = torch.cat([mask, torch.zeros_like(mask[:, :5])], dim=1)
    with torch.no_grad():
        plain = backbone(x, t, condition)
        assert torch.equal(backbone(x, t, Condition(poisoned, mask)), plain)
        assert torch.equal(backbone(x, t, Condition(poisoned, mask.long() * 3)), plain)
        assert_close(backbone(x, t, Condition(longer, longer_mask)), plain)
        # ... and the tokens that are kept do change something.
        touched = embeds.clone()
        touched[:, 0] += 1.0
        assert (backbone(x, t, Condition(touched, mask)) - plain).abs().max() > 1e-4 * plain.abs().max()
    embeds = embeds.clone().requires_grad_()
    backbone(x, t, Condition(embeds, mask)).square().sum().backward()
    assert torch.equal(embeds.grad.abs().sum(-1) > 0, mask)
    backbone.zero_grad()


def test_a_plain_tensor_counts_every_token(backbone):
    x, t, condition = draw(backbone), torch.tensor([0.9, 0.3]), backbone.encode(PROMPTS)
    embeds, every = condition.prompt_embeds, torch.ones_like(condition.prompt_embeds_mask)
    if condition.pooled_prompt_embeds is not None:
        with pytest.raises(ValueError, match="needs pooled_prompt_embeds"):
            backbone(x, t, embeds)
        return
    with torch.no_grad():
        assert_close(backbone(x, t, embeds), backbone(x, t, Condition(embeds, every)))


def test_without_a_mask_the_length_is_fixed_and_the_network_sees_padding(backbone):
    if backbone.has_mask:
        pytest.skip("this network takes a mask")
    x, t, condition = draw(backbone), torch.tensor([0.9, 0.3]), backbone.encode(PROMPTS)
    embeds, mask, pooled = condition.prompt_embeds, condition.prompt_embeds_mask, condition.pooled_prompt_embeds
    assert embeds.shape[1] == backbone.token_count and not mask.all()
    with pytest.raises(ValueError, match=rf"the same {backbone.token_count} tokens .* got {backbone.token_count - 1}"):
        backbone(x, t, Condition(embeds[:, 1:], mask[:, 1:], pooled))
    with torch.no_grad():
        plain = backbone(x, t, condition)
        assert torch.equal(backbone(x, t, Condition(embeds, None, pooled)), plain), "the mask is for the shift alone"
        other = torch.where(mask.unsqueeze(-1), embeds, embeds + 1)
        assert not torch.equal(backbone(x, t, with_embeds(condition, other)), plain)


def test_a_setting_says_whether_the_shift_touches_padding(backbone):
    shift = af.ConditionShift(scale=-1.0, bias=0.5)
    condition = backbone.encode(PROMPTS)
    kept = condition.prompt_embeds_mask
    moved = (shift(condition).prompt_embeds != condition.prompt_embeds).any(-1)
    assert torch.equal(moved, kept), "by default padding stays as it is"
    other = copy.copy(backbone)
    other.shift_padding = True
    condition = other.encode(PROMPTS)
    if backbone.has_mask:
        assert torch.equal(condition.prompt_embeds_mask, kept)
    else:
        assert condition.prompt_embeds_mask is None
        assert (shift(condition).prompt_embeds != condition.prompt_embeds).any(-1).all()


def test_the_published_shift_is_seen_by_the_network(backbone):
    x, t, condition = draw(backbone), torch.tensor([0.9, 0.3]), backbone.encode(PROMPTS)
    with torch.no_grad():
        plain = backbone(x, t, condition)
        shifted = backbone(x, t, af.ConditionShift()(condition))
    assert (plain - shifted).square().mean() > 1e-5 * plain.square().mean()


def test_conditions_of_another_model_are_refused(backbone):
    x, t, condition = draw(backbone), torch.tensor([0.9, 0.3]), backbone.encode(PROMPTS)
    wide = with_embeds(condition, condition.prompt_embeds.repeat(1, 1, 2))
    with pytest.raises(ValueError, match="is the condition of another model"):
        backbone(x, t, wide)
    with pytest.raises(ValueError, match="of one batch size"):
        backbone(x, t, condition.index([0]))
    with pytest.raises(ValueError, match="of one batch size"):
        backbone(x, t[:1], condition)
    with pytest.raises(TypeError, match=r"write \[prompt\]"):
        backbone.encode("a red cat")


# ---- batches and times


def test_a_batch_equals_its_samples_one_by_one(backbone):
    x, t, condition = draw(backbone, 3), torch.tensor([1.0, 0.5, 0.1]), backbone.encode([*PROMPTS, ""])
    with torch.no_grad():
        together = backbone(x, t, condition)
        single = torch.cat([backbone(x[i : i + 1], t[i : i + 1], condition.index([i])) for i in range(3)])
        assert_close(single, together)
        t[2] = 0.8
        changed = backbone(x, t, condition)
    assert torch.equal(changed[:2], together[:2])
    assert (changed[2] - together[2]).abs().max() > 1e-3 * together.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_time_embedding_gets_the_exact_time(backbone, dtype):
    """0.999 and 1.0 are one number in bf16; the network must tell them apart whatever its weights are stored in."""
    model = copy.deepcopy(backbone).to(dtype)
    seen = spy_on_time(model)
    t = torch.tensor([0.999, 1.0])
    with torch.no_grad():
        velocity = model(draw(model, 1).repeat(2, 1, 1, 1), t, backbone.encode(PROMPTS[:1] * 2))
    assert velocity.dtype == dtype and seen[0].dtype == torch.float32
    torch.testing.assert_close(seen[0], EMBEDDED_TIME[backbone.family](t), rtol=1e-6, atol=1e-6)


def test_networks_that_round_the_time_are_the_two_that_get_it_back(backbone, monkeypatch):
    model = copy.deepcopy(backbone).to(torch.bfloat16)
    seen = spy_on_time(model)
    monkeypatch.setattr(Backbone, "exact_time", staticmethod(lambda module, timestep: nullcontext()))
    with torch.no_grad():
        model(draw(model), torch.tensor([0.999, 1.0]), backbone.encode(PROMPTS))
    rounded = bool(seen[0][0] == seen[0][1])
    assert rounded == (backbone.family in ("flux", "qwen_image"))


def test_bfloat16_stays_near_float32(backbone):
    exact = copy.deepcopy(backbone)
    if exact.embedded_guidance is not None:
        # FLUX embeds 1000 times the guidance in the dtype of its weights: 3500 is 3504 in bf16, 4000 is itself.
        exact.embedded_guidance = 4.0
    model = copy.deepcopy(exact).to(torch.bfloat16)
    x, t, condition = draw(backbone), torch.tensor([0.9, 0.3]), backbone.encode(PROMPTS)
    with torch.no_grad():
        expected = exact(x, t, condition)
    x = x.clone().requires_grad_()
    velocity = model(x, t, condition)
    assert (velocity.float() - expected).norm() < 0.05 * expected.norm()
    velocity.float().square().mean().backward()
    grads = [p.grad for p in model.transformer.parameters() if p.grad is not None]
    assert x.grad.isfinite().all() and all(g.isfinite().all() for g in grads)


# ---- gradients


def test_gradients_reach_the_input_and_every_parameter_but_the_declared_ones(backbone):
    model = copy.deepcopy(backbone)
    # A number of patches that is no multiple of 32, so that Z-Image pads the image and its padding token is used.
    x = draw(model, 2, 16, 48).requires_grad_()
    model(x, torch.tensor([0.9, 0.3]), backbone.encode(PROMPTS)).square().mean().backward()
    assert (x.grad != 0).all()
    unused = {name for name, p in model.transformer.named_parameters() if p.grad is None or not p.grad.any()}
    assert unused == backbone.parameters_without_gradient()


def test_checkpointing_recomputes_and_changes_no_number(backbone):
    x, t, condition = draw(backbone), torch.tensor([0.9, 0.3]), backbone.encode(PROMPTS)

    def run(checkpointing: bool):
        model = copy.deepcopy(backbone)
        if checkpointing:
            model.enable_gradient_checkpointing()
        blocks = [m for m in model.transformer.modules() if "Block" in type(m).__name__]
        runs = []
        for block in blocks:
            # Before the block: a recomputation stops as soon as it has what backward needs.
            block.register_forward_pre_hook(lambda *_: runs.append(1))
        loss = model(x, t, condition).square().mean()
        loss.backward()
        gradients = {name: p.grad for name, p in model.transformer.named_parameters() if p.grad is not None}
        return loss.detach(), gradients, len(runs)

    (loss, gradients, runs), (same_loss, same_gradients, more_runs) = run(False), run(True)
    assert more_runs > runs, "nothing was recomputed"
    assert torch.equal(loss, same_loss) and gradients.keys() == same_gradients.keys()
    for name, gradient in gradients.items():
        assert torch.equal(gradient, same_gradients[name]), name


# ---- the transformer stays diffusers' own


def test_the_transformer_is_unmodified_and_no_hook_is_left(backbone):
    import diffusers

    cls = getattr(diffusers, backbone.transformer_class)
    stored = cls.from_pretrained(backbone.folder / "transformer")
    assert type(backbone.transformer) is cls and type(backbone.transformer).forward is cls.forward
    x, t, condition = draw(backbone), torch.tensor([0.9, 0.3]), backbone.encode(PROMPTS)
    before = count_hooks(backbone.transformer)
    with torch.no_grad():
        backbone(x, t, condition)
    assert count_hooks(backbone.transformer) == before == 0
    assert backbone.transformer.state_dict().keys() == stored.state_dict().keys()
    assert {f"transformer.{name}" for name in stored.state_dict()} == backbone.state_dict().keys()


def test_no_hook_is_left_after_an_error_inside_the_network(backbone):
    model = copy.deepcopy(backbone)
    last = [m for m in model.transformer.modules() if "Block" in type(m).__name__][-1]

    def fail(*_):
        raise RuntimeError("in the middle of it")

    handle = last.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="in the middle of it"):
        model(draw(model), torch.tensor([0.9, 0.3]), backbone.encode(PROMPTS))
    handle.remove()
    assert count_hooks(model.transformer) == 0


def test_lora_targets_name_what_acts_on_the_image_and_what_tells_the_time(backbone):
    """Attention, feed-forward and modulation of every block, and the embedding of the time; nothing else."""
    linear = {
        name: module
        for name, module in backbone.transformer.named_modules()
        if isinstance(module, torch.nn.Linear | torch.nn.Conv2d)
    }
    targets = backbone.lora_targets
    hit = {n for n in linear if any(n == target or n.endswith("." + target) for target in targets)}
    assert all(any(n == target or n.endswith("." + target) for n in linear) for target in targets), "a dead target"
    blocks = tuple(f"{n}." for n, m in backbone.transformer.named_modules() if "Block" in type(m).__name__)
    inside = {n for n in linear if n.startswith(blocks)}
    # SANA's depthwise convolution mixes no channels, and a block of Z-Image's text has no modulation.
    assert {n for n in inside - hit if "conv_depth" not in n} == set()
    times = ("timestep_embedder", "t_embedder", "time_embed.linear", "norm_out.linear", "adaLN_modulation")
    assert hit - inside and all(any(time in n for time in times) for n in hit - inside)
    assert any("embedder" in n for n in hit - inside)
