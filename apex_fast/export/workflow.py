"""A ComfyUI workflow of core nodes that samples as :func:`apex_fast.sample` does: one list of nodes, written two ways.

``Workflow.graph()`` is what the window opens and saves (places, links, a note), ``Workflow.prompt()`` what a script
posts to ``/prompt``. :data:`NODES` states inputs and outputs of the nodes as the public repository has them
(``nodes.py``, ``comfy_extras/nodes_{sd3,flux,lumina2,cond,model_advanced}.py``).

Times. A KSampler with scheduler ``simple`` takes N of a table of sigmas: entry 1000 - int(1000 i / N), of 1000, is
1 - i / N where N divides 1000. The table is that of the model's time shift, and at shift 1 it is uniform: so 1, 2, 4, 5
and 8 steps are :func:`apex_fast.time_grid`'s to rounding, and other N are off by less than 0.001. FLUX has a table of
10,000 and a shift exp(mu), mu = 0. At one step every shift gives [1, 0].

Steps. ``euler`` is the Euler step of ``af.sample``, ``lcm`` the one with ``stochasticity=1``: both exactly, for a model
that predicts noise minus data. cfg 1 leaves the negative prompt out of the computation; it is an input that has to be
connected. Initial noise is drawn by ComfyUI's own code, so a seed need not give the picture that it gives elsewhere.

Text. FLUX and SD3 see the padding of T5, so its length is set to what the run was trained with
(``T5TokenizerOptions``); ComfyUI's own would be shorter. Lumina 2's system prompt is the node's "superior", the one
that diffusers puts first.
"""

from __future__ import annotations

import uuid
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from apex_fast.backbones.loading import backbone_class

if TYPE_CHECKING:
    from apex_fast.export.source import Source

WIDGET = "*"
"""In place of the type of an input that is a value of the node and not a link."""


@dataclass(frozen=True)
class NodeType:
    """A core node: its inputs in order, each with the type of its link or ``WIDGET``, and the types of its outputs."""

    inputs: dict[str, str]
    outputs: tuple[str, ...] = ()


def _values(*names: str) -> dict[str, str]:
    return dict.fromkeys(names, WIDGET)


NODES: dict[str, NodeType] = {
    "UNETLoader": NodeType(_values("unet_name", "weight_dtype"), ("MODEL",)),
    "CheckpointLoaderSimple": NodeType(_values("ckpt_name"), ("MODEL", "CLIP", "VAE")),
    "LoraLoaderModelOnly": NodeType({"model": "MODEL", **_values("lora_name", "strength_model")}, ("MODEL",)),
    "CLIPLoader": NodeType(_values("clip_name", "type"), ("CLIP",)),
    "DualCLIPLoader": NodeType(_values("clip_name1", "clip_name2", "type"), ("CLIP",)),
    "TripleCLIPLoader": NodeType(_values("clip_name1", "clip_name2", "clip_name3"), ("CLIP",)),
    "VAELoader": NodeType(_values("vae_name"), ("VAE",)),
    "T5TokenizerOptions": NodeType({"clip": "CLIP", **_values("min_padding", "min_length")}, ("CLIP",)),
    "CLIPTextEncode": NodeType({"clip": "CLIP", **_values("text")}, ("CONDITIONING",)),
    "CLIPTextEncodeLumina2": NodeType({"clip": "CLIP", **_values("system_prompt", "user_prompt")}, ("CONDITIONING",)),
    "FluxGuidance": NodeType({"conditioning": "CONDITIONING", **_values("guidance")}, ("CONDITIONING",)),
    "ConditioningZeroOut": NodeType({"conditioning": "CONDITIONING"}, ("CONDITIONING",)),
    "ModelSamplingSD3": NodeType({"model": "MODEL", **_values("shift")}, ("MODEL",)),
    "ModelSamplingAuraFlow": NodeType({"model": "MODEL", **_values("shift")}, ("MODEL",)),
    "ModelSamplingFlux": NodeType(
        {"model": "MODEL", **_values("max_shift", "base_shift", "width", "height")}, ("MODEL",)
    ),
    "EmptySD3LatentImage": NodeType(_values("width", "height", "batch_size"), ("LATENT",)),
    "KSampler": NodeType(
        {
            "model": "MODEL",
            **_values("seed", "steps", "cfg", "sampler_name", "scheduler"),
            "positive": "CONDITIONING",
            "negative": "CONDITIONING",
            "latent_image": "LATENT",
            **_values("denoise"),
        },
        ("LATENT",),
    ),
    "VAEDecode": NodeType({"samples": "LATENT", "vae": "VAE"}, ("IMAGE",)),
    "SaveImage": NodeType({"images": "IMAGE", **_values("filename_prefix")}),
}

SEED_CONTROL = "fixed"
"""What the window does with the seed after a picture: a value of its own behind every seed in ``graph()``."""


@dataclass(frozen=True)
class Parts:
    """What a family's users load in ComfyUI, beside the model.

    Attributes:
        bases: hub ids of published models, and the file of each.
        text: loader of the text encoders, their files, and its ``type`` (None: it has no such input).
        vae: file of the VAE.
        shift: node that sets the time shift, with the values that make it none.
        checkpoint: whether the published file holds the VAE too and is loaded as a checkpoint.
    """

    bases: dict[str, str]
    text: tuple[str, tuple[str, ...], str | None]
    vae: str
    shift: tuple[str, dict[str, float]]
    checkpoint: bool = False


_NO_SHIFT = {"shift": 1.0}
PARTS: dict[str, Parts] = {
    "qwen_image": Parts(
        bases={"Qwen/Qwen-Image": "qwen_image_bf16", "Qwen/Qwen-Image-2512": "qwen_image_2512_bf16"},
        text=("CLIPLoader", ("qwen_2.5_vl_7b",), "qwen_image"),
        vae="qwen_image_vae",
        shift=("ModelSamplingAuraFlow", _NO_SHIFT),
    ),
    "flux": Parts(
        bases={
            "black-forest-labs/FLUX.1-dev": "flux1-dev",
            "black-forest-labs/FLUX.1-schnell": "flux1-schnell",
            "black-forest-labs/FLUX.1-Krea-dev": "flux1-krea-dev",
        },
        text=("DualCLIPLoader", ("clip_l", "t5xxl_fp16"), "flux"),
        vae="ae",
        shift=("ModelSamplingFlux", {"max_shift": 0.0, "base_shift": 0.0}),
    ),
    "z_image": Parts(
        bases={"Tongyi-MAI/Z-Image": "z_image_bf16", "Tongyi-MAI/Z-Image-Turbo": "z_image_turbo_bf16"},
        # The loader knows the encoder by its weights; its list has no type for Z-Image.
        text=("CLIPLoader", ("qwen_3_4b",), "lumina2"),
        vae="ae",
        shift=("ModelSamplingAuraFlow", _NO_SHIFT),
    ),
    "stable_diffusion_3": Parts(
        bases={
            "stabilityai/stable-diffusion-3.5-large": "sd3.5_large",
            "stabilityai/stable-diffusion-3.5-medium": "sd3.5_medium",
            "stabilityai/stable-diffusion-3-medium-diffusers": "sd3_medium",
        },
        text=("TripleCLIPLoader", ("clip_l", "clip_g", "t5xxl_fp16"), None),
        vae="sd3_vae",
        shift=("ModelSamplingSD3", _NO_SHIFT),
        checkpoint=True,
    ),
    "lumina2": Parts(
        bases={"Alpha-VLLM/Lumina-Image-2.0": "lumina_2_model_bf16"},
        text=("CLIPLoader", ("gemma_2_2b_fp16",), "lumina2"),
        vae="ae",
        shift=("ModelSamplingAuraFlow", _NO_SHIFT),
    ),
}


@dataclass(frozen=True)
class Link:
    """An output of another node: its key, and which."""

    node: str
    slot: int = 0


@dataclass(frozen=True)
class Node:
    """A node: its type, the values and links of all its inputs, and the column of the window that it stands in."""

    type: str
    inputs: dict[str, Any]
    column: int


@dataclass
class Workflow:
    """Nodes by key, in an order in which every link points back.

    Attributes:
        nodes: of the graph.
        files: (name, folder under models/, where from) of every file that its loaders name.
        note: what a user should know, in Markdown.
    """

    nodes: dict[str, Node] = field(default_factory=dict)
    files: list[tuple[str, str, str]] = field(default_factory=list)
    note: str = ""

    def add(self, key: str, type: str, column: int, /, **inputs: Any) -> Link:
        """Adds a node; returns its first output. KeyError or ValueError for inputs that the type does not have."""
        known = NODES[type].inputs
        if set(inputs) != set(known):
            raise ValueError(f"{type} takes {', '.join(known)}; got {', '.join(inputs)}")
        self.nodes[key] = Node(type, {name: inputs[name] for name in known}, column)
        return Link(key)

    def prompt(self) -> dict[str, Any]:
        """The API format: what ``POST /prompt`` takes as ``prompt``."""
        ids = {key: str(i) for i, key in enumerate(self.nodes, 1)}
        return {
            ids[key]: {
                "class_type": node.type,
                "inputs": {
                    name: [ids[value.node], value.slot] if isinstance(value, Link) else value
                    for name, value in node.inputs.items()
                },
                "_meta": {"title": node.type},
            }
            for key, node in self.nodes.items()
        }

    def graph(self) -> dict[str, Any]:
        """The format of the window, version 0.4, with the note."""
        ids = {key: i for i, key in enumerate(self.nodes, 1)}
        links: list[list[Any]] = []
        leaving: dict[tuple[str, int], list[int]] = {}
        drawn = []
        heights: dict[int, int] = {}
        for key, node in self.nodes.items():
            kind = NODES[node.type]
            sockets, values = [], []
            for name, value in node.inputs.items():
                if not isinstance(value, Link):
                    values.append(value)
                    if name == "seed":
                        values.append(SEED_CONTROL)
                    continue
                number = len(links) + 1
                links.append([number, ids[value.node], value.slot, ids[key], len(sockets), kind.inputs[name]])
                leaving.setdefault((value.node, value.slot), []).append(number)
                sockets.append({"name": name, "type": kind.inputs[name], "link": number})
            text = any("\n" in str(v) or len(str(v)) > 60 for v in values) or node.type.startswith("CLIPTextEncode")
            height = 60 + 26 * (len(sockets) + len(values)) + (120 if text else 0)
            top = heights.get(node.column, 0)
            heights[node.column] = top + height + 60
            drawn.append(
                {
                    "id": ids[key],
                    "type": node.type,
                    "pos": [380 * node.column, top],
                    "size": [330, height],
                    "flags": {},
                    "order": len(drawn),
                    "mode": 0,
                    "inputs": sockets,
                    "outputs": [],
                    "properties": {"Node name for S&R": node.type},
                    "widgets_values": values,
                }
            )
        for key, entry in zip(self.nodes, drawn, strict=True):
            kind = NODES[entry["type"]]
            entry["outputs"] = [
                {"name": output, "type": output, "slot_index": slot, "links": leaving.get((key, slot))}
                for slot, output in enumerate(kind.outputs)
            ]
        drawn.append(
            {
                "id": len(ids) + 1,
                "type": "Note",
                "pos": [-480, 0],
                "size": [440, 360],
                "flags": {},
                "order": len(drawn),
                "mode": 0,
                "inputs": [],
                "outputs": [],
                "properties": {},
                "widgets_values": [self.note],
            }
        )
        return {
            "id": str(uuid.uuid5(uuid.NAMESPACE_URL, repr(self.nodes))),
            "revision": 0,
            "last_node_id": len(drawn),
            "last_link_id": len(links),
            "nodes": drawn,
            "links": links,
            "groups": [],
            "config": {},
            "extra": {},
            "version": 0.4,
        }


def workflow(source: Source, *, lora: str | None = None, model: str | None = None) -> Workflow:
    """The workflow that draws the example prompt of ``source`` with its steps, at its size.

    lora, model: file names: of a LoRA on the published base, or of a whole diffusion model. One of the two.
    """
    parts, record = PARTS[source.family], source.record
    flow = Workflow()
    height, width = source.resolution
    network, vae = _network(flow, parts, source.base, lora, model)
    loader, encoders, kind = parts.text
    names = ["clip_name"] if len(encoders) == 1 else [f"clip_name{i}" for i in range(1, len(encoders) + 1)]
    files = [f"{name}.safetensors" for name in encoders]
    choice = {} if kind is None else {"type": kind}
    clip = flow.add("text encoders", loader, 0, **dict(zip(names, files, strict=True)), **choice)
    flow.files += [(file, "text_encoders", "the family's ComfyUI files") for file in files]
    if vae is None:
        vae = flow.add("vae", "VAELoader", 0, vae_name=f"{parts.vae}.safetensors")
        origin = "`vae/diffusion_pytorch_model.safetensors` of the base, renamed" if parts.checkpoint else ""
        flow.files.append((f"{parts.vae}.safetensors", "vae", origin or "the family's ComfyUI files"))
    if "t5xxl_fp16" in encoders:
        length = record.max_sequence_length or backbone_class(source.family).default_sequence_length
        clip = flow.add("text length", "T5TokenizerOptions", 1, clip=clip, min_padding=0, min_length=length)
    if source.family == "lumina2":
        positive = flow.add(
            "prompt", "CLIPTextEncodeLumina2", 1, clip=clip, system_prompt="superior", user_prompt=source.prompt
        )
    else:
        positive = flow.add("prompt", "CLIPTextEncode", 1, clip=clip, text=source.prompt)
    embedded = backbone_class(source.family).teacher_guidance.embedded
    if embedded is not None:
        # Weights that take no guidance (schnell) ignore it.
        value = embedded if record.embedded_guidance is None else record.embedded_guidance
        positive = flow.add("guidance", "FluxGuidance", 2, conditioning=positive, guidance=float(value))
    negative = flow.add("no negative prompt", "ConditioningZeroOut", 2, conditioning=positive)
    name, values = parts.shift
    size = {"width": width, "height": height}
    shifted = flow.add(
        "no time shift", name, 2, model=network, **values, **(size if "width" in NODES[name].inputs else {})
    )
    latent = flow.add("noise", "EmptySD3LatentImage", 2, **size, batch_size=1)
    samples = flow.add(
        "sampler",
        "KSampler",
        3,
        model=shifted,
        positive=positive,
        negative=negative,
        latent_image=latent,
        seed=0,
        steps=source.steps,
        cfg=1.0,
        sampler_name="euler",
        scheduler="simple",
        denoise=1.0,
    )
    pixels = flow.add("decode", "VAEDecode", 4, samples=samples, vae=vae)
    flow.add("save", "SaveImage", 4, images=pixels, filename_prefix=source.name)
    flow.note = _note(source, name, lora)
    return flow


def _network(flow: Workflow, parts: Parts, base: str, lora: str | None, model: str | None) -> tuple[Link, Link | None]:
    """Adds the loaders of the network; its output, and that of the VAE where the same file holds it."""
    if (lora is None) == (model is None):
        raise ValueError("workflow: expected the name of a LoRA or of a model, and not both")
    if model is not None:
        flow.files.append((model, "diffusion_models", "this export"))
        return flow.add("model", "UNETLoader", 0, unet_name=model, weight_dtype="default"), None
    assert lora is not None
    # Of a base that is none of the published ones the file is its user's; another name would load another model.
    file = parts.bases.get(base, base.rstrip("/").rpartition("/")[2]) + ".safetensors"
    origin = f"{base}, as ComfyUI loads it"
    vae = None
    if parts.checkpoint:
        network = flow.add("model", "CheckpointLoaderSimple", 0, ckpt_name=file)
        vae = Link("model", NODES["CheckpointLoaderSimple"].outputs.index("VAE"))
        flow.files.append((file, "checkpoints", origin))
    else:
        network = flow.add("model", "UNETLoader", 0, unet_name=file, weight_dtype="default")
        flow.files.append((file, "diffusion_models", origin))
    flow.files.append((lora, "loras", "this export"))
    return flow.add("lora", "LoraLoaderModelOnly", 1, model=network, lora_name=lora, strength_model=1.0), vae


def _note(source: Source, shift: str, lora: str | None) -> str:
    strength = "" if lora is None else ", and the strength of the LoRA at 1"
    return (
        f"Made for {source.steps} step{'s' if source.steps > 1 else ''} without guidance: keep cfg at 1, the scheduler "
        f"at simple and {shift} as it is{strength}.\n\n"
        "1, 2, 4, 5 or 8 steps take uniform times. With 2 steps or more, the sampler euler goes on from where it is, "
        "and lcm draws new noise in every step; at 1 step they are the same.\n\n"
        f"Trained at {source.resolution[1]} x {source.resolution[0]} pixels."
    )
