"""Engines: one process or several; never several that look like one."""

import pytest
import torch

from flowrl.engine import EngineError, connect, default_device, raise_together, together
from flowrl.engine.accelerate import Accelerate
from flowrl.engine.local import Local
from flowrl.resolve import ResolveError, available


class Told(Local):
    """An engine of three processes as one of them sees it: what the others say is known beforehand."""

    world = 3

    def __init__(self, rank, others):
        super().__init__("cpu")
        self.rank, self.others, self.said = rank, others, []

    def gather_text(self, text):
        self.said.append(text)
        return [*self.others[: self.rank], text, *self.others[self.rank :]]


def test_one_process_is_its_own_group():
    engine = connect("local", "cpu")
    assert (engine.rank, engine.world, engine.device) == (0, 1, torch.device("cpu"))
    x = torch.rand(3)
    assert torch.equal(engine.sum(x), x) and engine.gather_text("a\nb") == ["a\nb"]
    engine.barrier()
    engine.close()


def test_several_processes_are_never_run_unconnected(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(EngineError, match="2 processes were launched.*engine 'local' joined 1.*engine.name=accelerate"):
        connect("local", "cpu")


def test_a_launcher_of_one_process_is_fine(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert connect("local", "cpu").world == 1


def test_unknown_engines_are_named():
    assert {"local", "accelerate"} <= set(available("flowrl.engine"))
    with pytest.raises(ResolveError, match="did you mean 'accelerate'"):
        connect("accelarate")


def test_an_engine_may_be_a_file_of_the_user_s(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text("from flowrl.engine.local import Local\n\nclass Mine(Local):\n    name = 'mine'\n")
    assert connect(f"{path}:Mine", "cpu").name == "mine"


def test_the_device_of_a_process(monkeypatch):
    assert default_device("cpu") == torch.device("cpu") and default_device("cuda:1") == torch.device("cuda:1")
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    assert default_device() == torch.device("cpu")
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert default_device() == torch.device("cuda:3")


def test_a_failure_of_one_stops_all_with_its_own_message():
    raise_together(Told(0, ["", ""]), None)
    with pytest.raises(EngineError, match="^process 2 failed: RewardError: no GPU left$"):
        raise_together(Told(0, ["", "RewardError: no GPU left"]), None)
    mine = ValueError("mine")
    engine = Told(1, ["KeyError: 'theirs'", ""])
    with pytest.raises(ValueError, match="mine") as raised:
        raise_together(engine, mine)
    assert raised.value is mine and engine.said == ["ValueError: mine"]


def test_a_block_that_all_leave_together():
    engine = Told(0, ["", ""])
    with together(engine):
        pass
    assert engine.said == [""]
    with pytest.raises(KeyError) as raised, together(engine):
        raise KeyError("mine")
    assert raised.value.args == ("mine",) and engine.said[1:] == ["KeyError: 'mine'"]
    reached = []
    with pytest.raises(EngineError, match="process 1 failed: OSError: disk"), together(Told(0, ["OSError: disk", ""])):
        reached.append(True)
    assert reached


def test_accelerate_with_one_process(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    engine = connect("accelerate", "cpu")
    assert isinstance(engine, Accelerate) and (engine.rank, engine.world) == (0, 1)
    assert engine.device == torch.device("cpu")
    x = torch.rand(3, dtype=torch.float64)
    assert torch.equal(engine.sum(x), x) and engine.gather_text("naïve") == ["naïve"]
    engine.barrier()
    engine.close()
