"""Which chunk lives in which slot of the cache: sinks, the window, and eviction, as pure functions over ints.

A *slot table* lists, for one sample, the chunk that lives in each slot (`None`: empty). Who may see whom is not decided
here: `models.visibility.visible_history` is the one definition, shared with the training masks. Two facts about it make
the cache simple, and the tests check both against it for every pattern of cuts:

1. *What a chunk cannot see, no later chunk can see.* Going from chunk c to c + 1 the visible history only gains c: the
   window moves on, and a new sink is c itself. So the slots of invisible chunks are free, and eviction needs no
   knowledge of the cuts to come.
2. *A chunk sees `min(c, window - 1)` earlier chunks, whatever the shots.* So a ring of `window` slots holds all of them
   and exactly one free slot, which the chunk takes for itself; before the ring is full, the filled slots are its first
   c. What a chunk reads, its own slot included, is therefore always the leading `min(c + 1, window)` slots: a slice,
   never a copy, for every sample of a batch, even where their shots differ and their tables with them.

A shot sink thus pins the first chunk of a shot by what is visible alone; at the next cut it stops being visible (unless
it is still inside the window), and its slot is reused.
"""

from collections.abc import Sequence

from longlive.models.visibility import VisibilityRule, visible_history

SlotTable = tuple[int | None, ...]
"""The chunk in each slot of one sample's cache."""


def num_slots(rule: VisibilityRule, num_chunks: int) -> int:
    """Slots that a rollout of `num_chunks` needs: everything that one chunk sees, itself included.

    Raises:
        ValueError: if there is no chunk.
    """
    if num_chunks < 1:
        raise ValueError(f"num_chunks={num_chunks}: a rollout has at least one chunk")
    return num_chunks if rule.window_chunks is None else min(rule.window_chunks, num_chunks)


def free_slot(table: SlotTable, chunk: int, shot_index: Sequence[int], rule: VisibilityRule) -> int:
    """The slot that `chunk` takes: the first that is empty or holds what `chunk` (and so every later chunk) cannot see.

    A chunk that has a slot already keeps it.

    Raises:
        ValueError: if every slot is needed, because the table is smaller than `num_slots`.
    """
    if chunk in table:
        return table.index(chunk)
    visible = set(visible_history(chunk, shot_index, rule))
    for slot, occupant in enumerate(table):
        if occupant not in visible:
            return slot
    raise ValueError(
        f"chunk={chunk} finds no free slot: all {len(table)} slots hold chunks that it sees; make the cache for more "
        "chunks, or give a window"
    )


def place(table: SlotTable, slot: int, chunk: int | None) -> SlotTable:
    """The table after `chunk` has moved into `slot`, or, with None, after the slot was emptied."""
    return (*table[:slot], chunk, *table[slot + 1 :])


def absolute_position(chunk: int, shot_index: Sequence[int], chunk_frames: int, shot_rope_offset: float) -> float:
    """RoPE position of a chunk's first frame: its frame number, plus `shot_rope_offset` per shot before its own."""
    return chunk * chunk_frames + shot_index[chunk] * shot_rope_offset


def relative_positions(
    chunks: Sequence[int], shot_index: Sequence[int], chunk_frames: int, shot_rope_offset: float
) -> list[float]:
    """RoPE positions of the first frames of `chunks`, counted inside this list alone.

    The list is what one query sees, in order: sinks, window, own chunk. Frames are counted as if nothing had been
    evicted between its entries, and every change of shot between neighbours adds `shot_rope_offset` once, so positions
    stay below `len(chunks) * (chunk_frames + shot_rope_offset)` in a video of any length. As long as nothing has been
    evicted they are the absolute positions.
    """
    positions: list[float] = []
    position = 0.0
    for previous, chunk in zip([None, *chunks][:-1], chunks, strict=True):
        if previous is not None:
            position += chunk_frames + shot_rope_offset * (shot_index[chunk] != shot_index[previous])
        positions.append(position)
    return positions
