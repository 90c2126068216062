"""Networks of transformers, read while other threads compute: what they see of it, and what becomes of the weights."""

import json
import sys
import threading
import time

import pytest
import torch

from rewards import build
from rewards.files import READING, Weights
from tests.rewards.test_reward_conformance import own
from tests.rewards.test_reward_vqascore import build_t5, build_vicuna

pytestmark = pytest.mark.slow

LOADED = ["pickscore", "blip.itm", "image_sim", "vqascore", "suder", "hpsv3", "videoreward", "imagereward", "geneval"]


@pytest.fixture
def seen_elsewhere():
    """The default dtypes that another thread sees, which looks all the time."""
    seen, done = set(), threading.Event()

    def look():
        while not done.is_set():
            seen.add(torch.get_default_dtype())
            seen.add(torch.zeros(1).dtype)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    watcher = threading.Thread(target=look)
    watcher.start()
    yield seen
    done.set()
    watcher.join()
    sys.setswitchinterval(interval)


@pytest.mark.parametrize("name", LOADED)
def test_a_load_leaves_the_default_dtype_alone(name, seen_elsewhere, tmp_path):
    """It belongs to the whole process: a tensor that a lane or the policy makes meanwhile would be bfloat16 too."""
    reward = build(name, own(name, "tiny")(tmp_path))
    seen_elsewhere.clear()
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        reward.load(torch.device("cpu"), dtype)
    assert seen_elsewhere == {torch.float32}


def test_nor_does_a_config_that_names_a_dtype(seen_elsewhere, tmp_path):
    """As those of the hub do."""
    options = own("hpsv3", "tiny")(tmp_path)
    path = tmp_path / "base" / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "torch_dtype": "bfloat16"}))
    seen_elsewhere.clear()
    build("hpsv3", options).load(torch.device("cpu"), torch.float32)
    assert seen_elsewhere == {torch.float32}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("make", [build_t5, build_vicuna], ids=["t5", "vicuna"])
def test_weights_are_those_that_transformers_reads_in_that_precision(make, dtype, tmp_path):
    """T5 keeps some in fp32 where others are fp16, which would overflow; rotary frequencies are never rounded."""
    from transformers import InstructBlipForConditionalGeneration as Kind

    make(tmp_path)
    ours = Weights(str(tmp_path)).network("test", Kind, dtype)
    theirs = Kind.from_pretrained(tmp_path, dtype=dtype)
    for kind in ("named_parameters", "named_buffers"):
        expected = dict(getattr(theirs, kind)())
        found = dict(getattr(ours, kind)())
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            assert found[name].dtype == value.dtype and torch.equal(found[name], value), name
    assert len({value.dtype for value in ours.parameters()}) == (2 if dtype == torch.float16 else 1)


def test_networks_are_read_one_at_a_time(tmp_path):
    """transformers exchanges its own `tie_weights` meanwhile: two at once can leave it exchanged for good."""
    folder = own("blip.itm", "tiny")(tmp_path)["model"]
    from transformers import BlipForImageTextRetrieval

    done = threading.Event()
    args = ("test", BlipForImageTextRetrieval, torch.float32)
    thread = threading.Thread(target=lambda: (Weights(str(folder)).network(*args), done.set()))
    with READING:
        thread.start()
        time.sleep(0.3)
        assert not done.is_set()
    thread.join()
    assert done.is_set()
