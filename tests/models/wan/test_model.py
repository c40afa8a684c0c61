"""The network: equal to diffusers' where both exist, causal through every layer, conditioned per frame and chunk."""

from functools import partial

import pytest
import torch
from diffusers import WanTransformer3DModel
from torch.utils.checkpoint import checkpoint

from longlive.models.attention import ChunkedAttention, MaskedAttention
from longlive.models.visibility import Role, Segment, VisibilityRule, segment_mask, teacher_forcing_segments
from longlive.models.wan.config import WanConfig
from longlive.models.wan.model import CausalWan, sinusoidal_embedding
from longlive.models.wan.weights import diffusers_name, load_wan, load_weights, save_weights

CONFIG = WanConfig.tiny(num_layers=2, dim=48, ffn_dim=80, num_heads=2, in_channels=4, out_channels=4, text_dim=20)
FRAMES, HEIGHT, WIDTH = 3, 4, 6
TOKENS_PER_FRAME = CONFIG.tokens_per_frame(HEIGHT, WIDTH)
BIDIRECTIONAL = (Segment(Role.CLEAN, 0, FRAMES * TOKENS_PER_FRAME),)


def random_model(config=CONFIG, seed=0):
    """Every tensor random, the norms' and the head's too: zeros and ones would hide a wrong name."""
    model = CausalWan(config)
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            center = 1.0 if "norm" in name and name.endswith("weight") else 0.0
            parameter.copy_(center + 0.2 * torch.randn(parameter.shape, generator=g))
    return model


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def diffusers_config():
    return {
        "num_layers": CONFIG.num_layers,
        "num_attention_heads": CONFIG.num_heads,
        "attention_head_dim": CONFIG.head_dim,
        "ffn_dim": CONFIG.ffn_dim,
        "in_channels": CONFIG.in_channels,
        "out_channels": CONFIG.out_channels,
        "text_dim": CONFIG.text_dim,
        "freq_dim": CONFIG.freq_dim,
        "patch_size": CONFIG.patch_size,
        "cross_attn_norm": CONFIG.cross_attn_norm,
    }


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """diffusers' network with random weights, and the folder that diffusers itself saved it to."""
    model = WanTransformer3DModel(**diffusers_config()).eval()
    g = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.03 * torch.randn(parameter.shape, generator=g))
    folder = tmp_path_factory.mktemp("diffusers") / "transformer"
    model.save_pretrained(folder)
    return model, folder


@pytest.fixture(scope="module", params=["diffusers", "original"])
def loaded(request, reference, tmp_path_factory):
    """The same weights, through the files of either naming scheme."""
    ours = load_wan(reference[1])
    if request.param == "original":
        folder = tmp_path_factory.mktemp("original") / "wan"
        save_weights(ours.state_dict(), CONFIG, folder, naming="original")
        ours = load_wan(folder)
    return ours


@pytest.mark.parametrize("per_frame", [False, True], ids=["equal_timesteps", "timesteps_per_frame"])
@torch.no_grad()
def test_one_chunk_equals_diffusers(loaded, reference, per_frame):
    """Of the tolerance, most goes to diffusers' float32 sinusoids of the timestep; ours are float64, as Wan's."""
    latents = draw(2, FRAMES, CONFIG.in_channels, HEIGHT, WIDTH)
    prompts = draw(2, 7, CONFIG.text_dim, seed=1)
    timesteps = torch.tensor([[0.0, 250.0, 731.0], [999.0, 1000.0, 3.0]])
    if not per_frame:
        timesteps = timesteps[:, 1:2].expand(-1, FRAMES)
    attention = ChunkedAttention(BIDIRECTIONAL, torch.zeros(2, 1, dtype=torch.int64), VisibilityRule())
    ours = loaded(latents, timesteps, prompts, torch.arange(2)[:, None], torch.arange(FRAMES).expand(2, -1), attention)
    their_timesteps = timesteps.repeat_interleave(TOKENS_PER_FRAME, dim=1) if per_frame else timesteps[:, 0]
    theirs = reference[0](latents.transpose(1, 2), their_timesteps, prompts, return_dict=False)[0].transpose(1, 2)
    assert theirs.std() > 0.1
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


@torch.no_grad()
def test_diffusers_loads_what_is_saved_in_its_naming(tmp_path):
    """The other direction, through diffusers' own loader."""
    ours = random_model()
    save_weights(ours.state_dict(), CONFIG, tmp_path / "transformer", naming="diffusers")
    theirs = WanTransformer3DModel.from_pretrained(tmp_path / "transformer")
    their_tensors = theirs.state_dict()
    assert {diffusers_name(name) for name in ours.state_dict()} == set(their_tensors)
    assert all(torch.equal(tensor, their_tensors[diffusers_name(name)]) for name, tensor in ours.state_dict().items())


CHUNKS, CHUNK_FRAMES = 3, 2


def teacher_forcing_inputs(batch=2):
    frames = 2 * CHUNKS * CHUNK_FRAMES
    return {
        "latents": draw(batch, frames, CONFIG.in_channels, HEIGHT, WIDTH),
        "timesteps": 1000 * torch.rand(batch, frames, generator=torch.Generator().manual_seed(1)),
        "prompt_embeds": draw(4, 5, CONFIG.text_dim, seed=2),
        "prompt_index": torch.tensor([[0, 1, 2], [3, 3, 1]])[:batch].repeat(1, 2),
        "frame_positions": torch.arange(CHUNKS * CHUNK_FRAMES).repeat(2).expand(batch, -1),
    }


SEGMENTS = teacher_forcing_segments(CHUNKS, CHUNK_FRAMES * TOKENS_PER_FRAME)
SHOTS = torch.tensor([[0, 0, 0], [0, 1, 1]])
RULES = {"all": VisibilityRule(), "window": VisibilityRule(2), "shot_sink": VisibilityRule(2, shot_sink=True)}


def moved_chunks(before, after):
    """Which (sample, segment) differ."""
    return (after - before).abs().flatten(2).sum(-1).unflatten(1, (-1, CHUNK_FRAMES)).sum(-1) > 0


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
@pytest.mark.parametrize("segment", range(2 * CHUNKS))
@torch.no_grad()
def test_a_changed_chunk_reaches_only_those_that_may_see_it(segment, rule):
    """Through all layers, by way of others: a leak of the future lets training see what rollout never has."""
    model, inputs = random_model(), teacher_forcing_inputs()
    attention = ChunkedAttention(SEGMENTS, SHOTS, rule)
    before = model(**inputs, attention=attention)
    latents = inputs["latents"].clone()
    latents[:, segment * CHUNK_FRAMES] += 1.0
    after = model(**inputs | {"latents": latents}, attention=attention)
    visible = torch.stack([segment_mask(SEGMENTS, shots, rule) for shots in SHOTS.tolist()]).int()
    reachable = visible @ visible  # two layers: directly, or through what it changed in the first
    assert torch.equal(moved_chunks(before, after), reachable[:, :, segment] > 0)


def test_gradients_agree_between_chunked_and_masked_attention():
    model, inputs = random_model(), teacher_forcing_inputs()
    gradients = []
    for attention_class in (ChunkedAttention, MaskedAttention):
        velocity = model(**inputs, attention=attention_class(SEGMENTS, SHOTS, RULES["shot_sink"]))
        gradients.append(torch.autograd.grad(velocity.square().sum(), list(model.parameters())))
    for (name, _), ours, oracle in zip(model.named_parameters(), *gradients, strict=True):
        # The key's bias shifts all scores of a query alike: its gradient is rounding noise around zero.
        if not name.endswith(".k.bias"):
            torch.testing.assert_close(ours, oracle, rtol=1e-3, atol=1e-5 * float(oracle.abs().max()))


@pytest.mark.parametrize("chunk", range(CHUNKS))
@torch.no_grad()
def test_a_prompt_reaches_its_own_chunk_and_those_that_see_it(chunk):
    """Catches prompts of the first chunk, or of the first sample, used for all."""
    model, inputs = random_model(), teacher_forcing_inputs()
    attention = ChunkedAttention(SEGMENTS, SHOTS, RULES["all"])
    before = model(**inputs, attention=attention)
    prompt_index = inputs["prompt_index"].clone()
    prompt_index[0, [chunk, CHUNKS + chunk]] = 3
    after = model(**inputs | {"prompt_index": prompt_index}, attention=attention)
    moved = moved_chunks(before, after)
    visible = segment_mask(SEGMENTS, (0,) * CHUNKS, RULES["all"])
    expected = visible[:, chunk].clone()
    expected[CHUNKS + chunk] = True
    assert torch.equal(moved, torch.stack([expected, torch.zeros_like(expected)]))


@torch.no_grad()
def test_a_timestep_reaches_its_own_frame():
    model, inputs = random_model(), teacher_forcing_inputs(batch=1)
    alone = tuple(Segment(Role.NOISY, frame, TOKENS_PER_FRAME) for frame in range(2 * CHUNKS * CHUNK_FRAMES))
    attention = ChunkedAttention(alone, torch.zeros(1, len(alone), dtype=torch.int64), VisibilityRule())
    before = model(**inputs, attention=attention)
    timesteps = inputs["timesteps"].clone()
    timesteps[0, 4] += 100
    after = model(**inputs | {"timesteps": timesteps}, attention=attention)
    moved = (after - before).abs().flatten(2).sum(-1)[0] > 0
    assert moved.nonzero().flatten().tolist() == [4]


@torch.no_grad()
def test_two_sequences_in_one_batch_do_not_mix():
    model, inputs = random_model(), teacher_forcing_inputs()
    both = model(**inputs, attention=ChunkedAttention(SEGMENTS, SHOTS, RULES["shot_sink"]))
    for sample in range(2):
        one = {name: value[sample : sample + 1] for name, value in inputs.items() if name != "prompt_embeds"}
        attention = ChunkedAttention(SEGMENTS, SHOTS[sample : sample + 1], RULES["shot_sink"])
        alone = model(**one, prompt_embeds=inputs["prompt_embeds"], attention=attention)
        torch.testing.assert_close(both[sample : sample + 1], alone, rtol=1e-5, atol=1e-5)


def test_initial_weights_have_their_scales_and_are_a_function_of_the_seed():
    with torch.device("meta"):
        model = CausalWan(CONFIG)
    model.to_empty(device="cpu")
    model.init_weights(seed=0)
    first = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert first["head.head.weight"].abs().max() == 0
    assert first["text_embedding.0.weight"].std() == pytest.approx(model.config.text_dim**-0.5, rel=0.1)
    assert first["blocks.1.norm3.weight"].unique().tolist() == [1.0]
    shift_and_scale = first["blocks.1.modulation"][0, [0, 1, 3, 4]]
    assert shift_and_scale.std() == pytest.approx(48**-0.5, rel=0.2)
    assert shift_and_scale.mean() == pytest.approx(0, abs=0.05)
    assert first["blocks.1.modulation"][0, [2, 5]].mean() == pytest.approx(0.5, abs=0.07), "gates start half open"
    bound = (6 / (48 + 80)) ** 0.5
    assert 0.9 * bound < first["blocks.0.ffn.0.weight"].abs().max() <= bound
    assert not torch.equal(first["blocks.0.self_attn.q.weight"], first["blocks.1.self_attn.q.weight"])
    model.init_weights(seed=0)
    assert all(torch.equal(tensor, first[name]) for name, tensor in model.state_dict().items())
    model.init_weights(seed=1)
    assert not torch.equal(model.state_dict()["blocks.0.self_attn.q.weight"], first["blocks.0.self_attn.q.weight"])


@torch.no_grad()
def test_a_bfloat16_network_keeps_time_in_float32():
    """Catches timesteps rounded to bfloat16: 998 and 1000 would be one timestep."""
    model, inputs = random_model().bfloat16(), teacher_forcing_inputs()
    seen = []
    model.time_projection.register_forward_hook(lambda module, args, output: seen.append((args[0], output)))
    velocity = model(**inputs, attention=ChunkedAttention(SEGMENTS, SHOTS, RULES["all"]))
    assert velocity.dtype == torch.bfloat16
    assert all(tensor.dtype == torch.float32 for tensor in seen[0])
    full = random_model()(**inputs, attention=ChunkedAttention(SEGMENTS, SHOTS, RULES["all"]))
    assert (velocity.float() - full).abs().mean() < 0.05 * full.abs().mean()


def test_autocast_changes_rounding_only():
    """Catches mixed dtypes that a layer refuses or warns about, and time that autocast rounds to bfloat16."""
    model, inputs = random_model(), teacher_forcing_inputs()
    attention = ChunkedAttention(SEGMENTS, SHOTS, RULES["all"])
    full = model(**inputs, attention=attention)
    seen = []
    model.time_projection.register_forward_hook(lambda module, args, output: seen.append(output))
    with torch.autocast("cpu", torch.bfloat16):
        mixed = model(**inputs, attention=attention)
    assert seen[0].dtype == torch.float32
    assert (mixed - full).abs().mean() < 0.05 * full.abs().mean()
    mixed.float().square().sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def test_recomputing_blocks_in_backward_changes_no_gradient():
    """Activation checkpointing runs the attention function twice: it must give the same both times."""
    inputs = teacher_forcing_inputs()
    gradients = []
    for recompute in (False, True):
        model = random_model()
        for block in model.blocks:
            if recompute:
                block.forward = partial(checkpoint, block.forward, use_reentrant=False)
        velocity = model(**inputs, attention=ChunkedAttention(SEGMENTS, SHOTS, RULES["shot_sink"]))
        gradients.append(torch.autograd.grad(velocity.square().sum(), list(model.parameters())))
    assert all(torch.equal(first, second) for first, second in zip(*gradients, strict=True))


def test_timesteps_become_cosines_and_sines():
    expected = torch.tensor([[[1.0, 1.0, 0.0, 0.0], [-0.4161468, 0.9998, 0.9092974, 0.0199987]]])
    torch.testing.assert_close(sinusoidal_embedding(torch.tensor([[0.0, 2.0]]), 4), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt_index": torch.zeros(2, 5, dtype=torch.int64)}, "gives 5 prompts, which do not divide 12 frames"),
        ({"prompt_embeds": torch.zeros(4, 5, 21)}, "text_dim=21 arrive, but the network was made for text_dim=20"),
        ({"latents": torch.zeros(2, 12, 5, HEIGHT, WIDTH)}, "channels=5 arrive"),
        ({"latents": torch.zeros(2, 12, 4, 5, WIDTH)}, "latent height=5, width=6 are no multiples of patch_size"),
    ],
)
def test_inputs_of_another_network_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        random_model()(**teacher_forcing_inputs() | change, attention=ChunkedAttention(SEGMENTS, SHOTS, RULES["all"]))


def test_loading_needs_no_particular_device_or_dtype(reference):
    with torch.device("meta"):
        model = CausalWan(CONFIG)
    load_weights(model, reference[1], dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
