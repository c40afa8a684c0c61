"""`longlive generate` on a tiny run, in this process, and a look at what it asks of the rollout."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from helpers.runs import run, write_toyworld
from longlive import generate as generation
from longlive.config import compose
from longlive.data.video import open_video

PROMPTS = ("a red circle moves slowly right over a dark ground", "a blue square", "a cyan cross")


def train_visibly(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 12 steps with a visible learning rate: at its start the network answers zero to everything."""
    directory = tmp_path_factory.mktemp("trained")
    shards = write_toyworld(tmp_path_factory.mktemp("shards"))
    run(directory, shards, "optimizer.lr=0.02")
    return directory


def make(trained: Path, directory: Path, *more: str, prompts: str | None = None) -> dict[str, Any]:
    """Two solver steps; `PROMPTS`, unless told otherwise."""
    given = f"prompts=[{','.join(PROMPTS)}]" if prompts is None else prompts
    settings = [f"checkpoint={trained}", f"directory={directory}", given, "precision=32-true", "rollout.num_steps=2"]
    return generation.generate(compose("generate", [*settings, *more]))


def read(file: Path) -> torch.Tensor:
    with open_video(file) as reader:
        return reader.read(range(reader.num_raw_frames))


def note_calls(monkeypatch: pytest.MonkeyPatch) -> list[SimpleNamespace]:
    """Engine, prompts, shots, sample ids, ... and videos of every call of `generate_videos` from now on."""
    calls: list[SimpleNamespace] = []
    real = generation.generate_videos

    def noted(engine: Any, codec: Any, text_encoder: Any, prompts: Any, *arguments: Any, **settings: Any) -> Any:
        videos, timings = real(engine, codec, text_encoder, prompts, *arguments, **settings)
        calls.append(SimpleNamespace(engine=engine, prompts=prompts, videos=videos, **settings))
        return videos, timings

    monkeypatch.setattr(generation, "generate_videos", noted)
    return calls
