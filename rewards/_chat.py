"""Chat models that see pictures, behind one interface: a server with OpenAI's API, or a model in this process.

Both answer the same questions greedily and say the same of an answer's probabilities, so that a judge does not know
which of them it asks. Pictures travel as PNG, which loses nothing but the rounding to bytes.
"""

from __future__ import annotations

import base64
import io
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor

from rewards._answers import Reply, Step, is_number
from rewards._vlm import answers, control_token, load_chat_model, next_token_logprobs, prepare
from rewards.http import Endpoint, RemoteError, began
from rewards.media import to_pil
from rewards.types import RewardError

LIKELIEST = 20
"""Tokens told at a place: the most that the API allows."""
LONGEST_ANSWER = 16 << 20
"""Bytes of a server's answer."""


@dataclass(frozen=True, slots=True)
class Question:
    """One user's message."""

    content: tuple[str | Tensor, ...]
    """Texts and pictures [3,H,W] in [0,1], in their order."""
    system: str = ""
    """The system's message; "" = none."""


Outcome: TypeAlias = Reply | RewardError
"""A reply, or why there is none."""


class Chat(Protocol):
    """Something that answers questions about pictures."""

    def load(self, device: torch.device, dtype: torch.dtype) -> None:
        """Make it ready; RewardError if it cannot be had."""
        ...

    def unload(self) -> None:
        """Let it go."""
        ...

    def ask(self, questions: Sequence[Question], max_tokens: int, logprobs: bool) -> list[Outcome]:
        """An outcome each, in order; with `logprobs` replies have steps.

        An answer that is cut off is asked for once more with twice the tokens, unless it is read from its first ones.
        """
        ...


# ------------------------------------------------------------------------------------------------ a server


class RemoteChat:
    """A server with `/models` and `/chat/completions` as OpenAI's API has them: vLLM, SGLang, ..."""

    def __init__(
        self,
        reward: str,
        url: str | Sequence[str],
        model: str | None,
        *,
        seed: int = 0,
        deadline: float = 180.0,
        max_concurrency: int = 8,
        **limits: Any,
    ) -> None:
        """`deadline`: seconds for all questions of one `ask`; `limits`: options of `rewards.http.Endpoint`."""
        self._reward, self._url, self._model, self._seed = reward, url, model, seed
        self._deadline, self._threads = deadline, max_concurrency
        self._limits = {
            "deadline": deadline, "max_concurrency": max_concurrency, "max_bytes": LONGEST_ANSWER, **limits
        }  # fmt: skip
        self._endpoint: Endpoint | None = None

    def load(self, device: torch.device, dtype: torch.dtype) -> None:
        """Ask which models there are: a server that is down is an error now, not no verdict on every sample later."""
        self._endpoint = Endpoint(self._url, **self._limits)
        try:
            models = _served(self._endpoint.get("/models"))
        except RemoteError as error:
            if error.status not in (404, 405, 501) or self._model is None:  # some gateways offer no list
                raise RewardError(
                    f"reward {self._reward!r}: the judge cannot be reached: {error}. Mend: start the server, give its "
                    "address up to /v1 in `url`, and the model's name in `model`"
                ) from error
            return
        if self._model is None and len(models) == 1:
            self._model = models[0]
        if self._model is None or (models and self._model not in models):
            raise RewardError(
                f"reward {self._reward!r}: {self._url} has no model {self._model!r}. "
                f"Mend: set `model` to one that it serves: {', '.join(models) or 'it names none'}"
            )

    def unload(self) -> None:
        """Close the connections."""
        if self._endpoint is not None:
            self._endpoint.close()
        self._endpoint = None

    def ask(self, questions: Sequence[Question], max_tokens: int, logprobs: bool) -> list[Outcome]:
        """Several at a time; all are settled when the deadline is over."""
        if not questions:
            return []
        end = began() + self._deadline

        def answer(question: Question) -> Outcome:
            try:
                reply = self._post(question, max_tokens, logprobs, end)
                if reply.finished or logprobs:
                    return reply
                return self._post(question, 2 * max_tokens, logprobs, end)
            except RewardError as error:
                return error

        with ThreadPoolExecutor(min(self._threads, len(questions)), thread_name_prefix=self._reward) as pool:
            return list(pool.map(answer, questions))

    def _post(self, question: Question, max_tokens: int, logprobs: bool, end: float) -> Reply:
        if self._endpoint is None:
            raise RewardError(f"reward {self._reward!r} is not loaded; call load(device, dtype) first (a hub does)")
        left = end - time.monotonic()
        if left <= 0:
            reason = f"the deadline of {self._deadline:g} s was over before it was its turn; raise `deadline`"
            raise RemoteError(str(self._url), reason)
        body = {
            "model": self._model, "messages": _messages(question), "max_tokens": max_tokens,
            "temperature": 0, "top_p": 1, "seed": self._seed,
        }  # fmt: skip
        told = {"logprobs": True, "top_logprobs": LIKELIEST} if logprobs else {}
        return read_completion(self._endpoint.post("/chat/completions", {**body, **told}, deadline=left), logprobs)


def data_url(picture: Tensor) -> str:
    """[3,H,W] in [0,1] as a PNG in a `data:` URL."""
    file = io.BytesIO()
    to_pil(picture).save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def _messages(question: Question) -> list[dict[str, Any]]:
    content = [
        {"type": "text", "text": part}
        if isinstance(part, str)
        else {"type": "image_url", "image_url": {"url": data_url(part)}}
        for part in question.content
    ]
    system = [{"role": "system", "content": question.system}] if question.system else []
    return [*system, {"role": "user", "content": content}]


def read_completion(answer: Any, logprobs: bool) -> Reply:
    """A chat completion's first choice; RewardError if there is none, or if it is a refusal."""
    choice = _at(answer, "choices", 0)
    message = _at(choice, "message")
    refusal = message.get("refusal") if isinstance(message, dict) else None
    if refusal:
        raise RewardError(f"the judge refuses: {str(refusal)[:500]}")
    finish = choice.get("finish_reason")
    if finish == "content_filter":
        raise RewardError("the judge's answer was withheld by a content filter")
    text = _at(message, "content")
    if not isinstance(text, str):
        raise _malformed("choices[0].message.content", text, "text")
    return Reply(text=text, finished=finish != "length", steps=_steps(choice) if logprobs else ())


def _steps(choice: dict[str, Any]) -> tuple[Step, ...]:
    told = choice.get("logprobs")
    content = told.get("content") if isinstance(told, dict) else None
    if not isinstance(content, list):
        raise RewardError(
            "the server tells no log-probabilities. Mend: let it (vLLM does by default), or use a mode whose answer is "
            "read as text"
        )
    return tuple(Step(_token(step)[0], tuple(map(_token, _list(_at(step, "top_logprobs"))))) for step in content)


def _token(entry: Any) -> tuple[str, float]:
    token, logprob = _at(entry, "token"), _at(entry, "logprob")
    if not isinstance(token, str):
        raise _malformed("a token of the log-probabilities", token, "text")
    if not is_number(logprob) or logprob > 1e-3:
        raise _malformed("a log-probability", logprob, "a number of at most 0")
    return token, float(logprob)


def _list(value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise _malformed("top_logprobs", value, "a list")
    return value


def _served(answer: Any) -> list[str]:
    """Names of the models of a `/models` answer; what has another form names none."""
    data = answer.get("data") if isinstance(answer, dict) else None
    found = [each.get("id") for each in data if isinstance(each, dict)] if isinstance(data, list) else []
    return [name for name in found if isinstance(name, str)]


def _at(value: Any, *path: str | int) -> Any:
    """What stands at a path of a JSON answer."""
    for key in path:
        try:
            value = value[key]
        except (KeyError, IndexError, TypeError) as error:
            raise _malformed("the server's answer", value, f"a chat completion with {key!r}") from error
    return value


def _malformed(what: str, found: object, expected: str) -> RewardError:
    text = repr(found)
    return RewardError(f"{what} is {text if len(text) <= 200 else text[:197] + '...'}; expected {expected}")


# ------------------------------------------------------------------------------------------------ a local model


class LocalChat:
    """A model of `AutoModelForImageTextToText` with a chat template; all questions are one batch."""

    def __init__(self, reward: str, model: str, revision: str = "main") -> None:
        """`model`: folder or hub id, `revision` on the hub."""
        self._reward, self._source, self._revision = reward, model, revision
        self._model: Any = None
        self._processor: Any = None

    def load(self, device: torch.device, dtype: torch.dtype) -> None:
        """Read processor and weights."""
        self._model, self._processor = load_chat_model(self._reward, self._source, self._revision, device, dtype)

    def unload(self) -> None:
        """Let model and processor go."""
        self._model = self._processor = None

    def ask(self, questions: Sequence[Question], max_tokens: int, logprobs: bool) -> list[Outcome]:
        """Of probabilities only those of the first token are told."""
        if self._model is None:
            raise RewardError(
                f"reward {self._reward!r} has no weights yet; call load(device, dtype) first (a hub does)"
            )
        outcomes: list[Outcome] = [self._refused(question) for question in questions]
        rows = [row for row, outcome in enumerate(outcomes) if isinstance(outcome, Reply)]
        asked = [questions[row] for row in rows]
        if asked:
            replies = self._first_steps(asked) if logprobs else self._answers(asked, max_tokens)
            for row, reply in zip(rows, replies, strict=True):
                outcomes[row] = reply
        return outcomes

    def _refused(self, question: Question) -> Outcome:
        """An error for a text that would be read as something else than text, such as the place of a picture."""
        text = "\n".join([question.system, *(part for part in question.content if isinstance(part, str))])
        found = control_token(self._processor.tokenizer, text)
        if found is not None:
            return RewardError(f"the question has {found!r} in it, which the model reads as a control token")
        return Reply("")

    def _first_steps(self, questions: Sequence[Question]) -> list[Reply]:
        logprobs = next_token_logprobs(self._model, self._inputs(questions))
        values, ids = logprobs.topk(min(LIKELIEST, logprobs.shape[1]))
        decode = self._processor.tokenizer.decode
        replies = []
        for row_values, row_ids in zip(values.tolist(), ids.tolist(), strict=True):
            likeliest = tuple((decode([i]), value) for i, value in zip(row_ids, row_values, strict=True))
            replies.append(Reply(text=likeliest[0][0], steps=(Step(likeliest[0][0], likeliest),)))
        return replies

    def _answers(self, questions: Sequence[Question], max_tokens: int) -> list[Reply]:
        replies = self._written(questions, max_tokens)
        cut = [row for row, reply in enumerate(replies) if not reply.finished]
        if cut:
            longer = self._written([questions[row] for row in cut], 2 * max_tokens)
            for row, reply in zip(cut, longer, strict=True):
                replies[row] = reply
        return replies

    def _written(self, questions: Sequence[Question], max_tokens: int) -> list[Reply]:
        texts = answers(self._model, self._processor, self._inputs(questions), max_tokens)
        return [Reply(text=text, finished=ended) for text, ended in texts]

    def _inputs(self, questions: Sequence[Question]) -> Any:
        pictures = [[part for part in question.content if isinstance(part, Tensor)] for question in questions]
        return prepare(self._processor, pictures, [_talk(question) for question in questions])


def _talk(question: Question) -> list[dict[str, Any]]:
    content = [{"type": "text", "text": p} if isinstance(p, str) else {"type": "image"} for p in question.content]
    system = [{"role": "system", "content": [{"type": "text", "text": question.system}]}] if question.system else []
    return [*system, {"role": "user", "content": content}]
