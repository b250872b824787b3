from __future__ import annotations

import pytest
import torch

from apex_fast import Condition, ConditionShift


def test_scalar_shift_of_a_tensor():
    c = torch.randn(3, 5)
    torch.testing.assert_close(ConditionShift()(c), -c + 0.5)
    torch.testing.assert_close(ConditionShift(scale=2.0, bias=-1.0)(c), 2 * c - 1)


def test_masked_tokens_stay_as_they_are():
    c = Condition(torch.randn(2, 3, 4), torch.tensor([[1, 1, 0], [1, 0, 0]]))
    shifted = ConditionShift()(c)
    keep = c.prompt_embeds_mask.bool()
    assert torch.equal(shifted.prompt_embeds[~keep], c.prompt_embeds[~keep])
    torch.testing.assert_close(shifted.prompt_embeds[keep], 0.5 - c.prompt_embeds[keep])
    assert shifted.prompt_embeds_mask is c.prompt_embeds_mask


def test_pooled_embedding_is_shifted_unless_told_otherwise():
    c = Condition(torch.randn(2, 3, 4), pooled_prompt_embeds=torch.randn(2, 6))
    torch.testing.assert_close(ConditionShift()(c).pooled_prompt_embeds, 0.5 - c.pooled_prompt_embeds)
    assert ConditionShift(shift_pooled=False)(c).pooled_prompt_embeds is c.pooled_prompt_embeds


def test_diagonal_has_a_number_per_channel():
    shift = ConditionShift("diagonal", dim=4, pooled_dim=6)
    with torch.no_grad():
        shift.scale.copy_(torch.arange(4.0))
        shift.pooled_bias.copy_(torch.arange(6.0))
    c = Condition(torch.randn(2, 3, 4), pooled_prompt_embeds=torch.randn(2, 6))
    shifted = shift(c)
    torch.testing.assert_close(shifted.prompt_embeds, c.prompt_embeds * torch.arange(4.0) + 0.5)
    torch.testing.assert_close(shifted.pooled_prompt_embeds, -c.pooled_prompt_embeds + torch.arange(6.0))


def test_identity_is_exact():
    c = torch.randn(4, 3, 5)
    assert torch.equal(ConditionShift(scale=1.0, bias=0.0)(c), c)


@pytest.mark.parametrize(
    ("arguments", "trains_scale", "trains_bias"),
    [
        ({}, False, False),
        ({"trainable": True}, True, True),
        ({"trainable": True, "train_bias": False}, True, False),
        ({"train_bias": True}, False, True),
    ],
)
def test_scale_and_bias_are_frozen_one_by_one(arguments, trains_scale, trains_bias):
    shift = ConditionShift(**arguments)
    assert (shift.scale.requires_grad, shift.bias.requires_grad) == (trains_scale, trains_bias)
    c = torch.randn(2, 3, requires_grad=True)
    shift(c).sum().backward()
    assert (shift.scale.grad is not None, shift.bias.grad is not None) == (trains_scale, trains_bias)
    if trains_scale:
        torch.testing.assert_close(shift.scale.grad, c.detach().sum())
    if trains_bias:
        torch.testing.assert_close(shift.bias.grad, torch.tensor(6.0))


def test_state_dict_restores_a_shift():
    trained = ConditionShift("diagonal", scale=0.3, bias=0.7, dim=2)
    restored = ConditionShift("diagonal", dim=2)
    restored.load_state_dict(trained.state_dict())
    c = torch.randn(3, 2)
    assert torch.equal(restored(c), trained(c))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mode": "lowrank"}, '"scalar" or "diagonal", got \'lowrank\''),
        ({"mode": "diagonal"}, "needs dim"),
        ({"dim": 4}, 'belong to mode "diagonal"'),
    ],
)
def test_settings_that_do_not_fit_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        ConditionShift(**arguments)


def test_conditions_that_do_not_fit_are_refused():
    with pytest.raises(TypeError, match="shift embeddings, not labels"):
        ConditionShift()(torch.tensor([1, 2]))
    with pytest.raises(TypeError, match="expected a Tensor or a Condition, got list"):
        ConditionShift()([1.0])
    with pytest.raises(ValueError, match="has 3 channels but the diagonal was made for 4"):
        ConditionShift("diagonal", dim=4)(torch.zeros(2, 3))
    with pytest.raises(ValueError, match=r'on meta but condition on cpu; move it once: shift.to\("cpu"\)'):
        ConditionShift().to("meta")(torch.zeros(2, 3))
    with pytest.raises(ValueError, match=r"needs pooled_dim .*\(here 5\)"):
        ConditionShift("diagonal", dim=4)(Condition(torch.zeros(2, 3, 4), pooled_prompt_embeds=torch.zeros(2, 5)))


def test_repr_shows_what_it_does():
    assert "mode=scalar, scale=-1, bias=0.5" in repr(ConditionShift())
    assert "scale=[7]" in repr(ConditionShift("diagonal", dim=7))
