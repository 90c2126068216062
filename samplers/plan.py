"""Plans: which steps of a rollout are stochastic, which branch, which follow the ODE.

A plan is a value: immutable, hashable, comparable. Those that change over training are pure functions of
(iteration, seed), so every rank and every member of a group gets the same one.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from typing import Literal, get_args

import torch
from torch import Tensor

from samplers.noise import stable_seed
from samplers.solvers import SOLVERS, Solver

__all__ = [
    "Plan",
    "Strategy",
    "all_steps",
    "branch_at",
    "compress_tail",
    "deterministic",
    "random_subset",
    "random_window",
    "sliding_window",
    "subset",
    "window",
    "window_dwell",
    "window_start",
]

Times = Tensor | Sequence[float]
Strategy = Literal["progressive", "random", "decay", "exp_decay", "frozen"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """What each of T steps does. Tensors and lists are accepted and kept as tuples.

    Example: ``Plan(times=(1, .5, 0), stochastic=(True, False), fanout=(4, 1))`` takes one stochastic step in which
    every root splits into 4 children, then one ODE step: 4 leaves and 1 + 4 velocity calls per root.
    """

    times: tuple[float, ...]
    """[T+1] falling times; the first is at most 1 (noise), the last is 0 (data)."""
    stochastic: tuple[bool, ...]
    """[T] True: a kernel's Gaussian step, stored with its log-prob. False: an ODE step, not stored."""
    fanout: tuple[int, ...]
    """[T] children of every node alive at that step, each with its own noise; 1 = no branching."""
    solver: Solver = "euler"
    """Solver of the ODE steps."""
    noise: tuple[float, ...] = ()
    """[T] factor on eta in each step; () = 1 everywhere. It is part of the kernel, hence of the log-prob."""
    strides: tuple[int, ...] = (1,)
    """The ODE steps behind the last stochastic one are walked once for each stride, as samples of their own."""
    until: int | None = None
    """Steps that are walked: the state there, with its noise, is the sample, for others to go on from; None = all."""
    kept: tuple[int, ...] = ()
    """Steps, rising, whose first state and its velocity every sample keeps: `Trajectory.visited`."""

    def __post_init__(self) -> None:
        """Normalise to tuples and refuse plans that cannot be walked (ValueError)."""
        object.__setattr__(self, "times", tuple(_floats(self.times)))
        object.__setattr__(self, "stochastic", tuple(bool(s) for s in self.stochastic))
        object.__setattr__(self, "fanout", tuple(int(k) for k in self.fanout))
        object.__setattr__(self, "noise", tuple(float(f) for f in self.noise) or (1.0,) * len(self.stochastic))
        object.__setattr__(self, "strides", tuple(int(stride) for stride in self.strides))
        object.__setattr__(self, "kept", tuple(int(step) for step in self.kept))
        _check_times(self.times)
        _check_lengths(self)
        _check_branches(self)
        _check_until(self)
        _check_strides(self)
        _check_kept(self)
        if self.solver not in SOLVERS:
            raise ValueError(f"unknown ODE solver {self.solver!r}; choose one of {', '.join(SOLVERS)}.")

    @property
    def num_steps(self) -> int:
        """T."""
        return len(self.stochastic)

    @property
    def stochastic_steps(self) -> tuple[int, ...]:
        """Indices of the stochastic steps, rising."""
        return tuple(step for step, on in enumerate(self.stochastic) if on)

    @property
    def num_stochastic(self) -> int:
        """Stochastic steps on the path of one leaf."""
        return len(self.stochastic_steps)

    @property
    def leaves_per_root(self) -> int:
        """Samples that grow from one initial noise."""
        return math.prod(self.fanout) * len(self.strides)

    @property
    def head(self) -> int:
        """Steps up to and with the last stochastic one; 0 where all follow the ODE."""
        return self.stochastic_steps[-1] + 1 if any(self.stochastic) else 0

    @property
    def tails(self) -> tuple[tuple[float, ...], ...]:
        """The times behind the head, one list for each stride: every stride-th time, and always the last at the end."""
        last = self.num_steps if self.until is None else self.until
        return tuple(
            tuple(self.times[place] for place in (*range(self.head, last, stride), last)) for stride in self.strides
        )

    def grid(self, device: torch.device | str = "cpu") -> Tensor:
        """The times as [T+1] float32."""
        return torch.tensor(self.times, dtype=torch.float32, device=device)

    def nodes(self, step: int) -> int:
        """Nodes per root that are alive when ``step`` begins; a shared prefix counts once."""
        return math.prod(self.fanout[:step])

    def calls(self, num_roots: int = 1) -> int:
        """Velocity evaluations (samples through the network) of a rollout; children share their parent's call."""
        head = sum(self.nodes(step) * self._calls_at(step, self.times[step + 1]) for step in range(self.head))
        tails = sum(self._calls_at(self.head, then) for tail in self.tails for then in tail[1:])
        return num_roots * (head + self.nodes(self.head) * tails)

    def num_edges(self, num_roots: int = 1) -> int:
        """Stored edges of a rollout: one for every child of a stochastic step."""
        return num_roots * sum(self.nodes(step + 1) for step in self.stochastic_steps)

    def with_fanout(self, fanout: Mapping[int, int]) -> "Plan":
        """The same plan, branching at these steps: ``plan.with_fanout({3: 8})``.

        Branch at the first stochastic step to let a group that shares its initial noise run its ODE prefix once.
        """
        outside = [step for step in fanout if not 0 <= step < self.num_steps]
        if outside:
            raise ValueError(f"cannot branch at steps {outside}: the plan has steps 0 to {self.num_steps - 1}.")
        return replace(self, fanout=tuple(fanout.get(step, old) for step, old in enumerate(self.fanout)))

    def with_solver(self, solver: Solver) -> "Plan":
        """The same plan with another solver for its ODE steps."""
        return replace(self, solver=solver)

    def with_noise(self, noise: Mapping[int, float]) -> "Plan":
        """The same plan with these factors on eta: ``plan.with_noise({3: 4.0})``."""
        return replace(self, noise=tuple(noise.get(step, old) for step, old in enumerate(self.noise)))

    def with_strides(self, strides: Sequence[int]) -> "Plan":
        """The same plan with several tails: ``(1, 2)`` ends every node twice, in all and in half of the steps left."""
        return replace(self, strides=tuple(strides))

    def with_kept(self, steps: Sequence[int]) -> "Plan":
        """The same plan, in which every sample keeps its states at the beginning of these steps."""
        return replace(self, kept=tuple(sorted(steps)))

    def _calls_at(self, step: int, then: float) -> int:
        # Heun falls back to Euler where it would have to ask the network at t = 0.
        second = self.solver == "heun" and not (step < self.num_steps and self.stochastic[step]) and then > 0
        return 2 if second else 1


def deterministic(times: Times, solver: Solver = "euler", until: int | None = None) -> Plan:
    """ODE steps only: evaluation, and the methods that need samples but no log-probs; the first `until` of them."""
    return replace(subset(times, (), solver=solver), until=until)


def all_steps(times: Times, solver: Solver = "euler") -> Plan:
    """Every step stochastic but the last, whose noise would stay in the sample (Flow-GRPO, arXiv:2505.05470)."""
    return window(times, 0, len(times) - 2, solver=solver)


def window(times: Times, start: int, width: int, solver: Solver = "euler") -> Plan:
    """Stochastic on [start, start + width), ODE elsewhere (MixGRPO, arXiv:2507.21802). ValueError if it sticks out."""
    num_steps = len(times) - 1
    if width < 1 or start < 0 or start + width > num_steps:
        raise ValueError(
            f"a window of {width} steps from step {start} does not lie in steps 0 to {num_steps - 1}; "
            "a window holds at least one step, and a plan whose last step is an ODE step needs two steps."
        )
    return subset(times, range(start, start + width), solver=solver)


def subset(times: Times, steps: Sequence[int], solver: Solver = "euler") -> Plan:
    """Stochastic on these steps, in any pattern, ODE elsewhere."""
    num_steps = len(times) - 1
    _check_inside(steps, num_steps)
    chosen = set(steps)
    stochastic = tuple(step in chosen for step in range(num_steps))
    return Plan(times=tuple(_floats(times)), stochastic=stochastic, fanout=(1,) * num_steps, solver=solver)


def random_subset(times: Times, iteration: int, steps: Sequence[int], count: int, seed: int = 0) -> Plan:
    """``count`` of the candidate ``steps``, drawn anew in each iteration and equal for the whole group."""
    if not 1 <= count <= len(set(steps)):
        raise ValueError(f"cannot draw {count} stochastic steps out of {len(set(steps))} candidates {list(steps)}.")
    return subset(times, sorted(set(steps), key=lambda step: stable_seed(seed, iteration, step))[:count])


def random_window(
    times: Times, iteration: int, size: int = 2, low: int = 0, high: int | None = None, seed: int = 0
) -> Plan:
    """Flow-GRPO-Fast: a window of ``size`` steps at random inside [low, high), start in [low, high - size] inclusive.

    ``high`` defaults to T // 2, the noisy half. The draw depends on (seed, iteration) alone.
    """
    num_steps = len(times) - 1
    high = num_steps // 2 if high is None else high
    if not (0 <= low and low + size <= high <= num_steps and size >= 1):
        raise ValueError(
            f"a window of {size} steps does not fit into steps [{low}, {high}) of {num_steps}; "
            "make it smaller or the range wider (high defaults to half the steps)."
        )
    return window(times, low + stable_seed(seed, iteration) % (high - size - low + 1), size)


def branch_at(
    times: Times,
    steps: Sequence[int],
    fanout: int | Sequence[int] = 2,
    *,
    rest: Literal["stochastic", "ode"] = "stochastic",
    solver: Solver = "euler",
) -> Plan:
    """Trees: every node alive at one of ``steps`` splits into ``fanout`` children (one number, or one per step).

    ``rest="stochastic"`` is BranchGRPO (arXiv:2509.06040): all other steps but the last are stochastic too.
    ``rest="ode"`` is TempFlow-GRPO (arXiv:2508.04324): only the branching steps are, so credit is exact.
    """
    _check_inside(steps, len(times) - 1)
    widths = [fanout] * len(steps) if isinstance(fanout, int) else list(fanout)
    if len(widths) != len(steps):
        raise ValueError(f"{len(steps)} branching steps need {len(steps)} fan-outs (or one for all), got {widths}.")
    noisy = {*steps, *range(len(times) - 2)} if rest == "stochastic" else set(steps)
    return subset(times, sorted(noisy), solver=solver).with_fanout(dict(zip(steps, widths, strict=True)))


def sliding_window(
    times: Times,
    iteration: int,
    width: int = 4,
    stride: int = 1,
    shift_every: int = 25,
    strategy: Strategy = "progressive",
    *,
    roll_back: bool = True,
    seed: int = 0,
    min_every: int = 1,
    threshold: int = 13,
    rate: float = 0.1,
    solver: Solver = "euler",
) -> Plan:
    """MixGRPO's window (arXiv:2507.21802) at an iteration; see ``window_start`` for the schedule.

    Note: the public code lets the window shrink and then vanish at the clean end and never trains step T-2. Here the
    window always has its full width, and the last stop is the one that ends with step T-2 (step T-1 stays ODE).
    """
    start = window_start(
        iteration,
        num_steps=len(times) - 1,
        width=width,
        stride=stride,
        shift_every=shift_every,
        strategy=strategy,
        roll_back=roll_back,
        seed=seed,
        min_every=min_every,
        threshold=threshold,
        rate=rate,
    )
    return window(times, start, width, solver=solver)


def compress_tail(times: Times, step: int, share: float) -> tuple[float, ...]:
    """The grid with fewer points behind ``step``: MixGRPO-Flash's (arXiv:2507.21802), where step is the window's last.

    Of T steps, the times up to ``step`` stay; behind them come n = int((T - step) share) points from the next time to
    0, equally spaced in the grid's own index. A rollout then takes step + n instead of T evaluations.
    Note: the public code takes n = 1 near the clean end and then never reaches 0. With n = 2 a single step does, which
    ends in the mean of what is possible and loses the spread; here n is at least 3 (but at most what the grid had).
    Note: between the grid's times a straight line is drawn; the public code shifts equal steps anew (0.002 apart).
    """
    grid = _floats(times)
    left = len(grid) - 1 - step
    if not 0 < share <= 1 or not 0 <= step < len(grid) - 1:
        raise ValueError(
            f"cannot compress the steps behind step {step} of {len(grid) - 1} to a share of {share:g}; "
            "the share lies in (0, 1], and the step must exist."
        )
    points = min(max(int(left * share + 1e-9), 3), left)
    places = (
        torch.linspace(step + 1, len(grid) - 1, points, dtype=torch.float64).tolist() if points > 1 else [left + step]
    )
    return (*grid[: step + 1], *(_between(grid, place) for place in places))


def _between(grid: list[float], place: float) -> float:
    """The grid's time at a fractional index."""
    low = min(int(place), len(grid) - 2)
    return grid[low] + (place - low) * (grid[low + 1] - grid[low])


def window_start(
    iteration: int,
    *,
    num_steps: int,
    width: int = 4,
    stride: int = 1,
    shift_every: int = 25,
    strategy: Strategy = "progressive",
    roll_back: bool = True,
    seed: int = 0,
    min_every: int = 1,
    threshold: int = 13,
    rate: float = 0.1,
) -> int:
    """First step of the sliding window at an iteration (counted from 0).

    The window stops at 0, stride, 2 stride, ... and last at T-1-width, stays ``window_dwell`` iterations at each stop,
    and then returns to 0 (``roll_back``) or stays at the last. "frozen" never leaves 0; "random" draws a start in
    0..T-1-width anew in each iteration.
    """
    last = num_steps - 1 - width
    if iteration < 0 or stride < 1 or width < 1 or last < 0:
        raise ValueError(
            f"no sliding window for iteration={iteration}, stride={stride}, width={width}, num_steps={num_steps}: "
            "stride and width are at least 1, and the width at most num_steps - 1 (the last step is an ODE step)."
        )
    if strategy == "frozen":
        return 0
    if strategy == "random":
        return stable_seed(seed, iteration) % (last + 1)
    stops = [*range(0, last, stride), last]
    dwells = [
        window_dwell(
            stop,
            num_steps=num_steps,
            shift_every=shift_every,
            strategy=strategy,
            min_every=min_every,
            threshold=threshold,
            rate=rate,
        )
        for stop in stops
    ]
    leave = list(accumulate(dwells))
    if roll_back:
        iteration %= leave[-1]
    return next((stop for stop, end in zip(stops, leave, strict=True) if iteration < end), last)


def window_dwell(
    start: int,
    *,
    num_steps: int,
    shift_every: int = 25,
    strategy: Strategy = "progressive",
    min_every: int = 1,
    threshold: int = 13,
    rate: float = 0.1,
) -> int:
    """Iterations that the sliding window stays at ``start``, at least 1 (MixGRPO's schedules).

    "progressive": shift_every. "decay": a straight line from shift_every at step 0 to min_every at step T-2.
    "exp_decay": ceil(shift_every exp(-rate max(0, start - threshold))).
    """
    if shift_every < 1 or min_every < 1:
        raise ValueError(f"shift_every and min_every are at least 1, got {shift_every} and {min_every}.")
    if strategy == "progressive":
        return shift_every
    if strategy == "decay":
        along = start / max(num_steps - 2, 1)
        return max(min_every, int(shift_every * (1 - along) + min_every * along))
    if strategy == "exp_decay":
        return math.ceil(shift_every * math.exp(-rate * max(0, start - threshold)))
    raise ValueError(f"unknown window strategy {strategy!r}; choose one of {', '.join(get_args(Strategy))}.")


def _floats(times: Times) -> list[float]:
    return [float(t) for t in (times.tolist() if isinstance(times, Tensor) else times)]


def _check_times(times: tuple[float, ...]) -> None:
    if len(times) < 2:
        raise ValueError(f"times needs at least two entries (one step), got {list(times)}.")
    if not times[0] <= 1 or times[-1] != 0:
        raise ValueError(
            f"times must run from at most 1 (noise) to exactly 0 (data), got {times[0]:g} to {times[-1]:g}; "
            "a grid that stops early leaves noise in the sample. Divide timesteps by 1000 and append 0."
        )
    for step, (now, then) in enumerate(pairwise(times)):
        if not then < now:
            raise ValueError(
                f"times must fall at every step, but step {step} goes {now:g} -> {then:g}; "
                "sort the grid from noise to data and drop duplicates."
            )


def _check_lengths(plan: Plan) -> None:
    num_steps = len(plan.times) - 1
    if not len(plan.stochastic) == len(plan.fanout) == len(plan.noise) == num_steps:
        raise ValueError(
            f"{len(plan.times)} times make {num_steps} steps, but stochastic has {len(plan.stochastic)} entries, "
            f"fanout {len(plan.fanout)} and noise {len(plan.noise)}; give one entry per step."
        )


def _check_until(plan: Plan) -> None:
    if plan.until is None:
        return
    if plan.strides != (1,):
        raise ValueError(f"until={plan.until} ends before several tails (strides {plan.strides}) could; leave one out.")
    if not plan.head <= plan.until <= plan.num_steps:
        raise ValueError(
            f"until={plan.until} steps are to be walked, of {plan.num_steps} whose last stochastic one is number "
            f"{plan.head}; choose from {plan.head} to {plan.num_steps}, or None for all."
        )


def _check_strides(plan: Plan) -> None:
    left = plan.num_steps - plan.head
    if not plan.strides or min(plan.strides) < 1 or len(set(plan.strides)) < len(plan.strides):
        raise ValueError(f"strides={plan.strides}: give different whole numbers of at least 1, such as (1, 2).")
    if plan.strides != (1,) and not plan.head:
        raise ValueError(f"strides={plan.strides} without a stochastic step would walk the same ODE several times.")
    if len(set(plan.tails)) < len(plan.tails):
        raise ValueError(
            f"strides={plan.strides} make equal tails of the {left} steps behind the last stochastic one, and so "
            f"equal samples; leave out strides above {max(left, 1)}, or put the stochastic step earlier."
        )


def _check_kept(plan: Plan) -> None:
    _check_inside(plan.kept, plan.num_steps if plan.until is None else plan.until)
    if list(plan.kept) != sorted(set(plan.kept)):
        raise ValueError(f"kept={plan.kept} must name different steps in rising order.")
    if plan.kept and plan.strides != (1,):
        raise ValueError(f"kept={plan.kept} with strides={plan.strides}: tails walk other steps; leave strides=(1,).")
    if plan.kept and plan.solver == "average":
        raise ValueError(
            f"kept={plan.kept}: with solver='average' a step has the mean velocity of its whole length, not that at "
            "the state that is kept; choose euler, heun or dpmpp_2m."
        )


def _check_branches(plan: Plan) -> None:
    for step, (noisy, width) in enumerate(zip(plan.stochastic, plan.fanout, strict=True)):
        if width < 1:
            raise ValueError(f"fanout at step {step} is {width}; 1 means no branching, 2 splits every node in two.")
        if width > 1 and not noisy:
            raise ValueError(
                f"step {step} is an ODE step, so its {width} children would be identical; "
                "branch at a stochastic step, or make this one stochastic."
            )


def _check_inside(steps: Sequence[int], num_steps: int) -> None:
    outside = [step for step in steps if not 0 <= step < num_steps]
    if outside:
        raise ValueError(f"steps {outside} lie outside this grid, whose steps are 0 to {num_steps - 1}.")
