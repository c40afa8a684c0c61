"""Weights on disk: both namings, shards, and refusals that name what differs."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from longlive.models.wan.config import WanConfig
from longlive.models.wan.model import CausalWan
from longlive.models.wan.weights import (
    diffusers_name,
    load_wan,
    load_weights,
    original_name,
    save_weights,
    stored_weights,
)

CONFIG = WanConfig.tiny(num_layers=2, dim=24, ffn_dim=32, num_heads=2, in_channels=4, out_channels=4, text_dim=8)


def random_tensors(seed=0):
    g = torch.Generator().manual_seed(seed)
    model = CausalWan(CONFIG)
    return {name: torch.randn(tensor.shape, generator=g) for name, tensor in model.state_dict().items()}


def assert_holds(model, tensors):
    state = model.state_dict()
    assert list(state) == list(tensors)
    assert all(torch.equal(state[name], tensor) for name, tensor in tensors.items())


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ("patch_embedding.weight", "patch_embedding.weight"),
        ("text_embedding.2.bias", "condition_embedder.text_embedder.linear_2.bias"),
        ("time_embedding.0.weight", "condition_embedder.time_embedder.linear_1.weight"),
        ("time_projection.1.weight", "condition_embedder.time_proj.weight"),
        ("blocks.7.self_attn.q.weight", "blocks.7.attn1.to_q.weight"),
        ("blocks.7.self_attn.o.bias", "blocks.7.attn1.to_out.0.bias"),
        ("blocks.29.cross_attn.norm_k.weight", "blocks.29.attn2.norm_k.weight"),
        ("blocks.0.norm3.bias", "blocks.0.norm2.bias"),
        ("blocks.0.ffn.0.weight", "blocks.0.ffn.net.0.proj.weight"),
        ("blocks.0.ffn.2.weight", "blocks.0.ffn.net.2.weight"),
        ("blocks.0.modulation", "blocks.0.scale_shift_table"),
        ("head.modulation", "scale_shift_table"),
        ("head.head.weight", "proj_out.weight"),
    ],
)
def test_names_are_translated_both_ways(ours, theirs):
    assert diffusers_name(ours) == theirs
    assert original_name(theirs) == ours


def test_the_825_names_of_the_5b_map_one_to_one():
    with torch.device("meta"):
        names = list(CausalWan(WanConfig.ti2v_5b()).state_dict())
    theirs = {diffusers_name(name) for name in names}
    assert len(theirs) == 825
    assert [original_name(diffusers_name(name)) for name in names] == names
    assert [original_name(name) for name in names] == names


@pytest.mark.parametrize("naming", ["original", "diffusers"])
@pytest.mark.parametrize("max_shard_bytes", [25_000, 5_000_000_000], ids=["shards", "one_file"])
def test_weights_survive_a_round_trip(naming, max_shard_bytes, tmp_path):
    tensors = random_tensors()
    save_weights(tensors, CONFIG, tmp_path / "wan", naming=naming, max_shard_bytes=max_shard_bytes)
    assert_holds(load_wan(tmp_path / "wan"), tensors)
    assert not (tmp_path / "wan.partial").exists()


def test_shards_stay_below_their_limit_and_are_indexed(tmp_path):
    save_weights(random_tensors(), CONFIG, tmp_path / "wan", naming="diffusers", max_shard_bytes=25_000)
    index = json.loads((tmp_path / "wan" / "diffusion_pytorch_model.safetensors.index.json").read_text())
    files = sorted((tmp_path / "wan").glob("*.safetensors"))
    assert len(files) > 2
    assert files[0].name == f"diffusion_pytorch_model-00001-of-{len(files):05d}.safetensors"
    stored = {name: file.name for file in files for name in load_file(file)}
    assert stored == index["weight_map"]
    sizes = [sum(tensor.nbytes for tensor in load_file(file).values()) for file in files]
    assert index["metadata"]["total_size"] == sum(sizes)
    assert max(sizes) <= 25_000


def test_a_built_network_is_overwritten_in_place(tmp_path):
    """Catches parameters replaced under an optimizer, which would go on training the old ones."""
    tensors = random_tensors()
    save_weights(tensors, CONFIG, tmp_path / "wan")
    model = CausalWan(CONFIG)
    parameters = dict(model.named_parameters())
    load_weights(model, tmp_path / "wan")
    assert all(parameter is parameters[name] for name, parameter in model.named_parameters())
    assert_holds(model, tensors)


def test_a_part_of_a_tensor_can_be_read_alone(tmp_path):
    """What sharded loading stands on: rows, no rows and everything, under the network's names."""
    tensors = random_tensors()
    save_weights(tensors, CONFIG, tmp_path / "wan", naming="diffusers", max_shard_bytes=25_000)
    with torch.device("meta"):
        model = CausalWan(CONFIG)
    names = []
    for name, stored in stored_weights(model, tmp_path / "wan"):
        names.append(name)
        rows = tensors[name].shape[0]
        for where in ((slice(rows // 3, rows - 1),), (slice(rows, rows),), ()):
            assert torch.equal(stored[where], tensors[name][where])
    assert sorted(names) == sorted(tensors)


def test_weights_are_checked_before_the_first_is_asked_for(tmp_path):
    """Catches a check that runs with the first tensor, after the network has lost its own."""
    save_file({"head.head.bias": torch.zeros(16)}, tmp_path / "wan.safetensors")
    with pytest.raises(ValueError, match="does not fit the network"):
        stored_weights(CausalWan(CONFIG), tmp_path / "wan.safetensors")


def test_one_file_loads_without_its_folder(tmp_path):
    tensors = random_tensors()
    save_file({diffusers_name(name): tensor for name, tensor in tensors.items()}, tmp_path / "any.safetensors")
    with torch.device("meta"):
        model = CausalWan(CONFIG)
    load_weights(model, tmp_path / "any.safetensors")
    assert_holds(model, tensors)


def test_weights_are_stored_and_loaded_in_the_dtype_asked_for(tmp_path):
    save_weights(random_tensors(), CONFIG, tmp_path / "wan", dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in load_wan(tmp_path / "wan").parameters()} == {torch.bfloat16}
    as_float32 = load_wan(tmp_path / "wan", dtype=torch.float32)
    assert {parameter.dtype for parameter in as_float32.parameters()} == {torch.float32}


def test_other_weights_are_refused_by_name_before_anything_changes(tmp_path):
    tensors = random_tensors()
    changed = {name: tensor for name, tensor in tensors.items() if not name.startswith("blocks.1.")}
    changed["head.head.weight"] = torch.zeros(3, 24)
    changed["blocks.9.extra"] = torch.zeros(1)
    save_file(changed, tmp_path / "wan.safetensors")
    model = CausalWan(CONFIG)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match="does not fit the network") as raised:
        load_weights(model, tmp_path / "wan.safetensors")
    message = str(raised.value)
    assert "missing: blocks.1.modulation, blocks.1.self_attn.q.weight" in message
    assert "1 unexpected: blocks.9.extra" in message
    assert "1 of another shape: head.head.weight [3, 24] instead of [16, 24]" in message
    assert_holds(model, before)


def test_tensors_of_another_config_are_not_saved(tmp_path):
    with pytest.raises(ValueError, match="to save does not fit"):
        save_weights(random_tensors(), WanConfig.tiny(), tmp_path / "wan")
    assert not (tmp_path / "wan").exists()


def test_existing_weights_are_never_overwritten(tmp_path):
    save_weights(random_tensors(), CONFIG, tmp_path / "wan")
    with pytest.raises(ValueError, match="weights never overwrite"):
        save_weights(random_tensors(seed=1), CONFIG, tmp_path / "wan")
    assert_holds(load_wan(tmp_path / "wan"), random_tensors())


def test_an_incomplete_download_names_what_is_missing(tmp_path):
    save_weights(random_tensors(), CONFIG, tmp_path / "wan", max_shard_bytes=25_000)
    victim = sorted((tmp_path / "wan").glob("*.safetensors"))[1]
    victim.unlink()
    with pytest.raises(ValueError, match=f"lacks {victim.name}"):
        load_wan(tmp_path / "wan")


def test_a_folder_without_weights_is_refused(tmp_path):
    CONFIG.to_json(tmp_path / "config.json")
    with pytest.raises(
        ValueError, match=r"no Wan weights: looked for \*\.safetensors, transformer/\*\.safetensors, \*\.pt"
    ):
        load_wan(tmp_path)


def save_as_longlive(tensors, path, state="generator", prefix="model.", **others):
    """A trainer's checkpoint: one state among others, its names with the trainer's prefix."""
    torch.save({state: {f"{prefix}{name}": tensor for name, tensor in tensors.items()}, "step": 600, **others}, path)
    return path


@pytest.mark.parametrize("state", ["generator", "generator_ema", "model"])
@pytest.mark.parametrize("prefix", ["", "model.", "model._fsdp_wrapped_module."])
def test_a_longlive_file_loads(state, prefix, tmp_path):
    tensors = random_tensors()
    model = CausalWan(CONFIG)
    load_weights(model, save_as_longlive(tensors, tmp_path / "model.pt", state, prefix))
    assert_holds(model, tensors)


@pytest.mark.parametrize("source", ["original", "diffusers", "longlive"])
def test_from_every_name_to_every_other(source, tmp_path):
    tensors, path = random_tensors(), tmp_path / "source"
    if source == "longlive":
        path = save_as_longlive(tensors, tmp_path / "model.pt")
    else:
        save_weights(tensors, CONFIG, path, source)
    model = CausalWan(CONFIG)
    load_weights(model, path)
    for naming in ("original", "diffusers"):
        save_weights(model.state_dict(), CONFIG, tmp_path / naming, naming)
        stored = load_file(tmp_path / naming / "diffusion_pytorch_model.safetensors")
        names = {name: diffusers_name(name) if naming == "diffusers" else name for name in tensors}
        assert {names[name] for name in tensors} == set(stored)
        assert all(torch.equal(stored[names[name]], tensor) for name, tensor in tensors.items())


def test_wrappers_inside_a_name_are_no_part_of_it(tmp_path):
    tensors = random_tensors()
    wrapped = {
        name.replace("blocks.1.", "blocks.1._checkpoint_wrapped_module._fsdp_wrapped_module."): tensor
        for name, tensor in tensors.items()
    }
    model = CausalWan(CONFIG)
    load_weights(model, save_as_longlive(wrapped, tmp_path / "model.pt", prefix="_orig_mod.model."))
    assert_holds(model, tensors)


def test_of_two_states_the_average_is_taken_and_said(tmp_path, caplog):
    average, latest = random_tensors(seed=0), random_tensors(seed=1)
    path = save_as_longlive(average, tmp_path / "model.pt", "generator_ema", generator=latest)
    model = CausalWan(CONFIG)
    with caplog.at_level("INFO", logger="longlive"):
        load_weights(model, path)
    assert_holds(model, average)
    assert f"{path}: taking generator_ema" in caplog.text


def test_a_file_of_tensors_alone_loads_in_either_naming(tmp_path):
    tensors = random_tensors()
    torch.save({diffusers_name(name): tensor for name, tensor in tensors.items()}, tmp_path / "wan.pt")
    model = CausalWan(CONFIG)
    load_weights(model, tmp_path)
    assert_holds(model, tensors)


def test_what_is_loaded_from_a_mapped_file_is_no_part_of_it(tmp_path):
    """A network whose weights are the file's own pages would lose them with the file."""
    tensors = random_tensors()
    path = save_as_longlive(tensors, tmp_path / "model.pt")
    with torch.device("meta"):
        model = CausalWan(CONFIG)
    load_weights(model, path)
    with path.open("r+b") as file:
        file.write(bytes(path.stat().st_size))
    assert_holds(model, tensors)


@pytest.mark.parametrize("layout", ["wan", "diffusers"])
def test_a_whole_download_is_enough(layout, tmp_path):
    """Beside the network lie other models, in folders and in PyTorch files of their own."""
    tensors = random_tensors()
    if layout == "wan":
        save_weights(tensors, CONFIG, tmp_path / "all", "original", max_shard_bytes=25_000)
        torch.save({"encoder.conv1.weight": torch.zeros(1)}, tmp_path / "all" / "Wan2.2_VAE.pth")
    else:
        save_weights(tensors, CONFIG, tmp_path / "all" / "transformer", "diffusers", max_shard_bytes=25_000)
        (tmp_path / "all" / "vae").mkdir()
        save_file({"encoder.conv_in.weight": torch.zeros(1)}, tmp_path / "all" / "vae" / "model.safetensors")
    model = CausalWan(CONFIG)
    load_weights(model, tmp_path / "all")
    assert_holds(model, tensors)


def test_the_index_of_shards_is_enough(tmp_path):
    tensors = random_tensors()
    save_weights(tensors, CONFIG, tmp_path / "wan", max_shard_bytes=25_000)
    model = CausalWan(CONFIG)
    load_weights(model, tmp_path / "wan" / "diffusion_pytorch_model.safetensors.index.json")
    assert_holds(model, tensors)


def test_a_longlive_file_of_another_network_is_refused_by_name(tmp_path):
    tensors = random_tensors()
    tensors["head.head.weight_packed"] = tensors.pop("head.head.weight")
    path = save_as_longlive(tensors, tmp_path / "model.pt")
    with pytest.raises(ValueError, match=r"1 missing: head\.head\.weight; 1 unexpected: head\.head\.weight_packed"):
        stored_weights(CausalWan(CONFIG), path)


@pytest.mark.parametrize("state", ["generator_lora", "generator"])
def test_an_adapter_is_no_network(state, tmp_path):
    tensors = {"base_model.model.blocks.0.ffn.0.lora_A.weight": torch.zeros(4, 24)}
    with pytest.raises(ValueError, match=r"holds a LoRA, not a network.*load_longlive_adapter"):
        load_weights(CausalWan(CONFIG), save_as_longlive(tensors, tmp_path / "lora.pt", state, prefix=""))
