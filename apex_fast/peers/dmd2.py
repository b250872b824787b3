"""Distribution matching distillation with two time scales (DMD2, arXiv 2405.14867), without its GAN term.

Three networks: the one-step *generator* G, a frozen *teacher*, whose score is that of the data, and a *fake score*,
which follows what the generator makes now. Both scores are asked at the generator's samples, noised again; their
difference is the gradient of the Kullback-Leibler divergence of the two distributions, and goes into the generator
through its sample. With the networks of this library, which predict velocities v = z - x on x_t = t z + (1 - t) x,
and with x0(v) = x_t - t v the sample that a velocity implies (mu_base and mu_fake of DMD, arXiv 2311.18828):

    x   = z - G(z, 1)                                                 one step from noise to a sample
    w   = mean |x - x0(v_real)| of each sample                        the normaliser (DMD, Eq. 8)
    g   = (x0(v_fake) - x0(v_real)) / w = t (v_real - v_fake) / w     the gradient on the sample (DMD, Eq. 7)
    L_G = 1/2 mean (x - sg(x - g))^2                                  so dL_G/dx = g/n, as the released code has it
    L_F = mean |v_fake(t z' + (1 - t) sg(x), t) - (z' - sg(x))|^2     flow matching on samples (DMD, Eq. 6)

By Prop. 1 of APEX (s = -(x_t + (1 - t) v)/t) g is s_fake - s_real times t^2/((1 - t) w). One step from noise
makes x = z - v_gen, so the gradient on the generator's velocity is t (v_fake - v_real)/(w n): that of APEX's correction
in exact form and without its clip, 2 (v_shift - v_real)/n, times t/(2 w).

Two time scales (DMD2, Sec. 4.2): for each update of the generator the fake score gets ``fake_steps`` (5), each on
fresh samples under the step's conditions, the last on the very sample that the generator learned from, as in the
released code. So k updates cost 4 k + 4 forwards: k - 1 samples without gradient, k times forward and backward of
the fake score, forward and backward of the generator, and one pass of each score (the teacher's twice if guided).

Several steps (Sec. 4.4 and 4.5): with ``generator_steps`` n the generator also learns to start at t = i/n, from a
sample of its own that was noised again (backward simulation); one i is drawn for a batch.

Left out: the GAN term (Sec. 4.3), which needs real pictures and a discriminator's head. The fake score may be a whole
network or an adapter (``dmd2_lora``; the TwinFlow paper runs DMD so at 20B); here it is just a callable.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from apex_fast import ops
from apex_fast.condition import Condition
from apex_fast.passes import Passes
from apex_fast.path import endpoint, per_sample
from apex_fast.peers.base import Backward, Copies, Peer, PeerSettings, noise, times, whole_or_float
from apex_fast.roles import trained
from apex_fast.velocities import Velocities, Velocity


def distribution_matching_gradient(
    x_fake: Tensor, x_t: Tensor, t: Tensor, v_real: Tensor, v_fake: Tensor
) -> tuple[Tensor, Tensor]:
    """The gradient g of DMD (Eq. 7) on the generator's sample, and its normaliser w (Eq. 8, without weights in t).

    Args:
        x_fake: the sample ``[B, ...]``.
        x_t, t: where both scores were asked, ``[B, ...]`` and ``[B]``.
        v_real, v_fake: their velocities there.

    Returns:
        ``(t (v_real - v_fake) / w, w)``, ``[B, ...]`` and ``[B]``, without history.
    """
    with torch.no_grad():
        distance = (x_fake - endpoint(v_real, x_t, t)).abs().flatten(1).mean(1)
        normaliser = distance.clamp_min(torch.finfo(distance.dtype).tiny)
        return per_sample(t / normaliser, x_t) * (v_real - v_fake), normaliser


def distribution_matching_loss(x_fake: Tensor, gradient: Tensor) -> Tensor:
    """``1/2 mean (x - sg(x - g))^2``, 0-d, whose derivative in ``x_fake`` is ``g`` over the number of elements."""
    return 0.5 * (x_fake - (x_fake - gradient).detach()).square().mean()


class FakeScore:
    """The network that follows the generator's samples, with an optimizer of its own.

    Args:
        velocity: asks it.
        parameters: what is trained of it, by name. They need no gradients outside of :meth:`training`, so that they
            may be an adapter in the very network that the generator is.
        optimizer: over ``parameters``.
        learning_rate: of the step with an index.
        max_grad_norm: its gradients are scaled down to this norm; None leaves them.
    """

    def __init__(
        self,
        velocity: Velocity,
        parameters: Mapping[str, nn.Parameter],
        optimizer: torch.optim.Optimizer,
        *,
        learning_rate: Callable[[int], float],
        max_grad_norm: float | None = None,
    ) -> None:
        self.velocity, self.parameters, self.optimizer = velocity, dict(parameters), optimizer
        self.learning_rate, self.max_grad_norm = learning_rate, max_grad_norm
        for parameter in self.parameters.values():
            parameter.requires_grad_(False)

    @contextmanager
    def training(self) -> Iterator[None]:
        """Within this context its parameters take gradients."""
        for parameter in self.parameters.values():
            parameter.requires_grad_(True)
        try:
            yield
        finally:
            for parameter in self.parameters.values():
                parameter.requires_grad_(False)

    def update(self, step: int) -> None:
        """A step of the optimizer on the gradients, which are cleared. Gradients that are not finite are
        taken as zero, on the device: what the optimizer then does follows from its moments and its decay alone."""
        owned = [p for p in self.parameters.values() if p.grad is not None]
        limit = float("inf") if self.max_grad_norm is None else self.max_grad_norm
        finite = torch.nn.utils.clip_grad_norm_(owned, limit).isfinite()
        for parameter in owned:
            parameter.grad = torch.where(finite, parameter.grad, 0.0)
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate(step)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def state_dict(self) -> dict[str, Any]:
        """Weights and optimizer."""
        weights = {name: parameter.detach().clone() for name, parameter in self.parameters.items()}
        return {"weights": weights, "optimizer": self.optimizer.state_dict()}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores :meth:`state_dict`. ValueError for the weights of another fake score."""
        saved = state["weights"]
        if odd := sorted(saved.keys() ^ self.parameters.keys()):
            raise ValueError(f"the fake score was saved with other parameters (first difference: {odd[0]})")
        for name, parameter in self.parameters.items():
            if saved[name].shape != parameter.shape:
                shapes = f"{list(saved[name].shape)}, and here it is {list(parameter.shape)}"
                raise ValueError(f"the fake score was saved with {name} of {shapes}")
            parameter.copy_(saved[name])
        self.optimizer.load_state_dict(state["optimizer"])


class Dmd2(Peer):
    """DMD2 without its GAN term; the teacher is ``velocities.real``."""

    name: ClassVar[str] = "dmd2"
    reads: ClassVar[tuple[str, ...]] = ("fake_steps", "fake_times", "query_times", "generator_steps")

    def __init__(
        self, velocities: Velocities, settings: PeerSettings, fake: FakeScore, *, copies: Copies, **options: Any
    ) -> None:
        super().__init__(velocities, settings, copies=copies, **options)
        if velocities.real is None:
            raise ValueError("DMD2 needs a frozen teacher: make the roles with real='frozen'")
        self.fake = fake

    @property
    def passes(self) -> Passes:
        """4 k + 4 forwards for k updates of the fake score, and the simulated steps of ``generator_steps``."""
        k, simulated = self.settings.fake_steps, (self.settings.generator_steps - 1) / 2
        without = (k - 1) + k * simulated + (1 + self.guided) + 1
        return Passes(whole_or_float(without), k + 1, k + 1, k + 1 if self.checkpointing else 0)

    def losses(
        self,
        x: Tensor,
        condition: Condition | Tensor,
        negative: Condition | Tensor | None,
        *,
        step: int,
        generator: torch.Generator | None,
        backward: Backward,
    ) -> dict[str, Tensor]:
        fitted = []
        for _ in range(self.settings.fake_steps - 1):
            with torch.no_grad():
                sample = self.sample(x, condition, generator)
            fitted.append(self.fit(sample, x, condition, step=step, generator=generator))
        x_fake = trained(self.sample(x, condition, generator), "generator")
        z, t = noise(x, generator), times(self.settings.query_times, x, generator)
        with torch.no_grad():
            x_t = ops.interpolate(x_fake.detach(), z, t)
            v_real = self.teacher(self.velocities.real, x_t, t, condition, negative, x)
            v_fake = self.ask("fake", self.fake.velocity, x_t, t, condition, x)
        gradient, normaliser = distribution_matching_gradient(x_fake.detach(), x_t, t, v_real, v_fake)
        loss = distribution_matching_loss(x_fake, gradient)
        backward(loss)
        fitted.append(self.fit(x_fake.detach(), x, condition, step=step, generator=generator))
        difference, size = v_fake - v_real, v_real.flatten(1).norm(dim=1)
        tiny = torch.finfo(size.dtype).tiny
        return {
            "loss_generator": loss.detach(),
            "loss_fake": torch.stack(fitted).mean(),
            "loss_total": loss.detach() + fitted[-1],
            "dv_rms": difference.square().mean().sqrt(),
            "fake_to_real": (difference.flatten(1).norm(dim=1) / size.clamp_min(tiny)).mean(),
            "dmd_normaliser": normaliser.mean(),
        }

    def sample(self, x: Tensor, condition: Condition | Tensor, generator: torch.Generator | None) -> Tensor:
        """What the generator makes of noise like ``x`` ``[B, ...]``: its sample, differentiable in its parameters.
        With several steps, the sample of the step that was drawn, behind those before it without gradient."""
        steps, role = self.settings.generator_steps, self.velocities.generator
        x_t = noise(x, generator)
        last = 0
        if steps > 1:
            place = x.device if generator is None else generator.device
            last = int(torch.randint(steps, (), generator=generator, device=place))
        for number in range(last):
            t = x_t.new_full((len(x),), 1 - number / steps)
            with torch.no_grad():
                velocity = self.ask("generator", role, x_t, t, condition, x)
                below = t.new_full((len(x),), 1 - (number + 1) / steps)
                x_t = ops.interpolate(endpoint(velocity, x_t, t), noise(x, generator), below)
        t = x_t.new_full((len(x),), 1 - last / steps)
        return endpoint(self.ask("generator", role, x_t, t, condition, x), x_t, t)

    def fit(
        self,
        sample: Tensor,
        x: Tensor,
        condition: Condition | Tensor,
        *,
        step: int,
        generator: torch.Generator | None,
    ) -> Tensor:
        """One update of the fake score by flow matching on ``sample`` ``[B, ...]``; its loss, 0-d, detached."""
        z, t = noise(x, generator), times(self.settings.fake_times, x, generator)
        with self.fake.training():
            velocity = self.ask("fake", self.fake.velocity, ops.interpolate(sample, z, t), t, condition, x)
            loss = ops.mixed_velocity_loss(trained(velocity, "fake"), sample, z).mean()
            loss.backward()
        self.fake.update(step)
        return loss.detach()

    def state_dict(self) -> dict[str, Any]:
        """The fake score and its optimizer."""
        return {"fake": self.fake.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores :meth:`state_dict`."""
        if set(state) != {"fake"}:
            raise ValueError(f"{self.name} needs the state of its fake score, and {sorted(state)} was saved")
        self.fake.load_state_dict(state["fake"])
