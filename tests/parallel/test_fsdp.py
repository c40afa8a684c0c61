"""A sharded network is the same network: same names, same numbers, less memory, and communication that is counted."""

import re
import warnings
from functools import cache, partial

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.utils._python_dispatch import TorchDispatchMode

from helpers.distributed import RankError, run_on_ranks
from longlive.models.attention import ChunkedAttention
from longlive.models.visibility import VisibilityRule, teacher_forcing_segments
from longlive.models.wan.config import WanConfig
from longlive.models.wan.model import CausalWan
from longlive.parallel.fsdp import ShardingOptions, shard_network
from longlive.parallel.materialise import local_part, materialise

CONFIG = WanConfig.tiny(
    num_layers=3, dim=36, ffn_dim=50, num_heads=2, in_channels=4, out_channels=4, text_dim=10, freq_dim=16
)
"""Widths that 4 ranks do not divide, so that their parts differ."""
CHUNKS, HEIGHT, WIDTH = 2, 4, 6
"""Chunks of one frame of 6 tokens."""


def draw(*shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def inputs(sample):
    """What the network gets for one sample; every rank of a test takes another one."""
    segments = teacher_forcing_segments(CHUNKS, CONFIG.tokens_per_frame(HEIGHT, WIDTH))
    return {
        "latents": draw(1, 2 * CHUNKS, CONFIG.in_channels, HEIGHT, WIDTH, seed=sample),
        "timesteps": torch.tensor([[0.0, 0.0, 300.0 + sample, 900.0]]),
        "prompt_embeds": draw(2, 3, CONFIG.text_dim, seed=100 + sample),
        "prompt_index": torch.tensor([[0, 1, 0, 1]]),
        "frame_positions": torch.tensor([[0, 1, 0, 1]]),
        "attention": ChunkedAttention(segments, torch.zeros(1, CHUNKS, dtype=torch.int64), VisibilityRule()),
    }


def loss(network, sample):
    return (network(**inputs(sample)) - draw(1, 2 * CHUNKS, 4, HEIGHT, WIDTH, seed=200 + sample)).square().mean()


def on_meta():
    with torch.device("meta"):
        return CausalWan(CONFIG)


def whole_network(seed=0):
    network = on_meta()
    materialise(network, "cpu", seed=seed)
    # Zeros in the head would hide every gradient before it.
    with torch.no_grad():
        network.head.head.weight.copy_(draw(*network.head.head.weight.shape, seed=7))
    return network


@cache
def expected(num_samples):
    """Mean loss and gradients over the samples, on one device."""
    network = whole_network()
    mean = sum(loss(network, sample) for sample in range(num_samples)) / num_samples
    mean.backward()
    return mean.detach(), {name: parameter.grad for name, parameter in network.named_parameters()}


def sharded_network(options=None, sequence_ranks=1, ranks_per_node=None):
    mesh = init_device_mesh(
        "cpu",
        (dist.get_world_size() // sequence_ranks, sequence_ranks),
        mesh_dim_names=("data_parallel", "sequence_parallel"),
    )
    network = shard_network(on_meta(), mesh, options or ShardingOptions(), ranks_per_node)
    materialise(network, "cpu")
    with torch.no_grad():
        part, where = local_part(network.head.head.weight)
        part.copy_(draw(*network.head.head.weight.shape, seed=7)[where])
    return network


def full(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def relative(found, wanted):
    return float((found - wanted).detach().norm() / wanted.norm().clamp_min(1e-12))


def assert_equals_one_device(network, own_loss, num_samples):
    mean, gradients = expected(num_samples)
    dist.all_reduce(own_loss)
    assert relative(own_loss / dist.get_world_size(), mean) <= 1e-6
    # The key bias of attention has no effect: its gradient is rounding alone, so it is held against the whole gradient.
    total = torch.stack([gradient.norm() for gradient in gradients.values()]).norm()
    for name, parameter in network.named_parameters():
        error = (full(parameter.grad) - gradients[name]).norm()
        assert error <= 1e-6 * max(gradients[name].norm(), 1e-4 * total), f"{name}: {error}"


OPTIONS = {
    "plain": ShardingOptions(),
    "checkpointed": ShardingOptions(activation_checkpointing=True),
    "every second": ShardingOptions(activation_checkpointing=2),
    "kept": ShardingOptions(reshard_after_forward=False),
    "checkpointed and kept": ShardingOptions(activation_checkpointing=True, reshard_after_forward=False),
}


def train_with_every_option():
    warnings.filterwarnings("error", message="FSDP2-wrapped")
    for options in OPTIONS.values():
        network = sharded_network(options)
        own_loss = loss(network, dist.get_rank())
        own_loss.backward()
        assert_equals_one_device(network, own_loss.detach(), dist.get_world_size())


@pytest.mark.parametrize("num_ranks", [1, 2, 4])
def test_loss_and_gradients_equal_those_of_one_device(num_ranks):
    run_on_ranks(train_with_every_option, num_ranks)


def train_hybrid():
    for checkpointing in (False, True):
        options = ShardingOptions(replicate_across_nodes=True, activation_checkpointing=checkpointing)
        network = sharded_network(options, sequence_ranks=2, ranks_per_node=2)
        assert network.head.head.weight.placements == (Replicate(), Shard(0))
        own_loss = loss(network, dist.get_rank())
        own_loss.backward()
        assert_equals_one_device(network, own_loss.detach(), dist.get_world_size())


def test_nodes_may_hold_replicas():
    run_on_ranks(train_hybrid, 4)


def describe(options):
    network = sharded_network(options, sequence_ranks=2)
    state = {name: (tuple(tensor.shape), type(tensor)) for name, tensor in network.state_dict().items()}
    return state, sum(part.to_local().numel() for part in network.parameters()), isinstance(network, CausalWan)


def test_a_rank_holds_its_share_under_wans_names():
    """Catches wrappers that rename parameters: such a checkpoint loads nowhere else."""
    options = ShardingOptions(activation_checkpointing=True)
    whole = whole_network().state_dict()
    ranks = run_on_ranks(describe, 4, options)
    for state, _, is_wan in ranks:
        assert state == {name: (tuple(tensor.shape), DTensor) for name, tensor in whole.items()}
        assert is_wan
    num_parameters = sum(tensor.numel() for tensor in whole.values())
    sizes = [size for _, size, _ in ranks]
    assert sum(sizes) == num_parameters
    assert max(sizes) < 0.3 * num_parameters


def count_attention_calls(options):
    network, calls = sharded_network(options), []
    given = inputs(0)
    attention = given["attention"]

    def counted(*args):
        calls.append(args[-1])
        return attention(*args)

    network(**given | {"attention": counted}).square().mean().backward()
    return calls


@pytest.mark.parametrize(
    ("activation_checkpointing", "recomputed"), [(False, []), (True, [2, 1, 0]), (1, [2, 1, 0]), (2, [2, 0])]
)
def test_backward_recomputes_the_blocks_asked_for(activation_checkpointing, recomputed):
    options = ShardingOptions(activation_checkpointing=activation_checkpointing)
    assert run_on_ranks(count_attention_calls, 1, options) == [[0, 1, 2, *recomputed]]


class Collectives(TorchDispatchMode):
    """Names of the collectives called while it lasts."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d":
            self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def count_collectives(options, num_microbatches):
    """Gathers and reductions of one optimizer step, and whether its gradients are the sum over microbatches."""
    network, num_ranks = sharded_network(options), dist.get_world_size()
    with Collectives() as collectives:
        for microbatch in range(num_microbatches):
            network.set_requires_gradient_sync(microbatch == num_microbatches - 1)
            loss(network, microbatch * num_ranks + dist.get_rank()).backward()
    _, gradients = expected(num_microbatches * num_ranks)
    for name in ("blocks.0.ffn.0.weight", "time_embedding.0.weight", "head.modulation"):
        found = network.get_parameter(name).grad.full_tensor() / num_microbatches
        assert relative(found, gradients[name]) <= 1e-6, name
    return tuple(sum(kind in name for name in collectives.names) for kind in ("gather", "reduce_scatter"))


GROUPS = CONFIG.num_layers + 2
"""The blocks, the timestep's layers, the rest: each is gathered and reduced in one call."""


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradient_accumulation_reduces_once_per_optimizer_step(checkpointing):
    """Catches a reduction per microbatch, and parameters gathered once more for recomputing."""
    options = ShardingOptions(activation_checkpointing=checkpointing)
    for gathers, reductions in run_on_ranks(count_collectives, 2, options, 3):
        assert reductions == GROUPS
        assert gathers == 3 * 2 * GROUPS


def test_parameters_kept_for_backward_are_gathered_once():
    for gathers, reductions in run_on_ranks(count_collectives, 2, ShardingOptions(reshard_after_forward=False), 1):
        assert (gathers, reductions) == (GROUPS, GROUPS)


def train_compiled():
    """Three batches through compiled blocks, without and with checkpointing, and how many programs that took."""
    programs = []

    def backend(program, example_inputs):
        programs.append(program)
        return program.forward

    torch.compile = partial(torch.compile, backend=backend)
    num_programs = []
    for checkpointing in (False, True):
        torch.compiler.reset()
        programs.clear()
        network = sharded_network(ShardingOptions(compile=True, activation_checkpointing=checkpointing))
        mean = sum(loss(network, sample) for sample in range(3)) / 3
        mean.backward()
        assert_equals_one_device(network, mean.detach(), 3)
        num_programs.append(len(programs))
    return num_programs


def test_compiled_blocks_share_their_programs():
    """Catches a program per layer or per batch: after eight, torch compiles no more and says nothing."""
    # Spawned, because a fork would trace the shape checks of the tests as well.
    # Block and self-attention, each cut in two by the attention function.
    assert run_on_ranks(train_compiled, 1, start_method="spawn") == [[4, 4]]


def infer_then_train(options):
    network = sharded_network(options)
    with torch.no_grad():
        inferred = loss(network, dist.get_rank())
    for name, parameter in network.named_parameters():
        assert isinstance(parameter, DTensor), name
    own_loss = loss(network, dist.get_rank())
    assert torch.equal(inferred, own_loss)
    own_loss.backward()
    assert_equals_one_device(network, own_loss.detach(), dist.get_world_size())


@pytest.mark.parametrize("name", ["plain", "kept"])
def test_a_pass_without_backward_leaves_the_network_sharded(name):
    """Catches whole copies left behind by validation: an average swapped in after it would change only those, and
    training would go on from other weights than those on disk."""
    run_on_ranks(infer_then_train, 2, OPTIONS[name])


def train_partly_frozen():
    network = sharded_network(ShardingOptions(activation_checkpointing=True))
    _, gradients = expected(2)
    trained = {"blocks.1.self_attn.q.weight", "blocks.2.modulation", "head.head.bias"}
    for name, parameter in network.named_parameters():
        parameter.requires_grad_(name in trained)
    loss(network, dist.get_rank()).backward()
    for name, parameter in network.named_parameters():
        if name in trained:
            assert relative(full(parameter.grad), gradients[name]) <= 1e-6, name
        else:
            assert parameter.grad is None, name


def test_frozen_parameters_get_no_gradient():
    """Catches a group that wants gradients of all its parameters: adapters train a few of them."""
    run_on_ranks(train_partly_frozen, 2)


def dtypes_and_errors():
    """Which dtypes arrive where when parameters are gathered in bfloat16, and what rounding costs."""
    reference = whole_network()
    given = inputs(0)
    with torch.no_grad():
        exact = reference(**given)
        with torch.autocast("cpu", torch.bfloat16):
            autocast = reference(**given)
    network = sharded_network(ShardingOptions(parameter_dtype="bfloat16", activation_checkpointing=True))
    seen = {}

    def see_block(block, args):
        seen["modulation"], seen["rotation"], seen["index"] = args[1].dtype, args[2].cos.dtype, args[4].dtype
        seen["block weight"], seen["tokens"] = block.self_attn.q.weight.dtype, args[0].dtype

    network.blocks[1].register_forward_pre_hook(see_block)
    network.time_projection[1].register_forward_hook(
        lambda layer, args, output: seen.update({"time weight": layer.weight.dtype, "time": output.dtype})
    )
    velocity = network(**given)
    velocity.float().square().mean().backward()
    seen["velocity"] = velocity.dtype
    seen["parameters"] = {parameter.dtype for parameter in network.parameters()}
    seen["gradients"] = {parameter.grad.dtype for parameter in network.parameters()}
    return seen, relative(velocity.detach().float(), exact), relative(autocast.float(), exact)


def test_gathering_in_bfloat16_leaves_time_and_weights_in_float32():
    """Catches inputs cast on their way into a block: modulation in bfloat16 would say nothing of it."""
    for seen, error, autocast_error in run_on_ranks(dtypes_and_errors, 2):
        narrow = {name for name, dtype in seen.items() if dtype is torch.bfloat16}
        assert narrow == {"block weight", "tokens", "velocity"}
        assert seen["index"] is torch.int64
        assert seen["parameters"] == seen["gradients"] == {torch.float32}
        # The modulation's table is rounded too, which autocast does not do: it must not show.
        assert error < 1.2 * autocast_error


def hybrid_mesh(ranks_per_node):
    sharded_network(ShardingOptions(replicate_across_nodes=True), ranks_per_node=ranks_per_node)


@pytest.mark.parametrize(
    ("ranks_per_node", "message"),
    [(None, "pass ranks_per_node"), (3, "ranks_per_node=3 does not divide 2 ranks into nodes; use one of [1, 2]")],
)
def test_nodes_that_the_ranks_do_not_fill_are_refused(ranks_per_node, message):
    with pytest.raises(RankError, match=re.escape(message)):
        run_on_ranks(hybrid_mesh, 2, ranks_per_node)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"activation_checkpointing": -1}, "activation_checkpointing=-1 must be true, false, or n >= 1"),
        ({"parameter_dtype": "float16"}, "parameter_dtype='float16' is not supported; use null"),
        ({"reduce_dtype": "half"}, "reduce_dtype='half' is not supported; use float32 or bfloat16"),
    ],
)
def test_options_that_do_not_exist_are_refused(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        ShardingOptions(**options)
