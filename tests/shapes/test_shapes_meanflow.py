"""The few-step generator's recipe: what it regresses on, that it can be run again, what the shipped weights give."""

import json

import pytest
import torch

from flowrl.models import load
from flowrl.models.pipeline import resolve
from flowrl.shapes import meanflow
from flowrl.shapes.meanflow import Recipe, rows_of, train_meanflow
from flowrl.types import T_NEXT

TINY = Recipe(trajectories=6, times=3, steps=2, batch=4, save_every=1)


def exact_walks(num=40, last=5, mean=2.0, std=0.5):
    """Walks of the exact ODE for data N(mean, std^2), which keeps a state's standard deviations."""
    generator = torch.Generator().manual_seed(0)
    t = torch.rand(num, last + 1, generator=generator).sort(1, descending=True).values
    width = (((1 - t) * std).square() + t**2).sqrt()
    surprise = torch.randn(num, 1, 2, 3, 3, generator=generator)
    x = ((1 - t) * mean).view(num, -1, 1, 1, 1) + width.view(num, -1, 1, 1, 1) * surprise
    return {"x": x, "v": torch.full_like(x, 7.0), "t": t, "prompt": torch.arange(num)}, surprise


def test_rows_are_mean_velocities_between_two_states_of_a_walk():
    walks, surprise = exact_walks()
    recipe = Recipe(batch=400, same_time=0.25)
    x, t, r, u, prompt = rows_of(walks, recipe, torch.Generator().manual_seed(1))
    same = r == t
    assert ((r <= t).all()) and float(same.float().mean()) == pytest.approx(0.25, abs=0.08)
    assert (u[same] == 7).all(), "where the times are equal, the teacher's velocity"

    def state(time):
        width = (((1 - time) * 0.5).square() + time**2).sqrt()
        return ((1 - time) * 2.0).view(-1, 1, 1, 1) + width.view(-1, 1, 1, 1) * surprise[prompt, 0]

    torch.testing.assert_close(x, state(t))
    apart = ~same & (t - r > 0.05)
    expected = (state(t) - state(r)) / (t - r).view(-1, 1, 1, 1)
    torch.testing.assert_close(u[apart], expected[apart], rtol=1e-3, atol=1e-3)


def test_walks_are_the_teachers_and_the_same_again():
    teacher = load("shapes")
    walks = meanflow.trajectories(TINY, teacher)
    assert walks["x"].shape == walks["v"].shape == (6, 4, 4, 12, 12) and walks["t"].shape == (6, 4)
    assert (walks["t"][:, 0] == 1).all() and (walks["t"][:, -1] == 0).all() and (walks["t"].diff(dim=1) < 0).all()
    texts = [spec.prompt for spec in meanflow.prompts("train")]
    cond = teacher.encode([texts[i] for i in walks["prompt"].tolist()])
    with torch.no_grad():
        for place in range(3):
            v = teacher.velocity(walks["x"][:, place], walks["t"][:, place], cond)
            torch.testing.assert_close(walks["v"][:, place], v, rtol=0, atol=1e-5)
    again = meanflow.trajectories(TINY, teacher)
    assert all(torch.equal(walks[name], again[name]) for name in walks)


def test_the_recipe_writes_a_model_and_goes_on_after_a_stop(tmp_path, monkeypatch):
    class Stopped(Exception):
        pass

    def stop(*_):
        raise Stopped

    whole = train_meanflow(tmp_path / "whole", TINY)
    with monkeypatch.context() as patch:
        patch.setattr(meanflow.Stage, "finish", stop)
        with pytest.raises(Stopped):
            train_meanflow(tmp_path / "cut", TINY)
    cut = train_meanflow(tmp_path / "cut", TINY)
    models = [load(folder, family="meanflow") for folder in (whole, cut)]
    states = [model.trainable.state_dict() for model in models]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    base = load("shapes").trainable.state_dict()
    assert sum(not torch.equal(states[0][name], base[name]) for name in base) > 10
    assert json.loads((whole / "meanflow" / "recipe.json").read_text())["steps"] == 2
    assert not (whole / ".meanflow").exists() and not (whole / "README.md").exists()
    assert "_name_or_path" not in (whole / "meanflow" / "config.json").read_text()


def test_the_shipped_network_is_whole_small_and_says_how_it_was_made():
    from pathlib import Path

    folder = Path(resolve("shapes")) / "meanflow"
    assert sum(file.stat().st_size for file in folder.iterdir()) <= 5_000_000
    assert Recipe(**json.loads((folder / "recipe.json").read_text())) == Recipe()
    model = load("shapes", family="meanflow")
    cond = model.encode(["a red circle"])
    x = torch.randn(1, 4, 12, 12, generator=torch.Generator().manual_seed(0))
    t, far = torch.ones(1), torch.zeros(1)
    with torch.no_grad():
        moment, whole = model.velocity(x, t, cond), model.velocity(x, t, {**cond, T_NEXT: far})
        base = load("shapes").velocity(x, t, cond)
    assert (moment - base).square().mean() < 0.1 * base.square().mean()
    assert (whole - moment).square().mean() > 0.01 * moment.square().mean()


@pytest.mark.slow
def test_four_steps_of_it_are_better_than_four_of_the_base():
    from flowrl.collect import Conditions, Geometry
    from flowrl.data import load_prompts
    from flowrl.evaluate import evaluate, evaluation_prompts
    from flowrl.policy import Policy
    from rewards import RewardHub

    prompts = evaluation_prompts(load_prompts("shapes", "held_out"), 90)
    found = {}
    with RewardHub([{"use": "shapes"}]) as hub:
        for family in (None, "meanflow"):
            policy = Policy(load("shapes", family=family), frozen=True)
            scored = evaluate(
                policy,
                prompts,
                hub,
                Conditions(encode=policy.encode),
                Geometry(height=96, width=96),
                num_steps=4,
                seed=0,
            )
            found[family] = float(scored.scores["shapes"].mean())
    assert found["meanflow"] > found[None] + 0.05
