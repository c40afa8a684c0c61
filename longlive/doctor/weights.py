"""`longlive doctor weights <path>`: what a downloaded folder or file holds, and which setting it fits.

Files are recognised by what is in them, not by what they are called. Nothing but names, shapes and dtypes is read, so
a folder of 30 GB takes a second. What fits nothing is compared with Wan2.2-TI2V-5B, and the differences are named; the
exit code is then 1.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from longlive.adapters.longlive_lora import CRITIC_STATE
from longlive.codecs.wan import WanVideoCodec
from longlive.codecs.wan_weights import ORIGINAL_FILE, diffusers_name
from longlive.config import compose, config_directory, instantiate
from longlive.data.weight_files import INDEX, SAFETENSORS, TensorFiles, check_tensors, find_files
from longlive.models.wan.config import WanConfig
from longlive.models.wan.model import CausalWan
from longlive.models.wan.weights import PLACES, STATES, check_weights
from longlive.text.umt5_weights import ORIGINAL_FILES, open_original

FOLDERS = (*PLACES, ORIGINAL_FILE, f"vae/*{SAFETENSORS}", ORIGINAL_FILES, f"text_encoder/*{SAFETENSORS}")
"""Where a folder is looked into."""


@dataclass(frozen=True)
class Part:
    """One set of tensors.

    Attributes:
        kind: network, adapter, codec, text encoder, or unknown.
        files: their names, below the path that was asked about.
        names: whose names the tensors have.
        num_tensors, num_parameters: how many.
        dtypes: tensors by dtype.
        fits: the setting that takes them; None: none does.
        detail: why not, or what else is known.
    """

    kind: str
    files: tuple[str, ...]
    names: str
    num_tensors: int
    num_parameters: int
    dtypes: dict[str, int]
    fits: str | None
    detail: str


def main(arguments: Sequence[str]) -> int:
    """Print what a path holds, with `--json` as JSON.

    Returns:
        0; 1 if there is nothing, or something that fits no setting.
    """
    parser = argparse.ArgumentParser(
        prog="longlive doctor weights",
        description="What a downloaded folder or file of Wan, diffusers or LongLive holds, and which setting takes it",
    )
    parser.add_argument("path", help="a folder or a file")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    options = parser.parse_args(arguments)
    try:
        parts = list(parts_of(Path(options.path)))
    except ValueError as error:
        print(f"longlive doctor weights: {error}", file=sys.stderr)
        return 1
    if options.json:
        print(json.dumps([asdict(part) for part in parts], indent=2))
    else:
        print_parts(parts, Console())
    return int(any(part.fits is None for part in parts))


def parts_of(path: Path) -> Iterator[Part]:
    """Everything in a folder or a file.

    Raises:
        ValueError: if there is nothing, or a file cannot be read.
    """
    root = path if path.is_dir() else path.parent
    for files in _groups(path):
        tensors = TensorFiles.open(files, (*STATES, CRITIC_STATE))
        kind, names = _recognise(tensors)
        fits, detail = _fit(kind, tensors, path)
        if tensors.state is not None:
            detail = f"under {tensors.state}{'; ' if detail else ''}{detail}"
        yield Part(
            kind,
            tuple(str(file.relative_to(root)) for file in files),
            names,
            len(tensors.shapes),
            sum(math.prod(shape) for shape in tensors.shapes.values()),
            dict(Counter(tensors.dtypes.values())),
            fits,
            detail,
        )


def print_parts(parts: Sequence[Part], console: Console) -> None:
    """A row per set of tensors; below, where each is and what else is to be said of it."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in ("what", "names", "tensors", "parameters", "dtype", "fits"):
        table.add_column(heading, justify="right" if heading in ("tensors", "parameters") else "left", overflow="fold")
    for part in parts:
        fits = Text("nothing", style="red") if part.fits is None else Text(part.fits, style="green")
        table.add_row(
            part.kind, part.names, f"{part.num_tensors:,}", f"{part.num_parameters:,}", ", ".join(part.dtypes), fits
        )
    console.print(table)
    for part in parts:
        files = part.files[0] + (f" and {len(part.files) - 1} more" if part.files[1:] else "")
        console.print(Text(f"{files}: {part.kind}{'; ' if part.detail else ''}{part.detail}"), soft_wrap=True)


def _groups(path: Path) -> Iterator[list[Path]]:
    """Files that belong together."""
    if not path.is_dir():
        yield find_files(path, (), "weights")
        return
    found = False
    for place in FOLDERS:
        files = sorted(path.glob(place))
        indexed = place.endswith(SAFETENSORS) and any(path.glob(place.replace(SAFETENSORS, INDEX)))
        for group in [find_files(path, (place,), "weights")] if indexed else [[file] for file in files]:
            found = True
            yield group
    if not found:
        find_files(path, FOLDERS, "weights")


def _recognise(tensors: TensorFiles) -> tuple[str, str]:
    """What it is, and whose names it has, by tensors that nothing else has."""
    if any(".lora_A." in name for name in tensors.shapes):
        return "adapter", "peft"
    for kind, names, tensor in (
        ("network", "Wan", "head.modulation"),
        ("network", "diffusers", "condition_embedder.time_proj.weight"),
        ("codec", "Wan", "encoder.conv1.weight"),
        ("codec", "diffusers", "encoder.conv_in.weight"),
        ("text encoder", "Wan", "token_embedding.weight"),
        ("text encoder", "transformers", "shared.weight"),
        ("text encoder", "transformers", "encoder.embed_tokens.weight"),
    ):
        if tensor in tensors.shapes:
            return kind, names
    return "unknown", "unknown"


def _fit(kind: str, tensors: TensorFiles, path: Path) -> tuple[str | None, str]:
    try:
        if kind == "network":
            return _fitting_model(tensors, path), ""
        if kind == "adapter":
            downs = [shape for name, shape in tensors.shapes.items() if ".lora_A." in name]
            ranks = ", ".join(str(rank) for rank in sorted({shape[0] for shape in downs}))
            return "load_longlive_adapter", f"rank {ranks}, {len(downs)} layers"
        if kind == "codec":
            with torch.device("meta"):
                wanted = WanVideoCodec.ti2v_5b().autoencoder.state_dict()
            stored = {diffusers_name(name): shape for name, shape in tensors.shapes.items()}
            check_tensors(stored, {name: tuple(tensor.shape) for name, tensor in wanted.items()}, path)
            return "codec=wan", ""
        if kind == "text encoder":
            if "token_embedding.weight" in tensors.shapes:
                open_original(tensors.files[0])
            embedding = next(shape for name, shape in tensors.shapes.items() if name.split(".")[-2] in _EMBEDDINGS)
            return "text=umt5", f"embeddings of {embedding[1]} features: model.text_dim={embedding[1]}"
    except ValueError as error:
        return None, str(error)
    return None, f"first tensors: {', '.join(list(tensors.shapes)[:4])}"


_EMBEDDINGS = ("token_embedding", "shared", "embed_tokens")


def _fitting_model(tensors: TensorFiles, path: Path) -> str:
    """The option of `model`, or the sizes in the `config.json` beside the weights.

    Raises:
        ValueError: if there is none.
    """
    for name in sorted(file.stem for file in (config_directory() / "model").glob("*.yaml")):
        if _fits(instantiate(compose("train", [f"model={name}"]).model), tensors, path):
            return f"model={name}"
    described = tensors.files[0].parent / "config.json"
    config = WanConfig.from_json(described) if described.is_file() else WanConfig.ti2v_5b()
    with torch.device("meta"):
        network = CausalWan(config)
    check_weights(network, tensors, path)
    return " ".join(f"model.{key}={getattr(config, key)}" for key in ("num_layers", "dim", "ffn_dim", "num_heads"))


def _fits(config: WanConfig, tensors: TensorFiles, path: Path) -> bool:
    with torch.device("meta"):
        network = CausalWan(config)
    try:
        check_weights(network, tensors, path)
    except ValueError:
        return False
    return True
