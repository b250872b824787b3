"""What a shift of the condition changes, as numbers: pure functions of tensors, in fp32 whatever comes in.

Every function returns one number per sample ``[B]``; who calls them takes the mean.
"""

from __future__ import annotations

import torch
from torch import Tensor


def token_change(real: Tensor, shifted: Tensor, kept: Tensor) -> Tensor:
    """``||shifted - real|| / ||real||`` over the tokens that count, ``[B]``.

    real, shifted: ``[B, L, ...]``. kept: ``[B, L]`` bool.
    """
    change, size = _squares(shifted.float() - real.float(), kept), _squares(real.float(), kept)
    return (change.sum(1) / size.sum(1)).sqrt()


def common_share(real: Tensor, shifted: Tensor, kept: Tensor) -> Tensor:
    """The share of the change that is the same for every token, ``[B]``: with d the change of a token,
    ``||mean of d||^2 / mean of ||d||^2``. NaN where nothing changes; 1 for a single token.

    real, shifted: ``[B, L, ...]``. kept: ``[B, L]`` bool.
    """
    change = (shifted.float() - real.float()).flatten(2)
    # where, not a product: what is not counted may be infinite
    change = torch.where(kept.unsqueeze(2), change, 0.0)
    count = kept.sum(1)
    mean = change.sum(1) / count.unsqueeze(1)
    return mean.square().sum(1) / (change.square().sum((1, 2)) / count)


def log_weights(queries: Tensor, keys: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    """Logarithms of the attention weights, ``log softmax(scale q k + bias)`` over the keys, ``[B, H, S, N]`` fp32.

    queries: ``[B, H, S, d]``. keys: ``[B, H, N, d]``. bias: broadcasts to ``[B, H, S, N]``; -inf leaves a key out.
    """
    logits = queries.float() @ keys.float().transpose(2, 3) * scale
    if bias is not None:
        logits = logits + bias.float()
    return logits.log_softmax(-1)


def symmetric_kl(real: Tensor, shifted: Tensor, counted: Tensor) -> Tensor:
    """``(KL(p || q) + KL(q || p)) / 2`` of attention weights p and q, in nats, mean over heads and queries, ``[B]``.

    real, shifted: logarithms of p and q, ``[B, H, S, N]``. counted: ``[B, S]`` bool, the queries that count.
    """
    p, q = real.exp(), shifted.exp()
    terms = (p - q) * (real - shifted)
    # A key that both leave out has the weight 0 under both, and its logarithms no difference.
    terms = torch.where(real.isneginf() & shifted.isneginf(), 0.0, terms)
    return _mean_of_queries(0.5 * terms.sum(-1), counted)


def entropy(weights: Tensor, counted: Tensor) -> Tensor:
    """``-sum p log p`` in nats of attention weights, mean over heads and queries, ``[B]``; 0 is one key alone.

    weights: logarithms, ``[B, H, S, N]``. counted: ``[B, S]`` bool.
    """
    terms = torch.where(weights.isneginf(), 0.0, weights.exp() * weights)
    return _mean_of_queries(-terms.sum(-1), counted)


def velocity_change(real: Tensor, shifted: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``||v_shift - v_real|| / ||v_real||``, the cosine of the two, and ``||v_shift|| / ||v_real||``, each ``[B]``.

    real, shifted: ``[B, C, h, w]``.
    """
    real, shifted = real.float().flatten(1), shifted.float().flatten(1)
    norm, norm_shifted = real.norm(dim=1), shifted.norm(dim=1)
    cosine = (real * shifted).sum(1) / (norm * norm_shifted)
    return (shifted - real).norm(dim=1) / norm, cosine, norm_shifted / norm


def _squares(values: Tensor, kept: Tensor) -> Tensor:
    return torch.where(kept, values.flatten(2).square().sum(2), 0.0)


def _mean_of_queries(values: Tensor, counted: Tensor) -> Tensor:
    """``[B, H, S]`` to ``[B]``."""
    values = torch.where(counted.unsqueeze(1), values, 0.0)
    return values.sum((1, 2)) / (counted.sum(1) * values.shape[1])
