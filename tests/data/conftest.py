"""A small shard set that most tests here read: 11 clips in 4 shards, whose frames say which clip and frame they are."""

from pathlib import Path

import pytest

from helpers.clips import NumberedSource
from longlive.data.sample import ClipSpec
from longlive.data.shards import write_shards


@pytest.fixture(scope="session")
def pristine_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("shards")
    write_shards(NumberedSource(), directory, clips_per_shard=3, progress=False)
    return directory


@pytest.fixture
def shards(pristine_shards: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    directory = tmp_path / "shards"
    directory.mkdir()
    for file in pristine_shards.iterdir():
        (directory / file.name).write_bytes(file.read_bytes())
    return directory


@pytest.fixture
def spec() -> ClipSpec:
    """Clips of 9 raw frames: 3 frames in 3 chunks."""
    return ClipSpec(num_frames=3, chunk_frames=1, height=16, width=32, fps=24)
