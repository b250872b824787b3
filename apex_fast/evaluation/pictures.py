"""Scores of pictures in a folder, for models that no small benchmark fits: CLIP score, and Frechet distance to a folder
of real pictures.

A folder may have any of the layouts of :mod:`apex_fast.evaluation.layouts`, or be just a folder of pictures; its
pictures are read one batch at a time. The networks that measure come from files on this machine, nothing is downloaded:

CLIP score
    100 max(cos(picture, text), 0) by a ``CLIPModel`` of transformers, mean over the pictures (Hessel et al.,
    arXiv 2104.08718, Eq. 1, with the weight 100 that text-to-image papers take in place of 2.5). Scores of two CLIP
    models are not comparable.
FID
    Frechet distance in the 2,048 features of the Inception network that FID is defined by (Heusel et al.,
    arXiv 1706.08500), as its TorchScript file ``inception-2015-12-05.pt`` has it: that file is the network with its own
    resizing, so torch reads it without another package. (The networks of torch-fidelity, which torchmetrics takes, of
    pytorch-fid and of clean-fid import torchvision.) How pictures are resized changes FID (Parmar et al., arXiv
    2104.11222), so compare numbers that were made the same way only.
Frechet distance in other features
    The same distance in the features of any local vision model of transformers (CLIP, DINOv2, ...). It is no FID.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from apex_fast.evaluation.layouts import FACTS, METADATA, Prompt
from apex_fast.extras import require

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
INCEPTION = "inception-2015-12-05.pt"
"""Name under which the TorchScript file of the FID network is published."""


@dataclass(frozen=True)
class Picture:
    """One picture of a folder.

    Attributes:
        path: of its file.
        prompt: what it was drawn for; None where nothing says it.
        part: (which, of how many): the file holds several pictures in a square grid; None where it is one.
    """

    path: Path
    prompt: str | None = None
    part: tuple[int, int] | None = None

    def read(self) -> Any:
        """The picture (PIL, RGB). ValueError for a file that is none, or one that cannot be cut evenly."""
        pil = require("PIL.Image", extra="train")
        try:
            with pil.open(self.path) as file:
                picture = file.convert("RGB")
        except (OSError, SyntaxError) as error:
            raise ValueError(f"{self.path} is no picture, or was cut off: {error}") from error
        if self.part is None:
            return picture
        number, count = self.part
        across = int(np.ceil(np.sqrt(count)))
        down = -(-count // across)
        if picture.width % across or picture.height % down:
            raise ValueError(
                f"{self.path} of {picture.width} x {picture.height} pixels is no grid of {count} equal pictures"
            )
        width, height = picture.width // across, picture.height // down
        left, top = number % across * width, number // across * height
        return picture.crop((left, top, left + width, top + height))


def read_folder(
    folder: str | Path, prompts: Sequence[Prompt] | None = None, *, images_per_file: int | None = None
) -> list[Picture]:
    """The pictures in ``folder``, with their prompts where they are known.

    Prompts come from, in this order: ``metadata.jsonl`` with ``file_name`` and ``text`` (layout plain); the
    ``metadata.jsonl`` beside a folder ``samples`` (layout geneval); ``prompts`` whose names are those of the files
    (layout dpg); the text chunk that ``apex-fast generate`` writes into every picture.

    Args:
        prompts: those of DPG-Bench, for a folder of that layout which others have drawn.
        images_per_file: pictures in the grid of each file; None is what the files say, else one.

    Raises:
        FileNotFoundError: there is no such folder, or a picture that it lists is missing.
        ValueError: no picture in it, or a list that cannot be read.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder of pictures")
    found = list(_geneval(folder)) or list(_plain(folder)) or list(_any(folder, prompts, images_per_file))
    if not found:
        raise ValueError(f"no pictures in {folder}; expected files with one of {', '.join(SUFFIXES)}")
    return found


def _geneval(folder: Path) -> Iterator[Picture]:
    for own in sorted(path for path in folder.iterdir() if path.is_dir() and path.name.isdigit()):
        if not (own / METADATA).is_file() or not (own / "samples").is_dir():
            continue
        values = _lines(own / METADATA)
        if not values or not isinstance(values[0].get("prompt"), str):
            raise ValueError(f'{own / METADATA}: expected a line of JSON with "prompt"')
        for path in _files(own / "samples"):
            yield Picture(path, values[0]["prompt"])


def _plain(folder: Path) -> Iterator[Picture]:
    if not (folder / METADATA).is_file():
        return
    for number, values in enumerate(_lines(folder / METADATA), 1):
        name, text = values.get("file_name"), values.get("text")
        if not isinstance(name, str) or not isinstance(text, str):
            raise ValueError(f'{folder / METADATA}, line {number}: expected "file_name" and "text"')
        path = folder / name
        if not path.is_file():
            raise FileNotFoundError(f"{folder / METADATA} lists {name}, and it is not there")
        yield Picture(path, text)


def _any(folder: Path, prompts: Sequence[Prompt] | None, images_per_file: int | None) -> Iterator[Picture]:
    named = {prompt.name: prompt.text for prompt in prompts or () if prompt.name is not None}
    for path in _files(folder):
        facts = _facts(path)
        prompt = named.get(path.stem, facts.get("prompt"))
        count = images_per_file or int(facts.get("pictures", 1))
        for part in range(count):
            yield Picture(path, prompt, (part, count) if count > 1 else None)


def _files(folder: Path) -> list[Path]:
    """Pictures in ``folder`` and below; what has a dot in front is none."""
    files = (path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and not path.name.startswith("."))
    return sorted(files)


def _lines(file: Path) -> list[dict[str, Any]]:
    try:
        values = [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n") if line.strip()]
    except ValueError as error:
        raise ValueError(f"{file} holds a line that is no JSON: {error}") from error
    if not all(isinstance(value, dict) for value in values):
        raise ValueError(f"{file} holds a line that is no object of JSON")
    return values


def _facts(path: Path) -> dict[str, Any]:
    """What ``apex-fast generate`` wrote into the picture; empty for pictures of others."""
    if path.suffix.lower() != ".png":
        return {}
    pil = require("PIL.Image", extra="train")
    try:
        with pil.open(path) as file:
            found = json.loads(file.info.get(FACTS, "{}"))
    except (OSError, SyntaxError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


# ---- networks that measure

Features = Callable[[Sequence[Any]], Tensor]
"""PIL pictures to ``[N, D]`` on the CPU."""


class ClipScore:
    """CLIP scores by a local ``CLIPModel``.

    Args:
        folder: as ``save_pretrained`` writes it, with its tokenizer and image processor.
        device: to compute on.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: it holds no CLIP model.
    """

    def __init__(self, folder: str | Path, device: torch.device | str = "cpu") -> None:
        transformers = require("transformers", extra="train")
        self.device = torch.device(device)
        kind = _config_of(folder, "--clip-model").get("model_type")
        if kind != "clip":
            raise ValueError(f"--clip-model: {folder} holds a model of the type {kind!r}, expected 'clip'")
        self.model = _whole(transformers.CLIPModel, folder, "--clip-model").to(self.device)
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
        self.processor = _image_processor(folder)
        self.cut = 0
        """Texts seen so far that were longer than the model reads, and were cut."""

    @torch.no_grad()
    def __call__(self, pictures: Sequence[Any], prompts: Sequence[str]) -> Tensor:
        """``[N]`` scores, fp32 on the CPU, of PIL pictures for their prompts."""
        length = self.model.config.text_config.max_position_embeddings
        whole = self.tokenizer(list(prompts))["input_ids"]
        self.cut += sum(len(ids) > length for ids in whole)
        texts = self.tokenizer(list(prompts), padding=True, truncation=True, max_length=length, return_tensors="pt")
        pixels = self.processor(images=list(pictures), return_tensors="pt")["pixel_values"]
        found = self.model(
            input_ids=texts["input_ids"].to(self.device),
            attention_mask=texts["attention_mask"].to(self.device),
            pixel_values=pixels.to(self.device, self.model.dtype),
        )
        cosine = F.cosine_similarity(found.image_embeds.float(), found.text_embeds.float())
        return cosine.clamp(min=0).mul(100).cpu()


def inception_features(file: str | Path, device: torch.device | str = "cpu") -> Features:
    """The features that FID is defined by, from the TorchScript file of the network.

    Args:
        file: called as ``network(images, return_features=True)`` with uint8 ``[N, 3, H, W]`` of any size, it returns
            ``[N, D]``; ``inception-2015-12-05.pt`` is such a file.

    Raises:
        FileNotFoundError: the file is not there.
        ValueError: it is no TorchScript, or cannot be called so.
    """
    file = Path(file)
    if not file.is_file():
        raise FileNotFoundError(f"--fid-weights: {file} is not there; expected {INCEPTION}, the TorchScript file")
    try:
        network = torch.jit.load(str(file), map_location=device).eval()
    except RuntimeError as error:
        raise ValueError(
            f"--fid-weights: {file} cannot be read as TorchScript; expected {INCEPTION}, which holds the network "
            "itself, and no file of weights alone"
        ) from error

    @torch.no_grad()
    def features(pictures: Sequence[Any]) -> Tensor:
        found = []
        for picture in pictures:
            # One at a time: they may have different sizes, and the network resizes them itself.
            pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None]
            try:
                found.append(network(pixels.to(device), return_features=True).flatten(1).float().cpu())
            except RuntimeError as error:
                raise ValueError(
                    f"--fid-weights: {file} cannot be called with uint8 pictures [N, 3, H, W] and "
                    f"return_features=True, as {INCEPTION} is: {str(error).strip().splitlines()[-1]}"
                ) from error
        return torch.cat(found)

    return features


def vision_features(folder: str | Path, device: torch.device | str = "cpu") -> Features:
    """Features of a local vision model of transformers: of CLIP its picture embedding before normalisation, of others
    their pooled output, or the first token where they have none.

    Raises:
        FileNotFoundError: there is no such folder.
    """
    transformers = require("transformers", extra="train")
    is_clip = _config_of(folder, "--fid-model").get("model_type") == "clip"
    model = _whole(transformers.CLIPModel if is_clip else transformers.AutoModel, folder, "--fid-model").to(device)
    processor = _image_processor(folder)

    @torch.no_grad()
    def features(pictures: Sequence[Any]) -> Tensor:
        pixels = processor(images=list(pictures), return_tensors="pt")["pixel_values"].to(device, model.dtype)
        if is_clip:
            return model.visual_projection(model.vision_model(pixel_values=pixels).pooler_output).float().cpu()
        found = model(pixel_values=pixels)
        pooled = getattr(found, "pooler_output", None)
        return (found.last_hidden_state[:, 0] if pooled is None else pooled.flatten(1)).float().cpu()

    return features


def _whole(cls: Any, folder: str | Path, option: str) -> Any:
    """The model in ``folder`` in eval mode, all of its weights from there: transformers gives what a folder lacks
    random values, and the numbers of such a network would mean nothing."""
    model, loaded = cls.from_pretrained(folder, local_files_only=True, output_loading_info=True)
    if absent := sorted(map(str, [*loaded["missing_keys"], *loaded["mismatched_keys"]])):
        raise ValueError(
            f"{option}: {folder} lacks weights that {type(model).__name__} has, or has them in other shapes, such as "
            f"{', '.join(absent[:3])}; give it a folder that this class saved"
        )
    return model.eval()


def _config_of(folder: str | Path, option: str) -> dict[str, Any]:
    file = Path(folder) / "config.json"
    if not file.is_file():
        raise FileNotFoundError(
            f"{option}: {folder} holds no config.json; expected the folder of a model on this machine, as "
            "save_pretrained writes it"
        )
    return json.loads(file.read_text(encoding="utf-8"))


def _image_processor(folder: str | Path) -> Any:
    transformers = require("transformers", extra="train")
    # The one that needs no torchvision; what it makes of a picture does not depend on what else is installed.
    return transformers.AutoImageProcessor.from_pretrained(folder, local_files_only=True, backend="pil")


# ---- scores


def features_of(features: Features, pictures: Sequence[Picture], batch_size: int = 16) -> Tensor:
    """``[N, D]`` of all pictures, read batch by batch."""
    parts = [pictures[i : i + batch_size] for i in range(0, len(pictures), batch_size)]
    return torch.cat([features([picture.read() for picture in part]) for part in parts])


def clip_score(score: ClipScore, pictures: Sequence[Picture], batch_size: int = 16) -> float:
    """Mean CLIP score of pictures for their prompts. ValueError for a picture whose prompt is not known."""
    unknown = next((picture.path for picture in pictures if picture.prompt is None), None)
    if unknown is not None:
        raise ValueError(
            f"a CLIP score needs the prompt of every picture, and nothing says that of {unknown}; give --prompts the "
            "folder of text files of the same names, or list pictures and texts in metadata.jsonl"
        )
    found = []
    for first in range(0, len(pictures), batch_size):
        part = pictures[first : first + batch_size]
        found.append(score([picture.read() for picture in part], [str(picture.prompt) for picture in part]))
    return torch.cat(found).double().mean().item()
