"""Two stages in one run: who gives credit, who draws the samples, what is asked for."""

import pytest
import torch
from pydantic import ValidationError

from flowrl.algorithms.cascade import Cascade
from flowrl.algorithms.gspo import GSPO
from flowrl.algorithms.token_dpo import TokenDPO
from flowrl.types import Prompt, TokenBatch, Tokens


def batch(iteration, rewards=(1.0, 0.0, 0.5, 0.5)):
    ids = torch.ones(4, 3, dtype=torch.long)
    mask = torch.ones(4, 3, dtype=torch.bool)
    tokens = Tokens(
        ids=ids, present=mask, mask=mask, logprob=torch.full((4, 3), -1.0), prompt=torch.zeros(4).long(),
        inputs=(None,) * 4,
    )  # fmt: skip
    return TokenBatch(
        prompts=[Prompt(id=0, text="?")], tokens=tokens, group=torch.zeros(4).long(), iteration=iteration,
        rewards=torch.tensor(rewards).double(), place=torch.arange(4), facts={"tokens": torch.full((4,), 3.0).double()},
    )  # fmt: skip


def test_each_stage_gives_its_own_credit():
    method = Cascade(switch=2, offline={"name": "token_dpo"}, online={"name": "gspo"})
    early, late = method.credit(batch(1)), method.credit(batch(2))
    torch.testing.assert_close(early, TokenDPO().credit(batch(1)), equal_nan=True)
    torch.testing.assert_close(late, GSPO().credit(batch(2)), equal_nan=True)
    assert early.isnan().sum() == 2 and not late.isnan().any()
    assert len(method.mass(batch(1))) == 1 and len(method.mass(batch(2))) == 2


def test_the_old_policy_stands_still_until_the_switch():
    method = Cascade(switch=3)
    assert [method.old_decay(i) for i in range(5)] == [1, 1, 0, 0, 0]
    assert method.needs.old and not method.needs.on_policy


def test_it_asks_for_what_either_stage_needs():
    needs = Cascade().needs
    assert needs.tokens and needs.reference and needs.reference_logprobs and needs.whole_groups
    assert not Cascade(offline={"name": "grpo"}, online={"name": "rloo"}).needs.reference


@pytest.mark.parametrize("stage", [{"name": "flow_grpo"}, {"name": "ppo"}, {"clip_range": 0.2}])
def test_a_stage_that_cannot_be_one_is_refused(stage):
    with pytest.raises(ValidationError, match="stage"):
        Cascade(online=stage)


def test_settings_of_the_stages_are_checked_and_completed():
    method = Cascade(offline={"name": "token_dpo", "beta": 0.3})
    assert method.offline["beta"] == 0.3 and "length_normalised" in method.offline
    with pytest.raises(ValidationError, match="bta"):
        Cascade(offline={"name": "token_dpo", "bta": 0.3})
