"""What a config and an iteration say reaches where it is read: real answers of a tiny model through a run's actor."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from flowrl.vlm.actor import ACCURACY
from flowrl.vlm.augment import correct
from tests.vlm.conftest import LONGEST, MEMBERS

VERIFIERS = """
def counted(response, tokens):
    return float(tokens)


def cut(response, truncated):
    return float(truncated)


def fixed(response, worth=1.0):
    return worth
"""
SLOTS = [0, 1, 2]


@pytest.fixture(scope="module")
def entry(tmp_path_factory):
    """`entry("fixed", worth=0.6)`: the entry of a verifier of this file."""
    path = tmp_path_factory.mktemp("wiring") / "verifiers.py"
    path.write_text(VERIFIERS)
    return lambda name, **keys: {"use": f"{path}:{name}", "name": name, **keys}


def collected(run, progress=0.0, iteration=0, prompts=None):
    """Four answers to each of three questions, two of which have pictures."""
    return run.actor.collect(progress, prompts or run.prompts[:3], SLOTS, iteration)


def written(batch):
    """The policy's tokens of each answer."""
    return [ids[mask].tolist() for ids, mask in zip(batch.tokens.ids, batch.tokens.mask, strict=True)]


# ------------------------------------------------------------------------------------------------ whose answers


@torch.no_grad()
def gap(run, batch):
    """How far a run's weights are from those that wrote a batch, as the largest difference of a log-prob."""
    tokens = batch.tokens
    return (run.policy.evaluate(tokens).logprob - tokens.logprob)[tokens.mask].abs().max().item()


def test_the_offline_stage_of_a_cascade_asks_the_initial_model(text_run):
    run = text_run({"iterations": 6, "algorithm": {"name": "cascade", "switch": 3}})
    initial = text_run({}, "initial")
    for iteration in (0, 1):
        run.step(iteration)
    offline = collected(run, iteration=2)
    assert gap(initial, offline) < 1e-5 and gap(run, offline) > 1e-2
    run.step(2)
    online = collected(run, iteration=3)
    assert gap(run, online) < 1e-5 and gap(initial, online) > 1e-2


# ------------------------------------------------------------------------------------------------ what verifiers see


def lengths_and_cuts(run, rows):
    """Of answers without tools, ids [s] each: how long they are, and whether the model did not end them itself."""
    end = json.loads((Path(run.config.model.path) / "generation_config.json").read_text())["eos_token_id"]
    return [len(ids) for ids in rows], [ids[-1] != end for ids in rows]


def test_verifiers_are_told_the_length_and_the_cut(text_run, entry):
    run = text_run({"rewards": [entry("counted"), entry("cut")]})
    batch = collected(run)
    scores, rows = run.actor.submit(batch)().scores, written(batch)
    lengths, cuts = lengths_and_cuts(run, rows)
    assert scores["counted"].tolist() == batch.facts["tokens"].tolist() == lengths
    assert scores["cut"].tolist() == batch.facts["truncated"].tolist() == cuts
    assert len(set(lengths)) > 2 and len(set(cuts)) == 2


def test_verifiers_are_told_both_of_continuations_too(text_run, entry):
    """The value of a bare prompt is the mean of what two whole answers get."""
    algorithm = {"name": "ppo", "values": "monte_carlo", "continuations": 2, "every": 3}
    run = text_run({"algorithm": algorithm, "rewards": [entry("counted"), entry("cut", weight=100.0)]})
    write, calls = run.policy.write, []

    def heard(*arguments, **options):
        calls.append(write(*arguments, **options))
        return calls[-1]

    run.policy.write = heard
    batch = collected(run)
    from_the_start = calls[1]  # the first call writes the answers themselves
    lengths, cuts = lengths_and_cuts(run, [row.ids.tolist() for row in from_the_start])
    expected = [length + 100.0 * is_cut for length, is_cut in zip(lengths, cuts, strict=True)]
    assert batch.values[:, 0].view(3, MEMBERS)[:, 0].tolist() == torch.tensor(expected).view(3, 2).mean(1).tolist()
    assert len(set(lengths)) > 1 and len(set(cuts)) == 2
    assert any(len(row.ids) == LONGEST and len(row.ids) > 3 for rows in calls[2:] for row in rows)


# ------------------------------------------------------------------------------------------------ what counts as right


@pytest.mark.parametrize(
    ("worth", "passing", "passes"),
    [(0.6, 0.9, False), (0.6, 0.5, True), (0.5, 0.5, True), (0.9, 0.9, True), (0.7, 0.7, True)],
)
def test_what_passes_is_what_the_config_says(text_run, entry, worth, passing, passes):
    """For what is remembered of a prompt, for dead groups in the metrics, and for whether a group gets help."""
    run = text_run({
        "rewards": [entry("fixed", worth=worth)], "data.passing": passing, "data.on_dead_group": "correct",
        "data.filters": [{"use": "informative"}], "data.max_tries": 2,
    })  # fmt: skip
    helped, revive = [], run.actor.revive
    run.actor.revive = lambda batch, dead, iteration: helped.extend(dead) or revive(batch, dead, iteration)
    row = run.step(0)
    assert (row["dead_low"], row["dead_high"]) == (float(not passes), float(passes))
    seen = [prompt.id for prompt in run.prompts if run.history.seen(prompt.id)]
    assert seen and {run.history.pass_rate(prompt) for prompt in seen} == {float(passes)}
    assert len(helped) == (0 if passes else 3)


@pytest.mark.parametrize(("passing", "replaced"), [(0.5, 0), (0.51, 2)])
def test_an_answer_that_just_passes_is_not_corrected(text_run, entry, passing, replaced):
    run = text_run({"rewards": [entry("fixed", worth=0.5)], "data.passing": passing})
    prompts = [correct(prompt) for prompt in run.prompts if "solution" in prompt.metadata]
    batch = collected(run, prompts=prompts)
    for place, prompt in enumerate(prompts):
        said = [answer.response for answer in batch.samples[place * MEMBERS : (place + 1) * MEMBERS]]
        assert said.count(prompt.metadata["solution"]) == replaced


@pytest.mark.parametrize(
    ("weights", "worth", "right"),
    [((1.0,), 0.7, 0), ((1.0,), 1.0, 1), ((0.65, 0.15, 0.2), 1.0, 1)],
    ids=["almost", "right", "rounded"],
)
def test_a_right_answer_has_the_whole_reward(text_run, entry, weights, worth, right):
    """But for rounding: the three weights sum to less than 1 in float32."""
    parts = [{**entry("fixed", worth=worth, weight=weight), "name": f"part{weight}"} for weight in weights]
    run = text_run({"rewards": parts})
    row = run.step(0)
    assert row["text/pass@1"] == row["text/groups/all_right"] == right
    assert row["text/groups/all_wrong"] == 1 - right
    assert run.actor.evaluate().scores[ACCURACY].tolist() == [right] * 3


# ------------------------------------------------------------------------------------------------ along the run


def test_noise_on_pictures_fades_along_the_run(text_run):
    run = text_run({"iterations": 8, "generation.noisy": {"share": 0.5, "strength": 0.8}})
    assert [run.actor.plan(iteration) for iteration in (0, 2, 8)] == [0.0, 0.25, 1.0]
    first, last = (written(collected(run, progress)) for progress in (0.0, 1.0))
    run.actor.writer.noisy = None
    clean = written(collected(run))
    assert last == clean != first


def test_the_masked_patches_are_others_in_another_iteration(text_run):
    run = text_run({"algorithm": {"name": "grpo", "perception_coef": 0.01}})
    batch = collected(run, iteration=4)
    assert (batch.iteration, batch.seed) == (4, run.config.seed)
    ready = replace(batch, advantages=torch.ones(len(batch.tokens)))

    def perception(**changes):
        with torch.no_grad():
            return run.algorithm.loss(run.policy, replace(ready, **changes)).metrics["perception"].item()

    assert perception() == perception()
    assert len({perception(), perception(iteration=5), perception(seed=ready.seed + 1)}) == 3
