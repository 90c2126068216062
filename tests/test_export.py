"""Exports of whole runs, of pictures and of videos: code in their READMEs draws what `flowrl sample` draws."""

import json
import os
import shutil
from typing import get_args, get_type_hints

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from flowrl import cli, comfyui, standalone
from flowrl.collect import Conditions, sample
from flowrl.data import load_prompts
from flowrl.media import geometry_of
from flowrl.models import ModelError
from flowrl.policy import Policy, load_weights
from flowrl.vlm.export import FORMS as TEXT_FORMS
from flowrl.weights import ADAPTER, FORMATS
from rewards.folder import read
from samplers import noise_source
from tests import runs

pytestmark = pytest.mark.slow

MODELS = {"image": "tiny/sd3", "video": "tiny/wan"}
LORA = {"rank": 2, "alpha": 6}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """trained(medium, kind): a run's folder, far enough from the base model to see it."""
    from flowrl.train import Trainer

    made = {}

    def run(medium, kind):
        if (medium, kind) not in made:
            folder = tmp_path_factory.mktemp("export") / f"{medium}_{kind}"
            changes = {
                "iterations": 2, "model.lora": LORA if kind == "lora" else None, "optimizer.lr": 3e-2,
                "model.guidance": 2.0, "data.evaluation.num_steps": 3, "algorithm": runs.MIX | {"num_steps": 3},
            }  # fmt: skip
            Trainer(runs.config(MODELS[medium], folder, changes)).run()
            made[medium, kind] = folder
        return made[medium, kind]

    return run


@pytest.fixture
def drawn(monkeypatch):
    """drawn(...): the media [B,F,3,H,W] that `flowrl sample` draws and then saves, and where it saved them."""

    def draw(**given):
        seen = []
        save = standalone.save_grid
        monkeypatch.setattr(standalone, "save_grid", lambda *a, **k: (seen.append(a[0].media), save(*a, **k)))
        arguments = {"count": 1, "num_steps": None, "guidance": None, "seed": 0, "weights": None, "model": ""}
        path = standalone.sample_grid(["a cat"], **arguments | {"output": None} | given)
        monkeypatch.setattr(standalone, "save_grid", save)
        return seen[0], path

    return draw


def by_readme(folder, monkeypatch):
    """What the code of an export's README has made when it has run: its file and its names."""
    code = (folder / "README.md").read_text().split("```python\n")[1].split("```")[0]
    monkeypatch.chdir(folder.parent)
    names = {}
    exec(code.replace("your prompt", "a cat"), names)
    return names


# ------------------------------------------------------------------------------------------------ runs


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("medium", MODELS)
def test_the_readme_of_each_format_draws_what_sample_draws(trained, drawn, medium, form, tmp_path, monkeypatch):
    run = trained(medium, "lora")
    ours, _ = drawn(weights=run, output=tmp_path / "ours.png")
    base, _ = drawn(model=MODELS[medium], guidance=2.0, num_steps=3, output=tmp_path / "base.png")
    assert (ours - base).abs().max() > 1e-2
    folder = standalone.export_run(run, tmp_path / "out", averaged=True, form=form)
    names = by_readme(folder, monkeypatch)
    assert (tmp_path / ("image.png" if medium == "image" else "video.mp4")).stat().st_size > 0
    pipe, settings = names["pipe"], names["settings"]
    model = standalone.load(MODELS[medium])
    index = torch.zeros(1, dtype=torch.long)
    shape = model.noise_shape(settings["height"], settings["width"], settings.get("num_frames", 1))
    latents = noise_source(shape, seed=0, iteration=-1, prompt=index)(index, index, -1)
    theirs = pipe(prompt="a cat", latents=latents, output_type="pt", return_dict=False, **settings)[0]
    theirs = theirs if medium == "video" else theirs[:, None]
    torch.testing.assert_close(torch.as_tensor(theirs).float(), ours, rtol=0, atol=1e-4)


@pytest.mark.parametrize("medium", MODELS)
def test_the_readme_of_a_run_draws_its_first_evaluation_sample_again(trained, medium, monkeypatch):
    run = trained(medium, "full")
    config = standalone.run_config(run)
    prompts = load_prompts(config.data.eval_prompts or config.data.prompts, "held_out")[:1]
    assert json.dumps(prompts[0].text) in (run / "weights" / "README.md").read_text()
    names = by_readme(run / "weights", monkeypatch)
    again = names["pipe"](
        prompt=prompts[0].text, latents=names["latents"], output_type="pt", return_dict=False, **names["settings"]
    )[0]
    policy = Policy(standalone.load_model(config), frozen=True, guidance=config.model.guidance)
    load_weights(policy, run / "weights")
    (ours,) = sample(
        policy, prompts, [0], Conditions(encode=policy.encode), geometry_of(config, policy.model),
        num_steps=config.data.evaluation.num_steps, seed=config.data.evaluation.seed,
    )  # fmt: skip
    torch.testing.assert_close(torch.as_tensor(again).float().reshape(ours.shape), ours, rtol=0, atol=1e-4)
    if medium == "image":
        assert (read(run / "image.png")[0] - ours[0]).abs().max() < 2 / 255


def test_a_merged_run_is_a_model_of_its_own(trained, drawn, tmp_path):
    """Its folder is a pipeline that knows its settings, with nothing in it about the machine that trained."""
    for kind in ("lora", "full"):
        run = trained("image", kind)
        folder = standalone.export_run(run, tmp_path / kind, averaged=True, form="merged")
        ours, _ = drawn(weights=run, output=tmp_path / "a.png")
        theirs, _ = drawn(model=str(folder), output=tmp_path / "b.png")
        torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-5)
        assert {path.suffix for path in folder.rglob("*") if path.is_file()} <= {".json", ".md", ".safetensors", ".txt"}
        for path in folder.rglob("*.json"):
            assert "name_or_path" not in path.read_text(), path


@pytest.mark.parametrize("form", FORMATS)
def test_all_files_of_an_export_have_the_permissions_that_umask_gives(trained, tmp_path, form):
    """safetensors writes for the owner alone, which a merged pipeline's loader on another account runs into."""
    before = os.umask(0o027)
    try:
        folder = standalone.export_run(trained("image", "lora"), tmp_path / "out", averaged=True, form=form)
    finally:
        os.umask(before)
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert any(path.suffix == ".safetensors" for path in files)
    assert {path.stat().st_mode & 0o777 for path in files} == {0o640}


def test_merging_leaves_the_policy_as_it_was(tmp_path):
    from flowrl.models import load
    from flowrl.policy import Policy

    policy = Policy(load("tiny/sd3"), lora=LORA)
    with torch.no_grad():
        for parameter in policy.trainable_parameters():
            parameter.add_(0.1)
    before = {name: p.clone() for name, p in policy.model.trainable.named_parameters()}
    policy.export(tmp_path / "merged", form="merged")
    after = dict(policy.model.trainable.named_parameters())
    assert before.keys() == after.keys() and all(torch.equal(p, before[name]) for name, p in after.items())
    assert policy.model.pipe.transformer is policy.model.trainable


def test_peft_loads_its_format(trained, tmp_path):
    """As PEFT has it: a model around the transformer, of equal velocities, with the alpha of the training."""
    from diffusers import SD3Transformer2DModel
    from peft import PeftModel

    from flowrl.models import load
    from flowrl.policy import load_weights

    run = trained("image", "lora")
    folder = standalone.export_run(run, tmp_path / "peft", averaged=True, form="peft")
    ours, plain = load("tiny/sd3"), load("tiny/sd3")
    load_weights(ours, run / "weights")
    assert isinstance(plain.trainable, SD3Transformer2DModel)
    plain.trainable = PeftModel.from_pretrained(plain.trainable, folder)
    assert plain.trainable.peft_config["default"].lora_alpha == LORA["alpha"]
    x, t, cond = torch.randn(2, *ours.noise_shape(32, 32)), torch.tensor([0.3, 0.8]), ours.encode(["a cat", "b"])
    with torch.no_grad():
        torch.testing.assert_close(plain.velocity(x, t, cond), ours.velocity(x, t, cond), rtol=0, atol=1e-5)
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["r"] == 2 and config["lora_alpha"] == 6 and config["base_model_name_or_path"] is None


@pytest.mark.parametrize("form", ["peft", "comfyui"])
def test_what_reads_back_and_what_does_not(trained, tmp_path, form):
    from flowrl.models import load
    from flowrl.policy import load_weights

    folder = standalone.export_run(trained("image", "lora"), tmp_path / "out", averaged=True, form=form)
    with pytest.raises(ModelError, match="an export of format diffusers or merged"):
        load_weights(load("tiny/sd3"), folder)


def test_a_network_without_a_pipeline_of_its_own_has_one_format(trainer, tmp_path):
    """Average velocities: diffusers could load a merged folder, and would draw nonsense."""
    algorithm = {"name": "meanflow_nft", "num_steps": 2, "draws_per_sample": 2, "decay": 0.5}
    run = trainer({"model.family": "meanflow", "algorithm": algorithm})
    for form in ("peft", "comfyui", "merged"):
        with pytest.raises(ModelError, match="only flowrl reads its weights back. Take format diffusers"):
            run.policy.export(tmp_path / form, form=form)
        assert not (tmp_path / form).exists()


# ------------------------------------------------------------------------------------------------ the command line


def test_the_commands_export_and_sample(trained, command, tmp_path, monkeypatch):
    run = shutil.copytree(trained("video", "lora"), tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    code, out, err = command("export", run, "--format", "comfyui")
    assert code == 0 and "run/export_comfyui" in out.replace("\n", ""), err
    assert (run / "export_comfyui" / "comfyui_lora.safetensors").is_file()
    assert command("export", run, "--format", "onnx")[0] == 2
    code, out, err = command("sample", "a cat", "--from", run, "--count", 1)
    assert code == 0 and "sample.mp4" in out, err
    clip, fps = read(tmp_path / "sample.mp4")
    assert len(clip) == standalone.load("tiny/wan").frames and fps == 16
    assert command("sample", "a cat", "--from", run, "--count", 1, "--output", "still.png")[0] == 0
    with Image.open("still.png") as still:
        assert still.n_frames == len(clip)
    full = trained("image", "full")
    code, _, err = command("export", full, "--format", "peft", "--output", tmp_path / "out")
    assert code == 2 and "format peft is for LoRA adapters" in err and "Traceback" not in err
    assert not (tmp_path / "out").exists()
    code, _, err = command("sample", "a cat", "--from", full, "--output", "x.mp4")
    assert code == 2 and "makes pictures. Or name a .png" in err
    code, _, err = command("sample", "a cat", "--from", full, "--source", "x.png")
    assert code == 2 and "takes 0 source pictures, and 1 are given" in err


def test_the_command_line_knows_the_formats():
    """It spells them out itself, because it imports nothing heavy before a command runs."""
    known, nothing = get_args(get_type_hints(cli.export)["form"])
    assert nothing is type(None)
    assert set(get_args(known)) == {*FORMATS, *TEXT_FORMS}


def test_a_model_that_begins_with_a_picture_is_given_one(command, tmp_path):
    Image.new("RGB", (16, 16), "red").save(tmp_path / "first.png")
    arguments = ["sample", "a cat", "--model", "tiny/wan_i2v", "--count", 1, "--output", tmp_path / "clip.mp4"]
    code, _, err = command(*arguments)
    assert code == 2 and "takes 1 source pictures, and 0 are given: --source PICTURE" in err
    code, _, err = command(*arguments, "--source", tmp_path / "first.png")
    assert code == 0 and len(read(tmp_path / "clip.mp4")[0]) > 1, err


# ------------------------------------------------------------------------------------------------ ComfyUI's names


def adapted_network(network, targets, seed=0):
    """Adapters with random factors on a network, and the change of each of its layers' weights, by PEFT."""
    from peft import LoraConfig

    generator = torch.Generator().manual_seed(seed)
    network.add_adapter(LoraConfig(r=2, lora_alpha=6, target_modules=targets), adapter_name=ADAPTER)
    deltas, factors = {}, {}
    for name, layer in network.named_modules():
        if hasattr(layer, "lora_A"):
            down = torch.randn(layer.lora_A[ADAPTER].weight.shape, generator=generator)
            up = torch.randn(layer.lora_B[ADAPTER].weight.shape, generator=generator)
            factors[name], deltas[name] = (down, up), 3.0 * up @ down
    return factors, deltas


def dense(stored, name):
    """The change of a weight that a file says: alpha / r B A, where without alpha it is r."""
    down, up = stored[f"{name}.lora_A.weight"], stored[f"{name}.lora_B.weight"]
    return stored.get(f"{name}.alpha", torch.tensor(float(len(down)))) / len(down) * up @ down


def hunyuan(**changed):
    from diffusers import HunyuanVideoTransformer3DModel

    sizes = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 1, "num_single_layers": 1,
             "num_refiner_layers": 1, "text_embed_dim": 16, "pooled_projection_dim": 16, "mlp_ratio": 4.0}  # fmt: skip
    with torch.device("meta"):
        return HunyuanVideoTransformer3DModel(**sizes | changed)


def test_layers_that_are_one_in_comfyui_are_fused():
    """Each fused weight changes by the layers' own changes under each other; by zeros where a layer has none."""
    network = hunyuan()
    factors, deltas = adapted_network(network, ["to_q", "to_v", "add_k_proj", "to_out.0", "0.proj_out"])
    stored = comfyui.tensors(network, factors, ADAPTER)
    block, single, refiner = (
        f"{name}.0" for name in ("transformer_blocks", "single_transformer_blocks", "context_embedder.token_refiner."
                                 "refiner_blocks")
    )  # fmt: skip
    none = torch.zeros(16, 16)
    expected = {
        "double_blocks.0.img_attn_qkv": [deltas[f"{block}.attn.to_q"], none, deltas[f"{block}.attn.to_v"]],
        "double_blocks.0.txt_attn_qkv": [none, deltas[f"{block}.attn.add_k_proj"], none],
        "double_blocks.0.img_attn_proj": [deltas[f"{block}.attn.to_out.0"]],
        "single_blocks.0.linear1": [
            deltas[f"{single}.attn.to_q"], none, deltas[f"{single}.attn.to_v"], torch.zeros(64, 16),
        ],
        "single_blocks.0.linear2": [deltas[f"{single}.proj_out"]],
        "txt_in.individual_token_refiner.blocks.0.self_attn_qkv": [
            deltas[f"{refiner}.attn.to_q"], none, deltas[f"{refiner}.attn.to_v"],
        ],
        "txt_in.individual_token_refiner.blocks.0.self_attn_proj": [deltas[f"{refiner}.attn.to_out.0"]],
    }  # fmt: skip
    assert {key.removeprefix("transformer.").partition(".lora")[0] for key in stored} == set(expected)
    for name, parts in expected.items():
        torch.testing.assert_close(dense(stored, f"transformer.{name}"), torch.cat(parts))
    assert len(stored["transformer.double_blocks.0.img_attn_qkv.lora_A.weight"]) == 2 * 2  # the ranks add up


def test_diffusers_reads_hunyuanvideo_s_blocks():
    """Its importer knows one width only, 3072, and takes the refiner's adapters apart wrongly: these are left out."""
    from diffusers import HunyuanVideoPipeline

    network = hunyuan(num_attention_heads=24, attention_head_dim=128)
    targets = (
        r"(single_)?transformer_blocks\.0\.(attn\.(to_[qkv]|add_[qkv]_proj|to_out\.0|to_add_out)|proj_mlp|proj_out)"
    )
    factors, _ = adapted_network(network, targets)
    stored = comfyui.tensors(network, factors, ADAPTER)
    read_back = HunyuanVideoPipeline.lora_state_dict(dict(stored))
    assert {key.removeprefix("transformer.").partition(".lora")[0] for key in read_back} == set(factors)
    for name, (down, up) in factors.items():
        theirs = [read_back[f"transformer.{name}.lora_{f}.weight"] for f in "AB"]
        x = torch.randn(down.shape[1])
        torch.testing.assert_close(theirs[1] @ (theirs[0] @ x), 3.0 * up @ (down @ x), rtol=1e-4, atol=1e-3)


def test_layers_without_a_name_there_are_refused():
    network = hunyuan()
    factors, _ = adapted_network(network, ["norm_out.linear"])
    with pytest.raises(
        ModelError, match="adapter of .*norm_out.linear has no name in the table of Hunyuan.*lora.targets"
    ):
        comfyui.tensors(network, factors, ADAPTER)


def test_alpha_is_a_key_of_each_layer_where_the_importer_takes_it(trained, tmp_path):
    folder = standalone.export_run(trained("video", "lora"), tmp_path / "out", averaged=True, form="comfyui")
    stored = load_file(folder / "comfyui_lora.safetensors")
    layers = {key.removesuffix(".lora_A.weight") for key in stored if key.endswith(".lora_A.weight")}
    assert layers and all(float(stored[f"{layer}.alpha"]) == LORA["alpha"] for layer in layers)
    assert {"diffusion_model.blocks.0.self_attn.q", "diffusion_model.blocks.0.cross_attn.o"} <= layers
    with safe_open(folder / "comfyui_lora.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
