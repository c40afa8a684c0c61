"""Many videos at a glance: a picture with a row of raw frames for each."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from PIL import Image, ImageDraw

from longlive.data.atomic import write_aside
from longlive.data.video import open_video
from longlive.typing import Tensor, UInt8

SHEET_COLUMNS = 8
"""Raw frames of one video in the contact sheet, evenly spread, first and last included."""


def write_contact_sheet(path: Path, files: Sequence[Path], prompts: Sequence[str]) -> None:
    """A PNG with a row per video: raw frames evenly spread over it, its prompt above."""
    rows = []
    for file in files:
        with open_video(file) as reader:
            places = (
                torch.linspace(0, reader.num_raw_frames - 1, min(SHEET_COLUMNS, reader.num_raw_frames)).round().long()
            )
            rows.append(reader.read(places.tolist()))
    scale = max(1, 96 // rows[0].shape[-1])
    height, width = rows[0].shape[-2] * scale, rows[0].shape[-1] * scale
    caption, gap = 16, 4
    sheet = Image.new("RGB", (len(rows[0]) * (width + gap), len(rows) * (height + caption + gap)), "white")
    pen = ImageDraw.Draw(sheet)
    for row, (frames, prompt) in enumerate(zip(rows, prompts, strict=False)):
        top = row * (height + caption + gap)
        pen.text((2, top + 2), prompt, fill="black")
        for column, frame in enumerate(_images(frames)):
            image = frame.resize((width, height), Image.Resampling.NEAREST)
            sheet.paste(image, (column * (width + gap), top + caption))
    with write_aside(path) as temporary:
        sheet.save(temporary, format="PNG")


def _images(frames: UInt8[Tensor, "t 3 H W"]) -> Iterator[Image.Image]:
    return (Image.fromarray(frame) for frame in frames.permute(0, 2, 3, 1).numpy())
