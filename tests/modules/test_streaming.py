"""Streams: that they are one long rollout, what a clip of one is scored with, whose turn it is, and that a killed run
goes on in the middle of one."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.optim import SGD

from helpers.distillation_float64 import merged
from helpers.noisy import tiny_distillation
from helpers.runs import assert_same, fake_batches, fit
from helpers.wan_float64 import wan_velocity
from longlive.data.prompt_batches import PromptBatch
from longlive.models.visibility import VisibilityRule, visible_history
from longlive.modules import streaming
from longlive.modules.conditions import Conditions
from longlive.modules.distillation import DistillationModule
from longlive.modules.streaming import StreamingSettings
from longlive.rollout.settings import RolloutSettings
from longlive.rollout.student import Clip, StudentRollout
from longlive.typing import Tensor

FRAMES, CHUNKS, CLIPS = 4, 8, 4
"""Frames of a chunk; chunks and clips of a stream."""
SHAPE = (16, 4, 4)
SHOTS = torch.tensor([[0, 0, 0, 0, 0, 0, 0, 0], [0, 0, 0, 1, 1, 1, 1, 1]])
PROMPTS = (("red", "red", "red", "red", "blue", "blue", "blue", "blue"), ("green",) * 3 + ("a cut to grey",) * 5)
ROLLOUT = RolloutSettings(
    chunk_frames=FRAMES, num_steps=2, solver="euler", window=12, sink_frames=4, shot_sink=True, shot_rope_offset=4.0
)
STREAMING = StreamingSettings(max_frames=CHUNKS * FRAMES, clip_frames=2 * FRAMES, score_past=True)
Make = Callable[..., DistillationModule]


def batch(number: int = 0, prompts: Sequence[tuple[str, ...]] = PROMPTS) -> PromptBatch:
    ids = torch.tensor([2 * number, 2 * number + 1])
    return PromptBatch(tuple(prompts), SHOTS, ids, height=32, width=32)


def batches(steps: int) -> list[PromptBatch]:
    """As `PromptDataModule` brings them: one for every clip of a stream."""
    return [batch(step // CLIPS) for step in range(steps)]


@pytest.fixture
def make() -> Make:
    return partial(tiny_distillation, rollout=ROLLOUT, streaming=STREAMING)


class Watch(Callback):
    """The clips of a run, which of them had a graph, and what their steps said."""

    def __init__(self, module: DistillationModule, monkeypatch: pytest.MonkeyPatch) -> None:
        self.clips: list[Clip] = []
        self.graphs: list[bool] = []
        self.learned: list[tuple[str, bool]] = []
        self.outputs: list[dict[str, Any]] = []
        roll_out, learn = module.roll_out, module.learn

        def watched_rollout(*args: Any) -> Clip:
            clip = roll_out(*args)
            self.graphs.append(clip.latents.requires_grad)
            self.clips.append(clip)
            return clip

        def watched_learn(role: Any, rollout: Tensor, *args: Any) -> Any:
            self.learned.append((role, torch.equal(rollout, self.clips[-1].latents)))
            return learn(role, rollout, *args)

        monkeypatch.setattr(module, "roll_out", watched_rollout)
        monkeypatch.setattr(module, "learn", watched_learn)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.outputs.append(outputs)


@pytest.mark.parametrize(
    "changes", [{}, {"relative_rope": True}, {"cache_dtype": "nvfp4"}, {"prompt_switch": "recache"}], ids=str
)
def test_a_stream_is_one_long_rollout(make: Make, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a student that does not change, and exits where generation ends. Catches a context pass that is missing at the
    border of clips, slots that are taken anew there, and noise that repeats in every clip."""
    monkeypatch.setattr(StudentRollout, "exit_step", lambda self, state, first: ROLLOUT.num_steps - 1)
    still = {"optimizer": partial(SGD, lr=0.0), "critic_optimizer": partial(SGD, lr=0.0)}
    module = make(rollout=RolloutSettings(**vars(ROLLOUT) | changes), **still)
    watch = Watch(module, monkeypatch)
    fit(module, batches(6), callbacks=[watch])
    streamed = torch.cat([clip.latents.detach() for clip in watch.clips[:CLIPS]], dim=1)

    engine, conditions = module.rollout_engine(), module.conditions(batch())
    state = engine.start(SHAPE, 3, (0, 1), CHUNKS, purpose="stream")
    whole = []
    for chunk in range(CHUNKS):
        condition = engine.open_chunk(
            state, conditions.prompt_embeds, conditions.prompt_index[:, chunk], SHOTS[:, chunk].tolist()
        )
        whole.append(engine._finish(state, condition, write=True))
    torch.testing.assert_close(streamed, torch.cat(whole, dim=1), atol=1e-4, rtol=1e-4)
    assert [clip.first_chunk for clip in watch.clips] == [0, 2, 4, 6, 0, 2]
    second = torch.cat([clip.latents.detach() for clip in watch.clips[CLIPS:]], dim=1)
    assert (second - streamed[:, : second.shape[1]]).abs().amax((1, 2, 3, 4)).min() > 0.1


def test_a_step_is_a_clip_that_the_student_and_the_critic_learn_from(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One clip however many learn, or the places of a stream would depend on whose turn it is."""
    module = make()
    watch = Watch(module, monkeypatch)
    trainer = fit(module, batches(7), callbacks=[watch])
    assert trainer.global_step == len(watch.clips) == 7
    assert watch.graphs == [True, False, False, True, False, False, True]
    both, alone = ["student", "critic"], ["critic"]
    assert watch.learned == [(role, True) for turn in watch.graphs for role in (both if turn else alone)]
    places = [output["clip_position"] for output in watch.outputs]
    stream = torch.cat(places[:CLIPS])
    assert torch.equal(stream, torch.arange(CHUNKS * FRAMES) / (CHUNKS * FRAMES))
    assert torch.equal(places[CLIPS], places[0])
    assert all(output["scored"].all() and output["scored"].shape == (2, 2 * FRAMES) for output in watch.outputs)
    assert len({float(output["loss"]) for output in watch.outputs}) == 7


def third_clip(module: DistillationModule, first: PromptBatch) -> tuple[Conditions, Tensor]:
    """What the chunks 4 and 5 are asked for, and all latents before them."""
    made = []
    for _ in range(3):
        conditions = module.conditions(first)
        clip = module.stream.next_clip(conditions, 0, partial(module.start_rollout, conditions, "stream"))
        if len(made) == 2:
            return clip, torch.cat(made, dim=1)
        with torch.no_grad():
            made.append(module.roll_out("critic", clip, 0).latents)
    raise AssertionError


class Script:
    """The scores of the third clip of one sample in float64: one dense pass, from lists that were written by hand.

    With a window of 3 chunks, the first chunk as a sink and the shot's first as another, chunk 4 sees 0 and 3; chunk 5
    sees 0 and 4 in the first sample, and 0 and 3 in the second, which was cut at 3.
    """

    past = (0, 3)
    sees = ({3: [0], 4: [0, 3], 5: [0, 4]}, {3: [0], 4: [0, 3], 5: [0, 3]})

    def __init__(self, module: DistillationModule, sample: int, before: Tensor, clip: Tensor) -> None:
        self.module, self.sample, self.clip = module, sample, clip[sample].double()
        self.past_latents = torch.cat([before[sample, c * FRAMES : (c + 1) * FRAMES] for c in self.past]).double()
        encode = module.text_encoder.encode
        self.prompts = [embeds.double() for embeds in encode(list(PROMPTS[sample]))]
        self.negative = [encode([""])[0].double()] * CHUNKS

    def velocity(self, role: str | None, noisy: Tensor, timestep: float, prompts: list[Tensor]) -> Tensor:
        places = [("clean", c) for c in (0, 3, 4, 5)] + [("noisy", c) for c in (4, 5)]
        places = [place for place in places for _ in range(FRAMES)]
        sees = self.sees[self.sample]

        def visible(mine: tuple[str, int], other: tuple[str, int]) -> bool:
            return mine == other or (other[0] == "clean" and other[1] in sees.get(mine[1], []))

        positions = [
            c * FRAMES + 4.0 * int(SHOTS[self.sample, c]) + number % FRAMES for number, (_, c) in enumerate(places)
        ]
        return wan_velocity(
            merged(self.module, role),
            self.module.model_config.num_heads,
            torch.cat([self.past_latents, self.clip, noisy]),
            [0.0] * 4 * FRAMES + [timestep] * 2 * FRAMES,
            positions,
            [prompts[c] for _, c in places],
            torch.tensor([[visible(mine, other) for other in places] for mine in places]),
        )[4 * FRAMES :]

    def losses(self, step: int, draws: dict[str, tuple[float, Tensor]]) -> dict[str, float]:
        timestep, noise = draws["critic"]
        x_t = (1 - timestep / 1000) * self.clip + timestep / 1000 * noise
        v = self.velocity("critic", x_t, timestep, self.prompts)
        critic = float((v - (noise - self.clip)).square().mean())

        timestep, noise = draws["student"]
        x_t = (1 - timestep / 1000) * self.clip + timestep / 1000 * noise

        def clean(role: str | None, prompts: list[Tensor]) -> Tensor:
            return x_t - timestep / 1000 * self.velocity(role, x_t, timestep, prompts)

        cond, uncond = clean(None, self.prompts), clean(None, self.negative)
        real, student = cond + 3 * (cond - uncond), 0.0
        for part in (slice(0, FRAMES), slice(FRAMES, 2 * FRAMES)):
            g = (clean("critic", self.prompts) - real)[part] / (self.clip - real)[part].abs().mean()
            student += 0.5 * float(g.square().mean()) / 2
        return {"student": student, "critic": critic}


def test_a_clip_is_scored_with_the_past_that_its_rollout_saw(make: Make) -> None:
    """Against a dense float64 pass: other chunks for samples with other cuts, at their places in the video, and loss on
    the clip's chunks alone."""
    module = make()
    conditions, before = third_clip(module, batch())
    clip = torch.randn(2, 2 * FRAMES, *SHAPE, generator=torch.Generator().manual_seed(7))
    step, found, expected = 5, {}, {"student": 0.0, "critic": 0.0}
    for role in ("student", "critic"):
        loss = module.loss(role, clip, conditions, step)
        assert loss.frame_errors.shape == (2, 2 * FRAMES)
        found[role] = loss.loss.item()
    noisings = {role: module.noising(role, conditions, step) for role in ("student", "critic")}
    for sample in range(2):
        draws = {
            role: (float(drawn.timesteps[sample, 0]), drawn.noise[sample].double()) for role, drawn in noisings.items()
        }
        for role, value in Script(module, sample, before, clip).losses(step, draws).items():
            expected[role] += value / 2
    for role, value in expected.items():
        assert found[role] == pytest.approx(value, rel=1e-5), role


def test_a_clip_may_be_scored_as_a_video_of_its_own(make: Make) -> None:
    """Catches a past that is seen nonetheless, and positions or prompts that are those of the beginning."""
    streaming = StreamingSettings(**vars(STREAMING) | {"score_past": False})
    module, plain = make(streaming=streaming), make(streaming=None)
    conditions, _ = third_clip(module, batch())
    prompts, shots = tuple(prompts[4:6] for prompts in PROMPTS), torch.zeros(2, 2, dtype=torch.int64)
    alone = PromptBatch(prompts, shots, batch().sample_ids, height=32, width=32)
    clip = torch.randn(2, 2 * FRAMES, *SHAPE, generator=torch.Generator().manual_seed(7))
    for role in ("student", "critic"):
        found, expected = module.loss(role, clip, conditions, 5), plain.loss(role, clip, plain.conditions(alone), 5)
        assert found.frame_errors.shape == expected.frame_errors.shape == (2, 2 * FRAMES)
        torch.testing.assert_close(found.loss, expected.loss, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("kind", ["keep", "recache"])
def test_past_chunks_have_the_prompts_that_they_are_cached_under(make: Make, kind: Any) -> None:
    """The first sample switches from red to blue where the third clip begins; the second was cut before."""
    module = make(rollout=RolloutSettings(**vars(ROLLOUT) | {"prompt_switch": kind}))
    clip, _ = third_clip(module, batch())
    distinct = ["red", "blue", "green", "a cut to grey"]
    encoded = module.text_encoder.encode(distinct)
    names = [[distinct[int((encoded == clip.prompt_embeds[i]).all((1, 2)).nonzero())] for i in row]
             for row in clip.prompt_index.tolist()]  # fmt: skip
    old = "red" if kind == "keep" else "blue"
    assert names == [[old, old, "blue", "blue"], ["green", *["a cut to grey"] * 3]]
    assert module.recaches(module.conditions(batch())) == (frozenset() if kind == "keep" else {4})


@pytest.mark.parametrize(("sinks", "shot_sink", "window"), [(0, False, 3), (1, False, 3), (1, True, 4), (0, True, 2)])
def test_the_past_of_a_clip_is_what_any_of_its_chunks_sees(sinks: int, shot_sink: bool, window: int) -> None:
    """For every pattern of cuts: seen as a short video of past and clip, the rule shows the same chunks as in the whole
    video; and past chunks see all past ones before them. The scores and the rebuilt cache stand on this."""
    rule = VisibilityRule(window, sinks, shot_sink)
    for cuts, first in product(product((0, 1), repeat=CHUNKS - 1), (2, 4, 6)):
        shots = [0]
        for cut in cuts:
            shots.append(shots[-1] + cut)
        chunks = [*visible_history(first, shots, rule), first, first + 1]
        compact = [shots[chunk] for chunk in chunks]
        for place, chunk in enumerate(chunks):
            seen = [chunks[index] for index in visible_history(place, compact, rule)]
            wanted = visible_history(chunk, shots, rule) if chunk >= first else chunks[:place]
            assert seen == wanted, (shots, first, chunk)


class Save(Callback):
    """Writes a checkpoint after a step."""

    def __init__(self, path: Path, after: int) -> None:
        self.path, self.after = path, after

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        if trainer.global_step == self.after:
            trainer.save_checkpoint(self.path)


@pytest.mark.parametrize(
    ("killed_after", "changes"),
    [
        (2, {}),
        (4, {}),
        (3, {"relative_rope": True, "prompt_switch": "recache"}),
        (5, {"cache_dtype": "nvfp4"}),
    ],
    ids=str,
)
def test_a_run_killed_in_a_stream_goes_on_bit_for_bit(
    make: Make, tmp_path: Path, killed_after: int, changes: dict[str, Any]
) -> None:
    """The cache was written by weights that are gone, and its slots are in an order of their own."""
    everything, half, ends = batches(6), tmp_path / "half.ckpt", []
    for first in (0, killed_after):
        trainer = fit(
            make(rollout=RolloutSettings(**vars(ROLLOUT) | changes)),
            everything[first:],
            callbacks=[Save(half, killed_after)] if first == 0 else [],
            checkpoint=half if first else None,
            max_steps=6,
            max_epochs=5,
        )
        assert trainer.global_step == 6
        trainer.save_checkpoint(tmp_path / "end.ckpt")
        ends.append(torch.load(tmp_path / "end.ckpt", weights_only=True))
    for part in ("state_dict", "optimizer_states", "stream"):
        assert_same(ends[1][part], ends[0][part], part)
    assert ends[0]["stream"]["next_chunk"] == 4
    assert (torch.load(half, weights_only=True)["stream"] is None) == (killed_after == 4)


def test_a_checkpoint_of_a_run_that_has_not_gone_on_yet_keeps_the_stream(make: Make, tmp_path: Path) -> None:
    """A run that is told to stop before its first step."""
    trainer = fit(make(), batches(2))
    trainer.save_checkpoint(tmp_path / "first.ckpt")
    stored = torch.load(tmp_path / "first.ckpt", weights_only=True)
    module = make()
    module.on_load_checkpoint(stored)
    again: dict[str, Any] = {"state_dict": {}}
    module.on_save_checkpoint(again)
    assert_same(again["stream"], stored["stream"])


def test_a_rank_holds_one_tensor_of_all_ranks_at_a_time(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The caches of all ranks, on every rank, do not fit in its memory."""
    fit(make(), batches(2)).save_checkpoint(tmp_path / "first.ckpt")
    gathered: list[weakref.ref[Tensor]] = []

    def whole(rows: Tensor) -> Tensor:
        assert not any(each() is not None for each in gathered)
        gathered.append(weakref.ref(made := rows.clone()))
        return made

    monkeypatch.setattr(streaming, "of_all_ranks", whole)
    with pytest.raises(ValueError, match=r"the next batch holds \[2, 3\]"):
        fit(make(), [batch(1)], checkpoint=tmp_path / "first.ckpt", max_steps=3, max_epochs=5)
    refused = len(gathered)
    trainer = fit(make(), [batch(0)], checkpoint=tmp_path / "first.ckpt", max_steps=3, max_epochs=5)
    assert trainer.global_step == 3
    assert len(gathered) == 2 * refused > 2 * 4, "a rank that refuses its samples left the others waiting"


def test_frames_are_given_to_the_first_clip_alone(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a window of one chunk nothing is past, and the second clip must not be taken for the first."""
    clips = fake_batches(1, num_frames=CHUNKS * FRAMES)[0]
    narrow = RolloutSettings(chunk_frames=FRAMES, num_steps=2, window=FRAMES)
    module = make(given_frames=1, rollout=narrow)
    watch = Watch(module, monkeypatch)
    fit(module, [clips] * 3, callbacks=[watch])
    assert torch.equal(watch.clips[0].latents[:, :1], clips.latents[:, :1])
    assert [output["scored"].sum().item() for output in watch.outputs] == [2 * 7, 2 * 8, 2 * 8]
    assert [bool((output["timesteps"][:, 0] == 0).all()) for output in watch.outputs] == [True, False, False]


def test_a_stream_holds_no_more_at_its_end_than_in_its_middle(make: Make) -> None:
    """Slots and latents that nobody sees any more are gone."""
    module = make(streaming=StreamingSettings(16 * FRAMES, 2 * FRAMES))
    long = PromptBatch((("red",) * 16,), torch.zeros(1, 16, dtype=torch.int64), torch.tensor([0]), 32, 32)
    held: list[tuple[int, int]] = []

    class Measure(Callback):
        def on_train_batch_end(self, *args: Any) -> None:
            if module.stream.state is not None:
                held.append((module.stream.state.cache.num_bytes, module.stream.state.past.latents.nbytes))

    fit(module, [long] * 8, callbacks=[Measure()])
    assert len(held) == 7
    assert held[1:] == [held[1]] * 6
    assert module.stream.state is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"streaming": (32, 12)}, "max_frames=32 is no multiple of clip_frames=12"),
        ({"streaming": (32, 32)}, "max_frames=32 is no multiple of clip_frames=32, at least 2 times"),
        ({"streaming": (36, 6)}, "clip_frames=6 is no multiple of chunk_frames=4"),
        ({"rollout": RolloutSettings(chunk_frames=FRAMES)}, "need a window"),
        ({"student_every": 2}, "student_every=2 and the 4 clips of a stream have the common divisor 2"),
    ],
    ids=str,
)
def test_settings_that_do_not_fit_are_refused(make: Make, changes: dict[str, Any], message: str) -> None:
    def made() -> DistillationModule:
        lengths = changes.get("streaming", (CHUNKS * FRAMES, 2 * FRAMES))
        return make(**changes | {"streaming": StreamingSettings(*lengths)})

    with pytest.raises(ValueError, match=message):
        made()


def test_batches_that_are_not_of_the_stream_are_refused(make: Make) -> None:
    with pytest.raises(ValueError, match=r"\[0, 1\] is at frame 8 of 32, .* \[2, 3\]; .* 4 steps in a row: data.clip"):
        fit(make(), [batch(0), batch(1)])
    short = PromptBatch((("red",) * 4,), SHOTS[:1, :4], torch.tensor([0]), 32, 32)
    with pytest.raises(ValueError, match=r"videos of 16 frames, .* max_frames=32; set data.num_frames=32"):
        fit(make(), [short])


@pytest.mark.parametrize(
    ("changes", "number", "message"),
    [
        ({}, 1, r"of a stream of the samples \[0, 1\], and the next batch holds \[2, 3\]"),
        ({"rollout": RolloutSettings(chunk_frames=FRAMES, num_steps=2, window=16)}, 0, "the window 4 chunks"),
        ({"streaming": StreamingSettings(32, 16)}, 0, "at chunk 2 with a window of 3 chunks; here clips have 16"),
    ],
    ids=["samples", "window", "clips"],
)
def test_a_stream_that_cannot_go_on_is_refused(
    make: Make, tmp_path: Path, changes: dict[str, Any], number: int, message: str
) -> None:
    fit(make(), batches(1)).save_checkpoint(tmp_path / "first.ckpt")
    with pytest.raises(ValueError, match=message):
        fit(make(**changes), [batch(number)], checkpoint=tmp_path / "first.ckpt", max_steps=2, max_epochs=5)
