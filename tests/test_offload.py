"""What waits on the CPU changes no number, is really moved, and is really gone meanwhile."""

from __future__ import annotations

import copy
import gc
import itertools
import json
import weakref
from pathlib import Path

import pytest
import torch
from torch import Tensor

pytest.importorskip("peft")

from backbone_cases import PROMPTS, draw, load_tiny
from tiny_runs import losses, make_pipeline, pipeline_keys, start_process

from apex_fast import ApexObjective, Condition, ConditionShift, Velocities
from apex_fast.backbones.base import Backbone
from apex_fast.backbones.offload import Offload, block_lists
from apex_fast.lora import LoraSettings, add_lora, lora_velocities
from apex_fast.planning import plan
from apex_fast.planning.memory import LiveBytes
from apex_fast.training.config import load_config
from apex_fast.training.loop import Trainer
from apex_fast.training.settings import SettingsError

SCHEDULES = ("joint", "retain", "sequential")
EVERYTHING = 0
"""As ``smallest``: even the activations of tiny networks are moved."""


def network(family: str, folders: pytest.TempPathFactory, mode: str) -> Backbone:
    backbone = copy.deepcopy(load_tiny(family, folders))
    backbone.transformer.train()
    if mode == "lora":
        add_lora(backbone, LoraSettings(rank=4), seed=0)
        torch.manual_seed(1)
        for name, parameter in backbone.transformer.named_parameters():
            if "lora_B" in name:  # zero at first, which would hide half of the gradients
                parameter.data.normal_(std=0.05)
    else:
        backbone.transformer.requires_grad_(True)
        for name in backbone.parameters_without_gradient():
            backbone.transformer.get_parameter(name).requires_grad_(False)
    return backbone


def roles(backbone: Backbone, mode: str, *, blocks: bool = False) -> Velocities:
    if mode == "lora":
        return lora_velocities(backbone)
    velocities = Velocities.from_module(backbone, real="frozen")
    if blocks:
        velocities.real.offload = Offload(velocities.real.transformer, blocks=True)
    return velocities


def gradients(backbone: Backbone, velocities: Velocities, schedule: str) -> tuple[Tensor, list[Tensor]]:
    """Total loss and gradients of one step, after which nothing is left of it."""
    objective = ApexObjective(ConditionShift(), warmup_steps=0, ramp_steps=0)
    condition = backbone.encode(PROMPTS)
    x = draw(backbone, len(PROMPTS), 16, 16)
    found = objective.backward(
        velocities, x, condition, step=0, schedule=schedule, generator=torch.Generator().manual_seed(3)
    )
    parameters = [p for p in backbone.transformer.parameters() if p.requires_grad]
    grads = [p.grad for p in parameters]
    for parameter in parameters:
        parameter.grad = None
    return found.total, grads


def same(one: tuple[Tensor, list[Tensor]], other: tuple[Tensor, list[Tensor]]) -> bool:
    pairs = [(one[0], other[0]), *zip(one[1], other[1], strict=True)]
    return all((a is None and b is None) or torch.equal(a, b) for a, b in pairs)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str, str], tuple[Tensor, list[Tensor]]]:
    """The step without offload, by family, mode and schedule; checkpointing changes nothing of it."""
    found = {}
    for family, mode in itertools.product(("sana", "flux"), ("full", "lora")):
        backbone = network(family, tmp_path_factory, mode)
        velocities = roles(backbone, mode)
        for schedule in SCHEDULES:
            found[family, mode, schedule] = gradients(backbone, velocities, schedule)
            assert any(bool(g is not None and g.any()) for g in found[family, mode, schedule][1])
    return found


# ---- no number changes


@pytest.mark.parametrize("checkpointing", [False, True, 2], ids=["keeping", "checkpointing", "every second"])
@pytest.mark.parametrize("mode", ["full", "lora"])
@pytest.mark.parametrize("family", ["sana", "flux"])
def test_no_number_changes(tmp_path_factory, plain, family: str, mode: str, checkpointing: bool | int) -> None:
    for activations, blocks in ((True, False), (False, True), (True, True)):
        backbone = network(family, tmp_path_factory, mode)
        if checkpointing is not False:
            backbone.enable_gradient_checkpointing(checkpointing)
        in_blocks = blocks and mode == "lora"
        if activations or in_blocks:
            backbone.offload = Offload(
                backbone.transformer, activations=activations, blocks=in_blocks, smallest=EVERYTHING
            )
        velocities = roles(backbone, mode, blocks=blocks)
        for schedule in SCHEDULES:
            found = gradients(backbone, velocities, schedule)
            assert same(found, plain[family, mode, schedule]), (activations, blocks, schedule)
        moved = moved_of(backbone, velocities)
        assert (moved["out"] > 0) == activations
        # Everything that went out came back: each saved tensor is asked for once.
        assert moved["out"] == moved["back"]
        assert (moved["weights"] > 0) == blocks
        assert moved["waiting"] == 0, "something on the CPU outlives its step"


def moved_of(backbone: Backbone, velocities: Velocities) -> dict[str, int]:
    offloads = [b.offload for b in (backbone, velocities.real) if isinstance(b, Backbone) and b.offload is not None]
    return {
        "out": sum(o.moved.activations_out for o in offloads),
        "back": sum(o.moved.activations_back for o in offloads),
        "weights": sum(o.moved.weights_in for o in offloads),
        "waiting": sum(o.moved.waiting for o in offloads),
    }


def test_a_real_branch_and_samples_without_gradient_fetch_their_blocks_too(tmp_path_factory) -> None:
    backbone = network("sana", tmp_path_factory, "lora")
    condition, x = backbone.encode(PROMPTS), draw(backbone, 2, 16, 16)
    with torch.no_grad():
        expected = backbone(x, torch.ones(2), condition)
        backbone.offload = offload = Offload(backbone.transformer, blocks=True)
        assert torch.equal(backbone(x, torch.ones(2), condition), expected)
        assert offload.moved.weights_in == offload.weight_bytes > 0
        assert offload.moved.activations_out == 0


# ---- it is really moved


def test_under_checkpointing_the_inputs_of_the_blocks_move_and_without_it_much_more(tmp_path_factory) -> None:
    sizes = {}
    for checkpointing in (False, True):
        backbone = network("sana", tmp_path_factory, "lora")
        if checkpointing:
            backbone.enable_gradient_checkpointing()
        backbone.offload = Offload(backbone.transformer, activations=True, smallest=EVERYTHING)
        velocity = backbone(draw(backbone, 2, 16, 16), torch.ones(2), backbone.encode(PROMPTS))
        velocity.square().mean().backward()
        sizes[checkpointing] = backbone.offload.moved.activations_out
    assert 0 < sizes[True] < sizes[False] / 2


def test_no_weight_is_taken_for_an_activation(tmp_path_factory) -> None:
    backbone = network("flux", tmp_path_factory, "lora")
    weights = {p.untyped_storage().data_ptr() for p in backbone.transformer.parameters()}
    offload = backbone.offload = Offload(backbone.transformer, activations=True, smallest=EVERYTHING)
    sent: list[int] = []
    real = offload.to_host
    offload.to_host = lambda tensor: sent.append(tensor.untyped_storage().data_ptr()) or real(tensor)  # type: ignore
    backbone(draw(backbone, 2, 16, 16), torch.ones(2), backbone.encode(PROMPTS)).mean().backward()
    assert sent and not weights & set(sent)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_fetched_block_is_gone_before_the_next_one_runs(tmp_path_factory, checkpointing: bool) -> None:
    backbone = network("sana", tmp_path_factory, "lora")
    if checkpointing:
        backbone.enable_gradient_checkpointing()
    offload = backbone.offload = Offload(backbone.transformer, blocks=True)
    copies: list[weakref.ref] = []
    most = 0
    real = offload.to_device

    def watched(host: Tensor, device: torch.device) -> Tensor:
        nonlocal most
        made = real(host, device)
        copies.append(weakref.ref(made.untyped_storage()))
        most = max(most, sum(ref() is not None for ref in copies))
        return made

    offload.to_device = watched  # type: ignore[method-assign]
    gc.disable()  # nothing may hang in a cycle
    try:
        velocity = backbone(draw(backbone, 2, 16, 16), torch.ones(2), backbone.encode(PROMPTS))
        in_a_block = max(len(block.places) for block in offload.blocks)
        total = sum(len(block.places) for block in offload.blocks)
        assert len(copies) == total > in_a_block
        assert not any(ref() is not None for ref in copies), "autograd keeps weights that should be on the CPU"
        velocity.square().mean().backward()
        assert len(copies) > total, "backward used weights of its own"
        assert most <= in_a_block
        del velocity
    finally:
        gc.enable()


def test_at_rest_the_network_holds_the_weights_of_the_cpu(tmp_path_factory) -> None:
    backbone = network("sana", tmp_path_factory, "lora")
    before = {name: p.detach().clone() for name, p in backbone.transformer.named_parameters()}
    offload = backbone.offload = Offload(backbone.transformer, blocks=True)
    homes = {id(place.parameter) for block in offload.blocks for place in block.places}
    with pytest.raises(ValueError, match="prompt_embeds"):
        backbone(draw(backbone, 2, 16, 16), torch.ones(2), backbone.encode(PROMPTS).prompt_embeds[..., :3])
    backbone(draw(backbone, 2, 16, 16), torch.ones(2), backbone.encode(PROMPTS)).mean().backward()
    after = dict(backbone.transformer.named_parameters())
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert homes <= {id(p) for p in after.values()}
    # What moves or casts the network leaves them alone, and takes the rest along.
    backbone.to(torch.float64)
    dtypes = {p.dtype for block in offload.blocks for p in (place.parameter for place in block.places)}
    assert dtypes == {torch.float32}
    assert next(p for n, p in backbone.transformer.named_parameters() if "lora_A" in n).dtype == torch.float64
    offload.remove()
    assert all(not block._forward_pre_hooks for blocks in block_lists(backbone.transformer) for block in blocks)


def test_on_another_device_a_graph_takes_next_to_nothing(tmp_path_factory) -> None:
    """The meta device counts as that other device: what is on the CPU takes nothing of it."""
    alive = {}
    for name, options in {
        "none": None,
        "activations": {"activations": True, "smallest": EVERYTHING},
    }.items():
        backbone = network("flux", tmp_path_factory, "lora")
        backbone.transformer.to("meta")  # and not the text encoders, which a copy of a backbone shares with it
        if options is not None:
            backbone.offload = Offload(backbone.transformer, **options)
        with torch.device("meta"), LiveBytes() as counted:
            counted.hold(backbone.transformer.parameters(), "weights")
            condition = condition_on_meta(backbone)
            start = counted.live
            velocity = backbone(torch.empty(2, *backbone.latent_shape(16, 16)), torch.ones(2), condition)
            alive[name] = counted.live - start
            velocity.mean().backward()
    assert 0 < alive["activations"] < alive["none"] / 10


def condition_on_meta(backbone: Backbone) -> Condition:
    pooled = torch.empty(2, backbone.transformer.config.pooled_projection_dim)
    return Condition(torch.empty(2, backbone.token_count, backbone.text_width), None, pooled)


# ---- in a run


@pytest.fixture(scope="module")
def sana(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_pipeline(tmp_path_factory.mktemp("sana"), "sana")


@pytest.mark.parametrize("mode", [("--rank", "4"), ()], ids=["lora", "full"])
def test_a_run_trains_the_same_with_everything_on_the_cpu(
    sana: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: tuple[str, ...]
) -> None:
    monkeypatch.setattr("apex_fast.backbones.offload.SMALLEST", 0)
    offload = ("--activation_offload", "true", "--block_offload", "true", "--gradient_checkpointing", "[1]")
    for folder, more in (("plain", ()), ("offload", offload)):
        trainer = Trainer(load_config(None, pipeline_keys(sana, tmp_path / folder, *mode, *more)))
        assert trainer.run().finished
    assert trainer.backbone.offload.moved.activations_out > 0
    holder = trainer.backbone if mode else trainer.velocities.real
    # Once per step and pass at least: generator, shifted, real and data, as far as the block belongs to them.
    assert holder.offload.moved.weights_in >= 4 * holder.offload.weight_bytes > 0
    assert losses(tmp_path / "offload") == losses(tmp_path / "plain")
    assert len(losses(tmp_path / "plain")) == 4


PROCESS = """
import io, json, sys, warnings
import torch
import torch.distributed as dist
from process_end import leave
from apex_fast.backbones import offload
from apex_fast.training.config import load_config
from apex_fast.training.loop import Trainer

warnings.filterwarnings("ignore")
torch.set_num_threads(1)
offload.SMALLEST = 0
dist.init_process_group("gloo")
found = []
for plain, offloaded in json.loads(sys.argv[1]):
    ends = []
    for words in (plain, offloaded):
        trainer = Trainer(load_config(None, words), stream=io.StringIO())
        trainer.run()
        whole = lambda p: p.full_tensor() if hasattr(p, "full_tensor") else p
        ends.append([whole(p.detach()).clone() for p in trainer.parameters])
    moved = trainer.backbone.offload.moved
    same = all(torch.equal(a, b) for a, b in zip(*ends))
    found.append([same, moved.activations_out > 0, moved.activations_out == moved.activations_back, moved.waiting])
if dist.get_rank() == 0:
    print(json.dumps(found))
leave()
"""


def test_activations_wait_on_the_cpu_in_several_processes_too(sana: Path, tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    (tmp_path / "worker.py").write_text(PROCESS)
    common = ("--probe", "false", "--checkpointing_steps", "null", "--train_batch_size", "1", "--max_train_steps", "2")
    cases = []
    for way, more in (("ddp", ("--rank", "4")), ("fsdp2", ("--gradient_checkpointing", "true"))):
        words = [*common, "--distributed", way, *more]
        cases.append(
            [
                pipeline_keys(sana, tmp_path / f"{way}-{on}", *words, "--activation_offload", on)
                for on in ("false", "true")
            ]
        )
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(tmp_path / "worker.py")]
    process = start_process([*command, json.dumps(cases)])
    output, errors = process.communicate(timeout=240)
    assert process.returncode == 0, errors[-3000:]
    assert json.loads(output.strip().splitlines()[-1]) == [[True, True, True, 0]] * 2


def test_a_run_says_what_can_not_be_offloaded(sana: Path, tmp_path: Path) -> None:
    for more, message in (
        (("--block_offload", "true", "--real_branch", "live"), "this run has none"),
        (("--block_offload", "true", "--real_branch", "ema", "--rank", "4"), "real_branch: ema changes in every step"),
        (("--block_offload", "true", "--rank", "4", "--quantization", "int8"), "write one of the two"),
        (("--activation_offload", "true", "--compile", "true"), "activation_offload moves tensors between calls"),
        (("--gradient_checkpointing", "0"), "a number from 1"),
        (("--gradient_checkpointing", "[0, 0]"), "each block once"),
    ):
        with pytest.raises(SettingsError, match=message):
            load_config(None, pipeline_keys(sana, tmp_path, *more))
    config = load_config(None, pipeline_keys(sana, tmp_path, "--gradient_checkpointing", "[7]"))
    with pytest.raises(SettingsError, match="blocks, numbered from 0, and 7 is none of them"):
        Trainer(config)
    with pytest.raises(ValueError, match="have no frozen weights"):
        Offload(torch.nn.ModuleDict({"blocks": torch.nn.ModuleList([torch.nn.Linear(2, 2)])}), blocks=True)


def test_the_plan_counts_what_waits_where(sana: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("apex_fast.backbones.offload.SMALLEST", 0)
    steps = {}
    for name in ("nothing", "activation_offload", "block_offload"):
        more = () if name == "nothing" else (f"--{name}", "true")
        config = load_config(None, pipeline_keys(sana, tmp_path, "--rank", "4", *more))
        steps[name] = plan(config, compare=False).chosen.step
    nothing, activations, blocks = steps.values()
    assert nothing.waiting_weights == nothing.waiting_activations == activations.waiting_weights == 0
    assert blocks.held["frozen weights"] + blocks.waiting_weights == nothing.held["frozen weights"]
    assert blocks.waiting_weights > nothing.held["frozen weights"] / 2
    assert 0 < activations.waiting_activations and activations.peak < nothing.peak
    assert blocks.peak < nothing.peak
