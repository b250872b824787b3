"""A one-step generator from the ops alone: what to write in a training loop of your own.

No ApexObjective, no trainer: only ``torch.ops.apex_fast`` and a network. The task is small enough to see everything:
four conditions, each a ring of four blobs in the plane, and a velocity network that first learns flow matching (many
steps to sample) and then the correction on its own one-step samples. Under a minute on one core:

    python examples/raw_ops_loop.py
"""

from __future__ import annotations

import argparse
import copy
import math

import torch
from torch import Tensor, nn

import apex_fast  # noqa: F401  loads torch.ops.apex_fast

ops = torch.ops.apex_fast
CONDITIONS, WIDTH = 4, 16


class VelocityNet(nn.Module):
    """F(x_t, t, c) for points in the plane. Any network with these three arguments will do."""

    def __init__(self, hidden: int = 192) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(2 + 9 + WIDTH, hidden), nn.SiLU(),
            nn.Linear(hidden, hidden), nn.SiLU(),
            nn.Linear(hidden, hidden), nn.SiLU(),
            nn.Linear(hidden, 2),
        )  # fmt: skip

    def forward(self, x_t: Tensor, t: Tensor, c: Tensor) -> Tensor:
        waves = t[:, None] * torch.tensor([1.0, 2.0, 4.0, 8.0]) * math.pi
        return self.layers(torch.cat([x_t, t[:, None], waves.sin(), waves.cos(), c], 1))


def data(labels: Tensor, generator: torch.Generator) -> Tensor:
    """Condition k: four blobs on a circle of radius 1.5, turned by k * 22.5 degrees."""
    blob = torch.randint(4, labels.shape, generator=generator)
    angle = (blob + labels / 4) * (math.pi / 2)
    centre = 1.5 * torch.stack([angle.cos(), angle.sin()], 1)
    return centre + 0.1 * torch.randn(centre.shape, generator=generator)


def flow_matching(net: nn.Module, x: Tensor, c: Tensor, times: Tensor, generator: torch.Generator) -> Tensor:
    """Plain flow matching, loss [B]: a weight lambda = 0 of the mixed loss."""
    z = torch.randn(x.shape, generator=generator)
    x_t = ops.interpolate(x, z, times)  # t z + (1 - t) x
    return ops.mixed_velocity_loss(net(x_t, times, c), x, z)


def correction_step(
    net: nn.Module, real: nn.Module, x: Tensor, c: Tensor, weight: float, generator: torch.Generator
) -> Tensor:
    """One step of the method: its three roles and the data term, as one scalar to call backward() on."""
    batch = x.shape[0]
    noise, z = torch.randn(2, *x.shape, generator=generator)
    one, t = torch.ones(batch), torch.rand(batch, generator=generator) * 0.96 + 0.02

    # 1. Generator: from pure noise in one step. Its sample is noised again; the loss does not go back through that.
    v_gen = net(noise, one, c)
    x_fake_t, target = ops.renoise(v_gen.detach(), noise, one, z, t)
    # 2. Shifted branch: the same network under a c + b learns the velocity of what the generator makes now.
    v_shift = net(x_fake_t, t, ops.condition_shift(c, torch.tensor(-1.0), torch.tensor(0.5)))
    # 3. Real branch: the velocity of the data there. A frozen copy of the start; under LoRA, the adapter switched off.
    with torch.no_grad():
        v_real = real(x_fake_t, t, c)
    # `fake` teaches the shifted branch, `correction` pushes the generator along v_shift - v_real; `stats` are to log.
    fake, correction, stats = ops.shifted_velocity_loss(v_gen, v_shift, v_real, target, clip=1.0)

    # 4. Data, away from t = 1, where it would ask the generator for the mean of the data.
    supervised = flow_matching(net, x, c, torch.rand(batch, generator=generator) * 0.96 + 0.02, generator)
    return fake.mean() + weight * correction.mean() + supervised.mean()


@torch.no_grad()
def one_step_distance(net: nn.Module, embeddings: Tensor, count: int = 1000) -> float:
    """Energy distance between one-step samples and data, mean over the conditions; 0 means the same distribution."""
    generator, total = torch.Generator().manual_seed(7), 0.0
    for k in range(CONDITIONS):
        c, noise = embeddings[k].expand(count, -1), torch.randn(count, 2, generator=generator)
        fake = ops.sampler_step(noise, net(noise, torch.ones(count), c), torch.ones(count), torch.zeros(count))
        real = data(torch.full((count,), k), generator)
        within = (torch.cdist(fake, fake).sum() + torch.cdist(real, real).sum()) / (count * (count - 1))
        total += float(2 * torch.cdist(fake, real).mean() - within)
    return total / CONDITIONS


def main(start_steps: int = 1500, steps: int = 2000, batch: int = 256) -> tuple[float, float]:
    """Train; returns the one-step energy distance before and after."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(1)
    embeddings = torch.randn(CONDITIONS, WIDTH)
    net = VelocityNet()

    def draw() -> tuple[Tensor, Tensor]:
        labels = torch.randint(CONDITIONS, (batch,), generator=generator)
        return data(labels, generator), embeddings[labels]

    optimizer = torch.optim.Adam(net.parameters(), lr=2e-3)
    for _ in range(start_steps):
        x, c = draw()
        optimizer.zero_grad()
        flow_matching(net, x, c, torch.rand(batch, generator=generator), generator).mean().backward()
        optimizer.step()
    before = one_step_distance(net, embeddings)
    print(f"flow matching, one step: energy distance {before:.4f}")

    real = copy.deepcopy(net).requires_grad_(False)
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)
    for step in range(steps):
        # The shifted branch is fitted before its difference is believed, and the rate falls to nothing at the end.
        weight = min(1.0, max(0.0, step / steps - 0.1) * 10)
        optimizer.param_groups[0]["lr"] = 1e-3 * (1 - step / steps)
        x, c = draw()
        optimizer.zero_grad()
        correction_step(net, real, x, c, weight, generator).backward()
        optimizer.step()
        if (step + 1) % max(1, steps // 5) == 0:
            print(f"step {step + 1:5}: energy distance {one_step_distance(net, embeddings):.4f}")
    return before, one_step_distance(net, embeddings)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2000)
    before, after = main(steps=parser.parse_args().steps)
    print(f"one step: {before:.4f} before, {after:.4f} after, {before / max(after, 1e-6):.0f} times closer to the data")
