"""Averages of the weights: several rates at once, in checkpoints, as files."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import torch
from torch import nn

pytest.importorskip("yaml")
pytest.importorskip("peft")

from safetensors.torch import load_file
from tiny_runs import keys, losses, make_pipeline, make_start, pipeline_keys

from apex_fast.cli import main
from apex_fast.export.command import export_run
from apex_fast.lora import WEIGHTS, load_lora
from apex_fast.training.checkpoint import CheckpointError, load_state
from apex_fast.training.config import load_config
from apex_fast.training.ema import WeightAverage, chosen_average
from apex_fast.training.loop import Trainer
from apex_fast.training.models import load_found, load_pretrained
from apex_fast.training.results import find_result
from apex_fast.training.settings import SettingsError

RATES = "[0.5, 0.2, 0.999]"
"""In a short run every rate above about (1 + n) / (10 + n) is that one, so the others are low."""


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_start(tmp_path_factory.mktemp("tiny") / "start")


@pytest.fixture(scope="module")
def sana(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_pipeline(tmp_path_factory.mktemp("sana"), "sana")


@pytest.fixture(scope="module")
def lora_run(sana: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "lora"
    more = ("--rank", "4", "--learning_rate", "1e-2", "--ema_decay", RATES, "--max_train_steps", "12")
    assert main(["train", *pipeline_keys(sana, folder, *more)]) == 0
    return folder


# ---- the numbers


def test_each_rate_follows_its_own_formula() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(3, 2)
    layer.bias.requires_grad_(False)
    rates = (0.3, 0.9)
    average = WeightAverage(layer, rates)
    expected = {rate: layer.weight.detach().double() for rate in rates}
    for i in range(1, 40):
        with torch.no_grad():
            layer.weight.add_(torch.randn(2, 3))
        average.update()
        for rate in rates:
            kept = min(rate, (1 + i) / (10 + i))
            expected[rate] = kept * expected[rate] + (1 - kept) * layer.weight.detach().double()
    for rate in rates:
        torch.testing.assert_close(average.averages[rate]["weight"].double(), expected[rate], rtol=1e-5, atol=1e-6)
    assert average.decay == 0.3 and average.average is average.averages[0.3]
    assert average.average.keys() == {"weight"}
    assert not torch.allclose(average.averages[0.3]["weight"], average.averages[0.9]["weight"])


def test_one_rate_is_what_the_first_of_several_is() -> None:
    layer = nn.Linear(3, 2)
    alone, among = WeightAverage(layer, 0.9), WeightAverage(layer, [0.9, 0.99])
    for _ in range(5):
        with torch.no_grad():
            layer.weight.mul_(1.1)
        alone.update()
        among.update()
    assert torch.equal(alone.average["weight"], among.average["weight"])


def test_applying_a_rate_is_undone_bit_for_bit() -> None:
    layer = nn.Linear(3, 2).bfloat16()
    average = WeightAverage(layer, [0.5, 0.9])
    assert average.average["weight"].dtype == torch.float32
    with torch.no_grad():
        layer.weight.add_(1)
    average.update()
    own = layer.weight.detach().clone()
    for rate, values in ((None, average.average), (0.9, average.averages[0.9])):
        with average.applied(rate):
            assert torch.equal(layer.weight, values["weight"].bfloat16())
        assert torch.equal(layer.weight, own)
    with pytest.raises(KeyError), average.applied(0.7):
        pass


def test_memory_is_one_fp32_copy_of_what_is_trained_for_each_rate(sana: Path, tmp_path: Path) -> None:
    trainer = Trainer(load_config(None, pipeline_keys(sana, tmp_path, "--rank", "4", "--ema_decay", RATES)))
    trained = sum(p.numel() for p in trainer.backbone.parameters() if p.requires_grad)
    assert trained < sum(p.numel() for p in trainer.backbone.transformer.parameters()) / 2
    held = sum(v.numel() * v.element_size() for values in trainer.average.averages.values() for v in values.values())
    assert held == 3 * 4 * trained


@pytest.mark.parametrize(
    ("value", "message"),
    [("[]", "is an empty list"), ("[0.9, 1.0]", "below 1, got 1.0"), ("[0.9, 0.90]", "names a rate twice")],
)
def test_rates_that_make_no_sense_are_refused(tmp_path: Path, value: str, message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        load_config(None, ["--output_dir", str(tmp_path), *("--loss", "flow_matching", "--ema_decay", value)])


# ---- checkpoints


def test_a_resumed_run_has_the_same_averages_at_every_rate(start: Path, tmp_path: Path) -> None:
    more = ("--ema_decay", RATES, "--max_train_steps", "8")
    whole = Trainer(load_config(None, keys(start, tmp_path / "whole", *more)))
    whole.run()
    Trainer(load_config(None, keys(start, tmp_path / "parts", *more))).run(until=3)
    resumed = Trainer(load_config(None, keys(start, tmp_path / "parts", *more, "--resume_from_checkpoint", "latest")))
    resumed.run()
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    for rate in (0.5, 0.2, 0.999):
        ours, theirs = resumed.average.averages[rate], whole.average.averages[rate]
        assert all(torch.equal(ours[name], value) for name, value in theirs.items())


def test_a_rate_that_was_not_saved_is_refused_with_those_that_were(start: Path, tmp_path: Path) -> None:
    Trainer(load_config(None, keys(start, tmp_path, "--ema_decay", "[0.5, 0.9]"))).run(until=2)
    resume = ("--resume_from_checkpoint", "latest", "--ema_decay", "[0.5, 0.99]")
    with pytest.raises(CheckpointError, match="no average with ema_decay 0.99; averages there: 0.5, 0.9"):
        Trainer(load_config(None, keys(start, tmp_path, *resume)))


@pytest.mark.parametrize(
    ("rates", "wanted"), [([0.1, 0.5], [0.1, 0.5]), ([0.1], [0.1]), ([0.9, 0.1], [0.5, 0.1]), ([0.5], [0.5])]
)
def test_a_resume_takes_the_average_of_the_same_rate_and_says_where_there_is_none(
    rates: list[float], wanted: list[float]
) -> None:
    layer = nn.Linear(3, 2)
    saved = WeightAverage(layer, [0.5, 0.1])
    for _ in range(3):
        with torch.no_grad():
            layer.weight.add_(1)
        saved.update()
    resumed = WeightAverage(layer, rates)
    resumed.load_state_dict(saved.state_dict())
    for rate, source in zip(rates, wanted, strict=True):
        assert torch.equal(resumed.averages[rate]["weight"], saved.averages[source]["weight"])
    assert resumed.updates == 3
    assert len(resumed.notes) == (rates[0] == 0.9)
    assert all("no average with ema_decay 0.9" in note and "with 0.5" in note for note in resumed.notes)


def test_a_run_with_another_rate_says_which_average_it_goes_on_from(start: Path, tmp_path: Path) -> None:
    Trainer(load_config(None, keys(start, tmp_path, "--ema_decay", "0.5"))).run(until=2)
    resume = ("--resume_from_checkpoint", "latest", "--ema_decay", "0.9")
    said = io.StringIO()
    Trainer(load_config(None, keys(start, tmp_path, *resume)), stream=said).run(until=3)
    assert "no average with ema_decay 0.9; that one goes on from the average with 0.5" in said.getvalue()


def test_an_update_of_a_step_that_was_left_out_changes_nothing() -> None:
    layer = nn.Linear(3, 2)
    with_it, without = WeightAverage(layer, [0.3, 0.9]), WeightAverage(layer, [0.3, 0.9])
    for step in range(5):
        with torch.no_grad():
            layer.weight.add_(1)
        with_it.update(torch.tensor(float(step == 2)))
        if step != 2:
            without.update()
    assert with_it.updates == without.updates == 4
    for rate in (0.3, 0.9):
        assert torch.equal(with_it.averages[rate]["weight"], without.averages[rate]["weight"])


def test_a_state_of_one_rate_from_before_there_were_several_is_read() -> None:
    layer = nn.Linear(2, 2)
    state = WeightAverage(layer, 0.9).state_dict()
    state.pop("decay")
    WeightAverage(layer, 0.9).load_state_dict(state)
    with pytest.raises(ValueError, match="one, whose rate was not noted"):
        chosen_average(state, "0.99")


# ---- files


def test_the_average_of_a_lora_is_a_lora_that_the_stock_pipeline_and_peft_load(sana: Path, lora_run: Path) -> None:
    averages = load_state(lora_run / "checkpoint-12", "ema")
    files = {"0.5": lora_run / "model", "0.2": lora_run / "model/ema-0.2", "0.999": lora_run / "model/ema-0.999"}
    seen = set()
    for rate, folder in files.items():
        state = load_file(folder / WEIGHTS)
        wanted = chosen_average(averages, rate)
        assert len(state) == len(wanted)
        by_name = {name.replace(".default", ""): value for name, value in wanted.items()}
        assert all(torch.equal(value, by_name[name]) for name, value in state.items()), rate
        backbone = load_pretrained(sana)
        load_lora(backbone, folder)  # through the stock pipeline's own load_lora_weights, into peft layers
        lora_b = next(p for n, p in backbone.transformer.named_parameters() if "lora_B" in n and p.any())
        seen.add(float(lora_b.detach().abs().sum()))
    assert len(seen) == 3


def test_another_average_is_exported_by_its_rate(lora_run: Path, tmp_path: Path) -> None:
    folder = export_run(lora_run, out=tmp_path / "other", ema="0.2")
    assert_same(load_file(folder / WEIGHTS), load_file(lora_run / "model/ema-0.2" / WEIGHTS))
    assert main(["export", str(lora_run), "--ema", "0.999"]) == 0
    named = lora_run / "export/diffusers-ema-0.999"
    assert_same(load_file(named / WEIGHTS), load_file(lora_run / "model/ema-0.999" / WEIGHTS))
    with pytest.raises(CheckpointError, match="no average with ema_decay 0.7; averages there: 0.5, 0.2, 0.999"):
        export_run(lora_run, out=tmp_path / "none", ema="0.7")


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], value) for name, value in other.items())


def test_the_averages_of_a_whole_network_stay_in_the_checkpoint(start: Path, tmp_path: Path) -> None:
    assert main(["train", *keys(start, tmp_path, "--ema_decay", "[0.3, 0.1]", "--learning_rate", "1e-2")]) == 0
    assert not list((tmp_path / "model").glob("ema-*"))
    first = load_found(find_result(tmp_path))[0]
    other, phrase = load_found(find_result(tmp_path, ema="0.1"))
    assert "averaged at 0.1" in phrase
    wanted = chosen_average(load_state(tmp_path / "checkpoint-4", "ema"), "0.1")
    parameters = dict(other.named_parameters())
    assert all(torch.equal(parameters[name], value) for name, value in wanted.items())
    assert any(not torch.equal(parameters[name], p) for name, p in first.named_parameters())
    with pytest.raises(FileNotFoundError, match="has no checkpoint"):
        find_result(make_empty(tmp_path / "empty"), ema="0.1")


def make_empty(folder: Path) -> Path:
    folder.mkdir()
    return folder
