"""Adapters as folders: what goes in comes back, and peft and diffusers compute with them what we compute."""

import json
from pathlib import Path

import diffusers
import peft
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from helpers.adapters import CONFIG, LATENTS, PROMPTS, TIMESTEP, adapted, base, fill_adapter, velocity
from helpers.runs import assert_same
from longlive.adapters.export import CastFormat, write_export
from longlive.adapters.lora import (
    LoRASettings,
    adapter_names,
    adapter_state,
    add_adapter,
)
from longlive.adapters.lora_files import (
    DIFFUSERS_FILE,
    LoRAFormat,
    check_lora_export,
    find_adapter,
    load_adapter,
    run_of_adapter,
    save_adapter,
    write_lora,
)
from longlive.adapters.lora_merging import merge_adapter
from longlive.adapters.lora_truncation import add_truncated
from longlive.models.wan.model import CausalWan
from longlive.models.wan.weights import save_weights
from longlive.typing import Tensor

RUN = {"module": {"seed": 3}, "data": {"fps": 24.0}}


@pytest.fixture(scope="module")
def network() -> CausalWan:
    """Two adapters that do something, whose alpha is not their rank; and the first one in a lower rank."""
    made = base()
    for seed, name in enumerate(("student", "critic")):
        add_adapter(made, name, LoRASettings(rank=4, alpha=8))
        fill_adapter(made, name, seed)
    add_truncated(made, "student", 2, "small")
    return made


either = pytest.mark.parametrize("name", ["student", "small"])


@pytest.mark.parametrize("naming", ["original", "diffusers"])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_an_adapter_goes_to_a_file_and_comes_back(
    network: CausalWan, tmp_path: Path, dtype: torch.dtype | None, naming: str
) -> None:
    save_adapter(network, "critic", tmp_path / "critic", dtype, naming=naming)
    other = base()
    load_adapter(other, "fake", tmp_path / "critic")
    ours, theirs = adapter_state(network, "critic"), adapter_state(other, "fake")
    assert ours.keys() == theirs.keys()
    for key, value in ours.items():
        assert torch.equal(theirs[key], value.to(dtype or value.dtype).float())
    if dtype is None:
        assert torch.equal(adapted("fake", other), adapted("critic", network))
    stored = load_file(find_adapter(tmp_path / "critic"))
    assert {value.dtype for value in stored.values()} == {dtype or torch.float32}
    assert sum(value.numel() for value in stored.values()) == 2 * 4 * (8 * (32 + 32) + 2 * (32 + 64))
    with pytest.raises(ValueError, match="never overwrite"):
        save_adapter(network, "student", tmp_path / "critic")
    load_adapter(other, "by_file", find_adapter(tmp_path / "critic"))
    assert_same(adapter_state(other, "by_file"), theirs)
    assert [path.name for path in tmp_path.iterdir()] == ["critic"]


@either
def test_peft_loads_the_file(network: CausalWan, tmp_path: Path, name: str) -> None:
    """Over the plain network, with nothing of ours: the very numbers."""
    save_adapter(network, name, tmp_path / "student")
    loaded = peft.PeftModel.from_pretrained(base(), str(tmp_path / "student"))
    with torch.no_grad():
        assert torch.equal(velocity(loaded.base_model.model), adapted(name, network))
    named = peft.get_peft_model_state_dict(loaded)
    stored = load_file(tmp_path / "student" / "adapter_model.safetensors")
    assert {key: value.shape for key, value in named.items()} == {key: value.shape for key, value in stored.items()}


def test_a_file_of_pefts_loads_here(tmp_path: Path) -> None:
    theirs = peft.get_peft_model(
        base(), peft.LoraConfig(r=2, lora_alpha=6, target_modules=["self_attn.q", "ffn.0"], init_lora_weights=False)
    )
    theirs.save_pretrained(str(tmp_path / "theirs"))
    ours = base()
    load_adapter(ours, "style", tmp_path / "theirs")
    with torch.no_grad():
        assert torch.equal(adapted("style", ours), velocity(theirs.base_model.model))
        assert not torch.equal(adapted(None, ours), velocity(theirs.base_model.model))


def diffusers_network(folder: Path) -> diffusers.WanTransformer3DModel:
    """With the weights of a network here, through diffusers' own loader."""
    return diffusers.WanTransformer3DModel.from_pretrained(folder)


def their_velocity(model: diffusers.WanTransformer3DModel) -> Tensor:
    with torch.no_grad():
        (made,) = model.eval()(LATENTS.transpose(1, 2), torch.tensor([TIMESTEP]), PROMPTS, return_dict=False)
    return made.transpose(1, 2)


@either
def test_diffusers_loads_the_adapter_and_the_merged_network(network: CausalWan, tmp_path: Path, name: str) -> None:
    """Without our metadata alpha would be taken for the rank, and half of the adapter be missing."""
    save_weights(base().state_dict(), CONFIG, tmp_path / "base", naming="diffusers")
    write_lora(tmp_path / "lora", network, name, LoRAFormat(), config=RUN, step=7, naming="diffusers")
    expected = adapted(name, network)
    theirs = diffusers_network(tmp_path / "base")
    torch.testing.assert_close(their_velocity(theirs), adapted(None, network), rtol=0, atol=1e-5)
    theirs.load_lora_adapter(str(tmp_path / "lora"), weight_name=DIFFUSERS_FILE)
    torch.testing.assert_close(their_velocity(theirs), expected, rtol=0, atol=1e-5)
    assert (expected - adapted(None, network)).abs().max() > 0.05
    as_pipeline, metadata = diffusers.WanPipeline.lora_state_dict(str(tmp_path / "lora"), return_lora_metadata=True)
    assert_same(as_pipeline, load_file(tmp_path / "lora" / DIFFUSERS_FILE))
    assert (metadata["transformer.r"], metadata["transformer.lora_alpha"]) == ((4, 8) if name == "student" else (2, 2))

    student = base()
    load_adapter(student, "student", tmp_path / "lora")
    merge_adapter(student, "student")
    path = tmp_path / "merged.safetensors"
    write_export(path, CONFIG, student.state_dict(), CastFormat("fp32"), config=RUN, step=7, naming="diffusers")
    merged = diffusers_network(tmp_path / "base")
    merged.load_state_dict(load_file(path))
    torch.testing.assert_close(their_velocity(merged), expected, rtol=0, atol=1e-5)


@either
def test_a_file_of_diffusers_loads_here(network: CausalWan, tmp_path: Path, name: str) -> None:
    """With its metadata; and as other programs write it, without: alpha is the rank."""
    save_adapter(network, name, tmp_path / "ours", naming="diffusers")
    save_weights(base().state_dict(), CONFIG, tmp_path / "base", naming="diffusers")
    theirs = diffusers_network(tmp_path / "base")
    theirs.load_lora_adapter(str(tmp_path / "ours"), weight_name=DIFFUSERS_FILE, adapter_name="style")
    state = peft.get_peft_model_state_dict(theirs, adapter_name="style")
    diffusers.WanPipeline.save_lora_weights(
        str(tmp_path / "pipeline"),
        transformer_lora_layers=state,
        transformer_lora_adapter_metadata=theirs.peft_config["style"].to_dict(),
    )
    again = base()
    load_adapter(again, "style", tmp_path / "pipeline")
    assert torch.equal(adapted("style", again), adapted(name, network))
    save_file(load_file(tmp_path / "pipeline" / DIFFUSERS_FILE), tmp_path / "bare.safetensors")
    load_adapter(again, "bare", tmp_path / "bare.safetensors")
    assert_same(adapter_state(again, "bare"), adapter_state(network, name))
    assert again.blocks[0].ffn[0].scaling == {"style": 2.0 if name == "student" else 1.0, "bare": 1.0}


@pytest.mark.parametrize("naming", ["original", "diffusers"])
def test_an_exported_adapter_says_of_which_run_it_is(network: CausalWan, tmp_path: Path, naming: str) -> None:
    """And what another program wrote says nothing."""
    folder = tmp_path / "lora"
    summary = write_lora(folder, network, "student", LoRAFormat("bf16"), config=RUN, step=7, naming=naming)
    run = run_of_adapter(folder)
    assert run is not None
    assert (run.format, run.naming, run.step, run.config) == ("lora", naming, 7, RUN)
    assert run_of_adapter(find_adapter(folder)) == run
    assert summary.num_parameters == 2 * 4 * (8 * (32 + 32) + 2 * (32 + 64))
    assert summary.tensors == {"bfloat16": 40}
    assert summary.tensor_bytes == {"bfloat16": 2 * summary.num_parameters}
    save_adapter(network, "student", tmp_path / "plain", naming=naming)
    assert run_of_adapter(tmp_path / "plain") is None


def test_what_cannot_be_read_or_written_is_refused(network: CausalWan, tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    for output, naming, message in (
        ("there", "original", "there exists, and nothing is overwritten"),
        (
            "lora.safetensors",
            "original",
            r"lora\.safetensors must not end in \.safetensors: format=lora writes a folder",
        ),
        ("lora", "peft", "naming='peft': format=lora has the names of original or diffusers"),
    ):
        with pytest.raises(ValueError, match=message):
            check_lora_export(tmp_path / output, naming)
    with pytest.raises(ValueError, match="dtype='fp16' is unknown; use bf16 or fp32"):
        LoRAFormat("fp16")
    with pytest.raises(ValueError, match=r"there has no adapter_model\.safetensors and no pytorch_lora_weights\.safe"):
        find_adapter(tmp_path / "there")

    target = base()
    save_adapter(network, "student", tmp_path / "student")
    stored = tmp_path / "student" / "adapter_config.json"
    config = json.loads(stored.read_text())
    for changes, message in (({"use_dora": True}, "use_dora"), ({"r": 8}, "does not fit"), (None, "adapter_config")):
        stored.unlink()
        if changes is not None:
            stored.write_text(json.dumps(config | changes))
        with pytest.raises(ValueError, match=message):
            load_adapter(target, "student", tmp_path / "student")
    save_adapter(network, "student", tmp_path / "diffusers", naming="diffusers")
    with safe_open(tmp_path / "diffusers" / DIFFUSERS_FILE, framework="pt") as file:
        about = json.loads(file.metadata()["lora_adapter_metadata"]) | {"transformer.use_rslora": True}
    tensors = load_file(tmp_path / "diffusers" / DIFFUSERS_FILE)
    save_file(tensors, tmp_path / "other.safetensors", metadata={"lora_adapter_metadata": json.dumps(about)})
    with pytest.raises(ValueError, match=r"other\.safetensors sets use_rslora; only plain LoRA"):
        load_adapter(target, "student", tmp_path / "other.safetensors")
    assert adapter_names(target) == []
