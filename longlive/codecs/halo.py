"""How much left context a codec needs in practice, measured once and kept beside its weights as `halo.json`.

A window of a video that is encoded alone differs from the same part of the whole encode; the difference falls with
every frame of extra left context, the *halo*. The receptive field says where it is zero; long before that it is lost
in rounding. `longlive.parallel.codec_halo` measures, `WanVideoCodec.from_pretrained` reads.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from longlive.data.atomic import write_aside

FILE_NAME = "halo.json"


@dataclass(frozen=True)
class MeasuredHalo:
    """A measurement and what it means.

    Attributes:
        halo_frames: the smallest halo whose error is below the bound.
        max_error: its error; latents have about unit variance.
        bound: the error that was allowed.
        definition: what was compared: words, clip, dtype, versions.
    """

    halo_frames: int
    max_error: float
    bound: float
    definition: dict[str, Any]

    def write(self, folder: str | Path) -> Path:
        """Store it beside a codec's `config.json`; the file is complete or absent."""
        path = Path(folder, FILE_NAME)
        with write_aside(path) as temporary:
            temporary.write_text(json.dumps(asdict(self), indent=2) + "\n")
        return path

    @classmethod
    def read(cls, folder: str | Path) -> MeasuredHalo | None:
        """The measurement in a codec's folder, None if there is none.

        Raises:
            ValueError: if the file is no such measurement.
        """
        path = Path(folder, FILE_NAME)
        if not path.is_file():
            return None
        try:
            fields = json.loads(path.read_text())
            return cls(
                halo_frames=int(fields["halo_frames"]),
                max_error=float(fields["max_error"]),
                bound=float(fields["bound"]),
                definition=dict(fields["definition"]),
            )
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{path} is no measured halo ({type(error).__name__}: {error}); remove it, and measure "
                "again with tools/measure_halo.py --write"
            ) from error

    def check(self, exact_halo_frames: int) -> None:
        """Raise a `ValueError` if it cannot belong to a codec with this receptive field."""
        if not 0 <= self.halo_frames <= exact_halo_frames:
            raise ValueError(
                f"halo_frames={self.halo_frames} in {FILE_NAME} is outside 0 .. {exact_halo_frames}, the receptive "
                "field of this codec; remove the file, and measure again with tools/measure_halo.py --write"
            )
