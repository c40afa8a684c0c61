"""`longlive doctor weights`: what lies in a download, by content."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

from longlive import doctor
from longlive.codecs.wan import WanVideoCodec
from longlive.models.wan.config import WanConfig
from longlive.models.wan.model import CausalWan
from longlive.models.wan.weights import save_weights


def zeros(config: WanConfig) -> dict[str, torch.Tensor]:
    with torch.device("meta"):
        network = CausalWan(config)
    return {name: torch.zeros(1).expand(tensor.shape) for name, tensor in network.state_dict().items()}


def run(path, capsys, *, code: int):
    assert doctor.main(["weights", str(path), "--json"]) == code
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("naming", ["original", "diffusers"])
def test_a_network_is_recognised_with_its_option_and_its_names(naming, tmp_path, capsys):
    folder = tmp_path / "all" / ("transformer" if naming == "diffusers" else "")
    save_weights(zeros(WanConfig.tiny()), WanConfig.tiny(), folder, naming, torch.bfloat16, max_shard_bytes=2_000_000)
    (part,) = run(tmp_path / "all", capsys, code=0)
    assert (part["kind"], part["fits"], part["names"]) == (
        "network", "model=tiny", {"original": "Wan", "diffusers": "diffusers"}[naming]
    )  # fmt: skip
    assert part["num_tensors"] == sum(part["dtypes"].values()) == len(zeros(WanConfig.tiny()))
    assert part["dtypes"] == {"bfloat16": part["num_tensors"]}
    assert part["num_parameters"] == sum(tensor.numel() for tensor in zeros(WanConfig.tiny()).values())
    assert len(part["files"]) == 2


def test_sizes_without_an_option_come_from_the_config_beside_them(tmp_path, capsys):
    config = WanConfig.tiny(num_layers=1, dim=24, ffn_dim=32, num_heads=2)
    save_weights(zeros(config), config, tmp_path / "wan")
    assert run(tmp_path / "wan", capsys, code=0)[0]["fits"] == (
        "model.num_layers=1 model.dim=24 model.ffn_dim=32 model.num_heads=2"
    )
    (tmp_path / "wan" / "config.json").unlink()
    (part,) = run(tmp_path / "wan", capsys, code=1)
    assert part["fits"] is None
    assert "blocks.1.modulation" in part["detail"]
    assert "instead of [3072, 48, 1, 2, 2]" in part["detail"]


def test_everything_in_a_folder_is_listed(tmp_path, capsys):
    adapter = {"base_model.model.blocks.0.ffn.0.lora_A.weight": torch.zeros(4, 24)}
    torch.save({"generator_lora": adapter}, tmp_path / "lora.pt")
    torch.save({"a": torch.zeros(3)}, tmp_path / "other.pt")
    WanVideoCodec.tiny().autoencoder.save_pretrained(tmp_path / "vae")
    parts = {part["files"][0]: part for part in run(tmp_path, capsys, code=1)}
    lora, other, codec = parts["lora.pt"], parts["other.pt"], parts["vae/diffusion_pytorch_model.safetensors"]
    assert (lora["kind"], lora["detail"]) == ("adapter", "under generator_lora; rank 4, 1 layers")
    assert (other["kind"], other["detail"]) == ("unknown", "first tensors: a")
    assert (codec["kind"], codec["fits"]) == ("codec", None)
    assert "does not fit the network" in codec["detail"]


def test_the_table_names_everything_and_the_differences(tmp_path, capsys):
    save_file({"shared.weight": torch.zeros(8, 64)}, tmp_path / "model.safetensors")
    assert doctor.main(["weights", str(tmp_path / "model.safetensors")]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "text encoder transformers 1 512 float32 text=umt5" in text
    assert "model.safetensors: text encoder; embeddings of 64 features: model.text_dim=64" in text


def test_nothing_is_an_error_that_says_what_was_looked_for(tmp_path, capsys):
    assert doctor.main(["weights", str(tmp_path)]) == 1
    assert "holds no weights: looked for *.safetensors, transformer/*.safetensors, *.pt" in capsys.readouterr().err
    assert doctor.main(["weights", str(tmp_path / "nowhere")]) == 1
    assert "nowhere does not exist" in capsys.readouterr().err
