"""RPO (NeurIPS 2024, arXiv:2407.12164): labels drawn from the rewards, and flow matching on the reference side.

| symbol | here |
|---|---|
| x_ref, x_gen | the better and the worse sample of a pair; of a folder of pairs the chosen and the rejected |
| r, lambda-harmonic | the run's reward; `rewards/harmonic.py` |
| y ~ Bernoulli(sigmoid(r_ref - r_gen)) | the sign of the rows' credit, sharpened by label_gain |
| similarity loss | anchor |
| beta = 1 in -log sigmoid(beta [...]) | beta = 2, which is halved |
| early stopping on the validation reward, lambda 0.3 | data.evaluation: headline, patience, keep: best |
"""

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from flowrl.algorithms.matching import member_of, unit_mean
from flowrl.algorithms.preference import Preference
from flowrl.types import Batch
from samplers import stable_seed

_LABELS = -5


class RPO(Preference):
    """RPO (arXiv:2407.12164): anchor e_ref - [y log sigmoid(D) + (1 - y) log sigmoid(-D)], D the logit of Flow-DPO.

    Note: errors are those of the velocity; the official code's models (SD 2.1, SDXL) have errors of the noise.
    Note: both sides of a pair have one t and one noise; the official code draws them apart.
    Note: the paper pairs pictures of a subject with generated ones. Without such a folder the better of two own samples
    takes the subject's place, and its reward is always the higher one.
    Note: rewards that differ by 0.1 make labels that are right in 52 of 100 cases; `label_gain` is ours.
    """

    beta: Annotated[
        float,
        Field(description="Strength of a pair; the paper has no factor, which is 2 here, where half is taken.", gt=0),
    ] = 2.0
    anchor: Annotated[
        float, Field(description="Weight of flow matching on the better sample, the paper's similarity loss.", ge=0)
    ] = 1.0
    label_gain: Annotated[
        float, Field(description="y is 1 with probability sigmoid(label_gain (r_ref - r_gen)).", gt=0)
    ] = 1.0

    def strength(self, t: Tensor) -> Tensor:
        """`beta` at all times, [N]."""
        return torch.full_like(t, self.beta)

    def preference(self, batch: Batch, rewards: Tensor) -> Tensor:
        """+1 and -1 by the label of each pair and draw [N]: the better row is chosen with the probability above."""
        assert batch.draws is not None
        better = super().preference(batch, rewards)
        # Both rows lie half of the pair's difference from its mean.
        lead = 2 * (rewards - unit_mean(rewards, batch.draws.unit.to(rewards.device))).abs()
        drawn = torch.tensor(_uniforms(batch), dtype=rewards.dtype)
        label = drawn.to(rewards.device) < torch.sigmoid(self.label_gain * lead)
        return torch.where(label, better, -better)


def _uniforms(batch: Batch) -> list[float]:
    """A number in [0, 1) of each draw of each pair, the same in both of its rows, [N]."""
    draws, member = batch.draws, member_of(batch)
    assert draws is not None
    pairs: dict[int, list[int]] = {}
    for unit, sample in zip(draws.unit.tolist(), draws.sample.tolist(), strict=True):
        pairs.setdefault(unit, []).append(int(member[sample]))
    # With shared draws the pairs of a prompt have one key: who is in a pair tells them apart.
    named = [(*key, *sorted(pairs[unit])) for key, unit in zip(draws.key.tolist(), draws.unit.tolist(), strict=True)]
    return [_uniform(stable_seed(batch.seed, batch.iteration, *name, _LABELS)) for name in named]


def _uniform(seed: int) -> float:
    return torch.rand((), generator=torch.Generator().manual_seed(seed), dtype=torch.float64).item()
