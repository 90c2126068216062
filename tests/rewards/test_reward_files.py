"""Where weights are looked for on the disk, and that nothing but tensors comes out of a checkpoint."""

import os

import pytest
import torch

from rewards import RewardError
from rewards.files import Weights, read_tensors


class Runs:
    """What an attacker puts in a checkpoint: code that runs as soon as it is read."""

    def __init__(self, trace):
        self.trace = trace

    def __reduce__(self):
        return os.mkdir, (str(self.trace),)


@pytest.mark.parametrize("old", [False, True])
def test_a_checkpoint_runs_no_code(tmp_path, old):
    trace, file = tmp_path / "trace", tmp_path / "file.pt"
    torch.save({"weight": torch.ones(2), "more": Runs(trace)}, file, _use_new_zipfile_serialization=not old)
    with pytest.raises(RewardError, match="file.pt is no checkpoint of tensors alone .*asks for code to run"):
        read_tensors(file)
    assert not trace.exists()
    torch.load(file, weights_only=False)
    assert trace.exists(), "the checkpoint of this test is harmless"


# ------------------------------------------------------------------------------------------------ files


@pytest.fixture
def copy(tmp_path):
    """A repository of two files, one of them in a folder."""
    folder = tmp_path / "copy"
    (folder / "step-1").mkdir(parents=True)
    (folder / "step-1" / "model.pth").write_text("weights")
    (folder / "config.json").write_text("{}")
    return Weights(str(folder), ("step-1/model.pth", "config.json"))


def test_files_of_a_folder_are_found_by_their_paths(copy):
    assert copy.file("r") == copy.local / "step-1" / "model.pth"
    assert copy.file("r", "config.json") == copy.local / "config.json"
    with pytest.raises(RewardError, match="'r': .*copy has no step-2/model.pth"):
        copy.file("r", "step-2/model.pth")


def test_a_file_is_the_one_of_its_name_and_the_others_lie_around_it(copy, monkeypatch):
    folder = copy.local
    for given in (folder / "step-1" / "model.pth", folder / "config.json"):
        at = copy.at(str(given))
        assert at.file("r", "step-1/model.pth") == folder / "step-1" / "model.pth"
        assert at.file("r", "config.json").samefile(folder / "config.json")
        assert at.is_here()
    monkeypatch.chdir(folder / "step-1")
    assert copy.at("model.pth").file("r", "config.json").samefile(folder / "config.json")


def test_what_lies_directly_beside_a_file_comes_first(copy):
    flat = copy.local / "step-1" / "config.json"
    flat.write_text("{}")
    assert copy.at(str(flat.parent / "model.pth")).file("r", "config.json") == flat


def test_a_file_of_any_other_name_is_the_first(copy):
    mine = copy.local / "step-1" / "mine.pth"
    mine.write_text("weights")
    assert copy.at(str(mine)).file("r") == mine
    assert copy.at(str(mine)).file("r", "config.json") == copy.local / "config.json"


def test_what_is_not_around_a_file_is_named(copy):
    (copy.local / "config.json").unlink()
    (copy.local.parent / "config.json").write_text("{}")  # of something else
    at = copy.at(str(copy.local / "step-1" / "model.pth"))
    assert not at.is_here()
    with pytest.raises(RewardError, match="model.pth is a file, and around it there is no config.json"):
        at.file("r", "config.json")


def test_whether_all_of_it_is_here(copy, tmp_path):
    assert copy.is_here()
    (copy.local / "step-1" / "model.pth").unlink()
    assert not copy.is_here()
    assert not Weights(str(tmp_path / "none")).is_here()


def test_a_folder_of_unknown_files_is_a_model_only_with_its_config(tmp_path):
    assert not Weights(str(tmp_path)).is_here()
    (tmp_path / "config.json").write_text("{}")
    assert Weights(str(tmp_path)).is_here()
    assert Weights(str(tmp_path / "config.json")).is_here()
