"""Every family with every method: real iterations on the tiny pipelines, and what a run of any of them must be able to.

Each tiny pipeline goes through one method of every kind, four of them through all methods; weights of both kinds, LoRA
and all, take turns so that every pipeline gets both. A new pipeline in flowrl/tiny and a new method in
flowrl/algorithms join by being there, the latter with settings for a short run in `METHODS`.

    python -m tests.test_families_train JOB.json        what each of two processes does in the test of gloo
"""

import copy
import functools
import json
import math
import os
import socket
import subprocess
import sys
import traceback
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from flowrl import media, models, tiny
from flowrl.algorithms.schedule import plans_of
from flowrl.checkpoint import latest_valid
from flowrl.config import make_config
from flowrl.costs import expected_cost
from flowrl.models import ModelError
from flowrl.resolve import available
from flowrl.train import Trainer
from tests import runs

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
NAMES = sorted(tiny.names())
TEXTS = ["a red cat", "two dogs on a hill"]
GUIDANCE = 3.0
LORA = {"rank": 2, "alpha": 4}
ROLES = ("rollout", "train", "old", "reference", "teacher")

METHODS = {
    "awm": {"num_steps": 3, "draws_per_sample": 2},
    "branch_grpo": {"num_steps": 3, "splits": [0, 1]},
    "crd": {"num_steps": 2, "draws_per_sample": 2},
    "dance_grpo": {"num_steps": 3},
    "ddpo": {"num_steps": 3, "min_count": 4},
    "dgpo": {"num_steps": 3, "draws_per_sample": 2},
    "diffusion_art": {"num_steps": 2, "draws_per_sample": 2},
    "diffusion_dpo": {"num_steps": 2},
    "diffusion_nft": {"num_steps": 2, "draws_per_sample": 2, "decay": 0.5},
    "flash_grpo": {"num_steps": 3},
    "flow_dpo": {"num_steps": 2},
    "flow_dppo": {"num_steps": 3, "window": 1},
    "flow_grpo": {"num_steps": 3, "kl_coef": 0.04},
    "flow_rwr": {"num_steps": 2},
    "granular_grpo": {"num_steps": 4, "strides": [1, 2], "steps": [0]},
    "grpo_guard": {"num_steps": 3},
    "meanflow_nft": {"num_steps": 2},
    "mix_grpo": {"num_steps": 3, "window": 1},
    "opd": {"num_steps": 3, "teacher_guidance": 3.0},
    "pref_grpo": {"num_steps": 3},
    "reda": {"num_steps": 2, "reference": [0.0, 1.0]},
    "reward_gradient": {"num_steps": 2, "mode": "draft", "last_steps": 1},
    "rpo": {"num_steps": 2},
    "srpo": {"num_steps": 2, "positive": ["clean"], "negative": ["noisy"]},
    "tempflow_grpo": {"num_steps": 3, "branches": 2},
}
"""Settings of each method for a short run."""
REWARDS = {"srpo": "shapes_clip"}
"""Where brightness, which every other method gets, does not do."""
KINDS = {
    "window": {"name": "mix_grpo", **METHODS["mix_grpo"]},
    "tree": {"name": "branch_grpo", "num_steps": 3, "splits": [0]},
    "forward process": {"name": "diffusion_nft", **METHODS["diffusion_nft"]},
    "pairs": {"name": "flow_dpo", **METHODS["flow_dpo"]},
    "gradient": {"name": "reward_gradient", **METHODS["reward_gradient"]},
}
"""One method of each kind; that of windows is guided where the weights take guidance."""
OTHERS = {
    "pairs": {"name": "diffusion_dpo", **METHODS["diffusion_dpo"]},
    "gradient": {"name": "reward_gradient", "num_steps": 3, "mode": "refl", "last_steps": 2},
}
"""What half of the pipelines get instead."""


# ------------------------------------------------------------------------------------------------ runs


@functools.cache
def original(name):
    """A tiny pipeline as a model, not to be changed."""
    return models.load(f"tiny/{name}")


@pytest.fixture(scope="module", autouse=True)
def read_once():
    """Every run gets a copy of a pipeline that is read from the disk once, unless it asks for more than its name."""

    def load(path, **options):
        plain = {"family": None, "dtype": torch.float32, "loading": {}, "inference": None}
        if options != plain:
            return models.load(path, **options)
        return copy.deepcopy(original(path.removeprefix(tiny.PREFIX)))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(media, "load", load)
        yield
    original.cache_clear()


@pytest.fixture(scope="module")
def conditions():
    """Conditions of the prompts by (name, guidance): to encode a source picture takes most of a short run."""
    return {}


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    """`prompts(name)`: the prompts of a tiny pipeline, in a file with a picture each where it takes some."""
    folder = tmp_path_factory.mktemp("prompts")

    def write(name):
        model = original(name)
        if not model.num_sources[1]:
            return TEXTS
        rows = [{"prompt": text, "source": picture(folder, name, i, model)} for i, text in enumerate(TEXTS)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(folder / f"{name}.jsonl")

    return write


def picture(folder, name, number, model):
    """The name of a new picture in the folder, of the size that the model makes."""
    pixels = np.random.default_rng(number).integers(0, 256, (model.height, model.width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / f"{name}{number}.png")
    return f"{name}{number}.png"


@pytest.fixture
def run(prompts, tmp_path):
    """`run("wan", {...})`: a Trainer on two prompts with two samples each; what is left open is closed."""
    made = []

    def make(name, changes=None, folder="run", resume=False):
        values = tree(name, tmp_path / folder, {"data.prompts": prompts(name), **(changes or {})})
        made.append(Trainer(make_config(values), resume=resume))
        return made[-1]

    yield make
    for one in made:
        one._let_go()


def tree(name, folder, changes):
    return runs.tree(
        f"tiny/{name}", folder,
        {"data.prompts_per_iteration": 2, "data.samples_per_prompt": 2, "optimizer.ema_decay": None,
         "data.evaluation": {"num_samples": 2, "num_steps": 2, "grid_prompts": 1}, **changes},
    )  # fmt: skip


def numbers(pipe):
    """A copy of every weight and buffer of a pipeline, {component.name: values}."""
    parts = {name: part for name, part in pipe.components.items() if isinstance(part, torch.nn.Module)}
    return {
        f"{name}.{key}": value.detach().clone() for name, part in parts.items()
        for key, value in (*part.named_parameters(), *part.named_buffers())
    }  # fmt: skip


def iterate(trainer):
    """One iteration: its metrics, and the names of what it changed, which is what learns and nothing else."""
    pipe, config = trainer.policy.model.pipe, trainer.config
    before = numbers(pipe)
    plans = plans_of(trainer.algorithm, trainer.actor.times, 0, config.data.samples_per_prompt, config.seed)
    expected = expected_cost(config, trainer.algorithm, plans)
    row = trainer.step(0)
    assert {role: row[f"calls/{role}"] for role in ROLES} == {role: getattr(expected, role) for role in ROLES}
    assert math.isfinite(row["reward/mean"]) and math.isfinite(row["grad_norm"])
    if trainer.algorithm.needs.logprobs:
        assert row["ratio_first_update"] <= 1e-5
    trained = {id(parameter) for parameter in trainer.policy.trainable_parameters()}
    after = numbers(pipe)
    moved = {name for name, value in before.items() if not torch.equal(value, after[name])}
    learns, frozen = set(), []
    for component in trainer.policy.model.components:
        for name, parameter in getattr(pipe, component).named_parameters():
            (learns.add(f"{component}.{name}") if id(parameter) in trained else frozen.append(parameter))
    assert moved <= learns
    assert all(parameter.grad is None for parameter in [*frozen, *pipe.vae.parameters()])
    # The down factors of an adapter have no gradient while the up factors are 0.
    able = {name for name in learns if "lora_A" not in name}
    part = {name.split(".")[0] for name in moved}
    assert moved <= able and len(moved) > sum(name.split(".")[0] in part for name in able) / 2
    return row, moved


# ------------------------------------------------------------------------------------------------ families and methods


@pytest.mark.one_in(6)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", NAMES)
def test_a_family_learns_by_a_method_of_every_kind(name, kind, run, conditions):
    place, number = NAMES.index(name), list(KINDS).index(kind)
    method = OTHERS.get(kind, KINDS[kind]) if place // 2 % 2 else KINDS[kind]
    guidance = allowed(original(name)) if kind == "window" else 1.0
    lora = LORA if (place + number) % 2 else None
    trainer = run(name, {"algorithm": method, "model.lora": lora, "model.guidance": guidance})
    trainer.actor.conditions.known = conditions.setdefault((name, guidance), trainer.actor.conditions.known)
    iterate(trainer)


def allowed(model):
    """More guidance than 1, where these weights take it."""
    try:
        model.check_guidance(GUIDANCE)
    except ModelError:
        return 1.0
    return GUIDANCE


def test_the_settings_are_those_of_all_methods():
    found = {name: algorithm(name) for name in available("flowrl.algorithms")}
    assert set(METHODS) == {name for name, cls in found.items() if cls is not None and not cls().needs.tokens}


def algorithm(name):
    from pydantic import ValidationError

    from flowrl.config import algorithm_class

    try:
        return algorithm_class(name)
    except ValidationError:  # a file of what methods share
        return None


@pytest.mark.one_in(4)
@pytest.mark.parametrize("name", ["wan", "sd15", "flux_kontext", "wan22"])
@pytest.mark.parametrize("method", METHODS)
def test_a_method_trains_any_family(name, method, run):
    lora = (list(METHODS).index(method) + len(name)) % 2
    trainer = run(name, {
        "algorithm": {"name": method, **METHODS[method]}, "model.lora": LORA if lora else None,
        "rewards": [{"use": REWARDS.get(method, "pixel.brightness")}], "data.samples_per_prompt": 4,
        "optimizer.update": "auto",
    })  # fmt: skip
    if method == "meanflow_nft":
        with pytest.raises(ValueError, match=r"solver=average asks for the mean velocity.* knows only"):
            trainer.step(0)
        return
    iterate(trainer)


@pytest.mark.parametrize("name", ["wan", "sd15", "flux_kontext", "wan22"])
def test_a_family_without_a_two_time_network_is_refused_as_one(name, run):
    with pytest.raises(ModelError, match="no two-time network"):
        run(name, {"algorithm": {"name": "meanflow_nft"}, "model.family": "meanflow"})


@pytest.mark.parametrize("step", range(3))
@pytest.mark.parametrize("name", ["wan22", "wan22_i2v"])
def test_a_step_trains_the_expert_of_its_time(name, step, run):
    method = {"name": "flow_grpo", "num_steps": 4, "window": 1, "window_range": [step, step + 1]}
    trainer = run(name, {"algorithm": method, "model.lora": LORA if step % 2 else None})
    model = trainer.policy.model
    early = float(trainer.actor.times[step]) >= model.pipe.config.boundary_ratio
    _, moved = iterate(trainer)
    assert {parameter.split(".")[0] for parameter in moved} == {"transformer" if early else "transformer_2"}


# ------------------------------------------------------------------------------------------------ going on


GOING_ON = {
    "wan22": {"algorithm": {"name": "flow_grpo", "num_steps": 4, "kl_coef": 0.04}, "model.lora": LORA},
    "sd15": {"algorithm": KINDS["window"], "model.guidance": 2.0},
    "flux_kontext": {"algorithm": KINDS["forward process"], "model.lora": LORA},
}


@pytest.mark.parametrize("name", GOING_ON)
def test_a_run_that_goes_on_is_the_same_run(name, run, tmp_path):
    """Two iterations are one and, from its checkpoint, another, to the last bit."""
    changes = {**GOING_ON[name], "optimizer.ema_decay": 0.9, "optimizer.updates_per_iteration": 2}
    run(name, {**changes, "iterations": 2}, "straight").run()
    run(name, {**changes, "iterations": 1}, "stopped").run()
    run(name, {**changes, "iterations": 2}, "stopped", resume=True).run()
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    one, other = (latest_valid(folder / "checkpoints") for folder in (straight, stopped))
    assert one.iteration == other.iteration == 2 and runs.same(one.tensors, other.tensors)
    assert runs.rows(straight) == runs.rows(stopped)
    files = [path.relative_to(straight) for path in straight.glob("weights/**/*.safetensors")]
    assert files and all(runs.digest(straight / file) == runs.digest(stopped / file) for file in files)


# ------------------------------------------------------------------------------------------------ two processes


def test_two_processes_train_two_experts_as_one_does(run, tmp_path):
    """Over gloo, with micro-batches of one state: each of them is one expert's alone."""
    changes = {
        "algorithm": {"name": "flow_grpo", "num_steps": 4, "kl_coef": 0.04, "clip_range": 0.5}, "model.lora": LORA,
        "data.prompts": TEXTS, "optimizer.micro_batch": 1, "optimizer.eps": 1e-3,
        "optimizer.updates_per_iteration": 2,
    }  # fmt: skip
    one = run("wan22", changes, "one")
    start = one.policy.state_dict()
    rows = [one.step(iteration) for iteration in range(2)]
    values = tree("wan22", tmp_path / "two", {**changes, "engine": {"name": "accelerate", "device": "cpu"}})
    job = {"config": values, "iterations": 2, "world": 2, "result": str(tmp_path / "result")}
    (tmp_path / "job.json").write_text(json.dumps(job))
    command = [sys.executable, "-m", "tests.test_families_train", str(tmp_path / "job.json")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    for mine, theirs in zip(rows, json.loads((tmp_path / "result.json").read_text()), strict=True):
        assert theirs["reward/mean"] == pytest.approx(mine["reward/mean"], rel=1e-6)
        assert theirs["grad_norm"] == pytest.approx(mine["grad_norm"], rel=1e-3)
        assert [theirs[f"calls/{role}"] for role in ROLES] == [mine[f"calls/{role}"] for role in ROLES]
    ours, two = one.policy.state_dict(), load_file(tmp_path / "result.safetensors")
    for part in ("transformer", "transformer_2"):
        names = [name for name in ours if name.startswith(f"weights.{part}.")]
        moved = math.sqrt(sum(runs.distance(ours[name], start[name]) ** 2 for name in names))
        apart = math.sqrt(sum(runs.distance(ours[name], two[name]) ** 2 for name in names))
        assert moved > 0 and apart < 1e-3 * moved


def processes(job):
    """Run a job in as many processes as it says, forked here so that the imports are paid for once; 0 = all is well."""
    from diffusers import WanPipeline  # noqa: F401  # an import that is lazy, before the fork

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = []
    for rank in range(job["world"]):
        children.append(os.fork())
        if children[-1] == 0:
            code = 1
            try:
                place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": job["world"], "MASTER_PORT": port}
                os.environ.update({"MASTER_ADDR": "127.0.0.1", **{key: str(value) for key, value in place.items()}})
                one_process(job)
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(code)
    return max(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children)


def one_process(job):
    trainer = Trainer(make_config(job["config"]))
    assert trainer.engine.world == job["world"]
    rows = [trainer.step(iteration) for iteration in range(job["iterations"])]
    if trainer.main:
        Path(job["result"] + ".json").write_text(json.dumps(rows))
        save_file(trainer.policy.state_dict(), job["result"] + ".safetensors")
    trainer.engine.close()
    trainer._let_go()


# ------------------------------------------------------------------------------------------------ what rewards see


WITNESS = """
import json
import numpy as np
import torch
from PIL import Image
from rewards.types import declare


def seen(samples, kind):
    with open({file!r}, "a") as file:
        for sample in samples:
            clip = sample.media if sample.media.ndim == 4 else sample.media[None]
            row = {{"by": kind, "shape": list(sample.media.shape), "fps": sample.fps, "prompt": sample.prompt}}
            row["means"], row["source"] = clip.mean((1, 2, 3)).tolist(), sample.meta.get("source")
            if row["source"]:
                pixels = np.asarray(Image.open(row["source"]).convert("RGB"), dtype=np.float32) / 255
                row["distance"] = (clip[0].detach() - torch.tensor(pixels).permute(2, 0, 1)).abs().mean().item()
            file.write(json.dumps(row) + chr(10))
    return torch.stack([sample.media.mean() for sample in samples])


@declare(media=frozenset({{"video"}}), differentiable=True)
def video(samples):
    return seen(samples, "video")


@declare(differentiable=True)
def image(samples):
    return seen(samples, "image")
"""
"""Rewards that write down what they see."""


@pytest.fixture
def witness(tmp_path):
    """`witness.rewards("video")` and, after a run, `witness.told("video")`."""

    class Witness:
        file, source = tmp_path / "seen.jsonl", tmp_path / "witness.py"

        def reward(self, kind, **options):
            return {"use": f"{self.source}:{kind}", "name": kind, **options}

        def told(self, kind):
            rows = [json.loads(line) for line in self.file.read_text().splitlines()]
            return [row for row in rows if row["by"] == kind]

    made = Witness()
    made.source.write_text(WITNESS.format(file=str(made.file)))
    return made


def test_rewards_see_clips_with_their_speed_and_pictures_some_frames(run, witness):
    rewards = [witness.reward("video"), witness.reward("image", frames=3), {"use": "temporal_consistency"}]
    row = run("wan", {"rewards": rewards, "model.fps": 11.0}).step(0)
    clips, pictures = witness.told("video"), witness.told("image")
    assert [(clip["shape"], clip["fps"]) for clip in clips] == [([5, 3, 32, 32], 11.0)] * 4
    assert [picture["shape"] for picture in pictures] == [[3, 32, 32]] * 3 * 4
    middles = [mean for clip in clips for mean in (clip["means"][0], clip["means"][2], clip["means"][4])]
    found = [picture["means"][0] for picture in pictures]
    assert sorted(found) == pytest.approx(sorted(middles), abs=1e-6)
    assert row["score/image"] == pytest.approx(sum(middles) / len(middles), abs=1e-6)
    assert 0 <= row["score/temporal_consistency"] <= 1


def test_the_config_s_frame_rate_is_that_of_real_rewards(run):
    """The same clips at twice the rate move twice as fast; without a word it is that of the family."""
    rates = {"family": None, "same": 16.0, "twice": 32.0}
    speed = {
        name: run("wan", {"rewards": [{"use": "flow.magnitude"}], "model.fps": rate}, name).step(0)["reward/mean"]
        for name, rate in rates.items()
    }
    assert speed["family"] == speed["same"] > 0
    assert speed["twice"] == pytest.approx(2 * speed["same"], rel=1e-6)


def test_gradients_come_from_whole_clips_too(run, witness):
    trainer = run("wan", {"rewards": [witness.reward("video")], "algorithm": KINDS["gradient"], "model.fps": 11.0})
    iterate(trainer)
    assert {(*row["shape"], row["fps"]) for row in witness.told("video")} == {(5, 3, 32, 32, 11.0)}


@pytest.mark.parametrize("kind", ["window", "gradient"])
def test_rewards_see_the_picture_that_is_edited(run, witness, prompts, kind):
    rewards = [witness.reward("image"), {"use": "similarity.l1"}]
    row = run("flux_kontext", {"rewards": rewards, "algorithm": KINDS[kind]}).step(0)
    told = witness.told("image")
    folder = Path(prompts("flux_kontext")).parent
    sources = dict(zip(TEXTS, [str(folder / f"flux_kontext{i}.png") for i in range(2)], strict=True))
    assert len(told) == 4 and all(one["source"] == sources[one["prompt"]] for one in told)
    expected = -sum(one["distance"] for one in told) / len(told)
    assert row["score/similarity.l1"] == pytest.approx(expected, abs=1e-5)


# ------------------------------------------------------------------------------------------------ memory and speed


SETTINGS = {
    "gradient checkpointing": {"model.gradient_checkpointing": True},
    "text encoders elsewhere": {"model.offload_text_encoders": True},
    "decoding one by one": {"model.decode_micro_batch": 1},
    "rollout one by one": {"model.rollout_micro_batch": 1},
    "update one by one": {"optimizer.micro_batch": 1},
    "update from the rollout's graphs": {"optimizer.update": "single_pass"},
}


@pytest.mark.parametrize("kind", ["window", "gradient"])
@pytest.mark.parametrize("name", ["wan", "flux"])
def test_what_saves_memory_or_time_changes_neither_samples_nor_weights(name, kind, run):
    """Up to rounding, which Adam's first step would show as a whole one unless eps is large beside it."""
    base = {"algorithm": KINDS[kind], "model.guidance": 2.0, "optimizer.eps": 1e-3}
    trainer = run(name, base, "plain")
    start = runs.weights(trainer)
    reward = trainer.step(0)["reward/mean"]
    moved = runs.distance(runs.weights(trainer), start)
    assert moved > 0
    for place, (what, changes) in enumerate(SETTINGS.items()):
        if kind == "gradient" and "optimizer.update" in changes:
            continue  # there are no stochastic steps whose graphs could be kept
        other = run(name, {**base, **changes}, f"run{place}")
        assert other.step(0)["reward/mean"] == pytest.approx(reward, rel=1e-5), what
        assert runs.distance(runs.weights(other), runs.weights(trainer)) < 1e-3 * moved, what


if __name__ == "__main__":
    sys.exit(processes(json.loads(Path(sys.argv[1]).read_text())))
