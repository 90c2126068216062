"""Pair-GRPO: twin prompts are one group, and stored pictures stand among their samples, ever more rarely."""

import torch
from pydantic import ValidationError
from pytest import approx, fixture, mark, raises

from flowrl.algorithms.diffusion_nft import DiffusionNFT
from flowrl.collect import Conditions, Geometry, check_stored, injected, roll_out
from flowrl.costs import expected_cost
from flowrl.pairs import load_media, read_pairs, save_media
from flowrl.types import Prompt
from tests import runs

K, T = 4, 3


@fixture(scope="module")
def store(tmp_path_factory):
    """Two twins: four prompts, each with its own picture chosen and its twin's rejected."""
    import json

    folder = tmp_path_factory.mktemp("twins")
    files = [save_media(torch.full((1, 3, 32, 32), 0.2 + 0.2 * i), folder, f"{i}") for i in range(4)]
    rows = [
        {"prompt": f"thing {i}", "chosen": files[i], "rejected": files[i ^ 1], "metadata": {"twin": i // 2}}
        for i in range(4)
    ]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@fixture(scope="module")
def policy(tiny_model):
    from flowrl.models import load
    from flowrl.policy import Policy

    return Policy(load(tiny_model), frozen=True)


def method(inject):
    return DiffusionNFT(num_steps=T, draws_per_sample=2, inject=inject)


def collect(policy, prompts, inject, slots=None, iteration=0):
    algorithm = method(inject)
    plan = algorithm.plan(policy.model.times(T, 32, 32), iteration, K, 0)
    return roll_out(
        policy, algorithm, [plan], prompts, slots or [*range(len(prompts))], Conditions(encode=policy.encode),
        Geometry(height=32, width=32), samples_per_prompt=K, iteration=iteration, seed=0,
    )  # fmt: skip


def test_true_and_false_pictures_take_the_first_places(policy, store):
    prompts = read_pairs(store)
    plain, given = collect(policy, prompts, 0.0), collect(policy, prompts, 1.0)
    assert given.trajectory.group.tolist() == plain.trajectory.group.tolist() == [i // K for i in range(4 * K)]
    for place, prompt in enumerate(prompts):
        for number, row in enumerate(prompt.metadata["stored"]):
            (expected,) = policy.model.encode_media(load_media(row["media"])[None])
            torch.testing.assert_close(given.trajectory.x0[place * K + number], expected)
        mine = slice(place * K + 2, (place + 1) * K)
        torch.testing.assert_close(given.trajectory.x0[mine], plain.trajectory.x0[mine], rtol=1e-5, atol=1e-5)
    assert (plain.trajectory.calls, given.trajectory.calls) == (4 * K * T, 4 * (K - 2) * T)


def test_injection_is_a_function_of_the_place(policy, store):
    prompts = read_pairs(store)
    some = injected(0, 5, range(4000), 0.3)
    assert some.float().mean().item() == approx(0.3, abs=0.03)
    assert torch.equal(injected(0, 5, [7, 9], 0.3), some[[7, 9]])
    assert not torch.equal(injected(0, 6, range(4000), 0.3), some)
    assert injected(0, 5, range(100), 1.0).all() and not injected(0, 5, range(100), 0.0).any()
    whole, part = collect(policy, prompts, 0.5), collect(policy, prompts[2:], 0.5, slots=[2, 3])
    torch.testing.assert_close(part.trajectory.x0, whole.trajectory.x0[2 * K :], rtol=1e-5, atol=1e-5)


@mark.parametrize("at", [0, 1])
def test_a_run_compares_twins_and_costs_what_is_announced(trainer, store, at):
    """pi is 1 in iteration 0 and 0.4 in iteration 1."""
    run = trainer({
        "algorithm": {"name": "diffusion_nft", "num_steps": T, "draws_per_sample": 2, "inject": [[0, 1.0], [1, 0.4]]},
        "data.prompts": str(store), "data.together": "twin", "data.prompts_per_iteration": 4,
    })  # fmt: skip
    plan = run.algorithm.plan(run.actor.times, at, K, 0)
    row = [run.step(i) for i in range(at + 1)][-1]
    expected = expected_cost(run.config, run.algorithm, [plan], at)
    assert row["calls/rollout"] == expected.rollout and row["calls/train"] == expected.train == 4 * K * 2
    assert expected.rollout < 4 * K * T


def test_credit_is_that_of_the_union_of_both_prompts(trainer, store, monkeypatch):
    run = trainer({
        "algorithm": {"name": "diffusion_nft", "num_steps": T, "draws_per_sample": 2, "inject": 1.0},
        "data.prompts": str(store),
        "data.together": "twin", "data.prompts_per_iteration": 4,
    })  # fmt: skip
    seen = {}
    monkeypatch.setattr(run.updater, "run", lambda batch, update_of: seen.update(batch=batch) or {})
    run.step(0)
    batch = seen["batch"]
    for family in (slice(0, 2 * K), slice(2 * K, 4 * K)):
        r = batch.rewards[family]
        expected = (r - r.mean()) / (r.std(correction=0) + 1e-4)
        mine = torch.isin(batch.draws.sample, torch.arange(4 * K)[family])
        torch.testing.assert_close(
            batch.advantages[mine], expected.float()[batch.draws.sample[mine] - family.start], rtol=1e-4, atol=1e-5
        )


def test_what_cannot_be_meant_is_refused():
    with raises(ValidationError, match="probability"):
        DiffusionNFT(inject=[[0, 1.5], [9, 0.0]])
    with raises(ValueError, match="names 0 stored samples where 2 are wanted"):
        check_stored([Prompt(id=0, text="a cat")], 2)


def test_published_curriculum():
    algorithm = DiffusionNFT(inject=[[50, 1], [450, 0.25], [1200, 0]])
    found = [algorithm.injection(n) for n in (0, 50, 250, 450, 825, 1200, 9999)]
    assert found == approx([1, 1, 0.625, 0.25, 0.125, 0, 0])


assert runs.SAMPLES == K
