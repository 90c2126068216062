"""What a vision-language model is given: one prompt each, processed alone once, and batches collated from rows.

Pictures of a batch are packed, not stacked: their patches lie under each other, and how many a row has differs. So a
prompt goes through the processor alone, and a batch is put together from its parts: prompts padded on the left, answers
on the right, pictures in the order of the rows.

Symbols: N rows, L places of a prompt, S places of an answer.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Container, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

Message = Mapping[str, Any]
"""{"role": ..., "content": text, or a list of {"type": "text", "text": ...}, {"type": "image", "image": picture} and
{"type": "video", "video": frames, "fps": how many of them make a second}}."""


@dataclass(frozen=True, eq=False, kw_only=True, slots=True)
class Inputs:
    """A prompt as the model takes it, and what came later with pictures of its own: a tool's answers."""

    ids: Tensor
    """Token numbers, int64 [L]."""
    places: Mapping[str, Tensor] = field(default_factory=dict)
    """What else the model is told of each place, by the argument's name, [L]: which are of pictures, say."""
    media: Mapping[str, Tensor] = field(default_factory=dict)
    """Pictures and their sizes by the argument's name; the first dimension counts patches, tiles, pictures or rows."""
    later: tuple[tuple[int, Inputs], ...] = ()
    """Parts of the answer that have such things: the place of the answer where each begins, and the part."""
    messages: tuple[Message, ...] = ()
    """What it was made of, to make it again with other pictures."""
    solution: Tensor | None = None
    """An answer known to be right, int64 [s], where the prompt has one."""

    def then(self, start: int, part: Inputs) -> Inputs:
        """With a part that begins at a place of the answer; one without pictures needs no mention."""
        return replace(self, later=(*self.later, (start, part))) if part.media or part.places else self

    @property
    def nbytes(self) -> int:
        """Size of its tensors."""
        own = sum(tensor.nbytes for tensor in (self.ids, *self.places.values(), *self.media.values()))
        return own + sum(part.nbytes for _, part in self.later)


def asked(text: str, pictures: Sequence[Any] = (), system: str = "") -> tuple[Message, ...]:
    """A user's message, its pictures before the text, after the system's if there is one."""
    content = [*({"type": "image", "image": picture} for picture in pictures), {"type": "text", "text": text}]
    first = ({"role": "system", "content": [{"type": "text", "text": system}]},) if system else ()
    return (*first, {"role": "user", "content": content})


def split(processed: Mapping[str, Any]) -> Inputs:
    """What a processor returns for a single prompt, taken apart: an argument with a value for each place, or media."""
    told = {name: torch.as_tensor(value) for name, value in processed.items() if name != "attention_mask"}
    shape = told["input_ids"].shape
    others = {name: value for name, value in told.items() if name != "input_ids"}
    return Inputs(
        ids=told["input_ids"][0],
        places={name: value[0] for name, value in others.items() if value.shape == shape},
        media={name: value for name, value in others.items() if value.shape != shape},
    )


def whole(inputs: Inputs, ids: Tensor) -> Inputs:
    """A prompt and the places [s] of an answer to it, as one prompt."""
    names = _names([inputs])
    return Inputs(
        ids=torch.cat([inputs.ids, ids]),
        places={name: torch.cat([_of_prompt(inputs, name), _of_answer(inputs, name, len(ids))]) for name in names},
        media=_packed(_with_parts([inputs])),
    )


def collate(
    inputs: Sequence[Inputs], ids: Tensor, present: Tensor, pad_id: int, media: Container[str] | None = None
) -> dict[str, Tensor]:
    """Arguments of the model for N rows of prompts, left-padded to L, and answers `ids` [N,S] where `present` [N,S].

    `pad_id` stands where there is nothing: a token that is no picture's, for a model counts these everywhere. `media`
    are the names of what is packed, None: all.
    Note: 0, for text, continues what a processor tells of each place; transformers' own `generate` does so too.
    """
    longest, size = max(len(one.ids) for one in inputs), ids.shape[1]
    before = torch.stack([pad(one.ids, (longest - len(one.ids), 0), value=pad_id) for one in inputs])
    there = torch.stack([torch.arange(longest) >= longest - len(one.ids) for one in inputs])
    ids, present = ids.cpu(), present.cpu()
    batch = {
        "input_ids": torch.cat([before, torch.where(present, ids, pad_id)], dim=1),
        "attention_mask": torch.cat([there, present], dim=1).long(),
    }
    for name in _names(inputs):
        rows = [
            torch.cat([pad(_of_prompt(one, name), (longest - len(one.ids), 0)), _of_answer(one, name, size)])
            for one in inputs
        ]
        batch[name] = torch.stack(rows)
    return batch | _packed(_with_parts(inputs), media)


def later_media(inputs: Sequence[Inputs]) -> dict[str, Tensor]:
    """Pictures of N answers, without those of their prompts."""
    return _packed([part for one in inputs for part in _parts(one)])


def _names(inputs: Sequence[Inputs]) -> list[str]:
    """Arguments with a value for each place."""
    return list(dict.fromkeys(name for part in _with_parts(inputs) for name in part.places))


def _with_parts(inputs: Sequence[Inputs]) -> list[Inputs]:
    """Each prompt before what came later in its answer."""
    return [part for one in inputs for part in (one, *_parts(one))]


def _parts(inputs: Inputs) -> list[Inputs]:
    return [part for _, part in inputs.later]


def _of_prompt(inputs: Inputs, name: str) -> Tensor:
    return inputs.places[name] if name in inputs.places else torch.zeros_like(inputs.ids)


def _of_answer(inputs: Inputs, name: str, size: int) -> Tensor:
    """What is told of the places [S] of an answer: 0, but in the parts that have something to tell."""
    told = torch.zeros(size, dtype=_of_prompt(inputs, name).dtype)
    for start, part in inputs.later:
        if name in part.places and start < size:
            told[start : start + len(part.ids)] = part.places[name]
    return told


def _packed(parts: Sequence[Inputs], only: Container[str] | None = None) -> dict[str, Tensor]:
    """Pictures of all parts under each other."""
    names = dict.fromkeys(name for part in parts for name in part.media if only is None or name in only)
    return {name: _stacked([part.media[name] for part in parts if name in part.media]) for name in names}


def _stacked(parts: Sequence[Tensor]) -> Tensor:
    """Along the first dimension, with zeros where others are larger: tiles a picture, or pictures a row lacks.

    Models leave out what is nothing but zeros, or know the sizes.
    """
    largest = [max(sizes) for sizes in zip(*(part.shape[1:] for part in parts), strict=True)]
    fit = []
    for part in parts:
        missing = [(0, wanted - size) for wanted, size in zip(largest, part.shape[1:], strict=True)]
        fit.append(pad(part, [number for pair in reversed(missing) for number in pair]))
    return torch.cat(fit)


class Cache:
    """Inputs that were made before, by what they were made of; the least recently used go when they grow too large."""

    def __init__(self, most: int = 1 << 30) -> None:
        """`most` bytes of tensors."""
        self._most, self._size = most, 0
        self._kept: OrderedDict[Hashable, Inputs] = OrderedDict()

    def get(self, key: Hashable, make: Callable[[], Inputs]) -> Inputs:
        """What is kept under `key`, else what `make` makes, kept from now on."""
        if key in self._kept:
            self._kept.move_to_end(key)
            return self._kept[key]
        made = self._kept[key] = make()
        self._size += made.nbytes
        while self._size > self._most and len(self._kept) > 1:
            self._size -= self._kept.popitem(last=False)[1].nbytes
        return made
