"""What the probe reads out of a running network: every softmax attention of every family, and which tokens are text."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from backbone_cases import PROMPTS, count_hooks, draw, load_tiny
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from apex_fast.backbones.base import Backbone
from apex_fast.backbones.tiny import TINY_FAMILIES
from apex_fast.condition import Condition
from apex_fast.probing import measures
from apex_fast.probing.capture import AttentionCapture, LayerCall, Tokens

pytestmark = pytest.mark.usefixtures("one_thread")
TIMES = torch.tensor([0.9, 0.4])
ALL = 10_000


@pytest.fixture(params=TINY_FAMILIES)
def backbone(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Backbone:
    return load_tiny(request.param, tmp_path_factory)


@torch.no_grad()
def capture(backbone: Backbone, x: Tensor, condition: Condition, **options: Any) -> tuple[Tensor, list[LayerCall]]:
    calls: list[LayerCall] = []
    with AttentionCapture(backbone, Tokens.of(backbone, condition, *x.shape[2:]), calls.append, **options):
        velocity = backbone(x, TIMES, condition)
    return velocity, calls


def test_every_attention_is_seen_once_and_changes_nothing(backbone):
    x, condition, hooks = draw(backbone), backbone.encode(PROMPTS), count_hooks(backbone)
    velocity, calls = capture(backbone, x, condition)
    layers = [name for name, module in backbone.transformer.named_modules() if hasattr(module, "processor")]
    assert sorted(call.layer for call in calls) == sorted(layers)
    assert torch.equal(velocity, backbone(x, TIMES, condition))
    assert count_hooks(backbone) == hooks
    kinds = {call.kind for call in calls}
    expected = {
        "sana": {"linear", "cross"},
        "qwen_image": {"joint"},
        "flux": {"joint"},
        "stable_diffusion_3": {"joint", "image"},
        "lumina2": {"joint", "text", "image"},
        "z_image": {"joint", "text", "image"},
    }
    assert kinds == expected[backbone.family]


def test_the_text_is_where_the_family_puts_it(backbone):
    """One token of one prompt changes: so does its key in the first layer that has text, and no other."""
    x, condition = draw(backbone), backbone.encode(PROMPTS)
    kept = Tokens.of(backbone, condition, *x.shape[2:]).kept
    assert kept.sum(1).unique().numel() == 2 or backbone.family == "stable_diffusion_3"
    for sample in (0, 1):
        token = int(kept[sample].nonzero()[-1])
        embeds = condition.prompt_embeds.clone()
        embeds[sample, token] = embeds[sample, token].flip(0) + 0.3
        other = Condition(embeds, condition.prompt_embeds_mask, condition.pooled_prompt_embeds)
        real, changed = (
            next(c for c in capture(backbone, x, given)[1] if c.kind in ("cross", "joint", "text"))
            for given in (condition, other)
        )
        moved = (real.token_keys != changed.token_keys).any(2) & kept
        assert moved.nonzero().tolist() == [[sample, token]]
        # As many keys of the whole sequence as the token has; Z-Image's own padding is overwritten by the network.
        assert int((real.keys != changed.keys).any(3).any(1).sum()) == 1


def test_the_picture_is_where_the_family_puts_it(backbone):
    """Another picture leaves the text's keys in the first layer alone, and changes every query that is compared."""
    condition, first, second = backbone.encode(PROMPTS), draw(backbone, seed=0), draw(backbone, seed=1)
    calls = [capture(backbone, x, condition, queries=ALL)[1] for x in (first, second)]
    for real, changed in zip(*calls, strict=True):
        if real.kind in ("joint", "cross"):
            tokens = Tokens.of(backbone, condition, *first.shape[2:])
            assert real.queries.shape[2] == tokens.image
            assert (real.queries != changed.queries).any(3).all()
            assert torch.equal(real.token_keys[tokens.kept], changed.token_keys[tokens.kept])
            return
    raise AssertionError("no layer with both")


class Recorded(TorchFunctionMode):
    """Weights of every softmax, from torch itself: with the identity in place of the values it returns them."""

    def __init__(self) -> None:
        super().__init__()
        self.weights: list[tuple[Tensor, Tensor]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is functional.scaled_dot_product_attention:
            query, key, value = (*args, *(kwargs[n] for n in ("query", "key", "value")[len(args) :]))[:3]
            options = {name: v for name, v in kwargs.items() if name not in ("query", "key", "value")}
            identity = torch.eye(key.shape[2]).expand(*key.shape[:2], -1, -1)
            self.weights.append((query, func(query, key, identity, **options)))
        return func(*args, **kwargs)


@torch.no_grad()
def test_weights_are_those_of_the_network_masks_included(backbone):
    x, condition = draw(backbone), backbone.encode(PROMPTS)
    with Recorded() as recorded:
        _, calls = capture(backbone, x, condition, queries=7)
    softmax = [call for call in calls if call.kind != "linear"]
    assert len(softmax) == len(recorded.weights)
    for call, (queries, weights) in zip(softmax, recorded.weights, strict=True):
        found = measures.log_weights(call.queries, call.keys, call.bias, call.scale).exp()
        assert found.shape[2] == 7
        for sample, place in call.queries_kept.nonzero().tolist():
            same = (queries[sample] - call.queries[sample, :, place : place + 1]).abs().sum((0, 2)) == 0
            assert same.sum() == 1
            expected = weights[sample][:, same].squeeze(1)
            torch.testing.assert_close(found[sample, :, place], expected, atol=1e-6, rtol=1e-4)


def test_the_chosen_queries_repeat_and_depend_on_the_seed(backbone):
    x, condition = draw(backbone), backbone.encode(PROMPTS)
    first, again, other = (
        next(c for c in capture(backbone, x, condition, queries=3, seed=seed)[1] if c.queries is not None)
        for seed in (0, 0, 1)
    )
    assert torch.equal(first.queries, again.queries)
    assert not torch.equal(first.queries, other.queries)
    assert first.queries_kept.all()


def test_an_attention_that_cannot_be_read_is_an_error(tmp_path_factory):
    backbone = load_tiny("qwen_image", tmp_path_factory)
    x, condition, hooks = draw(backbone), backbone.encode(PROMPTS), count_hooks(backbone)
    attention = backbone.transformer.transformer_blocks[0].attn
    processor = attention.processor

    def elsewhere(attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor, **_: Any) -> Any:
        return hidden_states, encoder_hidden_states

    try:
        attention.processor = elsewhere
        with pytest.raises(RuntimeError, match="transformer_blocks.0.attn ran 0 calls .* attention backend"):
            capture(backbone, x, condition)
    finally:
        attention.processor = processor
    with (
        pytest.raises(RuntimeError, match="attends to .* keys, and a layer of qwen_image was expected to have"),
        torch.no_grad(),
        AttentionCapture(backbone, Tokens(torch.ones(2, 3, dtype=torch.bool), 5), lambda call: None),
    ):
        backbone(x, TIMES, condition)
    assert count_hooks(backbone) == hooks


def test_compiled_blocks_are_read_too(tmp_path_factory):
    import copy

    backbone = copy.deepcopy(load_tiny("qwen_image", tmp_path_factory))
    x, condition = draw(backbone), backbone.encode(PROMPTS)
    plain, calls = capture(backbone, x, condition)
    backbone.compile_blocks(backend="eager")
    compiled, seen = capture(backbone, x, condition)
    assert [call.layer for call in seen] == [call.layer for call in calls]
    assert torch.equal(plain, compiled)


# ---- the measures


def test_padding_counts_in_no_measure():
    generator = torch.Generator().manual_seed(0)
    real, shifted = torch.randn(2, 2, 5, 3, generator=generator)
    kept = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]).bool()
    broken = real.clone(), shifted.clone()
    broken[0][0, 3:], broken[1][0, 3:] = math.inf, math.nan
    for measure in (measures.token_change, measures.common_share):
        expected = [measure(real[:1, :3], shifted[:1, :3], kept[:1, :3]), measure(real[1:], shifted[1:], kept[1:])]
        torch.testing.assert_close(measure(*broken, kept), torch.cat(expected))


def test_common_share_tells_a_constant_from_what_cancels():
    real = torch.zeros(3, 4, 2)
    shifted = torch.tensor([1.0, 2.0]).expand(3, 4, 2).clone()
    shifted[1, ::2] *= -1  # the mean over tokens is zero
    shifted[2] = 0  # nothing changes
    share = measures.common_share(real, shifted, torch.ones(3, 4, dtype=torch.bool))
    torch.testing.assert_close(share, torch.tensor([1.0, 0.0, math.nan]), equal_nan=True)


def test_symmetric_kl_and_entropy_against_their_formulas():
    generator = torch.Generator().manual_seed(0)
    p, q = torch.randn(2, 2, 3, 5, 7, generator=generator, dtype=torch.float64).softmax(-1)
    p[..., 0], q[..., 0] = 0, 0  # a key that a mask leaves out
    p, q = p / p.sum(-1, keepdim=True), q / q.sum(-1, keepdim=True)
    counted = torch.ones(2, 5, dtype=torch.bool)
    counted[1, 2:] = False
    terms = torch.where(p > 0, p * (p / q).log(), 0) + torch.where(q > 0, q * (q / p).log(), 0)
    rows = 0.5 * terms.sum(-1).mean(1)
    expected = torch.stack([rows[0].mean(), rows[1, :2].mean()])
    torch.testing.assert_close(measures.symmetric_kl(p.log(), q.log(), counted), expected)
    assert (measures.symmetric_kl(p.log(), p.log(), counted) == 0).all()
    rows = torch.where(p > 0, -p * p.log(), 0).sum(-1).mean(1)
    torch.testing.assert_close(measures.entropy(p.log(), counted), torch.stack([rows[0].mean(), rows[1, :2].mean()]))


def test_velocity_change_of_a_known_pair():
    real = torch.tensor([3.0, 4.0]).view(1, 2, 1, 1)
    change, cosine, norm = measures.velocity_change(real, -2 * real)
    assert (change.item(), cosine.item(), norm.item()) == pytest.approx((3.0, -1.0, 2.0))
