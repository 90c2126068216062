"""Answers of a vision-language model with the exact log-probability of every token, keyed by what they are answers to.

    rows = [begin(inputs, key=(seed, iteration, slot, member)) for member in range(8)]
    rows = write(model, rows, temperature=1.0, limit=256)
    tokens = tokens_of(rows, prompt=[0] * 8)

A row is an answer so far, and writing goes on from there: a turn after a tool's answer, or the answer that a cut-off
thinking is forced to, is one more call with what was appended.

Each token is drawn by inverting the distribution function at a number that only the row's key and the place decide, so
that an answer depends on nothing that happens to be in its batch, nor on how many processes there are.
Note: computers round sums of other lengths otherwise, so that now and then, about once in a million tokens, a draw that
falls on a border goes the other way.

Symbols: N rows, L places of a prompt, S places of an answer, H hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

from flowrl.types import Tokens
from flowrl.vlm.collate import Inputs, collate, whole
from flowrl.vlm.model import ImageTextModel
from samplers import stable_seed

End = Literal["", "eos", "stop", "length"]
"""Why writing stopped: not at all yet, the model ended its answer, a stop text came, the limit was reached."""

_KEPT = 0.9
"""Rows that have ended leave the batch once no more than this share goes on: copying the cache costs about a step."""


@dataclass(frozen=True, eq=False, kw_only=True, slots=True)
class Row:
    """One answer so far: what the model was given, and the places that came since."""

    inputs: Inputs
    key: tuple[int, ...]
    """What names its randomness: seed, iteration, place of the prompt in the iteration, member of the group."""
    ids: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))
    """Token numbers, int64 [s]."""
    mask: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.bool))
    """Which of them the model chose, bool [s]."""
    logprob: Tensor = field(default_factory=lambda: torch.zeros(0))
    """Their log-probabilities, fp32 [s]; 0 off the mask."""
    end: End = ""
    forced: bool = False
    """Whether its thinking was cut off and an answer forced."""

    def append(self, part: Inputs, *, forced: bool = False) -> Row:
        """With tokens that the model did not choose (`ImageTextModel.foreign`), and open again."""
        size = len(part.ids)
        return replace(
            self,
            inputs=self.inputs.then(len(self.ids), part),
            ids=torch.cat([self.ids, part.ids]),
            mask=torch.cat([self.mask, torch.zeros(size, dtype=torch.bool)]),
            logprob=torch.cat([self.logprob, torch.zeros(size)]),
            end="",
            forced=self.forced or forced,
        )

    def wrote(self, ids: Tensor, logprob: Tensor, end: End) -> Row:
        """With tokens that the model chose, and why it stopped."""
        return replace(
            self,
            ids=torch.cat([self.ids, ids]),
            mask=torch.cat([self.mask, torch.ones(len(ids), dtype=torch.bool)]),
            logprob=torch.cat([self.logprob, logprob]),
            end=end,
        )

    def asked(self, inputs: Inputs) -> Row:
        """The same answer to another prompt: the clean picture, where it was written to a distorted one."""
        return replace(self, inputs=replace(inputs, later=self.inputs.later))

    @property
    def truncated(self) -> bool:
        """Whether the limit cut it off."""
        return self.end == "length"


def begin(inputs: Inputs, key: Sequence[int]) -> Row:
    """An answer without a token. Rows of a prompt share its `inputs` object: it is read once for all of them."""
    return Row(inputs=inputs, key=tuple(key))


def tokens_of(rows: Sequence[Row], prompt: Sequence[int]) -> Tokens:
    """The table of N answers; `prompt` [N] is the index of each one's prompt in the batch's list."""
    ids, mask, logprob = (
        torch.nn.utils.rnn.pad_sequence([getattr(row, name) for row in rows], batch_first=True)
        for name in ("ids", "mask", "logprob")
    )
    lengths = torch.tensor([len(row.ids) for row in rows])
    return Tokens(
        ids=ids,
        present=torch.arange(ids.shape[1]) < lengths[:, None],
        mask=mask,
        logprob=logprob,
        prompt=torch.tensor(list(prompt), dtype=torch.int64),
        inputs=tuple(row.inputs for row in rows),
    )


@torch.no_grad()
def write(
    model: ImageTextModel, rows: Sequence[Row], *, limit: int, temperature: float = 1.0, stops: Sequence[str] = (),
    greedy: bool = False, batch: int | None = None,
) -> list[Row]:  # fmt: skip
    """Goes on with rows until each ends itself, has written one of `stops`, or `limit` tokens more.

    Tokens are drawn from the whole distribution at `temperature`, but for banned ones: no top-p, no top-k, no penalty,
    whose log-probabilities the update could not repeat. `greedy` takes the likeliest. `batch` rows are written at a
    time, None: all. A stop text is part of the answer; one that is a single token costs nothing to look for.
    """
    stop = _Stop(model, stops)
    written: list[Row] = []
    size = batch or max(1, len(rows))
    for start in range(0, len(rows), size):
        written += _write(model, rows[start : start + size], limit, temperature, greedy, stop)
    return written


def force(
    model: ImageTextModel, rows: Sequence[Row], *, limit: int, text: str = "</think> <answer>",
    unless: str = "</think>", temperature: float = 1.0, greedy: bool = False, batch: int | None = None,
) -> list[Row]:  # fmt: skip
    """Lets rows that were cut off while they thought answer after all, in `limit` tokens (GLM-4.1V, arXiv:2507.01006).

    Such a row has reached its limit without writing `unless`. It gets `text`, which the policy does not answer for, and
    goes on. One that does not end even then stays cut off.
    """
    forced = model.foreign(template=text)
    cut = [i for i, row in enumerate(rows) if row.end == "length" and unless not in model.decode(row.ids)]
    begun = [rows[i].append(forced, forced=True) for i in cut]
    answered = write(model, begun, limit=limit, temperature=temperature, greedy=greedy, batch=batch) if cut else []
    done = list(rows)
    for i, row in zip(cut, answered, strict=True):
        done[i] = row
    return done


def uniforms(key: Sequence[int], start: int, count: int) -> Tensor:
    """What decides the tokens at places `start`, `start` + 1, ... of the row of a key: float64 [count] in [0, 1)."""
    generator = torch.Generator().manual_seed(stable_seed(*key, start))
    return torch.rand(count, generator=generator, dtype=torch.float64)


def invert(logprobs: Tensor, u: Tensor) -> Tensor:
    """The token [N] at which the distribution function of `logprobs` [N,V] passes u [N] in [0, 1).

    One of probability 0 is never drawn. Computed in float64: a sum of 150,000 terms in float32 misses the tail.
    """
    where = "cpu" if logprobs.device.type == "mps" else logprobs.device  # which has no float64
    reached = logprobs.to(where).double().exp().cumsum(-1)
    target = u.to(where)[:, None] * reached[:, -1:]
    return torch.searchsorted(reached, target, right=True)[:, 0].clamp(max=logprobs.shape[1] - 1).to(logprobs.device)


def _write(
    model: ImageTextModel, rows: Sequence[Row], limit: int, temperature: float, greedy: bool, stop: _Stop
) -> list[Row]:
    noise = torch.stack([uniforms(row.key, len(row.ids), limit) for row in rows])
    ids, logprob = torch.zeros(len(rows), limit, dtype=torch.int64), torch.zeros(len(rows), limit)
    ends: dict[int, tuple[int, End]] = {}  # of each row that has ended: how long it is, and why
    inside = torch.arange(len(rows))  # those in the decoder
    decoder = _Decoder(model, rows)
    for place in range(limit):
        table = model.logprobs(decoder.state, temperature)
        drawn = table.argmax(-1) if greedy else invert(table, noise[inside, place])
        ids[inside, place], logprob[inside, place] = drawn.cpu(), table.gather(1, drawn[:, None])[:, 0].cpu()
        for row in inside.tolist():
            if row not in ends and (reason := stop(ids[row, : place + 1])):
                ends[row] = place + 1, reason
        going = torch.tensor([i for i, row in enumerate(inside.tolist()) if row not in ends], dtype=torch.int64)
        if not len(going) or place + 1 == limit:
            break
        if len(going) <= _KEPT * len(inside):
            decoder.keep(going)
            inside, drawn = inside[going], drawn[going.to(drawn.device)]
        decoder.step(drawn)
    written = []
    for i, row in enumerate(rows):
        length, end = ends.get(i, (limit, "length"))
        written.append(row.wrote(ids[i, :length], logprob[i, :length], end))
    return written


class _Decoder:
    """The states after N rows, moved on token by token with the model's cache; each prompt is read once."""

    def __init__(self, model: ImageTextModel, rows: Sequence[Row]) -> None:
        self._model = model
        index, prefixes = _distinct(rows)
        none = torch.zeros(len(prefixes), 0, dtype=torch.int64)
        batch = collate(prefixes, none, none.bool(), model.pad_id)
        batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
        batch["position_ids"] = positions = model.positions(batch)
        states, self._cache = model.states(batch, use_cache=True)
        self._shape = positions.shape[:-2]  # () or (3,)
        self._next = positions.amax(dim=(*range(positions.dim() - 2), positions.dim() - 1)) + 1
        self._mask = batch["attention_mask"]
        self.state = states[:, -1]
        if index.tolist() != list(range(len(prefixes))):
            self.keep(index)

    def keep(self, index: Tensor) -> None:
        """Goes on with the rows at `index`, which may name one several times."""
        index = index.to(self._model.device)
        self._cache.reorder_cache(index)  # the one selection that recurrent layers know too
        self._next, self._mask, self.state = self._next[index], self._mask[index], self.state[index]

    def step(self, tokens: Tensor) -> None:
        """One token [N] further."""
        self._mask = torch.cat([self._mask, self._mask.new_ones(len(tokens), 1)], dim=1)
        positions = self._next[:, None].expand(*self._shape, -1, 1)
        batch = {"input_ids": tokens[:, None], "attention_mask": self._mask, "position_ids": positions}
        states, self._cache = self._model.states(batch, self._cache, use_cache=True)
        self.state = states[:, -1]
        self._next = self._next + 1


def _distinct(rows: Sequence[Row]) -> tuple[Tensor, list[Inputs]]:
    """What is to be read first, each once, and which of it each row goes on from."""
    found: dict[object, int] = {}
    prefixes: list[Inputs] = []
    index = []
    for row in rows:
        begun = len(row.ids) > 0
        # Rows that go on from one answer share its tensor of ids.
        name: object = (id(row.inputs), id(row.ids)) if begun else id(row.inputs)
        if name not in found:
            found[name] = len(prefixes)
            prefixes.append(whole(row.inputs, row.ids) if begun else row.inputs)
        index.append(found[name])
    return torch.tensor(index), prefixes


class _Stop:
    """Says of the tokens that a row has written whether they end, and why."""

    def __init__(self, model: ImageTextModel, stops: Sequence[str]) -> None:
        self._decode = model.decode
        self._ends = frozenset(model.ends)
        encoded = {text: model.encode(text) for text in stops}
        self._tokens = frozenset(ids[0] for ids in encoded.values() if len(ids) == 1)
        self._texts = [text for text, ids in encoded.items() if len(ids) != 1]
        self._reach = max((len(text.encode()) for text in self._texts), default=0)

    def __call__(self, ids: Tensor) -> End:
        last = int(ids[-1])
        if last in self._ends:
            return "eos"
        if last in self._tokens:
            return "stop"
        if self._texts:
            tail = self._decode(ids[-self._reach :])
            if any(text in tail for text in self._texts):
                return "stop"
        return ""
