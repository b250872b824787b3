"""Queries, keys and values of every attention while a network runs, as they enter the softmax.

Every softmax attention of the six families ends in ``torch.nn.functional.scaled_dot_product_attention``: called by the
attention processor itself (SANA, Stable Diffusion 3, Lumina 2) or through diffusers' dispatcher and its default backend
(Qwen-Image, FLUX, Z-Image). A ``TorchFunctionMode`` sees that call, with key norms and rotary embeddings already
applied, without a change to any class; forward hooks that live as long as the mode tell which layer is running. A layer
that runs and is not seen is an error: another attention backend was chosen, and its numbers would be missing.

SANA's self-attention is linear and has no softmax. Its keys and values are read by hooks behind ``to_k`` (or the norm
of the keys) and ``to_v``, its output behind the layer.

Which tokens are the text's is a matter of the family (:func:`_order`). Padding never counts as text. Where the network
sees padding (FLUX, Stable Diffusion 3, Z-Image's own), its keys do take part in the softmax.

Of a long sequence a seeded subset of the queries is kept, the same for every head; each of them attends to all keys, so
only the mean over queries is an estimate. The queries that count are the picture's, and the text's own in layers that
the picture does not enter.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from apex_fast.backbones.base import Backbone
from apex_fast.condition import Condition

Kind = Literal["cross", "joint", "text", "image", "linear"]
"""What a layer's attention joins: the picture asks the text; both ask both; text alone; the picture alone; the picture
alone, without a softmax."""

Edit = Callable[[str, Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]
"""``(layer, query, key, value) -> (query, key, value)``, each ``[B, H, tokens, d]``."""

_MULTIPLE = 32
"""To which Z-Image pads picture and text, each by itself, with tokens of its own."""


@dataclass(frozen=True)
class Tokens:
    """The tokens of one call of the network.

    Args:
        kept: ``[B, L]`` bool, the tokens of the condition that are no padding.
        image: tokens of the picture.
    """

    kept: Tensor
    image: int

    @staticmethod
    def of(backbone: Backbone, condition: Condition, height: int, width: int) -> Tokens:
        """Those of ``condition`` and latents of ``height`` x ``width``."""
        embeds, mask = condition.prompt_embeds, condition.prompt_embeds_mask
        kept = embeds.new_ones(embeds.shape[:2], dtype=torch.bool) if mask is None else mask.ne(0)
        return Tokens(kept, (height // backbone.patch) * (width // backbone.patch))


@dataclass(frozen=True)
class Order:
    """How a layer's sequence is built.

    Args:
        kind: see :data:`Kind`.
        keys: tokens of the sequence of keys.
        text: ``[B, L]``, the place of every token of the condition among the keys; of padding any place. None without
            text.
        image: ``[B]``, the place of the picture's first token among the queries. None without a picture.
    """

    kind: Kind
    keys: int
    text: Tensor | None = None
    image: Tensor | None = None


def _order(family: str, layer: str, tokens: Tokens) -> Order:
    """The order of a layer's tokens. RuntimeError for a family that is not known."""
    kept, image = tokens.kept, tokens.image
    batch, length = kept.shape
    place = torch.arange(length, device=kept.device).expand(batch, length)
    start = torch.zeros(batch, dtype=torch.long, device=kept.device)
    lengths = kept.sum(1)
    parts = layer.split(".")
    match family:
        case "sana":
            if parts[-1] == "attn1":
                return Order("linear", image, image=start)
            return Order("cross", length, text=place, image=start)
        case "qwen_image" | "flux":
            return Order("joint", length + image, text=place, image=start + length)
        case "stable_diffusion_3":
            if parts[-1] == "attn2":
                return Order("image", image, image=start)
            return Order("joint", image + length, text=place + image, image=start)
        case "lumina2":
            # The kept tokens come first in every prompt, and the picture right after them.
            if parts[0] == "context_refiner":
                return Order("text", length, text=place)
            if parts[0] == "noise_refiner":
                return Order("image", image, image=start)
            return Order("joint", int(lengths.max()) + image, text=place, image=lengths)
        case "z_image":
            # Only kept tokens enter, so the place of one is the number of kept ones before it.
            place, padded = kept.cumsum(1) - 1, -(-lengths // _MULTIPLE) * _MULTIPLE
            picture = -(-image // _MULTIPLE) * _MULTIPLE
            if parts[0] == "context_refiner":
                return Order("text", int(padded.max()), text=place.clamp(min=0))
            if parts[0] == "noise_refiner":
                return Order("image", picture, image=start)
            return Order("joint", picture + int(padded.max()), text=place.clamp(min=0) + picture, image=start)
    raise RuntimeError(
        f"the probe does not know in which order the layers of {family} keep the tokens of text and picture; add the "
        "family to _order in apex_fast/probing/capture.py"
    )


@dataclass
class LayerCall:
    """What one layer's attention saw.

    Args:
        layer: its name in the transformer.
        kind: see :data:`Kind`.
        tokens_kept: ``[B, T]`` bool: which rows of the next two count.
        token_keys, token_values: ``[B, T, channels of all heads]`` of the text's tokens, or of the picture's where the
            layer has no text; keys of linear attention behind their ReLU.
        queries: ``[B, H, S, d]``, a seeded subset; None for linear attention.
        queries_kept: ``[B, S]`` bool: which of them count.
        keys: ``[B, H, N, d]``, all of them; None for linear attention.
        bias: what is added to the logits, broadcasting to ``[B, H, S, N]``; None for nothing.
        scale: of the logits.
        output: ``[B, T, channels]`` of a linear attention; None for others.
    """

    layer: str
    kind: Kind
    tokens_kept: Tensor
    token_keys: Tensor
    token_values: Tensor
    queries: Tensor | None = None
    queries_kept: Tensor | None = None
    keys: Tensor | None = None
    bias: Tensor | None = None
    scale: float = 1.0
    output: Tensor | None = None

    @property
    def bytes(self) -> int:
        """Memory that holding this takes."""
        parts = (self.token_keys, self.token_values, self.queries, self.keys, self.bias, self.output)
        return sum(part.numel() * part.element_size() for part in parts if part is not None)


class AttentionCapture(TorchFunctionMode):
    """While it is entered, hands what every attention of a backbone sees to ``observe``, layer by layer.

    Enter it around one call of the backbone under ``torch.no_grad()``. Compiled blocks run uncompiled in it.

    Args:
        backbone: whose attention layers are watched.
        tokens: of the call.
        observe: gets a :class:`LayerCall`, whose tensors may be views of the network's own: copy what is to be kept.
        queries: at most so many queries of a layer.
        seed: of their choice.
        edit: replaces queries, keys and values of a softmax before it sees them.

    Raises:
        RuntimeError: by the call, if a layer's attention cannot be seen or has other tokens than its family's.
    """

    def __init__(
        self,
        backbone: Backbone,
        tokens: Tokens,
        observe: Callable[[LayerCall], None],
        *,
        queries: int = 64,
        seed: int = 0,
        edit: Edit | None = None,
    ) -> None:
        super().__init__()
        self._backbone, self._tokens, self._observe = backbone, tokens, observe
        self._queries, self._seed, self._edit = queries, seed, edit
        self._handles: list[RemovableHandle] = []
        self._running: list[str] = []
        self._seen = 0
        self._eager: Any = None

    def __enter__(self) -> AttentionCapture:
        modules = list(self._backbone.transformer.named_modules())
        if any(getattr(module, "_compiled_call_impl", None) is not None for _, module in modules):
            # A compiled block would not call the function that is watched.
            self._eager = torch.compiler.set_stance("force_eager")
        try:
            for name, module in modules:
                if hasattr(module, "processor"):
                    self._watch(name, module)
            return super().__enter__()
        except BaseException:
            # __exit__ is not called for what could not be entered.
            self._release(None, None, None)
            raise

    def __exit__(self, *error: Any) -> None:
        try:
            super().__exit__(*error)
        finally:
            self._release(*error)

    def _release(self, *error: Any) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._running.clear()
        if self._eager is not None:
            self._eager.__exit__(*error)
            self._eager = None

    def _watch(self, name: str, module: nn.Module) -> None:
        linear: dict[str, Tensor] = {}
        is_linear = _order(self._backbone.family, name, self._tokens).kind == "linear"

        def begin(module: nn.Module, arguments: tuple[Any, ...]) -> None:
            self._running.append(name)
            self._seen = 0
            linear.clear()

        def end(module: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
            self._running.pop()
            if is_linear:
                self._linear(name, linear, output)
            elif self._seen != 1:
                raise RuntimeError(
                    f"{name} ran {self._seen} calls of scaled_dot_product_attention where one was expected; the probe "
                    "reads attention there, so leave diffusers' attention backend at its default (native)"
                )

        self._handles += [module.register_forward_pre_hook(begin), module.register_forward_hook(end)]
        if is_linear:
            norm = getattr(module, "norm_k", None)
            for key, part in (("keys", module.to_k if norm is None else norm), ("values", module.to_v)):

                def read(module: nn.Module, arguments: tuple[Any, ...], output: Tensor, key: str = key) -> None:
                    linear[key] = output

                self._handles.append(part.register_forward_hook(read))

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is functional.scaled_dot_product_attention and self._running:
            query, key, value, options = _arguments(*args, **kwargs)
            if self._edit is not None:
                query, key, value = self._edit(self._running[-1], query, key, value)
            self._softmax(self._running[-1], query, key, value, options)
            self._seen += 1
            return func(query, key, value, **options)
        return func(*args, **kwargs)

    def _softmax(self, name: str, query: Tensor, key: Tensor, value: Tensor, options: dict[str, Any]) -> None:
        order = _order(self._backbone.family, name, self._tokens)
        if key.shape[2] != order.keys or options.get("is_causal"):
            raise RuntimeError(
                f"{name} attends to {key.shape[2]} keys{' causally' if options.get('is_causal') else ''}, and a layer "
                f"of {self._backbone.family} was expected to have {order.keys}: this diffusers orders its tokens in "
                "another way than the probe knows"
            )
        if key.shape[1] != query.shape[1]:  # grouped queries: several heads share keys and values
            repeats = query.shape[1] // key.shape[1]
            key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
        place, counted = self._chosen(order, query.shape[2])
        bias = options.get("attn_mask")
        if bias is not None:
            if bias.dtype == torch.bool:
                bias = torch.zeros(bias.shape, device=bias.device).masked_fill(~bias, -math.inf)
            if bias.shape[-2] > 1:
                rows = place[:, None, :, None].expand(-1, bias.shape[1], -1, bias.shape[-1])
                bias = bias.expand(len(place), -1, -1, -1).gather(2, rows)
        kept = self._tokens.kept
        if order.text is None:
            kept = torch.ones(key.shape[0], key.shape[2], dtype=torch.bool, device=key.device)
        self._observe(
            LayerCall(
                layer=name,
                kind=order.kind,
                tokens_kept=kept,
                token_keys=_rows(key, order.text),
                token_values=_rows(value, order.text),
                queries=query.gather(2, place[:, None, :, None].expand(-1, query.shape[1], -1, query.shape[3])),
                queries_kept=counted,
                keys=key,
                bias=bias,
                scale=options.get("scale") or query.shape[-1] ** -0.5,
            )
        )

    def _chosen(self, order: Order, count: int) -> tuple[Tensor, Tensor]:
        """Places of the queries that are kept and whether they count, each ``[B, S]``."""
        kept = self._tokens.kept
        generator = torch.Generator().manual_seed(self._seed)
        if order.image is not None:
            chosen = torch.randperm(self._tokens.image, generator=generator)[: self._queries].to(kept.device)
            place = order.image.unsqueeze(1) + chosen
            return place, torch.ones_like(place, dtype=torch.bool)
        assert order.text is not None
        # In random order, with padding behind everything else.
        rank = torch.rand(kept.shape, generator=generator).to(kept.device) + (~kept).float()
        chosen = rank.argsort(1)[:, : self._queries]
        return order.text.gather(1, chosen), kept.gather(1, chosen)

    def _linear(self, name: str, found: dict[str, Tensor], output: Tensor) -> None:
        if found.keys() != {"keys", "values"}:
            raise RuntimeError(
                f"{name}: its linear attention did not call to_k and to_v, where the probe reads keys and values; undo "
                "fuse_qkv_projections()"
            )
        # As the layer uses them: the ReLU is what makes the attention linear.
        keys = functional.relu(found["keys"])
        kept = torch.ones(keys.shape[:2], dtype=torch.bool, device=keys.device)
        self._observe(LayerCall(name, "linear", kept, keys, found["values"], output=output))


def _arguments(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    **options: Any,
) -> tuple[Tensor, Tensor, Tensor, dict[str, Any]]:
    """The arguments of ``scaled_dot_product_attention``, all but three by their names."""
    return query, key, value, {"attn_mask": attn_mask, "dropout_p": dropout_p, "is_causal": is_causal, **options}


def _rows(values: Tensor, place: Tensor | None) -> Tensor:
    """``[B, H, N, d]`` at ``place`` ``[B, L]`` as ``[B, L, H d]``; at all places for None."""
    values = values.transpose(1, 2).flatten(2)
    if place is None:
        return values
    return values.gather(1, place.clamp(max=values.shape[1] - 1).unsqueeze(2).expand(-1, -1, values.shape[2]))
