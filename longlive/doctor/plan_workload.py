"""What one call of the network is: tokens, frames and attention entries, per rank of a sequence group.

`Workload` is teacher forcing on a micro-batch, by the same tables that training uses: `parallel.layout` says who owns
what, `models.visibility` who sees whom. `ChunkWorkload` is a call on one chunk of a rollout (`rollout.split`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from longlive.models.visibility import (
    Rectangle,
    Role,
    VisibilityRule,
    count_entries,
    count_useful_entries,
    rectangles,
)
from longlive.models.wan.config import WanConfig
from longlive.parallel.layout import SequenceLayout, check_heads


@runtime_checkable
class Work(Protocol):
    """What a plan asks of a call."""

    @property
    def model(self) -> WanConfig: ...

    @property
    def text_tokens(self) -> int: ...

    @property
    def size(self) -> int: ...

    @property
    def num_prompts(self) -> int: ...

    @property
    def useful_entries(self) -> int: ...

    def frames(self, rank: int) -> int: ...

    def tokens(self, rank: int) -> int: ...

    def prompt_rows(self, rank: int) -> int: ...

    def key_tokens(self, only_joined: bool) -> int: ...


@dataclass(frozen=True)
class Workload:
    """A micro-batch as the ranks of one sequence group share it.

    Attributes:
        model: sizes of the network.
        layout: who owns which copies of the chunks.
        rule: window and sinks.
        batch_size: clips per data rank.
        num_chunks: of a clip.
        chunk_frames: frames per chunk.
        height, width: of a latent frame.
        text_tokens: tokens of a prompt.
        given_frames: first frames of a clip that bear no loss.

    Raises:
        ValueError: if the ranks do not divide the heads, or patches do not tile a frame.
    """

    model: WanConfig
    layout: SequenceLayout
    rule: VisibilityRule
    batch_size: int
    num_chunks: int
    chunk_frames: int
    height: int
    width: int
    text_tokens: int
    given_frames: int = 0

    def __post_init__(self) -> None:
        check_heads(self.model.num_heads, self.size)
        self.model.patches(self.height, self.width)

    @property
    def size(self) -> int:
        """Ranks that share a clip."""
        return self.layout.size

    @property
    def num_frames(self) -> int:
        """Frames of a clip, each counted once."""
        return self.num_chunks * self.chunk_frames

    @property
    def tokens_per_frame(self) -> int:
        return self.model.tokens_per_frame(self.height, self.width)

    @property
    def tokens_per_chunk(self) -> int:
        return self.chunk_frames * self.tokens_per_frame

    def frames(self, rank: int) -> int:
        """Frames in a rank's sequence, clean and noisy, over its micro-batch."""
        return self.batch_size * len(self.layout.pieces[rank]) * self.chunk_frames

    def tokens(self, rank: int) -> int:
        """Tokens in a rank's sequence, over its micro-batch."""
        return self.frames(rank) * self.tokens_per_frame

    def loss_tokens(self, rank: int) -> int:
        """Those of them that are noisy targets and not given, and so bear loss (if no frame is padding)."""
        starts = [chunk * self.chunk_frames for chunk in self.layout.of_role(rank, Role.NOISY)]
        frames = sum(self.chunk_frames - min(max(self.given_frames - start, 0), self.chunk_frames) for start in starts)
        return self.batch_size * frames * self.tokens_per_frame

    def prompt_rows(self, rank: int) -> int:
        """Prompts that a rank's queries attend to, one for every piece."""
        return self.batch_size * len(self.layout.pieces[rank])

    @property
    def num_prompts(self) -> int:
        """Distinct prompts of a micro-batch: one per chunk, the most there can be."""
        return self.batch_size * self.num_chunks

    @property
    def _one_shot(self) -> tuple[int, ...]:
        return (0,) * self.num_chunks

    @property
    def useful_entries(self) -> int:
        """Attention scores of one head that visibility asks for, in the micro-batch."""
        segments = self.layout.delivered(self.tokens_per_chunk)
        return self.batch_size * count_useful_entries(segments, self._one_shot, self.rule)

    @property
    def entries(self) -> int:
        """Attention scores of one head if every token saw every token."""
        return self.batch_size * count_entries(self.layout.delivered(self.tokens_per_chunk))

    @property
    def rectangles(self) -> tuple[Rectangle, ...]:
        """The dense parts of a clip's attention."""
        return rectangles(self.layout.delivered(self.tokens_per_chunk), self._one_shot, self.rule)

    def key_tokens(self, only_joined: bool) -> int:
        """Tokens of the keys of all rectangles; `only_joined`: of those that consist of several segments, which
        `ChunkedAttention` copies."""
        return (
            self.batch_size
            * self.tokens_per_chunk
            * sum(len(part.keys) for part in self.rectangles if len(part.keys) > 1 or not only_joined)
        )


@dataclass(frozen=True)
class ChunkWorkload:
    """A call on one chunk, which sees itself and what the cache holds. Ranks share its frames, and the heads.

    Attributes:
        model: sizes of the network.
        batch_size: videos.
        chunk_tokens, chunk_frames: of one of them, on all ranks.
        visible_chunks: that it sees, itself included.
        text_tokens: of a prompt.
        size: ranks.
    """

    model: WanConfig
    batch_size: int
    chunk_tokens: int
    chunk_frames: int
    visible_chunks: int
    text_tokens: int
    size: int

    def frames(self, rank: int) -> int:
        return self.batch_size * self.chunk_frames // self.size

    def tokens(self, rank: int) -> int:
        return self.batch_size * self.chunk_tokens // self.size

    def prompt_rows(self, rank: int) -> int:
        return self.batch_size

    @property
    def num_prompts(self) -> int:
        """One per video, the most there can be."""
        return self.batch_size

    @property
    def useful_entries(self) -> int:
        return self.batch_size * self.visible_chunks * self.chunk_tokens**2

    def key_tokens(self, only_joined: bool) -> int:
        """Tokens of the keys that attention is given beside the chunk's own; `only_joined` changes nothing."""
        return self.batch_size * (self.visible_chunks - 1) * self.chunk_tokens
