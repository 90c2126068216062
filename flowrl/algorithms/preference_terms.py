"""What preference methods are made of, for velocities and for tokens: losses of log-ratios, a pair or an answer each.

A log-ratio is log pi - log ref of a sample. Where there is none, as for a velocity, it is minus how much farther the
policy is from the sample than its reference.
"""

import torch.nn.functional as F
from torch import Tensor


def log_odds(chosen: Tensor, rejected: Tensor, beta: float | Tensor) -> Tensor:
    """beta (log-ratio of the chosen - that of the rejected) of pairs [M]: the log-odds of the preference."""
    return beta * (chosen - rejected)


def dpo(chosen: Tensor, rejected: Tensor, beta: float | Tensor) -> Tensor:
    """DPO (arXiv:2305.18290, eq. 7): -log sigmoid(beta (chosen - rejected)) of the log-ratios of pairs [M]."""
    return -F.logsigmoid(log_odds(chosen, rejected, beta))


def bco(chosen: Tensor, rejected: Tensor, beta: float | Tensor, shift: float | Tensor) -> Tensor:
    """BCO (arXiv:2404.04656): each side's implicit reward beta log-ratio against `shift`, summed over both sides [M].

    -log sigmoid(beta chosen - shift) - log sigmoid(-(beta rejected - shift)): a classifier of good and bad that
    measures quality, where `dpo` measures a difference only. `shift` is the mean implicit reward so far.
    """
    return -F.logsigmoid(beta * chosen - shift) - F.logsigmoid(shift - beta * rejected)


def sft(logprob: Tensor, lengths: Tensor) -> Tensor:
    """Mean negative log-prob of answers' tokens, from their sums and lengths [M]."""
    return -logprob / lengths.clamp(min=1)


def mpo(preference: Tensor, quality: Tensor, generation: Tensor, weights: tuple[float, float, float]) -> Tensor:
    """MPO (arXiv:2411.10442): w_p preference + w_q quality + w_g generation, [M] each."""
    preferred, judged, written = weights
    return preferred * preference + judged * quality + written * generation
