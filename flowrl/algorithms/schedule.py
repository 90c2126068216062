"""The parts of a plan that methods share: the time grid, the group size, one root a group or one a sample."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from flowrl.types import Algorithm, AnyBatch, TokenBatch
from samplers import Plan, all_steps, random_window, shifted_times


class AlgorithmError(ValueError):
    """An algorithm answered what nobody can use."""


def plans_of(
    algorithm: Algorithm, times: Tensor, iteration: int, samples_per_prompt: int, seed: int
) -> tuple[Plan, ...]:
    """The plans of an iteration, one or several, after the checks that every method wants (ValueError)."""
    answer = algorithm.plan(times, iteration, samples_per_prompt, seed)
    plans = tuple(answer) if isinstance(answer, list | tuple) else (answer,)
    if not plans or not all(isinstance(plan, Plan) for plan in plans):
        raise AlgorithmError(
            f"plan() returned {_told(answer)}; return a samplers.Plan, or a list of them, one for each kind of root."
        )
    for plan in plans:
        if algorithm.needs.logprobs and not plan.num_stochastic:
            raise AlgorithmError(
                "no step of the plan is stochastic, so there is no log-prob and nothing to learn from; "
                "give it a window or steps."
            )
        if plan.stochastic[-1]:
            raise AlgorithmError(
                f"the last step of the plan, {plan.num_steps - 1}, is stochastic, and its noise would stay in the "
                "sample; end the window or the steps before it."
            )
        if samples_per_prompt % plan.leaves_per_root:
            raise AlgorithmError(
                f"samples_per_prompt={samples_per_prompt} is no multiple of the {plan.leaves_per_root} samples that "
                "one initial noise branches into; change it, or the fanout."
            )
    if len({plan.leaves_per_root for plan in plans}) > 1:
        raise AlgorithmError("the plans of an iteration must all branch into the same number of samples.")
    return plans


def credit_of(algorithm: Any, batch: AnyBatch) -> Tensor:
    """The credit of a batch's rows, [E] or [N], or of answers' tokens, [N,S]; AlgorithmError for other answers."""
    credit = algorithm.credit(batch)
    count = len(batch.rows)
    shapes = [(count,), tuple(batch.rows.ids.shape)] if isinstance(batch, TokenBatch) else [(count,)]
    if not isinstance(credit, Tensor) or tuple(credit.shape) not in shapes or not credit.is_floating_point():
        raise AlgorithmError(
            f"credit() returned {_told(credit)}; return a floating tensor [{count}], one number for each "
            "of batch.rows, stored steps or draws (flowrl.algorithms.advantages.to_edges makes it from samples' "
            "advantages)."
        )
    if bool(credit.isinf().any()):
        raise AlgorithmError("credit() returned an infinite number; it divides by a std of 0, perhaps: add an eps.")
    return credit


def _told(answer: object) -> str:
    if isinstance(answer, Tensor):
        return f"a {str(answer.dtype).removeprefix('torch.')} tensor {list(answer.shape)}"
    text = repr(answer)
    return f"{type(answer).__name__} {text if len(text) <= 60 else text[:57] + '...'}"


def training_times(times: Tensor, num_steps: int, shift: float | None) -> Tensor:
    """The grid [T+1] to train on: the shifted one where a shift is set, else the model's own `times`."""
    if shift is not None:
        return shifted_times(num_steps, shift)
    if len(times) != num_steps + 1:
        raise ValueError(f"num_steps={num_steps} needs a grid of {num_steps + 1} times, got {len(times)}.")
    return times


def share_noise(plan: Plan, samples_per_prompt: int) -> Plan:
    """One root a group: it follows the ODE once and splits into the whole group at its first stochastic step."""
    return plan.with_fanout({plan.stochastic_steps[0]: samples_per_prompt})


def check_group_size(samples_per_prompt: int) -> None:
    """A group of one has nothing to be compared with."""
    if samples_per_prompt < 2:
        raise ValueError(
            f"samples_per_prompt={samples_per_prompt}, but an advantage is a sample's reward against those of its "
            "group, so every advantage would be 0; choose at least 2 (papers use 12 to 24)."
        )


def check_window(num_steps: int, window: int | None, window_range: tuple[int, int] | None) -> None:
    """Refuse a random window that its range cannot hold (ValueError)."""
    if window is None:
        if window_range is not None:
            raise ValueError("window_range says where a window lies, but there is none; set window, say to 2.")
        return
    low, high = window_range or (0, num_steps // 2)
    if not (window >= 1 and 0 <= low and low + window <= high < num_steps):
        raise ValueError(
            f"window={window} does not fit steps [{low}, {high}) of {num_steps}: it holds at least one, and the last "
            f"step always follows the ODE; make the window smaller, window_range wider (at most [0, {num_steps - 1}]) "
            "or num_steps larger."
        )


def all_or_window(
    grid: Tensor, iteration: int, window: int | None, window_range: tuple[int, int] | None, seed: int
) -> Plan:
    """All steps but the last stochastic, or (Flow-GRPO-Fast) a window at random that is the same for everyone."""
    if window is None:
        return all_steps(grid)
    low, high = window_range or (0, (len(grid) - 1) // 2)
    return random_window(grid, iteration, window, low=low, high=high, seed=seed)


def early_steps(steps: tuple[int, ...] | None, num_steps: int) -> tuple[int, ...]:
    """Candidate steps of a method with one stochastic step at a time; None = the first half. Refuses others."""
    chosen = tuple(range(max(1, num_steps // 2))) if steps is None else steps
    outside = [step for step in chosen if not 0 <= step < num_steps - 1]
    if outside or not chosen or len(set(chosen)) < len(chosen):
        raise ValueError(
            f"steps={list(chosen)} must name different steps from 0 to {num_steps - 2}, at least one: of "
            f"num_steps={num_steps} the last always follows the ODE."
        )
    return chosen


def in_turn(plans: Sequence[Plan], iteration: int) -> tuple[Plan, ...]:
    """The plans, another one first in each iteration, so that every prompt meets all of them."""
    first = iteration % len(plans)
    return (*plans[first:], *plans[:first])
