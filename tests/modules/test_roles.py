"""Roles in precisions of their own: who shares what, what each multiplies by, and runs that stop and start."""

import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from torch.optim import AdamW

from helpers.runs import assert_same, fit, random_network, tiny_module
from longlive.adapters.adapted import AdaptedNetwork
from longlive.adapters.lora import LoRASettings, base_name
from longlive.callbacks.ema import EMA, averaged_weights
from longlive.data.prompt_batches import PromptBatch
from longlive.modules import base as base_module
from longlive.modules.distillation import DistillationModule
from longlive.modules.roles import read_precisions, shared_bases, spread, with_weights
from longlive.parallel.checkpoint import load_checkpoint
from longlive.precision.nvfp4.format import QuantisedTensor, quantise
from longlive.precision.nvfp4.linear import NVFP4Linear
from longlive.precision.nvfp4.plugin import NVFP4Precision
from longlive.precision.nvfp4.recipe import NVFP4Recipe
from longlive.rollout.settings import RolloutSettings
from longlive.train import initialise
from longlive.typing import Tensor

SHOTS = torch.tensor([[0, 1]])
PROMPTS = (("a red circle", "a blue square"),)
MIXED = {"student": "nvfp4", "critic": "nvfp4"}
ALL = dict.fromkeys(("student", "teacher", "critic"), "nvfp4")


def batch(number: int = 0) -> PromptBatch:
    return PromptBatch(PROMPTS, SHOTS, torch.tensor([number]), height=32, width=32)


def distillation(**changes: Any) -> DistillationModule:
    settings: dict[str, Any] = {
        "optimizer": partial(AdamW, lr=1e-2, betas=(0.0, 0.999)),
        "critic_optimizer": partial(AdamW, lr=2e-2, betas=(0.0, 0.999)),
        "lora": LoRASettings(rank=4, alpha=8),
        "rollout": RolloutSettings(chunk_frames=4, num_steps=2, window=8),
        "student_every": 2,
        "seed": 3,
    }
    module: Any = tiny_module(DistillationModule, **settings | changes)  # type: ignore[arg-type]
    return module


@pytest.fixture(scope="module")
def stage_one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint whose weights are random throughout."""
    module = tiny_module()
    module.network = random_network(module.model_config)
    with torch.no_grad():
        for parameter in module.network.parameters():
            parameter.mul_(0.2)
    path = tmp_path_factory.mktemp("stage_one") / "step-0000001.ckpt"
    torch.save({"state_dict": module.state_dict(), "callbacks": {}, "global_step": 1}, path)
    return path


def start(module: DistillationModule, path: Path, precision: Any = "bf16-mixed") -> DistillationModule:
    """As `longlive train initialise_from=...`."""
    chosen = {"plugins": [precision]} if isinstance(precision, NVFP4Precision) else {"precision": precision}
    initialise(Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, **chosen), module, path)
    return module


def weights_of(path: Path) -> dict[str, Tensor]:
    return {name.removeprefix("network."): value for name, value in load_checkpoint(path)["state_dict"].items()}


@pytest.mark.parametrize(
    ("own", "run", "expected"),
    [
        ({}, "bf16-mixed", [("network", "student teacher critic")]),
        ({"critic": "bf16"}, "bf16-mixed", [("network", "student teacher critic")]),
        ({"critic": "bf16"}, "32-true", [("network", "student teacher"), ("critic_base", "critic")]),
        ({"student": "nvfp4"}, "bf16-mixed", [("network", "student"), ("teacher_base", "teacher critic")]),
        (MIXED, "bf16-mixed", [("network", "student critic"), ("teacher_base", "teacher")]),
        (ALL, "bf16-mixed", [("network", "student teacher critic")]),
        (ALL, NVFP4Precision(), [("network", "student teacher critic")]),
        (
            {"student": "nvfp4", "teacher": "fp8", "critic": "fp32"},
            "bf16-mixed",
            [("network", "student"), ("teacher_base", "teacher"), ("critic_base", "critic")],
        ),
        (
            {"student": NVFP4Precision(), "critic": NVFP4Precision(recipe=NVFP4Recipe(weights="static_6"))},
            NVFP4Precision(),
            [("network", "student teacher"), ("critic_base", "critic")],
        ),
    ],
    ids=["run", "same", "critic", "student", "two", "all", "all as the run", "three", "settings"],
)
def test_roles_that_compute_the_same_share_a_base(own: dict[str, Any], run: Any, expected: list[Any]) -> None:
    bases = shared_bases(read_precisions(own, 0), run)
    assert [(base.place, " ".join(base.roles)) for base in bases] == expected
    assert all(base.precision is None for base in bases if base.roles[0] not in own)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"generator": "nvfp4"}, "role_precision names generator; the roles are student, teacher, critic"),
        ({"critic": "int4"}, r"role_precision\.critic='int4' is not supported; use nvfp4, fp8"),
    ],
)
def test_roles_and_precisions_that_do_not_exist_are_refused(settings: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        distillation(role_precision=settings)


@pytest.mark.parametrize("own", [MIXED, ALL, {"teacher": "nvfp4", "critic": "32-true"}], ids=str)
def test_every_role_multiplies_what_its_precision_makes_of_stage_one(own: dict[str, str], stage_one: Path) -> None:
    """A base of the initial weights, or one that the run's plugin or context reached, computes something else."""
    module = start(distillation(role_precision=own), stage_one)
    conditions = module.conditions(batch())
    noisy = torch.randn(1, 8, 16, 4, 4, generator=torch.Generator().manual_seed(1))
    timesteps = torch.full(noisy.shape[:2], 500.0)
    for role in ("student", "teacher", "critic"):
        precision = own.get(role, "bf16-mixed")
        plain = tiny_module(model=module.model_config)
        plain.configure_model()
        network: Any = plain.network
        network.load_state_dict(weights_of(stage_one))
        if precision == "nvfp4":
            NVFP4Precision().convert_module(network.requires_grad_(False))
        context = torch.autocast("cpu", torch.bfloat16, enabled=precision != "32-true")
        with torch.no_grad(), context:
            expected = module.score(AdaptedNetwork(network, None), noisy, conditions)(noisy, timesteps)
        with torch.no_grad(), module.trainer.precision_plugin.forward_context():
            made = module.score(getattr(module, role), noisy, conditions)(noisy, timesteps)
        assert torch.equal(made, expected), role


def test_a_bfloat16_base_learns_bit_for_bit_what_a_float32_one_does(
    stage_one: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    learned = []
    for held in (True, False):
        if not held:
            monkeypatch.setattr(base_module, "freeze", lambda network, precision: None)
        module = start(distillation(), stage_one)
        dtypes = {parameter.dtype for parameter in module.network.parameters()}
        assert dtypes == ({torch.bfloat16, torch.float32} if held else {torch.float32})
        fit(module, [batch(0), batch(1)], precision="bf16-mixed")
        learned.append({name: value for name, value in module.state_dict().items() if base_name(name) is None})
    assert_same(*learned)


def test_nothing_but_adapters_learns_whatever_the_bases_are(stage_one: Path) -> None:
    module = start(distillation(role_precision=MIXED), stage_one)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    fit(module, [batch(0), batch(1)], precision="bf16-mixed")
    moved = {name for name, value in module.state_dict().items() if not torch.equal(value, before[name])}
    assert moved == {name for name in before if "lora_" in name}
    (plugin,) = module.own_plugins()
    assert plugin.clock.step == 1, "random bits of another step"
    packed = [layer for layer in module.network.modules() if isinstance(layer, NVFP4Linear)]
    assert len(packed) == 10
    assert all(layer.weight is None for layer in packed)
    assert not any(isinstance(layer, NVFP4Linear) for layer in module.teacher_base.modules())


def test_the_runs_precision_packs_the_base_that_all_share(stage_one: Path) -> None:
    """Before, it kept float32 masters that nothing learns from, and quantised them at every call."""
    plugin = NVFP4Precision()
    module = start(distillation(), stage_one, plugin)
    assert module.held_as() == {"network": "mse"}
    fit(module, [batch()], plugins=[plugin])
    assert module.held_as() == {"network": "mse"}


def test_a_run_killed_in_a_cycle_goes_on_bit_for_bit(stage_one: Path, tmp_path: Path) -> None:
    """Random bits of gradients are drawn by the role's own plugin, which no Trainer tells the step."""
    batches = [batch(number) for number in range(3)]

    def run(count: int, first: int = 0, resumed: Path | None = None) -> dict[str, Any]:
        module = distillation(role_precision=MIXED)
        if resumed is None:
            start(module, stage_one)
        trainer = fit(
            module,
            batches[first:count],
            callbacks=[EMA(decay=0.9)],
            checkpoint=resumed,
            max_steps=count,
            max_epochs=5,
            precision="bf16-mixed",
        )
        trainer.save_checkpoint(tmp_path / f"{first}-{count}.ckpt")
        return load_checkpoint(tmp_path / f"{first}-{count}.ckpt")

    whole, _ = run(3), run(1)
    resumed = run(3, 1, tmp_path / "0-1.ckpt")
    for part in ("state_dict", "optimizer_states", "callbacks", "bases"):
        assert_same(resumed[part], whole[part], part)
    assert whole["bases"] == {"network": "mse", "teacher_base": "weights"}
    held = [name for name in whole["state_dict"] if "ffn.0" in name and name.endswith(("weight", "packed"))]
    held = [name for name in held if "lora_" not in name]
    assert held == ["network.blocks.0.ffn.0.base_layer.weight_packed", "teacher_base.blocks.0.ffn.0.weight"]
    with pytest.raises(ValueError, match=re.escape("the checkpoint's bases are {'network': 'mse'")):
        fit(distillation(), batches[1:], checkpoint=tmp_path / "0-1.ckpt", precision="bf16-mixed")


def test_codes_of_one_run_start_another_only_by_the_same_rule(stage_one: Path, tmp_path: Path) -> None:
    """A 2-step student starts from the 4-step one; by another rule every weight would be scaled by 256 / 448."""
    first = start(distillation(role_precision=ALL), stage_one)
    trainer = fit(first, [batch()], precision="bf16-mixed")
    path = tmp_path / "step-0000001.ckpt"
    trainer.save_checkpoint(path)
    second = start(distillation(role_precision=ALL, seed=8), path)
    assert_same(dict(second.state_dict()), dict(first.state_dict()))
    for recipe, name in ((NVFP4Recipe("static_6"), "static_6"), (NVFP4Recipe(weight_tiles=False), "mse_1x16")):
        with pytest.raises(ValueError, match=f"packed with the rule mse, and here with {name}; "):
            start(distillation(role_precision=dict.fromkeys(ALL, NVFP4Precision(recipe=recipe))), path)
    lacks = (
        r"no weights for (\w+)\.\S*\.self_attn\.q\.\S*weight, only NVFP4 codes, and for 9 more: .* export format=fp32"
    )
    with pytest.raises(ValueError, match=lacks):
        start(distillation(), path)
    with pytest.raises(ValueError, match=lacks):
        start(distillation(role_precision={"student": "nvfp4"}), path)


SOME = NVFP4Precision(layers=("blocks.*.ffn.[02]",))


@pytest.mark.parametrize(
    "then", [{"student": SOME}, ALL, {"teacher": "nvfp4"}, {}], ids=["layers", "all", "other", "none"]
)
@pytest.mark.parametrize("first", [MIXED, {"student": SOME}], ids=["mixed", "layers"])
def test_a_run_with_weights_beside_codes_starts_one_with_others_packed(
    first: dict[str, Any], then: dict[str, Any], stage_one: Path, tmp_path: Path
) -> None:
    """A base of the same rule, but other layers, took no codes for them and kept its initial weights."""
    path = tmp_path / "step-0000001.ckpt"
    fit(start(distillation(role_precision=first), stage_one), [batch()], precision="bf16-mixed").save_checkpoint(path)
    found = start(distillation(role_precision=then, seed=8), path).state_dict()
    expected = start(distillation(role_precision=then, seed=8), stage_one).state_dict()
    assert found.keys() == expected.keys()
    names = [name for name in expected if base_name(name) is not None]
    layers = re.compile(r"ffn|attn\.[qkvo]")
    assert {name for name in names if not layers.search(name)}
    for name in names:
        if name.endswith("weight_packed"):
            # Of what a bfloat16 base has rounded, which may turn the choice of a scale.
            ours, theirs = (decoded(state, name.removesuffix("_packed")) for state in (found, expected))
            assert (ours - theirs).norm() < 0.1 * theirs.norm(), name
        elif not name.endswith("weight_scale"):
            torch.testing.assert_close(found[name].float(), expected[name].float(), atol=2e-2, rtol=1e-2)


def decoded(state: Mapping[str, Tensor], weight: str) -> Tensor:
    packed, scales, amax = (state[f"{weight}_{part}"] for part in ("packed", "scale", "amax"))
    return QuantisedTensor(packed, scales.view(torch.float8_e4m3fn), amax, "mse", tiles=True).dequantise()


def tensors(number: int, *names: str) -> dict[str, Tensor]:
    return {name: torch.full((2,), float(number)) for name in names}


def test_weights_are_found_whatever_bases_they_were_trained_in() -> None:
    own = tensors(0, "network.q.base_layer.weight", "network.q.lora_A.student.weight", "critic_base.q.weight")
    own |= tensors(0, "critic_base.q.lora_A.critic.weight")

    def taken(stored: Mapping[str, Tensor]) -> dict[str, float]:
        return {name: float(value[0]) for name, value in spread(own, stored).items()}

    base = {"network.q.base_layer.weight": 1.0, "critic_base.q.weight": 1.0}
    fresh = {"network.q.lora_A.student.weight": 0.0, "critic_base.q.lora_A.critic.weight": 0.0}
    assert taken(tensors(1, "network.q.weight")) == base | fresh
    shared = tensors(1, "network.q.base_layer.weight") | tensors(2, "network.q.lora_A.critic.weight")
    assert taken(shared) == base | fresh | {"critic_base.q.lora_A.critic.weight": 2.0}
    packed = tensors(2, *(f"network.q.base_layer.weight_{part}" for part in ("packed", "scale", "amax")))
    assert taken(packed | tensors(3, "teacher_base.q.weight")) == {name: 3.0 for name in base} | fresh
    assert taken(tensors(1, "network.q.weight", "network.other")).keys() == own.keys() | {"network.other"}
    # Codes cannot be taken for weights, nor initial values.
    with pytest.raises(ValueError, match=r"network\.q\.base_layer\.weight, only NVFP4 codes, and for 1 more"):
        spread(own, packed)
    with pytest.raises(ValueError, match=r"no weights for network\.q\.base_layer\.weight, and for 1 more"):
        spread(own, tensors(5, "network.other", "network.q.lora_A.student.weight"))


def test_codes_become_weights_where_there_are_none() -> None:
    weight = torch.randn(32, 32, generator=torch.Generator().manual_seed(0))
    codes: QuantisedTensor = quantise(weight, "mse", tiles=True)
    parts = zip(("packed", "scale", "amax"), (codes.packed, codes.scales.view(torch.uint8), codes.amax), strict=True)
    stored = {f"network.q.base_layer.weight_{part}": tensor for part, tensor in parts}
    stored["network.q.lora_A.student.weight"] = torch.ones(1)
    plain = with_weights(stored, {"network": "mse"})
    assert plain.keys() == {"network.q.base_layer.weight", "network.q.lora_A.student.weight"}
    assert torch.equal(plain["network.q.base_layer.weight"], codes.dequantise())
    plain = with_weights(stored | {"teacher_base.q.weight": weight}, {"network": "mse", "teacher_base": "weights"})
    assert torch.equal(plain["network.q.base_layer.weight"], weight)


def test_what_a_run_made_is_read_back_in_one_precision(stage_one: Path, tmp_path: Path) -> None:
    """`averaged_weights`, then a network as export and generate build it."""
    for own, exact in ((MIXED, True), (ALL, False)):
        module = start(distillation(role_precision=own), stage_one)
        trainer = fit(module, [batch()], precision="bf16-mixed")
        trainer.save_checkpoint(tmp_path / "run.ckpt")
        checkpoint = load_checkpoint(tmp_path / "run.ckpt")
        plain = distillation()
        plain.configure_model()
        plain.load_state_dict(plain.weights_of(with_weights(averaged_weights(checkpoint), checkpoint["bases"])))
        masters = weights_of(stage_one)
        name = "blocks.0.ffn.0.weight"
        weight = plain.network.get_parameter(name)
        rounded = masters[name].bfloat16().float()
        codes = quantise(masters[name], "mse", tiles=True).dequantise()
        assert torch.equal(weight, rounded if exact else codes)
        learned = SimpleNamespace(**{"state": module.state_dict(), "plain": plain.state_dict()})
        for role in ("student", "critic"):
            names = [each for each in learned.plain if f".{role}." in each]
            assert names
            assert all(torch.equal(learned.plain[each], learned.state[each]) for each in names)
