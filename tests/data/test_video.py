"""Frame accuracy over codecs, containers and oddities: every frame carries its number in its pixels."""

import io
import random

import av
import numpy as np
import pytest
import torch
from av.video.reformatter import Colorspace, VideoReformatter

from helpers.videos import encode, numbered_frames, numbers
from longlive.data import video
from longlive.data.video import DecordReader, PyAVReader, UnreadableVideoError, open_video

NUM_FRAMES = 50
OPEN_GROUPS = {"x264-params": "keyint=12:min-keyint=12:scenecut=0:bframes=3:b-adapt=0:open-gop=1"}
FILES = {
    "h264": {"options": {"x264-params": "keyint=12:min-keyint=12:scenecut=0:bframes=3:b-adapt=0"}},
    "h264, one group": {},
    "h264, no B-frames, mkv": {"container": "matroska", "options": {"x264-params": "keyint=10:bframes=0"}},
    "h264, open groups": {"options": OPEN_GROUPS},
    "h264, open groups, mkv": {"container": "matroska", "options": OPEN_GROUPS},
    "h264, open groups without leading pictures": {"options": {"x264-params": "keyint=12:min-keyint=12:open-gop=1"}},
    "h264, odd size": {"size": (35, 67), "pixel_format": "yuv444p"},
    "h264, every frame a key frame": {"options": {"x264-params": "keyint=1"}},
    "hevc": {"codec": "libx265", "options": {"x265-params": "keyint=12:min-keyint=12:bframes=3:log-level=none"}},
    "hevc, closed groups, mkv": {
        "codec": "libx265",
        "container": "matroska",
        "options": {"x265-params": "keyint=12:open-gop=0:bframes=3:log-level=none"},
    },
    "hevc, odd size": {"codec": "libx265", "size": (35, 67), "pixel_format": "yuv444p"},
    "vp9, webm": {"codec": "libvpx-vp9", "container": "webm", "options": {"g": "12", "cpu-used": "8"}},
    "vp9, mp4": {"codec": "libvpx-vp9", "options": {"g": "12", "cpu-used": "8"}},
    "vp9, odd size, mkv": {
        "codec": "libvpx-vp9",
        "container": "matroska",
        "size": (35, 67),
        "options": {"cpu-used": "8"},
    },
    "av1, mp4": {"codec": "libsvtav1", "size": (64, 96), "options": {"preset": "12", "g": "16"}},
    "av1, webm": {"codec": "libsvtav1", "container": "webm", "size": (66, 98), "options": {"preset": "12", "g": "16"}},
    "av1, mkv": {"codec": "libsvtav1", "container": "matroska", "size": (64, 96), "options": {"preset": "12"}},
    "mpeg4": {"codec": "mpeg4", "options": {"g": "12"}},
    "mpeg4, B-frames": {"codec": "mpeg4", "options": {"g": "12", "bf": "2"}},
    "turned by 90 degrees": {"rotation": 90},
    "turned by 180 degrees": {"rotation": 180},
    "turned by -90 degrees": {"rotation": -90},
}
DECORD_READS = {
    "h264",
    "h264, one group",
    "h264, no B-frames, mkv",
    "h264, odd size",
    "h264, every frame a key frame",
    "vp9, webm",
    "vp9, mp4",
    "vp9, odd size, mkv",
    "mpeg4",
}


@pytest.fixture(scope="module")
def files() -> dict[str, bytes]:
    return {}


def content_of(files: dict[str, bytes], name: str) -> bytes:
    """The file of a name in `FILES`, encoded once."""
    if name not in files:
        settings = dict(FILES[name])
        frames = numbered_frames(NUM_FRAMES, *settings.pop("size", (48, 80)))
        turns = settings.get("rotation", 0) // 90
        files[name] = encode(torch.rot90(frames, -turns, (2, 3)), **settings)
    return files[name]


@pytest.mark.parametrize("decoder", ["pyav", "decord"])
@pytest.mark.parametrize("name", FILES)
def test_every_frame_is_the_one_asked_for_in_any_order(files: dict[str, bytes], name: str, decoder: str) -> None:
    """A decoder that seeks to the wrong group, or drops leading pictures, returns a neighbour without an error."""
    if decoder == "decord" and video.decord is None:
        assert DECORD_READS  # without decord's wheel every file goes through PyAV, which the other parameter covers
        return
    with open_video(content_of(files, name), decoder) as reader:
        assert reader.num_raw_frames == NUM_FRAMES
        assert (reader.height, reader.width) == FILES[name].get("size", (48, 80))
        assert numbers(reader.read(range(NUM_FRAMES))) == list(range(NUM_FRAMES))
        order = random.Random(0)
        for _ in range(6):
            indices = [order.randrange(NUM_FRAMES) for _ in range(order.choice([1, 2, 9]))]
            assert numbers(reader.read(indices)) == indices
        for index in order.sample(range(NUM_FRAMES), 8):
            assert numbers(reader.read([index])) == [index]


@pytest.mark.skipif(video.decord is None, reason="decord has wheels for x86-64 only")
def test_decord_gets_only_the_files_that_it_reads_right(files: dict[str, bytes]) -> None:
    chosen = {name for name in FILES if type(open_video(content_of(files, name), "decord")) is DecordReader}
    assert chosen == DECORD_READS


@pytest.mark.skipif(video.decord is None, reason="decord has wheels for x86-64 only")
def test_both_decoders_give_the_same_pixels(files: dict[str, bytes]) -> None:
    content = content_of(files, "h264")
    indices = [0, 7, 13, 30]
    torch.testing.assert_close(
        open_video(content, "pyav").read(indices), open_video(content, "decord").read(indices), rtol=0, atol=0
    )


def test_the_files_with_open_groups_have_pictures_that_need_the_group_before(files: dict[str, bytes]) -> None:
    """Otherwise the tests above would pass with any decoder."""
    with av.open(io.BytesIO(content_of(files, "h264, open groups"))) as container:
        packets = [(packet.pts, packet.is_keyframe) for packet in container.demux(video=0) if packet.size]
    keys = [stamp for stamp, is_key in packets if is_key]
    assert any(stamp < key for key in keys for stamp, _ in packets[packets.index((key, True)) :])


def test_the_default_decoder_is_pyav(files: dict[str, bytes]) -> None:
    assert type(open_video(content_of(files, "h264"))) is PyAVReader


def test_without_decord_asking_for_it_is_an_error(files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(video, "decord", None)
    with pytest.raises(ValueError, match=r"decoder='decord' is not installed"):
        open_video(content_of(files, "h264"), "decord")
    with pytest.raises(ValueError, match=r"decoder='ffmpeg' is unknown; use one of pyav, decord"):
        open_video(content_of(files, "h264"), "ffmpeg")


def test_a_frame_far_into_the_file_is_reached_by_seeking(
    files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Decoding from the start would be right too, and ten times slower for long videos."""
    reader = open_video(content_of(files, "h264"))
    runs = []
    decode_from = PyAVReader._decode_from

    def note(self: PyAVReader, group: int, run: list[int], frames: torch.Tensor) -> bool:
        runs.append((group, list(run)))
        return decode_from(self, group, run, frames)

    monkeypatch.setattr(PyAVReader, "_decode_from", note)
    assert numbers(reader.read([49, 0, 3, 30])) == [49, 0, 3, 30]
    assert runs == [(0, [0, 3]), (2, [30]), (4, [49])]


def test_a_wanted_frame_that_does_not_come_out_is_tried_from_earlier_key_frames(
    files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    reader = open_video(content_of(files, "h264"))
    tried = []
    decode_from = PyAVReader._decode_from

    def fail_at_first(self: PyAVReader, group: int, run: list[int], frames: torch.Tensor) -> bool:
        tried.append(group)
        return group < 0 and decode_from(self, group, run, frames)

    monkeypatch.setattr(PyAVReader, "_decode_from", fail_at_first)
    assert numbers(reader.read([30])) == [30]
    assert tried == [2, 1, 0, -1]


@pytest.mark.parametrize("container", ["mp4", "matroska"])
def test_a_variable_frame_rate_is_told_by_time_stamps(container: str) -> None:
    times = [0.0, 0.1, 0.15, 0.4, 0.5, 1.0, 1.05, 1.3]
    content = encode(numbered_frames(len(times)), container=container, times=times)
    for decoder in ("pyav", "decord") if video.decord else ("pyav",):
        reader = open_video(content, decoder)
        np.testing.assert_allclose(reader.index.timestamps, times, atol=0.002)
        assert numbers(reader.read([7, 2, 5, 0, 1, 3])) == [7, 2, 5, 0, 1, 3]


def test_frames_that_the_container_hides_are_not_counted() -> None:
    """Cutting without re-encoding leaves frames before the cut in the file; counting them shifts every index."""
    source = av.open(io.BytesIO(encode(numbered_frames(30), options={"x264-params": "bframes=0"})))
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as output:
        stream = output.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.size:
                packet.pts -= 7 * 512
                packet.dts -= 7 * 512
                packet.stream = stream
                output.mux(packet)
    reader = open_video(file.getvalue(), "decord" if video.decord else "pyav")
    assert type(reader) is PyAVReader
    assert numbers(reader.read(range(reader.num_raw_frames))) == list(range(7, 30))


def test_colours_follow_the_matrix_that_the_file_names() -> None:
    """BT.709 pixels read as BT.601 look almost right: greens and reds shift."""
    colour = np.array([200, 40, 90], dtype=np.uint8)
    file = io.BytesIO()
    to_709 = VideoReformatter()
    with av.open(file, "w", format="mp4") as output:
        stream = output.add_stream("libx264", rate=24)
        stream.height, stream.width, stream.pix_fmt, stream.options = 32, 32, "yuv420p", {"crf": "1"}
        stream.codec_context.colorspace = Colorspace.ITU709
        for _ in range(3):
            frame = av.VideoFrame.from_ndarray(np.broadcast_to(colour, (32, 32, 3)).copy(), format="rgb24")
            frame = to_709.reformat(frame, format="yuv420p", dst_colorspace=Colorspace.ITU709)
            output.mux(stream.encode(frame))
        output.mux(stream.encode())
    pixel = open_video(file.getvalue()).read([1])[0, :, 16, 16]
    assert (pixel.int() - torch.from_numpy(colour).int()).abs().max() <= 3


def test_anamorphic_pixels_are_reported() -> None:
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as output:
        stream = output.add_stream("libx264", rate=24)
        stream.height, stream.width, stream.pix_fmt = 32, 32, "yuv420p"
        stream.codec_context.sample_aspect_ratio = 2
        for pixels in numbered_frames(3, 32, 32).permute(0, 2, 3, 1).contiguous().numpy():
            output.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        output.mux(stream.encode())
    assert open_video(file.getvalue()).index.pixel_aspect == 2


def test_a_path_reads_like_its_content(tmp_path, files: dict[str, bytes]) -> None:
    path = tmp_path / "clip.mp4"
    path.write_bytes(content_of(files, "hevc"))
    for source in (path, str(path)):
        assert numbers(open_video(source).read([20, 4])) == [20, 4]
    with pytest.raises(FileNotFoundError):
        open_video(tmp_path / "nothing.mp4")


def test_broken_files_are_unreadable_and_never_shorter_videos(tmp_path, files: dict[str, bytes]) -> None:
    content = content_of(files, "h264")
    table_first = encode(numbered_frames(NUM_FRAMES), movflags="faststart", folder=tmp_path)
    for broken in (b"", b"no video at all", content[: len(content) // 2], table_first[: len(table_first) * 2 // 3]):
        with pytest.raises(UnreadableVideoError):
            open_video(broken)


def test_a_video_of_noise_packets_is_unreadable(files: dict[str, bytes]) -> None:
    content = bytearray(content_of(files, "hevc"))
    start = content.index(b"mdat") + 4
    content[start : start + 4000] = random.Random(0).randbytes(min(4000, len(content) - start))
    with pytest.raises(UnreadableVideoError):
        open_video(bytes(content)).read(range(NUM_FRAMES))


def test_a_file_without_video_is_unreadable() -> None:
    file = io.BytesIO()
    with av.open(file, "w", format="wav") as output:
        stream = output.add_stream("pcm_s16le", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 800), dtype=np.int16), format="s16", layout="mono")
        frame.sample_rate = 8000
        output.mux(stream.encode(frame))
        output.mux(stream.encode())
    with pytest.raises(UnreadableVideoError, match="no video stream"):
        open_video(file.getvalue())


def test_indices_outside_the_video_are_errors(files: dict[str, bytes]) -> None:
    reader = open_video(content_of(files, "h264"))
    for indices in ([0, NUM_FRAMES], [-1]):
        with pytest.raises(IndexError, match=f"of a video that has {NUM_FRAMES}"):
            reader.read(indices)
    assert reader.read([]).shape == (0, 3, 48, 80)
