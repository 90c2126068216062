"""Cascade RL (InternVL3.5, arXiv:2508.18265): first offline on preferences, then online on rewards, in one run.

| symbol | here |
|---|---|
| the offline stage, MPO (or DPO) | offline: {name: token_mpo, ...}, for the first `switch` iterations |
| its samples, of the model before the stage | drawn by the old policy, which stands still until the switch |
| the online stage, GSPO | online: {name: gspo, ...}, from then on |
"""

from typing import Annotated, Any

from pydantic import Field, field_validator
from torch import Tensor

from flowrl.resolve import resolve
from flowrl.types import Hyperparameters, Loss, Needs, TokenBatch, TokenPolicy

Stage = dict[str, Any]


class Cascade(Hyperparameters):
    """Cascade RL (arXiv:2508.18265): a method for answers on the initial model's samples, then another on the policy's.

    The first lifts the model cheaply and without instability, the second goes beyond what its samples hold.
    Note: the paper draws the offline samples once and trains on them in a run of its own; here each iteration of the
    stage draws some, of the same initial model, so that nothing is stored.
    """

    offline: Annotated[
        Stage, Field(description="The first stage: {name: ..., its settings}.", validate_default=True)
    ] = {"name": "token_mpo"}
    online: Annotated[
        Stage, Field(description="The second stage: {name: ..., its settings}.", validate_default=True)
    ] = {"name": "gspo"}
    switch: Annotated[int, Field(description="Iterations of the first stage.", ge=1)] = 20

    @field_validator("offline", "online")
    @classmethod
    def _complete(cls, stage: Stage) -> Stage:
        """With every default of the method written down."""
        made = _method(stage)
        if not made.needs.tokens or made.needs.value:
            raise ValueError(f"{stage['name']} cannot be a stage: it is not for answers, or wants a value head.")
        if made.needs.old or made.needs.continuations or made.needs.besides:
            raise ValueError(
                f"{stage['name']} cannot be a stage with reset_every, nor with more answers than those of a group "
                "(values=monte_carlo, remax): the old policy and the answers are the cascade's own."
            )
        return {"name": stage["name"], **made.model_dump(mode="json")}

    @property
    def needs(self) -> Needs:
        """What either stage asks for, and a policy that follows: it draws the samples."""
        first, then = _method(self.offline).needs, _method(self.online).needs
        shared = ("reference", "reference_logprobs", "whole_groups", "scores", "token_credit")
        either = {name: getattr(first, name) or getattr(then, name) for name in shared}
        return Needs(tokens=True, old=True, history=max(first.history, then.history), **either)

    @property
    def fewest_samples(self) -> int:
        """Answers to a prompt that either stage compares."""
        return max(getattr(_method(stage), "fewest_samples", 1) for stage in (self.offline, self.online))

    def old_decay(self, iteration: int) -> float:
        """1, the initial weights draw the samples, until the last iteration of the first stage; then 0."""
        return 1.0 if iteration + 1 < self.switch else 0.0

    def credit(self, batch: TokenBatch) -> Tensor:
        """As the stage's method gives it."""
        credit: Tensor = self._stage(batch.iteration).credit(batch)
        return credit

    def loss(self, policy: TokenPolicy, batch: TokenBatch) -> Loss:
        """The stage's own."""
        loss: Loss = self._stage(batch.iteration).loss(policy, batch)
        return loss

    def mass(self, batch: TokenBatch) -> Tensor:
        """What the stage's method divides by."""
        mass: Tensor = self._stage(batch.iteration).mass(batch)
        return mass

    def share(self, batch: TokenBatch, total: Tensor) -> float:
        """As the stage's method shares."""
        return float(self._stage(batch.iteration).share(batch, total))

    def pairs_answers(self, iteration: int) -> bool:
        """Whether the stage's method does."""
        return bool(self._stage(iteration).pairs_answers(iteration))

    def starts_at_one(self, batch: TokenBatch) -> bool:
        """Whether the stage's method does."""
        return bool(self._stage(batch.iteration).starts_at_one(batch))

    def _stage(self, iteration: int) -> Any:
        return _method(self.offline if iteration < self.switch else self.online)


def _method(stage: Stage) -> Any:
    """The record of a stage; ValueError where it has no name."""
    if not isinstance(stage.get("name"), str):
        raise ValueError(f"a stage is {{name: ..., its settings}}, not {stage!r}.")
    return resolve(stage["name"], "flowrl.algorithms")(**{key: value for key, value in stage.items() if key != "name"})
