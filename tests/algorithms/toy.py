"""A policy small enough to know in closed form, and one training iteration of any algorithm on it.

Symbols: P prompts, K samples a prompt, B = P K samples; two latent dimensions.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from flowrl.algorithms.matching import noised
from flowrl.algorithms.schedule import plans_of
from flowrl.collect import grow, roots_of_prompts
from flowrl.critic import Critic
from flowrl.history import PromptHistory
from flowrl.types import T_NEXT, Algorithm, Batch, Cond, Loss, Prompt, take
from samplers import Plan, Trajectory, noise_source, rollout, rows, shifted_times, stable_seed

DIM = 2


class ToyPolicy(nn.Module):
    """The exact velocity for data N(centre, 0.5^2); the centre is a trainable bias plus gain times condition [P, 2].

    With the condition `t_next` it is the exact mean velocity from t to t_next, which may equal t.
    """

    def __init__(self, bias: float = 0.0) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.full((DIM,), bias))
        self.gain = nn.Parameter(torch.ones(()))
        self.initial = (self.bias.detach().clone(), self.gain.detach().clone())
        self.before = self.initial
        self.old_is_current = False
        self.calls = {"current": 0, "reference": 0, "teacher": 0, "old": 0}
        self.role = "current"

    def velocity(self, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        self.calls[self.role] += len(x)
        bias, gain = self._weights()
        centre, t = bias + gain * cond["offset"], rows(t, x)
        surprise = (x - (1 - t) * centre) / (((1 - t) * 0.5) ** 2 + t**2)
        v = t * surprise - centre - (1 - t) * 0.25 * surprise
        if T_NEXT not in cond:
            return v
        r = rows(cond[T_NEXT], x)
        # The ODE keeps a state at the same number of standard deviations from the mean.
        width, width_next = (((1 - s) * 0.5).square().add(s**2).sqrt() for s in (t, r))
        x_next = (1 - r) * centre + width_next / width * (x - (1 - t) * centre)
        return torch.where(r == t, v, (x - x_next) / torch.where(r == t, 1.0, t - r))

    def _weights(self) -> tuple[Tensor, Tensor]:
        if self.role == "current":
            return self.bias, self.gain
        return self.before if self.role == "old" else self.initial

    @contextmanager
    def reference(self) -> Iterator[None]:
        self.role = "reference"
        try:
            yield
        finally:
            self.role = "current"

    @contextmanager
    def old(self) -> Iterator[None]:
        """The weights that follow: the initial ones until `follow` is called."""
        self.role = "old"
        try:
            yield
        finally:
            self.role = "current"

    def follow(self, decay: float) -> None:
        """old <- decay old + (1 - decay) trained."""
        bias, gain = self.before
        self.before = (bias.lerp(self.bias.detach(), 1 - decay), gain.lerp(self.gain.detach(), 1 - decay))

    @contextmanager
    def teacher(self, weights: str | None, guidance: float) -> Iterator[None]:
        """The initial weights; guidance has no meaning here, and there are no others."""
        assert weights is None
        self.role = "teacher"
        try:
            yield
        finally:
            self.role = "current"


def reward(x0: Tensor) -> Tensor:
    """Highest at (1, 1): -|x0 - 1|^2, [B]."""
    return -(x0.double() - 1).square().sum(1)


def collect(
    algorithm: Algorithm, policy: ToyPolicy, iteration: int = 0, num_prompts: int = 4, k: int = 8, seed: int = 0,
    history: PromptHistory | None = None, reward: Callable[[Tensor], Tensor] = reward, critic: Critic | None = None,
) -> Batch:  # fmt: skip
    """Roll out, score and credit P prompts with K samples each; edges with NaN credit are still there."""
    plans = plans_of(algorithm, shifted_times(algorithm.num_steps, 3.0), iteration, k, seed)
    width = plans[0].leaves_per_root
    prompt, number = roots_of_prompts(plans, num_prompts, k)
    cond = {"offset": torch.linspace(-0.5, 0.5, num_prompts)[:, None].repeat(1, DIM)}

    def walk(plan: Plan, mine: Tensor) -> Trajectory:
        noise = noise_source((DIM,), seed=seed, iteration=iteration, prompt=prompt[mine], member=number[mine] * width)
        roots = torch.arange(len(mine))
        return rollout(
            lambda x, t, i, *then: policy.velocity(x, t, take(cond, i) | dict(zip([T_NEXT], then, strict=False))),
            noise(roots, torch.zeros_like(roots), -1), plan, algorithm.kernel, eta=algorithm.eta,
            prompt=prompt[mine], group=prompt[mine], noise=noise, keep_mean=algorithm.needs.means,
        )  # fmt: skip

    trajectory = grow(plans, prompt * (k // width) + number, walk)
    prompts = [Prompt(id=i, text=str(i)) for i in range(num_prompts)]
    batch = Batch(
        prompts=prompts, cond=cond, trajectory=trajectory, leaf_prompt=trajectory.leaf_prompt, plans=plans,
        iteration=iteration, seed=seed, groups=prompts, critic=critic,
    )  # fmt: skip
    batch.rewards = reward(trajectory.x0)
    batch.scores, batch.weights = {"reward": batch.rewards}, {"reward": 1.0}
    batch.history = history or PromptHistory(32, num_prompts)
    for number_of, rewards in enumerate(batch.rewards.view(num_prompts, k)):
        batch.history.add(number_of, rewards, iteration)
    batch.times, batch.place = shifted_times(algorithm.num_steps, 3.0), torch.arange(len(batch.rewards))
    batch.draws = algorithm.draws(batch)
    batch.advantages = algorithm.credit(batch)
    return batch


def scattered() -> ToyPolicy:
    """A policy whose trained, old and initial weights are three."""
    policy = ToyPolicy()
    policy.before = (torch.tensor([0.15, -0.1]), torch.tensor(1.1))
    with torch.no_grad():
        policy.bias += torch.tensor([0.3, 0.1])
        policy.gain -= 0.2
    return policy


class Asked(NamedTuple):
    """At the states of a batch's draws, in float64 [N,2]: the target and what the three weights say."""

    target: Tensor
    current: Tensor
    old: Tensor
    initial: Tensor


def asked(policy: ToyPolicy, batch: Batch) -> Asked:
    """The velocities that a forward-process loss compares; that of the trained weights with its graph."""
    at = noised(batch)
    state = at.x.double(), at.t.double(), at.cond
    with torch.no_grad(), policy.old():
        old = policy.velocity(*state)
    with torch.no_grad(), policy.reference():
        initial = policy.velocity(*state)
    return Asked(at.target.double(), policy.velocity(*state), old, initial)


def live(batch: Batch) -> Batch:
    """Without the rows that are not trained on."""
    assert batch.advantages is not None
    return batch.select(~batch.advantages.isnan())


def gradient(algorithm: Algorithm, policy: ToyPolicy, batch: Batch, scale: float = 1.0) -> tuple[Loss, Tensor]:
    """The loss of a batch and its gradient [3]; nothing is left in `.grad`."""
    loss = algorithm.loss(policy, batch)
    parameters = (policy.bias, policy.gain)
    grads = torch.autograd.grad(scale * loss.value, parameters)
    return loss, torch.cat([grad.flatten() for grad in grads])


def train(
    algorithm: Algorithm, iterations: int, lr: float, num_prompts: int = 4, k: int = 8, updates: int = 1, seed: int = 0,
    critic: Critic | None = None,
) -> tuple[ToyPolicy, list[dict[str, float]]]:  # fmt: skip
    """A plain training loop; the record of each iteration holds its mean reward and the metrics of its last update."""
    policy, records, history = ToyPolicy(), [], PromptHistory(32, num_prompts)
    optimizer = torch.optim.Adam(policy.parameters(), lr=lr)
    for iteration in range(iterations):
        batch = live(collect(algorithm, policy, iteration, num_prompts, k, seed, history, critic=critic))
        order = torch.Generator().manual_seed(stable_seed(seed, iteration))
        unit = torch.arange(len(batch.rows)) if batch.draws is None else batch.draws.unit
        names = unit.unique()
        for chosen in names[torch.randperm(len(names), generator=order)].tensor_split(updates):
            optimizer.zero_grad()
            loss = algorithm.loss(policy, batch.select(torch.isin(unit, chosen).nonzero().flatten()))
            loss.value.backward()
            optimizer.step()
        policy.follow(algorithm.old_decay(iteration))
        assert batch.rewards is not None
        metrics = {name: float(value) for name, value in loss.metrics.items()}
        metrics |= {"reward": float(batch.rewards.mean()), "loss": float(loss.value.detach())}
        records.append(metrics | {"weight": float(policy.bias.detach().sum())})
    return policy, records
