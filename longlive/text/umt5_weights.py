"""The UMT5 encoder as Wan published it, `models_t5_umt5-xxl-enc-bf16.pth`: what transformers calls its tensors.

The tensors are the same, shape by shape; names correspond one to one, 242 for UMT5-XXL (transformers has a 243rd, a
second name of the token embedding). The feed-forward multiplies two projections, `wo(gelu(wi_0 x) * wi_1 x)`; Wan calls
them `gate.0` and `fc1`, and a swap of the two would fit every shape.

The file has no configuration, and needs none: every size is a dimension of some tensor, and the rest (tanh GELU, eps
1e-6, distances up to 128) is what UMT5 is.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from transformers import UMT5Config, UMT5EncoderModel

from longlive.data.weight_files import TensorFiles, check_tensors

ORIGINAL_FILES = "models_t5_*.pth"

_TOP_NAMES = {"token_embedding": "shared", "norm": "encoder.final_layer_norm"}
_BLOCK_NAMES = {
    "norm1": "layer.0.layer_norm",
    "attn.q": "layer.0.SelfAttention.q",
    "attn.k": "layer.0.SelfAttention.k",
    "attn.v": "layer.0.SelfAttention.v",
    "attn.o": "layer.0.SelfAttention.o",
    "pos_embedding.embedding": "layer.0.SelfAttention.relative_attention_bias",
    "norm2": "layer.1.layer_norm",
    "ffn.gate.0": "layer.1.DenseReluDense.wi_0",
    "ffn.fc1": "layer.1.DenseReluDense.wi_1",
    "ffn.fc2": "layer.1.DenseReluDense.wo",
}
_PARTS = re.compile(r"(?:blocks\.(?P<block>\d+)\.)?(?P<module>.+)\.weight")
_SECOND_NAME = "encoder.embed_tokens.weight"


def transformers_name(name: str) -> str:
    """transformers' name of a tensor of Wan's file. Names that it does not have stay."""
    match = _PARTS.fullmatch(name)
    if match is None:
        return name
    if match["block"] is None:
        return f"{_TOP_NAMES[match['module']]}.weight" if match["module"] in _TOP_NAMES else name
    module = _BLOCK_NAMES.get(match["module"])
    return name if module is None else f"encoder.block.{match['block']}.{module}.weight"


def config_of(shapes: Mapping[str, Sequence[int]], source: object) -> UMT5Config:
    """The configuration that belongs to tensors, by Wan's names.

    Raises:
        ValueError: if one that fixes a size is missing; `source` is what to call the file.
    """
    looked_for = {
        "token_embedding.weight": 2,
        "blocks.0.attn.q.weight": 2,
        "blocks.0.ffn.fc1.weight": 2,
        "blocks.0.pos_embedding.embedding.weight": 2,
    }
    missing = [name for name, num_dims in looked_for.items() if len(shapes.get(name, ())) != num_dims]
    if missing:
        raise ValueError(
            f"{source} is no UMT5 encoder in Wan's names: it has no matrix {', '.join(missing)}, but "
            f"{', '.join(list(shapes)[:4])}, ...; use models_t5_umt5-xxl-enc-bf16.pth of Wan2.2-TI2V-5B"
        )
    embedding, query, hidden, bias = (shapes[name] for name in looked_for)
    blocks = {match["block"] for match in map(_PARTS.fullmatch, shapes) if match is not None and match["block"]}
    return UMT5Config(
        vocab_size=embedding[0],
        d_model=embedding[1],
        d_kv=query[0] // bias[1],
        d_ff=hidden[0],
        num_layers=len(blocks),
        num_heads=bias[1],
        relative_attention_num_buckets=bias[0],
        feed_forward_proj="gated-gelu",
        layer_norm_epsilon=1e-6,
        relative_attention_max_distance=128,
    )


def open_original(file: str | Path) -> tuple[TensorFiles, UMT5Config]:
    """What a file in Wan's names holds, none of it read yet.

    Raises:
        ValueError: if it cannot be read, or is no whole UMT5 encoder.
    """
    files = TensorFiles.open([Path(file)], ("model", "state_dict"))
    config = config_of(files.shapes, file)
    with torch.device("meta"):
        wanted = {name: tuple(tensor.shape) for name, tensor in UMT5EncoderModel(config).state_dict().items()}
    del wanted[_SECOND_NAME]
    stored = {transformers_name(name): shape for name, shape in files.shapes.items()}
    check_tensors(stored, wanted, file, "Download it again")
    return files, config


def load_original(file: str | Path, dtype: torch.dtype) -> UMT5EncoderModel:
    """The encoder of a file in Wan's names.

    Raises:
        ValueError: as `open_original`.
    """
    files, config = open_original(file)
    with torch.device("meta"):
        model = UMT5EncoderModel(config)
    state = {transformers_name(name): tensor[()].to(dtype) for name, tensor in files}
    model.load_state_dict(state | {_SECOND_NAME: state["shared.weight"]}, assign=True)
    model.set_input_embeddings(model.shared)
    return model.eval()
