"""LoRA in the files of LongLive's trainers: a PyTorch file with peft's state under `generator_lora` (the critic's under
`critic_lora`), or that state alone.

Names are peft's, below the network; FSDP's wrappers may be between. The rank is a dimension of every tensor. alpha is
in no file: LongLive's configs have always set it to the rank (128 for LongLive-2.0, 256 for LongLive-1.0), so that the
product is not scaled, and so it is here unless it is given.

`save_adapter` writes what was loaded as a folder of peft's, which says its alpha.
"""

from __future__ import annotations

from pathlib import Path

from torch import nn

from longlive.adapters.lora import PREFIX, add_stored_adapter
from longlive.data.weight_files import TensorFiles

STUDENT_STATE, CRITIC_STATE = "generator_lora", "critic_lora"


def load_longlive_adapter(
    network: nn.Module, name: str, file: str | Path, alpha: int | None = None, state: str = STUDENT_STATE
) -> None:
    """Add the adapter of a LongLive file to its base.

    Args:
        network: the base that the adapter was trained on.
        name: of the adapter here.
        file: PyTorch's, or safetensors.
        alpha: None: the adapter's rank.
        state: `generator_lora` or `critic_lora`, in a file that holds both.

    Raises:
        ValueError: if the file cannot be read, holds no LoRA of one rank, or one of another network; the network is
            untouched then.
    """
    files = TensorFiles.open([Path(file)], (state,))
    tensors = {PREFIX + _name_in_network(key): tensor for key, tensor in files}
    ranks = {shape[0] for key, shape in files.shapes.items() if ".lora_A." in key}
    if len(ranks) != 1:
        found = f"ranks {sorted(ranks)}" if ranks else f"no lora_A among {', '.join(list(files.shapes)[:4])}"
        raise ValueError(f"{file} has {found}; only plain LoRA of one rank is supported")
    (rank,) = ranks
    whole = {key: tensor[()] for key, tensor in tensors.items()}
    add_stored_adapter(network, name, whole, rank, rank if alpha is None else alpha, str(file))


def _name_in_network(key: str) -> str:
    """Without what peft and the trainer put before and into it."""
    return key.removeprefix(PREFIX).removeprefix("model.").replace(".default.weight", ".weight")
