"""Whether a network can see a condition shift, measured before anything is trained.

The probe asks the two branches what training will ask them at its first step. ``x_fake`` is what the network makes of
noise in one step (Eq. 11 of APEX, arXiv 2604.12322), and at each of a few times t the velocity at ``x_fake_t`` is taken
under the real condition and under every shifted one; x_t is the same for all. The pass under the real condition is held
(:mod:`apex_fast.probing.capture`): of every layer a subset of the queries with their attention weights, and the text's
keys and values. A shifted pass is compared with it layer by layer while it runs and keeps nothing. So memory does not
grow with the number of shifts: it is that of one real pass of ``batch_size`` prompts at one time.

Two more passes a time say what the numbers mean. In one the text embeddings are off by one unit in the last place of
the network's dtype ("one rounding"), which gives the level below which nothing can be seen. In the other every prompt
is exchanged for the next one, which gives the change that a network makes of a condition that it knows.

Symmetric KL is taken for the queries of the real pass: softmax(q_real k_real) against softmax(q_real k_shifted), so it
is about the keys alone. In layers behind the first, keys have also changed because their input has.
"""

from __future__ import annotations

import copy
import functools
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from apex_fast.backbones.base import Backbone
from apex_fast.condition import Condition
from apex_fast.probing import measures
from apex_fast.probing.capture import AttentionCapture, Kind, LayerCall, Tokens
from apex_fast.probing.verdict import (
    DEFAULT,
    THRESHOLDS,
    Candidate,
    Facts,
    Thresholds,
    Verdict,
    judge,
    recommend,
    structural_cause,
)
from apex_fast.shift import SITES, ConditionShift

SCALES = (-1.0, -0.5, 0.5, 1.0)
BIASES = (0.0, 0.5, 1.0)
TIMES = (1.0, 0.9, 0.5, 0.1)
CHECK_TIMES = (0.9, 0.5)
"""Of :func:`check_shift`, and of a quick probe: near the noise, where the generator works, and half way."""
_REPORT_SECONDS = 10.0


@dataclass(frozen=True)
class LayerChange:
    """What a shift does to one layer; None stands for "has no meaning here", never for 0.

    Args:
        layer, kind: see :class:`~apex_fast.probing.capture.LayerCall`.
        common_share: of the change in the text's keys, how much is the same for every token; None without text and
            where nothing changes.
        kl: symmetric KL of the attention weights in nats; None for linear attention.
        entropy, entropy_shifted: of those weights, in nats.
        keys, values: relative change, of the text's tokens, or of the picture's where the layer has no text.
        output: relative change of the output of a linear attention; None for others.
    """

    layer: str
    kind: Kind
    common_share: float | None
    kl: float | None
    entropy: float | None
    entropy_shifted: float | None
    keys: float
    values: float
    output: float | None

    @property
    def sees_text(self) -> bool:
        """Whether its softmax has keys of the text."""
        return self.kind in ("cross", "joint", "text")


@dataclass(frozen=True)
class ProbeRow:
    """One shift: what it changes, and the verdict.

    Args:
        name: of a shift that is not of the grid ("the config's"); "" for the grid.
        mode, site: of the shift.
        scale, bias: of the shift; of a diagonal one the mean over channels.
        change, cosine, norm: per time, means over samples: ``||v_shift - v_real|| / ||v_real||``, the cosine of the two
            velocities, ``||v_shift|| / ||v_real||``.
        layers: per layer, means over times and samples.
        verdict, reason: see :mod:`apex_fast.probing.verdict`.
    """

    name: str
    mode: str
    site: str
    scale: float
    bias: float
    change: tuple[float, ...]
    cosine: tuple[float, ...]
    norm: tuple[float, ...]
    layers: tuple[LayerChange, ...]
    verdict: Verdict = "invisible"
    reason: str = ""

    @property
    def is_control(self) -> bool:
        """Whether it shifts nothing."""
        return not self.name and self.scale == 1 and self.bias == 0

    @property
    def mean_change(self) -> float:
        """Of the velocity, over times."""
        return _mean(self.change)

    @property
    def kl(self) -> float | None:
        """Mean over the layers that see text."""
        return _mean_of(layer.kl for layer in self.layers if layer.sees_text)

    @property
    def common_share(self) -> float | None:
        """Mean over the layers that see text."""
        return _mean_of(layer.common_share for layer in self.layers if layer.sees_text)

    @property
    def keys(self) -> float | None:
        """Relative change of the text's keys, mean over the layers that see text."""
        return _mean_of(layer.keys for layer in self.layers if layer.sees_text)

    @property
    def values(self) -> float | None:
        """Relative change of the text's values, mean over the layers that see text."""
        return _mean_of(layer.values for layer in self.layers if layer.sees_text)

    @property
    def entropy_share(self) -> float | None:
        """Entropy of the shifted weights over that of the real ones, both summed over the layers that see text."""
        pairs = [(layer.entropy, layer.entropy_shifted) for layer in self.layers if layer.sees_text]
        real = sum(real for real, _ in pairs if real is not None)
        shifted = sum(shifted for _, shifted in pairs if shifted is not None)
        return shifted / real if real > 0 else None


@dataclass(frozen=True)
class ProbeReport:
    """All that a probe measured. :func:`apex_fast.probing.table` prints it.

    Args:
        family: of the backbone.
        dtype: of its velocity.
        times: at which velocities were taken.
        samples: noises, one a prompt.
        rows: the grid, then shifts that were given by name.
        recommended: position of the recommended row; None if there is none. ``why`` is the reason.
        rounding: per time, the change of the velocity when the text embeddings are off by one rounding.
        other_prompt: per time, the change when every prompt is exchanged for the next; None with one prompt.
        pooled: whether the condition has a pooled embedding, and ``pooled_shifted`` whether it was shifted.
        thresholds: that the verdicts go by.
        passes: forwards of ``batch_size`` prompts.
        held_bytes: of the real pass, while shifted ones were compared with it.
        seconds: that it took.
    """

    family: str
    dtype: str
    times: tuple[float, ...]
    samples: int
    rows: tuple[ProbeRow, ...]
    recommended: int | None
    why: str
    rounding: tuple[float, ...]
    other_prompt: tuple[float, ...] | None
    pooled: bool
    pooled_shifted: bool
    thresholds: Thresholds
    passes: int
    held_bytes: int
    seconds: float

    def row(self, site: str, scale: float, bias: float, mode: str = "scalar") -> ProbeRow:
        """The row of the grid. KeyError if it was not measured."""
        for row in self.rows:
            if (row.name, row.site, row.scale, row.bias, row.mode) == ("", site, scale, bias, mode):
                return row
        raise KeyError(f"no row {mode}, {site}, {scale:g}, {bias:g}")


@torch.no_grad()
def probe(
    backbone: Backbone,
    prompts: Sequence[str] | Condition,
    *,
    scales: Sequence[float] = SCALES,
    biases: Sequence[float] = BIASES,
    sites: Sequence[str] = SITES,
    modes: Sequence[str] = ("scalar",),
    shifts: Mapping[str, ConditionShift] | None = None,
    times: Sequence[float] = TIMES,
    shift_pooled: bool = True,
    shape: tuple[int, int, int] | None = None,
    batch_size: int | None = None,
    queries: int = 64,
    seed: int = 0,
    thresholds: Thresholds = THRESHOLDS,
    call: Callable[[Tensor, Tensor, Any], Tensor] | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> ProbeReport:
    """Measures what each shift of a grid changes in a network, and says which of them it can be trained with.

    Without gradients, in eval mode, with the noise of ``seed`` alone; the network is left as it was.

    Args:
        backbone: on the device where it is to run.
        prompts: texts that the backbone encodes, or their condition, batch n. With several prompts there is a yardstick
            for a change: what another prompt does.
        scales, biases, sites, modes: the grid: every combination. A diagonal shift is at its start the scalar one, so
            ``modes`` need not have it.
        shifts: further shifts by name, such as a trained one.
        times: at which velocities are compared, in [0, 1], 1 is noise.
        shift_pooled: whether the grid shifts pooled embeddings as well.
        shape: (C, h, w) of the latents; None is the size that the model was built for.
        batch_size: prompts in one pass; None is all of them. What is held of a pass grows with it.
        queries: of each head and sample, at most so many, a seeded subset, are compared. More do not change the KL by
            more than its spread over queries over the root of their number.
        seed: of noise and of that subset.
        thresholds: of the verdicts.
        call: called in place of the backbone, for the same network under autocast.
        say: gets a line before the first pass and every ten seconds.

    Raises:
        ValueError: an empty grid, unknown sites, times outside [0, 1], or a network whose velocity is zero or not
            finite already without a shift.
        RuntimeError: attention that cannot be read; see :class:`~apex_fast.probing.capture.AttentionCapture`.
    """
    began = time.monotonic()
    condition = prompts if isinstance(prompts, Condition) else backbone.encode(list(prompts))
    condition = condition.written().to(backbone.device)
    _check(times, sites, queries, batch_size)
    wanted = _grid(backbone, condition, scales, biases, sites, modes, shift_pooled)
    wanted += [(name, copy.deepcopy(shift)) for name, shift in (shifts or {}).items()]
    if not wanted:
        raise ValueError("probe: the grid is empty; give at least one of scales, biases, sites and modes, or shifts=")
    run = _Run(backbone, condition, times, shape, batch_size, queries, seed, call or backbone, say)
    run.measure([shift.to(backbone.device) for _, shift in wanted])
    pooled = condition.pooled_prompt_embeds is not None
    rows = tuple(_row(run, i, name, shift) for i, (name, shift) in enumerate(wanted))
    # Calls that do not repeat to the last bit have that as their level of rounding.
    controls = [row for row in rows if row.is_control]
    rounding = tuple(
        max([r, *(c.change[i] for c in controls)]) for i, r in enumerate(_means(run.rounding, run.samples))
    )
    other = None if run.other_prompt is None else _means(run.other_prompt, run.samples)
    judged = []
    for row, (_, shift) in zip(rows, wanted, strict=True):
        verdict, reason = judge(
            Facts(
                is_control=row.is_control,
                finite=all(map(math.isfinite, row.change)),
                change=row.mean_change,
                norm=_mean(row.norm),
                rounding=_mean(rounding),
                other_prompt=None if other is None else _mean(other),
                kl=row.kl,
                common_share=row.common_share,
                entropy_share=row.entropy_share,
                cause=_cause(backbone, shift, pooled),
                text_cause=_cause(backbone, shift, pooled=False),
            ),
            thresholds,
        )
        judged.append(replace(row, verdict=verdict, reason=reason))
    grid = [row for row in judged if not row.name]
    best, why = recommend(
        [Candidate(row.site, row.scale, row.bias, row.verdict, row.mean_change) for row in grid],
        None if other is None else _mean(other),
        thresholds,
    )
    return ProbeReport(
        family=backbone.family,
        dtype=str(run.dtype).removeprefix("torch."),
        times=tuple(times),
        samples=run.samples,
        rows=tuple(judged),
        recommended=best,
        why=why,
        rounding=rounding,
        other_prompt=other,
        pooled=pooled,
        pooled_shifted=pooled and shift_pooled,
        thresholds=thresholds,
        passes=run.passes_done,
        held_bytes=run.held_bytes,
        seconds=time.monotonic() - began,
    )


# ---- one shift, before a training


@dataclass(frozen=True)
class CheckLine:
    """The answer of :func:`check_shift`.

    Args:
        line: to be printed.
        verdict, reason: of the shift.
        row: its measurements.
        is_control: whether the shift is none (scale 1, bias 0), which some runs want for comparison.
    """

    line: str
    verdict: Verdict
    reason: str
    row: ProbeRow
    is_control: bool

    def refuse_invisible(self, instead: str = "probe: false trains it anyway") -> None:
        """Raises SettingsError for an invisible shift; ``instead`` says how to train with it all the same."""
        if self.verdict != "invisible":
            return
        from apex_fast.training.settings import SettingsError

        row = self.row
        what = f"scale {row.scale:g} and bias {row.bias:g} at the site {row.site}"
        choose = "shift.scale -1 and shift.bias 0.5"
        if (row.site, row.scale, row.bias) == DEFAULT:
            choose = "another shift.site or a larger shift.bias"
        raise SettingsError(
            f"shift: {what} is invisible to this network ({self.reason}), so the shift would do nothing; "
            f"choose {choose} (`apex-fast probe` measures what this model sees), or {instead}"
        )


def check_shift(
    backbone: Backbone,
    shift: ConditionShift,
    condition: Condition,
    *,
    times: Sequence[float] = CHECK_TIMES,
    shape: tuple[int, int, int] | None = None,
    seed: int = 0,
    thresholds: Thresholds = THRESHOLDS,
    call: Callable[[Tensor, Tensor, Any], Tensor] | None = None,
) -> CheckLine:
    """Whether ``backbone`` sees ``shift``: :func:`probe` of this shift alone at a few times, in nine passes (seven for
    a single prompt) of all of ``condition``, which should be of a few prompts.

    Arguments and errors as :func:`probe`.
    """
    report = probe(
        backbone,
        condition,
        scales=(),
        shifts={"the run's": shift},
        times=times,
        shape=shape,
        seed=seed,
        thresholds=thresholds,
        call=call,
    )
    row = report.rows[0]
    is_control = row.mode == "scalar" and row.scale == 1 and row.bias == 0
    name = f"{row.mode} shift, scale {row.scale:g}, bias {row.bias:g}, site {row.site}"
    line = f"probe: {row.verdict}: {name}: {row.reason} ({report.passes} passes, {report.seconds:.1f} s)"
    return CheckLine(line, row.verdict, row.reason, row, is_control)


# ---- the passes


class _Run:
    """The passes of a probe and the sums of what they measure."""

    def __init__(
        self,
        backbone: Backbone,
        condition: Condition,
        times: Sequence[float],
        shape: tuple[int, int, int] | None,
        batch_size: int | None,
        queries: int,
        seed: int,
        call: Callable[[Tensor, Tensor, Any], Tensor],
        say: Callable[[str], None],
    ) -> None:
        self.backbone, self.condition, self.times = backbone, condition, tuple(times)
        self.queries, self.seed, self.call, self.say = queries, seed, call, say
        self.samples = len(condition)
        self.batch = min(batch_size or self.samples, self.samples)
        generator = torch.Generator().manual_seed(seed)
        shape = shape or backbone.sample_shape
        # One to make x_fake of, one to noise it again.
        self.noise, self.fresh = torch.randn(2, self.samples, *shape, generator=generator).to(backbone.device)
        # A sign for every number: the embeddings off by one rounding.
        self.signs = [torch.randint(0, 2, part.shape, generator=generator) * 2 - 1 for part in _floats(condition)]
        order = [*range(1, self.samples), 0]
        self.others = condition.index(order) if self.samples > 1 else None
        self.dtype = torch.float32
        self.passes = self.passes_done = self.held_bytes = 0
        self.begun = self.said = 0.0
        self.rounding = [0.0 for _ in self.times]
        self.other_prompt = None if self.others is None else [0.0 for _ in self.times]
        self.velocities: list[list[list[float]]] = []
        self.layers: list[dict[str, _LayerSums]] = []

    def measure(self, shifts: Sequence[ConditionShift]) -> None:
        """All passes of all ``shifts``."""
        self.velocities = [[[0.0] * 3 for _ in self.times] for _ in shifts]
        self.layers = [{} for _ in shifts]
        batches = -(-self.samples // self.batch)
        each = 2 + (self.others is not None) + len(shifts)
        self.passes = batches * (1 + len(self.times) * each)
        count = f"shifts {len(shifts)}, times {len(self.times)}, prompts {self.samples}"
        self.say(f"{count}: {self.passes} passes of batch {self.batch}, without gradient")
        self.begun = self.said = time.monotonic()
        with _evaluating(self.backbone):
            for first in range(0, self.samples, self.batch):
                here = slice(first, first + self.batch)
                condition, noise = self.condition.index(here), self.noise[here]
                x_fake = noise - self._velocity(noise, 1.0, condition).float()
                for i, t in enumerate(self.times):
                    self._at(i, t * self.fresh[here] + (1 - t) * x_fake, condition, first, shifts)

    def _at(self, i: int, x_t: Tensor, condition: Condition, first: int, shifts: Sequence[ConditionShift]) -> None:
        """The passes at the time ``i`` of the samples from ``first`` on."""
        t = self.times[i]
        held: dict[str, _Held] = {}
        real = self._captured(x_t, t, condition, condition, lambda seen: _hold(seen, held))
        self._check_real(real, t)
        if not held:
            raise RuntimeError(
                f"probe: no attention of this {self.backbone.family} network was seen; it was looked for in modules "
                "with a `processor`, as diffusers makes them"
            )
        self.held_bytes = max(self.held_bytes, sum(entry.bytes for entry in held.values()))
        self.dtype = real.dtype
        off = self._velocity(x_t, t, self._off_by_rounding(condition, first))
        self.rounding[i] += measures.velocity_change(real, off)[0].sum().item()
        if self.others is not None and self.other_prompt is not None:
            v_other = self._velocity(x_t, t, self.others.index(slice(first, first + self.batch)))
            self.other_prompt[i] += measures.velocity_change(real, v_other)[0].sum().item()
        for j, shift in enumerate(shifts):
            compare = functools.partial(_compare, held, self.layers[j])
            shifted = self._captured(x_t, t, shift(condition), condition, compare)
            for k, value in enumerate(measures.velocity_change(real, shifted)):
                self.velocities[j][i][k] += value.sum().item()
            if time.monotonic() - self.said > _REPORT_SECONDS:
                each = (time.monotonic() - self.begun) / self.passes_done
                left = each * (self.passes - self.passes_done)
                self.say(f"probing: pass {self.passes_done} of {self.passes}, {left:.0f} s left")
                self.said = time.monotonic()

    def _velocity(self, x_t: Tensor, t: float, condition: Condition) -> Tensor:
        self.passes_done += 1
        times = torch.full((len(x_t),), t, device=x_t.device)
        return self.call(x_t, times, condition)

    def _captured(
        self, x_t: Tensor, t: float, condition: Condition, original: Condition, observe: Callable[[LayerCall], None]
    ) -> Tensor:
        tokens = Tokens.of(self.backbone, original, *x_t.shape[2:])
        with AttentionCapture(self.backbone, tokens, observe, queries=self.queries, seed=self.seed):
            return self._velocity(x_t, t, condition)

    def _check_real(self, velocity: Tensor, t: float) -> None:
        norms = velocity.float().flatten(1).norm(dim=1)
        if not bool(norms.isfinite().all()) or not bool(norms.all()):
            what = "zero" if bool(norms.isfinite().all()) else "not finite"
            raise ValueError(
                f"probe: the velocity of this network is {what} at t = {t:g} without any shift; probe a trained model, "
                "in a dtype that it runs in"
            )

    def _off_by_rounding(self, condition: Condition, first: int) -> Condition:
        epsilon = torch.finfo(self.dtype).eps
        signs = iter(self.signs)

        def off(values: Tensor) -> Tensor:
            sign = next(signs)[first : first + len(values)].to(values.device)
            return values.float() * (1 + epsilon * sign)  # the network rounds them to its own dtype

        pooled = condition.pooled_prompt_embeds
        embeds = off(condition.prompt_embeds)
        return Condition(embeds, condition.prompt_embeds_mask, None if pooled is None else off(pooled))


@dataclass
class _Held:
    """A layer of the real pass, with what all shifted ones are compared with computed once."""

    call: LayerCall
    weights: Tensor | None
    entropy: Tensor | None
    bytes: int


def _hold(seen: LayerCall, held: dict[str, _Held]) -> None:
    # Keys are not needed once the weights of the chosen queries are known; the rest is copied, since a view would keep
    # the whole of what it looks into.
    weights = entropy = None
    if seen.queries is not None and seen.queries_kept is not None and seen.keys is not None:
        weights = measures.log_weights(seen.queries, seen.keys, seen.bias, seen.scale)
        entropy = measures.entropy(weights, seen.queries_kept)
    kept = LayerCall(
        layer=seen.layer,
        kind=seen.kind,
        tokens_kept=seen.tokens_kept,
        token_keys=seen.token_keys.clone(),
        token_values=seen.token_values.clone(),
        queries=None if seen.queries is None else seen.queries.clone(),
        queries_kept=seen.queries_kept,
        output=None if seen.output is None else seen.output.clone(),
    )
    size = kept.bytes + (0 if weights is None else weights.numel() * weights.element_size())
    held[seen.layer] = _Held(kept, weights, entropy, size)


class _LayerSums:
    """Sums over samples and times of what :class:`LayerChange` is the mean of."""

    def __init__(self, kind: Kind) -> None:
        self.kind = kind
        self._values: dict[str, tuple[float, int]] = {}

    def add(self, name: str, values: Tensor, skip_nan: bool = False) -> None:
        """values: one number a sample, ``[B]``."""
        if skip_nan:
            values = values[~values.isnan()]
        total, count = self._values.get(name, (0.0, 0))
        self._values[name] = (total + values.sum().item(), count + values.numel())

    def mean(self, name: str) -> float | None:
        total, count = self._values.get(name, (0.0, 0))
        return total / count if count else None


def _compare(layers: dict[str, _Held], sums: dict[str, _LayerSums], seen: LayerCall) -> None:
    held = layers[seen.layer]
    real, own = held.call, sums.setdefault(seen.layer, _LayerSums(seen.kind))
    kept = seen.tokens_kept
    own.add("keys", measures.token_change(real.token_keys, seen.token_keys, kept))
    own.add("values", measures.token_change(real.token_values, seen.token_values, kept))
    if seen.kind in ("cross", "joint", "text"):
        own.add("common_share", measures.common_share(real.token_keys, seen.token_keys, kept), skip_nan=True)
    if seen.output is not None and real.output is not None:
        own.add("output", measures.token_change(real.output, seen.output, kept))
    if held.weights is not None and held.entropy is not None and seen.keys is not None:
        assert real.queries is not None and real.queries_kept is not None
        weights = measures.log_weights(real.queries, seen.keys, seen.bias, seen.scale)
        own.add("kl", measures.symmetric_kl(held.weights, weights, real.queries_kept))
        own.add("entropy", held.entropy)
        own.add("entropy_shifted", measures.entropy(weights, real.queries_kept))


@contextmanager
def _evaluating(backbone: Backbone) -> Iterator[None]:
    """Every module in eval mode, and afterwards in the mode that it was in."""
    modes: dict[nn.Module, bool] = {module: module.training for module in backbone.modules()}
    backbone.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


# ---- rows


def _check(times: Sequence[float], sites: Sequence[str], queries: int, batch_size: int | None) -> None:
    if not times or any(not 0 <= t <= 1 for t in times):
        raise ValueError(f"probe: times must be in [0, 1], at least one, got {list(times)}")
    if unknown := [site for site in sites if site not in SITES]:
        raise ValueError(f"probe: sites are {', '.join(SITES)}, got {', '.join(unknown)}")
    if queries < 1:
        raise ValueError(f"probe: queries must be at least 1, got {queries}")
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"probe: batch_size must be at least 1, got {batch_size}")


def _grid(
    backbone: Backbone,
    condition: Condition,
    scales: Sequence[float],
    biases: Sequence[float],
    sites: Sequence[str],
    modes: Sequence[str],
    shift_pooled: bool,
) -> list[tuple[str, ConditionShift]]:
    pooled = condition.pooled_prompt_embeds
    shifts = []
    for mode in modes:
        for site in sites:
            sizes = {}
            if mode == "diagonal":
                sizes["dim"] = backbone.site_width(site)
                if pooled is not None and shift_pooled:
                    sizes["pooled_dim"] = pooled.shape[-1]
            for scale in scales:
                for bias in biases:
                    shift = ConditionShift(mode, scale, bias, site=site, shift_pooled=shift_pooled, **sizes)
                    shifts.append(("", shift))
    return shifts


def _row(run: _Run, position: int, name: str, shift: ConditionShift) -> ProbeRow:
    change, cosine, norm = (tuple(values[k] / run.samples for values in run.velocities[position]) for k in range(3))
    layers = tuple(
        LayerChange(
            layer=layer,
            kind=sums.kind,
            common_share=sums.mean("common_share"),
            kl=sums.mean("kl"),
            entropy=sums.mean("entropy"),
            entropy_shifted=sums.mean("entropy_shifted"),
            keys=sums.mean("keys"),  # type: ignore[arg-type]
            values=sums.mean("values"),  # type: ignore[arg-type]
            output=sums.mean("output"),
        )
        for layer, sums in run.layers[position].items()
    )
    # As they were written: 0.1 is 0.10000000149 in fp32.
    scale, bias = (float(f"{value.double().mean().item():.7g}") for value in (shift.scale, shift.bias))
    return ProbeRow(name, shift.mode, shift.site, scale, bias, change, cosine, norm, layers)


def _cause(backbone: Backbone, shift: ConditionShift, pooled: bool) -> str | None:
    scale, bias = shift.scale.float(), shift.bias.float()
    # Per channel it is another network's weights that decide; only a start that all channels share is known.
    if bool((scale != scale.flatten()[0]).any()) or bool((bias != bias.flatten()[0]).any()):
        return None
    scale, bias = scale.flatten()[0].item(), bias.flatten()[0].item()
    if scale == 1 and bias == 0:
        return "it shifts nothing"
    return structural_cause(backbone.family, shift.site, scale, bias, shifts_pooled=pooled and shift.shift_pooled)


def _floats(condition: Condition) -> list[Tensor]:
    parts = (condition.prompt_embeds, condition.pooled_prompt_embeds)
    return [part for part in parts if part is not None]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _means(sums: Sequence[float], samples: int) -> tuple[float, ...]:
    return tuple(value / samples for value in sums)


def _mean_of(values: Any) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None
