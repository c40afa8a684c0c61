"""Wan's transformer once more, in float64 and from the papers' formulas: no line of the package runs in here.

What a network of the package computes in float32, with its attention functions, caches and kernels, this computes from
the same weights in one dense pass over the whole sequence. Sizes are read off the weights, but for the heads.
"""

import math

import torch
from torch import Tensor
from torch.nn.functional import gelu, silu

Weights = dict[str, Tensor]
"""By Wan's names, float64."""


def float64_weights(network: torch.nn.Module) -> Weights:
    """Copies, so that gradients are this script's own."""
    return {
        name: parameter.detach().double().requires_grad_(parameter.requires_grad)
        for name, parameter in network.named_parameters()
    }


def linear(weights: Weights, name: str, x: Tensor) -> Tensor:
    return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight


def layer_norm(x: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt()


def rotate(x: Tensor, positions: list[tuple[float, int, int]]) -> Tensor:
    """`[l n e]` by (frame, row, column) of each token: neighbouring pairs as complex numbers."""
    pairs = x.shape[-1] // 2
    third = pairs // 3
    sizes = (pairs - 2 * third, third, third)
    angles = torch.tensor(
        [
            [
                position * 10000.0 ** (-k / size)
                for position, size in zip(where, sizes, strict=True)
                for k in range(size)
            ]
            for where in positions
        ],
        dtype=torch.float64,
    )
    turned = torch.view_as_complex(x.unflatten(-1, (pairs, 2)).contiguous()) * torch.polar(
        torch.ones_like(angles), angles
    ).unsqueeze(1)
    return torch.view_as_real(turned).flatten(-2)


def attend(query: Tensor, key: Tensor, value: Tensor, visible: Tensor | None = None) -> Tensor:
    """`[l n e]`; `visible [l k]` says which query sees which key."""
    scores = torch.einsum("lne,kne->nlk", query, key) / math.sqrt(query.shape[-1])
    if visible is not None:
        scores = scores.masked_fill(~visible, -math.inf)
    return torch.einsum("nlk,kne->lne", scores.softmax(-1), value)


def wan_velocity(
    weights: Weights,
    num_heads: int,
    latents: Tensor,
    timesteps: list[float],
    frame_positions: list[float],
    prompts: list[Tensor],
    visible: Tensor,
) -> Tensor:
    """Velocity of one sample.

    Args:
        latents: `[f c h w]`, float64; patches are 2 x 2.
        timesteps, frame_positions: of every frame.
        prompts: of every frame, `[s text_dim]`.
        visible: which frame (row) sees which (column).
    """
    num_frames, channels, height, width = latents.shape
    dim = weights["patch_embedding.bias"].shape[0]
    rows, columns = height // 2, width // 2
    per_frame = rows * columns
    patches = latents.reshape(num_frames, channels, rows, 2, columns, 2).permute(0, 2, 4, 1, 3, 5).flatten(3)
    x = patches.reshape(num_frames, per_frame, -1) @ weights["patch_embedding.weight"].flatten(1).T
    x = x + weights["patch_embedding.bias"]

    half = weights["time_embedding.0.weight"].shape[1] // 2
    angles = torch.tensor([[t * 10000.0 ** (-k / half) for k in range(half)] for t in timesteps], dtype=torch.float64)
    time = linear(weights, "time_embedding.0", torch.cat([angles.cos(), angles.sin()], dim=-1))
    time = linear(weights, "time_embedding.2", silu(time))
    modulation = linear(weights, "time_projection.1", silu(time)).reshape(num_frames, 6, dim)

    positions = [(p, row, column) for p in frame_positions for row in range(rows) for column in range(columns)]
    sees = visible.repeat_interleave(per_frame, 0).repeat_interleave(per_frame, 1)

    def heads(name: str, y: Tensor, norm: str | None = None) -> Tensor:
        y = linear(weights, name, y)
        y = y if norm is None else rms_norm(y, weights[f"{norm}.weight"])
        return y.reshape(-1, num_heads, dim // num_heads)

    num_layers = len({name.split(".")[1] for name in weights if name.startswith("blocks.")})
    for layer in range(num_layers):
        block = f"blocks.{layer}"
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = (
            part[:, None] for part in (modulation + weights[f"{block}.modulation"]).unbind(1)
        )
        y = (layer_norm(x) * (1 + scale_1) + shift_1).flatten(0, 1)
        query = rotate(heads(f"{block}.self_attn.q", y, f"{block}.self_attn.norm_q"), positions)
        key = rotate(heads(f"{block}.self_attn.k", y, f"{block}.self_attn.norm_k"), positions)
        attended = attend(query, key, heads(f"{block}.self_attn.v", y), sees)
        x = x + linear(weights, f"{block}.self_attn.o", attended.flatten(1)).reshape(x.shape) * gate_1

        y = layer_norm(x) * weights[f"{block}.norm3.weight"] + weights[f"{block}.norm3.bias"]
        update = []
        for frame, prompt in enumerate(prompts):
            text = linear(
                weights, "text_embedding.2", gelu(linear(weights, "text_embedding.0", prompt), approximate="tanh")
            )
            query = heads(f"{block}.cross_attn.q", y[frame], f"{block}.cross_attn.norm_q")
            key = heads(f"{block}.cross_attn.k", text, f"{block}.cross_attn.norm_k")
            update.append(attend(query, key, heads(f"{block}.cross_attn.v", text)).flatten(1))
        x = x + linear(weights, f"{block}.cross_attn.o", torch.stack(update))

        y = layer_norm(x) * (1 + scale_2) + shift_2
        y = linear(weights, f"{block}.ffn.2", gelu(linear(weights, f"{block}.ffn.0", y), approximate="tanh"))
        x = x + y * gate_2

    shift, scale = (time[:, None] + weights["head.modulation"]).unbind(1)
    out = linear(weights, "head.head", layer_norm(x) * (1 + scale[:, None]) + shift[:, None])
    return out.reshape(num_frames, rows, columns, 2, 2, -1).permute(0, 5, 1, 3, 2, 4).reshape(latents.shape)
