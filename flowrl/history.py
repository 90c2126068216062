"""What a run remembers of every prompt: its recent rewards, and how often it was solved.

It is what curricula and baselines that span iterations ask.

    history = PromptHistory(size=32, num_prompts=len(prompts))
    history.add(prompt.id, rewards, iteration)          the rewards [K] of one group, after they were gathered
    history.mean(prompt.id), history.spread(prompt.id), history.group_variance(prompt.id)
    history.pass_rate(prompt.id), history.streak(prompt.id), history.outcomes()

It is fed with the gathered rewards, in the order of the iteration's prompts, and is therefore equal on every process.

Symbols: P prompts seen, K samples of a group, M remembered rewards of a prompt, R of all prompts together, I iterations
with a group of two verdicts or more.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

_NAMES = ("ids", "rewards", "groups", "counts", "seen", "last", "rated", "pass_rates", "streaks", "outcomes")

PASS_DECAY = 0.5
"""Weight of the past in a pass rate; a prompt's visits are epochs apart, and it has few of them."""
ALIKE = 1e-6
"""Rewards are alike where their std is at most this times max(1, max |r|), as for `group_advantages`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Past:
    """What is remembered of one prompt."""

    rewards: Tensor
    """float64 [M], oldest first."""
    groups: Tensor
    """int64 [M], which of the prompt's groups (from 0) each reward belongs to."""
    seen: int
    last: int
    group_variance: float
    rated: int
    """Groups with a verdict."""
    pass_rate: float
    """Running mean over them; 0 before the first."""
    streak: int


_UNSEEN = _Past(
    rewards=torch.zeros(0, dtype=torch.float64),
    groups=torch.zeros(0, dtype=torch.int64),
    seen=0,
    last=-1,
    group_variance=math.nan,
    rated=0,
    pass_rate=0.0,
    streak=0,
)


class PromptHistory:
    """The most recent rewards of every prompt, how many of its groups were seen, when last, and how well it went.

    A prompt that an iteration takes more than once comes with ids of its own, `id + n num_prompts`; all of them are
    the same prompt here.
    """

    def __init__(self, size: int, num_prompts: int, passing: float = 0.5) -> None:
        """Remember up to `size` rewards of each of `num_prompts` prompts; 0 = count the groups, but keep no reward.

        A sample passes where its reward is at least `passing`.
        """
        if size < 0 or num_prompts < 1:
            raise ValueError(
                f"a history of size={size} for num_prompts={num_prompts}: size (data.history) is 0 or more, "
                "and there is at least one prompt."
            )
        self.size, self.num_prompts, self.passing = size, num_prompts, passing
        self._past: dict[int, _Past] = {}
        self._outcomes: list[list[int]] = []

    def add(self, prompt_id: int, rewards: Tensor, iteration: int) -> None:
        """Remember the rewards [K] of one group; NaN (no verdict) is not stored, but the group counts as seen."""
        if rewards.ndim != 1:
            raise ValueError(f"prompt {prompt_id}: rewards of shape {tuple(rewards.shape)}; give one group's, [K].")
        before = self._of(prompt_id)
        new = rewards.detach().to("cpu", torch.float64)
        new = new[new.isfinite()]
        side = self._side(new)
        self._count(iteration, side)
        self._past[prompt_id % self.num_prompts] = self._made(
            torch.cat([before.rewards, new]),
            torch.cat([before.groups, torch.full((len(new),), before.seen)]),
            seen=before.seen + 1,
            last=iteration,
            rated=before.rated + bool(len(new)),
            pass_rate=self._followed(before, new),
            streak=_longer(before.streak, side),
        )

    def rewards(self, prompt_id: int) -> Tensor:
        """The remembered rewards, float64 [M], oldest first; [0] of an unseen prompt."""
        return self._of(prompt_id).rewards.clone()

    def groups(self, prompt_id: int) -> Tensor:
        """Which of the prompt's groups each remembered reward belongs to, int64 [M], counted from 0."""
        return self._of(prompt_id).groups.clone()

    def seen(self, prompt_id: int) -> int:
        """How many groups of the prompt were seen, whether or not their rewards are still remembered."""
        return self._of(prompt_id).seen

    def last(self, prompt_id: int) -> int:
        """The iteration in which the prompt was seen last; -1 = never."""
        return self._of(prompt_id).last

    def mean(self, prompt_id: int) -> float:
        """Mean of the remembered rewards; NaN where there is none."""
        return self._of(prompt_id).rewards.mean().item()

    def spread(self, prompt_id: int) -> float:
        """Standard deviation (divisor M) of the remembered rewards, all groups together; NaN where there is none."""
        rewards = self._of(prompt_id).rewards
        return rewards.std(correction=0).item() if len(rewards) else math.nan

    def group_variance(self, prompt_id: int) -> float:
        """Variance within a group, pooled over the remembered ones: sum (r - mean of its group)² / (M - groups).

        Unlike `spread`² it does not count that the policy has become better from one group to the next. NaN where no
        group has two remembered rewards.
        """
        return self._of(prompt_id).group_variance

    def rated(self, prompt_id: int) -> int:
        """How many groups of the prompt had a verdict."""
        return self._of(prompt_id).rated

    def pass_rate(self, prompt_id: int) -> float:
        """Running mean, over its groups, of the share of a group's samples that pass; NaN before the first verdict.

        It starts at the first group's share p; then e <- 0.5 e + 0.5 p.
        """
        past = self._of(prompt_id)
        return past.pass_rate if past.rated else math.nan

    def streak(self, prompt_id: int) -> int:
        """How many of its latest groups in a row had equal rewards: n > 0 that pass, or -n that do not; 0 = none.

        A group with fewer than two verdicts tells nothing and leaves it as it is.
        """
        return self._of(prompt_id).streak

    def outcomes(self) -> Tensor:
        """Groups of each iteration, int64 [I,4]: iteration, groups, those all alike that pass, and that do not.

        Only groups with two verdicts or more count. Every group that was drawn does, whether or not it was trained on.
        """
        return torch.tensor(self._outcomes, dtype=torch.int64).view(-1, 4)

    def state_dict(self) -> dict[str, Tensor]:
        """Everything as plain finite tensors, prompts in the order of their ids; `load_state_dict` gives it all back.

        `ids`, `counts` (M of each), `seen`, `last`, `rated`, `streaks`: int64 [P]; `pass_rates` float64 [P], 0 where
        `rated` is; `rewards` float64 [R] and `groups` int64 [R], prompt after prompt; `outcomes` int64 [I,4]. There is
        no padding, since a checkpoint refuses NaN.
        """
        ids = sorted(self._past)
        past = [self._past[key] for key in ids]
        return {
            "ids": torch.tensor(ids, dtype=torch.int64),
            "rewards": torch.cat([_UNSEEN.rewards, *(p.rewards for p in past)]),
            "groups": torch.cat([_UNSEEN.groups, *(p.groups for p in past)]),
            "counts": torch.tensor([len(p.rewards) for p in past], dtype=torch.int64),
            "seen": torch.tensor([p.seen for p in past], dtype=torch.int64),
            "last": torch.tensor([p.last for p in past], dtype=torch.int64),
            "rated": torch.tensor([p.rated for p in past], dtype=torch.int64),
            "pass_rates": torch.tensor([p.pass_rate for p in past], dtype=torch.float64),
            "streaks": torch.tensor([p.streak for p in past], dtype=torch.int64),
            "outcomes": self.outcomes(),
        }

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Become the history that `state_dict` described; ValueError where it is another run's."""
        if missing := [name for name in _NAMES if name not in state]:
            raise ValueError(f"the saved prompt history lacks {', '.join(missing)}; start a new run.")
        ids, counts = state["ids"].tolist(), state["counts"].tolist()
        if ids and max(ids) >= self.num_prompts:
            raise ValueError(
                f"the saved history knows prompt {max(ids)}, but data.prompts has only {self.num_prompts}; "
                "put the old prompts back, or start a new run."
            )
        if counts and max(counts) > self.size:
            raise ValueError(
                f"the saved history has {max(counts)} rewards of a prompt, more than data.history={self.size}; "
                "put the old data.history back, or start a new run."
            )
        rewards, groups = (torch.split(state[name].cpu(), counts) for name in ("rewards", "groups"))
        per_prompt = ("seen", "last", "rated", "pass_rates", "streaks")
        numbers = zip(*(state[name].tolist() for name in per_prompt), strict=True)
        self._past = {
            key: self._made(
                rewards[i].clone(), groups[i].clone(), seen=seen, last=last, rated=rated, pass_rate=rate, streak=streak
            )
            for i, (key, (seen, last, rated, rate, streak)) in enumerate(zip(ids, numbers, strict=True))
        }
        self._outcomes = state["outcomes"].tolist()

    def _of(self, prompt_id: int) -> _Past:
        return self._past.get(prompt_id % self.num_prompts, _UNSEEN)

    def _side(self, rewards: Tensor) -> int | None:
        """Of a group's verdicts: 1 if alike and passing, -1 if alike and not, 0 if they differ; None below two."""
        if len(rewards) < 2:
            return None
        if rewards.std(correction=0) > ALIKE * max(1.0, rewards.abs().max().item()):
            return 0
        return 1 if rewards.mean() >= self.passing else -1

    def _count(self, iteration: int, side: int | None) -> None:
        if side is None:
            return
        if not self._outcomes or self._outcomes[-1][0] != iteration:
            self._outcomes.append([iteration, 0, 0, 0])
        row = self._outcomes[-1]
        row[1:] = [row[1] + 1, row[2] + (side > 0), row[3] + (side < 0)]

    def _followed(self, before: _Past, rewards: Tensor) -> float:
        """The pass rate after a group's verdicts."""
        if not len(rewards):
            return before.pass_rate
        share = (rewards >= self.passing).double().mean().item()
        return PASS_DECAY * before.pass_rate + (1 - PASS_DECAY) * share if before.rated else share

    def _made(
        self, rewards: Tensor, groups: Tensor, *, seen: int, last: int, rated: int, pass_rate: float, streak: int
    ) -> _Past:
        first = max(0, len(rewards) - self.size)
        rewards, groups = rewards[first:], groups[first:]
        # Kept rather than computed on demand: a curriculum asks for it of every prompt in every iteration.
        return _Past(
            rewards=rewards,
            groups=groups,
            seen=seen,
            last=last,
            group_variance=_within(rewards, groups),
            rated=rated,
            pass_rate=pass_rate,
            streak=streak,
        )


def _longer(streak: int, side: int | None) -> int:
    """A streak after one more group: it goes on where the side is its own, and begins anew where it is the other."""
    if side is None:
        return streak
    return streak + side if streak * side > 0 else side


def _within(rewards: Tensor, groups: Tensor) -> float:
    total, freedom = 0.0, 0
    for group in dict.fromkeys(groups.tolist()):
        members = rewards[groups == group]
        members = members - members[0]  # equal rewards then have variance 0, not that of a rounded mean
        total += (members - members.mean()).square().sum().item()
        freedom += len(members) - 1
    return total / freedom if freedom else math.nan
