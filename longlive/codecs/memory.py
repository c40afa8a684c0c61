"""Peak memory without computing: run the code on the meta device and count the bytes of the tensors alive.

On the meta device tensors have shapes and lifetimes, but no contents. A dispatch mode sees every new storage and when
it dies, so the peak of a network's forward, with all its temporaries, is known for any size in milliseconds. What it
cannot see is memory that a kernel takes for itself, such as a convolution's workspace.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """A context that counts what is allocated inside it.

    Attributes:
        live: bytes that were allocated inside and are alive now.
        peak: the largest value that `live` had.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = 0
        self.peak = 0
        self._sizes: dict[int, int] = {}

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = {_key(leaf) for leaf in tree_leaves((args, kwargs or {})) if isinstance(leaf, torch.Tensor)}
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            # A view or an in-place operation returns a storage that it was given.
            if isinstance(leaf, torch.Tensor) and _key(leaf) not in given and _key(leaf) not in self._sizes:
                self._count(leaf.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        self._sizes[storage._cdata] = storage.nbytes()
        weakref.finalize(storage, self._forget, storage._cdata)
        self.live += storage.nbytes()
        self.peak = max(self.peak, self.live)

    def _forget(self, key: int) -> None:
        self.live -= self._sizes.pop(key)


def _key(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata
