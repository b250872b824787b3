"""Counting live bytes, and the planned step against the same step run for real on the CPU."""

from __future__ import annotations

import dataclasses
import functools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

pytest.importorskip("diffusers")
pytest.importorskip("peft")

from apex_fast.backbones.tiny import tiny_pipeline
from apex_fast.lora import EMA, LoraSettings, add_lora
from apex_fast.planning.blueprint import Blueprint
from apex_fast.planning.memory import ACTIVATIONS, LiveBytes, UnknownValueError, bytes_of
from apex_fast.planning.meta import AcceleratorOnMeta
from apex_fast.planning.quantized import EightBitLinear, FourBitLinear, numel, quantize
from apex_fast.planning.step import (
    AVERAGE,
    FROZEN,
    GRADIENTS,
    OPTIMIZER,
    REAL,
    TRAINED,
    count_step,
    plan_step,
    planned_run,
)
from apex_fast.training.config import TrainConfig

SCHEDULES = ("joint", "retain", "sequential")


@functools.cache
def tiny(family: str) -> Blueprint:
    transformer = tiny_pipeline(family).transformer
    arguments = {k: v for k, v in transformer.config.items() if not k.startswith("_")}
    return Blueprint(f"tiny {family}", family, arguments, 8, 8, tokens=16)


def config(**settings: object) -> TrainConfig:
    common = {"output_dir": "unused", "pretrained_model_name_or_path": "unused", "dataset_name": "unused"}
    return TrainConfig(**{**common, "train_batch_size": 2, **settings})


# ---- the counter


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_storages_are_counted_once_and_until_they_die(device: str) -> None:
    with LiveBytes() as counted:
        x = torch.empty(10, 4, device=device)
        view = x.view(40)[3:]
        assert counted.live == 160
        y = x + 1
        del x
        assert counted.live == 320
        del view
        assert counted.live == 160
        y.add_(1)
        assert counted.live == 160 and counted.peak == 320
        counted.start_peak()
        assert counted.peak == 160
    del y
    assert counted.live == 0


def test_categories_follow_what_is_held() -> None:
    weight = torch.zeros(8, requires_grad=True)
    with LiveBytes() as counted:
        counted.hold([weight], "weights")
        (weight * 2).sum().backward()
        counted.hold([weight.grad], "gradients")
    assert counted.by_category == {"weights": 32, "gradients": 32, ACTIVATIONS: 0}
    assert sum(counted.peak_by_category.values()) == counted.peak


def test_graph_memory_is_what_autograd_keeps() -> None:
    layers = nn.Sequential(nn.Linear(16, 16), nn.GELU(), nn.Linear(16, 16)).to("meta")
    with LiveBytes() as counted:
        counted.hold(layers.parameters(), "weights")
        out = layers(torch.empty(5, 16, device="meta"))
    # the input, what GELU reads, what the second layer reads, the output
    assert counted.by_category[ACTIVATIONS] == 4 * 5 * 16 * 4
    assert counted.flops == 2 * 2 * 5 * 16 * 16
    del out


def test_depthwise_convolutions_are_not_counted_as_dense_ones() -> None:
    layer = nn.Conv2d(32, 32, 3, padding=1, groups=32, bias=False).to("meta")
    with LiveBytes() as counted:
        layer(torch.empty(1, 32, 8, 8, device="meta", requires_grad=True)).sum().backward()
    assert counted.flops == 3 * 2 * 32 * 64 * 9


def test_small_masks_have_values_on_the_meta_device() -> None:
    with AcceleratorOnMeta(), LiveBytes():
        mask = torch.ones(2, 6, dtype=torch.bool, device="meta")
        assert bool(mask.all())
        mask[1:, 4:] = False
        both = torch.cat([mask, mask])
        assert not bool(both.all()) and both.sum(1).tolist() == [6, 4, 6, 4]
        rows = torch.empty(2, 6, 3, device="meta")[mask]
        assert rows.shape == (10, 3)
        longest = torch.where(mask.any(1), mask.sum(1), torch.as_tensor(9, device="meta"))
        assert longest.max().item() == 6


def test_unknown_values_are_refused() -> None:
    with LiveBytes():
        with pytest.raises(UnknownValueError, match="cannot be planned"):
            torch.empty(3, device="meta").sum().item()
        known = torch.ones(3, dtype=torch.int64, device="meta")
        known.copy_(torch.empty(3, device="meta").to(torch.int64))
        with pytest.raises(UnknownValueError):
            known.tolist()


def test_attention_on_meta_takes_no_matrix_of_weights() -> None:
    q = torch.empty(1, 2, 4096, 8, device="meta", requires_grad=True)
    mask = torch.ones(1, 1, 1, 4096, dtype=torch.bool, device="meta")
    with AcceleratorOnMeta(), LiveBytes() as counted:
        out = F.scaled_dot_product_attention(q, q, q, attn_mask=mask)
        out.sum().backward()
    assert out.shape == q.shape
    assert counted.peak < 20 * q.numel() * 4


def test_autocast_on_meta_casts_as_cuda_does() -> None:
    layer = nn.Linear(8, 8).to("meta")
    x = torch.empty(2, 8, device="meta")
    with AcceleratorOnMeta():
        assert layer(x).dtype == torch.float32
        with torch.autocast("cpu", torch.bfloat16):
            assert layer(x).dtype == torch.bfloat16
            assert F.layer_norm(layer(x), (8,)).dtype == torch.float32
            assert (layer(x) + layer(x)).dtype == torch.bfloat16
    assert layer(x).dtype == torch.float32


# ---- weights


@pytest.mark.parametrize("settings", [{}, {"rank": 4}, {"rank": 4, "lora_dtype": "bf16", "weight_dtype": "bf16"}])
def test_weights_and_optimizer_are_those_of_a_real_model(settings: dict) -> None:
    pipeline = tiny_pipeline("sana")
    from apex_fast.backbones.sana import SanaBackbone

    backbone = SanaBackbone(pipeline.transformer.to(torch.bfloat16 if "weight_dtype" in settings else torch.float32))
    if "rank" in settings:
        add_lora(backbone, LoraSettings(rank=4, dtype=settings.get("lora_dtype", "fp32")))
    else:
        backbone.requires_grad_(True)
    trained = [p for p in backbone.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained)
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    state = [v for s in optimizer.state.values() for v in s.values()]

    planned = count_step(tiny("sana"), config(**settings))
    assert planned.held[TRAINED] == bytes_of(trained)
    assert planned.held[GRADIENTS] == bytes_of(trained)
    assert planned.held.get(FROZEN, 0) == bytes_of(p for p in backbone.parameters() if not p.requires_grad)
    assert planned.held[OPTIMIZER] == bytes_of(state)
    assert planned.held[AVERAGE] == sum(4 * p.numel() for p in trained)
    assert planned.trained == sum(p.numel() for p in trained)
    assert planned.held.get(REAL, 0) == (0 if "rank" in settings else bytes_of(trained))


def test_the_real_branch_is_counted_by_its_kind() -> None:
    model = tiny("sana")
    full = {kind: count_step(model, config(real_branch=kind)).held.get(REAL, 0) for kind in ("frozen", "ema", "live")}
    assert full["frozen"] == full["ema"] > full["live"] == 0
    lora = {kind: count_step(model, config(rank=4, real_branch=kind)).held for kind in ("frozen", "ema", "live")}
    assert lora["frozen"].get(REAL, 0) == lora["live"].get(REAL, 0) == 0
    assert lora["ema"][REAL] == lora["ema"][TRAINED]
    assert any(
        f".{EMA}." in name
        for name, _ in planned_run(model, config(rank=4, real_branch="ema")).backbone.named_parameters()
    )


def test_quantized_weights_take_their_bits() -> None:
    def net() -> nn.Module:
        return nn.Sequential(nn.Linear(128, 256), nn.Linear(256, 64, bias=False)).to("meta", torch.bfloat16)

    eight, four = net(), net()
    quantize(eight, "int8")
    quantize(four, "nf4")
    assert isinstance(eight[0], EightBitLinear) and isinstance(four[0], FourBitLinear)
    weights = 128 * 256 + 256 * 64
    assert bytes_of([*eight.parameters(), *eight.buffers()]) == weights + 2 * 256 + 5 * (256 + 64)
    assert bytes_of([*four.parameters(), *four.buffers()]) == weights // 2 + weights // 64 * 4 + 2 * 256
    assert numel(four[0].weight) == 128 * 256

    def kept(module: nn.Module) -> int:
        x = torch.empty(4, 128, dtype=torch.bfloat16, device="meta", requires_grad=True)
        with LiveBytes() as counted:
            counted.hold([*module.parameters(), *module.buffers(), x], "held")
            out = module(x)
            alive = counted.by_category[ACTIVATIONS]
            out.sum().backward()
        assert x.grad.shape == x.shape
        return alive

    # torchao keeps the weights that it made for the product, bitsandbytes makes them again
    assert kept(eight) - kept(four) == 2 * weights


def test_int8_is_torchaos() -> None:
    torchao = pytest.importorskip("torchao.quantization")
    real = nn.Sequential(nn.Linear(128, 256)).to(torch.bfloat16).requires_grad_(False)
    stand_in = nn.Sequential(nn.Linear(128, 256)).to("meta", torch.bfloat16).requires_grad_(False)
    torchao.quantize_(real, torchao.Int8WeightOnlyConfig())
    quantize(stand_in, "int8")
    assert bytes_of([*real.parameters()]) == bytes_of([*stand_in.parameters(), *stand_in.buffers()])


# ---- a step


def totals(moments: list) -> list[tuple[str, int]]:
    return [(name, round(sum(bytes_.values()))) for name, bytes_ in moments]


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(("family", "settings"), [("sana", {}), ("qwen_image", {"rank": 4})])
def test_planned_bytes_are_those_of_the_same_step_on_the_cpu(
    family: str, settings: dict, schedule: str, checkpointing: bool
) -> None:
    run = config(schedule=schedule, gradient_checkpointing=checkpointing, **settings)
    planned, real = count_step(tiny(family), run), count_step(tiny(family), run, "cpu")
    assert totals(planned.moments) == totals(real.moments)
    assert planned.held == real.held
    assert (planned.peak, planned.transient) == (real.peak, real.transient)
    assert (planned.flops, planned.forward_flops) == (real.flops, real.forward_flops)


@pytest.mark.parametrize("family", ["stable_diffusion_3", "z_image", "lumina2", "flux"])
def test_every_family_is_planned_as_the_cpu_counts_it(family: str) -> None:
    run = config(rank=4, gradient_checkpointing=True, weight_dtype="bf16")
    planned, real = count_step(tiny(family), run), count_step(tiny(family), run, "cpu")
    # Norms keep their statistics in fp32 on the accelerator and in bf16 on the CPU, and FLUX's RMS norm is one kernel.
    assert planned.peak == pytest.approx(real.peak, rel=0.015)
    assert planned.flops == real.flops


def test_later_passes_of_an_accumulation_find_gradients() -> None:
    model = tiny("sana")
    once, twice = (
        count_step(model, config(gradient_accumulation_steps=n, schedule="joint", ema_decay=None)) for n in (1, 2)
    )
    passes = [{name: dict(moments)[name] for name in ("real",)} for moments in (once.moments, twice.moments)]
    assert passes[1]["real"][GRADIENTS] == once.held[GRADIENTS] > passes[0]["real"].get(GRADIENTS, 0) == 0
    assert twice.flops == once.flops


def test_schedules_and_checkpointing_order_the_peak() -> None:
    model = tiny("sana")
    run = config(rank=4, train_batch_size=8, ema_decay=None)

    def peak(schedule: str, checkpointing: bool) -> int:
        return count_step(model, dataclasses.replace(run, schedule=schedule, gradient_checkpointing=checkpointing)).peak

    plain = [peak(schedule, False) for schedule in SCHEDULES]
    assert plain[0] > plain[1] > plain[2]
    saved = [peak(schedule, True) for schedule in SCHEDULES]
    assert saved[0] >= saved[1] >= saved[2]
    assert all(less < more for less, more in zip(saved, plain, strict=True))


@pytest.mark.parametrize(
    ("family", "depth", "settings"),
    [
        ("sana", (12,), {"schedule": "retain", "gradient_checkpointing": True}),
        ("flux", (4, 5), {"schedule": "joint", "rank": 4}),
        ("stable_diffusion_3", (4, 4), {"schedule": "joint"}),
    ],
)
def test_shallow_models_stand_for_deep_ones(family: str, depth: tuple[int, ...], settings: dict) -> None:
    model = tiny(family)
    if family == "stable_diffusion_3":
        model = dataclasses.replace(model, transformer={**model.transformer, "dual_attention_layers": (0,)})
    deep = model.at_depth(depth)
    assert deep.depth() == depth
    planned, whole = plan_step(deep, config(**settings)), count_step(deep, config(**settings))
    # EXACT where the peak of every part of the step is at one place for all depths, which it is up to small change.
    assert planned.peak == pytest.approx(whole.peak, rel=0.01)
    assert planned.transient == pytest.approx(whole.transient, rel=0.01)
    for name, size in whole.held.items():
        assert planned.held[name] == pytest.approx(size, abs=1), name
    assert planned.flops == pytest.approx(whole.flops, rel=1e-12)
    assert planned.parameters == whole.parameters
