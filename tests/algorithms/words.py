"""A policy of words small enough to know in closed form, and a batch of its answers as a run would hand it over.

Symbols: P prompts, K answers a prompt, N = P K answers, S places, V = 6 words; word 0 ends an answer.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from flowrl.types import Hyperparameters, Loss, Prompt, TokenBatch, Tokens, TokenStats
from samplers import stable_seed

V = 6
LONGEST = 7
HOLE = 2
"""Word after which a foreign one is put in, which is present but not the policy's."""


class Words(nn.Module):
    """The next word by the last one and by a picture: logits = table[last] + seen[picture]; pictures are prompts.

    All is float64, so that gradients compare to rounding. `gold` are the prompts' worked answers.
    """

    def __init__(self, prompts: int = 4, seed: int = 0, gold: Sequence[Sequence[int] | None] = ()) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        draw = lambda *size: 0.5 * torch.randn(*size, generator=generator, dtype=torch.float64)  # noqa: E731
        self.table, self.seen = nn.Parameter(draw(V + 1, V)), nn.Parameter(draw(prompts, V))
        self.worth = nn.Parameter(draw(V + 1))
        self.initial = [p.detach().clone() for p in (self.table, self.seen)]
        self.solutions = list(gold)
        self.role, self.blind, self.calls = "current", 0.0, 0

    def logits(self, last: Tensor, picture: Tensor) -> Tensor:
        """[...,V] after the words `last` [...] (V: none yet), of prompts [...]."""
        table, seen = self.initial if self.role == "reference" else (self.table, self.seen)
        return table[last] + (1 - self.blind) * seen[picture]

    def evaluate(self, tokens: Tokens, *, entropy: bool = False, value: bool = False) -> TokenStats:
        self.calls += 1
        last = torch.cat([torch.full_like(tokens.ids[:, :1], V), tokens.ids[:, :-1]], 1)
        logits = self.logits(last, tokens.prompt[:, None].expand_as(last))
        words = torch.distributions.Categorical(logits=logits)
        mask = tokens.mask
        return TokenStats(
            words.log_prob(tokens.ids).where(mask, 0.0),
            words.entropy().where(mask, 0.0) if entropy else None,
            self.worth[last].where(mask, 0.0) if value else None,
        )

    @contextmanager
    def reference(self) -> Iterator[None]:
        self.role = "reference"
        try:
            yield
        finally:
            self.role = "current"

    @contextmanager
    def masked_images(self, ratio: float, seed: int) -> Iterator[None]:
        self.blind = ratio
        try:
            yield
        finally:
            self.blind = 0.0

    def gold(self, tokens: Tokens) -> Tokens | None:
        rows = [self.solutions[p] if self.solutions else None for p in tokens.prompt.tolist()]
        if not any(rows):
            return None
        ids = torch.zeros(len(rows), max(len(row or ()) for row in rows), dtype=torch.long)
        mask = torch.zeros_like(ids, dtype=torch.bool)
        for i, row in enumerate(rows):
            ids[i, : len(row or ())] = torch.tensor(row or [], dtype=torch.long)
            mask[i, : len(row or ())] = True
        return Tokens(
            ids=ids, present=mask, mask=mask, logprob=torch.zeros(ids.shape), prompt=tokens.prompt,
            inputs=(None,) * len(rows),
        )  # fmt: skip


@torch.no_grad()
def write(policy: Words, prompts: int = 4, k: int = 4, seed: int = 0) -> Tokens:
    """K answers to each prompt, drawn with a generator of each row's own."""
    rows = []
    for row in range(prompts * k):
        generator = torch.Generator().manual_seed(stable_seed(seed, row))
        ids, mine, last = [], [], V
        while len(ids) < LONGEST:
            chance = policy.logits(torch.tensor(last), torch.tensor(row // k)).softmax(-1)
            last = int(torch.multinomial(chance, 1, generator=generator))
            ids, mine = [*ids, last], [*mine, True]
            if last == 0:
                break
            if last == HOLE and len(ids) < LONGEST:
                ids, mine, last = [*ids, 5], [*mine, False], 5
        rows.append((ids, mine))
    size = (len(rows), max(len(ids) for ids, _ in rows))
    ids, mask, present = (torch.zeros(size, dtype=kind) for kind in (torch.long, torch.bool, torch.bool))
    for i, (words, mine) in enumerate(rows):
        ids[i, : len(words)], mask[i, : len(words)] = torch.tensor(words), torch.tensor(mine)
        present[i, : len(words)] = True
    tokens = Tokens(
        ids=ids, present=present, mask=mask, logprob=torch.zeros(size, dtype=torch.float64),
        prompt=torch.arange(prompts).repeat_interleave(k), inputs=(None,) * len(rows),
    )  # fmt: skip
    return tokens_with(tokens, logprob=policy.evaluate(tokens).logprob)


def tokens_with(tokens: Tokens, **changed: Any) -> Tokens:
    """The table with other columns."""
    return replace(tokens, inputs=tokens.inputs, **changed)


def score(tokens: Tokens) -> Tensor:
    """How many 3s an answer has, and a little for its length, float64 [N]."""
    return ((tokens.ids == 3) & tokens.mask).sum(1).double() + 0.01 * tokens.lengths


def batch_of(policy: Words, algorithm: Hyperparameters, k: int = 4, seed: int = 0, **given: Any) -> TokenBatch:
    """Answers, scored and credited; rows with NaN credit are still there."""
    prompts = len(policy.seen)
    tokens = write(policy, prompts, k, seed)
    rewards = score(tokens)
    with torch.no_grad():
        stats = policy.evaluate(tokens, entropy=True, value=True)
        with policy.reference():
            reference = policy.evaluate(tokens).logprob
    entropy = stats.entropy.sum(1) / tokens.lengths
    facts = {
        "tokens": tokens.lengths.double(), "truncated": (tokens.lengths >= LONGEST - 1).double(),
        "entropy": entropy.double(), "tool_position": (tokens.ids == HOLE).double().argmax(1).double(),
        "greedy": torch.full((len(tokens),), 0.4, dtype=torch.float64),
        "shuffled": torch.full((len(tokens),), 0.4, dtype=torch.float64),
    }  # fmt: skip
    facts["tool_position"][~(tokens.ids == HOLE).any(1)] = torch.nan
    needs = algorithm.needs
    batch = TokenBatch(
        prompts=[Prompt(id=i, text=str(i)) for i in range(prompts)], tokens=tokens, group=tokens.prompt.clone(),
        facts=facts, rewards=rewards, place=torch.arange(len(rewards)), scores={"reward": rewards},
        weights={"reward": 1.0}, values=stats.value if needs.value else None,
        reference=reference if needs.reference_logprobs else None,
    )  # fmt: skip
    for name, value in given.items():
        setattr(batch, name, value)
    batch.advantages = algorithm.credit(batch).double()
    return batch


def live(batch: TokenBatch) -> TokenBatch:
    """Without the rows that are not trained on."""
    unknown = batch.advantages.isnan()
    return batch.select(~(unknown if unknown.dim() == 1 else unknown.any(1)))


def moved(policy: Words, by: float = 0.3, seed: int = 1) -> Words:
    """The policy after some training: every weight has moved."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter += by * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
    return policy


def gradient(algorithm: Any, policy: Words, batch: TokenBatch, scale: float = 1.0) -> tuple[Loss, Tensor]:
    """The loss of a batch and its gradient, flat; nothing is left in `.grad`."""
    loss = algorithm.loss(policy, batch)
    parameters = list(policy.parameters())
    grads = torch.autograd.grad(scale * loss.value, parameters, allow_unused=True)
    return loss, torch.cat([
        torch.zeros_like(p).flatten() if g is None else g.flatten() for p, g in zip(parameters, grads, strict=True)
    ])  # fmt: skip
