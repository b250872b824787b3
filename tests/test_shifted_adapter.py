"""A shifted branch with an adapter of its own: who trains what, what is kept, what is saved, what it costs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from test_lora import adapter_weights, disturb, gradients, held_bytes, inputs, load
from tiny_runs import losses, make_pipeline, pipeline_keys
from torch import Tensor

pytest.importorskip("diffusers", reason="diffusers is not installed: pip install 'apex_fast[train]'")
pytest.importorskip("peft", reason="peft is not installed: pip install 'apex_fast[train]'")

import apex_fast as af  # noqa: E402
from apex_fast import lora  # noqa: E402
from apex_fast.lora import LoraSettings, add_lora, lora_velocities, save_lora  # noqa: E402
from apex_fast.planning.step import AVERAGE, FROZEN, GRADIENTS, OPTIMIZER, REAL, TRAINED, count_step  # noqa: E402
from apex_fast.training.checkpoint import CheckpointError, load_state, read_tensors  # noqa: E402
from apex_fast.training.config import load_config  # noqa: E402
from apex_fast.training.loop import Trainer  # noqa: E402
from apex_fast.training.settings import SettingsError  # noqa: E402


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return make_pipeline(tmp_path_factory.mktemp("model"), "sana")


def made(model: Path, *, checkpointing: bool = False, real: str = "frozen", **settings):
    backbone = load(model)
    add_lora(backbone, LoraSettings(rank=4, **settings), seed=0)
    disturb(backbone)
    backbone.train()
    if checkpointing:
        backbone.enable_gradient_checkpointing()
    return backbone, lora_velocities(backbone, real, shifted_adapter=True)


def split(found: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Gradients of the generator's adapter and of the shifted branch's, under one set of names."""
    parts = []
    for adapter in (lora.GENERATOR, lora.SHIFTED):
        parts.append({n.replace(f".{adapter}", ""): g for n, g in found.items() if f".{adapter}" in n})
    assert len(parts[0]) + len(parts[1]) == len(found), "nothing but the two adapters is trained"
    return parts[0], parts[1]


def step(backbone, velocities, schedule: str | None = None, at: int = 0, **settings):
    x, _, condition = inputs(backbone)
    objective = af.ApexObjective(af.ConditionShift(), **{"warmup_steps": 0, "ramp_steps": 0, **settings})
    draws = objective.draw(x, torch.Generator().manual_seed(1))
    return objective.backward(velocities, x, condition, step=at, draws=draws, schedule=schedule)


# ---- who trains what


@pytest.mark.parametrize("schedule", ["retain", "sequential"])
def test_each_loss_trains_its_own_adapter(model, schedule):
    backbone, velocities = made(model)
    step(backbone, velocities, schedule, correction_weight=0.0, supervised_weight=0.0)
    generator, shifted = split(gradients(backbone))
    assert not generator and shifted and all(bool(g.any()) for g in shifted.values()), "L_fake: the shifted one"
    step(backbone, velocities, schedule, fake_weight=0.0)
    generator, shifted = split(gradients(backbone))
    assert generator and not shifted and all(bool(g.any()) for g in generator.values()), "the others: the generator's"
    step(backbone, velocities, schedule, generator_every=2, supervised_every=2)
    assert not split(gradients(backbone))[0], "between the generator's steps it gets no gradient at all"


@pytest.mark.parametrize("checkpointing", [False, True])
def test_at_first_the_two_gradients_add_up_to_that_of_a_shared_adapter(model, checkpointing):
    """Both adapters are equal then, so what one network would have got is shared out between the two."""
    backbone = load(model)
    add_lora(backbone, LoraSettings(rank=4), seed=0)
    disturb(backbone)
    backbone.train()
    before = step(backbone, lora_velocities(backbone))
    shared, _ = split(gradients(backbone))
    for schedule in ("retain", "sequential"):
        backbone, velocities = made(model, checkpointing=checkpointing)
        now = step(backbone, velocities, schedule)
        torch.testing.assert_close(now.total, before.total, rtol=1e-5, atol=1e-6)
        generator, shifted = split(gradients(backbone))
        assert generator.keys() == shifted.keys() == shared.keys()
        for name, value in shared.items():
            scale = value.abs().max().item()
            torch.testing.assert_close(generator[name] + shifted[name], value, rtol=0, atol=1e-4 * scale + 1e-7)


def test_the_roles_run_with_their_own_adapters(model):
    backbone, velocities = made(model, real="ema")
    x, t, condition = inputs(backbone)
    generated = velocities.generator(x, t, condition)
    assert torch.equal(velocities.shifted(x, t, condition), generated)
    disturb(backbone, lora.SHIFTED, seed=9, size=0.2)
    assert torch.equal(velocities.generator(x, t, condition), generated)
    assert not torch.allclose(velocities.shifted(x, t, condition), generated, atol=1e-3)
    # An average begins as the generator's, to the rounding of a pass without a graph.
    torch.testing.assert_close(velocities.real(x, t, condition), generated.detach())
    assert velocities.switch.active == (lora.GENERATOR,) and not velocities.shares_network
    with pytest.raises(ValueError, match='schedule="joint" stacks'):
        step(backbone, velocities, "joint")


def test_one_base_and_one_adapter_more(model):
    backbone = load(model)
    base = held_bytes(backbone)
    add_lora(backbone, LoraSettings(rank=4, dtype="bf16"), seed=0)
    one = sum(p.nbytes for p in adapter_weights(backbone).values())
    random_state = torch.get_rng_state()
    velocities = lora_velocities(backbone, shifted_adapter=True)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert held_bytes(backbone) == base + 2 * one
    assert {p.dtype for p in velocities.shifted_parameters()} == {torch.bfloat16}
    lora_velocities(backbone, shifted_adapter=True)
    assert held_bytes(backbone) == base + 2 * one, "made anew, the roles find the adapter that is there"
    assert lora_velocities(backbone).shifted is None


def test_its_state_is_kept_beside_an_average(model):
    backbone, velocities = made(model, real="ema")
    disturb(backbone, lora.SHIFTED, seed=9)
    disturb(backbone, lora.EMA, seed=8)
    state = velocities.state_dict()
    other, restored = made(model, real="ema")
    restored.load_state_dict(state)
    for adapter in (lora.SHIFTED, lora.EMA):
        for name, value in adapter_weights(backbone, adapter).items():
            assert torch.equal(adapter_weights(other, adapter)[name], value), name
    with pytest.raises(ValueError, match="of another real branch"):
        lora_velocities(load_with_lora(model), "ema").load_state_dict(state)


def load_with_lora(model: Path) -> af.Backbone:
    backbone = load(model)
    add_lora(backbone, LoraSettings(rank=4), seed=0)
    return backbone


def test_what_is_saved_is_the_generators_adapter(model, tmp_path):
    backbone, _ = made(model)
    disturb(backbone, lora.SHIFTED, seed=9)
    saved = read_tensors(save_lora(backbone, tmp_path))
    own = adapter_weights(backbone)
    assert len(saved) == len(own)
    for name, value in saved.items():
        head, _, tail = name.removeprefix("transformer.").rpartition(".weight")
        assert torch.equal(own[f"{head}.{lora.GENERATOR}.weight{tail}"], value), name


# ---- runs


def planned_bytes(**settings):
    from test_planning_memory import config, tiny

    return count_step(tiny("sana"), config(**settings))


MORE = ("--rank", "4", "--shifted_adapter", "true", "--ema_decay", "0.9", "--lora_dropout", "0.1")


def run(words: list[str]) -> Trainer:
    trainer = Trainer(load_config(None, words))
    trainer.run()
    return trainer


def test_a_run_resumes_to_the_same_numbers_and_exports_one_adapter(model, tmp_path):
    more = (*MORE, "--shifted_adapter_learning_rate", "1e-3", "--checkpointing_steps", "2")
    whole = run(pipeline_keys(model, tmp_path / "whole", *more))
    rates = {group["group"]: group["lr"] for group in whole.optimizer.param_groups}
    assert rates == {"network": pytest.approx(3e-4), "shifted_adapter": pytest.approx(1e-3)}
    moved = whole.velocities.shifted_parameters()
    assert moved and all(bool(p.isfinite().all()) for p in moved)
    assert not any(".shifted" in name for name in whole.average.parameters)

    checkpoint = tmp_path / "whole" / "checkpoint-2"
    kept = load_state(checkpoint, "real_branch")
    assert kept and all(name.startswith("shifted.") for name in kept)
    (tmp_path / "again").mkdir()
    again = run(pipeline_keys(model, tmp_path / "again", *more, "--resume_from_checkpoint", str(checkpoint)))
    assert losses(tmp_path / "again") == [line for line in losses(tmp_path / "whole") if line[0] > 2]
    for one, other in zip(again.velocities.shifted_parameters(), moved, strict=True):
        assert torch.equal(one, other)
    with pytest.raises(CheckpointError, match="shifted_adapter: true, this one has shifted_adapter: false"):
        without = tuple("false" if word == "true" else word for word in MORE)
        Trainer(
            load_config(
                None, pipeline_keys(model, tmp_path / "third", *without, "--resume_from_checkpoint", str(checkpoint))
            )
        )

    for folder in (tmp_path / "whole" / "model", checkpoint / "model"):
        names = list(read_tensors(folder / lora.WEIGHTS))
        assert len(names) == len(adapter_weights(whole.backbone))
        record = json.loads((folder / "apex_fast.json").read_text()) if (folder / "apex_fast.json").is_file() else {}
        assert "shifted" not in json.dumps(record.get("lora", {}))
    from apex_fast.training.models import load_generator

    for source in (tmp_path / "whole", checkpoint):
        backbone, _ = load_generator(source)
        assert set(backbone.transformer.peft_config) == {lora.GENERATOR}


def test_plans_count_it():
    plain, own = (planned_bytes(rank=4, ema_decay=0.9, shifted_adapter=wanted) for wanted in (False, True))
    trained = plain.held[TRAINED]
    assert own.held[TRAINED] == 2 * trained and own.held[OPTIMIZER] == pytest.approx(2 * plain.held[OPTIMIZER])
    assert own.held[AVERAGE] == plain.held[AVERAGE] and own.held.get(REAL, 0) == plain.held.get(REAL, 0)
    assert own.held[FROZEN] == plain.held[FROZEN] and own.forward_flops == plain.forward_flops
    # Both adapters' gradients are there when the optimizer steps.
    assert own.held[GRADIENTS] == 2 * trained


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--shifted_adapter", "true"), "shifted_adapter belongs to LoRA"),
        (("--rank", "4", "--shifted_adapter_learning_rate", "1e-4"), "it shares the generator's"),
        ((*MORE, "--shifted_adapter_learning_rate", "0"), "must be above 0, got 0"),
        ((*MORE, "--schedule", "joint"), "schedule: joint stacks"),
        ((*MORE, "--loss", "paper"), "shifted_adapter is for loss: correction"),
        ((*MORE, "--objective.fake_weight", "0"), "nothing trains it"),
    ],
)
def test_what_does_not_go_together_is_refused(model, tmp_path, more, message):
    with pytest.raises(SettingsError, match=message):
        load_config(None, pipeline_keys(model, tmp_path, *more))


def test_several_processes_are_refused():
    from types import SimpleNamespace

    from apex_fast.training.setup import check_spreading

    config = SimpleNamespace(loss="correction", block_offload=False, shifted_adapter=True)
    with pytest.raises(SettingsError, match="shifted_adapter trains two adapters in turns"):
        check_spreading(config, SimpleNamespace(sharded=False))
