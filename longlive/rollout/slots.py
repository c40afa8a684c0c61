"""How the KV cache stores its slots: as plain numbers, or in NVFP4 at 0.28 of the bytes of bfloat16.

`cache.py` says which chunk lives in which slot and what a pass sees; here is what a slot is made of. A storage takes
one chunk at a time and gives back the leading slots of the ring.

**NVFP4** (design: LongLive-2.0, arXiv 2605.18739; format: `precision/nvfp4/format.py`). The keys of one (sample, slot,
head) are one matrix `[tokens, head_dim]`, and so are its values: blocks of 16 along `head_dim`, rule `mse`, one amax
per matrix. So samples, chunks and heads do not touch each other: any batch, and any split of the heads over ranks,
stores the same bits.

Keys have channels that are large in every token, and a block's scale follows its largest element. So the mean over the
chunk's tokens is taken off before quantising, kept in bfloat16, and added back on reading: with channels offset by 2.7
standard deviations, quantised keys move what attention gives by 8.7 % instead of 25 %. (LongLive-2.0's code averages
over `head_dim`, and then stores the keys as they were.) Values have no such channels and are stored directly.

**Bytes.** Per element 1/2 for the code and 1/16 for the scale, and per matrix 4 for the amax and, for keys,
`2 head_dim` for the mean: against bfloat16 `.28125 + (8 + 2 head_dim) / (4 tokens head_dim)`. A chunk of 64 tokens and
more stays below .30 whatever the head; Wan2.2 at 704 x 1280 has 7040 tokens in a chunk, and the mean costs nothing.

**Reading** a compressed slot makes numbers that are as large as the dense slots would have been, for one layer. They
live as long as that layer's attention, never as long as the chunk: kept for all layers, they would be the dense cache
again. In bfloat16, 5 bytes per number are in use while a layer is unpacked, 10 where relative RoPE turns keys (in
float32, as for dense slots), and 2 remain: with a window of 32 frames of Wan2.2 at 704 x 1280, for one sample, .81, 1.6
and .32 GiB beside a cache of 2.72 instead of 9.67 GiB.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import ClassVar, Literal

import torch

from longlive.precision.nvfp4.format import BLOCK, QuantisedTensor, Rule, quantise
from longlive.typing import Float, Heads, Tensor, UInt8

Slots = Float[Tensor, "b slots l n e"]
"""Keys or values of a run of slots; `l` is the tokens of one chunk."""

Matrices = Float[Tensor, "b n slots l e"]
"""The same, a matrix per (sample, head, slot)."""

SlotIndex = int | Tensor | tuple[Tensor, Tensor]
"""One slot for each sample: an int where all agree, else int64 `[b]`; or for some samples alone: those and their slots,
int64 each."""

CacheDtype = torch.dtype | Literal["nvfp4"]
"""What the numbers of a cache are stored in."""


def put(target: Slots, index: SlotIndex, source: Heads) -> None:
    """Write one chunk `[b l n e]` into a slot of every sample, in place and in the dtype of the slots."""
    if isinstance(index, int):
        target[:, index] = source.to(target.dtype)
        return
    samples, slots = by_sample(index)
    target[samples, slots] = source[samples].to(target.dtype)


def by_sample(index: Tensor | tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Samples and their slots."""
    return index if isinstance(index, tuple) else (torch.arange(len(index), device=index.device), index)


class SlotStorage(ABC):
    """The slots of one layer, in some format. Space is allocated at construction and never grows.

    Attributes:
        copies: whether reading makes new numbers. They are the caller's own, and too many to be kept for all layers at
            once.
        slot_dim: of `tensors`.
    """

    copies: ClassVar[bool]
    slot_dim: int = 1

    @abstractmethod
    def write(self, index: SlotIndex, keys: Heads, values: Heads) -> None:
        """Store one chunk of every sample, or of those that the index names."""

    @abstractmethod
    def read(self, num_slots: int, dtype: torch.dtype) -> tuple[Slots, Slots]:
        """Keys and values of the leading slots, ready for arithmetic in `dtype`.

        May be views of the storage. The caller may overwrite slots that no table lists, and nothing else.
        """

    def snapshot(self) -> "SlotStorage":
        """What a view reads as long as it lives. Usually the storage itself, which goes on."""
        return self

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """All that is stored, by name and as it is stored: samples are the first dim, slots are `slot_dim`."""

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over what another storage of this format and size gave as its `tensors`."""
        for name, own in self.tensors().items():
            own.copy_(tensors[name])

    @property
    def num_bytes(self) -> int:
        """Bytes held."""
        return sum(tensor.nbytes for tensor in self.tensors().values())


class DenseStorage(SlotStorage):
    """Slots as plain numbers. Reading in the stored dtype is a view, in another one a converted copy."""

    copies = False

    def __init__(
        self,
        batch_size: int,
        slots: int,
        tokens: int,
        num_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> None:
        shape = (batch_size, slots, tokens, num_heads, head_dim)
        self._keys = torch.zeros(shape, dtype=dtype, device=device)
        self._values = torch.zeros(shape, dtype=dtype, device=device)

    def write(self, index: SlotIndex, keys: Heads, values: Heads) -> None:
        put(self._keys, index, keys)
        put(self._values, index, values)

    def read(self, num_slots: int, dtype: torch.dtype) -> tuple[Slots, Slots]:
        return self._keys[:, :num_slots].to(dtype), self._values[:, :num_slots].to(dtype)

    def tensors(self) -> dict[str, Tensor]:
        return {"keys": self._keys, "values": self._values}


def check_head_dim(head_dim: int) -> None:
    """Raise the `ValueError` for heads that NVFP4 slots cannot store."""
    if head_dim % BLOCK:
        raise ValueError(
            f"cache_dtype=nvfp4 stores heads in blocks of {BLOCK}, and head_dim={head_dim} is no multiple of it; use "
            "cache_dtype=bfloat16"
        )


class NVFP4Storage(SlotStorage):
    """Slots in NVFP4, keys without their mean.

    Raises:
        ValueError: if `head_dim` is no multiple of 16.
    """

    copies = True
    slot_dim = 2

    def __init__(
        self,
        batch_size: int,
        slots: int,
        tokens: int,
        num_heads: int,
        head_dim: int,
        device: torch.device | str,
    ) -> None:
        check_head_dim(head_dim)
        self._keys, self._values = (
            _PackedSlots(batch_size, num_heads, slots, tokens, head_dim, device) for _ in range(2)
        )
        self._key_means: Float[Tensor, "b n slots e"] = torch.zeros(
            batch_size, num_heads, slots, head_dim, dtype=torch.bfloat16, device=device
        )

    def write(self, index: SlotIndex, keys: Heads, values: Heads) -> None:
        centred = keys.transpose(1, 2).float()
        # Rounded first and taken off as rounded: what is added back is then exactly what was taken off.
        means = centred.mean(dim=2).bfloat16()
        _put_matrices(self._key_means, index, means)
        self._keys.write(index, centred - means[:, :, None].float())
        self._values.write(index, values.transpose(1, 2).float())

    def read(self, num_slots: int, dtype: torch.dtype) -> tuple[Slots, Slots]:
        keys = self._keys.read(num_slots, dtype)
        keys += self._key_means[:, :, :num_slots, None].to(dtype)
        # Matrices lie head by head, as attention kernels take them; joining slots and tokens is then no copy.
        return keys.permute(0, 2, 3, 1, 4), self._values.read(num_slots, dtype).permute(0, 2, 3, 1, 4)

    def tensors(self) -> dict[str, Tensor]:
        operands = (("keys", self._keys), ("values", self._values))
        packed = {f"{name}_{part}": tensor for name, slots in operands for part, tensor in slots.tensors().items()}
        return packed | {"key_means": self._key_means}


class _PackedSlots:
    """The NVFP4 matrices of one operand. Scales are held as bytes, because float8 tensors know no indexed writes."""

    rule: Rule = "mse"

    def __init__(
        self, batch_size: int, num_heads: int, slots: int, tokens: int, head_dim: int, device: torch.device | str
    ) -> None:
        shape = (batch_size, num_heads, slots)
        self.codes: UInt8[Tensor, "b n slots l half"] = torch.zeros(
            *shape, tokens, head_dim // 2, dtype=torch.uint8, device=device
        )
        self.scales: UInt8[Tensor, "b n slots l blocks"] = torch.zeros(
            *shape, tokens, head_dim // BLOCK, dtype=torch.uint8, device=device
        )
        self.amax: Float[Tensor, "b n slots"] = torch.zeros(shape, dtype=torch.float32, device=device)

    def write(self, index: SlotIndex, matrices: Float[Tensor, "b n l e"]) -> None:
        quantised = quantise(matrices, self.rule)
        _put_matrices(self.codes, index, quantised.packed)
        _put_matrices(self.scales, index, quantised.scales.view(torch.uint8))
        _put_matrices(self.amax, index, quantised.amax)

    def read(self, num_slots: int, dtype: torch.dtype) -> Matrices:
        codes, scales, amax = (x[:, :, :num_slots] for x in (self.codes, self.scales, self.amax))
        return QuantisedTensor(codes, scales.view(torch.float8_e4m3fn), amax, self.rule).dequantise(dtype)

    def tensors(self) -> dict[str, Tensor]:
        return {"codes": self.codes, "scales": self.scales, "amax": self.amax}


def _put_matrices(target: Tensor, index: SlotIndex, source: Tensor) -> None:
    """As `put`, where slots are the third dim."""
    if isinstance(index, int):
        target[:, :, index] = source
        return
    samples, slots = by_sample(index)
    target[samples, :, slots] = source[samples]


def make_storage(
    batch_size: int,
    slots: int,
    tokens: int,
    num_heads: int,
    head_dim: int,
    dtype: CacheDtype,
    device: torch.device | str,
) -> SlotStorage:
    """Slots of one layer in the format that `dtype` names.

    Raises:
        ValueError: if the format cannot store heads of this size.
    """
    if isinstance(dtype, str):
        return NVFP4Storage(batch_size, slots, tokens, num_heads, head_dim, device)
    return DenseStorage(batch_size, slots, tokens, num_heads, head_dim, dtype, device)
