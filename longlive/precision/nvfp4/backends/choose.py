"""Which backend computes NVFP4 on this machine, chosen once and said once.

`auto` takes the first that can do what is asked: Transformer Engine where the device multiplies FP4 and it imports,
then, where nothing learns, torchao, then the emulation. It looks at the recipe too: a backend that would compute
another one is passed over, and the log says why. A backend that is asked for by name and cannot run is an error.
"""

from __future__ import annotations

import logging
from functools import cache

import torch

from longlive.precision.nvfp4.backends import torchao, transformer_engine
from longlive.precision.nvfp4.backends.base import Backend, describe_device, has_fp4_gemms
from longlive.precision.nvfp4.backends.emulated import EmulatedBackend
from longlive.precision.nvfp4.backends.torchao import TorchAOBackend
from longlive.precision.nvfp4.backends.transformer_engine import TransformerEngineBackend
from longlive.precision.nvfp4.recipe import NVFP4Recipe

log = logging.getLogger(__name__)

BACKENDS = ("emulated", "transformer_engine", "torchao")


def choose_backend(
    name: str = "auto",
    recipe: NVFP4Recipe | None = None,
    *,
    trains: bool = True,
    device: torch.device | str | None = None,
) -> Backend:
    """The backend that computes `recipe`.

    Args:
        name: one of BACKENDS, or `auto`.
        recipe: by default `NVFP4Recipe()`.
        trains: whether weights learn; False for rollouts and frozen bases.
        device: where; by default the current CUDA device, or the CPU.

    Raises:
        ValueError: for another name, or a recipe that the named backend does not compute.
        RuntimeError: if the named backend cannot run on this machine.
    """
    if name not in ("auto", *BACKENDS):
        raise ValueError(f"backend={name!r} does not exist; use auto, {', '.join(BACKENDS)}")
    recipe = recipe or NVFP4Recipe()
    if name == "auto":
        backend, reason = _first_that_can(recipe, trains, device)
        return _announce(backend, reason, device)
    lacks, why_not = _obstacles(name, recipe, trains, device)
    if lacks is not None:
        raise RuntimeError(f"backend={name} cannot run here: {lacks}. {_instead(recipe, trains, device)}")
    if why_not is not None:
        raise ValueError(f"backend={name} cannot do what is asked: {why_not}. {_instead(recipe, trains, device)}")
    return _announce(_make(name, device), "it was asked for", device)


def _first_that_can(recipe: NVFP4Recipe, trains: bool, device: torch.device | str | None) -> tuple[Backend, str]:
    """The backend of `auto`, and why it is."""
    if not has_fp4_gemms(device):
        return EmulatedBackend(), f"{describe_device(device)} has no FP4 GEMMs"
    passed_over: list[str] = []
    for name in ("transformer_engine", "torchao"):
        if name == "torchao" and recipe.activations is None:
            continue  # weights only: no GEMM of it is FP4 either
        obstacle = next((reason for reason in _obstacles(name, recipe, trains, device) if reason is not None), None)
        if obstacle is None:
            return _make(name, device), "; ".join([*passed_over, "it runs here"])
        passed_over.append(f"not {name}: {obstacle}")
    return EmulatedBackend(), "; ".join(passed_over)


def _obstacles(
    name: str, recipe: NVFP4Recipe, trains: bool, device: torch.device | str | None
) -> tuple[str | None, str | None]:
    """What the machine lacks for a backend, and why the backend does not compute the recipe."""
    if name == "emulated":
        return None, None
    lacks = transformer_engine.missing(device) if name == "transformer_engine" else torchao.missing()
    if lacks is not None:
        return lacks, None
    backend = _make(name, device)
    if trains and not backend.trains:
        return None, "its weights do not learn; it is for rollouts"
    return None, backend.refusal(recipe)


def _make(name: str, device: torch.device | str | None) -> Backend:
    if name == "transformer_engine":
        return TransformerEngineBackend(device)
    return TorchAOBackend(device) if name == "torchao" else EmulatedBackend()


def _instead(recipe: NVFP4Recipe, trains: bool, device: torch.device | str | None) -> str:
    return f"backend=auto would run {_first_that_can(recipe, trains, device)[0].name} instead"


def _announce(backend: Backend, reason: str, device: torch.device | str | None) -> Backend:
    _say(logging.INFO, f"NVFP4 backend: {backend.name} ({reason})")
    if isinstance(backend, EmulatedBackend):
        where = describe_device(device)
        _say(logging.WARNING, f"NVFP4 is emulated on {where}: accuracy is real, speed and memory of GEMMs are not")
    return backend


@cache
def _say(level: int, message: str) -> None:
    """Once per message and process, however many networks are converted."""
    log.log(level, "%s", message)
