"""What a rollout is between two chunks: its cache, and the latents that the cache was made from."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch

from longlive.models.visibility import VisibilityRule, visible_history
from longlive.rollout.cache import KeyValueCache
from longlive.typing import Latents


@dataclass(frozen=True)
class Past:
    """Finished chunks that a later one may see.

    Samples with other cuts see other chunks, but equally many of them (`sinks.py`).

    Attributes:
        chunks: per sample their indices in the video, ascending.
        latents: of these chunks, clean and detached.
    """

    chunks: tuple[tuple[int, ...], ...]
    latents: Latents

    @classmethod
    def empty(cls, num_samples: int, latent_shape: tuple[int, int, int], device: torch.device) -> Past:
        """Before the first chunk."""
        return cls(((),) * num_samples, torch.zeros(num_samples, 0, *latent_shape, device=device))

    @property
    def num_chunks(self) -> int:
        """Of every sample."""
        return len(self.chunks[0])

    def chunk(self, place: int) -> Latents:
        """The latents of every sample's chunk at a place of the list."""
        return self.latents.tensor_split(self.num_chunks, dim=1)[place]

    def of(self, chunks: Sequence[Sequence[int]]) -> Past:
        """Some of these chunks, as many of each sample."""
        kept = tuple(map(tuple, chunks))
        if kept == self.chunks:
            return self
        places = [[mine.index(c) for c in wanted] for mine, wanted in zip(self.chunks, kept, strict=True)]
        index = torch.tensor(places, dtype=torch.int64, device=self.latents.device)
        samples = torch.arange(len(kept), device=self.latents.device)[:, None]
        by_chunk = self.latents.unflatten(1, (self.num_chunks, -1))
        return Past(kept, by_chunk[samples, index].flatten(1, 2))

    def and_then(self, chunk: int, latents: Latents) -> Past:
        """With one more chunk of every sample."""
        chunks = tuple((*mine, chunk) for mine in self.chunks)
        return Past(chunks, torch.cat([self.latents, latents.detach().to(self.latents)], dim=1))


@dataclass
class RolloutState:
    """A rollout between two chunks: all that the next one needs.

    Attributes:
        cache: keys and values of earlier chunks.
        past: the chunks that are in it. Of those that nobody sees any more it keeps none.
        seed, sample_ids, step, purpose: name the noise.
        latent_shape: (channels, height, width).
        shot_index: per sample the shots so far.
        prompts: per sample the prompts so far, as indices into one list that a rollout is given throughout.
        next_chunk: index of the chunk to come.
        recaches: chunks before which the cache is rebuilt wherever the prompts of these samples switch: ranks that
            share a network must all run it equally often.
    """

    cache: KeyValueCache
    past: Past
    seed: int
    sample_ids: tuple[int, ...]
    latent_shape: tuple[int, int, int]
    shot_index: list[list[int]]
    prompts: list[list[int]]
    next_chunk: int = 0
    step: int = 0
    purpose: str = "rollout"
    recaches: Collection[int] = ()

    def enter(self, prompts: Sequence[int], shots: Sequence[int], rule: VisibilityRule) -> None:
        """Give every sample its prompt and shot in the next chunk, and drop of the past what nobody sees any more."""
        self.prompts, self.shot_index = (
            [[*row[: self.next_chunk], value] for row, value in zip(rows, values, strict=True)]
            for rows, values in ((self.prompts, prompts), (self.shot_index, shots))
        )
        self.past = self.past.of([visible_history(self.next_chunk, row, rule) for row in self.shot_index])
