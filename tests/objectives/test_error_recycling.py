"""Error recycling against its formulas in float64, and its decisions against their rates and names."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from longlive import rng
from longlive.diffusion.schedule import FlowSchedule
from longlive.objectives.error_buffer import LATENT, NOISE
from longlive.objectives.error_recycling import ErrorRecycling, Step, prediction_errors
from longlive.objectives.teacher_forcing import Draws, InjectedErrors, TeacherForcingInputs, draw, make_inputs
from longlive.typing import Tensor

SCHEDULE = FlowSchedule(num_steps=100, shift=3.0)
SIGMAS = [3 * u / (1 + 2 * u) for u in (1 - i / 100 for i in range(100))]
CHUNK, NUM_CHUNKS, BUCKETS = 2, 4, 10
FRAME = (3, 4, 5)
SHAPE = (2, CHUNK * NUM_CHUNKS, *FRAME)
CHUNKS = range(NUM_CHUNKS)
STEP = Step(seed=5, step=9, sample_ids=(70, 3), num_chunks=NUM_CHUNKS, chunk_frames=CHUNK, grid_size=100)
ALWAYS: dict[str, Any] = {
    "clean_probability": 0, "history_probability": 1, "latent_probability": 1, "noise_probability": 1,
}  # fmt: skip


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def recycling(**changes: Any) -> ErrorRecycling:
    return ErrorRecycling(**{"budget_mib": 1, "num_buckets": BUCKETS} | changes)


def draws_of(step: Step) -> Draws:
    return draw(
        FRAME, CHUNK, SCHEDULE, seed=step.seed, step=step.step, sample_ids=step.sample_ids, history=CHUNKS,
        targets=CHUNKS,
    )  # fmt: skip


def inputs_of(step: Step, clean: Tensor, errors: InjectedErrors | None = None) -> TeacherForcingInputs:
    is_given = step.is_given(CHUNKS) if step.given_frames else None
    return make_inputs(clean, clean, draws_of(step), SCHEDULE, CHUNK, is_given, errors=errors)


def fill(recycler: ErrorRecycling, per_bucket: int = 1) -> None:
    """The entries of bucket i are i + 1 + j / 100 (latent) and -(i + 1) (noise), everywhere."""
    for bucket in range(BUCKETS):
        for index in range(per_bucket):
            value = torch.tensor([bucket + 1 + index / 100, -(bucket + 1.0)])
            recycler.buffer.append(bucket, value.view(2, 1, 1, 1, 1).expand(2, CHUNK, *FRAME))


def one_step(recycler: ErrorRecycling, step: Step, scored: Tensor | None = None, seed: int = 0) -> Tensor:
    """A batch from its announcement to its record; returns the prediction."""
    clean = randn(len(step.sample_ids), *SHAPE[1:], seed=seed)
    inputs = inputs_of(step, clean)
    prediction = randn(*clean.shape, seed=seed + 1)
    if scored is None:
        scored = torch.ones(clean.shape[:2], dtype=torch.bool)
    recycler.announce(step, list(CHUNKS), inputs, scored)
    recycler.record(step, list(CHUNKS), inputs, prediction)
    return prediction


def entries(recycler: ErrorRecycling) -> list[Tensor]:
    """All entries, bucket by bucket, the oldest first."""
    return [entry for bucket in by_bucket(recycler) for entry in bucket]


def by_bucket(recycler: ErrorRecycling) -> list[list[Tensor]]:
    """The entries of every bucket, the oldest first."""
    recycler.state_dict()  # waits for what is under way
    buffer, found = recycler.buffer, []
    for bucket in range(buffer.num_buckets):
        places = [(bucket, rank) for rank in range(buffer.size(bucket))]
        kinds = [buffer.take(kind, places) for kind in (LATENT, NOISE)] if places else []
        found.append(list(torch.stack(kinds, dim=1)) if places else [])
    return found


def test_the_errors_of_a_prediction_are_those_of_the_latent_and_the_noise_that_it_points_to() -> None:
    """x0_hat - x0 and eps_hat - eps, from where x_t and the prediction lead, in float64."""
    clean, prediction = randn(*SHAPE), randn(*SHAPE, seed=1)
    step = replace(STEP, given_frames=3)
    inputs, draws = inputs_of(step, clean), draws_of(step)
    found = prediction_errors(prediction, inputs).double()
    for sample in range(2):
        for frame in range(SHAPE[1]):
            sigma = SIGMAS[int(draws.grid_index[sample, frame // CHUNK])]
            x0, eps, v = (x[sample, frame].double() for x in (clean, draws.noise, prediction))
            noisy = (1 - sigma) * x0 + sigma * eps
            if frame < 3:
                assert found[:, sample, frame].abs().sum() == 0
                continue
            torch.testing.assert_close(found[LATENT, sample, frame], noisy - sigma * v - x0, atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(found[NOISE, sample, frame], noisy + (1 - sigma) * v - eps, atol=1e-5, rtol=1e-5)


def test_the_latent_error_is_measured_from_the_true_latent_where_errors_were_injected() -> None:
    """Measured from the latent with its error, a network that repairs nothing would look perfect."""
    clean, prediction = randn(*SHAPE), randn(*SHAPE, seed=1)
    injected = InjectedErrors(latents=randn(*SHAPE, seed=2), noise=randn(*SHAPE, seed=3))
    inputs, draws = inputs_of(STEP, clean, injected), draws_of(STEP)
    found = prediction_errors(prediction, inputs).double()
    assert injected.latents is not None
    assert injected.noise is not None
    for frame in range(SHAPE[1]):
        sigma = SIGMAS[int(draws.grid_index[0, frame // CHUNK])]
        x0, eps, v, e_x, e_n = (
            x[0, frame].double() for x in (clean, draws.noise, prediction, injected.latents, injected.noise)
        )
        noisy = (1 - sigma) * (x0 + e_x) + sigma * (eps + e_n)
        torch.testing.assert_close(found[LATENT, 0, frame], noisy - sigma * v - x0, atol=1e-5, rtol=1e-5)
        expected = (1 - sigma) * (v - (eps + e_n - x0))
        torch.testing.assert_close(found[NOISE, 0, frame], expected, atol=1e-5, rtol=1e-5)


def test_injected_errors_change_what_is_seen_and_only_noise_moves_the_target() -> None:
    """The formulas in float64: the target points from the true latent to the noise that was mixed in."""
    clean = randn(*SHAPE)
    history, latents, noise = (randn(*SHAPE, seed=seed) for seed in (1, 2, 3))
    draws, plain = draws_of(STEP), inputs_of(STEP, clean)
    for errors in (
        InjectedErrors(history=history),
        InjectedErrors(latents=latents),
        InjectedErrors(noise=noise),
        InjectedErrors(history, latents, noise),
    ):
        inputs = inputs_of(STEP, clean, errors)
        e_h, e_x, e_n = (
            torch.zeros(SHAPE).double() if e is None else e.double()
            for e in (errors.history, errors.latents, errors.noise)
        )
        sigma = torch.tensor(SIGMAS)[draws.grid_index].repeat_interleave(CHUNK, 1)[:, :, None, None, None].double()
        x0, eps = clean.double(), draws.noise.double()
        expected = torch.cat([x0 + e_h, (1 - sigma) * (x0 + e_x) + sigma * (eps + e_n)], dim=1)
        torch.testing.assert_close(inputs.latents.double(), expected, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(inputs.target.double(), eps + e_n - x0, atol=1e-5, rtol=1e-5)
        assert torch.equal(inputs.timesteps, plain.timesteps)
        assert torch.equal(inputs.loss_weights, plain.loss_weights)
        assert torch.equal(inputs.clean, clean)


def test_errors_come_from_the_bucket_of_their_chunk_and_into_the_history_from_any() -> None:
    """Entries tell their bucket. A wrong one is an error of a wrong size, which trains something else."""
    recycler = recycling(**ALWAYS, scale_spread=0)
    fill(recycler)
    from_any = set()
    for number in range(20):
        step = replace(STEP, step=number)
        draws = draws_of(step)
        errors = recycler.inject(step, randn(*SHAPE), CHUNKS, CHUNKS, draws.grid_index)
        # Bucket i + 1 as the grid's indices i * 10 .. i * 10 + 9 have it.
        expected = (draws.grid_index.double() / 10).floor() + 1
        for found, sign in ((errors.latents, 1), (errors.noise, -1)):
            assert found is not None
            by_chunk = found.unflatten(1, (NUM_CHUNKS, CHUNK)).flatten(2)
            assert torch.equal(by_chunk.double(), sign * expected[:, :, None].expand_as(by_chunk))
        assert errors.history is not None
        history = errors.history.unflatten(1, (NUM_CHUNKS, CHUNK)).flatten(2)
        assert torch.equal(history, history[:, :, :1].expand_as(history)), "one entry for a chunk"
        from_any |= set(history[:, :, 0].flatten().tolist())
    assert from_any == set(range(1, BUCKETS + 1))


def test_all_entries_are_injected_alike_and_scaled_evenly() -> None:
    recycler = recycling(**ALWAYS)
    fill(recycler, per_bucket=3)
    choices = [
        choice
        for number in range(300)
        for choice in recycler.choose(
            replace(STEP, step=number), "latent", CHUNKS, [[number % BUCKETS] * NUM_CHUNKS] * 2
        )
    ]
    assert len(choices) == 300 * 2 * NUM_CHUNKS
    counts = torch.zeros(BUCKETS, 3)
    for choice in choices:
        counts[choice.bucket, choice.age_rank] += 1
    assert (counts - 80).abs().max() < 5 * 80**0.5
    scales = torch.tensor([choice.scale for choice in choices])
    assert 0.7 <= scales.min() < 0.701
    assert 1.299 < scales.max() <= 1.3
    assert abs(float(scales.mean()) - 1) < 5 * 0.6 / 12**0.5 / len(choices) ** 0.5
    errors = recycler.inject(STEP, randn(*SHAPE), CHUNKS, CHUNKS, draws_of(STEP).grid_index)
    assert errors.history is not None
    expected = {
        (c.row, c.column): c.scale * float(torch.tensor(c.bucket + 1 + c.age_rank / 100).bfloat16())
        for c in recycler.choose(STEP, "history", CHUNKS, None)
    }
    assert len(expected) == 2 * NUM_CHUNKS
    for (row, column), value in expected.items():
        assert float(errors.history[row, CHUNK * column].mean()) == pytest.approx(value, rel=1e-5)


def test_a_clip_gets_errors_at_the_rates_of_the_design() -> None:
    recycler, number = recycling(), 800
    fill(recycler)
    step = replace(STEP, sample_ids=tuple(range(number)))
    got = {
        name: {choice.row for choice in recycler.choose(step, name, CHUNKS, buckets)}
        for name, buckets in (("history", None), ("latent", [[0] * 4] * number), ("noise", [[0] * 4] * number))
    }
    clean = {sample for sample in range(number) if recycler.is_clean(step, sample)}
    rates = {
        0.2: clean,
        0.8 * 0.9: got["history"],
        0.8 * 0.9 + 1e-9: got["latent"],
        0.8 * 0.01: got["noise"],
        0.8 * 0.9 * 0.9: got["history"] & got["latent"],
    }
    for rate, samples in rates.items():
        assert abs(len(samples) - number * rate) < 4 * (number * rate * (1 - rate)) ** 0.5, rate
    assert not clean & (got["history"] | got["latent"] | got["noise"])
    recorded = {sample for sample in range(number) if recycler.may_record(step, sample)}
    assert recorded | clean == set(range(number))
    assert abs(len(recorded & clean) - 0.1 * len(clean)) < 4 * (len(clean) * 0.09) ** 0.5


def test_a_decision_is_a_function_of_its_name_alone() -> None:
    """Neither the batch, nor who shares it, nor the global generator has a say."""
    recycler = recycling()
    fill(recycler, per_bucket=4)
    samples = tuple(range(40))
    together = replace(STEP, sample_ids=samples)
    expected = {(c.row, c.column): c for c in recycler.choose(together, "history", CHUNKS, None)}
    assert 60 < len(expected) < 160
    torch.manual_seed(99)
    torch.rand(7)
    found = {
        (sample, 2 + column): choice
        for sample in reversed(samples)
        for column, choice in (
            (c.column, c) for c in recycler.choose(replace(STEP, sample_ids=(sample,)), "history", [2, 3], None)
        )
    }
    assert {key: (c.bucket, c.age_rank, c.scale) for key, c in found.items()} == {
        key: (c.bucket, c.age_rank, c.scale) for key, c in expected.items() if key[1] >= 2
    }
    for other in (replace(together, step=10), replace(together, seed=6)):
        assert {(c.row, c.column) for c in recycler.choose(other, "history", CHUNKS, None)} != set(expected)


def test_given_frames_get_no_error() -> None:
    recycler = recycling(**ALWAYS)
    fill(recycler)
    step = replace(STEP, given_frames=3)
    errors = recycler.inject(step, randn(*SHAPE), CHUNKS, CHUNKS, draws_of(step).grid_index)
    for found in vars(errors).values():
        assert (found.abs().flatten(2).amax(2) > 0).int().tolist() == [[0, 0, 0, 1, 1, 1, 1, 1]] * 2


def test_an_empty_bucket_injects_nothing() -> None:
    recycler = recycling(**ALWAYS)
    errors = recycler.inject(STEP, randn(*SHAPE), CHUNKS, CHUNKS, draws_of(STEP).grid_index)
    assert errors == InjectedErrors()
    index = draws_of(STEP).grid_index
    recycler.buffer.append(int(index[1, 2]) // 10, torch.ones(2, CHUNK, *FRAME))
    errors = recycler.inject(STEP, randn(*SHAPE), CHUNKS, CHUNKS, index)
    assert errors.latents is not None
    got = errors.latents.unflatten(1, (NUM_CHUNKS, CHUNK)).flatten(2).amax(2) > 0
    assert torch.equal(got, index // 10 == index[1, 2] // 10)


def test_recorded_errors_lie_in_the_bucket_of_their_timestep_in_the_order_of_their_names() -> None:
    """The order of the batch is that of the ranks, so it must not matter."""
    recycler = recycling(clean_probability=0)
    prediction = one_step(recycler, STEP)
    recycler.commit()
    step = STEP
    errors = prediction_errors(prediction, inputs_of(step, randn(*SHAPE))).bfloat16()
    expected: list[list[Tensor]] = [[] for _ in range(BUCKETS)]
    for sample in sorted(step.sample_ids):
        row = step.sample_ids.index(sample)
        for chunk in CHUNKS:
            index = rng.integer(100, step.seed, "timestep", step=step.step, sample=sample, chunk=chunk)
            expected[index // 10].append(errors[:, row, CHUNK * chunk : CHUNK * (chunk + 1)])
    found = by_bucket(recycler)
    assert [len(bucket) for bucket in found] == [len(bucket) for bucket in expected]
    for ours, theirs in zip(found, expected, strict=True):
        assert all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=True))


def test_what_is_padded_not_scored_or_given_is_not_recorded() -> None:
    """An error of frames that are not trained says nothing about the network."""
    recycler = recycling(clean_probability=0)
    scored = torch.tensor([[0, 1, 1, 1, 1, 0, 0, 0], [0] * 8], dtype=torch.bool)
    one_step(recycler, replace(STEP, given_frames=1), scored)
    recycler.commit()
    held = entries(recycler)
    assert len(held) == 2
    assert sorted(float(entry[:, 0].abs().sum()) == 0 for entry in held) == [False, True], "a given frame has no error"
    recycler = recycling(clean_probability=0)
    one_step(recycler, replace(STEP, given_frames=CHUNK), torch.tensor([[0, 0, 1, 1, 0, 0, 0, 0], [0] * 8]).bool())
    recycler.commit()
    assert len(entries(recycler)) == 1


def test_the_warm_up_records_all_clips_and_later_steps_one() -> None:
    recycler = recycling(clean_probability=0, warm_up_steps=2)
    step = replace(STEP, sample_ids=tuple(range(6)))
    numbers = []
    for number in range(4):
        before = len(entries(recycler))
        one_step(recycler, replace(step, step=number), seed=number)
        recycler.commit()
        numbers.append(len(entries(recycler)) - before)
    assert numbers == [24, 24, 4, 4]


def test_the_recorded_clip_is_drawn_evenly_and_may_be_clean() -> None:
    """A choice by the order of the batch would record one data rank's clips alone."""
    recycler, number = recycling(warm_up_steps=0), 150
    for index in range(number):
        step = replace(STEP, step=index, sample_ids=(0, 1, 2))
        inputs = inputs_of(step, torch.zeros(3, *SHAPE[1:]))
        recycler.announce(step, list(CHUNKS), inputs, torch.ones(3, SHAPE[1], dtype=torch.bool))
        # Wrong by the number of the clip: E_n - E_x = v_hat - v, whatever sigma is.
        recycler.record(step, list(CHUNKS), inputs, inputs.target + torch.arange(3)[:, None, None, None, None])
        recycler.commit()
    counts = torch.bincount(torch.tensor([int((entry[1] - entry[0]).mean().round()) for entry in entries(recycler)]))
    recorded = 0.8 + 0.2 * 0.1
    expected = number * recorded / 3
    assert abs(int(counts.sum()) / NUM_CHUNKS - number * recorded) < 4 * (number * recorded * (1 - recorded)) ** 0.5
    assert (counts / NUM_CHUNKS - expected).abs().max() < 4 * expected**0.5


@pytest.mark.parametrize("warm_up_steps", [0, 9])
def test_accumulated_batches_are_recorded_as_one(warm_up_steps: int) -> None:
    """Resumed on half the ranks, a run accumulates twice the batches; a clip drawn twice counts once."""
    settings = {"clean_probability": 0, "warm_up_steps": warm_up_steps}
    whole, parts, twice = recycling(**settings), recycling(**settings), recycling(**settings)
    ids = (9, 4, 6, 1)
    for number in range(5):
        step = replace(STEP, step=number, sample_ids=ids)
        clean, prediction = randn(4, *SHAPE[1:], seed=number), randn(4, *SHAPE[1:], seed=number + 1)
        order = {whole: [[0, 1, 2, 3]], parts: [[2], [3, 1], [0]], twice: [[1, 0], [3, 2], [0, 3]]}
        for recycler, batches in order.items():
            for rows in batches:
                part = replace(step, sample_ids=tuple(ids[row] for row in rows))
                inputs = inputs_of(part, clean[rows])
                recycler.announce(part, list(CHUNKS), inputs, torch.ones(len(rows), SHAPE[1], dtype=torch.bool))
                recycler.record(part, list(CHUNKS), inputs, prediction[rows])
            recycler.commit()
    expected = entries(whole)
    assert len(expected) == (5 * 16 if warm_up_steps else 5 * 4)
    for other in (parts, twice):
        found = entries(other)
        assert len(found) == len(expected)
        assert all(torch.equal(one, two) for one, two in zip(found, expected, strict=True))


def test_a_step_that_was_not_committed_is_forgotten() -> None:
    """A run that is killed amid an accumulation repeats the step."""
    recycler = recycling(clean_probability=0)
    one_step(recycler, STEP)
    assert not entries(recycler)
    one_step(recycler, replace(STEP, step=10, sample_ids=(5,)))
    recycler.commit()
    assert len(entries(recycler)) == NUM_CHUNKS


def test_a_loaded_state_goes_on_like_the_saved_one() -> None:
    saved = recycling(warm_up_steps=2)
    for number in range(3):
        one_step(saved, replace(STEP, step=number), seed=number)
        saved.commit()
    loaded = recycling(warm_up_steps=2)
    loaded.load_state_dict(saved.state_dict())
    for number in range(3, 6):
        step = replace(STEP, step=number)
        index = draws_of(step).grid_index
        ours, theirs = (vars(one.inject(step, randn(*SHAPE), CHUNKS, CHUNKS, index)) for one in (saved, loaded))
        for name, error in ours.items():
            assert (error is None and theirs[name] is None) or torch.equal(error, theirs[name])
        for recycler in (saved, loaded):
            one_step(recycler, step, seed=number)
            recycler.commit()
    assert len(entries(loaded)) == len(entries(saved)) > 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"clean_probability": 1.1}, "clean_probability=1.1 must be between 0 and 1"),
        ({"noise_probability": -0.1}, "noise_probability=-0.1 must be between 0 and 1"),
        ({"scale_spread": 2}, "scale_spread=2 must be between 0 and 1"),
        ({"warm_up_steps": -1}, "warm_up_steps=-1 must be at least 0"),
        ({"budget_mib": 0}, "budget_mib=0 must be positive"),
        ({"num_buckets": 0}, "num_buckets=0 must be at least 1"),
    ],
)
def test_a_setting_out_of_range_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        recycling(**settings)


def test_errors_of_clips_of_another_size_are_refused() -> None:
    recycler = recycling(**ALWAYS)
    fill(recycler)
    with pytest.raises(ValueError, match=r"of chunks of \[2, 3, 4, 5\], and the chunks here are \[2, 3, 6, 5\]"):
        recycler.inject(STEP, randn(2, 8, 3, 6, 5), CHUNKS, CHUNKS, draws_of(STEP).grid_index)
