"""A small text encoder of the model's own: for models that are made from scratch, in pixel space, and trained whole."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from apex_fast.condition import Condition
from apex_fast.extras import require


class OwnText(nn.Module):
    """A transformers encoder and its tokenizer.

    Args:
        text_encoder: a transformers encoder whose output has ``last_hidden_state`` [B, L, D]; it is frozen on arrival.
        tokenizer: ``transformers.PreTrainedTokenizerFast`` with a padding token.
        max_sequence_length: tokens that every prompt is padded or cut to.
    """

    def __init__(self, text_encoder: nn.Module, tokenizer: Any, *, max_sequence_length: int = 16) -> None:
        super().__init__()
        self.text_encoder = text_encoder.requires_grad_(False).eval()
        self.tokenizer = tokenizer
        self.max_sequence_length = max_sequence_length

    @classmethod
    def from_config(
        cls,
        text_encoder: dict[str, Any],
        prompts: Iterable[str],
        *,
        vocab_size: int = 384,
        max_sequence_length: int = 16,
    ) -> OwnText:
        """A T5 encoder with random weights from the global random state.

        Args:
            text_encoder: arguments of ``transformers.T5Config`` (``vocab_size`` is set from the tokenizer).
            prompts: text that the byte-level BPE tokenizer is trained on; words outside it fall into pieces, down to
                bytes, so any text encodes.
            vocab_size: upper bound of the vocabulary, at least 259 (256 bytes and three special tokens).
        """
        transformers = require("transformers", extra="train")
        tokenizer = _train_tokenizer(prompts, vocab_size)
        config = transformers.T5Config(
            **text_encoder,
            vocab_size=len(tokenizer),
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
        return cls(transformers.T5EncoderModel(config), tokenizer, max_sequence_length=max_sequence_length)

    @property
    def width(self) -> int:
        """Channels D of the embeddings."""
        return self.text_encoder.config.hidden_size

    def encode(self, prompts: list[str], *, requires_grad: bool = False) -> Condition:
        """Embeddings [B, L, D] in the encoder's dtype with a bool mask [B, L], L = max_sequence_length.

        The empty prompt is the end token alone and serves as the negative condition of guidance.
        """
        tokens = self.tokenizer(
            prompts, padding="max_length", max_length=self.max_sequence_length, truncation=True, return_tensors="pt"
        )
        device = self.text_encoder.device
        ids, mask = tokens["input_ids"].to(device), tokens["attention_mask"].to(device)
        with torch.set_grad_enabled(requires_grad and torch.is_grad_enabled()):
            embeds = self.text_encoder(input_ids=ids, attention_mask=mask).last_hidden_state
        return Condition(embeds, mask.bool())

    def save_pretrained(self, folder: Path) -> None:
        """Writes ``text_encoder/`` and ``tokenizer/`` into ``folder``."""
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
