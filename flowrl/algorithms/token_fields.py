"""Hyperparameters of the methods for tokens: each one's type, check and description, written once.

What they share with the methods for steps is in `fields`; here is what differs, if only in its scale.
"""

from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from flowrl.algorithms.advantages import BaselineMode, Combine, MeanMode, StdMode
from flowrl.algorithms.aggregate import Mode, check_horizon
from flowrl.algorithms.corrections import Level, Rejection
from flowrl.algorithms.fields import Count
from flowrl.algorithms.kl import TokenKLForm
from flowrl.algorithms.objectives import NEEDS_MEANS, SEQUENCE_MEANS, Objective
from flowrl.schedules import Schedule, values

TV_TRUST = 0.2
CorrectionMode = Literal["tis", "mis", "icepop", "bypass"]
USUAL_HIGH: dict[CorrectionMode | None, float] = {"tis": 2.0, "mis": 2.0, "icepop": 5.0}
Shaping = Literal["tool_position", "entropy"]


def check_tokens(objective: Objective) -> None:
    """Refuse an objective that has no meaning for tokens."""
    if objective in NEEDS_MEANS:
        raise ValueError(
            f"objective={objective!r} reads the means of Gaussian steps, and a token has none; choose dppo_tv, which "
            "bounds the change of a token's probability, or clip."
        )


def check_trust(objective: Objective, trust: float | None) -> None:
    """Refuse an objective whose trust region nobody can guess."""
    usual = {"spo": "0.2, the half-width in the ratio", "drpo": "0.1, the half-width in the probability",
             "dro": "10, which is 1 / beta"}  # fmt: skip
    if objective in usual and trust is None:
        raise ValueError(f"objective={objective!r} needs algorithm.trust: say {usual[objective]}.")


def check_aggregate(objective: Objective, mode: Mode, horizon: int | None) -> None:
    """A constant length is for the one mean that divides by it; a ratio of answers is for a mean over answers."""
    if objective in SEQUENCE_MEANS and mode != "seq_mean_token_mean":
        raise ValueError(
            f"aggregate={mode} with objective={objective!r}, whose loss is one of whole answers: long ones would count "
            "for more; set aggregate=seq_mean_token_mean."
        )
    check_horizon(mode, horizon)


def _sides(clip_range: float | tuple[float, float]) -> float | tuple[float, float]:
    low, high = clip_range if isinstance(clip_range, tuple) else (clip_range, clip_range)
    if not (0 < low < float("inf") and 0 < high < float("inf")):
        raise ValueError(
            f"clip_range={clip_range} clips every ratio or none: the ratio is kept in [1 - low, 1 + high], so both "
            "are positive (low = 1 is no lower bound); 0.2 is usual for a token's ratio, 3e-4 for an answer's."
        )
    return clip_range


def _shares(schedule: float | tuple[tuple[float, float], ...]) -> float | tuple[tuple[float, float], ...]:
    if not all(0 <= value <= 1 for value in values(schedule)):
        raise ValueError(f"a weight against that of the policy gradient lies in [0, 1], got {schedule}.")
    return schedule


Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]

# ----------------------------------------------------------------------------------------------------- the objective

ObjectiveName = Annotated[
    Objective, Field(description="What is maximised: PPO's clip or another function of flowrl.algorithms.objectives.")
]
ClipRange = Annotated[
    float | tuple[float, float],
    AfterValidator(_sides),
    Field(
        description="Trust region of a token's ratio, [1 - c, 1 + c] or [1 - low, 1 + high]; low = 1: no lower bound."
    ),
]
DualClip = Annotated[
    float,
    Field(
        description="dual_clip only: largest ratio that a bad answer's loss still grows with.", gt=1,
        allow_inf_nan=False,
    ),
]  # fmt: skip
Trust = Annotated[
    Positive | None,
    Field(
        description="dppo_tv, cppo_tv: largest change of a token's probability (null: 0.2); spo, drpo: half-width; "
        "dro: 1 / beta."
    ),
]
Tau = Annotated[Positive, Field(description="sapo only: how fast the gate closes for tokens of good answers.")]
TauNegative = Annotated[Positive, Field(description="sapo only: the same for tokens of bad answers; larger is safer.")]
TopEntropy = Annotated[
    float,
    Field(
        description="Share of an answer's tokens, those with the highest entropy, that have a policy gradient.",
        gt=0, le=1,
    ),
]  # fmt: skip

# ------------------------------------------------------------------------------------------------------ the averages

Aggregate = Annotated[Mode, Field(description="Which mean of the tokens' losses (see flowrl.algorithms.aggregate).")]
Horizon = Annotated[
    Count | None,
    Field(description="seq_mean_token_sum_norm only: tokens that an answer's sum is divided by; the longest allowed."),
]

# -------------------------------------------------------------------------------------------------------- advantages

Mean = Annotated[
    MeanMode, Field(description="What is subtracted from a reward: its group's mean, that of the whole batch, or none.")
]
Baseline = Annotated[
    BaselineMode, Field(description="That mean is one of all answers, or of the others alone (leave_one_out).")
]
AdvStd = Annotated[
    StdMode,
    Field(description="Divide by the std of the prompt's group, of the whole batch (global), or not at all (none)."),
]
AdvEps = Annotated[NotNegative, Field(description="Added to that std.")]
Unbiased = Annotated[bool, Field(description="Divide squared deviations by n - 1, not n, in that std.")]
AdvClip = Annotated[Positive | None, Field(description="Advantages are cut to [-adv_clip, adv_clip]; null: not.")]
AdvFloor = Annotated[NotNegative, Field(description="Smallest std that advantages are divided by.")]
CombineHow = Annotated[
    Combine,
    Field(
        description="Several rewards: one advantage of their sum, or the weighted sum of an advantage for each "
        "(per_reward), normalised again over the batch (gdpo)."
    ),
]
Gamma = Annotated[
    float, Field(description="What a reward is worth one token earlier; 1 = the same all along the answer.", gt=0, le=1)
]
MaskTruncated = Annotated[
    bool, Field(description="Answers that were cut off leave the loss; they stay in their group's statistics.")
]
ShapingName = Annotated[
    Shaping | None,
    Field(
        description="What changes an advantage: where the first tool call stands (ASPO), how unsure the answer was "
        "(entropy, EDGE-GRPO, at most 5 times); null: nothing."
    ),
]
ShapingCoef = Annotated[
    float, Field(description="tool_position only: weight of the place, negative where earlier calls are better.")
]
ShapingCap = Annotated[
    NotNegative, Field(description="tool_position only: the change is at most this share of the advantage's size.")
]

# --------------------------------------------------------------------------------------------------------- penalties

KLCoef = Annotated[
    NotNegative, Field(description="Weight of the distance to the initial weights; 0 saves the reference forward.")
]
KLForm = Annotated[TokenKLForm, Field(description="Estimate of that distance (see flowrl.algorithms.kl).")]
KLUnbiased = Annotated[
    bool, Field(description="Multiply it by the ratio, since the rollout's policy drew the tokens and not today's.")
]
KLInReward = Annotated[
    NotNegative,
    Field(
        description="Weight of log pi - log ref, as the rollout had it, that is taken off the reward token by token."
    ),
]
ResetEvery = Annotated[
    Count | None,
    Field(
        description="Iterations after which the policy becomes the reference, and the optimiser begins anew (ProRL); "
        "null: never."
    ),
]
EntropyCoef = Annotated[NotNegative, Field(description="Weight of the entropy, which is then kept up.")]

# ------------------------------------------------------------------------------------- answers that others have drawn

Correction = Annotated[
    CorrectionMode | None,
    Field(
        description="Where a foreign engine wrote the answers, weights pi_old / pi_engine are cut (tis), masked above "
        "(mis) or on both sides (icepop), or the ratio is taken against the engine itself (bypass); null: ignored."
    ),
]
CorrectionLevel = Annotated[
    Level, Field(description="One such weight a token, an answer (product), or an answer's geometric mean.")
]
CorrectionLow = Annotated[NotNegative, Field(description="icepop only: smallest weight that is kept.")]
CorrectionHigh = Annotated[
    Positive | None,
    Field(description="Largest weight: where it is cut, or kept; null: 2, with icepop 5 as in the paper."),
]
RejectionName = Annotated[
    Rejection | None,
    Field(
        description="Answers of a foreign engine whose distance of that kind (statistic over tokens of k1, k2 or k3) "
        "is outside reject_range are left out; null: none."
    ),
]
RejectRange = Annotated[
    tuple[float, float],
    Field(description="The distances that are kept; k1 is log pi_old - log pi_engine, k2 and k3 are not negative."),
]
OffPolicyDelta = Annotated[
    Positive | None,
    Field(
        description="Bad answers whose mean log(mu / pi), mu being who wrote them, is above this are left out (OPSM); "
        "null: none."
    ),
]

# --------------------------------------------------------------------------------------------------------- more terms

PositiveSFT = Annotated[NotNegative, Field(description="Weight of -log pi on right answers (Intern-S1, VAPO).")]
Shuffled = Annotated[
    int, Field(ge=1, description="Answers to each video with its frames shuffled; half of the group's is usual.")
]
TemporalBonus = Annotated[
    NotNegative, Field(description="Added to the reward of right answers where the order of the frames helps.")
]
TemporalMargin = Annotated[
    NotNegative,
    Field(description="Share of the mean reward of answers to shuffled frames that a group must reach for the bonus."),
]
Right = Annotated[
    float, Field(description="Total reward from which an answer is right, and gets the bonus.", allow_inf_nan=False)
]
PositiveReward = Annotated[
    float, Field(description="Total reward from which an answer is right for positive_sft_coef.", allow_inf_nan=False)
]
SFTCoef = Annotated[
    Schedule,
    AfterValidator(_shares),
    Field(
        description="CHORD: mu in (1 - mu) policy gradient + mu imitation of the prompts' `solution`, a number or "
        "[[iteration, value], ...]; other terms keep their weights; 0: none."
    ),
]
PerceptionCoef = Annotated[
    NotNegative, Field(description="PAPO: weight of the KL to the same policy with masked pictures, which is raised.")
]
PerceptionMask = Annotated[
    float, Field(description="PAPO: share of a picture's patches that are masked there.", gt=0, le=1)
]
PerceptionEntropy = Annotated[
    NotNegative, Field(description="PAPO: weight of both policies' entropies, which are held down.")
]
