"""Real iterations of models that write, through the one trainer: every method, every kind of model, every setting.

A new method in flowrl/algorithms joins by being there, and so does a new tiny model in flowrl/vlm/tiny.py.
"""

import json
import math
from dataclasses import replace

import pytest
import torch
from PIL import Image
from pydantic import ValidationError

from flowrl.config import ConfigError, algorithm_class, check, make_config
from flowrl.data import DataError
from flowrl.models import ModelError
from flowrl.resolve import available
from flowrl.types import Prompt
from flowrl.vlm import tiny
from flowrl.vlm.collate import asked
from rewards import RewardError
from tests import runs
from tests.vlm.conftest import LONGEST, LORA, MEMBERS, SIZES, STEADY

pytestmark = pytest.mark.slow


def token_methods():
    """{name: its class} of the files in flowrl/algorithms that are a method for answers."""
    found = {}
    for name in available("flowrl.algorithms"):
        try:
            method = algorithm_class(name)
        except ValidationError:
            continue  # a part of methods
        if method().needs.tokens:
            found[name] = method
    return found


METHODS = token_methods()
SETTINGS = {"passk_grpo": {"k": 2}}
"""Where the defaults teach nothing in a group of four."""
MODES = {name: {} for name in ("token_mean", "seq_mean_token_mean", "seq_mean_token_sum", "token_sum")}
MODES["seq_mean_token_sum_norm"] = {"horizon": LONGEST}


def method(name, **settings):
    return {"name": name, **SETTINGS.get(name, {}), **settings}


def test_the_methods_were_listed():
    assert {"grpo", "gspo", "reinforce_pp", "ppo", "token_dpo"} <= set(METHODS)
    assert "flow_grpo" not in METHODS


def answers(trainer, iteration=0):
    """What the first try of an iteration would bring, without training on it."""
    prompts = trainer._prompts_of(iteration, 0)
    return trainer.actor.collect(trainer.actor.plan(iteration), prompts, list(range(len(prompts))), iteration)


def iterate(trainer, iterations=2):
    """The metrics of the first iterations, which are all sound and move the weights."""
    before, rows = runs.weights(trainer), []
    for iteration in range(iterations):
        rows.append(trainer.step(iteration))
        trainer.iteration = iteration + 1
    assert runs.distance(runs.weights(trainer), before) > 0
    for row in rows:
        assert not [key for key, value in row.items() if not runs.finite(value)]
        assert row["skipped_updates"] == 0
        assert row.get("ratio_first_update", 0.0) < 1e-4
    return rows


# ------------------------------------------------------------------------------------------------ methods, settings


@pytest.mark.parametrize("name", METHODS)
def test_every_method_trains(text_run, name):
    trainer = text_run({"algorithm": method(name)})
    rows = iterate(trainer)
    assert rows[0]["calls/rollout"] > 0 and rows[0]["calls/train"] > 0
    assert 0 < rows[0]["text/tokens/all"] <= LONGEST
    assert ("ratio_first_update" in rows[0]) == ("clip_range" in METHODS[name].model_fields)
    assert sum(row["empty_updates"] for row in rows) < 2


KINDS = {
    "kl": ({"algorithm": method("grpo", kl_coef=0.1)}, {"kl"}),
    "kl in an answer's reward": ({"algorithm": method("grpo", kl_in_reward=0.1)}, set()),
    "kl in the tokens' rewards": ({"algorithm": method("reinforce_pp", kl_in_reward=0.1)}, set()),
    "entropy": ({"algorithm": method("grpo", entropy_coef=0.01)}, {"entropy_bonus"}),
    "unsure tokens alone": ({"algorithm": method("grpo", top_entropy=0.3)}, set()),
    "imitation of good answers": ({"algorithm": method("grpo", positive_sft_coef=0.1)}, {"positive_sft"}),
    "imitation of solutions": ({"algorithm": method("grpo", sft_coef=0.5)}, {"sft"}),
    "perception": (
        {"algorithm": method("grpo", perception_coef=0.01, perception_entropy=0.03)},
        {"perception", "perception_entropy"},
    ),
    "shaped by entropy": ({"algorithm": method("grpo", shaping="entropy")}, set()),
    "shaped by tools": ({"algorithm": method("grpo", shaping="tool_position")}, {"text/calls"}),
    "truncated ones left out": ({"algorithm": method("grpo", mask_truncated=True)}, set()),
    "two updates": ({"optimizer.updates_per_iteration": 2}, set()),
    "two updates of whole groups": (
        {"algorithm": method("token_dpo", pairing="all"), "optimizer.updates_per_iteration": 2},
        {"reward_accuracies"},
    ),
    "gspo, two updates": ({"algorithm": method("gspo"), "optimizer.updates_per_iteration": 2}, set()),
    "a critic that warms up": ({"algorithm": method("ppo", critic_warmup=1)}, {"value_loss"}),
    "lora with a critic": ({"algorithm": method("ppo"), "model.lora": LORA}, {"value_loss"}),
    "checkpointing": ({"model.gradient_checkpointing": True}, set()),
    "average": ({"optimizer.ema_decay": 0.9}, set()),
    "no pictures": ({"data.prompts": ["how many?", "say it"], "data.prompts_per_iteration": 2}, set()),
}


@pytest.mark.parametrize(("changes", "metrics"), KINDS.values(), ids=KINDS)
def test_every_setting_trains(text_run, changes, metrics):
    rows = iterate(text_run(changes))
    assert metrics <= rows[0].keys()


@pytest.mark.parametrize("combine", ["gdpo", "per_reward"])
def test_each_verifier_by_itself(text_run, verifier, combine):
    rewards = [verifier("code"), verifier("short", weight=0.5)]
    apart = iterate(text_run({"algorithm": method("grpo", combine=combine), "rewards": rewards}, "apart"))
    summed = iterate(text_run({"algorithm": method("grpo"), "rewards": rewards}, "summed"))
    assert apart[0]["reward/mean"] == summed[0]["reward/mean"]
    assert apart[0]["adv_abs"] != summed[0]["adv_abs"]


def test_what_a_penalty_reads_is_right_from_the_start(text_run):
    """KL 0 at first and more later; the entropy is what the rollout's tokens say of it."""
    rows = iterate(text_run({"algorithm": method("grpo", kl_coef=0.1)}), 3)
    assert abs(rows[0]["kl"]) < 1e-9 and rows[2]["kl"] > 1e-6


def test_the_critic_alone_warms_up(text_run):
    """While it does, the language model learns to expect rewards, and the policy's terms weigh nothing."""
    trainer = text_run({"algorithm": method("ppo", critic_warmup=1, value_coef=1e-9), "optimizer.eps": 1.0})
    before = runs.weights(trainer)
    first, second = trainer.step(0), trainer.step(1)
    assert first["value_loss"] > 0 and first["value_mean"] == 0.0
    assert runs.distance(runs.weights(trainer), before) > 0 and second["grad_norm"] > 1e3 * first["grad_norm"]


def foreign(trainer, shift):
    """Lets the answers seem to come from an engine whose log-probs differ by `shift` [N,S]."""
    collect = trainer.actor.collect

    def collected(*arguments):
        batch = collect(*arguments)
        tokens = batch.tokens
        behaviour = (tokens.logprob + shift(tokens)).where(tokens.mask, 0.0)
        return replace(batch, tokens=replace(tokens, inputs=tokens.inputs, behaviour=behaviour))

    trainer.actor.collect = collected


@pytest.mark.parametrize("correction", ["tis", "mis", "icepop", "bypass"])
def test_answers_of_a_foreign_engine_are_weighed(text_run, correction):
    """The engine gave every token half of its probability: weights are 2, cut at 1.5 or left out."""
    settings = {"correction": correction, "correction_high": 1.5, "clip_range": (1.0, 9.0)}
    own = text_run({"algorithm": method("grpo", **settings), "optimizer.max_grad_norm": None}, "own")
    theirs = text_run({"algorithm": method("grpo", **settings), "optimizer.max_grad_norm": None}, "theirs")
    foreign(theirs, lambda tokens: torch.full_like(tokens.logprob, -math.log(2)))
    norms = [trainer.step(0)["grad_norm"] for trainer in (own, theirs)]
    factor = {"tis": 1.5, "mis": 0.0, "icepop": 0.0, "bypass": 2.0}[correction]
    assert norms[0] > 0 and norms[1] == pytest.approx(factor * norms[0], rel=1e-4)


# ------------------------------------------------------------------------------------------------ models


def parts(trainer):
    """Parameters by what they are: those of the vision tower, of adapters, and all others."""
    network = trainer.policy.model.trainable
    vision = {id(p) for p in network.get_encoder(modality="image").parameters()}
    found = {"vision": {}, "adapters": {}, "others": {}}
    for name, parameter in network.named_parameters():
        kind = "vision" if id(parameter) in vision else "adapters" if "lora_" in name else "others"
        found[kind][name] = parameter
    return found


@pytest.mark.parametrize("lora", [None, LORA], ids=["full", "lora"])
@pytest.mark.parametrize("name", tiny.names())
def test_every_model_trains_on_policy(text_run, name, lora):
    """The first ratio is 1 at a temperature of 0.7, with answers, prompts and pictures of different sizes."""
    trainer = text_run(
        {"model.lora": lora, "data.prompts_per_iteration": len(SIZES), "optimizer.micro_batch": 5}, name=name
    )
    written = answers(trainer)
    assert len(written.tokens.lengths.unique()) > 2
    assert len({len(inputs.ids) for inputs in written.tokens.inputs}) > 3
    before = {kind: {n: p.detach().clone() for n, p in of.items()} for kind, of in parts(trainer).items()}
    row = trainer.step(0)
    assert row["ratio_first_update"] < 1e-4 and row["ratio_max_dev"] < 1e-4
    after = parts(trainer)
    moved = {kind: {n for n, p in after[kind].items() if not torch.equal(p, before[kind][n])} for kind in after}
    assert before["vision"] and not moved["vision"]
    assert bool(moved["others"]) == (lora is None) and bool(moved["adapters"]) == (lora is not None)


@pytest.mark.parametrize("name", tiny.names())
def test_vision_learns_where_it_is_asked_to(text_run, name):
    trainer = text_run({"model.freeze_vision": False}, name=name)
    before = {n: p.detach().clone() for n, p in parts(trainer)["vision"].items()}
    trainer.step(0)
    after = parts(trainer)["vision"]
    assert sum(not torch.equal(after[n], before[n]) for n in before) > len(before) / 2


# ------------------------------------------------------------------------------------------------ how work is cut


def trained(text_run, folder, changes):
    """Weights after two iterations, and their metrics."""
    trainer = text_run({**STEADY, **changes}, folder)
    before = runs.weights(trainer)
    rows = [trainer.step(iteration) for iteration in range(2)]
    assert runs.distance(runs.weights(trainer), before) > 1e-3
    return runs.weights(trainer), rows


@pytest.mark.parametrize("updates", [1, 2])
@pytest.mark.parametrize("mode", MODES)
def test_micro_batches_change_nothing(text_run, mode, updates):
    base = {
        "algorithm": method("grpo", aggregate=mode, **MODES[mode], kl_coef=0.01, entropy_coef=0.001),
        "optimizer.updates_per_iteration": updates,
    }
    whole, told = trained(text_run, "whole", base)
    for size in (1, 2):
        cut, rows = trained(text_run, f"cut{size}", {**base, "optimizer.micro_batch": size})
        assert (cut - whole).abs().max() < 1e-6
        assert rows[1]["grad_norm"] == pytest.approx(told[1]["grad_norm"], rel=1e-4)


@pytest.mark.one_in(2)
@pytest.mark.parametrize("name", METHODS)
def test_micro_batches_change_no_method(text_run, name):
    base = {"algorithm": method(name), "optimizer.updates_per_iteration": 2}
    whole, _ = trained(text_run, "whole", base)
    cut, _ = trained(text_run, "cut", {**base, "optimizer.micro_batch": 1})
    assert (cut - whole).abs().max() < 1e-6


def test_the_modes_differ(text_run):
    """As their definitions say, since the gradient of an on-policy update is linear in the tokens' weights."""
    free = {"optimizer.max_grad_norm": None}
    made = {
        mode: text_run({**free, "algorithm": method("grpo", aggregate=mode, **MODES[mode])}, mode) for mode in MODES
    }
    tokens = answers(made["token_sum"]).tokens.lengths.sum().item()
    norm = {mode: trainer.step(0)["grad_norm"] for mode, trainer in made.items()}
    assert norm["token_sum"] == pytest.approx(tokens * norm["token_mean"], rel=1e-4)
    assert norm["token_sum"] == pytest.approx(3 * MEMBERS * norm["seq_mean_token_sum"], rel=1e-4)
    assert norm["seq_mean_token_sum"] == pytest.approx(LONGEST * norm["seq_mean_token_sum_norm"], rel=1e-4)
    others = {value for mode, value in norm.items() if mode != "seq_mean_token_mean"}
    assert all(abs(norm["seq_mean_token_mean"] / value - 1) > 0.01 for value in others)


@pytest.mark.parametrize("name", tiny.names())
def test_answers_do_not_depend_on_how_many_are_written_at_a_time(text_run, name):
    batches = [answers(text_run({"generation.batch_size": n}, f"b{n}", name=name)) for n in (None, 1, 5)]
    first = batches[0].tokens
    for batch in batches[1:]:
        assert torch.equal(batch.tokens.ids, first.ids) and torch.equal(batch.tokens.mask, first.mask)
        torch.testing.assert_close(batch.tokens.logprob, first.logprob, rtol=0, atol=2e-5)


def test_an_answer_depends_on_its_place_alone(text_run):
    """Not on what is asked beside it; another iteration or seed gives another answer."""
    trainer = text_run({"data.prompts_per_iteration": 6})
    prompts = trainer._prompts_of(0, 0)
    every = trainer.actor.collect(0.0, prompts, range(6), 0)
    some = trainer.actor.collect(0.0, prompts[3:5], [3, 4], 0)
    texts = [answer.response for answer in every.samples]
    assert [answer.response for answer in some.samples] == texts[3 * MEMBERS : 5 * MEMBERS]
    assert [answer.response for answer in trainer.actor.collect(0.0, prompts, range(6), 1).samples] != texts


def test_questions_with_one_text_are_told_apart(text_run, home):
    """Also those that live for one iteration, so that another may come to lie where they lay."""
    trainer = text_run()
    model, texts = trainer.policy.model, []
    for number in (1, 3, 4, 5):
        row = {"images": [f"{home}/{number}-0.png"], "given": number}
        batch = trainer.actor.collect(0.0, [Prompt(id=0, text="how many?", metadata=row)], [0], 0)
        shown = batch.tokens.inputs[0].media["pixel_values"]
        with Image.open(f"{home}/{number}-0.png") as picture:
            expected = model.prepare(asked("how many?", [picture.convert("RGB")])).media["pixel_values"]
        assert torch.equal(shown, expected)
        texts.append(tuple(answer.response for answer in batch.samples))
        del batch, row
    assert len(set(texts)) == 4


# ------------------------------------------------------------------------------------------------ filters
# What becomes of rows, nothing kept, and resuming: tests/test_filters_train.py, test_resume.py.


@pytest.mark.parametrize("name", ["grpo", "gspo", "reinforce_pp", "ppo", "token_mpo"])
def test_two_tries_are_one_larger_iteration(text_run, verifier, name):
    """Six questions in two tries, of which three teach, and the same six at once: the same weights."""
    changes = {
        **STEADY, "algorithm": method(name), "rewards": [verifier("dull")], "data.filters": [{"use": "informative"}],
    }  # fmt: skip
    twice = text_run({**changes, "data.max_tries": 2}, "twice")
    once = text_run({**changes, "data.prompts_per_iteration": 6}, "once")
    start = runs.weights(once)
    rows = [twice.step(0), once.step(0)]
    assert [row["refill_tries"] for row in rows] == [2, 1] and rows[0]["refill_missing"] == 0
    assert (runs.weights(twice) - runs.weights(once)).abs().max() < 1e-5 < runs.distance(runs.weights(once), start)
    for key in rows[0].keys() & rows[1].keys():
        if not key.startswith(("time/", "refill", "ratio_", "calls/")) and "per_second" not in key:
            assert rows[0][key] == pytest.approx(rows[1][key], rel=1e-4, abs=1e-5), key


@pytest.mark.one_in(2)
@pytest.mark.parametrize("filter_", [
    {"use": "short_enough", "most": 4}, {"use": "not_truncated"}, {"use": "largest_advantage", "prune": 0.7},
    {"use": "pf_ppo", "how": "max_random"}, {"use": "best_worst", "best": 1, "worst": 1},
], ids=lambda entry: entry["use"])  # fmt: skip
@pytest.mark.parametrize("name", ["grpo", "reinforce_pp", "ppo", "token_dpo", "token_mpo"])
def test_filters_of_answers_leave_sound_updates(text_run, name, filter_):
    """Also of pairs of which one answer has left, and cut as finely as may be."""
    whole, rows = {}, {}
    for size in (None, 1):
        changes = {"algorithm": method(name), "data.filters": [filter_], "optimizer.micro_batch": size}
        trainer = text_run({**STEADY, **changes}, f"run{size}")
        rows[size] = trainer.step(0)
        whole[size] = runs.weights(trainer)
        assert rows[size]["skipped_updates"] == 0 and runs.finite(rows[size]["grad_norm"])
    assert rows[None]["kept_samples"] <= 1 and (whole[None] - whole[1]).abs().max() < 1e-6


# ------------------------------------------------------------------------------------------------ verifiers


def test_routed_verifiers_see_their_own_questions(text_run, verifier):
    """Who is not asked has no verdict, which stops no run however strict the watch is."""
    routes = [
        verifier("code", when={"data_source": "even"}), verifier("short", when={"data_source": "odd"}),
        verifier("odd", weight=0.0),
    ]  # fmt: skip
    trainer = text_run({"rewards": routes, "data.max_no_verdict": 0.0, "data.prompts_per_iteration": 6})
    rows = iterate(trainer, 5)
    for row in rows:
        assert row["reward/mean"] == pytest.approx((row["score/code"] + row["score/short"]) / 2)
        assert row["text/reward/even"] == pytest.approx(row["score/code"])
        assert row["text/reward/odd"] == pytest.approx(row["score/short"])
        assert [row[f"score_no_verdict/{name}"] for name in ("code", "short", "odd")] == [0, 0, 0]


def test_routed_verifiers_by_themselves(text_run, verifier):
    """Where each verifier has an advantage of its own, one that is not asked takes nobody out of training."""
    routes = [verifier("code", when={"data_source": "even"}), verifier("short", when={"data_source": "odd"})]
    weights = {}
    for combine in ("sum", "per_reward"):
        trainer = text_run(
            {"rewards": routes, "algorithm": method("grpo", combine=combine), "data.prompts_per_iteration": 6}, combine
        )
        iterate(trainer, 1)
        weights[combine] = runs.weights(trainer)
    # Every answer asks one verifier: its own advantage is that of the sum.
    assert (weights["sum"] - weights["per_reward"]).abs().max() < 1e-6


@pytest.mark.parametrize("key", ["gate", "only_where"])
def test_what_changes_the_total_is_refused_where_there_is_none(vlm_tree, verifier, key):
    given = {"gate": {"min": 0.5}, "only_where": {"code": 0.5}}[key]
    rewards = [verifier("code"), verifier("odd", **{key: given})]
    make_config(vlm_tree("nowhere", {"rewards": rewards}))
    with pytest.raises(ConfigError, match=rf"rewards.1.{key}: cuts the total.*drop the {key}, or set combine=sum"):
        make_config(vlm_tree("nowhere", {"rewards": rewards, "algorithm": method("grpo", combine="gdpo")}))


def test_a_verifier_that_fails_is_no_verdict_and_stops_a_run_that_has_no_other(text_run, verifier):
    trainer = text_run({"rewards": [verifier("some"), verifier("broken", weight=0.0)]})
    row = trainer.step(0)
    assert 0 < row["score_no_verdict/some"] < 1 and row["no_verdict_frac"] == pytest.approx(
        row["score_no_verdict/some"]
    )
    assert runs.finite(row["reward/mean"]) and row["grad_norm"] > 0
    dead = text_run({"rewards": [verifier("broken")]}, "dead")
    before = runs.weights(dead)
    with pytest.raises(RewardError, match="'broken' gives no verdict on 100%.*out of order"):
        for iteration in range(3):
            assert dead.step(iteration)["grad_norm"] == 0
    assert torch.equal(runs.weights(dead), before)


def test_gates_and_conditions(text_run, verifier):
    """A gate cuts the total; `only_where` counts a score only beside a right answer."""
    gated = [verifier("code"), verifier("odd", weight=0.0, gate={"min": 0.5, "floor": -1.0})]
    told = text_run({"rewards": gated}, "gated").step(0)
    assert told["gate_cut/odd"] == pytest.approx(1 - told["score/odd"])
    table = text_run({"rewards": [verifier("odd"), verifier("code", only_where={"odd": 0.5})]}, "beside")
    batch = answers(table)
    result = table.actor.submit(batch)()
    expected = result.scores["odd"] + result.scores["code"].where(result.scores["odd"] >= 0.5, 0.0)
    assert torch.equal(result.total, expected) and 0 < result.scores["odd"].mean() < 1


PROGRESS = '''
def score(response, progress):
    """How far the run is, as the verifier is told."""
    with open({path!r}, "a") as file:
        file.write(f"{{progress}}\\n")
    return len(response) % 3 / 2
'''


def test_verifiers_are_told_how_far_the_run_is(text_run, tmp_path):
    (tmp_path / "progress.py").write_text(PROGRESS.format(path=str(tmp_path / "told")))
    text_run({"rewards": [f"{tmp_path}/progress.py:score"], "iterations": 4, "evaluate_every": 2}).run()
    told = [float(line) for line in (tmp_path / "told").read_text().split()]
    asked = 3 * MEMBERS
    expected = [1.0] * 3 + [0.0] * asked + [0.25] * asked + [1.0] * 3 + [0.5] * asked + [0.75] * asked + [1.0] * 3
    assert told == expected


BOXES = """
def boxes(response):
    return 0.0
"""


def test_a_dynamic_iou_rises_along_the_run(text_run, tmp_path, home, monkeypatch):
    """A box with an IoU of 0.9 is found in the first tenth of the run alone."""
    (tmp_path / "q.jsonl").write_text(json.dumps({"prompt": "where?", "answer": [0, 0, 10, 10], "images": []}) + "\n")
    rewards = [
        {"use": "verifiers.boxes.grounding", "name": "box", "mode": "hit", "threshold": "dynamic"},
        {"use": "verifiers.boxes.grounding", "name": "iou", "mode": "iou", "weight": 0.0},
    ]
    trainer = text_run({
        "rewards": rewards, "iterations": 10, "data.prompts": str(tmp_path / "q.jsonl"),
        "data.prompts_per_iteration": 1, "data.evaluation": {"num_samples": 1, "grid_prompts": 0},
    })  # fmt: skip
    # What random weights write is never a box, so the words are put into their mouth.
    monkeypatch.setattr(type(trainer.policy.model), "decode", lambda self, ids: "<answer>[0, 0, 10, 9]</answer>")
    rows = [trainer.step(iteration) for iteration in (0, 1, 2)]
    assert [row["score/box"] for row in rows] == [1.0, 1.0, 0.0]  # progress 0, 0.1 and 0.2
    assert [row["score/iou"] for row in rows] == pytest.approx([0.9] * 3)
    assert trainer.actor.evaluate().scores["box"].tolist() == [0.0]


def test_verifiers_that_are_only_watched(text_run, verifier, tmp_path):
    changes = {"eval_rewards": [verifier("odd")], "iterations": 1}
    summary = text_run(changes).run()
    assert {"code", "odd", "accuracy"} <= summary["final"]["scores"].keys()
    (row,) = runs.rows(tmp_path / "run")
    assert "score/odd" not in row and "score/code" in row or "score/verifiers.py:code" in row
    with pytest.raises(RewardError, match="rewards and eval_rewards both have scores called odd; give"):
        text_run({"rewards": [verifier("odd")], "eval_rewards": [{**verifier("odd"), "name": None}]}, "twice")


# ------------------------------------------------------------------------------------------------ mistakes


def problems(vlm_tree, tmp_path, changes):
    """Everything that is said about a config before weights are loaded."""
    from flowrl.configfile import dump_yaml

    path = tmp_path / "config.yaml"
    path.write_text(dump_yaml(vlm_tree(tmp_path / "run", changes)))
    return "\n".join(check(path))


def test_method_and_section_belong_together(vlm_tree, tmp_path, make_config):
    with pytest.raises(ConfigError, match=r"(?s)algorithm.name.*grpo trains a model that writes.*add the section"):
        make_config({"algorithm": {"name": "grpo"}})
    text = problems(vlm_tree, tmp_path, {"algorithm": dict(runs.FLOW)})
    assert "flow_grpo trains a model that makes media" in text and "such as grpo" in text


@pytest.mark.parametrize("name", [n for n in METHODS if getattr(METHODS[n](), "fewest_samples", 1) > 1])
def test_a_group_of_one_is_refused(vlm_tree, tmp_path, name):
    text = problems(vlm_tree, tmp_path, {"algorithm": {"name": name}, "data.samples_per_prompt": 1})
    fewest = METHODS[name]().fewest_samples
    assert "data.samples_per_prompt" in text
    assert f"{name} compares the answers to a prompt, so it needs {fewest} of them; draw more" in text


def test_which_methods_compare():
    alone = {name for name in METHODS if getattr(METHODS[name](), "fewest_samples", 1) == 1}
    assert alone == {"reinforce_pp", "ppo", "remax"}


def test_a_picture_that_is_missing_is_named(vlm_tree, tmp_path):
    (tmp_path / "q.jsonl").write_text('{"prompt": "how many?", "images": ["nowhere.png"], "answer": 1}\n')
    text = problems(vlm_tree, tmp_path, {"data.prompts": str(tmp_path / "q.jsonl")})
    assert "data.prompts" in text and "q.jsonl:1" in text and "nowhere.png" in text


def test_a_picture_that_is_none_is_named(text_run, tmp_path):
    (tmp_path / "broken.png").write_text("no picture")
    (tmp_path / "q.jsonl").write_text('{"prompt": "how many?", "images": ["broken.png"], "answer": 1}\n')
    changes = {"data.prompts": str(tmp_path / "q.jsonl"), "data.prompts_per_iteration": 1}
    with pytest.raises(DataError, match="broken.png"):
        text_run({**changes, "data.evaluation": {"num_samples": 1, "grid_prompts": 0}}).step(0)


def test_a_folder_of_another_kind_is_refused(text_run, tiny_model):
    with pytest.raises(ModelError, match="(?s)has no config.json.*vision-language model"):
        text_run({"model.path": str(tiny_model)})
    with pytest.raises(ModelError, match="(?s)vision-language"):
        text_run({"model.path": str(tiny_model / "text_encoder")}, "encoder")


def test_other_mistakes_are_told_with_their_keys(vlm_tree, tmp_path):
    text = problems(vlm_tree, tmp_path, {
        "rewards": [{"use": "verifiers.exat"}], "data.on_dead_group": "hnit", "model.path": "./nowhere",
        "generation.tools": {"use": ["zom"]}, "data.max_tries": 2, "data.filters": ["informative"],
    })  # fmt: skip
    for key, told in (
        ("rewards", "verifiers.exact"), ("data.on_dead_group", "hint"), ("model.path", "does not exist"),
        ("generation.tools", "zoom"),
    ):  # fmt: skip
        assert any(key in line and told in line for line in text.splitlines()), (key, text)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"algorithm": {"name": "reinforce_pp"}, "data.replay": {}}, "data.replay: .*an advantage each"),
        ({"algorithm": {"name": "reinforce_pp_baseline"}, "data.replay": {}}, "data.replay: .*an advantage each"),
        ({"algorithm": {"name": "cascade", "offline": {"name": "grpo"}, "online": {"name": "reinforce_pp"}},
          "data.replay": {}}, "data.replay: .*an advantage each"),
        ({"algorithm": {"name": "token_dpo"}, "data.replay": {}}, "data.replay: .*pairs"),
        ({"data.on_dead_group": "hint", "data.max_tries": 2, "data.filters": [{"use": "informative"}],
          "data.replay": {}}, "data.replay: .*data.on_dead_group"),
        ({"generation.noisy": {}, "generation.server": {"url": "http://127.0.0.1:1/v1"}}, "noisy: .*leave noisy or"),
        ({"algorithm": {"name": "grpo", "mean": "none"}, "data.samples_per_prompt": 1}, "samples_per_prompt: .*2 of"),
        ({"algorithm": {"name": "grpo", "mean": "batch"}, "data.samples_per_prompt": 1}, "samples_per_prompt: .*2 of"),
    ],
)  # fmt: skip
def test_what_does_not_go_together_is_refused(vlm_tree, changes, told):
    with pytest.raises(ConfigError, match=told):
        make_config(vlm_tree("nowhere", changes))


def test_prompts_without_a_number_of_tokens_that_fits(vlm_tree):
    with pytest.raises(ConfigError, match="max_new_tokens"):
        make_config(vlm_tree("nowhere", {"generation": {"max_new_tokens": 0}}))
