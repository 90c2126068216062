"""A server that writes the answers instead of the policy: vLLM, or another with OpenAI's chat completions.

    server = Server(policy.model, "http://127.0.0.1:8000/v1")
    rows = server.write([begin(inputs, (seed, iteration, slot, member)) for member in range(8)], limit=256)
    tokens = tokens_of(policy, rows, prompt=[0] * 8)

What the server says of its tokens' probabilities is the table's `behaviour`, and the policy's own word is `logprob`: a
correction of the loss weighs with the ratio of the two. vLLM must be told to report what it drew from, temperature and
banned tokens included: `--logprobs-mode processed_logprobs`.
Note: the server's weights are its own. They are as new as whoever runs it keeps them.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Self

import torch

from flowrl.models.pipeline import ModelError
from flowrl.types import Tokens
from flowrl.vlm import generate
from flowrl.vlm.collate import Message
from flowrl.vlm.generate import End, Row
from flowrl.vlm.model import ImageTextModel
from rewards.http import Endpoint, RemoteError, readable
from samplers import stable_seed

if TYPE_CHECKING:
    from flowrl.vlm.policy import TextPolicy

_NUMBERED = "token_id:"
"""How vLLM writes a token of which it tells the number instead of the text."""


class Server:
    """An engine elsewhere that draws answers with the same model; many threads may ask it at once."""

    def __init__(
        self, model: ImageTextModel, url: str | Sequence[str], name: str | None = None, *, timeout: float = 600.0,
        concurrency: int = 8, token: str | None = None,
    ) -> None:  # fmt: skip
        """Finds the server; ModelError where it is down, or serves no model of this name.

        url          address up to /v1; several are asked in turn
        name         what it serves the model as; None: its first
        timeout      seconds for a request and all tries of it
        concurrency  requests at a time
        token        bearer token, or `env:NAME`
        """
        self._model, self._url, self._threads = model, url, concurrency
        self._endpoint = Endpoint(url, token=token, timeout=timeout, deadline=timeout, max_concurrency=concurrency)
        self.name = self._served(name)

    def close(self) -> None:
        """Closes the connections."""
        self._endpoint.close()

    def __enter__(self) -> Self:
        """The server itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close it."""
        self.close()

    def write(self, rows: Sequence[Row], *, limit: int, temperature: float = 1.0) -> list[Row]:
        """Answers of at most `limit` tokens to rows without one, a request a prompt; `logprob` is the server's.

        Note: the draws are the server's, keyed by the first row of a prompt: whether they repeat is its affair.
        ModelError where rows have been begun: the protocol knows no way to go on from tokens and pictures.
        """
        if any(len(row.ids) for row in rows):
            raise ModelError("a server can only begin answers: use no tools and no given beginnings, or no server.")
        groups: dict[int, list[int]] = {}
        for i, row in enumerate(rows):
            groups.setdefault(id(row.inputs), []).append(i)

        def ask(members: list[int]) -> list[Row]:
            return self._group([rows[i] for i in members], limit, temperature)

        written = list(rows)
        with ThreadPoolExecutor(self._threads, thread_name_prefix="server") as pool:
            for members, answers in zip(groups.values(), pool.map(ask, groups.values()), strict=True):
                for i, answer in zip(members, answers, strict=True):
                    written[i] = answer
        return written

    def _group(self, rows: Sequence[Row], limit: int, temperature: float) -> list[Row]:
        """Answers to one prompt."""
        body = {
            "model": self.name,
            "messages": [_sendable(message) for message in rows[0].inputs.messages],
            "n": len(rows),
            "max_tokens": limit,
            "temperature": temperature,
            "seed": stable_seed(*rows[0].key) % (1 << 31),
            "logprobs": True,
            "logit_bias": {str(token): -100 for token in self._model.banned.tolist()},
            # What a model's generation_config.json recommends would stand in their place.
            "top_p": 1.0, "top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0,
            "return_token_ids": True,
        }  # fmt: skip
        answer = self._asked("/chat/completions", body)
        choices = answer.get("choices") if isinstance(answer, dict) else None
        if not isinstance(choices, list) or len(choices) != len(rows):
            raise self._malformed(f"{len(rows)} choices were asked for", choices)
        return [self._row(row, choice) for row, choice in zip(rows, choices, strict=True)]

    def _row(self, row: Row, choice: Any) -> Row:
        """A row with what the server chose for it."""
        steps = _at(choice, "logprobs", "content")
        reason = _at(choice, "finish_reason")
        if not isinstance(steps, list) or reason not in ("stop", "length"):
            raise self._malformed("an ended choice with log-probabilities was expected", choice)
        ids, logprob = self._ids(choice, steps), [_at(step, "logprob") for step in steps]
        if len(ids) != len(logprob) or not all(isinstance(p, int | float) and p <= 1e-3 for p in logprob):
            raise self._malformed(f"a log-probability for each of {len(ids)} tokens was expected", logprob)
        wrong = set(ids) & set(self._model.banned.tolist())
        if wrong:
            raise ModelError(
                f"server {self._url}: it drew {self._model.tokenizer.convert_ids_to_tokens(min(wrong))!r}, which "
                "logit_bias forbids. Take a server that heeds logit_bias, as vLLM does."
            )
        end: End = "eos" if reason == "stop" else "length"
        done = row.wrote(torch.tensor(ids, dtype=torch.int64), torch.tensor(logprob, dtype=torch.float32), end)
        if end == "eos" and (not ids or ids[-1] not in self._model.ends):
            # Some keep the end to themselves: it is there, but nobody knows how probable it was.
            ended = torch.tensor([self._model.ends[0]])
            done = replace(done.append(replace(row.inputs, ids=ended, places={}, media={}, later=())), end="eos")
        return done

    def _ids(self, choice: Mapping[str, Any], steps: Sequence[Any]) -> list[int]:
        """The numbers of the tokens: as the server tells them, else those that its text is made of."""
        told = choice.get("token_ids")
        size = self._model.trainable.get_output_embeddings().weight.shape[0]
        if isinstance(told, list) and all(isinstance(i, int) and 0 <= i < size for i in told):
            return told
        texts = [_at(step, "token") for step in steps]
        if all(isinstance(text, str) and text.removeprefix(_NUMBERED).isdigit() for text in texts):
            return [int(text.removeprefix(_NUMBERED)) for text in texts]
        ids = self._model.encode("".join(map(str, texts)))
        if [self._model.tokenizer.decode([i]) for i in ids] != texts:
            raise ModelError(
                f"server {self._url}: it tells no numbers of its tokens, and its text does not give them back. "
                "Take one that knows return_token_ids (vLLM 0.10.2 or later)."
            )
        return ids

    def _served(self, name: str | None) -> str:
        answer = self._asked("/models")
        data = answer.get("data") if isinstance(answer, dict) else None
        models = [each.get("id") for each in data if isinstance(each, dict)] if isinstance(data, list) else []
        if not models or (name is not None and name not in models):
            raise ModelError(
                f"server {self._url}: it has no model {name or 'at all'}. Set generation.server.model to one that it "
                f"serves: {readable(', '.join(map(str, models))) or 'it names none'}."
            )
        return name or str(models[0])

    def _asked(self, path: str, body: Mapping[str, Any] | None = None) -> Any:
        try:
            return self._endpoint.get(path) if body is None else self._endpoint.post(path, body)
        except RemoteError as error:
            raise ModelError(
                f"server {self._url}: {error.reason} (tries at {path}: {error.attempts}). Start it with this "
                "model, and give its address up to /v1 in generation.server.url."
            ) from error

    def _malformed(self, expected: str, found: object) -> ModelError:
        return ModelError(
            f"server {self._url}: {expected}, it answered {readable(repr(found), 200)}. Take one with OpenAI's chat "
            "completions, such as vLLM."
        )


def tokens_of(policy: TextPolicy, rows: Sequence[Row], prompt: Sequence[int]) -> Tokens:
    """The table of N answers of a server: `behaviour` is its word, `logprob` that of the policy."""
    tokens = generate.tokens_of(rows, prompt)
    return policy.rescored(replace(tokens, behaviour=tokens.logprob))


def _sendable(message: Message) -> dict[str, Any]:
    content = message["content"]
    parts = content if isinstance(content, str) else [_part(part) for part in content]
    return {"role": message["role"], "content": parts}


def _part(part: Mapping[str, Any]) -> Mapping[str, Any]:
    """Pictures travel as PNG, which loses nothing."""
    if part["type"] == "video":
        raise ModelError("a server is sent pictures, no videos; leave generation.server out, or ask without videos.")
    if part["type"] != "image":
        return part
    file = io.BytesIO()
    part["image"].convert("RGB").save(file, "PNG")
    url = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
    return {"type": "image_url", "image_url": {"url": url}}


def _at(value: Any, *path: str) -> Any:
    """What stands at a path of a JSON answer; None where there is nothing."""
    for key in path:
        value = value.get(key) if isinstance(value, dict) else None
    return value
