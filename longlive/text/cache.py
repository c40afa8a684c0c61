"""Embeddings are computed once: a cache on disk in front of a text encoder, and a small one in memory in front of that.

An entry is named by a hash of the encoder's fingerprint and the prompt, so that caches of several encoders can share a
folder and nothing ever has to be invalidated. It is one safetensors file, `ab/cd/abcd....safetensors`, that holds the
tokens up to the prompt's end (the rest is zero by contract) and a digest of their bytes. It is written under a
temporary name and renamed, so any number of processes may read and write one folder: at worst two compute the same
entry, and the later file replaces an equal one. An entry that cannot be read or fails its digest is computed again.
"""

import hashlib
import logging
import os
import uuid
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from longlive.text.base import TextEncoder, TextEncoderFactory, TokenEmbeds, with_padding, without_padding
from longlive.typing import Int, PromptEmbeds, Tensor

log = logging.getLogger(__name__)


class CachedTextEncoder(TextEncoder):
    """A text encoder that computes every prompt once, ever; only missing prompts reach the encoder, in one batch.

    Results are on the CPU, in the encoder's dtype. An encoder given as a factory is built at the first missing prompt,
    never if there is none. It is no submodule: it stays on its device, and out of checkpoints. One cache may be used by
    many processes, but one object by one thread.

    Args:
        encoder: the encoder, or a factory that knows its fingerprint.
        folder: where entries live; made at the first write.
        memory_bytes: how much of the most recently used embeddings to keep in memory.

    Raises:
        ValueError: if `folder` is a file or `memory_bytes` is negative.
    """

    def __init__(
        self, encoder: TextEncoder | TextEncoderFactory, folder: str | Path, memory_bytes: int = 256 * 2**20
    ) -> None:
        super().__init__()
        self._folder = Path(folder).expanduser()
        if self._folder.exists() and not self._folder.is_dir():
            raise ValueError(f"folder={folder} is a file; name a folder for the cached embeddings")
        if memory_bytes < 0:
            raise ValueError(f"memory_bytes={memory_bytes} is negative; use 0 to keep nothing in memory")
        self.embed_dim = encoder.embed_dim
        self.num_tokens = encoder.num_tokens
        self._fingerprint = encoder.fingerprint
        # In a list, where nn.Module does not find it.
        self._encoder: list[TextEncoder | TextEncoderFactory] = [encoder]
        self._memory = _RecentEmbeds(memory_bytes)

    @property
    def fingerprint(self) -> str:
        return self._fingerprint

    def encode(self, prompts: Sequence[str]) -> PromptEmbeds:
        """Embeddings `[len(prompts) num_tokens embed_dim]`, on the CPU."""
        found: dict[str, TokenEmbeds] = {}
        missing: list[str] = []
        for prompt in dict.fromkeys(prompts):
            embeds = self._memory.get(prompt)
            if embeds is None:
                embeds = self._read(prompt)
            if embeds is None:
                missing.append(prompt)
            else:
                found[prompt] = embeds
        if missing:
            for prompt, padded in zip(missing, self._built_encoder().encode(missing).cpu(), strict=True):
                found[prompt] = without_padding(padded)
                self._write(prompt, found[prompt])
        for prompt, embeds in found.items():
            self._memory.put(prompt, embeds)
        return with_padding((found[prompt] for prompt in prompts), self.num_tokens, self.embed_dim)

    def _built_encoder(self) -> TextEncoder:
        encoder = self._encoder[0]
        if isinstance(encoder, TextEncoderFactory):
            encoder = encoder.build()
            self._encoder[0] = encoder
        return encoder

    def _path(self, prompt: str) -> Path:
        # Captions from the wild may hold lone surrogates, which strict UTF-8 refuses.
        name = f"{self._fingerprint}\0{prompt}".encode("utf-8", "surrogatepass")
        key = hashlib.blake2b(name, digest_size=20).hexdigest()
        return self._folder / key[:2] / key[2:4] / f"{key}.safetensors"

    def _read(self, prompt: str) -> TokenEmbeds | None:
        path = self._path(prompt)
        try:
            with safe_open(path, framework="pt") as file:
                # A copy: what is kept in memory must not hang on a mapped file that a network drive may lose.
                embeds = file.get_tensor("embeds").clone()
                digest = (file.metadata() or {}).get("digest")
            if digest != _digest(embeds):
                raise ValueError("its bytes do not match its digest")
            if embeds.shape[1:] != (self.embed_dim,) or len(embeds) > self.num_tokens:
                raise ValueError(f"its shape is {tuple(embeds.shape)}")
        except FileNotFoundError:
            return None
        except (OSError, SafetensorError, ValueError) as error:
            log.warning("cached embedding %s is unusable and is computed again: %s", path, error)
            return None
        return embeds

    def _write(self, prompt: str, embeds: TokenEmbeds) -> None:
        path = self._path(prompt)
        # For the person who looks into the folder.
        readable = prompt.encode("utf-8", "replace").decode()
        metadata = {"digest": _digest(embeds), "prompt": readable, "fingerprint": self._fingerprint}
        temporary = path.with_name(f".{path.stem}.{uuid.uuid4().hex}.tmp")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                temporary.write_bytes(save({"embeds": embeds}, metadata))
                os.replace(temporary, path)
            finally:
                temporary.unlink(missing_ok=True)
        except OSError as error:
            log.warning("embedding was computed but could not be cached: %s", error)


class _RecentEmbeds:
    """The most recently used embeddings, up to a number of bytes."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._num_bytes = 0
        self._entries: OrderedDict[str, TokenEmbeds] = OrderedDict()

    def get(self, prompt: str) -> TokenEmbeds | None:
        if prompt not in self._entries:
            return None
        self._entries.move_to_end(prompt)
        return self._entries[prompt]

    def put(self, prompt: str, embeds: TokenEmbeds) -> None:
        if prompt in self._entries:
            self._entries.move_to_end(prompt)
            return
        self._entries[prompt] = embeds
        self._num_bytes += embeds.nbytes
        while self._num_bytes > self._max_bytes:
            self._num_bytes -= self._entries.popitem(last=False)[1].nbytes


def unique_prompts(prompts: Sequence[Sequence[str]]) -> tuple[list[str], Int[Tensor, "b p"]]:
    """The distinct prompts of a batch, in order of appearance, and for every place the index of its prompt.

    Args:
        prompts: `prompts[sample][place]`, as many places in every sample.

    Returns:
        `(distinct, index)` with `distinct[index[b, p]] == prompts[b][p]`; the index is int64 `[b p]`.

    Raises:
        ValueError: if there is no prompt, or samples have different numbers of prompts.
    """
    counts = {len(sample) for sample in prompts}
    if counts in (set(), {0}):
        raise ValueError("the batch has no prompt; give every sample at least one, which may be empty")
    if len(counts) > 1:
        raise ValueError(
            f"samples have different numbers of prompts, {sorted(counts)}; repeat prompts so that all have "
            f"{max(counts)}"
        )
    distinct: dict[str, int] = {}
    index = [[distinct.setdefault(prompt, len(distinct)) for prompt in sample] for sample in prompts]
    return list(distinct), torch.tensor(index, dtype=torch.int64)


def _digest(embeds: Tensor) -> str:
    return hashlib.blake2b(embeds.contiguous().view(torch.uint8).numpy().tobytes(), digest_size=16).hexdigest()
