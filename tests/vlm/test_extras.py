"""What methods for answers have besides: a reference that is reset, values of continuations, a horizon from the config.

The toy of the exact values: answers of two tokens at most, so that all of them can be written down.
"""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from PIL import Image

from flowrl.algorithms.advantages import gae, less_baseline, stretch_advantages
from flowrl.algorithms.dr_grpo import DrGRPO
from flowrl.algorithms.grpo import GRPO
from flowrl.algorithms.ppo import PPO
from flowrl.algorithms.token_dpo import TokenDPO
from flowrl.config import ConfigError, make_config
from flowrl.vlm.augment import shuffled
from flowrl.vlm.continuations import state_values
from flowrl.vlm.data import messages
from flowrl.vlm.generate import begin
from samplers import stable_seed
from tests import runs, threaded
from tests.test_resume import assert_equal_folders
from tests.vlm.conftest import LONGEST, LORA, MEMBERS, STEADY
from tests.vlm.policies import make, prompts

pytestmark = pytest.mark.slow

KL = {"name": "grpo", "kl_coef": 0.5, "reset_every": 2}
LEARNERS = {"lora": {"model.lora": LORA}, "full": {}}
VINE = {"name": "ppo", "values": "monte_carlo", "continuations": 2, "every": 3}


# ------------------------------------------------------------------------------------------------ the reset reference


def held_to(run, tokens):
    """Log-probs of what the trained policy is held to."""
    with torch.no_grad(), run.policy.old():
        return run.policy.evaluate(tokens).logprob


@pytest.mark.parametrize("changes", LEARNERS.values(), ids=LEARNERS)
def test_the_reference_moves_exactly_at_the_reset_and_the_kl_is_zero_after_it(text_run, changes):
    run = text_run({"iterations": 5, "algorithm": KL, **changes})
    asked = run.actor.collect(0.0, run.prompts[:3], [0, 1, 2], 99).tokens
    said, kls, moments = [held_to(run, asked)], [], []
    for iteration in range(5):
        kls.append(run.step(iteration)["kl"])
        said.append(held_to(run, asked))
        moments.append(len(run.optimizer.state))
    changed = [not torch.equal(a, b) for a, b in zip(said, said[1:], strict=False)]
    assert changed == [False, True, False, True, False]
    assert [kl == 0 for kl in kls] == [True, False, True, False, True]
    assert [count > 0 for count in moments] == [True, False, True, False, True]
    with torch.no_grad():
        assert not torch.equal(run.policy.evaluate(asked).logprob, said[-1])


def test_what_a_batch_remembers_of_the_reference_is_that_of_its_own_iteration(text_run):
    """In a first iteration after a reset, and in the one behind it, whose reference then stands still."""
    run = text_run({"iterations": 4, "algorithm": {**KL, "kl_in_reward": 0.1}, "model.lora": LORA})
    for iteration in range(3):
        run.step(iteration)
    batch = run.actor.collect(0.0, run.prompts[:3], [0, 1, 2], 3)
    assert torch.allclose(batch.reference, held_to(run, batch.tokens), atol=1e-5)
    assert (batch.reference - batch.tokens.logprob)[batch.tokens.mask].abs().max() > 1e-3
    with run.policy.reference(), torch.no_grad():
        initial = run.policy.evaluate(batch.tokens).logprob
    assert (batch.reference - initial)[batch.tokens.mask].abs().max() > 1e-3


@pytest.mark.parametrize("algorithm", [KL, {"name": "token_dpo", "reset_every": 2}], ids=["grpo", "token_dpo"])
def test_a_resumed_run_has_the_same_reference(text_run, tmp_path, algorithm):
    options = {"iterations": 5, "checkpoint_every": 1, "keep_checkpoints": 9, "evaluate_every": 5,
               "algorithm": algorithm, "model.lora": LORA}  # fmt: skip
    text_run(options, "whole").run()
    for done in (2, 3):  # right after a reset, and between two
        text_run(options, "run").run()
        for later in range(done + 1, 6):
            shutil.rmtree(tmp_path / "run" / "checkpoints" / f"{later:06d}")
        resumed = text_run(options, "run", resume=True)
        assert resumed.iteration == done
        resumed.run()
        assert_equal_folders(tmp_path / "whole", tmp_path / "run")
        shutil.rmtree(tmp_path / "run")


def test_a_reset_asks_for_weights_that_follow_and_never_lets_them_write():
    for method in (GRPO(kl_coef=0.1, reset_every=3), TokenDPO(reset_every=3)):
        assert method.needs.old and method.needs.on_policy and not method.needs.reference
        assert [method.old_decay(i) for i in range(4)] == [1.0, 1.0, 0.0, 1.0]
        assert [method.resets_optimizer(i) for i in range(4)] == [False, False, True, False]
    for method in (GRPO(kl_coef=0.1), TokenDPO()):
        assert method.needs.reference and not method.needs.old and not method.resets_optimizer(0)
    assert not GRPO().needs.old and not GRPO().needs.reference
    with pytest.raises(ValueError, match="reset_every resets the reference, and there is none without a KL"):
        GRPO(reset_every=3)


# ------------------------------------------------------------------------------------------------ Monte-Carlo values


def test_advantages_between_states_by_hand():
    """States before tokens 0 and 2 (and 1, where there is no verdict): .25 -> .75 -> 1, the reward."""
    nan = torch.nan
    values = torch.tensor([[0.25, nan, 0.75, nan, 9.0], [nan, 0.5, nan, 9.0, 9.0]], dtype=torch.float64)
    mask = torch.tensor([[1, 1, 1, 1, 0], [1, 1, 1, 0, 0]]).bool()
    rewards = torch.tensor([[0, 0, 0, 1.0, 0], [0, 0, 0, 0, 0]], dtype=torch.float64)
    found = stretch_advantages(rewards, values, mask)
    assert found.tolist() == [[0.5, 0.5, 0.25, 0.25, 0], [0, -0.5, -0.5, 0, 0]]


def test_with_a_state_before_every_token_they_are_one_step_advantages():
    torch.manual_seed(0)
    mask = torch.arange(7) < torch.tensor([7, 3, 1])[:, None]
    values, rewards = torch.rand(2, 3, 7, dtype=torch.float64)
    found = stretch_advantages(rewards, values, mask)
    assert torch.allclose(found, gae(rewards * mask, values * mask, mask, 1.0, 0.0))
    total = (rewards * mask).sum(1)
    assert torch.allclose(found.sum(1), total - values[:, 0])  # they telescope: the value at the end is the reward


def scored(policy, value):
    """A grade by the tokens of an answer, and what it was asked."""
    asked = []

    def grade(rows, index):
        asked.extend(zip(rows, index, strict=True))
        return torch.tensor([value(row.ids) for row in rows], dtype=torch.float64)

    return grade, asked


def two_tokens():
    """One prompt with two answers of two tokens, a policy, and rewards by the last token."""
    policy = make(temperature=1.0)
    (inputs,) = prompts(policy)[:1]
    keys = [(0, 0, 0)] * 8
    rows = policy.write([begin(inputs, (*key, member)) for member, key in enumerate(keys)], limit=2)
    return policy, inputs, policy.tokens(rows, [0] * len(rows)), keys


def test_values_are_unbiased():
    """Against the sum over every answer that there is, within four standard errors of as many continuations."""
    policy, inputs, tokens, keys = two_tokens()
    size, count = policy.model.trainable.get_output_embeddings().weight.shape[0], 400

    def reward(ids):
        return float(int(ids[-1]) % 3 == 0)

    grade, asked = scored(policy, reward)
    values, _ = state_values(policy, tokens, keys, grade, continuations=count, every=1, limit=2)
    every = torch.arange(size)

    def after(prefix):
        """Probabilities of the next token."""
        row = [begin(inputs, (0,)).wrote(torch.cat([prefix, every[i : i + 1]]), torch.zeros(len(prefix) + 1), "eos")
               for i in range(size)]  # fmt: skip
        with torch.no_grad():
            said = torch.cat([policy.evaluate(policy.tokens(row[i : i + 64], [0] * 64)).logprob[:, -1]
                              for i in range(0, size, 64)])  # fmt: skip
        return said.exp()

    right = (every % 3 == 0).double()
    checked = 0
    for answer in range(len(tokens)):
        if not bool(tokens.mask[answer, 1:].any()):
            continue
        chance = after(tokens.ids[answer, :1]).double()
        assert chance.sum().item() == pytest.approx(1, abs=1e-4)
        exact = float((chance * right).sum())
        error = (exact * (1 - exact) / count) ** 0.5
        assert 0.02 < exact < 0.98 and abs(float(values[answer, 1]) - exact) < 4 * error
        checked += 1
    assert checked >= 2
    assert {len(row.ids) for row, _ in asked} <= {1, 2}


def test_a_state_where_nothing_is_left_to_choose_has_the_value_of_its_reward():
    """Where all continuations get what the answer got, nothing is won by any of its tokens."""
    policy, _, tokens, keys = two_tokens()
    grade, _ = scored(policy, lambda ids: 0.75)
    values, _ = state_values(policy, tokens, keys, grade, continuations=3, every=1, limit=2)
    mask = tokens.mask
    assert bool((values[mask] == 0.75).all()) and bool(values[~mask].isnan().all())
    last = mask & (mask.flip(1).long().cumsum(1).flip(1) == 1)
    assert torch.equal(stretch_advantages(0.75 * last.double(), values, mask), torch.zeros(mask.shape).double())


def test_states_are_every_so_many_tokens_and_those_alike_are_asked_once(text_run):
    run = text_run({"algorithm": VINE})
    before = dict(run.policy.calls)
    batch = run.actor.collect(0.0, run.prompts[:3], [0, 1, 2], 0)
    tokens = batch.tokens
    assert run.policy.model.value_head is None
    expected = torch.zeros_like(tokens.mask)
    expected[:, ::3] = tokens.mask[:, ::3]
    assert torch.equal(batch.values.isfinite(), expected)
    distinct = {
        (prompt, *ids[:place].tolist())
        for prompt, ids, size in zip(tokens.prompt.tolist(), tokens.ids, tokens.lengths.tolist(), strict=True)
        for place in range(0, size, 3)
    }
    assert batch.facts["continuations"].sum() == 2 * len(distinct)
    first = batch.values[:, 0].view(3, MEMBERS)
    assert bool((first == first[:, :1]).all())  # one state: the bare prompt
    assert run.policy.calls["rollout"] > before.get("rollout", 0)
    again = run.actor.collect(0.0, run.prompts[:3], [0, 1, 2], 0)
    assert torch.equal(again.values.nan_to_num(-1), batch.values.nan_to_num(-1))
    alone = run.actor.collect(0.0, run.prompts[1:2], [1], 0)
    mine = batch.values[MEMBERS : 2 * MEMBERS, : alone.values.shape[1]]
    assert torch.equal(alone.values.nan_to_num(-1), mine.nan_to_num(-1))


def test_calls_are_what_is_read_and_written():
    """Each state once, whatever goes on from it, and every token that comes then."""
    policy, inputs, tokens, keys = two_tokens()
    grade, asked = scored(policy, lambda ids: 0.0)
    before = policy.calls["train"]
    _, count = state_values(policy, tokens, keys, grade, continuations=3, every=1, limit=2)
    states = {tuple(row.ids[:-1].tolist()) for row, _ in asked if len(row.ids) == 2} | {()}
    begun = {tuple(ids[:1].tolist()) for ids, mask in zip(tokens.ids, tokens.mask, strict=True) if mask[1]}
    assert len(asked) == count.sum() == 3 * (1 + len(begun)) and begun <= states
    prompt = len(inputs.ids)
    first = sum(len(row.ids) for row, _ in asked[:3])
    read = prompt + len(begun) * (prompt + 1)
    assert policy.calls["train"] - before == read + first + 3 * len(begun)


def test_a_run_learns_from_continuations_and_logs_them(text_run, tmp_path):
    run = text_run({"iterations": 2, "algorithm": VINE, "optimizer.updates_per_iteration": 2})
    start = run.policy.state_dict()
    run.run()
    rows = runs.rows(tmp_path / "run")
    assert all(row["text/continuations"] > 0 and row["calls/rollout"] > 0 for row in rows)
    assert all(row["ratio_first_update"] < 1e-4 for row in rows) and "value_loss" not in rows[0]
    assert any(not torch.equal(start[name], value) for name, value in run.policy.state_dict().items())


@pytest.mark.parametrize("algorithm", [VINE, KL], ids=["monte_carlo", "reset"])
def test_two_processes_do_what_one_does(text_run, monkeypatch, algorithm):
    """They hold two prompts and one; an update on half of the answers each."""
    changes = {**STEADY, "algorithm": algorithm, "optimizer.updates_per_iteration": 2}
    alone = text_run(changes, "alone")
    monkeypatch.setenv("WORLD_SIZE", "2")
    both = [
        threaded.on_rank(rank, 2, lambda: text_run({**changes, "engine": {"name": threaded.NAME}}, "both"))
        for rank in range(2)
    ]
    told = [alone.step(i) for i in range(3)]
    first, second = threaded.together([lambda t=t: [t.step(i) for i in range(3)] for t in both])
    for mine, theirs, others in zip(told, first, second, strict=True):
        names = [n for n in mine if n.startswith(("text/continuations", "score/", "kl", "grad_norm", "adv_abs"))]
        assert {n: theirs[n] for n in names} == pytest.approx({n: mine[n] for n in names}, rel=1e-3, abs=1e-5)
        assert theirs["grad_norm"] == others["grad_norm"] > 0
    ends = [runs.weights(run) for run in (alone, *both)]
    assert torch.equal(ends[1], ends[2]) and (ends[0] - ends[1]).abs().max() < 1e-5


def test_answers_whose_first_state_has_no_verdict_are_not_trained_on(text_run, verifier):
    run = text_run({"algorithm": {**VINE, "continuations": 1}, "rewards": [verifier("some")]})
    batch = run.actor.collect(0.0, run.prompts[:3], [0, 1, 2], 0)
    result = run.actor.submit(batch)()
    known = batch.values[:, 0].isfinite() & result.total.isfinite() & batch.tokens.mask.any(1)
    ready = replace(batch, rewards=result.total.double(), place=torch.arange(len(batch.tokens)))
    credit = run.algorithm.credit(ready)
    assert torch.equal(credit.isfinite().all(1), known) and 0 < known.sum() < len(known)


def test_what_has_no_continuations_is_refused(vlm_tree, tmp_path, verifier):
    changes = {
        "algorithm": VINE, "rewards": [verifier("code", norm="rank")], "data.replay": {},
        "generation": {"max_new_tokens": LONGEST, "tools": {"use": ["calculator"]}, "forced_answer": {}},
    }  # fmt: skip
    with pytest.raises(ConfigError) as refused:
        make_config(vlm_tree(tmp_path / "run", changes))
    told = str(refused.value)
    assert all(key in told for key in ("generation.tools", "generation.forced_answer", "norm", "data.replay"))
    with pytest.raises(ValueError, match="has no critic, to which lam_alpha, critic_warmup belongs"):
        PPO(values="monte_carlo", lam_alpha=0.05, critic_warmup=3)
    stages = {"name": "cascade", "online": KL}
    with pytest.raises(ConfigError, match="cannot be a stage with reset_every"):
        make_config(vlm_tree(tmp_path / "run", {"algorithm": stages}))


# ------------------------------------------------------------------------------------------------ the horizon


def test_the_horizon_is_the_longest_answer_unless_the_config_says_otherwise(vlm_tree, tmp_path):
    def horizon(**algorithm):
        return make_config(vlm_tree(tmp_path / "run", {"algorithm": algorithm})).algorithm.model_extra["horizon"]

    assert horizon(name="dr_grpo") == LONGEST
    assert horizon(name="dr_grpo", horizon=100) == 100
    assert horizon(name="grpo", aggregate="seq_mean_token_sum_norm") == LONGEST
    assert horizon(name="dr_grpo", aggregate="token_mean", horizon=None) is None
    assert horizon(name="grpo") is None
    assert DrGRPO().horizon == 1024


# ------------------------------------------------------------------------------------------------ the greedy baseline


def test_remax_by_hand():
    """Two prompts: a lead over the greedy answer's reward, and one where the greedy one has no verdict."""
    rewards = torch.tensor([1.0, 0.25, torch.nan, 1.0, 0.5], dtype=torch.float64)
    group = torch.tensor([0, 0, 0, 1, 2])
    greedy = torch.tensor([0.5, 0.5, 0.5, torch.nan, 0.5], dtype=torch.float64)
    found = less_baseline(rewards, group, greedy)
    assert found.value.tolist() == [0.5, -0.25, 0, 0, 0]
    assert found.valid.tolist() == [True, True, False, False, True] and found.live.tolist() == [True, False, False]


def test_t_grpo_compares_with_answers_to_shuffled_frames(text_run, verifier, tmp_path):
    """The fact is what anyone would get who asks the shuffled videos with the same keys; a picture has none."""
    shades = [Image.new("RGB", (56, 56), (60 * i, 250 - 60 * i, 90)) for i in range(4)]
    for i, shade in enumerate(shades):
        shade.save(tmp_path / f"{i}.png")
    listed = [f"{i}.png" for i in range(4)]
    rows = [{"prompt": "up or down?", "videos": [listed]}, {"prompt": "what?", "images": ["0.png"]},
            {"prompt": "and now?", "videos": [listed[::-1]]}]  # fmt: skip
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    changes = {"iterations": 2, "algorithm": {"name": "t_grpo", "shuffled": 3, "right": 0.5},
               "rewards": [verifier("code")], "data.prompts": str(tmp_path / "q.jsonl")}  # fmt: skip
    run = text_run(changes, name="qwen2_5_vl")
    assert ", and 3 to each video with shuffled frames" in dict(run.actor.describe())["samples"]
    batch = run.actor.collect(0.0, run.prompts, [0, 1, 2], 1)
    key = stable_seed(run.config.seed, 1, -15)
    for place in (0, 2):
        asked = shuffled(run.prompts[place], key=(key, place))
        inputs = run.policy.prepare(messages(asked))
        rows = run.policy.write([begin(inputs, (key, -1, place, member)) for member in range(3)], limit=LONGEST)
        mean = sum(sum(map(ord, run.policy.text(row))) % 7 / 6 for row in rows) / 3
        assert batch.facts["shuffled"][4 * place : 4 * place + 4].tolist() == pytest.approx([mean] * 4)
    assert batch.facts["shuffled"][4:8].isnan().all()
    for prompt, inputs in zip(run.prompts, batch.tokens.inputs[::4], strict=True):  # what is trained on is in order
        plain = run.policy.prepare(messages(prompt))
        assert plain.media.keys() == inputs.media.keys()
        assert all(torch.equal(plain.media[name], inputs.media[name]) for name in plain.media)
    run.run()
    assert all(row["grad_norm"] > 0 for row in runs.rows(tmp_path / "run"))


def test_remax_compares_with_the_answer_that_an_evaluation_at_temperature_0_writes(text_run, verifier, tmp_path):
    run = text_run({"iterations": 2, "algorithm": {"name": "remax"}, "rewards": [verifier("code")],
                    "data.samples_per_prompt": 1})  # fmt: skip
    batch = run.actor.collect(0.0, run.prompts[:3], [0, 1, 2], 0)
    best = [begin(run.actor.writer.inputs(prompt), (9,)) for prompt in run.prompts[:3]]
    texts = [run.policy.text(row) for row in run.policy.write(best, limit=LONGEST, greedy=True)]
    assert batch.facts["greedy"].tolist() == pytest.approx([sum(map(ord, text)) % 7 / 6 for text in texts])
    result = run.actor.submit(batch)()
    ready = replace(batch, rewards=result.total.double(), place=torch.arange(3))
    assert torch.allclose(run.algorithm.credit(ready).double(), result.total.double() - batch.facts["greedy"])
    run.run()
    rows = runs.rows(tmp_path / "run")
    assert all(row["grad_norm"] > 0 for row in rows)
