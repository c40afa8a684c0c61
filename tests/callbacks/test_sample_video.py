"""Videos while training: they show the averaged weights, are written where they are looked for, and change nothing."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from PIL import Image

from helpers.runs import MemoryLogger, assert_same, events, fake_batches, fit, tiny_module
from longlive.callbacks.ema import EMA
from longlive.callbacks.loss_breakdown import LossBreakdown
from longlive.callbacks.sample_video import SampleVideo, slug
from longlive.data.prompts import StoryPrompt
from longlive.data.requests import VideoRequest
from longlive.data.video import open_video
from longlive.modules.base import LongLiveModule
from longlive.rollout.engine import RolloutSettings
from longlive.rollout.video import generate_videos
from longlive.typing import RawFrames

PROMPTS = ("a red circle moves right", "A blue square, quickly!")
NUM_RAW_FRAMES = 29


def sampler(directory: Path, **changes: Any) -> SampleVideo:
    settings = {"prompts": PROMPTS, "num_frames": 8, "height": 32, "width": 32, "every_n_steps": 2}
    return SampleVideo(directory=str(directory / "samples"), **settings | changes)


def module(**changes: Any) -> LongLiveModule:
    return tiny_module(rollout=RolloutSettings(chunk_frames=4, num_steps=2), **changes)


def read(file: Path) -> RawFrames:
    with open_video(file) as reader:
        return reader.read(range(reader.num_raw_frames))


class State(Callback):
    """What training goes on with after a batch, once the samples are made."""

    def __init__(self) -> None:
        self.modes: list[bool] = []
        self.weights: list[dict[str, torch.Tensor]] = []
        self.random: list[torch.Tensor] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        self.modes.append(all(part.training for part in pl_module.modules()))
        self.weights.append({name: value.detach().clone() for name, value in pl_module.named_parameters()})
        self.random.append(torch.get_rng_state())


class Metric:
    """Notes what it is given."""

    def __init__(self) -> None:
        self.shapes: list[tuple[int, ...]] = []
        self.prompts: list[str] = []
        self.resets = 0

    def update(self, videos: torch.Tensor, prompts: Sequence[str]) -> None:
        assert videos.min() >= -1
        assert videos.max() <= 1
        self.shapes.append(tuple(videos.shape))
        self.prompts += prompts

    def compute(self) -> dict[str, torch.Tensor]:
        return {"colour": torch.tensor(0.25 * len(self.shapes))}

    def reset(self) -> None:
        self.resets += 1


@pytest.fixture(scope="module")
def sampled(tmp_path_factory) -> tuple[Path, EMA, LongLiveModule]:
    """Five steps, samples every two of them."""
    directory = tmp_path_factory.mktemp("run")
    ema, trained = EMA(decay=0.9), module()
    logger = TensorBoardLogger(directory, name="tensorboard", version="")
    fit(trained, fake_batches(5), [ema, sampler(directory)], logger)
    return directory, ema, trained


def test_every_interval_and_the_end_leave_a_file_per_prompt(sampled):
    directory, _, _ = sampled
    names = ["00-a-red-circle-moves-right.mp4", "01-a-blue-square-quickly.mp4"]
    found = {
        folder.name: sorted(file.name for file in folder.iterdir()) for folder in (directory / "samples").iterdir()
    }
    assert found == {f"step-{step:07d}": names for step in (2, 4, 5)}
    for file in (directory / "samples").rglob("*.mp4"):
        assert read(file).shape == (NUM_RAW_FRAMES, 3, 32, 32)


def test_tensorboard_gets_an_animation_and_its_prompt(sampled):
    """A video summary that nothing decodes is written without an error, and shows nothing."""
    directory, _, _ = sampled
    images, texts = {}, {}
    for step, value in events(directory):
        plugin = value.metadata.plugin_data.plugin_name
        if plugin == "images":
            width, height, content = value.tensor.string_val[:3]
            images[step, value.tag] = (int(width), int(height), content)
        elif plugin == "text":
            texts[step, value.tag] = value.tensor.string_val[0].decode()
    assert sorted(images) == [(step, f"samples/0{index}") for step in (1, 3, 4) for index in (0, 1)]
    for width, height, content in images.values():
        assert (width, height) == (32, 32)
        animation = Image.open(io.BytesIO(content))
        assert animation.format == "GIF"
        assert animation.size == (32, 32)
        # Pillow joins frames that are equal.
        assert 1 < animation.n_frames <= NUM_RAW_FRAMES
        assert animation.info["loop"] == 0
    assert [texts[step, f"samples/0{index}/prompt/text_summary"] for step in (1, 3, 4) for index in (0, 1)] == [
        *PROMPTS
    ] * 3


def test_the_videos_are_those_of_the_averaged_weights(sampled, tmp_path, monkeypatch):
    """The weights themselves make worse videos, and another model than the one that is kept."""
    _, ema, trained = sampled
    shown: list[RawFrames] = []
    monkeypatch.setattr(SampleVideo, "_write", lambda self, videos, trainer: shown.append(videos))
    restored = EMA(decay=0.9)
    fit(module(), fake_batches(5), [restored, sampler(tmp_path)])
    assert_same(restored.average, ema.average)

    def expected(weights: dict[str, torch.Tensor]) -> RawFrames:
        other = module()
        other.configure_model()
        other.load_state_dict(weights)
        prompts = [[prompt] * 2 for prompt in PROMPTS]
        engine = other.eval().rollout_engine()
        return generate_videos(engine, other.codec, other.text_encoder, prompts, (4, 4), seed=0, sample_ids=(0, 1))[0]

    assert torch.equal(shown[-1], expected(ema.average))
    assert not torch.equal(shown[-1], expected(trained.state_dict()))


@pytest.mark.parametrize("averages", [True, False])
def test_sampling_changes_nothing_of_training(tmp_path, averages):
    """A forgotten eval mode, weights left swapped or a number drawn from the global generator bend the curve after
    every sample."""
    logs, states, random = [], [], torch.get_rng_state()
    for extra in ([sampler(tmp_path, metric=Metric())], []):
        logger, state = MemoryLogger(), State()
        torch.set_rng_state(random)
        ema = [EMA(decay=0.9)] if averages else []
        fit(module(), fake_batches(6), [*ema, LossBreakdown(1), *extra, state], logger)
        logs.append(logger.of("train/loss"))
        states.append(state)
        assert state.modes == [True] * 6
    assert logs[0] == logs[1]
    assert len(logs[0]) == 6
    assert_same(states[0].weights, states[1].weights)
    assert_same(states[0].random, states[1].random)


def test_weights_and_mode_are_restored_when_sampling_fails(tmp_path, monkeypatch):
    callback, ema, trained = sampler(tmp_path), EMA(decay=0.9), module()
    monkeypatch.setattr(callback, "_roll_out", lambda module: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        fit(trained, fake_batches(4), [ema, callback])
    undisturbed, alone = module(), EMA(decay=0.9)
    fit(undisturbed, fake_batches(2), [alone])
    assert_same(dict(trained.state_dict()), dict(undisturbed.state_dict()))
    assert_same(ema.average, alone.average)
    assert trained.training


def test_the_metric_sees_all_videos_afresh_and_is_logged(tmp_path):
    logger, metric = MemoryLogger(), Metric()
    prompts = [f"a red circle {index}" for index in range(3)]
    callback = sampler(tmp_path, prompts=prompts, metric=metric, num_shown=1, every_n_steps=2)
    fit(module(), fake_batches(4), [callback], logger)
    assert metric.shapes == [(3, NUM_RAW_FRAMES, 3, 32, 32)] * 2
    assert metric.prompts == prompts * 2
    assert metric.resets == 2
    assert logger.of("samples/colour") == {1: 0.25, 3: 0.5}
    assert len(list((tmp_path / "samples").rglob("*.mp4"))) == 2


def test_with_interval_0_only_the_end_is_sampled(tmp_path):
    fit(module(), fake_batches(3), [sampler(tmp_path, every_n_steps=0)])
    assert [folder.name for folder in (tmp_path / "samples").iterdir()] == ["step-0000003"]


def test_accumulated_batches_are_sampled_once_per_step(tmp_path, monkeypatch):
    callback, calls = sampler(tmp_path, every_n_steps=1), []
    monkeypatch.setattr(callback, "_write", lambda videos, trainer: calls.append(trainer.global_step))
    fit(module(), fake_batches(6), [callback], max_steps=3, accumulate_grad_batches=2)
    assert calls == [1, 2, 3]


def test_a_resumed_run_does_not_sample_its_first_step_again(tmp_path, monkeypatch):
    fit(module(), fake_batches(2)).save_checkpoint(tmp_path / "2.ckpt")
    callback, calls = sampler(tmp_path, every_n_steps=2), []
    monkeypatch.setattr(callback, "_write", lambda videos, trainer: calls.append(trainer.global_step))
    batches = fake_batches(6)[2:]
    settings = {"max_steps": 4, "accumulate_grad_batches": 2, "checkpoint": tmp_path / "2.ckpt"}
    fit(module(), batches, [callback], **settings)
    assert calls == [4]


def test_without_a_prompt_there_is_nothing_to_sample(tmp_path):
    with pytest.raises(ValueError, match="no prompt"):
        sampler(tmp_path, prompts=[])


@pytest.mark.parametrize("changes", [{"fps": 0}, {"fps": -24.0}, {"height": 0}, {"width": -32}], ids=str)
def test_sizes_and_rates_are_positive(tmp_path, changes):
    """Found when the first file is written, they cost the steps before it."""
    ((name, value),) = changes.items()
    with pytest.raises(ValueError, match=f"{name}={value} must be positive"):
        sampler(tmp_path, **changes)


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ({"num_frames": 6}, "num_frames=6"),
        ({"height": 36}, "height=36, width=32 are no multiples of the codec's spatial_ratio=8; use 32, 32"),
        ({"width": 40}, "latent height=4, width=5 are no multiples of patch_size"),
    ],
)
def test_impossible_sizes_are_refused_before_training(tmp_path, size, message):
    """Found at the first sample, they cost the steps before it; rounded down, the videos have another size."""
    trained = module()
    with pytest.raises(ValueError, match=message):
        fit(trained, fake_batches(2), [sampler(tmp_path, **size)])
    assert trained.network is None


@pytest.mark.parametrize(
    ("prompt", "name"),
    [
        ("A red circle, moving -- right!", "a-red-circle-moving-right"),
        ("", "empty"),
        ("ß 漢字 ..", "empty"),
        ("../../etc/passwd", "etc-passwd"),
        ("a" * 70, "a" * 60),
        ("b" * 59 + " ccc", "b" * 59),
    ],
)
def test_a_prompt_becomes_a_file_name(prompt, name):
    assert slug(prompt) == name


def test_a_story_is_rolled_out_with_its_shots_prompts_and_cuts(tmp_path, monkeypatch):
    """Samples without the scene-cut phrase, or without the cut itself, would show a network that never cuts."""
    asked: dict[str, Any] = {}

    def generate(engine, codec, text_encoder, prompts, latent_size, *, shot_index, **names: Any) -> tuple[Any, None]:
        asked.update(prompts=[list(row) for row in prompts], shots=shot_index.tolist())
        return torch.zeros(len(prompts), 61, 3, 32, 32, dtype=torch.uint8), None

    monkeypatch.setattr("longlive.callbacks.sample_video.generate_videos", generate)
    metric = Metric()
    prompts = [
        "a red circle",
        StoryPrompt("There and back", ("a dog", "a cat", "a dog"), (1, 2, 1)),
        ["a hen", "a cow"],
    ]
    metric.update = lambda videos, prompts: asked.update(measured=prompts)  # type: ignore[method-assign]
    callback = sampler(tmp_path, prompts=prompts, num_frames=16, metric=metric, scene_cut_phrase="Cut. ")
    logger = TensorBoardLogger(tmp_path, name="tensorboard", version="")
    fit(module(), fake_batches(1), [callback], logger)
    assert asked["shots"] == [[0, 0, 0, 0], [0, 1, 1, 2], [0, 0, 1, 1]]
    assert asked["prompts"] == [
        ["a red circle"] * 4,
        ["a dog", "Cut. a cat", "a cat", "Cut. a dog"],
        ["a hen", "a hen", "Cut. a cow", "a cow"],
    ]
    assert asked["measured"] == [prompts[0], prompts[1], StoryPrompt("a-hen", ("a hen", "a cow"), (2, 2))]
    names = sorted(file.name for file in (tmp_path / "samples" / "step-0000001").iterdir())
    assert names == ["00-a-red-circle.mp4", "01-there-and-back.mp4", "02-a-hen.mp4"]
    texts = [
        v.tensor.string_val[0].decode() for _, v in events(tmp_path) if v.metadata.plugin_data.plugin_name == "text"
    ]
    assert texts == ["a red circle", "a dog | a cat | a dog", "a hen | a cow"]


def test_a_story_that_does_not_fit_the_video_is_refused_before_training(tmp_path):
    callback = sampler(tmp_path, prompts=[StoryPrompt("long", ("a dog", "a cat"), (1, 2))], num_frames=8)
    with pytest.raises(ValueError, match=r"story 'long' last 1 \+ 2 = 3 chunks, but the video has 2"):
        fit(module(), fake_batches(1), [callback])


def test_a_video_may_begin_with_an_image(tmp_path, monkeypatch):
    """A network that was trained with its first frame given has never learnt to make one."""
    trained = module(given_frames=1)
    images = [torch.full((3, 32, 32), level, dtype=torch.uint8) for level in (40, 200)]
    requests = [VideoRequest(prompt, image) for prompt, image in zip(PROMPTS, images, strict=True)]
    metric = Metric()
    fit(trained, fake_batches(1), [sampler(tmp_path, prompts=requests, metric=metric)])
    assert metric.prompts == list(PROMPTS)
    for index, image in enumerate(images):
        (file,) = (tmp_path / "samples" / "step-0000001").glob(f"0{index}-*.mp4")
        assert (read(file)[0].float() - image.float()).abs().mean() < 8, "as the toy codec knows it"
    with pytest.raises(ValueError, match="some prompts have an image and some have none"):
        sampler(tmp_path, prompts=[requests[0], "a red circle"])
