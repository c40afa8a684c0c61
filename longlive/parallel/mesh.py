"""Which processes read the same clip, and which read others.

A mesh of two axes, `(data_parallel, sequence_parallel)`. The ranks of one sequence group are neighbours, so they sit
in one node and their all-to-alls stay inside it; they share a sample. Parameters know nothing of this: they are sharded
over all ranks.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from longlive.parallel.layout import MakeLayout, SequenceLayout, check_world, whole_layout

DATA = "data_parallel"
SEQUENCE = "sequence_parallel"


def make_mesh(world_size: int, sequence_parallel_size: int, device_type: str) -> DeviceMesh:
    """The mesh of all processes. Every process must call it.

    Raises:
        ValueError: if the sequence ranks do not divide the processes.
    """
    check_world(world_size, sequence_parallel_size)
    return init_device_mesh(
        device_type,
        (world_size // sequence_parallel_size, sequence_parallel_size),
        mesh_dim_names=(DATA, SEQUENCE),
    )


@dataclass(frozen=True)
class SequenceShare:
    """A process's place in its sequence group: all that a training stage knows of parallelism.

    Attributes:
        rank, size: in the group.
        group: for collectives; None: there is no group.
        make_layout: who owns what.
        codec_context: how a rank's encode gets its left context (`codec_halo.codec_context`).
    """

    rank: int = 0
    size: int = 1
    group: ProcessGroup | None = None
    make_layout: MakeLayout = whole_layout
    codec_context: str = "auto"

    def layout(self, num_chunks: int) -> SequenceLayout:
        """The layout of a clip.

        Raises:
            ValueError: if the ranks do not divide it.
        """
        return self.make_layout(num_chunks, self.size)


ALONE = SequenceShare()
"""Under strategies that know no sequence groups."""
