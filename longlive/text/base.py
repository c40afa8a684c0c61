"""The contract of a text encoder: prompts to embeddings of a fixed number of tokens."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence

import torch
from torch import nn

from longlive.typing import Float, PromptEmbeds, Tensor

TokenEmbeds = Float[Tensor, "token d"]
"""The tokens of one prompt up to its end."""


class TextEncoder(nn.Module, ABC):
    """Frozen prompts -> embeddings.

    Attributes:
        embed_dim: features of one text token.
        num_tokens: text tokens per prompt; longer prompts are cut, shorter ones are zero beyond their end.
    """

    embed_dim: int
    num_tokens: int

    @abstractmethod
    def encode(self, prompts: Sequence[str]) -> PromptEmbeds:
        """Embeddings `[len(prompts) num_tokens embed_dim]`, zero beyond each prompt's end."""

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """Names weights and settings: two encoders with one fingerprint give equal embeddings. Keys caches on disk."""


class TextEncoderFactory(ABC):
    """A text encoder that is not loaded yet: what is known of it without its weights, and how to get it.

    A run whose prompts are all cached never calls `build`, and so never loads the weights.

    Attributes:
        embed_dim: as of the encoder.
        num_tokens: as of the encoder.
    """

    embed_dim: int
    num_tokens: int

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """The fingerprint of the encoder that `build` returns."""

    @abstractmethod
    def build(self) -> TextEncoder:
        """Load the encoder."""


def without_padding(padded: Float[Tensor, "s d"]) -> TokenEmbeds:
    """The tokens of a prompt up to its end, in memory of their own."""
    used = padded.any(dim=-1).nonzero()
    length = int(used[-1]) + 1 if len(used) else 0
    # A copy: a slice would keep the whole batch alive.
    return padded[:length].clone()


def with_padding(prompts: Iterable[TokenEmbeds], num_tokens: int, embed_dim: int) -> PromptEmbeds:
    """Prompts of any length up to `num_tokens`, as an encoder returns them together."""
    entries = list(prompts)
    dtype = entries[0].dtype if entries else torch.float32
    padded = torch.zeros(len(entries), num_tokens, embed_dim, dtype=dtype)
    for row, embeds in zip(padded, entries, strict=True):
        row[: len(embeds)] = embeds
    return padded
