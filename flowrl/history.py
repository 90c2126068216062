"""What a run remembers of every prompt: its recent rewards, for curricula and for baselines that span iterations.

    history = PromptHistory(size=32, num_prompts=len(prompts))
    history.add(prompt.id, rewards, iteration)          the rewards [K] of one group, after they were gathered
    history.mean(prompt.id), history.spread(prompt.id), history.group_variance(prompt.id)

It is fed with the gathered rewards, in the order of the iteration's prompts, and is therefore equal on every process.

Symbols: P prompts seen, K samples of a group, M remembered rewards of a prompt, R of all prompts together.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

_NAMES = ("ids", "rewards", "groups", "counts", "seen", "last")


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


_UNSEEN = _Past(
    rewards=torch.zeros(0, dtype=torch.float64),
    groups=torch.zeros(0, dtype=torch.int64),
    seen=0,
    last=-1,
    group_variance=math.nan,
)


class PromptHistory:
    """The most recent rewards of every prompt, how many of its groups were seen, and in which iteration last.

    A prompt that an iteration takes more than once comes with ids of its own, `id + n num_prompts`; all of them are
    the same prompt here.
    """

    def __init__(self, size: int, num_prompts: int) -> None:
        """Remember up to `size` rewards of each of `num_prompts` prompts; 0 = count the groups, but keep no reward."""
        if size < 0 or num_prompts < 1:
            raise ValueError(
                f"a history of size={size} for num_prompts={num_prompts}: size (data.history) is 0 or more, "
                "and there is at least one prompt."
            )
        self.size, self.num_prompts = size, num_prompts
        self._past: dict[int, _Past] = {}

    def add(self, prompt_id: int, rewards: Tensor, iteration: int) -> None:
        """Remember the rewards [K] of one group; NaN (no verdict) is not stored, but the group counts as seen."""
        if rewards.ndim != 1:
            raise ValueError(f"prompt {prompt_id}: rewards of shape {tuple(rewards.shape)}; give one group's, [K].")
        before = self._of(prompt_id)
        new = rewards.detach().to("cpu", torch.float64)
        new = new[new.isfinite()]
        self._past[prompt_id % self.num_prompts] = self._made(
            torch.cat([before.rewards, new]),
            torch.cat([before.groups, torch.full((len(new),), before.seen)]),
            seen=before.seen + 1,
            last=iteration,
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

    def state_dict(self) -> dict[str, Tensor]:
        """Everything as plain finite tensors, prompts in the order of their ids; `load_state_dict` gives it all back.

        `ids`, `counts` (M of each), `seen`, `last`: int64 [P]; `rewards` float64 [R] and `groups` int64 [R], prompt
        after prompt. There is no padding, since a checkpoint refuses NaN.
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
        seen, last = state["seen"].tolist(), state["last"].tolist()
        self._past = {
            key: self._made(rewards[i].clone(), groups[i].clone(), seen=seen[i], last=last[i])
            for i, key in enumerate(ids)
        }

    def _of(self, prompt_id: int) -> _Past:
        return self._past.get(prompt_id % self.num_prompts, _UNSEEN)

    def _made(self, rewards: Tensor, groups: Tensor, *, seen: int, last: int) -> _Past:
        first = max(0, len(rewards) - self.size)
        rewards, groups = rewards[first:], groups[first:]
        # Kept rather than computed on demand: a curriculum asks for it of every prompt in every iteration.
        return _Past(rewards=rewards, groups=groups, seen=seen, last=last, group_variance=_within(rewards, groups))


def _within(rewards: Tensor, groups: Tensor) -> float:
    total, freedom = 0.0, 0
    for group in dict.fromkeys(groups.tolist()):
        members = rewards[groups == group]
        members = members - members[0]  # equal rewards then have variance 0, not that of a rounded mean
        total += (members - members.mean()).square().sum().item()
        freedom += len(members) - 1
    return total / freedom if freedom else math.nan
