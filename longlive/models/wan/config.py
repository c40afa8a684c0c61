"""Sizes of a Wan transformer, and the two `config.json` styles that published checkpoints carry.

Wan's own files and diffusers' files name the same sizes differently, and both leave out what they take for granted
(text width, patch size). `from_json` reads either style, `to_json` writes either.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

Naming = Literal["original", "diffusers"]
"""Whose names a file uses: Wan's own release, or diffusers' `WanTransformer3DModel`."""

_ORIGINAL_KEYS = {
    "num_layers": "num_layers",
    "dim": "dim",
    "ffn_dim": "ffn_dim",
    "num_heads": "num_heads",
    "in_channels": "in_dim",
    "out_channels": "out_dim",
    "text_dim": "text_dim",
    "freq_dim": "freq_dim",
    "patch_size": "patch_size",
    "cross_attn_norm": "cross_attn_norm",
    "eps": "eps",
}
_DIFFUSERS_KEYS = _ORIGINAL_KEYS | {
    "num_heads": "num_attention_heads",
    "in_channels": "in_channels",
    "out_channels": "out_channels",
}


@dataclass(frozen=True)
class WanConfig:
    """Sizes of a Wan diffusion transformer.

    Attributes:
        num_layers: transformer blocks.
        dim: features of a token. A velocity model must pass the noise of a whole token through them: keep `dim` at
            least about twice `in_channels * patch height * patch width`.
        ffn_dim: hidden features of a block's feed-forward.
        num_heads: attention heads; divides `dim` into even heads.
        in_channels, out_channels: latent channels.
        text_dim: features of a prompt embedding's token.
        freq_dim: sinusoids of the timestep embedding; even.
        patch_size: latent (frames, rows, columns) of one token. One frame, because timesteps are per frame.
        cross_attn_norm: whether a normalisation with parameters precedes cross-attention.
        eps: of every normalisation.

    Raises:
        ValueError: if the sizes do not fit together; the message names the rule and legal values.
    """

    num_layers: int
    dim: int
    ffn_dim: int
    num_heads: int
    in_channels: int
    out_channels: int
    text_dim: int
    freq_dim: int = 256
    patch_size: tuple[int, int, int] = (1, 2, 2)
    cross_attn_norm: bool = True
    eps: float = 1e-6

    def __post_init__(self) -> None:
        sizes = ("num_layers", "dim", "ffn_dim", "num_heads", "in_channels", "out_channels", "text_dim", "freq_dim")
        for name in sizes:
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if self.dim % self.num_heads:
            legal = [heads for heads in range(1, self.dim // 2 + 1) if self.dim % (2 * heads) == 0]
            raise ValueError(f"num_heads={self.num_heads} does not divide dim={self.dim}; use one of {legal}")
        if self.head_dim % 2 or self.head_dim < 6:
            raise ValueError(
                f"dim={self.dim} over num_heads={self.num_heads} gives heads of {self.head_dim} features; rotary "
                "positions in three directions need an even number of at least 6, so use fewer heads or another dim"
            )
        if self.freq_dim % 2:
            raise ValueError(f"freq_dim={self.freq_dim} must be even (cosines and sines); use {self.freq_dim + 1}")
        if self.patch_size[0] != 1 or min(self.patch_size) < 1:
            raise ValueError(
                f"patch_size={self.patch_size} must be (1, rows, columns): timesteps and chunks are counted in frames, "
                "so a token covers one frame"
            )

    @property
    def head_dim(self) -> int:
        """Features of one attention head."""
        return self.dim // self.num_heads

    def patches(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of tokens in a latent frame of `height x width`.

        Raises:
            ValueError: if patches do not tile the frame.
        """
        _, rows, columns = self.patch_size
        if height % rows or width % columns:
            raise ValueError(
                f"latent height={height}, width={width} are no multiples of patch_size={self.patch_size}; use "
                f"{max(height - height % rows, rows)}, {max(width - width % columns, columns)}"
            )
        return height // rows, width // columns

    def tokens_per_frame(self, height: int, width: int) -> int:
        """Tokens of a latent frame of `height x width`; errors as in `patches`."""
        rows, columns = self.patches(height, width)
        return rows * columns

    @classmethod
    def tiny(cls, **overrides: Any) -> WanConfig:
        """The toy world's size: 1.2 M parameters. `overrides` replace single sizes."""
        config = cls(
            num_layers=4, dim=128, ffn_dim=512, num_heads=4, in_channels=16, out_channels=16, text_dim=64, freq_dim=256
        )
        return replace(config, **overrides)

    @classmethod
    def ti2v_5b(cls) -> WanConfig:
        """Wan2.2-TI2V-5B: 4,999,787,712 parameters."""
        return cls(
            num_layers=30,
            dim=3072,
            ffn_dim=14336,
            num_heads=24,
            in_channels=48,
            out_channels=48,
            text_dim=4096,
        )

    @classmethod
    def from_json(cls, path: str | Path) -> WanConfig:
        """Read the `config.json` of a Wan2.2 release or of diffusers' `WanTransformer3DModel`.

        Sizes that the file takes for granted (text width, patch size) are those of every Wan release.

        Raises:
            ValueError: if a size is missing, or the file describes a network that this one is not (image conditioning
                by extra keys and values, no q/k normalisation).
        """
        content = json.loads(Path(path).read_text())
        keys = _DIFFUSERS_KEYS if "num_attention_heads" in content else _ORIGINAL_KEYS
        for name in ("added_kv_proj_dim", "image_dim", "pos_embed_seq_len"):
            if content.get(name) is not None:
                raise ValueError(f"{path}: {name}={content[name]} belongs to a network with image keys; use a TI2V one")
        if content.get("qk_norm", True) not in (True, "rms_norm_across_heads"):
            raise ValueError(f"{path}: qk_norm={content['qk_norm']!r} is not Wan's RMS norm across heads")
        sizes = {name: content[key] for name, key in keys.items() if key in content}
        if "num_attention_heads" in content and "attention_head_dim" in content:
            sizes["dim"] = content["num_attention_heads"] * content["attention_head_dim"]
        sizes.setdefault("text_dim", 4096)
        sizes["patch_size"] = tuple(sizes.get("patch_size", (1, 2, 2)))
        required = ("num_layers", "dim", "ffn_dim", "num_heads", "in_channels", "out_channels")
        missing = [keys[name] for name in required if sizes.get(name) is None]
        if missing:
            raise ValueError(f"{path} has no {', '.join(missing)}; it is no config of a Wan transformer")
        return cls(**sizes)

    def to_json(self, path: str | Path, naming: Naming = "original") -> None:
        """Write a `config.json` that Wan's code (`original`) or diffusers reads."""
        keys = _DIFFUSERS_KEYS if naming == "diffusers" else _ORIGINAL_KEYS
        content: dict[str, Any] = {key: getattr(self, name) for name, key in keys.items()}
        if naming == "diffusers":
            del content["dim"]
            content |= {
                "_class_name": "WanTransformer3DModel",
                "attention_head_dim": self.head_dim,
                "qk_norm": "rms_norm_across_heads",
            }
        else:
            content |= {"_class_name": "WanModel", "model_type": "ti2v", "qk_norm": True}
        Path(path).write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")
