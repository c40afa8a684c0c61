"""Text without a text model: every word is a fixed random vector, plus a small code of its place in the sentence.

    token i of a prompt = word vector (standard normal, named by the word) + position_weight * sinusoid(i)

Random vectors of 64 dims are almost orthogonal, so a network tells the few words of the toy world apart at once, while
the position code keeps "red over blue" and "blue over red" different. Nothing is learned and nothing is stored: the
vectors follow from the word by hashing, on every machine and in every process.
"""

import hashlib
import math
import re
from collections.abc import Sequence

import torch

from longlive import rng
from longlive.text.base import TextEncoder
from longlive.typing import Float, PromptEmbeds, Tensor

_WORD = re.compile(r"[^\W_]+(?:'[^\W_]+)*")


class ToyTextEncoder(TextEncoder):
    """Deterministic word embeddings; case and punctuation do not count, an empty prompt is all zeros.

    Args:
        embed_dim: features of a text token; even.
        num_tokens: tokens of a prompt, one per word; further words are cut.
        position_weight: amplitude of the position code beside word vectors of unit variance.
        seed: names the set of word vectors.

    Raises:
        ValueError: if `embed_dim` is not a positive even number or `num_tokens` is not positive.
    """

    def __init__(self, embed_dim: int = 64, num_tokens: int = 16, position_weight: float = 0.25, seed: int = 0) -> None:
        super().__init__()
        if embed_dim < 2 or embed_dim % 2:
            raise ValueError(
                f"embed_dim={embed_dim} is not a positive even number, which the sine and cosine position code needs; "
                f"use {max(2, embed_dim + embed_dim % 2)}"
            )
        if num_tokens < 1:
            raise ValueError(f"num_tokens={num_tokens} leaves no room for a word; use 1 or more")
        self.embed_dim = embed_dim
        self.num_tokens = num_tokens
        self.position_weight = position_weight
        self.seed = seed
        self._word_vectors: dict[str, Tensor] = {}

    def encode(self, prompts: Sequence[str]) -> PromptEmbeds:
        """Embeddings `[len(prompts) num_tokens embed_dim]`, float32 on the CPU."""
        embeds = torch.zeros(len(prompts), self.num_tokens, self.embed_dim)
        position_code = self.position_weight * sinusoid(self.num_tokens, self.embed_dim)
        for prompt_embeds, prompt in zip(embeds, prompts, strict=True):
            for position, word in enumerate(words(prompt)[: self.num_tokens]):
                prompt_embeds[position] = self._word_vector(word) + position_code[position]
        return embeds

    @property
    def fingerprint(self) -> str:
        return f"toy-{self.embed_dim}-{self.num_tokens}-{self.position_weight}-{self.seed}"

    def _word_vector(self, word: str) -> Tensor:
        if word not in self._word_vectors:
            # blake2, because Python's hash() of a string differs between processes.
            digest = hashlib.blake2b(word.encode(), digest_size=8).digest()
            generator = rng.generator(self.seed, "toy_text", sample=int.from_bytes(digest, "little"))
            self._word_vectors[word] = torch.randn(self.embed_dim, generator=generator)
        return self._word_vectors[word]


def words(prompt: str) -> list[str]:
    """The words of a prompt, lower case, without punctuation: `"A red circle!"` -> `["a", "red", "circle"]`."""
    return _WORD.findall(prompt.lower())


def sinusoid(num_positions: int, dim: int) -> Float[Tensor, "position dim"]:
    """Sine and cosine position code, wavelengths from 2 pi to 10000 * 2 pi (Vaswani et al. 2017, section 3.5)."""
    frequencies = torch.exp(torch.arange(0, dim, 2) * (-math.log(10000.0) / dim))
    angles = torch.arange(num_positions)[:, None] * frequencies
    return torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(1)
