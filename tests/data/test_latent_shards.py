"""Latent shards: the latents that training would have made, whoever writes them and however often it is killed."""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import shutil
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
import webdataset

from helpers.clips import NumberedSource
from helpers.folders import contents, in_a_process
from helpers.latents import SEED, Encoder, kill_at, latent_shards, online, settings_of
from helpers.runs import assert_same
from longlive.codecs.base import VideoCodec
from longlive.codecs.dct import DCTCodec
from longlive.codecs.wan import WanVideoCodec
from longlive.data import atomic
from longlive.data.indexed import IndexedShards
from longlive.data.latent_shards import Share, VideoShards, raw_pieces
from longlive.data.reader import ShardReader
from longlive.data.sample import ClipSpec, ClipWindow, UnreachableSampleError
from longlive.data.shards import load_index, write_shards
from longlive.data.shots import ShotRules
from longlive.data.sources import UnreadableClipError
from longlive.data.streamed import StreamedShards

CUTS = ShotRules(scene_cut_phrase="Cut. ", max_chunks_per_shot=1, forced_cut_margin=1 / 24)
SHORT = ClipSpec(num_frames=2, chunk_frames=1, height=16, width=32, fps=24)
"""Clips of 5 raw frames: the videos, of 9 to 11, hold several."""


def open_reader(kind: str, directory: Path, spec: ClipSpec) -> ShardReader:
    if kind == "indexed":
        return IndexedShards([directory], spec, seed=SEED, shuffle=True)
    return StreamedShards(
        [directory], spec, seed=SEED, shuffle=True, batch_size=2, data_rank=0, data_size=1, shuffle_buffer=3
    )


def damage(directory: Path, clip: int) -> None:
    """Change a byte of a clip's video."""
    sample = load_index(directory).samples[clip]
    content = bytearray((directory / sample.shard).read_bytes())
    content[sample.members["mp4"].offset + 100] ^= 1
    (directory / sample.shard).write_bytes(content)


@pytest.fixture(scope="module")
def reference(pristine_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Latents of short clips, encoded by one process without interruption."""
    directory = tmp_path_factory.mktemp("latents")
    latent_shards(pristine_shards, directory, SHORT, encoder := Encoder()).encode(encoder)
    return directory


@pytest.mark.parametrize("kind", ["indexed", "streamed"])
@pytest.mark.parametrize(
    ("codec", "spec", "piece_frames"),
    [
        (DCTCodec(), SHORT, 1),
        (DCTCodec(), ClipSpec(3, 1, 16, 16, 20, shot_rules=CUTS), 2),
        (WanVideoCodec.tiny(), ClipSpec(4, 2, 16, 32, 30), 1),
    ],
)
def test_a_reader_of_latents_gives_what_training_would_have_encoded(
    shards: Path, tmp_path: Path, kind: str, codec: VideoCodec, spec: ClipSpec, piece_frames: int
) -> None:
    """In the same order, bit by bit: clips that are drawn anew in every epoch, with cuts, padding and a sample that
    cannot be read. Latents of other clips, or prompts of other chunks, train as well and teach something else."""
    damage(shards, 4)
    encoder = Encoder(codec)
    latent_shards(shards, tmp_path / "latents", spec, encoder, num_epochs=2).encode(encoder, piece_frames=piece_frames)
    videos, latents = (open_reader(kind, directory, spec) for directory in (shards, tmp_path / "latents"))
    starts = set()
    for position in range(2 * len(videos)):
        ours, theirs = latents[position], online(videos[position], encoder)
        assert ours.prompt_embeds.keys() >= theirs.prompt_embeds.keys()
        known = {prompt: ours.prompt_embeds[prompt] for prompt in theirs.prompt_embeds}
        assert_same(vars(ours) | {"prompt_embeds": known}, vars(theirs))
        starts.add((ours.sample_id, tuple(ours.latents.flatten()[:50].tolist())))
    assert latents.unreadable.count == videos.unreadable.count == 1
    assert len(starts) > 10 or spec.num_frames > 2, "one clip of each video proves nothing of those of later epochs"
    later = latents[2 * len(videos)]
    assert any(torch.equal(later.latents, latents[position].latents) for position in range(len(videos)))


def test_a_rank_gets_the_latents_of_its_own_frames(pristine_shards: Path, tmp_path: Path) -> None:
    spec = ClipSpec(num_frames=3, chunk_frames=1, height=16, width=32, fps=24)
    latent_shards(pristine_shards, tmp_path, spec, encoder := Encoder()).encode(encoder)
    whole = open_reader("indexed", tmp_path, spec)[0]
    for window, frames in ((ClipWindow(1, 9, 1), slice(1, 3)), (ClipWindow(0, 5, 0), slice(0, 2))):
        part = ClipSpec(3, 1, 16, 32, 24, window=window)
        sample = open_reader("indexed", tmp_path, part)[0]
        assert sample.frame_offset == frames.start
        assert sample.prompts == whole.prompts
        assert torch.equal(sample.latents, whole.latents[frames])
        assert sample.latents.untyped_storage().nbytes() == sample.latents.nbytes, "a view keeps the whole clip alive"


def test_shards_keep_their_names_keys_and_json(pristine_shards: Path, reference: Path) -> None:
    videos, latents = load_index(pristine_shards), load_index(reference)
    for video, latent in zip(videos.samples, latents.samples, strict=True):
        assert (latent.key, latent.shard, latent.shots) == (video.key, video.shard, video.shots)
        assert set(latent.members) == {"latents.safetensors", "prompt_embeds.safetensors", "json"}
    urls, originals = (sorted(map(str, folder.glob("*.tar"))) for folder in (reference, pristine_shards))
    plain = webdataset.WebDataset(urls, shardshuffle=False)
    for ours, theirs in zip(plain, webdataset.WebDataset(originals, shardshuffle=False), strict=True):
        assert (ours["__key__"], ours["json"]) == (theirs["__key__"], theirs["json"])


def test_kills_at_any_clip_and_before_any_visible_step_change_nothing(
    pristine_shards: Path, reference: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed (-9) twice each time, once in the middle of a shard and once right before a file gets its name."""
    replace = os.replace

    def encode(directory: Path, before: Callable[[], object] = lambda: None) -> None:
        latent_shards(pristine_shards, directory, SHORT, encoder := Encoder(before=before)).encode(encoder)

    for clip, rename in ((1, 1), (5, 2), (6, 3), (8, 5), (10, 3)):
        directory = tmp_path / f"{clip}-{rename}"
        assert in_a_process(partial(encode, directory, kill_at(clip))) == -signal.SIGKILL
        count = kill_at(rename)

        def kill_or_replace(source: Path, target: Path, count: Callable[[], None] = count) -> None:
            count()
            replace(source, target)

        with monkeypatch.context() as patched:
            patched.setattr(atomic.os, "replace", kill_or_replace)
            assert in_a_process(partial(encode, directory)) == -signal.SIGKILL
        encode(directory)
        assert contents(directory) == contents(reference)


def test_a_finished_shard_is_not_encoded_again(pristine_shards: Path, reference: Path, tmp_path: Path) -> None:
    killed = Encoder(before=kill_at(8))
    write = partial(latent_shards, pristine_shards, tmp_path, SHORT)
    in_a_process(lambda: write(killed).encode(killed))
    encoded: list[int] = []
    write(encoder := Encoder(before=lambda: encoded.append(1))).encode(encoder)
    assert len(encoded) == 5, "two shards of three clips were finished"
    write(encoder).encode(encoder)
    assert len(encoded) == 5
    assert contents(tmp_path) == contents(reference)


@pytest.mark.parametrize("what", ["cut", "removed"])
def test_a_shard_that_is_not_as_it_was_written_is_encoded_again(
    pristine_shards: Path, reference: Path, tmp_path: Path, what: str, caplog: pytest.LogCaptureFixture
) -> None:
    write = partial(latent_shards, pristine_shards, tmp_path, SHORT)
    write(encoder := Encoder()).encode(encoder, Share(1, 2))
    torn = tmp_path / "shard-000001.tar"
    if what == "cut":
        torn.write_bytes(torn.read_bytes()[:3000])
    else:
        torn.unlink()
    (tmp_path / ".shard-000000.tar.partial").write_bytes(b"what a killed process left")
    assert write(encoder).encode(encoder, Share(0, 2)) is None, "the set is not complete"
    encoded: list[int] = []
    write(encoder := Encoder(before=lambda: encoded.append(1))).encode(encoder, Share(1, 2))
    assert len(encoded) == 3
    assert "shard-000001.tar is missing or shorter than it was written" in caplog.text
    assert contents(tmp_path) == contents(reference)


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)])
def test_tasks_together_write_what_one_writes(
    pristine_shards: Path, reference: Path, tmp_path: Path, order: tuple[int, ...]
) -> None:
    done: list[int] = []
    for task in order:
        writing = latent_shards(pristine_shards, tmp_path, SHORT, encoder := Encoder())
        assert not (tmp_path / "shards.json").exists()
        index = writing.encode(encoder, Share(task, 3), advance=done.append)
    assert index == load_index(reference)
    assert sum(done) == 11
    assert contents(tmp_path) == contents(reference)
    assert latent_shards(pristine_shards, tmp_path, SHORT, encoder).encode(encoder, Share(7, 8)) == index


def test_tasks_that_were_given_the_same_shards_do_not_write_one_twice(
    pristine_shards: Path, reference: Path, tmp_path: Path
) -> None:
    """Two processes that write one file at once leave a torn one, and one of them may be done and gone."""
    notes = tmp_path / "encoded"

    def note() -> None:
        with notes.open("a") as file:
            file.write("x")

    def encode() -> None:
        latent_shards(pristine_shards, tmp_path / "latents", SHORT, encoder := Encoder(before=note)).encode(encoder)

    processes = [multiprocessing.get_context("fork").Process(target=encode) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert notes.read_text() == "x" * 11
    assert contents(tmp_path / "latents") == contents(reference)


def test_an_unreadable_clip_keeps_its_place_without_latents(
    shards: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    damage(shards, 4)
    writing = latent_shards(shards, tmp_path / "latents", SHORT, encoder := Encoder())
    with pytest.raises(UnreadableClipError, match="clip-004: its mp4 is not what was written"):
        writing.encode(encoder, strict=True)
    with caplog.at_level(logging.WARNING):
        index = writing.encode(encoder)
    assert index is not None
    assert [sample.key for sample in index.samples] == [f"clip-{clip:03d}" for clip in range(11)]
    assert index.skipped == (("clip-004", "its mp4 is not what was written: the checksum differs"),)
    assert set(index.samples[4].members) == {"json"}
    assert "clip clip-004 is unreadable, and has no latents" in caplog.text
    with pytest.raises(UnreadableClipError, match="clip-004: its mp4 is not what was written"):
        writing.encode(encoder, strict=True)  # also of a set that is finished
    for shard in shards.glob("*.tar"):
        shard.write_bytes(bytes(shard.stat().st_size))
    with pytest.raises(UnreadableClipError, match=r"none of the 11 clips is readable; the first: .* checksum differs"):
        latent_shards(shards, tmp_path / "none", SHORT, encoder).encode(encoder)


def test_a_shard_that_cannot_be_reached_is_an_error_and_no_hole(shards: Path, tmp_path: Path) -> None:
    """A network drive that is away for a moment would otherwise take all its clips out of the training data."""
    writing = latent_shards(shards, tmp_path / "latents", SHORT, encoder := Encoder())
    away = shards / "shard-000002.tar"
    content = away.read_bytes()
    away.unlink()
    with pytest.raises(UnreachableSampleError, match="No such file"):
        writing.encode(encoder)
    away.write_bytes(content)
    index = writing.encode(encoder)
    assert index is not None
    assert index.skipped == ()
    away.unlink()
    with pytest.raises(FileNotFoundError, match="1 of 4 shards are missing"):
        VideoShards(shards).open(SHORT, SEED)


def test_several_sets_are_encoded_as_training_reads_them_together(pristine_shards: Path, tmp_path: Path) -> None:
    """Clips are drawn by a sample's number in all sets, and both sets have a shard 0."""

    class Others(NumberedSource):
        def __getitem__(self, index: int):
            clip = super().__getitem__(index)
            return type(clip)(f"other-{index}", clip.fps, clip.shots, clip.frames)

    write_shards(Others(4), others := tmp_path / "others", clips_per_shard=2, progress=False)
    sets = [pristine_shards, others]
    latent_shards(sets, tmp_path / "latents", SHORT, encoder := Encoder()).encode(encoder)
    videos = IndexedShards(sets, SHORT, seed=SEED, shuffle=False)
    latents = IndexedShards([tmp_path / "latents"], SHORT, seed=SEED, shuffle=False)
    for position in (0, 10, 11, 14):
        assert torch.equal(latents[position].latents, online(videos[position], encoder).latents)
    with pytest.raises(ValueError, match="two clips of the source share the key 'clip-000'"):
        VideoShards([pristine_shards, pristine_shards]).open(SHORT, SEED)


def test_going_on_with_other_settings_or_videos_is_an_error_and_no_mixture(
    pristine_shards: Path, shards: Path, tmp_path: Path
) -> None:
    directory = tmp_path / "latents"
    latent_shards(pristine_shards, directory, SHORT, encoder := Encoder()).encode(encoder, Share(0, 2))
    before = contents(directory)
    for changes, message in (
        ({"codec": "dct-other"}, "codec: dct-[0-9a-f]+ there, dct-other now"),
        ({"num_epochs": 2}, "num_epochs: 1 there, 2 now"),
        ({"versions": {"torch": "1.0"}}, "versions: .* there, {'torch': '1.0'} now"),
    ):
        with pytest.raises(ValueError, match=f"holds an interrupted run of other settings .*{message}"):
            latent_shards(pristine_shards, directory, SHORT, encoder, **changes).encode(encoder)
    shutil.rmtree(shards)
    write_shards(NumberedSource(10), shards, clips_per_shard=3, progress=False)
    with pytest.raises(ValueError, match=r"videos: [0-9a-f]+ there, [0-9a-f]+ now"):
        latent_shards(shards, directory, SHORT, encoder).encode(encoder)
    assert contents(directory) == before


def test_wrong_settings_are_refused_before_any_work(pristine_shards: Path, reference: Path, tmp_path: Path) -> None:
    encoder = Encoder()
    with pytest.raises(ValueError, match="piece_frames=0 must be at least 1"):
        latent_shards(pristine_shards, tmp_path / "new", SHORT, encoder).encode(encoder, piece_frames=0)
    with pytest.raises(ValueError, match=r"task_index=4 must be one of 0 .. 3, for num_tasks=4; .* --array=0-3"):
        Share(4, 4)
    with pytest.raises(ValueError, match="holds latents already; stage=encode takes shards of videos"):
        VideoShards(reference).open(SHORT, SEED)
    assert not (tmp_path / "new").exists()
    assert settings_of(SHORT, encoder).to_json() == json.loads((reference / "shards.json").read_text())["latents"]


def test_every_shard_belongs_to_one_process_of_one_task() -> None:
    shares = [part for task in range(3) for part in Share(task, 3).split(2)]
    assert [list(share.of(8)) for share in shares] == [[0, 6], [3], [1, 7], [4], [2], [5]]
    assert [list(share.of(8)) for share in Share(1, 3).split(1)] == [[1, 4, 7]]


@pytest.mark.parametrize(
    ("num_frames", "piece_frames", "lengths"),
    [(1, 16, [1]), (5, 2, [5, 8, 4]), (4, 4, [13]), (4, 1, [1, 4, 4, 4])],
)
def test_pieces_of_a_clip_adjoin_and_hold_whole_frames(num_frames: int, piece_frames: int, lengths: list[int]) -> None:
    pieces = raw_pieces(ClipSpec(num_frames, 1, 16, 16, 24), piece_frames)
    assert [len(piece) for piece in pieces] == lengths
    assert [index for piece in pieces for index in piece] == list(range(4 * num_frames - 3))
