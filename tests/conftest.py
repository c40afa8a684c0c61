"""Shapes in signatures are checked while the tests run; the import hook must come before longlive is imported."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

from jaxtyping import install_import_hook

install_import_hook("longlive", "beartype.beartype")
