#!/usr/bin/env python
"""How much left context (halo) a codec needs, so that a window encoded alone equals the same part of the whole encode.

    .venv/bin/python tools/measure_halo.py --tiny
    .venv/bin/python tools/measure_halo.py --dct
    .venv/bin/python tools/measure_halo.py Wan2.2-TI2V-5B-Diffusers --height 704 --width 1280 --device cuda --write

Definition. The error of a halo of H frames is the largest absolute difference, over all clips, windows and owned
frames, between the latents of a window that begins H frames early and those of the whole encode, both in float32.
Latents have about unit variance, so the bound is 2^-8: the rounding of bfloat16 between 1 and 2. The clips are uniform
noise, a scene of the toy world that fills the picture, and the videos given with --video.

--write stores the smallest halo below the bound as halo.json beside the codec's config.json, where
`WanVideoCodec.from_pretrained` finds it.
"""

from __future__ import annotations

import argparse
import platform
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from longlive import __version__, rng
from longlive.codecs.base import VideoCodec, num_raw_frames
from longlive.codecs.dct import DCTCodec
from longlive.codecs.halo import MeasuredHalo
from longlive.codecs.wan import WanVideoCodec, autoencoder_folder
from longlive.data.joined import centre_crop_and_resize
from longlive.data.toyworld import random_scene, render
from longlive.data.video import open_video
from longlive.parallel.codec_halo import BFLOAT16_ROUNDING, halo_errors, smallest_halo
from longlive.typing import Tensor, UInt8, Video

NUM_WINDOWS = 4
"""Windows of each clip that are tried: their starts lie one frame apart."""


def make_codec(settings: argparse.Namespace) -> tuple[VideoCodec, int]:
    """The codec in float32, and its exact halo."""
    if settings.dct:
        codec: VideoCodec = DCTCodec()
        return codec, codec.halo_frames
    wan = WanVideoCodec.tiny() if settings.tiny else WanVideoCodec.from_pretrained(settings.folder)
    return wan, wan.exact_halo_frames


def make_clips(settings: argparse.Namespace, length: int) -> dict[str, Video]:
    """Clips of `length` raw frames by name, one sample each, in [-1, 1]."""
    size = (settings.height, settings.width)
    noise = 2 * torch.rand((1, length, 3, *size), generator=rng.generator(0, "halo_noise")) - 1
    clips = {"noise": noise}
    clips["toy world"] = to_unit_range(centre_crop_and_resize(render(random_scene(0, 0), length), *size))
    for path in settings.video:
        with open_video(path) as reader:
            if reader.num_raw_frames < length:
                raise ValueError(f"--video {path} has {reader.num_raw_frames} raw frames, the clip needs {length}")
            frames = centre_crop_and_resize(reader.read(range(length)), *size, reader.index.pixel_aspect)
            clips[path.name] = to_unit_range(frames)
    return clips


def to_unit_range(frames: UInt8[Tensor, "t 3 H W"]) -> Video:
    """uint8 pixels to [-1, 1], float32, as a batch of one."""
    return frames[None].float().div_(127.5).sub_(1)


@torch.no_grad()
def measure(settings: argparse.Namespace) -> tuple[list[float], MeasuredHalo]:
    """The error of every halo, and the choice."""
    torch.backends.cudnn.allow_tf32 = False  # else float32 is a name only
    codec, exact = make_codec(settings)
    codec.to(settings.device)
    starts = list(range(2, 2 + NUM_WINDOWS))
    # One frame beyond the exact halo, so that the table's last row shows that nothing is missing.
    num_frames = starts[-1] + exact + 2
    clips = make_clips(settings, num_raw_frames(num_frames, codec.temporal_ratio))
    with Progress(transient=True) as progress:
        task = progress.add_task("encoding", total=len(clips) * (1 + len(starts)))
        videos = [clip.to(settings.device) for clip in clips.values()]
        errors = halo_errors(codec, videos, starts, lambda: progress.advance(task))[: exact + 1]
    halo = smallest_halo(errors, settings.bound)
    definition = {
        "error": "largest absolute difference of a window's latents to those of the whole encode",
        "clip": {
            "num_frames": num_frames,
            "height": settings.height,
            "width": settings.width,
            "contents": list(clips),
            "window_starts": starts,
        },
        "dtype": "float32",
        "device": settings.device,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "diffusers": version("diffusers"),
            "longlive": __version__,
        },
    }
    return errors, MeasuredHalo(halo, errors[halo], settings.bound, definition)


def show(errors: Sequence[float], measured: MeasuredHalo) -> None:
    """Print a row per halo."""
    clip = measured.definition["clip"]
    table = Table(
        title=f"{clip['num_frames']} frames of {clip['height']} x {clip['width']}, float32",
        caption=f"bound {measured.bound:g}; contents: {', '.join(clip['contents'])}",
    )
    for title in ("halo [frames]", "max error", ""):
        table.add_column(title, justify="right")
    for halo, error in enumerate(errors):
        notes = ["smallest below the bound"] * (halo == measured.halo_frames)
        notes += ["exact by receptive field"] * (halo == len(errors) - 1)
        table.add_row(str(halo), f"{error:.2e}", ", ".join(notes))
    Console().print(table)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, nargs="?", help="a diffusers folder with Wan's autoencoder")
    parser.add_argument("--tiny", action="store_true", help="the tiny random Wan codec instead")
    parser.add_argument("--dct", action="store_true", help="the toy world's codec instead")
    parser.add_argument("--height", type=int, default=64)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--video", type=Path, action="append", default=[], help="one more clip; may be repeated")
    parser.add_argument("--bound", type=float, default=BFLOAT16_ROUNDING)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--write", action="store_true", help="store the choice beside the codec's config.json")
    settings = parser.parse_args(arguments)
    if (settings.folder is not None) + settings.tiny + settings.dct != 1:
        parser.error("name one codec: a diffusers folder, --tiny or --dct")
    if settings.write and settings.folder is None:
        parser.error("--write stores the halo in a codec's folder: name a folder instead of --tiny or --dct")
    try:
        errors, measured = measure(settings)
        show(errors, measured)
        if settings.write:
            Console().print(f"written to {measured.write(autoencoder_folder(settings.folder))}")
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
