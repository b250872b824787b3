"""Tensors of a network that wait in the memory of the CPU: saved activations, and the weights of frozen blocks.

A step of the objective calls its network three to five times, with and without gradient, with an adapter on or off,
and a checkpointed block once more in backward. Two things are held on the CPU meanwhile, each by itself or together:

* **Activations**: what autograd saves for backward while the network runs goes to pinned memory and comes back when
  backward asks for it (``torch.autograd.graph.saved_tensors_hooks``, entered for the length of one call with gradient).
  Under gradient checkpointing that is the input of every checkpointed block, since the hooks that checkpointing itself
  puts in place inside of a block are the inner ones. Parameters, and views of them, stay where they are.
* **Frozen blocks**: the weights of a block that are not trained live on the CPU. Before the block runs they are put on
  the device as new tensors, and the module holds those for the length of the call; afterwards it holds the CPU's again.
  New tensors, and not ``parameter.data`` set to another device, since autograd or a recomputation may still refer to
  the very tensor that the forward used. What autograd saves of them without checkpointing is saved as a note of where
  it came from and fetched anew in backward.

On a GPU both copies run on a stream of their own: a block's weights are fetched while the block before it computes, and
saved activations are sent while the next op runs. Elsewhere they are plain copies, by which the tests count what moved.
That the streams overlap as meant has not been measured on a GPU yet.

diffusers has group offloading for inference (``apply_group_offloading``). It moves whole modules, trained adapters
included, by setting ``parameter.data``: an optimizer then finds its parameters on the CPU and their gradients on the
GPU, and without checkpointing backward finds the weights that the forward used on the CPU. So it is not used here.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

SMALLEST = 1 << 16
"""Bytes below which a saved activation stays where it is: its copy would cost more than it frees."""


@dataclass
class Moved:
    """How many bytes went each way so far, and how many activations wait on the CPU: now, and at most so far."""

    activations_out: int = 0
    activations_back: int = 0
    weights_in: int = 0
    waiting: int = 0
    most_waiting: int = 0


class Offload:
    """What a :class:`~apex_fast.Backbone` enters around its calls (``Backbone.offload``).

    Attributes:
        moved: bytes that were copied so far.
    """

    def __init__(
        self,
        transformer: nn.Module,
        *,
        activations: bool = False,
        blocks: bool = False,
        smallest: int | None = None,
    ) -> None:
        """
        Args:
            transformer: its blocks are the entries of its ``nn.ModuleList`` children.
            activations: whether saved activations wait on the CPU.
            blocks: whether the frozen weights of the blocks do: of every parameter of a block that needs no gradient
                now. They are moved to the CPU here.
            smallest: bytes of an activation that is worth moving; None is :data:`SMALLEST`.

        Raises:
            ValueError: ``blocks`` for a transformer whose blocks have no frozen weights.
        """
        self.activations, self.smallest = activations, SMALLEST if smallest is None else smallest
        self.moved = Moved()
        self.blocks: list[_Block] = []
        if blocks:
            found = [_Block(block, self) for blocks_ in block_lists(transformer) for block in blocks_]
            self.blocks = [block for block in found if block.places]
            if not self.blocks:
                raise ValueError(
                    f"block_offload: the blocks of this {type(transformer).__name__} have no frozen weights, so there "
                    "is nothing to keep on the CPU; all of it is trained"
                )
            for before, after in zip(self.blocks, self.blocks[1:], strict=False):
                before.after, after.before = after, before
        # The device's copies of frozen weights that are in use, and where they came from.
        self.fetched: dict[int, tuple[Tensor, _Place]] = {}
        self._stream: torch.cuda.Stream | None = None

    @property
    def weight_bytes(self) -> int:
        """Bytes of the frozen weights that live on the CPU."""
        return sum(p.parameter.numel() * p.parameter.element_size() for block in self.blocks for p in block.places)

    def calling(self) -> AbstractContextManager:
        """The context of one call of the network."""
        if not torch.is_grad_enabled() or not (self.activations or self.blocks):
            return nullcontext()
        return torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack)

    @contextmanager
    def staying(self) -> Iterator[None]:
        """Within this context the frozen weights of the blocks are not in the network, so that whatever moves or casts
        the network leaves them alone."""
        places = [place for block in self.blocks for place in block.places]
        for place in places:
            del place.module._parameters[place.name]
        try:
            yield
        finally:
            for place in places:
                place.module._parameters[place.name] = place.parameter

    def remove(self) -> None:
        """Takes the hooks off the blocks; their weights stay on the CPU."""
        for block in self.blocks:
            block.remove()
        self.blocks = []

    # ---- copies

    def stream(self, device: torch.device) -> torch.cuda.Stream | None:
        """The stream that copies run on; None where there are no streams."""
        if device.type != "cuda":
            return None
        if self._stream is None:
            self._stream = torch.cuda.Stream(device)
        return self._stream

    def to_host(self, tensor: Tensor) -> _Host:
        """A copy on its way to the CPU."""
        self.moved.activations_out += tensor.numel() * tensor.element_size()
        # Of what is expanded only what there really is.
        source = tensor.detach()
        for dim, stride in enumerate(tensor.stride()):
            if stride == 0 and tensor.shape[dim] > 1:
                source = source.narrow(dim, 0, 1)
        note = (self.moved, tensor.device, tensor.shape, tensor.stride(), tensor.dtype)
        if tensor.is_meta:
            return _Host(None, *note)
        stream = self.stream(tensor.device)
        if stream is None:
            return _Host(source.to("cpu", copy=True), *note)
        host = torch.empty_like(source, device="cpu", pin_memory=True)
        stream.wait_stream(torch.cuda.current_stream(tensor.device))
        with torch.cuda.stream(stream):
            host.copy_(source, non_blocking=True)
        # Its memory may be given to another tensor only when this copy is through.
        source.record_stream(stream)
        return _Host(host, *note)

    def to_device(self, host: Tensor, device: torch.device) -> Tensor:
        """A copy of ``host``, on a GPU by the copy stream; :meth:`wait` before it is used."""
        if device.type == "meta":
            return torch.empty_like(host, device=device)
        stream = self.stream(device)
        if stream is None:
            return host.to(device, copy=True)
        with torch.cuda.stream(stream):
            tensor = host.to(device, non_blocking=True)
        tensor.record_stream(torch.cuda.current_stream(device))
        return tensor

    def wait(self, device: torch.device) -> None:
        """Has the work that follows wait for the copies so far."""
        stream = self.stream(device)
        if stream is not None:
            torch.cuda.current_stream(device).wait_stream(stream)

    # ---- what autograd saves

    def _pack(self, tensor: Tensor) -> Any:
        source = tensor if isinstance(tensor, nn.Parameter) else tensor._base
        found = None if source is None else self.fetched.get(id(source))
        if found is not None and found[0] is source:
            return _Weight(found[1], tensor.device, tensor.shape, tensor.stride(), tensor.storage_offset())
        if not self.activations or isinstance(source, nn.Parameter):
            return tensor
        if type(tensor) is not Tensor or tensor.numel() * tensor.element_size() < self.smallest:
            return tensor
        return self.to_host(tensor)

    def _unpack(self, packed: Any) -> Tensor:
        if isinstance(packed, _Weight):
            self.moved.weights_in += packed.place.parameter.numel() * packed.place.parameter.element_size()
            weight = self.to_device(packed.place.parameter.detach(), packed.device)
            self.wait(packed.device)
            return weight.as_strided(packed.shape, packed.stride, packed.offset)
        if not isinstance(packed, _Host):
            return packed
        self.moved.activations_back += packed.bytes
        if packed.tensor is None:
            return torch.empty_strided(packed.shape, packed.stride, dtype=packed.dtype, device=packed.device)
        tensor = packed.tensor
        if packed.device.type != "cpu":
            tensor = self.to_device(tensor, packed.device)
            self.wait(packed.device)
        if tensor.shape != packed.shape:
            tensor = tensor.expand(packed.shape)
        elif tensor.stride() != packed.stride:
            # A slice of something larger. Kernels choose their way by strides, and another way rounds otherwise.
            laid = torch.empty_strided(packed.shape, packed.stride, dtype=packed.dtype, device=packed.device)
            tensor = laid.copy_(tensor)
        return tensor


@dataclass
class _Host:
    """A saved activation on the CPU; without values on the meta device, where only its absence counts."""

    tensor: Tensor | None
    moved: Moved
    device: torch.device
    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype

    def __post_init__(self) -> None:
        self.moved.waiting += self.bytes
        self.moved.most_waiting = max(self.moved.most_waiting, self.moved.waiting)

    def __del__(self) -> None:
        self.moved.waiting -= self.bytes

    @property
    def bytes(self) -> int:
        return self.shape.numel() * self.dtype.itemsize


@dataclass
class _Weight:
    """A frozen weight, or a view of one, that backward will need."""

    place: _Place
    device: torch.device
    shape: torch.Size
    stride: tuple[int, ...]
    offset: int


@dataclass(eq=False)
class _Place:
    """Where a frozen weight belongs; ``parameter`` is the one that lives on the CPU."""

    module: nn.Module
    name: str
    parameter: nn.Parameter


@dataclass(eq=False)
class _Block:
    """One block with its frozen weights, and the hooks that fetch them."""

    module: nn.Module
    owner: Offload
    places: list[_Place] = field(default_factory=list)
    before: _Block | None = None
    after: _Block | None = None
    ahead: dict[int, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        known: dict[int, nn.Parameter] = {}
        for module in self.module.modules():
            for name, parameter in module._parameters.items():
                if parameter is None or parameter.requires_grad:
                    continue
                home = known.get(id(parameter))
                if home is None:
                    home = known[id(parameter)] = self._at_home(parameter)
                module._parameters[name] = home
                self.places.append(_Place(module, name, home))
        self._hooks = []
        if self.places:
            self._hooks = [
                self.module.register_forward_pre_hook(self._enter, with_kwargs=True),
                # Also where the call raises, as a recomputation does on purpose once it has what backward needs.
                self.module.register_forward_hook(self._leave, always_call=True),
            ]

    @staticmethod
    def _at_home(parameter: nn.Parameter) -> nn.Parameter:
        if parameter.is_meta:
            return parameter
        data = parameter.detach().to("cpu")
        if torch.cuda.is_available():
            data = data.pin_memory()
        return parameter if data is parameter.data else nn.Parameter(data, requires_grad=False)

    def remove(self) -> None:
        for hook in self._hooks:
            hook.remove()

    # ---- around a call

    def fetch(self, device: torch.device) -> None:
        """Starts to bring the weights to ``device`` unless they are on their way."""
        if self.ahead:
            return
        for place in self.places:
            parameter = place.parameter
            if id(parameter) in self.ahead:
                continue
            self.owner.moved.weights_in += parameter.numel() * parameter.element_size()
            self.ahead[id(parameter)] = self.owner.to_device(parameter.detach(), device)

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        device = next((a.device for a in (*args, *kwargs.values()) if isinstance(a, Tensor)), None)
        if device is None:
            raise RuntimeError(
                f"block_offload: {type(module).__name__} was called without a tensor, so there is no device to fetch "
                "its weights to"
            )
        self.fetch(device)
        self.owner.wait(device)
        copies: dict[int, nn.Parameter] = {}
        for place in self.places:
            home = id(place.parameter)
            if home not in copies:
                copies[home] = nn.Parameter(self.ahead[home], requires_grad=False)
                self.owner.fetched[id(copies[home])] = (copies[home], place)
            place.module._parameters[place.name] = copies[home]
        self.ahead = {}
        if device.type in ("cuda", "meta"):
            # In backward the blocks are recomputed from the last to the first.
            backwards = torch._C._current_graph_task_id() != -1
            near = self.before if backwards else self.after
            if near is not None:
                near.fetch(device)

    def _leave(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        for place in self.places:
            copy = place.module._parameters[place.name]
            place.module._parameters[place.name] = place.parameter
            self.owner.fetched.pop(id(copy), None)


def block_lists(transformer: nn.Module) -> list[nn.ModuleList]:
    """The lists of repeated blocks of a diffusers transformer, in the order of their definition."""
    return [child for child in transformer.children() if isinstance(child, nn.ModuleList)]
