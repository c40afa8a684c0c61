"""A module small enough to train in a test, and a way to make one in which nothing is zero."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer

from longlive.codecs.dct import DCTCodec
from longlive.data.batch import BatchSpec, VideoBatch
from longlive.diffusion.schedule import FlowSchedule
from longlive.models.wan.config import WanConfig
from longlive.modules.teacher_forcing import TeacherForcingModule
from longlive.text.toy import ToyTextEncoder

MakeModule = Callable[..., TeacherForcingModule]


@pytest.fixture
def settings() -> dict[str, Any]:
    """Arguments of a tiny module: chunks of 2 frames, 16 channels, 32 text features."""
    return {
        "model": WanConfig.tiny(num_layers=2, dim=48, ffn_dim=64, num_heads=2, text_dim=32, freq_dim=16),
        "codec": DCTCodec(),
        "text_encoder": ToyTextEncoder(embed_dim=32),
        "schedule": FlowSchedule(),
        "chunk_frames": 2,
        "optimizer": partial(torch.optim.SGD, lr=0.1),
        "seed": 3,
    }


@pytest.fixture
def make_module(settings: dict[str, Any]) -> MakeModule:
    """Builds a module whose network is random throughout: Wan's zero head would hide every error."""

    def make(kind: type[TeacherForcingModule] = TeacherForcingModule, **changes: Any) -> TeacherForcingModule:
        module = kind(**(settings | changes))
        module.configure_model()
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for name, parameter in module.trained_network.named_parameters():
                if name.endswith(("modulation", "bias")) or name.startswith("head"):
                    parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
                if "self_attn.q." in name or "self_attn.k." in name:
                    # Sharper attention than at initialisation: who is seen, and where, then shows in the output.
                    parameter.mul_(2)
        return module

    return make


@pytest.fixture
def batch() -> VideoBatch:
    """Two clips of 6 frames, 3 chunks, as latents of 4 x 4."""
    return VideoBatch.fake(BatchSpec(batch_size=2, num_frames=6, chunk_frames=2, channels=16, height=4, width=4))


@pytest.fixture
def make_trainer() -> Callable[..., Trainer]:
    """Lightning's own Trainer, quiet and without files."""
    quiet: dict[str, Any] = {
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return partial(Trainer, **quiet)
