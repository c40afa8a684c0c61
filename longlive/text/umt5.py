"""Wan's text encoder: transformers' UMT5 encoder and its tokenizer, read from a local diffusers folder.

A prompt is cleaned as Wan cleans it (mojibake repaired by ftfy, HTML entities resolved, white space collapsed), cut or
padded to 512 tokens, encoded with the padding masked, and set to zero beyond its end. Wan's network then attends to all
512 tokens without a mask: the zeros are part of what it was trained on.

The weights of UMT5-XXL are 11 GB in bfloat16, so a run should load them only if it must: `UMT5Factory` knows everything
that a cache of embeddings needs to know, and loads nothing before `build`.
"""

from __future__ import annotations

import hashlib
import html
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import ftfy
import torch
from transformers import AutoTokenizer, UMT5EncoderModel

from longlive.text.base import TextEncoder, TextEncoderFactory
from longlive.typing import PromptEmbeds

_EMBEDDING_KEYS = {"shared.weight", "encoder.embed_tokens.weight"}
_SAMPLE_BYTES = 1024


class UMT5TextEncoder(TextEncoder):
    """Prompts -> UMT5 embeddings. Frozen, always in evaluation mode.

    Args:
        model: the encoder; its dtype and device are those of the embeddings.
        tokenizer: a transformers tokenizer with a padding token.
        fingerprint: names the weights, the tokenizer and the dtype; see `UMT5Factory.fingerprint`.
        num_tokens: text tokens per prompt, 512 for Wan.
    """

    def __init__(self, model: UMT5EncoderModel, tokenizer: Any, fingerprint: str, num_tokens: int = 512) -> None:
        super().__init__()
        self.embed_dim = int(model.config.d_model)
        self.num_tokens = _checked_num_tokens(num_tokens)
        self.model = model.requires_grad_(False)
        self.tokenizer = tokenizer
        self._fingerprint = fingerprint
        self.train(False)

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        num_tokens: int = 512,
        dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str = "cpu",
    ) -> UMT5TextEncoder:
        """Load from a diffusers folder at once; arguments and errors are those of `UMT5Factory`."""
        return UMT5Factory(folder, num_tokens, dtype, device).build()

    def train(self, mode: bool = True) -> UMT5TextEncoder:
        """Stays in evaluation mode, whatever the module that owns the encoder switches to."""
        return super().train(False)

    @property
    def fingerprint(self) -> str:
        return self._fingerprint

    def encode(self, prompts: Sequence[str]) -> PromptEmbeds:
        """Embeddings `[len(prompts) num_tokens embed_dim]` in the model's dtype, on its device."""
        device = self.model.device
        if not prompts:
            return torch.zeros(0, self.num_tokens, self.embed_dim, dtype=self.model.dtype, device=device)
        tokens = self.tokenizer(
            [clean(prompt) for prompt in prompts],
            padding="max_length",
            truncation=True,
            max_length=self.num_tokens,
            add_special_tokens=True,
            return_attention_mask=True,
            return_tensors="pt",
        )
        mask = tokens.attention_mask.to(device)
        # Autocast would make a prompt's embedding depend on the step that asked for it first.
        with torch.autocast(device.type, enabled=False):
            embeds = self.model(tokens.input_ids.to(device), attention_mask=mask).last_hidden_state
        return embeds.masked_fill(mask[..., None] == 0, 0.0)


@dataclass(frozen=True)
class UMT5Factory(TextEncoderFactory):
    """The UMT5 encoder of a diffusers folder, not loaded yet.

    Attributes:
        folder: a local pipeline folder with `text_encoder/` (`config.json`, `*.safetensors`) and
            `tokenizer/` (`tokenizer.json`).
        num_tokens: text tokens per prompt, 512 for Wan.
        dtype: dtype of the weights, of the work and of the embeddings.
        device: where the encoder is built and stays.

    Raises:
        ValueError: if the folder lacks one of its parts, or `num_tokens` is not positive.
    """

    folder: str | Path
    num_tokens: int = 512
    dtype: torch.dtype = torch.bfloat16
    device: torch.device | str = "cpu"

    def __post_init__(self) -> None:
        _checked_num_tokens(self.num_tokens)
        parts = ("text_encoder/config.json", "text_encoder/*.safetensors", "tokenizer/tokenizer.json")
        missing = [part for part in parts if not any(Path(self.folder).glob(part))]
        if missing:
            raise ValueError(
                f"text encoder folder={self.folder} lacks {', '.join(missing)}; point it at a downloaded diffusers "
                "folder such as Wan2.2-TI2V-5B-Diffusers"
            )

    @cached_property
    def embed_dim(self) -> int:  # type: ignore[override]
        config = json.loads((Path(self.folder) / "text_encoder" / "config.json").read_text())
        return int(config["d_model"])

    @cached_property
    def fingerprint(self) -> str:
        """Names the folder's content, the dtype and the number of tokens.

        Hashed are: every byte of the encoder's `config.json` and of the tokenizer's files; and of each weight file its
        name, its size, its safetensors header (names, dtypes, shapes and places of all tensors), and 1 KiB from the
        start, the middle and the end of every tensor. So it takes milliseconds instead of the minute that 11 GB take,
        and still differs for other weights of the same shapes; only an edit of single values in the middle of tensors
        could escape it. Paths and modification times do not count: copies of a folder share a cache.
        """
        digest = hashlib.blake2b(digest_size=16)
        digest.update(f"umt5/{self.dtype}/{self.num_tokens}".encode())
        folder = Path(self.folder)
        tokenizer_files = sorted(path for path in (folder / "tokenizer").iterdir() if path.is_file())
        for path in (folder / "text_encoder" / "config.json", *tokenizer_files):
            content = path.read_bytes()
            digest.update(f"/{path.name}/{len(content)}/".encode())
            digest.update(content)
        for path in sorted((folder / "text_encoder").glob("*.safetensors")):
            digest.update(f"/{path.name}/{path.stat().st_size}/".encode())
            for sample in _weight_samples(path):
                digest.update(sample)
        return f"umt5-{digest.hexdigest()}"

    def build(self) -> UMT5TextEncoder:
        """Load weights and tokenizer.

        Raises:
            ValueError: if the weights are not those of the folder's configuration.
        """
        folder = Path(self.folder)
        loaded: Any = UMT5EncoderModel.from_pretrained(
            folder / "text_encoder",
            dtype=self.dtype,
            local_files_only=True,
            use_safetensors=True,
            output_loading_info=True,
        )
        model, loading = loaded
        missing = set(loading["missing_keys"])
        # The token embedding has two names and files carry one or both. UMT5's configuration says that embeddings are
        # not tied (it means the output layer's), and then transformers leaves a missing name at random values.
        if missing == {"encoder.embed_tokens.weight"}:
            model.set_input_embeddings(model.shared)
        elif missing == {"shared.weight"}:
            model.set_input_embeddings(model.encoder.embed_tokens)
        elif missing:
            raise ValueError(
                f"the weights in {folder / 'text_encoder'} are not those of its config.json: missing "
                f"{sorted(missing)[:3]} (the first 3); download the folder again"
            )
        tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True)
        return UMT5TextEncoder(model.to(self.device), tokenizer, self.fingerprint, self.num_tokens)


def clean(prompt: str) -> str:
    """Wan's text cleaning: broken encodings repaired, HTML entities (also doubly escaped ones) resolved, one space."""
    return re.sub(r"\s+", " ", html.unescape(html.unescape(ftfy.fix_text(prompt)))).strip()


def _checked_num_tokens(num_tokens: int) -> int:
    if num_tokens < 1:
        raise ValueError(f"num_tokens={num_tokens} leaves no room for a prompt; use 512, as Wan does")
    return num_tokens


def _weight_samples(path: Path) -> list[bytes]:
    """The header of a safetensors file, and the start, the middle and the end of every tensor in it."""
    with path.open("rb") as file:
        length = file.read(8)
        header = file.read(int.from_bytes(length, "little"))
        samples = [header]
        begin_of_data = file.tell()
        tensors = json.loads(header)
        tensors.pop("__metadata__", None)
        for name in sorted(tensors):
            begin, end = tensors[name]["data_offsets"]
            for offset in (begin, (begin + end) // 2, end - _SAMPLE_BYTES):
                file.seek(begin_of_data + max(offset, begin))
                samples.append(file.read(min(_SAMPLE_BYTES, end - begin)))
    return samples
