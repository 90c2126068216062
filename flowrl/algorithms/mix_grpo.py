"""MixGRPO (arXiv:2507.21802): SDE steps inside a window that slides from noise to data, ODE steps outside.

| symbol | here |
|---|---|
| T | num_steps |
| S, the interval of SDE steps; w; s; tau | the plan's stochastic steps; window; stride; shift_every |
| l, left end of the window | `samplers.window_start` |
| G group size | data.samples_per_prompt |
| A_i | credit |
| epsilon | clip_range |
"""

from typing import Annotated

from pydantic import Field, model_validator
from torch import Tensor

from flowrl.algorithms import fields
from flowrl.algorithms.policy_gradient import PolicyGradient
from flowrl.algorithms.schedule import check_group_size, share_noise, training_times
from samplers import Plan, Solver, Strategy, compress_tail, window, window_start


class MixGRPO(PolicyGradient):
    """MixGRPO (arXiv:2507.21802): SDE inside a sliding window, ODE outside; only the window's steps are optimised.

    With `tail` below 1 MixGRPO-Flash: fewer points behind the window (take `solver: dpmpp_2m` for them). Flash* is
    `strategy: frozen, tail: 0.2`.
    Note: the public code's window shrinks and vanishes at the clean end; here it keeps its width (see `samplers`).
    Note: the paper's grid is `shift: 3` over equal steps; by default the model's own grid is taken.
    Note: exp_decay starts at step 13 of 25 in the public code; here at the same share of any num_steps.
    Note: Flash's public code ends late windows above 0; here every tail has at least three points and ends at 0.
    Note: Flash's public code takes its solver behind the window only; here it is that of the ODE steps before it too.
    """

    num_steps: fields.NumSteps = 25
    window: Annotated[fields.Count, Field(description="Stochastic, trained steps w of an iteration.")] = 4
    stride: Annotated[fields.Count, Field(description="Steps s by which the window moves on.")] = 1
    shift_every: Annotated[fields.Count, Field(description="Iterations tau at one place (decay: the first).")] = 25
    strategy: Annotated[Strategy, Field(description="How it moves; decay leaves late steps sooner.")] = "progressive"
    last_start: Annotated[
        int | None, Field(description="Last place of the window's first step; null: as late as it fits.", ge=0)
    ] = None
    roll_back: Annotated[bool, Field(description="From the last place go back to the first; else stay there.")] = True
    solver: Annotated[Solver, Field(description="Solver of the ODE steps.")] = "euler"
    tail: Annotated[
        float, Field(description="Flash: share of the steps behind the window that are taken; 1: all.", gt=0, le=1)
    ] = 1.0
    shared_noise: fields.SharedNoise = True
    combine: fields.CombineHow = "per_reward"
    adv_eps: fields.AdvEps = 1e-8
    unbiased: fields.Unbiased = True

    @model_validator(mode="after")
    def _possible(self) -> "MixGRPO":
        if self.window > self.num_steps - 1:
            raise ValueError(
                f"a window of {self.window} steps does not fit into num_steps={self.num_steps}, whose last step always "
                f"follows the ODE; choose window <= {self.num_steps - 1}, or more steps."
            )
        if self._last_start + self.window > self.num_steps - 1:
            raise ValueError(
                f"a window of {self.window} steps from last_start={self.last_start} sticks out of num_steps="
                f"{self.num_steps}, whose last step always follows the ODE; choose last_start <= "
                f"{self.num_steps - 1 - self.window}."
            )
        return self

    @property
    def _last_start(self) -> int:
        return self.num_steps - 1 - self.window if self.last_start is None else self.last_start

    def plan(self, times: Tensor, iteration: int, samples_per_prompt: int, seed: int) -> Plan:
        """The window's place is a function of the iteration."""
        check_group_size(samples_per_prompt)
        grid = training_times(times, self.num_steps, self.shift)
        start = window_start(
            iteration,
            num_steps=self._last_start + self.window + 1,
            width=self.window,
            stride=self.stride,
            shift_every=self.shift_every,
            strategy=self.strategy,
            roll_back=self.roll_back,
            seed=seed,
            threshold=13 * (self.num_steps - 2) // 23,
        )
        shorter = grid if self.tail == 1 else compress_tail(grid, start + self.window - 1, self.tail)
        plan = window(shorter, start, self.window, self.solver)
        return share_noise(plan, samples_per_prompt) if self.shared_noise else plan
