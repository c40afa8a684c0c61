"""Shape names: the one legend of dims, and the tensor types that public functions are annotated with.

Shapes are checked by jaxtyping and beartype when the tests run, and cost nothing otherwise.

| letter | dim |
|---|---|
| b | batch |
| t, H, W | raw frames, and their height and width in pixels |
| f, c, h, w | latent frames, channels, height, width |
| l, d | tokens, features |
| n | attention heads (a head's features are `e`) |
| p | prompts of one sample: the frames are split into `p` equal runs, each with its own prompt |
| u, s | distinct prompts of a batch, text tokens of one prompt |
"""

from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor

RawFrames = UInt8[Tensor, "b t 3 H W"]
"""Raw RGB frames as they are stored and moved: 0 to 255."""

Video = Float[Tensor, "b t 3 H W"]
"""RGB in [-1, 1]."""

Latents = Float[Tensor, "b f c h w"]
Tokens = Float[Tensor, "b l d"]
Heads = Float[Tensor, "b l n e"]
"""Queries, keys or values, split into attention heads."""

PerFrame = Float[Tensor, "b f"]
PromptEmbeds = Float[Tensor, "u s d"]

__all__ = [
    "Bool",
    "Float",
    "Heads",
    "Int",
    "Latents",
    "PerFrame",
    "PromptEmbeds",
    "RawFrames",
    "Tensor",
    "Tokens",
    "UInt8",
    "Video",
]
