"""The parts of a plan that methods share: the time grid, the group size, one root a group or one a sample."""

from torch import Tensor

from samplers import Plan, shifted_times


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
