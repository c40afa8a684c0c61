"""LoRA as LongLive's trainers store it: what peft computes with it, our network computes."""

from __future__ import annotations

from pathlib import Path

import peft
import pytest
import torch

from helpers.adapters import base, velocity
from longlive.adapters.longlive_lora import load_longlive_adapter
from longlive.adapters.lora import PREFIX, adapter_names, adapter_state, use_adapter
from longlive.adapters.lora_files import load_adapter, save_adapter
from longlive.typing import Tensor


@pytest.fixture(scope="module")
def theirs() -> peft.PeftModel:
    """As the trainer wraps its network: every linear layer of the blocks, alpha as the rank."""
    targets = [
        name
        for name, module in base().named_modules()
        if name.startswith("blocks.") and isinstance(module, torch.nn.Linear)
    ]
    torch.manual_seed(0)
    config = peft.LoraConfig(r=4, lora_alpha=4, target_modules=targets, init_lora_weights=False)
    return peft.get_peft_model(base(), config)


def stored(theirs: peft.PeftModel) -> dict[str, Tensor]:
    return {key: tensor.clone() for key, tensor in peft.get_peft_model_state_dict(theirs).items()}


@pytest.mark.parametrize("kind", ["checkpoint", "alone", "fsdp", "bare"])
def test_an_adapter_of_longlive_computes_what_peft_computes(theirs: peft.PeftModel, kind: str, tmp_path: Path) -> None:
    state = stored(theirs)
    if kind == "fsdp":
        state = {key.replace("blocks.1.", "blocks.1._fsdp_wrapped_module."): value for key, value in state.items()}
    if kind == "bare":
        state = {key.removeprefix(PREFIX).replace(".weight", ".default.weight"): v for key, v in state.items()}
    critic = {key: torch.zeros_like(tensor) for key, tensor in state.items()}
    whole = {"generator_lora": state, "critic_lora": critic, "step": 5000}
    torch.save(state if kind == "alone" else whole, tmp_path / "lora.pt")
    ours = base()
    load_longlive_adapter(ours, "few_steps", tmp_path / "lora.pt")
    with use_adapter(ours, "few_steps"):
        assert torch.equal(velocity(ours), velocity(theirs.base_model.model))
    assert not torch.equal(velocity(ours), velocity(theirs.base_model.model))
    if kind != "alone":
        load_longlive_adapter(ours, "critic", tmp_path / "lora.pt", state="critic_lora")
        assert not any(tensor.any() for tensor in adapter_state(ours, "critic").values())


def test_alpha_scales_and_is_kept_in_pefts_folder(theirs: peft.PeftModel, tmp_path: Path) -> None:
    torch.save(stored(theirs), tmp_path / "lora.pt")
    ours, again = base(), base()
    load_longlive_adapter(ours, "quarter", tmp_path / "lora.pt", alpha=1)
    save_adapter(ours, "quarter", tmp_path / "quarter")
    load_adapter(again, "quarter", tmp_path / "quarter")
    with use_adapter(ours, "quarter"), use_adapter(again, "quarter"):
        assert torch.equal(velocity(ours), velocity(again))
        assert not torch.equal(velocity(ours), velocity(theirs.base_model.model))


def test_what_is_no_adapter_of_this_network_leaves_it_as_it_was(theirs: peft.PeftModel, tmp_path: Path) -> None:
    state = stored(theirs)
    first = next(iter(state))
    wrong = {
        "has ranks [2, 4]": {**state, first: state[first][:2]},
        "has no lora_A among a.weight": {"a.weight": torch.zeros(1)},
        f"{first} is missing on one side": {key: tensor for key, tensor in state.items() if key != first},
        "no linear layer is named 'blocks.7.ffn.0'": {
            **state,
            f"{PREFIX}blocks.7.ffn.0.lora_A.weight": torch.zeros(4, 32),
        },
        "holds generator; looked for generator_lora": {"generator": state},
    }
    ours = base()
    for message, content in wrong.items():
        torch.save(content, tmp_path / "lora.pt")
        with pytest.raises(ValueError, match=r".") as raised:
            load_longlive_adapter(ours, "few_steps", tmp_path / "lora.pt")
        assert message in str(raised.value)
    torch.save(state, tmp_path / "lora.pt")
    with pytest.raises(ValueError, match="adapter name 'half' must be an identifier that torch's modules have not"):
        load_longlive_adapter(ours, "half", tmp_path / "lora.pt")
    assert adapter_names(ours) == []
