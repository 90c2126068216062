"""A model with two times: exactly its base at r = t, walked in steps that know their end, and exported whole."""

import json
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from flowrl.collect import Conditions, Geometry, draw, roll_out
from flowrl.models import ModelError, families, load
from flowrl.policy import Policy, load_weights
from flowrl.types import T_NEXT, Model, Prompt
from samplers import deterministic, noise_source
from tests import runs

PROMPTS = ["a cat", "two dogs in a box"]
T, R = torch.tensor([0.9, 0.4]), torch.tensor([0.3, 0.0])


def shaken(model, seed=0):
    """With an embedding of the second time that does something."""
    embed = model.trainable.time_text_embed.elapsed_embed
    with torch.no_grad():
        embed.linear_2.weight.normal_(std=0.5, generator=torch.Generator().manual_seed(seed))
    return model


@pytest.fixture(scope="session")
def folder(tiny_sd3, tmp_path_factory):
    """The tiny pipeline with a two-time network beside its own."""
    path = tmp_path_factory.mktemp("two_times") / "tiny"
    shutil.copytree(tiny_sd3, path)
    shaken(load(path, family="meanflow", fresh=True)).trainable.save_pretrained(path / "meanflow")
    return path


@pytest.fixture
def two_times(folder):
    return load(folder, family="meanflow")


def noise(model, number=2):
    return torch.randn(number, *model.noise_shape(32, 32), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def velocity(model, r=None, guidance=1.0):
    cond = model.encode(PROMPTS)
    return model.velocity(noise(model), T, cond if r is None else {**cond, T_NEXT: r}, guidance)


def test_it_is_a_model_that_is_chosen_by_name(two_times, folder):
    assert isinstance(two_times, Model) and two_times.solver == "average"
    assert two_times.components == ("transformer",) and two_times.arguments()["num_inference_steps"] == 4
    assert "meanflow" not in families()
    assert torch.equal(two_times.times(4, 32, 32), torch.tensor([1, 0.75, 0.5, 0.25, 0]))
    assert not any(p.requires_grad for p in two_times.trainable.parameters())


def test_a_fresh_one_is_its_base_whatever_r_is(tiny_sd3, sd3):
    fresh = load(tiny_sd3, family="meanflow", fresh=True)
    for r in (None, T, R):
        assert torch.equal(velocity(fresh, r), velocity(sd3))


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_at_r_equal_t_it_is_exactly_the_base_and_elsewhere_not(two_times, sd3, guidance):
    """The guided batch holds every sample twice, and both must be told the same r."""
    base = velocity(sd3, guidance=guidance)
    for r in (None, T):
        assert torch.equal(velocity(two_times, r, guidance), base)
    found = velocity(two_times, R, guidance)
    assert ((found - base).abs().flatten(1).amax(1) > 1e-3).all()
    one = velocity(two_times, torch.stack([T[0], R[1]]), guidance)
    torch.testing.assert_close(one, torch.stack([base[0], found[1]]), rtol=0, atol=1e-5)


def test_what_it_says_is_smooth_in_r(two_times):
    """Its derivative exists at r = t too, where the two formulas meet: V is continuous there."""
    near = [(velocity(two_times, T - e) - velocity(two_times, T)) / e for e in (1e-2, 5e-3)]
    assert near[0].abs().max() > 1e-3
    torch.testing.assert_close(near[0], near[1], rtol=0.1, atol=0.05 * float(near[0].abs().max()))


def prompts():
    return [Prompt(id=i, text=text) for i, text in enumerate(PROMPTS)]


def test_samples_are_walked_along_the_mean_velocity(two_times):
    """x_r = x_t - (t - r) u(x_t, r, t), written out."""
    policy, slot = Policy(two_times, frozen=True), torch.arange(2)
    conditions, geometry = Conditions(encode=policy.encode), Geometry(height=32, width=32)
    found = torch.cat(list(draw(policy, prompts(), [0, 1], conditions, geometry, num_steps=3, seed=0)))
    assert policy.calls["eval"] == 2 * 3
    cond = policy.encode(PROMPTS)
    x = noise_source(two_times.noise_shape(32, 32), seed=0, iteration=-1, prompt=slot)(slot, slot * 0, -1)
    for t, r in ((1.0, 2 / 3), (2 / 3, 1 / 3), (1 / 3, 0.0)):
        with torch.no_grad():
            u = two_times.velocity(x, torch.full((2,), t), {**cond, T_NEXT: torch.full((2,), r)})
        x = x - (t - r) * u
    torch.testing.assert_close(found, x, rtol=0, atol=1e-5)


class Walking:
    """As much of an algorithm as a rollout asks of it."""

    kernel, eta = None, 0.0

    class needs:
        on_policy, means, stored = True, False, 0

    def injection(self, iteration):
        return 0.0


def test_a_one_time_model_is_not_walked_as_if_it_had_two(sd3):
    policy = Policy(sd3, frozen=True)
    plan = deterministic(torch.linspace(1, 0, 3), solver="average")
    with pytest.raises(ValueError, match="SD3 knows only that of a moment.*model.family to meanflow"):
        roll_out(
            policy, Walking(), [plan], prompts(), [0, 1], Conditions(encode=policy.encode),
            Geometry(height=32, width=32), samples_per_prompt=2, iteration=0, seed=0,
        )  # fmt: skip


def test_a_guide_is_refused(two_times):
    policy = Policy(two_times, frozen=True)
    drawn = draw(
        policy, prompts(), [0, 1], Conditions(encode=policy.encode), Geometry(height=32, width=32), num_steps=2, seed=0,
        guide=lambda velocity, cond: velocity,
    )  # fmt: skip
    with pytest.raises(ValueError, match="mean of a whole step"):
        next(drawn)


def trained(folder, **options):
    policy = Policy(load(folder, family="meanflow"), **options)
    optimizer = torch.optim.SGD(policy.trainable_parameters(), lr=0.05)
    cond = {**policy.encode(PROMPTS), T_NEXT: R}
    for _ in range(2):
        optimizer.zero_grad()
        policy.velocity(noise(policy.model), T, cond).square().mean().backward()
        for p in policy.trainable_parameters():
            p.grad = torch.sign(p.grad)
        optimizer.step()
    return policy


def test_an_export_carries_the_embedding_of_the_second_time(folder, two_times, tmp_path):
    """Without it the export would be the base model in four steps, and nobody would be told."""
    policy = trained(folder, reference=True)
    with policy.reference():
        torch.testing.assert_close(velocity(policy.model, R), velocity(two_times, R), rtol=0, atol=1e-6)
    target = policy.export(tmp_path / "weights")
    tensors = load_file(target / "transformer" / "diffusion_pytorch_model.safetensors")
    own = [name for name in tensors if "elapsed_embed" in name]
    assert len(own) == 2 and json.loads((target / "transformer" / "config.json").read_text())["_class_name"] == (
        "TwoTimesSD3Transformer2DModel"
    )
    assert not torch.equal(tensors[own[1]], two_times.trainable.state_dict()[own[1]])
    before = velocity(two_times, R)
    load_weights(two_times, target)
    torch.testing.assert_close(velocity(two_times, R), velocity(policy.model, R), rtol=0, atol=1e-6)
    assert not torch.allclose(velocity(two_times, R), before, atol=1e-3)


def test_lora_of_the_embedding_is_exported_too(folder, two_times, tmp_path):
    targets = ["to_q", "elapsed_embed.linear_1", "elapsed_embed.linear_2"]
    policy = trained(folder, lora={"rank": 2, "alpha": 4, "targets": targets})
    target = policy.export(tmp_path / "weights")
    before = velocity(two_times, R)
    load_weights(two_times, target)
    torch.testing.assert_close(velocity(two_times, R), velocity(policy.model, R), rtol=0, atol=1e-5)
    assert not torch.allclose(velocity(two_times, R), before, atol=1e-3)
    with torch.no_grad():
        fresh = load(folder, family="meanflow")
        moved = velocity(two_times, R) - velocity(two_times, T) - velocity(fresh, R) + velocity(fresh, T)
    assert moved.abs().max() > 1e-3


def test_the_readme_of_an_export_draws_a_picture(folder, tmp_path, monkeypatch):
    target = trained(folder).export(tmp_path / "weights")
    code = re.search(r"```python\n(.*?)```", (target / "README.md").read_text(), re.DOTALL)[1]
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README.md", "exec"), {})
    assert (tmp_path / "image.png").stat().st_size > 0


def test_a_network_without_the_embedding_is_refused(folder, tiny_sd3, tmp_path):
    with pytest.raises(ModelError, match="has no two-time network.*flowrl shapes meanflow"):
        load(tiny_sd3, family="meanflow")
    shutil.copytree(folder, tmp_path / "broken")
    file = tmp_path / "broken" / "meanflow" / "diffusion_pytorch_model.safetensors"
    tensors = {name: tensor for name, tensor in load_file(file).items() if "elapsed" not in name}
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ModelError, match="2 weights are missing or differ.*elapsed_embed"):
        load(tmp_path / "broken", family="meanflow")


def test_a_run_trains_evaluates_goes_on_and_is_sampled(trainer, tmp_path):
    """From the config's `model.family` to a picture of the exported weights; a resumed run is the same run."""
    from flowrl.standalone import sample_grid

    algorithm = {"name": "meanflow_nft", "num_steps": 2, "draws_per_sample": 2, "decay": 0.5}
    changes = {"model.family": "meanflow", "algorithm": algorithm, "iterations": 2}
    whole = trainer(changes, folder="whole")
    whole.run()
    assert sorted(whole.evaluations) == ["0", "2"] and whole.policy.calls["eval"] == 2 * 4 * 3
    stopped = trainer(changes, folder="stopped")
    stopped.step(0)
    stopped.iteration = 1
    stopped._save()
    stopped.lock.release()
    resumed = trainer(changes, folder="stopped", resume=True)
    resumed.step(1)
    assert runs.same(runs.state(resumed), runs.state(whole))
    sample_grid(
        ["a cat"], model="", weights=whole.folder, count=1, num_steps=2, guidance=None, seed=0,
        output=tmp_path / "picture.png",
    )  # fmt: skip
    assert (tmp_path / "picture.png").stat().st_size > 0
