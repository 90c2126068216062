"""On-policy distillation: loss against distributions, gradient against brute force, teachers in whole runs."""

import json
import math
from collections import Counter
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file
from torch.distributions import Normal, kl_divergence

from flowrl.algorithms.opd import OPD
from flowrl.policy import Policy, load_weights
from flowrl.types import Needs, Prompt
from tests import runs
from tests.algorithms.toy import ToyPolicy, collect, gradient, train

pytestmark = pytest.mark.slow

PLAIN = {"num_steps": 5, "teacher_guidance": 1.0}


class Taught(ToyPolicy):
    """The toy with empty-prompt conditions of zero, hence guidance; its teachers are other biases."""

    def __init__(self, **teachers):
        super().__init__()
        self.teachers, self.guidance, self.asked = teachers, 1.0, Counter()

    def velocity(self, x, t, cond):
        prompted = super().velocity(x, t, cond)
        if self.guidance == 1:
            return prompted
        empty = super().velocity(x, t, {"offset": torch.zeros_like(cond["offset"])})
        return empty + self.guidance * (prompted - empty)

    @contextmanager
    def teacher(self, weights, guidance):
        own, self.guidance = self.initial, guidance
        if weights is not None:
            self.initial = (torch.full_like(own[0], self.teachers[weights]), own[1])
        before = self.calls["teacher"]
        with super().teacher(None, guidance):
            yield
        self.asked[weights] += self.calls["teacher"] - before
        self.initial, self.guidance = own, 1.0


def moved(by=0.3, **teachers):
    """A student that is not what it was."""
    policy = Taught(**teachers)
    with torch.no_grad():
        policy.bias += by
    return policy


def means_by_hand(policy, batch, eta):
    """Flow-GRPO's step written out, one edge after the other: mean [2] and std of each, and its length."""
    steps, edges = [], batch.trajectory
    for x, t, t_next, prompt in zip(edges.x, edges.t, edges.t_next, edges.prompt, strict=True):
        v = policy.velocity(x[None], t[None], batch.cond_at(prompt[None]))[0]
        h = t - t_next
        g = eta * (t / (1 - (t if t < 1 else t_next))).sqrt()
        steps.append((x - h * (v + g**2 / (2 * t) * (x + (1 - t) * v)), g * h.sqrt(), h))
    return steps


# ------------------------------------------------------------------------------------------------- the loss


@pytest.mark.parametrize("sde", ["flow_sde", "dance_sde", "cps"])
def test_the_loss_is_the_divergence_of_the_two_steps(sde):
    """KL of torch's normals, divided by the latent dimensions; without `kl` it is the distance of the means alone."""
    policy, algorithm = moved(), OPD(**PLAIN, sde=sde)
    batch = collect(algorithm, policy)
    edges = batch.trajectory
    cond = batch.cond_at(edges.prompt)
    with torch.no_grad():
        student = algorithm.kernel(edges.x, policy.velocity(edges.x, edges.t, cond), edges.t, edges.t_next, edges.eta)
        with policy.reference():
            v = policy.velocity(edges.x, edges.t, cond)
        teacher = algorithm.kernel(edges.x, v, edges.t, edges.t_next, edges.eta)
    expected = kl_divergence(Normal(*student), Normal(*teacher)).mean()
    loss = algorithm.loss(policy, batch)
    torch.testing.assert_close(loss.value, expected)
    torch.testing.assert_close(loss.metrics["distill_kl"], expected)
    torch.testing.assert_close(loss.metrics["policy_loss"], expected)
    plain = algorithm.model_copy(update={"kl": False}).loss(policy, batch)
    torch.testing.assert_close(plain.value, (student.mean - teacher.mean).square().mean() / 2)
    torch.testing.assert_close(plain.metrics["distill_kl"], expected)
    mse = (policy.velocity(edges.x, edges.t, cond) - v).square().mean()
    torch.testing.assert_close(loss.metrics["distill_mse"], mse.detach())
    torch.testing.assert_close(plain.metrics["distill_mse"], mse.detach())


@pytest.mark.parametrize("kl", [True, False])
def test_the_gradient_is_that_of_the_formula_edge_by_edge(kl):
    policy, algorithm = moved(), OPD(**PLAIN, kl=kl)
    batch = collect(algorithm, policy)
    _, found = gradient(algorithm, policy, batch)
    with torch.no_grad(), policy.reference():
        targets = means_by_hand(policy, batch, 0.7)
    terms = [
        (mean - target).square().mean() / (2 * (std**2 if kl else 1))
        for (mean, std, _), (target, *_) in zip(means_by_hand(policy, batch, 0.7), targets, strict=True)
    ]
    expected = torch.autograd.grad(torch.stack(terms).mean(), (policy.bias, policy.gain))
    torch.testing.assert_close(found, torch.cat([g.flatten() for g in expected]), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("eta", "factor"), [(0.7, 1 + 0.7**2 / 2), (1e-4, 1.0)])
def test_guidance_is_distilled_by_the_difference_of_the_velocities(eta, factor):
    """w = 1: with v the mean moves by -h (1 + g^2 (1 - t) / 2t), where g^2 (1 - t) / 2t = eta^2 / 2 but 0 at t = 1.

    As the noise goes it is -h: an ODE step, whose loss is h^2 / 2 times the squared difference of the velocities.
    """
    policy, algorithm = Taught(), OPD(num_steps=5, teacher_guidance=3.0, eta=eta, kl=False)
    batch = collect(algorithm, policy)
    edges = batch.trajectory
    cond = batch.cond_at(edges.prompt)
    with torch.no_grad():
        prompted = policy.velocity(edges.x, edges.t, cond)
        empty = policy.velocity(edges.x, edges.t, {"offset": torch.zeros_like(cond["offset"])})
    gap = (3 - 1) ** 2 * (prompted - empty).square().mean(1)
    h, weight = edges.t - edges.t_next, torch.where(edges.t < 1, factor, 1.0) ** 2
    torch.testing.assert_close(algorithm.loss(policy, batch).value, (h**2 * weight * gap / 2).mean())
    assert policy.asked == {None: 2 * len(edges)}


def test_what_the_teacher_would_do_itself_costs_nothing():
    policy, algorithm = ToyPolicy(), OPD(**PLAIN)
    loss, found = gradient(algorithm, policy, collect(algorithm, policy))
    assert loss.value == 0 and found.abs().max() == 0 and loss.metrics["distill_mse"] == 0
    guided = OPD(num_steps=5, teacher_guidance=2.0)
    policy = Taught()
    assert guided.loss(policy, collect(guided, policy)).value > 0


def test_every_prompt_has_the_teacher_of_its_domain():
    teachers = {"one": "a", "two": "b", "default": None}
    policy = Taught(a=0.5, b=-1.0)
    algorithm = OPD(num_steps=4, teachers=teachers, teacher_guidance={"one": 1.0, "two": 2.0, "default": 1.0})
    batch = collect(algorithm, policy)
    domains = ["two", None, "one", "two"]
    batch.prompts = [replace(p, metadata={"domain": d}) for p, d in zip(batch.prompts, domains, strict=True)]
    edges = batch.trajectory

    with torch.no_grad():
        student = means_by_hand(policy, batch, 0.7)
        expected, chosen = [], {"one": ("a", 1.0), "two": ("b", 2.0), None: (None, 1.0)}
        for domain, (weights, guidance) in chosen.items():
            with policy.teacher(weights, guidance):
                target = means_by_hand(policy, batch, 0.7)
            for i, prompt in enumerate(edges.prompt.tolist()):
                if domains[prompt] == domain:
                    expected.append((student[i][0] - target[i][0]).square().mean() / (2 * student[i][1] ** 2))
    policy.asked.clear()
    value = algorithm.loss(policy, batch).value
    torch.testing.assert_close(value, torch.stack(expected).mean(), rtol=1e-4, atol=0)
    each = len(edges) // 4
    assert policy.asked == {"a": each, None: each, "b": 2 * 2 * each}
    only = replace(batch, trajectory=edges.select(edges.prompt == 1))
    assert algorithm.loss(policy, only).value == 0  # of the one that has not moved from its teacher


def test_the_graph_of_a_single_pass_is_the_student_s_alone():
    policy, algorithm = moved(), OPD(**PLAIN)
    batch = collect(algorithm, policy)
    edges = batch.trajectory
    assert torch.equal(edges.state, torch.arange(len(edges)))
    again, found = gradient(algorithm, policy, batch)
    kept = replace(batch, velocity=policy.velocity(edges.x, edges.t, batch.cond_at(edges.prompt)))
    policy.calls["current"] = 0
    loss, same = gradient(algorithm, policy, kept)
    torch.testing.assert_close(loss.value, again.value)
    torch.testing.assert_close(same, found)
    assert policy.calls["current"] == 0


def test_the_self_check_sees_a_student_that_did_not_draw_the_samples():
    policy, algorithm = moved(), OPD(**PLAIN)
    batch = collect(algorithm, policy)
    assert algorithm.loss(policy, batch).metrics["ratio_max_dev"] < 1e-5
    with torch.no_grad():
        policy.bias += 0.1
    assert algorithm.loss(policy, batch).metrics["ratio_max_dev"] > 1e-2


def test_training_brings_the_student_to_its_teacher():
    algorithm = OPD(num_steps=5, teachers={"default": "a"}, teacher_guidance=1.0)
    policy = Taught(a=0.4)
    optimizer = torch.optim.Adam(policy.parameters(), lr=0.05)
    seen = []
    for iteration in range(25):
        loss = algorithm.loss(policy, collect(algorithm, policy, iteration))
        optimizer.zero_grad()
        loss.value.backward()
        optimizer.step()
        seen.append(float(loss.metrics["distill_mse"]))
    assert seen[-1] < 0.02 * seen[0]
    torch.testing.assert_close(policy.bias.detach(), torch.full((2,), 0.4), rtol=0, atol=0.05)


def test_without_anything_to_learn_the_weights_stay():
    policy, _ = train(OPD(**PLAIN), iterations=2, lr=0.1)
    assert torch.equal(policy.bias.detach(), policy.initial[0])


# ------------------------------------------------------------------------------------------------- the record


def test_no_reward_is_needed():
    algorithm, policy = OPD(**PLAIN), ToyPolicy()
    batch = collect(algorithm, policy)
    batch.rewards = torch.full_like(batch.rewards, math.nan)
    assert torch.equal(algorithm.credit(batch), torch.zeros(len(batch.trajectory)))


def test_needs_name_the_teachers_and_the_largest_guidance():
    assert OPD().needs == Needs(teachers=(None,), guidance=4.5)
    both = OPD(teachers={"a": "runs/x", "b": "runs/y", "c": "runs/x"}, teacher_guidance={"a": 1.0, "b": 3.0, "c": 2.0})
    assert both.needs == Needs(teachers=("runs/x", "runs/y"), guidance=3.0)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"teachers": {}}, "at least 1 item"),
        ({"teacher_guidance": 0.5}, "teacher_guidance of default must be at least 1"),
        ({"teacher_guidance": math.nan}, "at least 1"),
        ({"teacher_guidance": math.inf}, "finite"),
        ({"teacher_guidance": {"ocr": 2.0}}, "is for ocr, the teachers for default"),
        ({"teachers": {"a": None, "b": None}, "teacher_guidance": {"a": 1.0}}, "is for a, the teachers for a, b"),
        ({"eta": 1e-6}, "set kl: false, or eta to 0.001"),
        ({"sde": "cps", "eta": 1.5}, r"eta in \(0, 1\]"),
        ({"window": 99}, "window=99 does not fit"),
    ],
)
def test_impossible_values_are_refused_with_a_reason(fields, message):
    with pytest.raises(ValidationError, match=message):
        OPD(**fields)
    OPD(eta=1e-6, kl=False)


def test_prompts_without_a_teacher_are_refused():
    algorithm = OPD(teachers={"ocr": None}, teacher_guidance=2.0)
    algorithm.check_prompts([Prompt(id=0, text="a", metadata={"domain": "ocr"})])
    with pytest.raises(ValueError, match=r"'a cat', without a 'domain' .* for ocr. Add algorithm.teachers.default"):
        algorithm.check_prompts([Prompt(id=0, text="a cat")])
    with pytest.raises(ValueError, match=r"with 'domain': 'sky' .* Add algorithm.teachers.sky"):
        algorithm.check_prompts([Prompt(id=0, text="a cat", metadata={"domain": "sky"})])
    by_style = OPD(teachers={"ink": None}, domain_key="style")
    by_style.check_prompts([Prompt(id=0, text="a cat", metadata={"style": "ink"})])


# ------------------------------------------------------------------------------------------------- whole runs


def distilling(**algorithm):
    return {
        "algorithm": {"name": "opd", "num_steps": 4, "eta": 0.7, **algorithm},
        "optimizer": {"lr": 3e-3, "ema_decay": 0.9},
        "iterations": 3,
    }


@pytest.fixture
def teacher(tiny_model, tmp_path):
    """A folder with weights that draw otherwise than the model, LoRA or full."""

    def make(lora):
        from flowrl.models import load

        policy = Policy(load(tiny_model), lora=lora)
        torch.manual_seed(0)
        with torch.no_grad():
            for p in policy.trainable_parameters():
                p.add_(torch.randn_like(p) * 0.1)
        return policy.export(tmp_path / "teacher" / "weights").parent

    return make


@pytest.mark.parametrize("student", [None, runs.LORA])
@pytest.mark.parametrize("taught_by", [None, {"rank": 2, "alpha": 16}])
def test_a_run_comes_closer_to_its_teacher_and_exports_only_itself(
    trainer, teacher, tiny_model, tmp_path, student, taught_by
):
    folder = str(teacher(taught_by))
    changes = distilling(teachers={"default": folder}, teacher_guidance=1.0) | {"model.lora": student, "iterations": 5}
    trainer(changes | {"optimizer.lr": 3e-2 if student else 3e-3}).run()
    rows = runs.rows(tmp_path / "run")
    assert rows[-1]["distill_mse"] < 0.9 * rows[0]["distill_mse"]
    assert all(row["ratio_first_update"] < 1e-4 for row in rows)
    samples = len(runs.PROMPTS) * runs.SAMPLES
    assert {row["calls/teacher"] for row in rows} == {3 * samples} and {row["calls/reference"] for row in rows} == {0}

    from flowrl.models import load

    plain = Policy(load(tiny_model), lora=student)
    expected = load_file(next(plain.export(tmp_path / "plain").rglob("*_*.safetensors")))
    found = load_file(next((tmp_path / "run" / "weights").rglob("*_*.safetensors")))
    assert {n: t.shape for n, t in found.items()} == {n: t.shape for n, t in expected.items()}
    load_weights(plain, tmp_path / "run" / "weights")


@pytest.mark.parametrize("student", [None, runs.LORA])
def test_guidance_is_distilled_and_counted_where_it_is_used(trainer, tmp_path, student):
    trainer(distilling(teacher_guidance=3.0) | {"model.lora": student, "optimizer.update": "recompute"}).run()
    rows = runs.rows(tmp_path / "run")
    samples = len(runs.PROMPTS) * runs.SAMPLES
    for row in rows:
        calls = {role: row[f"calls/{role}"] for role in ("rollout", "train", "teacher", "reference")}
        assert calls == {"rollout": 4 * samples, "train": 3 * samples, "teacher": 2 * 3 * samples, "reference": 0}
    assert rows[0]["distill_kl"] > 0 and rows[-1]["distill_mse"] < rows[0]["distill_mse"]
    settings = json.loads((tmp_path / "run" / "weights" / "inference.json").read_text())
    assert settings["guidance_scale"] == 1


@pytest.mark.parametrize("student", [None, runs.LORA])
def test_a_resumed_run_is_the_run(trainer, teacher, tmp_path, student):
    changes = distilling(teachers={"default": str(teacher(runs.LORA))}, teacher_guidance=2.0) | {"model.lora": student}
    straight = trainer(changes, folder="straight")
    straight.run()
    trainer({**changes, "iterations": 1}, folder="run").run()
    resumed = trainer(changes, folder="run", resume=True)
    resumed.run()
    assert runs.same(runs.state(straight), runs.state(resumed))


def test_a_config_without_its_teachers_is_refused_before_anything_is_loaded(config_file, teacher, tmp_path):
    from flowrl.config import check

    def problems(algorithm, **changes):
        return check(config_file(distilling(**algorithm) | changes))

    here = str(teacher(runs.LORA))
    assert problems({"teachers": {"default": here}}) == []
    (absent,) = problems({"teachers": {"default": str(tmp_path / "nowhere")}})
    assert "algorithm.teachers: weights" in absent and "nowhere is no folder" in absent
    (empty,) = problems({"teachers": {"default": str(tmp_path)}})
    assert "has no exported weights. Give the output_dir of a run that has ended" in empty
    (unknown,) = problems({"teachers": {"sky": here}})
    assert "'a cat', without a 'domain'" in unknown
