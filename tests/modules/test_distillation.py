"""One step against a float64 script, who learns when, and a run that is killed in the middle of a cycle."""

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.optim import SGD
from torch.utils.checkpoint import checkpoint

from helpers.distillation_float64 import Script
from helpers.noisy import tiny_distillation
from helpers.runs import MemoryLogger, assert_same, fake_batches, fit, tiny_module
from longlive.adapters.lora import adapter_parameters
from longlive.callbacks.ema import EMA, averaged_weights
from longlive.callbacks.loss_breakdown import LossBreakdown
from longlive.codecs.dct import DCTCodec
from longlive.data.prompt_batches import PromptBatch, PromptDataModule
from longlive.diffusion.schedule import FlowSchedule
from longlive.modules.distillation import DistillationModule
from longlive.rollout.settings import RolloutSettings
from longlive.typing import Tensor

CHUNKS, FRAMES = 3, 4
SHOTS = torch.tensor([[0, 0, 1], [0, 1, 1]])
PROMPTS = (("a red circle", "a red circle", "a cut to a blue square"), ("green", "a cut to grey", "grey, going on"))
ROLLOUT = RolloutSettings(chunk_frames=FRAMES, num_steps=2, solver="euler", window=8, shot_rope_offset=4.0)
MakeDistillation = Callable[..., DistillationModule]


def batch(number: int = 0) -> PromptBatch:
    return PromptBatch(PROMPTS, SHOTS, torch.tensor([2 * number, 2 * number + 1]), height=32, width=32)


@pytest.fixture
def make() -> MakeDistillation:
    return partial(tiny_distillation, rollout=ROLLOUT)


def learned(module: DistillationModule) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in module.named_parameters()}


def changed(before: dict[str, Tensor], after: dict[str, Tensor]) -> set[str]:
    """Which roles moved: `student`, `critic`, `base`."""
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    return {next((role for role in ("student", "critic") if f".{role}." in name), "base") for name in moved}


def losses(module: DistillationModule, number: int, step: int) -> dict[str, Tensor]:
    conditions = module.conditions(batch(number))
    made = {}
    for role in ("student", "critic"):
        with torch.set_grad_enabled(role == "student"):
            clip = module.roll_out(role, conditions, step)
        made[role] = module.loss(role, clip.latents, conditions, step).loss
    return made


@pytest.mark.parametrize("step", [0, 1])
def test_the_losses_of_a_step_are_those_of_a_float64_script(make: MakeDistillation, step: int) -> None:
    """From prompts and seeds to the numbers: rollout, exit, window, cuts, guidance and adapters, on one layer."""
    module = make()
    made = losses(module, 0, step)
    scripts = [Script(module, PROMPTS[row], SHOTS[row].tolist(), row, step) for row in range(2)]
    expected = {
        "student": sum(script.student_loss() for script in scripts) / 2,
        "critic": sum(script.critic_loss() for script in scripts) / 2,
    }
    for role, value in expected.items():
        assert made[role].item() == pytest.approx(value, rel=1e-6), role


def test_each_loss_reaches_its_own_adapter_alone(make: MakeDistillation) -> None:
    module = make()
    for role, loss in losses(module, 0, 0).items():
        with (module.student if role == "student" else module.critic).active():
            loss.backward()
        reached = {name for name, p in module.network.named_parameters() if p.grad is not None and p.grad.any()}
        assert reached == {name for name, _ in adapter_parameters(module.network, role)}
        module.zero_grad()


class Watch(Callback):
    """Which roles moved in every batch, and the average after it."""

    def __init__(self, ema: EMA | None = None) -> None:
        self.ema = ema
        self.moved: list[set[str]] = []
        self.values: list[dict[str, float]] = []
        self.averages: list[dict[str, Tensor]] = []
        self.weights: list[dict[str, Tensor]] = []

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, DistillationModule)
        self.weights = [learned(pl_module)]

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        assert isinstance(pl_module, DistillationModule)
        self.weights.append(learned(pl_module))
        self.moved.append(changed(self.weights[-2], self.weights[-1]))
        self.values.append(outputs["values"])
        if self.ema is not None:
            self.averages.append({name: value.clone() for name, value in self.ema.average.items()})


def test_the_critic_learns_in_every_step_and_the_student_in_every_third(make: MakeDistillation) -> None:
    """Steps are batches: an optimizer that counts twice would shift everything that is done every n steps."""
    watch = Watch()
    trainer = fit(make(), [batch(number) for number in range(7)], callbacks=[watch])
    both, alone = {"student", "critic"}, {"critic"}
    assert watch.moved == [both, alone, alone, both, alone, alone, both]
    assert trainer.global_step == 7
    for index, values in enumerate(watch.values):
        roles = {name.split("/")[0] for name in values}
        assert roles == (both if index % 3 == 0 else alone)
        assert all(math.isfinite(value) and value > 0 for value in values.values())


def test_a_step_says_what_the_health_of_a_distillation_is_told_by(make: MakeDistillation) -> None:
    """The critic starts as the teacher, and so as wrong as it; the spread is that of the rollout learned from."""
    watch, module = Watch(), make(noisy=False)
    fit(module, [batch(0)], callbacks=[watch])
    (values,) = watch.values
    assert values["student/critic_error"] == pytest.approx(values["student/teacher_error"], rel=1e-6)
    first = make(noisy=False)
    with torch.no_grad():
        clip = first.roll_out("student", first.conditions(batch(0)), 0).latents
    expected = clip.double().sub(clip.double().mean(dim=0)).square().sum(dim=0).sqrt().mean()
    assert values["student/diversity"] == pytest.approx(float(expected), rel=1e-5)


def test_the_average_is_the_students_and_moves_with_it(make: MakeDistillation) -> None:
    """The average of the critic is nobody's; counted in the critic's steps, it would forget five times as fast."""
    ema = EMA(decay=0.9)
    watch = Watch(ema)
    fit(make(), [batch(number) for number in range(5)], callbacks=[ema, watch])
    names = {name for name in watch.weights[0] if ".student." in name}
    assert watch.averages[0].keys() == names
    for name in names:
        start, first, second = (watch.weights[index][name].double() for index in (0, 1, 4))
        once = 0.1 * start + 0.9 * first
        twice = 2 / 11 * once + 9 / 11 * second
        for number, expected in enumerate((once, once, once, twice, twice)):
            torch.testing.assert_close(watch.averages[number][name].double(), expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("killed_after", [1, 4])
def test_a_run_killed_in_a_cycle_goes_on_bit_for_bit(make: MakeDistillation, tmp_path: Path, killed_after: int) -> None:
    """Both Adams, the average, and whose turn it is (known mistake 3)."""
    batches = [batch(number) for number in range(6)]
    schedule = {"learning_rate": partial(torch.optim.lr_scheduler.ExponentialLR, gamma=0.9)}

    def run(count: int, first: int = 0, start: Path | None = None) -> Path:
        ema, logger = EMA(decay=0.9), MemoryLogger()
        trainer = fit(
            make(**schedule),
            batches[first:count],
            callbacks=[ema, LossBreakdown(every_n_steps=2)],
            logger=logger,
            checkpoint=start,
            max_steps=count,
            max_epochs=5,
        )
        assert trainer.global_step == count
        path = tmp_path / f"{first}-{count}.ckpt"
        trainer.save_checkpoint(path)
        return path

    whole = torch.load(run(6), weights_only=True)
    resumed = torch.load(run(6, killed_after, run(killed_after)), weights_only=True)
    for part in ("state_dict", "optimizer_states", "lr_schedulers", "callbacks", "global_step"):
        assert_same(resumed[part], whole[part], part)
    assert len(whole["optimizer_states"]) == 2
    assert [len(state["state"]) for state in whole["optimizer_states"]] == [20, 20]
    steps = [{float(s["step"]) for s in state["state"].values()} for state in whole["optimizer_states"]]
    assert steps == [{2.0}, {6.0}]


def test_recomputing_activations_changes_no_gradient(make: MakeDistillation) -> None:
    """In backward, both another adapter and a later cache are there."""
    results = []
    for checkpointed in (False, True):
        module = make(optimizer=partial(SGD, lr=0.1), critic_optimizer=partial(SGD, lr=0.1))
        if checkpointed:
            for block in module.network.blocks:
                block.forward = partial(checkpoint, block.forward, use_reentrant=False)
        fit(module, [batch(0)])
        results.append(learned(module))
    assert changed(results[0], make().state_dict()) == {"student", "critic"}
    assert_same(results[1], results[0])


@pytest.mark.parametrize(("role", "poisoned"), [("student", "student"), ("critic", "critic"), ("teacher", "base")])
def test_numbers_that_are_none_stop_the_run_and_name_their_role(
    make: MakeDistillation, role: str, poisoned: str
) -> None:
    """Of the base it is the rollout that is seen first, which is the student's."""
    module = make()
    name = {"student": ".student.", "critic": ".critic.", "base": "head.head"}[poisoned]
    with torch.no_grad():
        next(p for n, p in module.named_parameters() if name in n and n.endswith("weight")).fill_(math.inf)
    expected = "critic: the prediction" if role == "critic" else "student: the rollout"
    with pytest.raises(RuntimeError, match=f"^{expected} is not finite"):
        fit(module, [batch()])


@pytest.mark.parametrize("role", ["student", "critic"])
def test_a_gradient_that_is_no_number_changes_no_weight(
    make: MakeDistillation, role: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = make()
    before = learned(module)
    parameter = next(p for n, p in module.named_parameters() if f".{role}." in n)
    parameter.register_hook(lambda gradient: gradient * math.nan)
    with pytest.raises(RuntimeError, match=f"^{role}: the gradient is not finite"):
        fit(module, [batch()])
    assert changed(before, learned(module)) == (set() if role == "student" else {"student"})


def test_what_is_generated_is_the_student(make: MakeDistillation) -> None:
    module = make()
    engine = module.rollout_engine()
    conditions = module.conditions(batch())
    arguments = (conditions.prompt_embeds, conditions.prompt_index, conditions.shot_index, (16, 4, 4), 0, [5, 6])
    made = engine.generate(*arguments).latents
    with module.student.active():
        assert torch.equal(module.rollout_engine().generate(*arguments).latents, made)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if ".student." in name:
                parameter.zero_()
    assert not torch.equal(engine.generate(*arguments).latents, made)


def test_it_starts_from_the_weights_of_stage_one_or_of_another_distillation(make: MakeDistillation) -> None:
    """Known mistake 4: weights, no more. What is not in this network is an error."""
    stage_one, module = tiny_module(), make(noisy=False)
    stage_one.configure_model()
    own = learned(module)
    stored = {name: torch.full_like(value, 0.5) for name, value in stage_one.state_dict().items()}
    weights = module.weights_of(stored)
    module.load_state_dict(weights)
    assert changed(own, learned(module)) == {"base"}
    assert all((value == 0.5).all() for name, value in learned(module).items() if "lora_" not in name)
    other = make()
    module.load_state_dict(module.weights_of(other.state_dict()))
    assert_same(learned(module), learned(other))
    assert set(module.weights_of(stored | {"network.other": torch.zeros(1)})) - set(own) == {"network.other"}
    del stored["network.head.head.weight"]
    with pytest.raises(ValueError, match=r"no weights for network\.head\.head\.weight\b"):
        module.weights_of(stored)


def test_a_checkpoint_holds_the_average_where_the_student_is(make: MakeDistillation, tmp_path: Path) -> None:
    ema = EMA(decay=0.9)
    module = make()
    trainer = fit(module, [batch(number) for number in range(4)], callbacks=[ema])
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    weights = averaged_weights(torch.load(tmp_path / "run.ckpt", weights_only=True))
    own = module.state_dict()
    assert weights.keys() == own.keys()
    assert changed(own, weights) == {"student"}


def test_image_to_video_trains_on_clips_whose_first_frame_is_given(make: MakeDistillation) -> None:
    module = make(given_frames=1, timestep_per_chunk=True)
    clips = fake_batches(1, num_frames=CHUNKS * FRAMES)[0]
    conditions = module.conditions(clips)
    assert torch.equal(conditions.given, clips.latents[:, :1])
    clip = module.roll_out("student", conditions, 0)
    assert torch.equal(clip.latents[:, :1], clips.latents[:, :1])
    loss = module.loss("student", clip.latents, conditions, 0)
    assert (loss.timesteps[:, 0] == 0).all()
    assert (loss.timesteps[:, 1:] >= 20).all()
    assert len(loss.timesteps.unique()) > 3
    trainer = fit(make(given_frames=1), fake_batches(2, num_frames=CHUNKS * FRAMES))
    assert trainer.global_step == 2
    with pytest.raises(ValueError, match="given_frames=1, but the batch holds prompts alone"):
        fit(module, [batch()])


class Counting(DCTCodec):
    """Knows how many raw frames it has encoded."""

    def __init__(self) -> None:
        super().__init__()
        self.encoded: list[int] = []

    def encode(self, video: Tensor) -> Tensor:
        self.encoded.append(video.shape[1])
        return super().encode(video)


@pytest.mark.parametrize(("given", "num_raw_frames"), [(0, []), (1, [1]), (3, [9])])
def test_of_clips_the_raw_frames_of_given_frames_alone_are_encoded(
    make: MakeDistillation, given: int, num_raw_frames: list[int]
) -> None:
    """An encode of whole clips takes as long as a step, and nothing looks at the rest."""
    module = make(given_frames=given, codec=Counting())
    pixels = torch.randint(256, (2, 45, 3, 32, 48), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    clips = replace(fake_batches(1, num_frames=CHUNKS * FRAMES)[0], latents=None, raw_frames=pixels)
    conditions = module.conditions(clips)
    assert module.codec.encoded == num_raw_frames
    whole = module.encode(clips)
    assert conditions.latent_shape == tuple(whole.shape[2:]) == (16, 4, 6)
    if given:
        assert torch.equal(conditions.given, whole[:, :given])
    else:
        assert conditions.given is None
    with pytest.raises(ValueError, match=r"41 raw frames; its 3 chunks of 4 frames are of 45$"):
        module.conditions(replace(clips, raw_frames=pixels[:, :41]))
    with pytest.raises(ValueError, match=r"height=28, width=48 are no multiples of .* use 24, 48"):
        module.conditions(replace(clips, raw_frames=pixels[..., :28, :]))


def test_videos_that_the_codec_cannot_make_are_refused_before_there_is_a_network() -> None:
    """They were trained on at the next smaller size."""
    module = tiny_module(DistillationModule, critic_optimizer=partial(SGD, lr=0.1), rollout=ROLLOUT)
    data = PromptDataModule(["red"], num_frames=CHUNKS * FRAMES, chunk_frames=FRAMES, height=22, width=32)
    refused = r"height=22, width=32 are no multiples of the codec's spatial_ratio=8; use 16, 32"
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, max_steps=1)
    with pytest.raises(ValueError, match=refused):
        trainer.fit(module, datamodule=data)
    assert module.network is None
    with pytest.raises(ValueError, match=refused):
        module.conditions(replace(batch(), height=22))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"student_every": 0}, "student_every=0"),
        ({"guidance": -1.0}, "guidance=-1.0"),
        ({"given_frames": 5}, "given_frames=5 must be 0 to 4"),
        ({"max_gradient_norm": 0.0}, "max_gradient_norm=0.0"),
        ({"exit_per": "step"}, "exit_per='step' is unknown; use rollout or chunk"),
        ({"rollout": RolloutSettings(chunk_frames=FRAMES, guidance_scale=3.0)}, "set guidance_scale=1"),
    ],
    ids=str,
)
def test_settings_that_do_not_fit_are_refused(make: MakeDistillation, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(**changes)


def test_without_guidance_the_teacher_is_asked_once(make: MakeDistillation) -> None:
    for guidance, calls in ((3.0, 3), (0.0, 2)):
        module = make(guidance=guidance, schedule=FlowSchedule())
        conditions = module.conditions(batch())
        clip = module.roll_out("student", conditions, 0)
        seen: list[Tensor] = []
        module.network.register_forward_hook(lambda module, args, output, seen=seen: seen.append(output))
        module.loss("student", clip.latents, conditions, 0)
        assert len(seen) == calls
