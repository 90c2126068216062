"""`flowrl plan`'s arithmetic: what a real forward pass keeps, closed forms, and the published sizes without weights."""

import json
import shutil

import pytest
import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

from benchmarks.models import SIZES
from flowrl import estimate, tiny
from flowrl.models import load
from flowrl.numerics import stand_ins
from flowrl.policy import Policy
from tests import runs

pytestmark = pytest.mark.slow

LORA = {"rank": 4, "alpha": 8}
T5 = {
    "d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64, "feed_forward_proj": "gated-gelu",
    "is_gated_act": True, "dense_act_fn": "gelu_new",
}  # fmt: skip
WORDS = {"vocab_size": 49408}
CLIP_L = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
CLIP_G = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20}
ENCODERS = {
    "sd35m": {
        "text_encoder": CLIP_L | WORDS | {"projection_dim": 768},
        "text_encoder_2": CLIP_G | WORDS | {"projection_dim": 1280},
        "text_encoder_3": T5 | {"vocab_size": 32128},
    },
    "flux": {"text_encoder": CLIP_L | WORDS | {"projection_dim": 768}, "text_encoder_2": T5 | {"vocab_size": 32128}},
    "wan13b": {"text_encoder": T5 | {"vocab_size": 256384}},
}  # fmt: skip
"""What the published configuration files of the text encoders say."""


def sketched(path, lora=None, **options):
    """The model of a path without weights, with what learns set by a policy."""
    from flowrl.config import make_config

    values = runs.tree(path, "nowhere", {"model.path": str(path)} | {f"model.{n}": v for n, v in options.items()})
    model = estimate.sketch(make_config(values))
    return model, Policy(model, lora=lora)


def walked(path, lora=None, **options):
    model, _ = sketched(path, lora, **options)
    return estimate.walk(model, model.height, model.width, model.frames)


def kept_by_a_real_pass(name, lora):
    """Numbers in the storages that autograd keeps of a forward pass with weights, on the CPU."""
    model = load(f"tiny/{name}")
    Policy(model, lora=lora)
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.trainable.parameters()}
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    cond = model.encode(["a picture"], stand_ins(model))
    here = {key: tensor for key, tensor in cond.items() if not key.startswith("negative_")}
    x = torch.zeros(1, *model.noise_shape(model.height, model.width, model.frames))
    with saved_tensors_hooks(keep, lambda tensor: tensor):
        model.predict(x, torch.full((1,), 0.5), here)
    return sum(t.untyped_storage().nbytes() for storage, t in kept.items() if storage not in weights) / 4


@pytest.mark.parametrize("lora", [None, LORA], ids=["full", "lora"])
@pytest.mark.parametrize("name", ["sd3", "flux", "wan22", "qwen_image", "sd15"])
def test_a_walk_keeps_what_a_real_pass_keeps(name, lora):
    """Up to masks and a few scalars."""
    assert walked(f"tiny/{name}", lora).saved == pytest.approx(kept_by_a_real_pass(name, lora), rel=0.02)


def test_operations_are_those_of_the_layers():
    """Two a weight and row of every linear layer, and 4 S^2 D of every attention over S tokens."""
    model = load("tiny/flux")
    counted = []

    def count(layer, inputs, output):
        counted.append(2 * layer.weight.numel() * output[..., 0].numel())

    handles = [m.register_forward_hook(count) for m in model.trainable.modules() if isinstance(m, nn.Linear)]
    cond = {key: tensor for key, tensor in model.encode(["a"]).items() if not key.startswith("negative_")}
    x = torch.zeros(1, *model.noise_shape(model.height, model.width))
    with torch.no_grad():
        model.predict(x, torch.full((1,), 0.5), cond)
    for handle in handles:
        handle.remove()
    config = model.pipe.transformer.config
    tokens = model.num_tokens(model.height, model.width) + cond["prompt_embeds"].shape[1]
    width = config.num_attention_heads * config.attention_head_dim
    attention = 4 * tokens**2 * width * (config.num_layers + config.num_single_layers)
    found = walked("tiny/flux")
    assert found.forward == sum(counted) + attention
    assert 1.9 < found.backward / found.forward <= 2  # the first layers need no gradient of their inputs
    with_lora = walked("tiny/flux", LORA)
    assert with_lora.forward > found.forward  # the adapters themselves
    assert with_lora.backward < 0.8 * found.backward  # frozen weights have no gradient


def test_checkpointing_keeps_the_inputs_of_every_block():
    """Blocks more are tokens more, of the width of the network, and nothing else."""
    from diffusers import SD3Transformer2DModel

    def with_layers(count):
        model, _ = sketched("tiny/sd3")
        with torch.device("meta"):
            transformer = SD3Transformer2DModel.from_config({**model.pipe.transformer.config, "num_layers": count})
        model.pipe.transformer = model.trainable = transformer
        return model, estimate.walk(model, model.height, model.width, 1)

    (model, few), (_, many) = with_layers(3), with_layers(7)
    config = model.pipe.transformer.config
    tokens = model.num_tokens(model.height, model.width) + model.encode_text(["a"], ())["prompt_embeds"].shape[1]
    assert many.checkpointed - few.checkpointed == 4 * tokens * config.num_attention_heads * config.attention_head_dim
    assert few.checkpointed < few.saved


@pytest.mark.parametrize("name", sorted(tiny.names()))
def test_every_family_can_be_walked(name):
    found = walked(f"tiny/{name}", LORA)
    assert 0 < found.forward and 0 < found.backward <= 2 * found.forward
    assert 0 < found.checkpointed <= found.saved


# ------------------------------------------------------------------------------------------------ published sizes


def published(size, folder):
    """The configuration files of a published model in a folder: everything but the weights."""
    source = tiny.folder(SIZES[size].tiny)
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    (folder / "inference.json").unlink()
    index = json.loads((folder / "model_index.json").read_text())
    for part, values in SIZES[size].parts.items():
        index[part] = ["diffusers", values["_class_name"]]
        name = "scheduler_config.json" if part == "scheduler" else "config.json"
        (folder / part / name).write_text(json.dumps(dict(values)))
    for part, values in ENCODERS[size].items():
        file = folder / part / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | values))
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


@pytest.mark.parametrize(
    ("size", "billions"),
    [
        ("sd35m", 2.24),
        *(pytest.param(*size, marks=pytest.mark.exhaustive) for size in (("flux", 11.9), ("wan13b", 1.42))),
    ],
)
def test_a_plan_of_a_published_size_needs_no_weights(size, billions, tmp_path, capsys):
    from typer.testing import CliRunner

    from flowrl import cli
    from flowrl.configfile import dump_yaml

    folder = published(size, tmp_path / "model")
    assert not list(folder.rglob("*.safetensors"))
    changes = {"model.path": str(folder), "model.lora": {"rank": 32}, "model.dtype": "bfloat16"}
    changes |= {key: value for key, value in SIZES[size].run.items()}
    file = tmp_path / "plan.yaml"
    file.write_text(dump_yaml(runs.tree(folder, tmp_path / "run", changes)))
    model, policy = sketched(folder, LORA)
    weights = sum(p.numel() for p in model.trainable.parameters()) - policy.num_trainable
    assert weights / 1e9 == pytest.approx(billions, rel=0.03)

    result = CliRunner().invoke(cli.app, ["plan", str(file), "--memory", "4", "--tflops", "400"])
    assert result.exit_code == 0, result.output
    assert "cannot be walked" not in result.output
    (line,) = [line for line in result.output.splitlines() if line.startswith("memory, estimated")]
    network = float(line.split("network ")[1].split(",")[0])
    assert network == pytest.approx(weights * 2 / 2**30, rel=0.03)
    assert "more than 4 GiB" in result.output and "model.layerwise_casting" in result.output
    assert not (tmp_path / "run").exists()
