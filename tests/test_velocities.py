from __future__ import annotations

import copy

import pytest
import torch
from small_networks import VectorNetwork
from torch import nn

from apex_fast import Velocities


def point() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return torch.randn(3, 2), torch.rand(3), torch.randn(3, 3)


def move(module: nn.Module, by: float = 0.1) -> None:
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.add_(by)


def test_a_callable_plays_all_roles():
    network = VectorNetwork()
    roles = Velocities.of(network)
    assert roles.generator is network and roles.shifted is None and roles.real is None
    assert roles.shares_network
    assert Velocities.of(roles) is roles


def test_bound_methods_of_one_network_count_as_shared():
    network = VectorNetwork()
    assert Velocities(network.forward, shifted=network.forward).shares_network
    assert not Velocities(network, shifted=VectorNetwork()).shares_network


@pytest.mark.parametrize("arguments", [(None,), (lambda: 0, 3)])
def test_roles_must_be_callable(arguments):
    with pytest.raises(TypeError, match=r"must be a callable velocity\(x_t, t, condition\)"):
        Velocities(*arguments)


def test_frozen_is_the_module_as_it_was():
    network = VectorNetwork(dropout=0.5)
    before = copy.deepcopy(network).eval()
    roles = Velocities.from_module(network)
    move(network)
    x, t, c = point()
    assert torch.equal(roles.real(x, t, c), before(x, t, c))
    assert not roles.real.training and network.training
    assert not any(p.requires_grad for p in roles.real.parameters())
    roles.update_ema()  # may always be called
    assert torch.equal(roles.real(x, t, c), before(x, t, c))


def test_live_is_the_module_itself():
    network = VectorNetwork()
    roles = Velocities.from_module(network, real="live")
    assert roles.generator is network and roles.real is None and not roles.has_ema
    assert roles.state_dict() == {}


@pytest.mark.parametrize("real", ["frozen", "ema"])
def test_parameters_that_never_change_are_shared(real):
    network = VectorNetwork()
    network.first.requires_grad_(False)
    roles = Velocities.from_module(network, real=real)
    assert roles.real.first.weight is network.first.weight
    assert roles.real.last.weight is not network.last.weight
    assert network.last.weight.requires_grad
    assert not any(name.startswith("first") for name in roles.state_dict())


def test_ema_follows_the_module():
    network = VectorNetwork()
    network.register_buffer("calls", torch.zeros(1))
    roles = Velocities.from_module(network, real="ema", ema_decay=0.9)
    start = network.last.bias.detach().clone()
    move(network, 1.0)
    network.calls += 5
    roles.update_ema()
    torch.testing.assert_close(roles.real.last.bias, start + 0.1)
    roles.update_ema()
    torch.testing.assert_close(roles.real.last.bias, start + 0.19)
    assert roles.real.calls.item() == 5
    assert not roles.real.last.bias.requires_grad


def test_ema_of_half_parameters_does_not_stall():
    # 1 + 0.001 is 1 in bf16: without the fp32 average no number of updates would move it
    network = nn.Linear(1, 1, bias=False).bfloat16()
    nn.init.ones_(network.weight)
    roles = Velocities.from_module(network, real="ema", ema_decay=0.999)
    with torch.no_grad():
        network.weight.fill_(2.0)
    for _ in range(500):
        roles.update_ema()
    assert roles.real.weight.dtype == torch.bfloat16
    assert roles.real.weight.item() == pytest.approx(2 - 0.999**500, abs=0.01)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ema_state_survives_a_restart(dtype):
    network = VectorNetwork().to(dtype)
    roles = Velocities.from_module(network, real="ema", ema_decay=0.5)
    move(network)
    roles.update_ema()
    saved = roles.state_dict()
    restarted = Velocities.from_module(copy.deepcopy(network), real="ema", ema_decay=0.5)
    restarted.load_state_dict(saved)
    for mine, theirs in zip(restarted.real.parameters(), roles.real.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    for run in (roles, restarted):
        move(run.generator)
        run.update_ema()
    for mine, theirs in zip(restarted.real.parameters(), roles.real.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_state_is_a_copy_and_a_foreign_one_is_refused():
    network = VectorNetwork()
    roles = Velocities.from_module(network, real="ema", ema_decay=0.0)
    saved = roles.state_dict()
    kept = {name: value.clone() for name, value in saved.items()}
    move(network)
    roles.update_ema()
    assert all(torch.equal(saved[name], kept[name]) for name in saved)
    with pytest.raises(ValueError, match=r"missing \['first.bias'"):
        roles.load_state_dict({})
    with pytest.raises(ValueError, match=r"unknown \['other'\]"):
        roles.load_state_dict({**saved, "other": torch.zeros(1)})


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((lambda x, t, c: x,), TypeError, "expected an nn.Module"),
        ((nn.Linear(1, 1), "teacher"), ValueError, '"frozen", "ema" or "live"'),
        ((nn.Linear(1, 1), "ema", 1.5), ValueError, "ema_decay must lie"),
    ],
)
def test_from_module_refuses_what_it_cannot_use(arguments, error, message):
    with pytest.raises(error, match=message):
        Velocities.from_module(*arguments)
