"""Every command of the command line, and weights that any diffusers pipeline can use."""

import json
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from flowrl.config import load_config
from flowrl.configfile import dump_yaml
from samplers import noise_source
from tests import runs

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
COMMANDS = ("train", "plan", "eval", "sample", "export", "doctor", "config", "shapes", "pairs", "reward", "vlm")


# ------------------------------------------------------------------------------------------------ help


def test_help_answers_at_once():
    """In time on the processor, which a busy machine does not change; and without importing torch."""
    code = (
        "import sys\nfrom flowrl import cli\nsys.argv = ['flowrl', '--help']\ntry:\n    cli.main()\nfinally:\n"
        "    print('heavy:', sorted({'torch', 'numpy', 'pydantic', 'diffusers', 'transformers'} & set(sys.modules)))"
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0 and "heavy: []" in done.stdout
    assert all(name in done.stdout for name in COMMANDS)
    assert (after.ru_utime + after.ru_stime) - (before.ru_utime + before.ru_stime) < 1


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_explains_itself(command, name):
    code, out, _ = command(name, "--help")
    assert code == 0 and "Usage" in out


def test_an_unknown_command_or_option_is_refused(command):
    assert command("trian")[0] == 2
    assert command("doctor", "--quick")[0] == 2


# ------------------------------------------------------------------------------------------------ without a run


def test_a_config_is_checked_and_shown(command, config_file, tmp_path):
    path = config_file()
    code, out, _ = command("config", "check", path)
    assert code == 0 and "ok" in out
    code, out, _ = command("config", "show", path, "optimizer.lr=0.5", "rewards.0.weight=2")
    assert code == 0
    shown = tmp_path / "shown.yaml"
    shown.write_text(out)
    config = load_config(shown)
    assert config == load_config(path, ["optimizer.lr=0.5", "rewards.0.weight=2"])
    assert config.optimizer.lr == 0.5 and config.rewards[0].weight == 2


def test_a_config_of_the_repository_can_be_shown_and_checked(command, monkeypatch):
    """That all of them can be read is the business of test_configs."""
    monkeypatch.chdir(ROOT)
    for word in ("show", "check"):
        code, _, err = command("config", word, "configs/quickstart.yaml")
        assert code == 0, err


def test_a_plan_says_what_a_run_costs_and_starts_nothing(command, config_file, tmp_path):
    code, out, _ = command("plan", config_file({"model.lora": runs.LORA}), "model.guidance=2.0")
    assert code == 0 and not (tmp_path / "run").exists()
    line = " ".join(out.split())
    # 3 prompts x 4 samples, window 2 of 4 steps from a shared start: 3 + 12 * 3 calls, 3 + 12 trained, twice.
    assert (
        "78 rollout + 30 train an iteration" in line and "SS.." in line and "3 x 4 = 12" in line.replace("prompts ", "")
    )
    assert "LoRA" in line and "parameters" in line


def test_doctor(command):
    code, out, _ = command("doctor", "--no-numerics")
    assert code == 0
    assert torch.__version__.split("+")[0] in out and all(word in out for word in ("python", "device", "extra ocr"))


def test_scenes_of_the_built_in_world(command, tmp_path):
    path = tmp_path / "scenes.png"
    code, out, _ = command("shapes", "draw", "a red circle", "two stars", "--output", path)
    assert code == 0 and str(path.name) in out.replace("\n", "")
    red, green, blue = torch.frombuffer(bytearray(Image.open(path).tobytes()), dtype=torch.uint8).view(-1, 3).unbind(1)
    assert ((red > 180) & (green < 90) & (blue < 90)).sum() > 100
    assert command("shapes", "draw", "--output", tmp_path / "all.png")[0] == 0
    assert Image.open(tmp_path / "all.png").size[0] > Image.open(path).size[0]
    code, _, err = command("shapes", "draw", "a purple cow", "--output", path)
    assert code == 2 and "'a purple cow' is no sentence of the built-in world" in err


# ------------------------------------------------------------------------------------------------ with a run


@pytest.fixture(scope="module")
def trained(tiny_model, tmp_path_factory):
    """{kind: folder} of two runs of the command line, far enough from the base model to see it."""
    from flowrl.train import Trainer

    folders = {}
    for kind, lora in (("lora", runs.LORA), ("full", None)):
        folder = tmp_path_factory.mktemp("cli") / kind
        changes = {
            "iterations": 2, "evaluate_every": 2, "model.lora": lora, "optimizer.lr": 3e-2, "model.guidance": 2.0,
            "model.height": 16, "data.evaluation.num_steps": 5,
        }  # fmt: skip
        Trainer(runs.config(tiny_model, folder, changes)).run()
        folders[kind] = folder
    return folders


both_kinds = pytest.mark.parametrize("kind", ["lora", "full"])


def test_train_tells_its_plan_and_its_progress(command, config_file, tmp_path):
    code, out, err = command("train", config_file(), "iterations=2", "evaluate_every=1")
    assert code == 0, err
    assert "denoiser calls" in out and "1/2" in out and "2/2" in out and "evaluation after 2 iterations" in out
    assert "Traceback" not in err and (tmp_path / "run" / "report.html").is_file()


@both_kinds
def test_exported_weights_draw_the_policys_pictures_in_plain_diffusers(trained, tiny_model, kind):
    from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline

    from flowrl.collect import Conditions, sample
    from flowrl.media import geometry_of
    from flowrl.standalone import run_config
    from flowrl.train import Trainer
    from flowrl.types import Prompt

    folder = trained[kind]
    run = Trainer(run_config(folder), resume=True)
    run.lock.release()
    wanted = [Prompt(id=i, text=text) for i, text in enumerate(runs.PROMPTS)]
    geometry = geometry_of(run.config, run.policy.model)
    with run.policy.averaged():
        ours = sample(
            run.policy, wanted, range(3), Conditions(encode=run.policy.encode), geometry,
            num_steps=run.config.data.evaluation.num_steps, seed=5,
        )[:, 0]  # fmt: skip
    shape = run.policy.model.noise_shape(16, 32)
    index = torch.arange(3)
    noise = noise_source(shape, seed=5, iteration=-1, prompt=index)(index, torch.zeros_like(index), -1)

    parts = {"text_encoder_3": None, "tokenizer_3": None}
    base = StableDiffusion3Pipeline.from_pretrained(tiny_model, **parts)
    if kind == "full":
        transformer = SD3Transformer2DModel.from_pretrained(folder / "weights" / "transformer")
        pipe = StableDiffusion3Pipeline.from_pretrained(tiny_model, transformer=transformer, **parts)
    else:
        pipe = StableDiffusion3Pipeline.from_pretrained(tiny_model, **parts)
        pipe.load_lora_weights(folder / "weights")
    settings = json.loads((folder / "weights" / "inference.json").read_text())
    assert (settings["height"], settings["width"], settings["num_inference_steps"]) == (16, 32, 5)
    assert settings["guidance_scale"] == 2.0
    base.set_progress_bar_config(disable=True)
    pipe.set_progress_bar_config(disable=True)
    theirs = pipe(runs.PROMPTS, latents=noise.clone(), output_type="pt", **settings).images
    untrained = base(runs.PROMPTS, latents=noise.clone(), output_type="pt", **settings).images
    assert theirs.shape == ours.shape == (3, 3, 16, 32)
    assert torch.allclose(theirs, ours, atol=1e-4)
    assert (theirs - untrained).abs().max() > 1e-2


@both_kinds
def test_an_evaluation_of_a_run_finds_what_the_run_found(trained, command, kind):
    from rich.console import Console

    from flowrl.standalone import evaluate_run

    folder = trained[kind]
    summary = json.loads((folder / "summary.json").read_text())
    found = evaluate_run(
        folder, num_samples=None, num_steps=None, seed=None, with_base=True, console=Console(quiet=True)
    )
    for side, name in (("base", "base"), ("final", "tuned")):
        expected = summary[side]["scores"]["pixel.brightness"]["mean"]
        assert found[name].scores["pixel.brightness"].mean().item() == pytest.approx(expected, rel=1e-4)
    assert found["base"].scores["pixel.brightness"].mean() != found["tuned"].scores["pixel.brightness"].mean()
    code, out, _ = command("eval", folder, "--num-samples", 3, "--num-steps", 2, "--seed", 3, "--no-base")
    assert code == 0 and "pixel.brightness" in out and "tuned" in out and "base" not in out
    code, out, _ = command("eval", folder, "--num-samples", 3)
    assert code == 0 and "gain" in out and "±" in out


def test_samples_from_a_model_and_from_a_run(trained, tiny_model, command, tmp_path):
    def draw(name, *arguments):
        path = tmp_path / name
        code, _, err = command("sample", "a cat", "a dog", "--output", path, "--count", 2, *arguments)
        assert code == 0, err
        return Image.open(path).tobytes()

    model = draw("model.png", "--model", tiny_model)
    assert draw("again.png", "--model", tiny_model) == model != draw("seed.png", "--model", tiny_model, "--seed", 1)
    assert draw("guided.png", "--model", tiny_model, "--guidance", 5) != model
    run = draw("run.png", "--from", trained["full"])
    assert (
        run == draw("weights.png", "--from", trained["full"] / "weights") != draw("lora.png", "--from", trained["lora"])
    )
    steps = draw("steps.png", "--from", trained["full"], "--num-steps", 2)
    assert steps != run


@both_kinds
def test_the_base_model_may_take_the_last_steps(trained, tiny_model, command, tmp_path, monkeypatch, kind):
    """Weights draw by their own settings: 5 steps, guidance 2, 16 x 32. The copied base model has the same ones."""
    from flowrl import standalone

    base = shutil.copytree(tiny_model, tmp_path / "base")
    shutil.copy(trained[kind] / "weights" / "inference.json", base)
    copies, make = [], standalone.Policy
    monkeypatch.setattr(standalone, "Policy", lambda *a, **k: copies.append(k["reference"]) or make(*a, **k))

    def draw(*arguments):
        path = tmp_path / "grid.png"
        code, _, err = command("sample", "a cat", "a dog", "--output", path, "--count", 2, *arguments)
        assert code == 0, err
        return Image.open(path).tobytes()

    def shared(share):
        return draw("--from", trained[kind], "--tuned-share", share)

    tuned, untrained = draw("--from", trained[kind]), draw("--model", base)
    assert shared(1) == tuned != untrained == shared(0)
    assert shared(0.6) == shared(0.55) not in (tuned, untrained, shared(0.4))  # 3, 2.75 and 2 of 5 steps
    assert shared(0.95) == tuned  # 4.75 of 5 steps
    full = kind == "full"  # only these weights need a second copy, and only where the base model has a step to take
    assert copies == [False, False, False, full, full, full, full, False]


def test_sharing_the_steps_needs_tuned_weights_and_a_share(tiny_model, command, tmp_path):
    code, _, err = command("sample", "a cat", "--model", tiny_model, "--tuned-share", 0.6)
    assert code == 2 and "--tuned-share 0.6" in err and "add --from RUN" in err and "Traceback" not in err
    for share in (-0.1, 1.1):
        code, _, err = command("sample", "a cat", "--from", tmp_path, "--tuned-share", share)
        assert code == 2 and "Invalid value for '--tuned-share'" in err


@both_kinds
def test_an_export_of_a_checkpoint_is_that_of_the_run(trained, command, tmp_path, kind):
    def contents(folder):
        files = [path for path in folder.rglob("*") if path.is_file() and path.suffix != ".md"]
        return {path.relative_to(folder): runs.digest(path) for path in files}

    code, _, err = command("export", trained[kind], "--output", tmp_path / "out")
    assert code == 0, err
    assert contents(tmp_path / "out") == contents(trained[kind] / "weights")
    assert command("export", trained[kind], "--output", tmp_path / "last", "--no-averaged")[0] == 0
    assert contents(tmp_path / "last").keys() == contents(tmp_path / "out").keys()
    assert contents(tmp_path / "last") != contents(tmp_path / "out")


def test_a_run_without_weights_says_how_to_get_them(trained, command, tmp_path):
    unfinished = tmp_path / "unfinished"
    unfinished.mkdir()
    (unfinished / "config.yaml").write_text((trained["full"] / "config.yaml").read_text())
    for arguments in (["eval", unfinished], ["sample", "a cat", "--from", unfinished]):
        code, _, err = command(*arguments)
        assert code == 2 and "has no exported weights" in err and f"flowrl export {unfinished}" in err


@pytest.mark.slow
def test_a_base_model_from_nothing(command, tmp_path):
    """The smallest pretraining there can be gives a pipeline that draws."""
    sizes = ["--steps", 1, "--autoencoder-steps", 1, "--pool", 200]
    code, _, err = command("shapes", "pretrain", "--output", tmp_path / "base", *sizes)
    assert code == 0, err
    code, _, err = command("sample", "a red circle", "--model", tmp_path / "base", "--output", tmp_path / "one.png")
    assert code == 0 and Image.open(tmp_path / "one.png").size[0] > 96, err


def test_a_config_may_come_with_its_base(command, tiny_model, tmp_path):
    (tmp_path / "base.yaml").write_text(dump_yaml(runs.tree(tiny_model, tmp_path / "run")))
    (tmp_path / "child.yaml").write_text("base: base.yaml\noptimizer: {lr: 0.25}\n")
    code, out, _ = command("config", "show", tmp_path / "child.yaml")
    assert code == 0 and "lr: 0.25" in out and "name: mix_grpo" in out
