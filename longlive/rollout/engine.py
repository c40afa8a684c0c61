"""Rollout: chunk after chunk from noise, each seeing what the cache still holds of the earlier ones.

One chunk is (design: LongLive-2.0, arXiv 2605.18739)

    noise -> n solver steps, each one network call over [visible cache | the chunk] -> context pass at timestep 0

and the context pass writes the finished chunk into the cache. A cached pass equals the teacher-forcing forward of the
same tokens with the same window and sinks: training and rollout share `models.visibility`.

`RolloutEngine.generate` and `.rollout` are the loop; they compute no gradients. Its parts (`start`, `open_chunk`,
`velocity`, `write`) are public and leave gradients to the caller, for losses on rollouts and for sessions whose prompts
come while they run.

**Guidance** runs the conditional and the unconditional branch as one forward of twice the rows with one cache of twice
the rows: on small models the call count is what costs. The unconditional branch sees its own history, cached under the
negative prompt.

**Noise** is a function of (seed, sample id, chunk), in training also of the optimizer step and of what the rollout is
for: a sample's video depends neither on the batch it is generated in, nor on how long the rollout goes on.

**Given frames** (image to video: one) are the first frames of the video, clean latents that are not generated. In their
chunk they stay what they are, at timestep 0, while the frames beside them are denoised, as in training
(`TeacherForcingModule.given_frames`); a chunk of given frames alone only gets its context pass.

**Prompt switches** within a shot leave the cache as it is, or rebuild it (`prompt_switch`, `switches.py`): then the
finished chunks that the next one sees go through context passes under the new prompt. The unconditional branch, whose
prompt is the same, keeps its own.
"""

import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass

import torch

from longlive import rng
from longlive.adapters.adapted import AdaptedNetwork
from longlive.diffusion.guidance import guide
from longlive.diffusion.schedule import FlowSchedule
from longlive.diffusion.solver import make_solver
from longlive.models.wan.model import CausalWan
from longlive.parallel.layout import check_rollout
from longlive.parallel.mesh import ALONE, SequenceShare
from longlive.rollout.cache import ChunkView, KeyValueCache
from longlive.rollout.request import GivenFrames, NegativeEmbeds, check_given, check_request
from longlive.rollout.settings import CACHE_DTYPES, RolloutSettings
from longlive.rollout.split import SplitNetwork
from longlive.rollout.state import Past, RolloutState
from longlive.rollout.switches import switches
from longlive.typing import Float, Int, Latents, PerFrame, PromptEmbeds, Tensor


@dataclass(frozen=True)
class ChunkCondition:
    """What all network calls of one chunk share: `rows` is the batch, doubled under guidance.

    Attributes:
        view: what the chunk sees of the cache.
        prompt_embeds: the distinct prompts of this chunk.
        prompt_index: which of them each row gets, `[rows 1]`.
    """

    view: ChunkView
    prompt_embeds: PromptEmbeds
    prompt_index: Int[Tensor, "rows 1"]


@dataclass(frozen=True)
class ChunkReport:
    """Progress: chunk `chunk` (of `num_chunks`) took `seconds` from its noise to the end of its context pass."""

    chunk: int
    num_chunks: int
    seconds: float


@dataclass(frozen=True)
class Generated:
    """Latents `[b f c h w]` on the network's device, float32, and the loop seconds of every chunk."""

    latents: Latents
    chunk_seconds: tuple[float, ...]


class RolloutEngine:
    """Generates latents with a causal network.

    Args:
        model: the network, or what an adapter makes of it; its parameters' device and dtype are the rollout's. Whether
            it is in eval mode is the caller's business.
        settings: see `RolloutSettings`.
        schedule: noise levels; the shift must be the one of training.
        sequence: ranks that share the rollout (`split.py`): every one of them must make the same calls, and gets the
            same results.

    Raises:
        ValueError: if the settings do not fit the network, or the ranks do not divide what they share.
    """

    def __init__(
        self,
        model: CausalWan | AdaptedNetwork,
        settings: RolloutSettings,
        schedule: FlowSchedule,
        sequence: SequenceShare = ALONE,
    ) -> None:
        settings.check_network(model.config)
        check_rollout(settings.chunk_frames, model.config.num_heads, sequence.size)
        self.model = model if sequence.group is None else SplitNetwork(model, sequence.group)
        self.num_cached_heads = model.config.num_heads // sequence.size
        self.settings = settings
        self.schedule = schedule

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def _branches(self) -> int:
        """Rows of every call per sample: the conditional one, and under guidance the unconditional one."""
        return 2 if self.settings.guided else 1

    def generate(
        self,
        prompt_embeds: PromptEmbeds,
        prompt_index: Int[Tensor, "b p"],
        shot_index: Int[Tensor, "b chunk"],
        latent_shape: tuple[int, int, int],
        seed: int,
        sample_ids: Sequence[int],
        negative_embeds: NegativeEmbeds | None = None,
        on_chunk: Callable[[ChunkReport], None] | None = None,
        given: GivenFrames | None = None,
    ) -> Generated:
        """The chunks of `rollout` in one tensor, with the time each took. Arguments and errors as there."""
        seconds: list[float] = []

        def record(report: ChunkReport) -> None:
            seconds.append(report.seconds)
            if on_chunk is not None:
                on_chunk(report)

        chunks = self.rollout(
            prompt_embeds, prompt_index, shot_index, latent_shape, seed, sample_ids, negative_embeds, record, given
        )
        return Generated(torch.cat(list(chunks), dim=1), tuple(seconds))

    def rollout(
        self,
        prompt_embeds: PromptEmbeds,
        prompt_index: Int[Tensor, "b p"],
        shot_index: Int[Tensor, "b chunk"],
        latent_shape: tuple[int, int, int],
        seed: int,
        sample_ids: Sequence[int],
        negative_embeds: NegativeEmbeds | None = None,
        on_chunk: Callable[[ChunkReport], None] | None = None,
        given: GivenFrames | None = None,
    ) -> Iterator[Latents]:
        """Generate `p` chunks, one after the other; with a window, memory does not grow with their number.

        Args:
            prompt_embeds: the distinct prompts.
            prompt_index: which prompt every chunk of every sample follows.
            shot_index: shot of every chunk, counted from 0 in each sample.
            latent_shape: (channels, height, width) of a frame.
            seed: names the noise, together with the sample ids.
            sample_ids: one per sample.
            negative_embeds: `[1 s d]`, the prompt of the unconditional branch; only with guidance.
            on_chunk: called after every chunk.
            given: the first frames of every video; None: all are generated.

        Returns:
            An iterator of finished chunks `[b chunk_frames c h w]`, float32.

        Raises:
            ValueError: before any work, if the arguments do not fit one another or the network.
        """
        check_request(
            prompt_embeds,
            prompt_index,
            shot_index,
            sample_ids,
            negative_embeds,
            text_dim=self.model.config.text_dim,
            settings=self.settings,
        )
        num_chunks = prompt_index.shape[1]
        check_given(given, (len(sample_ids), num_chunks * self.settings.chunk_frames, *latent_shape))
        state = self.start(latent_shape, seed, sample_ids, num_chunks)
        prompt_index = prompt_index.to(self.device)

        def chunks() -> Iterator[Latents]:
            for chunk in range(num_chunks):
                start = self._now()
                condition = self.open_chunk(
                    state, prompt_embeds, prompt_index[:, chunk], shot_index[:, chunk].tolist(), negative_embeds
                )
                # Nobody looks back at the last chunk, so it needs no context pass.
                latents = self._finish(state, condition, self.given_of(chunk, given), write=chunk + 1 < num_chunks)
                if on_chunk is not None:
                    on_chunk(ChunkReport(chunk, num_chunks, self._now() - start))
                yield latents

        return chunks()

    def start(
        self,
        latent_shape: tuple[int, int, int],
        seed: int,
        sample_ids: Sequence[int],
        max_chunks: int,
        *,
        step: int = 0,
        purpose: str = "rollout",
        retain: bool = False,
        recaches: Collection[int] = (),
    ) -> RolloutState:
        """An empty cache. With a window it does for a video of any length, else for `max_chunks`.

        Args:
            latent_shape: (channels, height, width) of a frame.
            seed, sample_ids, step, purpose: name the noise.
            max_chunks: of the longest video.
            retain: whether backward may run earlier chunks again (`cache.py`).
            recaches: see `RolloutState`.

        Raises:
            ValueError: if the latents do not fit the network.
        """
        channels, height, width = latent_shape
        if channels != self.model.config.in_channels:
            raise ValueError(f"latents of {channels} channels: the network takes {self.model.config.in_channels}")
        cache = self._make_cache((height, width), len(sample_ids), max_chunks, self.device, retain)
        return RolloutState(
            cache,
            Past.empty(len(sample_ids), latent_shape, self.device),
            seed,
            tuple(sample_ids),
            latent_shape,
            shot_index=[[] for _ in sample_ids],
            prompts=[[] for _ in sample_ids],
            step=step,
            purpose=purpose,
            recaches=recaches,
        )

    def cache_bytes(self, latent_size: tuple[int, int], num_samples: int, max_chunks: int) -> int:
        """Bytes of this rank's KV cache of a rollout of so many samples; nothing is allocated.

        Raises:
            ValueError: if the latents do not fit the network.
        """
        return self._make_cache(latent_size, num_samples, max_chunks, torch.device("meta")).num_bytes

    def _make_cache(
        self,
        latent_size: tuple[int, int],
        num_samples: int,
        max_chunks: int,
        device: torch.device,
        retain: bool = False,
    ) -> KeyValueCache:
        config, settings = self.model.config, self.settings
        dtype = (
            next(self.model.parameters()).dtype if settings.cache_dtype is None else CACHE_DTYPES[settings.cache_dtype]
        )
        return KeyValueCache(
            num_layers=config.num_layers,
            batch_size=num_samples * self._branches,
            num_chunks=max_chunks,
            chunk_frames=settings.chunk_frames,
            patches=config.patches(*latent_size),
            num_heads=self.num_cached_heads,
            head_dim=config.head_dim,
            rule=settings.rule,
            relative_rope=settings.relative_rope,
            shot_rope_offset=settings.shot_rope_offset,
            dtype=dtype,
            device=device,
            retain=retain,
        )

    def noise(self, state: RolloutState) -> Latents:
        """The noise that the next chunk starts from, float32 `[b chunk_frames c h w]`."""
        shape = (self.settings.chunk_frames, *state.latent_shape)
        samples = [
            rng.normal(shape, state.seed, state.purpose, step=state.step, sample=sample, chunk=state.next_chunk)
            for sample in state.sample_ids
        ]
        return torch.stack(samples).to(self.device)

    def open_chunk(
        self,
        state: RolloutState,
        prompt_embeds: PromptEmbeds,
        prompt_index: Int[Tensor, " b"],
        shot_index: Sequence[int],
        negative_embeds: NegativeEmbeds | None = None,
    ) -> ChunkCondition:
        """Make room for the next chunk, with the prompt and shot of every sample in it; where a prompt switches within
        a shot, rebuild the cache if the settings say so.

        Args:
            prompt_embeds: the distinct prompts; a list that may grow in a rollout, and does not change otherwise.
        """
        state.enter(prompt_index.tolist(), shot_index, self.settings.rule)
        # Of a long list of prompts, a chunk needs the few that its samples follow.
        used, index = torch.unique(prompt_index.to(self.device), return_inverse=True)
        embeds = prompt_embeds.to(self.device)[used]
        if negative_embeds is not None:
            index = torch.cat([index, torch.full_like(index, len(used))])
            embeds = torch.cat([embeds, negative_embeds.to(embeds)])
        self._recache(state, embeds, index[:, None])
        view = state.cache.open(state.next_chunk, state.shot_index * self._branches)
        return ChunkCondition(view, embeds, index[:, None])

    @torch.no_grad()
    def _recache(self, state: RolloutState, embeds: PromptEmbeds, index: Int[Tensor, "rows 1"]) -> None:
        """Write what the next chunk sees of its shot anew, of the samples whose prompt switches there."""
        chunk, visible = state.next_chunk, state.past.chunks
        rows = list(zip(state.prompts, state.shot_index, strict=True))
        switching = [sample for sample, row in enumerate(rows) if switches(chunk, *row)]
        if self.settings.prompt_switch == "keep" or not (switching or chunk in state.recaches):
            return
        for place in range(state.past.num_chunks):
            samples = [s for s in switching if rows[s][1][visible[s][place]] == rows[s][1][chunk]]
            seen = [row[: place + 1] for row in visible] * self._branches
            view = state.cache.reopen(seen, state.shot_index * self._branches, samples)
            latents = state.past.chunk(place)
            timesteps = torch.zeros(latents.shape[:2], device=latents.device)
            self._call(ChunkCondition(view, embeds, index), latents, timesteps, write=True)

    def velocity(self, condition: ChunkCondition, x: Latents, timesteps: PerFrame) -> Latents:
        """One denoise call: the velocity at `x`, guided if the settings say so, float32.

        Args:
            x: the chunk's noisy latents `[b chunk_frames c h w]`.
            timesteps: 0 to 1000 `[b chunk_frames]`.
        """
        velocity = self._call(condition, x, timesteps, write=False)
        if not self.settings.guided:
            return velocity
        conditional, unconditional = velocity.chunk(2)
        return guide(conditional, unconditional, self.settings.guidance_scale)

    def write(self, state: RolloutState, condition: ChunkCondition, latents: Latents) -> None:
        """Context pass: the finished chunk goes into the cache, without gradient, and the rollout moves on."""
        with torch.no_grad():
            self._call(condition, latents, torch.zeros(latents.shape[:2], device=latents.device), write=True)
        condition.view.commit()
        state.past = state.past.and_then(state.next_chunk, latents)
        state.next_chunk += 1

    def _call(
        self, condition: ChunkCondition, x: Latents, timesteps: PerFrame, write: bool
    ) -> Float[Tensor, "rows f c h w"]:
        velocity: Tensor = self.model(
            latents=x.repeat(self._branches, 1, 1, 1, 1),
            timesteps=timesteps.repeat(self._branches, 1),
            prompt_embeds=condition.prompt_embeds,
            prompt_index=condition.prompt_index,
            frame_positions=condition.view.frame_positions,
            attention=condition.view.attention(write=write),
        )
        return velocity.float()

    def given_of(self, chunk: int, given: GivenFrames | None) -> Latents | None:
        """The given frames of one chunk."""
        first = chunk * self.settings.chunk_frames
        if given is None or given.shape[1] <= first:
            return None
        return given[:, first : first + self.settings.chunk_frames].to(self.device, torch.float32)

    @torch.no_grad()
    def _finish(
        self, state: RolloutState, condition: ChunkCondition, given: GivenFrames | None = None, *, write: bool
    ) -> Latents:
        """From noise to a finished chunk. A method, because `no_grad` inside a generator would reach its consumer."""
        x = hold(self.noise(state), given)
        num_given = 0 if given is None else given.shape[1]
        solver = make_solver(self.settings.solver, self.settings.num_steps, self.schedule)
        for timestep, _ in solver if num_given < x.shape[1] else ():
            timesteps = torch.full(x.shape[:2], timestep, device=x.device)
            timesteps[:, :num_given] = 0
            x = hold(solver.step(self.velocity(condition, x, timesteps), x), given)
        if write:
            self.write(state, condition, x)
        return x

    def _now(self) -> float:
        """Wall-clock seconds, once the work given to the device is done."""
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()
        return time.perf_counter()


def hold(x: Latents, given: GivenFrames | None) -> Latents:
    """A chunk's latents with the given frames in the place of its first ones."""
    return x if given is None else torch.cat([given, x[:, given.shape[1] :]], dim=1)
