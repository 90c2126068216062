"""Twins of the built-in world: one word apart, true to their pictures, and from training prompts only."""

import pytest
import torch

from flowrl.data import DataError, PromptSampler
from flowrl.pairs import load_media, read_pairs
from flowrl.shapes.scenes import prompts
from flowrl.shapes.twins import twins, write_twins
from rewards import RewardHub, Sample


def test_twins_differ_in_one_word_and_are_training_prompts():
    train = {spec.prompt for spec in prompts("train")}
    found = twins(60)
    assert len({frozenset((a.prompt, b.prompt)) for a, b in found}) == 60
    for a, b in found:
        assert {a.prompt, b.prompt} <= train and a.category == b.category
    apart = [sum(x != y for x, y in zip(a.prompt.split(), b.prompt.split(), strict=False)) for a, b in found]
    assert sum(count == 1 for count in apart) >= 50, "plurals and articles may follow the word"
    assert twins(60) == found and twins(60, seed=1) != found


def test_own_pictures_are_right_and_the_twins_wrong(tmp_path):
    write_twins(tmp_path / "twins", 12)
    rows = read_pairs(tmp_path / "twins")
    assert len(rows) == 24
    with RewardHub(["shapes"]) as hub:
        for place, expected in ((0, 1.0), (1, 0.0)):
            media = [load_media(row.metadata["stored"][place]["media"])[0] for row in rows]
            result = hub([Sample(media=m, prompt=row.text) for m, row in zip(media, rows, strict=True)])
            strict = result.parts["shapes"]["strict"]
            # A twin that asks for fewer things of a kind, say "a circle and a star", may be true of both pictures.
            assert (strict == expected).float().mean() >= (1.0 if expected else 0.8)
    sampler = PromptSampler(rows, 6, together="twin")
    for iteration in range(5):
        drawn = [prompt.metadata["twin"] for prompt in sampler(iteration)]
        assert drawn[::2] == drawn[1::2] and len(set(drawn)) == 3
    assert torch.tensor([p.id for i in range(4) for p in sampler(i)]).unique().numel() == 24, "an epoch sees all"


def test_what_cannot_be_is_refused(tmp_path):
    write_twins(tmp_path / "twins", 2)
    with pytest.raises(DataError, match="holds pairs already"):
        write_twins(tmp_path / "twins", 2)
    with pytest.raises(DataError, match="only about"):
        twins(100_000)
    rows = read_pairs(tmp_path / "twins")
    with pytest.raises(DataError, match="data.together=twin: 2 prompts share a value, and an iteration takes 3"):
        PromptSampler(rows, 3, together="twin")
    with pytest.raises(DataError, match="data.together=twim.*did you mean 'twin'"):
        PromptSampler(rows, 2, together="twim")
