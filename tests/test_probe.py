"""The shift probe: its controls come out right on every family, its verdicts have the reasons that they name."""

from __future__ import annotations

import copy
import json
import math
from typing import Any

import pytest
import torch
from backbone_cases import PROMPTS, count_hooks, load_tiny, with_embeds
from torch import Tensor, nn

import apex_fast as af
from apex_fast.backbones.base import Backbone
from apex_fast.backbones.tiny import TINY_FAMILIES
from apex_fast.condition import Condition
from apex_fast.probing import ProbeReport, as_mapping, check_shift, probe, table
from apex_fast.probing.capture import AttentionCapture, Tokens
from apex_fast.probing.probe import _compare, _hold, _LayerSums
from apex_fast.probing.verdict import Candidate, Facts, Thresholds, judge, recommend
from apex_fast.training.models import Autocast
from apex_fast.training.settings import SettingsError

pytestmark = pytest.mark.usefixtures("one_thread")
TIMES = (0.9, 0.5)


@pytest.fixture(params=TINY_FAMILIES)
def backbone(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Backbone:
    return load_tiny(request.param, tmp_path_factory)


def shape(backbone: Backbone) -> tuple[int, int, int]:
    return backbone.latent_shape(32, 32)


def quick(backbone: Backbone, prompts: Any = PROMPTS, **options: Any) -> ProbeReport:
    return probe(backbone, prompts, **{"times": TIMES, "shape": shape(backbone), **options})


def in_bf16(backbone: Backbone) -> Backbone:
    length = backbone.max_sequence_length
    return Backbone.from_pretrained(backbone.folder, torch_dtype=torch.bfloat16, max_sequence_length=length)


# ---- controls


@pytest.mark.parametrize("dtype", ("fp32", "bf16"))
def test_no_shift_changes_nothing_at_all(backbone, dtype):
    backbone = in_bf16(backbone) if dtype == "bf16" else backbone
    report = quick(backbone, scales=(1,), biases=(0,))
    assert report.dtype == {"fp32": "float32", "bf16": "bfloat16"}[dtype]
    assert [row.site for row in report.rows] == ["raw", "projected"]
    for row in report.rows:
        assert row.change == (0.0, 0.0) and row.verdict == "invisible" and "control" in row.reason
        for layer in row.layers:
            assert layer.keys == layer.values == 0
            assert layer.kl in (0, None) and layer.common_share is None
    assert report.recommended is None


@torch.no_grad()
def with_keys(backbone: Backbone, bias_on: str) -> tuple[float, dict[str, _LayerSums]]:
    """Adds one constant to the final keys of every layer, all or the text's alone; (change of the velocity, layers)."""
    condition, t = backbone.encode(PROMPTS), torch.tensor([0.7, 0.7])
    x = torch.randn(2, *shape(backbone), generator=torch.Generator().manual_seed(0))
    tokens = Tokens.of(backbone, condition, *x.shape[2:])
    held: dict[str, Any] = {}
    with AttentionCapture(backbone, tokens, lambda call: _hold(call, held)):
        real = backbone(x, t, condition)

    def add(layer: str, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        constant = torch.linspace(-2, 2, key.shape[-1])
        if bias_on == "all":
            return query, key + constant, value
        text = (0, tokens.kept.shape[1]) if backbone.family != "stable_diffusion_3" else (tokens.image, None)
        key = key.clone()
        key[:, :, slice(*text)] += constant
        return query, key, value

    sums: dict[str, _LayerSums] = {}
    with AttentionCapture(backbone, tokens, lambda call: _compare(held, sums, call), edit=add):
        shifted = backbone(x, t, condition)
    return ((shifted - real).norm() / real.norm()).item(), sums


def test_a_constant_on_all_final_keys_leaves_the_attention_weights(backbone):
    change, layers = with_keys(backbone, "all")
    assert change < 1e-5
    seen = [sums for sums in layers.values() if sums.mean("kl") is not None]
    assert seen
    for sums in seen:
        assert sums.mean("kl") < 1e-9 and sums.mean("keys") > 0.1
    shares = [sums.mean("common_share") for sums in seen if sums.mean("common_share") is not None]
    assert shares and min(shares) > 0.999


@pytest.mark.parametrize("family", ("qwen_image", "flux", "stable_diffusion_3"))
def test_a_constant_on_the_texts_keys_alone_moves_weight_between_text_and_picture(family, tmp_path_factory):
    """In joint attention the picture's keys stay, so the same constant is seen."""
    change, layers = with_keys(load_tiny(family, tmp_path_factory), "text")
    assert change > 1e-3
    assert all(sums.mean("kl") > 1e-3 for sums in layers.values() if sums.kind == "joint")


NORMS = {
    "sana": "caption_norm",
    "qwen_image": "txt_norm",
    "flux": "transformer_blocks.0.attn.norm_added_k",
    "z_image": "cap_embedder.0",
    "stable_diffusion_3": "transformer_blocks.0.attn.norm_added_k",
    "lumina2": "time_caption_embed.caption_embedder.0",
}


@torch.no_grad()
def test_a_positive_scale_right_before_an_rms_norm_is_invisible_to_rounding(backbone):
    condition, t = backbone.encode(PROMPTS), torch.tensor([0.7, 0.7])
    x = torch.randn(2, *shape(backbone), generator=torch.Generator().manual_seed(0))

    def velocity(scale: float) -> Tensor:
        def before(module: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            # Far above the norm's epsilon, which is what else would tell scales apart.
            return (1000 * scale * arguments[0], *arguments[1:])

        handle = backbone.transformer.get_submodule(NORMS[backbone.family]).register_forward_pre_hook(before)
        try:
            return backbone(x, t, condition)
        finally:
            handle.remove()

    real = velocity(1)
    scaled, flipped = ((velocity(scale) - real).norm() / real.norm() for scale in (3.0, -3.0))
    assert scaled < 3e-6
    assert flipped > 1e-4


def test_a_sign_flip_is_visible(backbone):
    report = quick(backbone, scales=(-1,), biases=(0,))
    for row in report.rows:
        assert row.verdict != "invisible"
        assert row.mean_change > 1000 * sum(report.rounding)
        assert row.kl > 1e-3
        assert all(layer.kl > 1e-6 for layer in row.layers if layer.sees_text)


# ---- what each family sees


@pytest.mark.parametrize("family", ("qwen_image", "z_image", "lumina2"))
def test_families_that_begin_with_an_rms_norm_do_not_see_a_positive_scale(family, tmp_path_factory):
    backbone = load_tiny(family, tmp_path_factory)
    condition = backbone.encode(PROMPTS)
    # The embeddings of the tiny text encoders are hardly above the epsilon of some norms.
    condition = with_embeds(condition, condition.prompt_embeds * 100)
    report = quick(backbone, condition, scales=(0.5, -0.5), biases=(0, 50), sites=("raw",))
    row = report.row("raw", 0.5, 0)
    assert row.verdict == "invisible" and "a positive scale cancels" in row.reason
    assert row.kl < 1e-6
    assert report.row("raw", -0.5, 0).verdict != "invisible"
    assert report.row("raw", 0.5, 50).verdict != "invisible"


@pytest.mark.parametrize("family", ("sana", "flux", "stable_diffusion_3"))
def test_families_that_begin_with_a_linear_layer_see_a_positive_scale(family, tmp_path_factory):
    backbone = load_tiny(family, tmp_path_factory)
    row = quick(backbone, scales=(0.5,), biases=(0,), sites=("raw",), shift_pooled=False).rows[0]
    assert row.verdict != "invisible" and row.mean_change > 1e-2


def test_embeddings_as_small_as_the_epsilon_of_the_norm_show_a_positive_scale(tmp_path_factory):
    row = quick(load_tiny("z_image", tmp_path_factory), scales=(0.5,), biases=(0,), sites=("raw",)).rows[0]
    assert row.verdict == "visible" and row.reason.endswith("but for the norm's epsilon")


@pytest.mark.parametrize("family", ("qwen_image", "flux", "stable_diffusion_3"))
def test_a_bias_ahead_of_layer_norms_is_invisible_unless_the_pooled_embedding_carries_it(family, tmp_path_factory):
    backbone = load_tiny(family, tmp_path_factory)
    report = quick(backbone, scales=(1, -1), biases=(0, 0.5, 50), sites=("projected",), shift_pooled=False)
    for bias in (0.5, 50):
        row = report.row("projected", 1, bias)
        assert row.verdict == "invisible" and "layer norms" in row.reason
        assert row.mean_change < 1e-5
        assert report.row("projected", -1, bias).change == pytest.approx(
            report.row("projected", -1, 0).change, rel=1e-3
        )
    if family != "qwen_image":
        report = quick(backbone, scales=(1,), biases=(0.5,), sites=("projected",))
        assert report.pooled_shifted and report.rows[0].verdict == "visible"


def test_sana_sees_a_bias_behind_its_projection_in_the_values_alone(tmp_path_factory):
    row = quick(load_tiny("sana", tmp_path_factory), scales=(1,), biases=(0.5,), sites=("projected",)).rows[0]
    assert row.verdict == "visible" and "the values carry it" in row.reason
    assert row.kl < 1e-9 and row.common_share == pytest.approx(1, abs=1e-5)
    assert row.keys > 0.1 and row.values > 0.1


def test_linear_attention_gets_what_means_something_for_it(tmp_path_factory):
    report = quick(load_tiny("sana", tmp_path_factory), scales=(-1,), biases=(0.5,), sites=("raw",))
    linear = [layer for layer in report.rows[0].layers if layer.kind == "linear"]
    assert len(linear) == 2
    for layer in linear:
        assert (layer.kl, layer.common_share, layer.entropy) == (None, None, None)
    # The first runs before any text has reached the picture.
    assert (linear[0].keys, linear[0].values, linear[0].output) == (0, 0, 0)
    assert min(linear[1].keys, linear[1].values, linear[1].output) > 0.01
    # They are left out of the row's means, and null in the JSON.
    assert report.rows[0].kl > 0
    layers = as_mapping(report)["rows"][0]["layers"]
    assert [layer["kl"] is None for layer in layers] == [True, False, True, False]


def test_bf16_on_a_cpu_tells_rounding_from_change(tmp_path_factory):
    backbone = in_bf16(load_tiny("qwen_image", tmp_path_factory))
    report = quick(backbone, scales=(0.7, 1, -1), biases=(0, 0.5))
    assert 1e-3 < min(report.rounding) < 0.05
    for row in (report.row("raw", 0.7, 0), report.row("projected", 1, 0.5)):
        assert row.verdict == "invisible" and row.reason.startswith("only rounding")
        assert 0 < row.mean_change < 0.05
    assert report.row("raw", -1, 0.5).verdict == report.row("projected", -1, 0.5).verdict == "visible"


@pytest.mark.parametrize(("family", "scale"), (("flux", 0.5), ("stable_diffusion_3", 1)))
def test_bf16_does_not_hide_what_fp32_sees(family, scale, tmp_path_factory):
    backbone = load_tiny(family, tmp_path_factory)
    options = {"scales": (scale,), "biases": (0.2,), "sites": ("raw",), "shift_pooled": False}
    exact, rounded = (quick(network, **options) for network in (backbone, in_bf16(backbone)))
    assert 0.02 < exact.rows[0].mean_change < 0.03
    assert exact.rows[0].verdict == rounded.rows[0].verdict == "visible"


# ---- the passes


def test_the_network_is_left_as_it_was(tmp_path_factory):
    backbone = copy.deepcopy(load_tiny("flux", tmp_path_factory))
    backbone.train()
    backbone.transformer.transformer_blocks[1].eval()
    modes = [module.training for module in backbone.modules()]
    hooks, state = count_hooks(backbone), torch.random.get_rng_state()
    shift = af.ConditionShift(trainable=True)
    quick(backbone, shifts={"own": shift}, scales=())
    assert [module.training for module in backbone.modules()] == modes
    assert count_hooks(backbone) == hooks and torch.equal(torch.random.get_rng_state(), state)
    assert all(p.grad is None for p in [*backbone.parameters(), *shift.parameters()])


def test_passes_are_announced_and_batches_change_nothing(tmp_path_factory):
    backbone, lines = load_tiny("stable_diffusion_3", tmp_path_factory), []
    # A family without padding mask, so that nothing depends on who shares a batch.
    prompts = [*PROMPTS, "a map"]
    whole = quick(backbone, prompts, scales=(-1,), say=lines.append)
    assert whole.passes == 1 + 2 * (3 + 6) and str(whole.passes) in lines[0]
    parts = quick(backbone, prompts, scales=(-1,), batch_size=2)
    assert parts.passes == 2 * whole.passes and parts.held_bytes < whole.held_bytes
    for row, other in zip(whole.rows, parts.rows, strict=True):
        assert other.change == pytest.approx(row.change, rel=1e-4)
        assert other.kl == pytest.approx(row.kl, rel=1e-3)
        assert other.common_share == pytest.approx(row.common_share, rel=1e-3)
    assert parts.other_prompt == pytest.approx(whole.other_prompt, rel=1e-4)


def test_a_change_is_what_a_loop_by_hand_finds(tmp_path_factory):
    backbone = load_tiny("qwen_image", tmp_path_factory)
    condition, shift = backbone.encode(PROMPTS), af.ConditionShift(scale=-0.5, bias=1.0)
    report = quick(backbone, condition, shifts={"own": shift}, scales=(), seed=3)
    z, fresh = torch.randn(2, 2, *shape(backbone), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        x_fake = z - backbone(z, torch.ones(2), condition)
        for i, time in enumerate(TIMES):
            x_t, t = time * fresh + (1 - time) * x_fake, torch.full((2,), time)
            real, shifted = backbone(x_t, t, condition), backbone(x_t, t, shift(condition))
            expected = ((shifted - real).flatten(1).norm(dim=1) / real.flatten(1).norm(dim=1)).mean().item()
            assert report.rows[0].change[i] == pytest.approx(expected, rel=1e-5)


def test_one_prompt_has_no_other_prompt(tmp_path_factory):
    report = quick(load_tiny("qwen_image", tmp_path_factory), PROMPTS[:1], scales=(-1,), biases=(0.5,))
    assert report.other_prompt is None and "another prompt" not in table(report)


def test_a_diagonal_shift_begins_as_the_scalar_one_and_then_differs(tmp_path_factory):
    backbone = load_tiny("flux", tmp_path_factory)
    report = quick(backbone, scales=(-1,), biases=(0.5,), modes=("scalar", "diagonal"))
    scalar, diagonal = report.row("projected", -1, 0.5), report.row("projected", -1, 0.5, "diagonal")
    assert diagonal.change == pytest.approx(scalar.change, rel=1e-4)
    width = backbone.site_width("projected")
    trained = af.ConditionShift("diagonal", 1.0, dim=width, site="projected", shift_pooled=False)
    with torch.no_grad():
        trained.bias.copy_(torch.linspace(-1, 1, width))
    row = quick(backbone, scales=(), shifts={"trained": trained}).rows[0]
    # A bias that differs between channels passes the layer norms that take a common one out.
    assert row.verdict == "visible" and row.name == "trained" and row.mode == "diagonal"


@pytest.mark.parametrize(
    ("options", "message"),
    (
        ({"scales": ()}, "the grid is empty"),
        ({"times": (1.5,)}, r"times must be in \[0, 1\]"),
        ({"sites": ("end",)}, "sites are raw, projected, got end"),
        ({"queries": 0}, "queries must be at least 1"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
    ),
)
def test_what_cannot_be_probed_is_refused(options, message, tmp_path_factory):
    with pytest.raises(ValueError, match=message):
        quick(load_tiny("qwen_image", tmp_path_factory), **options)


def test_a_network_without_a_velocity_is_refused(tmp_path_factory):
    backbone = copy.deepcopy(load_tiny("qwen_image", tmp_path_factory))
    nn.init.zeros_(backbone.transformer.proj_out.weight)
    nn.init.zeros_(backbone.transformer.proj_out.bias)
    with pytest.raises(ValueError, match="is zero at t = 0.9 without any shift"):
        quick(backbone)


# ---- one shift before a run


def test_check_shift_passes_what_is_seen_and_refuses_what_is_not(tmp_path_factory):
    backbone = load_tiny("qwen_image", tmp_path_factory)
    condition = backbone.encode(PROMPTS)
    seen = check_shift(backbone, af.ConditionShift(), condition, shape=shape(backbone))
    assert seen.verdict == "visible" and not seen.is_control
    assert (
        seen.line.startswith("probe: visible: scalar shift, scale -1, bias 0.5, site raw: ") and "9 passes" in seen.line
    )
    seen.refuse_invisible()
    hidden = check_shift(backbone, af.ConditionShift(scale=0.5, bias=0.0), condition, shape=shape(backbone))
    with pytest.raises(SettingsError, match="scale 0.5 and bias 0 at the site raw is invisible .*shift.scale -1"):
        hidden.refuse_invisible()
    control = check_shift(backbone, af.ConditionShift(scale=1.0, bias=0.0), condition, shape=shape(backbone))
    assert control.is_control and control.verdict == "invisible"


def test_check_shift_under_autocast(tmp_path_factory):
    backbone = load_tiny("qwen_image", tmp_path_factory)
    call = Autocast(backbone, "cpu", torch.bfloat16)
    condition = backbone.encode(PROMPTS)
    line = check_shift(backbone, af.ConditionShift(), condition, shape=shape(backbone), call=call)
    assert line.verdict == "visible"
    hidden = af.ConditionShift(scale=0.7, bias=0.0)
    line = check_shift(backbone, hidden, condition, shape=shape(backbone), call=call)
    assert line.verdict == "invisible" and "a positive scale cancels" in line.reason


def test_what_another_prompt_does_is_what_a_loop_by_hand_finds(tmp_path_factory):
    backbone = load_tiny("qwen_image", tmp_path_factory)
    report = quick(backbone, scales=(-1,), biases=(0.5,), sites=("raw",), times=(0.9,), seed=3)
    generator = torch.Generator().manual_seed(3)
    noise, fresh = torch.randn(2, len(PROMPTS), *shape(backbone), generator=generator)
    condition = backbone.encode(list(PROMPTS))
    other = condition.index([*range(1, len(PROMPTS)), 0])
    with torch.no_grad():
        x_fake = noise - backbone(noise, torch.ones(len(noise)), condition)
        x_t, t = 0.9 * fresh + 0.1 * x_fake, torch.full((len(noise),), 0.9)
        real, changed = (backbone(x_t, t, c).flatten(1) for c in (condition, other))
    expected = ((changed - real).norm(dim=1) / real.norm(dim=1)).mean().item()
    assert expected > 1e-4
    assert report.other_prompt[0] == pytest.approx(expected, rel=1e-4)


def test_collapsing_attention_is_measured_on_the_network(tmp_path_factory):
    backbone = load_tiny("sana", tmp_path_factory)  # no norm between its projected text and the keys
    # Nothing but the entropy may decide.
    limits = Thresholds(destructive=1e9, blown_up=1e9)
    report = quick(backbone, scales=(-1, 1e4), biases=(0,), sites=("projected",), times=(0.9,), thresholds=limits)
    flat, sharp = (report.row("projected", scale, 0) for scale in (-1, 1e4))
    assert sharp.entropy_share < limits.collapsed < 0.9 < flat.entropy_share
    assert sharp.verdict == "destructive" and "attention collapses" in sharp.reason
    assert flat.verdict == "visible"


@pytest.mark.parametrize("family", ("flux", "stable_diffusion_3"))
def test_the_reason_says_where_the_pooled_embedding_alone_carries_a_shift(family, tmp_path_factory):
    backbone = load_tiny(family, tmp_path_factory)
    row = quick(backbone, scales=(1,), biases=(0.5,), sites=("projected",), times=(0.9,)).rows[0]
    assert row.verdict == "visible" and "the pooled embedding alone carries it: a bias" in row.reason
    row = quick(backbone, scales=(-1,), biases=(0.5,), sites=("raw",), times=(0.9,)).rows[0]
    assert "alone" not in row.reason


def test_a_family_that_the_capture_does_not_know_is_an_error_that_leaves_no_hook(tmp_path_factory, monkeypatch):
    backbone = load_tiny("qwen_image", tmp_path_factory)
    before = count_hooks(backbone)
    monkeypatch.setattr(type(backbone), "family", "mine")
    with pytest.raises(RuntimeError, match="order the layers of mine .*capture.py"):
        quick(backbone, scales=(-1,), biases=(0.5,))
    assert count_hooks(backbone) == before


# ---- verdicts


def facts(**changes: Any) -> Facts:
    usual = {
        "is_control": False,
        "finite": True,
        "change": 0.3,
        "norm": 1.0,
        "rounding": 1e-7,
        "other_prompt": 0.4,
        "kl": 0.5,
        "common_share": 0.5,
        "entropy_share": 1.0,
        "cause": None,
    }
    return Facts(**{**usual, **changes})


@pytest.mark.parametrize(
    ("changes", "verdict", "reason"),
    (
        ({}, "visible", "30 %, 0.75 times what another prompt does; attention by a KL of 0.5"),
        ({"finite": False, "change": math.nan}, "destructive", "not finite"),
        ({"norm": 5.0}, "destructive", "blown up to 5 times"),
        ({"change": 1.2}, "destructive", "far from anything"),
        ({"change": 1.2, "other_prompt": 1.1}, "visible", "1.1 times"),
        ({"change": 1.2, "other_prompt": None}, "destructive", "far from anything"),
        ({"entropy_share": 0.01}, "destructive", "attention collapses"),
        ({"change": 0.0}, "invisible", "does not change at all"),
        ({"change": 1.4e-7}, "invisible", "only rounding"),
        ({"change": 3e-4}, "invisible", "0.075 % of what another prompt does: less than 0.1 %"),
        ({"change": 3e-4, "cause": "why"}, "invisible", "; why"),
        ({"change": 9e-4, "other_prompt": None}, "invisible", "by 0.09 %: less than 0.1 %"),
        # A network that hardly reads its prompts shows little of anything.
        ({"change": 5e-4, "other_prompt": 1.6e-3}, "visible", "weak"),
        ({"change": 5e-4}, "visible", "weak"),
        ({"text_cause": "why"}, "visible", "the pooled embedding alone carries it: why"),
        ({"change": 0.014, "rounding": 0.01}, "invisible", "only rounding"),
        ({"change": 0.016, "rounding": 0.01}, "visible", "weak"),
        ({"change": 0.01}, "visible", "weak: below 2 %"),
        ({"kl": 1e-14}, "visible", "the values carry it"),
        ({"common_share": 0.97}, "visible", "97 % of the change in keys"),
        ({"is_control": True, "change": 1e-6}, "invisible", "repeat to"),
    ),
)
def test_verdicts(changes, verdict, reason):
    found, why = judge(facts(**changes))
    assert found == verdict and reason in why


def test_thresholds_are_settings():
    assert judge(facts(change=0.01), Thresholds(invisible=0.05))[0] == "invisible"
    assert judge(facts(change=0.03), Thresholds(invisible=0.05))[0] == "visible"
    assert judge(facts(change=0.3), Thresholds(destructive=0.2, over_prompt=0.5))[0] == "destructive"


def test_recommendations():
    def row(scale: float, verdict: Any, change: float, site: str = "raw") -> Candidate:
        return Candidate(site, scale, 0.5, verdict, change)

    rows = [row(-1, "visible", 0.2), row(-0.5, "visible", 0.45)]
    assert recommend(rows, 0.4)[0] == 0
    assert recommend([row(-1, "invisible", 0), row(-0.5, "visible", 0.9), row(0.5, "visible", 0.3)], 0.4)[0] == 2
    assert recommend([row(-1, "visible", 0.003), row(-0.5, "visible", 0.9)], None)[0] == 1
    assert recommend([row(1, "visible", 0.003), row(0.5, "visible", 0.01)], 0.4) == (
        1,
        "the strongest of the visible ones, all of them weak",
    )
    assert recommend([row(1, "invisible", 0), row(-1, "destructive", 9)], 0.4)[0] is None
    assert recommend([row(1, "invisible", 0)], 0.4)[0] is None


# ---- what is shown


def test_table_and_json_say_the_same(tmp_path_factory):
    backbone = load_tiny("sana", tmp_path_factory)
    report = quick(backbone, scales=(-1, 1), biases=(0, 0.5))
    text, values = table(report), json.loads(json.dumps(as_mapping(report), allow_nan=False))
    for row, entry in zip(report.rows, values["rows"], strict=True):
        assert row.reason in text and entry["verdict"] == row.verdict
        assert entry["velocity_change"] == list(row.change)
    assert "n/a" in text  # the share of the change that the control does not make
    best = values["recommended"]
    row = report.rows[best["row"]]
    assert f"shift.scale {row.scale:g}, shift.bias {row.bias:g}, shift.site {row.site}" in text


def test_a_velocity_that_is_not_finite_is_destructive_and_can_be_written(tmp_path_factory):
    backbone = load_tiny("sana", tmp_path_factory)
    report = quick(backbone, scales=(1e38,), biases=(0,), sites=("projected",))
    assert report.rows[0].verdict == "destructive" and "not finite" in report.rows[0].reason
    assert "nan" in json.dumps(as_mapping(report), allow_nan=False)


def test_conditions_that_are_given_are_used(tmp_path_factory):
    backbone = load_tiny("lumina2", tmp_path_factory)
    embeds = backbone.encode(PROMPTS)
    same = quick(backbone, embeds, scales=(-1,), biases=(0.5,), sites=("raw",))
    assert same.rows[0].change == quick(backbone, scales=(-1,), biases=(0.5,), sites=("raw",)).rows[0].change
    half = Condition(embeds.prompt_embeds.bfloat16(), embeds.prompt_embeds_mask)
    # Embeddings in bf16 before a network in fp32: its own rounding counts.
    assert max(quick(backbone, half, scales=(-1,), biases=(0.5,), sites=("raw",)).rounding) < 1e-5
