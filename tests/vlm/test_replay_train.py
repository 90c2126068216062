"""Answers of earlier iterations in real updates: how many, which, and what is not said of them; pairs and filters."""

import pytest
import torch

from tests import runs
from tests.vlm.conftest import MEMBERS

pytestmark = pytest.mark.slow

PLACES = 3 * MEMBERS
"""Answers of an iteration in `text_run`."""


def watched(trainer):
    """What was drawn again, and how many answers were trained on, iteration by iteration."""
    drawn, trained = [], []
    draw, update = trainer.replay.draw, trainer.updater.run

    def spy_draw(*arguments):
        drawn.append(draw(*arguments))
        return drawn[-1]

    def spy_update(batch, update_of):
        trained.append(len(batch.rows))
        assert len(update_of) == len(batch.rows)
        return update(batch, update_of)

    trainer.replay.draw, trainer.updater.run = spy_draw, spy_update
    return drawn, trained


def test_answers_of_this_iteration_are_not_drawn_again(text_run, verifier):
    trainer = text_run({"data.replay": {"size": 64, "max_age": 3}, "rewards": [verifier("dull")]})
    drawn, _ = watched(trainer)
    rows = [trainer.step(iteration) for iteration in range(4)]
    assert drawn[0] is None and len(trainer.replay) > 0
    ages = torch.cat([again.age for again in drawn if again is not None])
    assert len(ages) > 0 and ages.min() >= 1
    # Their ratio is that of a policy some iterations ago.
    assert all("ratio_first_update" not in row and runs.finite(row["grad_norm"]) for row in rows)


def test_further_tries_leave_no_more_places(text_run, verifier, capfd):
    """Answers that a refill drew in vain are no places for old ones: an update is never larger than an iteration."""
    trainer = text_run({
        "data.replay": {"size": 64, "max_age": 9}, "rewards": [verifier("rare")], "data.max_tries": 4,
        "data.filters": [{"use": "informative"}],
    })  # fmt: skip
    _, trained = watched(trainer)
    tries = [trainer.step(iteration)["refill_tries"] for iteration in range(5)]
    assert max(tries) > 1
    assert max(trained) == PLACES
    assert "warning: ratio_first_update" not in capfd.readouterr().out


@pytest.mark.parametrize("algorithm", [
    {"name": "token_dpo"}, {"name": "token_mpo"}, {"name": "cascade", "offline": {"name": "token_dpo"}},
], ids=lambda section: section["name"])  # fmt: skip
def test_pairs_are_of_the_answers_that_filters_left(text_run, verifier, algorithm):
    """Without that the best answer would often be one that is gone, and its group without a pair."""
    trainer = text_run({"algorithm": algorithm, "data.filters": [{"use": "short_enough", "most": 5}]})
    seen, update = [], trainer.updater.run

    def spy(batch, update_of):
        seen.append(batch)
        return update(batch, update_of)

    trainer.updater.run = spy
    gone = 0
    for iteration in range(3):
        row = trainer.step(iteration)
        gone += row["kept_samples"] < 1
        batch = seen[-1]
        assert (batch.facts["tokens"] <= 5).all()
        assert all(count == 2 for count in torch.unique(batch.group, return_counts=True)[1].tolist())
        assert runs.finite(row["policy_loss"])
    assert gone and sum(len(batch.rows) for batch in seen)
