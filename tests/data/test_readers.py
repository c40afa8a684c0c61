"""Both readers of the same shards: orders, replacement of unreadable samples, resuming, workers."""

import json
import logging
import tarfile
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import chain
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader

from helpers.videos import numbers
from longlive.data.indexed import IndexedShards
from longlive.data.order import PositionBatches, epoch_order
from longlive.data.reader import ShardReader
from longlive.data.sample import ClipSpec, ClipWindow, VideoSample, collate
from longlive.data.shards import load_index
from longlive.data.streamed import StreamedShards

READERS = ["indexed", "streamed"]
BATCH = 2


def open_reader(
    kind: str, directory: Path | str, spec: ClipSpec, *, shuffle: bool = True, data_rank: int = 0, data_size: int = 1
) -> ShardReader:
    if kind == "indexed":
        return IndexedShards([directory], spec, seed=5, shuffle=shuffle)
    return StreamedShards(
        [directory],
        spec,
        seed=5,
        shuffle=shuffle,
        batch_size=BATCH,
        data_rank=data_rank,
        data_size=data_size,
        shuffle_buffer=4,
    )


def sample_ids(reader: ShardReader, positions: range) -> list[int]:
    return [reader[position].sample_id for position in positions]


def damage(directory: Path, clip: int, suffix: str, content: bytes) -> None:
    """Overwrite the beginning of a member inside its tar."""
    sample = load_index(directory).samples[clip]
    with (directory / sample.shard).open("r+b") as file:
        file.seek(sample.members[suffix].offset)
        file.write(content[: sample.members[suffix].num_bytes])


def is_the_clip_it_claims(sample: VideoSample) -> bool:
    """Two chunks from anywhere in the first shot, and the second one."""
    frames, first = numbers(sample.raw_frames), 16 * sample.sample_id
    cut = first + 5 + sample.sample_id % 3
    return first <= frames[0] <= cut - 5 and frames == [*range(frames[0], frames[0] + 5), *range(cut, cut + 4)]


@pytest.mark.parametrize("kind", READERS)
def test_an_epoch_reads_every_clip_once_and_rightly(kind: str, pristine_shards: Path, spec: ClipSpec) -> None:
    reader = open_reader(kind, pristine_shards, spec)
    for epoch in range(2):
        samples = [reader[position] for position in range(11 * epoch, 11 * (epoch + 1))]
        assert sorted(sample.sample_id for sample in samples) == list(range(11))
        assert all(is_the_clip_it_claims(sample) for sample in samples)
        for sample in samples:
            begins, ends = (f"clip {sample.sample_id} {what}" for what in ("begins", "ends"))
            assert sample.prompts == (begins, begins, f"The scene transitions. {ends}")
            assert sample.shot_index == (0, 0, 1)


@pytest.mark.parametrize("kind", READERS)
def test_epochs_differ_and_a_seed_repeats(kind: str, pristine_shards: Path, spec: ClipSpec) -> None:
    first, again = (sample_ids(open_reader(kind, pristine_shards, spec), range(33)) for _ in range(2))
    assert first == again
    assert len({tuple(first[start : start + 11]) for start in (0, 11, 22)}) == 3


@pytest.mark.parametrize("kind", READERS)
def test_a_reader_starts_at_any_position_as_if_it_had_read_up_to_there(
    kind: str, pristine_shards: Path, spec: ClipSpec
) -> None:
    whole = sample_ids(open_reader(kind, pristine_shards, spec), range(40))
    for start in (1, 7, 10, 11, 26):
        assert sample_ids(open_reader(kind, pristine_shards, spec), range(start, 40)) == whole[start:]


@pytest.mark.parametrize("kind", READERS)
def test_going_back_reads_the_same_again(kind: str, pristine_shards: Path, spec: ClipSpec) -> None:
    reader = open_reader(kind, pristine_shards, spec)
    assert sample_ids(reader, range(15)) == sample_ids(reader, range(15))


@pytest.mark.parametrize("num_workers", [1, 2])
@pytest.mark.parametrize("kind", READERS)
def test_workers_do_not_change_the_order(kind: str, num_workers: int, pristine_shards: Path, spec: ClipSpec) -> None:
    def batches(num_workers: int) -> list[list[int]]:
        loader = DataLoader(
            open_reader(kind, pristine_shards, spec),
            batch_sampler=PositionBatches(lambda: 4, BATCH, 0, 1),
            collate_fn=collate,
            num_workers=num_workers,
        )
        return [batch.sample_ids.tolist() for batch, _ in zip(loader, range(9), strict=False)]

    assert batches(num_workers) == batches(0)


@pytest.mark.parametrize("data_size", [2, 4])
def test_the_indexed_global_batch_is_the_same_for_any_number_of_ranks(
    data_size: int, pristine_shards: Path, spec: ClipSpec
) -> None:
    reader = open_reader("indexed", pristine_shards, spec)
    order = [*epoch_order(11, 5, 0), *epoch_order(11, 5, 1)]
    for step in range(4):
        shares = [
            [reader[position].sample_id for position in range(4 * step + rank, 4 * (step + 1), data_size)]
            for rank in range(data_size)
        ]
        assert Counter(chain(*shares)) == Counter(order[4 * step : 4 * (step + 1)])


def test_streamed_ranks_share_the_epoch_out(pristine_shards: Path, spec: ClipSpec) -> None:
    readers = [open_reader("streamed", pristine_shards, spec, data_rank=rank, data_size=2) for rank in range(2)]
    plans = [reader.epoch_plan(0, 0) for reader in readers]
    shares = [sample_ids(reader, range(rank, 2 * len(plans[rank][1]), 2)) for rank, reader in enumerate(readers)]
    assert sorted(chain(*shares)) == list(range(11))
    with pytest.raises(ValueError, match="4 shards for 5 ranks"):
        open_reader("streamed", pristine_shards, spec, data_rank=0, data_size=5)


def test_a_resumed_stream_opens_only_the_shards_that_it_still_needs(
    pristine_shards: Path, spec: ClipSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = []
    read_shard = StreamedShards._read_shard

    def note(self: StreamedShards, url: str, ids: list[int]) -> object:
        opened.append(url)
        return read_shard(self, url, ids)

    monkeypatch.setattr(StreamedShards, "_read_shard", note)
    assert open_reader("streamed", pristine_shards, spec)[10].sample_id in range(11)
    assert len(opened) < 4


def test_streams_come_through_commands_and_urls(pristine_shards: Path, spec: ClipSpec) -> None:
    local = sample_ids(open_reader("streamed", pristine_shards, spec), range(12))
    for location in (f"pipe:cat {pristine_shards}/{{}}", f"file://{pristine_shards}/"):
        assert sample_ids(open_reader("streamed", location, spec), range(12)) == local


@pytest.mark.parametrize("kind", READERS)
def test_unreadable_samples_are_counted_named_once_and_replaced_by_the_next(
    kind: str, shards: Path, spec: ClipSpec, caplog: pytest.LogCaptureFixture
) -> None:
    """Skipping instead of replacing would shift every later sample, on one rank only."""
    whole = sample_ids(open_reader(kind, shards, spec), range(22))
    damage(shards, 2, "mp4", b"\0" * 10_000)
    damage(shards, 7, "json", b"{broken")
    damage(shards, 8, "mp4", b"\0" * 10_000)
    reader = open_reader(kind, shards, spec)
    with caplog.at_level(logging.WARNING):
        found = [reader[position] for position in range(22)]

    bad = {2, 7, 8}
    expected = [next(number for number in [*whole, *whole][place:] if number not in bad) for place in range(22)]
    if whole[21] in bad:
        expected[21] = found[21].sample_id  # its replacement stands in the third epoch
    assert [sample.sample_id for sample in found] == expected
    assert all(is_the_clip_it_claims(sample) for sample in found)
    assert reader.unreadable.count == 3
    assert len(caplog.records) == 3
    for key in ("clip-002", "clip-007", "clip-008"):
        assert caplog.text.count(key) == 1


@pytest.mark.parametrize("kind", READERS)
def test_workers_report_to_one_count(kind: str, shards: Path, spec: ClipSpec) -> None:
    damage(shards, 2, "mp4", b"\0" * 10_000)
    damage(shards, 7, "json", b"{broken")
    reader = open_reader(kind, shards, spec)
    batches = PositionBatches(lambda: 0, BATCH, 0, 1)
    loader = DataLoader(reader, batch_sampler=batches, collate_fn=collate, num_workers=2)
    for _ in zip(loader, range(6), strict=False):
        pass
    assert reader.unreadable.count == 2


def flip_a_bit(directory: Path, clip: int) -> None:
    """In the coded pixels of the last frames: a decoder conceals it, and no earlier frame shows it."""
    sample = load_index(directory).samples[clip]
    member = sample.members["mp4"]
    path = directory / sample.shard
    content = bytearray(path.read_bytes())
    start = content.index(b"mdat", member.offset)
    num_bytes = int.from_bytes(content[start - 4 : start], "big")
    content[start + num_bytes - 12] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("kind", READERS)
def test_ranks_that_read_different_windows_skip_the_same_damaged_samples(
    kind: str, shards: Path, spec: ClipSpec
) -> None:
    """Decoding tells only the rank whose window is hit: its peers would train on another clip than it does."""
    flip_a_bit(shards, 4)
    ids = []
    for window in (ClipWindow(0, 5, 0), ClipWindow(5, 9, 2)):
        reader = open_reader(kind, shards, replace(spec, window=window))
        ids.append(sample_ids(reader, range(22)))
        assert reader.unreadable.count == 1
    assert ids[0] == ids[1]
    assert 4 not in ids[0]


def test_shards_that_were_written_without_checksums_are_read(shards: Path, spec: ClipSpec) -> None:
    content = json.loads((shards / "shards.json").read_text())
    for sample in content["samples"]:
        for member in sample["members"].values():
            assert member.pop("crc32") >= 0
    (shards / "shards.json").write_text(json.dumps(content))
    reader = open_reader("indexed", shards, spec)
    assert sorted(sample_ids(reader, range(11))) == list(range(11))
    assert reader.unreadable.count == 0


def truncate_last_shard(directory: Path) -> None:
    path = directory / "shard-000003.tar"
    path.write_bytes(path.read_bytes()[:3000])


def drop_a_member(directory: Path) -> None:
    path = directory / "shard-000003.tar"
    with tarfile.open(path) as old, tarfile.open(path.with_suffix(".new"), "w") as new:
        for member in old:
            if member.name != "clip-009.mp4":
                new.addfile(member, old.extractfile(member))
    path.with_suffix(".new").replace(path)


def drop_from_index(directory: Path) -> None:
    content = json.loads((directory / "shards.json").read_text())
    del content["samples"][9]["members"]["mp4"]
    (directory / "shards.json").write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("kind", "break_it", "bad"),
    [
        ("indexed", truncate_last_shard, {9, 10}),
        ("streamed", truncate_last_shard, {9, 10}),
        ("streamed", drop_a_member, {9}),
        ("indexed", drop_from_index, {9}),
    ],
)
def test_missing_members_and_cut_shards_are_unreadable_samples(
    kind: str, break_it: Callable[[Path], None], bad: set[int], shards: Path, spec: ClipSpec
) -> None:
    break_it(shards)
    reader = open_reader(kind, shards, spec)
    samples = [reader[position] for position in range(11)]
    assert {sample.sample_id for sample in samples} == set(range(11)) - bad
    assert all(is_the_clip_it_claims(sample) for sample in samples)
    assert reader.unreadable.count == len(bad)


@pytest.mark.parametrize("kind", READERS)
def test_nothing_readable_is_an_error_and_no_endless_search(kind: str, shards: Path, spec: ClipSpec) -> None:
    for clip in range(11):
        damage(shards, clip, "mp4", b"\0" * 10_000)
    with pytest.raises(RuntimeError, match="11 samples in a row are unreadable"):
        open_reader(kind, shards, spec)[3]


def test_a_missing_shard_is_an_error_before_any_work_where_it_can_be_known(shards: Path, spec: ClipSpec) -> None:
    (shards / "shard-000002.tar").unlink()
    with pytest.raises(FileNotFoundError, match=r"1 of 4 shards are missing: .*shard-000002.tar; copy them again"):
        open_reader("indexed", shards, spec)
    reader = open_reader("streamed", shards, spec)
    assert {reader[position].sample_id for position in range(11)} == {0, 1, 2, 3, 4, 5, 9, 10}
    assert reader.unreadable.count == 3


@pytest.mark.parametrize("kind", READERS)
def test_without_shuffling_clips_come_as_stored_and_repetitions_carry_no_loss(
    kind: str, pristine_shards: Path, spec: ClipSpec
) -> None:
    reader = open_reader(kind, pristine_shards, spec, shuffle=False)
    samples = [reader[position] for position in range(13)]
    assert [sample.sample_id for sample in samples] == [*range(11), 0, 1]
    assert [sample.num_valid_frames for sample in samples] == [3] * 11 + [0, 0]
    torch.testing.assert_close(samples[11].raw_frames, samples[0].raw_frames, rtol=0, atol=0)


@pytest.mark.parametrize("kind", READERS)
def test_temporal_crops_change_with_the_epoch_and_not_with_the_reader(
    kind: str, pristine_shards: Path, spec: ClipSpec
) -> None:
    """Clip 5 has 7 raw frames before its cut, three windows of 5."""
    reader = open_reader(kind, pristine_shards, spec)
    starts = {}
    for position in range(66):
        sample = reader[position]
        if sample.sample_id == 5:
            starts[position // 11] = numbers(sample.raw_frames)[0] - 80
    assert len(starts) == 6
    assert len(set(starts.values())) > 1
    other = open_reader("indexed" if kind == "streamed" else "streamed", pristine_shards, spec)
    for position in range(66):
        sample = other[position]
        if sample.sample_id == 5:
            assert numbers(sample.raw_frames)[0] - 80 == starts[position // 11]


def test_several_shard_sets_are_read_as_one(pristine_shards: Path, spec: ClipSpec) -> None:
    reader = IndexedShards([pristine_shards, str(pristine_shards)], spec, seed=0, shuffle=True)
    assert sorted(sample_ids(reader, range(22))) == list(range(22))


def test_a_stream_names_each_shard_set_once(pristine_shards: Path, spec: ClipSpec) -> None:
    """Its samples are found by key, so the second of two equal sets would be missing."""
    with pytest.raises(ValueError, match="is named twice"):
        StreamedShards(
            [pristine_shards] * 2, spec, seed=0, shuffle=True, batch_size=1, data_rank=0, data_size=1, shuffle_buffer=4
        )


def test_a_reader_travels_to_a_fresh_interpreter(pristine_shards: Path, spec: ClipSpec) -> None:
    """Workers that are spawned, and not forked, get the reader pickled."""
    for kind in READERS:
        reader = open_reader(kind, pristine_shards, spec)
        loader = DataLoader(
            reader,
            batch_sampler=PositionBatches(partial(int, 0), BATCH, 0, 1),
            collate_fn=collate,
            num_workers=1,
            multiprocessing_context="spawn",
        )
        assert next(iter(loader)).sample_ids.tolist() == sample_ids(reader, range(2))
