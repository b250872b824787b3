"""apex_fast.fusion: fused ops inside unmodified diffusers networks give the same results and gradients."""

from __future__ import annotations

import copy
from collections import Counter

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("diffusers", reason="diffusers is not installed: pip install 'apex_fast[train]'")

from small_networks import TextNetwork

from apex_fast import ApexObjective, Backbone, Condition, ConditionShift, Velocities, fusion
from apex_fast.backbones.qwen_image import QwenImageBackbone
from apex_fast.backbones.sana import SanaBackbone
from apex_fast.backbones.tiny import tiny_pipeline
from apex_fast.shift import ShiftedCondition

FAMILIES = {"sana": SanaBackbone, "qwen_image": QwenImageBackbone}
every_family = pytest.mark.parametrize("family", FAMILIES)
TEXT, TOKENS = 32, 7


def make(family: str, dtype: torch.dtype = torch.float32) -> Backbone:
    transformer = tiny_pipeline(family).transformer.to(dtype).train()
    return FAMILIES[family](transformer, max_sequence_length=TOKENS)


def make_condition(seed: int = 0, dtype: torch.dtype = torch.float32, masked: bool = True) -> Condition:
    generator = torch.Generator().manual_seed(seed)
    mask = torch.ones(2, TOKENS, dtype=torch.bool)
    mask[0, 5:] = False
    return Condition(torch.randn(2, TOKENS, TEXT, generator=generator).to(dtype), mask if masked else None)


def make_x(backbone: Backbone, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, backbone.latent_channels, 8, 8, generator=generator)


def make_shift(mode: str = "scalar") -> ConditionShift:
    shift = ConditionShift(mode=mode, dim=TEXT if mode == "diagonal" else None, trainable=True)
    with torch.no_grad():
        shift.scale.add_(torch.linspace(0.0, 0.3, TEXT) if mode == "diagonal" else 0.1)
    return shift


def gradients(*modules: nn.Module) -> dict[str, Tensor]:
    found = {}
    for index, module in enumerate(modules):
        for name, parameter in module.named_parameters():
            if parameter.grad is not None:
                found[f"{index}.{name}"] = parameter.grad
                parameter.grad = None
    return found


def step(objective: ApexObjective, velocities, backbone: Backbone, **options) -> dict[str, float]:
    losses = objective.backward(
        velocities,
        make_x(backbone),
        make_condition(masked=options.pop("masked", True)),
        step=0,
        generator=torch.Generator().manual_seed(3),
        **options,
    )
    return {name: value.item() for name, value in losses.metrics.items()}


def assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor], tolerance: float = 1e-4) -> None:
    assert ours.keys() == theirs.keys() and ours
    for name, expected in theirs.items():
        largest = max(expected.abs().max().item(), 1e-4)
        error = (ours[name] - expected).abs().max().item() / largest
        assert error < tolerance, f"gradient of {name}: relative error {error:.1e}"


class Calls(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names[func.name().removeprefix("apex_fast::")] += 1
        return func(*args, **(kwargs or {}))


# ---- results and gradients


@every_family
@pytest.mark.parametrize("mode", ("scalar", "diagonal"))
@pytest.mark.parametrize("masked", (True, False))
@pytest.mark.parametrize("schedule", ("sequential", "retain", "joint"))
def test_a_training_step(family: str, schedule: str, masked: bool, mode: str) -> None:
    backbone, shift = make(family), make_shift(mode)
    objective = ApexObjective(shift=shift, warmup_steps=0, ramp_steps=0)
    before = step(objective, backbone, backbone, schedule=schedule, masked=masked)
    expected = gradients(backbone, shift)
    with fusion.fused(backbone, shift) as parts:
        after = step(objective, backbone, backbone, schedule=schedule, masked=masked)
    takes_shift = not (family == "sana" and mode == "diagonal")
    assert parts.parts == (("text path",) if takes_shift else ()) + ("velocity head",)
    assert after == pytest.approx(before, rel=1e-4, abs=1e-6)
    assert {"1.scale", "1.bias"} <= expected.keys()
    assert_same(gradients(backbone, shift), expected)


@every_family
def test_half_precision_stays_as_close_to_the_truth(family: str) -> None:
    shift, t = make_shift(), torch.tensor([0.3, 0.8])

    def velocity(backbone: Backbone, fused: bool) -> Tensor:
        x, condition = make_x(backbone), make_condition()
        with torch.no_grad():
            if not fused:
                return backbone(x, t, shift(condition)).double()
            with fusion.fused(backbone, shift):
                return backbone(x, t, shift(condition)).double()

    truth = velocity(make(family, torch.float64), fused=False)
    half = make(family, torch.bfloat16)
    ours, plain = ((velocity(half, fused) - truth).abs().mean().item() for fused in (True, False))
    assert ours <= 1.5 * plain


@every_family
def test_under_gradient_checkpointing(family: str) -> None:
    backbone, shift = make(family), make_shift()
    objective = ApexObjective(shift=shift, warmup_steps=0, ramp_steps=0)
    step(objective, backbone, backbone)
    expected = gradients(backbone, shift)
    backbone.enable_gradient_checkpointing()
    with fusion.fused(backbone, shift):
        step(objective, backbone, backbone)
    assert_same(gradients(backbone, shift), expected)


@every_family
def test_lora(family: str) -> None:
    """The adapters' gradients, and an adapter on the very layers that are fused."""
    pytest.importorskip("peft", reason="peft is not installed: pip install 'apex_fast[train]'")
    from apex_fast.lora import LoraSettings, add_lora, lora_velocities

    first = "caption_projection.linear_1" if family == "sana" else "txt_in"
    for targets in (None, ("to_q", "proj_out", first)):
        backbone, shift = make(family), make_shift()
        add_lora(backbone, LoraSettings(rank=2, target_modules=targets), seed=0)
        with torch.no_grad():
            for name, parameter in backbone.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(std=0.1, generator=torch.Generator().manual_seed(len(name)))
        velocities = lora_velocities(backbone)
        objective = ApexObjective(shift=shift, warmup_steps=0, ramp_steps=0)
        step(objective, velocities, backbone)
        expected = gradients(backbone, shift)
        with fusion.fused(backbone, shift):
            step(objective, velocities, backbone)
        assert all("lora" in name or name.startswith("1.") for name in expected)
        assert_same(gradients(backbone, shift), expected)


# ---- what is written and kept


@every_family
def test_the_shifted_condition_is_not_written(family: str) -> None:
    backbone, shift = make(family), make_shift()
    x, t, condition = make_x(backbone), torch.tensor([0.3, 0.8]), make_condition()
    op = "projected_condition_shift" if family == "sana" else "condition_shift_rms_norm"
    with fusion.fused(backbone, shift), Calls() as calls:
        backbone(x, t, shift(condition))
    assert calls.names["condition_shift"] == 0 and calls.names[op] == 1 and calls.names["velocity_head"] == 1
    with Calls() as calls:
        backbone(x, t, shift(condition))
    assert calls.names["condition_shift"] == 1 and calls.names[op] == 0


@every_family
def test_the_head_keeps_hidden_and_its_statistics(family: str) -> None:
    backbone = make(family)
    x, t, condition = make_x(backbone), torch.tensor([0.3, 0.8]), make_condition()
    saved = {}
    for fused in (False, True):
        sizes: list[int] = []
        seen: set[int] = set()

        def pack(value: Tensor, sizes=sizes, seen=seen) -> Tensor:
            if value.data_ptr() not in seen:
                seen.add(value.data_ptr())
                sizes.append(value.numel() * value.element_size())
            return value

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
            if fused:
                with fusion.fused(backbone):
                    backbone(x, t, condition)
            else:
                backbone(x, t, condition)
        saved[fused] = sum(sizes)
    width = backbone.transformer.proj_out.in_features
    tokens = 2 * (8 // backbone.patch) ** 2
    # the norm that the gradient of its scale needs, and the modulated state that the projection's needs
    assert saved[False] - saved[True] >= 2 * 4 * tokens * width - 2 * 4 * width, "all but the shift [B, D]"


# ---- the context


@every_family
def test_nothing_stays_behind(family: str) -> None:
    backbone, shift = make(family), make_shift()

    def state() -> list:
        modules = [*backbone.modules(), shift]
        return [(type(m), sorted(k for k in m.__dict__ if k != "_backward_hooks"), m.forward.__func__) for m in modules]

    before, keys = state(), list(backbone.state_dict())
    with fusion.fused(backbone, shift):
        assert list(backbone.state_dict()) == keys and [type(m) for m in (*backbone.modules(), shift)] == [
            entry[0] for entry in before
        ]
        assert isinstance(shift(make_condition()), ShiftedCondition)
    assert state() == before
    with pytest.raises(KeyError), fusion.fused(backbone, shift):
        raise KeyError
    assert state() == before and backbone.fusion is None
    assert type(shift(make_condition())) is Condition


def test_refusals() -> None:
    backbone, shift = make("sana"), make_shift()
    with (
        pytest.raises(TypeError, match=r"fused: expected an apex_fast.Backbone, got Linear"),
        fusion.fused(nn.Linear(2, 2)),
    ):
        pass
    backbone.family = "flux"
    with pytest.raises(ValueError, match="fused: no part of a flux network is fused, only of sana, qwen_image"):
        with fusion.fused(backbone, shift):
            pass
    del backbone.family
    with fusion.fused(backbone, shift):
        for again in ((backbone, None), (make("sana"), shift)):
            with pytest.raises(RuntimeError, match="fused already; leave that context first"), fusion.fused(*again):
                pass


@every_family
def test_parts_with_hooks_are_left_alone(family: str) -> None:
    backbone, shift = make(family), make_shift()
    seen: list[type] = []
    handle = backbone.transformer.proj_out.register_forward_pre_hook(lambda m, args: seen.append(type(args[0])))
    with fusion.fused(backbone, shift) as parts:
        backbone(make_x(backbone), torch.tensor([0.3, 0.8]), make_condition())
    handle.remove()
    assert parts.parts == ("text path",) and seen == [Tensor]


@every_family
def test_autocast_has_the_dtypes_of_the_network_itself(family: str) -> None:
    backbone, shift = make(family), make_shift()
    x, t, condition = make_x(backbone), torch.tensor([0.3, 0.8]), make_condition()
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        plain = backbone(x, t, shift(condition))
        with fusion.fused(backbone, shift):
            ours = backbone(x, t, shift(condition))
    assert ours.dtype == plain.dtype
    torch.testing.assert_close(ours.float(), plain.float(), rtol=0.1, atol=0.1 * plain.abs().max().item())


def test_a_copy_made_inside_stands_on_its_own() -> None:
    backbone, shift = make("sana"), make_shift()
    x, t, condition = make_x(backbone), torch.tensor([0.3, 0.8]), make_condition()
    with torch.no_grad():
        with fusion.fused(backbone, shift):
            frozen = Velocities.from_module(backbone).real
            expected = frozen(x, t, condition)
            for parameter in backbone.parameters():
                parameter.zero_()
            torch.testing.assert_close(
                frozen(x, t, shift(condition)), frozen(x, t, ConditionShift.forward(shift, condition))
            )
        torch.testing.assert_close(frozen(x, t, condition), expected)
        assert expected.any() and copy.deepcopy(frozen)(x, t, condition).any()


@pytest.mark.parametrize("change", ("none", "in place", "new"))
def test_row_sums_follow_the_weights(change: str) -> None:
    backbone, shift = make("sana"), make_shift()
    backbone.requires_grad_(False)
    linear = backbone.transformer.caption_projection.linear_1
    x, t, condition = make_x(backbone), torch.tensor([0.3, 0.8]), make_condition()
    with fusion.fused(backbone, shift), torch.no_grad():
        backbone(x, t, shift(condition))
        if change == "in place":
            linear.weight.add_(0.05)
        elif change == "new":
            linear.weight = nn.Parameter(linear.weight + 0.05, requires_grad=False)
        ours = backbone(x, t, shift(condition))
        plain = backbone(x, t, ConditionShift.forward(shift, condition))
    torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-5)


# ---- the condition that is not written


def lazy(shift: ConditionShift, condition: Condition) -> ShiftedCondition:
    return ShiftedCondition(condition, shift)


def test_an_unwritten_condition_is_a_condition_to_every_network() -> None:
    shift = make_shift()
    condition = Condition(torch.randn(2, 3, 4), torch.tensor([[1, 1, 0], [1, 0, 0]]), torch.randn(2, 5))
    ours, written = lazy(shift, condition), shift(condition)
    for name in ("prompt_embeds", "prompt_embeds_mask", "pooled_prompt_embeds"):
        assert torch.equal(getattr(ours, name), getattr(written, name))
    assert isinstance(ours, Condition) and len(ours) == 2 and ours.device == condition.device
    assert type(ours.index([1])) is Condition and torch.equal(ours.index([1]).prompt_embeds, written.prompt_embeds[1:])
    assert not ours.detach().prompt_embeds.requires_grad and ours.to(torch.float64).prompt_embeds.dtype == torch.float64
    network = TextNetwork(pooled_dim=5)
    x, t = torch.randn(2, 2, 4, 4), torch.tensor([0.2, 0.7])
    assert torch.equal(network(x, t, ours), network(x, t, written))
    assert condition.written() is condition


def test_joined_conditions_stay_unwritten_and_know_their_tokens() -> None:
    shift = make_shift()
    first, second = make_condition(0), Condition(torch.randn(2, TOKENS + 2, TEXT))
    joined = Condition.cat([first, lazy(shift, first), lazy(shift, second), second])
    assert isinstance(joined, ShiftedCondition)
    expected = Condition.cat([first, shift(first), shift(second), second])
    assert torch.equal(joined.prompt_embeds, expected.prompt_embeds)
    assert torch.equal(joined.prompt_embeds_mask, expected.prompt_embeds_mask)
    again = Condition.cat([joined, first])
    assert torch.equal(again.prompt_embeds[:8], expected.prompt_embeds)
    other = Condition.cat([lazy(shift, first), lazy(make_shift(), first)])
    assert type(other) is Condition
    pooled = Condition(first.prompt_embeds, None, torch.randn(2, 3))
    assert type(Condition.cat([pooled, lazy(shift, pooled)])) is Condition


def test_a_fused_shift_refuses_what_it_always_refused() -> None:
    backbone, shift = make("qwen_image"), make_shift("diagonal")
    with fusion.fused(backbone, shift):
        with pytest.raises(ValueError, match="prompt_embeds has 4 channels but the diagonal was made for 32"):
            shift(Condition(torch.randn(2, 3, 4)))
        assert torch.equal(shift(torch.ones(2, TEXT)), ConditionShift.forward(shift, torch.ones(2, TEXT)))
