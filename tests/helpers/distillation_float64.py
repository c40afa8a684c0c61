"""A step of distillation in float64, from prompts and seeds to both losses: no line of the modules, the objective, the
rollout or the adapters runs in here. Random numbers come from the package, by name."""

from collections.abc import Sequence

import torch
from torch import Tensor

from helpers.wan_float64 import Weights, wan_velocity
from longlive import rng
from longlive.modules.distillation import DistillationModule

FRAMES = 4
"""Of a chunk."""


def merged(module: DistillationModule, adapter: str | None) -> Weights:
    """The network of a role, by Wan's names; adapters of rank 4 and alpha 8."""
    weights = {}
    for name, parameter in module.network.named_parameters():
        if "lora_" not in name:
            weights[name.replace(".base_layer.", ".")] = parameter.detach().double()
    pairs: dict[str, dict[str, Tensor]] = {}
    if adapter is not None:
        for name, parameter in module.network.named_parameters():
            layer, _, matrix = name.rpartition(".lora_")
            if f".{adapter}." in name:
                pairs.setdefault(f"{layer}.weight", {})[matrix[0]] = parameter.detach().double()
    for name, pair in pairs.items():
        weights[name] = weights[name] + 8 / 4 * pair["B"] @ pair["A"]
    return weights


class Script:
    """A step of one sample: one dense pass per network call.

    Args:
        module: in float32, with Euler steps on a schedule of shift 3, a window of two chunks, and shots that are 4
            positions apart.
        prompts, shots: of every chunk.
        sample, step: name the draws.
    """

    def __init__(
        self, module: DistillationModule, prompts: Sequence[str], shots: list[int], sample: int, step: int
    ) -> None:
        self.weights = {role: merged(module, role) for role in ("student", "critic")}
        self.weights["teacher"] = merged(module, None)
        encode = module.text_encoder.encode
        self.prompts = [embeds.double() for embeds in encode(list(prompts))]
        self.negative = [encode([""])[0].double()] * len(prompts)
        self.heads, self.seed = module.model_config.num_heads, module.seed
        self.shots, self.sample, self.step = shots, sample, step
        self.chunks = range(len(shots))

    def frames(self, chunks: list[int]) -> list[float]:
        return [c * FRAMES + f + 4.0 * self.shots[c] for c in chunks for f in range(FRAMES)]

    def sees(self, chunk: int, other: int) -> bool:
        """A window of two chunks: itself and the one before."""
        return other in (chunk - 1, chunk)

    def normal(self, purpose: str, chunk: int) -> Tensor:
        return rng.normal(
            (FRAMES, 16, 4, 4), self.seed, purpose, step=self.step, sample=self.sample, chunk=chunk
        ).double()

    def rollout(self, role: str) -> Tensor:
        """Two Euler steps at sigma 1 and shifted 1/2; exits at the step that is drawn."""
        sigmas = (1.0, 3 * 0.5 / (1 + 2 * 0.5), 0.0)
        exit_step = rng.integer(2, self.seed, f"{role}_rollout_exit", step=self.step, chunk=0)
        video = torch.empty(0, 16, 4, 4, dtype=torch.float64)
        for chunk in self.chunks:
            x, chunks = self.normal(f"{role}_rollout", chunk), list(range(chunk + 1))
            owner = torch.tensor(chunks).repeat_interleave(FRAMES).tolist()
            visible = torch.tensor([[self.sees(mine, other) and other <= mine for other in owner] for mine in owner])
            for index in range(exit_step + 1):
                velocity = wan_velocity(
                    self.weights["student"],
                    self.heads,
                    torch.cat([video, x]),
                    [0.0] * len(video) + [1000 * sigmas[index]] * FRAMES,
                    self.frames(chunks),
                    [self.prompts[c] for c in owner],
                    visible,
                )[-FRAMES:]
                target = 0.0 if index == exit_step else sigmas[index + 1]
                x = x + (target - sigmas[index]) * velocity
            video = torch.cat([video, x])
        return video

    def noised(self, role: str, x: Tensor) -> tuple[float, Tensor, Tensor]:
        u = 1 - rng.integer(1000, self.seed, f"{role}_timestep", step=self.step, sample=self.sample) / 1000
        timestep = min(max(torch.tensor(3000 * u / (1 + 2 * u)).item(), 20.0), 980.0)
        eps = torch.cat([self.normal(f"{role}_noise", chunk) for chunk in self.chunks])
        return timestep, (1 - timestep / 1000) * x + timestep / 1000 * eps, eps

    def velocity(self, role: str, history: Tensor, x_t: Tensor, timestep: float, prompts: list[Tensor]) -> Tensor:
        chunks = list(self.chunks)
        places = [(kind, c) for kind in ("clean", "noisy") for c in chunks for _ in range(FRAMES)]

        def visible(mine: tuple[str, int], other: tuple[str, int]) -> bool:
            if other[0] == "noisy":
                return mine == other
            return self.sees(mine[1], other[1]) and (other[1] < mine[1] or mine == other)

        return wan_velocity(
            self.weights[role],
            self.heads,
            torch.cat([history, x_t]),
            [0.0] * len(history) + [timestep] * len(x_t),
            self.frames(chunks) * 2,
            [prompts[c] for _, c in places],
            torch.tensor([[visible(mine, other) for other in places] for mine in places]),
        )[len(history) :]

    def student_loss(self) -> float:
        x = self.rollout("student")
        timestep, x_t, _ = self.noised("student", x)

        def clean(role: str, prompts: list[Tensor]) -> Tensor:
            return x_t - timestep / 1000 * self.velocity(role, x, x_t, timestep, prompts)

        cond, uncond = clean("teacher", self.prompts), clean("teacher", self.negative)
        real = cond + 3 * (cond - uncond)
        total = 0.0
        for part in (slice(c * FRAMES, (c + 1) * FRAMES) for c in self.chunks):
            g = (clean("critic", self.prompts) - real)[part] / (x - real)[part].abs().mean()
            total += 0.5 * float(g.square().mean()) / len(self.chunks)
        return total

    def critic_loss(self) -> float:
        x = self.rollout("critic")
        timestep, x_t, eps = self.noised("critic", x)
        velocity = self.velocity("critic", x, x_t, timestep, self.prompts)
        return float((velocity - (eps - x)).square().mean())
