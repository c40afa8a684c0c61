"""Wan's codec as Wan published it, `Wan2.2_VAE.pth`: what diffusers calls its tensors.

The tensors are the same, shape by shape, and names correspond one to one, 196 for Wan2.2-TI2V-5B; the table below is
the whole difference. In Wan's names a level of the network is a sequence: its residual blocks, then what resamples.
diffusers numbers the blocks alone and gives resampling a name.

The file says nothing of the sizes and statistics that belong to it, so the caller does.
"""

from __future__ import annotations

import re
from pathlib import Path

import torch
from torch import nn

from longlive.data.weight_files import TensorFiles, check_tensors

ORIGINAL_FILE = "Wan2.2_VAE.pth"

_RULES = (
    (r"^conv1\.", "quant_conv."),
    (r"^conv2\.", "post_quant_conv."),
    (r"^(encoder|decoder)\.conv1\.", r"\1.conv_in."),
    (r"^(encoder|decoder)\.head\.0\.", r"\1.norm_out."),
    (r"^(encoder|decoder)\.head\.2\.", r"\1.conv_out."),
    (r"\.middle\.0\.", ".mid_block.resnets.0."),
    (r"\.middle\.1\.", ".mid_block.attentions.0."),
    (r"\.middle\.2\.", ".mid_block.resnets.1."),
    (r"\.downsamples\.(\d+)\.downsamples\.\d+\.(resample|time_conv)\.", r".down_blocks.\1.downsampler.\2."),
    (r"\.downsamples\.(\d+)\.downsamples\.(\d+)\.", r".down_blocks.\1.resnets.\2."),
    (r"\.upsamples\.(\d+)\.upsamples\.\d+\.(resample|time_conv)\.", r".up_blocks.\1.upsampler.\2."),
    (r"\.upsamples\.(\d+)\.upsamples\.(\d+)\.", r".up_blocks.\1.resnets.\2."),
    (r"\.residual\.0\.", ".norm1."),
    (r"\.residual\.2\.", ".conv1."),
    (r"\.residual\.3\.", ".norm2."),
    (r"\.residual\.6\.", ".conv2."),
    (r"\.shortcut\.", ".conv_shortcut."),
)


def diffusers_name(name: str) -> str:
    """diffusers' name of a tensor of `Wan2.2_VAE.pth`. Names that both share, or neither, stay."""
    for pattern, replacement in _RULES:
        name = re.sub(pattern, replacement, name)
    return name


def load_original(autoencoder: nn.Module, file: str | Path, dtype: torch.dtype) -> None:
    """Fill diffusers' autoencoder, built on meta, from a file in Wan's names (or diffusers').

    Args:
        autoencoder: of the sizes that belong to the file.
        file: PyTorch's or safetensors.
        dtype: of the weights.

    Raises:
        ValueError: if the file cannot be read, or names or shapes are not the autoencoder's; it is untouched then.
    """
    files = TensorFiles.open([Path(file)], ("model", "state_dict"))
    stored = {diffusers_name(name): shape for name, shape in files.shapes.items()}
    wanted = {name: tuple(tensor.shape) for name, tensor in autoencoder.state_dict().items()}
    check_tensors(stored, wanted, file, "Use the codec of Wan2.2-TI2V-5B")
    autoencoder.load_state_dict({diffusers_name(name): tensor[()].to(dtype) for name, tensor in files}, assign=True)
