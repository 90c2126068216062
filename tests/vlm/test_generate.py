"""Sampling: from the right distribution, with the right log-probabilities, the same draws in whatever batch."""

import pytest
import torch

from flowrl.vlm.collate import Inputs, asked
from flowrl.vlm.generate import Row, begin, force, invert, tokens_of, uniforms, write
from tests.vlm.policies import (
    NAMES,
    TEMPERATURE,
    answers,
    begun,
    expected,
    load,
    make,
    picture,
    prompts,
    used_tool,
    written_out,
)

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def policies():
    return {name: make(name) for name in NAMES}


@pytest.fixture(scope="module")
def policy(policies):
    return policies["llava"]


@pytest.mark.parametrize("name", NAMES)
def test_logprobs_are_those_of_the_models_own_forward_pass(policies, name):
    """Traps 1 and 4: temperature, banned tokens and positions as in a pass over the finished text, alone."""
    policy = policies[name]
    rows, _ = answers(policy)
    rows += used_tool(policy, rows)
    assert len({len(row.inputs.ids) for row in rows}) >= 3 and any(row.inputs.later for row in rows)
    for row in rows:
        assert torch.allclose(row.logprob.double(), expected(policy.model, row), atol=1e-5), policy.text(row)


@pytest.mark.parametrize("name", NAMES)
def test_greedy_answers_are_those_of_transformers_generate(policies, name):
    policy = policies[name]
    model, inputs = policy.model, prompts(policy)
    rows = policy.write(begun(inputs, members=1), limit=10, greedy=True)
    banned = [*model.banned.tolist()]
    for row, one in zip(rows, inputs, strict=True):
        batch = written_out(model, [begin(one, (0,))])
        made = model.trainable.generate(**batch, max_new_tokens=10, do_sample=False, suppress_tokens=banned)
        assert row.ids.tolist() == made[0, len(one.ids) :].tolist()


@pytest.mark.parametrize("name", NAMES)
def test_a_draw_depends_on_its_key_alone(policies, name):
    """Neither on what else is in the batch, nor on its size and order: so neither on the number of processes."""
    policy = policies[name]
    rows = begun(prompts(policy), members=3)
    whole = policy.write(rows, limit=8)
    split = policy.write(rows[::-1], limit=8, batch=5)[::-1]
    assert [row.ids.tolist() for row in whole] == [row.ids.tolist() for row in split]
    assert len({tuple(row.ids.tolist()) for row in whole}) > 9  # and other keys draw otherwise
    other = policy.write(begun(prompts(policy), members=3, seed=1), limit=8)
    assert [row.ids.tolist() for row in other] != [row.ids.tolist() for row in whole]


def test_frequencies_are_those_of_the_softmax(policy):
    """Chi-squared of 20,000 draws of a first token against softmax(logits / T) over what is not banned."""
    one = prompts(policy)[0]
    table = policy.model.states(written_out(policy.model, [begin(one, ())]))[0][:, -1]
    chances = policy.model.logprobs(table, TEMPERATURE).double().exp()[0].detach()
    count = 20_000
    noise = torch.cat([uniforms((3, 0, 0, member), 0, 1) for member in range(count)])
    seen = torch.bincount(invert(chances.log()[None].expand(count, -1), noise), minlength=len(chances))
    assert seen[policy.model.banned].sum() == 0 and chances[policy.model.banned].sum() == 0
    kept = chances * count > 5
    rest = torch.tensor([seen[~kept].sum(), (chances[~kept] * count).sum()])
    square = ((seen[kept] - chances[kept] * count) ** 2 / (chances[kept] * count)).sum() + (
        (rest[0] - rest[1]) ** 2 / rest[1]
    )
    freedom = int(kept.sum())
    assert abs(square - freedom) < 5 * (2 * freedom) ** 0.5


def test_inversion_meets_every_token_and_never_an_impossible_one():
    logprobs = torch.tensor([[0.0, 0.25, 0.25, 0.0, 0.5, 0.0]]).log()
    u = torch.tensor([0.0, 0.1, 0.249999, 0.25, 0.49, 0.5, 0.75, 1 - 2**-53], dtype=torch.float64)
    assert invert(logprobs.expand(8, -1), u).tolist() == [1, 1, 1, 2, 2, 4, 4, 4]
    # A tail of 2^-40 is drawn where u falls into it: float32 would have rounded it away.
    tail = torch.tensor([[1.0, 2.0**-40]]).log()
    assert invert(tail, torch.tensor([1 - 2.0**-41], dtype=torch.float64)).item() == 1


def test_uniforms_are_keyed_by_row_and_place():
    a = uniforms((0, 1, 2, 3), 0, 8)
    assert torch.equal(a, uniforms((0, 1, 2, 3), 0, 8)) and a.dtype == torch.float64
    assert not torch.equal(a, uniforms((0, 1, 2, 4), 0, 8)) and not torch.equal(a, uniforms((0, 1, 2, 3), 8, 8))


def test_the_end_is_kept_and_nothing_follows(policy):
    """Trap 5: the token that ends an answer was chosen; padding was not, even where it is the same token."""
    rows, tokens = answers(policy, limit=40, members=8)
    ended = [row for row in rows if row.end == "eos"]
    assert (
        ended
        and any(row.end == "length" for row in rows)
        and all(row.truncated == (row.end == "length") for row in rows)
    )
    for row in ended:
        assert int(row.ids[-1]) in policy.model.ends and not set(row.ids[:-1].tolist()) & set(policy.model.ends)
        assert row.mask.all() and row.logprob[-1] < 0
    assert tokens.mask.sum(1).tolist() == tokens.present.sum(1).tolist() == [len(row.ids) for row in rows]
    assert (tokens.logprob[~tokens.mask] == 0).all() and (tokens.ids[~tokens.present] == 0).all()
    again = policy.evaluate(tokens).logprob
    assert (again[~tokens.mask] == 0).all() and torch.allclose(again, tokens.logprob, atol=1e-5)


def test_writing_stops_at_a_text(policy):
    """At the token with which a stop text is complete, be it one token or several; and goes on from there."""
    model, rows = policy.model, begun(prompts(policy), members=8)
    free = policy.write(rows, limit=24)
    texts = [policy.text(row) for row in free]
    stop = max(map(chr, range(32, 127)), key=lambda letter: sum(letter in text for text in texts))
    assert len(model.encode(stop)) == 1
    stopped = policy.write(rows, limit=24, stops=(stop,))
    cut = [row for row in stopped if row.end == "stop"]
    assert cut
    for before, after in zip(free, stopped, strict=True):
        assert before.ids[: len(after.ids)].tolist() == after.ids.tolist()
        assert (stop in policy.text(after)) == (after.end == "stop") and stop not in policy.text(after.ids[:-1])
    pairs = [text[i : i + 2] for text in texts for i in range(3, 10)]
    pair = next(pair for pair in pairs if pair.isascii() and pair.isprintable() and len(model.encode(pair)) == 2)
    stopped = policy.write(rows, limit=24, stops=(pair,))
    assert any(row.end == "stop" for row in stopped)
    for after in stopped:
        assert (pair in policy.text(after)) == (after.end == "stop") and pair not in policy.text(after.ids[:-1])


def test_a_prompt_is_read_once_for_its_group(policy, monkeypatch):
    sizes = []
    own = policy.model.states
    monkeypatch.setattr(
        policy.model,
        "states",
        lambda batch, *a, **k: (sizes.append(tuple(batch["input_ids"].shape)), own(batch, *a, **k))[1],
    )
    inputs = prompts(policy)
    policy.write(begun(inputs, members=4), limit=3)
    assert sizes[0][0] == len(inputs) and sizes[1:] == [(16, 1), (16, 1)]


def test_an_answer_goes_on_from_any_place(policy):
    """Foreign tokens are there and not chosen; what follows is drawn and scored after them."""
    rows, _ = answers(policy, limit=5)
    part = policy.model.foreign(" and ")
    more = policy.write([row.append(part) for row in rows], limit=4)
    for before, after in zip(rows, more, strict=True):
        start, end = len(before.ids), len(before.ids) + len(part.ids)
        assert after.mask.tolist() == [True] * start + [False] * (end - start) + [True] * (len(after.ids) - end)
        assert after.logprob[start:end].tolist() == [0.0] * (end - start)
        assert policy.text(after).startswith(policy.text(before.ids.tolist() + part.ids.tolist()))
        assert torch.allclose(after.logprob.double(), expected(policy.model, after), atol=1e-5)


def test_what_was_cut_off_is_forced_to_answer(policy):
    """Only rows that ran out of tokens, and had not thought to an end."""
    model, inputs = policy.model, prompts(policy)
    thought = torch.tensor(model.encode("x</think>"))
    rows = policy.write(begun(inputs, members=3), limit=6)
    rows[0] = begin(inputs[0], (9,)).wrote(thought, torch.zeros(len(thought)), "length")
    rows[1] = begin(inputs[0], (10,)).wrote(torch.tensor(model.ends), torch.zeros(len(model.ends)), "eos")
    done = force(model, rows, limit=5, temperature=TEMPERATURE)
    text = torch.tensor(model.encode("</think> <answer>"))
    assert not done[0].forced and not done[1].forced
    for before, after in zip(rows, done, strict=True):
        assert after.forced == (before.end == "length" and "</think>" not in policy.text(before))
        if after.forced:
            start = len(before.ids)
            assert torch.equal(after.ids[start : start + len(text)], text)
            assert not after.mask[start : start + len(text)].any() and after.mask[start + len(text) :].all()
            assert 1 <= len(after.ids) - start - len(text) <= 5
            assert torch.allclose(after.logprob.double(), expected(model, after), atol=1e-5)
        else:
            assert torch.equal(after.ids, before.ids)
    assert sum(row.forced for row in done) >= 5


def test_banned_tokens_are_never_drawn():
    """Trap 3: a model that wants nothing but pictures, and the forward pass that would fail on one."""
    model = load("llava")
    image = model.processor.image_token_id
    with torch.no_grad():  # each state's dot product with its own mean direction is large
        one = model.prepare(asked("count", [picture(0)]))
        states, _ = model.states(written_out(model, [begin(one, ())]))
        head = model.trainable.get_output_embeddings().weight
        head[image] = states[0, -4:].mean(0) * 40
        wanted = model.trainable(**written_out(model, [begin(one, ())])).logits[0, -1].softmax(-1)[image]
    assert wanted > 0.9
    rows = write(model, [begin(one, (0, member)) for member in range(8)], limit=16)
    assert not {int(i) for row in rows for i in row.ids} & set(model.banned.tolist())
    assert all(row.logprob.isfinite().all() for row in rows)
    policy = make(model=model, temperature=1.0)
    tokens = policy.tokens(rows, [0] * 8)
    assert torch.allclose(policy.evaluate(tokens).logprob, tokens.logprob, atol=1e-5)
    sampled = begin(one, (0,)).wrote(torch.tensor([image]), torch.zeros(1), "length")
    with pytest.raises(ValueError, match="do not match"):
        policy.evaluate(policy.tokens([sampled], [0]))


def test_a_table_of_rows():
    inputs = Inputs(ids=torch.tensor([1]))
    rows = [
        Row(inputs=inputs, key=(0,)).wrote(torch.tensor([4, 5]), torch.tensor([-1.0, -2.0]), "eos"),
        Row(inputs=inputs, key=(1,)).wrote(torch.tensor([6]), torch.tensor([-3.0]), "length").append(inputs),
        Row(inputs=inputs, key=(2,)),
    ]
    tokens = tokens_of(rows, [0, 0, 1])
    assert tokens.ids.tolist() == [[4, 5], [6, 1], [0, 0]]
    assert tokens.present.tolist() == [[True, True], [True, True], [False, False]]
    assert tokens.mask.tolist() == [[True, True], [True, False], [False, False]]
    assert tokens.logprob.tolist() == [[-1, -2], [-3, 0], [0, 0]] and tokens.prompt.tolist() == [0, 0, 1]
    assert rows[1].end == "" and tokens.inputs[0] is inputs


def test_another_picture_can_be_asked_about():
    clean, part = Inputs(ids=torch.tensor([1])), Inputs(ids=torch.tensor([2]), media={"pixels": torch.ones(1)})
    row = Row(inputs=Inputs(ids=torch.tensor([3])), key=()).append(part)
    assert row.asked(clean).inputs.ids is clean.ids and row.asked(clean).inputs.later == ((0, part),)
