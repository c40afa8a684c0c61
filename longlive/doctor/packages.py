"""Versions of what longlive is built on, of packages that can really be imported."""

import importlib
import importlib.metadata

from longlive.doctor.check import UnavailableError, reason

PACKAGES = {
    "torch": "torch",
    "lightning": "lightning",
    "torchao": "torchao",
    "torchmetrics": "torchmetrics",
    "diffusers": "diffusers",
    "transformers": "transformers",
    "peft": "peft",
    "safetensors": "safetensors",
    "webdataset": "webdataset",
    "av": "av",
    "decord": "decord",
    "einops": "einops",
    "ftfy": "ftfy",
    "hydra-core": "hydra",
    "omegaconf": "omegaconf",
    "jaxtyping": "jaxtyping",
    "numpy": "numpy",
    "pillow": "PIL",
    "rich": "rich",
    "tensorboard": "tensorboard",
}
"""Distributions that longlive depends on, and the module that each is imported as."""

EXTRAS = {
    "transformer-engine": ("transformer_engine.pytorch", "nvfp4"),
    "hydra-submitit-launcher": ("hydra_plugins.hydra_submitit_launcher", "slurm"),
}
"""Optional distributions: the module of each, and the extra of longlive that installs it."""


def probe_package(distribution: str, module: str, extra: str | None = None) -> str:
    """The version of a package that can be imported."""
    try:
        version = importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        fix = f"pip install longlive[{extra}]" if extra else "pip install longlive"
        raise UnavailableError(f"not installed; {fix}") from None
    try:
        importlib.import_module(module)
    except Exception as error:
        raise UnavailableError(f"{version} is installed, but import {module} fails: {reason(error)}") from error
    return version
