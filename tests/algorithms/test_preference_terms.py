"""The terms of preference methods against autograd, each other, and the loss of velocities."""

import math

import pytest
import torch

from flowrl.algorithms.flow_dpo import FlowDPO
from flowrl.algorithms.preference_terms import bco, dpo, log_odds, mpo, sft
from tests.algorithms.test_preference import moved
from tests.algorithms.toy import collect, live

CHOSEN = torch.tensor([0.5, -2.0, 0.0, 30.0], dtype=torch.float64)
REJECTED = torch.tensor([-0.5, 1.0, 0.0, -900.0], dtype=torch.float64)


def test_dpo_is_the_negative_log_probability_of_the_preference():
    """Bradley-Terry: P(w beats l) = e^w / (e^w + e^l) of the implicit rewards."""
    implicit = 0.3 * torch.stack([CHOSEN, REJECTED], 1)
    torch.testing.assert_close(dpo(CHOSEN, REJECTED, 0.3), -implicit.log_softmax(1)[:, 0])
    assert dpo(CHOSEN, REJECTED, 0.3)[2].item() == pytest.approx(math.log(2))


def test_dpos_pull_is_beta_times_how_wrong_the_order_is():
    chosen, rejected = CHOSEN.clone().requires_grad_(), REJECTED.clone().requires_grad_()
    dpo(chosen, rejected, 0.3).sum().backward()
    torch.testing.assert_close(chosen.grad, -0.3 * (-log_odds(CHOSEN, REJECTED, 0.3)).sigmoid())
    torch.testing.assert_close(rejected.grad, -chosen.grad)


def test_velocities_and_tokens_share_the_function():
    """Flow-DPO's loss is dpo of minus half the errors' gaps, whatever beta_t."""
    algorithm, policy = FlowDPO(num_steps=5, beta=6.0, beta_schedule="one_minus_t_sq", pairing="all"), moved()
    batch = live(collect(algorithm, policy, num_prompts=3, k=4))
    found = algorithm.compare(policy, batch)
    rows = torch.arange(len(batch.draws)).view(-1, 2)
    gap_w, gap_l = found.gap[rows].T
    expected = dpo(-gap_w / 2, -gap_l / 2, 6.0 * (1 - batch.draws.t[rows[:, 0]]) ** 2).mean()
    torch.testing.assert_close(algorithm.loss(policy, batch).value, expected)


def test_bco_is_two_classifications():
    target = torch.nn.functional.binary_cross_entropy_with_logits
    expected = target(0.3 * CHOSEN - 0.2, torch.ones(4).double(), reduction="none")
    expected = expected + target(0.3 * REJECTED - 0.2, torch.zeros(4).double(), reduction="none")
    torch.testing.assert_close(bco(CHOSEN, REJECTED, 0.3, 0.2), expected)


def test_mpo_is_their_weighted_sum():
    logprob, lengths = torch.tensor([-4.0, -9.0]), torch.tensor([2, 3])
    parts = dpo(CHOSEN[:2], REJECTED[:2], 0.1), bco(CHOSEN[:2], REJECTED[:2], 0.1, 0.0), sft(logprob, lengths)
    assert parts[2].tolist() == [2, 3]
    torch.testing.assert_close(mpo(*parts, (0.8, 0.2, 1.0)), 0.8 * parts[0] + 0.2 * parts[1] + parts[2])
