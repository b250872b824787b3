"""What every family of text-to-image flow models has in common: an unmodified transformer behind one convention.

A backbone holds the plain diffusers transformer as its only submodule, so that ``parameters()``, ``state_dict()``, an
optimizer or a checkpoint see nothing else. Tokenizers, text encoders, VAE and scheduler are kept beside it in
``components``, unmodified too: text is encoded by the stock pipeline's own ``encode_prompt``, and
:meth:`Backbone.pipeline` gives that pipeline back over the same objects. A family file states its network's time scale
and direction, its sign, packing and masks; everything else is here.

No class is patched, and no hook outlives a call unless blocks are offloaded, which is asked for
(:mod:`apex_fast.backbones.offload`). Three things need one while a call runs: networks that round the time
to their own dtype get it back unrounded (:meth:`Backbone.exact_time`), a condition shift at the site "projected" is
applied behind the network's own text projection (``Backbone.text_projection``), and under gradient checkpointing a
block is recomputed in the state that its forward had (:meth:`Backbone.enable_gradient_checkpointing`), whichever role
is active by then.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from apex_fast import ops
from apex_fast.backbones.offload import Offload, block_lists
from apex_fast.condition import Condition
from apex_fast.extras import require
from apex_fast.shift import SITES, SitedCondition

if TYPE_CHECKING:
    from apex_fast.backbones.own_text import OwnText
    from apex_fast.fusion import Fusion

Replay = Callable[[], AbstractContextManager]
"""Makes a context in which a recomputation finds what its forward found."""


@dataclass(frozen=True)
class TeacherGuidance:
    """How a family's own pipeline guides a sampler when its user sets nothing; the real branch is guided the same way.

    Args:
        scale: classifier-free guidance, in the convention of the pipeline's argument; see
            :meth:`Backbone.linear_guidance_scale`. 1 is none.
        negative_prompt: what it leads away from. None: the pipeline guides only if its user writes a negative prompt.
        embedded: the scale that guidance-distilled weights take as an input (FLUX.1-dev); None for all others.
    """

    scale: float = 1.0
    negative_prompt: str | None = None
    embedded: float | None = None


class Backbone(nn.Module):
    """A pretrained flow transformer as a velocity callable: ``backbone(x_t, t, condition)`` is noise minus data.

    Get one with :meth:`from_pretrained`. Families are subclasses that implement :meth:`velocity`, :meth:`encode_text`,
    :meth:`encode_latents` and :meth:`decode_latents` and fill the class attributes.

    Args:
        transformer: the diffusers transformer of the family, unmodified.
        components: tokenizers, text encoders, VAE and scheduler under the names that the family's pipeline gives them.
            What is missing is only missed by the call that needs it.
        text: a text encoder and tokenizer of the model's own (:class:`~apex_fast.backbones.own_text.OwnText`) in
            place of the pipeline's, for models made from scratch; it is a submodule and can be trained.
        max_sequence_length: tokens that :meth:`encode` pads or cuts prompts to; None is what the family's pipeline
            uses.
        embedded_guidance: for weights that take the guidance scale as an input (``config.guidance_embeds``).
        shift_padding: for families whose network sees padding (no mask), whether the condition shift touches padding
            tokens too.
        sample_size: edge of the samples that a model with a text encoder of its own was made for, where the
            transformer's config states none (Qwen-Image, Z-Image).

    Raises:
        ValueError: a transformer of another class, guidance that these weights do not take, or a size that is missing
            or stated twice.
    """

    family: ClassVar[str]
    transformer_class: ClassVar[str]
    pipeline_class: ClassVar[str]
    text_parts: ClassVar[tuple[str, ...]]
    """Components that text encoding needs, tokenizers included."""
    has_mask: ClassVar[bool]
    """Whether the network takes the padding mask; if not, padding is part of the condition and the length is fixed."""
    default_sequence_length: ClassVar[int]
    teacher_guidance: ClassVar[TeacherGuidance]
    lora_targets: ClassVar[tuple[str, ...]]
    """Ends of the names of the layers that LoRA adapts by default: attention, feed-forward and modulation of every
    block, and the embedding of the time. Without the last two the network cannot learn to act otherwise at t = 1 than
    elsewhere, and one-step samples stay blurred (docs/lora.md)."""
    text_projection: ClassVar[str]
    """Name of the last module of the network's own text projection, behind which a shift at the site "projected" is
    applied."""

    def __init__(
        self,
        transformer: nn.Module,
        *,
        components: Mapping[str, Any] | None = None,
        text: OwnText | None = None,
        max_sequence_length: int | None = None,
        embedded_guidance: float | None = None,
        shift_padding: bool = False,
        sample_size: int | None = None,
    ) -> None:
        super().__init__()
        name = type(self).__name__
        if type(transformer).__name__ != self.transformer_class:
            raise ValueError(
                f"{name}: expected a diffusers {self.transformer_class}, got {type(transformer).__name__}; "
                "Backbone.from_pretrained chooses the family by itself"
            )
        self.transformer = transformer
        self.text = text
        # Not registered as submodules: a frozen text encoder is no parameter of the model that is trained.
        self.components: dict[str, Any] = dict(components or {})
        self._freed: dict[str, str] = {}
        self.shift_padding = shift_padding
        if text is not None:
            width = self.text_width
            if text.width != width:
                raise ValueError(
                    f"{name}: the transformer expects text of width {width}, the text encoder gives {text.width}"
                )
            max_sequence_length = max_sequence_length or text.max_sequence_length
        stated = getattr(transformer.config, "sample_size", None)
        if stated is not None and sample_size is not None:
            raise ValueError(
                f"{name}: sample_size={sample_size}, but the transformer's config states its own ({stated}); leave "
                "sample_size out"
            )
        if text is not None and stated is None and sample_size is None:
            raise ValueError(
                f"{name}: this transformer's config states no size of its samples; say which one the model is made "
                "for, e.g. sample_size=8"
            )
        self.sample_size = sample_size
        self.max_sequence_length = max_sequence_length or self.default_sequence_length
        embeds = bool(getattr(transformer.config, "guidance_embeds", False))
        if embeds and embedded_guidance is None:
            embedded_guidance = self.teacher_guidance.embedded
            if embedded_guidance is None:
                raise ValueError(
                    f"{name}: these weights take the guidance scale as an input (config.guidance_embeds); pass "
                    "embedded_guidance=, e.g. embedded_guidance=4.5"
                )
        elif embedded_guidance is not None and not embeds:
            raise ValueError(
                f"{name}: embedded_guidance= is for weights that take the guidance scale as an input, and "
                "config.guidance_embeds is false; guide the sampler with guidance_scale= instead"
            )
        self.embedded_guidance = embedded_guidance
        # What a checkpointed block must find again when it is recomputed; called at its forward (see lora.py).
        self.recompute_states: list[Callable[[], Replay]] = []
        self._checkpointing: bool | int | list[int] = True
        # Keeps saved activations, or frozen blocks, in the memory of the CPU.
        self.offload: Offload | None = None
        # Takes a shifted condition unwritten, while apex_fast.fusion has put the shift into the text path.
        self.fusion: Fusion | None = None

    # ---- what a family states

    def velocity(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """The family's network call in the library's convention; ``x_t`` has the transformer's dtype."""
        raise NotImplementedError

    def encode_text(self, prompts: list[str], *, negative: bool) -> Condition:
        """The condition of ``prompts`` as the family's pipeline makes it (through its own ``encode_prompt``)."""
        raise NotImplementedError

    def encode_latents(self, images: Tensor, generator: torch.Generator | None) -> Tensor:
        """Latents ``[B, C, h, w]`` of images in [-1, 1] ``[B, 3, H, W]``, in the scale that the network reads."""
        raise NotImplementedError

    def decode_latents(self, latents: Tensor) -> Tensor:
        """The inverse of :meth:`encode_latents`."""
        raise NotImplementedError

    @property
    def text_width(self) -> int:
        """Channels D of ``prompt_embeds`` that the network expects."""
        raise NotImplementedError

    @property
    def latent_channels(self) -> int:
        """C of the samples."""
        return self.transformer.config.in_channels

    @property
    def patch(self) -> int:
        """Latent pixels that one token covers in each direction."""
        return self.transformer.config.patch_size

    def guide(self, v_condition: Tensor, v_negative: Tensor, scale: float) -> Tensor:
        """Guided velocity as the family's pipeline combines the two, all ``[B, C, h, w]``."""
        return v_negative + scale * (v_condition - v_negative)

    def linear_guidance_scale(self, scale: float) -> float | None:
        """g such that the pipeline's guidance at ``scale`` is ``v_negative + g (v_condition - v_negative)``, which the
        loss op computes on its way; None where it is no such line and :meth:`guide` has to be called.
        """
        return scale

    def parameters_without_gradient(self) -> set[str]:
        """Names of parameters of the transformer that no output depends on, such as the text side of a last block.

        They are frozen in full tuning and left out of LoRA: an optimizer would decay them and DistributedDataParallel
        would wait for them.
        """
        return set()

    # ---- use

    def forward(self, x_t: Tensor, t: Tensor, condition: Condition | Tensor) -> Tensor:
        """Velocity, noise minus data (APEX, arXiv 2604.12322, Eq. 3), in the dtype of the transformer.

        Args:
            x_t: ``[B, C, h, w]`` latents, any float dtype and any size that the patches divide.
            t: ``[B]`` fp32 or fp64, 1 is noise; it reaches the time embedding unrounded.
            condition: as :meth:`encode` makes it; a plain Tensor ``[B, L, D]`` counts every token.

        Raises:
            ValueError: shapes that do not fit each other or the network.
        """
        if self.offload is None:
            return self._call(x_t, t, condition)
        with self.offload.calling():
            return self._call(x_t, t, condition)

    def _call(self, x_t: Tensor, t: Tensor, condition: Condition | Tensor) -> Tensor:
        if not isinstance(condition, Condition):
            condition = Condition(condition)
        if isinstance(condition, SitedCondition):
            with self._shifted_projection(condition):
                return self._checked_velocity(x_t, t, condition.condition)
        if self.fusion is None:
            return self._checked_velocity(x_t, t, condition.written())
        with self.fusion.instruction(condition) as original:
            return self._checked_velocity(x_t, t, original)

    def _checked_velocity(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        embeds = condition.prompt_embeds
        name, batch = type(self).__name__, x_t.shape[0]
        if x_t.dim() != 4 or embeds.shape[0] != batch or t.shape != (batch,):
            raise ValueError(
                f"{name}: expected x_t [B, C, h, w], t [B] and prompt_embeds [B, L, D] of one batch size, "
                f"got {list(x_t.shape)}, {list(t.shape)} and {list(embeds.shape)}"
            )
        if x_t.shape[1] != self.latent_channels or embeds.shape[2] != self.text_width:
            raise ValueError(
                f"{name}: expected x_t with {self.latent_channels} channels and prompt_embeds with {self.text_width}, "
                f"got {x_t.shape[1]} and {embeds.shape[2]}; is the condition of another model?"
            )
        if x_t.shape[2] % self.patch or x_t.shape[3] % self.patch:
            raise ValueError(
                f"{name}: latents must be a multiple of {self.patch} high and wide (the patches of this network), "
                f"got {list(x_t.shape)}"
            )
        if not self.has_mask and embeds.shape[1] != self.token_count:
            raise ValueError(
                f"{name}: this network takes no padding mask, so every condition must have the same "
                f"{self.token_count} tokens (max_sequence_length={self.max_sequence_length}), got {embeds.shape[1]}; "
                "encode prompts with the length that the model is used with"
            )
        return self.velocity(x_t.to(self.transformer.dtype), t, condition)

    @property
    def token_count(self) -> int:
        """Tokens of a condition that :meth:`encode` makes (``max_sequence_length``, and a second encoder's)."""
        return self.max_sequence_length

    def site_width(self, site: str) -> int:
        """Channels of a text token at the site of a condition shift, the ``dim`` of a diagonal one.

        ValueError for an unknown site.
        """
        if site not in SITES:
            raise ValueError(f"{type(self).__name__}: site must be one of {', '.join(SITES)}, got {site!r}")
        if site == "raw":
            return self.text_width
        module = self.transformer.get_submodule(self.text_projection)
        if isinstance(module, nn.Sequential):
            module = module[-1]
        width = getattr(module, "out_features", None)  # a linear layer, or what an adapter or a quantiser made of it
        return module.weight.shape[-1] if width is None else width

    def projected_tokens(self, shifted: SitedCondition, projected: Tensor) -> Tensor | None:
        """Which tokens of ``projected`` ``[..., D]`` (of the text projection) are shifted, ``[...]``; None for all."""
        return shifted.shifted_tokens()

    @contextmanager
    def _shifted_projection(self, shifted: SitedCondition) -> Iterator[None]:
        shift, calls = shifted.shift, 0

        def apply(module: nn.Module, arguments: tuple[Any, ...], projected: Tensor) -> Tensor:
            nonlocal calls
            calls += 1
            return ops.condition_shift(
                projected, shift.scale, shift.bias, mask=self.projected_tokens(shifted, projected)
            )

        handle = self.transformer.get_submodule(self.text_projection).register_forward_hook(apply)
        try:
            yield
        finally:
            handle.remove()
        if calls != 1:
            raise RuntimeError(
                f"{type(self).__name__}: the condition shift belongs behind {self.text_projection}, which this call of "
                f"the network ran {calls} times instead of once; was the module or its forward replaced?"
            )

    def encode(self, prompts: list[str], *, negative: bool = False, requires_grad: bool = False) -> Condition:
        """The condition of ``prompts``: embeddings ``[B, L, D]`` in the text encoder's dtype, on the transformer's
        device, with the bool mask ``[B, L]`` of the tokens that are no padding.

        Args:
            prompts: texts; "" is the empty prompt.
            negative: whether they are negative prompts, which some pipelines prepare differently (SANA leaves its
                instruction out).
            requires_grad: keep the graph, for a text encoder of the model's own that is trained along.

        Raises:
            TypeError: a single string.
            RuntimeError: the text encoders were freed or never loaded.
        """
        if isinstance(prompts, str):
            raise TypeError(f"{type(self).__name__}.encode: expected a list of prompts, got one string; write [prompt]")
        if self.text is not None:
            return self.text.encode(list(prompts), requires_grad=requires_grad).to(self.device)
        self._needs(self.text_parts, "encode prompts")
        with torch.no_grad():
            condition = self.encode_text(list(prompts), negative=negative)
        mask = condition.prompt_embeds_mask
        if mask is not None:
            mask = None if self.shift_padding and not self.has_mask else mask.bool()
        made = Condition(condition.prompt_embeds, mask, condition.pooled_prompt_embeds)
        # A transformer that was not loaded is nowhere; the embeddings then stay where they were made.
        return made if self.device.type == "meta" else made.to(self.device)

    @torch.no_grad()
    def encode_images(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Latents ``[B, C, h, w]`` of images ``[B, 3, H, W]`` in [-1, 1], in the VAE's dtype; the images themselves for
        a model without a VAE.

        generator: of the VAE's sampling, where it samples.
        """
        if "vae" not in self.components and "vae" not in self._freed:
            return images
        self._needs(("vae",), "encode images")
        vae = self.components["vae"]
        self.latent_shape(*images.shape[2:])
        return self.encode_latents(images.to(vae.device, vae.dtype), generator)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Images ``[B, 3, H, W]`` in about [-1, 1] of latents, in the VAE's dtype; the inverse of
        :meth:`encode_images`.
        """
        if "vae" not in self.components and "vae" not in self._freed:
            return latents
        self._needs(("vae",), "decode latents")
        vae = self.components["vae"]
        return self.decode_latents(latents.to(vae.device, vae.dtype))

    # ---- sizes

    @functools.cached_property
    def vae_scale_factor(self) -> int:
        """Image pixels per latent pixel in each direction; 1 for a model in pixel space, and for a transformer that was
        loaded alone, whose sizes are those of its latents."""
        if "vae" not in self.components:
            return 1
        return int(self.pipeline().vae_scale_factor)

    @property
    def size_multiple(self) -> int:
        """Height and width of images must be multiples of this many pixels."""
        return self.vae_scale_factor * self.patch

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """(C, h, w) of the latents of one image of ``height`` x ``width`` pixels. ValueError for a size that does not
        divide."""
        multiple = self.size_multiple
        if height < 1 or width < 1 or height % multiple or width % multiple:
            near = [max(multiple, round(edge / multiple) * multiple) for edge in (height, width)]
            raise ValueError(
                f"{type(self).__name__}: images must be multiples of {multiple} pixels high and wide, got "
                f"{height} x {width}; {near[0]} x {near[1]} is near"
            )
        return self.latent_channels, height // self.vae_scale_factor, width // self.vae_scale_factor

    @property
    def sample_shape(self) -> tuple[int, int, int]:
        """(C, h, w) of one sample of the size that the model was built for."""
        edge = self.transformer.config.sample_size
        return self.latent_channels, edge, edge

    @property
    def device(self) -> torch.device:
        """Where the transformer is."""
        return next(self.transformer.parameters()).device

    # ---- the parts beside the transformer

    def pipeline(self) -> Any:
        """The stock diffusers pipeline over the very same objects, the transformer included.

        Components that were freed or not loaded are None in it.
        """
        diffusers = require("diffusers", extra="train")
        cls = getattr(diffusers, self.pipeline_class)
        parts: dict[str, Any] = {"transformer": self.transformer}
        for name, parameter in inspect.signature(cls).parameters.items():
            if name in self.components:
                parts[name] = self.components[name]
            elif parameter.default is inspect.Parameter.empty:
                parts.setdefault(name, None)
        return cls(**parts)

    def free_text_encoders(self) -> None:
        """Drops tokenizers and text encoders, for training on embeddings that are encoded already."""
        self._free(self.text_parts, "free_text_encoders()")

    def free_vae(self, how: str = "free_vae()") -> None:
        """Drops the VAE, for training on latents that are encoded already. ``how`` is named where it is missed."""
        self.vae_scale_factor  # noqa: B018 - cached while the VAE that tells it is still there
        self._free(("vae",), how)

    def _free(self, names: tuple[str, ...], how: str) -> None:
        for name in names:
            if self.components.pop(name, None) is not None:
                self._freed[name] = how

    def _needs(self, names: tuple[str, ...], what: str) -> None:
        missing = [name for name in names if self.components.get(name) is None]
        if missing:
            why = self._freed.get(missing[0])
            raise RuntimeError(
                f"{type(self).__name__}: {', '.join(missing)} is needed to {what}, and "
                + (f"was dropped by {why}" if why else "was not loaded")
                + "; load the model with its text encoders and VAE (Backbone.from_pretrained), or use what was encoded "
                "before"
            )

    def to(self, *args: Any, **kwargs: Any) -> Backbone:
        """Moves the transformer as any module, and to a device also text encoders and VAE; a dtype is the
        transformer's alone. Blocks that are offloaded stay where and what they are."""
        with nullcontext() if self.offload is None else self.offload.staying():
            super().to(*args, **kwargs)
        device = torch._C._nn._parse_to(*args, **kwargs)[0]
        if device is not None:
            for part in self.components.values():
                if isinstance(part, nn.Module) and part.device != device:
                    part.to(device)
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Backbone:
        # A frozen or averaged copy for the real branch needs its own transformer only: what is beside it is shared,
        # and so is a text encoder of the model's own unless it is being trained.
        memo[id(self.components)] = self.components
        if self.text is not None:
            memo[id(self.text.tokenizer)] = self.text.tokenizer
            if not any(p.requires_grad for p in self.text.parameters()):
                memo[id(self.text)] = self.text
        copied = self.__class__.__new__(self.__class__)
        memo[id(self)] = copied
        # The states are those of the adapters in this transformer, which the copy's are not; nor is what is offloaded.
        memo[id(self.recompute_states)] = []
        if self.offload is not None:
            memo[id(self.offload)] = None
        copied.__dict__.update({key: copy.deepcopy(value, memo) for key, value in self.__dict__.items()})
        if getattr(copied.transformer, "gradient_checkpointing", False):
            copied.enable_gradient_checkpointing(
                self._checkpointing
            )  # the function that was copied asks the original's states
        return copied

    # ---- for the time of a call

    @staticmethod
    @contextmanager
    def exact_time(embedding: nn.Module, timestep: Tensor) -> Iterator[None]:
        """Within this context ``embedding`` gets ``timestep`` as its first argument in place of what it is called with.

        Some transformers round the time to their own dtype before they embed it, and in bf16 0.999 is 1.
        """

        def restore(module: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
            return (timestep, *arguments[1:])

        handle = embedding.register_forward_pre_hook(restore)
        try:
            yield
        finally:
            handle.remove()

    def enable_gradient_checkpointing(self, blocks: bool | int | list[int] = True) -> None:
        """Recomputes the transformer's blocks in backward, each in the state that its forward had.

        blocks: True: every block. A number n: every n-th one, the first included. A list: those with these numbers,
        counted from 0 through all lists of blocks in the order of their definition. A block that is not recomputed
        keeps its activations and costs no time.

        What has to be in place again (the role's adapters) is asked from ``recompute_states`` when the block runs, not
        when it is recomputed: by then another role may be active.
        """

        chosen = self._chosen_blocks(blocks)
        self._checkpointing = blocks

        def checkpointed(module: nn.Module, *args: Any) -> Any:
            if chosen is not None and id(module) not in chosen:
                return module(*args)
            replays = [state() for state in self.recompute_states]

            def contexts() -> tuple[AbstractContextManager, AbstractContextManager]:
                return nullcontext(), _entered(replays)

            return checkpoint(module.__call__, *args, use_reentrant=False, context_fn=contexts)

        self.transformer.enable_gradient_checkpointing(checkpointed)

    def _chosen_blocks(self, blocks: bool | int | list[int]) -> set[int] | None:
        if isinstance(blocks, bool) or blocks == 1:
            return None
        every = [block for listed in block_lists(self.transformer) for block in listed]
        if isinstance(blocks, int):
            return {id(block) for block in every[::blocks]}
        if max(blocks) >= len(every):
            raise ValueError(
                f"gradient_checkpointing: this {type(self.transformer).__name__} has {len(every)} blocks, numbered "
                f"from 0, and {max(blocks)} is none of them"
            )
        return {id(every[number]) for number in blocks}

    def compile_blocks(self, **options: Any) -> None:
        """Compiles the repeated blocks of the transformer in place (``torch.compile`` of each), which share their
        compiled code; names and classes stay. A block is compiled once for every state that its roles have (adapter on
        or off, with or without gradient, guided or not), not once for every change between them. These are more states
        than torch expects of one function (8), beyond which it would go on without compiling; the limit is raised.

        options: of ``torch.compile``.
        """
        # Not diffusers' compile_repeated_blocks, which not every family names its blocks for.
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
        for blocks in self.transformer.children():
            if isinstance(blocks, nn.ModuleList):
                for block in blocks:
                    block.compile(**options)

    @classmethod
    def from_config(
        cls,
        transformer: dict[str, Any],
        text_encoder: dict[str, Any],
        prompts: Iterable[str],
        *,
        vocab_size: int = 384,
        max_sequence_length: int = 16,
        sample_size: int | None = None,
        vae: str | Path | None = None,
        seed: int = 0,
    ) -> Self:
        """A new model with random weights and a text encoder of its own, in pixel space or in the latents of a small
        VAE: what a start is trained from. Call it on a family's class.

        transformer: arguments of the family's diffusers transformer.
        text_encoder, prompts, vocab_size, max_sequence_length: see
        :meth:`apex_fast.backbones.own_text.OwnText.from_config`.
        sample_size: edge of the samples (pixels, or those of the latents), for families whose transformer does not
            state it.
        vae: folder of a VAE of the class that the family's pipeline decodes with, as
            :mod:`apex_fast.training.autoencoder` writes one; None is pixel space.
        seed: of the weights. The global random state is left as it was.

        Raises:
            ValueError: a family that needs pooled embeddings (FLUX, Stable Diffusion 3), or widths and sizes that do
                not fit.
        """
        from apex_fast.backbones.loading import own_vae
        from apex_fast.backbones.own_text import OwnText

        if len(cls.text_parts) > 2:
            raise ValueError(
                f"{cls.__name__}.from_config: this family reads several text encoders, and a model's own is one; "
                "choose SANA, Qwen-Image, Z-Image or Lumina 2"
            )
        diffusers = require("diffusers", extra="train")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = getattr(diffusers, cls.transformer_class)(**transformer)
            text = OwnText.from_config(
                text_encoder, prompts, vocab_size=vocab_size, max_sequence_length=max_sequence_length
            )
        components = {} if vae is None else {"vae": own_vae(Path(vae), cls)}
        return cls(model, text=text, sample_size=sample_size, components=components)

    def save_pretrained(self, folder: str | Path, *, transformer: bool = True) -> None:
        """Writes a model with a text encoder of its own; see :func:`apex_fast.backbones.loading.save_own`."""
        from apex_fast.backbones.loading import save_own

        save_own(self, Path(folder), transformer=transformer)

    @classmethod
    def from_pretrained(cls, path_or_id: str, **options: Any) -> Backbone:
        """A pretrained model; see :func:`apex_fast.backbones.loading.from_pretrained` for the arguments.

        On a subclass it refuses models of another family.
        """
        from apex_fast.backbones.loading import from_pretrained

        backbone = from_pretrained(path_or_id, **options)
        if not isinstance(backbone, cls):
            raise ValueError(
                f"{cls.__name__}.from_pretrained: {path_or_id} is a {backbone.family} model; write "
                f"{type(backbone).__name__} or Backbone.from_pretrained"
            )
        return backbone


@contextmanager
def _entered(replays: list[Replay]) -> Iterator[None]:
    with ExitStack() as stack:
        for replay in replays:
            stack.enter_context(replay())
        yield
