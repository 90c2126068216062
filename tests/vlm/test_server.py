"""A client of a chat server that draws the answers, against a real server on the loopback around the same tiny model.

The server is written apart from the client: it renders and processes what came over the line itself, and takes a whole
forward pass for each token.
"""

import threading

import pytest
import torch

from flowrl.models.pipeline import ModelError
from flowrl.vlm.collate import asked
from flowrl.vlm.server import Server, tokens_of
from rewards.types import RewardError
from tests.rewards.chat_server import chat_server, picture
from tests.rewards.faults import FaultServer, reply, status
from tests.vlm.policies import LORA, QUESTIONS, begun, load, make, prompts, used_tool

pytestmark = pytest.mark.slow

LIMIT = 8
KNOWN = {"model", "messages", "n", "max_tokens", "temperature", "seed", "logprobs", "logit_bias", "top_p", "top_k",
         "min_p", "repetition_penalty", "return_token_ids"}  # fmt: skip


def drawn(model, inputs, body, generator):
    """One answer: its numbers, what the log-probability of each was, why it ended."""
    ids, others = inputs["input_ids"], {k: v for k, v in inputs.items() if k not in ("input_ids", "attention_mask")}
    said = []
    for _ in range(body["max_tokens"]):
        logits = model(input_ids=ids, **others).logits[0, -1] / body["temperature"]
        for token, bias in body["logit_bias"].items():
            logits[int(token)] += bias
        token = int(torch.multinomial(logits.softmax(-1), 1, generator=generator))
        said.append((token, float(logits.log_softmax(-1)[token])))
        if token == 258:
            return said, "stop"
        ids = torch.cat([ids, torch.tensor([[token]])], 1)
    return said, "length"


def plain(processor, said, reason, index):
    """A choice as vLLM gives it, with numbers."""
    steps = [{"token": processor.tokenizer.decode([i]), "logprob": p, "bytes": None} for i, p in said]
    message = {"role": "assistant", "content": processor.tokenizer.decode([i for i, _ in said])}
    return {
        "index": index, "message": message, "finish_reason": reason, "logprobs": {"content": steps},
        "token_ids": [i for i, _ in said],
    }  # fmt: skip


def numbered(processor, said, reason, index):
    """Without numbers of its own, but with tokens written as numbers; and the end is not told."""
    choice = plain(processor, said, reason, index)
    told = [(i, p) for i, p in said if i != 258]
    choice["logprobs"]["content"] = [{"token": f"token_id:{i}", "logprob": p} for i, p in told]
    return {**choice, "token_ids": None}


def serving(change=plain, models=("tiny", "other")):
    """A server around a fresh tiny model; `change` makes a choice of what was drawn."""
    made = load("llava")
    model, processor, lock = made.trainable, made.processor, threading.Lock()

    @torch.no_grad()
    def answer(body):
        assert set(body) == KNOWN and body["top_p"] == 1 and body["top_k"] == -1, sorted(body)
        talk, pictures = [], []
        for message in body["messages"]:
            parts = message["content"]
            pictures += [picture(part["image_url"]["url"]) for part in parts if part["type"] == "image_url"]
            content = [{"type": "image"} if part["type"] == "image_url" else part for part in parts]
            talk.append({"role": message["role"], "content": content})
        text = processor.apply_chat_template(talk, add_generation_prompt=True)
        inputs = processor(text=[text], images=[pictures] if pictures else None, return_tensors="pt")
        generator = torch.Generator().manual_seed(body["seed"])
        with lock:
            choices = [change(processor, *drawn(model, inputs, body, generator), i) for i in range(body["n"])]
        return {"object": "chat.completion", "choices": choices}

    return chat_server(answer, models)


@pytest.mark.parametrize("change", [plain, numbered])
def test_its_word_is_kept_beside_the_policys(change):
    policy = make("llava", lora=LORA)
    with serving(change) as there, Server(policy.model, there.url + "/v1") as server:
        assert server.name == "tiny"
        rows = server.write(begun(prompts(policy), members=3), limit=LIMIT, temperature=0.7)
        again = server.write(begun(prompts(policy), members=3), limit=LIMIT, temperature=0.7)
        assert len([r for r in there.requests if r.method == "POST"]) == 2 * len(QUESTIONS)
    assert [row.ids.tolist() for row in rows] == [row.ids.tolist() for row in again]
    assert len({tuple(row.ids.tolist()) for row in rows}) > 8 and {row.end for row in rows} == {"eos", "length"}
    tokens = tokens_of(policy, rows, [slot for slot in range(4) for _ in range(3)])
    assert tokens.behaviour[tokens.mask].max() < 0
    # The same weights, another implementation: what it said is what the policy says.
    assert torch.allclose(tokens.behaviour, tokens.logprob, atol=1e-4)
    for row in rows:
        assert (row.end == "eos") == (int(row.ids[-1]) == 258) and len(row.ids) <= LIMIT + 1
        chosen = row.mask if change is plain else row.mask[:-1] if row.end == "eos" else row.mask
        assert chosen.all() and row.mask.all() == (change is plain or row.end == "length")
    with torch.no_grad():
        for parameter in policy.trainable_parameters():
            parameter += 0.05
    moved = tokens_of(policy, rows, tokens.prompt.tolist())
    assert torch.equal(moved.behaviour, tokens.behaviour)
    assert (moved.logprob - moved.behaviour)[moved.mask].abs().max() > 0.05
    assert torch.equal(moved.logprob, policy.evaluate(moved).logprob)


def test_other_temperatures_and_limits_are_asked_for():
    policy = make("llava", temperature=1.3)
    with serving() as there, Server(policy.model, there.url + "/v1", "other", concurrency=2) as server:
        rows = server.write(begun(prompts(policy)), limit=3, temperature=1.3)
        bodies = [r.json() for r in there.requests if r.method == "POST"]
    assert {len(row.ids) for row in rows if row.end == "length"} == {3}
    assert {(body["model"], body["n"], body["max_tokens"], body["temperature"]) for body in bodies} == {
        ("other", 2, 3, 1.3)
    }
    assert {int(i) for i in bodies[0]["logit_bias"]} == set(policy.model.banned.tolist())
    tokens = tokens_of(policy, rows, [0] * len(rows))
    assert torch.allclose(tokens.behaviour, tokens.logprob, atol=1e-4)


def test_text_is_read_back_where_numbers_are_missing():
    """As it is without return_token_ids: plain letters give their numbers, half of a letter does not."""
    model = load("llava")

    def letters(processor, said, reason, index):
        steps = [{"token": letter, "logprob": -1.0} for letter in "red"]
        return {"index": index, "finish_reason": "stop", "logprobs": {"content": steps}}

    with serving(letters) as there, Server(model, there.url + "/v1") as server:
        (row,) = server.write(begun([model.prepare(asked("x"))], members=1), limit=LIMIT)
    assert row.ids.tolist() == [*model.encode("red"), 258] and row.mask.tolist() == [True] * 3 + [False]

    def halves(processor, said, reason, index):
        steps = [{"token": text, "logprob": -1.0} for text in ("re", "d")]
        return {"index": index, "finish_reason": "stop", "logprobs": {"content": steps}}

    with serving(halves) as there, Server(model, there.url + "/v1") as server:
        with pytest.raises(ModelError, match="return_token_ids"):
            server.write(begun([model.prepare(asked("x"))], members=1), limit=LIMIT)


def broken(**changes):
    return lambda processor, said, reason, index: {**plain(processor, said, reason, index), **changes}


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (broken(logprobs=None), "log-probabilities was expected"),
        (broken(finish_reason="content_filter"), "an ended choice"),
        (broken(token_ids=[65]), "a log-probability for each of 1 tokens"),
        (lambda *_: {"index": 0}, "was expected"),
        (lambda *_: None, "was expected"),
        (
            broken(token_ids=[259], logprobs={"content": [{"token": "<image>", "logprob": -1.0}]}),
            "'<image>', which logit_bias forbids",
        ),
        (broken(logprobs={"content": [{"token": "a", "logprob": "x"}]}, token_ids=[65]), "a log-probability for each"),
    ],
)
def test_answers_that_are_none(change, match):
    model = load("llava")
    with serving(change) as there, Server(model, there.url + "/v1") as server:
        with pytest.raises(ModelError, match=match):
            server.write(begun([model.prepare(asked("x"))], members=1), limit=LIMIT)


def test_servers_that_are_none():
    model = load("llava")
    with FaultServer(status(404)) as there, pytest.raises(ModelError, match="404.*generation.server.url"):
        Server(model, there.url + "/v1")
    with FaultServer(reply({"data": []})) as there, pytest.raises(ModelError, match="no model at all"):
        Server(model, there.url + "/v1")
    with serving() as there, pytest.raises(ModelError, match="no model nope.*tiny, other"):
        Server(model, there.url + "/v1", "nope")
    with pytest.raises(RewardError, match="http"):
        Server(model, "127.0.0.1")


def test_it_only_begins_answers():
    policy = make("llava")
    rows = used_tool(policy, begun(prompts(policy)), limit=2)
    with serving() as there, Server(policy.model, there.url + "/v1") as server:
        with pytest.raises(ModelError, match="only begin"):
            server.write(rows, limit=LIMIT)
