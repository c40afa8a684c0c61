"""`longlive export`: the averaged weights of a run as one safetensors file, in one of the formats of `conf/format/`.

Of a run that trained an adapter, base and adapter are merged into one network; `format=lora` writes the adapter alone,
with `rank=` in a lower rank (`adapters/lora_truncation.py`).

`longlive generate checkpoint=<file>` rolls out from it as from the checkpoint. A new format is a class beside those of
`adapters/export.py` and a file in `conf/format/`.
"""

from __future__ import annotations

from pathlib import Path

from omegaconf import DictConfig
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from longlive.adapters.export import ExportFormat, ExportSummary, check_export, write_export
from longlive.adapters.lora import base_parameters
from longlive.adapters.lora_files import LoRAFormat, check_lora_export, write_lora
from longlive.adapters.lora_merging import merge_adapter
from longlive.adapters.lora_truncation import Truncation, add_truncated
from longlive.config import instantiate
from longlive.trained import load_trained

TRUNCATED = "truncated"
"""What the adapter of a lower rank is called in its network."""


def export(config: DictConfig) -> ExportSummary:
    """Run `conf/export.yaml` as composed; returns what it also prints.

    Raises:
        ValueError: if a setting is wrong, the file exists, or the checkpoint does not fit its own config; nothing is
            written then.
        FileNotFoundError: if there is no checkpoint.
    """
    output = Path(config.output)
    format: ExportFormat | LoRAFormat = instantiate(config.format)
    if isinstance(format, LoRAFormat):
        check_lora_export(output, config.naming, config.rank)
    else:
        check_export(output, format, config.naming)
        if config.rank is not None:
            raise ValueError(
                f"rank={config.rank} is of format=lora; format={format.name} has the adapter in its weights, where a "
                "lower rank saves nothing: leave rank out"
            )
    trained = load_trained(config.checkpoint)
    if trained.packing is not None:
        raise ValueError(
            f"checkpoint={trained.path} is in NVFP4, and what was rounded away does not come back; export from the "
            "run, or from a file in fp32"
        )
    network, adapter = trained.module.trained_network, trained.module.adapter
    if isinstance(format, LoRAFormat):
        if adapter is None:
            raise ValueError(
                f"checkpoint={trained.path} has no adapter; format=lora is for runs that train one, as "
                "module=distillation does"
            )
        truncation = None
        if config.rank is not None:
            truncation, adapter = add_truncated(network, adapter, config.rank, TRUNCATED), TRUNCATED
        summary = write_lora(
            output,
            network,
            adapter,
            format,
            config=trained.config,
            step=trained.step,
            naming=config.naming,
            truncation=truncation,
        )
        print_summary(summary, output)
        print_lora(summary, sum(value.numel() for value in base_parameters(network)), truncation)
        return summary
    merge_adapter(network, adapter)
    weights = network.state_dict()
    with Progress(*Progress.get_default_columns(), console=Console(stderr=True)) as progress:
        task = progress.add_task("exporting", total=len(weights))
        summary = write_export(
            output,
            trained.module.model_config,
            weights,
            format,
            config=trained.config,
            step=trained.step,
            naming=config.naming,
            on_weight=lambda: progress.advance(task),
        )
    print_summary(summary, output)
    return summary


def print_summary(summary: ExportSummary, output: Path) -> None:
    """A row per dtype, and how large the file is."""
    table = Table("dtype", "tensors", "bytes", box=None, pad_edge=False)
    for dtype, number in summary.tensors.items():
        table.add_row(dtype, f"{number:,}", f"{summary.tensor_bytes[dtype]:,}")
    Console().print(table)
    print(
        f"{output}: {summary.num_parameters:,} parameters in {summary.num_bytes:,} bytes; in bfloat16 they would take "
        f"{summary.ratio:.2f} times that"
    )


def print_lora(summary: ExportSummary, num_of_base: int, truncation: Truncation | None) -> None:
    """How large an adapter is beside its base, and what it lacks of the one that was trained."""
    share = summary.num_parameters / num_of_base
    print(f"{summary.num_parameters:,} parameters are {share:.2%} of the {num_of_base:,} of its base")
    if truncation is not None:
        print(
            f"rank {truncation.rank} of {truncation.trained_rank}: lacks {truncation.error:.3%} of the trained update, "
            f"in {truncation.worst_layer} {truncation.worst_error:.3%} (Frobenius norm)"
        )
