"""One step instead of many for any velocity network, with the plain Python API; some seconds on a CPU."""

import torch

import apex_fast as af


class Network(torch.nn.Module):  # velocity(x_t, t, condition) = noise - data is all that is asked of a model
    def __init__(self):
        super().__init__()
        widths = [7, 128, 128, 128]
        hidden = [m for a, b in zip(widths, widths[1:], strict=False) for m in (torch.nn.Linear(a, b), torch.nn.SiLU())]
        self.layers = torch.nn.Sequential(*hidden, torch.nn.Linear(128, 2))

    def forward(self, x_t, t, condition):
        return self.layers(torch.cat([x_t, t[:, None], condition], dim=1))


CENTRES = torch.tensor([[1.0, 0.0], [0.7, 0.7], [0.0, 1.0], [-0.7, 0.7]])  # of kind k: CENTRES[k] and its opposite


def batch(size=256):
    kind, side = torch.randint(4, (size,)), torch.randint(2, (size, 1)) * 2 - 1
    return CENTRES[kind] * side + 0.05 * torch.randn(size, 2), torch.nn.functional.one_hot(kind, 4).float()


def train(objective, velocities, steps):
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    for step in range(steps):
        objective.backward(velocities, *batch(), step=step)
        optimizer.step()
        optimizer.zero_grad()
    points, condition = batch(2000)
    made = af.sample(model, torch.randn_like(points), condition, num_inference_steps=1).detach()
    centres = CENTRES[condition.argmax(1)]
    return torch.minimum((made - centres).norm(dim=1), (made + centres).norm(dim=1)).mean().item()


torch.manual_seed(0)
model, shift = Network(), af.ConditionShift(scale=-1.0, bias=0.5)  # c_fake = a c + b
# A model that needs many steps; yours is trained already. Flow matching is the objective with its data term alone.
uniform = af.TimeDistribution("uniform")
start = af.ApexObjective(shift, fake_weight=0, correction_weight=0, supervised_times=uniform)
print(f"before: in one step points land {train(start, model, 600):.2f} beside their centre")
velocities = af.Velocities.from_module(model, real="frozen")  # generator, shifted branch, real branch
print(f"after:  {train(af.ApexObjective(shift, total_steps=900, correction_weight=1.0), velocities, 900):.2f}")
