"""Adapters in three roles: what is held, what is switched, what is recomputed, what is saved."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor

pytest.importorskip("diffusers", reason="diffusers is not installed: pip install 'apex_fast[train]'")
pytest.importorskip("peft", reason="peft is not installed: pip install 'apex_fast[train]'")

import apex_fast as af  # noqa: E402
from apex_fast import lora  # noqa: E402
from apex_fast.backbones.loading import FAMILIES  # noqa: E402
from apex_fast.lora import LoraSettings, add_lora, load_lora, load_start_lora, lora_velocities, save_lora  # noqa: E402

PROMPTS = ["a red cat", "a dog on a green hill"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """Saved tiny pipelines by family, made when first asked for."""
    from apex_fast.backbones.tiny import save_tiny_pipeline

    class Folders(dict):
        def __missing__(self, family: str) -> Path:
            self[family] = tmp_path_factory.mktemp(family)
            save_tiny_pipeline(family, self[family])
            return self[family]

    return Folders()


def load(folder: Path, **options) -> af.Backbone:
    return af.Backbone.from_pretrained(folder, **options)


def inputs(backbone: af.Backbone, batch: int = 2) -> tuple[Tensor, Tensor, af.Condition]:
    generator = torch.Generator().manual_seed(3)
    edge = 4 * backbone.size_multiple
    x = torch.randn(batch, *backbone.latent_shape(edge, edge), generator=generator)
    return x, torch.rand(batch, generator=generator), backbone.encode([PROMPTS[i % 2] for i in range(batch)])


@torch.no_grad()
def disturb(backbone: af.Backbone, adapter: str = lora.GENERATOR, seed: int = 5, size: float = 0.05) -> None:
    """Gives an adapter an effect, as training would."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in adapter_weights(backbone, adapter).values():
        parameter.add_(size * torch.randn(parameter.shape, generator=generator).to(parameter.dtype))


def adapter_weights(backbone: af.Backbone, adapter: str = lora.GENERATOR) -> dict[str, Tensor]:
    return {n: p for n, p in backbone.transformer.named_parameters() if ".lora_" in n and f".{adapter}" in n}


def held_bytes(backbone: af.Backbone) -> int:
    """Bytes of all weights that the transformer holds, each memory counted once."""
    storages = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in backbone.transformer.parameters()}
    return sum(storages.values())


def gradients(backbone: af.Backbone) -> dict[str, Tensor]:
    found = {n: p.grad.clone() for n, p in backbone.transformer.named_parameters() if p.grad is not None}
    backbone.zero_grad()
    return found


# ---- what is held


def test_no_role_copies_or_moves_the_base(folders):
    backbone = load(folders["sana"])
    base = {n: (p.data_ptr(), p.clone()) for n, p in backbone.transformer.named_parameters()}
    before = held_bytes(backbone)
    add_lora(backbone, LoraSettings(rank=4), seed=0)
    one_adapter = sum(p.nbytes for p in adapter_weights(backbone).values())
    assert one_adapter > 0 and held_bytes(backbone) == before + one_adapter
    velocities = lora_velocities(backbone, "frozen")
    x, t, condition = inputs(backbone)
    objective = af.ApexObjective(af.ConditionShift(), warmup_steps=0, ramp_steps=0)
    for schedule in ("joint", "retain", "sequential"):
        objective.backward(velocities, x, condition, step=5, schedule=schedule)
    assert held_bytes(backbone) == before + one_adapter, "three roles, one copy"
    lora_velocities(backbone, "ema")
    assert held_bytes(backbone) == before + 2 * one_adapter, "an averaged real branch costs one adapter"
    after = dict(backbone.transformer.named_parameters())
    for name, (pointer, value) in base.items():
        module, _, leaf = name.rpartition(".")
        now = after.get(name, after.get(f"{module}.base_layer.{leaf}"))
        assert now.data_ptr() == pointer and torch.equal(now, value), name


def test_the_real_branch_is_the_base_bit_for_bit(folders):
    backbone = load(folders["sana"])
    x, t, condition = inputs(backbone)
    expected = backbone(x, t, condition)
    add_lora(backbone, LoraSettings(rank=4), seed=0)
    velocities = lora_velocities(backbone, "frozen")
    assert torch.equal(velocities.generator(x, t, condition), expected), "an adapter begins without effect"
    disturb(backbone)
    assert not torch.allclose(velocities.generator(x, t, condition), expected, atol=1e-3)
    assert torch.equal(velocities.real(x, t, condition), expected)
    # ... and the roles leave the generator's adapter on, also after an error in the network.
    with pytest.raises(ValueError, match="of one batch size"):
        velocities.real(x, t[:1], condition)
    assert velocities.switch.active == (lora.GENERATOR,)
    assert velocities.shares_network


def test_switching_roles_leaves_requires_grad_alone(folders):
    backbone = load(folders["sana"])
    add_lora(backbone, LoraSettings(rank=4), seed=0)
    velocities = lora_velocities(backbone, "ema")
    trained = [n for n, p in backbone.named_parameters() if p.requires_grad]
    assert trained and trained == [n for n in trained if f".{lora.GENERATOR}" in n]
    seen: list[list[str]] = []
    hook = backbone.transformer.register_forward_pre_hook(
        lambda *_: seen.append([n for n, p in backbone.named_parameters() if p.requires_grad])
    )
    x, t, condition = inputs(backbone)
    velocities.real(x, t, condition)
    velocities.generator(x, t, condition)
    with velocities.switch.use(()):
        backbone(x, t, condition)
    hook.remove()
    assert seen == [trained] * 3


def test_an_averaged_real_branch_follows_the_trained_adapter(folders):
    backbone = load(folders["sana"])
    add_lora(backbone, LoraSettings(rank=4, dtype="bf16"), seed=0)
    velocities = lora_velocities(backbone, "ema", ema_decay=0.9)
    assert velocities.has_ema
    expected = {n: p.detach().double() for n, p in adapter_weights(backbone).items()}
    for step in range(20):
        disturb(backbone, seed=step, size=1e-3)
        velocities.update_ema()
        for name, parameter in adapter_weights(backbone).items():
            expected[name] = 0.9 * expected[name] + 0.1 * parameter.detach().double()
    averages = adapter_weights(backbone, lora.EMA)
    for name, value in expected.items():
        average = averages[name.replace(lora.GENERATOR, lora.EMA)]
        assert average.dtype == torch.bfloat16
        # Half of a bf16 step: the sum was kept exactly, and rounded once.
        torch.testing.assert_close(average.double(), value, rtol=2**-8, atol=1e-9)
    state = velocities.state_dict()
    assert state and all(v.dtype == torch.float32 for v in state.values())
    other = load(folders["sana"])
    add_lora(other, LoraSettings(rank=4, dtype="bf16"), seed=1)
    restored = lora_velocities(other, "ema", ema_decay=0.9)
    restored.load_state_dict(state)
    x, t, condition = inputs(backbone)
    assert torch.equal(restored.real(x, t, condition), velocities.real(x, t, condition))
    with pytest.raises(ValueError, match="of another real branch"):
        lora_velocities(other, "frozen").load_state_dict(state)


@pytest.mark.parametrize("real", ["frozen", "ema"])
def test_the_real_branch_drops_nothing_while_the_generator_does(folders, tmp_path, real):
    styled = load(folders["sana"])
    add_lora(styled, LoraSettings(rank=4, dropout=0.5), seed=2)
    disturb(styled)
    save_lora(styled, tmp_path)
    backbone = load(folders["sana"])
    load_start_lora(backbone, tmp_path, "frozen")
    add_lora(backbone, LoraSettings(rank=4, dropout=0.5), seed=0)
    velocities = lora_velocities(backbone, real)
    disturb(backbone)
    disturb(backbone, lora.START)
    backbone.train()
    x, t, condition = inputs(backbone)
    with torch.no_grad():
        assert torch.equal(velocities.real(x, t, condition), velocities.real(x, t, condition))
        assert not torch.equal(velocities.generator(x, t, condition), velocities.generator(x, t, condition))
        with velocities.switch.use((lora.START,)):
            # An adapter that is not trained drops nothing in any role.
            assert torch.equal(backbone(x, t, condition), backbone(x, t, condition))


def test_a_copy_recomputes_with_its_own_adapters(folders):
    backbone = load(folders["sana"])
    backbone.train()
    backbone.enable_gradient_checkpointing()
    add_lora(backbone, LoraSettings(rank=4), seed=0)
    lora_velocities(backbone)
    copied = copy.deepcopy(backbone)
    velocities = lora_velocities(copied, "frozen")
    disturb(copied)
    x, t, condition = inputs(copied)
    velocity = velocities.generator(x, t, condition)
    with lora.AdapterSwitch(backbone.transformer).use(()), velocities.switch.use(()):
        velocity.square().mean().backward()
    assert len(gradients(copied)) == len(adapter_weights(copied))


# ---- steps and recomputation


def step_gradients(folder: Path, *, schedule: str, checkpointing: bool, real: str = "frozen", dropout: float = 0.0):
    backbone = load(folder)
    add_lora(backbone, LoraSettings(rank=4, dropout=dropout), seed=0)
    disturb(backbone)
    backbone.train()
    if checkpointing:
        backbone.enable_gradient_checkpointing()
    velocities = lora_velocities(backbone, real)
    x, _, condition = inputs(backbone)
    objective = af.ApexObjective(af.ConditionShift(), warmup_steps=0, ramp_steps=0)
    torch.manual_seed(7)
    losses = objective.backward(
        velocities, x, condition, step=0, generator=torch.Generator().manual_seed(1), schedule=schedule
    )
    return losses, gradients(backbone)


@pytest.mark.parametrize("family", ["sana", "qwen_image"])
def test_schedules_and_checkpointing_give_the_same_gradients(folders, family):
    reference, expected = step_gradients(folders[family], schedule="joint", checkpointing=False)
    assert expected and all(".lora_" in name for name in expected)
    for schedule in ("joint", "retain", "sequential"):
        for checkpointing in (False, True):
            losses, found = step_gradients(folders[family], schedule=schedule, checkpointing=checkpointing)
            torch.testing.assert_close(losses.total, reference.total, rtol=1e-5, atol=1e-6)
            assert found.keys() == expected.keys()
            for name, value in expected.items():
                scale = value.abs().max().item()
                torch.testing.assert_close(found[name], value, rtol=0, atol=1e-4 * scale + 1e-7, msg=name)


def test_the_recomputed_generator_has_the_dropout_masks_of_its_first_pass(folders):
    for checkpointing in (False, True):
        _, expected = step_gradients(folders["sana"], schedule="retain", checkpointing=checkpointing, dropout=0.5)
        _, found = step_gradients(folders["sana"], schedule="sequential", checkpointing=checkpointing, dropout=0.5)
        # Both draw: generator, real, shifted, data; only sequential runs the generator a second time, under the
        # random state of the first.
        for name, value in expected.items():
            torch.testing.assert_close(
                found[name], value, rtol=0, atol=1e-4 * value.abs().max().item() + 1e-7, msg=name
            )


def two_adapter_gradients(folder: Path, *, checkpointing: bool, replay: bool = True) -> dict[str, Tensor]:
    """Both adapters' gradients where the generator's graph is recomputed after another role has run and been left."""
    backbone = load(folder)
    add_lora(backbone, LoraSettings(rank=4), seed=0)
    velocities = lora_velocities(backbone, "ema")
    for name in (lora.GENERATOR, lora.EMA):
        disturb(backbone, name, seed=len(name), size=0.2)
        for parameter in adapter_weights(backbone, name).values():
            parameter.requires_grad_(True)
    backbone.train()
    if checkpointing:
        backbone.enable_gradient_checkpointing()
    if not replay:
        backbone.recompute_states.clear()
    x, t, condition = inputs(backbone)
    second = lora.AdapterRole(backbone, velocities.switch, (lora.EMA,))
    loss = velocities.generator(x, t, condition).square().mean() + 3 * second(x, t, condition).square().mean()
    with velocities.switch.use(()):
        # Whatever is active now is not what the two forwards ran with.
        loss.backward()
    return gradients(backbone)


def test_recomputation_runs_with_the_adapters_of_its_forward(folders):
    expected = two_adapter_gradients(folders["sana"], checkpointing=False)
    assert any(f".{lora.EMA}" in name for name in expected)
    found = two_adapter_gradients(folders["sana"], checkpointing=True)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-7, msg=name)
    # Without the replay it goes wrong, so this test can fail.
    try:
        wrong = two_adapter_gradients(folders["sana"], checkpointing=True, replay=False)
    except (RuntimeError, torch.utils.checkpoint.CheckpointError):
        return
    assert wrong.keys() != expected.keys() or any(not torch.allclose(wrong[n], v) for n, v in expected.items())


def test_compiled_blocks_are_compiled_once_for_a_state_not_for_a_switch(folders):
    backbone = load(folders["sana"])
    add_lora(backbone, LoraSettings(rank=4), seed=0)
    velocities = lora_velocities(backbone, "ema")
    compiled: list[int] = []

    def backend(graph: torch.fx.GraphModule, example_inputs: list[Tensor]):
        compiled.append(1)
        return graph.forward

    torch._dynamo.reset()
    x, t, condition = inputs(backbone)
    expected = None
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True, recompile_limit=8):
        backbone.compile_blocks(backend=backend, fullgraph=True)
        assert torch._dynamo.config.recompile_limit == 64
        for _ in range(5):
            out = velocities.generator(x, t, condition)
            with torch.no_grad():
                averaged, base = velocities.real(x, t, condition), None
                with velocities.switch.use(()):
                    base = backbone(x, t, condition)
            expected = expected or len(compiled)
            assert torch.equal(out, averaged) and torch.equal(out, base), "adapters begin without effect"
    torch._dynamo.reset()
    # Three states of two kinds of block (the first one's input is laid out in another way), and then no more.
    assert len(compiled) == expected <= 6


# ---- what is adapted


@pytest.mark.parametrize("family", FAMILIES)
def test_every_default_adapter_gets_a_gradient(folders, family):
    """Among them would be the text side of Qwen-Image's last block, which no output depends on."""
    backbone = load(folders[family])
    add_lora(backbone, LoraSettings(rank=2), seed=0)
    disturb(backbone)
    x, t, condition = inputs(backbone)
    backbone(x, t, condition).square().mean().backward()
    found = gradients(backbone)
    weights = adapter_weights(backbone)
    blind = [n for n in weights if n not in found or not found[n].abs().max() > 0]
    assert not blind
    layers = {name.split(".lora_")[0] for name in weights}
    for target in backbone.lora_targets:
        assert any(f".{layer}".endswith(f".{target}") for layer in layers), f"{target} names no layer"


def test_layers_that_do_not_exist_are_refused(folders):
    with pytest.raises(ValueError, match=r"no layer of SanaTransformer2DModel ends with any of \['to_z'\]; layers are"):
        add_lora(load(folders["sana"]), LoraSettings(target_modules=("to_z",)))
    backbone = load(folders["sana"])
    add_lora(backbone, LoraSettings(rank=2, target_modules=("to_q",)))
    assert {name.split(".lora_")[0].rpartition(".")[2] for name in adapter_weights(backbone)} == {"to_q"}
    with pytest.raises(ValueError, match="has an adapter .default. already"):
        add_lora(backbone, LoraSettings())
    with pytest.raises(ValueError, match="call add_lora first"):
        lora_velocities(load(folders["sana"]))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": 0}, "rank must be a whole number, at least 1"),
        ({"rank": True}, "rank must be"),
        ({"alpha": 0.0}, "alpha must be above 0"),
        ({"dropout": 1.0}, "dropout must be"),
        ({"target_modules": ()}, "target_modules is empty"),
        ({"dtype": "fp16"}, "dtype must be"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        LoraSettings(**settings)


@pytest.mark.parametrize(("base", "dtype"), [("bf16", "fp32"), ("fp32", "bf16"), ("bf16", "bf16")])
def test_base_and_adapter_may_differ_in_dtype(folders, base, dtype):
    names = {"fp32": torch.float32, "bf16": torch.bfloat16}
    backbone = load(folders["sana"], torch_dtype=names[base])
    add_lora(backbone, LoraSettings(rank=4, dtype=dtype), seed=0)
    disturb(backbone)
    x, t, condition = inputs(backbone)
    velocity = backbone(x, t, condition)
    assert velocity.dtype == names[base] == backbone.transformer.dtype
    velocity.float().square().mean().backward()
    assert {p.grad.dtype for p in adapter_weights(backbone).values()} == {names[dtype]}
    exact = load(folders["sana"])
    add_lora(exact, LoraSettings(rank=4), seed=0)
    disturb(exact)
    expected = exact(x, t, condition)
    assert (velocity.float() - expected).abs().max() < 0.05 * expected.abs().max()


def test_an_int8_base_takes_an_adapter(folders, tmp_path):
    pytest.importorskip("torchao", reason="torchao is not installed: pip install 'apex_fast[quantization]'")
    exact = load(folders["sana"])
    x, t, condition = inputs(exact)
    expected = exact(x, t, condition)
    backbone = load(folders["sana"], quantization_config="int8", torch_dtype=torch.bfloat16)
    weight = backbone.transformer.transformer_blocks[0].attn1.to_q.weight
    assert weight.dtype == torch.bfloat16 and type(weight).__name__ != "Parameter", "stored as int8"
    quantised = backbone(x, t, condition)
    assert (quantised.float() - expected).abs().max() < 0.05 * expected.abs().max()
    add_lora(backbone, LoraSettings(rank=4), seed=0)
    velocities = lora_velocities(backbone, "frozen")
    disturb(backbone)
    velocities.generator(x, t, condition).float().square().mean().backward()
    assert len(gradients(backbone)) == len(adapter_weights(backbone))
    assert torch.equal(velocities.real(x, t, condition), quantised)
    save_lora(backbone, tmp_path)
    with pytest.raises(ValueError, match='cannot be merged into quantised weights.*use "frozen"'):
        load_start_lora(load(folders["sana"], quantization_config="int8", torch_dtype=torch.bfloat16), tmp_path)


# ---- files


@pytest.mark.parametrize("family", FAMILIES)
def test_the_stock_pipeline_reads_what_is_saved(folders, tmp_path, family, caplog):
    """No weight missing, none unexpected, and a scale alpha / rank other than 1 that survives."""
    from diffusers import DiffusionPipeline

    backbone = load(folders[family])
    add_lora(backbone, LoraSettings(rank=4, alpha=12), seed=0)
    disturb(backbone)
    lora_velocities(backbone)
    x, t, condition = inputs(backbone)
    expected = backbone(x, t, condition).detach()
    save_lora(backbone, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [lora.WEIGHTS]
    pipeline = DiffusionPipeline.from_pretrained(folders[family])
    with caplog.at_level("WARNING"):
        pipeline.load_lora_weights(str(tmp_path))
    said = [r.getMessage() for r in caplog.records]
    # Where there is a CLIP it says that it has no adapter, which is so.
    assert not [text for text in said if "CLIPText" not in text and ("lora" in text.lower() or "keys" in text.lower())]
    bound = 2e-6 * expected.abs().max().item() + 1e-7
    stock = type(backbone)(pipeline.transformer, components=backbone.components)
    torch.testing.assert_close(stock(x, t, condition), expected, rtol=0, atol=bound)
    again = load(folders[family])
    load_lora(again, tmp_path)
    torch.testing.assert_close(again(x, t, condition), expected, rtol=0, atol=bound)


@pytest.mark.parametrize("kind", [{"use_rslora": True, "alpha": 3}, {"use_dora": True}], ids=["rslora", "dora"])
def test_kinds_of_adapter_survive_the_file(folders, tmp_path, kind):
    backbone = load(folders["sana"])
    x, t, condition = inputs(backbone)
    plain = backbone(x, t, condition)
    add_lora(backbone, LoraSettings(rank=4, **kind), seed=0)
    disturb(backbone)
    save_lora(backbone, tmp_path)
    again = load(folders["sana"])
    load_lora(again, tmp_path)
    expected = backbone(x, t, condition)
    torch.testing.assert_close(again(x, t, condition), expected, rtol=0, atol=1e-5)
    assert not torch.allclose(expected, plain, atol=1e-3)


def test_an_fp32_adapter_on_a_bf16_base_is_read_bit_for_bit(folders, tmp_path):
    backbone = load(folders["sana"], torch_dtype=torch.bfloat16)
    add_lora(backbone, LoraSettings(rank=4), seed=0)
    disturb(backbone)
    save_lora(backbone, tmp_path)
    expected = adapter_weights(backbone)
    assert any(not torch.equal(v, v.bfloat16().float()) for v in expected.values()), "bf16 would not show"
    for read in (load_lora, lambda b, folder: load_start_lora(b, folder, "continue")):
        again = load(folders["sana"], torch_dtype=torch.bfloat16)
        read(again, tmp_path)
        found = adapter_weights(again)
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            assert found[name].dtype == torch.float32 and torch.equal(found[name], value), name


def test_a_run_may_start_from_a_lora(folders, tmp_path):
    styled = load(folders["sana"])
    add_lora(styled, LoraSettings(rank=4, alpha=12), seed=0)
    disturb(styled)
    x, t, condition = inputs(styled)
    expected = styled(x, t, condition).detach()
    save_lora(styled, tmp_path)

    def close(value: Tensor) -> None:
        torch.testing.assert_close(value, expected, rtol=0, atol=5e-6)

    merged = load(folders["sana"])
    names = set(merged.transformer.state_dict())
    load_start_lora(merged, tmp_path, "merge")
    assert set(merged.transformer.state_dict()) == names, "nothing of the adapter is left beside the weights"
    close(merged(x, t, condition))
    add_lora(merged, LoraSettings(rank=2), seed=1)
    close(lora_velocities(merged, "frozen").real(x, t, condition))

    kept = load(folders["sana"])
    load_start_lora(kept, tmp_path / lora.WEIGHTS, "frozen")
    add_lora(kept, LoraSettings(rank=2), seed=1)
    velocities = lora_velocities(kept, "ema")
    disturb(kept)
    close(velocities.real(x, t, condition))
    assert not torch.allclose(velocities.generator(x, t, condition), expected, atol=1e-3)
    assert all(f".{lora.GENERATOR}" in n for n, p in kept.named_parameters() if p.requires_grad)

    continued = load(folders["sana"])
    load_start_lora(continued, tmp_path, "continue")
    velocities = lora_velocities(continued, "frozen")
    close(velocities.generator(x, t, condition))
    bare = load(folders["sana"])(x, t, condition)
    assert torch.equal(velocities.real(x, t, condition), bare)
    assert len([p for p in continued.parameters() if p.requires_grad]) == len(adapter_weights(continued))


def test_a_lora_that_does_not_fit_is_refused(folders, tmp_path):
    from safetensors.torch import load_file, save_file

    with pytest.raises(FileNotFoundError, match="expected a .safetensors file, or a folder with"):
        load_start_lora(load(folders["sana"]), tmp_path)
    backbone = load(folders["sana"])
    add_lora(backbone, LoraSettings(rank=4), seed=0)
    file = save_lora(backbone, tmp_path / "a")
    with pytest.raises(ValueError, match="does not fit this|no weights for|of another model"):
        load_start_lora(load(folders["qwen_image"]), tmp_path / "a")
    state = load_file(file)
    (tmp_path / "b").mkdir()
    save_file({**state, "text_encoder.q_proj.lora_A.weight": torch.zeros(2, 2)}, tmp_path / "b" / lora.WEIGHTS)
    with pytest.raises(ValueError, match="has parts for text_encoder; only the transformer"):
        load_start_lora(load(folders["sana"]), tmp_path / "b")
    unknown = {"transformer.no_such_layer.lora_A.weight": torch.zeros(4, 8)}
    unknown["transformer.no_such_layer.lora_B.weight"] = torch.zeros(8, 4)
    (tmp_path / "c").mkdir()
    save_file({**state, **unknown}, tmp_path / "c" / lora.WEIGHTS)
    with pytest.raises(ValueError, match=r"LoRA: .* (has \+2 weights|does not fit)"):
        load_start_lora(load(folders["sana"]), tmp_path / "c")
    with pytest.raises(ValueError, match='how must be "merge", "frozen" or "continue"'):
        load_start_lora(load(folders["sana"]), tmp_path / "a", "add")
