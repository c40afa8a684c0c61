"""Teacher forcing from batch to gradient: equal to one forward per chunk, and every knob moves what it names."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from torch.utils.data import DataLoader

from longlive.data.batch import VideoBatch
from longlive.models.attention import MaskedAttention
from longlive.models.visibility import Role, Segment, VisibilityRule, visible_history
from longlive.modules.teacher_forcing import TeacherForcingModule
from longlive.objectives.teacher_forcing import TeacherForcingInputs
from longlive.typing import Float, Int, Latents, PerFrame, PromptEmbeds, Tensor

PROMPTS = (("a red circle", "a blue square", "a green cross"), ("a red circle", "a red circle", "a cyan square"))
SHOTS = torch.tensor([[0, 1, 1], [0, 0, 0]])
TOKENS_PER_CHUNK = 2 * 4


@pytest.fixture
def batch(batch: VideoBatch) -> VideoBatch:
    """Every chunk with a prompt of its own, two samples with different cuts."""
    return replace(batch, prompts=PROMPTS, shot_index=SHOTS, sample_ids=torch.tensor([41, 7]))


@torch.no_grad()
def velocity(module: TeacherForcingModule, batch: VideoBatch) -> Latents:
    """What the module predicts for the noisy copy at step 0."""
    inputs = module.make_inputs(module.encode(batch), batch, 0)
    return module.predict(inputs, batch, *module.embed(batch.prompts))


def loss_of(module: TeacherForcingModule, batch: VideoBatch) -> Tensor:
    return module.training_step(batch, 0)["loss"]


def test_the_loss_is_finite_and_reaches_every_parameter(
    make_module: Callable[..., TeacherForcingModule], batch: VideoBatch
) -> None:
    """Catches a part of the network that is bypassed, detached or forgotten."""
    module = make_module()
    loss = loss_of(module, batch)
    loss.backward()
    assert loss.isfinite()
    assert float(loss.detach()) > 0.1
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize(
    ("changes", "rule"),
    [
        ({}, VisibilityRule()),
        ({"shot_rope_offset": 8.0, "noise_augmentation": 0.4}, VisibilityRule()),
        ({"window": 4}, VisibilityRule(window_chunks=2)),
        ({"window": 4, "sink_frames": 2}, VisibilityRule(window_chunks=2, sink_chunks=1)),
        # Here the two samples see different chunks: 2 sees 1, which opens its shot, and in the other sample 0.
        ({"window": 4, "shot_sink": True}, VisibilityRule(window_chunks=2, shot_sink=True)),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_the_velocity_of_a_chunk_is_one_forward_of_its_history_and_itself(
    make_module: Callable[..., TeacherForcingModule],
    batch: VideoBatch,
    changes: dict[str, Any],
    rule: VisibilityRule,
) -> None:
    """As a rollout computes it. Catches copies, prompts, positions, timesteps or shots that get mixed up on the way."""
    module = make_module(**changes)
    inputs = module.make_inputs(module.encode(batch), batch, 0)
    predicted = velocity(module, batch)
    clean, noisy = inputs.latents.split([4, 6], dim=1)
    offset = changes.get("shot_rope_offset", 0.0)
    for sample in range(2):
        for chunk in range(3):
            frames = slice(2 * chunk, 2 * chunk + 2)
            past = slice(0, 2 * chunk)
            segments = [
                *(Segment(Role.CLEAN, earlier, TOKENS_PER_CHUNK) for earlier in range(chunk)),
                Segment(Role.NOISY, chunk, TOKENS_PER_CHUNK),
            ]
            with torch.no_grad():
                alone = module.trained_network(
                    latents=torch.cat([clean[sample, past], noisy[sample, frames]])[None],
                    timesteps=torch.cat([torch.zeros(2 * chunk), inputs.target_timesteps[sample, frames]])[None],
                    prompt_embeds=module.text_encoder.encode(PROMPTS[sample][: chunk + 1]),
                    prompt_index=torch.arange(chunk + 1)[None],
                    frame_positions=torch.tensor(
                        [[f + offset * int(SHOTS[sample, f // 2]) for f in range(2 * chunk + 2)]]
                    ),
                    attention=MaskedAttention(segments, SHOTS[sample : sample + 1], rule),
                )
            torch.testing.assert_close(predicted[sample, frames], alone[0, past.stop :], atol=2e-5, rtol=1e-4)


def test_a_window_changes_what_the_last_chunk_sees(
    make_module: Callable[..., TeacherForcingModule], batch: VideoBatch
) -> None:
    """So that the test before compares different things."""
    assert visible_history(2, [0, 1, 1], VisibilityRule(window_chunks=2)) == [1]
    everything, windowed = velocity(make_module(), batch), velocity(make_module(window=4), batch)
    difference = (everything - windowed).abs().amax((0, 2, 3, 4))
    assert difference[:4].max() < 1e-5
    assert difference[4:].min() > 1e-3


def test_a_prompt_acts_on_its_own_chunk_and_later_ones_alone(
    make_module: Callable[..., TeacherForcingModule], batch: VideoBatch
) -> None:
    module = make_module()
    before = velocity(module, batch)
    for chunk in range(3):
        row = list(PROMPTS[0])
        row[chunk] = "a purple triangle"
        change = (velocity(module, replace(batch, prompts=(tuple(row), PROMPTS[1]))) - before).abs().amax((2, 3, 4))
        assert change[0, : 2 * chunk].sum() == 0
        assert change[0, 2 * chunk : 2 * chunk + 2].min() > 1e-3
        assert change[1].sum() == 0


def test_a_sample_does_not_depend_on_its_batch(
    make_module: Callable[..., TeacherForcingModule], batch: VideoBatch
) -> None:
    """Known mistake 9: one sample's cuts, prompts or noise used for all."""
    module = make_module(shot_rope_offset=8.0, window=4, shot_sink=True, noise_augmentation=0.3)
    together = velocity(module, batch)
    assert batch.latents is not None
    for row in range(2):
        alone = replace(
            batch,
            latents=batch.latents[row : row + 1],
            prompts=PROMPTS[row : row + 1],
            shot_index=SHOTS[row : row + 1],
            num_valid_frames=batch.num_valid_frames[row : row + 1],
            sample_ids=batch.sample_ids[row : row + 1],
        )
        torch.testing.assert_close(velocity(module, alone)[0], together[row], atol=1e-5, rtol=1e-4)


class Differentiable(TeacherForcingModule):
    """Lets gradients reach the data, to see which of it the loss depends on."""

    def encode(self, batch: VideoBatch) -> Latents:
        assert batch.latents is not None
        return batch.latents


def test_padded_chunks_carry_no_loss_and_change_no_other(
    make_module: Callable[..., TeacherForcingModule], batch: VideoBatch
) -> None:
    """The first clip ends after 4 of 6 frames."""
    module = make_module(Differentiable)
    assert batch.latents is not None
    latents = batch.latents.clone().requires_grad_()
    padded = replace(batch, latents=latents, num_valid_frames=torch.tensor([4, 6]))
    result = module.training_step(padded, 0)
    (gradient,) = torch.autograd.grad(result["loss"], latents)
    reached = gradient.abs().amax((2, 3, 4)) > 0
    assert reached.int().tolist() == [[1, 1, 1, 1, 0, 0], [1] * 6]
    assert torch.equal(result["scored"], reached)

    other = latents.detach().clone()
    other[0, 4:] = 100
    changed = replace(padded, latents=other)
    assert torch.equal(loss_of(module, changed), result["loss"])
    longer = replace(changed, num_valid_frames=torch.tensor([5, 6]))
    assert not torch.equal(loss_of(module, longer), result["loss"])

    losses, weights = result["frame_errors"], module.make_inputs(other, padded, 0).loss_weights
    counted = torch.cat([(losses * weights)[0, :4], (losses * weights)[1]])
    torch.testing.assert_close(result["loss"].detach(), counted.sum() / 10)


def test_a_step_returns_what_its_loss_is_made_of(
    make_module: Callable[..., TeacherForcingModule], batch: VideoBatch
) -> None:
    """A callback breaks it down by timestep and by place; shifted by a frame, those numbers would still look fine."""
    module = make_module()
    phases: list[str] = []
    module.on_phase = phases.append
    result = module.training_step(batch, 0)
    inputs = module.make_inputs(module.encode(batch), batch, 0)
    expected = (velocity(module, batch) - inputs.target).square().flatten(2).mean(2)
    torch.testing.assert_close(result["frame_errors"], expected, atol=1e-5, rtol=1e-5)
    assert not result["frame_errors"].requires_grad
    assert torch.equal(result["timesteps"], inputs.timesteps[:, 4:])
    assert result["scored"].all()
    assert phases == ["encode", "forward"]


class Recorder(TeacherForcingModule):
    """Keeps the prompts of every forward; a forward costs nothing. `step_now` stands for the Trainer's."""

    step_now = 0

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.seen: list[Sequence[Sequence[str]]] = []

    @property
    def global_step(self) -> int:
        return self.step_now

    def embed(
        self, prompts: Sequence[Sequence[str]], known: Mapping[str, Tensor] | None = None
    ) -> tuple[PromptEmbeds, Int[Tensor, "b p"]]:
        self.seen.append([list(row) for row in prompts])
        return super().embed(prompts, known)

    def predict(
        self, inputs: TeacherForcingInputs, batch: VideoBatch, prompt_embeds: Tensor, prompt_index: Tensor
    ) -> Latents:
        return torch.zeros_like(inputs.target)


def many(sample_ids: Sequence[int]) -> VideoBatch:
    """Clips of two chunks, as small as they get, with a prompt that names their id."""
    count = len(sample_ids)
    return VideoBatch(
        latents=torch.zeros(count, 4, 16, 2, 2),
        prompts=tuple((f"first {sample}", f"second {sample}") for sample in sample_ids),
        shot_index=torch.zeros(count, 2, dtype=torch.int64),
        num_valid_frames=torch.full((count,), 4),
        sample_ids=torch.tensor(sample_ids),
    )


def dropped(module: Recorder, sample_ids: Sequence[int], step: int = 0) -> list[int]:
    """Ids of the samples whose prompts were replaced by the empty one."""
    module.step_now = step
    batch = many(sample_ids)
    module.training_step(batch, 0)
    empty = []
    for sample, before, after in zip(sample_ids, batch.prompts, module.seen[-1], strict=True):
        assert list(after) in ([*before], ["", ""]), "all prompts of a sample, or none"
        if list(after) == ["", ""]:
            empty.append(sample)
    return empty


def test_prompts_are_dropped_at_their_rate_and_by_name(settings: dict[str, Any]) -> None:
    """A function of (seed, step, sample id): neither the batch nor the global generator has a say."""
    module = Recorder(**settings, prompt_dropout=0.25)
    first = dropped(module, range(600))
    assert abs(len(first) - 150) < 4 * (600 * 0.25 * 0.75) ** 0.5
    torch.manual_seed(99)
    assert dropped(module, list(range(300, 600))[::-1]) == [sample for sample in first if sample >= 300][::-1]
    later = dropped(module, range(600), step=1)
    assert abs(len(set(later) & set(first)) - 600 / 16) < 4 * (600 / 16) ** 0.5, "independent of the step before"
    other_seed = Recorder(**(settings | {"seed": 4}), prompt_dropout=0.25)
    assert dropped(other_seed, range(600)) != first
    assert not dropped(Recorder(**settings), range(600))


def test_validation_drops_no_prompt(settings: dict[str, Any], make_trainer: Callable[..., Trainer]) -> None:
    module = Recorder(**settings, prompt_dropout=0.9)
    make_trainer().validate(module, DataLoader([many(range(20))], batch_size=None), verbose=False)
    assert module.seen == [[[f"first {sample}", f"second {sample}"] for sample in range(20)]]


def test_training_draws_anew_at_every_step(settings: dict[str, Any]) -> None:
    """Drawn by sample id alone, a clip would be seen at the same noise in every epoch."""
    module = Recorder(**settings)
    timesteps = []
    for step in range(3):
        module.step_now = step
        timesteps.append(module.training_step(many(range(10)), 0)["timesteps"])
    assert (timesteps[0] != timesteps[1]).float().mean() > 0.9
    assert (timesteps[1] != timesteps[2]).float().mean() > 0.9


def test_the_validation_loss_repeats_exactly(
    settings: dict[str, Any], batch: VideoBatch, make_trainer: Callable[..., Trainer]
) -> None:
    """Noise drawn anew each time would hide the small differences between checkpoints."""
    module = TeacherForcingModule(**settings, prompt_dropout=0.5, noise_augmentation=0.3)
    loader = DataLoader([batch], batch_size=None)
    losses = []
    for seed in range(2):
        torch.manual_seed(seed)
        (metrics,) = make_trainer().validate(module, loader, verbose=False)
        losses.append(metrics["validation/loss"])
    trainer = make_trainer(max_steps=3)
    trainer.fit(module, DataLoader([batch] * 3, batch_size=None))
    module.trained_network.init_weights(module.seed)
    trainer.validate(module, loader, verbose=False)
    losses.append(float(trainer.callback_metrics["validation/loss"]))
    assert losses[0] == losses[1] == losses[2]


def test_positions_count_frames_and_skip_at_a_cut(
    make_module: Callable[..., TeacherForcingModule], batch: VideoBatch
) -> None:
    module = make_module(shot_rope_offset=8.0)
    assert module.pieces(batch).clip_positions().tolist() == [[0, 1, 10, 11, 12, 13], [0, 1, 2, 3, 4, 5]]
    assert make_module().pieces(batch).clip_positions().tolist() == [[0, 1, 2, 3, 4, 5]] * 2
    difference = (velocity(module, batch) - velocity(make_module(), batch)).abs().amax((2, 3, 4))
    assert difference[0, :2].max() < 1e-5
    assert difference[0, 2:].min() > 1e-3
    assert difference[1].max() < 1e-5


def test_positions_are_exact_whatever_torchs_default_dtype_is(
    make_module: Callable[..., TeacherForcingModule], batch: VideoBatch
) -> None:
    """bfloat16, the default during a step in true half precision, cannot tell frame 257 from frame 258."""
    module = make_module(shot_rope_offset=8.0)
    torch.set_default_dtype(torch.bfloat16)
    try:
        positions = module.pieces(replace(batch, shot_index=torch.zeros(2, 150, dtype=torch.int64))).clip_positions()
    finally:
        torch.set_default_dtype(torch.float32)
    assert positions[0].tolist() == list(range(300))


def test_given_frames_carry_no_loss(make_module: Callable[..., TeacherForcingModule], batch: VideoBatch) -> None:
    """Image to video: in rollout the first frame is given, so its velocity is never asked for."""
    result = make_module(given_frames=1).training_step(batch, 0)
    assert result["scored"].int().tolist() == [[0, 1, 1, 1, 1, 1]] * 2
    assert (result["timesteps"][:, 0] == 0).all()
    assert (result["timesteps"][:, 1] > 0).all()


def test_a_prompt_that_is_missing_is_refused(
    make_module: Callable[..., TeacherForcingModule], batch: VideoBatch
) -> None:
    with pytest.raises(ValueError, match="sample 7 has 2 prompts for 3 chunks"):
        make_module().training_step(replace(batch, prompts=(PROMPTS[0], PROMPTS[1][:2])), 0)


class AbsoluteError(TeacherForcingModule):
    """The README's example: another loss is one method."""

    def frame_losses(self, prediction: Latents, inputs: TeacherForcingInputs) -> PerFrame:
        return (prediction - inputs.target).abs().mean(dim=(2, 3, 4))


class Losses(Callback):
    """What a Trainer hands over after every step."""

    def __init__(self) -> None:
        self.losses: list[float] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.losses.append(float(outputs["loss"].detach()))


def test_a_subclass_with_another_loss_trains(
    settings: dict[str, Any], batch: VideoBatch, make_trainer: Callable[..., Trainer]
) -> None:
    """By Lightning's own Trainer. At first the network answers zero, so the loss is the size of the target."""
    module = AbsoluteError(**settings)
    batch = replace(batch, num_valid_frames=torch.tensor([6, 3]))
    losses = Losses()
    make_trainer(max_steps=2, callbacks=[losses]).fit(module, DataLoader([batch] * 2, batch_size=None))
    inputs = module.make_inputs(module.encode(batch), batch, 0)
    sizes = inputs.loss_weights * inputs.target.abs().flatten(2).mean(2)
    expected = (sizes[0].sum() + sizes[1, :3].sum()) / 9
    assert losses.losses[0] == pytest.approx(float(expected), rel=1e-5)
    assert len(losses.losses) == 2
    start = TeacherForcingModule(**settings)
    start.configure_model()
    assert not torch.equal(module.trained_network.head.head.weight, start.trained_network.head.head.weight)


def test_a_few_steps_on_one_batch_lower_the_loss(
    settings: dict[str, Any], make_module: Callable[..., TeacherForcingModule], batch: VideoBatch
) -> None:
    """The gradient points downhill: catches a target, or a sign, that differs from what the loss is measured on."""
    module = make_module()
    optimizer = torch.optim.AdamW(module.parameters(), lr=3e-3)
    losses = []
    for _ in range(12):
        loss = loss_of(module, batch)
        losses.append(float(loss.detach()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.8 * losses[0]


def test_accumulated_batches_of_one_equal_the_batch_of_two(
    make_module: Callable[..., TeacherForcingModule], batch: VideoBatch
) -> None:
    """Gradients, with equal numbers of valid frames: nothing leaks from one sample into the other's."""
    module = make_module(prompt_dropout=0.5)
    parameters = list(module.parameters())
    together = torch.autograd.grad(loss_of(module, batch), parameters)
    assert batch.latents is not None
    halves = []
    for row in range(2):
        one = VideoBatch(
            latents=batch.latents[row : row + 1],
            prompts=PROMPTS[row : row + 1],
            shot_index=SHOTS[row : row + 1],
            num_valid_frames=torch.tensor([6]),
            sample_ids=batch.sample_ids[row : row + 1],
        )
        halves.append(torch.autograd.grad(loss_of(module, one), parameters))
    for whole, first, second in zip(together, *halves, strict=True):
        torch.testing.assert_close((first + second) / 2, whole, atol=1e-5, rtol=1e-3)


def test_frames_that_no_chunk_tiles_are_refused(
    make_module: Callable[..., TeacherForcingModule], batch: VideoBatch
) -> None:
    latents: Float[Tensor, "b f c h w"] = torch.zeros(2, 5, 16, 4, 4)
    with pytest.raises(ValueError, match="the batch holds 5 frames; its 3 chunks of 2 are 6"):
        make_module().training_step(replace(batch, latents=latents), 0)
