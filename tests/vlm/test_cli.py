"""The commands for models that write: `flowrl vlm`, and those that work for both kinds."""

import json
import shlex
import sys
from pathlib import Path

import pytest
import torch

from flowrl.configfile import dump_yaml
from tests import runs
from tests.vlm.conftest import LONGEST, LORA

pytestmark = pytest.mark.slow

GRADER = '''
"""Right for every second answer or so; counts its calls, and stops at a call as Ctrl-C does."""

from pathlib import Path

HERE = Path(__file__).parent


def half(response, answer, prompt):
    calls = HERE / "calls"
    number = int(calls.read_text()) if calls.is_file() else 0
    calls.write_text(str(number + 1))
    stop = HERE / "stop"
    if stop.is_file() and number == int(stop.read_text()):
        raise KeyboardInterrupt
    if prompt == "a":
        return None
    return float(sum(map(ord, response)) % 2)
'''


@pytest.fixture(scope="module")
def trained(vlm_tree, tmp_path_factory):
    """Folders of two runs of two iterations, by what they trained."""
    from flowrl.config import make_config
    from flowrl.train import Trainer

    folders = {}
    for kind, lora in (("full", None), ("lora", LORA)):
        folders[kind] = tmp_path_factory.mktemp("runs") / kind
        changes = {
            "iterations": 2, "evaluate_every": 2, "model.lora": lora, "data.evaluation.num_samples": 6,
            "data.system": "Look.", "optimizer": {"lr": 1e-3, "ema_decay": 0.5},
        }  # fmt: skip
        Trainer(make_config(vlm_tree(folders[kind], changes))).run()
    return folders


@pytest.fixture
def config(vlm_tree, tmp_path):
    """`config({"seed": 3})`: the path of a YAML config."""

    def make(changes=None, name="config.yaml"):
        path = tmp_path / name
        path.write_text(dump_yaml(vlm_tree(tmp_path / "run", changes)))
        return path

    return make


both = pytest.mark.parametrize("kind", ["full", "lora"])


# ------------------------------------------------------------------------------------------------ grading


@pytest.fixture
def grading(config, home, tmp_path):
    """A folder with the grader, and a config that asks it."""
    (tmp_path / "grader.py").write_text(GRADER)
    return config({"rewards": [{"use": f"{tmp_path}/grader.py:half"}], "generation.batch_size": 4})


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_grades_are_written_beside_the_rows(command, grading, home, tmp_path):
    code, out, err = command("vlm", "grade", grading, "-o", tmp_path / "new" / "graded.jsonl", "--answers", 4)
    assert code == 0, err
    rows, before = rows_of(tmp_path / "new" / "graded.jsonl"), rows_of(home / "questions.jsonl")
    assert [row["prompt"] for row in rows] == [row["prompt"] for row in before]
    graded = [row for row in rows if row["prompt"] != "a"]
    assert len(graded) == 5 and all("pass_rate" not in row for row in rows if row not in graded)
    for row in graded:
        assert row["answers"] == 4 and row["pass_rate"] == row["right"] / 4 == 1 - row["difficulty"]
        assert row["pass@1"] == row["pass_rate"] and row["mean_reward"] == row["pass_rate"]
    assert len({row["pass_rate"] for row in graded}) > 1
    for right in range(5):
        count = sum(row["right"] == right for row in graded)
        assert any(line.split()[:2] == [str(right), str(count)] for line in out.splitlines())
    assert "without a verdict: 1" in out and "odd: 2 questions" in out and "even: 3 questions" in out
    # The pictures are found from the new file, and the rows can be trained on by their difficulty.
    code, _, err = command("config", "check", grading, f"data.prompts={tmp_path}/new/graded.jsonl")
    assert code == 0, err
    from flowrl.vlm.data import load_questions, pictures

    old, new = (load_questions(path) for path in (home / "questions.jsonl", tmp_path / "new" / "graded.jsonl"))
    assert [[p.tobytes() for p in pictures(q)] for q in old] == [[p.tobytes() for p in pictures(q)] for q in new]


def test_graded_questions_have_a_curriculum(command, grading, tmp_path):
    graded = tmp_path / "graded.jsonl"
    plain = "rewards=[{use: verifiers.exact, weight: 1}]"
    assert command("vlm", "grade", grading, "-o", graded, "--answers", 2, plain)[0] == 0
    code, _, err = command("config", "check", grading, f"data.prompts={graded}", "data.curriculum=easy_first")
    assert code == 0, err


def test_a_warm_up_matters_to_no_grades(command, grading, tmp_path):
    assert "warm-up" in command("config", "check", grading, "optimizer.warmup=50")[2]
    asked = ["-o", tmp_path / "graded.jsonl", "--answers", 1, "optimizer.warmup=50"]
    code, _, err = command("vlm", "grade", grading, *asked)
    assert code == 0, err


def test_grading_goes_on_after_a_stop(command, grading, tmp_path):
    calls, target = tmp_path / "calls", tmp_path / "graded.jsonl"
    assert command("vlm", "grade", grading, "-o", tmp_path / "whole.jsonl", "--answers", 4)[0] == 0
    assert int(calls.read_text()) == 24
    calls.unlink()
    (tmp_path / "stop").write_text("9")  # in the third question
    assert command("vlm", "grade", grading, "-o", target, "--answers", 4)[0] != 0
    assert not target.exists()
    part = tmp_path / "graded.jsonl.part"
    assert len(rows_of(part)) == 3  # what it was asked, and two questions
    with part.open("a") as file:
        file.write('{"question": 2, "rewards": [1.0, ')  # torn off
    (tmp_path / "stop").unlink()
    calls.unlink()
    code, _, err = command("vlm", "grade", grading, "-o", target, "--answers", 5)
    assert code == 2 and "answers: 4 then, 5 now" in err
    code, _, err = command("vlm", "grade", grading, "-o", target, "--answers", 4)
    assert code == 0, err
    assert int(calls.read_text()) == 16
    assert target.read_bytes() == (tmp_path / "whole.jsonl").read_bytes() and not part.exists()
    code, _, err = command("vlm", "grade", grading, "-o", target, "--answers", 4)
    assert code == 2 and "is there already" in err


@both
def test_a_runs_weights_grade_too(command, grading, trained, tmp_path, kind):
    lora = "null" if kind == "full" else json.dumps(LORA)
    for name, more in (("base", []), ("tuned", ["--from", trained[kind]])):
        target = tmp_path / f"{name}.jsonl"
        code, _, err = command("vlm", "grade", grading, "-o", target, "--answers", 8, *more, f"model.lora={lora}")
        assert code == 0, err
    rates = [[row.get("pass_rate") for row in rows_of(tmp_path / f"{name}.jsonl")] for name in ("base", "tuned")]
    assert rates[0] != rates[1]


def test_a_config_of_pictures_is_not_graded(command, config_file, tmp_path):
    code, _, err = command("vlm", "grade", config_file(), "-o", tmp_path / "graded.jsonl")
    assert code == 2 and "trains a model that draws" in err


# ------------------------------------------------------------------------------------------------ asking


def generated(folder, question, picture, system=None):
    """What transformers' own generate says with the likeliest tokens."""
    from PIL import Image
    from transformers import AutoModelForImageTextToText, AutoProcessor

    from flowrl.vlm.model import ImageTextModel

    processor = AutoProcessor.from_pretrained(folder)
    network = AutoModelForImageTextToText.from_pretrained(folder)
    content = [{"type": "image", "image": Image.open(picture)}, {"type": "text", "text": question}]
    talk = [{"role": "user", "content": content}]
    if system:
        talk = [{"role": "system", "content": [{"type": "text", "text": system}]}, *talk]
    inputs = processor.apply_chat_template(
        talk, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    banned = ImageTextModel.load(folder).banned.tolist()
    ids = network.generate(**inputs, max_new_tokens=LONGEST, do_sample=False, suppress_tokens=banned)
    return processor.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def test_an_answer_is_that_of_transformers(command, model, home):
    picture = home / "1-0.png"
    folder = model("llava")
    code, out, err = command("vlm", "ask", folder, "how many?", picture, "--max-new-tokens", LONGEST)
    assert code == 0, err
    assert out.rstrip("\n") == generated(folder, "how many?", picture).rstrip("\n")
    assert command("vlm", "ask", folder, "how many?", home / "none.png")[0] == 2


@both
def test_a_run_is_asked_as_it_was_trained(command, trained, home, model, kind):
    run, picture = trained[kind], home / "1-0.png"
    code, _, err = command("export", run, "--format", "full")
    assert code == 0, err
    said = generated(run / "export_full", "how many?", picture, system="Look.")
    code, out, err = command("vlm", "ask", model("llava"), "how many?", picture, "--from", run)
    assert code == 0, err
    assert out.rstrip("\n") == said.rstrip("\n")
    assert said != generated(run / "export_full", "how many?", picture)


@both
def test_a_run_is_asked_on_its_own_model_alone(command, trained, home, model, kind, tmp_path):
    run, picture = trained[kind], home / "1-0.png"
    code, out, err = command("vlm", "ask", "tiny/llava", "how many?", picture, "--from", run)
    assert code == 2 and not out
    assert f"was trained on '{model('llava')}'" in err and "'tiny/llava' is named" in err
    told = err[err.index("flowrl vlm ask") :]
    code, out, err = command(*shlex.split(told)[1:])
    assert code == 0 and out, err
    same = tmp_path / "link"  # another name of the same folder
    same.symlink_to(model("llava"))
    code, again, err = command("vlm", "ask", same, "how many?", picture, "--from", run)
    assert code == 0 and again == out, err


def test_words_that_a_model_does_not_know_are_told(command):
    from flowrl.shapes.questions import questions

    picture = Path(__file__).parents[2] / "configs/prompts/questions/pictures/color_0.png"
    asked = ["vlm", "ask", "shapes_vlm", "--max-new-tokens", 4]
    code, out, err = command(*asked, "<image> What color is the square?", picture)
    assert code == 0 and "shapes_vlm does not know 'What', 'square?', and reads each as <unk>" in err
    listed = err[err.index("It knows") :].split(": ", 1)[1].split()
    assert f"It knows {len(listed)} words" in err and "warning" not in out
    assert not {"<unk>", "<image>", "<user>"} & {*listed}
    known = {word for question in questions("train", count=300) for word in question.text.split()}
    assert known <= {*listed}
    code, _, err = command(*asked, "what color is the square ?", picture)
    assert code == 0 and not err


def test_a_tokenizer_without_a_token_for_unknown_words_has_none(command, model, home):
    code, _, err = command("vlm", "ask", model("qwen2_vl"), "Zürich 東京?", home / "1-0.png", "--max-new-tokens", 2)
    assert code == 0 and "does not know" not in err


def test_tools_can_be_asked_for(command, model, home):
    path = model("llava")
    code, _, err = command("vlm", "ask", path, "how many?", home / "1-0.png", "--tool", "zoom", "--max-new-tokens", 4)
    assert code == 0, err
    code, _, err = command("vlm", "ask", path, "how many?", home / "1-0.png", "--tool", "zoon", "--max-new-tokens", 4)
    assert code == 2 and "zoom" in err


# ------------------------------------------------------------------------------------------------ runs


@both
def test_an_evaluation_of_a_run_finds_what_the_run_found(trained, command, kind):
    from rich.console import Console

    from flowrl.standalone import evaluate_run

    folder = trained[kind]
    summary = json.loads((folder / "summary.json").read_text())
    found = evaluate_run(folder, num_samples=None, num_steps=None, seed=None, with_base=True, console=Console())
    for name, part in (("base", "base"), ("tuned", "final")):
        for score, entry in summary[part]["scores"].items():
            assert found[name].scores[score].nanmean().item() == pytest.approx(entry["mean"], abs=1e-6), (name, score)
    assert found["base"].texts != found["tuned"].texts
    code, out, _ = command("eval", folder, "--num-samples", 3, "--seed", 3, "--no-base")
    assert code == 0 and "accuracy" in out
    for more in (["--num-steps", 3], ["--guide", "latent=1"]):
        code, _, err = command("eval", folder, *more)
        assert code == 2 and "which takes no steps" in err


@both
def test_an_export_of_a_checkpoint_is_that_of_the_run(trained, command, tmp_path, kind):
    files = {"full": "model.safetensors", "lora": "adapter_model.safetensors"}
    code, out, err = command("export", trained[kind], "--output", tmp_path / "out")
    assert code == 0, err
    wanted = runs.digest(trained[kind] / "weights" / files[kind])
    assert runs.digest(tmp_path / "out" / files[kind]) == wanted
    assert command("export", trained[kind], "--output", tmp_path / "last", "--no-averaged")[0] == 0
    assert runs.digest(tmp_path / "last" / files[kind]) != wanted


@both
def test_exported_weights_may_be_read_by_whom_umask_lets(trained, tmp_path, kind):
    probe = tmp_path / "probe"
    probe.touch()
    modes = {path.name: path.stat().st_mode for path in (trained[kind] / "weights").iterdir() if path.is_file()}
    assert modes.keys() & {"model.safetensors", "adapter_model.safetensors"}
    assert {*modes.values()} == {probe.stat().st_mode}


def test_only_formats_of_such_a_model_are_written(trained, command):
    for kind, form, known in (
        ("lora", "comfyui", "peft or full"),
        ("full", "peft", "full"),
        ("full", "merged", "full"),
    ):
        code, _, err = command("export", trained[kind], "--format", form)
        assert code == 2 and f"Take --format {known}." in err


def test_what_is_about_pictures_says_so(trained, command, config, tmp_path):
    run = trained["lora"]
    for arguments in (["a cat", "--from", run], ["a cat", "--model", "tiny/llava"]):
        code, _, err = command("sample", *arguments, "--output", tmp_path / "x.png")
        assert code == 2 and "flowrl vlm ask" in err
    for arguments in (["pairs", "make"], ["reward", "train-latent"]):
        where = ["--output", tmp_path / "o"] if arguments[0] == "reward" else [tmp_path / "o"]
        code, _, err = command(*arguments, config(), *where)
        assert code == 2 and "this command is about pictures" in err


def test_packages_that_a_verifier_does_without_are_noted(command, config, monkeypatch):
    path = config({"rewards": [{"use": "verifiers.math"}]})
    monkeypatch.setitem(sys.modules, "math_verify", None)  # as if it were not installed
    code, out, _ = command("config", "check", path)
    assert code == 0 and "verifiers.math" in out and 'pip install -e ".[vlm]"' in out


# ------------------------------------------------------------------------------------------------ plans


def test_a_plan_says_what_a_run_costs_and_starts_nothing(command, config, tmp_path):
    path = config({"model.lora": LORA})
    code, out, err = command("plan", path, "--tflops", 1, "--memory", 1e-5)
    assert code == 0, err
    assert "12 answers an iteration" in out and "memory, estimated" in out and "work, estimated" in out
    assert "generation.batch_size=6" in out and "rollout_micro_batch" not in out and "offload" not in out
    assert not (tmp_path / "run").exists()


def test_a_plan_of_a_model_that_is_not_here_names_it(command, config):
    code, _, err = command("plan", config(), "model.path=nobody/no-such-model")
    assert code == 2 and "model 'nobody/no-such-model' cannot be read" in err and "hf download" in err


@pytest.mark.parametrize("name", ["llava", "qwen2_vl"])
@pytest.mark.parametrize("lora", [None, LORA], ids=["full", "lora"])
def test_the_estimate_is_that_of_a_real_pass(config, vlm_tree, tmp_path, name, lora):
    """What learns, the cache, operations and kept numbers of a pass with weights on the CPU."""
    from torch.autograd.graph import saved_tensors_hooks
    from torch.utils.flop_counter import FlopCounterMode

    from flowrl.config import make_config
    from flowrl.standalone import actor_of
    from flowrl.vlm import estimate

    loaded = make_config(vlm_tree(tmp_path, {"model.lora": lora}, name))
    sketched, lengths = estimate.sketch(loaded)
    actor = actor_of(loaded)
    actor.load()
    assert sketched.num_trainable == actor.policy.num_trainable
    asked = [actor.writer.inputs(prompt) for prompt in actor.prompts[:4]]
    assert lengths.prompt == round(sum(len(inputs.ids) for inputs in asked) / 4) and lengths.answer == LONGEST
    walked = estimate.walk(sketched.model, 20)
    network = actor.policy.model.trainable
    x = torch.randn(1, 20, network.get_output_embeddings().weight.shape[1], requires_grad=True)
    kept, weights = {}, {p.untyped_storage().data_ptr() for p in network.parameters()}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with FlopCounterMode(display=False) as counter, saved_tensors_hooks(keep, lambda tensor: tensor):
        out = network.get_decoder()(inputs_embeds=x, use_cache=True, return_dict=True)
        network.get_output_embeddings()(out.last_hidden_state)
    assert walked.forward == pytest.approx(counter.get_total_flops(), rel=0.05)
    numbers = sum(t.untyped_storage().nbytes() for s, t in kept.items() if s not in weights) / 4
    assert walked.saved == pytest.approx(numbers, rel=0.35)
    memory = estimate.memory(loaded, sketched, lengths, walked, 1)
    cached = sum(layer.keys.numel() + layer.values.numel() for layer in out.past_key_values.layers) / 20
    assert memory.cache == 12 * (lengths.prompt + lengths.answer) * cached * 4


def test_answers_that_others_are_compared_with_are_written_too(vlm_tree, tmp_path):
    """Of three questions each: the likeliest answer, or five to shuffled frames, after one reading of the question."""
    from flowrl.config import make_config
    from flowrl.vlm import estimate

    work = {}
    for name, more in (("grpo", {}), ("remax", {}), ("t_grpo", {"shuffled": 5})):
        config = make_config(vlm_tree(tmp_path / name, {"algorithm": {"name": name, **more}}))
        policy, lengths = estimate.sketch(config)
        walked = estimate.walk(policy.model, lengths.prompt + lengths.answer)
        prompt = estimate.walk(policy.model, lengths.prompt)
        work[name] = estimate.operations(config, policy, lengths, walked, prompt)
    seeing = 2 * lengths.patches * sum(p.numel() for p in policy.model.trainable.get_encoder("image").parameters())
    answer = walked.forward - prompt.forward
    assert work["remax"] - work["grpo"] == pytest.approx(3 * (prompt.forward + seeing + answer))
    assert work["t_grpo"] - work["grpo"] == pytest.approx(3 * (prompt.forward + seeing + 5 * answer))


def test_the_vision_tower_counts_by_patches(vlm_tree, tmp_path):
    from flowrl.config import make_config
    from flowrl.standalone import actor_of
    from flowrl.vlm import estimate

    config = make_config(vlm_tree(tmp_path, {}, "llava"))
    _, lengths = estimate.sketch(config)
    actor = actor_of(config)
    actor.load()
    vision = actor.policy.model.trainable.config.vision_config
    pictures = sum(len(prompt.metadata["images"]) for prompt in actor.prompts[:4])
    assert lengths.patches == pictures * (vision.image_size // vision.patch_size) ** 2 / 4


# ------------------------------------------------------------------------------------------------ help


def test_the_built_in_model_that_writes_has_settings_of_its_own(command, tmp_path):
    code, _, err = command("shapes", "pretrain", "--vlm", "--video", "--output", tmp_path / "x")
    assert code == 2 and "--vlm" in err and not (tmp_path / "x").exists()


@pytest.mark.parametrize("name", ["ask", "grade"])
def test_the_commands_explain_themselves(command, name):
    code, out, _ = command("vlm", name, "--help")
    assert code == 0 and "Usage" in out
