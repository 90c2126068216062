"""What the tests of a whole run with a model that writes share: questions on the disk, verifiers, models, a trainer."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file, save_file

from tests import runs

TEMPERATURE = 0.7
LONGEST = 8
"""Tokens of an answer."""
MEMBERS = 4
LORA = {"rank": 4, "alpha": 8}
# Adam's first step is the sign of the gradient, noise included, unless eps is large beside the noise.
STEADY = {"optimizer.eps": 1e-2, "optimizer.lr": 1e-2}
SIZES = ((), ((56, 56),), ((28, 60), (90, 30)), ((60, 28),), ((120, 40),), ((40, 40),))
"""Pictures of the questions: none, one, two, of different sizes."""
TEXTS = ("hello", "how many?", "which of the two is the larger one?", "a", "what color is the bird there?", "and now?")
VERIFIERS = '''
"""Verifiers of the nonsense that random weights write."""

import torch

from rewards.verifiers import NoVerdict, Verdict


def code(response):
    """Something that differs from answer to answer, in [0, 1]."""
    return sum(map(ord, response)) % 7 / 6


def odd(response):
    """Right or wrong, each for half of the answers."""
    return float(sum(map(ord, response)) % 2)


def rare(response):
    """Right for one answer in five."""
    return float(sum(map(ord, response)) % 5 == 0)


def short(response, tokens):
    """1 for no token, less for more."""
    return 1 / (1 + tokens)


def nothing(response):
    """Never right."""
    return 0.0


def some(response):
    """No verdict on one answer in three."""
    value = sum(map(ord, response))
    if value % 3 == 0:
        raise NoVerdict("not today")
    return value % 7 / 6


def dull(response, data_source):
    """The same for every answer to half of the questions."""
    return 0.5 if data_source == "odd" else code(response)


def broken(response):
    """Always fails."""
    raise TypeError("out of order")
'''


def tagged(source, sizes, text, number):
    return {"prompt": text, "images": [f"{number}-{i}.png" for i in range(len(sizes))], "answer": str(number),
            "data_source": source, "difficulty": number / len(SIZES)}  # fmt: skip


@pytest.fixture(scope="session")
def home(tmp_path_factory) -> Path:
    """A folder with questions.jsonl, its pictures, and verifiers.py; half of the questions have a solution."""
    folder = tmp_path_factory.mktemp("questions")
    rows = []
    for number, (sizes, text) in enumerate(zip(SIZES, TEXTS, strict=True)):
        for i, (width, height) in enumerate(sizes):
            pixels = np.random.default_rng([number, i]).integers(0, 255, (height, width, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"{number}-{i}.png")
        gold = {"solution": f"so it is {number}"} if number % 2 else {}
        rows.append({**tagged("even" if number % 2 == 0 else "odd", sizes, text, number), **gold})
    (folder / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "verifiers.py").write_text(VERIFIERS)
    return folder


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    """`model("llava")`: the folder of a tiny model whose answers end at different places."""
    from flowrl.vlm import tiny

    root, made = tmp_path_factory.mktemp("vlm"), {}

    def build(name):
        if name not in made:
            made[name] = tiny.build(name, root / name)
            path = made[name] / "model.safetensors"
            weights = load_file(path)
            head = next((key for key in weights if key.endswith("lm_head.weight")), None)
            head = head or next(key for key in weights if key.endswith("language_model.embed_tokens.weight"))
            end = json.loads((made[name] / "generation_config.json").read_text())["eos_token_id"]
            weights[head][end] *= 2.5  # its logit then is now and then far above the others
            save_file(weights, path, metadata={"format": "pt"})
        return made[name]

    return build


@pytest.fixture(scope="session")
def vlm_tree(home, model):
    """`vlm_tree(folder, {"algorithm": ...}, "qwen2_vl")`: the values of a small run's config."""

    def make(folder, changes=None, name="llava"):
        base = {
            "algorithm": {"name": "grpo"},
            "generation": {"max_new_tokens": LONGEST, "temperature": TEMPERATURE},
            "rewards": [{"use": f"{home}/verifiers.py:code"}],
            "data": {
                "prompts": f"{home}/questions.jsonl", "prompts_per_iteration": 3, "samples_per_prompt": MEMBERS,
                "evaluation": {"num_samples": 3, "grid_prompts": 1},
            },
            "optimizer": {"lr": 1e-2},
            "log.rollouts_every": 0,
        }  # fmt: skip
        return runs.tree(model(name), folder, {**base, **(changes or {})})

    return make


@pytest.fixture
def text_run(vlm_tree, tmp_path):
    """`text_run({"algorithm": ...}, name="qwen2_vl")`: a Trainer on three questions with four answers each."""
    from flowrl.config import make_config
    from flowrl.train import Trainer

    made = []

    def make(changes=None, folder="run", resume=False, name="llava"):
        made.append(Trainer(make_config(vlm_tree(tmp_path / folder, changes, name)), resume=resume))
        return made[-1]

    yield make
    for one in made:
        one._let_go()


@pytest.fixture(scope="session")
def verifier(home):
    """`verifier("odd", weight=0.5)`: the entry of a reward."""
    return lambda name, **keys: {"use": f"{home}/verifiers.py:{name}", "name": name, **keys}
