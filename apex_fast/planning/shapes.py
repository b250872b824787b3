"""A memory of what operations on meta tensors return, since a step repeats each of them many thousand times."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

_Made = tuple[tuple[tuple[int, ...], tuple[int, ...], torch.dtype], ...]

_functional: dict[Any, bool] = {}
_made: dict[Any, tuple[bool, _Made]] = {}
_LIMIT = 100_000


def run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """``func(*args, **kwargs)``; where the same was asked before of meta tensors of the same shapes, new tensors like
    those that came then, without running the operation.

    Only for operations that return new tensors: views and in-place operations always run.
    """
    functional = _functional.get(func)
    if functional is None:
        functional = _functional[func] = _returns_new_tensors(func)
    if not functional:
        return func(*args, **kwargs)
    try:
        key = (func, *map(_describe, args), *((name, _describe(value)) for name, value in kwargs.items()))
        found = _made.get(key)
    except (_NotDescribed, TypeError):
        return func(*args, **kwargs)
    if found is None:
        out = func(*args, **kwargs)
        made = _description(out, args)
        if made is not None and len(_made) < _LIMIT:
            _made[key] = (isinstance(out, Tensor), made)
        return out
    single, made = found
    outs = [torch.empty_strided(size, stride, dtype=dtype, device="meta") for size, stride, dtype in made]
    return outs[0] if single else tuple(outs)


class _NotDescribed(Exception):
    pass


def _returns_new_tensors(func: Any) -> bool:
    schema = func._schema
    return (
        not schema.is_mutable
        and bool(schema.returns)
        and all(str(r.type) == "Tensor" and r.alias_info is None for r in schema.returns)
        and all(a.alias_info is None for a in schema.arguments)
        and torch.Tag.data_dependent_output not in func.tags
        and torch.Tag.dynamic_output_shape not in func.tags
    )


def _describe(value: Any) -> Any:
    kind = type(value)
    if kind is Tensor or kind is torch.nn.Parameter:
        if not value.is_meta:
            raise _NotDescribed
        return value.dtype, tuple(value.shape), value.stride()
    if kind is list or kind is tuple:
        return kind, *map(_describe, value)
    if isinstance(value, Tensor):
        raise _NotDescribed
    # 1, 1.0 and True are equal as keys, and give results of other dtypes
    return kind, value


def _description(out: Any, args: Any) -> _Made | None:
    """How to make tensors like those of ``out``; None where that cannot be done or ``out`` shares memory with ``args``,
    which some operations do although their schema says otherwise."""
    taken = {t.untyped_storage()._cdata for t in tree_leaves(args) if isinstance(t, Tensor)}
    made = []
    for tensor in (out,) if isinstance(out, Tensor) else tuple(out):
        if type(tensor) is not Tensor or not tensor.is_meta or tensor.untyped_storage()._cdata in taken:
            return None
        like = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
        if like.untyped_storage().nbytes() != tensor.untyped_storage().nbytes():
            return None
        made.append((tuple(tensor.shape), tensor.stride(), tensor.dtype))
    return tuple(made)
