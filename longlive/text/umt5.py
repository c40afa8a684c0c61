"""Wan's text encoder: transformers' UMT5 encoder and its tokenizer, read from a local folder, Wan's or diffusers'.

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
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import ftfy
import torch
from transformers import AutoTokenizer, UMT5EncoderModel

from longlive.text.base import TextEncoder, TextEncoderFactory
from longlive.text.umt5_weights import ORIGINAL_FILES, load_original, open_original
from longlive.typing import PromptEmbeds

_SAMPLE_BYTES = 1024
_TOKENIZER_FOLDERS = ("google/umt5-xxl", "tokenizer")
"""Wan's, diffusers'."""


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
        """Load from a folder at once; arguments and errors are those of `UMT5Factory`."""
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
    """The UMT5 encoder of a downloaded folder, not loaded yet.

    Attributes:
        folder: a download of Wan's kind, with `models_t5_umt5-xxl-enc-bf16.pth` and the tokenizer in
            `google/umt5-xxl/`; or of diffusers', with `text_encoder/` (`config.json`, `*.safetensors`) and `tokenizer/`
            (`tokenizer.json`).
        num_tokens: text tokens per prompt, 512 for Wan.
        dtype: dtype of the weights, of the work and of the embeddings.
        device: where the encoder is built and stays.

    Raises:
        ValueError: if the folder lacks one of its parts, holds weights of something else, or `num_tokens` is not
            positive.
    """

    folder: str | Path
    num_tokens: int = 512
    dtype: torch.dtype = torch.bfloat16
    device: torch.device | str = "cpu"

    def __post_init__(self) -> None:
        _checked_num_tokens(self.num_tokens)
        if self.original_file is not None:
            open_original(self.original_file)
        parts = () if self.original_file is not None else ("text_encoder/config.json", "text_encoder/*.safetensors")
        missing = [part for part in parts if not any(Path(self.folder).glob(part))]
        if self.tokenizer_folder is None:
            missing.append("tokenizer/tokenizer.json")
        if missing:
            raise ValueError(
                f"text encoder folder={self.folder} lacks {', '.join(missing)}; point it at a downloaded "
                f"Wan2.2-TI2V-5B (with {ORIGINAL_FILES} and {_TOKENIZER_FOLDERS[0]}/) or Wan2.2-TI2V-5B-Diffusers"
            )

    @cached_property
    def original_file(self) -> Path | None:
        """The weights, if they are in Wan's names.

        Raises:
            ValueError: if there are several.
        """
        found = sorted(Path(self.folder).glob(ORIGINAL_FILES))
        if len(found) > 1:
            raise ValueError(f"text encoder folder={self.folder} holds {len(found)} files {ORIGINAL_FILES}; leave one")
        return found[0] if found else None

    @cached_property
    def tokenizer_folder(self) -> Path | None:
        """Where `tokenizer.json` lies; None: nowhere."""
        folders = [Path(self.folder, name) for name in _TOKENIZER_FOLDERS]
        return next((folder for folder in folders if (folder / "tokenizer.json").is_file()), None)

    @cached_property
    def embed_dim(self) -> int:  # type: ignore[override]
        if self.original_file is not None:
            return int(open_original(self.original_file)[1].d_model)
        config = json.loads((Path(self.folder) / "text_encoder" / "config.json").read_text())
        return int(config["d_model"])

    @cached_property
    def fingerprint(self) -> str:
        """Names the folder's content, the dtype and the number of tokens.

        Hashed are: every byte of the encoder's `config.json` and of the tokenizer's files; and of each weight file its
        name, its size, its safetensors header (names, dtypes, shapes and places of all tensors), and 1 KiB from the
        start, the middle and the end of every tensor. So it takes milliseconds instead of the minute that 11 GB take,
        and still differs for other weights of the same shapes; only an edit of single values in the middle of tensors
        could escape it. A PyTorch file has checksums of all its tensors, and they are hashed instead. Paths and
        modification times do not count: copies of a folder share a cache.
        """
        digest = hashlib.blake2b(digest_size=16)
        digest.update(f"umt5/{self.dtype}/{self.num_tokens}".encode())
        folder = Path(self.folder)
        assert self.tokenizer_folder is not None
        files = sorted(path for path in self.tokenizer_folder.iterdir() if path.is_file())
        if self.original_file is None:
            files.insert(0, folder / "text_encoder" / "config.json")
        for path in files:
            content = path.read_bytes()
            digest.update(f"/{path.name}/{len(content)}/".encode())
            digest.update(content)
        for path in sorted((folder / "text_encoder").glob("*.safetensors")):
            digest.update(f"/{path.name}/{path.stat().st_size}/".encode())
            for sample in _weight_samples(path):
                digest.update(sample)
        if self.original_file is not None:
            digest.update(_checksums(self.original_file))
        return f"umt5-{digest.hexdigest()}"

    def build(self) -> UMT5TextEncoder:
        """Load weights and tokenizer.

        Raises:
            ValueError: if the weights are not those of the folder's configuration.
        """
        model: Any
        if self.original_file is not None:
            model = load_original(self.original_file, self.dtype)
        else:
            model = _read_transformers(Path(self.folder) / "text_encoder", self.dtype)
        tokenizer = AutoTokenizer.from_pretrained(self.tokenizer_folder, local_files_only=True)
        return UMT5TextEncoder(model.to(self.device), tokenizer, self.fingerprint, self.num_tokens)


def clean(prompt: str) -> str:
    """Wan's text cleaning: broken encodings repaired, HTML entities (also doubly escaped ones) resolved, one space."""
    return re.sub(r"\s+", " ", html.unescape(html.unescape(ftfy.fix_text(prompt)))).strip()


def _read_transformers(folder: Path, dtype: torch.dtype) -> UMT5EncoderModel:
    loaded: Any = UMT5EncoderModel.from_pretrained(
        folder, dtype=dtype, local_files_only=True, use_safetensors=True, output_loading_info=True
    )
    model: UMT5EncoderModel
    model, loading = loaded
    missing = set(loading["missing_keys"])
    # The token embedding has two names and files carry one or both. UMT5's configuration says that embeddings are not
    # tied (it means the output layer's), and then transformers leaves a missing name at random values.
    if missing == {"encoder.embed_tokens.weight"}:
        model.set_input_embeddings(model.shared)
    elif missing == {"shared.weight"}:
        model.set_input_embeddings(model.encoder.embed_tokens)
    elif missing:
        raise ValueError(
            f"the weights in {folder} are not those of its config.json: missing {sorted(missing)[:3]} (the first 3); "
            "download the folder again"
        )
    return model


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


def _checksums(path: Path) -> bytes:
    """Of everything in a PyTorch file: those that its zip directory has; a file older than that is read whole."""
    if not zipfile.is_zipfile(path):
        with path.open("rb") as file:
            return hashlib.file_digest(file, "blake2b").digest()
    with zipfile.ZipFile(path) as archive:
        # The first part of a name is the archive's own, and follows the file's.
        entries = [(entry.filename.partition("/")[2], entry.file_size, entry.CRC) for entry in archive.infolist()]
    return json.dumps(entries).encode()
