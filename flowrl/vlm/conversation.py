"""Answers in several turns: the model writes, its calls of tools are run, their results are appended, it writes on.

    write = partial(generate.write, model, limit=256, stops=STOPS)
    talks = converse(rows, pictures, model, write, tools, turns=3)

What tools say is present in the row and masked: the policy did not choose it, and no loss is taken of it. All rows
take their turns together, and the calls of all rows run side by side.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Generic, Protocol, Self, TypeVar

import torch
from torch import Tensor

from flowrl.models.pipeline import ModelError
from flowrl.vlm.tools import CLOSE, OPEN, Call, Picture, Tool, ToolResult, parse_calls, run_calls

STOPS = (CLOSE,)
"""Texts at which a turn ends, besides the model's own end."""
RESPONSE = " <tool_response> {images}{text} </tool_response> "
"""What is appended for each call."""


class Row(Protocol):
    """One answer so far, as `flowrl.vlm.generate.Row` is."""

    @property
    def ids(self) -> Tensor:
        """Token numbers, int64 [s]."""
        ...

    @property
    def end(self) -> str:
        """Why writing stopped: "eos", "stop" (one of STOPS) or "length"."""
        ...

    def append(self, part: Any) -> Self:
        """With tokens that the model did not choose."""
        ...


class Reader(Protocol):
    """What is asked of the model, as `flowrl.vlm.model.ImageTextModel` is."""

    def decode(self, ids: Tensor) -> str:
        """The text of tokens [s]."""
        ...

    def foreign(self, text: str, pictures: Sequence[Picture], template: str) -> Any:
        """Text and pictures in a template as a part for `Row.append`, without control tokens in the text."""
        ...


R = TypeVar("R", bound=Row)


@dataclass(frozen=True, kw_only=True, slots=True)
class Talk(Generic[R]):
    """One answer with its turns."""

    row: R
    pictures: tuple[Picture, ...] = ()
    """All that the model has seen: the question's, then those of tools, in order."""
    turns: tuple[str, ...] = ()
    """What the model wrote, turn by turn."""
    calls: int = 0
    """Calls that were answered, those with a mistake included."""
    failed_calls: int = 0
    """Of these, those that were answered with an error."""
    tool_position: int | None = None
    """The place in the row of the token with which the first answered call begins; None without one."""
    over_turns: bool = False
    """It asked for a tool in its last turn, and was not answered (Mini-o3, arXiv:2509.07969): not a wrong answer, but
    an unfinished one, which may be left out of the loss."""

    @property
    def text(self) -> str:
        """All that the model wrote, which is what verifiers should see: a tool's words are none of its answer."""
        return "\n".join(self.turns)

    @property
    def truncated(self) -> bool:
        """Whether its last turn was cut off by the limit of tokens."""
        return self.row.end == "length"


def converse(
    rows: Sequence[R], pictures: Sequence[Sequence[Picture]], model: Reader, write: Callable[[list[R]], Sequence[R]],
    tools: Mapping[str, Tool], *, turns: int = 2, seconds: float = 10.0, template: str = RESPONSE,
) -> list[Talk[R]]:  # fmt: skip
    """Let N rows be answered in up to `turns` turns each; `pictures` [N] are those of their questions.

    `write` goes on with rows, each until it ends itself, has written one of STOPS, or reaches its limit. A turn that
    ends with calls is answered, each call by `template` with its result (`seconds` for each at most), as long as a turn
    is left.
    """
    if turns < 1:
        raise ValueError(f"turns={turns}; an answer has at least one.")
    talks = [Talk(row=row, pictures=tuple(seen)) for row, seen in zip(rows, pictures, strict=True)]
    going = list(range(len(talks)))
    for turn in range(1, turns + 1):
        written = write([talks[i].row for i in going]) if going else []
        asked: dict[int, list[Call]] = {}
        for i, row in zip(going, written, strict=True):
            start = len(talks[i].row.ids) if turn > 1 else 0  # what an answer was begun with is part of it
            talks[i] = replace(talks[i], row=row, turns=(*talks[i].turns, model.decode(row.ids[start:])))
            asked[i] = _calls(talks[i])
            if asked[i] and turn < turns and talks[i].tool_position is None:
                talks[i] = replace(talks[i], tool_position=_place_of(OPEN, row.ids, model))
        going = [i for i in going if asked[i]]
        if turn < turns:
            results = iter(run_calls([(c, talks[i].pictures) for i in going for c in asked[i]], tools, seconds=seconds))
            for i in going:
                talks[i] = _answered(talks[i], [next(results) for _ in asked[i]], model, template)
    return [replace(talk, over_turns=i in going) for i, talk in enumerate(talks)]


def facts(talks: Sequence[Talk[Any]]) -> dict[str, Tensor]:
    """What is known of N answers, float64 [N] each; `tool_position` is NaN where no call was answered."""
    named = {
        "calls": [talk.calls for talk in talks],
        "failed_calls": [talk.failed_calls for talk in talks],
        "truncated": [talk.truncated for talk in talks],
        "over_turns": [talk.over_turns for talk in talks],
        "tool_position": [math.nan if talk.tool_position is None else talk.tool_position for talk in talks],
    }
    return {name: torch.tensor(values, dtype=torch.float64) for name, values in named.items()}


def _calls(talk: Talk[Any]) -> list[Call]:
    """The calls that the last turn ends with."""
    if talk.truncated:
        return []
    said = talk.turns[-1]
    # A token may hold more than the text that stopped the turn.
    return parse_calls(said[: said.rfind(CLOSE) + len(CLOSE)] if talk.row.end == "stop" else said)


def _answered(talk: Talk[R], results: Sequence[ToolResult], model: Reader, template: str) -> Talk[R]:
    for result in results:
        part, result = _part(result, model, template)
        talk = replace(
            talk,
            row=talk.row.append(part),
            pictures=(*talk.pictures, *result.pictures),
            calls=talk.calls + 1,
            failed_calls=talk.failed_calls + result.error,
        )
    return talk


def _part(result: ToolResult, model: Reader, template: str) -> tuple[Any, ToolResult]:
    """The tokens of a result; those of an error if the model's processor does not take its pictures."""
    try:
        return model.foreign(result.text, result.pictures, template), result
    except ModelError:
        if not result.pictures:
            raise
        refused = ToolResult("error: the picture cannot be shown", error=True)
        return model.foreign(refused.text, (), template), refused


def _place_of(mark: str, ids: Tensor, model: Reader) -> int:
    """The place of the token that completes the first `mark` in the text of tokens [s]; the last one's without it.

    That is where the mark begins, for a tokenizer that knows it as one token. Halves the tokens, instead of decoding
    each: pieces of a letter have no text of their own.
    """
    low, high = 0, len(ids) - 1
    while low < high:
        middle = (low + high) // 2
        if mark in model.decode(ids[: middle + 1]):
            high = middle
        else:
            low = middle + 1
    return low
