"""The KV cache of a rollout: per layer a ring of slots, one chunk per slot, and nothing is ever shifted.

A pass over chunk c opens a `ChunkView`: the slot that c takes, and the leading slots of the ring, which are exactly
what c sees plus that slot (`sinks.py` says why). Keys and values of the pass's own tokens go into the own slot, and one
dense `scaled_dot_product_attention` without a mask runs over the slice: attention does not care for the order of keys.
Two modes:

- *denoise*: what lies in the own slot is scratch, overwritten by every solver step. The slot table does not list it.
- *context* (`write=True`): the pass over the finished chunk at timestep 0. The slot keeps what it writes, and
  `ChunkView.commit` enters the chunk in the table.

A chunk that is there can be written anew (`reopen`): its pass sees the chunks that the caller names, wherever in the
ring they lie.

Under autograd the slice is copied before the own keys enter it, so a graph holds what its pass has read, whatever is
written to the ring later. Activation checkpointing reads again in backward: that is refused once another chunk was
opened, for by then the ring may hold something else. With `retain`, slots are kept for views that may yet read them
(`retained.py`).

**RoPE.** Absolute: keys are cached after rotation, at the chunk's frame plus its shot's offset. Relative: keys are
cached unrotated, and the view rotates them once, at positions counted inside the visible list
(`sinks.relative_positions`); the rotated keys live as long as the view.

**Memory** is allocated once: `2 layers batch slots tokens_per_chunk dim` numbers. Guidance doubles the batch (the
unconditional rows follow the conditional ones); a head-sharded rank asks for its own heads only. How a slot is stored,
plainly or in NVFP4, is `slots.py`'s business. Compressed slots are unpacked (and rotated) by every pass for the layer
at hand: whatever a view kept would be the uncompressed cache.
"""

from collections.abc import Sequence
from functools import partial

import torch

from longlive.models.attention import dense_attention
from longlive.models.visibility import VisibilityRule, visible_history
from longlive.models.wan.rope import Rotation, rotation
from longlive.rollout.retained import RetainedStorage
from longlive.rollout.sinks import SlotTable, absolute_position, free_slot, num_slots, place, relative_positions
from longlive.rollout.slots import CacheDtype, SlotIndex, Slots, SlotStorage, make_storage, put
from longlive.typing import Heads, Int, PerFrame, Tensor


class KeyValueCache:
    """The caches of all layers, and one slot table per sample.

    Attributes:
        tables: for every sample the chunk in each slot.
        rule: who sees whom.
        num_opened: views made so far; the last one is valid.
    """

    def __init__(
        self,
        *,
        num_layers: int,
        batch_size: int,
        num_chunks: int,
        chunk_frames: int,
        patches: tuple[int, int],
        num_heads: int,
        head_dim: int,
        rule: VisibilityRule,
        relative_rope: bool = False,
        shot_rope_offset: float = 0.0,
        dtype: CacheDtype = torch.float32,
        device: torch.device | str = "cpu",
        retain: bool = False,
    ) -> None:
        """
        Args:
            num_layers, num_heads, head_dim: of the network; `num_heads` counts the heads of this rank.
            batch_size: rows, the unconditional ones of guidance included.
            num_chunks: length of the longest rollout; without a window this is the capacity.
            chunk_frames: frames per chunk.
            patches: rows and columns of tokens in a frame.
            rule: window and sinks.
            relative_rope: count positions inside the visible list instead of the video.
            shot_rope_offset: positions that a scene cut adds.
            dtype: of the stored numbers; "nvfp4" for compressed slots.
            retain: whether a view can be read after later chunks were opened, as backward needs it.

        Raises:
            ValueError: if there is no chunk, or `dtype` cannot store heads of this size.
        """
        slots = num_slots(rule, num_chunks)
        tokens = chunk_frames * patches[0] * patches[1]
        self.rule = rule
        self.tables: list[SlotTable] = [(None,) * slots] * batch_size
        self.chunk_frames = chunk_frames
        self.patches = patches
        self.head_dim = head_dim
        self.relative_rope = relative_rope
        self.shot_rope_offset = shot_rope_offset
        self.device = torch.device(device)

        def storage(slots: int) -> SlotStorage:
            return make_storage(batch_size, slots, tokens, num_heads, head_dim, dtype, device)

        self.layers: list[SlotStorage] = [
            RetainedStorage(batch_size, slots, partial(storage, 1)) if retain else storage(slots)
            for _ in range(num_layers)
        ]
        self.retain = retain
        self.num_opened = 0

    @property
    def num_bytes(self) -> int:
        """Bytes held by all layers."""
        return sum(layer.num_bytes for layer in self.layers)

    def open(self, chunk: int, shot_index: Sequence[Sequence[int]]) -> "ChunkView":
        """Make room for a chunk and show what it sees.

        The slot that the chunk takes leaves the table: whatever it held, nobody can see any more.

        Args:
            chunk: index in the video.
            shot_index: per sample the shot of every chunk up to this one.

        Raises:
            ValueError: if the chunk sees an earlier one that was never written, or finds no slot (more chunks than the
                cache was made for).
        """
        # Samples with one table and the same shots share all decisions; batches of one shot decide once.
        decisions: dict[tuple[SlotTable, tuple[int, ...]], tuple[int, SlotTable, list[float], float]] = {}
        rows = [(table, tuple(shots[: chunk + 1])) for table, shots in zip(self.tables, shot_index, strict=True)]
        for row in rows:
            if row not in decisions:
                decisions[row] = self._decide(chunk, *row)
        decided = [decisions[row] for row in rows]
        self.tables = [table for _, table, _, _ in decided]

        own_slots = [slot for slot, _, _, _ in decided]
        index: SlotIndex = own_slots[0] if len(set(own_slots)) == 1 else torch.tensor(own_slots, device=self.device)
        visible_slots = len(decided[0][2])
        assert all(len(positions) == visible_slots for _, _, positions, _ in decided)
        key_rotation = None
        if self.relative_rope:
            key_rotation = self._rotation([positions for _, _, positions, _ in decided])
        own_positions = self._frame_positions([[position] for _, _, _, position in decided])
        committed = [place(table, slot, chunk) for slot, table, _, _ in decided]
        self.num_opened += 1
        return ChunkView(self, chunk, visible_slots, index, index, committed, own_positions, key_rotation)

    def reopen(
        self, visible: Sequence[Sequence[int]], shot_index: Sequence[Sequence[int]], samples: Sequence[int]
    ) -> "ChunkView":
        """Show a chunk of every sample that is in the cache already, for a context pass that writes it anew.

        Args:
            visible: per sample, and as many of each, what the pass sees: chunks of the cache, ascending, its own last.
            shot_index: per sample the shot of every chunk.
            samples: whose slots a context pass writes.
        """
        slots = [[table.index(c) for c in chunks] for table, chunks in zip(self.tables, visible, strict=True)]
        starts = [self._starts(chunks, shots) for chunks, shots in zip(visible, shot_index, strict=True)]
        # There may be none to write, and an empty list has no dtype of its own.
        index = partial(torch.tensor, dtype=torch.int64, device=self.device)
        key_rotation = self._rotation(starts) if self.relative_rope else None
        own_positions = self._frame_positions([[positions[-1]] for positions in starts])
        self.num_opened += 1
        return ChunkView(
            self,
            visible[0][-1],
            index(slots),
            len(slots[0]) - 1,
            (index(samples), index([slots[sample][-1] for sample in samples])),
            self.tables,
            own_positions,
            key_rotation,
        )

    def _decide(
        self, chunk: int, table: SlotTable, shot_index: tuple[int, ...]
    ) -> tuple[int, SlotTable, list[float], float]:
        """For one sample: own slot, table without it, first position of every slot read, own first position."""
        history = visible_history(chunk, shot_index, self.rule)
        missing = [earlier for earlier in history if earlier not in table]
        if missing:
            raise ValueError(
                f"chunk={chunk} sees chunks {missing}, which are not in the cache; write every finished chunk with a "
                "context pass before the next one starts"
            )
        slot = free_slot(table, chunk, shot_index, self.rule)
        visible = [*history, chunk]
        start_of = dict(zip(visible, self._starts(visible, shot_index), strict=True))
        occupied = place(table, slot, chunk)
        leading = occupied[: len(visible)]
        assert set(leading) == set(visible)  # fact 2 of sinks.py
        positions = [start_of[c] for c in leading if c is not None]
        return slot, place(table, slot, None), positions, start_of[chunk]

    def _starts(self, visible: Sequence[int], shot_index: Sequence[int]) -> list[float]:
        """RoPE position of the first frame of every chunk of a list that ends with the one that sees it."""
        if self.relative_rope:
            return relative_positions(visible, shot_index, self.chunk_frames, self.shot_rope_offset)
        return [absolute_position(c, shot_index, self.chunk_frames, self.shot_rope_offset) for c in visible]

    def _frame_positions(self, starts: list[list[float]]) -> PerFrame:
        frames = torch.arange(self.chunk_frames, dtype=torch.float64)
        return (torch.tensor(starts, dtype=torch.float64)[:, :, None] + frames).flatten(1).to(self.device)

    def _rotation(self, starts: list[list[float]]) -> Rotation:
        return rotation(self._frame_positions(starts), *self.patches, self.head_dim)


class ChunkView:
    """What the passes over one chunk read, and where they write. Valid until another chunk is opened; of a cache that
    retains, readable as long as it lives.

    Attributes:
        chunk: index in the video.
        frame_positions: RoPE positions of the chunk's own frames, float64 `[b f]`; the network takes them.
    """

    def __init__(
        self,
        cache: KeyValueCache,
        chunk: int,
        visible_slots: int | Int[Tensor, "b visible"],
        index: SlotIndex,
        target: SlotIndex,
        committed: list[SlotTable],
        frame_positions: PerFrame,
        key_rotation: Rotation | None,
    ) -> None:
        """
        Args:
            cache: of which it is a view.
            chunk, frame_positions: see there.
            visible_slots: those that are read: so many leading ones, or which ones of every sample.
            index: the own place among them.
            target: the slots that `write` writes.
            committed: the tables once the chunk is there.
            key_rotation: of what is read; None: it is stored rotated.
        """
        self.chunk = chunk
        self.frame_positions = frame_positions
        self.index = index
        self._cache = cache
        self._layers = [layer.snapshot() for layer in cache.layers]
        self._number = cache.num_opened
        self._visible_slots = visible_slots
        self._target = target
        self._committed = committed
        self._key_rotation = key_rotation
        self._read: dict[tuple[int, torch.dtype], tuple[Slots, Slots]] = {}

    def read(self, layer: int, dtype: torch.dtype) -> tuple[Slots, Slots]:
        """Keys, rotated, and values of everything visible; the own slot is for the caller to fill.

        Of dense slots made once per view: the steps of a chunk change nothing but its own slot. Of compressed and
        retained ones made by every call, and the caller's own.

        Raises:
            RuntimeError: if another chunk was opened since, and the cache does not retain.
        """
        if self._cache.num_opened != self._number and not self._cache.retain:
            raise RuntimeError(
                f"chunk={self.chunk} reads the cache after another chunk was opened, when its slots may hold something "
                "else; if this is backward under activation checkpointing, start the rollout with retain=True"
            )
        if (layer, dtype) in self._read:
            return self._read[layer, dtype]
        keys, values = self._visible(self._layers[layer], dtype)
        if self._key_rotation is not None:
            keys = self._key_rotation.rotate(keys.flatten(1, 2)).view_as(keys)
        if self.shares_reads:
            self._read[layer, dtype] = keys, values
        return keys, values

    def _visible(self, storage: SlotStorage, dtype: torch.dtype) -> tuple[Slots, Slots]:
        if isinstance(self._visible_slots, int):
            return storage.read(self._visible_slots, dtype)
        samples = torch.arange(len(self._visible_slots), device=self._visible_slots.device)[:, None]
        keys, values = storage.read(len(self._committed[0]), dtype)
        return keys[samples, self._visible_slots], values[samples, self._visible_slots]

    def write(self, layer: int, keys: Heads, values: Heads) -> None:
        """Store the own tokens of a context pass."""
        self._cache.layers[layer].write(self._target, keys.detach(), values.detach())

    @property
    def shares_reads(self) -> bool:
        """Whether `read` gives the same numbers to every pass, or the ring itself."""
        return isinstance(self._visible_slots, int) and not self._layers[0].copies

    @property
    def stores_unrotated(self) -> bool:
        """Whether keys go into the cache before RoPE."""
        return self._key_rotation is not None

    def attention(self, *, write: bool) -> "CachedAttention":
        """The attention function of one pass: denoise (`write=False`) or context (`write=True`)."""
        return CachedAttention(self, write)

    def commit(self) -> None:
        """Enter the chunk in the tables, after a context pass has gone through all layers."""
        self._cache.tables = self._committed


class CachedAttention:
    """A `SelfAttention` whose queries are one chunk's tokens and whose keys are those tokens and the cache."""

    def __init__(self, view: ChunkView, write: bool) -> None:
        self._view = view
        self._write = write

    def __call__(self, query: Heads, key: Heads, value: Heads, rotation: Rotation, layer: int) -> Heads:
        rotated_key = rotation.rotate(key)
        keys, values = self._view.read(layer, query.dtype)
        needs_graph = torch.is_grad_enabled() and (key.requires_grad or value.requires_grad)
        if needs_graph and self._view.shares_reads:
            keys, values = keys.clone(), values.clone()
        put(keys, self._view.index, rotated_key)
        put(values, self._view.index, value)
        if self._write:
            self._view.write(layer, key if self._view.stores_unrotated else rotated_key, value)
        return dense_attention(rotation.rotate(query), keys.flatten(1, 2), values.flatten(1, 2))
