"""A source of small clips whose frames say which clip and which frame they are."""

import torch

from helpers.videos import numbered_frames
from longlive.data.shots import Shot
from longlive.data.sources import SourceClip, UnreadableClipError


class NumberedSource:
    """Clip i is `clip-<i>` of `9 + i % 3` raw frames, the last four a shot of their own; its frame t spells `16 i + t`.
    Those in `unreadable` raise."""

    def __init__(self, num_clips: int = 11, unreadable: tuple[int, ...] = ()) -> None:
        self.num_clips, self.unreadable = num_clips, unreadable

    def __len__(self) -> int:
        return self.num_clips

    def __getitem__(self, index: int) -> SourceClip:
        key = f"clip-{index:03d}"
        if index in self.unreadable:
            raise UnreadableClipError(key, "made so")
        num_raw_frames = 9 + index % 3
        frames = torch.roll(numbered_frames(256, 16, 32), -16 * index, 0)[:num_raw_frames]
        cut = num_raw_frames - 4
        shots = (Shot(0, cut, f"clip {index} begins"), Shot(cut, num_raw_frames, f"clip {index} ends"))
        return SourceClip(key=key, fps=24, shots=shots, frames=frames)
