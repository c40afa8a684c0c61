"""`longlive generate`: a checkpoint and prompts become videos, a contact sheet and a record of how they were made.

The checkpoint, or the file that `longlive export` made of it, says what it is: network, codec, text encoder, chunk size
and rollout settings come from the config inside it; `rollout.*` settings given here replace those. A LoRA over it
(`lora=`) brings its own rollout settings, where its file says them. Every video is a function of (checkpoint, LoRA,
settings, prompt, seed, its number), and is written whole or not at all: an interrupted run started again keeps the
finished ones.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import time
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, get_type_hints

import torch
from lightning.pytorch.plugins import Precision
from omegaconf import DictConfig
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from longlive import __version__
from longlive.adapters.lora_merging import merge_adapter
from longlive.callbacks.sample_video import slug
from longlive.codecs.base import num_raw_frames, to_unit_range
from longlive.config import check_types, instantiate, to_plain
from longlive.data.atomic import write_aside
from longlive.data.contact_sheet import write_contact_sheet
from longlive.data.prompts import StoryPrompt
from longlive.data.requests import VideoRequest, read_requests
from longlive.data.video import open_video
from longlive.data.video_writer import write_mp4
from longlive.metrics.first_frame import compare_first_frames
from longlive.modules.base import LongLiveModule
from longlive.precision.auto import autocast_context
from longlive.precision.nvfp4.linear import NVFP4Linear
from longlive.precision.nvfp4.plugin import NVFP4Precision
from longlive.precision.nvfp4.recipe import NVFP4Recipe
from longlive.precision.plugin import LinearPrecision
from longlive.rollout.engine import ChunkReport
from longlive.rollout.settings import RolloutSettings
from longlive.rollout.video import Timings, generate_videos
from longlive.trained import Trained, load_trained, with_lora
from longlive.typing import Tensor, UInt8

log = logging.getLogger(__name__)

RECORD = "generation.json"


def generate(config: DictConfig) -> dict[str, Any]:
    """Run `conf/generate.yaml` as composed; returns what it also writes to `generation.json`.

    Raises:
        ValueError: if there is no prompt, a setting is wrong, the checkpoint does not fit its own config, or the
            directory holds videos of other settings.
        FileNotFoundError: if there is no checkpoint.
    """
    start = time.perf_counter()
    check_numbers(config)
    requests = requests_of(config)
    trained, settings = load_asked(config)
    module = trained.module
    training = trained.config["data"]
    # Checkpoints from before there was a phrase were trained without.
    scene_cut_phrase = training.get("scene_cut_phrase", "")
    told = [request.story if config.scene_cuts else replace(request.story, scene_cuts=False) for request in requests]
    stories = [story_of(story, settings, config.num_frames, training["num_frames"]) for story in told]
    chunks = [story.chunks(scene_cut_phrase) for story in stories]
    lengths = [len(prompts) for prompts, _ in chunks]
    num_frames = sorted({length * settings.chunk_frames for length in lengths})
    height, width, fps = (
        training[name] if config[name] is None else config[name] for name in ("height", "width", "fps")
    )
    ratio = module.codec.temporal_ratio
    for frames in num_frames:
        module.codec.check_video(torch.empty(0, num_raw_frames(frames, ratio), 3, height, width))
    latent_size = (height // module.codec.spatial_ratio, width // module.codec.spatial_ratio)
    module.model_config.patches(*latent_size)
    first_frames = {
        index: request.first_frame(height, width) for index, request in enumerate(requests) if request.image is not None
    }
    warn_of_given_frames(trained, bool(first_frames))
    settings.check_network(module.model_config)
    metric = None if config.metric is None else instantiate(config.metric)
    precision, precision_record = precision_of(trained, config)
    asked = [
        story if isinstance(request.prompt, StoryPrompt) else request.prompt
        for request, story in zip(requests, stories, strict=True)
    ]

    directory = Path(config.directory)
    directory.mkdir(parents=True, exist_ok=True)
    record: dict[str, Any] = {
        "settings": {
            "checkpoint": str(trained.path),
            "step": trained.step,
            "lora": None if trained.lora is None else str(trained.lora),
            "seed": config.seed,
            "negative_prompt": config.negative_prompt,
            "num_frames": num_frames[0] if len(num_frames) == 1 else num_frames,
            "height": height,
            "width": width,
            "fps": fps,
            "rollout": asdict(settings),
            "precision": precision_record,
            "prompts": [asdict(prompt) if isinstance(prompt, StoryPrompt) else prompt for prompt in asked],
        },
        "version": __version__,
        "torch": torch.__version__,
        "device": device_name(),
        "timings": {},
    }
    if any(len(story.captions) > 1 and story.scene_cuts for story in stories):
        record["settings"]["scene_cut_phrase"] = scene_cut_phrase
    if first_frames:
        record["settings"]["first_frames"] = [
            digest(first_frames[index]) if index in first_frames else None for index in range(len(requests))
        ]
    record |= _check_directory(directory, record)
    names = [slug(request.name or request.story.name) for request in requests]
    files = [directory / f"{index:03d}-{name}.mp4" for index, name in enumerate(names)]
    waiting = [index for index, file in enumerate(files) if not file.exists()]
    place(module, precision, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    engine = module.rollout_engine(settings)
    record["kv_cache_bytes"] = engine.cache_bytes(latent_size, min(config.batch_size, len(files)), max(lengths))
    batches = batches_of(waiting, [(lengths[i], i in first_frames) for i in range(len(files))], config.batch_size)
    timings: list[Timings] = []
    with progress_bar() as progress, autocast_context(precision, module.device):
        task = progress.add_task("generating", total=sum(lengths[batch[0]] for batch in batches))

        def advance(report: ChunkReport) -> None:
            progress.advance(task)

        for batch in batches:
            prompts, shot_index = zip(*(chunks[index] for index in batch), strict=True)
            images = [first_frames[index] for index in batch if index in first_frames]
            videos, batch_timings = generate_videos(
                engine,
                module.codec,
                module.text_encoder,
                prompts,
                latent_size,
                seed=config.seed,
                sample_ids=batch,
                shot_index=torch.tensor(shot_index),
                negative_prompt=config.negative_prompt,
                on_chunk=advance,
                first_raw_frames=to_unit_range(torch.stack(images)) if images else None,
            )
            timings.append(batch_timings)
            for index, video in zip(batch, videos, strict=True):
                write_mp4(files[index], video, fps)
    if timings:
        total = Timings(
            sum(each.loop for each in timings),
            sum(each.streaming for each in timings),
            sum(each.raw_frames for each in timings),
        )
        record["timings"] = total.to_json() | {
            "whole": time.perf_counter() - start,
            "videos_generated": len(waiting),
            "batch_size": config.batch_size,
        }
    sheet = directory / "contact_sheet.png"
    write_contact_sheet(sheet, files[: config.sheet_rows], [request.text for request in requests])
    if metric is not None:
        metrics = measure(metric, files, asked)
        print_metrics(metrics)
        record["metrics"] = metrics
    if first_frames:
        record["first_frame"] = compare_first_frames(module.codec, files, first_frames)
    _write_json(directory / RECORD, record)
    sizes = " or ".join(str(num_raw_frames(frames, ratio)) for frames in num_frames)
    print(f"{len(files)} videos of {sizes} raw frames in {directory}")
    print(f"contact sheet: {sheet}")
    return record


def check_numbers(config: DictConfig) -> None:
    """What is known of the numbers before anything is loaded.

    Raises:
        ValueError: for one that is not positive, or not whole and has to be; or a setting of another type.
    """
    check_types(config, {"seed": int, "scene_cuts": bool})
    check_types(config.rollout, {name: kind | None for name, kind in get_type_hints(RolloutSettings).items()})
    for name in ("num_frames", "height", "width", "fps", "batch_size", "sheet_rows"):
        value, of_training = config[name], name not in ("batch_size", "sheet_rows")
        if value is None and of_training:
            continue
        kind, rule = ((int, float), "positive") if name == "fps" else (int, "a whole number of at least 1")
        if not isinstance(value, kind) or not 0 < value < math.inf:
            raise ValueError(f"{name}={value} must be {rule}{', or null: as in training' if of_training else ''}")


def load_asked(config: DictConfig) -> tuple[Trained, RolloutSettings]:
    """What the settings `checkpoint`, `lora` and `rollout` ask for.

    Raises:
        ValueError, FileNotFoundError: as `load_trained` and `with_lora`; or a setting of the rollout is wrong.
    """
    trained = load_trained(config.checkpoint)
    if config.lora is not None:
        trained = with_lora(trained, config.lora)
    given: dict[str, Any] = {str(name): value for name, value in config.rollout.items() if value is not None}
    return trained, replace(trained.module.rollout, **given)


def place(module: LongLiveModule, precision: Precision | str, device: torch.device) -> None:
    """Bring a module to its device, and its layers into the precision of the rollout, for good.

    Its adapter is merged into the float32 weights, which rolls out as fast as no adapter. Weights that the precision
    packs would lose most of it: beside them it multiplies on its own.
    """
    module.to(device)
    if isinstance(precision, LinearPrecision):
        precision.convert_module(module.requires_grad_(False))
        precision.freeze(module)
    elif module.adapter is not None:
        merge_adapter(module.trained_network, module.adapter)
        module.hold(module.trained_network)


def requests_of(config: DictConfig) -> list[VideoRequest]:
    """The videos that the settings `prompts` and `image` ask for; prompts may be an object that makes them.

    Raises:
        ValueError: as `read_requests`.
    """
    prompts = config.prompts
    if isinstance(prompts, DictConfig):
        prompts = instantiate(prompts)
    elif not isinstance(prompts, str):
        prompts = [str(prompt) for prompt in prompts or ()]
    return read_requests(prompts, config.image)


def story_of(story: StoryPrompt, settings: RolloutSettings, num_frames: int | None, usual_frames: int) -> StoryPrompt:
    """What a video shows, with the durations of its shots.

    Args:
        story: as asked for.
        settings: of the rollout.
        num_frames: how long the video has to be; None: as long as its story says.
        usual_frames: how long, if that says nothing.

    Raises:
        ValueError: if the story does not fit a video of that length.
    """
    if num_frames is None and story.durations is not None:
        return story
    return story.over(settings.num_chunks(usual_frames if num_frames is None else num_frames))


def batches_of(waiting: Sequence[int], kinds: Sequence[Hashable], batch_size: int) -> list[list[int]]:
    """Videos that are generated together: of one kind (their length, whether they begin with an image), in order."""
    groups: dict[Hashable, list[int]] = {}
    for index in waiting:
        groups.setdefault(kinds[index], []).append(index)
    return [group[i : i + batch_size] for group in groups.values() for i in range(0, len(group), batch_size)]


def warn_of_given_frames(trained: Trained, has_images: bool) -> None:
    """Say once if a network is given its first frames and was not trained with them, or the other way round."""
    given_frames = trained.config["module"].get("given_frames")
    if has_images and given_frames == 0:
        log.warning("%s was trained without given frames (module.given_frames=0): images are new to it", trained.path)
    if not has_images and given_frames:
        log.warning("%s was trained to be given its first frame; without image=... it has to make one", trained.path)


def digest(pixels: UInt8[Tensor, "1 3 H W"]) -> str:
    """Names the content of an image in the record."""
    return hashlib.blake2b(pixels.numpy().tobytes(), digest_size=8).hexdigest()


def precision_of(trained: Trained, config: DictConfig) -> tuple[Precision | str, Any]:
    """The precision of a rollout, and what the record says of it.

    Packed layers multiply in NVFP4 whatever would be `auto` otherwise. They were packed once for all, so settings that
    choose layers or the weights' rule are those of the file.

    Raises:
        ValueError: for a precision that would not use what is packed as it is.
    """
    packing = trained.packing
    if packing is not None and config.precision.get("precision") == "auto":
        recipe, layers = NVFP4Recipe(weights=packing.rule, weight_tiles=packing.tiles), packing.layers
        kept = packing.keep_last_blocks_bf16
        nvfp4 = NVFP4Precision(recipe=recipe, layers=layers, keep_last_blocks_bf16=kept, seed=config.seed)
        return nvfp4, {
            "precision": nvfp4.precision,
            "recipe": asdict(recipe),
            "layers": list(layers),
            "keep_last_blocks_bf16": kept,
        }
    precision: Precision | str = instantiate(config.precision)
    record = precision if isinstance(precision, str) else to_plain(config.precision)
    if packing is None:
        return precision, record
    if not isinstance(precision, NVFP4Precision):
        raise ValueError(
            f"{trained.path} holds NVFP4 weights; use precision=nvfp4 (or auto), and to multiply unquantised "
            "activations by them precision.recipe.activations=null"
        )
    network = trained.module.trained_network
    packed = {name for name, layer in network.named_modules() if isinstance(layer, NVFP4Linear)}
    chosen = {layer.name for layer in precision.selection.of(network, NVFP4Linear) if layer.reason is None}
    if precision.recipe.weights != packing.rule or chosen != packed:
        raise ValueError(
            f"{trained.path} is packed with rule={packing.rule}, layers={list(packing.layers)}, "
            f"keep_last_blocks_bf16={packing.keep_last_blocks_bf16}; precision.recipe.weights, precision.layers and "
            "precision.keep_last_blocks_bf16 must say the same, as they do with precision=auto"
        )
    return precision, record


def device_name() -> str:
    """The accelerator's name, or the CPU's with the number of threads used."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"cpu, {torch.get_num_threads()} threads"


def progress_bar() -> Progress:
    """Chunks done, elapsed and left."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("chunks"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
    )


def measure(metric: Any, files: Sequence[Path], prompts: Sequence[str | StoryPrompt]) -> dict[str, float]:
    """A video metric on the files as written."""
    for file, prompt in zip(files, prompts, strict=True):
        metric.update(to_unit_range(_read_whole(file)[None]), [prompt])
    return {name: round(float(value), 4) for name, value in metric.compute().items()}


def print_metrics(metrics: Mapping[str, float]) -> None:
    """A table: a row per attribute, with quarters and drift where the metric has them."""
    names = [name for name in metrics if "/" not in name]
    spans = list(dict.fromkeys(name.split("/")[1] for name in metrics if "/" in name))
    table = Table("", "video", *(span.replace("_", " ") for span in spans))
    for name in names:
        table.add_row(
            name, *(f"{metrics[k]:.3f}" if k in metrics else "" for k in (name, *(f"{name}/{s}" for s in spans)))
        )
    Console().print(table)


def _read_whole(file: Path) -> UInt8[Tensor, "t 3 H W"]:
    with open_video(file) as reader:
        return reader.read(range(reader.num_raw_frames))


def _check_directory(directory: Path, record: dict[str, Any]) -> dict[str, Any]:
    """Write the record of a new run; refuse to mix videos of two runs.

    Returns:
        What an earlier run of the same settings measured on the videos that are there: they are made only once.

    Raises:
        ValueError: if the directory belongs to other settings.
    """
    path = directory / RECORD
    settings = json.loads(json.dumps(record["settings"]))
    if path.exists():
        before = json.loads(path.read_text(encoding="utf-8"))
        changed = [name for name in settings if settings[name] != before["settings"].get(name)]
        if changed:
            raise ValueError(
                f"{directory} holds videos made with another {', '.join(changed)}; nothing already written is "
                "overwritten: give another directory=..., or remove it"
            )
        return {name: before[name] for name in ("timings", "metrics") if name in before}
    _write_json(path, record)
    return {}


def _write_json(path: Path, record: Mapping[str, Any]) -> None:
    with write_aside(path) as temporary:
        temporary.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
