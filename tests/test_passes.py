"""The passes that planning counts are those that a step makes."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from apex_fast import ApexObjective, ConditionShift
from apex_fast.passes import Passes, mean_forwards, objective_passes, paper_passes, step_passes

BATCH = 2


class _Counted(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, owner):
        ctx.owner, ctx.rows = owner, x.shape[0]
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        ctx.owner.backward_rows += ctx.rows
        return grad, None


class Counting(nn.Module):
    """A network that counts the samples of its forwards and backwards."""

    def __init__(self, checkpointing: bool) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)
        self.checkpointing = checkpointing
        self.in_backward = False
        self.without = self.within = self.recomputed = self.backward_rows = 0

    def body(self, x: Tensor) -> Tensor:
        if self.in_backward:
            self.recomputed += x.shape[0]
        elif torch.is_grad_enabled():
            self.within += x.shape[0]
        else:
            self.without += x.shape[0]
        return _Counted.apply(self.layer(x), self)

    def forward(self, x_t: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        x = x_t + t[:, None] + condition
        if self.checkpointing and torch.is_grad_enabled():
            return checkpoint(self.body, x, use_reentrant=False)
        return self.body(x)

    def run_backward(self, loss: Tensor) -> None:
        self.in_backward = True
        loss.backward()
        self.in_backward = False

    def passes(self) -> Passes:
        counts = (self.without, self.within, self.backward_rows, self.recomputed)
        assert all(count % BATCH == 0 for count in counts)
        return Passes(*(count // BATCH for count in counts))


def run(network: Counting, objective: ApexObjective, schedule: str, step: int) -> None:
    x, condition = torch.randn(BATCH, 3), torch.randn(BATCH, 3)
    negative = torch.randn(1, 3) if objective.guidance_scale != 1 else None
    objective.backward(
        network,
        x,
        condition,
        step=step,
        schedule=schedule,
        negative_condition=negative,
        backward=network.run_backward,
        generator=torch.Generator().manual_seed(0),
    )


@pytest.mark.parametrize("schedule", ["joint", "retain", "sequential"])
@pytest.mark.parametrize("correction", [True, "measured", False])
def test_passes_of_the_correction(schedule: str, correction: bool | str) -> None:
    for supervised, fake, guided, checkpointing in itertools.product([True, False], repeat=4):
        terms = {"correction": correction, "supervised": supervised, "fake": fake}
        if correction is not True and not supervised and not fake:
            with pytest.raises(ValueError, match="nothing is trained"):
                step_passes(schedule, **terms)
            continue
        objective = ApexObjective(
            ConditionShift(),
            correction_weight=0.5 if correction else 0.0,
            fake_weight=float(fake),
            supervised_weight=float(supervised),
            guidance_scale=3.0 if guided else 1.0,
            warmup_steps=1,
            ramp_steps=0,
        )
        network = Counting(checkpointing)
        run(network, objective, schedule, step=0 if correction == "measured" else 1)
        planned = step_passes(schedule, **terms, guided=guided, checkpointing=checkpointing)
        assert network.passes() == planned, (terms, guided, checkpointing)


@pytest.mark.parametrize("detached", [True, False])
def test_passes_of_the_paper_loss(detached: bool) -> None:
    for fake, mix, mixes, checkpointing in itertools.product([True, False], repeat=4):
        if not (fake or mix):
            with pytest.raises(ValueError, match="nothing is trained"):
                paper_passes(fake=fake, mix=mix)
            continue
        planned = paper_passes(fake=fake, mix=mix, mixes_shifted=mixes, detached=detached, checkpointing=checkpointing)
        for schedule in ("joint", "retain", *(("sequential",) if detached else ())):
            objective = ApexObjective(
                ConditionShift(),
                loss="paper",
                paper_fake_weight=float(fake),
                paper_mix_weight=float(mix),
                mix_weight=0.5 if mixes else 0.0,
                detach_x_fake=detached,
            )
            network = Counting(checkpointing)
            run(network, objective, schedule, step=0)
            assert network.passes() == planned, (fake, mix, mixes, checkpointing, schedule)


@pytest.mark.parametrize("schedule", ["joint", "retain", "sequential"])
def test_passes_of_every_kind_of_step(schedule: str) -> None:
    for consistency, mix, mixes, guided, checkpointing in itertools.product([True, False], repeat=5):
        objective = ApexObjective(
            ConditionShift(),
            consistency_weight=float(consistency),
            mix_regulariser_weight=float(mix),
            mix_weight=0.5 if mixes else 0.0,
            guidance_scale=3.0 if guided else 1.0,
            generator_every=3,
            supervised_every=2,
            warmup_steps=0,
            ramp_steps=0,
        )
        options = {"guided": guided, "checkpointing": checkpointing}
        sums = []
        for step in range(6):
            network = Counting(checkpointing)
            run(network, objective, schedule, step=step)
            assert network.passes() == objective_passes(objective, schedule, **options, step=step), (step, options)
            sums.append(network.passes().total_in_forwards)
        assert objective.full_step == 5 and sums[5] == max(sums) > min(sums)
        assert network.passes() == objective_passes(objective, schedule, **options)
        assert mean_forwards(objective, schedule, **options) == pytest.approx(sum(sums) / 6)


def test_totals_in_forwards() -> None:
    # method: 2 + 3 forwards and 3 backwards of 2 F; checkpointing runs the 3 again, guidance adds one.
    assert step_passes("sequential").total_in_forwards == 11
    assert step_passes("retain").total_in_forwards == 10
    assert step_passes("sequential", checkpointing=True).total_in_forwards == 14
    assert step_passes("joint", guided=True).total_in_forwards == 12
    assert str(step_passes("retain", guided=True)) == "11 F (2 without gradient, 3 with, 3 backward)"


def test_unknown_schedule() -> None:
    with pytest.raises(ValueError, match='got "?.?parallel'):
        step_passes("parallel")
