"""From measurements to a verdict, a reason and a recommended shift. All thresholds are in :class:`Thresholds`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Verdict = Literal["invisible", "visible", "destructive"]


@dataclass(frozen=True)
class Thresholds:
    """Where a shift stops being invisible and where it starts to be destructive.

    "Change" is the mean over times and samples of ``||v_shift - v_real|| / ||v_real||``.

    Args:
        rounding: a change of at most so many times what one rounding of the text embedding does to the velocity is
            rounding: the network answers the shifted condition as it answers the real one. Shifts that a norm cancels
            stay below 1.25 times in bf16 on the tiny models; at twice this limit, shifts that fp32 sees would be lost.
        invisible: so is a change below this share of what another prompt does, though it is more than rounding: the
            network reads a thousand times more from a word. Below this alone where that is not known.
        weak: a visible change below this gets a warning in its reason.
        destructive: a change of at least this much is destructive if it is also ``over_prompt`` times what another
            prompt does; at 1 the shifted branch is as far from the real one as an answer of zero.
        over_prompt: see ``destructive``. A shift that moves the velocity no further than another prompt does leaves
            the network where it was trained.
        blown_up: the velocity is blown up where its norm is so many times that of the real one.
        collapsed: attention has collapsed where its entropy is below this share of the real one: a query that spread
            over many keys looks at one.
    """

    rounding: float = 1.5
    invisible: float = 1e-3
    weak: float = 0.02
    destructive: float = 0.75
    over_prompt: float = 1.5
    blown_up: float = 3.0
    collapsed: float = 0.05


THRESHOLDS = Thresholds()
DEFAULT = ("raw", -1.0, 0.5)
"""Site, scale and bias that a run has if it does not say otherwise."""

# A positive scale without bias leaves the direction of a token as it is, which is all that an RMS norm passes on.
_RMS_NORM_FIRST = {
    ("qwen_image", "raw"): "txt_norm",
    ("z_image", "raw"): "the norm in cap_embedder",
    ("lumina2", "raw"): "the norm in caption_embedder",
}
# A layer norm takes the mean over channels out, and with it a bias that all channels share. Every block of these
# families reads the text through one, so the bias stays in the residual stream unseen.
_LAYER_NORM_NEXT = {
    ("qwen_image", "projected"): "txt_norm1 and txt_norm2",
    ("flux", "projected"): "norm1_context, norm2_context and norm",
    ("stable_diffusion_3", "projected"): "norm1_context and norm2_context",
}


def structural_cause(family: str, site: str, scale: float, bias: float, *, shifts_pooled: bool) -> str | None:
    """Why this shift cannot be seen by a network of this family, from its structure alone; None if nothing is known.

    scale, bias: that all channels share.
    shifts_pooled: whether a pooled embedding is shifted as well, which nothing cancels.
    """
    if shifts_pooled:
        return None
    norm = _RMS_NORM_FIRST.get((family, site))
    if norm is not None and scale > 0 and bias == 0:
        return f"a positive scale cancels in {norm} (RMS), right behind it, but for the norm's epsilon"
    norm = _LAYER_NORM_NEXT.get((family, site))
    if norm is not None and scale == 1:
        return f"a bias that all channels share is taken out by the layer norms that read the text ({norm})"
    return None


@dataclass(frozen=True)
class Facts:
    """What a verdict rests on; means over times and samples, attention over the layers that see text.

    Args:
        is_control: scale 1 and bias 0.
        finite: whether every shifted velocity is.
        change, norm: of the velocity, see :func:`apex_fast.probing.measures.velocity_change`.
        rounding: the change by one rounding of the text embedding.
        other_prompt: the change by another prompt; None if there was only one.
        kl: symmetric KL of the attention weights.
        common_share: of the change in the text's keys; None where nothing changes.
        entropy_share: entropy of the shifted weights over that of the real ones; None where the real ones have none.
        cause: from :func:`structural_cause`.
        text_cause: the same for the text alone, where a pooled embedding that is shifted as well carries what is left.
    """

    is_control: bool
    finite: bool
    change: float
    norm: float
    rounding: float
    other_prompt: float | None
    kl: float | None
    common_share: float | None
    entropy_share: float | None
    cause: str | None
    text_cause: str | None = None


def judge(facts: Facts, limits: Thresholds = THRESHOLDS) -> tuple[Verdict, str]:
    """The verdict on one shift, and the reason in words."""
    if not facts.finite:
        return "destructive", "the velocity is not finite"
    moved = f"the velocity moves by {percent(facts.change)}"
    if facts.is_control:
        if facts.change == 0:
            return "invisible", "no shift: the control, nothing changes at all"
        return "invisible", f"no shift: the control; calls of this network repeat to {percent(facts.change)} only"
    prompt = facts.other_prompt
    least = limits.invisible * min(1.0, prompt or 1.0)
    if facts.change <= max(limits.rounding * facts.rounding, least):
        if facts.change == 0:
            reason = "the velocity does not change at all"
        elif facts.change <= limits.rounding * facts.rounding:
            reason = f"only rounding: {moved}, one rounding of the text does {percent(facts.rounding)}"
        else:
            share = "" if not prompt else f", {percent(facts.change / prompt)} of what another prompt does"
            reason = f"{moved}{share}: less than {percent(limits.invisible)}"
        return "invisible", reason if facts.cause is None else f"{reason}; {facts.cause}"
    beside = "" if not prompt else f", {facts.change / prompt:.2g} times what another prompt does"
    if facts.norm >= limits.blown_up:
        return "destructive", f"the velocity is blown up to {facts.norm:.3g} times its size"
    if facts.change >= limits.destructive and (not prompt or facts.change >= limits.over_prompt * prompt):
        return "destructive", f"{moved}{beside}: the network is far from anything it knows"
    if facts.entropy_share is not None and facts.entropy_share < limits.collapsed:
        return "destructive", f"attention collapses: {percent(facts.entropy_share)} of its entropy is left"
    reason = [moved + beside]
    if facts.kl is not None:
        reason.append(_attention(facts))
    if facts.change < limits.weak:
        reason.append(f"weak: below {percent(limits.weak)}")
    if facts.cause is not None:
        reason.append(f"though {facts.cause}")
    elif facts.text_cause is not None:
        reason.append(f"the pooled embedding alone carries it: {facts.text_cause}")
    return "visible", "; ".join(reason)


def _attention(facts: Facts) -> str:
    assert facts.kl is not None
    if facts.kl < 1e-9:
        return "attention weights stay as they are, the values carry it"
    text = f"attention by a KL of {facts.kl:.2g}"
    if facts.common_share is not None and facts.common_share > 0.9:
        text += f" ({percent(facts.common_share)} of the change in keys is the same for every token)"
    return text


@dataclass(frozen=True)
class Candidate:
    """A row of the grid as :func:`recommend` sees it."""

    site: str
    scale: float
    bias: float
    verdict: Verdict
    change: float


def recommend(
    candidates: Sequence[Candidate], other_prompt: float | None, limits: Thresholds = THRESHOLDS
) -> tuple[int | None, str]:
    """The position of the recommended row and the reason; None if no row can be recommended.

    The default shift if it is visible and not weak. Else, among those, the one whose change is nearest (by ratio) to
    what another prompt does, 0.3 if that is not known. Else the strongest weak one.
    """
    visible = [i for i, c in enumerate(candidates) if c.verdict == "visible"]
    strong = [i for i in visible if candidates[i].change >= limits.weak]
    for i in strong:
        if (candidates[i].site, candidates[i].scale, candidates[i].bias) == DEFAULT:
            return i, "the default, and visible"
    if strong:
        target = other_prompt or 0.3
        best = min(strong, key=lambda i: abs(math.log(candidates[i].change / target)))
        what = "what another prompt does" if other_prompt else percent(target)
        return best, f"visible, and nearest to {what}"
    if visible:
        return max(visible, key=lambda i: candidates[i].change), "the strongest of the visible ones, all of them weak"
    if any(c.verdict == "destructive" for c in candidates):
        return None, "nothing between invisible and destructive; try scales and biases in between"
    return None, "no shift of this grid is visible; try the other site, a negative scale or larger values"


def percent(share: float) -> str:
    """0.123 as "12.3 %", with as many digits as mean something."""
    value = 100 * share
    return f"{value:.1e} %" if 0 < abs(value) < 0.01 else f"{value:.3g} %"
