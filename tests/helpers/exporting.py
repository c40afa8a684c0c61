"""`longlive export` on a tiny run, and the latents of rollouts from what it writes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from longlive.adapters.export import ExportSummary
from longlive.config import compose
from longlive.export import export
from longlive.generate import generate
from longlive.rollout.engine import RolloutEngine

PROMPTS = "prompts=[a red circle moves right,a blue square]"
PACKED_LAYERS = 10


def make(trained: Path, output: Path, *settings: str) -> ExportSummary:
    return export(compose("export", [f"checkpoint={trained}", f"output={output}", *settings]))


@contextmanager
def noted_rollouts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., torch.Tensor]]:
    """Inside, what it gives rolls out and returns the chunks before anything is rounded to pixels; the same rollout is
    made once."""
    seen: list[torch.Tensor] = []
    made: dict[tuple[Path, tuple[str, ...]], torch.Tensor] = {}
    real = RolloutEngine.rollout

    def noted(engine: RolloutEngine, *arguments: Any) -> Iterator[torch.Tensor]:
        for chunk in real(engine, *arguments):
            seen.append(chunk.clone())
            yield chunk

    def of(location: Path, *settings: str) -> torch.Tensor:
        if (location, settings) not in made:
            seen.clear()
            fixed = (PROMPTS, "num_frames=8", "rollout.num_steps=2", f"directory={tmp_path_factory.mktemp('videos')}")
            generate(compose("generate", [f"checkpoint={location}", *fixed, *settings]))
            made[location, settings] = torch.cat(seen, dim=1)
        return made[location, settings]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RolloutEngine, "rollout", noted)
        yield of
