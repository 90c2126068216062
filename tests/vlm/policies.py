"""What the tests of the policy share: tiny models of six classes, prompts of mixed lengths and sizes of pictures."""

import numpy as np
import torch
from PIL import Image

from flowrl.vlm import tiny
from flowrl.vlm.collate import asked, collate
from flowrl.vlm.generate import begin
from flowrl.vlm.model import ImageTextModel
from flowrl.vlm.policy import TextPolicy

NAMES = tiny.names()
TEMPERATURE = 0.7
LORA = {"rank": 4, "alpha": 8}
RESPONSE = " <tool_response> {images}{text} </tool_response> "


def picture(seed, width=56, height=56):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8))


QUESTIONS = (
    ("count", [picture(0)]),
    ("which of them is larger?", [picture(1, 28, 60), picture(2, 90, 30)]),
    ("hello", []),
    ("a", [picture(3, 60, 28)]),
)


def load(name, **options):
    return ImageTextModel.load(f"tiny/{name}", **options)


def make(name="llava", temperature=TEMPERATURE, model=None, **options):
    """A policy on a fresh tiny model."""
    return TextPolicy(load(name) if model is None else model, temperature=temperature, **options)


def prompts(policy):
    return [policy.prepare(asked(text, pictures)) for text, pictures in QUESTIONS]


def begun(inputs, members=2, seed=0):
    return [begin(one, (seed, 0, slot, member)) for slot, one in enumerate(inputs) for member in range(members)]


def answers(policy, limit=12, members=2, inputs=None):
    """Rows and their table: `members` answers to each question."""
    inputs = prompts(policy) if inputs is None else inputs
    rows = policy.write(begun(inputs, members), limit=limit)
    return rows, policy.tokens(rows, [slot for slot in range(len(inputs)) for _ in range(members)])


def used_tool(policy, rows, limit=6):
    """The same rows after a tool's answer with a picture, which not all get, and what they wrote then."""
    part = policy.model.foreign("ok", [picture(9, 40, 90)], RESPONSE)
    return policy.write([row.append(part) if i % 3 else row for i, row in enumerate(rows)], limit=limit)


def written_out(model, rows):
    """The rows as one batch of arguments, padded on the left, and nothing else of ours: no positions."""
    table = [row.inputs for row in rows]
    ids = torch.nn.utils.rnn.pad_sequence([row.ids for row in rows], batch_first=True)
    present = torch.arange(ids.shape[1]) < torch.tensor([len(row.ids) for row in rows])[:, None]
    return collate(table, ids, present, model.pad_id)


@torch.no_grad()
def expected(model, row, temperature=TEMPERATURE):
    """Log-probabilities [s] of a row's tokens by the model's own forward pass, alone, with its own positions."""
    batch = written_out(model, [row])
    logits = model.trainable(**batch).logits[0, len(row.inputs.ids) - 1 : -1].double() / temperature
    logits[:, model.banned] = -torch.inf
    said = torch.distributions.Categorical(logits=logits).log_prob(row.ids)
    return said.where(row.mask, 0.0)
