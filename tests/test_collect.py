"""Rollouts, decoding and hand-over to the rewards: keyed by prompt and place, whatever the portions and processes."""

from dataclasses import replace

import pytest
import torch

from flowrl.collect import (
    Conditions,
    Geometry,
    _whole_groups,
    decode,
    decode_and_submit,
    draw,
    roll_out,
    sample,
    samples_of,
)
from flowrl.types import Prompt
from samplers import noise_source
from tests import runs
from tests.models.tiny import euler

K = runs.SAMPLES
PROMPTS = [Prompt(id=10 + i, text=text, metadata={"n": i}) for i, text in enumerate(runs.PROMPTS)]
GEOMETRY = Geometry(height=32, width=32)


@pytest.fixture(scope="module")
def policy(tiny_model):
    from flowrl.models import load
    from flowrl.policy import Policy

    return Policy(load(tiny_model), frozen=True)


def algorithm(**changes):
    from flowrl.config import AlgorithmConfig

    return AlgorithmConfig(**{**runs.MIX, **changes}).build()


def collect(policy, method, prompts=PROMPTS, slots=None, geometry=GEOMETRY, iteration=0, seed=0):
    plan = method.plan(policy.model.times(method.num_steps, 32, 32), iteration, K, seed)
    return roll_out(
        policy, method, [plan], prompts, slots or list(range(len(prompts))), Conditions(encode=policy.encode), geometry,
        samples_per_prompt=K, iteration=iteration, seed=seed,
    )  # fmt: skip


# ------------------------------------------------------------------------------------------------ conditions


def test_a_text_is_encoded_once_in_a_run():
    asked = []

    def encode(texts):
        asked.append(list(texts))
        return {"a": torch.tensor([[float(len(t))] for t in texts]), "b": torch.tensor([len(t) for t in texts])}

    conditions = Conditions(encode=encode, chunk=2)
    found = conditions(["xx", "y", "xx", "zzz", "y"])
    assert found["a"].flatten().tolist() == [2, 1, 2, 3, 1] and found["b"].tolist() == [2, 1, 2, 3, 1]
    assert asked == [["xx", "y"], ["zzz"]]
    assert conditions(["zzz", "wwww"])["b"].tolist() == [3, 4]
    assert asked[2:] == [["wwww"]]


def test_only_the_conditions_used_last_are_kept():
    asked = []

    def encode(texts):
        asked.extend(texts)
        return {"a": torch.tensor([[float(ord(t))] for t in texts])}

    conditions = Conditions(encode=encode, limit=2)
    assert conditions(["a", "b", "c"])["a"].flatten().tolist() == [97, 98, 99]  # more than are kept, and all there
    conditions(["b"])
    conditions(["d"])  # c was used longest ago
    assert asked == ["a", "b", "c", "d"] and list(conditions.known) == [("b",), ("d",)]
    assert conditions(["b", "c"])["a"].flatten().tolist() == [98, 99] and asked[4:] == ["c"]


def test_conditions_are_those_of_the_policy(policy):
    ours, theirs = Conditions(encode=policy.encode)(runs.PROMPTS), policy.encode(runs.PROMPTS)
    assert ours.keys() == theirs.keys()
    assert all(torch.allclose(ours[name], theirs[name], atol=1e-6) for name in ours)


# ------------------------------------------------------------------------------------------------ rollouts


@pytest.mark.parametrize("shared", [False, True])
def test_a_prompts_samples_do_not_depend_on_which_process_makes_them(policy, shared):
    method = algorithm(shared_noise=shared)
    everyone = collect(policy, method)
    for slots in ([0], [1, 2]):
        part = collect(policy, method, [PROMPTS[s] for s in slots], slots)
        mine = torch.isin(everyone.trajectory.group, torch.tensor(slots))
        assert part.trajectory.group.tolist() == everyone.trajectory.group[mine].tolist()
        assert torch.allclose(part.trajectory.x0, everyone.trajectory.x0[mine], atol=1e-5)


def test_every_key_changes_the_noise(policy):
    method = algorithm(shared_noise=False, strategy="frozen")
    base = collect(policy, method).trajectory.x0
    assert torch.equal(collect(policy, method).trajectory.x0, base)
    assert not torch.allclose(collect(policy, method, iteration=1).trajectory.x0, base)
    assert not torch.allclose(collect(policy, method, seed=1).trajectory.x0, base)
    twins = collect(policy, method, [replace(PROMPTS[0], id=i) for i in range(2)])
    assert not torch.allclose(twins.trajectory.x0[:K], twins.trajectory.x0[K:])  # equal texts, groups of their own
    samples = base[:K].flatten(1)
    assert torch.cdist(samples, samples).fill_diagonal_(1).min() > 1e-3


def test_a_shared_start_is_the_same_state_for_the_whole_group(policy):
    first = collect(policy, algorithm(shared_noise=True)).trajectory
    first = first.select(first.step == 0)
    apart = collect(policy, algorithm(shared_noise=False)).trajectory
    apart = apart.select(apart.step == 0)
    for group in range(len(PROMPTS)):
        mine = first.x[first.prompt == group]
        assert len(mine) == K and torch.equal(mine, mine[:1].expand_as(mine))
        assert not torch.allclose(apart.x[apart.prompt == group][0], apart.x[apart.prompt == group][1])


def test_samples_and_prompts_stay_together(policy):
    batch = collect(policy, algorithm(), slots=[4, 7, 9])
    assert [p.id for p in batch.prompts] == [10, 11, 12]
    assert batch.leaf_prompt.tolist() == [0] * K + [1] * K + [2] * K
    assert batch.trajectory.group.tolist() == [4] * K + [7] * K + [9] * K
    assert len(batch.trajectory) == 2 * len(PROMPTS) * K


def test_portions_of_a_rollout_change_nothing_but_memory(policy):
    sizes = []
    velocity = policy.velocity

    def spy(x, t, cond):
        sizes.append(len(x))
        return velocity(x, t, cond)

    whole = collect(policy, algorithm())
    policy.velocity = spy
    try:
        parts = collect(policy, algorithm(), geometry=replace(GEOMETRY, rollout_batch=5))
    finally:
        del policy.velocity
    assert max(sizes) == 5
    assert torch.allclose(parts.trajectory.x0, whole.trajectory.x0, atol=1e-5)
    assert torch.allclose(parts.trajectory.logprob, whole.trajectory.logprob, atol=1e-5)


# ------------------------------------------------------------------------------------------------ where a grid begins


@pytest.mark.slow
def test_both_begin_where_the_model_s_grid_does():
    """Stable Diffusion's first level leaves some of the picture, and its state there is not the noise itself."""
    from flowrl.models import load
    from flowrl.policy import Policy

    own = Policy(load("tiny/sd15"), frozen=True)
    times, index = own.model.times(3, 32, 32), torch.arange(3)
    shape = own.model.noise_shape(32, 32)

    drawn = collect(own, algorithm(num_steps=3, shared_noise=False, strategy="frozen")).trajectory
    prompt = index.repeat_interleave(K)
    source = noise_source(shape, seed=0, iteration=0, prompt=prompt, member=torch.arange(3 * K) % K)
    noise = source(torch.arange(3 * K), torch.zeros(3 * K, dtype=torch.long), -1)
    states = drawn.select(drawn.step == 0).x
    assert torch.equal(states, own.model.start(noise, float(times[0]))) and not torch.allclose(states, noise, atol=1e-2)

    (x0,) = draw(own, PROMPTS, range(3), Conditions(encode=own.encode), GEOMETRY, num_steps=3, seed=4)
    noise = noise_source(shape, seed=4, iteration=-1, prompt=index)(index, index * 0, -1)
    walked = euler(own.velocity, own.model.start(noise, float(times[0])), times, own.encode(runs.PROMPTS))
    assert torch.allclose(x0, walked, atol=1e-5)


# ------------------------------------------------------------------------------------------------ samples


def test_evaluation_samples_depend_on_their_keys_alone(policy):
    def draw(prompts=PROMPTS, slots=range(3), **options):
        return sample(
            policy, prompts, slots, Conditions(encode=policy.encode), GEOMETRY, **{"num_steps": 3, "seed": 0, **options}
        )

    whole = draw()
    assert whole.shape == (3, 1, 3, 32, 32) and whole.min() >= 0 and whole.max() <= 1
    assert torch.allclose(draw(batch=2), whole, atol=1e-5)
    assert torch.allclose(draw(PROMPTS[1:], [1, 2]), whole[1:], atol=1e-5)
    assert not torch.allclose(draw(seed=1), whole, atol=1e-3)
    assert not torch.allclose(draw([PROMPTS[0]] * 2, [0, 1])[0], draw([PROMPTS[0]] * 2, [0, 1])[1], atol=1e-3)


def test_evaluation_samples_are_counted_apart(policy):
    before = dict(policy.calls)
    sample(policy, PROMPTS, range(3), Conditions(encode=policy.encode), GEOMETRY, num_steps=3, seed=0)
    changed = {role: n - before.get(role, 0) for role, n in policy.calls.items() if n != before.get(role, 0)}
    assert changed == {"eval": 9}


@pytest.fixture(scope="module")
def exports(tiny_model, tmp_path_factory):
    """{kind: folder} of exported weights far from the base model's."""
    from flowrl.models import load
    from flowrl.policy import Policy

    folders = {}
    for kind, lora in (("lora", runs.LORA), ("full", None)):
        tuned = Policy(load(tiny_model), lora=lora)
        generator = torch.Generator().manual_seed(0)
        for p in tuned.trainable_parameters():
            p.data += 0.1 * torch.randn(p.shape, generator=generator)
        folders[kind] = tuned.export(tmp_path_factory.mktemp("exports") / kind)
    return folders


both_kinds = pytest.mark.parametrize("kind", ["lora", "full"])


@both_kinds
def test_the_base_model_takes_the_steps_after_the_tuned_ones(tiny_model, exports, kind):
    """Against two models side by side, the tuned one read by diffusers, and the ODE written out; guidance doubles."""
    from diffusers import SD3Transformer2DModel

    from flowrl.models import load
    from flowrl.policy import Policy, load_weights

    def mixed(steps, **options):
        return sample(
            policy, PROMPTS, range(3), Conditions(encode=policy.encode), GEOMETRY, num_steps=10, seed=4,
            tuned_steps=steps, **options,
        )  # fmt: skip

    policy = Policy(load(tiny_model), frozen=True, guidance=2.0, reference=kind == "full")
    load_weights(policy, exports[kind])
    base, tuned = load(tiny_model), load(tiny_model)
    if kind == "lora":
        tuned.pipe.load_lora_weights(exports[kind])
    else:
        tuned.trainable = SD3Transformer2DModel.from_pretrained(exports[kind] / "transformer")
    index = torch.arange(3)
    noise = noise_source(base.noise_shape(32, 32), seed=4, iteration=-1, prompt=index)(index, index * 0, -1)
    times, cond = base.times(10, 32, 32), base.encode(runs.PROMPTS)

    found = {}
    for steps in (0, 5, 6, 7, 10):
        before = policy.calls.total()
        found[steps] = mixed(steps)
        assert policy.calls.total() - before == 2 * 10 * 3 and set(policy.calls) == {"eval"}
        x = euler(lambda x, t, c: tuned.velocity(x, t, c, 2.0), noise, times[: steps + 1], cond)
        x = euler(lambda x, t, c: base.velocity(x, t, c, 2.0), x, times[steps:], cond)
        with torch.no_grad():
            expected = base.decode(x).clamp(0, 1)
        torch.testing.assert_close(found[steps], expected, rtol=0, atol=1e-5)
    for a, b in ((0, 5), (5, 6), (6, 7), (7, 10)):
        assert (found[a] - found[b]).abs().max() > 1e-3
    assert torch.equal(mixed(None), found[10])
    torch.testing.assert_close(mixed(6, batch=2), found[6], rtol=0, atol=1e-5)
    assert not any(p.requires_grad for p in policy.model.trainable.parameters())


def test_a_handover_that_cannot_be_is_refused(policy, tiny_model, exports):
    from flowrl.models import ModelError, load
    from flowrl.policy import Policy, load_weights

    def draw(policy, steps):
        conditions = Conditions(encode=policy.encode)
        sample(policy, PROMPTS, range(3), conditions, GEOMETRY, num_steps=3, seed=0, tuned_steps=steps)

    for steps in (-1, 4):
        with pytest.raises(ValueError, match=f"tuned_steps is {steps}, of 3 steps: choose from 0 to 3"):
            draw(policy, steps)
    overwritten = Policy(load(tiny_model), frozen=True)
    load_weights(overwritten, exports["full"])
    draw(overwritten, 3)
    with pytest.raises(ModelError, match="reference=True"):
        draw(overwritten, 2)


def test_decoding_in_portions_gives_the_same_pictures(policy):
    x0 = torch.randn(5, *policy.model.noise_shape(32, 32), generator=torch.Generator().manual_seed(0))
    whole = decode(policy, x0, None)
    assert whole.shape == (5, 1, 3, 32, 32) and not whole.requires_grad
    assert torch.allclose(decode(policy, x0, 2), whole, atol=1e-5)


def test_what_a_reward_sees():
    media = torch.rand(3, 1, 3, 8, 8)
    found = samples_of(media, PROMPTS, torch.tensor([2, 0, 2]), torch.tensor([7, 8, 7]))
    assert [s.prompt for s in found] == ["a red house", "a cat", "a red house"]
    assert [s.group for s in found] == [7, 8, 7] and [s.meta["n"] for s in found] == [2, 0, 2]
    assert [s.kind for s in found] == ["image"] * 3 and torch.equal(found[1].media, media[1, 0])
    (video,) = samples_of(torch.rand(1, 4, 3, 8, 8), PROMPTS, torch.tensor([0]), torch.tensor([0]))
    assert video.kind == "video" and video.media.shape == (4, 3, 8, 8)


@pytest.mark.parametrize("sizes", [[4, 4, 4], [1, 5, 2, 2], [3]])
@pytest.mark.parametrize("batch", [1, 4, 5, 8, 100])
def test_portions_never_cut_a_group(sizes, batch):
    group = torch.cat([torch.full((n,), 10 + i) for i, n in enumerate(sizes)])
    parts = [group[part].tolist() for part in _whole_groups(group, batch)]
    assert sum(parts, []) == group.tolist()
    whole = [set(part) for part in parts]
    assert sum(map(len, whole)) == len(set().union(*whole))
    assert all(len(part) <= batch or len(set(part)) == 1 for part in parts)
    merged = [len(a) + len(b) for a, b in zip(parts, parts[1:], strict=False)]
    assert all(size > batch for size in merged)  # no portion is smaller than it must be


class Hub:
    def __init__(self):
        self.seen = []

    def submit(self, samples):
        self.seen.append(samples)
        return len(self.seen)


def test_rewards_get_whole_groups_in_order(policy):
    batch = collect(policy, algorithm())
    hub = Hub()
    assert decode_and_submit(policy, batch, hub, replace(GEOMETRY, decode_batch=5)) == [1, 2, 3]
    assert [[s.group for s in part] for part in hub.seen] == [[0] * K, [1] * K, [2] * K]
    assert [part[0].prompt for part in hub.seen] == runs.PROMPTS
    pictures = torch.stack([s.media for part in hub.seen for s in part])
    assert torch.equal(batch.media[:, 0], pictures)
    assert torch.allclose(pictures, decode(policy, batch.trajectory.x0, None)[:, 0], atol=1e-5)
    assert len(decode_and_submit(policy, batch, Hub(), GEOMETRY)) == 1


# ------------------------------------------------------------------------------------------------ the old policy


def test_the_old_policy_draws_the_samples_unless_the_method_draws_its_own(tiny_model):
    from flowrl.algorithms.crd import CRD
    from flowrl.models import load
    from flowrl.policy import Policy

    def drawn(on_policy):
        policy = Policy(load(tiny_model), old=True)
        method = CRD(num_steps=3, draws_per_sample=2, kl_coef=0.0, on_policy=on_policy)
        first = collect(policy, method).trajectory.x0
        with torch.no_grad():
            for parameter in policy.trainable_parameters():
                parameter += 0.05
        policy.update_average()
        policy.follow(1.0)
        return first, collect(policy, method).trajectory.x0

    first, again = drawn(on_policy=False)
    assert torch.equal(first, again), "the weights that draw have not moved"
    first, again = drawn(on_policy=True)
    assert not torch.allclose(first, again)
