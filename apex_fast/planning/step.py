"""The planned step: the real objective, roles, schedule and optimizer on tensors without memory, counted."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from apex_fast.backbones.base import Backbone
from apex_fast.condition import Condition
from apex_fast.lora import DTYPES, EMA
from apex_fast.objective import ApexObjective
from apex_fast.planning.blueprint import Blueprint
from apex_fast.planning.memory import ACTIVATIONS, LiveBytes, bytes_of
from apex_fast.planning.meta import AcceleratorOnMeta
from apex_fast.planning.quantized import numel, quantize
from apex_fast.training.config import TrainConfig
from apex_fast.training.ema import WeightAverage
from apex_fast.training.flow_matching import FlowMatching
from apex_fast.training.guidance import real_guidance
from apex_fast.training.models import Autocast
from apex_fast.training.setup import make_objective, make_trainable, make_velocities
from apex_fast.velocities import Velocities

FROZEN, TRAINED, REAL, GRADIENTS, OPTIMIZER, AVERAGE = (
    "frozen weights",
    "trained weights",
    "real branch",
    "gradients",
    "optimizer",
    "average of the weights",
)
"""Categories of memory beside the activations."""

WAITING = "frozen weights on the CPU"
"""Category of what takes no memory of the device, and is left out of every sum."""

SHALLOW, DEEPER = 2, 3
"""Blocks of a kind in the two models that stand for a deep one, whose memory is linear in its blocks."""


@dataclass(frozen=True)
class StepBytes:
    """What one planned step needs.

    Attributes:
        held: bytes by category that live as long as the run; without gradients and activations.
        moments: bytes by category at the peak and at the end of each part of the step, in order: passes, backwards,
            the optimizer.
        flops: of the matrix products, convolutions and attention of one step (one pass of the accumulation).
        forward_flops: of one forward of the batch without gradient.
        trained: trained parameters.
        parameters: of the transformer, adapters left out.
        waiting_weights, waiting_activations: bytes that offloading keeps in the memory of the CPU; not in the above.
    """

    held: dict[str, float]
    moments: list[tuple[str, dict[str, float]]]
    flops: float
    forward_flops: float
    trained: float
    parameters: float
    waiting_weights: float = 0.0
    waiting_activations: float = 0.0

    @property
    def peak_moment(self) -> tuple[str, dict[str, float]]:
        """Name and bytes by category of the part of the step that needs the most."""
        return max(self.moments, key=lambda moment: sum(moment[1].values()))

    @property
    def peak(self) -> int:
        """Bytes at the peak, everything counted."""
        return round(sum(self.peak_moment[1].values()))

    @property
    def transient(self) -> int:
        """Bytes that come and go, at the peak of passes and backwards: activations, temporary tensors, gradients.

        They are one number because a gradient that waits in a backward for its second half looks like an activation.
        """
        sums = (m.get(ACTIVATIONS, 0.0) + m.get(GRADIENTS, 0.0) for name, m in self.moments if name != OPTIMIZER)
        return round(max(sums))


@dataclass
class PlannedRun:
    """A run as the trainer makes it, on any device: backbone, roles, objective, optimizer, averages."""

    backbone: Backbone
    objective: ApexObjective | FlowMatching
    velocities: Velocities
    parameters: list[nn.Parameter]
    optimizer: torch.optim.Optimizer
    average: WeightAverage | None
    x: Tensor
    condition: Condition
    negative: Condition | None
    config: TrainConfig
    marks: list[Callable[[str], None]] = field(default_factory=list)

    def mark(self, name: str) -> None:
        """Tells whoever listens that a part of the step begins."""
        for listen in self.marks:
            listen(name)

    def pass_once(self) -> None:
        """One pass of the accumulation: objective and backwards."""

        def backward(loss: Tensor, *args: Any, **kwargs: Any) -> None:
            self.mark("backward")
            (loss / self.config.gradient_accumulation_steps).backward(*args, **kwargs)
            self.mark("between")

        if isinstance(self.objective, FlowMatching):
            self.objective.backward(self.velocities.generator, self.x, self.condition, step=0, backward=backward)
            return
        self.objective.backward(
            self.velocities,
            self.x,
            self.condition,
            step=self.objective.full_step,
            negative_condition=self.negative,
            schedule=self.config.schedule_in_use,
            backward=backward,
        )

    def update(self) -> None:
        """What follows the passes: clipping, optimizer, averages."""
        self.mark(OPTIMIZER)
        limit = self.config.max_grad_norm
        torch.nn.utils.clip_grad_norm_(self.parameters, float("inf") if limit is None else limit)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.average is not None:
            self.average.update()
        self.velocities.update_ema()


def planned_run(model: Blueprint, config: TrainConfig, device: torch.device | str = "meta") -> PlannedRun:
    """The run of ``config`` with ``model`` on ``device``; the meta device takes no memory. Data and files that the
    config names are not looked at.

    Raises:
        ValueError: settings that the model or the objective refuses.
    """
    config = plannable(model, config)
    backbone = model.backbone(device)
    dtype = DTYPES[config.weight_dtype]
    cast_weights(backbone.transformer, dtype)
    if config.quantization is not None:
        backbone.transformer.requires_grad_(False)
        quantize(backbone.transformer, config.quantization)
    with torch.device(device):
        make_trainable(config, backbone)
        guidance = real_guidance(config, backbone)
        # Samples come from the data in fp32, embeddings in the dtype of the text encoder.
        x = torch.zeros(config.train_batch_size, *model.latent_shape(backbone, config.image_size))
        condition = model.condition(backbone, config.train_batch_size, dtype)
        negative = None if guidance is None else model.condition(backbone, 1, dtype)
        objective, _ = make_objective(config, backbone, guidance, condition)
        # "cpu" is what carries the state of autocast to meta tensors, see AcceleratorOnMeta.
        velocities = make_velocities(config, backbone, torch.device("cpu"), guidance)
        parameters = [p for p in backbone.parameters() if p.requires_grad]
        if isinstance(objective, ApexObjective):
            parameters += [p for p in objective.shift.parameters() if p.requires_grad]
        decays, apart = config.ema_decays, velocities.shifted_parameters()
        average = WeightAverage(backbone, decays, leave_out=apart) if decays else None
        optimizer: torch.optim.Optimizer
        if config.optimizer == "adamw_8bit":
            optimizer = EightBit(parameters)
        else:
            # As torch updates many tensors at once; its temporary tensors are part of the peak. The fused kernel that
            # runs on a GPU has none, so this is the upper bound of the two.
            optimizer = torch.optim.AdamW(parameters, lr=config.learning_rate, foreach=True)
    return PlannedRun(backbone, objective, velocities, parameters, optimizer, average, x, condition, negative, config)


class EightBit(torch.optim.Optimizer):
    """The memory of 8-bit AdamW: two moments of a byte a value, with one fp32 scale for every 256; fp32 moments for
    tensors below 4096 values."""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        super().__init__(parameters, {})

    def step(self, closure: Any = None) -> None:
        for parameter in self.param_groups[0]["params"]:
            if parameter.grad is None or self.state[parameter]:
                continue
            count, small = parameter.numel(), parameter.numel() < 4096
            kind = {"dtype": torch.float32 if small else torch.uint8, "device": parameter.device}
            for name in ("1", "2"):
                self.state[parameter][f"state{name}"] = torch.empty(count, **kind)
                if not small:
                    scales = torch.empty(-(-count // 256), dtype=torch.float32, device=parameter.device)
                    self.state[parameter][f"absmax{name}"] = scales


def plannable(model: Blueprint, config: TrainConfig) -> TrainConfig:
    """``config`` without what planning leaves out."""
    left_out: dict[str, Any] = {"compile": False, "start_lora": None, "start_lora_mode": "merge"}
    if model.own_text and config.guidance_scale is None:
        # As training does: a model with a text encoder of its own has no pipeline whose users guide it.
        left_out["guidance_scale"] = None if config.loss != "correction" else 1.0
    return dataclasses.replace(config, **left_out)


def cast_weights(transformer: nn.Module, dtype: torch.dtype) -> None:
    """Casts as ``from_pretrained(torch_dtype=)`` does, which keeps some modules of some classes in fp32."""
    kept = getattr(transformer, "_keep_in_fp32_modules", None) or []
    for name, parameter in transformer.named_parameters():
        if not any(part in name.split(".") for part in kept):
            parameter.data = parameter.data.to(dtype)
    for name, buffer in transformer.named_buffers():
        if buffer.is_floating_point() and not any(part in name.split(".") for part in kept):
            buffer.data = buffer.data.to(dtype)


# ---- counting


def count_step(model: Blueprint, config: TrainConfig, device: torch.device | str = "meta") -> StepBytes:
    """Runs one step of the whole model in its full depth and counts it.

    On the CPU this really computes, for comparison.
    """
    bytes_ = LiveBytes()
    with _counting(bytes_):
        # Inside, so that the values of masks are known.
        run = planned_run(model, config, device)
        trained = {id(p) for p in run.parameters}
        weights = [*run.backbone.parameters(), *run.backbone.buffers()]
        bytes_.hold([w for w in weights if id(w) not in trained], FROZEN)
        bytes_.hold(run.parameters, TRAINED)
        bytes_.hold(_of_the_real_branch(run), REAL)
        bytes_.hold(_waiting(run), WAITING)
        if run.average is not None:
            bytes_.hold([v for average in run.average.averages.values() for v in average.values()], AVERAGE)
        for parameter in run.parameters:
            parameter.grad = torch.zeros_like(parameter)
        run.optimizer.step()
        run.optimizer.zero_grad(set_to_none=True)
        state = [v for s in run.optimizer.state.values() for v in s.values() if isinstance(v, Tensor)]
        bytes_.hold(state, OPTIMIZER)
        if config.gradient_accumulation_steps > 1:
            # Every pass but the first finds the gradients of the ones before it.
            for parameter in run.parameters:
                parameter.grad = torch.zeros_like(parameter)
                bytes_.hold([parameter.grad], GRADIENTS)
        held = {n: float(size) for n, size in bytes_.by_category.items() if n not in (ACTIVATIONS, WAITING)}
        held[GRADIENTS] = float(bytes_of(run.parameters))
        moments = _Moments(bytes_, run)
        for parameter in run.parameters:
            parameter.register_post_accumulate_grad_hook(lambda p: bytes_.hold([p.grad], GRADIENTS))
        bytes_.flops = 0
        moments.begin("passes")
        run.pass_once()
        flops = bytes_.flops
        run.update()
        moments.end()
        bytes_.flops = 0
        with torch.no_grad():
            run.velocities.generator(run.x, torch.ones(len(run.x), device=device), run.condition)
        forward = bytes_.flops
    own = sum(numel(p) for name, p in run.backbone.transformer.named_parameters() if "lora_" not in name)
    trained_count = sum(p.numel() for p in run.parameters)
    offload = run.backbone.offload
    return StepBytes(
        held,
        moments.found,
        float(flops),
        float(forward),
        float(trained_count),
        float(own),
        waiting_weights=float(bytes_of(_waiting(run))),
        waiting_activations=0.0 if offload is None else float(offload.moved.most_waiting),
    )


def _waiting(run: PlannedRun) -> list[Tensor]:
    """Frozen weights that live on the CPU and come for the length of a call."""
    real = run.velocities.real
    networks = (run.backbone, real.module if isinstance(real, Autocast) else real)
    offloads = [n.offload for n in networks if isinstance(n, Backbone) and n.offload is not None]
    return [place.parameter for offload in offloads for block in offload.blocks for place in block.places]


def _of_the_real_branch(run: PlannedRun) -> list[Tensor]:
    """Tensors that exist for the real branch alone: a copy of the network, an averaged adapter, exact averages."""
    adapter = [p for name, p in run.backbone.named_parameters() if f".{EMA}." in name]
    twin = run.velocities.real
    own = [*twin.parameters(), *twin.buffers()] if isinstance(twin, nn.Module) else []
    shared = {id(t) for t in [*run.backbone.parameters(), *run.backbone.buffers()]}
    trained = {id(p) for p in run.velocities.shifted_parameters()}
    kept = [t for t in run.velocities._own_state().values() if id(t) not in trained]
    return [*adapter, *(t for t in own if id(t) not in shared), *kept]


@contextlib.contextmanager
def _counting(bytes_: LiveBytes) -> Iterator[None]:
    # A collection would free what hangs in a cycle at some moment or other; without, the count repeats.
    enabled = gc.isenabled()
    gc.disable()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with AcceleratorOnMeta(), bytes_:
                yield
    finally:
        if enabled:
            gc.enable()


class _Moments:
    """Splits a step into parts at every call of a role and every backward; keeps the peak of each and what it leaves.

    The peak of a whole step may be in one part in a shallow model and in another in a deep one. Within a backward it is
    at the beginning, when all activations are there, or at the end, when all gradients are: hence both.
    """

    def __init__(self, bytes_: LiveBytes, run: PlannedRun) -> None:
        self.bytes, self.found = bytes_, []
        self._name: str | None = None
        run.marks.append(self.begin)
        for role in ("generator", "shifted", "real"):
            call = getattr(run.velocities, role)
            if call is not None:
                setattr(run.velocities, role, self._wrapped(role, call))

    def _wrapped(self, role: str, call: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def velocity(*args: Any) -> Tensor:
            self.begin(role)
            result = call(*args)
            self.begin("between")
            return result

        return velocity

    def begin(self, name: str) -> None:
        self.end()
        self._name = name
        self.bytes.start_peak()

    def end(self) -> None:
        if self._name is not None:
            for bytes_ in (self.bytes.peak_by_category, self.bytes.by_category):
                self.found.append((self._name, {k: float(v) for k, v in bytes_.items() if k != WAITING}))
            self._name = None


# ---- depth


def plan_step(model: Blueprint, config: TrainConfig) -> StepBytes:
    """:func:`count_step` on the meta device, for deep models from shallow ones.

    The blocks of a kind are alike, so every part of a step needs memory and operations that are linear in their
    number; two depths of each kind give the line.
    """
    if not isinstance(config.gradient_checkpointing, bool):
        # Blocks are not alike then.
        return count_step(model, config)
    depth = model.depth()
    shallow = tuple(min(n, SHALLOW) if n > DEEPER else n for n in depth)
    result = count_step(model.at_depth(shallow), config)
    base = result
    for kind, (least, blocks) in enumerate(zip(shallow, depth, strict=True)):
        if blocks == least:
            continue
        deeper = tuple(DEEPER if i == kind else n for i, n in enumerate(shallow))
        more = count_step(model.at_depth(deeper), config)
        result = _plus(result, base, more, (blocks - least) / (DEEPER - least))
    return result


def _plus(result: StepBytes, base: StepBytes, more: StepBytes, times: float) -> StepBytes:
    """``result + times * (more - base)``, number by number."""

    def add(a: dict[str, float], b: dict[str, float], c: dict[str, float]) -> dict[str, float]:
        names = {**a, **b, **c}
        return {n: a.get(n, 0.0) + times * (c.get(n, 0.0) - b.get(n, 0.0)) for n in names}

    if [name for name, _ in base.moments] != [name for name, _ in more.moments]:
        raise RuntimeError("planning: a deeper model runs another step; this is a mistake of apex_fast")
    moments = [
        (name, add(found, below, above))
        for (name, found), (_, below), (_, above) in zip(result.moments, base.moments, more.moments, strict=True)
    ]
    numbers = {
        f.name: getattr(result, f.name) + times * (getattr(more, f.name) - getattr(base, f.name))
        for f in dataclasses.fields(StepBytes)
        if f.name not in ("held", "moments")
    }
    return StepBytes(held=add(result.held, base.held, more.held), moments=moments, **numbers)
