"""The site "projected": every family applies the shift behind its own text projection, for the length of a call."""

from __future__ import annotations

import copy

import pytest
import torch
from backbone_cases import PROMPTS, assert_close, count_hooks, draw, load_tiny
from torch import Tensor, nn

import apex_fast as af
from apex_fast.backbones.base import Backbone
from apex_fast.backbones.tiny import TINY_FAMILIES, tiny_pipeline
from apex_fast.condition import Condition, concatenate
from apex_fast.shift import SitedCondition

pytestmark = pytest.mark.usefixtures("one_thread")
TIMES = torch.tensor([0.9, 0.4])


@pytest.fixture(params=TINY_FAMILIES)
def backbone(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Backbone:
    return load_tiny(request.param, tmp_path_factory)


def projection(backbone: Backbone) -> nn.Module:
    return backbone.transformer.get_submodule(backbone.text_projection)


@torch.no_grad()
def by_hand(backbone: Backbone, x: Tensor, condition: Condition, scale: Tensor, bias: Tensor, kept: Tensor | None):
    """The same through a hook of the test's own; ``kept`` in the layout of what the projection returns."""

    def shift(module: nn.Module, arguments: tuple, output: Tensor) -> Tensor:
        shifted = scale * output + bias
        return shifted if kept is None else torch.where(kept.unsqueeze(-1), shifted, output)

    handle = projection(backbone).register_forward_hook(shift)
    try:
        return backbone(x, TIMES, condition)
    finally:
        handle.remove()


@torch.no_grad()
@pytest.mark.parametrize("mode", ("scalar", "diagonal"))
def test_the_shift_is_applied_behind_the_projection(backbone, mode):
    x, condition = draw(backbone), backbone.encode(PROMPTS)
    width = backbone.site_width("projected")
    if mode == "diagonal":
        shift = af.ConditionShift(mode, dim=width, site="projected", shift_pooled=False)
        shift.scale.copy_(torch.linspace(-1.5, -0.5, width))
    else:
        shift = af.ConditionShift(site="projected", shift_pooled=False)
    shifted = shift(condition)
    assert isinstance(shifted, SitedCondition) and len(shifted) == 2
    # Z-Image gets no padding, and what it pads itself it overwrites; in the others masked tokens stay.
    kept = None if backbone.family == "z_image" else condition.prompt_embeds_mask
    expected = by_hand(backbone, x, condition, shift.scale, shift.bias, kept)
    found = backbone(x, TIMES, shifted)
    assert_close(found, expected, 1e-5)
    plain, raw = backbone(x, TIMES, condition), backbone(x, TIMES, af.ConditionShift(shift_pooled=False)(condition))
    for other in (plain, raw):
        assert (found - other).abs().max() > 1e-3 * plain.abs().max()


@torch.no_grad()
def test_nothing_outlives_the_call(backbone):
    x, condition = draw(backbone), backbone.encode(PROMPTS)
    hooks, before = count_hooks(backbone), backbone(x, TIMES, condition)
    backbone(x, TIMES, af.ConditionShift(site="projected")(condition))
    with pytest.raises(ValueError, match="batch size"):
        backbone(x, TIMES[:1], af.ConditionShift(site="projected")(condition))
    assert count_hooks(backbone) == hooks
    assert torch.equal(backbone(x, TIMES, condition), before)


@torch.no_grad()
def test_no_shift_changes_nothing_and_pooled_embeddings_follow_their_setting(backbone):
    x, condition = draw(backbone), backbone.encode(PROMPTS)
    nothing = af.ConditionShift(scale=1.0, bias=0.0, site="projected")
    assert torch.equal(backbone(x, TIMES, nothing(condition)), backbone(x, TIMES, condition))
    if condition.pooled_prompt_embeds is None:
        return
    shifted, kept = (af.ConditionShift(site="projected", shift_pooled=pooled)(condition) for pooled in (True, False))
    torch.testing.assert_close(shifted.pooled_prompt_embeds, 0.5 - condition.pooled_prompt_embeds)
    assert kept.pooled_prompt_embeds is condition.pooled_prompt_embeds
    assert (backbone(x, TIMES, shifted) - backbone(x, TIMES, kept)).abs().max() > 0


@torch.no_grad()
def test_one_call_serves_shifted_and_unshifted_rows(backbone):
    """The joint schedule stacks them."""
    x, condition = draw(backbone), backbone.encode(PROMPTS)
    shifted = af.ConditionShift(site="projected")(condition)
    joined = concatenate([condition, shifted, condition])
    assert isinstance(joined, SitedCondition)
    parts = backbone(torch.cat([x] * 3), TIMES.repeat(3), joined).chunk(3)
    for part, alone in zip(parts, (condition, shifted, condition), strict=True):
        assert_close(part, backbone(x, TIMES, alone), 1e-4)


def gradients(backbone: Backbone, shift: af.ConditionShift, schedule: str) -> dict[str, Tensor]:
    objective = af.ApexObjective(shift, warmup_steps=0, ramp_steps=0)
    condition = backbone.encode(PROMPTS)
    generator = torch.Generator().manual_seed(1)
    objective.backward(backbone, draw(backbone), condition, step=0, schedule=schedule, generator=generator)
    named = [*backbone.transformer.named_parameters(), *shift.named_parameters()]
    found = {name: parameter.grad for name, parameter in named if parameter.grad is not None}
    for _, parameter in named:
        parameter.grad = None
    return found


@pytest.mark.parametrize("checkpointing", (False, True))
def test_every_schedule_gives_the_same_gradients_and_trains_the_shift(backbone, checkpointing):
    backbone = copy.deepcopy(backbone)
    backbone.transformer.requires_grad_(True)
    if checkpointing:
        backbone.enable_gradient_checkpointing()
    shift = af.ConditionShift(site="projected", trainable=True)
    expected = gradients(backbone, shift, "sequential")
    assert expected["scale"].abs() > 0 and expected["bias"].abs() > 0
    for schedule in ("joint", "retain"):
        found = gradients(backbone, shift, schedule)
        assert found.keys() == expected.keys()
        for name, gradient in expected.items():
            error = (found[name] - gradient).abs().max() / gradient.abs().max().clamp_min(1e-4)
            assert error < 2e-3, f"{schedule}: {name} differs by {error:.1e}"


def test_a_projection_that_an_adapter_wraps_is_found(backbone):
    peft = pytest.importorskip("peft")
    module = projection(backbone)
    linear = module[-1] if isinstance(module, nn.Sequential) else module
    if not isinstance(linear, nn.Linear):
        pytest.skip("SANA's site lies behind a norm, which has no adapter")
    backbone = copy.deepcopy(backbone)
    name = backbone.text_projection + (".1" if isinstance(module, nn.Sequential) else "")
    width = backbone.site_width("projected")
    backbone.transformer.add_adapter(peft.LoraConfig(r=2, target_modules=[name], init_lora_weights=False))
    assert backbone.site_width("projected") == width
    x, condition = draw(backbone), backbone.encode(PROMPTS)
    shift = af.ConditionShift(site="projected", shift_pooled=False)
    kept = None if backbone.family == "z_image" else condition.prompt_embeds_mask
    expected = by_hand(backbone, x, condition, shift.scale, shift.bias, kept)
    assert_close(backbone(x, TIMES, shift(condition)), expected, 1e-5)


# ---- what cannot follow the instruction says so


def test_another_network_cannot_read_an_unshifted_embedding():
    condition = Condition(torch.randn(2, 3, 4), torch.ones(2, 3, dtype=torch.bool))
    shifted = af.ConditionShift(site="projected")(condition)
    for read in (lambda: shifted.prompt_embeds, shifted.written):
        with pytest.raises(TypeError, match='site "projected".*ConditionShift\\(site="raw"\\)'):
            read()
    with pytest.raises(ValueError, match="pass an apex_fast.Condition"):
        af.ConditionShift(site="projected")(condition.prompt_embeds)


def test_a_sited_condition_moves_and_splits_as_a_condition():
    condition = Condition(torch.randn(2, 3, 4), torch.tensor([[1, 1, 0], [1, 0, 0]]), torch.randn(2, 5))
    shifted = af.ConditionShift(site="projected")(condition)
    halved = shifted.to(torch.bfloat16).index([1])
    assert isinstance(halved, SitedCondition) and len(halved) == 1 and halved.shift is shifted.shift
    assert halved.condition.prompt_embeds.dtype == torch.bfloat16
    joined = Condition.cat([condition, shifted]).index([1, 2])
    assert joined.shifted_tokens().tolist() == [[False] * 3, [True, True, False]]
    with pytest.raises(ValueError, match="one condition shift"):
        Condition.cat([shifted, af.ConditionShift(site="projected")(condition)])


def test_unknown_sites_are_refused(backbone):
    with pytest.raises(ValueError, match="raw, projected, got 'keys'"):
        af.ConditionShift(site="keys")
    with pytest.raises(ValueError, match="raw, projected, got 'keys'"):
        backbone.site_width("keys")


@torch.no_grad()
def test_a_diagonal_has_the_width_of_its_site(backbone):
    wide = type(backbone)(tiny_pipeline(backbone.family, text_width=48).transformer, max_sequence_length=16)
    assert (wide.site_width("raw"), wide.site_width("projected")) == (48, 32)
    condition = Condition(torch.randn(2, wide.token_count, 48), pooled_prompt_embeds=pooled_of(backbone, wide))
    shift = af.ConditionShift("diagonal", dim=32, site="projected", shift_pooled=False)
    x = torch.randn(2, wide.latent_channels, 8, 8)
    assert wide(x, TIMES, shift(condition)).isfinite().all()


def pooled_of(backbone: Backbone, wide: Backbone) -> Tensor | None:
    pooled = backbone.encode(PROMPTS).pooled_prompt_embeds
    return None if pooled is None else torch.randn(2, wide.transformer.config.pooled_projection_dim)


def test_a_projection_that_does_not_run_is_noticed(backbone):
    backbone = copy.deepcopy(backbone)
    inner, module = copy.deepcopy(projection(backbone)), projection(backbone)
    module.__class__ = type("Bypassed", (type(module),), {"__call__": lambda self, *a: inner(*a)})
    with pytest.raises(RuntimeError, match="ran 0 times instead of once"):
        backbone(draw(backbone), TIMES, af.ConditionShift(site="projected")(backbone.encode(PROMPTS)))
