"""LoRA on a frozen base: three roles, one copy of the weights.

``peft`` adapters sit in the unmodified transformer. The generator and the shifted branch run with the adapter
``"default"`` on (the name that diffusers' export of metadata looks for), the real branch with it off, with an averaged
copy of it (``"ema"``), or with the same. A role change sets two attributes of every adapted layer for the length of
one call; nothing is copied, moved, merged or frozen by it, and what is active at rest is what the generator uses, so
that the backbone itself, or a DistributedDataParallel around it, is the generator.

The shifted branch may have an adapter of its own, ``"shifted"``. L_fake then trains that one alone, as DMD2 trains a
fake score beside the generator, but on the one base; it is kept in checkpoints and is no part of what is saved.

Two things that go wrong elsewhere are held here. peft's own switches (``set_adapter``, ``disable_adapters``) also turn
``requires_grad`` of the adapters on and off, which would take parameters from an optimizer's or a DDP bucket's sight in
mid-step; these switches do not. And a block that is recomputed in backward runs with the adapters that its forward had,
whichever role is active by then (:meth:`apex_fast.Backbone.enable_gradient_checkpointing`).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from apex_fast.backbones.base import Backbone
from apex_fast.condition import Condition
from apex_fast.extras import require
from apex_fast.parts import whole
from apex_fast.velocities import Velocities, Velocity

GENERATOR = "default"
"""Adapter of the generator and, unless it has one of its own, the shifted branch: what is trained and saved."""
EMA = "ema"
"""Adapter of an averaged real branch."""
SHIFTED = "shifted"
"""Adapter of a shifted branch that does not share the generator's."""
START = "start"
"""Adapter that the run starts from and leaves as it is, active in every role."""

WEIGHTS = "pytorch_lora_weights.safetensors"
"""File that diffusers' pipelines write and look for."""


@dataclass(frozen=True)
class LoraSettings:
    """What kind of adapter is added.

    Args:
        rank: r of the two factors.
        alpha: scale of the adapter, ``alpha / rank`` (``alpha / sqrt(rank)`` with rsLoRA); None is ``rank``, a scale
            of 1.
        dropout: on the adapter's input, in [0, 1).
        use_rslora: rank-stabilised scale.
        use_dora: weight-decomposed adapter: slower, and stock tools differ in whether they read it.
        target_modules: ends of the names of the layers that are adapted; None is the family's default
            (``Backbone.lora_targets``).
        dtype: of the adapter's weights, whatever the base is stored in. "bf16" saves half of a small part of the
            memory and loses small updates.

    Raises:
        ValueError: a value out of range.
    """

    rank: int = 64
    alpha: float | None = None
    dropout: float = 0.0
    use_rslora: bool = False
    use_dora: bool = False
    target_modules: tuple[str, ...] | None = None
    dtype: Literal["fp32", "bf16"] = "fp32"

    def __post_init__(self) -> None:
        if isinstance(self.rank, bool) or not isinstance(self.rank, int) or self.rank < 1:
            raise ValueError(f"LoraSettings: rank must be a whole number, at least 1, got {self.rank!r}")
        if self.alpha is not None and not self.alpha > 0:
            raise ValueError(f"LoraSettings: alpha must be above 0, or None for the rank, got {self.alpha}")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"LoraSettings: dropout must be at least 0 and below 1, got {self.dropout}")
        if self.target_modules is not None and not self.target_modules:
            raise ValueError("LoraSettings: target_modules is empty; name layers, or None for the family's default")
        if self.dtype not in DTYPES:
            raise ValueError(f'LoraSettings: dtype must be "fp32" or "bf16", got {self.dtype!r}')


DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
"""Names of dtypes in settings, of adapters and of bases."""


# ---- which adapters are active


class AdapterSwitch:
    """Which adapters of a transformer are active, as a tuple of names; empty is the bare base.

    Raises ValueError if the transformer has no adapters.
    """

    def __init__(self, transformer: nn.Module) -> None:
        tuners = require("peft.tuners.tuners_utils", extra="train")
        self.layers = [m for m in transformer.modules() if isinstance(m, tuners.BaseTunerLayer)]
        if not self.layers:
            raise ValueError(f"AdapterSwitch: {type(transformer).__name__} has no adapters; add one with add_lora")

    @property
    def active(self) -> tuple[str, ...]:
        """What the next call runs with."""
        layer = self.layers[0]
        return () if layer.disable_adapters else tuple(layer.active_adapters)

    def activate(self, names: Sequence[str]) -> None:
        """Makes ``names`` active, and no other. Does not touch ``requires_grad``."""
        names = list(names)
        for layer in self.layers:
            layer._disable_adapters = not names
            if names:
                layer._active_adapter = names

    @contextmanager
    def use(self, names: Sequence[str]) -> Iterator[None]:
        """Within this context ``names`` are active."""
        before = self.active
        self.activate(names)
        try:
            yield
        finally:
            self.activate(before)

    def recompute_state(self) -> Callable[[], Any]:
        """For ``Backbone.recompute_states``: what is active now, to be active again."""
        names = self.active
        return lambda: self.use(names)


class AdapterRole:
    """A velocity callable: ``call(x_t, t, condition)`` with the adapters ``names`` active.

    dropouts: modules that drop nothing during the call, whatever mode the network is in: a branch that is only read
    gives one answer to one question.
    """

    def __init__(
        self, call: Velocity, switch: AdapterSwitch, names: Sequence[str], dropouts: Sequence[nn.Module] = ()
    ) -> None:
        self.call, self.switch, self.names, self.dropouts = call, switch, tuple(names), tuple(dropouts)

    def __call__(self, x_t: Tensor, t: Tensor, condition: Tensor | Condition) -> Tensor:
        modes = [module.training for module in self.dropouts]
        with self.switch.use(self.names):
            try:
                for module in self.dropouts:
                    module.training = False
                return self.call(x_t, t, condition)
            finally:
                for module, mode in zip(self.dropouts, modes, strict=True):
                    module.training = mode

    def __repr__(self) -> str:
        return f"AdapterRole({', '.join(self.names) or 'base'})"


class LoraVelocities(Velocities):
    """The roles of a backbone with adapters; made by :func:`lora_velocities`."""

    def __init__(
        self,
        backbone: Backbone,
        call: Velocity,
        real: Literal["frozen", "ema", "live"],
        ema_decay: float,
        shifted_adapter: bool = False,
    ) -> None:
        transformer = backbone.transformer
        self.switch = AdapterSwitch(transformer)
        start = (START,) if START in transformer.peft_config else ()
        self.switch.activate((*start, GENERATOR))
        states = [state for state in backbone.recompute_states if not isinstance(_owner(state), AdapterSwitch)]
        backbone.recompute_states[:] = [*states, self.switch.recompute_state]
        names = {"frozen": start, "ema": (*start, EMA), "live": (*start, GENERATOR)}[real]
        if real == "ema" and EMA not in transformer.peft_config:
            _add(backbone, _config_like(transformer.peft_config[GENERATOR]), EMA)
        self.shifted_adapter = shifted_adapter
        if shifted_adapter and SHIFTED not in transformer.peft_config:
            _add_shifted(backbone)
        dropouts = [m for m in transformer.modules() if isinstance(m, nn.Dropout) and m.p > 0]
        super().__init__(
            call,
            shifted=AdapterRole(call, self.switch, (*start, SHIFTED)) if shifted_adapter else None,
            real=None if real == "live" else AdapterRole(call, self.switch, names, dropouts),
        )
        self.switch.activate((*start, GENERATOR))
        # By name, with the exact sum where the adapter itself is kept in half precision.
        self._exact: dict[str, Tensor] = {}
        self._transformer = transformer
        if real != "ema":
            return
        self._ema_decay = float(ema_decay)
        averages, sources = _adapter(transformer, EMA), _adapter(transformer, GENERATOR)
        with torch.no_grad():
            for name, average in averages.items():
                source = sources[name]
                average.requires_grad_(False)
                average.data = source.detach().clone()
                if source.dtype != torch.float32:
                    # An update of 2 % would be lost in the rounding of half precision, so the sum is kept beside it.
                    self._exact[name] = source.detach().float()
        self.switch.activate((*start, GENERATOR))

    @torch.no_grad()
    def update_ema(self, skip: Tensor | None = None) -> None:
        """Moves the averaged adapter towards the trained one; after every optimizer step, and not where ``skip`` is not
        zero. Nothing for another real branch."""
        if self._ema_decay is None:
            return
        # By name, not by stored parameters: sharding a network replaces them.
        averages, sources = _adapter(self._transformer, EMA), _adapter(self._transformer, GENERATOR)
        for name, average in averages.items():
            exact = self._exact.get(name, average.data)
            exact.lerp_(sources[name].detach().to(exact.dtype), self._ema_share(exact, skip))
            if name in self._exact:
                average.copy_(exact)

    @property
    def changes(self) -> bool:
        """Whether a checkpoint has to keep :meth:`state_dict`: an average, or the shifted branch's own adapter."""
        return self.has_ema or self.shifted_adapter

    def shifted_parameters(self) -> list[nn.Parameter]:
        """Trained parameters of the shifted branch alone; none where it shares the generator's adapter."""
        return list(_adapter(self._transformer, SHIFTED).values()) if self.shifted_adapter else []

    def _own_state(self) -> dict[str, Tensor]:
        state: dict[str, Tensor] = {}
        if self._ema_decay is not None:
            averages = _adapter(self._transformer, EMA)
            state = {name: self._exact.get(name, average.data) for name, average in averages.items()}
        if self.shifted_adapter:
            state |= {f"{SHIFTED}.{name}": p for name, p in _adapter(self._transformer, SHIFTED).items()}
        return state

    @torch.no_grad()
    def load_state_dict(self, state: Any) -> None:
        """Restores :meth:`state_dict`; ValueError for the state of another real branch."""
        super().load_state_dict(state)
        averages = _adapter(self._transformer, EMA) if self._exact else {}
        for name, exact in self._exact.items():
            averages[name].copy_(exact)


def _owner(function: Callable[..., Any]) -> object:
    return getattr(function, "__self__", None)


# ---- adding, starting from, saving


def add_lora(backbone: Backbone, settings: LoraSettings, *, seed: int | None = None) -> None:
    """Freezes the transformer and adds the adapter that is trained; its effect is zero at first.

    Args:
        settings: what kind.
        seed: of the adapter's weights; None draws from the global random state.

    Raises:
        ValueError: an adapter of that name is there already, or no layer fits ``target_modules``.
    """
    peft = require("peft", extra="train")
    transformer = backbone.transformer
    if GENERATOR in getattr(transformer, "peft_config", {}):
        raise ValueError(f'add_lora: the model has an adapter "{GENERATOR}" already; load the model anew')
    unused = backbone.parameters_without_gradient()
    excluded = sorted({name.rpartition(".")[0] for name in unused})
    targets = list(backbone.lora_targets if settings.target_modules is None else settings.target_modules)
    config = peft.LoraConfig(
        r=settings.rank,
        lora_alpha=settings.rank if settings.alpha is None else settings.alpha,
        lora_dropout=settings.dropout,
        use_rslora=settings.use_rslora,
        use_dora=settings.use_dora,
        target_modules=targets,
        exclude_modules=excluded or None,
    )
    transformer.requires_grad_(False)
    with torch.random.fork_rng(devices=[], enabled=seed is not None):
        if seed is not None:
            torch.manual_seed(seed)
        try:
            _add(backbone, config, GENERATOR)
        except ValueError as error:
            if "not found in the base model" not in str(error):
                raise
            raise ValueError(
                f"add_lora: no layer of {type(transformer).__name__} ends with any of {targets}; layers are named like "
                f"{_example_layers(transformer)}"
            ) from error
    for parameter in _adapter(transformer, GENERATOR).values():
        parameter.data = parameter.data.to(DTYPES[settings.dtype])
        parameter.requires_grad_(True)


@torch.no_grad()
def _add_shifted(backbone: Backbone) -> None:
    """An adapter of the shifted branch's own, at first equal to the generator's: the branch begins where the one that
    shares it would, and no random number is drawn that a run without it does not draw."""
    transformer = backbone.transformer
    with torch.random.fork_rng(devices=[]):
        _add(backbone, _config_like(transformer.peft_config[GENERATOR]), SHIFTED)
    sources = _adapter(transformer, GENERATOR)
    for name, parameter in _adapter(transformer, SHIFTED).items():
        parameter.data = sources[name].detach().clone()
        parameter.requires_grad_(True)


def lora_velocities(
    backbone: Backbone,
    real: Literal["frozen", "ema", "live"] = "frozen",
    *,
    ema_decay: float = 0.98,
    call: Velocity | None = None,
    shifted_adapter: bool = False,
) -> LoraVelocities:
    """The roles of a backbone that :func:`add_lora` was called on; no weights of the base are copied.

    Args:
        real: ``"frozen"``: the base with the adapter off (and a start adapter on), free and steady. ``"ema"``: an
            adapter that follows the trained one by exponential moving average. ``"live"``: the trained one.
        ema_decay: share of the old average that an update keeps, for ``"ema"``.
        call: what runs the network, such as the backbone under autocast; None is the backbone itself.
        shifted_adapter: give the shifted branch an adapter of its own, of the generator's kind and at first equal to
            it: L_fake then trains that one alone and the correction the generator's alone. One more adapter in weights,
            gradients and optimizer; the schedules ``retain`` and ``sequential`` serve it.

    Raises:
        ValueError: no adapter to train, unknown ``real``, or a decay outside [0, 1].
    """
    if GENERATOR not in getattr(backbone.transformer, "peft_config", {}):
        raise ValueError(f'lora_velocities: the model has no adapter "{GENERATOR}" to train; call add_lora first')
    if real not in ("frozen", "ema", "live"):
        raise ValueError(f'lora_velocities: real must be "frozen", "ema" or "live", got {real!r}')
    if not 0 <= ema_decay <= 1:
        raise ValueError(f"lora_velocities: ema_decay must lie in [0, 1], got {ema_decay}")
    return LoraVelocities(backbone, backbone if call is None else call, real, ema_decay, shifted_adapter)


def add_another(
    backbone: Backbone, name: str, *, rank: int | None = None, seed: int | None = None
) -> dict[str, nn.Parameter]:
    """Adds a further adapter, without effect at first: of the kind of the one that is trained and on the same layers,
    but without dropout. It is active afterwards, and asks for no gradients.

    Args:
        name: of the adapter.
        rank: of its factors, with a scale of 1; None is the trained one's, with its scale.
        seed: of its weights; None draws from the global random state.

    Returns:
        Its parameters, fp32, under names that are the same for every adapter.

    Raises:
        ValueError: there is no adapter to be like, or one of that name already.
    """
    transformer = backbone.transformer
    if GENERATOR not in getattr(transformer, "peft_config", {}) or name in transformer.peft_config:
        raise ValueError(f'add_another: the model needs an adapter "{GENERATOR}" (add_lora) and none named "{name}"')
    config = _config_like(transformer.peft_config[GENERATOR])
    config.lora_dropout = 0.0
    if rank is not None:
        config.r = config.lora_alpha = rank
        # A scale of 1 everywhere: rank-stabilised LoRA would make it sqrt(rank), and patterns have ranks of their own.
        config.use_rslora, config.rank_pattern, config.alpha_pattern = False, {}, {}
    with torch.random.fork_rng(devices=[], enabled=seed is not None):
        if seed is not None:
            torch.manual_seed(seed)
        _add(backbone, config, name)
    # peft puts an adapter beside the weight that it adapts, which block offload keeps on the CPU meanwhile.
    device = next(iter(_adapter(transformer, GENERATOR).values())).device
    parameters = _adapter(transformer, name)
    for parameter in parameters.values():
        parameter.requires_grad_(False)
        parameter.data = parameter.data.to(device, torch.float32)
    return parameters


def load_start_lora(
    backbone: Backbone, path: str | Path, how: Literal["merge", "frozen", "continue"] = "merge"
) -> None:
    """Starts from an existing LoRA: the user's style, or an earlier run.

    Args:
        path: a ``.safetensors`` file, or a folder with ``pytorch_lora_weights.safetensors``; any naming that the
            family's diffusers pipeline reads.
        how: ``"merge"``: added to the weights of the base, for good. ``"frozen"``: a second adapter, active in every
            role and not trained, for bases that cannot take it in (quantised) or must stay as they are; what the run
            saves is then to be used together with it. ``"continue"``: it becomes the adapter that is trained, in place
            of :func:`add_lora`.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a LoRA of another model or with parts for text encoders; a quantised base and ``"merge"``.
    """
    if how not in ("merge", "frozen", "continue"):
        raise ValueError(f'load_start_lora: how must be "merge", "frozen" or "continue", got {how!r}')
    transformer = backbone.transformer
    if how == "merge" and getattr(transformer, "hf_quantizer", None) is not None:
        raise ValueError(
            'load_start_lora: a LoRA cannot be merged into quantised weights without rounding it; use "frozen", or '
            "load the base without quantisation"
        )
    name = GENERATOR if how == "continue" else START
    transformer.requires_grad_(False)
    _load(backbone, Path(path), name)
    if how == "merge":
        transformer.fuse_lora(adapter_names=[name])
        transformer.unload_lora()
        transformer.requires_grad_(False)
        return
    if how == "frozen":
        # What is not trained has nothing to gain from the dropout that it was trained with.
        for layer in AdapterSwitch(transformer).layers:
            if name in layer.lora_dropout:
                layer.lora_dropout[name] = nn.Identity()
    for parameter in _adapter(transformer, name).values():
        parameter.requires_grad_(how == "continue")
        if how == "continue":
            parameter.data = parameter.data.float()


def load_lora(backbone: Backbone, folder: str | Path) -> None:
    """Puts what :func:`save_lora` wrote onto a backbone, to generate with; errors as :func:`load_start_lora`."""
    backbone.transformer.requires_grad_(False)
    _load(backbone, Path(folder), GENERATOR)
    start = (START,) if START in backbone.transformer.peft_config else ()
    AdapterSwitch(backbone.transformer).activate((*start, GENERATOR))


def save_lora(backbone: Backbone, folder: str | Path, adapter: str = GENERATOR, *, write: bool = True) -> Path:
    """Writes the adapter as ``pytorch_lora_weights.safetensors``, which the stock pipeline's ``load_lora_weights``
    reads, rank, alpha and kind of adapter in its metadata. Returns the file.

    write: False in all processes but one, where the network is sharded over several: all of them gather its parts.
    """
    peft = require("peft", extra="train")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    transformer = backbone.transformer
    state = {k: whole(v) for k, v in peft.get_peft_model_state_dict(transformer, adapter_name=adapter).items()}
    if not write:
        return folder / WEIGHTS
    _pipeline_class(backbone).save_lora_weights(
        str(folder),
        transformer_lora_layers={k: v.to("cpu").contiguous() for k, v in state.items()},
        transformer_lora_adapter_metadata=_metadata(transformer, adapter),
        safe_serialization=True,
    )
    return folder / WEIGHTS


# ---- peft and diffusers


def _pipeline_class(backbone: Backbone) -> Any:
    return getattr(require("diffusers", extra="train"), backbone.pipeline_class)


def _metadata(transformer: nn.Module, adapter: str) -> dict[str, Any]:
    """The part of the adapter's configuration that a reader needs, in plain values.

    Not all of it: peft refuses a file that names a setting which its own version does not have yet. The adapted layers
    are named in full, so that a reader adapts these and needs no list of exceptions.
    """
    config = transformer.peft_config[adapter].to_dict()
    values = {key: value for key, value in config.items() if key in _KEPT and key != "exclude_modules"}
    values["target_modules"] = sorted({name.split(".lora_")[0] for name in _adapter(transformer, adapter)})
    return values


def _config_like(config: Any) -> Any:
    peft = require("peft", extra="train")
    return peft.LoraConfig(**{k: v for k, v in config.to_dict().items() if k in _KEPT})


_KEPT = (
    "r",
    "lora_alpha",
    "lora_dropout",
    "use_rslora",
    "use_dora",
    "target_modules",
    "exclude_modules",
    "rank_pattern",
    "alpha_pattern",
)


@contextmanager
def _second_adapter() -> Iterator[None]:
    with warnings.catch_warnings():
        # peft warns of a second adapter in a model; here it is meant.
        warnings.filterwarnings("ignore", message="Already found a `peft_config` attribute")
        yield


def _add(backbone: Backbone, config: Any, name: str) -> None:
    transformer = backbone.transformer
    trained = {n for n, p in transformer.named_parameters() if p.requires_grad}
    with _second_adapter():
        transformer.add_adapter(config, name)
    # peft makes the new adapter the only one that is trained.
    for parameter_name, parameter in transformer.named_parameters():
        if parameter_name in trained:
            parameter.requires_grad_(True)


def _adapter(transformer: nn.Module, name: str) -> dict[str, nn.Parameter]:
    """Parameters of one adapter, under names that are the same for every adapter."""
    mark = f".{name}"
    found = {}
    for path, parameter in transformer.named_parameters():
        head, dot, tail = path.partition(mark)
        if dot and ".lora_" in head and (not tail or tail.startswith(".")):
            found[head + tail] = parameter
    return found


def _example_layers(transformer: nn.Module) -> list[str]:
    names = [name for name, module in transformer.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    return names[-3:]


def _load(backbone: Backbone, path: Path, name: str) -> None:
    """Adds the adapter in ``path`` under ``name``, every weight of the file in its place."""
    peft = require("peft", extra="train")
    file = path / WEIGHTS if path.is_dir() else path
    if not file.is_file() or file.suffix != ".safetensors":
        raise FileNotFoundError(
            f"LoRA: {file} is not there; expected a .safetensors file, or a folder with {WEIGHTS} (other formats are "
            "not read because loading them can run code)"
        )
    cls, transformer = _pipeline_class(backbone), backbone.transformer
    state = cls.lora_state_dict(str(file.parent), weight_name=file.name, use_safetensors=True, local_files_only=True)
    state = state[0] if isinstance(state, tuple) else state
    foreign = sorted({key.split(".")[0] for key in state} - {"transformer"})
    if foreign:
        raise ValueError(
            f"LoRA: {file} has parts for {', '.join(foreign)}; only the transformer of a {backbone.pipeline_class} is "
            "adapted here, so save the LoRA without them"
        )
    active = AdapterSwitch(transformer).active if getattr(transformer, "peft_config", None) else ()
    trained = {n for n, p in transformer.named_parameters() if p.requires_grad}
    before = set(getattr(transformer, "peft_config", {}))
    try:
        # Through the pipeline, which knows every naming that its users have; it gets the transformer alone.
        pipeline = backbone.pipeline()
        with _second_adapter():
            pipeline.load_lora_weights(
                str(file.parent),
                weight_name=file.name,
                adapter_name=name,
                use_safetensors=True,
                local_files_only=True,
            )
    except (ValueError, RuntimeError, KeyError) as error:
        raise ValueError(f"LoRA: {file} does not fit this {type(transformer).__name__}: {error}") from error
    if name not in set(getattr(transformer, "peft_config", {})) - before:
        raise ValueError(f"LoRA: {file} has no weights for the transformer of a {backbone.pipeline_class}")
    loaded = peft.get_peft_model_state_dict(transformer, adapter_name=name)
    # diffusers logs what did not fit and goes on; half an adapter is worse than none.
    lost = len([key for key in state if not key.endswith(".alpha")]) - len(loaded)
    if lost:
        raise ValueError(
            f"LoRA: {file} has {lost:+d} weights against the {len(loaded)} that this {type(transformer).__name__} "
            "takes; it is of another model"
        )
    # diffusers loads into the dtype of the base; an adapter that was trained in fp32 stays what it was.
    weights = _adapter(transformer, name)
    for key, value in state.items():
        path = key.removeprefix("transformer.")
        weight = weights.get(path, weights.get(f"{path}.weight"))
        if weight is not None and weight.shape == value.shape:
            weight.data = value.to(weight.device)
    for parameter_name, parameter in transformer.named_parameters():
        parameter.requires_grad_(parameter_name in trained)
    if active:
        AdapterSwitch(transformer).activate((*active, name))
