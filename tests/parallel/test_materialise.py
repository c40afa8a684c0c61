"""Weights reach every rank, each its own part, and no number depends on how many ranks there are."""

from contextlib import contextmanager

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from helpers.distributed import RankError, run_on_ranks
from longlive.data import weight_files
from longlive.models.wan.config import WanConfig
from longlive.models.wan.model import CausalWan
from longlive.models.wan.weights import save_weights
from longlive.parallel.fsdp import ShardingOptions, shard_network
from longlive.parallel.materialise import local_part, materialise

CONFIG = WanConfig.tiny(
    num_layers=3, dim=36, ffn_dim=50, num_heads=2, in_channels=4, out_channels=4, text_dim=10, freq_dim=16
)
"""Widths that 4 ranks do not divide, so that their parts differ."""


def draw(*shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def full(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def on_meta():
    with torch.device("meta"):
        return CausalWan(CONFIG)


def sharded_network(options, ranks_per_node=None):
    """Still on meta."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    return shard_network(on_meta(), mesh, ShardingOptions(**options), ranks_per_node)


def parts(weights, options, ranks_per_node=None):
    network = sharded_network(options, ranks_per_node)
    materialise(network, "cpu", weights, seed=3)
    return {name: full(tensor) for name, tensor in network.state_dict().items()}


@pytest.mark.parametrize("num_ranks", [1, 2, 4])
def test_initial_weights_do_not_depend_on_the_number_of_ranks(num_ranks):
    wanted = CausalWan(CONFIG)
    wanted.init_weights(seed=3)
    for state in run_on_ranks(parts, num_ranks, None, {}):
        assert all(torch.equal(state[name], tensor) for name, tensor in wanted.state_dict().items())


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Random weights in both namings, in several files, and in one of LongLive's."""
    network = on_meta()
    tensors = {
        name: draw(*tensor.shape, seed=index) for index, (name, tensor) in enumerate(network.state_dict().items())
    }
    folders = {naming: tmp_path_factory.mktemp("weights") / naming for naming in ("original", "diffusers")}
    for naming, folder in folders.items():
        save_weights(tensors, CONFIG, folder, naming, max_shard_bytes=20_000)
        assert len(list(folder.glob("*.safetensors"))) > 3
    folders["longlive"] = tmp_path_factory.mktemp("weights") / "model.pt"
    torch.save({"generator": {f"model.{name}": tensor for name, tensor in tensors.items()}}, folders["longlive"])
    return tensors, folders


@pytest.mark.parametrize(
    ("num_ranks", "naming", "hybrid"),
    [(1, "diffusers", False), (2, "longlive", False), (4, "original", False), (4, "diffusers", True)],
)
def test_stored_weights_reach_every_rank_bit_for_bit(saved, naming, num_ranks, hybrid):
    tensors, folders = saved
    ranks_per_node = max(num_ranks // 2, 1)
    for state in run_on_ranks(parts, num_ranks, folders[naming], {"replicate_across_nodes": hybrid}, ranks_per_node):
        assert list(state) == list(tensors)
        assert all(torch.equal(state[name], tensor) for name, tensor in tensors.items())


@contextmanager
def counted_reads():
    """Every tensor that leaves a safetensors file while the context lasts: its bytes."""
    reads, open_file = [], weight_files.safe_open

    class CountedSlice:
        def __init__(self, stored):
            self.get_shape, self.get_dtype, self.stored = stored.get_shape, stored.get_dtype, stored

        def __getitem__(self, where):
            part = self.stored[where]
            reads.append(part.nbytes)
            return part

    class CountedFile:
        def __init__(self, *args, **kwargs):
            self.file = open_file(*args, **kwargs)

        def __enter__(self):
            self.file.__enter__()
            return self

        def __exit__(self, *exception):
            self.file.__exit__(*exception)

        def keys(self):
            return self.file.keys()

        def get_slice(self, name):
            return CountedSlice(self.file.get_slice(name))

    weight_files.safe_open = CountedFile
    try:
        yield reads
    finally:
        weight_files.safe_open = open_file


def bytes_read(folder):
    network = sharded_network({})
    with counted_reads() as reads:
        materialise(network, "cpu", folder)
    parts = [parameter.to_local().nbytes for parameter in network.parameters()]
    return sum(reads), sum(parts), max(reads), max(parts)


def test_a_rank_reads_its_own_rows_alone(saved):
    """Catches the whole file read on every rank: 80 GB of host memory on a node of eight."""
    whole = sum(tensor.nbytes for tensor in saved[0].values())
    ranks = run_on_ranks(bytes_read, 4, saved[1]["diffusers"])
    for read, held, largest_read, largest_held in ranks:
        assert read == held
        assert largest_read == largest_held
    assert sum(read for read, *_ in ranks) == whole


def message_of_refusal(folder):
    network = sharded_network({})
    materialise(network, "cpu")
    before = {name: full(tensor).clone() for name, tensor in network.state_dict().items()}
    with pytest.raises(ValueError, match="does not fit the network") as raised:
        materialise(network, "cpu", folder)
    assert all(torch.equal(full(tensor), before[name]) for name, tensor in network.state_dict().items())
    return str(raised.value)


def test_other_weights_are_refused_on_every_rank(saved, tmp_path):
    """Catches one rank that raises while the others wait for it."""
    tensors = {name: tensor for name, tensor in saved[0].items() if not name.startswith("blocks.2")}
    smaller = WanConfig.tiny(**{**vars(CONFIG), "num_layers": 2})
    save_weights(tensors, smaller, tmp_path / "smaller")
    messages = run_on_ranks(message_of_refusal, 2, tmp_path / "smaller")
    assert messages[0] == messages[1]
    assert "missing: blocks.2.modulation" in messages[0]


def test_a_whole_network_gets_the_same_weights(saved):
    tensors, folders = saved
    for weights, wanted in ((folders["diffusers"], tensors), (None, None)):
        network = on_meta()
        materialise(network, "cpu", weights, seed=3)
        if wanted is None:
            reference = CausalWan(CONFIG)
            reference.init_weights(seed=3)
            wanted = reference.state_dict()
        assert all(torch.equal(tensor, wanted[name]) for name, tensor in network.state_dict().items())


def part_of_columns():
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    local_part(distribute_tensor(torch.zeros(4, 4), mesh, [Shard(1)]))


def test_parts_that_are_no_rows_are_refused():
    """Catches weights of other columns, written without a word."""
    with pytest.raises(RankError, match="is no run of rows"):
        run_on_ranks(part_of_columns, 2)
