"""Prompts of videos made of several shots, and the folders that hold them.

The layout is LongLive's public one: a folder per video, with one file per shot and, optionally, how long they last:

    <folder>/<case>/0.json ... N-1.json     {"caption": "..."}
    <folder>/<case>/shot_durations.txt      N numbers of chunks, e.g. "2 2 4"

`<folder>/caption/<case>/...` is read the same way. A text alone is a story of one shot.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

from longlive.data.shots import chunk_prompts

DURATIONS_NAME = "shot_durations.txt"


@dataclass(frozen=True)
class StoryPrompt:
    """What a video of several shots should show.

    Attributes:
        name: of the video.
        captions: of its shots, in order.
        durations: chunks of every shot; None: all shots last as long, or nearly, and together what the video does.
        scene_cuts: whether they are shots; else the captions are prompts that follow one another within one shot.
    """

    name: str
    captions: tuple[str, ...]
    durations: tuple[int, ...] | None = None
    scene_cuts: bool = True

    def __post_init__(self) -> None:
        if not self.captions or not all(caption.strip() for caption in self.captions):
            raise ValueError(f"story {self.name!r} needs a caption for every shot, at least one; got {self.captions}")
        if self.durations is not None and (len(self.durations) != len(self.captions) or min(self.durations) < 1):
            raise ValueError(
                f"story {self.name!r} has {len(self.captions)} shots and the durations {list(self.durations)}; give "
                "every shot a number of chunks, at least 1"
            )

    @property
    def num_chunks(self) -> int | None:
        """Of the whole video; None if that is left open."""
        return None if self.durations is None else sum(self.durations)

    def over(self, num_chunks: int) -> StoryPrompt:
        """The story with the durations that its shots have in a video of `num_chunks`.

        Raises:
            ValueError: if its durations make up another number, or there are more shots than chunks.
        """
        if self.durations is None:
            count = len(self.captions)
            if num_chunks < count:
                raise ValueError(
                    f"story {self.name!r} has {count} shots, a video of {num_chunks} chunks holds {num_chunks}; "
                    "make it longer"
                )
            borders = [shot * num_chunks // count for shot in range(count + 1)]
            lengths = tuple(stop - start for start, stop in pairwise(borders))
            return replace(self, durations=lengths)
        if self.num_chunks != num_chunks:
            raise ValueError(
                f"the shots of story {self.name!r} last {' + '.join(map(str, self.durations))} = {self.num_chunks} "
                f"chunks, but the video has {num_chunks}; leave num_frames to the story, or change its durations"
            )
        return self

    def chunks(self, scene_cut_phrase: str) -> tuple[tuple[str, ...], tuple[int, ...]]:
        """Prompt and shot number of every chunk, as in training (`shots.chunk_prompts`).

        Raises:
            ValueError: if the durations are left open.
        """
        if self.durations is None:
            raise ValueError(f"story {self.name!r} says no durations; choose them with over(num_chunks)")
        captions = list(zip(self.captions, self.durations, strict=True))
        if self.scene_cuts:
            return chunk_prompts(captions, scene_cut_phrase)
        prompts, _ = chunk_prompts(captions, scene_cut_phrase="")
        return prompts, (0,) * len(prompts)


def read_case(folder: Path) -> StoryPrompt:
    """The story of one case folder.

    Raises:
        ValueError: if its files are not `0.json ... N-1.json`, one holds no caption, or the durations do not fit them.
    """
    files = sorted(file.name for file in folder.glob("*.json"))
    expected = [f"{number}.json" for number in range(len(files))]
    if not files or set(files) != set(expected):
        raise ValueError(
            f"{folder} holds {', '.join(files) or 'no json'}; name the shots' files 0.json, 1.json, ... without a gap, "
            "and keep no other json beside them"
        )
    captions = []
    for name in expected:
        try:
            content = json.loads((folder / name).read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{folder / name} is no json: {error}") from error
        if not isinstance(content, dict) or not isinstance(content.get("caption"), str):
            raise ValueError(f'{folder / name} holds no caption; write {{"caption": "..."}}')
        captions.append(content["caption"])
    durations = None
    file = folder / DURATIONS_NAME
    if file.exists():
        words = re.split(r"[\s,]+", file.read_text(encoding="utf-8").strip())
        if not all(word.isdecimal() for word in words):
            raise ValueError(f"{file} holds {' '.join(words)!r}; write one number of chunks per shot, e.g. '2 2 4'")
        durations = tuple(map(int, words))
    return StoryPrompt(folder.name, tuple(captions), durations)


def is_case(folder: Path) -> bool:
    """Whether a folder holds the shots of one story."""
    return (folder / "0.json").is_file()


def holds_cases(folder: Path) -> bool:
    """Whether a folder is one of cases, or a case itself."""
    return (folder / "caption").is_dir() or any(map(is_case, (folder, *folder.glob("*/"))))


def read_prompt_folder(folder: str | Path) -> list[StoryPrompt]:
    """The stories of a prompt folder, sorted by name; of a folder that is a case itself, its one story.

    Raises:
        ValueError: if there is no case in it, or one is broken.
    """
    folder = Path(folder)
    if is_case(folder):
        return [read_case(folder)]
    inner = folder / "caption" if (folder / "caption").is_dir() else folder
    cases = sorted(case for case in inner.iterdir() if case.is_dir())
    if not cases:
        raise ValueError(f"{folder} holds no case; expected <case>/0.json, 1.json, ... with a caption each")
    return [read_case(case) for case in cases]
