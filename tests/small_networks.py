"""Networks of a few hundred parameters that have what the tests need of a real one: a time, a condition, dropout, a
mask.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from apex_fast import Condition


class VectorNetwork(nn.Module):
    """Velocity of vectors ``[B, dim]`` under a plain tensor ``[B, condition_dim]``."""

    def __init__(self, dim: int = 2, condition_dim: int = 3, width: int = 16, depth: int = 2, dropout: float = 0.0):
        super().__init__()
        self.first = nn.Linear(dim + 1 + condition_dim, width)
        self.hidden = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
        self.dropout = nn.Dropout(dropout)
        self.last = nn.Linear(width, dim)

    def forward(self, x_t: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        hidden = self.first(torch.cat([x_t, t.unsqueeze(1).to(x_t.dtype), condition.to(x_t.dtype)], dim=1))
        for layer in self.hidden:
            hidden = hidden + self.dropout(layer(nn.functional.silu(hidden)))
        return self.last(hidden)


class TextNetwork(nn.Module):
    """Velocity of images ``[B, C, H, W]`` under a :class:`Condition`; masked tokens have no effect."""

    def __init__(self, channels: int = 2, condition_dim: int = 4, width: int = 8, pooled_dim: int = 0):
        super().__init__()
        self.text = nn.Linear(condition_dim, width)
        self.pooled = nn.Linear(pooled_dim, width) if pooled_dim else None
        self.time = nn.Linear(1, width)
        self.first = nn.Conv2d(channels, width, 3, padding=1)
        self.last = nn.Conv2d(width, channels, 3, padding=1)

    def forward(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        assert isinstance(condition, Condition)
        tokens = nn.functional.silu(self.text(condition.prompt_embeds))
        mask = condition.prompt_embeds_mask
        keep = torch.ones_like(tokens[..., :1]) if mask is None else mask.ne(0).unsqueeze(-1).to(tokens.dtype)
        context = (tokens * keep).sum(1) / keep.sum(1).clamp_min(1) + self.time(t.unsqueeze(1).to(tokens.dtype))
        if self.pooled is not None:
            context = context + self.pooled(condition.pooled_prompt_embeds)
        return self.last(torch.tanh(self.first(x_t) + context[:, :, None, None]))


def gradients(*modules: nn.Module) -> list[Tensor]:
    """A copy of every parameter's gradient (zeros where there is none); the gradients are cleared."""
    found = []
    for module in modules:
        for parameter in module.parameters():
            found.append(torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.clone())
            parameter.grad = None
    return found
