"""The ComfyUI workflow of an export: whole, of known nodes, and with the times and steps of the library's sampler."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("diffusers")

import apex_fast as af  # noqa: E402
from apex_fast.export.comfyui_keys import LAYOUTS  # noqa: E402
from apex_fast.export.workflow import NODES, PARTS, SEED_CONTROL, Link, Workflow, workflow  # noqa: E402
from apex_fast.sampler import time_grid  # noqa: E402
from apex_fast.training.results import Record  # noqa: E402

FAMILIES = tuple(LAYOUTS)
PROMPT = 'a sign that says "one"\nby night'


def source(family: str, *, base: str | None = None, steps: int = 1, **record: Any) -> Any:
    return SimpleNamespace(
        family=family,
        record=Record(family=family, mode="lora", base="", **record),
        base=base or next(iter(PARTS[family].bases)),
        steps=steps,
        resolution=[768, 1024],
        name="one_step",
        prompt=PROMPT,
    )


def made(family: str, *, model: bool = False, **settings: Any) -> Workflow:
    name = "one_step.safetensors"
    return workflow(source(family, **settings), lora=None if model else name, model=name if model else None)


def kinds(flow: Workflow) -> dict[str, dict[str, Any]]:
    return {node["class_type"]: node["inputs"] for node in flow.prompt().values()}


@pytest.mark.parametrize("model", [False, True], ids=["lora", "model"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_prompt_is_whole(family: str, model: bool) -> None:
    prompt = json.loads(json.dumps(made(family, model=model).prompt()))
    for number, node in prompt.items():
        kind = NODES[node["class_type"]]
        assert list(node["inputs"]) == list(kind.inputs)
        for name, value in node["inputs"].items():
            if kind.inputs[name] == "*":
                assert isinstance(value, str | int | float)
                continue
            other, slot = value
            assert int(other) < int(number)
            assert NODES[prompt[other]["class_type"]].outputs[slot] == kind.inputs[name]
    (saved,) = (n for n, node in prompt.items() if node["class_type"] == "SaveImage")
    reached, waiting = set(), [saved]
    while waiting:
        number = waiting.pop()
        reached.add(number)
        waiting += [v[0] for v in prompt[number]["inputs"].values() if isinstance(v, list)]
    assert reached == set(prompt)


@pytest.mark.parametrize("model", [False, True], ids=["lora", "model"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_graph_says_the_same(family: str, model: bool) -> None:
    """The graph, read as the window reads it: widgets by order, sockets by links."""
    flow = made(family, model=model)
    graph, prompt = json.loads(json.dumps(flow.graph())), flow.prompt()
    nodes = {node["id"]: node for node in graph["nodes"]}
    assert graph["last_node_id"] == max(nodes) and graph["last_link_id"] == len(graph["links"])
    links = {}
    for number, start, slot, end, socket, kind in graph["links"]:
        assert nodes[start]["outputs"][slot]["type"] == kind == nodes[end]["inputs"][socket]["type"]
        assert number in nodes[start]["outputs"][slot]["links"]
        assert nodes[end]["inputs"][socket]["link"] == number
        links[number] = [str(start), slot]
    (note,) = (nodes.pop(i) for i in list(nodes) if nodes[i]["type"] == "Note")
    assert note["widgets_values"] == [flow.note]
    read = {}
    for number, node in nodes.items():
        values = iter(node["widgets_values"])
        inputs = {entry["name"]: links[entry["link"]] for entry in node["inputs"]}
        for name, kind in NODES[node["type"]].inputs.items():
            if kind == "*":
                inputs[name] = next(values)
                if name == "seed":
                    assert next(values) == SEED_CONTROL
        assert not list(values)
        read[str(number)] = {"class_type": node["type"], "inputs": inputs, "_meta": {"title": node["type"]}}
    assert read == prompt
    boxes = [(*node["pos"], *node["size"]) for node in graph["nodes"]]
    for i, (x, y, w, h) in enumerate(boxes):
        for left, top, width, height in boxes[i + 1 :]:
            assert x + w <= left or left + width <= x or y + h <= top or top + height <= y


# ---- times and steps, by ComfyUI's arithmetic


def sigma_table(flow: Workflow) -> Tensor:
    """The model's sigmas, smallest first, as the node that sets the shift makes them."""
    (name,) = (n for n in kinds(flow) if n.startswith("ModelSampling"))
    values = kinds(flow)[name]
    if name == "ModelSamplingFlux":
        slope = (values["max_shift"] - values["base_shift"]) / (4096 - 256)
        mu = values["width"] * values["height"] / 256 * slope + values["base_shift"] - slope * 256
        t = torch.arange(1, 10001) / 10000
        return math.exp(mu) / (math.exp(mu) + (1 / t - 1))
    t = torch.arange(1, 1001) / 1000
    return values["shift"] * t / (1 + (values["shift"] - 1) * t)


def simple(table: Tensor, steps: int) -> Tensor:
    stride = len(table) / steps
    return torch.tensor([float(table[-(1 + int(i * stride))]) for i in range(steps)] + [0.0])


@pytest.mark.parametrize("family", FAMILIES)
def test_times_are_uniform(family: str) -> None:
    flow = made(family)
    sampler = kinds(flow)["KSampler"]
    assert (sampler["scheduler"], sampler["cfg"], sampler["denoise"], sampler["steps"]) == ("simple", 1.0, 1.0, 1)
    table = sigma_table(flow)
    assert simple(table, 1).tolist() == [1.0, 0.0]
    for steps in (1, 2, 4, 5, 8):
        torch.testing.assert_close(simple(table, steps).double(), time_grid(steps), rtol=0, atol=2e-7)
    # What the module says of other numbers of steps.
    for steps in (3, 6, 7):
        off = (simple(table, steps).double() - time_grid(steps)).abs().max()
        assert off < 1e-3 and (off > 1e-5 or len(table) > 1000)
    # The family's own shift would move the times of more steps than one.
    assert (simple(3 * table / (1 + 2 * table), 2).double() - time_grid(2)).abs().max() > 0.1


@pytest.mark.parametrize(("sampler", "stochasticity"), [("euler", 0.0), ("lcm", 1.0)])
@pytest.mark.parametrize("steps", [1, 2, 4])
def test_steps_are_those_of_the_library(sampler: str, stochasticity: float, steps: int) -> None:
    noise = torch.randn(2, 4, 6, 6, generator=torch.Generator().manual_seed(0))
    condition = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(1))

    def velocity(x: Tensor, t: Tensor, c: Any) -> Tensor:
        return torch.tanh(x * (1 + t.view(-1, 1, 1, 1))) + x.mean(1, keepdim=True)

    generator = torch.Generator().manual_seed(2)
    options = {"num_inference_steps": steps, "stochasticity": stochasticity}
    expected = af.sample(velocity, noise, condition, generator=generator, **options)
    generator.manual_seed(2)
    sigmas = simple(sigma_table(made("flux")), steps)
    x = sigmas[0] * noise  # and 1 - sigma of an empty latent, which is zero
    for sigma, after in zip(sigmas, sigmas[1:], strict=False):
        denoised = x - sigma * velocity(x, sigma.expand(2), condition)
        if sampler == "euler":
            x = x + (x - denoised) / sigma * (after - sigma)
        else:
            x = denoised
            if after > 0:
                fresh = torch.randn(noise.shape, generator=generator)
                x = after * fresh + (1 - after) * denoised
    torch.testing.assert_close(x, expected, rtol=2e-5, atol=2e-5)


# ---- what depends on the run


def test_steps_size_and_prompt_are_the_runs() -> None:
    flow = made("z_image", steps=4)
    assert kinds(flow)["KSampler"]["steps"] == 4
    assert kinds(flow)["EmptySD3LatentImage"] == {"width": 1024, "height": 768, "batch_size": 1}
    assert kinds(flow)["CLIPTextEncode"]["text"] == PROMPT
    assert "Made for 4 steps" in flow.note and "1024 x 768" in flow.note


def test_text_is_as_long_as_in_training() -> None:
    assert kinds(made("flux"))["T5TokenizerOptions"]["min_length"] == 512
    assert kinds(made("stable_diffusion_3"))["T5TokenizerOptions"]["min_length"] == 256
    assert kinds(made("flux", max_sequence_length=128))["T5TokenizerOptions"]["min_length"] == 128
    # The others have a mask, or no padding at all.
    assert "T5TokenizerOptions" not in kinds(made("qwen_image"))


def test_lumina_gets_the_system_prompt_of_its_pipeline() -> None:
    from diffusers import Lumina2Pipeline

    assert kinds(made("lumina2"))["CLIPTextEncodeLumina2"]["system_prompt"] == "superior"
    own = Lumina2Pipeline(None, None, None, None, None).system_prompt
    assert "generate superior images with the superior degree of image-text alignment" in own


def test_embedded_guidance() -> None:
    assert kinds(made("flux"))["FluxGuidance"]["guidance"] == 3.5
    assert kinds(made("flux", embedded_guidance=1.0))["FluxGuidance"]["guidance"] == 1.0
    assert "FluxGuidance" not in kinds(made("z_image"))


def test_a_base_of_ones_own_is_not_taken_for_the_published_one() -> None:
    assert kinds(made("flux"))["UNETLoader"]["unet_name"] == "flux1-dev.safetensors"
    assert kinds(made("flux", base="me/my-flux"))["UNETLoader"]["unet_name"] == "my-flux.safetensors"
    assert kinds(made("flux", base="/models/mine"))["UNETLoader"]["unet_name"] == "mine.safetensors"


def test_stable_diffusion_3_is_a_checkpoint_with_its_vae() -> None:
    flow = made("stable_diffusion_3")
    assert kinds(flow)["CheckpointLoaderSimple"]["ckpt_name"] == "sd3.5_large.safetensors"
    assert kinds(flow)["VAEDecode"]["vae"] == ["1", 2] and "VAELoader" not in kinds(flow)
    flow = made("stable_diffusion_3", model=True)
    assert "CheckpointLoaderSimple" not in kinds(flow) and kinds(flow)["VAELoader"]["vae_name"] == "sd3_vae.safetensors"


@pytest.mark.parametrize("model", [False, True], ids=["lora", "model"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_file_that_is_loaded_is_listed(family: str, model: bool, tmp_path: Path) -> None:
    flow = made(family, model=model)
    loaded = {v for node in kinds(flow).values() for v in node.values() if str(v).endswith(".safetensors")}
    assert loaded == {name for name, _, _ in flow.files}


def test_nodes_are_checked() -> None:
    with pytest.raises(ValueError, match="VAEDecode takes samples, vae; got samples"):
        Workflow().add("decode", "VAEDecode", 0, samples=Link("x"))
    with pytest.raises(ValueError, match="the name of a LoRA or of a model, and not both"):
        workflow(source("flux"), lora="a", model="b")
