"""The config: the YAML dialect, bases and overrides, what is refused, and in which words."""

import textwrap
import time

import pytest
import yaml

from flowrl.config import Config, ConfigError, check, diff, dump, identity, load_config, make_config
from flowrl.configfile import parse_yaml
from tests import runs

BASE = """\
name: demo
seed: 7
model: {path: shapes}
algorithm: {name: mix_grpo, num_steps: 10, window: 3, eta: 1.0}
rewards:
  - {use: shapes}
data:
  prompts: shapes
  samples_per_prompt: 8
optimizer:
  lr: 1e-4
  betas: [0.9, 0.95]
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base.yaml").write_text(BASE)
    return tmp_path


def child(folder, text, name="child.yaml", base="base: base.yaml\n"):
    (folder / name).write_text(base + textwrap.dedent(text))
    return name


def problems(path, *overrides):
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    return caught.value.problems


def only(path, *overrides):
    (problem,) = problems(path, *overrides)
    return problem


# ------------------------------------------------------------------------------------------------ the dialect


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("1E4", 1e4),
        ("5e-1", 0.5),
        ("-.5", -0.5),
        ("1.", 1.0),
        ("010", 10),
        ("0o10", 8),
        ("0x1F", 31),
        ("12:30", "12:30"),
        ("1_000", "1_000"),
        ("no", "no"),
        ("on", "on"),
        ("y", "y"),
        ("true", True),
        ("False", False),
        ("null", None),
        ("~", None),
        ("", None),
        ("2024-01-01", "2024-01-01"),
        (".inf", float("inf")),
        ("'1e-4'", "1e-4"),
        ('"true"', "true"),
        ("<<", "<<"),
        ("[1, 2e0]", [1, 2.0]),
        ("{}", {}),
        ("9" * 30, int("9" * 30)),
        ("9" * 500, float("inf")),
    ],
)
def test_scalars_are_those_of_yaml_1_2(text, value):
    found = parse_yaml(f"key: {text}", "t").values["key"]
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("a: 1\nb:\n  c: 1\n  c: 2", ["t:4", "'b.c' stands here for the second time (first in line 3)", "remove one"]),
        ("a: !!python/object/apply:os.system ['touch sentinel']", ["t:1", "tag", "is not allowed", "plain value"]),
        ("a: !!str 5", ["t:1", "tag"]),
        ("a: &x 1\nb: *x", ["t:1", "anchors and aliases are not allowed", "${section.key}"]),
        ("a: {<<: *x}", ["t:1", "anchors and aliases"]),
        ("a: " + "[" * 40 + "]" * 40, ["t:1", "nested deeper than 32"]),
        ("a: " + "[" * 5000, ["t:1", "nested deeper than 32"]),
        ("a: 1\n\tb: 2", ["t:2", "spaces, not tabs"]),
        ("a: b: c", ["t:1", "quote a text that holds ': '"]),
        ("a: 1\n---\nb: 2", ["t:2", "remove the line ---"]),
        ("a: @x", ["t:1", "quote the text"]),
        ("? [1]\n: 2", ["t:1", "a key must be a word"]),
        ("a: [1, 2", ["t:1"]),
        ("a: \x00", ["t: ", "special characters are not allowed"]),
    ],
)
def test_traps_are_refused_by_line(text, parts, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError) as caught:
        parse_yaml(text, "t")
    for part in parts:
        assert part in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_an_alias_bomb_costs_nothing(tmp_path):
    names = "abcdefghi"
    lines = ["a: &a [x, x, x, x, x, x, x, x, x]"]
    lines += [f"{y}: &{y} [{', '.join(['*' + x] * 9)}]" for x, y in zip(names, names[1:], strict=False)]
    (tmp_path / "bomb.yaml").write_text("\n".join(lines))
    start = time.process_time()
    assert "aliases are not allowed" in only(tmp_path / "bomb.yaml")
    assert time.process_time() - start < 1


def test_files_that_are_no_configs(folder):
    (folder / "huge.yaml").write_bytes(b"a: 1\n" * 250_000)
    (folder / "latin.yaml").write_bytes(b"name: x\nseed: \xe9\n")
    (folder / "list.yaml").write_text("- 1\n")
    (folder / "empty.yaml").write_text("# nothing\n")
    assert "larger than 1,000,000 bytes" in only("huge.yaml")
    assert "latin.yaml:2: not UTF-8" in only("latin.yaml")
    assert "not a list" in only("list.yaml")
    assert {line.split(": ")[1] for line in problems("empty.yaml")} == {"name", "model", "algorithm", "rewards", "data"}
    assert "basse.yaml does not exist (did you mean 'base.yaml'" in only("basse.yaml")
    assert "is a folder" in only(".")


def test_windows_files_load(folder):
    (folder / "crlf.yaml").write_bytes(b"\xef\xbb\xbf" + BASE.replace("\n", "\r\n").encode())
    assert load_config("crlf.yaml") == load_config("base.yaml")


# ------------------------------------------------------------------------------------------------ bases and overrides


def test_the_child_wins_over_its_bases(folder):
    (folder / "sub").mkdir()
    child(folder, "optimizer: {lr: 3e-4}\nseed: 1\n", name="sub/fast.yaml", base="base: ../base.yaml\n")
    child(folder, "seed: 2\nmodel: {lora: {rank: 4}}\n", name="lora.yaml", base="")
    child(folder, "name: mine\nrewards: [{use: ocr}]\n", base="base: [sub/fast.yaml, lora.yaml]\n")
    config = load_config("child.yaml")
    assert (config.name, config.seed, config.optimizer.lr, config.optimizer.betas) == ("mine", 2, 3e-4, (0.9, 0.95))
    assert config.model.lora.rank == 4 and [entry.use for entry in config.rewards] == ["ocr"]
    assert config.output_dir == "runs/mine"


def test_another_algorithm_starts_its_section_anew(folder):
    path = child(folder, "algorithm: {name: flow_grpo, kl_coef: 0.1}\n")
    assert load_config(path).algorithm.build().num_steps == 10 and load_config(path).algorithm.build().window is None
    config = load_config("base.yaml", ["algorithm.eta=0.5", "algorithm.name=flow_grpo"])
    assert config.algorithm.build().eta == 0.5 and config.algorithm.build().window is None
    assert load_config("base.yaml", ["algorithm.name=mix_grpo"]).algorithm.build().window == 3


def test_circles_and_missing_bases_are_named(folder):
    child(folder, "", name="a.yaml", base="base: b.yaml\n")
    child(folder, "", name="b.yaml", base="base: [base.yaml, a.yaml]\n")
    assert "circle: a.yaml -> b.yaml -> a.yaml" in only("a.yaml")
    child(folder, "", name="c.yaml", base="base: bsae.yaml\n")
    assert only("c.yaml").endswith("relative paths start at the folder of the file that names it.")
    assert "did you mean 'base.yaml'" in only("c.yaml")
    child(folder, "", name="d.yaml", base="seed: 1\nbase: 3\n")
    assert only("d.yaml").startswith("d.yaml:2: base: expected a file name")


def test_overrides_are_read_as_yaml(folder):
    overrides = [
        "optimizer.lr=1e-5", "name=no", "model.lora={rank: 2}", "model.lora.alpha=8", "rewards.0.weight=2",
        "data.evaluation.num_samples=8", "optimizer.max_grad_norm=null", "log.trackers=[wandb]", "output_dir=a=b",
    ]  # fmt: skip
    config = load_config("base.yaml", overrides)
    assert (config.optimizer.lr, config.name, config.output_dir) == (1e-5, "no", "a=b")
    assert (config.model.lora.rank, config.model.lora.alpha) == (2, 8)
    assert config.rewards[0].weight == 2 and config.data.evaluation.num_samples == 8
    assert config.optimizer.max_grad_norm is None and config.log.trackers == ("wandb",)
    assert [e.use for e in load_config("base.yaml", ["rewards=[{use: ocr}, {use: shapes}]"]).rewards] == [
        "ocr",
        "shapes",
    ]


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("optimizer.lr", ["override 'optimizer.lr'", "expected key=value"]),
        ("=3", ["expected key=value"]),
        ("a..b=3", ["expected key=value"]),
        ("rewards.1.weight=3", ["no rewards.1", "the list has 1 item, numbered from 0", "rewards='[...]'"]),
        ("rewards.x=3", ["no rewards.x"]),
        ("name.x=3", ["name is 'demo', not a section"]),
        ("seed=[1", ["override 'seed=[1'"]),
        ("optimizer.lrr=3", ["override 'optimizer.lrr=3': optimizer.lrr", "unknown key", "'optimizer.lr'"]),
        ("optimizer.lr=fast", ["override 'optimizer.lr=fast'", "'fast' should be a number", "Peak learning rate"]),
        ("base=x.yaml", ["base: unknown key"]),
    ],
)
def test_bad_overrides_are_named(folder, override, parts):
    problem = only("base.yaml", override)
    for part in parts:
        assert part in problem


def test_interpolation(folder):
    path = child(folder, "name: run-${seed}\noutput_dir: out/${name}/${optimizer.lr}\n")
    assert load_config(path, ["seed=9"]).output_dir == "out/run-9/0.0001"
    assert "name: Interpolation key 'sede' not found" in only("base.yaml", "name=${sede}")
    assert "override 'name=${sede}'" in only("base.yaml", "name=${sede}")
    assert "rewards.0.use" in only("base.yaml", "rewards.0.use=${x.y}")
    problem = only("base.yaml", "name=${output_dir}", "output_dir=${name}")
    assert "${section.key} refers to another value" in problem


# ------------------------------------------------------------------------------------------------ messages

MESSAGES = [
    (
        "optimizer: {lrr: 1}",
        ["child.yaml:2: optimizer.lrr: unknown key", "did you mean 'optimizer.lr'?", "weight_decay"],
    ),
    ("lr: 1e-3", ["child.yaml:2: lr: unknown key", "did you mean 'optimizer.lr'?"]),
    ("clip_range: 1e-3", ["clip_range: unknown key", "did you mean 'algorithm.clip_range'?"]),
    ("qqq: 1", ["qqq: unknown key; remove it. A config has: name, seed"]),
    ("algorithm: {clip_rnge: 1}", ["child.yaml:2: algorithm.clip_rnge", "'algorithm.clip_range'", "shift_every"]),
    ("algorithm: {window: x}", ["algorithm.window: 'x' should be a whole number", "Stochastic, trained steps"]),
    (
        "algorithm: {name: mix_gpro}",
        ["algorithm.name: 'mix_gpro' is not known", "did you mean 'mix_grpo'", "./file.py"],
    ),
    ("algorithm: {name: kl}", ["algorithm.name: 'kl' is no algorithm", "Hyperparameters"]),
    ("algorithm: {name: ''}", ["algorithm.name", "at least 1 character"]),
    ("algorithm: {window: 10}", ["algorithm: a window of 10 steps does not fit", "choose window <= 9"]),
    ("model: {lora: {rnk: 4}}", ["model.lora.rnk: unknown key; did you mean 'model.lora.rank'?"]),
    ("model: {dtype: fp16}", ["model.dtype: 'fp16' should be one of 'float32', 'bfloat16'"]),
    ("model: {dtype: bfloat61}", ["did you mean 'bfloat16'"]),
    ("model: {height: 0}", ["model.height: 0 should be greater than or equal to 1 (Pixels"]),
    ("model: {height: 64.5}", ["model.height: 64.5 should be a whole number"]),
    ("model: {family: sd33}", ["model.family: 'sd33' is not known in flowrl.models", "did you mean 'sd3'"]),
    ("engine: 3", ["engine: 3 should be a section of `key: value` lines"]),
    ("engine: {name: acelerate}", ["engine.name: 'acelerate' is not known", "did you mean 'accelerate'"]),
    ("iterations: true", ["iterations: True should be a number, not true or false"]),
    ("iterations: 0", ["iterations: 0 should be greater than or equal to 1"]),
    ("name: 3", ["name: 3 should be text; put it in quotes"]),
    ("name: ../up", ["name: '../up' should match pattern", "letters, digits"]),
    ("optimizer: {lr: .nan}", ["optimizer.lr: nan should be a finite number"]),
    ("optimizer: {betas: [0.9]}", ["optimizer.betas: the list is too short"]),
    ("optimizer: {betas: 0.9}", ["optimizer.betas: 0.9 should be a list"]),
    ("optimizer: {betas: [0.9, 0.9, 0.9]}", ["optimizer.betas", "at most 2 items"]),
    ("optimizer: {ema_decay: 1}", ["optimizer.ema_decay: 1 should be less than 1"]),
    (
        "optimizer: {warmup: 999}",
        ["optimizer.warmup: 999 updates of warm-up", "iterations x updates_per_iteration = 300"],
    ),
    ("optimizer: {min_lr_ratio: 0.1}", ["no effect on a constant schedule"]),
    ("data: {prompts: 3}", ["data.prompts: 3 should be `shapes`, the name of a .txt"]),
    ("data: {prompts: [a, 3]}", ["data.prompts: ['a', 3] should be `shapes`"]),
    ("data: {samples_per_prompt: 1}", ["data.samples_per_prompt: mix_grpo: samples_per_prompt=1", "choose at least 2"]),
    ("data: {evaluation: {num_samples: 4}}", ["a grid of 8 pictures out of num_samples=4"]),
    ("rewards: []", ["rewards: the list is empty", "{use: shapes}"]),
    ("rewards: [{weight: 1}]", ["rewards.0.use: this key is needed", "pixel.jpeg_size"]),
    ("rewards: [{use: shapes, weight: 0}]", ["rewards: every reward has weight 0"]),
    ("rewards: [shapes, {use: shapes}]", ["rewards.0 and rewards.1 are both called 'shapes'", "`name:`"]),
    ("rewards: [{use: shapes, norm: zscore}]", ["rewards.0.norm: 'zscore' should be none, rank, unit"]),
    ("rewards: [{use: shapes, norm: {affine: [1, 0]}}]", ["rewards.0.norm: should be none, rank", "scale > 0"]),
    ("rewards: [{use: shapes, on_error: zero}]", ["rewards.0.on_error: 'zero' should be one of 'nan', 'raise'"]),
    ("rewards: [{use: shapes, gate: {mni: 1}}]", ["rewards.0.gate.mni: unknown key", "'rewards.0.gate.min'"]),
]


@pytest.mark.parametrize(("text", "parts"), MESSAGES, ids=[text for text, _ in MESSAGES])
def test_messages_say_what_where_and_how(folder, text, parts):
    found = "\n".join(problems(child(folder, text)))
    assert found.startswith("child.yaml:2")
    for part in parts:
        assert part in found


def test_all_problems_come_at_once_in_the_order_of_the_file(folder):
    path = child(folder, "lr: 1\nseed: -1\nmodel: {dtype: x}\nalgorithm: {window: x, nope: 1}\n")
    found = problems(path, "optimizer.eps=-1")
    assert [line.split(": ")[1] for line in found[:5]] == [
        "lr",
        "seed",
        "model.dtype",
        "algorithm.window",
        "algorithm.nope",
    ]
    assert found[5].startswith("override 'optimizer.eps=-1': optimizer.eps")
    with pytest.raises(ConfigError, match="6 problems in the config"):
        load_config(path, ["optimizer.eps=-1"])


def test_an_error_in_a_base_names_the_base(folder):
    (folder / "base.yaml").write_text(BASE.replace("seed: 7", "sed: 7"))
    assert only(child(folder, "name: x\n")).startswith("base.yaml:2: sed: unknown key; did you mean 'seed'?")


def test_what_a_custom_algorithm_refuses_is_said_with_its_key(folder):
    (folder / "mine.py").write_text(
        textwrap.dedent("""
        import samplers
        from pydantic import Field
        from flowrl.types import Hyperparameters

        class Mine(Hyperparameters):
            num_steps: int = 4
            eta: float = 0.7
            power: float = Field(default=1.0, gt=0, description="How strong.")

            @property
            def kernel(self):
                return samplers.flow_sde

            def plan(self, times, iteration, samples_per_prompt, seed):
                if iteration > 10:
                    raise ValueError("no steps are left")
                return samplers.all_steps(times)

            def credit(self, batch): ...

            def loss(self, policy, batch): ...
        """)
    )
    (folder / "half.py").write_text((folder / "mine.py").read_text().replace("def credit", "def debit"))
    path = child(folder, "iterations: 5\nalgorithm: {name: ./mine.py, power: 2}\n")
    assert load_config(path).algorithm.build().power == 2.0
    assert "algorithm.power: -1 should be greater than 0 (How strong)" in only(path, "algorithm.power=-1")
    assert "algorithm: ./mine.py: no steps are left" in only(path, "iterations=50")
    assert "algorithm.name: ./half.py has no credit; see flowrl.types" in only(path, "algorithm.name=./half.py")
    assert "'./mien.py' does not exist (did you mean 'mine.py'" in only(path, "algorithm.name=./mien.py")


# ------------------------------------------------------------------------------------------------ check


def test_check_also_reads_prompts_and_builds_rewards(folder):
    assert check("base.yaml") == []
    (folder / "p.jsonl").write_text('{"prompt": "a"}\n{"promt": "b"}\n')
    found = check(
        "base.yaml", ["data.prompts=p.jsonl", "rewards.0.colour=1", "model.path=./shaeps", "log.tensorboard=yes"]
    )
    assert [line.split(": ")[1] for line in found] == ["rewards.0", "data.prompts", "model.path"]
    assert "colour" in found[0] and "p.jsonl:2" in found[1] and "the folder shaeps does not exist" in found[-1]
    assert "did you mean" in check("base.yaml", ["rewards=[{use: shaeps}]"])[0]
    assert "data.balance=colour" in check("base.yaml", ["data.balance=colour"])[0]
    assert check("base.yaml", ["seed=x"]) == problems("base.yaml", "seed=x")


def test_a_good_config_needs_no_device_and_weight_0_is_fine(folder):
    rewards = "rewards=[{use: shapes}, {use: pixel.brightness, weight: 0, device: 'cuda:7'}]"
    assert check("base.yaml", [rewards]) == []


# ------------------------------------------------------------------------------------------------ writing and comparing


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["model.lora={targets: [to_q, no, '1e-4', '12:30']}", "log.trackers=['null']"],
        ["rewards=[{use: shapes, norm: {affine: [1, 2e0]}, gate: {min: 0.3}, level: strict}]", "optimizer.lr=3.3e-7"],
        ["data.prompts=['a \\${sign}', 'back\\\\\\${slash}', \"tab\\there\", '  x: y', 'été 🐈', '# no']"],
        ["data.prompts=['\\${open', 'a\\b', 'a\\\\b $ {x}']"],
    ],
)
def test_a_dumped_config_loads_back(folder, overrides):
    config = load_config("base.yaml", overrides)
    (folder / "dumped.yaml").write_text(dump(config))
    again = load_config("dumped.yaml")
    assert again == config and dump(again) == dump(config)
    assert yaml.safe_load(dump(config))["name"] == "demo"  # other YAML readers understand it as well


def test_a_config_is_frozen_and_complete(folder):
    config = load_config("base.yaml")
    with pytest.raises(ValueError, match="frozen"):
        config.seed = 3
    with pytest.raises(ValueError, match="frozen"):
        config.algorithm.name = "x"
    assert config.algorithm.build().clip_range == 1e-4 and "clip_range: 0.0001" in dump(config)
    assert config.rewards[0].entry()["weight"] == 1.0 and config.rewards[0].options == {}
    assert make_config({**yaml.safe_load(dump(config))}) == config


def test_every_key_is_described():
    def sections(schema):
        yield Config.__name__, schema
        yield from schema["$defs"].items()

    for name, section in sections(Config.model_json_schema()):
        for key, info in section.get("properties", {}).items():
            assert info.get("description") or "$ref" in str(info), f"{name}.{key}"


def test_short_forms_of_rewards(folder):
    a = load_config("base.yaml", ["rewards={shapes: 1, pixel.jpeg_size: 0.5}"]).rewards
    assert [(e.use, e.weight) for e in a] == [("shapes", 1.0), ("pixel.jpeg_size", 0.5)]
    assert [e.use for e in load_config("base.yaml", ["rewards=[shapes, ocr]"]).rewards] == ["shapes", "ocr"]


def test_what_makes_a_run_that_run(folder):
    config = load_config("base.yaml")
    free = [
        "name=x", "output_dir=y", "checkpoint_every=1", "evaluate_every=2", "iterations=999", "optimizer.micro_batch=3",
        "model.decode_micro_batch=1", "engine.name=accelerate", "log.tensorboard=true", "data.evaluation.batch_size=9",
        "rewards.0.device=cpu", "rewards.0.batch_size=1", "model.gradient_checkpointing=true",
    ]  # fmt: skip
    assert diff(config, load_config("base.yaml", free)) == {}
    changed = load_config("base.yaml", ["algorithm.window=2", "seed=8", "rewards.0.level=strict", "optimizer.lr=1e-3",
                                        "data.evaluation.num_samples=9"])  # fmt: skip
    assert diff(config, changed) == {
        "seed": (7, 8),
        "algorithm.window": (3, 2),
        "rewards.0.level": ("(absent)", "strict"),
        "optimizer.lr": (1e-4, 1e-3),
        "data.evaluation.num_samples": (600, 9),  # a before and an after of different samples are no pairs
    }
    cosine = ["optimizer.schedule=cosine"]
    assert diff(load_config("base.yaml", cosine), load_config("base.yaml", [*cosine, "iterations=5"])) == {
        "iterations": (300, 5)
    }
    assert diff(identity(config), config) == {}


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"data.samples": "stored", "algorithm": {"name": "reward_gradient"}}, "data.samples: .*drawn step by step"),
        ({"data.samples": "stored", "algorithm": {"name": "diffusion_art"}}, "data.samples: .*drawn step by step"),
        ({"optimizer.update": "single_pass", "algorithm": {"name": "awm"}}, "optimizer.update: .*stochastic steps"),
        ({"data.together": "twin", "algorithm": {"name": "dgpo"}}, "data.together: .*shared draws"),
        ({"data.samples_per_prompt": 2, "algorithm": {"name": "awm", "inject": 0.5}}, "samples_per_prompt: .*one more"),
        ({"data.replay": {}}, "data.replay: .*models that write"),
        ({"data.on_dead_group": "hint"}, "data.on_dead_group: .*models that write"),
        ({"data.system": "Think."}, "data.system: .*models that write"),
        ({"data.video_frames": 4}, "data.video_frames: .*models that write"),
        ({"model.freeze_vision": False}, "model.freeze_vision: .*models that write"),
    ],
)  # fmt: skip
def test_what_a_method_or_media_cannot_do_is_refused(changes, told):
    with pytest.raises(ConfigError, match=told):
        make_config(runs.tree("shapes", "runs/x", changes))


@pytest.mark.parametrize(
    ("algorithm", "reward", "told"),
    [
        ("reward_gradient", "shapes", "it is not differentiable"),
        ("srpo", "pixel.brightness", "image and text features"),
    ],
)
def test_rewards_that_cannot_be_differentiated_are_found_by_a_check(tmp_path, algorithm, reward, told):
    path = tmp_path / "run.yaml"
    changes = {"algorithm": {"name": algorithm}, "rewards": [{"use": reward}]}
    path.write_text(yaml.safe_dump(runs.tree("shapes", "runs/x", changes)))
    assert any(told in problem for problem in check(path))
