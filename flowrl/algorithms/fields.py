"""Hyperparameters that methods share: each one's type, check and description, written once.

Use them as annotations, `clip_range: fields.ClipRange = 1e-4`; the default is the paper's, in the method's own file.
"""

from typing import Annotated, Literal

from pydantic import AfterValidator, Field

import samplers
from flowrl.algorithms.advantages import BaselineMode, Combine, StdMode
from flowrl.algorithms.kl import KLForm as KLFormName
from flowrl.algorithms.objectives import NEEDS_PROBABILITIES, NEEDS_TRUST, Objective
from samplers import Kernel, Solver

SDEName = Literal["flow_sde", "dance_sde", "wan_sde", "cps", "ddim"]
_UP_TO_ONE = ("cps", "ddim")


def resolve_kernel(sde: SDEName) -> Kernel:
    """The function of that name in `samplers`."""
    kernel: Kernel = getattr(samplers, sde)
    return kernel


def check_eta(sde: SDEName, eta: float) -> None:
    """Refuse an eta that the kernel cannot mean."""
    if sde in _UP_TO_ONE and eta > 1:
        raise ValueError(
            f"eta={eta:g} is impossible with sde={sde!r}, which replaces a share of the noise already there; "
            "choose eta in (0, 1], or sde='flow_sde', which has no upper limit."
        )


def _at_least_two(num_steps: int) -> int:
    if num_steps < 2:
        raise ValueError(
            f"num_steps={num_steps} leaves no stochastic step, because the last step always follows the ODE "
            "(its noise would stay in the sample); choose at least 2."
        )
    return num_steps


def _noisy(eta: float) -> float:
    if not 0 < eta < float("inf"):
        raise ValueError(
            f"eta={eta:g} adds no noise (or no finite one), so a step has no log-prob and nothing can be learnt; "
            "choose a positive number, say 0.7."
        )
    return eta


def _positive_sides(clip_range: float | tuple[float, float]) -> float | tuple[float, float]:
    low, high = clip_range if isinstance(clip_range, tuple) else (clip_range, clip_range)
    if not (0 < low < float("inf") and 0 < high < float("inf")):
        raise ValueError(
            f"clip_range={clip_range} clips every ratio or none: the ratio is kept in [1 - low, 1 + high], so both "
            "are positive (low = 1 is no lower bound); 1e-4 is usual, as log-probs are means over latent dimensions."
        )
    return clip_range


def check_steps(objective: Objective) -> None:
    """Refuse an objective that has no meaning for steps."""
    if objective in NEEDS_PROBABILITIES:
        raise ValueError(
            f"objective={objective!r} bounds how far the probability of a token moves, and a step has a density, which "
            "has no upper bound; choose dppo, which bounds the divergence of the steps."
        )


def check_trust(objective: Objective, trust: float | None) -> None:
    """Refuse an objective whose trust region nobody can guess."""
    if objective in NEEDS_TRUST and trust is None:
        raise ValueError(
            f"objective={objective!r} needs algorithm.trust, the half-width of its trust region in the ratio (drpo: in "
            "the density; dro: 1 / beta): about what clip_range would be, such as 1e-4."
        )


def _positive(value: float) -> float:
    if not value > 0:
        raise ValueError(f"{value:g} would erase every advantage; choose a positive number, 5 is usual.")
    return value


def _above_one(value: float) -> float:
    if not 1 < value < float("inf"):
        raise ValueError(f"{value:g} must be above 1; 3 is usual.")
    return value


def _width(value: float | None) -> float | None:
    if value is not None and not 0 < value < float("inf"):
        raise ValueError(f"{value:g} must be a positive number; the ratio could not move at all.")
    return value


def _not_negative(value: float) -> float:
    if not 0 <= value < float("inf"):
        raise ValueError(f"{value:g} must be a finite number of at least 0; 0 switches it off.")
    return value


def _at_least_one(value: int) -> int:
    if value < 1:
        raise ValueError(f"{value} must be at least 1.")
    return value


def _stretch(shift: float | None) -> float | None:
    if shift is not None and not 0 < shift < float("inf"):
        raise ValueError(f"shift={shift:g} does not give a falling time grid; 1 leaves it linear, SD3 uses 3.")
    return shift


Count = Annotated[int, AfterValidator(_at_least_one)]
NumSteps = Annotated[
    int,
    AfterValidator(_at_least_two),
    Field(description="Denoising steps of a training rollout, far fewer than evaluation needs; the last is ODE."),
]
ODESteps = Annotated[
    int,
    AfterValidator(_at_least_one),
    Field(description="Denoising steps of a training rollout, all of them ODE; evaluation may take more."),
]
SolverName = Annotated[Solver, Field(description="Solver of these steps, a function in `samplers`.")]
Shift = Annotated[
    float | None,
    AfterValidator(_stretch),
    Field(description="Shift of the time grid s u / (1 + (s - 1) u) over equal u; null takes the model's own grid."),
]
Eta = Annotated[float, AfterValidator(_noisy), Field(description="Strength of a stochastic step's noise.")]
SDE = Annotated[SDEName, Field(description="Kernel of a stochastic step, a function in `samplers`.")]
ClipRange = Annotated[
    float | tuple[float, float],
    AfterValidator(_positive_sides),
    Field(description="Trust region of the ratio, [1 - c, 1 + c] or [1 - low, 1 + high]; shrinks with resolution."),
]
ObjectiveName = Annotated[
    Objective, Field(description="What is maximised: PPO's clip or another function of flowrl.algorithms.objectives.")
]
DualClip = Annotated[
    float,
    AfterValidator(_above_one),
    Field(description="dual_clip only: largest ratio that a bad sample's loss still grows with."),
]
DPPO_TRUST = 1e-5
Trust = Annotated[
    float | None,
    AfterValidator(_width),
    Field(
        description="dppo: largest divergence of a step from the old one (null: 1e-5); spo, drpo: half-width; dro: 1 / "
        "beta."
    ),
]
CombineHow = Annotated[
    Combine,
    Field(
        description="Several rewards: one advantage of their sum, or the weighted sum of an advantage for each "
        "(per_reward), normalised again over the batch (gdpo)."
    ),
]
Baseline = Annotated[
    BaselineMode, Field(description="A sample is compared with its group's mean, or with that of the others.")
]
AdvFloor = Annotated[
    float,
    AfterValidator(_not_negative),
    Field(description="Smallest std that advantages are divided by, in units of the reward."),
]
DropZero = Annotated[bool, Field(description="Leave steps with zero advantage out, instead of averaging over them.")]
AdvClip = Annotated[float, AfterValidator(_positive), Field(description="Advantages are cut to [-adv_clip, adv_clip].")]
AdvStd = Annotated[
    StdMode,
    Field(description="Divide by the std of the prompt's group, of the whole batch (global), or not at all (none)."),
]
AdvEps = Annotated[float, AfterValidator(_not_negative), Field(description="Added to that std.")]
Unbiased = Annotated[bool, Field(description="Divide squared deviations by n - 1, not n, in that std.")]
KLCoef = Annotated[
    float,
    AfterValidator(_not_negative),
    Field(description="Weight of the distance to the initial weights; 0 saves the reference forward."),
]
KLForm = Annotated[
    KLFormName,
    Field(description="Form of that distance (see flowrl.algorithms.kl); a coefficient does not carry over."),
]
Window = Annotated[
    int | None, Field(description="Stochastic, trained steps of an iteration, at random; null: all but the last.")
]
WindowRange = Annotated[
    tuple[int, int] | None,
    Field(description="Steps [low, high) in which the window lies; null: the first half of the steps."),
]
Steps = Annotated[
    tuple[int, ...] | None,
    Field(description="Steps that take turns in being the stochastic one; null: the first half of the steps."),
]
StepShare = Annotated[
    float, Field(description="Share of its stochastic steps, at random, that a sample is trained on.", gt=0, le=1)
]
SharedNoise = Annotated[
    bool,
    Field(description="A group starts from one initial noise and its deterministic first steps run once."),
]
