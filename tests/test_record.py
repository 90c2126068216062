"""Single-pass updates: the gradient of a second forward pass without making one, and no memory that stays behind."""

import weakref

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from flowrl.config import ConfigError
from flowrl.models import load
from flowrl.policy import Policy
from flowrl.record import Recorder, _measured, free_memory
from flowrl.types import take
from tests import runs, threaded

pytestmark = pytest.mark.slow

GUARD = {"name": "grpo_guard", "num_steps": 4, "eta": 0.7, "clip_range": 1e-2, "adv_std": "group"}
FLOW = {**runs.FLOW, "kl_coef": 0.0}
BRANCH = {"name": "branch_grpo", "num_steps": 4, "splits": [0, 1], "split_noise": 1.5, "eta": 0.5, "clip_range": 1e-2}
ONE_STEP = {"num_steps": 4, "steps": [0, 1, 2], "eta": 0.7, "clip_range": 1e-2}
OPD = {"name": "opd", "num_steps": 4, "eta": 0.7, "teacher_guidance": 2.0}
LORA = {"model.lora": runs.LORA}
METHODS = {
    "all steps": {"algorithm": FLOW},
    "window": {"algorithm": {**FLOW, "window": 2, "window_range": [0, 3]}},
    "shared noise": {"algorithm": {**runs.MIX, "shared_noise": True}},
    "shortened tail": {"algorithm": {**runs.MIX, "num_steps": 8, "tail": 0.5, "solver": "dpmpp_2m"}},
    "tree": {"algorithm": BRANCH},
    "pruned tree": {"algorithm": {**BRANCH, "prune_steps": [2]}},
    "several plans": {"algorithm": {**ONE_STEP, "name": "tempflow_grpo"}},
    "several plans a prompt": {"algorithm": {**ONE_STEP, "name": "tempflow_grpo", "branches": 2}},
    "several tails": {"algorithm": {**ONE_STEP, "name": "granular_grpo", "steps": [0, 1], "strides": [1, 2]}},
    "weights and means": {"algorithm": GUARD},
    "whole samples": {"algorithm": {**FLOW, "objective": "gspo"}},
    "some steps": {"algorithm": {"name": "dance_grpo", "num_steps": 4, "eta": 0.5, "clip_range": 1e-2}},
    "KL": {"algorithm": runs.FLOW},
    "KL of adapters": {"algorithm": runs.FLOW, **LORA},
    "teacher": {"algorithm": OPD},
    "teacher of adapters": {"algorithm": OPD, **LORA},
    "guidance": {"algorithm": FLOW, "model.guidance": 2.0},
    "adapters": {"algorithm": FLOW, **LORA},
    "portions": {"algorithm": FLOW, "model.rollout_micro_batch": 5},
    "portions, guidance, adapters": {
        "algorithm": {**runs.MIX, "shared_noise": True},
        "model.rollout_micro_batch": 5,
        "model.guidance": 2.0,
        **LORA,
    },
    "checkpointing": {"algorithm": FLOW, "model.gradient_checkpointing": True},
}


def gradient(trainer):
    return torch.cat([p.grad.flatten() for p in trainer.policy.trainable_parameters()]).clone()


def compared(trainer, changes, ways, iteration=1):
    """One iteration in each way to make an update: the gradients before Adam, and the metrics."""
    found, told = {}, {}
    for way in ways:
        one = trainer({"optimizer.max_grad_norm": None, **changes, "optimizer.update": way}, folder=way)
        if one.policy.lora is not None:  # B = 0 would leave A without gradient, and the reference without distance
            move(one.policy)
        told[way] = one.step(iteration)
        found[way] = gradient(one)
    return found, told


@torch.no_grad()
def move(policy, by=0.05):
    generator = torch.Generator().manual_seed(0)
    for p in policy.trainable_parameters():
        p += by * torch.randn(p.shape, generator=generator)


# ------------------------------------------------------------------------------------------------ the same gradient


@pytest.mark.one_in(2)
@pytest.mark.parametrize("name", METHODS)
def test_the_gradient_is_that_of_a_second_forward_pass(trainer, name):
    found, told = compared(trainer, METHODS[name], ("recompute", "single_pass"))
    once, twice = found["single_pass"], found["recompute"]
    assert runs.distance(once, twice) <= 1e-5 * twice.norm() and twice.norm() > 0
    one, two = told["single_pass"], told["recompute"]
    assert one["single_pass"] == 1 and one["calls/train"] == 0
    assert two["single_pass"] == 0 and two["calls/train"] > 0
    for key in one:
        if not key.startswith(("time/", "ratio_", "calls/train", "single_pass")):
            assert one[key] == pytest.approx(two[key], rel=1e-4, abs=1e-6), key
    assert one["ratio_first_update"] <= 1e-6


def test_auto_takes_it_where_nothing_speaks_against_it(trainer):
    rows = {
        name: trainer({"algorithm": FLOW, "optimizer.update": "auto", **changes}, folder=name).step(0)
        for name, changes in {
            "plain": {},
            "two updates": {"optimizer.updates_per_iteration": 2},
            "micro_batch": {"optimizer.micro_batch": 6},
            "checkpointing": {"model.gradient_checkpointing": True},
            "recompute": {"optimizer.update": "recompute"},
        }.items()
    }
    assert [name for name, row in rows.items() if row["single_pass"]] == ["plain"]
    assert [name for name, row in rows.items() if row["calls/train"] == 0] == ["plain"]


@pytest.mark.parametrize(("share", "kept"), [(0.4, False), (0.7, True)])
def test_auto_lets_go_of_graphs_of_which_too_little_is_trained(trainer, share, kept):
    """Of 10 steps but the last a sample trains 3 or 6: then a second pass of those costs less, or does not."""
    dance = {"name": "dance_grpo", "num_steps": 10, "eta": 0.5, "step_share": share, "shared_noise": False}
    changes = {"algorithm": dance, "optimizer.max_grad_norm": None}
    rows, found = {}, {}
    for way in ("auto", "single_pass", "recompute"):
        run = trainer({**changes, "optimizer.update": way}, folder=way)
        rows[way], found[way] = run.step(0), gradient(run)
    assert [rows[way]["single_pass"] for way in rows] == [kept, 1, 0]
    assert rows["auto"]["calls/train"] == (0 if kept else rows["recompute"]["calls/train"])
    for way in ("auto", "single_pass"):
        assert runs.distance(found[way], found["recompute"]) <= 1e-5 * found["recompute"].norm()


@pytest.mark.parametrize(
    ("key", "value"), [("updates_per_iteration", 2), ("micro_batch", 8), ("updates_per_iteration", 7)]
)
def test_what_cannot_be_one_pass_is_refused(make_config, key, value):
    with pytest.raises(ConfigError, match=rf"single_pass takes all .* leave optimizer.{key} out, or set update=recomp"):
        make_config({"optimizer.update": "single_pass", f"optimizer.{key}": value})


def test_ranks_share_a_single_pass(trainer, monkeypatch):
    """Three prompts on two ranks, samples by their own plans: the sum of the ranks' gradients is one rank's."""
    options = {**METHODS["several plans"], "optimizer.update": "single_pass", "optimizer.max_grad_norm": None}
    one = trainer(options, "one")
    told = one.step(0)
    monkeypatch.setenv("WORLD_SIZE", "2")
    options["engine"] = {"name": threaded.NAME}
    two = [threaded.on_rank(r, 2, lambda: trainer(options, "two")) for r in range(2)]
    rows = threaded.together([lambda t=t: t.step(0) for t in two])
    for rank, row in zip(two, rows, strict=True):
        assert runs.distance(gradient(rank), gradient(one)) <= 1e-5 * gradient(one).norm()
        assert row["single_pass"] == 1 and row["calls/rollout"] == told["calls/rollout"] and row["calls/train"] == 0
    assert torch.equal(runs.weights(two[0]), runs.weights(two[1]))


@pytest.mark.slow
def test_two_processes_share_a_single_pass(trainer, config_file, tmp_path):
    from flowrl.checkpoint import latest_valid
    from tests.test_distributed import torchrun

    options = {**METHODS["shared noise"], "optimizer.update": "single_pass", "optimizer.eps": 1e-3, "iterations": 2}
    one = trainer(options, "one")
    start = runs.weights(one)
    one.run()
    done = torchrun(config_file(options, folder="two"), "engine.name=accelerate")
    assert done.returncode == 0, done.stderr
    assert [row["single_pass"] for row in runs.rows(tmp_path / "two")] == [1, 1]
    saved = latest_valid(tmp_path / "two" / "checkpoints")
    weights = torch.cat([saved.tensors[f"policy.weights.{name}"].flatten() for name in one.policy._parameters])
    assert runs.distance(weights, runs.weights(one)) < 1e-3 * runs.distance(runs.weights(one), start)


# ------------------------------------------------------------------------------------------------ memory


def test_too_little_memory_means_a_second_pass_with_the_same_result(trainer, monkeypatch):
    monkeypatch.setattr("flowrl.media.MEMORY_SHARE", 1e-9)
    found, told = compared(trainer, METHODS["portions"], ("auto", "recompute"))
    assert told["auto"]["single_pass"] == 0 and told["auto"]["calls/train"] == told["recompute"]["calls/train"] > 0
    assert torch.equal(found["auto"], found["recompute"])


def test_one_that_was_asked_for_takes_what_it_needs(trainer, monkeypatch):
    monkeypatch.setattr("flowrl.media.MEMORY_SHARE", 1e-9)
    assert trainer({"algorithm": FLOW, "optimizer.update": "single_pass"}).step(0)["single_pass"] == 1


@pytest.fixture(scope="module")
def built_in():
    """The built-in model, fully trained and by adapters, and a batch for it."""
    full, adapters = Policy(load("shapes")), Policy(load("shapes"), lora=runs.LORA, guidance=2.0)
    shape = full.model.noise_shape(full.model.height, full.model.width)
    x = torch.randn(8, *shape, generator=torch.Generator().manual_seed(0))
    return {"full": full, "adapters, guidance": adapters}, x, torch.linspace(0.1, 0.9, 8)


def forward(policy, x, t):
    cond = take(policy.encode(["a red circle"]), torch.zeros(len(x), dtype=torch.long))
    with torch.enable_grad():
        return cond, policy.velocity(x, t, cond)


@pytest.mark.parametrize("name", ["full", "adapters, guidance"])
def test_the_measured_size_is_what_the_allocator_gave(built_in, name):
    """Bytes allocated and not freed again in a forward pass with a graph, as the profiler counts them."""
    policies, x, t = built_in
    cond, _ = forward(policies[name], x, t)  # the first call allocates what stays
    _, size = _measured(policies[name], x, t, cond)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen, torch.enable_grad():
        kept = policies[name].velocity(x, t, cond)
    real = sum(event.self_cpu_memory_usage for event in seen.key_averages())
    assert kept.requires_grad and size == pytest.approx(real, rel=0.1)
    _, half = _measured(policies[name], x[:4], t[:4], take(cond, torch.arange(4)))
    assert half == pytest.approx(size / 2, rel=0.1)  # what a whole rollout's size is foretold by


def test_a_recorder_gives_up_by_its_foretold_size(built_in):
    policies, x, t = built_in
    policy = policies["full"]
    cond, _ = forward(policy, x, t)
    _, size = _measured(policy, x, t, cond)
    for states, kept in ((8, True), (8 * 10**6, False)):
        share = 4 * size / free_memory(x.device)
        recorder = Recorder(policy=policy, states=states, memory_share=share)
        with torch.no_grad():
            told = [recorder(x[:5], t[:5], take(cond, torch.arange(5))) for _ in range(2)]
        assert not any(v.requires_grad for v in told) and recorder.given_up is not kept
        found = recorder.result()
        assert (found is not None) is kept
        if found is not None:
            assert found.requires_grad and torch.equal(found.detach(), torch.cat(told))


def test_a_rollout_without_stored_states_has_nothing_to_keep(built_in):
    recorder = Recorder(policy=built_in[0]["full"], states=0)
    assert recorder.result() is None


class Counted:
    """A saved tensor of which one knows whether it is still held; without its history, which would hold it itself."""

    alive: "weakref.WeakSet[Counted]" = weakref.WeakSet()
    made = 0

    def __init__(self, tensor):
        self.tensor = tensor.detach()
        Counted.alive.add(self)
        Counted.made += 1


def test_no_graph_outlives_its_iteration(trainer):
    """Nothing that autograd saved is left after a step, without waiting for the garbage collector."""
    run = trainer({"algorithm": runs.FLOW, "optimizer.update": "single_pass"})
    with torch.autograd.graph.saved_tensors_hooks(Counted, lambda counted: counted.tensor):
        for iteration in range(2):
            before = Counted.made
            run.step(iteration)
            assert Counted.made > before and len(Counted.alive) == 0
        before = Counted.made
        run._evaluate()
        assert Counted.made == before  # an evaluation keeps no graph at all


def test_an_evaluation_is_the_same_after_either_way(trainer):
    """The averaged weights are swapped in and out between a rollout and the next: values and gradients stay right."""
    summaries = []
    for way in ("single_pass", "recompute"):
        run = trainer({"algorithm": FLOW, "optimizer.update": way, "evaluate_every": 1, "iterations": 2}, folder=way)
        summaries.append(run.run())
    means = [s["final"]["scores"]["pixel.brightness"]["mean"] for s in summaries]
    assert means[0] == pytest.approx(means[1], rel=1e-5) and runs.finite(means[0])


def test_a_graph_without_a_backward_pass_goes_too(trainer, tmp_path):
    """No sample gets a verdict, so that there is nothing to train on."""
    reward = runs.reward_file(tmp_path, "return [math.nan] * len(samples)")
    run = trainer({"algorithm": FLOW, "optimizer.update": "single_pass", "rewards": [{"use": reward}]})
    before = runs.state(run)
    with torch.autograd.graph.saved_tensors_hooks(Counted, lambda counted: counted.tensor):
        row = run.step(0)
    assert Counted.made > 0 and row["grad_norm"] == 0 and len(Counted.alive) == 0 and runs.same(runs.state(run), before)


# ------------------------------------------------------------------------------------------------ free memory


def host(folder, **files):
    for name, text in files.items():
        path = folder / name.replace("__", "/").replace("_dot_", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


MEMINFO = "MemTotal:       1000 kB\nMemFree:         100 kB\nMemAvailable:    800 kB\nSwapFree: 5 kB\n"
CPU = torch.device("cpu")


def test_free_memory_of_this_machine_is_possible():
    free = free_memory(CPU)
    assert free is None or 0 <= free < 2**50
    assert free_memory(torch.device("meta")) is None


def test_the_page_cache_counts_as_free(tmp_path):
    assert free_memory(CPU, host(tmp_path, proc__meminfo=MEMINFO)) == 800 * 1024


@pytest.mark.parametrize(
    ("limit", "used", "expected"),
    [("500000\n", "100000\n", 400_000), ("500000\n", "600000\n", 0), ("max\n", "100000\n", 800 * 1024)],
)
def test_a_container_is_held_to_its_limit(tmp_path, limit, used, expected):
    """Version 2 of control groups, and version 1, whose files have other names."""
    two = host(tmp_path / "2", proc__meminfo=MEMINFO)
    host(two, **{"sys__fs__cgroup__memory_dot_max": limit, "sys__fs__cgroup__memory_dot_current": used})
    assert free_memory(CPU, two) == expected
    one = host(tmp_path / "1", proc__meminfo=MEMINFO)
    names = ("sys__fs__cgroup__memory__memory_dot_limit_in_bytes", "sys__fs__cgroup__memory__memory_dot_usage_in_bytes")
    host(one, **dict(zip(names, (limit, used), strict=True)))
    assert free_memory(CPU, one) == expected


def test_a_system_that_does_not_say_is_not_asked_twice(tmp_path):
    assert free_memory(CPU, tmp_path) is None
