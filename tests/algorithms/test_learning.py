"""Each algorithm learns: on the toy, whose reward is highest at (1, 1), 40 iterations take the samples there."""

import pytest

from flowrl.algorithms.flow_grpo import FlowGRPO
from flowrl.algorithms.mix_grpo import MixGRPO
from tests.algorithms.toy import train

CASES = {
    "flow_grpo": FlowGRPO(num_steps=6, kl_coef=0.0),
    "flow_grpo fast": FlowGRPO(num_steps=6, window=2, shared_noise=True, kl_coef=0.0),
    "flow_grpo cps": FlowGRPO(num_steps=6, sde="cps", eta=0.8, kl_coef=0.0),
    "mix_grpo": MixGRPO(num_steps=8, window=3, shift_every=10),
    "mix_grpo dpmpp_2m": MixGRPO(num_steps=8, window=3, shift_every=10, solver="dpmpp_2m", shared_noise=False),
}


@pytest.mark.parametrize("name", CASES)
def test_the_reward_rises(name):
    policy, records = train(CASES[name], iterations=40, lr=0.05)
    first, last = (sum(r["reward"] for r in part) / 5 for part in (records[:5], records[-5:]))
    assert first < -1.5
    assert last > -0.8
    assert (policy.bias > 0.5).all()


def test_several_updates_leave_the_first_policy_and_are_clipped():
    _, records = train(FlowGRPO(num_steps=6, kl_coef=0.0, clip_range=0.01), iterations=5, lr=0.05, updates=4)
    assert all(record["ratio_max_dev"] > 0.01 and 0 < record["clip_frac"] < 1 for record in records)


def test_a_kl_holds_the_policy_back():
    free, _ = train(FlowGRPO(num_steps=6, kl_coef=0.0), iterations=25, lr=0.05)
    held, records = train(FlowGRPO(num_steps=6, kl_coef=5.0), iterations=25, lr=0.05)
    assert held.bias.abs().max() < 0.5 * free.bias.abs().max()
    assert records[0]["kl"] == 0
    assert records[-1]["kl"] > 0
