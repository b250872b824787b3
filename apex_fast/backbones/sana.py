"""SANA: the unmodified ``diffusers.SanaTransformer2DModel`` behind the library's velocity convention.

SANA predicts noise minus data at timestep 1000 t (times ``config.timestep_scale``), which is the library's own sign;
it reads text by cross-attention with a padding mask, after its own projection and RMS norm, so a condition shift on
the text embedding passes an MLP and is seen.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from apex_fast.condition import Condition
from apex_fast.extras import require

_INDEX = "model_index.json"
_PARTS = ("transformer", "text_encoder", "tokenizer")


class SanaBackbone(nn.Module):
    """A SANA transformer with its text encoder and tokenizer.

    The module itself is the velocity callable. All three parts are plain diffusers and transformers objects,
    reachable as ``.transformer``, ``.text_encoder`` and ``.tokenizer``; the text encoder is frozen on arrival.

    transformer: ``diffusers.SanaTransformer2DModel``.
    text_encoder: a transformers encoder whose output has ``last_hidden_state`` [B, L, caption_channels].
    tokenizer: ``transformers.PreTrainedTokenizerFast`` with a padding token.
    max_sequence_length: tokens that every prompt is padded or cut to.
    guidance: the embedded guidance of guidance-distilled weights (``config.guidance_embeds``); such weights cannot
    run without it.
    """

    def __init__(
        self,
        transformer: nn.Module,
        text_encoder: nn.Module,
        tokenizer: Any,
        *,
        max_sequence_length: int = 16,
        guidance: float | None = None,
    ) -> None:
        super().__init__()
        if transformer.config.guidance_embeds and guidance is None:
            raise ValueError(
                "SanaBackbone: these weights embed the guidance scale (config.guidance_embeds); "
                "pass guidance=, e.g. guidance=4.5"
            )
        if guidance is not None and not transformer.config.guidance_embeds:
            raise ValueError(
                "SanaBackbone: guidance= is for weights that embed the guidance scale, and config.guidance_embeds is "
                "false; guide the sampler with guidance_scale= instead"
            )
        width, expected = text_encoder.config.hidden_size, transformer.config.caption_channels
        if width != expected:
            raise ValueError(
                f"SanaBackbone: the transformer expects text of width {expected} (config.caption_channels), "
                f"the text encoder gives {width}"
            )
        self.transformer = transformer
        self.text_encoder = text_encoder.requires_grad_(False).eval()
        self.tokenizer = tokenizer
        self.max_sequence_length = max_sequence_length
        self.guidance = guidance

    # ---- construction

    @classmethod
    def from_config(
        cls,
        transformer: dict[str, Any],
        text_encoder: dict[str, Any],
        prompts: Iterable[str],
        *,
        vocab_size: int = 384,
        max_sequence_length: int = 16,
        seed: int = 0,
    ) -> SanaBackbone:
        """A new model with random weights: what a start is trained from.

        transformer: arguments of ``diffusers.SanaTransformer2DModel``.
        text_encoder: arguments of ``transformers.T5Config`` (``vocab_size`` is set from the tokenizer).
        prompts: text that the byte-level BPE tokenizer is trained on; words outside it fall into pieces, down to
        bytes, so any text encodes.
        vocab_size: upper bound of the vocabulary, at least 259 (256 bytes and three special tokens).
        seed: of the weights. The global random state is left as it was.
        """
        diffusers = require("diffusers", extra="train")
        transformers = require("transformers", extra="train")
        tokenizer = _train_tokenizer(prompts, vocab_size)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = diffusers.SanaTransformer2DModel(**transformer)
            config = transformers.T5Config(
                **text_encoder,
                vocab_size=len(tokenizer),
                pad_token_id=tokenizer.pad_token_id,
                eos_token_id=tokenizer.eos_token_id,
            )
            encoder = transformers.T5EncoderModel(config)
        return cls(model, encoder, tokenizer, max_sequence_length=max_sequence_length)

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, *, dtype: torch.dtype = torch.float32, guidance: float | None = None
    ) -> SanaBackbone:
        """Load what :meth:`save_pretrained` wrote. Reads safetensors only, never a pickle, and never the network.

        folder: holds ``model_index.json`` and the folders ``transformer``, ``text_encoder`` and ``tokenizer``.
        dtype: of transformer and text encoder, whatever they were stored in.

        Raises FileNotFoundError that names what is missing, ValueError for a folder of another kind.
        """
        folder = Path(folder)
        index = _read_index(folder)
        diffusers = require("diffusers", extra="train")
        transformers = require("transformers", extra="train")
        encoder_name = index["text_encoder"][1]
        encoder_class = getattr(transformers, encoder_name, None)
        if encoder_class is None:
            raise ValueError(
                f"SanaBackbone.from_pretrained: {folder / _INDEX} names the text encoder {encoder_name!r}, which "
                f"transformers {transformers.__version__} does not have"
            )
        safe = {"use_safetensors": True, "local_files_only": True}
        transformer = diffusers.SanaTransformer2DModel.from_pretrained(
            folder / "transformer", torch_dtype=dtype, **safe
        )
        text_encoder = encoder_class.from_pretrained(folder / "text_encoder", dtype=dtype, **safe)
        tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(folder / "tokenizer", local_files_only=True)
        length = int(index.get("max_sequence_length", 16))
        return cls(transformer, text_encoder, tokenizer, max_sequence_length=length, guidance=guidance)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write ``model_index.json``, ``transformer/``, ``text_encoder/`` and ``tokenizer/`` in the layout of a
        diffusers pipeline.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.transformer.save_pretrained(folder / "transformer", safe_serialization=True)
        self.text_encoder.save_pretrained(folder / "text_encoder")
        self.tokenizer.save_pretrained(folder / "tokenizer")
        index = {
            "_class_name": type(self).__name__,
            "transformer": ["diffusers", type(self.transformer).__name__],
            "text_encoder": ["transformers", type(self.text_encoder).__name__],
            "tokenizer": ["transformers", "PreTrainedTokenizerFast"],
            "max_sequence_length": self.max_sequence_length,
        }
        # Last, so that a folder with an index is a complete one.
        (folder / _INDEX).write_text(json.dumps(index, indent=2) + "\n")

    def __deepcopy__(self, memo: dict[int, Any]) -> SanaBackbone:
        # A frozen or averaged copy for the real branch needs its own transformer only: a frozen text encoder
        # (billions of parameters in the large models) is shared. One that is being trained is copied like the rest.
        shared = {id(self.tokenizer): self.tokenizer}
        if not any(p.requires_grad for p in self.text_encoder.parameters()):
            shared[id(self.text_encoder)] = self.text_encoder
        memo.update(shared)
        copied = self.__class__.__new__(self.__class__)
        memo[id(self)] = copied
        copied.__dict__.update({key: copy.deepcopy(value, memo) for key, value in self.__dict__.items()})
        return copied

    # ---- use

    @property
    def sample_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of one sample of the size that the model was built for."""
        config = self.transformer.config
        return config.in_channels, config.sample_size, config.sample_size

    def forward(self, x_t: Tensor, t: Tensor, condition: Condition | Tensor) -> Tensor:
        """Velocity, noise minus data (Eq. 3), in the dtype of the transformer.

        x_t: [B, C, H, W], any float dtype. t: [B], fp32 or fp64, 1 is noise; it reaches the time embedding unrounded.
        condition: text embeddings [B, L, D]; a plain Tensor counts every token, a Condition those that its mask keeps.
        """
        if not isinstance(condition, Condition):
            condition = Condition(condition)
        embeds, mask = condition.prompt_embeds, condition.prompt_embeds_mask
        if embeds.dim() != 3 or embeds.shape[0] != x_t.shape[0] or t.shape != (x_t.shape[0],):
            raise ValueError(
                "SanaBackbone: expected x_t [B, C, H, W], t [B] and prompt_embeds [B, L, D] of one batch size, "
                f"got {list(x_t.shape)}, {list(t.shape)} and {list(embeds.shape)}"
            )
        config, dtype = self.transformer.config, self.transformer.dtype
        guidance = None
        if self.guidance is not None:
            guidance = torch.full_like(t, self.guidance * config.guidance_embeds_scale)
        return self.transformer(
            x_t.to(dtype),
            encoder_hidden_states=embeds.to(dtype),
            encoder_attention_mask=None if mask is None else mask.ne(0),
            timestep=t * (1000.0 * config.timestep_scale),
            guidance=guidance,
            return_dict=False,
        )[0]

    def encode(self, prompts: list[str], *, requires_grad: bool = False) -> Condition:
        """Text embeddings of ``prompts``: [B, L, D] in the text encoder's dtype with a bool mask [B, L], L =
        max_sequence_length.

        The empty prompt is the end token alone and serves as the negative condition of guidance. ``requires_grad``
        keeps the graph, for a start that trains the text encoder along (unfreeze it first).
        """
        if isinstance(prompts, str):
            raise TypeError("SanaBackbone.encode: expected a list of prompts, got one string; write [prompt]")
        tokens = self.tokenizer(
            list(prompts),
            padding="max_length",
            max_length=self.max_sequence_length,
            truncation=True,
            return_tensors="pt",
        )
        device = self.text_encoder.device
        ids, mask = tokens["input_ids"].to(device), tokens["attention_mask"].to(device)
        with torch.set_grad_enabled(requires_grad and torch.is_grad_enabled()):
            embeds = self.text_encoder(input_ids=ids, attention_mask=mask).last_hidden_state
        return Condition(embeds, mask.bool())


def _train_tokenizer(prompts: Iterable[str], vocab_size: int) -> Any:
    tokenizers = require("tokenizers", extra="train")
    transformers = require("transformers", extra="train")
    special = ["<pad>", "</s>", "<unk>"]
    if vocab_size < 256 + len(special):
        raise ValueError(
            f"vocab_size must be at least {256 + len(special)} (every byte and three special tokens), got {vocab_size}"
        )
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="<unk>"))
    tokenizer.normalizer = tokenizers.normalizers.Sequence(
        [tokenizers.normalizers.NFKC(), tokenizers.normalizers.Lowercase(), tokenizers.normalizers.Strip()]
    )
    # A prefix space makes "seven" the same token at the start of a prompt as inside it.
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(list(prompts), trainer)
    end = tokenizer.token_to_id("</s>")
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", end)]
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )


def _read_index(folder: Path) -> dict[str, Any]:
    layout = (
        f"a folder with {_INDEX}, {', '.join(part + '/' for part in _PARTS)}, as SanaBackbone.save_pretrained writes it"
    )
    if not folder.is_dir():
        raise FileNotFoundError(f"SanaBackbone.from_pretrained: {folder} is not a folder; expected {layout}")
    path = folder / _INDEX
    if not path.is_file():
        raise FileNotFoundError(f"SanaBackbone.from_pretrained: {path} is missing; expected {layout}")
    try:
        index = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"SanaBackbone.from_pretrained: {path} is not valid JSON ({error})") from error
    if not isinstance(index, dict) or index.get("_class_name") != SanaBackbone.__name__:
        kind = index.get("_class_name") if isinstance(index, dict) else type(index).__name__
        raise ValueError(f"SanaBackbone.from_pretrained: {path} describes {kind!r}, expected 'SanaBackbone': {layout}")
    for part in _PARTS:
        if part not in index or not (folder / part).is_dir():
            raise FileNotFoundError(f"SanaBackbone.from_pretrained: {folder / part} is missing; expected {layout}")
    for part in _PARTS[:2]:
        if not list((folder / part).glob("*.safetensors")):
            raise FileNotFoundError(
                f"SanaBackbone.from_pretrained: no .safetensors file in {folder / part}; other weight formats are not "
                "read because loading them can run code"
            )
    return index
