"""The batch that readers produce and modules consume."""

from dataclasses import replace

import pytest
import torch

from longlive.data.batch import BatchSpec, VideoBatch

SPEC = BatchSpec(batch_size=2, num_frames=6, chunk_frames=2, channels=4, height=3, width=5)


def test_a_fake_batch_has_the_sizes_of_its_spec() -> None:
    batch = VideoBatch.fake(SPEC)
    assert batch.latents is not None
    assert batch.latents.shape == (2, 6, 4, 3, 5)
    assert batch.raw_frames is None
    assert batch.prompts == ((SPEC.prompt,) * 3,) * 2
    assert torch.equal(batch.shot_index, torch.zeros(2, 3, dtype=torch.int64))
    assert batch.num_valid_frames.tolist() == [6, 6]
    assert batch.sample_ids.tolist() == [0, 1]
    assert batch.batch_size == 2
    assert batch.frame_offset == 0


def test_a_fake_batch_is_a_function_of_its_seed() -> None:
    first, again, other = VideoBatch.fake(SPEC, seed=1), VideoBatch.fake(SPEC, seed=1), VideoBatch.fake(SPEC, seed=2)
    assert torch.equal(first.latents, again.latents)
    assert (first.latents - other.latents).abs().mean() > 0.5
    assert (first.latents[0] - first.latents[1]).abs().mean() > 0.5


def test_a_batch_holds_either_latents_or_raw_frames() -> None:
    batch = VideoBatch.fake(SPEC)
    raw_frames = torch.zeros(2, 21, 3, 24, 40, dtype=torch.uint8)
    assert replace(batch, latents=None, raw_frames=raw_frames).latents is None
    for broken in ({"latents": None}, {"raw_frames": raw_frames}):
        with pytest.raises(ValueError, match="either latents or raw_frames, exactly one"):
            replace(batch, **broken)


def test_moving_a_batch_moves_its_pixels_and_leaves_its_tables() -> None:
    """Tables on a device would stop the host at every `.tolist()`."""
    batch = VideoBatch.fake(SPEC)
    raw = replace(batch, latents=None, raw_frames=torch.zeros(2, 21, 3, 24, 40, dtype=torch.uint8))
    for moved in (batch.to("meta"), raw.to(torch.device("meta"))):
        media = moved.latents if moved.latents is not None else moved.raw_frames
        assert media is not None
        assert media.device.type == "meta"
        assert {moved.shot_index.device.type, moved.num_valid_frames.device.type, moved.sample_ids.device.type} == {
            "cpu"
        }
        assert moved.prompts == batch.prompts
    assert batch.latents is not None
    assert batch.latents.device.type == "cpu"


def test_chunks_divide_the_frames() -> None:
    assert SPEC.num_chunks == 3
    with pytest.raises(ValueError, match="num_frames=7 is no multiple of chunk_frames=2; use 6"):
        _ = replace(SPEC, num_frames=7).num_chunks
    with pytest.raises(ValueError, match=r"num_frames=1 .* use 2"):
        VideoBatch.fake(replace(SPEC, num_frames=1))
