"""The rollout under gradient: against plain autograd without a cache, where gradients go, where it exits, and that what
backward runs again reads what was read."""

import copy
import gc
import weakref
from collections import Counter
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from longlive import rng
from longlive.diffusion.schedule import FlowSchedule
from longlive.diffusion.solver import make_solver
from longlive.models.attention import dense_attention
from longlive.models.visibility import Role, Segment, VisibilityRule, token_mask
from longlive.models.wan.model import CausalWan
from longlive.models.wan.rope import Rotation
from longlive.rollout.engine import RolloutEngine, RolloutSettings, RolloutState
from longlive.rollout.student import Clip, StudentRollout
from longlive.typing import Heads, Tensor

FRAMES, SHAPE, CHUNKS = 2, (4, 4, 4), 5
SETTINGS = RolloutSettings(chunk_frames=FRAMES, num_steps=3, window=6, shot_sink=True, shot_rope_offset=4.0)
PROMPTS = torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(0))
PROMPT_INDEX = torch.tensor([[0, 0, 1, 1, 2], [2, 1, 1, 1, 0]])
SHOTS = torch.tensor([[0, 0, 1, 1, 1], [0, 1, 1, 1, 1]])
"""Cut at different chunks: the samples' tables differ, and slots are evicted in both."""
IDS = [7, 3]
GIVEN = torch.randn(2, 1, *SHAPE, generator=torch.Generator().manual_seed(3))
WEIGHTS = torch.randn(2, CHUNKS * FRAMES, *SHAPE, generator=torch.Generator().manual_seed(2))


class Exits(StudentRollout):
    """Exits that are given."""

    exits: tuple[int, ...] = ()

    def exit_step(self, state: RolloutState, first_chunk: int) -> int:
        return self.exits[state.next_chunk] if self.exits else super().exit_step(state, first_chunk)


def learning(network: CausalWan, checkpointed: bool = False) -> CausalWan:
    made = copy.deepcopy(network).requires_grad_(True)
    if checkpointed:
        for block in made.blocks:
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    return made


def started(rollout: StudentRollout, **changes: Any) -> RolloutState:
    names = {"seed": 5, "sample_ids": IDS, "max_chunks": CHUNKS, "step": 4, "purpose": "student_rollout"}
    return rollout.start(SHAPE, **(names | changes))


def clip_of(
    network: CausalWan, settings: RolloutSettings = SETTINGS, exits: tuple[int, ...] = (), given: Tensor | None = None
) -> Clip:
    rollout = Exits(RolloutEngine(network, settings, FlowSchedule()), exit_per="chunk")
    rollout.exits = exits
    return rollout.clip(started(rollout), PROMPTS, PROMPT_INDEX, SHOTS, given)


def gradients(network: CausalWan) -> dict[str, Tensor]:
    return {name: parameter.grad for name, parameter in network.named_parameters() if parameter.grad is not None}


class WithoutCache:
    """Attention over the clean chunks and one noisy one, all in one sequence; what was written without gradient, keys
    and values of the clean ones, is cut off here."""

    def __init__(self, chunk: int, shots: list[int], rule: VisibilityRule, tokens: int) -> None:
        segments = [*(Segment(Role.CLEAN, c, tokens) for c in range(chunk)), Segment(Role.NOISY, chunk, tokens)]
        self.history = chunk * tokens
        self.mask = token_mask(segments, shots, rule)[None, None]

    def __call__(self, query: Heads, key: Heads, value: Heads, rotation: Rotation, layer: int) -> Heads:
        key, value = (
            torch.cat([x[:, : self.history].detach(), x[:, self.history :]], dim=1)
            for x in (rotation.rotate(key), value)
        )
        return dense_attention(rotation.rotate(query), key, value, self.mask)


def reference(
    network: CausalWan, settings: RolloutSettings, exits: tuple[int, ...], sample: int, given: Tensor | None
) -> Tensor:
    """One sample, every call recomputing all that came before."""
    shots = SHOTS[sample].tolist()
    tokens = FRAMES * network.config.tokens_per_frame(*SHAPE[1:])
    video = torch.empty(1, 0, *SHAPE)
    for chunk in range(CHUNKS):
        held = 0 if given is None or chunk else given.shape[1]
        x = rng.normal((FRAMES, *SHAPE), 5, "student_rollout", step=4, sample=IDS[sample], chunk=chunk)[None]
        positions = torch.tensor([[c * FRAMES + f + 4.0 * shots[c] for c in range(chunk + 1) for f in range(FRAMES)]])
        solver = make_solver(settings.solver, settings.num_steps, FlowSchedule())
        for index, (timestep, sigma) in enumerate(solver):
            if held:
                x = torch.cat([given[sample : sample + 1], x[:, held:]], dim=1)
            timesteps = torch.full((1, (chunk + 1) * FRAMES), timestep)
            timesteps[:, : chunk * FRAMES + held] = 0
            with torch.set_grad_enabled(index == exits[chunk]):
                velocity = network(
                    torch.cat([video.detach(), x], dim=1),
                    timesteps,
                    PROMPTS,
                    PROMPT_INDEX[sample : sample + 1, : chunk + 1],
                    positions,
                    WithoutCache(chunk, shots, settings.rule, tokens),
                )[:, -FRAMES:]
            if index == exits[chunk]:
                x = x - sigma * velocity
                break
            x = solver.step(velocity, x)
        if held:
            x = torch.cat([given[sample : sample + 1], x[:, held:]], dim=1)
        video = torch.cat([video, x], dim=1)
    return video


@pytest.mark.parametrize("checkpointed", [False, True], ids=["kept", "checkpointed"])
@pytest.mark.parametrize(
    ("changes", "exits", "given"),
    [
        ({}, (2, 0, 1, 2, 1), None),
        ({"window": None, "shot_sink": False}, (1, 1, 1, 1, 1), None),
        ({"sink_frames": 2, "solver": "euler"}, (0, 2, 2, 1, 0), GIVEN),
    ],
    ids=["window", "everything", "sinks and a given frame"],
)
def test_gradients_are_those_of_plain_autograd_without_a_cache(
    network: CausalWan, changes: dict[str, Any], exits: tuple[int, ...], given: Tensor | None, checkpointed: bool
) -> None:
    """Catches samples' cuts that get mixed up, a gradient through the context pass or through an earlier step, and a
    backward that reads what the ring holds by then (known mistakes 9 and 11)."""
    settings = replace(SETTINGS, **changes)
    ours, plain = learning(network, checkpointed), learning(network)
    clip = clip_of(ours, settings, exits, given)
    assert (clip.exit_steps, clip.first_chunk) == (exits, 0)
    expected = torch.cat([reference(plain, settings, exits, sample, given) for sample in range(2)])
    torch.testing.assert_close(clip.latents, expected, atol=2e-5, rtol=1e-5)
    (clip.latents * WEIGHTS).sum().backward()
    (expected * WEIGHTS).sum().backward()
    found, wanted = gradients(ours), gradients(plain)
    assert found.keys() == wanted.keys() == dict(network.named_parameters()).keys()
    scale = max(float(gradient.abs().max()) for gradient in wanted.values())
    for name, gradient in wanted.items():
        assert (found[name] - gradient).abs().max() <= 1e-5 * scale, name


@pytest.mark.parametrize("cache_dtype", [None, "nvfp4"])
@pytest.mark.parametrize("relative", [False, True])
def test_checkpointing_changes_no_gradient(network_for_blocks: CausalWan, relative: bool, cache_dtype: Any) -> None:
    """Bit for bit, whatever the cache stores: what is computed again is what was computed."""
    settings = replace(SETTINGS, relative_rope=relative, cache_dtype=cache_dtype)
    results = []
    for checkpointed in (False, True):
        student = learning(network_for_blocks, checkpointed)
        clip = clip_of(student, settings, exits=(2, 0, 1, 2, 1))
        (clip.latents * WEIGHTS).sum().backward()
        results.append((clip.latents.detach(), gradients(student)))
    (latents, kept), (latents_again, recomputed) = results
    assert torch.equal(latents, latents_again)
    assert all(torch.equal(recomputed[name], gradient) for name, gradient in kept.items())


def test_a_cache_that_does_not_retain_refuses_to_be_read_again(network: CausalWan) -> None:
    """The ring of generation, used for training by mistake."""
    student = learning(network, checkpointed=True)
    rollout = StudentRollout(RolloutEngine(student, SETTINGS, FlowSchedule()))
    rollout.start = partial(RolloutEngine.start, rollout.engine)  # type: ignore[method-assign]
    state = rollout.engine.start(SHAPE, 5, IDS, CHUNKS)
    clip = rollout.clip(state, PROMPTS, PROMPT_INDEX, SHOTS)
    with pytest.raises(RuntimeError, match="start the rollout with retain=True"):
        clip.latents.sum().backward()


def test_exiting_at_the_last_step_is_generation(network: CausalWan) -> None:
    """The student trains on what it will generate. UniPC's first sigma is a millionth lower there."""
    clip = clip_of(network, exits=(2,) * CHUNKS)
    engine = RolloutEngine(network, SETTINGS, FlowSchedule())
    state = engine.start(SHAPE, 5, IDS, CHUNKS, step=4, purpose="student_rollout")
    generated = []
    for chunk in range(CHUNKS):
        condition = engine.open_chunk(state, PROMPTS, PROMPT_INDEX[:, chunk], SHOTS[:, chunk].tolist())
        generated.append(engine._finish(state, condition, write=True))
    torch.testing.assert_close(clip.latents, torch.cat(generated, dim=1), atol=5e-5, rtol=1e-5)
    early = clip_of(network, exits=(2, 1, 2, 2, 2))
    assert torch.equal(early.latents[:, :FRAMES], clip.latents[:, :FRAMES])
    assert (early.latents - clip.latents)[:, FRAMES:].abs().amax((2, 3, 4)).min() > 1e-3


def test_one_call_of_each_chunk_carries_gradients(network: CausalWan) -> None:
    """And none does under `no_grad`, as the critic's rollouts run."""
    student, calls = learning(network), []
    student.register_forward_hook(lambda module, args, output: calls.append(output.requires_grad))
    clip_of(student, exits=(2, 0, 1, 2, 0))
    expected = []
    for steps_before in (2, 0, 1, 2, 0):
        expected += [*[False] * steps_before, True, False]
    assert calls == expected
    calls.clear()
    with torch.no_grad():
        clip = clip_of(student, exits=(1, 1, 1, 1, 1))
    assert calls == [False] * 15
    assert not clip.latents.requires_grad


def test_gradients_stay_in_the_chunk_that_they_come_from(network: CausalWan) -> None:
    """A loss on the last chunk reaches the network through the last chunk's call alone."""
    results = []
    for others in (1.0, 0.0):
        student = learning(network)
        latents = clip_of(student, exits=(1,) * CHUNKS).latents
        last = torch.arange(CHUNKS * FRAMES) >= (CHUNKS - 1) * FRAMES
        weights = torch.where(last, 1.0, 0.0)[:, None, None, None]
        (latents * weights + others * (latents * (1 - weights)).detach()).sum().backward()
        results.append(gradients(student))
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])
    assert max(gradient.abs().max() for gradient in results[0].values()) > 1e-3


def exits_of(exit_per: str, network: CausalWan, **changes: Any) -> tuple[int, ...]:
    rollout = StudentRollout(RolloutEngine(network, replace(SETTINGS, num_steps=4), FlowSchedule()), exit_per)
    state = started(rollout, **changes)
    found = []
    for chunk in range(CHUNKS):
        state.next_chunk = chunk
        found.append(rollout.exit_step(state, 0))
    return tuple(found)


def test_exit_steps_depend_on_step_and_chunk_and_on_no_sample(network: CausalWan) -> None:
    """Ranks have other samples, and exit alike; a resumed run exits where the first one did."""
    per_rollout = [exits_of("rollout", network, step=step) for step in range(80)]
    per_chunk = [exits_of("chunk", network, step=step) for step in range(80)]
    assert all(len(set(exits)) == 1 for exits in per_rollout)
    assert sum(len(set(exits)) > 1 for exits in per_chunk) > 70
    for drawn in (per_rollout, per_chunk):
        counts = Counter(exits[2] for exits in drawn)
        assert counts.keys() == {0, 1, 2, 3}
        assert min(counts.values()) >= 8
    for exit_per in ("rollout", "chunk"):
        exits = exits_of(exit_per, network)
        torch.manual_seed(1)
        assert exits_of(exit_per, network, sample_ids=[99, 98]) == exits
        others = [exits_of(exit_per, network, **{name: value}) for name, value in
                  (("seed", 6), ("seed", 7), ("purpose", "critic_rollout"), ("purpose", "x"))]  # fmt: skip
        assert any(other != exits for other in others)


def test_a_clip_draws_its_exit_by_where_it_begins(network: CausalWan) -> None:
    """Clips of one streamed rollout would all exit alike otherwise."""
    rollout = StudentRollout(RolloutEngine(network, replace(SETTINGS, num_steps=2), FlowSchedule()))
    state, found = started(rollout, max_chunks=24), []
    for first in range(0, 24, 2):
        for state.next_chunk in (first, first + 1):
            found.append(rollout.exit_step(state, first))
    assert found[::2] == found[1::2]
    assert set(found) == {0, 1}


def test_noise_is_of_the_step_and_of_the_purpose(network: CausalWan) -> None:
    rollout = StudentRollout(RolloutEngine(network, SETTINGS, FlowSchedule()))
    noise = [
        rollout.engine.noise(started(rollout, **changes))
        for changes in ({}, {"step": 5}, {"purpose": "critic_rollout"}, {"seed": 6}, {"sample_ids": [8, 3]})
    ]
    for index, other in enumerate(noise[1:]):
        assert (other[0] != noise[0][0]).all()
        assert (other[1] == noise[0][1]).all() if index == 3 else (other[1] != noise[0][1]).all()


def test_a_rollout_goes_on_clip_after_clip_in_bounded_memory(network: CausalWan) -> None:
    """Streaming: two clips are one of both lengths, gradients end at the border, and what nobody sees any more goes."""
    student = learning(network, checkpointed=True)
    rollout = StudentRollout(RolloutEngine(student, SETTINGS, FlowSchedule()), "chunk")
    whole = rollout.clip(started(rollout), PROMPTS, PROMPT_INDEX, SHOTS).latents.detach()
    state = started(rollout)
    clips, border = [], 0
    for length in (2, 2, 1):
        part = slice(border, border + length)
        clip = rollout.clip(state, PROMPTS, PROMPT_INDEX[:, part], SHOTS[:, part])
        assert clip.first_chunk == border
        clip.latents.sum().backward()
        clips.append(clip.latents.detach())
        border += length
    assert torch.equal(torch.cat(clips, dim=1), whole)

    state = started(rollout, max_chunks=40)
    held, alive = [], []
    for _ in range(20):
        clip = rollout.clip(state, PROMPTS, torch.zeros(2, 1, dtype=torch.int64), torch.zeros(2, 1, dtype=torch.int64))
        alive.append(weakref.ref(next(reversed(state.cache.layers[0]._chunks[0]))))
        clip.latents.sum().backward()
        held.append(state.cache.num_bytes)
    del clip
    gc.collect()
    assert held[3:] == [held[3]] * 17
    assert sum(reference() is not None for reference in alive) <= 3


def test_the_last_chunk_of_all_needs_no_context_pass(network: CausalWan) -> None:
    calls: list[Tensor] = []
    student = copy.deepcopy(network)
    student.register_forward_hook(lambda module, args, output: calls.append(output))
    rollout = StudentRollout(RolloutEngine(student, replace(SETTINGS, num_steps=1), FlowSchedule()))
    going_on = rollout.clip(started(rollout), PROMPTS, PROMPT_INDEX, SHOTS)
    assert len(calls) == 2 * CHUNKS
    calls.clear()
    final = rollout.clip(started(rollout), PROMPTS, PROMPT_INDEX, SHOTS, final=True)
    assert len(calls) == 2 * CHUNKS - 1
    assert torch.equal(final.latents, going_on.latents)


def test_what_a_student_cannot_roll_out_is_refused(network: CausalWan) -> None:
    with pytest.raises(ValueError, match="set guidance_scale=1"):
        StudentRollout(RolloutEngine(network, replace(SETTINGS, guidance_scale=3.0), FlowSchedule()))
    engine = RolloutEngine(network, SETTINGS, FlowSchedule())
    with pytest.raises(ValueError, match="exit_per='step' is unknown"):
        StudentRollout(engine, "step")
    rollout = StudentRollout(engine)
    state = started(rollout)
    with pytest.raises(ValueError, match="are no first frames of videos"):
        rollout.clip(state, PROMPTS, PROMPT_INDEX[:, :1], SHOTS[:, :1], GIVEN.repeat(1, 3, 1, 1, 1))
