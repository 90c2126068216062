"""Checkpoints under kill -9, full disks, damage and malice; the optimizer's state; one run a folder."""

import json
import os
import pickle
import resource
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from flowrl import checkpoint, faults
from flowrl.checkpoint import (
    CheckpointError,
    RunLock,
    entries,
    flatten_optimizer,
    latest_valid,
    load,
    restore_optimizer,
)


def tensors(value=1.0):
    return {"w": torch.full((4, 3), value), "half": torch.full((5,), value, dtype=torch.bfloat16), "n": torch.tensor(7)}


def write(folder, iteration, value=None, keep=3):
    return checkpoint.save(
        folder, iteration, tensors(iteration if value is None else value), {"iteration": iteration}, keep
    )


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) and a[k].dtype == b[k].dtype for k in a)


# ------------------------------------------------------------------------------------------------ writing and reading


def test_what_is_saved_comes_back(tmp_path):
    meta = {"iteration": 5, "scores": [0.1 + 0.2, 1e-300], "nested": {"a": None, "b": True}, 2: 1, 10: 2}
    path = checkpoint.save(tmp_path, 5, tensors(0.1), meta)
    found = load(path)
    assert path.name == "000005" and found.iteration == 5
    assert equal(found.tensors, tensors(0.1))
    assert found.meta == json.loads(json.dumps(meta)) and found.meta["scores"] == meta["scores"]
    assert latest_valid(tmp_path).path == path


def test_shared_sliced_and_transposed_tensors_are_saved_as_what_they_are(tmp_path):
    base = torch.arange(12.0).reshape(3, 4)
    given = {"base": base, "same": base, "row": base[1], "turned": base.T, "leaf": base.clone().requires_grad_()}
    found = load(checkpoint.save(tmp_path, 0, given, {})).tensors
    assert all(torch.equal(found[name], given[name]) for name in given)


def test_the_newest_are_kept_and_a_left_history_goes(tmp_path):
    for iteration in (10, 20, 30, 40):
        write(tmp_path, iteration, keep=3)
    assert [p.name for p in entries(tmp_path)] == ["000020", "000030", "000040"]
    write(tmp_path, 25, keep=3)  # resumed from 20
    assert [p.name for p in entries(tmp_path)] == ["000020", "000025"]
    write(tmp_path, 30, keep=1)
    assert [p.name for p in entries(tmp_path)] == ["000030"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["000030"]


def test_an_iteration_can_be_saved_again(tmp_path):
    write(tmp_path, 1, value=1.0)
    write(tmp_path, 1, value=2.0)
    assert equal(latest_valid(tmp_path).tensors, tensors(2.0))
    assert [p.name for p in tmp_path.iterdir()] == ["000001"]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_never_saved(tmp_path, bad):
    write(tmp_path, 1)
    with pytest.raises(CheckpointError, match=r"not finite.*w, half.*optimizer.lr.*--resume"):
        write(tmp_path, 2, value=bad)
    assert [p.name for p in tmp_path.iterdir()] == ["000001"]


def test_metadata_must_be_plain(tmp_path):
    with pytest.raises(CheckpointError, match="plain JSON values.*not JSON serializable"):
        checkpoint.save(tmp_path, 0, {}, {"x": object()})


# ------------------------------------------------------------------------------------------------ kill -9


def killed_while(point, action):
    """Run `action` in a forked child that kills itself at `point`; forking spares it the import of torch."""
    child = os.fork()
    if child == 0:
        try:
            torch.set_num_threads(1)  # a fork does not inherit OpenMP's threads, and would wait for them for ever
            os.environ[faults.VARIABLE] = point
            action()
        finally:
            os._exit(3)  # the point was not reached
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


@pytest.mark.parametrize(
    ("point", "newest"), [("ckpt.after_tensors", 1), ("ckpt.before_rename", 1), ("ckpt.after_rename", 2)]
)
def test_a_kill_at_any_point_leaves_whole_checkpoints(tmp_path, point, newest):
    write(tmp_path, 1)
    assert killed_while(point, lambda: write(tmp_path, 2))
    found = latest_valid(tmp_path)
    assert found.iteration == newest and equal(found.tensors, tensors(newest))
    write(tmp_path, 2)
    assert [p.name for p in sorted(tmp_path.iterdir())] == ["000001", "000002"]
    assert equal(latest_valid(tmp_path).tensors, tensors(2))


def test_a_kill_between_the_two_renames_loses_nothing(tmp_path):
    path = write(tmp_path, 7)
    path.rename(tmp_path / ".old-000007")
    (tmp_path / ".tmp-000007-1").mkdir()
    assert equal(latest_valid(tmp_path).tensors, tensors(7))
    checkpoint.tidy(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["000007"]


def test_a_kill_in_the_first_checkpoint_leaves_none(tmp_path):
    assert killed_while("ckpt.before_rename", lambda: write(tmp_path, 1))
    assert entries(tmp_path) == []
    with pytest.raises(CheckpointError, match="no checkpoint in"):
        latest_valid(tmp_path)


def test_a_fault_can_wait_for_the_nth_time(tmp_path):
    def twice():
        write(tmp_path, 1)
        write(tmp_path, 2)
        write(tmp_path, 3)

    assert killed_while("ckpt.before_rename:2", twice)
    assert latest_valid(tmp_path).iteration == 1
    assert not killed_while("another.point", lambda: write(tmp_path, 1))


# ------------------------------------------------------------------------------------------------ full disks


def test_a_full_disk_is_named_and_harms_nothing(tmp_path):
    """RLIMIT_FSIZE stands in for a full disk: writing beyond it fails with EFBIG."""
    write(tmp_path, 1)
    big = {"w": torch.zeros(100_000)}
    report = tmp_path / "report.txt"

    def fill():
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
        try:
            checkpoint.save(tmp_path / "run", 2, big, {})
        except CheckpointError as error:
            report.write_text(str(error))

    assert not killed_while("none", fill)
    message = report.read_text()
    assert str(tmp_path / "run" / "000002") in message and "File too large (errno 27)" in message
    assert "Free some space" in message and "--resume" in message
    assert list((tmp_path / "run").iterdir()) == []
    assert latest_valid(tmp_path).iteration == 1


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_permission_is_named(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(CheckpointError, match=r"Permission denied \(errno 13\)"):
        write(tmp_path / "run", 1)


def test_a_path_that_is_a_file_is_named(tmp_path):
    (tmp_path / "run").write_text("")
    with pytest.raises(CheckpointError, match="cannot write the checkpoint"):
        write(tmp_path / "run", 1)


def test_an_old_checkpoint_that_cannot_be_removed_is_a_warning(tmp_path, monkeypatch):
    write(tmp_path, 1)

    def refuse(*_args, **_kwargs):
        raise OSError(13, "no")

    with monkeypatch.context() as patch:
        patch.setattr(
            checkpoint.shutil, "rmtree", lambda path, ignore_errors=False: None if ignore_errors else refuse()
        )
        with pytest.warns(UserWarning, match="could not remove the old checkpoint"):
            write(tmp_path, 2, keep=1)
    assert latest_valid(tmp_path).iteration == 2


# ------------------------------------------------------------------------------------------------ damage and malice


class Sentinel:
    """Unpickling it creates a file: the proof that something was unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


def edit(path, change, seal=True):
    """Change a manifest; with `seal` its own hash is made right again, as an attacker would."""
    manifest = json.loads((path / "manifest.json").read_text())
    change(manifest)
    if seal:
        manifest["sha256"] = checkpoint._own_hash(manifest)
    (path / "manifest.json").write_text(json.dumps(manifest))


def flip(path, offset):
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(bytes(data))


def state(path):
    return path / "state.safetensors"


def renamed_to(name):
    return lambda path, outside: edit(path, lambda m: m["files"][0].update(name=name))


def replace_with_pickle(path, outside):
    state(path).write_bytes(pickle.dumps(Sentinel(outside / "sentinel")))
    record = {"bytes": state(path).stat().st_size, "sha256": checkpoint._sha256(state(path))}
    edit(path, lambda m: m["files"][0].update(record))


def add_pickle(path, outside):
    """A file that nobody listed is never opened; the checkpoint stays valid, so damage something else too."""
    (path / ".metadata").write_bytes(pickle.dumps(Sentinel(outside / "sentinel")))
    state(path).unlink()


def link_state(path, outside):
    state(path).rename(outside / "elsewhere")
    state(path).symlink_to(outside / "elsewhere")


def link_folder(path, outside):
    path.rename(outside / "folder")
    path.symlink_to(outside / "folder")


def store_nan(path, outside):
    save_file({"w": torch.tensor([float("nan")])}, state(path))
    record = {"bytes": state(path).stat().st_size, "sha256": checkpoint._sha256(state(path))}
    edit(path, lambda m: m["files"][0].update(record))


DAMAGE = {
    "bit flip in a weight": (lambda p, o: flip(state(p), -3), "sha256 is not that of the manifest"),
    "bit flip in the header": (lambda p, o: flip(state(p), 20), "sha256 is not that of the manifest"),
    "truncated": (lambda p, o: os.truncate(state(p), 100), "100 bytes instead of"),
    "empty": (lambda p, o: os.truncate(state(p), 0), "0 bytes instead of"),
    "missing file": (lambda p, o: state(p).unlink(), "state.safetensors: missing"),
    "missing manifest": (lambda p, o: (p / "manifest.json").unlink(), "manifest.json: missing"),
    "empty manifest": (lambda p, o: os.truncate(p / "manifest.json", 0), "broken JSON"),
    "deep manifest": (lambda p, o: (p / "manifest.json").write_text("[" * 100_000), "broken JSON"),
    "foreign manifest": (lambda p, o: (p / "manifest.json").write_text("{}"), "not a manifest"),
    "edited metadata": (lambda p, o: edit(p, lambda m: m["meta"].update(iteration=9), seal=False), "damaged or edited"),
    "newer format": (lambda p, o: edit(p, lambda m: m.update(format=2)), "format 2, but this version reads format 1"),
    "no file list": (lambda p, o: edit(p, lambda m: m.update(files=None)), "files is missing or of the wrong type"),
    "parent path": (renamed_to("../../etc/passwd"), "'../../etc/passwd' is not a name"),
    "absolute path": (renamed_to("/etc/passwd"), "is not a name"),
    "dots": (renamed_to(".."), "'..' is not a name"),
    "no name": (renamed_to(None), "None is not a name"),
    "linked file": (link_state, "a symbolic link, not a file"),
    "linked folder": (link_folder, "a symbolic link, not a folder"),
    "pickle as weights": (replace_with_pickle, "not a safetensors file"),
    "pickle beside": (add_pickle, "missing"),
    "NaN weights": (store_nan, "not finite (NaN or Inf) in w"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_named_skipped_and_never_run(tmp_path, kind):
    damage, reason = DAMAGE[kind]
    run, outside = tmp_path / "run", tmp_path / "outside"
    outside.mkdir()
    write(run, 1)
    broken = write(run, 2)
    damage(broken, outside)
    with pytest.raises(CheckpointError) as caught:
        load(broken)
    assert reason in str(caught.value) and "000002" in str(caught.value)
    told = []
    assert latest_valid(run, told.append).iteration == 1
    assert len(told) == 1 and reason in told[0] and "Going on from" in told[0]
    with pytest.warns(UserWarning, match="skipped a damaged checkpoint"):
        latest_valid(run)
    assert not (outside / "sentinel").exists()


def test_nothing_valid_is_an_error_that_names_every_one(tmp_path):
    for iteration in (1, 2):
        os.truncate(state(write(tmp_path, iteration)), 10)
    with pytest.raises(CheckpointError) as caught:
        latest_valid(tmp_path)
    for part in ("no checkpoint in", "is valid", "000001", "000002", "another output_dir"):
        assert part in str(caught.value)
    with pytest.raises(CheckpointError, match="start without --resume"):
        latest_valid(tmp_path / "nowhere")


def test_no_load_path_can_unpickle():
    source = Path(checkpoint.__file__).read_text()
    assert not any(word in source for word in ("import pickle", "torch.load(", "eval(", "exec("))


# ------------------------------------------------------------------------------------------------ optimizer


def problem():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))
    groups = [{"params": model[0].parameters()}, {"params": model[2].parameters(), "lr": 3e-3, "weight_decay": 0.0}]
    return model, torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1)


def steps(model, optimizer, numbers):
    for i in numbers:
        x = torch.randn(16, 4, generator=torch.Generator().manual_seed(i))
        optimizer.zero_grad()
        (model(x) - x.sum(1, keepdim=True)).square().mean().backward()
        optimizer.step()


def test_a_restored_optimizer_goes_on_bit_for_bit(tmp_path):
    model, optimizer = problem()
    steps(model, optimizer, range(5))
    flat, meta = flatten_optimizer(optimizer)
    given = {f"o.{k}": v for k, v in flat.items()} | {f"m.{k}": v for k, v in model.state_dict().items()}
    checkpoint.save(tmp_path, 5, given, {"optimizer": meta})
    steps(model, optimizer, range(5, 9))

    again, fresh = problem()
    found = latest_valid(tmp_path)
    again.load_state_dict({k[2:]: v for k, v in found.tensors.items() if k.startswith("m.")})
    restore_optimizer(
        fresh, {k[2:]: v for k, v in found.tensors.items() if k.startswith("o.")}, found.meta["optimizer"]
    )
    assert fresh.param_groups[0]["betas"] == (0.9, 0.95) and fresh.param_groups[1]["lr"] == 3e-3
    steps(again, fresh, range(5, 9))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    before, after = optimizer.state_dict()["state"], fresh.state_dict()["state"]
    assert all(torch.equal(before[i][k], after[i][k]) for i in before for k in before[i])


@pytest.mark.parametrize("cls", [torch.optim.SGD, torch.optim.Adam, torch.optim.RMSprop])
def test_other_optimizers_and_fresh_ones_go_round(cls):
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = cls([weight], lr=0.1)
    for _ in range(2):
        flat, meta = flatten_optimizer(optimizer)
        other = cls([torch.nn.Parameter(torch.ones(3))], lr=9.0)
        restore_optimizer(other, flat, json.loads(json.dumps(meta)))
        assert repr(other.state_dict()) == repr(optimizer.state_dict())
        weight.grad = torch.ones(3)
        optimizer.step()


def test_a_foreign_optimizer_state_is_refused():
    model, optimizer = problem()
    steps(model, optimizer, [0])
    flat, meta = flatten_optimizer(optimizer)
    other = torch.optim.AdamW([torch.nn.Parameter(torch.ones(3))])
    with pytest.raises(CheckpointError, match=r"\[2, 2\] parameters .* this run has \[1\]"):
        restore_optimizer(other, flat, meta)
    shapes = torch.optim.AdamW([{"params": [torch.nn.Parameter(torch.ones(3)) for _ in range(2)]} for _ in range(2)])
    with pytest.raises(CheckpointError, match=r"parameter 0 has shape \[8, 4\], the parameter \[3\]"):
        restore_optimizer(shapes, flat, meta)
    missing = next(iter(flat))
    with pytest.raises(CheckpointError, match=f"{missing} .* is missing"):
        restore_optimizer(optimizer, {k: v for k, v in flat.items() if k != missing}, meta)
    with pytest.raises(CheckpointError, match="cannot be saved without pickle"):
        checkpoint._flatten({"x": print}, "", {})


# ------------------------------------------------------------------------------------------------ one run a folder


def test_a_second_run_is_told_who_has_the_folder(tmp_path):
    ready, go = os.pipe(), os.pipe()
    child = os.fork()
    if child == 0:
        with RunLock(tmp_path / "run"):
            os.write(ready[1], b"x")
            os.read(go[0], 1)
        os._exit(0)
    os.read(ready[0], 1)
    with pytest.raises(CheckpointError) as caught:
        RunLock(tmp_path / "run")
    os.write(go[1], b"x")
    os.waitpid(child, 0)
    for part in (str(tmp_path / "run"), f"process {child} on", "another output_dir"):
        assert part in str(caught.value)
    RunLock(tmp_path / "run").release()


def test_the_lock_of_a_killed_run_is_taken_over(tmp_path):
    child = os.fork()
    if child == 0:
        lock = RunLock(tmp_path)
        os.kill(os.getpid(), signal.SIGKILL)
        lock.release()
    os.waitpid(child, 0)
    assert str(child) in (tmp_path / "run.lock").read_text()
    with RunLock(tmp_path) as lock:
        assert json.loads(lock.path.read_text())["pid"] == os.getpid()
    assert (tmp_path / "run.lock").read_text() == ""


def test_a_lock_of_another_machine_counts(tmp_path):
    (tmp_path / "run.lock").write_text('{"pid": 1, "host": "far-away"}')
    with pytest.raises(CheckpointError, match=r"process 1 on far-away.*if it is dead, remove .*run.lock"):
        RunLock(tmp_path)
    (tmp_path / "run.lock").write_text('{"pid": 1, "ho')  # cut short by a crash
    RunLock(tmp_path).release()


def test_a_folder_with_checkpoints_is_only_entered_to_resume(tmp_path):
    write(tmp_path / "checkpoints", 1)
    with pytest.raises(CheckpointError, match="--resume.*another output_dir"):
        RunLock(tmp_path, resume=False)
    RunLock(tmp_path, resume=True).release()


def test_an_output_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "run").write_text("")
    with pytest.raises(CheckpointError, match="cannot write into output_dir .*run: "):
        RunLock(tmp_path / "run")


def test_saving_needs_no_warning(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        write(tmp_path, 1)
        latest_valid(tmp_path)


def test_the_fault_hook_needs_no_torch():
    code = "import sys, flowrl.faults; flowrl.faults.fault('x'); sys.exit('torch' in sys.modules)"
    env = os.environ | {faults.VARIABLE: "y"}
    assert subprocess.run([sys.executable, "-c", code], env=env, timeout=300).returncode == 0
    env[faults.VARIABLE] = "x"
    assert subprocess.run([sys.executable, "-c", code], env=env, timeout=300).returncode == -signal.SIGKILL
