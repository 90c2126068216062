"""The benchmark of the models: its runs are valid, its floor is the same calls, its tables say what was measured."""

import re
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks import models as bench
from flowrl import comfyui
from flowrl.estimate import Memory
from flowrl.models import families
from flowrl.resolve import resolve

ROOT = Path(__file__).parent.parent
MEMORY = Memory(network=2**31, encoders=0, vae=2**29, training=0, copies=0, activations=0, states=0)
TIMING = bench.Timing(
    seconds={"collect": 2.0, "credit": 0.001, "score": 0.5, "update": 5.0, "iteration": 8.0},
    floor={"collect": 1.6, "update": 4.0}, calls=160, flops=4e12, peak_flops=1e12, peak_memory=None,
    expected_memory=MEMORY, weights=2_240_000_000, learning=9_000_000,
)  # fmt: skip


@pytest.mark.parametrize("small", [False, True])
@pytest.mark.parametrize("size", sorted(bench.SIZES))
def test_every_size_has_a_valid_run(size, small, tmp_path):
    config = bench.config_of(
        bench.SIZES[size], tmp_path, "cpu", small=small, overrides=["optimizer.micro_batch=1", "model.dtype=float32"]
    )
    assert (config.optimizer.micro_batch, config.model.dtype) == (1, "float32")
    assert (config.model.height is None) == small
    assert config.model.lora is not None


def test_the_floor_repeats_every_call_in_its_way():
    network, role = nn.Linear(3, 2), "rollout"
    calls = bench.Calls(network, lambda: role)
    with torch.no_grad():
        for _ in range(3):
            network(torch.ones(4, 3))
    role = "train"
    network(torch.zeros(2, 3))
    role = "reference"
    with torch.no_grad():
        network(torch.ones(4, 3))
    again = []
    network.register_forward_hook(lambda module, inputs, out: again.append((out.requires_grad, len(out))))
    floor = calls.floor(torch.float32, lambda: None)
    assert sorted(again) == [(False, 4)] * 4 + [(True, 2)]
    assert {(phase, graded): n for (phase, graded, _), n in calls.counts.items()} == {
        ("collect", False): 3, ("update", True): 1, ("update", False): 1,
    }  # fmt: skip
    assert 0 < floor["collect"] and 0 < floor["update"]
    assert network.bias.grad.tolist() == [2.0, 2.0]  # of one backward pass through two rows, and of the sum
    assert sum(calls.counts.values()) == 5  # those of the floor are not counted


def test_the_timing_is_told_with_its_floor(tmp_path):
    assert TIMING.mfu == pytest.approx(0.5)
    config = bench.config_of(bench.SIZES["sd35m"], tmp_path, "cpu", small=False)
    text = bench.render_timing("sd35m", config, TIMING)
    assert "| collect | 2 | 1.6 | 1.25 |" in text and "| update | 5 | 4 | 1.25 |" in text
    assert "| score | 0.5 |  |  |" in text and "| iteration | 8 | 5.6 | 1.43 |" in text
    assert "credit" not in text, "less than a hundredth of the iteration"
    assert "2.24B weights, 9M learn" in text and "160 calls of the network, 20 a second" in text
    assert "not measured on this device" in text and "estimates 2.5 GiB" in text
    assert "24.0 GiB" in bench.render_timing("sd35m", config, TIMING._replace(peak_memory=24 * 2**30))


def test_equal_prompts_have_equal_embeddings():
    found = bench._embeddings(["a", "b", "a"], {"prompt_embeds": [5, 3], "pooled": [4]})
    assert found["prompt_embeds"].shape == (3, 5, 3) and found["pooled"].shape == (3, 4)
    assert torch.equal(found["pooled"][0], found["pooled"][2])
    assert not torch.equal(found["prompt_embeds"][0], found["prompt_embeds"][1])


def test_refusals_are_gathered_by_their_reason():
    rows = [
        bench.Agreement("sd3", "native", 0.0, ""), bench.Agreement("sd3", "flex", None, "no effect. Set native."),
        bench.Agreement("flux", "native", 0.0, ""), bench.Agreement("flux", "flex", 2e-7, ""),
        bench.Agreement("sd3", "sage", None, "not installed"), bench.Agreement("flux", "sage", None, "not installed"),
    ]  # fmt: skip
    text = bench.render_agreements(rows)
    head, _, first, second = text.splitlines()[:4]
    names = [cell.strip() for cell in head.strip("|").split("|")]
    assert names[0] == "family" and set(names[1:]) == {"native", "flex"}
    assert dict(zip(names, [c.strip() for c in first.strip("|").split("|")], strict=True)) == {
        "family": "sd3", "native": "0", "flex": "refused",
    }  # fmt: skip
    assert "2.0e-07" in second
    assert text.splitlines()[-2:] == ["- sd3: `flex`: no effect.", "- sd3, flux: `sage`: not installed."]


# ------------------------------------------------------------------------------------------------ the page


def table():
    """{family: the cells behind it} of the page's table: pipelines, what it makes, guidance, sides, frames, sources."""
    page = (ROOT / "docs" / "models.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+)` \|(.+)\|$", page, re.M)
    return {name: [cell.strip() for cell in rest.split("|")] for name, rest in rows}


def test_the_page_names_every_family_with_its_pipelines_and_sources():
    rows = table()
    assert set(rows) == set(families())
    for name, pipelines in families().items():
        family, cells = resolve(name, "flowrl.models"), rows[name]
        assert all(f"`{pipeline}`" in cells[0] for pipeline in pipelines), name
        assert ("videos" in cells[1]) == family.video, name
        fewest, most = family.num_sources
        expected = "" if not most else str(most) if fewest == most else f"{fewest} to {most}"
        assert cells[5] == expected, name
        assert ("classifier-free" in cells[2]) == (bool(family.guidance_argument) or "by the guider" in cells[2]), name
        assert ("/ –" not in cells[2]) == (family.embedded_argument is not None), name
        if family.video:
            assert f"{family.fps:g}" in cells[4], name


def test_the_page_says_which_families_go_to_comfyui():
    page = (ROOT / "docs" / "models.md").read_text(encoding="utf-8")
    assert len(comfyui.LAYOUTS) == 9, "the list on the page has nine networks"
    for absent in ("Sana", "CogVideoX", "HunyuanVideo15"):
        assert not any(kind.startswith(absent) for kind in comfyui.LAYOUTS)
    assert "Sana, CogVideoX and HunyuanVideo 1.5 have no table" in page


# ------------------------------------------------------------------------------------------------ real runs


@pytest.mark.slow
@pytest.mark.parametrize("size", sorted(bench.SIZES))
def test_the_run_of_every_size_works_on_its_tiny_pipeline(size, tmp_path):
    overrides = ["algorithm.num_steps=3", "data.prompts_per_iteration=1", "data.samples_per_prompt=2"]
    chosen = bench.SIZES[size]
    config = bench.config_of(chosen, tmp_path, "cpu", small=True, overrides=overrides)
    found = bench.measure(chosen, config, small=True, iterations=1)
    branches = 2 if config.model.guidance > 1 else 1
    assert found.calls == branches * (2 * 3 + 2 * (2 * 2))  # a rollout of three steps; two trained, and the reference
    assert 0 < found.floor["collect"] < 2 * found.seconds["collect"]
    assert 0 < found.floor["update"] < 2 * found.seconds["update"]
    assert found.flops > 0 and found.mfu > 0 and found.peak_memory is None
    text = bench.render_timing(size, config, found)
    assert "not measured on this device" in text and "| update |" in text and "| iteration |" in text


@pytest.mark.slow
def test_precision_and_batches_have_an_effect_and_kernels_agree():
    exact, coarse = bench.effects("sd3")
    assert exact.against_float32 == 0 < coarse.against_float32 < 0.1
    assert exact.one_by_one < 1e-5 and exact.ratio_one_by_one < 1e-4
    assert coarse.one_by_one > exact.one_by_one
    found = {row.backend: row for row in bench.agreements("flux")}
    assert found["native"].difference == 0
    assert found["_native_math"].difference < 1e-5
    assert found["sage"].difference is None and "sage" in found["sage"].reason
