#!/usr/bin/env python3
"""Peak memory of encoding clips as `longlive shards stage=encode` does: over many clips, and over longer and longer
ones.

    tools/measure_encoding.py                                    # the toy world, a tiny codec of Wan's kind
    tools/measure_encoding.py --codec /models/Wan2.2-TI2V-5B --device cuda --height 704 --width 1280 --clips 20

Every line is a process of its own, because a process's peak never falls. A clip is decoded and encoded 16 frames at a
time (`encode.piece_frames`), so a longer clip should add its file and its latents alone; `in one piece` shows what it
would add otherwise. With --device cuda the GPU's peak is told, too.
"""

from __future__ import annotations

import argparse
import multiprocessing
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from longlive.codecs.wan import WanVideoCodec
from longlive.data.latent_shards import LatentShards, VideoShards
from longlive.data.latents import LatentSettings
from longlive.data.sample import ClipSpec
from longlive.data.shards import write_shards
from longlive.data.toyworld import ToyWorldSource
from longlive.encode_shards import OnlineEncoder
from longlive.text.toy import ToyTextEncoder

MIB = 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--codec", help="folder of a Wan codec; default: a tiny random one")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", help="of the codec's weights")
    parser.add_argument("--height", type=int, default=64)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--frames", type=int, default=8, help="of each of the many clips")
    parser.add_argument("--clips", type=int, default=200)
    parser.add_argument(
        "--lengths", type=int, nargs="*", default=[16, 64, 256], help="frames of longer and longer clips"
    )
    arguments = parser.parse_args()

    peaks = _measure(arguments, arguments.frames, arguments.clips, piece_frames=16)
    print(f"{arguments.clips} clips of {arguments.frames} frames, {arguments.height} x {arguments.width}")
    quarters = [max(1, arguments.clips * quarter // 4) for quarter in (1, 2, 3, 4)]
    for clips in quarters:
        print(f"  after {clips:4d} clips: {_told(peaks[clips])}, {peaks[clips][0] / peaks[quarters[0]][0] - 1:+.2%}")
    for name, piece_frames in (("in pieces", 16), ("in one piece", 10**6)):
        print(f"one clip, {name}")
        for length in arguments.lengths:
            print(f"  {length:4d} frames: {_told(_measure(arguments, length, 1, piece_frames)[1])}")


def _told(peak: tuple[int, int, float]) -> str:
    memory, gpu_memory, seconds = peak
    gpu = f", GPU {gpu_memory / MIB:.1f} MiB" if gpu_memory else ""
    return f"peak {memory / MIB:.1f} MiB{gpu}, {seconds:.0f} s"


def _measure(
    arguments: argparse.Namespace, num_frames: int, num_clips: int, piece_frames: int
) -> Sequence[tuple[int, int, float]]:
    """Peak bytes of memory and GPU memory, and seconds, before the first clip and after every one."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_encode, args=(sender, arguments, num_frames, num_clips, piece_frames))
    process.start()
    sender.close()
    try:
        peaks: Sequence[tuple[int, int, float]] = receiver.recv()
    except EOFError:
        raise SystemExit("the measuring process died; its error is above") from None
    process.join()
    return peaks


def _encode(sender: object, arguments: argparse.Namespace, num_frames: int, num_clips: int, piece_frames: int) -> None:
    spec = ClipSpec(num_frames, 1, arguments.height, arguments.width, 24)
    codec = (
        WanVideoCodec.tiny()
        if arguments.codec is None
        else WanVideoCodec.from_pretrained(arguments.codec, getattr(torch, arguments.dtype))
    )
    device = torch.device(arguments.device)
    encoder = OnlineEncoder(codec.to(device), ToyTextEncoder(), device, torch.float32)
    settings = LatentSettings.of(
        spec,
        seed=0,
        num_epochs=1,
        dtype="float32",
        codec=codec.fingerprint,
        text_encoder=encoder.text_encoder.fingerprint,
        device=device.type,
        versions={},
    )
    with tempfile.TemporaryDirectory() as folder:
        videos = Path(folder, "videos")
        # By another process, whose peak is not encoding's: it draws all frames of a clip at once.
        writer = multiprocessing.get_context("spawn").Process(target=_write, args=(videos, num_clips, spec))
        writer.start()
        writer.join()
        shards = LatentShards(VideoShards(videos).open(spec, 0), Path(folder, "latents"), settings)
        begin, peaks = time.monotonic(), []

        def note(_: int = 0) -> None:
            gpu = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
            peaks.append((_peak_memory(), gpu, time.monotonic() - begin))

        note()
        shards.encode(encoder, piece_frames=piece_frames, advance=lambda clips: note() if clips else None)
    sender.send(peaks)  # type: ignore[attr-defined]


def _write(directory: Path, num_clips: int, spec: ClipSpec) -> None:
    write_shards(ToyWorldSource(num_clips, spec.num_raw_frames), directory, clips_per_shard=10, progress=False)


def _peak_memory() -> int:
    """Of this process, in bytes. (`ru_maxrss` would be that of the process that started it, if that had more.)"""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return 1024 * int(line.split()[1])
    raise SystemExit("this system does not tell a process's peak memory")


if __name__ == "__main__":
    main()
