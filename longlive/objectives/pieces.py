"""The copies of a clip's chunks that teacher forcing runs through the network, as one rank holds them.

The sequence is `[clean history | noisy targets]`. `parallel.layout` says which chunks of either a rank has (alone, all
that matter); from that follow the prompts and positions of its frames, and who sees whom. Tuning on clips and the
scores of distillation are both made of this.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from longlive.models.attention import ChunkedAttention, SelfAttention
from longlive.models.visibility import Role, VisibilityRule
from longlive.objectives.teacher_forcing import frames_of_chunks
from longlive.parallel.layout import SequenceLayout
from longlive.parallel.mesh import SequenceShare
from longlive.parallel.ulysses import UlyssesAttention
from longlive.typing import Float, Int, Tensor


@dataclass(frozen=True)
class HeldPieces:
    """What this rank holds of a batch of clips.

    Attributes:
        shot_index: shot of every chunk of the clips, on the CPU.
        chunk_frames: frames per chunk.
        sequence: this process's place in its sequence group.
        rule: who sees whom.
        shot_rope_offset: frames by which a scene cut moves the RoPE position.
        num_past: the first so many chunks are history alone: no targets.
        starts: RoPE position of every chunk's first frame; None: the videos begin with the clips.
    """

    shot_index: Int[Tensor, "b chunk"]
    chunk_frames: int
    sequence: SequenceShare
    rule: VisibilityRule
    shot_rope_offset: float = 0.0
    num_past: int = 0
    starts: Float[Tensor, "b chunk"] | None = None

    @property
    def num_chunks(self) -> int:
        """Of a clip."""
        return self.shot_index.shape[1]

    @property
    def layout(self) -> SequenceLayout:
        """Who holds what.

        Raises:
            ValueError: if the ranks do not divide the clip.
        """
        return self.sequence.layout(self.num_chunks).targeting(self.num_past)

    def chunks(self, role: Role) -> tuple[int, ...]:
        """The chunks that this rank holds in a role."""
        return self.layout.of_role(self.sequence.rank, role)

    def frames(self, role: Role) -> Int[Tensor, " f"]:
        """Their frames: indices in the clip."""
        return frames_of_chunks(self.chunks(role), self.chunk_frames)

    def prompt_index(self, of_clip: Int[Tensor, "b chunk"]) -> Int[Tensor, "b piece"]:
        """The prompts of both copies, of those of the clip's chunks."""
        chunks = torch.tensor(self.chunks(Role.CLEAN) + self.chunks(Role.NOISY), device=of_clip.device)
        return of_clip[:, chunks]

    def clip_positions(self) -> Float[Tensor, "b clip"]:
        """RoPE position of every frame of the clip: its index, plus the offset of its shot."""
        if self.starts is not None:
            return (self.starts[:, :, None] + torch.arange(self.chunk_frames)).flatten(1)
        shot = self.shot_index.repeat_interleave(self.chunk_frames, dim=1)
        return torch.arange(shot.shape[1]) + self.shot_rope_offset * shot.double()

    def frame_positions(self, device: torch.device) -> Float[Tensor, "b both"]:
        """RoPE positions of the frames of both copies."""
        frames = torch.cat([self.frames(Role.CLEAN), self.frames(Role.NOISY)])
        return self.clip_positions()[:, frames].to(device)

    def token_positions(self, sample_ids: Int[Tensor, " b"], tokens_per_frame: int) -> Int[Tensor, "b l"]:
        """A number for every token of both copies, the same one whichever rank holds the token: by sample, then as one
        rank that held every copy would order the clip's tokens."""
        chunk_tokens = self.chunk_frames * tokens_per_frame
        pieces = torch.tensor(
            [*self.chunks(Role.CLEAN), *(self.num_chunks + chunk for chunk in self.chunks(Role.NOISY))]
        )
        in_clip = (pieces[:, None] * chunk_tokens + torch.arange(chunk_tokens)).flatten()
        return sample_ids[:, None] * (2 * self.num_chunks * chunk_tokens) + in_clip

    def chunk_token_positions(self, sample_ids: Int[Tensor, " b"], tokens_per_frame: int) -> Int[Tensor, "b l"]:
        """The same for this rank's tokens of a chunk in a rollout (`rollout.split`)."""
        chunk_tokens = self.chunk_frames * tokens_per_frame
        share = chunk_tokens // self.sequence.size
        return sample_ids[:, None] * chunk_tokens + self.sequence.rank * share + torch.arange(share)

    def attention(self, tokens_per_frame: int) -> SelfAttention:
        """Over the copies of all ranks of the sequence group."""
        segments = self.layout.delivered(self.chunk_frames * tokens_per_frame)
        inner = ChunkedAttention(segments, self.shot_index, self.rule)
        return inner if self.sequence.group is None else UlyssesAttention(inner, self.sequence.group)
