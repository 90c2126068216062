"""Servers with OpenAI's API for tests of judges: one around a tiny model, one that says what it is told to.

Both are faults of `tests.rewards.faults.FaultServer`, so that a test can mix them with real ones. The server of the
model is written apart from rewards/_chat.py and rewards/_vlm.py: it decodes the pictures with PIL and takes a forward
pass a token.
"""

import base64
import io
import json
import math
import threading

import torch
from PIL import Image

from tests.rewards.faults import FaultServer, reply, status


def completion(text, finish="stop", steps=None, **message):
    """A chat completion; `steps`: [(token, {token: logprob})]."""
    told = None
    if steps is not None:
        rows = [
            {
                "token": token,
                "logprob": likeliest.get(token, 0.0),
                "bytes": None,
                "top_logprobs": [{"token": t, "logprob": p, "bytes": None} for t, p in likeliest.items()],
            }
            for token, likeliest in steps
        ]
        told = {"content": rows}
    said = {"role": "assistant", "content": text, **message}
    choice = {"index": 0, "message": said, "finish_reason": finish, "logprobs": told}
    return {"id": "x", "object": "chat.completion", "choices": [choice]}


def serving(answer, models=("tiny",)):
    """A fault that is none: lists its models, and answers a chat with `answer(body)`, a completion or another fault."""

    def fault(exchange):
        if exchange.request.method == "GET" and exchange.request.path == "/v1/models":
            return reply({"object": "list", "data": [{"id": name, "object": "model"} for name in models]})(exchange)
        if exchange.request.path != "/v1/chat/completions":
            return status(404)(exchange)
        made = answer(exchange.request.json())
        return made(exchange) if callable(made) else reply(made)(exchange)

    return fault


def chat_server(answer, models=("tiny",)):
    """A running server; its address is `url` + "/v1"."""
    return FaultServer(serving(answer, models))


def shown(body):
    """The texts of the user's message, and its pictures as PIL images."""
    content = body["messages"][-1]["content"]
    texts = [part["text"] for part in content if part["type"] == "text"]
    urls = [part["image_url"]["url"] for part in content if part["type"] == "image_url"]
    return texts, [picture(url) for url in urls]


def picture(url):
    head, _, data = url.partition(",")
    assert head == "data:image/png;base64"
    return Image.open(io.BytesIO(base64.b64decode(data, validate=True)))


def model_server(model, processor):
    """A server around a model and its processor."""
    lock = threading.Lock()
    known = {"model", "messages", "max_tokens", "temperature", "top_p", "seed", "logprobs", "top_logprobs"}

    @torch.no_grad()
    def answer(body):
        assert set(body) <= known and body["temperature"] == 0, sorted(body)
        json.dumps(body, allow_nan=False)
        talk = [
            {
                "role": message["role"],
                "content": message["content"]
                if isinstance(message["content"], str)
                else [{"type": "image"} if p["type"] == "image_url" else p for p in message["content"]],
            }
            for message in body["messages"]
        ]
        text = processor.apply_chat_template(talk, tokenize=False, add_generation_prompt=True)
        inputs = processor(images=shown(body)[1], text=text, return_tensors="pt")
        ids, written, steps, finish = inputs.pop("input_ids"), [], [], "length"
        inputs.pop("attention_mask")
        with lock:
            for _ in range(body["max_tokens"]):
                logprobs = model(input_ids=ids, **inputs).logits[0, -1].log_softmax(-1)
                token = int(logprobs.argmax())
                if token == processor.tokenizer.eos_token_id:
                    finish = "stop"
                    break
                top = logprobs.topk(body.get("top_logprobs", 1))
                said = [processor.tokenizer.decode([i]) for i in top.indices.tolist()]
                steps.append((said[0], dict(zip(said, top.values.tolist(), strict=True))))
                written.append(token)
                ids = torch.cat([ids, torch.tensor([[token]])], 1)
        text = processor.tokenizer.decode(written, skip_special_tokens=True)
        return completion(text, finish, steps if body.get("logprobs") else None)

    return chat_server(answer)


def logs(**chances):
    """{token: log-probability} of probabilities."""
    return {token: math.log(chance) for token, chance in chances.items()}
