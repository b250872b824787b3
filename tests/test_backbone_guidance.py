"""How each family's teacher is guided: the defaults of the stock pipelines, and how they combine two velocities."""

from __future__ import annotations

import copy
import inspect

import pytest
import torch
from backbone_cases import (
    NEGATIVE,
    PROMPTS,
    assert_close,
    draw,
    load_tiny,
    run_pipeline,
)

import apex_fast as af
from apex_fast.backbones.base import Backbone
from apex_fast.backbones.tiny import TINY_FAMILIES

pytestmark = pytest.mark.usefixtures("one_thread")

SCALE_ARGUMENT = {"qwen_image": "true_cfg_scale", "flux": "true_cfg_scale"}
NOT_LINEAR = ("qwen_image", "lumina2")


@pytest.fixture(params=TINY_FAMILIES)
def backbone(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Backbone:
    return load_tiny(request.param, tmp_path_factory)


def guided(backbone, negative, scale):
    """A velocity guided as the family does it; what the sampler's own guidance cannot do for all of them."""
    return lambda x, t, c: backbone.guide(backbone(x, t, c), backbone(x, t, negative), scale)


@pytest.mark.parametrize("sigmas", [[1.0], [1.0, 0.4]])
def test_the_teacher_is_guided_as_the_pipeline_guides_when_its_user_sets_nothing(backbone, sigmas):
    noise, teacher = draw(backbone), backbone.teacher_guidance
    expected, grid = run_pipeline(backbone, noise, sigmas)
    condition = backbone.encode(PROMPTS)
    if teacher.negative_prompt is None:
        assert_close(af.sample(backbone, noise, condition, times=grid), expected)
        return
    negative = backbone.encode([teacher.negative_prompt] * 2, negative=True)
    ours = af.sample(guided(backbone, negative, teacher.scale), noise, condition, times=grid)
    assert_close(ours, expected)
    unguided = af.sample(backbone, noise, condition, times=grid)
    assert (unguided - expected).abs().max() > 1e-3 * expected.abs().max(), "guidance must do something"
    linear = backbone.linear_guidance_scale(teacher.scale)
    if linear is not None:
        fused = af.sample(
            backbone, noise, condition, times=grid, guidance_scale=linear, negative_condition=negative.index([0])
        )
        assert_close(fused, expected)


def test_a_negative_prompt_of_the_user_guides_as_in_the_pipeline(backbone):
    noise, teacher = draw(backbone), backbone.teacher_guidance
    settings = {"true_cfg_scale": 2.0} if backbone.family == "flux" else {}
    expected, grid = run_pipeline(backbone, noise, [1.0, 0.4], negative_prompt=[NEGATIVE] * 2, **settings)
    negative = backbone.encode([NEGATIVE] * 2, negative=True)
    scale = settings.get("true_cfg_scale", teacher.scale)
    ours = af.sample(guided(backbone, negative, scale), noise, backbone.encode(PROMPTS), times=grid)
    assert_close(ours, expected)


def test_the_declared_defaults_are_those_of_the_installed_pipeline(backbone):
    arguments = inspect.signature(type(backbone.pipeline()).__call__).parameters
    teacher = backbone.teacher_guidance
    assert arguments[SCALE_ARGUMENT.get(backbone.family, "guidance_scale")].default == teacher.scale
    if backbone.family == "flux":
        assert arguments["guidance_scale"].default == teacher.embedded == backbone.embedded_guidance == 3.5
    else:
        assert teacher.embedded is None
    assert backbone.default_sequence_length == arguments["max_sequence_length"].default


@pytest.mark.parametrize("scale", [1.0, 3.5])
def test_guidance_is_linear_where_the_family_says_so(backbone, scale):
    """The loss op takes a linear guidance scale; where there is none it must not be used."""
    v, negative = draw(backbone, seed=1), draw(backbone, seed=2)
    combined, linear = backbone.guide(v, negative, scale), backbone.linear_guidance_scale(scale)
    assert (linear is None) == (backbone.family in NOT_LINEAR and scale != 1)
    if linear is not None:
        torch.testing.assert_close(combined, negative + linear * (v - negative), rtol=1e-5, atol=1e-5)
    else:
        on_the_line = negative + scale * (v - negative)
        assert (combined - on_the_line).abs().max() > 0.1


def test_rescaled_guidance_keeps_the_norm_of_the_conditional_velocity(backbone):
    if backbone.family not in NOT_LINEAR:
        pytest.skip("guided on a straight line")
    v, negative = draw(backbone, seed=1), draw(backbone, seed=2)
    combined = backbone.guide(v, negative, 4.0)
    if backbone.family == "qwen_image":
        # A token of the packed latents is a patch of 2 x 2 pixels with all channels.
        def norm(x):
            return x.square().unflatten(2, (-1, 2)).unflatten(4, (-1, 2)).sum((1, 3, 5)).sqrt()
    else:

        def norm(x):
            return x.norm(dim=-1)

    torch.testing.assert_close(norm(combined), norm(v), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(combined, v)


def test_embedded_guidance_reaches_the_network_and_is_refused_elsewhere(backbone):
    if backbone.family != "flux":
        with pytest.raises(ValueError, match="embedded_guidance= is for weights"):
            type(backbone)(backbone.transformer, embedded_guidance=3.5)
        return
    noise = draw(backbone)
    other = copy.copy(backbone)
    other.embedded_guidance = 6.0
    expected, grid = run_pipeline(backbone, noise, [1.0], guidance_scale=6.0)
    assert_close(af.sample(other, noise, backbone.encode(PROMPTS), times=grid), expected)
    assert (af.sample(backbone, noise, backbone.encode(PROMPTS), times=grid) - expected).abs().max() > 1e-3
