"""Counting the bytes that tensors hold while code runs, on any device, the meta device included."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import conv_flop_count, flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from apex_fast.planning import shapes

aten = torch.ops.aten

ACTIVATIONS = "activations"
"""The category of every storage that nobody has named: what passes of the network leave behind."""

_KNOWN_ELEMENTS = 1 << 17


def _attention_flops(query: Tensor, key: Tensor, value: Tensor, *_: Any, out_val: Any = None, **__: Any) -> int:
    return sdpa_flop_count(query.shape, key.shape, value.shape)


def _attention_backward_flops(grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> int:
    return sdpa_backward_flop_count(grad.shape, query.shape, key.shape, value.shape)


def _convolution_backward_flops(grad: Tensor, x: Tensor, weight: Tensor, *rest: Any, out_val: Any = None) -> int:
    # torch's own formula ignores groups, which counts a depthwise convolution many hundred times over.
    transposed, wanted = rest[4], rest[7]
    one = conv_flop_count(list(x.shape), list(weight.shape), list(grad.shape), transposed=transposed)
    return one * (bool(wanted[0]) + bool(wanted[1]))


_FLOPS = {
    **flop_registry,
    aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward_flops,
    aten.convolution_backward: _convolution_backward_flops,
}


class UnknownValueError(RuntimeError):
    """Code asked a meta tensor for its values, and they do not follow from values that are known."""


class LiveBytes(TorchDispatchMode):
    """Within this context every new storage is counted until it dies; views count once.

    Memory that a kernel takes and gives back inside one op is not seen. On the meta device, which holds no values,
    small integer and bool tensors are computed on the CPU as well as long as everything that they come from is known
    (a mask of ones, its sum), so that code which asks for a length gets one.

    Attributes:
        live: bytes now; ``by_category`` splits it.
        peak: the most since the start or :meth:`start_peak`; ``peak_by_category`` splits that moment.
        flops: floating-point operations of matrix products, convolutions and attention.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = 0
        self.by_category: dict[str, int] = {ACTIVATIONS: 0}
        self.peak = 0
        self.peak_by_category: dict[str, int] = {}
        self.flops = 0
        # Storages by their address in C++, which is theirs alone until the finalizer has run.
        self._sizes: dict[int, tuple[int, str]] = {}
        self._known = _KnownValues()

    # ---- counting

    def hold(self, tensors: Iterable[Tensor], category: str) -> None:
        """Counts ``tensors`` that exist already, or moves what is counted, under ``category``."""
        for tensor in tensors:
            for part in storages(tensor):
                found = self._sizes.get(part._cdata)
                if found is None:
                    self._count(part, category)
                elif found[1] != category:
                    size, before = found
                    self.by_category[before] -= size
                    self.by_category[category] = self.by_category.get(category, 0) + size
                    self._sizes[part._cdata] = (size, category)
        self._look()

    def start_peak(self) -> None:
        """Forgets the peak so far; the next one starts from what is alive now."""
        self.peak, self.peak_by_category = self.live, dict(self.by_category)

    def _count(self, storage: torch.UntypedStorage, category: str = ACTIVATIONS) -> None:
        size, address = storage.nbytes(), storage._cdata
        self._sizes[address] = (size, category)
        self.live += size
        self.by_category[category] = self.by_category.get(category, 0) + size
        weakref.finalize(storage, self._died, address).atexit = False

    def _died(self, address: int) -> None:
        size, category = self._sizes.pop(address)
        self.live -= size
        self.by_category[category] -= size

    def _look(self) -> None:
        if self.live > self.peak:
            self.start_peak()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = self._known.run(func, args, kwargs)
        formula = _FLOPS.get(func._overloadpacket)
        if formula is not None:
            self.flops += formula(*args, **kwargs, out_val=out)
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, Tensor):
                for storage in storages(tensor):
                    if storage._cdata not in self._sizes:
                        self._count(storage)
                        self._look()
        return out


def storages(tensor: Tensor) -> list[torch.UntypedStorage]:
    """The storages that hold ``tensor``; a quantised tensor has several."""
    if type(tensor) is not Tensor and type(tensor) is not torch.nn.Parameter:
        flatten = getattr(tensor, "__tensor_flatten__", None)
        if flatten is not None:
            return [s for name in flatten()[0] for s in storages(getattr(tensor, name))]
    return [tensor.untyped_storage()]


def bytes_of(tensors: Iterable[Tensor]) -> int:
    """Bytes of the storages behind ``tensors``, each counted once."""
    found = {storage._cdata: storage.nbytes() for tensor in tensors for storage in storages(tensor)}
    return sum(found.values())


# ---- values on the meta device


class _KnownValues:
    """Runs ops; for small integer and bool meta tensors also on the CPU, where all inputs are known."""

    def __init__(self) -> None:
        self._values: dict[int, Tensor] = {}

    def get(self, tensor: Tensor) -> Tensor | None:
        return self._values.get(id(tensor))

    def set(self, tensor: Tensor, value: Tensor) -> None:
        self._values[id(tensor)] = value
        weakref.finalize(tensor, self._values.pop, id(tensor), None).atexit = False

    def run(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        if func in _READS or not self._touches(args):
            if kwargs or not args or not isinstance(args[0], (Tensor, list, tuple)) or func in _READS:
                return self._run_unusual(func, args, kwargs)
            return shapes.run(func, args, kwargs)
        return self._run_unusual(func, args, kwargs)

    def _touches(self, args: Any) -> bool:
        known = self._values
        if known:
            for argument in args:
                if isinstance(argument, Tensor):
                    if id(argument) in known:
                        return True
                elif isinstance(argument, (list, tuple)):
                    for part in argument:
                        if id(part) in known:
                            return True
        return False

    def _run_unusual(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        inputs = [a for a in _flat((*args, *kwargs.values())) if isinstance(a, Tensor)]
        if not any(a.is_meta for a in inputs):
            out = func(*args, **kwargs)
            if isinstance(out, Tensor) and _countable(out):
                # made there, or brought there from the CPU
                self.set(out, func(*args, **{**kwargs, "device": torch.device("cpu")}))
            return out
        if not any(id(a) in self._values for a in inputs):
            if func in _READS and inputs[0].is_meta:
                raise _unknown(func)
            if func is aten._to_copy.default and kwargs.get("device", inputs[0].device).type != "meta":
                raise _unknown(func)
            return shapes.run(func, args, kwargs)
        return self._run_known(func, args, kwargs, inputs)

    def _run_known(self, func: Any, args: Any, kwargs: dict[str, Any], inputs: list[Tensor]) -> Any:
        values = {id(a): a if not a.is_meta else self.get(a) for a in inputs}
        if func in (aten.index.Tensor, aten.index_put_.default, aten.index_put.default):
            # A bool index picks as many rows as it has ones: positions instead, whose number the meta kernel sees.
            args = (args[0], _positions(args[1], self), *args[2:])
            return func(*args, **kwargs)
        if any(v is None for v in values.values()):
            if func in _READS:
                raise _unknown(func)
            if func._schema.is_mutable and id(args[0]) in self._values:
                # Something unknown is written into it, and views of it share that.
                self._values.clear()
            return func(*args, **kwargs)

        def known(tensor: Tensor) -> Tensor:
            return values[id(tensor)]

        where = {"device": torch.device("cpu")} if kwargs.get("device") is not None else {}
        on_cpu = func(*tree_map_only(Tensor, known, args), **{**tree_map_only(Tensor, known, kwargs), **where})
        if func in _READS and func is not aten.nonzero.default:
            return on_cpu
        if isinstance(on_cpu, Tensor) and kwargs.get("device", inputs[0].device).type != "meta":
            return on_cpu.clone()
        if func is aten.nonzero.default:
            out = torch.empty_like(on_cpu, device="meta")
        else:
            out = func(*args, **kwargs)
        for made, value in zip(_flat((out,)), _flat((on_cpu,)), strict=True):
            if isinstance(made, Tensor) and made.is_meta and _countable(made) and self.get(made) is None:
                self.set(made, value)
        return out


_READS = (aten._local_scalar_dense.default, aten.nonzero.default, aten.equal.default)


def _countable(tensor: Tensor) -> bool:
    return (
        tensor.is_meta
        and not tensor.is_floating_point()
        and not tensor.is_complex()
        and tensor.numel() <= _KNOWN_ELEMENTS
    )


def _flat(values: Iterable[Any]) -> Iterable[Any]:
    for value in values:
        if isinstance(value, (tuple, list)):
            yield from _flat(value)
        else:
            yield value


def _positions(indices: Any, known: _KnownValues) -> list[Tensor | None]:
    replaced: list[Tensor | None] = []
    for index in indices:
        value = known.get(index) if isinstance(index, Tensor) else None
        if value is None or value.dtype not in (torch.bool, torch.uint8):
            replaced.append(index)
        else:
            replaced += [torch.empty_like(part, device="meta") for part in value.nonzero(as_tuple=True)]
    return replaced


def _unknown(func: Any) -> UnknownValueError:
    return UnknownValueError(
        f"the network reads the values of a tensor ({func}) that planning has only the shape of; its memory depends on "
        "its data, so it cannot be planned without running it"
    )
