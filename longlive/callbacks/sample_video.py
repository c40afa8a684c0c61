"""Videos while training: roll out a few prompts with the averaged weights, show them in TensorBoard, keep the mp4
files.

TensorBoard gets an animated GIF (its own `add_video` writes nothing with current moviepy); the exact video lies beside
the log as mp4. Metrics given here are computed on the same videos.

A prompt is a text, or a story: a text per shot, whose video is cut where the story says, with the prompts and shots
that `generate` would give its chunks. With a first frame (`VideoRequest`) the video begins with it.
"""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from PIL import Image
from tensorboard.compat.proto.summary_pb2 import Summary

from longlive.callbacks.ema import EMA
from longlive.codecs.base import to_unit_range
from longlive.data.prompts import StoryPrompt
from longlive.data.requests import VideoRequest
from longlive.data.shots import SCENE_CUT_PHRASE
from longlive.data.video_writer import write_mp4
from longlive.modules.base import LongLiveModule
from longlive.parallel.strategy import ShardedStrategy
from longlive.rollout.video import generate_videos
from longlive.typing import RawFrames, Tensor, UInt8


@runtime_checkable
class VideoMetric(Protocol):
    """What is measured on videos and their prompts, texts or stories; `metrics.toyworld.ToyWorldAccuracy` is one."""

    def update(self, videos: Tensor, prompts: Sequence[Any]) -> None: ...

    def compute(self) -> dict[str, Tensor]: ...

    def reset(self) -> None: ...


class SampleVideo(Callback):
    """Every `every_n_steps` optimizer steps and after the last one: videos, on rank 0.

    Args:
        prompts: one video each: a text, a `StoryPrompt`, the captions of shots that last as long, or nearly, or one of
            these with its first frame (`VideoRequest`). All videos have a first frame given, or none.
        num_frames: latent frames, a multiple of the module's `chunk_frames`.
        height, width: pixels.
        fps: of the files.
        every_n_steps: 0: never during training, only at its end.
        seed: names the noise: the same one every time, so that videos of different steps compare.
        directory: where the mp4 files go, in a folder per step.
        metric: optional, logged as `samples/<name>`.
        num_shown: this many of the videos are written to TensorBoard and to files; all are measured.
        scene_cut_phrase: begins the first prompt of every shot but the first; the one of training.

    Raises:
        ValueError: if there is no prompt, a story's captions and durations do not fit, only some have an image, or a
            size or the rate is not positive.
    """

    def __init__(
        self,
        prompts: Sequence[str | StoryPrompt | VideoRequest | Sequence[str]],
        num_frames: int,
        height: int,
        width: int,
        directory: str,
        fps: float | int = 24.0,
        every_n_steps: int = 500,
        seed: int = 0,
        metric: VideoMetric | None = None,
        num_shown: int = 4,
        scene_cut_phrase: str = SCENE_CUT_PHRASE,
    ) -> None:
        if not prompts:
            raise ValueError("no prompt: SampleVideo needs at least one")
        for name, value in (("height", height), ("width", width), ("fps", fps)):
            if not value > 0:
                raise ValueError(f"{name}={value} must be positive")
        self.requests = [
            prompt
            if isinstance(prompt, VideoRequest)
            else VideoRequest(
                prompt if isinstance(prompt, str | StoryPrompt) else StoryPrompt(slug(prompt[0]), tuple(prompt))
            )
            for prompt in prompts
        ]
        if len({request.image is None for request in self.requests}) > 1:
            raise ValueError("some prompts have an image and some have none; give all of them one, or none")
        self.scene_cut_phrase = scene_cut_phrase
        self.num_frames = num_frames
        self.height, self.width, self.fps = height, width, fps
        self.every_n_steps = every_n_steps
        self.seed = seed
        self.directory = Path(directory)
        self.metric = metric
        self.num_shown = num_shown
        self._last_step = -1

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse impossible sizes and stories before training starts."""
        assert isinstance(pl_module, LongLiveModule)
        num_chunks = pl_module.rollout.num_chunks(self.num_frames)
        for request in self.requests:
            request.story.over(num_chunks)
            if request.image is not None:
                request.first_frame(self.height, self.width)
        codec = pl_module.codec
        codec.check_size(self.height, self.width)
        pl_module.model_config.patches(self.height // codec.spatial_ratio, self.width // codec.spatial_ratio)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._last_step = trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        if self.every_n_steps and step % self.every_n_steps == 0 and step != trainer.max_steps:
            self.sample(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.sample(trainer, pl_module)

    @torch.no_grad()
    def sample(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Roll out, measure and write, once per optimizer step."""
        # Every rank holds a part of a sharded network, so all of them roll out; otherwise the first one does.
        is_sharded = isinstance(trainer.strategy, ShardedStrategy)
        if trainer.global_step == self._last_step or not (trainer.is_global_zero or is_sharded):
            return
        self._last_step = trainer.global_step
        assert isinstance(pl_module, LongLiveModule)
        averages = [callback for callback in trainer.callbacks if isinstance(callback, EMA)]  # type: ignore[attr-defined]
        average = averages[0].averaged(pl_module) if averages else nullcontext()
        pl_module.eval()
        try:
            with average, trainer.precision_plugin.forward_context():
                videos = self._roll_out(pl_module)
        finally:
            pl_module.train()
        if not trainer.is_global_zero:
            return
        self._write(videos[: self.num_shown], trainer)
        if self.metric is not None:
            self.metric.reset()
            num_chunks = pl_module.rollout.num_chunks(self.num_frames)
            asked = [
                request.prompt if isinstance(request.prompt, str) else request.prompt.over(num_chunks)
                for request in self.requests
            ]
            self.metric.update(to_unit_range(videos), asked)
            values = {f"samples/{name}": float(value) for name, value in self.metric.compute().items()}
            for logger in trainer.loggers:
                logger.log_metrics(values, step=trainer.global_step - 1)

    def _roll_out(self, module: LongLiveModule) -> RawFrames:
        num_chunks = module.rollout.num_chunks(self.num_frames)
        codec = module.codec
        rows = [request.story.over(num_chunks).chunks(self.scene_cut_phrase) for request in self.requests]
        images = [
            request.first_frame(self.height, self.width) for request in self.requests if request.image is not None
        ]
        videos, _ = generate_videos(
            module.rollout_engine(),
            codec,
            module.text_encoder,
            [prompts for prompts, _ in rows],
            (self.height // codec.spatial_ratio, self.width // codec.spatial_ratio),
            seed=self.seed,
            sample_ids=range(len(rows)),
            shot_index=torch.tensor([shots for _, shots in rows]),
            first_raw_frames=to_unit_range(torch.stack(images)) if images else None,
        )
        return videos

    def _write(self, videos: RawFrames, trainer: Trainer) -> None:
        folder = self.directory / f"step-{trainer.global_step:07d}"
        folder.mkdir(parents=True, exist_ok=True)
        for index, (video, request) in enumerate(zip(videos, self.requests, strict=False)):
            write_mp4(folder / f"{index:02d}-{slug(request.name or request.story.name)}.mp4", video, self.fps)
            for logger in trainer.loggers:
                if isinstance(logger, TensorBoardLogger):
                    add_animation(
                        logger, f"samples/{index:02d}", video, request.text, self.fps, trainer.global_step - 1
                    )


def slug(prompt: str, longest: int = 60) -> str:
    """A prompt as part of a file name."""
    return re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:longest].rstrip("-") or "empty"


def add_animation(
    logger: TensorBoardLogger, tag: str, video: UInt8[Tensor, "t 3 H W"], prompt: str, fps: float, step: int
) -> None:
    """An animated GIF under the tag, and its prompt as text beside it."""
    frames = [
        Image.fromarray(frame).quantize(128, method=Image.Quantize.FASTOCTREE)
        for frame in video.permute(0, 2, 3, 1).numpy()
    ]
    buffer = io.BytesIO()
    frames[0].save(
        buffer, format="GIF", save_all=True, append_images=frames[1:], duration=max(20, round(1000 / fps)), loop=0
    )
    image = Summary.Image(
        height=video.shape[2], width=video.shape[3], colorspace=3, encoded_image_string=buffer.getvalue()
    )
    writer = logger.experiment._get_file_writer()
    writer.add_summary(Summary(value=[Summary.Value(tag=tag, image=image)]), step)
    logger.experiment.add_text(f"{tag}/prompt", prompt, step)
