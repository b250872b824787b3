from __future__ import annotations

import pytest
import torch

from apex_fast import Condition
from apex_fast.condition import batch_size, concatenate, condition_tensors, expand_batch


def condition(batch: int = 2, tokens: int = 3, mask: bool = True, pooled: bool = True) -> Condition:
    return Condition(
        torch.randn(batch, tokens, 4),
        torch.ones(batch, tokens, dtype=torch.bool) if mask else None,
        torch.randn(batch, 5) if pooled else None,
    )


def test_length_device_and_batch_size():
    c = condition(batch=3)
    assert len(c) == c.batch_size == batch_size(c) == 3
    assert c.device == torch.device("cpu")
    assert batch_size(torch.zeros(7, 2)) == 7


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((torch.zeros(2, 3, 4, dtype=torch.long),), TypeError, "prompt_embeds must be a floating-point tensor"),
        ((torch.zeros(2, 4),), ValueError, r"\[batch, tokens, channels\], got \[2, 4\]"),
        ((torch.zeros(2, 3, 4), torch.ones(2, 3)), TypeError, "prompt_embeds_mask must be a bool or integer"),
        ((torch.zeros(2, 3, 4), torch.ones(2, 4, dtype=torch.bool)), ValueError, r"= \[2, 3\], got \[2, 4\]"),
        ((torch.zeros(2, 3, 4), None, torch.zeros(3, 5)), ValueError, r"with batch 2, got \[3, 5\]"),
        ((torch.zeros(2, 3, 4), None, torch.zeros(2, 5, dtype=torch.int)), TypeError, "pooled_prompt_embeds must be"),
    ],
)
def test_fields_that_do_not_fit_are_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        Condition(*arguments)


def test_to_casts_embeddings_and_leaves_the_mask():
    c = condition()
    half = c.to(torch.bfloat16)
    assert half.prompt_embeds.dtype == half.pooled_prompt_embeds.dtype == torch.bfloat16
    assert half.prompt_embeds_mask.dtype == torch.bool
    assert c.to("cpu", torch.float64).prompt_embeds.dtype == torch.float64
    assert c.prompt_embeds.dtype == torch.float32


def test_index_keeps_the_batch_axis():
    c = condition(batch=4)
    for picked in ([2, 0], torch.tensor([2, 0])):
        some = c.index(picked)
        assert torch.equal(some.prompt_embeds, c.prompt_embeds[[2, 0]])
        assert torch.equal(some.pooled_prompt_embeds, c.pooled_prompt_embeds[[2, 0]])
        assert some.prompt_embeds_mask.shape == (2, 3)
    assert len(c.index(slice(1, 4))) == 3
    with pytest.raises(TypeError, match=r"pass a slice or a list, such as \[1\]"):
        c.index(1)


def test_detach_cuts_history():
    leaf = torch.randn(1, 2, 3, requires_grad=True)
    assert not Condition(leaf * 2).detach().prompt_embeds.requires_grad


def test_cat_pads_with_masked_tokens():
    short, long = condition(batch=1, tokens=2, mask=False), condition(batch=2, tokens=5, mask=False)
    joined = Condition.cat([short, long])
    assert joined.prompt_embeds.shape == (3, 5, 4)
    assert torch.equal(joined.prompt_embeds[0, :2], short.prompt_embeds[0])
    assert joined.prompt_embeds_mask.dtype == torch.bool
    assert joined.prompt_embeds_mask.tolist() == [[True, True, False, False, False], [True] * 5, [True] * 5]
    assert joined.pooled_prompt_embeds.shape == (3, 5)


def test_cat_needs_no_mask_where_lengths_agree():
    assert Condition.cat([condition(mask=False), condition(mask=False)]).prompt_embeds_mask is None


def test_cat_makes_the_missing_mask_and_keeps_integers():
    masked = Condition(torch.randn(1, 3, 4), torch.tensor([[1, 1, 0]]))
    joined = Condition.cat([masked, Condition(torch.randn(1, 3, 4))])
    assert joined.prompt_embeds_mask.dtype == torch.int64
    assert joined.prompt_embeds_mask.tolist() == [[1, 1, 0], [1, 1, 1]]


def test_cat_refuses_what_does_not_join():
    with pytest.raises(ValueError, match="at least one"):
        Condition.cat([])
    with pytest.raises(ValueError, match="all or none"):
        Condition.cat([condition(), condition(pooled=False)])
    with pytest.raises(ValueError, match=r"agree in channels, got \[4, 6\]"):
        Condition.cat([condition(pooled=False), Condition(torch.randn(1, 3, 6))])


def test_concatenate_takes_tensors_or_conditions_but_no_mixture():
    assert concatenate([torch.zeros(1, 2), torch.ones(2, 2)]).shape == (3, 2)
    assert isinstance(concatenate([condition(), condition()]), Condition)
    with pytest.raises(TypeError, match="all be Tensors or all Conditions"):
        concatenate([condition(), torch.zeros(2, 3, 4)])
    with pytest.raises(ValueError, match=r"got \[\[2\], \[3\]\]; apex_fast.Condition pads"):
        concatenate([torch.zeros(1, 2), torch.zeros(1, 3)])


def test_expand_batch_repeats_one_and_refuses_other_sizes():
    one = condition(batch=1)
    three = expand_batch(one, 3)
    assert len(three) == 3
    assert torch.equal(three.prompt_embeds[2], one.prompt_embeds[0])
    assert three.prompt_embeds_mask.shape == (3, 3)
    assert expand_batch(one, 1) is one
    assert expand_batch(torch.ones(1, 2), 4).shape == (4, 2)
    with pytest.raises(ValueError, match=r"negative_condition must have batch size 3 \(or 1.*got 2"):
        expand_batch(condition(batch=2), 3, "negative_condition")


def test_what_is_no_condition_is_named():
    with pytest.raises(TypeError, match="a Tensor or an apex_fast.Condition, got list"):
        condition_tensors([1.0])
    with pytest.raises(ValueError, match="batch axis"):
        batch_size(torch.tensor(1.0))
