"""The causal Wan diffusion transformer: latents and per-frame timesteps in, velocity out.

The network is Wan2.2's, parameter names included. What makes it causal is not in here: the attention function is an
argument, so one network trains by teacher forcing (clean and noisy copies in one sequence), rolls out with a cache and
runs bidirectionally, and it knows neither masks nor ranks. Differences to Wan's own class:

- timesteps are per frame (`[b f]`), prompts per run of frames, positions in time explicit;
- the patch embedding multiplies rearranged patches by its Conv3d-shaped weight: the same numbers, one matrix product;
- the timestep's path runs in float32 whatever dtype the parameters and autocast have, as Wan's does.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Real
from torch import nn

from longlive import rng
from longlive.models.attention import SelfAttention
from longlive.models.wan.block import FrameTokens, WanBlock, modulated_norm
from longlive.models.wan.config import WanConfig
from longlive.models.wan.rope import rotation
from longlive.typing import Float, Int, Latents, PromptEmbeds, Tensor

GATE_ROWS = (2, 5)
"""The gates of self-attention and feed-forward among the six rows of a block's modulation."""
GATE = 0.5


def sinusoidal_embedding(positions: Real[Tensor, "b f"], dim: int) -> Float[Tensor, "b f dim"]:
    """Cosines, then sines, of the positions at frequencies 1 to 1/10000; float32 from float64 angles, as in Wan."""
    half = dim // 2
    steps = torch.arange(half, dtype=torch.float64, device=positions.device)
    angles = positions.double()[..., None] * 10000.0 ** (-steps / half)
    return torch.cat([angles.cos(), angles.sin()], dim=-1).float()


class Float32Linear(nn.Linear):
    """A linear layer whose arithmetic is float32 whatever its parameters' dtype and autocast are."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x.float(), self.weight.float(), self.bias.float())


class PatchEmbedding(nn.Conv3d):
    """Latent patches to tokens; the parameters have Conv3d's shapes."""

    def forward(self, latents: Latents) -> FrameTokens:
        _, rows, columns = self.kernel_size
        patches = rearrange(latents, "b f c (h q) (w r) -> b f (h w) (c q r)", q=rows, r=columns)
        return F.linear(patches.to(self.weight.dtype), self.weight.flatten(1), self.bias)


class Head(nn.Module):
    """Modulated norm and projection to the patches of the velocity."""

    def __init__(self, config: WanConfig) -> None:
        super().__init__()
        self.eps = config.eps
        _, rows, columns = config.patch_size
        self.head = nn.Linear(config.dim, rows * columns * config.out_channels)
        self.modulation = nn.Parameter(torch.empty(1, 2, config.dim))

    def forward(self, x: FrameTokens, time_embedding: Float[Tensor, "b f d"]) -> Float[Tensor, "b f t patch"]:
        shift, scale = (time_embedding[:, :, None] + self.modulation.float()).unsqueeze(3).unbind(2)
        return self.head(modulated_norm(x, shift, scale, self.eps))


class CausalWan(nn.Module):
    """A Wan transformer whose self-attention is an argument.

    Built under `torch.device("meta")` it allocates nothing; it has no buffers. Weights are undefined until
    `init_weights` or `weights.load_weights`, apart from what torch's layers draw at construction.
    """

    def __init__(self, config: WanConfig) -> None:
        super().__init__()
        self.config = config
        self.patch_embedding = PatchEmbedding(
            config.in_channels, config.dim, kernel_size=config.patch_size, stride=config.patch_size
        )
        self.text_embedding = nn.Sequential(
            nn.Linear(config.text_dim, config.dim), nn.GELU(approximate="tanh"), nn.Linear(config.dim, config.dim)
        )
        self.time_embedding = nn.Sequential(
            Float32Linear(config.freq_dim, config.dim), nn.SiLU(), Float32Linear(config.dim, config.dim)
        )
        self.time_projection = nn.Sequential(nn.SiLU(), Float32Linear(config.dim, 6 * config.dim))
        self.blocks = nn.ModuleList(WanBlock(config, layer) for layer in range(config.num_layers))
        self.head = Head(config)

    @torch.no_grad()
    def init_weights(self, seed: int = 0) -> None:
        """Fill the parameters with `initial_weights`."""
        for name, drawn in self.initial_weights(seed):
            self.get_parameter(name).copy_(drawn)

    def initial_weights(self, seed: int = 0) -> Iterator[tuple[str, Tensor]]:
        """Wan's initialisation, carried over to any width, with gates that start half open.

        Xavier for linear layers and zero for the head, as Wan has it. Its standard deviation of 0.02 for the
        embeddings of text and time is `1 / sqrt(inputs)` at Wan's widths (0.016 to 0.018), and is written so here: at
        a width of 64 the constant would leave prompts and timesteps all but unheard. Wan's
        gates start near zero; a small network from scratch learns faster with `GATE`.

        Every tensor draws from its own generator on the CPU, so its values depend on the seed and its name alone.

        Yields:
            One parameter's name and its float32 values on the CPU at a time.
        """
        for name, parameter in self.named_parameters():
            generator = rng.generator(seed, f"init_weights/{name}")
            # Named, because Lightning builds networks with the accelerator as torch's default device.
            drawn = torch.zeros(parameter.shape, device="cpu")
            if name.endswith("modulation"):
                drawn.normal_(std=self.config.dim**-0.5, generator=generator)
                if name.startswith("blocks"):
                    drawn[:, GATE_ROWS] += GATE
            elif "norm" in name:
                drawn.fill_(1.0 if name.endswith("weight") else 0.0)
            elif name.startswith(("text_embedding", "time_embedding")) and name.endswith("weight"):
                drawn.normal_(std=parameter.shape[1] ** -0.5, generator=generator)
            elif name.endswith("weight") and name != "head.head.weight":
                nn.init.xavier_uniform_(drawn.flatten(1), generator=generator)
            yield name, drawn

    def forward(
        self,
        latents: Latents,
        timesteps: Real[Tensor, "b f"],
        prompt_embeds: PromptEmbeds,
        prompt_index: Int[Tensor, "b p"],
        frame_positions: Real[Tensor, "b f"],
        attention: SelfAttention,
    ) -> Latents:
        """Predict the velocity of every frame.

        Args:
            latents: `[b f c h w]`; teacher forcing passes the clean frames, then the noisy ones.
            timesteps: 0 (clean) to 1000 (noise), per frame.
            prompt_embeds: the distinct prompts of the batch `[u s text_dim]`. Their padding is not masked, as in Wan.
            prompt_index: the frames are split into `p` equal runs; run i cross-attends to prompt
                `prompt_index[:, i]` only.
            frame_positions: position of every frame in time, for the rotary embedding.
            attention: computes self-attention.

        Returns:
            Velocity `[b f c h w]` in the dtype of the parameters.

        Raises:
            ValueError: if patches do not tile the frames, channels or text width are not the config's, or the prompts'
                runs do not divide the frames.
        """
        num_frames, channels, height, width = latents.shape[1:]
        rows, columns = self.config.patches(height, width)
        self._check(num_frames, channels, prompt_embeds.shape[-1], prompt_index.shape[1])

        turns = rotation(frame_positions, rows, columns, self.config.head_dim)
        time_embedding = self.time_embedding(sinusoidal_embedding(timesteps, self.config.freq_dim))
        time_modulation = self.time_projection(time_embedding).unflatten(-1, (6, -1))
        prompts = self.text_embedding(prompt_embeds.to(self.patch_embedding.weight.dtype))

        x = self.patch_embedding(latents)
        for block in self.blocks:
            x = block(x, time_modulation, turns, prompts, prompt_index, attention)
        patches = self.head(x, time_embedding)
        _, q, r = self.config.patch_size
        return rearrange(patches, "b f (h w) (q r c) -> b f c (h q) (w r)", h=rows, q=q, r=r)

    def _check(self, num_frames: int, channels: int, text_dim: int, num_runs: int) -> None:
        for name, value, expected in (
            ("channels", channels, self.config.in_channels),
            ("text_dim", text_dim, self.config.text_dim),
        ):
            if value != expected:
                raise ValueError(f"{name}={value} arrive, but the network was made for {name}={expected}")
        if num_frames % num_runs:
            raise ValueError(
                f"prompt_index gives {num_runs} prompts, which do not divide {num_frames} frames into equal runs; give "
                "one prompt per chunk"
            )
