"""A policy small enough to know in closed form, and one training iteration of any algorithm on it.

Symbols: P prompts, K samples a prompt, B = P K samples; two latent dimensions.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from flowrl.types import Algorithm, Batch, Cond, Loss, Prompt
from samplers import noise_source, rollout, rows, shifted_times, stable_seed

DIM = 2


class ToyPolicy(nn.Module):
    """The exact velocity for data N(centre, 0.5^2); the centre is a trainable bias plus gain times condition [P, 2]."""

    def __init__(self, bias: float = 0.0) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.full((DIM,), bias))
        self.gain = nn.Parameter(torch.ones(()))
        self.initial = (self.bias.detach().clone(), self.gain.detach().clone())
        self.calls = {"current": 0, "reference": 0}
        self.role = "current"

    def velocity(self, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        self.calls[self.role] += len(x)
        bias, gain = (self.bias, self.gain) if self.role == "current" else self.initial
        centre, t = bias + gain * cond["offset"], rows(t, x)
        surprise = (x - (1 - t) * centre) / (((1 - t) * 0.5) ** 2 + t**2)
        return t * surprise - centre - (1 - t) * 0.25 * surprise

    @contextmanager
    def reference(self) -> Iterator[None]:
        self.role = "reference"
        try:
            yield
        finally:
            self.role = "current"


def reward(x0: Tensor) -> Tensor:
    """Highest at (1, 1): -|x0 - 1|^2, [B]."""
    return -(x0.double() - 1).square().sum(1)


def collect(
    algorithm: Algorithm, policy: ToyPolicy, iteration: int = 0, num_prompts: int = 4, k: int = 8, seed: int = 0
) -> Batch:
    """Roll out, score and credit P prompts with K samples each."""
    plan = algorithm.plan(shifted_times(algorithm.num_steps, 3.0), iteration, k, seed)
    prompt = torch.arange(num_prompts).repeat_interleave(k // plan.leaves_per_root)
    member = torch.arange(k // plan.leaves_per_root).repeat(num_prompts) * plan.leaves_per_root
    noise = noise_source((DIM,), seed=seed, iteration=iteration, prompt=prompt, member=member)
    cond = {"offset": torch.linspace(-0.5, 0.5, num_prompts)[:, None].repeat(1, DIM)}
    roots = torch.arange(len(prompt))
    trajectory = rollout(
        lambda x, t, index: policy.velocity(x, t, {"offset": cond["offset"][index]}),
        noise(roots, torch.zeros_like(roots), -1),
        plan,
        algorithm.kernel,
        eta=algorithm.eta,
        prompt=prompt,
        group=prompt,
        noise=noise,
    )
    prompts = [Prompt(id=i, text=str(i)) for i in range(num_prompts)]
    batch = Batch(prompts=prompts, cond=cond, trajectory=trajectory, leaf_prompt=trajectory.leaf_prompt)
    batch.rewards = reward(trajectory.x0)
    batch.advantages = algorithm.credit(batch)
    return batch


def select(batch: Batch, index: Tensor) -> Batch:
    """The minibatch of these edges."""
    assert batch.advantages is not None
    return Batch(
        prompts=batch.prompts,
        cond=batch.cond,
        trajectory=batch.trajectory.select(index),
        leaf_prompt=batch.leaf_prompt,
        advantages=batch.advantages[index],
    )


def gradient(algorithm: Algorithm, policy: ToyPolicy, batch: Batch, scale: float = 1.0) -> tuple[Loss, Tensor]:
    """The loss of a batch and its gradient [3]; nothing is left in `.grad`."""
    loss = algorithm.loss(policy, batch)
    parameters = (policy.bias, policy.gain)
    grads = torch.autograd.grad(scale * loss.value, parameters)
    return loss, torch.cat([grad.flatten() for grad in grads])


def train(
    algorithm: Algorithm, iterations: int, lr: float, num_prompts: int = 4, k: int = 8, updates: int = 1, seed: int = 0
) -> tuple[ToyPolicy, list[dict[str, float]]]:
    """A plain training loop; the record of each iteration holds its mean reward and the metrics of its last update."""
    policy, records = ToyPolicy(), []
    optimizer = torch.optim.Adam(policy.parameters(), lr=lr)
    for iteration in range(iterations):
        batch = collect(algorithm, policy, iteration, num_prompts, k, seed)
        order = torch.Generator().manual_seed(stable_seed(seed, iteration))
        for index in torch.randperm(len(batch.trajectory), generator=order).tensor_split(updates):
            optimizer.zero_grad()
            loss = algorithm.loss(policy, select(batch, index))
            loss.value.backward()
            optimizer.step()
        assert batch.rewards is not None
        metrics = {name: float(value) for name, value in loss.metrics.items()}
        metrics |= {"reward": float(batch.rewards.mean()), "loss": float(loss.value.detach())}
        records.append(metrics | {"weight": float(policy.bias.detach().sum())})
    return policy, records
