"""What can be asked of a trained network: videos, each with a prompt and, for image to video, its first frame.

Prompts come as texts, as a text file with one per line, or as a folder in one of three layouts:

    <folder>/<case>/0.json, 1.json, ...                      videos of several shots (`prompts.py`)
    <folder>/prompts/<name>.txt, <folder>/images/<name>.png  a text each, and a first frame
    <folder>/<name>.txt, <folder>/<name>.png                 the same, side by side

In the last two, there is an image for every text or for none. An image, or a folder of them, may also be given beside
prompts that come without: one image is the first frame of all videos, one prompt goes with all images; else there are
as many of either, and they are matched by name where prompts have one, in sorted order where not.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError

from longlive.data.joined import centre_crop_and_resize
from longlive.data.prompts import StoryPrompt, holds_cases, read_prompt_folder
from longlive.typing import Tensor, UInt8

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


@dataclass(frozen=True)
class VideoRequest:
    """One video.

    Attributes:
        prompt: of the whole video, or of its shots.
        image: its first frame, a file or pixels; None: the network makes that too.
        name: of the file that the prompt comes from; None: it has none.
    """

    prompt: str | StoryPrompt
    image: Path | UInt8[Tensor, "3 H W"] | None = None
    name: str | None = None

    @property
    def story(self) -> StoryPrompt:
        """The prompt as a story, of one shot if it is a text."""
        if isinstance(self.prompt, StoryPrompt):
            return self.prompt
        return StoryPrompt(self.prompt, (self.prompt,))

    @property
    def text(self) -> str:
        """All captions in one line."""
        return " | ".join(self.story.captions)

    def first_frame(self, height: int, width: int) -> UInt8[Tensor, "1 3 h w"]:
        """The pixels of the image, cropped and scaled as training does with videos.

        Raises:
            ValueError: if there is no image, or it is none.
        """
        if isinstance(self.image, torch.Tensor):
            return centre_crop_and_resize(self.image[None], height, width)
        if self.image is None:
            raise ValueError(f"no image is given for the video of {self.text!r}")
        try:
            with Image.open(self.image) as opened:
                pixels = np.asarray(opened.convert("RGB"))
        except (UnidentifiedImageError, OSError) as error:
            raise ValueError(f"{self.image} cannot be read as an image: {error}") from error
        return centre_crop_and_resize(torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None], height, width)


def read_requests(
    prompts: str | Sequence[str | StoryPrompt | VideoRequest], image: str | Path | None = None
) -> list[VideoRequest]:
    """The videos that prompts and images ask for.

    Args:
        prompts: one text, several, stories, requests as they are, a `.txt` file or a folder.
        image: a file or a folder.

    Raises:
        ValueError: if there is no prompt or an empty one, a file or folder is missing or none of the layouts, or images
            and prompts do not match.
    """
    if not isinstance(prompts, str):
        requests = [prompt if isinstance(prompt, VideoRequest) else VideoRequest(prompt) for prompt in prompts]
    elif prompts.strip() and os.path.isdir(prompts):  # Path.is_dir raises on texts too long for a name
        requests = _read_folder(Path(prompts))
    elif prompts.endswith(".txt"):
        if not Path(prompts).is_file():
            raise ValueError(
                f"prompts={prompts!r}: there is no such file; give a text file with one prompt per line, or a folder"
            )
        lines = Path(prompts).read_text(encoding="utf-8").splitlines()
        requests = [VideoRequest(line.strip()) for line in lines if line.strip()]
    else:
        requests = [VideoRequest(prompts.strip())] if prompts.strip() else []
    if not requests or not all(request.prompt.strip() for request in requests if isinstance(request.prompt, str)):
        raise ValueError(
            "no prompt: give prompts='a text', prompts=[text,text], prompts=file.txt (one per line), prompts=folder, "
            "or prompt_set=toyworld"
        )
    return requests if image is None else _with_images(requests, Path(image))


def read_prompts(path: str) -> list[str | StoryPrompt]:
    """The prompts of a `.txt` file or a folder, without images: what a training that makes its own videos needs.

    Raises:
        ValueError: if it is neither, or as `read_requests`.
    """
    if not path.endswith(".txt") and not os.path.isdir(path):
        raise ValueError(f"path={path!r}: there is no such folder; give one, or a text file with one prompt per line")
    return [request.prompt for request in read_requests(path)]


def _read_folder(folder: Path) -> list[VideoRequest]:
    texts, images = folder, folder
    if (folder / "prompts").is_dir():
        texts, images = folder / "prompts", folder / "images"
    prompts = {file.stem: file for file in sorted(texts.glob("*.txt"))}
    if not prompts or holds_cases(folder):
        return [VideoRequest(story, name=story.name) for story in read_prompt_folder(folder)]
    pictures = images_of(images) if images.is_dir() else {}
    if pictures:
        _check_same_names(pictures, prompts, folder)
    return [
        VideoRequest(file.read_text(encoding="utf-8").strip(), pictures.get(name), name)
        for name, file in prompts.items()
    ]


def _with_images(requests: list[VideoRequest], image: Path) -> list[VideoRequest]:
    if any(request.image is not None for request in requests):
        raise ValueError(f"image={image}, but the prompts' folder holds images too; give one of the two")
    if image.is_file():
        return [replace(request, image=image) for request in requests]
    if not image.is_dir():
        raise ValueError(f"image={image}: there is no such file or folder")
    pictures = images_of(image)
    if not pictures:
        raise ValueError(f"image={image} holds no image; expected files in {', '.join(IMAGE_SUFFIXES)}")
    named = {request.name: request for request in requests if request.name is not None}
    if named:
        _check_same_names(pictures, named, image)
        return [replace(request, image=pictures[name]) for name, request in named.items()]
    if len(requests) == 1:
        return [replace(requests[0], image=file, name=name) for name, file in pictures.items()]
    if len(requests) != len(pictures):
        raise ValueError(
            f"image={image} holds {len(pictures)} images for {len(requests)} prompts; give one prompt for all of them, "
            "or as many prompts as images"
        )
    return [
        replace(request, image=file, name=name)
        for request, (name, file) in zip(requests, pictures.items(), strict=True)
    ]


def images_of(folder: Path) -> dict[str, Path]:
    """The image files of a folder by name, sorted.

    Raises:
        ValueError: if two of them have one name.
    """
    found: dict[str, Path] = {}
    for file in sorted(folder.iterdir()):
        if file.suffix.lower() in IMAGE_SUFFIXES:
            other = found.setdefault(file.stem, file)
            if other is not file:
                raise ValueError(f"{other} and {file} have the same name; rename one of them")
    return found


def _check_same_names(pictures: Mapping[str, Path], prompts: Mapping[str, object], where: Path) -> None:
    if alone := sorted(set(pictures) ^ set(prompts)):
        raise ValueError(
            f"in {where}, these have only an image or only a prompt: {', '.join(alone)}; give both, under one name"
        )
