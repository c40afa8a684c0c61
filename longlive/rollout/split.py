"""A rollout shared by the ranks of a sequence group.

Of a chunk of K frames, rank r of P runs the network on the frames `[r K/P, (r+1) K/P)`. Frames meet in self-attention
alone: there Ulysses gives a rank all tokens of the chunk for `1/P` of the heads, so that its cache holds the keys and
values of these heads and no others. After every call the ranks gather the velocity.

So outside of the network a rollout is the same on every rank, and nothing there knows of ranks: noise and exit steps
are drawn, solvers step and given frames stay in place on whole chunks, and everybody has the finished video. That costs
little: a chunk of Wan2.2 at 704 x 1280 has 5.4 MB of velocity to gather per call, and in its 30 layers sends 5.2 GB of
queries, keys, values and outputs (in bfloat16).

Gradients flow through all of it. What a rank makes of a whole chunk, such as its part of a loss, reaches the frames of
the others, whose gradients are sums over the ranks. Backward communicates, and so do blocks that it runs again
(activation checkpointing): every rank must run backward through every chunk, even where its part of the loss reads few.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch.distributed as dist
from torch import nn

from longlive.adapters.adapted import AdaptedNetwork
from longlive.models.attention import SelfAttention
from longlive.models.wan.config import WanConfig
from longlive.models.wan.model import CausalWan
from longlive.models.wan.rope import rotation
from longlive.parallel.collectives import gather_parts
from longlive.parallel.ulysses import UlyssesUnrotated
from longlive.typing import Int, Latents, PerFrame, PromptEmbeds, Tensor


class SplitNetwork:
    """A network whose calls on one chunk are shared by a group. A view, no module of its own.

    Args:
        network: or what an adapter makes of it.
        group: its size divides the chunk's frames and the heads (`parallel.layout.check_rollout`).
    """

    def __init__(self, network: CausalWan | AdaptedNetwork, group: dist.ProcessGroup) -> None:
        self.network = network
        self.group = group

    @property
    def config(self) -> WanConfig:
        return self.network.config

    def parameters(self) -> Iterator[nn.Parameter]:
        return self.network.parameters()

    def __call__(
        self,
        latents: Latents,
        timesteps: PerFrame,
        prompt_embeds: PromptEmbeds,
        prompt_index: Int[Tensor, "b 1"],
        frame_positions: PerFrame,
        attention: SelfAttention,
    ) -> Latents:
        """As `CausalWan.forward`, of one chunk with one prompt. Every rank passes the same and gets the same;
        `attention` sees all tokens and this rank's heads."""
        share = latents.shape[1] // self.group.size()
        mine = slice(self.group.rank() * share, (self.group.rank() + 1) * share)
        turns = rotation(frame_positions, *self.config.patches(*latents.shape[-2:]), self.config.head_dim)
        velocity = self.network(
            latents=latents[:, mine],
            timesteps=timesteps[:, mine],
            prompt_embeds=prompt_embeds,
            prompt_index=prompt_index,
            frame_positions=frame_positions[:, mine],
            attention=UlyssesUnrotated(attention, turns, self.group),
        )
        return gather_parts(velocity, self.group).transpose(0, 1).flatten(1, 2)
