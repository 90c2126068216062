"""What `generation` and `data.on_dead_group` ask for happens: real iterations of a tiny model through the trainer."""

import json

import pytest
import torch

from flowrl.config import ConfigError, make_config
from flowrl.vlm.augment import BEGIN, CORRECTED
from tests import runs
from tests.vlm.conftest import LONGEST, MEMBERS
from tests.vlm.test_server import serving

pytestmark = pytest.mark.slow

REFILL = {"data.filters": [{"use": "informative"}], "data.max_tries": 2}
VERIFIERS = """
def hinted(response, prompt):
    return float("Hint: the solution begins with: so" in prompt and sum(map(ord, response)) % 2)


def begun(response):
    return float(response.startswith("so") and sum(map(ord, response)) % 2)


def solved(response):
    return float(response.startswith("so it is"))


def little(response):
    return 0.2


def enough(response):
    return 0.6
"""


@pytest.fixture(scope="module")
def verifiers(tmp_path_factory):
    path = tmp_path_factory.mktemp("verifiers") / "dead.py"
    path.write_text(VERIFIERS)
    return path


def watched(trainer):
    """The batches that the trainer's actor makes, one a try."""
    seen, collect = [], trainer.actor.collect

    def spy(*arguments):
        seen.append(collect(*arguments))
        return seen[-1]

    trainer.actor.collect = spy
    return seen


def sound(row):
    assert not [key for key, value in row.items() if not runs.finite(value)]
    assert row["ratio_first_update"] < 1e-4


def written(batch):
    """The policy's tokens of each answer."""
    tokens = batch.tokens
    return [ids[mask].tolist() for ids, mask in zip(tokens.ids, tokens.mask, strict=True)]


# ------------------------------------------------------------------------------------------------ a server


def served(there, **more):
    changes = {
        "model.path": "tiny/llava", "generation.server": {"url": there.url + "/v1"},
        "algorithm": {"name": "grpo", "correction": "tis"}, "data.evaluation.num_samples": 2,
    }  # fmt: skip
    return changes | more


def asked(there):
    return sum(request.method == "POST" for request in there.requests)


def test_a_server_writes_what_is_trained_on(text_run):
    with serving() as there:
        trainer = text_run(served(there))
        batches = watched(trainer)
        first = trainer.step(0)
        assert asked(there) == 3  # one request a question
        sound(first)
        # The same weights, so the weights of the correction are 1 but for rounding.
        assert first["is_weight_max"] == pytest.approx(1, abs=1e-3) and first["is_kl"] < 1e-6
        second = trainer.step(1)
        sound(second)  # against the policy's own word
        assert abs(second["is_weight_mean"] - 1) > 1e-3 and second["is_kl"] > 1e-4  # the server has not moved
        tokens = batches[1].tokens
        drift = tokens.logprob - tokens.behaviour
        assert second["is_weight_max"] == pytest.approx(drift[tokens.mask].exp().max().item(), rel=1e-4)
        count = asked(there)
        trainer.actor.evaluate()
        assert asked(there) == count  # the averaged weights are the policy's


def test_what_a_server_cannot_go_on_with_the_policy_writes(text_run):
    forced = {"text": " so", "unless": "}}", "tokens": 3}
    with serving() as there:
        trainer = text_run(served(there, **{"generation.forced_answer": forced}))
        (batch,) = (batches := watched(trainer), trainer.step(0))[0]
        assert len(batches) == 1 and asked(there) == 3
    tokens, cut = batch.tokens, batch.facts["forced"] > 0
    assert cut.any()
    own = tokens.mask & (torch.arange(tokens.ids.shape[1]) >= LONGEST)
    assert own[cut].any() and not own[~cut].any()
    assert torch.allclose(tokens.behaviour[own], tokens.logprob[own], atol=1e-5)


def test_a_server_that_is_down_and_tools_are_refused(text_run, vlm_tree, tmp_path):
    from flowrl.models.pipeline import ModelError

    with pytest.raises(ModelError, match="generation.server.url"):
        text_run({"generation.server": {"url": "http://127.0.0.1:9/v1", "timeout": 2}}).actor.load()
    both = {"generation.server": {"url": "http://127.0.0.1:9/v1"}, "generation.tools": {"use": ["zoom"]}}
    with pytest.raises(ConfigError, match="leave one of the two out"):
        make_config(vlm_tree(tmp_path, both))


# ------------------------------------------------------------------------------------------------ how answers come


def answers_of(text_run, changes, folder):
    trainer = text_run(changes, folder=folder)
    batches = watched(trainer)
    sound(trainer.step(0))
    return trainer, batches[0]


def test_noisy_rollouts_are_trained_on_the_clean_picture(text_run):
    _, plain = answers_of(text_run, {}, "plain")
    _, unmoved = answers_of(text_run, {"generation.noisy": {"strength": 0.0}}, "unmoved")
    assert written(unmoved) == written(plain)
    trainer = text_run({"generation.noisy": {"share": 0.5, "strength": 0.8}}, folder="noisy")
    plan = trainer.actor.plan(0)
    prompts = plain.prompts
    batch = trainer.actor.collect(plan, prompts, range(len(prompts)), 0)
    shown = [bool(prompt.metadata["images"]) for prompt in prompts for _ in range(MEMBERS)]
    late = [member >= MEMBERS // 2 for _ in prompts for member in range(MEMBERS)]
    changed = [a != b for a, b in zip(written(batch), written(plain), strict=True)]
    assert any(changed)
    assert not any(c for c, s, noisy in zip(changed, shown, late, strict=True) if not (s and noisy))
    for i in range(len(batch.tokens)):
        own, clean = batch.tokens.inputs[i], trainer.actor.writer.inputs(prompts[int(batch.tokens.prompt[i])])
        assert all(torch.equal(own.media[name], clean.media[name]) for name in clean.media)
    again = trainer.policy.evaluate(batch.tokens).logprob
    assert torch.allclose(again, batch.tokens.logprob, atol=1e-5)


def test_answers_that_are_cut_off_are_forced(text_run):
    forced = {"text": " so", "unless": "}}", "tokens": 3}
    trainer, batch = answers_of(text_run, {"generation.forced_answer": forced}, "forced")
    _, plain = answers_of(text_run, {}, "plain")
    assert torch.equal(batch.facts["forced"], plain.facts["truncated"]) and batch.facts["forced"].any()
    so = trainer.policy.model.encode(" so")
    for i, is_forced in enumerate(batch.facts["forced"].tolist()):
        ids, mask = batch.tokens.ids[i], batch.tokens.mask[i]
        assert ids[:LONGEST].tolist()[: len(written(plain)[i])] == written(plain)[i]
        if is_forced:
            assert ids[LONGEST : LONGEST + len(so)].tolist() == so
            assert mask[:LONGEST].all() and not mask[LONGEST : LONGEST + len(so)].any()
            assert 1 <= int(mask[LONGEST + len(so) :].sum()) <= 3
            assert " so" in batch.samples[i].response


# ------------------------------------------------------------------------------------------------ dead groups


def two_tries(text_run, verifiers, name, how):
    """The prompts that were helped, and the batches of both tries, of which only helped groups teach something."""
    changes = REFILL | {"data.on_dead_group": how, "rewards": [{"use": f"{verifiers}:{name}"}],
                        "data.prompts_per_iteration": 6, "data.samples_per_prompt": 8}  # fmt: skip
    trainer = text_run(changes)
    batches, before = watched(trainer), runs.weights(trainer)
    row = trainer.step(0)
    sound(row)
    first, second = batches
    assert row["refill_tries"] == 2 and row["kept_groups"] > 0
    assert runs.distance(runs.weights(trainer), before) > 0
    helped = [
        i for i, prompt in enumerate(second.prompts) if prompt.metadata not in [p.metadata for p in first.prompts]
    ]
    solvable = [prompt.id for prompt in first.prompts if "solution" in prompt.metadata]
    assert [second.prompts[i].id for i in helped] == solvable  # the others have nothing to give away
    return trainer, helped, first, second


def test_a_dead_group_gets_a_hint(text_run, verifiers):
    trainer, helped, first, second = two_tries(text_run, verifiers, "hinted", "hint")
    for prompt in first.prompts:  # the history is of the questions as they are: nobody was right
        assert trainer.history.rewards(prompt.id).sum() == 0
    assert sum(trainer.history.seen(i) for i in range(len(trainer.prompts))) == 12 - len(helped)
    for i in helped:
        assert second.prompts[i].text.endswith("\nHint: the solution begins with: so")


def test_a_dead_groups_answers_are_begun(text_run, verifiers):
    trainer, helped, _, second = two_tries(text_run, verifiers, "begun", "inpaint")
    begin = torch.tensor(trainer.policy.model.encode("so"))
    for i in helped:
        assert second.prompts[i].metadata[BEGIN] == "so"
        for row in (second.tokens.prompt == i).nonzero().flatten().tolist():
            assert torch.equal(second.tokens.ids[row, : len(begin)], begin)
            assert not second.tokens.mask[row, : len(begin)].any()
            assert second.samples[row].response.startswith("so")


def test_a_dead_groups_answers_are_corrected(text_run, verifiers):
    trainer, helped, _, second = two_tries(text_run, verifiers, "solved", "correct")
    policy, tokens = trainer.policy, second.tokens
    for i in helped:
        prompt = second.prompts[i]
        assert prompt.metadata[CORRECTED] == 0.5
        gold = [*policy.model.encode(prompt.metadata["solution"]), policy.model.ends[0]]
        rows = (tokens.prompt == i).nonzero().flatten().tolist()
        swapped = [row for row in rows if tokens.ids[row, : len(gold)].tolist() == gold]
        assert len(swapped) == 4
        for row in swapped:
            assert second.samples[row].response == prompt.metadata["solution"]
            assert tokens.mask[row].sum() == len(gold) and second.facts["tokens"][row] == len(gold)
            assert not second.facts["truncated"][row]
            # Learning from it makes it likelier than it was when it was put there.
            now = policy.evaluate(tokens.select(torch.tensor([row]))).logprob.sum()
            assert now > tokens.logprob[row].sum()
        others = [row for row in rows if row not in swapped]
        assert {second.samples[row].response for row in others}.isdisjoint({prompt.metadata["solution"]})


@pytest.mark.parametrize(("name", "dead"), [("little", True), ("enough", False)])
def test_a_group_is_dead_where_nothing_passes(text_run, verifiers, name, dead):
    """A small reward, as for the right form, does not make an answer right."""
    trainer = text_run(REFILL | {"data.on_dead_group": "hint", "rewards": [{"use": f"{verifiers}:{name}"}]})
    batches = watched(trainer)
    trainer.step(0)
    assert len(batches) == 2
    assert any("Hint:" in prompt.text for prompt in batches[1].prompts) == dead


def test_help_without_a_further_try_is_refused(vlm_tree, tmp_path):
    for more in ({}, {"data.max_tries": 2}, {"data.filters": [{"use": "informative"}]}):
        with pytest.raises(ConfigError, match=r"data\.max_tries=2 and data\.filters"):
            make_config(vlm_tree(tmp_path, {"data.on_dead_group": "hint", **more}))


def test_questions_of_the_same_words_keep_their_pictures(text_run, home, tmp_path):
    """Inputs are remembered by what they are made of: a helped question's metadata come and go."""
    rows = [
        {"prompt": "how many?", "images": [str(home / name)], "solution": "so it is"} for name in ("1-0.png", "2-0.png")
    ]
    file = tmp_path / "same.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    trainer = text_run({"data.prompts": str(file), "data.prompts_per_iteration": 2})
    from flowrl.vlm.augment import inpaint

    for _ in range(20):
        seen = [trainer.actor.writer.inputs(inpaint(prompt)) for prompt in trainer.prompts]
        assert not torch.equal(seen[0].media["pixel_values"], seen[1].media["pixel_values"])
