"""One Wan transformer block: modulated self-attention, cross-attention to the prompt, modulated feed-forward.

    x += gate_1 * self_attn( norm1(x) * (1 + scale_1) + shift_1 )
    x += cross_attn( norm3(x), prompt )
    x += gate_2 * ffn( norm2(x) * (1 + scale_2) + shift_2 )

Six vectors per frame (shifts, scales, gates) come from the frame's timestep plus the block's own table `modulation`.
Tokens travel as `[b f t d]` (t tokens per frame), so that what is per frame broadcasts without being copied to every
token. Normalisation and modulation are float32 as in Wan (wan/modules/model.py of Wan2.2); all else runs in the model's
dtype. Parameters carry Wan's names; of the three norms only `norm3` has any.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

from longlive.models.attention import SelfAttention, dense_attention
from longlive.models.wan.config import WanConfig
from longlive.models.wan.rope import Rotation
from longlive.typing import Float, Heads, Int, PromptEmbeds, Tensor

FrameTokens = Float[Tensor, "b f t d"]


def modulated_norm(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    """`layer_norm(x) * (1 + scale) + shift` in float32, returned in the dtype of `x`.

    Args:
        x: `[b f t d]`.
        shift, scale: float32 `[b f 1 d]`.
    """
    normed = F.layer_norm(x.float(), x.shape[-1:], eps=eps)
    return torch.addcmul(shift, normed, 1 + scale).to(x.dtype)


def gated_sum(x: Tensor, update: Tensor, gate: Tensor) -> Tensor:
    """`x + update * gate` in float32, returned in the dtype of `x`; `gate` is float32 `[b f 1 d]`."""
    return torch.addcmul(x.float(), update.float(), gate).to(x.dtype)


class WidthNorm(nn.RMSNorm):
    """RMS norm over the full width, across heads, in the dtype of the input: under autocast the weight follows it.
    (On CUDA, autocast of newer torch computes it in float32, and would leave queries and keys in that.)"""

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps).to(x.dtype)


class QKVProjection(nn.Module):
    """The parameters that both kinds of attention have: four projections and the RMS norms of queries and keys."""

    def __init__(self, config: WanConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.q = nn.Linear(config.dim, config.dim)
        self.k = nn.Linear(config.dim, config.dim)
        self.v = nn.Linear(config.dim, config.dim)
        self.o = nn.Linear(config.dim, config.dim)
        self.norm_q = WidthNorm(config.dim, eps=config.eps)
        self.norm_k = WidthNorm(config.dim, eps=config.eps)

    def split_heads(self, x: Tensor) -> Tensor:
        """`[... d]` to `[... n e]`."""
        return x.unflatten(-1, (self.num_heads, -1))


class WanSelfAttention(QKVProjection):
    """Tokens attend to tokens; who sees whom is the attention function's business."""

    def __init__(self, config: WanConfig, layer: int) -> None:
        super().__init__(config)
        self.layer = layer

    def forward(self, x: FrameTokens, rotation: Rotation, attention: SelfAttention) -> FrameTokens:
        tokens = x.flatten(1, 2)
        query = self.split_heads(self.norm_q(self.q(tokens)))
        key = self.split_heads(self.norm_k(self.k(tokens)))
        value = self.split_heads(self.v(tokens))
        attended = self._attend(query, key, value, rotation, attention)
        return self.o(attended.flatten(2)).view_as(x)

    @torch.compiler.disable
    def _attend(self, query: Heads, key: Heads, value: Heads, rotation: Rotation, attention: SelfAttention) -> Heads:
        """Not compiled with the rest: the function is another one for every batch, may communicate, and brings its own
        kernels. Read in here, the layer's index does not make every layer a program of its own either."""
        return attention(query, key, value, rotation, self.layer)


class WanCrossAttention(QKVProjection):
    """Tokens attend to the text of their own chunk's prompt. Keys and values are computed once per distinct prompt."""

    def forward(self, x: FrameTokens, prompts: PromptEmbeds, prompt_index: Int[Tensor, "b p"]) -> FrameTokens:
        num_runs = prompt_index.shape[1]
        query = rearrange(self.norm_q(self.q(x)), "b (p f) t (n e) -> (b p) (f t) n e", p=num_runs, n=self.num_heads)
        key = self.split_heads(self.norm_k(self.k(prompts)))
        value = self.split_heads(self.v(prompts))
        which = prompt_index.flatten()
        attended = dense_attention(query, key[which], value[which])
        return self.o(attended.flatten(2).reshape(x.shape))


class WanBlock(nn.Module):
    """One layer; `layer` is its index, which the attention function gets."""

    def __init__(self, config: WanConfig, layer: int) -> None:
        super().__init__()
        self.eps = config.eps
        self.self_attn = WanSelfAttention(config, layer)
        self.norm3 = nn.LayerNorm(config.dim, eps=config.eps) if config.cross_attn_norm else nn.Identity()
        self.cross_attn = WanCrossAttention(config)
        self.ffn = nn.Sequential(
            nn.Linear(config.dim, config.ffn_dim), nn.GELU(approximate="tanh"), nn.Linear(config.ffn_dim, config.dim)
        )
        self.modulation = nn.Parameter(torch.empty(1, 6, config.dim))

    def forward(
        self,
        x: FrameTokens,
        time_modulation: Float[Tensor, "b f 6 d"],
        rotation: Rotation,
        prompts: PromptEmbeds,
        prompt_index: Int[Tensor, "b p"],
        attention: SelfAttention,
    ) -> FrameTokens:
        modulation = (time_modulation + self.modulation.float()).unsqueeze(3)
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = modulation.unbind(2)
        update = self.self_attn(modulated_norm(x, shift_1, scale_1, self.eps), rotation, attention)
        x = gated_sum(x, update, gate_1)
        x = x + self.cross_attn(self.norm3(x), prompts, prompt_index)
        update = self.ffn(modulated_norm(x, shift_2, scale_2, self.eps))
        return gated_sum(x, update, gate_2)
