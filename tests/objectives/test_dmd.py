"""Both losses against the formulas in float64, on networks of one layer; where gradients go; draws known by name; and
numbers that are none."""

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

from helpers.wan_float64 import Weights, float64_weights, wan_velocity
from longlive import rng
from longlive.diffusion.schedule import FlowSchedule
from longlive.models.attention import ChunkedAttention
from longlive.models.visibility import VisibilityRule, teacher_forcing_segments
from longlive.models.wan.config import WanConfig
from longlive.models.wan.model import CausalWan
from longlive.objectives.dmd import (
    CountedFrames,
    Noising,
    Score,
    chunk_scale,
    critic_loss,
    draw_noising,
    noised,
    student_loss,
)
from longlive.typing import Tensor

CHUNK, SHAPE = 2, (2, 6, 4, 4, 4)
NUM_CHUNKS = SHAPE[1] // CHUNK
IDS = [70, 3]
SCHEDULE = FlowSchedule()
HEADS = 2
CONFIG = WanConfig.tiny(
    num_layers=1, dim=16, ffn_dim=32, num_heads=HEADS, in_channels=4, out_channels=4, text_dim=8, freq_dim=16
)
ROLES = ("student", "critic", "teacher")


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


PROMPTS = randn(3, 5, 8, seed=9)
"""One for each sample, and the negative one."""


def network(seed: int) -> CausalWan:
    """Random throughout: Wan's zero head would hide every error."""
    made = CausalWan(CONFIG)
    made.init_weights(seed)
    with torch.no_grad():
        for index, (name, parameter) in enumerate(made.named_parameters()):
            if name.endswith(("modulation", "bias")) or name.startswith("head"):
                parameter.add_(0.3 * randn(*parameter.shape, seed=100 * seed + index))
    return made


@dataclass
class Setting:
    """Three roles, and noise that the student makes its latents from in one call."""

    networks: dict[str, CausalWan]
    noise: Tensor

    def score(self, role: str, history: Tensor, negative: bool = False) -> Score:
        """Noisy chunks, each seeing the clean ones before it."""
        prompt_index = torch.full((2, 2 * NUM_CHUNKS), 2) if negative else torch.arange(2)[:, None].repeat(1, 6)
        segments = teacher_forcing_segments(NUM_CHUNKS, CHUNK * 4)
        attention = ChunkedAttention(segments, torch.zeros(2, NUM_CHUNKS, dtype=torch.int64), VisibilityRule())

        def velocity(latents: Tensor, timesteps: Tensor) -> Tensor:
            both = self.networks[role](
                torch.cat([history, latents], dim=1),
                torch.cat([torch.zeros_like(timesteps), timesteps], dim=1),
                PROMPTS,
                prompt_index,
                torch.arange(SHAPE[1]).repeat(2)[None].expand(2, -1),
                attention,
            )
            return both[:, SHAPE[1] :]

        return velocity

    def rollout(self) -> Tensor:
        timesteps = torch.full(SHAPE[:2], 700.0)
        return self.noise - 0.7 * self.score("student", 0.5 * self.noise)(self.noise, timesteps)

    def gradients(self) -> dict[str, set[str]]:
        """The parameters of each role that have one."""
        return {
            role: {name for name, p in made.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
            for role, made in self.networks.items()
        }


@pytest.fixture
def setting() -> Setting:
    return Setting({role: network(seed) for seed, role in enumerate(ROLES, start=1)}, randn(*SHAPE, seed=4))


def noising(role: Any = "student", **changes: Any) -> Noising:
    names = {"seed": 5, "step": 9, "sample_ids": IDS, "chunks": range(NUM_CHUNKS)}
    return draw_noising(SHAPE[2:], CHUNK, SCHEDULE, role, **(names | changes))


def counted(given: int = 0, world_size: int = 1) -> CountedFrames:
    frames = (torch.arange(SHAPE[1]) >= given).expand(SHAPE[:2])
    return CountedFrames(frames, frames.sum().float(), world_size)


# The script: float64, one sample and one chunk after the other.


def script_velocity(
    weights: Weights, history: Tensor, latents: Tensor, timesteps: list[float], prompt: Tensor
) -> Tensor:
    frames = SHAPE[1]
    chunk = torch.arange(frames) // CHUNK
    clean, noisy = torch.zeros(frames, 2 * frames).bool(), torch.zeros(frames, 2 * frames).bool()
    clean[:, :frames] = chunk[None] <= chunk[:, None]
    noisy[:, :frames] = chunk[None] < chunk[:, None]
    noisy[:, frames:] = chunk[None] == chunk[:, None]
    both = wan_velocity(
        weights,
        HEADS,
        torch.cat([history, latents]),
        [0.0] * frames + timesteps,
        [float(f) for f in range(frames)] * 2,
        [prompt] * (2 * frames),
        torch.cat([clean, noisy]),
    )
    return both[frames:]


def script_timestep(role: str, sample: int, chunk: int) -> float:
    u = 1 - rng.integer(1000, 5, f"{role}_timestep", step=9, sample=sample, chunk=chunk) / 1000
    shifted = torch.tensor(1000 * 5 * u / (1 + 4 * u), dtype=torch.float32)  # as the schedule keeps it
    return min(max(shifted.item(), 20.0), 980.0)


def script(setting: Setting, per_chunk: bool, given: int, guidance: float) -> tuple[dict[str, Weights], Tensor, Tensor]:
    """The weights with their gradients, and both losses; the critic's on the same rollout."""
    weights = {role: float64_weights(made) for role, made in setting.networks.items()}
    student, critic = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    elements = 2 * (SHAPE[1] - given) * 4 * 4 * 4
    for row, sample in enumerate(IDS):
        start, prompt, negative = setting.noise[row].double(), PROMPTS[row].double(), PROMPTS[2].double()
        x = start - 0.7 * script_velocity(weights["student"], 0.5 * start, start, [700.0] * SHAPE[1], prompt)
        fixed = x.detach()
        for role in ("student", "critic"):
            timesteps, noises = [], []
            for chunk in range(NUM_CHUNKS):
                t = script_timestep(role, sample, chunk if per_chunk else 0)
                timesteps += [0.0 if f < given else t for f in range(chunk * CHUNK, (chunk + 1) * CHUNK)]
                noises.append(rng.normal((CHUNK, *SHAPE[2:]), 5, f"{role}_noise", step=9, sample=sample, chunk=chunk))
            sigma = torch.tensor(timesteps, dtype=torch.float64)[:, None, None, None] / 1000
            eps = torch.cat(noises).double()
            x_t = (1 - sigma) * fixed + sigma * eps
            if role == "critic":
                v = script_velocity(weights["critic"], fixed, x_t, timesteps, prompt)
                critic = critic + (v - (eps - fixed))[given:].square().sum() / elements
                continue
            with torch.no_grad():
                fake = x_t - sigma * script_velocity(weights["critic"], fixed, x_t, timesteps, prompt)
                cond = x_t - sigma * script_velocity(weights["teacher"], fixed, x_t, timesteps, prompt)
                uncond = x_t - sigma * script_velocity(weights["teacher"], fixed, x_t, timesteps, negative)
                real = cond + guidance * (cond - uncond)
            for chunk in range(NUM_CHUNKS):
                part = slice(max(chunk * CHUNK, given), (chunk + 1) * CHUNK)
                if part.start >= part.stop:
                    continue
                g = (fake[part] - real[part]) / (fixed[part] - real[part]).abs().mean()
                student = student + 0.5 * (x[part] - (fixed[part] - g)).square().sum() / elements
    student.backward()
    critic.backward()
    return weights, student.detach(), critic.detach()


@pytest.mark.parametrize(("per_chunk", "given", "guidance"), [(False, 0, 3.0), (True, 1, 3.0), (True, 2, 0.0)], ids=str)
def test_losses_and_gradients_are_those_of_the_formulas_in_float64(
    setting: Setting, per_chunk: bool, given: int, guidance: float
) -> None:
    """From the student's weights to the loss and back. Catches a normaliser over the clip instead of the chunk, a
    guidance off by one, a gradient that leaks through the scores, given frames that count."""
    x = setting.rollout()
    fixed = x.detach()
    is_given = torch.arange(SHAPE[1]) < given
    common: dict[str, Any] = {"is_given": is_given if given else None}
    student = student_loss(
        x,
        noising("student", per_chunk=per_chunk),
        counted(given),
        critic=setting.score("critic", fixed),
        teacher=setting.score("teacher", fixed),
        unconditional=setting.score("teacher", fixed, negative=True) if guidance else None,
        guidance=guidance,
        **common,
    )
    student.loss.backward()
    assert {role for role, names in setting.gradients().items() if names} == {"student"}
    critic = critic_loss(
        setting.rollout(),
        noising("critic", per_chunk=per_chunk),
        counted(given),
        critic=setting.score("critic", fixed),
        **common,
    )
    student_gradients = {name: p.grad.clone() for name, p in setting.networks["student"].named_parameters()}
    critic.loss.backward()
    for name, parameter in setting.networks["student"].named_parameters():
        assert torch.equal(parameter.grad, student_gradients[name]), f"the critic's loss reached the student's {name}"
    assert setting.gradients()["teacher"] == set()

    weights, expected_student, expected_critic = script(setting, per_chunk, given, guidance)
    assert student.loss.item() == pytest.approx(expected_student.item(), rel=1e-6)
    assert critic.loss.item() == pytest.approx(expected_critic.item(), rel=1e-6)
    for role in ("student", "critic"):
        ours = dict(setting.networks[role].named_parameters())
        scale = max(float(w.grad.abs().max()) for w in weights[role].values())
        for name, expected in weights[role].items():
            difference = (ours[name].grad.double() - expected.grad).abs().max()
            assert float(difference) <= 1e-5 * scale, f"{role}: {name}"


def test_draws_depend_on_their_names_alone() -> None:
    """Neither on the batch nor on which chunks are here: ranks and resumed runs draw the same."""
    for role in ("student", "critic"):
        for per_chunk in (False, True):
            whole = noising(role, per_chunk=per_chunk)
            part = noising(role, per_chunk=per_chunk, sample_ids=IDS[1:], chunks=[1, 2])
            assert torch.equal(part.timesteps, whole.timesteps[1:, 1:])
            assert torch.equal(part.noise, whole.noise[1:, CHUNK:])
            for other in (noising(role, step=10, per_chunk=per_chunk), noising(role, seed=6, per_chunk=per_chunk)):
                assert not torch.equal(other.timesteps, whole.timesteps)
                assert not torch.equal(other.noise, whole.noise)
            is_one_per_sample = bool((whole.timesteps == whole.timesteps[:, :1]).all())
            assert is_one_per_sample is not per_chunk
    assert not torch.equal(noising("student").timesteps, noising("critic").timesteps)
    assert not torch.equal(noising("student").noise, noising("critic").noise)


def test_timesteps_are_uniform_on_the_shifted_grid_between_the_clamps() -> None:
    """Catches a second shift, an unshifted draw, and draws that are dropped instead of clamped."""
    steps = [noising(step=step, sample_ids=range(50), chunks=range(10), per_chunk=True).timesteps for step in range(4)]
    drawn = torch.cat(steps).flatten().double()
    assert drawn.min() == 20
    assert drawn.max() == 980
    u = torch.rand(200_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected = (1000 * 5 * u / (1 + 4 * u)).clamp(20, 980)
    assert (drawn == 980).double().mean() == pytest.approx(float((expected == 980).double().mean()), abs=0.02)
    for quantile in (0.1, 0.3, 0.5, 0.7):
        assert drawn.quantile(quantile) == pytest.approx(float(expected[:100_000].quantile(quantile)), rel=0.05)


def constant(value: Tensor) -> Score:
    return lambda latents, timesteps: value


def loss_of(x: Tensor, frames: CountedFrames, draws: Noising, seed: int = 1, **roles: Score) -> Any:
    v = [randn(*SHAPE, seed=seed + i) for i in range(3)]
    scores = {"critic": constant(v[0]), "teacher": constant(v[1]), "unconditional": constant(v[2])} | roles
    return student_loss(x, draws, frames, **scores)


def test_the_scale_of_one_chunk_does_not_reach_another() -> None:
    """One chunk of the rollout far away: the others' gradients stay."""
    x, far = randn(*SHAPE), randn(*SHAPE)
    far[:, :CHUNK] += 1000
    gradients = []
    for latents in (x, far):
        latents.requires_grad_()
        loss_of(latents, counted(), noising()).loss.backward()
        gradients.append(latents.grad)
    assert torch.equal(gradients[0][:, CHUNK:], gradients[1][:, CHUNK:])
    assert gradients[1][:, :CHUNK].norm() < 0.01 * gradients[0][:, :CHUNK].norm()


def test_frames_that_do_not_count_change_nothing() -> None:
    """Not the normaliser of their chunk, not the mean, and none where a whole chunk does not count: 0 / 0 is not 0."""
    x, other = randn(*SHAPE), randn(*SHAPE)
    other[:, 3:] = 50 * randn(*SHAPE, seed=8)[:, 3:]
    results = []
    frames = (torch.arange(SHAPE[1]) < 3).expand(SHAPE[:2])
    for latents in (x, other):
        latents.requires_grad_()
        made = loss_of(latents, CountedFrames(frames, frames.sum().float()), noising())
        made.loss.backward()
        results.append((made.loss.detach(), latents.grad))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])
    assert not results[0][1][:, 3:].any()
    scale = chunk_scale(torch.zeros(1, 4), torch.tensor([[True, False, False, False]]), 2)
    assert scale.tolist() == [[0, 0, 1, 1]]


def test_the_mean_over_ranks_is_the_loss_of_one_rank() -> None:
    """Chunks split 1 : 2 over two ranks, with a given frame on the first: a local mean would be wrong."""
    x, v = randn(*SHAPE), [randn(*SHAPE, seed=seed) for seed in (1, 2, 3)]
    whole, every = noising(per_chunk=True), counted(given=1)
    reached, total = [], 0.0
    for chunks in (range(0, 1), range(1, 3), range(3)):
        part = slice(chunks.start * CHUNK, chunks.stop * CHUNK)
        ranks = 1 if len(chunks) == NUM_CHUNKS else 2
        latents = x[:, part].clone().requires_grad_()
        made = student_loss(
            latents,
            Noising(whole.timesteps[:, chunks.start : chunks.stop], whole.noise[:, part]),
            CountedFrames(every.frames[:, part], every.num_frames, ranks),
            critic=constant(v[0][:, part]),
            teacher=constant(v[1][:, part]),
            unconditional=constant(v[2][:, part]),
            is_given=(torch.arange(SHAPE[1]) < 1)[part],
        )
        made.loss.backward()
        reached.append(latents.grad / ranks)
        total += made.loss.item() / ranks * (1 if ranks == 2 else -1)
    assert total == pytest.approx(0, abs=1e-6)
    torch.testing.assert_close(torch.cat(reached[:2], dim=1), reached[2], atol=1e-9, rtol=1e-6)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    ("role", "match"),
    [
        ("critic", "^critic: the prediction is not finite in samples \\[1\\]"),
        ("teacher", "^teacher: the prediction is not finite"),
        ("unconditional", "^teacher: the prediction without prompt is not finite"),
    ],
)
def test_a_number_that_is_none_stops_the_step_and_names_its_role(role: str, match: str, value: float) -> None:
    """Known mistake 18. Also infinite ones, which a comparison with itself would let through."""
    broken = randn(*SHAPE)
    broken[1, 2, 0, 1, 1] = value
    x = randn(*SHAPE).requires_grad_()
    with pytest.raises(RuntimeError, match=match):
        loss_of(x, counted(), noising(), **{role: constant(broken)})
    if role == "critic":
        with pytest.raises(RuntimeError, match=match):
            critic_loss(x, noising("critic"), counted(), critic=constant(broken))
    rollout = broken.requires_grad_()
    with pytest.raises(RuntimeError, match=r"^student: the rollout is not finite in samples"):
        loss_of(rollout, counted(), noising())
    with pytest.raises(RuntimeError, match=r"^student: the rollout is not finite"):
        critic_loss(rollout, noising("critic"), counted(), critic=constant(randn(*SHAPE)))


def test_a_teacher_that_agrees_with_the_rollout_exactly_is_told_not_hidden() -> None:
    """The normaliser is 0, the direction is 0 / 0."""
    x, draws = torch.zeros(SHAPE, requires_grad=True), noising()
    exact, other = constant(draws.noise), constant(randn(*SHAPE))
    for critic in (exact, other):
        with pytest.raises(RuntimeError, match=r"^student: the gradient .* is not finite in samples \[0, 1\]"):
            student_loss(x, draws, counted(), critic=critic, teacher=exact, unconditional=None, guidance=0.0)


def test_settings_that_do_not_belong_together_are_refused() -> None:
    x, draws = randn(*SHAPE), noising()
    v = constant(randn(*SHAPE))
    with pytest.raises(ValueError, match=r"guidance=3.0 needs unconditional"):
        student_loss(x, draws, counted(), critic=v, teacher=v, unconditional=None)
    with pytest.raises(ValueError, match=r"guidance=0.0 takes no unconditional"):
        student_loss(x, draws, counted(), critic=v, teacher=v, unconditional=v, guidance=0.0)
    with pytest.raises(ValueError, match="noise was drawn for"):
        noised(x[:, :4], draws)
    with pytest.raises(ValueError, match="noise was drawn for"):
        noised(x, replace(draws, timesteps=draws.timesteps[:, :1].repeat(1, 4)))


def test_the_students_loss_says_how_well_critic_and_teacher_know_its_rollouts() -> None:
    """By the formulas. Guidance is the teacher's aim and not its knowledge: it has no part in its error."""
    rollout, draws = randn(*SHAPE, seed=1), noising()
    off = 0.1 * randn(*SHAPE, seed=2)

    def critic(latents: Tensor, timesteps: Tensor) -> Tensor:
        return torch.zeros_like(latents)

    def teacher(latents: Tensor, timesteps: Tensor) -> Tensor:
        return draws.noise - rollout + off

    loss = student_loss(rollout, draws, counted(), critic=critic, teacher=teacher, unconditional=critic, guidance=3.0)
    sigma = draws.timesteps.double().repeat_interleave(CHUNK, dim=1)[:, :, None, None, None] / 1000
    of_critic = (sigma * (draws.noise.double() - rollout.double())).square().mean(dim=(2, 3, 4))
    of_teacher = (sigma * off.double()).square().mean(dim=(2, 3, 4))
    assert loss.prediction_errors is not None
    for errors, expected in zip(loss.prediction_errors, (of_critic, of_teacher), strict=True):
        torch.testing.assert_close(errors.double(), expected, rtol=1e-4, atol=1e-9)
