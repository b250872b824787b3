"""The fusions where they are used, each beside other ways to the same results: the rest of suite ``ops``.

===================  ===============================================================================================
case                 ways
===================  ===============================================================================================
txt_norm             Qwen-Image's norm of the text, of the shifted condition alone or of both
caption_projection   SANA's projection of the text, the same
velocity_head        final norm, modulation and projection; all of it trained, or only what lies before it (LoRA)
===================  ===============================================================================================

have ``eager`` (the modules of diffusers behind a shift in plain torch), ``checkpoint`` (``torch.utils.checkpoint``
around the same modules and the fused shift) and ``apex_fast``. ``one_pass`` is the loss of a schedule: ``recompute``
reads the velocities again in backward, ``apex_fast one pass`` writes gradients along with the losses. They reach the
network as they are (``handed over``), multiplied by what a caller's ``backward`` makes of the loss (``scaled``), or so
and one after the other (``sequential``); see :mod:`apex_fast.schedules`.

All ways of a case run forward and backward from the same operands and are compared with plain torch in fp64 first. Of
each way the report has the bytes that it moves, counted operation by operation, and those that it keeps for backward.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from apex_fast import ops
from apex_fast.schedules import KnownGradient

from ..allocator import release, touch
from ..report import Row, add_ratios
from ..timing import interleave, kept_bytes, moved_bytes, peak_extra_bytes
from .ops_cases import DTYPES, TOLERANCE

if TYPE_CHECKING:
    from .ops import Settings

#: Several roundings lie between operands and results here, where an op has one.
_LOOSER = 3.0


@dataclass
class Ways:
    """A case with its operands. ``outputs`` of a way are differentiated by ``leaves``; or a way makes the gradients
    itself (``own_backward``) and returns them all."""

    shape: Sequence[int]
    outputs: dict[str, Callable[[], list[Tensor]]]
    leaves: list[Tensor]
    held: list[Tensor] = field(default_factory=list)
    own_backward: bool = False

    def run(self, way: str, upstream: list[Tensor]) -> list[Tensor]:
        """Outputs of ``way`` without history, and gradients of the leaves; for its own backward the gradients alone."""
        outputs = self.outputs[way]()
        if self.own_backward:
            return outputs
        return [o.detach() for o in outputs] + list(torch.autograd.grad(outputs, self.leaves, upstream))


class Maker:
    """Operands of one dtype from one seed; ``exact``: the same rounded numbers in fp64."""

    def __init__(self, dtype: torch.dtype, device: str, exact: bool) -> None:
        self.dtype, self.device, self.exact = dtype, device, exact
        self.generator = torch.Generator().manual_seed(0)

    def __call__(self, *shape: int, scale: float = 1.0, gradient: bool = False) -> Tensor:
        return self.cast(torch.randn(shape, generator=self.generator) * scale).requires_grad_(gradient)

    def cast(self, value: Any) -> Any:
        """A tensor or module as the case has it."""
        value = value.to(self.device, self.dtype)
        return value.double() if self.exact else value

    def module(self, make: Callable[[], nn.Module]) -> nn.Module:
        """A module whose weights are those of the seed."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return self.cast(make())

    def number(self, value: float, gradient: bool = False) -> Tensor:
        """A parameter of the shift, fp32."""
        dtype = torch.float64 if self.exact else torch.float32
        return torch.tensor(value, dtype=dtype, device=self.device, requires_grad=gradient)

    def mask(self, batch: int, tokens: int) -> Tensor:
        """Of which the last quarter is padding."""
        return (torch.arange(tokens, device=self.device) < tokens - tokens // 4).repeat(batch, 1)


def _plain_shift(condition: Tensor, scale: Tensor, bias: Tensor, mask: Tensor) -> Tensor:
    return torch.where(mask[..., None], condition * scale.to(condition.dtype) + bias.to(condition.dtype), condition)


def _checkpointed(function: Callable[..., Tensor], *arguments: Tensor) -> Tensor:
    return checkpoint(function, *arguments, use_reentrant=False)


# ---- the text path


def _txt_norm(both: bool) -> Callable[[Maker, bool], Ways]:
    def make(make: Maker, tiny: bool) -> Ways:
        from diffusers.models.normalization import RMSNorm

        shape = (2, 8, 64) if tiny else (2, 512, 3584)
        c, mask = make(*shape), make.mask(*shape[:2])
        norm = make.module(lambda: RMSNorm(shape[-1], eps=1e-6))
        a, b = make.number(-1.0, True), make.number(0.5, True)

        def shifted(c: Tensor) -> Tensor:
            return norm(ops.condition_shift(c, a, b, mask=mask))

        def fused() -> list[Tensor]:
            found = ops.condition_shift_rms_norm(c, a, b, norm.weight, 1e-6, mask=mask, output_mask=(both, True))
            return list(found) if both else [found[1]]

        ways = {
            "eager": lambda: [norm(c)] * both + [norm(_plain_shift(c, a, b, mask))],
            "checkpoint": lambda: [_checkpointed(norm, c)] * both + [_checkpointed(shifted, c)],
            "apex_fast": fused,
        }
        return Ways(shape, ways, [norm.weight, a, b], [c, mask, norm.weight, a, b])

    return make


def _caption_projection(both: bool, train_shift: bool) -> Callable[[Maker, bool], Ways]:
    def make(make: Maker, tiny: bool) -> Ways:
        from diffusers.models.embeddings import PixArtAlphaTextProjection

        shape, width = ((2, 8, 64), 32) if tiny else ((2, 300, 2304), 2240)
        c, mask = make(*shape), make.mask(*shape[:2])
        mlp = make.module(lambda: PixArtAlphaTextProjection(shape[-1], width))
        a, b = make.number(-1.0, train_shift), make.number(0.5, train_shift)
        parameters, linear = list(mlp.parameters()), mlp.linear_1

        def shifted(c: Tensor) -> Tensor:
            return mlp(ops.condition_shift(c, a, b, mask=mask))

        def fused() -> list[Tensor]:
            sums = linear.weight.sum(1, dtype=a.dtype)
            projected = F.linear(c, linear.weight)
            found = ops.projected_condition_shift(
                projected, a, b, sums, linear_bias=linear.bias, mask=mask, output_mask=(both, True)
            )
            return [mlp.linear_2(mlp.act_1(hidden)) for hidden in (found if both else found[1:])]

        ways = {
            "eager": lambda: [mlp(c)] * both + [mlp(_plain_shift(c, a, b, mask))],
            "checkpoint": lambda: [_checkpointed(mlp, c)] * both + [_checkpointed(shifted, c)],
            "apex_fast": fused,
        }
        return Ways(shape, ways, [*parameters, *([a, b] if train_shift else [])], [c, mask, a, b, *parameters])

    return make


# ---- the velocity head


def _velocity_head(family: str, lora: bool) -> Callable[[Maker, bool], Ways]:
    def make(make: Maker, tiny: bool) -> Ways:
        from diffusers.models.normalization import AdaLayerNormContinuous
        from diffusers.models.transformers.sana_transformer import SanaModulatedNorm

        sana = family == "sana"
        shape, out = ((2, 8, 64), 4) if tiny else ((2, 1024, 2240), 32) if sana else ((1, 4096, 3072), 64)
        batch, _, width = shape
        hidden, temb = make(*shape, gradient=True), make(batch, width, gradient=not lora)
        projection = make.module(lambda: nn.Linear(width, out)).requires_grad_(not lora)
        if sana:
            norm = make.module(lambda: SanaModulatedNorm(width))
            table = make(2, width, scale=width**-0.5, gradient=not lora)
            more = [table]

            def modulated(h: Tensor) -> Tensor:
                return norm(h, temb, table)

            def scale_and_shift() -> tuple[Tensor, Tensor]:
                shift, scale = (table[None] + temb[:, None]).unbind(1)
                return scale, shift
        else:
            norm = make.module(lambda: AdaLayerNormContinuous(width, width, elementwise_affine=False, eps=1e-6))
            more = list(norm.requires_grad_(not lora).parameters())

            def modulated(h: Tensor) -> Tensor:
                return norm(h, temb)

            def scale_and_shift() -> tuple[Tensor, Tensor]:
                return norm.linear(norm.silu(temb)).chunk(2, dim=1)

        def head(h: Tensor) -> Tensor:
            return projection(modulated(h))

        def fused() -> list[Tensor]:
            return [ops.velocity_head(hidden, *scale_and_shift(), projection.weight, projection.bias, 1e-6)]

        ways = {
            "eager": lambda: [head(hidden)],
            "checkpoint": lambda: [_checkpointed(head, hidden)],
            "apex_fast": fused,
        }
        held = [hidden, temb, *more, *projection.parameters()]
        return Ways(shape, ways, [t for t in held if t.requires_grad], held)

    return make


# ---- the loss of a schedule


def _one_pass(how: str) -> Callable[[Maker, bool], Ways]:
    def make(make: Maker, tiny: bool) -> Ways:
        shape = (2, 4, 16, 16) if tiny else (8, 16, 256, 256)
        common = make(*shape)
        v_gen, v_shift, v_real = ((common + make(*shape, scale=0.6)).detach() for _ in range(3))
        v_gen.requires_grad_(), v_shift.requires_grad_()
        # As in a schedule, the state is fp32; a scale is what a caller's backward multiplies the loss with.
        target = (common + make(*shape, scale=0.6)).to(make.number(0.0).dtype)
        weight, scale = common[0].numel() / 2.0, make.number(0.5)
        weights = torch.full(shape[:1], weight, dtype=target.dtype, device=target.device)

        def means(*losses: Tensor) -> list[Tensor]:
            return [weight * loss.sum() for loss in losses]

        def of(loss: Tensor, *velocities: Tensor) -> list[Tensor]:
            return list(torch.autograd.grad(loss if how == "handed over" else scale * loss, velocities))

        def eager() -> list[Tensor]:
            dv = (v_shift - v_real).detach().to(target.dtype).clamp(-1, 1)
            generated, shifted = v_gen.to(target.dtype), v_shift.to(target.dtype)
            pairs = (shifted, target), (generated, (generated - dv).detach())
            fake, correction = means(*((one - two).square().flatten(1).mean(1) for one, two in pairs))
            return of(fake + correction, v_gen, v_shift)

        def recompute() -> list[Tensor]:
            if how != "sequential":
                fake, correction, _ = ops.shifted_velocity_loss(v_gen, v_shift, v_real, target)
                return of(sum(means(fake, correction)), v_gen, v_shift)
            fake, correction, _ = ops.shifted_velocity_loss(None, v_shift, v_real, target)
            of_shifted = of(*means(fake), v_shift)
            gradient, _, _ = ops.shifted_velocity_loss_backward(
                torch.zeros_like(weights), weights, v_shift.detach(), v_real, target,
                output_mask=(True, False, False), grad_gen_dtype=weights.dtype,
            )  # fmt: skip
            return of(KnownGradient.apply(*means(correction), v_gen, gradient), v_gen) + of_shifted

        def one_pass() -> list[Tensor]:
            fake, correction, _, grad_gen, grad_shift = ops.shifted_velocity_loss_with_gradients(
                weights, weights, v_shift.detach(), v_real, target,
                grad_gen_dtype=weights.dtype if how == "sequential" else None,
            )  # fmt: skip
            loss_fake, loss_correction = means(fake, correction)
            if how == "handed over":
                return [grad_gen, grad_shift]
            of_shifted = of(KnownGradient.apply(loss_fake, v_shift, grad_shift), v_shift)
            return of(KnownGradient.apply(loss_correction, v_gen, grad_gen), v_gen) + of_shifted

        ways = {"eager": eager, "recompute": recompute, "apex_fast one pass": one_pass}
        return Ways(shape, ways, [], [v_gen, v_shift, v_real, target], own_backward=True)

    return make


CASES: dict[str, Callable[[Maker, bool], Ways]] = {
    "txt_norm[shifted]": _txt_norm(both=False),
    "txt_norm[both]": _txt_norm(both=True),
    "caption_projection[shifted]": _caption_projection(both=False, train_shift=False),
    "caption_projection[shifted,trained shift]": _caption_projection(both=False, train_shift=True),
    "caption_projection[both]": _caption_projection(both=True, train_shift=False),
    "velocity_head[sana]": _velocity_head("sana", lora=False),
    "velocity_head[qwen_image]": _velocity_head("qwen_image", lora=False),
    "velocity_head[qwen_image,lora]": _velocity_head("qwen_image", lora=True),
    "one_pass[handed over]": _one_pass("handed over"),
    "one_pass[scaled]": _one_pass("scaled"),
    "one_pass[sequential]": _one_pass("sequential"),
}


# ---- running


def run_suite(settings: Settings, dtype: str) -> list[Row]:
    """All cases in ``dtype``; without diffusers only those that need none of its modules."""
    rows: list[Row] = []
    for name, make in CASES.items():
        if settings.only in name:
            print(f"{name} {dtype}", file=sys.stderr, flush=True)
            rows += measure(name, make, settings, dtype)
    return rows


def measure(name: str, make: Callable[[Maker, bool], Ways], settings: Settings, dtype: str) -> list[Row]:
    """The rows of one case."""
    case = make(Maker(DTYPES[dtype], settings.device, exact=False), settings.quick)
    exact = make(Maker(DTYPES[dtype], settings.device, exact=True), settings.quick)
    ways = [way for way in case.outputs if way not in ("eager", "apex_fast") or way in settings.providers]
    upstream = _upstream(exact)
    truth = exact.run("eager", upstream)
    del exact
    given = [g.to(DTYPES[dtype]) for g in upstream]
    calls = {way: (lambda way=way: case.run(way, given)) for way in ways}
    wrong = {way: why for way in ways if (why := _disagreement(calls[way](), truth, DTYPES[dtype]))}
    del truth
    timed = {way: call for way, call in calls.items() if way not in wrong}
    extra = {way: peak_extra_bytes(call, settings.device) for way, call in timed.items()}
    release()
    touch(max(extra.values(), default=0) * 5 // 4)
    timings = interleave(
        timed, rounds=min(settings.rounds, 7), block_ms=settings.block_ms, device=settings.device, warm_up=4
    )
    rows = []
    for way in ways:
        row = Row("ops", name, way, "forward_backward", dtype, list(case.shape), "training", error=wrong.get(way))
        row.moved_bytes = moved_bytes(calls[way])
        if not case.own_backward:
            row.kept_bytes = kept_bytes(case.outputs[way], case.held)
        if way in timed:
            timing = timings[way]
            row.p20_ms, row.p50_ms, row.p80_ms = timing.p20, timing.p50, timing.p80
            row.calls, row.page_faults, row.extra_bytes = len(timing.samples), timing.faults_per_call, extra[way]
        rows.append(row)
    add_ratios(rows)
    return rows


def _upstream(exact: Ways) -> list[Tensor]:
    if exact.own_backward:
        return []
    generator = torch.Generator().manual_seed(1)
    outputs = exact.outputs["eager"]()
    return [torch.randn(o.shape, generator=generator).to(o.device, o.dtype).bfloat16().to(o.dtype) for o in outputs]


def _disagreement(results: list[Tensor], truth: list[Tensor], dtype: torch.dtype) -> str | None:
    for k, (result, exact) in enumerate(zip(results, truth, strict=True)):
        error, largest = (result.double() - exact).abs().max().item(), exact.abs().max().item()
        allowed = _LOOSER * TOLERANCE[dtype]
        if not error <= allowed * largest:
            of = f"its largest value being {largest:.3g} (allowed: {allowed:g} of that)"
            return f"wrong: result {k} is off by {error:.3g}, {of}"
    return None
