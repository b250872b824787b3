"""A whole training step in one CUDA graph, for networks so small that launching their kernels takes longer than running
them::

    def step(x, prompt_embeds, mask):
        losses = objective.backward(network, x, Condition(prompt_embeds, mask), step=objective_step)
        clip_grad_norm_(network.parameters(), 1.0, foreach=True)
        optimizer.step()
        return losses.metrics

    graphed = GraphedStep(step, [optimizer])
    for x, condition in batches:
        metrics = graphed(x=x, prompt_embeds=condition.prompt_embeds, mask=condition.prompt_embeds_mask)

What a capture takes down is what a replay does: numbers of the host, such as the weight that the correction has at a
step, are constants of the graph. Name them in ``constants=`` and a change captures anew.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

Step = Callable[..., Mapping[str, Tensor]]


class GraphedStep:
    """Calls ``step`` a few times as it is, then captures it once and replays it; a call is one training step in each
    case, none is made twice.

    Args:
        step: ``step(**inputs) -> {name: Tensor}``: forward, backward, clip and optimizer, without zeroing gradients,
            which is done here, and without reading anything back from the device. Random draws must come from the
            device's default generator, which a replay advances as a step does.
        optimizers: that ``step`` calls, made with ``capturable=True``. A learning rate that is a Tensor may change
            freely; one that is a float captures anew with every change.
        warmup_steps: calls before a capture, in which kernels are chosen and optimizer states are made; at least 1.

    Raises:
        ValueError: no optimizer, one that cannot be captured, or no warm-up.
    """

    def __init__(self, step: Step, optimizers: Sequence[torch.optim.Optimizer], *, warmup_steps: int = 3) -> None:
        if not optimizers:
            raise ValueError("GraphedStep: pass the optimizers that the step calls, so that their gradients are reset")
        if warmup_steps < 1:
            raise ValueError(f"GraphedStep: warmup_steps must be at least 1, got {warmup_steps}")
        for optimizer in optimizers:
            if not all(group.get("capturable", True) for group in optimizer.param_groups):
                raise ValueError(
                    f"GraphedStep: {type(optimizer).__name__} keeps its step count on the host; make it with "
                    "capturable=True"
                )
        self.step = step
        self.optimizers = tuple(optimizers)
        self.warmup_steps = warmup_steps
        self.captures = 0
        """How often a graph was made."""
        self._key: Hashable = None
        self._warm = 0
        self._graph: torch.cuda.CUDAGraph | None = None
        self._inputs: dict[str, Tensor] = {}
        self._outputs: dict[str, Tensor] = {}

    def __call__(self, *, constants: Hashable = None, **inputs: Tensor) -> dict[str, Tensor]:
        """One training step.

        Args:
            constants: what the step depends on besides its inputs; another value captures anew.
            inputs: CUDA tensors, handed to ``step`` by name. Another shape, dtype or device captures anew.

        Returns:
            What ``step`` returned, without history. The tensors of a replay are the same at every call: read them, or
            clone them, before the next one.

        Raises:
            TypeError: an input or output that is no tensor.
            ValueError: an input that is not on a CUDA device, or inputs on several.
            RuntimeError: the step does something that a graph cannot hold.
        """
        device = self._check(inputs)
        key = (tuple((n, v.shape, v.dtype, v.device) for n, v in inputs.items()), constants, self._rates())
        if key != self._key:
            self._key, self._warm, self._graph = key, 0, None
            self._inputs, self._outputs = {}, {}  # before a new pool is filled, the old one is given back
        with torch.cuda.device(device):
            if self._warm < self.warmup_steps:
                self._warm += 1
                return self._run_aside(inputs)
            if self._graph is None:
                self._capture(inputs)
            for name, value in inputs.items():
                self._inputs[name].copy_(value, non_blocking=True)
            assert self._graph is not None
            self._graph.replay()
        return dict(self._outputs)

    def _check(self, inputs: Mapping[str, Any]) -> torch.device:
        for name, value in inputs.items():
            if not isinstance(value, Tensor):
                raise TypeError(
                    f"GraphedStep: {name} must be a Tensor, got {type(value).__name__}; what is no tensor belongs into "
                    "the step itself, or into constants="
                )
        devices = {value.device for value in inputs.values()}
        if len(devices) != 1 or next(iter(devices)).type != "cuda":
            found = ", ".join(sorted(map(str, devices))) or "no inputs"
            raise ValueError(f"GraphedStep: the inputs must be tensors on one CUDA device, got {found}")
        return next(iter(devices))

    def _rates(self) -> tuple[float, ...]:
        groups = [group for optimizer in self.optimizers for group in optimizer.param_groups]
        return tuple(group["lr"] for group in groups if not isinstance(group.get("lr"), Tensor))

    def _zero_grad(self) -> None:
        # None, so that the first backward of a capture makes gradients of its own and a replay starts from them.
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)

    def _run(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        outputs = self.step(**inputs)
        if not isinstance(outputs, Mapping) or not all(isinstance(v, Tensor) for v in outputs.values()):
            raise TypeError(f"GraphedStep: the step must return a dict of Tensors, got {type(outputs).__name__}")
        return {name: value.detach() for name, value in outputs.items()}

    def _run_aside(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        # On a stream of its own, as captures want their warm-up.
        current, aside = torch.cuda.current_stream(), torch.cuda.Stream()
        aside.wait_stream(current)
        with torch.cuda.stream(aside):
            self._zero_grad()
            outputs = self._run(inputs)
        current.wait_stream(aside)
        return outputs

    def _capture(self, inputs: Mapping[str, Tensor]) -> None:
        self._inputs = {name: value.detach().clone() for name, value in inputs.items()}
        self._zero_grad()
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        try:
            with torch.cuda.graph(graph):
                self._outputs = self._run(self._inputs)
        except RuntimeError as error:
            # torch stays on the capture's own stream where ending the capture fails too.
            torch.cuda.set_stream(stream)
            self._key = None
            raise RuntimeError(
                "GraphedStep: the step cannot be captured. It must not read from the device (.item(), float(tensor), "
                "`if tensor`), copy from pageable memory, or draw from a generator that is not the device's own. "
                f"The reason given: {error}"
            ) from error
        self._graph = graph
        self.captures += 1
