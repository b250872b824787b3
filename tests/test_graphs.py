"""apex_fast.graphs: a whole training step as one CUDA graph."""

from __future__ import annotations

import pytest
import torch
from small_networks import VectorNetwork
from torch import Tensor, nn

from apex_fast import ApexObjective, ConditionShift
from apex_fast.graphs import GraphedStep


def optimizer_of(module: nn.Module, **options) -> torch.optim.Optimizer:
    return torch.optim.AdamW(module.parameters(), lr=1e-2, **{"capturable": True, **options})


def test_arguments_are_checked() -> None:
    network = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="GraphedStep: pass the optimizers that the step calls"):
        GraphedStep(dict, [])
    with pytest.raises(ValueError, match="AdamW keeps its step count on the host; make it with capturable=True"):
        GraphedStep(dict, [torch.optim.AdamW(network.parameters(), capturable=False)])
    with pytest.raises(ValueError, match="warmup_steps must be at least 1, got 0"):
        GraphedStep(dict, [torch.optim.SGD(network.parameters(), lr=0.1)], warmup_steps=0)


def test_inputs_are_checked() -> None:
    network = nn.Linear(2, 2)
    graphed = GraphedStep(dict, [torch.optim.SGD(network.parameters(), lr=0.1)])
    with pytest.raises(TypeError, match="GraphedStep: count must be a Tensor, got int; .*constants="):
        graphed(count=3)
    with pytest.raises(ValueError, match="the inputs must be tensors on one CUDA device, got cpu"):
        graphed(x=torch.zeros(2))
    with pytest.raises(ValueError, match="on one CUDA device, got no inputs"):
        graphed()


def make(seed: int = 0) -> tuple[VectorNetwork, ApexObjective, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    network = VectorNetwork().cuda()
    objective = ApexObjective(ConditionShift().cuda(), warmup_steps=0, ramp_steps=0)
    return network, objective, optimizer_of(network)


def training_step(network, objective, optimizer):
    def step(x: Tensor, condition: Tensor) -> dict[str, Tensor]:
        losses = objective.backward(network, x, condition, step=5)
        norm = nn.utils.clip_grad_norm_(network.parameters(), 1.0, foreach=True)
        optimizer.step()
        return {"total": losses.total, "norm": norm}

    return step


def batches(count: int, size: int = 8) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(size)
    return [
        (torch.randn(size, 2, generator=generator).cuda(), torch.randn(size, 3, generator=generator).cuda())
        for _ in range(count)
    ]


@pytest.mark.cuda
def test_replays_train_as_steps_do() -> None:
    """Losses of the same size and a network that learns; bit-equality is not asked, since the draws differ."""
    network, objective, optimizer = make()
    graphed = GraphedStep(training_step(network, objective, optimizer), [optimizer])
    before = [p.detach().clone() for p in network.parameters()]
    totals = [graphed(x=x, condition=c)["total"].item() for x, c in batches(40)]
    assert graphed.captures == 1
    assert all(torch.isfinite(torch.tensor(totals))) and len(set(totals)) == 40
    assert all((a != b).any() for a, b in zip(before, network.parameters(), strict=True))
    assert sum(totals[-5:]) < sum(totals[:5])


@pytest.mark.cuda
def test_without_randomness_a_replay_is_the_step() -> None:
    def regression(network, optimizer):
        def step(x: Tensor, condition: Tensor) -> dict[str, Tensor]:
            loss = (network(x, x[:, 0], condition) - x).square().mean()
            loss.backward()
            optimizer.step()
            return {"loss": loss}

        return step

    results = []
    for graphs in (False, True):
        network, _, optimizer = make()
        step = regression(network, optimizer)
        run = GraphedStep(step, [optimizer]) if graphs else step
        losses = []
        for x, condition in batches(8):
            if not graphs:
                optimizer.zero_grad()
            losses.append(run(x=x, condition=condition)["loss"].item())
        results.append((losses, [p.detach().clone() for p in network.parameters()]))
    torch.testing.assert_close(results[0], results[1], rtol=1e-5, atol=1e-6)


@pytest.mark.cuda
def test_it_captures_anew_where_it_must() -> None:
    network, objective, optimizer = make()
    graphed = GraphedStep(training_step(network, objective, optimizer), [optimizer], warmup_steps=1)
    for size, constants, expected in ((8, 0, 1), (8, 0, 1), (4, 0, 2), (4, 1, 3)):
        for x, condition in batches(3, size):
            graphed(x=x, condition=condition, constants=constants)
        assert graphed.captures == expected
    optimizer.param_groups[0]["lr"] = 1e-3
    for x, condition in batches(2, 4):
        graphed(x=x, condition=condition, constants=1)
    assert graphed.captures == 4


@pytest.mark.cuda
def test_a_step_that_reads_from_the_device_is_refused() -> None:
    network, _, optimizer = make()

    def step(x: Tensor) -> dict[str, Tensor]:
        loss = network(x, x[:, 0], x.new_zeros(x.shape[0], 3)).square().mean()
        if loss.item() > 0:
            loss.backward()
        optimizer.step()
        return {"loss": loss}

    graphed = GraphedStep(step, [optimizer], warmup_steps=1)
    ((x, _),) = batches(1)
    graphed(x=x)
    with pytest.raises(RuntimeError, match="GraphedStep: the step cannot be captured. It must not read"):
        graphed(x=x)
