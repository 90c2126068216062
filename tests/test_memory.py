"""What makes a model fit changes where and how weights are kept, not what is trained; and running out of memory."""

import copy
import json

import pytest
import torch

from flowrl import memory
from flowrl.config import ConfigError
from flowrl.memory import cheaper, explained
from flowrl.models.pipeline import ModelError
from tests import runs

pytestmark = pytest.mark.slow

FITTED = {"model.lora": runs.LORA, "model.gradient_checkpointing": True, "iterations": 2}


def small_unet():
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8, block_out_channels=(8, 16), layers_per_block=1, cross_attention_dim=8, attention_head_dim=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
    ).requires_grad_(False)  # fmt: skip


def add_lora(model):
    """Adapters whose both factors are not zero, so that every gradient is there; their parameters."""
    from peft import LoraConfig

    torch.manual_seed(1)
    model.add_adapter(LoraConfig(r=2, lora_alpha=4, target_modules=["to_q", "to_v", "conv1"]))
    learns = {name: p for name, p in model.named_parameters() if "lora_" in name}
    generator = torch.Generator().manual_seed(2)
    for p in learns.values():
        p.data = 0.1 * torch.randn(p.shape, generator=generator)
    return learns


def gradients(model, learns):
    generator = torch.Generator().manual_seed(3)
    x, text = torch.randn(2, 4, 8, 8, generator=generator), torch.randn(2, 5, 8, generator=generator)
    model.train()  # gradient checkpointing is for training only
    out = model(x, torch.tensor([10, 900]), text, return_dict=False)[0]
    return out.detach(), torch.autograd.grad(out.square().sum(), list(learns.values()))


def worst(found, wanted):
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_layerwise_casting_trains_the_rounded_model(checkpointing):
    """The reference: the plain model with those weights rounded once, by hand."""
    cast, plain = small_unet(), small_unet()
    said = memory.cast_layerwise(cast, torch.float32)
    kept = {name: p.dtype for name, p in cast.named_parameters()}
    rounded = [name for name, dtype in kept.items() if dtype == torch.float8_e4m3fn]
    assert len(rounded) > len(kept) // 3 and "float8" in said
    assert all("norm" not in name for name in rounded)
    with torch.no_grad():
        for name, p in plain.named_parameters():
            if name in rounded:
                p.copy_(p.to(torch.float8_e4m3fn).float())
    found = []
    for model in (cast, plain):
        learns = add_lora(model)
        if checkpointing:
            model.enable_gradient_checkpointing()
        found.append(gradients(model, learns))
    assert (found[0][0] - found[1][0]).abs().max() <= 1e-5
    assert worst(found[0][1], found[1][1]) <= 1e-4
    assert {p.dtype for n, p in cast.named_parameters() if "lora_" in n} == {torch.float32}
    assert {n: p.dtype for n, p in cast.named_parameters() if n in rounded and "lora" not in n} != {}


@pytest.mark.parametrize("checkpointing", [False, True])
def test_group_offload_gives_the_gradients_of_the_plain_model(checkpointing):
    away, plain = small_unet(), small_unet()
    assert "saves nothing here" in memory.offload_layers(away, torch.device("cpu"))
    found = []
    for model in (away, plain):
        learns = add_lora(model)
        if checkpointing:
            model.enable_gradient_checkpointing()
        found.append(gradients(model, learns))
    assert torch.equal(found[0][0], found[1][0])
    assert all(torch.equal(a, b) for a, b in zip(found[0][1], found[1][1], strict=True))


def test_only_large_weights_stay_behind_and_copies_come_to_the_device():
    """On the device `meta` nothing is computed, but everything must be there."""
    model, device = small_unet(), torch.device("meta")
    memory.offload_layers(model, device)
    large = [m for m in model.modules() if isinstance(m, torch.nn.Linear | torch.nn.Conv2d)]
    behind = {id(p) for layer in large for p in layer.parameters()}
    for p in (*model.parameters(), *model.buffers()):
        assert p.device.type == ("cpu" if id(p) in behind else "meta")
    assert len(behind) > 50
    x, text = torch.randn(2, 4, 8, 8, device=device), torch.randn(2, 5, 8, device=device)
    assert model(x, torch.tensor([10, 900], device=device), text, return_dict=False)[0].shape == x.shape
    assert all(p.device.type == "cpu" for layer in large for p in layer.parameters())


def test_visitors_come_and_leave_with_their_values():
    module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4)).requires_grad_(False)
    before = copy.deepcopy(module.state_dict())
    visitors = memory.Visitors([module], torch.device("meta"))
    assert visitors.size == sum(t.nbytes for t in before.values())
    visitors.come()
    assert {t.device.type for t in module.state_dict().values()} == {"meta"}
    visitors.come()
    visitors.leave()
    assert runs.same(module.state_dict(), before)
    visitors.leave()
    assert runs.same(module.state_dict(), before)


def test_text_encoders_are_there_to_encode_and_gone_before_the_network_runs(tiny_model, monkeypatch):
    from flowrl.models import load

    model, seen = load(tiny_model), []
    plain = load(tiny_model).encode(["a cat"])
    monkeypatch.setattr(memory.Visitors, "come", lambda self: seen.append("come"))
    monkeypatch.setattr(memory.Visitors, "leave", lambda self: seen.append("leave"))
    for name in ("text_encoder", "text_encoder_2"):
        getattr(model.pipe, name).register_forward_pre_hook(lambda *_, name=name: seen.append(name))
    model.trainable.register_forward_pre_hook(lambda *_: seen.append("network"))
    said = memory.offload_text_encoders(model, torch.device("cpu"))
    assert said.startswith("text_encoder, text_encoder_2: in main memory between prompts")
    assert model.stays == {"text_encoder", "text_encoder_2"}
    cond = model.encode(["a cat"])
    assert all(torch.equal(cond[name], plain[name]) for name in plain)
    assert seen[0] == "come" and "leave" not in seen and "text_encoder" in seen
    seen.clear()
    model.velocity(torch.randn(1, *model.noise_shape(32, 32)), torch.tensor([0.5]), cond)
    assert sorted(seen) == ["leave", "network"]


def test_moving_a_model_leaves_what_is_to_stay(tiny_model):
    from flowrl.models import load

    model = load(tiny_model)
    memory.offload_text_encoders(model, torch.device("cpu"))
    model.to("meta")
    places = {name: next(part.parameters()).device.type for name, part in model.pipe.components.items()
              if isinstance(part, torch.nn.Module)}  # fmt: skip
    assert places == {"transformer": "meta", "vae": "meta", "text_encoder": "cpu", "text_encoder_2": "cpu"}


# ------------------------------------------------------------------------------------------------ whole runs


@pytest.fixture(scope="module")
def plain_run(tiny_model, tmp_path_factory):
    return trained(tiny_model, tmp_path_factory.mktemp("plain"), {})


def trained(model, folder, changes):
    """(weights, metrics) of a short LoRA run."""
    from flowrl.train import Trainer

    run = Trainer(runs.config(model, folder / "run", FITTED | changes))
    run.run()
    return runs.weights(run), runs.rows(folder / "run")


@pytest.mark.parametrize(
    "changes",
    [
        {"model.offload": "group"},
        {"model.offload_text_encoders": True},
        {"model.offload_trajectory": True},
        {"model.offload": "group", "model.offload_text_encoders": True, "model.offload_trajectory": True},
        {"model.offload_trajectory": True, "algorithm": {"name": "diffusion_nft", "num_steps": 4}},
    ],
    ids=lambda changes: "+".join(changes),
)
def test_what_is_kept_elsewhere_trains_the_same(tiny_model, tmp_path, plain_run, changes):
    weights, rows = trained(tiny_model, tmp_path, changes)
    other = {key: value for key, value in changes.items() if not key.startswith("model.")}
    wanted = trained(tiny_model, tmp_path / "plain", other) if other else plain_run
    assert torch.equal(weights, wanted[0])
    assert rows == wanted[1]


def test_layerwise_casting_in_a_run_exports_and_goes_on(tiny_model, tmp_path):
    from diffusers import StableDiffusion3Pipeline

    from flowrl.train import Trainer

    changes = FITTED | {"model.layerwise_casting": True}
    run = Trainer(runs.config(tiny_model, tmp_path / "run", changes))
    assert any("float8" in line for line in run.actor.in_effect)
    run.run()
    assert all(row["ratio_first_update"] <= 1e-5 for row in runs.rows(tmp_path / "run"))
    assert all(row["grad_norm"] > 0 for row in runs.rows(tmp_path / "run"))
    pipe = StableDiffusion3Pipeline.from_pretrained(tiny_model, text_encoder_3=None, tokenizer_3=None)
    pipe.load_lora_weights(str(tmp_path / "run" / "weights"))
    went_on = Trainer(runs.config(tiny_model, tmp_path / "run", changes | {"iterations": 3}), resume=True)
    assert torch.equal(runs.weights(went_on), runs.weights(run))
    went_on.run()
    assert len(runs.rows(tmp_path / "run")) == 3


@pytest.mark.parametrize("method", ["torchao_int8", "torchao_float8"])
def test_a_quantised_base_trains_as_its_rounded_weights_would(tiny_model, tmp_path, method):
    pytest.importorskip("torchao")
    from flowrl.models import load
    from flowrl.policy import Policy

    section = runs.config(tiny_model, tmp_path, FITTED | {"model.quantization": {"transformer": method}}).model
    quantised = load(tiny_model, loading=memory.loading_options(section))
    plain = load(tiny_model)
    rounded = {n: p.dequantize() for n, p in quantised.trainable.named_parameters() if type(p).__name__ != "Parameter"}
    assert len(rounded) > 10
    with torch.no_grad():
        for name, p in plain.trainable.named_parameters():
            if name in rounded:
                p.copy_(rounded[name])
    found = []
    for model in (quantised, plain):
        policy = Policy(model, lora=runs.LORA)
        generator = torch.Generator().manual_seed(0)
        for p in policy.trainable_parameters():
            p.data = 0.1 * torch.randn(p.shape, generator=generator)
        x = torch.randn(2, *model.noise_shape(32, 32), generator=generator)
        v = policy.velocity(x, torch.tensor([0.3, 0.9]), policy.encode(["a cat", "two dogs"]))
        found.append((v.detach(), torch.autograd.grad(v.square().sum(), policy.trainable_parameters())))
    assert (found[0][0] - found[1][0]).abs().max() <= 1e-4
    assert worst(found[0][1], found[1][1]) <= 1e-3
    _, rows = trained(tiny_model, tmp_path, {"model.quantization": {"transformer": method}})
    assert all(row["ratio_first_update"] <= 1e-5 and row["grad_norm"] > 0 for row in rows)
    assert (tmp_path / "run" / "weights" / "pytorch_lora_weights.safetensors").is_file()


# The compiler in C++ takes half a minute.
@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.exhaustive)])
def test_compiled_blocks_compute_the_same(tiny_model, tmp_path, monkeypatch, backend):
    from flowrl.models import load

    torch._dynamo.reset()
    captured, compile_ = [], torch.compile

    def counted(*args, **options):
        captured.append(args)
        return compile_(*args, **{**options, "backend": backend})

    monkeypatch.setattr(torch, "compile", counted)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))  # what a killed run left half-written would be loaded
    model = load(tiny_model)
    x, t = torch.randn(2, *model.noise_shape(32, 32)), torch.tensor([0.3, 0.9])
    cond = model.encode(["a cat", "two dogs"])
    with torch.no_grad():
        plain = model.velocity(x, t, cond)
        try:
            said = memory.compile_blocks(model.trainable, torch.device("cpu"))
        except ModelError as error:
            pytest.skip(str(error))
        assert said == "compiled blocks: 2 of transformer_blocks"
        before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        assert (model.velocity(x, t, cond) - plain).abs().max() <= 1e-5
        assert (
            torch._dynamo.utils.counters["stats"]["unique_graphs"] > before and len(captured) == 3
        )  # one to see if it works
    with pytest.raises(ModelError, match="Linear does not say which of its blocks repeat"):
        memory.compile_blocks(torch.nn.Linear(2, 2), torch.device("cpu"))


# ------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize("method, package", [("bnb_4bit", "bitsandbytes"), ("torchao_int8", "torchao")])
def test_a_missing_package_is_named_with_the_command(make_config, monkeypatch, method, package):
    monkeypatch.setattr(memory, "find_spec", lambda name: None)
    section = make_config(FITTED | {"model.quantization": {"transformer": method}}).model
    with pytest.raises(ModelError, match=rf"transformer: {method} needs the package {package}: pip install .*quant"):
        memory.loading_options(section)


@pytest.mark.skipif(torch.accelerator.is_available(), reason="there is an accelerator")
def test_bitsandbytes_asks_for_an_accelerator(make_config, monkeypatch):
    monkeypatch.setattr(memory, "find_spec", lambda name: True)
    section = make_config(FITTED | {"model.quantization": {"transformer": "bnb_4bit"}}).model
    with pytest.raises(ModelError, match="needs an accelerator, and here is none. Set torchao_int8"):
        memory.loading_options(section)


@pytest.mark.parametrize(
    "changes, text",
    [
        ({"model.quantization": {"transformer": "bnb_4bit"}}, "model.quantization: is for frozen weights.*model.lora"),
        ({"model.offload": "group", "model.gradient_checkpointing": True}, "model.offload: is for frozen weights"),
        ({"model.offload": "group", "model.lora": runs.LORA}, "model.gradient_checkpointing=true"),
        ({"model.layerwise_casting": True, "model.lora": runs.LORA}, "model.gradient_checkpointing=true"),
        (FITTED | {"model.offload": "group", "model.compile": True}, "compiled blocks and offload"),
        (
            FITTED | {"model.layerwise_casting": True, "model.quantization": {"transformer": "torchao_int8"}},
            "weights that are not quantised",
        ),
        (
            {"model.offload_text_encoders": True, "model.quantization": {"text_encoder_3": "torchao_int8"}},
            "text_encoder_3 is quantised and stays",
        ),
    ],
)
def test_combinations_that_cannot_be_meant(make_config, changes, text):
    with pytest.raises(ConfigError, match=text):
        make_config(changes)


def test_quantised_text_encoders_suit_full_training(make_config):
    make_config({"model.quantization": {"text_encoder": "torchao_int8"}})


def test_what_a_model_of_ones_own_cannot_do_is_said():
    class Mine:
        trainable = torch.nn.Linear(2, 2)

    section = runs.config("x", "y", FITTED | {"model.offload": "group"}).model
    with pytest.raises(ModelError, match="Mine is no flowrl.models.base.PipelineModel"):
        memory.fit(Mine(), section, "cpu")


# ------------------------------------------------------------------------------------------------ out of memory


@pytest.mark.parametrize("during", [None, "rollout", "decode", "update", "evaluation", "loading"])
@pytest.mark.parametrize("start", [{}, {"optimizer.update": "auto"}, {"optimizer.update": "single_pass"}, FITTED])
def test_every_cheaper_setting_is_a_config_and_they_come_to_an_end(tmp_path, start, during):
    changes, seen = dict(start), []
    for _ in range(60):
        config = runs.config("x", tmp_path, changes)
        savings = cheaper(config, during)
        for saving in savings:
            runs.config("x", tmp_path, changes | {saving.key: saving.value})
        if not savings:
            break
        seen.append(savings[0].key)
        changes[savings[0].key] = savings[0].value
    assert not savings
    assert seen[-1] == ("model.offload" if changes.get("model.gradient_checkpointing") else "model.lora.rank")


def test_what_costs_least_comes_first(make_config):
    config = make_config({"optimizer.update": "auto"})
    assert [s.key for s in cheaper(config, "rollout")][:2] == ["model.rollout_micro_batch", "optimizer.update"]
    assert [s.key for s in cheaper(config, "decode")][:2] == ["model.decode_micro_batch", "model.decode_tiling"]
    found = {s.key: s.value for s in cheaper(config)}
    assert found["model.rollout_micro_batch"] == len(runs.PROMPTS) * runs.SAMPLES // 2
    keys = list(found)
    assert keys.index("model.gradient_checkpointing") < keys.index("model.dtype") < keys.index("model.lora.rank")
    assert "optimizer.micro_batch" in [s.key for s in cheaper(make_config({}), "update")]


def test_other_errors_pass(make_config):
    with pytest.raises(ZeroDivisionError), explained(make_config({}), "update"):
        raise ZeroDivisionError


def _out_of_memory(*_):
    raise torch.OutOfMemoryError(
        "CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity of 1 MiB."
    )


@pytest.mark.parametrize(
    "during, first", [("rollout", "model.rollout_micro_batch=6"), ("decode", "model.decode_micro_batch=6"),
                      ("update", "optimizer.micro_batch=6")],
)  # fmt: skip
def test_running_out_of_memory_names_the_next_cheaper_setting(trainer, during, first):
    run = trainer({})
    model = run.policy.model

    def in_update(module, inputs):
        if torch.is_grad_enabled():
            _out_of_memory()

    if during == "decode":
        model.pipe.vae.decoder.register_forward_pre_hook(_out_of_memory)
    else:
        model.trainable.register_forward_pre_hook(in_update if during == "update" else _out_of_memory)
    with pytest.raises(memory.OutOfMemory) as caught:
        run.step(0)
    text = str(caught.value)
    assert f"out of memory during {during}: CUDA out of memory. Tried to allocate 20.00 GiB. The run has" in text
    assert f"Next cheaper: {first} (" in text and "model.dtype=float32" in text and "model.lora=null" in text
    assert isinstance(caught.value.__cause__, torch.OutOfMemoryError)


def test_the_command_line_shows_it_without_a_traceback(command, config_file, monkeypatch):
    from flowrl.update import Updater

    monkeypatch.setattr(Updater, "run", _out_of_memory)
    code, _, err = command("train", config_file())
    assert code == 2 and "Traceback" not in err
    assert "OutOfMemory: out of memory during update" in err and "Next cheaper: optimizer.micro_batch=6" in err


def test_the_effective_settings_are_printed(command, config_file):
    code, out, _ = command("train", config_file({"iterations": 1, "model.offload_text_encoders": True}))
    assert code == 0
    assert "attention: native (cpu: " in out and "text_encoder, text_encoder_2: in main memory" in out


def test_a_run_with_another_place_for_its_weights_goes_on(make_config):
    from flowrl.config import diff

    plain = make_config(FITTED)
    moved = make_config(FITTED | {"model.offload": "group", "model.offload_trajectory": True})
    assert diff(plain, moved) == {}
    assert diff(plain, make_config(FITTED | {"model.layerwise_casting": True}))
    assert json.dumps(plain.model_dump(mode="json"))
