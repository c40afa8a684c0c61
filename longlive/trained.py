"""What a run has made, from wherever it lies: the module of a checkpoint, or of a file that was exported from one.

Both say what they are. The config inside them describes network, codec and text encoder, so nothing here depends on
today's defaults. The weights are the averaged ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from longlive.adapters.exported import SUFFIX, Packing, load_network, read_description
from longlive.adapters.lora_files import LoRAFormat, find_adapter, load_adapter, run_of_adapter
from longlive.callbacks.ema import averaged_weights
from longlive.config import instantiate
from longlive.modules.base import LongLiveModule
from longlive.modules.roles import with_weights
from longlive.parallel.checkpoint import check_same_shapes, find_checkpoint, load_weights_and_config
from longlive.parallel.sources import sources_under

LORA = "lora"
"""What the adapter of a file is called in its network."""


@dataclass(frozen=True)
class Trained:
    """A network and all that goes with it.

    Attributes:
        path: of the checkpoint, or of the exported file.
        module: with its averaged weights, in eval mode, on the CPU.
        config: of the run, resolved; plain containers.
        step: optimizer steps.
        packing: of the layers that are in NVFP4 already; None: there is none.
        lora: the file of an adapter over it; None: there is none.
    """

    path: Path
    module: LongLiveModule
    config: dict[str, Any]
    step: int
    packing: Packing | None = None
    lora: Path | None = None


def load_trained(location: str | Path) -> Trained:
    """Read a checkpoint, the newest one of a run's directory, or a file that `longlive export` wrote.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: if it holds no config, or weights of another network than its config describes.
    """
    path = find_checkpoint(location)
    if path.suffix != SUFFIX:
        checkpoint = load_weights_and_config(path)
        return Trained(path, load_module(checkpoint, path), checkpoint["config"], checkpoint["global_step"])
    exported = read_description(path)
    if exported.format == LoRAFormat.name:
        raise ValueError(f"{path} holds a LoRA, not a network: give its base as checkpoint=, and this as lora={path}")
    module: LongLiveModule = instantiate(_in_one_precision(exported.config, weights=None))
    module.hold(load_network(exported, module.model_config))
    return Trained(path, module.eval(), exported.config, exported.step, exported.packing)


def with_lora(base: Trained, location: str | Path) -> Trained:
    """What a run has made, with the adapter of another run over it.

    How it rolls out and its noise levels are then those of the adapter's run, if its file says them. All else is the
    base's: its codec and text encoder lie where they are on this machine. Over a packed base it multiplies beside the
    codes, in high precision.

    Args:
        base: whose module changes.
        location: a folder or file as `load_adapter` takes it.

    Raises:
        ValueError: if there is no LoRA, or one of another network or other chunks; or the base has an adapter that is
            not merged.
    """
    module, file = base.module, find_adapter(location)
    if module.adapter is not None:
        raise ValueError(
            f"{base.path} has an adapter of its own, {module.adapter!r}; give lora={location} the run that its "
            "training started from, or merge that adapter: longlive export format=fp32"
        )
    run = run_of_adapter(file)
    if run is not None:
        theirs = OmegaConf.create(run.config).module
        if theirs.chunk_frames != module.chunk_frames:
            raise ValueError(
                f"{file} is of a network with chunks of {theirs.chunk_frames} frames, and {base.path} has chunks of "
                f"{module.chunk_frames}; give the checkpoint that its training started from"
            )
        module.rollout, module.schedule = instantiate(theirs.rollout), instantiate(theirs.schedule)
    load_adapter(module.trained_network, LORA, file)
    module.hold(module.trained_network, LORA)
    return replace(base, lora=file)


def load_module(checkpoint: Mapping[str, Any], path: Path) -> LongLiveModule:
    """The module of a checkpoint, with its averaged weights, in eval mode, on the CPU.

    Raises:
        ValueError: if the checkpoint holds no config, or weights of another network than its config describes; or what
            its run trained alone, over weights that are not there any more.
    """
    if not checkpoint.get("config"):
        raise ValueError(
            f"{path} holds no config, so it does not say what network it is; it was not written by `longlive train`"
        )
    under = sources_under(checkpoint, path)
    module: LongLiveModule = instantiate(_in_one_precision(checkpoint["config"], weights=under.weights))
    module.configure_model()
    for source in under.checkpoints:
        _take(module, load_weights_and_config(source))
    _take(module, checkpoint)
    return module.eval()


def _take(module: LongLiveModule, checkpoint: Mapping[str, Any]) -> None:
    stored = with_weights(averaged_weights(checkpoint), checkpoint.get("bases", {}))
    weights = module.weights_of(stored, bool(checkpoint.get("trainable_only")))
    check_same_shapes(module.state_dict(), weights)
    module.load_state_dict(weights)


def _in_one_precision(config: Mapping[str, Any], **changes: Any) -> DictConfig:
    """A run's module, with one network for all its roles: in which precision they were trained is no part of it."""
    module = OmegaConf.create(dict(config)).module
    if "role_precision" in module:
        changes["role_precision"] = None
    for name, value in changes.items():
        module[name] = value
    return module
