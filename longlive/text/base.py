"""The contract of a text encoder: prompts to embeddings of a fixed number of tokens."""

from abc import ABC, abstractmethod
from collections.abc import Sequence

from torch import nn

from longlive.typing import PromptEmbeds


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
