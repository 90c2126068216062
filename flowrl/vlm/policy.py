"""The policy that writes: a vision-language model of which LoRA adapters, all weights or nothing learn.

    policy = TextPolicy(ImageTextModel.load("shapes_vlm"), lora={"rank": 16, "alpha": 32}, temperature=1.0)
    inputs = policy.prepare(asked("How many circles are there?", [picture]))
    rows = policy.write([begin(inputs, (seed, iteration, slot, member)) for member in range(8)], limit=64)
    tokens = policy.tokens(rows, prompt=[0] * 8)
    policy.evaluate(tokens, entropy=True).logprob          with gradient; equals tokens.logprob before the first step

Symbols: N rows, S places of an answer, M places that the policy chose, H hidden size, V vocabulary.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from flowrl.models.pipeline import ModelError
from flowrl.policy import Lora, Trained
from flowrl.types import Tokens, TokenStats
from flowrl.vlm import augment, export, generate
from flowrl.vlm.collate import Cache, Inputs, Message, collate, later_media
from flowrl.vlm.generate import Row
from flowrl.vlm.model import ImageTextModel, pictures_of, with_pictures

_NUMBERS = 1 << 26
"""Log-probabilities that are made at a time, in fp32: 256 MiB, and a few times that in between."""


class TextPolicy(Trained):
    """A model that writes, at a temperature: what `evaluate` says is how probable the drawing of a token was."""

    model: ImageTextModel

    def __init__(
        self, model: ImageTextModel, *, temperature: float = 1.0, rescore: bool | None = None, share: bool = True,
        lora: Lora | Mapping[str, Any] | None = None, **trained: Any,
    ) -> None:  # fmt: skip
        """`lora` and the others are as in `Trained`; targets are never in what the model keeps frozen.

        `temperature` is that of sampling and scoring alike. `rescore` makes the log-probs of new answers once more, as
        an update makes them, for a forward pass; None: only below float32, where one token at a time and all at once
        are rounded so differently that the first ratio would not be 1. `share` reads a prompt once for all its answers
        in an update too, where the network can: not with gradient checkpointing, nor if it turns out that it cannot.
        """
        if not temperature > 0:
            raise ModelError(f"temperature is {temperature}; set one above 0, and greedy=True where nothing is drawn.")
        self.temperature = temperature
        self.rescore = model.dtype != torch.float32 if rescore is None else rescore
        self._share, self._share_checked = share, False
        self._prepared = Cache()
        self._masks: tuple[float, int] | None = None
        super().__init__(model, lora=_within(model, lora), **trained)

    # ------------------------------------------------------------------------------------ answers

    def prepare(self, messages: Sequence[Message], solution: str | None = None, key: Hashable | None = None) -> Inputs:
        """A prompt as the model takes it (`ImageTextModel.prepare`); under a `key` it is kept for the next time."""

        def make() -> Inputs:
            return self.model.prepare(messages, solution)

        return make() if key is None else self._prepared.get(key, make)

    def write(self, rows: Sequence[Row], *, limit: int, temperature: float | None = None, **options: Any) -> list[Row]:
        """Goes on with rows by at most `limit` tokens each (`flowrl.vlm.generate.write`), at the policy's temperature.

        Another temperature, or greedy=True, is for answers that are not trained on.
        """
        options["temperature"] = self.temperature if temperature is None else temperature
        written = generate.write(self.model, rows, limit=limit, **options)
        self._count(rows, written)
        return written

    def force(self, rows: Sequence[Row], *, limit: int, temperature: float | None = None, **options: Any) -> list[Row]:
        """Lets rows that were cut off while they thought answer after all (`flowrl.vlm.generate.force`)."""
        options["temperature"] = self.temperature if temperature is None else temperature
        written = generate.force(self.model, rows, limit=limit, **options)
        self._count(rows, written)
        return written

    def tokens(self, rows: Sequence[Row], prompt: Sequence[int]) -> Tokens:
        """The table of N answers, `prompt` [N] being their prompts' places in the batch's list."""
        tokens = generate.tokens_of(rows, prompt)
        return self.rescored(tokens) if self.rescore else tokens

    @torch.no_grad()
    def rescored(self, tokens: Tokens, rows: int = 16) -> Tokens:
        """The same answers with the log-probs that `evaluate` gives them now, `rows` at a time.

        For answers of a foreign engine, or to a picture that the update is not shown.
        """
        parts = [self.evaluate(tokens.select(part)).logprob for part in torch.split(torch.arange(len(tokens)), rows)]
        width = tokens.ids.shape[1]
        logprob = torch.cat([torch.nn.functional.pad(part, (0, width - part.shape[1])) for part in parts])
        return replace(tokens, logprob=logprob.to(tokens.ids.device))

    def text(self, row: Row | Tensor) -> str:
        """An answer as people and verifiers read it, without the tokens that end it."""
        return self.model.decode(row.ids if isinstance(row, Row) else row)

    # ------------------------------------------------------------------------------------ what an update asks

    def evaluate(self, tokens: Tokens, *, entropy: bool = False, value: bool = False) -> TokenStats:
        """What the current weights say about the places of N answers that the policy chose, [N,S]; adds to `calls`.

        The log-probabilities of the whole vocabulary are made for these places alone, a part at a time, and again in
        the backward pass where there are several parts.
        """
        states = self._states(tokens)
        rows, places = tokens.mask.to(states.device).nonzero(as_tuple=True)
        before, ids = states[rows, places], tokens.ids.to(states.device)[rows, places]

        def table(column: Tensor) -> Tensor:
            return torch.zeros(tokens.ids.shape, device=states.device).index_put((rows, places), column)

        logprob, spread = self._scored(before, ids, entropy)
        return TokenStats(
            logprob=table(logprob),
            entropy=table(spread) if entropy else None,
            value=table(self.model.values(before)) if value else None,
        )

    @torch.no_grad()
    def values(self, tokens: Tokens) -> Tensor:
        """What the value head expects before each token that the policy chose, fp32 [N,S]; ModelError without one."""
        value = self.evaluate(tokens, value=True).value
        assert value is not None
        return value

    def gold(self, tokens: Tokens) -> Tokens | None:
        """The right answers to these rows' prompts, row by row, for supervised terms (CHORD, GHPO).

        A row whose prompt has none is empty; None where all are.
        """
        if all(inputs.solution is None for inputs in tokens.inputs):
            return None
        rows = []
        for inputs in tokens.inputs:
            ids = inputs.ids[:0] if inputs.solution is None else inputs.solution
            row = generate.begin(replace(inputs, later=()), ())
            rows.append(row.wrote(ids, torch.zeros(len(ids)), "eos"))
        return generate.tokens_of(rows, tokens.prompt.tolist()).to(tokens.ids.device)

    @contextmanager
    def masked_images(self, ratio: float, seed: int) -> Iterator[None]:
        """Within it `evaluate` sees pictures of which this share of patches is black (PAPO, arXiv:2507.06448)."""
        before, self._masks = self._masks, (ratio, seed)
        try:
            yield
        finally:
            self._masks = before

    def _states(self, tokens: Tokens) -> Tensor:
        """The last state before each place of the answers, [N,S,H]: that which says how probable its token is."""
        inputs = tokens.inputs if self._masks is None else self._masked(tokens.inputs, *self._masks)
        # Answers of one token each have nothing that could go on from a prompt.
        alone = tokens.ids.shape[1] < 2 or len({id(one.ids) for one in inputs}) == len(inputs)
        # What is told of a picture's places may let these see each other both ways, which a cache cannot go on from.
        told = any(part.places for one in inputs for _, part in one.later)
        if alone or told or not self._share or (self.model.forgets and torch.is_grad_enabled()):
            return self._states_apart(inputs, tokens)
        if not self._share_checked:
            self._share, self._share_checked = self._can_share(inputs, tokens), True
        return self._states_shared(inputs, tokens) if self._share else self._states_apart(inputs, tokens)

    def _states_apart(self, inputs: Sequence[Inputs], tokens: Tokens) -> Tensor:
        """Each row with a prompt of its own."""
        batch = collate(inputs, tokens.ids, tokens.present, self.model.pad_id)
        self.calls[self._role] += int(batch["attention_mask"].sum())
        states, _ = self.model.states(batch)
        return states[:, states.shape[1] - tokens.ids.shape[1] - 1 : -1]

    def _states_shared(self, inputs: Sequence[Inputs], tokens: Tokens) -> Tensor:
        """Each prompt is read once, and all its answers go on from there, with one graph."""
        model = self.model
        number: dict[int, int] = {}
        index = torch.tensor([number.setdefault(id(one.ids), len(number)) for one in inputs])
        first = [index.tolist().index(p) for p in range(len(number))]
        prompts = [replace(inputs[i], later=()) for i in first]
        none = tokens.ids.new_zeros(len(prompts), 0)
        before = collate(prompts, none, none.bool(), model.pad_id)
        longest = before["input_ids"].shape[1]
        # Positions of an answer depend on the sizes of its prompt's pictures, not on the pictures.
        batch = collate(inputs, tokens.ids, tokens.present, model.pad_id, model.places_by)
        positions = model.positions(batch)
        states, cache = model.states(before | {"position_ids": positions[..., first, :longest]}, use_cache=True)
        index = index.to(states.device)
        cache.reorder_cache(index)
        self.calls[self._role] += int(before["attention_mask"].sum() + tokens.present.sum())
        answers = {
            "input_ids": batch["input_ids"][:, longest:-1],
            "attention_mask": batch["attention_mask"][:, :-1],
            "position_ids": positions[..., longest:-1],
            **later_media(inputs),
        }
        after, _ = model.states(answers, cache, use_cache=True)
        return torch.cat([states[index, -1:], after], dim=1)

    @torch.no_grad()
    def _can_share(self, inputs: Sequence[Inputs], tokens: Tokens) -> bool:
        """Whether the network says the same after a cache of several places, which recurrent layers may not heed."""
        calls = Counter(self.calls)
        apart, shared = self._states_apart(inputs, tokens).float(), self._states_shared(inputs, tokens).float()
        self.calls = calls  # a look of our own
        there = tokens.present.to(apart.device)
        return bool((apart - shared)[there].abs().mean(-1).max() < 0.1 * apart[there].std())

    def _scored(self, states: Tensor, ids: Tensor, entropy: bool) -> tuple[Tensor, Tensor]:
        """Log-probability and entropy [M] of the tokens `ids` [M] after `states` [M,H]."""
        size = max(1, _NUMBERS // self.model.trainable.get_output_embeddings().weight.shape[0])
        parts = []
        for start in range(0, max(1, len(ids)), size):
            part = states[start : start + size], ids[start : start + size], entropy
            parts.append(
                self._score(*part) if len(ids) <= size else checkpoint(self._score, *part, use_reentrant=False)
            )
        logprob, spread = zip(*parts, strict=True)
        return torch.cat(logprob), torch.cat(spread)

    def _score(self, states: Tensor, ids: Tensor, entropy: bool) -> tuple[Tensor, Tensor]:
        table = self.model.logprobs(states, self.temperature)
        logprob = table.gather(1, ids[:, None])[:, 0]
        if not entropy:
            return logprob, torch.zeros_like(logprob)
        # 0 log 0 is 0: what is banned adds nothing, and has no gradient.
        inside = table.index_fill(-1, self.model.banned.to(table.device), 0.0)
        return logprob, -(table.exp() * inside).sum(-1)

    def _masked(self, inputs: Sequence[Inputs], ratio: float, seed: int) -> list[Inputs]:
        made: dict[int, Inputs] = {}
        for one in inputs:
            if id(one) not in made:
                made[id(one)] = self._black(one, ratio, seed)
        return [made[id(one)] for one in inputs]

    def _black(self, inputs: Inputs, ratio: float, seed: int) -> Inputs:
        """A prompt with masked pictures; those that came later in the answer stay as they are."""
        key = int(inputs.ids.sum())  # one that does not depend on the order of the prompts
        black = (
            augment.masked(picture, ratio, seed=seed, iteration=0, prompt=key, number=number)
            for number, picture in enumerate(pictures_of(inputs.messages))
        )
        return replace(inputs, media=self.model.prepare(with_pictures(inputs.messages, black)).media)

    def _count(self, rows: Sequence[Row], written: Sequence[Row]) -> None:
        """Tokens that went through the network: each prefix once, then what was written."""
        read = {
            (id(row.inputs), id(row.ids) if len(row.ids) else 0): len(row.inputs.ids) + len(row.ids) for row in rows
        }
        new = sum(len(after.ids) - len(before.ids) for before, after in zip(rows, written, strict=True))
        self.calls[self._role] += sum(read.values()) + new

    # ------------------------------------------------------------------------------------ files

    def export(
        self, folder: str | Path, *, averaged: bool = True, inference: Mapping[str, Any] | None = None,
        form: export.Form | None = None,
    ) -> Path:  # fmt: skip
        """Writes what was learnt in a form of `flowrl.vlm.export`; None: adapters where there are some, else full."""
        if not self._parameters:
            raise ModelError("a frozen policy has learnt nothing that could be exported.")
        chosen = form or ("full" if self.lora is None else "peft")
        settings = {"temperature": self.temperature, **(inference or {})}
        with self.averaged() if averaged else nullcontext():
            export.write(self.model, self.lora is not None, Path(folder), chosen, settings)
        return Path(folder)

    def load_weights(self, folder: str | Path) -> None:
        """Takes back what `export` wrote of the same model, rank, alpha and targets; averages start anew."""
        source = Path(folder).expanduser()
        if export.is_peft(source) != (self.lora is not None):
            is_what, trains = (
                ("LoRA adapters", "all weights") if self.lora is None else ("a whole model", "LoRA adapters")
            )
            raise ModelError(
                f"weights {str(folder)!r} are {is_what}, the policy trains {trains}: build it with the lora of the run "
                "that wrote them."
            )
        if self.lora is not None:
            found = export.read_adapters(source, self.lora.alpha)
        else:
            stored = export.read_full(source, self._module)  # what is frozen too
            found = {name: tensor for name, tensor in stored.items() if name in self._parameters}
        self._assign(found | export.read_value_head(source))
        for follower in self._followers.values():
            follower.reset()


def _within(model: ImageTextModel, lora: Lora | Mapping[str, Any] | None) -> Lora | None:
    """LoRA settings whose targets, if there are any, are the full names of layers that may learn."""
    if lora is None:
        return None
    asked = Lora.model_validate(lora)
    return asked if asked.targets is None else asked.model_copy(update={"targets": model.layers(asked.targets)})
