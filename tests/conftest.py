"""Shapes in signatures are checked while the tests run; the import hook must come before longlive is imported."""

import gc
import os

import torch

os.environ.setdefault("OMP_NUM_THREADS", "1")
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # kernels are then tested without a GPU; read at their import

from jaxtyping import install_import_hook

install_import_hook("longlive", "beartype.beartype")


def pytest_collection_finish() -> None:
    """All is imported: nothing of it is garbage, and every fit would look through it."""
    gc.freeze()
