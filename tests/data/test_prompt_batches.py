"""Prompts by position: every one once an epoch, on any number of ranks, and again from where a run was killed."""

from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from torch.optim import SGD

from helpers.runs import tiny_module
from longlive.data.prompt_batches import PromptBatch, PromptDataModule
from longlive.data.prompts import StoryPrompt
from longlive.modules.distillation import DistillationModule
from longlive.modules.streaming import StreamingSettings
from longlive.rollout.settings import RolloutSettings

TEXTS = [f"prompt {number}" for number in range(5)]
STORY = StoryPrompt("story", ("a cat", "a dog"), (1, 2))


def module(prompts: Any = TEXTS, data_rank: int = 0, data_size: int = 1, **changes: Any) -> PromptDataModule:
    settings = {"num_frames": 12, "chunk_frames": 4, "height": 32, "width": 48, "batch_size": 2, "seed": 3}
    made = PromptDataModule(prompts, **settings | changes)
    made.data_parallel = lambda: (data_rank, data_size)  # type: ignore[method-assign]
    return made


def batches(data: PromptDataModule, number: int) -> list[PromptBatch]:
    stream = iter(data.train_dataloader())
    return [next(stream) for _ in range(number)]


def seen(found: list[PromptBatch]) -> list[tuple[int, str]]:
    """Id and prompt of every sample, in order of the ids."""
    return sorted((int(i), row[0]) for batch in found for i, row in zip(batch.sample_ids, batch.prompts, strict=True))


def test_every_prompt_comes_once_an_epoch_in_an_order_of_the_seed() -> None:
    """And its ids never come again: noise would."""
    found = seen(batches(module(), 5))
    assert [number for number, _ in found] == list(range(10))
    first, second = ([text for _, text in found[start : start + 5]] for start in (0, 5))
    assert sorted(first) == sorted(second) == TEXTS
    assert first != second
    assert [text for _, text in seen(batches(module(seed=4), 5))] != first + second


@pytest.mark.parametrize("data_size", [1, 2])
def test_ranks_share_the_order_and_a_resumed_run_goes_on_in_it(data_size: int) -> None:
    """A position that counts this rank's samples alone would repeat prompts on other ranks."""
    whole = seen(batches(module(), 6))
    before, after = [], []
    for rank in range(data_size):
        before += batches(module(data_rank=rank, data_size=data_size), 2 // data_size)
    position = {"samples_consumed": 4, "clips_trained": 0, "num_batches": 2 // data_size}
    for rank in range(data_size):
        resumed = module(data_rank=rank, data_size=data_size)
        resumed.load_state_dict(position)
        assert resumed.state_dict() == position
        after += batches(resumed, 4 // data_size)
    assert seen(before) + seen(after) == whole


def test_a_batch_comes_for_every_clip_of_its_videos_and_a_resumed_run_goes_on_in_them() -> None:
    """Three clips each: at a position that counts batches alone, a resumed stream would get other prompts."""
    clips = {"clip_frames": 4}
    whole = [batch.sample_ids.tolist() for batch in batches(module(**clips), 8)]
    assert whole == [[0, 1]] * 3 + [[2, 3]] * 3 + [[4, 5]] * 2
    resumed = module(**clips)
    resumed.load_state_dict({"samples_consumed": 2, "clips_trained": 1, "num_batches": 4})
    assert [batch.sample_ids.tolist() for batch in batches(resumed, 4)] == whole[4:]
    resumed._num_trained_batches = lambda: 6  # type: ignore[method-assign]
    assert resumed.state_dict() == {"samples_consumed": 4, "clips_trained": 0, "num_batches": 6}


def test_stories_are_cut_as_they_say() -> None:
    (batch,) = batches(module([STORY], batch_size=1, scene_cut_phrase="Cut! "), 1)
    assert batch.prompts == (("a cat", "Cut! a dog", "a dog"),)
    assert torch.equal(batch.shot_index, torch.tensor([[0, 1, 1]]))
    (uncut,) = batches(module([STORY], batch_size=1, scene_cut_phrase="Cut! ", scene_cuts=False), 1)
    assert uncut.prompts == (("a cat", "a dog", "a dog"),)
    assert not uncut.shot_index.any()
    assert (batch.batch_size, batch.height, batch.width) == (1, 32, 48)
    assert batch.to("cpu") is batch


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompts": []}, "no prompt"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"num_frames": 10}, "num_frames=10 is no positive multiple of chunk_frames=4; use 8 or 12"),
        ({"chunk_frames": 0}, "chunk_frames=0 must be positive"),
        ({"height": 0}, "height=0 must be positive"),
        ({"width": -48}, "width=-48 must be positive"),
        ({"fps": 0.0}, r"fps=0\.0 must be positive"),
        ({"prompts": [STORY], "num_frames": 8}, "story"),
        ({"clip_frames": 8}, "clip_frames=8 does not divide num_frames=12"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        module(**changes)


STREAMING = {
    "streaming": StreamingSettings(max_frames=12, clip_frames=4),
    "student_every": 2,
    "rollout": RolloutSettings(chunk_frames=4, num_steps=2, window=8),
}


@pytest.mark.parametrize(
    ("stage", "data", "message"),
    [
        ({}, {"clip_frames": 4}, r"clip_frames=4 brings every batch 3 times.*; use data\.clip_frames=null"),
        ({"given_frames": 1}, {}, "given_frames=1, but the data holds prompts alone; train on clips"),
        (STREAMING, {"num_frames": 16, "clip_frames": 4}, r"data\.num_frames=16 and .* max_frames=12"),
        (STREAMING, {"clip_frames": 6}, r"data\.clip_frames=6, but .*; set data\.num_frames=12 data\.clip_frames=4"),
        (STREAMING, {}, r"data\.clip_frames=None, but streams have max_frames=12 and clip_frames=4"),
    ],
    ids=["clips without streams", "no first frames", "another length", "other clips", "no clips"],
)
def test_data_of_another_stage_is_refused_before_a_network_is_built(
    stage: dict[str, Any], data: dict[str, Any], message: str
) -> None:
    """Clips without streams would train on every batch several times, without an error."""
    trained: Any = tiny_module(
        DistillationModule, critic_optimizer=partial(SGD, lr=0.1), **{"student_every": 1, "guidance": 0.0} | stage
    )
    trainer = Trainer(accelerator="cpu", max_steps=1, logger=False, enable_checkpointing=False)
    with pytest.raises(ValueError, match=message):
        trainer.fit(trained, datamodule=module(**data))
    assert trained.network is None


def test_data_as_the_stage_wants_it_is_taken() -> None:
    for stage, clips in (({}, None), ({}, 12), (STREAMING, 4)):
        trained: Any = tiny_module(DistillationModule, critic_optimizer=partial(SGD, lr=0.1), **stage)
        data = module(clip_frames=clips)
        data.trainer = SimpleNamespace(lightning_module=trained)  # type: ignore[assignment]
        data.setup("fit")
