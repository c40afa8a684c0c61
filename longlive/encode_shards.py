"""`longlive shards stage=encode`: clips are encoded before a training instead of during it.

Settings of clips, codec, text encoder and seed are those of a training (`experiment=...`), and so are the results, bit
by bit on equal hardware and libraries. The work is divided twice: among tasks that know nothing of each other
(`encode.task_index` of `encode.num_tasks`, on any machines that see the directory), and among the processes of each of
them (`encode.num_processes`), one device each. Whoever encodes the last shard finishes the set.
"""

from __future__ import annotations

import logging
import multiprocessing
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from hydra.utils import get_class
from omegaconf import DictConfig, OmegaConf
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch.multiprocessing import ProcessRaisedException

from longlive.callbacks.provenance import versions
from longlive.codecs.base import VideoCodec, to_unit_range
from longlive.config import check_types, instantiate, to_plain
from longlive.data.datamodule import VideoDataModule
from longlive.data.latent_shards import LatentShards, Share, VideoShards
from longlive.data.latents import LatentSettings
from longlive.data.shard_index import ShardIndex
from longlive.data.sources import UnreadableClipError
from longlive.text.base import TextEncoder, TokenEmbeds, without_padding
from longlive.typing import Float, Tensor, UInt8

log = logging.getLogger(__name__)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
PACKAGES = ("longlive", "torch", "diffusers", "transformers", "av")
"""Whose versions may change the bits of latents and embeddings. A set is encoded by one version of each."""
POLL_SECONDS = 0.5
_TYPES = dict.fromkeys(("epochs", "piece_frames", "num_processes", "first_gpu", "task_index", "num_tasks"), int)


class OnlineEncoder:
    """Encodes as a training module does, in pieces.

    Args:
        codec, text_encoder: frozen here, as in training.
        device: that the codec moves to.
        dtype: of the latents; a training makes float32.
    """

    def __init__(self, codec: VideoCodec, text_encoder: TextEncoder, device: torch.device, dtype: torch.dtype) -> None:
        self.codec = codec.eval().requires_grad_(False).to(device)
        self.text_encoder = text_encoder.eval().requires_grad_(False)
        self.device, self.dtype = device, dtype

    @torch.no_grad()
    def latents(self, pieces: Iterable[UInt8[Tensor, "t 3 H W"]]) -> Float[Tensor, "f c h w"]:
        encoder = self.codec.stream_encoder()
        parts = [encoder.push(to_unit_range(piece[None].to(self.device))).float() for piece in pieces]
        return torch.cat(parts, dim=1)[0].to("cpu", self.dtype)

    @torch.no_grad()
    def prompt_embeds(self, prompts: Sequence[str]) -> dict[str, TokenEmbeds]:
        embeds = self.text_encoder.encode(prompts).cpu()
        return {prompt: without_padding(padded) for prompt, padded in zip(prompts, embeds, strict=True)}


def encode_shards(config: DictConfig) -> None:
    """Encode this task's share of the shards of `config.source`.

    Raises:
        ValueError: if a setting is wrong, or the directory holds something else; before any work.
        FileNotFoundError: if videos are missing.
        UnreadableClipError: with `strict`, at the first clip that cannot be read; always, if none can be.
    """
    settings = config.encode
    check_types(settings, _TYPES)
    check_types(config, {"strict": bool})
    task, num_processes = Share(settings.task_index, settings.num_tasks), settings.num_processes
    if num_processes < 1:
        raise ValueError(f"encode.num_processes={num_processes} must be at least 1")
    device = _device(settings.device, settings.first_gpu)
    if device.type == "cuda" and num_processes != torch.cuda.device_count():
        log.info("%d GPUs are here; encode.num_processes may be as many", torch.cuda.device_count())
    shards, codec, text_encoder = _open(config, device)
    index = shards.begin(strict=config.strict)
    if index is None:
        mine = [shard for share in task.split(num_processes) for shard in share.of(shards.num_shards)]
        num_clips = sum(map(shards.num_clips, mine))
        with _progress(f"{len(mine)} of {shards.num_shards} shards", num_clips) as (bar, bar_task):
            if num_processes == 1:
                encoder = OnlineEncoder(codec, text_encoder, device, DTYPES[settings.dtype])
                index = _encode(config, shards, encoder, task, lambda clips: bar.advance(bar_task, clips))
            else:
                _in_processes(config, lambda clips: bar.update(bar_task, completed=clips))
                index = shards.begin(strict=config.strict)
    print(_report(config.directory, shards, index))


def _encode(
    config: DictConfig, shards: LatentShards, encoder: OnlineEncoder, share: Share, advance: Callable[[int], object]
) -> ShardIndex | None:
    pieces = config.encode.piece_frames
    return shards.encode(encoder, share, piece_frames=pieces, strict=config.strict, advance=advance)


def _device(device: str, gpu: int) -> torch.device:
    if device not in ("auto", "cpu", "cuda"):
        raise ValueError(f"encode.device={device!r} is unknown; use auto, cpu or cuda")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("encode.device=cuda, but PyTorch finds no GPU here; use encode.device=cpu")
    if device == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", gpu % torch.cuda.device_count())


def _open(config: DictConfig, device: torch.device) -> tuple[LatentShards, VideoCodec, TextEncoder]:
    """The set to write, and what encodes on that kind of device, all settings checked."""
    settings = config.encode
    if settings.dtype not in DTYPES:
        raise ValueError(f"encode.dtype={settings.dtype!r} is unknown; use {' or '.join(DTYPES)}")
    for name in ("epochs", "piece_frames"):
        if settings[name] < 1:
            raise ValueError(f"encode.{name}={settings[name]} must be at least 1")
    source = instantiate(config.source)
    if not isinstance(source, VideoShards):
        raise ValueError(
            f"stage=encode takes shards of videos, not a {type(source).__name__}; write its shards first "
            "(stage=write), then source=video_shards source.path=..."
        )
    if config.data.get("train") != config.source.path:
        raise ValueError(f"data.train={config.data.get('train')} is not what is encoded; give source.path alone")
    kind = get_class(config.data._target_)
    if not issubclass(kind, VideoDataModule):
        raise ValueError(f"data is a {kind.__name__}, which reads no clips; use data of a training on videos")
    data: VideoDataModule = instantiate(config.data)
    codec: VideoCodec = instantiate(config.codec)
    text_encoder: TextEncoder = instantiate(config.text)
    codec.check_size(data.spec.height, data.spec.width)
    if data.spec.temporal_ratio != codec.temporal_ratio:
        raise ValueError(
            f"data.temporal_ratio={data.spec.temporal_ratio}, but the codec's is {codec.temporal_ratio}; "
            f"use data.temporal_ratio={codec.temporal_ratio}"
        )
    latents = LatentSettings.of(
        data.spec,
        seed=data.seed,
        num_epochs=settings.epochs,
        dtype=settings.dtype,
        codec=codec.fingerprint,
        text_encoder=text_encoder.fingerprint,
        device=device.type,
        versions={name: version for name, version in versions().items() if name in PACKAGES},
    )
    return LatentShards(source.open(data.spec, data.seed), config.directory, latents), codec, text_encoder


def _in_processes(config: DictConfig, show: Callable[[int], None]) -> None:
    """Run the task's processes to their end; an error of one ends all, and an unreadable clip's is raised as it is."""
    num_processes = config.encode.num_processes
    spawn = multiprocessing.get_context("spawn")
    num_clips: Any = spawn.Array("q", num_processes)
    unreadable = spawn.SimpleQueue()
    arguments = (to_plain(config), num_clips, unreadable)
    context = torch.multiprocessing.start_processes(
        _process, args=arguments, nprocs=num_processes, join=False, start_method="spawn"
    )
    assert context is not None
    try:
        while not context.join(timeout=POLL_SECONDS):
            show(sum(num_clips))
    except ProcessRaisedException as error:
        if unreadable.empty():
            raise
        raise UnreadableClipError(*unreadable.get()) from error
    show(sum(num_clips))


def _process(process: int, config: dict[str, Any], num_clips: Any, unreadable: Any) -> None:
    """One of them."""
    settings = OmegaConf.create(config)
    device = _device(settings.encode.device, settings.encode.first_gpu + process)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    shards, codec, text_encoder = _open(settings, device)
    encoder = OnlineEncoder(codec, text_encoder, device, DTYPES[settings.encode.dtype])
    task = Share(settings.encode.task_index, settings.encode.num_tasks)

    def advance(clips: int) -> None:
        num_clips[process] += clips

    try:
        _encode(settings, shards, encoder, task.split(settings.encode.num_processes)[process], advance)
    except UnreadableClipError as error:
        unreadable.put((error.key, error.reason))
        raise


@contextmanager
def _progress(what: str, num_clips: int) -> Iterator[tuple[Progress, Any]]:
    """A bar that counts clips, those of finished shards at once, and says how long the rest will take."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("clips,"))
    with Progress(*columns, TimeRemainingColumn(), TextColumn("left")) as bar:
        yield bar, bar.add_task(f"encoding {what}", total=num_clips)


def _report(directory: str, shards: LatentShards, index: ShardIndex | None) -> str:
    if index is None:
        return (
            f"this task's shards are in {directory}, {shards.num_written} of all {shards.num_shards}; the task that "
            "encodes the last one finishes the set"
        )
    return f"latents of {len(index.samples) - len(index.skipped)} clips in {directory}, {len(index.skipped)} unreadable"
