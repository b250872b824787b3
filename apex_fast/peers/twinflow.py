"""TwinFlow (arXiv 2512.05150): the recursive consistency of :mod:`apex_fast.peers.rcgm` with a twin trajectory in
negative time, where the same network learns the velocity of its own one-step samples.

    x_fake    = z - F(z, 1)                              a one-step sample                            Sec. 3.1
    L_adv     = d( F(x_fake_t', -t'),  z' - x_fake ),    x_fake_t' = t' z' + (1 - t') sg(x_fake)      Eq. 2
    Dv        = F(x_fake_t', t') - F(x_fake_t', -t')     real velocity minus fake velocity            Eq. 7
    L_rectify = d( F(z, 1),  sg(F(z, 1) + clamp(Dv, -1, 1)) )                                         Eq. 9
    L         = L_base + L_adv + rectify_weight L_rectify                                             Eq. 10

With d the mean square the gradient of L_rectify on F(z, 1) is 2 clamp(v_fake - v_real)/n: that of APEX's correction,
the sign of time in the place of the shifted condition and the live network in that of the real branch. As in the
released code: a batch has four equal parts, RCGM's three and the twin's, whose data are replaced by one-step samples
(of the live network, without gradient) and which weighs 1; L_rectify is taken on the part that goes from noise to data,
on the samples that this very pass implies, its two velocities being the live network's without gradient; d is
``barron``, the difference is clamped to 1, L_rectify weighs 0.5.

Negative time: backbones get t' with its sign and turn it into their own units as they do any time, so SANA, say, is
asked with the timestep -1000 t', and the sine half of the embedding changes its sign while the cosine half stays; a
family that counts from data to noise (1 - t) gets 1 + t' there, a value that it is never asked with otherwise. No
class is changed for it. That is what the released LoRA configurations do; the other released networks also add an
embedding of the end of a jump.

Cost with equal parts, order N, unguided: 3 + 1/4 + 3N/4 + 2/4 forwards, 5.25 for N = 2.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from apex_fast import ops
from apex_fast.condition import Condition
from apex_fast.passes import Passes
from apex_fast.path import endpoint
from apex_fast.peers.base import noise, times, whole_or_float
from apex_fast.peers.rcgm import Rcgm, Rows, metric, part


class TwinFlow(Rcgm):
    """TwinFlow; roles and options as for :class:`~apex_fast.peers.rcgm.Rcgm`, with a fourth part of the batch."""

    name: ClassVar[str] = "twinflow"
    reads: ClassVar[tuple[str, ...]] = (*Rcgm.reads, "query_times", "rectify_weight")
    parts: ClassVar[int] = 4

    @property
    def passes(self) -> Passes:
        """RCGM's, the samples of the twin's part, and both velocities of the difference on the part from noise."""
        base = super().passes
        rectified = 2 * self._share(0) if self.settings.rectify_weight > 0 else 0
        without = base.forward_no_grad + self._share(3) + rectified
        return Passes(whole_or_float(without), base.forward_grad, base.backward, base.recomputed)

    @torch.no_grad()
    def data(self, x: Tensor, condition: Condition | Tensor, rows: Rows, generator: torch.Generator | None) -> Tensor:
        """The data, one-step samples in the twin's rows."""
        twin = rows.twin
        if twin.stop == twin.start:
            return x
        z = noise(x[twin], generator)
        start = z.new_ones(len(z))
        velocity = self.ask("generator", self.velocities.generator, z, start, part(condition, twin), x)
        return torch.cat([x[: twin.start], endpoint(velocity, z, start).to(x.dtype)])

    def asked(self, rows: Rows) -> Tensor:
        """The times, negative in the twin's rows."""
        sign = torch.ones_like(rows.t)
        sign[rows.twin] = -1.0
        return rows.t * sign

    def weights(self, rows: Rows) -> Tensor:
        """RCGM's, 1 for the twin's rows."""
        weights = super().weights(rows)
        weights[rows.twin] = 1.0
        return weights

    def finish(
        self,
        loss: Tensor,
        found: dict[str, Tensor],
        each: Tensor,
        velocity: Tensor,
        x_t: Tensor,
        x: Tensor,
        rows: Rows,
        condition: Condition | Tensor,
        generator: torch.Generator | None,
    ) -> Tensor:
        """``loss``, of which L_adv is a part by now, with L_rectify."""
        if rows.twin.stop > rows.twin.start:
            found["loss_adversarial"] = each[rows.twin].mean()
        ends = rows.ends
        if self.settings.rectify_weight == 0 or ends.stop == ends.start:
            return loss
        generated = velocity[ends]
        x_fake = endpoint(generated.detach(), x_t[ends], rows.t[ends])
        difference = self.difference(x_fake, part(condition, ends), x, generator)
        clip = self.settings.residual_clip
        goal = (generated + difference.clamp(-clip, clip)).detach()
        rectified = metric(generated, goal, self.settings.metric).mean()
        found["loss_rectify"] = rectified.detach()
        found["dv_rms"] = difference.square().mean().sqrt()
        return loss + self.settings.rectify_weight * rectified

    @torch.no_grad()
    def difference(
        self, x_fake: Tensor, condition: Condition | Tensor, like: Tensor, generator: torch.Generator | None
    ) -> Tensor:
        """Dv (Eq. 7) of the live network at ``x_fake`` ``[B, ...]``, noised again."""
        z, t = noise(x_fake, generator), times(self.settings.query_times, x_fake, generator)
        x_t, role = ops.interpolate(x_fake, z, t), self.velocities.generator
        fake = self.ask("fake", role, x_t, -t, condition, like)
        return self.ask("real", role, x_t, t, condition, like) - fake
