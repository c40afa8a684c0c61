"""How to roll out: the settings that a recipe gives, a checkpoint remembers and `longlive generate` may replace."""

from dataclasses import dataclass
from typing import Literal

import torch

from longlive.diffusion.solver import SOLVERS
from longlive.models.visibility import VisibilityRule
from longlive.models.wan.config import WanConfig
from longlive.rollout.slots import CacheDtype, check_head_dim

CACHE_DTYPES: dict[str, CacheDtype] = {"bfloat16": torch.bfloat16, "float32": torch.float32, "nvfp4": "nvfp4"}


@dataclass(frozen=True)
class RolloutSettings:
    """How to roll out.

    Attributes:
        chunk_frames: frames denoised together.
        num_steps: solver steps per chunk.
        solver: a name in `diffusion.solver.SOLVERS`.
        guidance_scale: 1 is no guidance, and then no negative prompt is taken.
        window: frames that a query sees at most, sinks and its own chunk included; None: everything.
        sink_frames: first frames of the video that stay visible.
        shot_sink: whether the first chunk of the current shot stays visible too.
        relative_rope: count RoPE positions inside the visible list, so that they stay bounded in a video of any length.
        shot_rope_offset: frames by which a scene cut moves the RoPE position.
        prompt_switch: what a new prompt within a shot does to the cache: `keep`, or `recache`: it is rebuilt from the
            finished frames under the new prompt (`switches.py`), by a network call for each chunk that is visible.
        cache_dtype: what keys and values are stored in; None: the dtype of the network's parameters. `nvfp4` takes 0.28
            of the bytes of `bfloat16`, and time to unpack what every pass sees.

    Raises:
        ValueError: if a setting is out of range, frames are no multiples of `chunk_frames`, or the window cannot hold
            the sinks and the chunk itself.
    """

    chunk_frames: int
    num_steps: int = 20
    solver: str = "unipc"
    guidance_scale: float = 1.0
    window: int | None = None
    sink_frames: int = 0
    shot_sink: bool = False
    relative_rope: bool = False
    shot_rope_offset: float = 0.0
    prompt_switch: str = "keep"
    cache_dtype: Literal["bfloat16", "float32", "nvfp4"] | None = None

    def __post_init__(self) -> None:
        for name in ("chunk_frames", "num_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if self.solver not in SOLVERS:
            raise ValueError(f"solver={self.solver!r} is unknown; use one of {', '.join(SOLVERS)}")
        if self.guidance_scale < 0:
            raise ValueError(
                f"guidance_scale={self.guidance_scale} is negative; use 1 for none, 3 to 5 for a base model"
            )
        if self.prompt_switch not in ("keep", "recache"):
            raise ValueError(f"prompt_switch={self.prompt_switch!r} is unknown; use keep or recache")
        if self.cache_dtype is not None and self.cache_dtype not in CACHE_DTYPES:
            raise ValueError(
                f"cache_dtype={self.cache_dtype!r} is unknown; use one of {', '.join(CACHE_DTYPES)} or null"
            )
        _ = self.rule

    @property
    def rule(self) -> VisibilityRule:
        """Who sees whom, in chunks."""
        return VisibilityRule.from_frames(self.window, self.sink_frames, self.shot_sink, self.chunk_frames)

    @property
    def guided(self) -> bool:
        """Whether an unconditional branch runs."""
        return self.guidance_scale != 1

    def num_chunks(self, num_frames: int) -> int:
        """Chunks of a video of `num_frames`.

        Raises:
            ValueError: if the frames are no positive multiple of `chunk_frames`.
        """
        if num_frames < 1 or num_frames % self.chunk_frames:
            lower = max(num_frames // self.chunk_frames, 1) * self.chunk_frames
            raise ValueError(
                f"num_frames={num_frames} is no positive multiple of chunk_frames={self.chunk_frames}; use {lower} or "
                f"{lower + self.chunk_frames}"
            )
        return num_frames // self.chunk_frames

    def check_network(self, config: WanConfig) -> None:
        """Raise the `ValueError` for a network that cannot be rolled out in this way."""
        if self.cache_dtype == "nvfp4":
            check_head_dim(config.head_dim)
