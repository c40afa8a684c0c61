"""Sharded encoding: windows, the exchange between neighbours, halos and what they cost."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.distributed as dist

from helpers.distributed import run_on_ranks
from longlive import rng
from longlive.codecs.dct import DCTCodec
from longlive.codecs.wan import WanVideoCodec
from longlive.data.sample import ClipWindow
from longlive.parallel import codec_halo
from longlive.parallel.codec_halo import (
    BFLOAT16_ROUNDING,
    NeighbourCache,
    WindowPart,
    check_parts,
    clip_window,
    codec_context,
    encode_window,
    exchange_window,
    halo_errors,
    halo_window,
    smallest_halo,
)
from longlive.typing import Latents, Video

TOOL = Path(__file__).resolve().parents[2] / "tools" / "measure_halo.py"


def random_video(num_frames: int, batch_size: int = 1, height: int = 16, width: int = 16, seed: int = 0) -> Video:
    shape = (batch_size, 1 + 4 * (num_frames - 1), 3, height, width)
    return 2 * torch.rand(shape, generator=rng.generator(seed, "test_video")) - 1


def part_of(whole: torch.Tensor, frames: range) -> torch.Tensor:
    return whole[:, frames.start : frames.stop]


def encode_part(
    codec: Any, video: Video, frames: range, context: str = "exchange", group: dist.ProcessGroup | None = None
) -> Latents:
    """As training does: read the window, encode it."""
    window = clip_window(codec, frames, context)
    return encode_window(codec, video[:, window.start : window.stop], frames, context, group)


@pytest.fixture(scope="module")
def codec() -> WanVideoCodec:
    return WanVideoCodec.tiny(seed=1)


# Windows: literal frames in, literal raw frames out.


def test_an_exchange_reads_the_raw_frames_of_the_owned_frames_and_no_others() -> None:
    assert exchange_window(range(0, 3), 4) == ClipWindow(0, 9, 0)
    assert exchange_window(range(3, 6), 4) == ClipWindow(9, 21, 3)
    assert exchange_window(range(0, 1), 4) == ClipWindow(0, 1, 0)
    assert exchange_window(range(1, 2), 4) == ClipWindow(1, 5, 1)
    assert exchange_window(range(5, 7), 2) == ClipWindow(9, 13, 5)


def test_a_halo_window_begins_one_raw_frame_before_the_groups_of_its_halo() -> None:
    assert halo_window(range(0, 3), 2, 4) == ClipWindow(0, 9, 0)
    assert halo_window(range(6, 9), 2, 4) == ClipWindow(12, 33, 6)
    assert halo_window(range(6, 9), 0, 4) == ClipWindow(20, 33, 6)
    assert halo_window(range(6, 9), 5, 4) == ClipWindow(0, 33, 6)
    assert halo_window(range(6, 9), 28, 4) == ClipWindow(0, 33, 6)


@pytest.mark.parametrize("size", [2, 3, 4])
def test_exchanging_ranks_read_every_raw_frame_once_and_equally_many_to_one_group(size: int) -> None:
    share = 12 // size
    windows = [exchange_window(range(rank * share, (rank + 1) * share), 4) for rank in range(size)]
    assert [frame for window in windows for frame in range(window.start, window.stop)] == list(range(45))
    assert all(abs((window.stop - window.start) - 45 / size) <= 4 for window in windows)


def test_windows_without_frames_or_with_a_negative_halo_are_refused() -> None:
    for frames in (range(3, 3), range(4, 2), range(-1, 2), range(0, 8, 2)):
        with pytest.raises(ValueError, match="must be a run of at least one frame"):
            exchange_window(frames, 4)
        with pytest.raises(ValueError, match="must be a run of at least one frame"):
            halo_window(frames, 2, 4)
    with pytest.raises(ValueError, match="halo=-1 must be at least 0"):
        halo_window(range(3), -1, 4)


# The choice.


def test_auto_exchanges_where_the_codec_can(codec: WanVideoCodec) -> None:
    assert [codec_context(codec, wanted) for wanted in ("auto", "exchange", "halo")] == ["exchange", "exchange", "halo"]
    assert [codec_context(DCTCodec(), wanted) for wanted in ("auto", "halo")] == ["halo", "halo"]


def test_a_context_that_a_codec_cannot_have_is_refused(codec: WanVideoCodec) -> None:
    with pytest.raises(ValueError, match=r"codec_context=exchange needs .* DCTCodec has none: use codec_context=halo"):
        codec_context(DCTCodec(), "exchange")
    with pytest.raises(ValueError, match="codec_context='hallo' is unknown; use auto, exchange, halo"):
        codec_context(codec, "hallo")


# The exchange.

CUTS = {
    2: ([0, 1, 2], [0, 2, 4], [0, 4, 8], [0, 1, 8], [0, 7, 8]),
    4: ([0, 1, 2, 3, 4], [0, 2, 4, 6, 8], [0, 4, 8, 12, 16], [0, 1, 2, 4, 8]),
}
"""Where the clip is cut: one, two and four frames per rank, and uneven ones."""


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_exchanging_ranks_encode_what_one_process_encodes(codec: WanVideoCodec, num_ranks: int) -> None:
    """Several clips in a row, so that a message of one encode that is read by the next would show."""
    cases = [
        (cuts, random_video(cuts[-1], batch_size=2, height=32, seed=seed)) for seed, cuts in enumerate(CUTS[num_ranks])
    ]
    cases += [(cuts, random_video(cuts[-1], width=48)) for cuts in CUTS[num_ranks][:2]]
    cases += [cases[0]]

    def encode() -> list[Latents]:
        rank = dist.get_rank()
        return [
            encode_part(codec, video, range(*cuts[rank : rank + 2]), group=dist.group.WORLD) for cuts, video in cases
        ]

    by_rank = run_on_ranks(encode, num_ranks)
    for (cuts, video), parts in zip(cases, zip(*by_rank, strict=True), strict=True):
        assert [part.shape[1] for part in parts] == [stop - start for start, stop in pairwise(cuts)]
        whole = codec.encode(video)
        # One piece and groups of four differ in the order of summation.
        error = (torch.cat(parts, dim=1) - whole).abs().max() / whole.abs().max()
        assert error <= 1e-6, f"cut at {cuts}"


def test_what_the_neighbour_sends_matters(codec: WanVideoCodec) -> None:
    """If windows of the tiny codec hardly depended on their left, the comparison above would compare nothing."""
    video = random_video(4)
    alone = codec.encode(video[:, 4:])[:, 1:]
    assert (alone - codec.encode(video)[:, 2:]).abs().max() > 0.1


def test_groups_of_a_larger_world_exchange_within_themselves() -> None:
    """Ranks of a group are no global ranks: the second of two data-parallel groups would talk to the first."""
    codec = WanVideoCodec.tiny(seed=1, dtype=torch.bfloat16)

    def encode() -> tuple[Latents, Latents]:
        rank = dist.get_rank()
        pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
        singles = [dist.new_group([other]) for other in range(4)]
        video = random_video(6, seed=rank // 2)
        place = rank % 2
        return (
            encode_part(codec, video, range(3 * place, 3 * place + 3), group=pairs[rank // 2]),
            encode_part(codec, video, range(0, 6), group=singles[rank]),
        )

    by_rank = run_on_ranks(encode, 4)
    for pair in range(2):
        whole = codec.encode(random_video(6, seed=pair))
        parts = torch.cat([by_rank[2 * pair + place][0] for place in range(2)], dim=1)
        assert parts.dtype == torch.float32
        # bfloat16 inside: one piece and groups of four round differently.
        assert (parts - whole).abs().mean() < 0.02 * whole.std()
        for place in range(2):
            assert torch.equal(by_rank[2 * pair + place][1], whole), "a group of one rank is a plain encode"


def test_ranks_run_as_a_wavefront(codec: WanVideoCodec) -> None:
    """The second rank must have passed its first convolution before the first rank enters its last one: if windows were
    encoded one after the other, nothing would be gained, and here both would wait for ever."""
    video = random_video(4)
    encoder = codec.autoencoder.encoder

    def encode() -> None:
        token = torch.zeros(1)

        def wait_for_the_second_rank(module: object, args: tuple[torch.Tensor, ...]) -> None:
            if args[0].shape[2] > 1 and not args[0].is_meta:  # neither frame 0 alone nor a dry run
                dist.recv(token, src=1, tag=7)

        def tell_the_first_rank(module: object, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
            if not output.is_meta:
                dist.send(token, dst=0, tag=7)

        if dist.get_rank() == 0:
            encoder.conv_out.register_forward_pre_hook(wait_for_the_second_rank)
        else:
            encoder.conv_in.register_forward_hook(tell_the_first_rank)
        encode_part(codec, video, range(0, 3) if dist.get_rank() == 0 else range(3, 4), group=dist.group.WORLD)

    run_on_ranks(encode, 2, timeout=20)


def test_ranks_that_all_own_the_whole_clip_exchange_nothing(codec: WanVideoCodec) -> None:
    """The contiguous layout: every rank's targets need the whole clip."""
    video = random_video(3)
    for latents in run_on_ranks(lambda: encode_part(codec, video, range(0, 3), group=dist.group.WORLD), 2):
        assert torch.equal(latents, codec.encode(video))


def test_a_rank_that_cannot_encode_ends_the_exchange_on_every_rank(
    codec: WanVideoCodec, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If only the rank itself raised, its neighbours would wait for it until the process group times out."""
    video = random_video(4)

    def messages() -> list[str]:
        rank = dist.get_rank()
        found = []
        # Rank 1 misses a raw frame; rank 0 has too many; the parts do not adjoin; rank 1 has too little memory.
        for given, owned, free in (
            ((video[:, :5], video[:, 5:12]), (range(0, 2), range(2, 4)), 2**30),
            ((video[:, :6], video[:, 5:]), (range(0, 2), range(2, 4)), 2**30),
            ((video[:, :5], video[:, 9:]), (range(0, 2), range(3, 4)), 2**30),
            ((video[:, :5], video[:, 5:]), (range(0, 2), range(2, 4)), 2**10),
        ):
            monkeypatch.setattr(codec_halo, "free_bytes", lambda device, free=free: free if rank else 2**30)
            with pytest.raises(ValueError) as error:  # noqa: PT011, the messages are compared below
                encode_window(codec, given[rank], owned[rank], "exchange", dist.group.WORLD)
            found.append(str(error.value))
        return found

    first, second = run_on_ranks(messages, 2, timeout=30)
    assert first == second
    assert "sequence rank 1: num_raw_frames=7, but frames 2 .. 3 need the 8 raw frames 5 .. 12" in first[0]
    assert "sequence rank 0: num_raw_frames=6, but frames 0 .. 1 need the 5 raw frames 0 .. 4" in first[1]
    assert "sequence rank 1: it owns frames 3 .. 3, and its left neighbour's end at 2" in first[2]
    assert "sequence rank 1: encoding 8 raw frames of 16 x 16" in first[3]


def test_a_window_that_does_not_fit_is_refused_with_numbers_and_ways_out() -> None:
    fits = WindowPart(0, 24, 93, 1, 704, 1280, 50 * 2**30, 60 * 2**30)
    check_parts([fits, WindowPart(24, 48, 96, 1, 704, 1280, 52 * 2**30, 52 * 2**30)], 4)
    check_parts([fits, WindowPart(24, 48, 96, 1, 704, 1280, 52 * 2**30, -1)], 4)
    with pytest.raises(
        ValueError,
        match=r"sequence rank 1: encoding 96 raw frames of 704 x 1280 \(batch size 1\) in one piece needs 52\.00 GiB "
        r"of activations, and 40\.50 GiB are free; use codec_context=halo .*, more sequence ranks, or smaller clips",
    ):
        check_parts([fits, WindowPart(24, 48, 96, 1, 704, 1280, 52 * 2**30, 81 * 2**29)], 4)


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ([WindowPart(2, 4, 8, 1, 16, 16)], "sequence rank 0: it owns frames 2 .. 3, .* begin at 0"),
        ([WindowPart(0, 2, 5, 1, 16, 16), WindowPart(1, 4, 12, 1, 16, 16)], "left neighbour's end at 2; .* begin at 2"),
        ([WindowPart(0, 2, 5, 1, 16, 16), WindowPart(2, 4, 8, 2, 16, 16)], r"are \(2, 16, 16\), .* are \(1, 16, 16\)"),
    ],
    ids=["no beginning", "overlap", "other batch size"],
)
def test_parts_that_do_not_belong_together_are_refused(parts: Sequence[WindowPart], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_parts(parts, 4)


def test_an_entry_of_another_shape_than_the_neighbour_expects_is_refused() -> None:
    """Another version of diffusers may cache otherwise; the neighbour would read bytes of something else."""

    def write() -> None:
        cache = NeighbourCache(
            [None],
            dist.group.WORLD,
            incoming=None,
            outgoing=[(1, 4, 2, 8, 8)],
            dtype=torch.float32,
            device=torch.device("cpu"),
        )
        with pytest.raises(ValueError, match=r"entry 0 .* shape \(1, 4, 3, 8, 8\), .* expects \(1, 4, 2, 8, 8\)"):
            cache[0] = torch.zeros(1, 4, 3, 8, 8)

    run_on_ranks(write, 1)


# One process, halos.


def test_one_process_encodes_plainly_and_refuses_a_part_that_needs_a_neighbour(codec: WanVideoCodec) -> None:
    video = random_video(4)
    for context in ("exchange", "halo", "auto"):
        assert torch.equal(encode_window(codec, video, range(0, 4), context, None), codec.encode(video))
        with pytest.raises(ValueError, match=r"num_raw_frames=9, but frames 0 .. 3 need the 13 raw frames 0 .. 12"):
            encode_window(codec, video[:, :9], range(0, 4), context, None)
    with pytest.raises(ValueError, match=r"frames 2 .. 3 have a left neighbour, and this process is alone"):
        encode_part(codec, video, range(2, 4))


def test_the_exact_halo_gives_the_latents_of_the_whole(codec: WanVideoCodec) -> None:
    first = codec.exact_halo_frames + 3
    video = random_video(first + 3)
    whole = codec.encode(video)
    for frames in (range(0, 2), range(2, 3), range(5, 8), range(first, first + 3)):
        latents = encode_part(codec, video, frames, "halo")
        torch.testing.assert_close(latents, part_of(whole, frames), rtol=0, atol=1e-6)


def test_groups_of_the_toy_codec_need_no_halo() -> None:
    codec, video = DCTCodec(), random_video(6, batch_size=2)
    whole = codec.encode(video)
    for frames in (range(0, 2), range(1, 2), range(2, 6)):
        assert clip_window(codec, frames, "auto") == halo_window(frames, 0, 4)
        assert torch.equal(encode_part(codec, video, frames, "halo"), part_of(whole, frames))
    with pytest.raises(ValueError, match=r"num_raw_frames=8, but frames 2 .. 3 need the 9 raw frames 4 .. 12"):
        encode_window(codec, video[:, 5:13], range(2, 4), "halo", None)


def test_halo_errors_are_the_errors_of_windows_with_that_halo(codec: WanVideoCodec) -> None:
    video, start = random_video(9), 3
    whole = codec.encode(video)
    errors = halo_errors(codec, [video], [start])
    assert len(errors) == 6
    for halo, error in enumerate(errors):
        frames = range(start + halo, 9)
        window = halo_window(frames, halo, 4)
        latents = codec.encode(video[:, window.start : window.stop])[:, -len(frames) :]
        assert (latents - part_of(whole, frames)).abs().max().item() == pytest.approx(error, abs=1e-6)
    assert errors[0] > errors[5] > 1e-3
    assert halo_errors(codec, [video, video.flip(1)], [2, start]) >= errors
    assert halo_errors(DCTCodec(), [video], [start]) == [0.0] * 6


@pytest.mark.parametrize("starts", [(), (1,), (2, 4)])
def test_windows_that_cut_nothing_off_or_leave_nothing_are_refused(starts: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"must lie in 2 \.\. 3 for clips of 4 frames"):
        halo_errors(DCTCodec(), [random_video(4)], starts)


def test_the_smallest_halo_is_the_first_below_the_bound() -> None:
    assert smallest_halo([1.0, 0.1, 0.003, 0.001]) == 2
    assert smallest_halo([1.0, BFLOAT16_ROUNDING, 0.0]) == 2
    assert smallest_halo([1.0, 0.1, 0.003], bound=0.5) == 1
    with pytest.raises(
        ValueError, match=r"no halo of 0 \.\. 1 frames has an error below 0\.00390625, the last has 0\.1"
    ):
        smallest_halo([1.0, 0.1])


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("measure_halo", TOOL)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_measured_halo_is_stored_with_the_codec_and_keeps_its_bound(
    codec: WanVideoCodec, tool: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    codec.autoencoder.save_pretrained(tmp_path / "vae")
    tool.main([str(tmp_path), "--height", "32", "--width", "32", "--write"])
    assert "smallest below the bound" in capsys.readouterr().out
    record = json.loads((tmp_path / "vae" / "halo.json").read_text())
    assert record["max_error"] < record["bound"] == BFLOAT16_ROUNDING
    assert record["definition"]["dtype"] == "float32"

    measured = WanVideoCodec.from_pretrained(tmp_path)
    assert 0 < measured.halo_frames == record["halo_frames"] < measured.exact_halo_frames
    frames = range(measured.halo_frames + 3, measured.halo_frames + 6)
    video = random_video(frames.stop, height=32, width=32, seed=5)
    difference = encode_part(measured, video, frames, "halo") - part_of(measured.encode(video), frames)
    assert 0 < difference.abs().max() < BFLOAT16_ROUNDING


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "name one codec"),
        (["--tiny", "--dct"], "name one codec"),
        (["--dct", "--write"], "--write stores the halo in a codec's folder"),
        (["missing"], "codec folder=missing holds no config.json"),
        (["--dct", "--height", "20"], "height=20, width=64 are no multiples"),
    ],
)
def test_the_tool_says_what_is_wrong(
    tool: ModuleType, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        tool.main(arguments)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err
