"""``apex-fast export --format comfyui``: what ComfyUI's loader, as ``comfyui_loader`` states it, makes of the files,
and what diffusers' own single-file loaders make of a checkpoint.
"""

from __future__ import annotations

import copy
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from backbone_cases import load_tiny
from comfyui_loader import detect, key_map, load_lora
from export_cases import PROMPT, code_of, tiny_run
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from apex_fast.backbones.base import Backbone
from apex_fast.export import export_run
from apex_fast.export.comfyui import lora_file, unknown_sizes
from apex_fast.export.comfyui_keys import LAYOUTS, check_family, native_state, place
from apex_fast.export.command import main
from apex_fast.lora import WEIGHTS, LoraSettings, add_lora, save_lora
from apex_fast.training.models import load_generator
from apex_fast.training.provenance import front_matter
from apex_fast.training.settings import SettingsError

FAMILIES = tuple(LAYOUTS)


def adapted(backbone: Backbone, folder: Path, **settings: Any) -> tuple[Backbone, dict[str, Tensor], dict[str, Any]]:
    """A copy of ``backbone`` with a LoRA that does something, its file's tensors and its settings."""
    backbone = copy.deepcopy(backbone)
    add_lora(backbone, LoraSettings(**{"rank": 3, "alpha": 7.0, **settings}), seed=0)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in backbone.transformer.named_parameters():
        if ".lora_B." in name:
            parameter.data = torch.randn(parameter.shape, generator=generator)
    file = save_lora(backbone, folder)
    return backbone, load_file(file), header(file)


def header(file: Path) -> dict[str, Any]:
    with safe_open(file, "pt") as opened:
        found = json.loads(opened.metadata()["lora_adapter_metadata"])
    return {key.removeprefix("transformer."): value for key, value in found.items()}


def rows_of(backbone: Backbone) -> Any:
    return lambda layer: backbone.transformer.get_submodule(layer).weight.shape[0]


def merged_native(backbone: Backbone) -> dict[str, Tensor]:
    merged = copy.deepcopy(backbone.transformer)
    merged.fuse_lora(adapter_names=["default"])
    merged.unload_lora()
    return native_state(backbone.family, merged.state_dict())


def assert_same_weights(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=1e-5, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


# ---- a LoRA


@pytest.mark.parametrize("settings", [{}, {"use_rslora": True}], ids=["plain", "rslora"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_loader_merges_what_peft_merges(
    family: str, settings: dict[str, Any], tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    base = load_tiny(family, tmp_path_factory)
    backbone, state, own = adapted(base, tmp_path, **settings)
    before = native_state(family, base.transformer.state_dict())
    lora = lora_file(family, state, own, rows_of(base))
    after, unknown = load_lora(family, before, lora)
    assert not unknown
    assert_same_weights(after, merged_native(backbone))
    # Every default target is there, modulation and time among them: a map that dropped one would pass the above.
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert len(state) // 2 == sum(len(parts) for parts in parts_of(family, state).values())
    assert changed == set(parts_of(family, state))


def parts_of(family: str, state: dict[str, Tensor]) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for key in state:
        layer = key.removeprefix("transformer.").rpartition(".lora_")[0]
        found.setdefault(place(family, f"{layer}.weight").name, set()).add(layer)
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_every_linear_layer_has_a_key(family: str, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    base = load_tiny(family, tmp_path_factory)
    linear = [n for n, m in base.transformer.named_modules() if isinstance(m, torch.nn.Linear)]
    backbone, state, own = adapted(base, tmp_path, target_modules=tuple(linear))
    before = native_state(family, base.transformer.state_dict())
    after, unknown = load_lora(family, before, lora_file(family, state, own, rows_of(base)))
    assert not unknown
    assert_same_weights(after, merged_native(backbone))


@pytest.mark.parametrize("parts", [("to_q",), ("to_k", "to_v"), ("to_q", "to_v")])
def test_a_joined_matrix_of_which_parts_are_adapted(
    parts: tuple[str, ...], tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    base = load_tiny("lumina2", tmp_path_factory)
    backbone, state, own = adapted(base, tmp_path, target_modules=parts)
    lora = lora_file("lumina2", state, own, rows_of(base))
    assert lora["diffusion_model.layers.0.attention.qkv.lora_A.weight"].shape[0] == 3 * len(parts)
    after, unknown = load_lora("lumina2", native_state("lumina2", base.transformer.state_dict()), lora)
    assert not unknown
    assert_same_weights(after, merged_native(backbone))


def test_parts_of_different_scales(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    base = load_tiny("lumina2", tmp_path_factory)
    backbone, state, own = adapted(base, tmp_path)
    pattern = {r"layers\.\d+\.attn\.to_k": 1.5}
    layers = [backbone.transformer.get_submodule(f"layers.{i}.attn.to_k") for i in range(2)]
    for layer in layers:
        layer.scaling["default"] = 1.5 / 3
    lora = lora_file("lumina2", state, {**own, "alpha_pattern": pattern}, rows_of(base))
    after, unknown = load_lora("lumina2", native_state("lumina2", base.transformer.state_dict()), lora)
    assert not unknown
    assert_same_weights(after, merged_native(backbone))


def test_only_lumina_needs_a_matrix_of_its_own(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    for family in FAMILIES:
        base = load_tiny(family, tmp_path_factory)
        _, state, own = adapted(base, tmp_path / family)
        lora = lora_file(family, state, own, rows_of(base))
        weights = sum(v.numel() for k, v in lora.items() if not k.endswith(".alpha"))
        same = weights == sum(v.numel() for v in state.values())
        assert same == (family != "lumina2")
    # The loader's names for diffusers' layers do not have Lumina's.
    known = key_map("lumina2", native_state("lumina2", base.transformer.state_dict()))
    assert not any(f"transformer.{layer}" in known for layer in own["target_modules"] if ".attn." in layer)


def test_dora_and_other_adapters_are_refused(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    base = load_tiny("flux", tmp_path_factory)
    _, state, own = adapted(base, tmp_path, use_dora=True)
    with pytest.raises(ValueError, match=r"DoRA with another norm than peft.*write --merge"):
        lora_file("flux", state, own, rows_of(base))
    with pytest.raises(ValueError, match=r"lora_magnitude_vector.* is no matrix of a LoRA"):
        lora_file("flux", state, {**own, "use_dora": False}, rows_of(base))


def test_a_layer_without_a_place_is_refused() -> None:
    with pytest.raises(ValueError, match=r"transformer_blocks.0.attn.to_x.weight has no place in the layout of flux"):
        place("flux", "transformer_blocks.0.attn.to_x.weight")
    with pytest.raises(ValueError, match="joins 3 matrices of the diffusers model, and 2 came"):
        native_state("z_image", {f"layers.0.attention.to_{n}.weight": torch.zeros(2, 2) for n in "qv"})


def test_sana_is_refused() -> None:
    with pytest.raises(ValueError, match=r"ComfyUI itself loads .*lumina2, not sana: .*use --format diffusers"):
        check_family("sana")


# ---- a diffusion model, against diffusers' own converters


def published(family: str) -> tuple[Any, dict[str, Tensor]]:
    """Config and state dict of a network of the published width with few blocks; every matrix has one column, since
    the layouts differ along rows alone."""
    import diffusers

    sizes: dict[str, tuple[str, dict[str, Any]]] = {
        "flux": ("FluxTransformer2DModel", {"num_layers": 2, "num_single_layers": 2, "guidance_embeds": True}),
        "stable_diffusion_3": (
            "SD3Transformer2DModel",
            {
                "num_layers": 24,
                "num_attention_heads": 24,
                "attention_head_dim": 64,
                "caption_projection_dim": 1536,
                "joint_attention_dim": 4096,
                "dual_attention_layers": (0, 1),
                "qk_norm": "rms_norm",
                "sample_size": 64,
                "pos_embed_max_size": 8,
            },
        ),
        "z_image": ("ZImageTransformer2DModel", {"n_layers": 2}),
        "lumina2": ("Lumina2Transformer2DModel", {"num_layers": 2}),
        "qwen_image": ("QwenImageTransformer2DModel", {"num_layers": 2}),
    }
    name, options = sizes[family]
    with torch.device("meta"):
        network = getattr(diffusers, name)(**options)
    generator = torch.Generator().manual_seed(0)
    state = {}
    for key, value in network.state_dict().items():
        shape = (value.shape[0], 1) if value.dim() == 2 else value.shape
        state[key] = torch.randn(shape, generator=generator)
    return network, state


def converted(family: str, native: dict[str, Tensor]) -> dict[str, Tensor]:
    from diffusers.loaders import single_file_utils as stock

    convert = {
        "flux": stock.convert_flux_transformer_checkpoint_to_diffusers,
        "stable_diffusion_3": stock.convert_sd3_transformer_checkpoint_to_diffusers,
        "z_image": stock.convert_z_image_transformer_checkpoint_to_diffusers,
        "lumina2": stock.convert_lumina2_to_diffusers,
    }.get(family)
    # Qwen-Image has the same names; its single-file loader changes nothing.
    return native if convert is None else convert(dict(native))


@pytest.mark.parametrize("family", FAMILIES)
def test_diffusers_reads_the_checkpoint_back(family: str) -> None:
    network, state = published(family)
    native = native_state(family, state)
    found = converted(family, native)
    assert found.keys() == state.keys()
    for name, value in state.items():
        assert torch.equal(found[name], value), name
    assert unknown_sizes(family, network.config) == []


@pytest.mark.parametrize("family", FAMILIES)
def test_comfyui_detects_the_family(family: str) -> None:
    _, state = published(family)
    assert detect(native_state(family, state)) == family
    assert (detect(state) == family) == LAYOUTS[family].same


def test_sizes_that_comfyui_does_not_know_are_named(tmp_path_factory: pytest.TempPathFactory) -> None:
    for family in FAMILIES:
        assert unknown_sizes(family, load_tiny(family, tmp_path_factory).transformer.config)


# ---- whole exports


def test_a_lora_of_a_run(tmp_path_factory: pytest.TempPathFactory) -> None:
    run = tiny_run(tmp_path_factory, "flux")
    folder = export_run(run, format="comfyui")
    file = folder / "models" / "loras" / "run.safetensors"
    generator = load_generator(run)[0]
    bare = copy.deepcopy(generator.transformer)
    bare.unload_lora()
    after, unknown = load_lora("flux", native_state("flux", bare.state_dict()), load_file(file))
    assert not unknown
    assert_same_weights(after, merged_native(generator))
    # Half of the effect would be lost without it: rank 4, alpha 8.
    assert load_file(file)["transformer.norm_out.linear.alpha"] == 8
    with safe_open(file, "pt") as opened:
        assert opened.metadata()["num_inference_steps"] == "1"
    graph = json.loads((folder / "workflow.json").read_text())
    loader = next(node for node in graph["nodes"] if node["type"] == "LoraLoaderModelOnly")
    assert loader["widgets_values"] == [file.name, 1.0]
    text = (folder / "README.md").read_text()
    # the card: grid, settings and metrics beside the files
    front = front_matter(text)
    assert {"comfyui", "flux", "lora"} <= set(front["tags"]) and "library_name" not in front
    assert "![Samples of the validation prompts](samples.png)" in text
    assert (folder / "samples.png").read_bytes() == (run / "samples" / "step-000004.png").read_bytes()
    for line in (
        "| condition shift | c_fake = -1 c + 0.5, scalar |",
        "| training step | L_fake | L_correction | L_sup | v_shift - v_real, relative |",
        "`workflow_api.json` is the same for `POST /prompt`",
    ):
        assert line in text
    named = set(re.findall(r"`([^`]+\.safetensors)` \|", text))
    assert {file.name, "flux.safetensors", "ae.safetensors"} <= named


def test_a_lora_with_merge_is_a_diffusion_model(tmp_path_factory: pytest.TempPathFactory) -> None:
    run = tiny_run(tmp_path_factory, "lumina2")
    with pytest.warns(UserWarning, match="hidden_size is 32, not 2304") as warned:
        folder = export_run(run, format="comfyui", merge=True)
    assert warned[0].filename == __file__, "the caller's line, not one of the library"
    written = load_file(folder / "models" / "diffusion_models" / "run.safetensors")
    assert_same_weights(written, merged_native(load_generator(run)[0]))
    prompt = json.loads((folder / "workflow_api.json").read_text())
    kinds = {node["class_type"]: node["inputs"] for node in prompt.values()}
    assert kinds["UNETLoader"]["unet_name"] == "run.safetensors"
    assert "LoraLoaderModelOnly" not in kinds


@pytest.mark.filterwarnings("error:ComfyUI")
def test_a_fully_tuned_run(tmp_path_factory: pytest.TempPathFactory, capsys: pytest.CaptureFixture[str]) -> None:
    run = tiny_run(tmp_path_factory, "stable_diffusion_3", "full")
    capsys.readouterr()
    assert main([str(run), "--format", "comfyui"]) == 0
    captured = capsys.readouterr()
    folder = Path(captured.out.strip())
    # Lines for the user, without the place in the library that a warning would name.
    careful, exported, _ = captured.err.splitlines()
    assert careful.startswith("careful: ComfyUI knows the sizes of the published stable_diffusion_3 models")
    assert exported == f"exported: the finished model of {run}"
    written = load_file(folder / "models" / "diffusion_models" / "run.safetensors")
    own = load_generator(run)[0].transformer.state_dict()
    back = converted("stable_diffusion_3", written)
    assert back.keys() == own.keys()
    assert all(torch.equal(back[name], value) for name, value in own.items())


def test_what_comfyui_would_get_wrong_is_refused(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    run = tiny_run(tmp_path_factory, "sana")
    with pytest.raises(SettingsError, match="not sana: it has no network of that kind"):
        export_run(run, format="comfyui")
    assert not (run / "export" / "comfyui").exists()
    start = tiny_run(tmp_path_factory, "flux") / "model" / WEIGHTS
    run = tiny_run(tmp_path_factory, "flux", "lora", "--start_lora", str(start))
    with pytest.raises(SettingsError, match="belongs on top of .* write --merge"):
        export_run(run, format="comfyui")


def test_the_code_of_the_card_queues_the_workflow(tmp_path_factory: pytest.TempPathFactory) -> None:
    """On a server that stands in for ComfyUI's: the whole workflow, with this prompt and this seed in it."""
    taken = []

    class Server(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            taken.append((self.path, self.headers["Content-Type"], json.loads(body)))
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b'{"prompt_id": "1"}')

        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Server) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        for family, name in (("flux", "text"), ("lumina2", "user_prompt")):
            folder = export_run(tiny_run(tmp_path_factory, family), format="comfyui")
            code = code_of(folder / "README.md")
            for old, new in (
                ("http://127.0.0.1:8188", f"http://127.0.0.1:{server.server_port}"),
                ('folder = "."', f"folder = {str(folder)!r}"),
                (f"prompt = {json.dumps(PROMPT)}", 'prompt = "a blue square"'),
                ("seed = 0", "seed = 3"),
            ):
                assert code.count(old) == 1
                code = code.replace(old, new)
            exec(compile(code, "README.md", "exec"), {})
            path, kind, body = taken.pop()
            assert (path, kind) == ("/prompt", "application/json")
            expected = json.loads((folder / "workflow_api.json").read_text())
            (encoder,) = (node for node in expected.values() if name in node["inputs"])
            (sampler,) = (node for node in expected.values() if "seed" in node["inputs"])
            assert encoder["inputs"][name] == PROMPT and sampler["inputs"]["seed"] == 0
            encoder["inputs"][name], sampler["inputs"]["seed"] = "a blue square", 3
            assert body == {"prompt": expected}
        server.shutdown()
