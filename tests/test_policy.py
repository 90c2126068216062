"""The policy: what learns, what it started from, its average, and an export that draws the same pictures."""

import copy
import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from flowrl.collect import Conditions
from flowrl.models import ModelError, load, load_pipeline
from flowrl.policy import Lora, Policy, load_weights
from flowrl.types import Policy as PolicyProtocol
from tests.models.tiny import euler, tiny_sd3  # noqa: F401  (a fixture)

PROMPTS = ["a cat", "two dogs in a box"]
LORA = {"rank": 4, "alpha": 24}
KINDS = {"lora": {"lora": LORA}, "full": {"lora": None, "reference": True}}
both_kinds = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture
def make(tiny_sd3):  # noqa: F811
    """A policy on a model of its own."""

    def build(kind="lora", **options):
        return Policy(load(tiny_sd3), **{**KINDS[kind], **options})

    return build


def noise(policy, number=2):
    return torch.randn(number, *policy.model.noise_shape(32, 32), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def velocity(policy):
    cond = policy.encode(PROMPTS)
    return policy.velocity(noise(policy), torch.tensor([0.9, 0.4]), cond)


def train(policy, steps=1, lr=0.05):
    """Optimiser steps on a loss that any weight can lower."""
    optimizer = torch.optim.SGD(policy.trainable_parameters(), lr=lr)
    cond, x = policy.encode(PROMPTS), noise(policy)
    for _ in range(steps):
        optimizer.zero_grad()
        policy.velocity(x, torch.tensor([0.9, 0.4]), cond).square().mean().backward()
        torch.nn.utils.clip_grad_norm_(policy.trainable_parameters(), 1e9)
        for p in policy.trainable_parameters():
            p.grad = torch.sign(p.grad)
        optimizer.step()
        policy.update_average()


def draw(policy, num_steps=3):
    """Pictures [2,3,32,32] along the model's own grid."""
    x0 = euler(policy.velocity, noise(policy), policy.model.times(num_steps, 32, 32), policy.encode(PROMPTS))
    with torch.no_grad():
        return policy.model.decode(x0)[:, 0]


def draw_with(pipe, policy, settings):
    return pipe(PROMPTS, latents=noise(policy), output_type="pt", **settings).images


# ------------------------------------------------------------------------------------------------- what learns


def test_a_policy_is_what_algorithms_expect(make):
    policy: PolicyProtocol = make()
    assert policy.velocity(noise(policy), torch.ones(2), policy.encode(PROMPTS)).shape == (2, 4, 16, 16)


def test_lora_adapts_the_attention_and_starts_at_the_model(make):
    policy = make()
    names = [n for n, p in policy.model.trainable.named_parameters() if p.requires_grad]
    assert names and all(".attn." in n or ".attn2." in n for n in names)
    assert all("lora_" in n for n in names)
    assert policy.num_trainable == sum(p.numel() for p in policy.trainable_parameters())
    with policy.reference():
        base = velocity(policy)
    assert torch.equal(velocity(policy), base)


def test_adapters_depend_on_the_seed_and_not_on_the_callers_randomness(make):
    torch.manual_seed(5)
    drawn = torch.randn(3)
    torch.manual_seed(5)
    one = make(seed=1).state_dict()
    assert torch.equal(torch.randn(3), drawn)
    two, three = make(seed=1).state_dict(), make(seed=2).state_dict()
    assert all(torch.equal(one[n], two[n]) for n in one)
    assert any(not torch.equal(one[n], three[n]) for n in one)
    kaiming = make(seed=1, lora={**LORA, "init": "kaiming"}).state_dict()
    assert any(not torch.equal(one[n], kaiming[n]) for n in one)


def test_full_training_has_every_weight_of_the_transformer(make):
    policy = make("full")
    assert policy.num_trainable == sum(p.numel() for p in policy.model.trainable.parameters())


@both_kinds
def test_trained_weights_are_float32_under_a_bfloat16_model(tiny_sd3, kind):  # noqa: F811
    policy = Policy(load(tiny_sd3, dtype=torch.bfloat16), **KINDS[kind], guidance=2.0)
    assert {p.dtype for p in policy.trainable_parameters()} == {torch.float32}
    before = velocity(policy)
    train(policy)
    assert before.dtype == torch.float32 and velocity(policy).isfinite().all()
    assert not torch.equal(velocity(policy), before)
    with policy.reference():
        assert torch.equal(velocity(policy), before)


def test_a_frozen_policy_learns_nothing(make):
    policy = make("full", frozen=True, ema_decay=0.9)
    assert policy.num_trainable == 0 and policy.trainable_parameters() == [] and policy.ema is None
    with policy.reference(), policy.averaged():
        velocity(policy)
    assert policy.calls == {"reference": 2}
    with pytest.raises(ModelError, match="frozen policy has learnt nothing"):
        policy.export("nowhere")


def test_lora_targets_can_be_chosen_and_wrong_ones_are_named(make):
    policy = make(lora={**LORA, "targets": ["attn.to_q"]})
    assert all(".attn.to_q." in n for n in policy.state_dict())
    with pytest.raises(ModelError, match="lora: .*to_nothing"):
        make(lora={**LORA, "targets": ["to_nothing"]})
    with pytest.raises(ValueError, match="aplha"):
        Lora.model_validate({"aplha": 3})


# -------------------------------------------------------------------------------------------------- guidance and counts


def test_guidance_is_applied_and_conditions_are_no_larger_than_needed(make):
    plain, guided = make(), make(guidance=4.5)
    assert set(plain.encode(PROMPTS)) == {"prompt_embeds", "pooled_prompt_embeds"}
    x, t, cond = noise(plain), torch.ones(2), guided.encode(PROMPTS)
    with torch.no_grad():
        assert torch.equal(guided.velocity(x, t, cond), guided.model.velocity(x, t, cond, 4.5))
        assert not torch.allclose(guided.velocity(x, t, cond), plain.velocity(x, t, cond))


def test_calls_are_samples_times_branches_by_role(make):
    policy = make(guidance=2.0)
    velocity(policy)
    with policy.role("rollout"):
        velocity(policy)
        velocity(policy)
        with policy.reference():
            velocity(policy)
        velocity(policy)
    with pytest.raises(KeyError), policy.role("eval"):
        raise KeyError
    velocity(policy)
    assert policy.calls == {"train": 8, "rollout": 12, "reference": 4}


# -------------------------------------------------------------------------------------------------- reference


@both_kinds
def test_reference_is_the_model_before_training_and_leaves_the_policy_alone(make, kind):
    policy = make(kind)
    base = velocity(policy)
    with policy.reference():
        assert torch.equal(velocity(policy), base)
    train(policy)
    trained = velocity(policy)
    assert not torch.allclose(trained, base, atol=1e-3)
    weights = policy.state_dict()
    with pytest.raises(KeyboardInterrupt), policy.reference():
        assert torch.equal(velocity(policy), base)
        raise KeyboardInterrupt
    assert torch.equal(velocity(policy), trained)
    assert all(torch.equal(weights[n], t) for n, t in policy.state_dict().items())
    assert all(p.requires_grad for p in policy.trainable_parameters())
    train(policy)
    with policy.reference():
        assert torch.equal(velocity(policy), base)


@both_kinds
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_reference_between_forward_and_backward_changes_no_gradient(make, kind, checkpointing):
    """A KL term does exactly this; weights swapped in place would break the backward pass."""
    policy = make(kind, gradient_checkpointing=checkpointing)
    train(policy)
    x, t, cond = noise(policy), torch.tensor([0.9, 0.4]), policy.encode(PROMPTS)
    with torch.no_grad(), policy.reference():
        target = policy.velocity(x, t, cond)

    def gradients(inside):
        for p in policy.trainable_parameters():
            p.grad = None
        v, v_ref = policy.velocity(x, t, cond), target
        if inside:
            with torch.no_grad(), policy.reference():
                v_ref = policy.velocity(x, t, cond)
        (v - v_ref).square().mean().backward()
        return [p.grad.clone() if p.grad is not None else None for p in policy.trainable_parameters()]

    pairs = list(zip(gradients(False), gradients(True), strict=True))
    assert any(a is not None and a.abs().max() > 0 for a, _ in pairs)
    for a, b in pairs:
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


def test_full_training_without_a_copy_has_no_reference(make):
    policy = make("full", reference=False)
    with pytest.raises(ModelError, match="reference=True"), policy.reference():
        pass


@both_kinds
def test_an_engine_may_wrap_the_module(make, kind):
    """DDP and its like put a wrapper at `model.trainable` after the policy is built."""
    policy = make(kind)
    base = velocity(policy)
    policy.model.trainable = torch.nn.ModuleList([policy.model.trainable])
    policy.model.trainable.forward = lambda **kwargs: policy.model.trainable[0](**kwargs)
    wrapper = policy.model.trainable
    train(policy)
    assert not torch.allclose(velocity(policy), base, atol=1e-3)
    with policy.reference():
        assert torch.equal(velocity(policy), base)
    assert policy.model.trainable is wrapper


# -------------------------------------------------------------------------------------------------- teachers


@pytest.fixture
def taught(make, tmp_path):
    """`taught("lora", "full")`: a LoRA student of a teacher with full weights, and the teacher by itself."""

    def build(kind, *teachers, **options):
        folders, alone = [], []
        for i, teacher in enumerate(teachers):
            lora = {"rank": 2 + i, "alpha": 12.0, "targets": (["attn.to_q"], ["attn.to_v", "attn2.to_q"])[i % 2]}
            policy = make(teacher, **({"lora": lora} if teacher == "lora" else {}))
            train(policy, 2, lr=0.03 * (i + 1))
            folders.append(str(policy.export(tmp_path / f"teacher_{i}" / "weights").parent))
            alone.append(policy)
        return make(kind, teachers=folders, largest_guidance=3.0, **options), folders, alone

    return build


both_teachers = pytest.mark.parametrize("teacher", KINDS)


def guided(policy, guidance):
    policy.guidance = guidance
    return velocity(policy)


@both_kinds
@both_teachers
def test_a_teacher_is_its_export_and_leaves_the_student_alone(taught, make, kind, teacher):
    student, (folder,), (alone,) = taught(kind, teacher)
    base, cond = velocity(student), make(kind, guidance=3.0).encode(PROMPTS)
    alone.encode = lambda _: cond
    expected = {g: guided(alone, g) for g in (1.0, 3.0)}
    assert not torch.allclose(expected[1.0], base, atol=1e-3)

    def look():
        for guidance, target in expected.items():
            with pytest.raises(KeyboardInterrupt), student.teacher(folder, guidance):
                torch.testing.assert_close(velocity(student), target, rtol=0, atol=1e-5)
                raise KeyboardInterrupt
        with student.reference():
            torch.testing.assert_close(velocity(student), base, rtol=0, atol=1e-6)

    learning = [n for n, p in student.model.trainable.named_parameters() if p.requires_grad]
    look()
    assert torch.equal(velocity(student), base)
    train(student, 2)
    trained = velocity(student)
    assert not torch.allclose(trained, base, atol=1e-3)
    look()
    assert torch.equal(velocity(student), trained) and student.guidance == 1
    assert [n for n, p in student.model.trainable.named_parameters() if p.requires_grad] == learning


@both_kinds
@both_teachers
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_teacher_between_forward_and_backward_changes_no_gradient(taught, kind, teacher, checkpointing):
    student, (folder,), _ = taught(kind, teacher, gradient_checkpointing=checkpointing)
    train(student)
    x, t, cond = noise(student), torch.tensor([0.9, 0.4]), student.encode(PROMPTS)
    with torch.no_grad(), student.teacher(folder, 3.0):
        target = student.velocity(x, t, cond)

    def gradients(inside):
        for p in student.trainable_parameters():
            p.grad = None
        v, v_teacher = student.velocity(x, t, cond), target
        if inside:
            with torch.no_grad(), student.teacher(folder, 3.0):
                v_teacher = student.velocity(x, t, cond)
        (v - v_teacher).square().mean().backward()
        return [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in student.trainable_parameters()]

    outside, between = gradients(False), gradients(True)
    assert max(g.abs().max() for g in outside) > 0
    for a, b in zip(outside, between, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


@both_kinds
def test_several_teachers_and_the_initial_weights_take_turns(taught, kind):
    student, folders, alone = taught(kind, "lora", "lora", "full")
    base = velocity(student)
    for _ in range(2):
        for folder, other in zip(folders, alone, strict=True):
            with student.teacher(folder, 1.0):
                torch.testing.assert_close(velocity(student), velocity(other), rtol=0, atol=1e-5)
            with student.teacher(None, 1.0):
                torch.testing.assert_close(velocity(student), base, rtol=0, atol=1e-6)
        train(student)


def test_lora_teachers_share_the_base(taught):
    """With LoRA there is no second network, and with full weights one for all teachers and the reference."""
    student, folders, alone = taught("lora", "lora", "lora")
    added = sum(p.numel() for p in student.model.trainable.parameters()) - student.num_trainable
    bare = sum(p.numel() for p in load(student.model.path).trainable.parameters())
    assert added - bare == sum(other.num_trainable for other in alone)
    own = student.model.trainable
    for folder in folders:
        with student.teacher(folder, 1.0):
            assert student.model.trainable is own
    full, folders, _ = taught("full", "lora", "lora", reference=False)
    places = set()
    for folder in (None, *folders):
        with full.teacher(folder, 1.0):
            places.add(id(full.model.trainable))
    assert len(places) == 1 and id(full.model.trainable) not in places


@both_kinds
def test_teachers_are_neither_learnt_nor_saved_nor_exported(taught, make, kind, tmp_path):
    student, *_ = taught(kind, "lora", "full", ema_decay=0.9)
    plain = make(kind, ema_decay=0.9)
    assert student.num_trainable == plain.num_trainable
    assert student.state_dict().keys() == plain.state_dict().keys()
    train(student, 2), train(plain, 2)
    one, two = student.export(tmp_path / "one"), plain.export(tmp_path / "two")
    files = [sorted(p.relative_to(f) for p in f.rglob("*") if p.is_file()) for f in (one, two)]
    assert files[0] == files[1]
    for name in (n for n in files[0] if n.suffix == ".safetensors"):
        with safe_open(one / name, "pt") as a, safe_open(two / name, "pt") as b:
            texts = [json.loads((f.metadata() or {}).get("lora_adapter_metadata", "{}")) for f in (a, b)]
            assert texts[0] == texts[1] and sorted(a.keys()) == sorted(b.keys())
            for key in a.keys():
                torch.testing.assert_close(a.get_tensor(key), b.get_tensor(key), rtol=0, atol=1e-6)


@both_kinds
def test_only_the_teacher_pays_for_its_guidance(taught, make, kind):
    student, (folder,), _ = taught(kind, "lora")
    conditions = Conditions(encode=student.encode)(PROMPTS)
    assert {"negative_prompt_embeds", "negative_pooled_prompt_embeds"} < set(conditions)
    x, t = noise(student), torch.tensor([0.9, 0.4])
    with torch.no_grad():
        bare = {name: tensor for name, tensor in conditions.items() if not name.startswith("negative_")}
        assert torch.equal(student.velocity(x, t, conditions), student.velocity(x, t, bare))
        with student.teacher(folder, 3.0):
            student.velocity(x, t, conditions)
        with student.teacher(None, 1.0):
            student.velocity(x, t, bare)
    assert student.calls == {"train": 4, "teacher": 4 + 2}


def test_teachers_that_are_absent_or_of_another_model_are_named(taught, make, tmp_path):
    with pytest.raises(ModelError, match=r"weights 'nowhere': .*nowhere is no folder. Give the output_dir of a run"):
        make(teachers=["nowhere"])
    with pytest.raises(ModelError, match="has no exported weights"):
        make(teachers=[str(tmp_path)])
    student, (folder,), _ = taught("lora", "lora")
    with (
        pytest.raises(ModelError, match=r"teacher 'other' was not loaded \('.*teacher_0'\)"),
        student.teacher("other", 1),
    ):
        pass
    with (
        pytest.raises(ModelError, match="guidance is 4, but conditions were encoded for 3"),
        student.teacher(folder, 4),
    ):
        pass
    with pytest.raises(ModelError, match="keep no reference"), make("full", reference=False).teacher(None, 1.0):
        pass

    for name, tensor in (("wider", torch.zeros(2, 48)), ("deeper", torch.zeros(2, 32))):
        file = f"{folder}/weights/pytorch_lora_weights.safetensors"
        with safe_open(file, "pt") as stored:
            tensors, metadata = {key: stored.get_tensor(key) for key in stored.keys()}, stored.metadata()
        key = next(key for key in tensors if "lora_A" in key)
        tensors[key if name == "wider" else key.replace("blocks.0", "blocks.7")] = tensor
        (tmp_path / name).mkdir()
        save_file(tensors, tmp_path / name / "pytorch_lora_weights.safetensors", metadata)
        for kind in KINDS:
            with pytest.raises(ModelError, match="does not fit the model. Give weights that were trained on the base"):
                make(kind, teachers=[str(tmp_path / name)])


@both_kinds
def test_a_full_teacher_of_another_size_is_named(make, kind, tmp_path):
    from diffusers import SD3Transformer2DModel

    policy = make("full")
    folder = policy.export(tmp_path / "weights")
    config = {**policy.model.trainable.config, "num_layers": 1}
    SD3Transformer2DModel.from_config(config).save_pretrained(folder / "transformer")
    with pytest.raises(ModelError, match="does not fit the model.*tensors differ in name or shape"):
        make(kind, teachers=[str(tmp_path)])


# -------------------------------------------------------------------------------------------------- average and state


@both_kinds
def test_averaged_weights_take_their_place_for_a_while(make, kind):
    policy = make(kind, ema_decay=0.5, ema_warmup=False)
    base = velocity(policy)
    train(policy)
    trained, weights = velocity(policy), policy.state_dict()
    with policy.averaged():
        between = velocity(policy)
        with pytest.raises(RuntimeError, match="changed places"):
            policy.state_dict()
    assert not torch.allclose(between, trained, atol=1e-4) and not torch.allclose(between, base, atol=1e-4)
    assert torch.equal(velocity(policy), trained)
    assert all(torch.equal(weights[n], t) for n, t in policy.state_dict().items())


def test_without_an_average_the_weights_stand_in(make):
    policy = make()
    train(policy)
    trained = velocity(policy)
    with policy.averaged():
        assert torch.equal(velocity(policy), trained)


@both_kinds
def test_state_round_trip_is_bit_exact(make, kind, tmp_path):
    policy, other = make(kind, ema_decay=0.9), make(kind, ema_decay=0.9, seed=3)
    train(policy, 2)
    state = policy.state_dict()
    assert all(t.device.type == "cpu" and not t.requires_grad for t in state.values())
    save_file(state, tmp_path / "state.safetensors")
    train(policy)  # the state is a copy: later steps do not reach it
    restored = load_file(tmp_path / "state.safetensors")
    assert all(torch.equal(state[n], restored[n]) for n in state)
    other.load_state_dict(restored)
    assert all(torch.equal(state[n], t) for n, t in other.state_dict().items())
    train(other)
    assert torch.equal(velocity(policy), velocity(other))
    with policy.averaged(), other.averaged():
        assert torch.equal(velocity(policy), velocity(other))


def test_states_that_do_not_fit_are_refused(make):
    state = make(ema_decay=0.9).state_dict()
    with pytest.raises(ModelError, match="has an average of weights, this policy has none"):
        make().load_state_dict(state)
    with pytest.raises(ModelError, match="differ in name or shape.*lora settings"):
        make(lora={**LORA, "rank": 2}, ema_decay=0.9).load_state_dict(state)
    untouched = make(ema_decay=0.9)
    before = untouched.state_dict()
    del state[next(iter(state))]
    with pytest.raises(ModelError, match="1 differ"):
        untouched.load_state_dict(state)
    assert all(torch.equal(before[n], t) for n, t in untouched.state_dict().items())


# -------------------------------------------------------------------------------------------------- the old policy


@both_kinds
def test_the_old_policy_is_the_trained_one_until_a_step_and_follows_it_by_its_decay(make, kind):
    policy = make(kind, old=True)
    base = velocity(policy)
    assert policy.old_is_current
    train(policy)
    trained, weights = velocity(policy), policy.state_dict()
    assert not policy.old_is_current
    with policy.old():
        assert torch.equal(velocity(policy), base)
    assert torch.equal(velocity(policy), trained)
    assert all(torch.equal(weights[n], t) for n, t in policy.state_dict().items())
    policy.follow(0.75)
    assert not policy.old_is_current
    moved = policy.state_dict()
    for name in [n for n in weights if n.startswith("weights.")]:
        old = "old." + name.removeprefix("weights.")
        torch.testing.assert_close(moved[old], 0.75 * weights[old] + 0.25 * weights[name], rtol=1e-6, atol=1e-7)
    policy.follow(1.0)
    assert all(torch.equal(moved[n], t) for n, t in policy.state_dict().items() if n != "old.count")
    policy.follow(0.0)
    assert policy.old_is_current
    with policy.old():
        assert torch.equal(velocity(policy), trained)


def test_the_old_policys_calls_are_counted_apart(make):
    policy = make(old=True)
    with policy.old():
        velocity(policy)
    train(policy)
    with policy.role("rollout"), policy.old():
        velocity(policy)
    assert policy.calls == {"old": 4, "train": 2}


def test_asking_the_old_policy_changes_no_gradient_but_may_not_come_between(make):
    policy = make(old=True)
    train(policy)
    x, t, cond = noise(policy), torch.tensor([0.9, 0.4]), policy.encode(PROMPTS)

    def gradients(before, between):
        for p in policy.trainable_parameters():
            p.grad = None
        if before:
            with torch.no_grad(), policy.old():
                policy.velocity(x, t, cond)
        loss = policy.velocity(x, t, cond).square().mean()
        if between:
            with torch.no_grad(), policy.old():
                policy.velocity(x, t, cond)
        loss.backward()
        return [p.grad.clone() for p in policy.trainable_parameters() if p.grad is not None]

    alone = gradients(before=False, between=False)
    assert any(grad.abs().max() > 0 for grad in alone)
    assert all(torch.equal(a, b) for a, b in zip(alone, gradients(before=True, between=False), strict=True))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        gradients(before=False, between=True)


def test_without_an_old_policy_the_trained_one_stands_in(make):
    policy = make()
    train(policy)
    policy.follow(0.5)
    trained = velocity(policy)
    with policy.old():
        assert torch.equal(velocity(policy), trained)
    assert policy.old_is_current and not any(n.startswith("old.") for n in policy.state_dict())


@both_kinds
@pytest.mark.parametrize("decay", [0.0, 0.5])
def test_the_old_policy_goes_on_bit_by_bit(make, kind, decay, tmp_path):
    policy, other = make(kind, old=True, ema_decay=0.9), make(kind, old=True, ema_decay=0.9, seed=3)
    train(policy)
    policy.follow(decay)
    state = policy.state_dict()
    save_file(state, tmp_path / "state.safetensors")
    other.load_state_dict(load_file(tmp_path / "state.safetensors"))
    assert other.old_is_current == policy.old_is_current == (decay == 0)
    for p in (policy, other):
        train(p)
        p.follow(0.3)
    assert policy.state_dict().keys() == other.state_dict().keys()
    assert all(torch.equal(t, other.state_dict()[n]) for n, t in policy.state_dict().items())
    with policy.old(), other.old():
        assert torch.equal(velocity(policy), velocity(other))


def test_a_state_without_the_old_policy_is_refused_and_so_is_one_too_many(make):
    with pytest.raises(ModelError, match="lacks weights that follow, this policy has them. Set the algorithm as in"):
        make(old=True).load_state_dict(make().state_dict())
    with pytest.raises(ModelError, match="has weights that follow, this policy has none"):
        make().load_state_dict(make(old=True).state_dict())
    policy = make(old=True)
    train(policy)
    with policy.old(), pytest.raises(RuntimeError, match="changed places"):
        policy.state_dict()


# -------------------------------------------------------------------------------------------------- export


@pytest.fixture
def exported(make, tmp_path):
    """A trained policy, its folder, and the pictures it draws."""

    def export(kind, averaged, guidance=1.0):
        policy = make(kind, ema_decay=0.5, ema_warmup=False, guidance=guidance)
        base = draw(policy)
        train(policy, 2)
        folder = policy.export(tmp_path / "weights", averaged=averaged, inference={"num_inference_steps": 3})
        if averaged:
            with policy.averaged():
                return policy, folder, draw(policy), base
        return policy, folder, draw(policy), base

    return export


@pytest.mark.parametrize("averaged", [False, True])
@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_a_lora_export_draws_the_same_pictures_in_diffusers(exported, tiny_sd3, averaged, guidance):  # noqa: F811
    """Alpha is not the rank here: diffusers would lose it without the metadata, and the scale with it (24/4 to 1)."""
    policy, folder, ours, base = exported("lora", averaged, guidance)
    settings = json.loads((folder / "inference.json").read_text())
    assert settings == {
        "num_inference_steps": 3, "guidance_scale": guidance, "max_sequence_length": 8, "height": 32, "width": 32,
    } | ({"negative_prompt": ""} if guidance > 1 else {})  # fmt: skip
    pipe = load_pipeline(tiny_sd3)
    pipe.load_lora_weights(folder)
    theirs = draw_with(pipe, policy, settings)
    assert (ours - base).abs().max() > 0.01
    torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-5)


def test_a_lora_export_carries_its_configuration(exported):
    _, folder, *_ = exported("lora", True)
    with safe_open(folder / "pytorch_lora_weights.safetensors", framework="pt") as file:
        metadata = json.loads(file.metadata()["lora_adapter_metadata"])
    assert metadata["transformer.r"] == 4 and metadata["transformer.lora_alpha"] == 24
    assert sorted(path.name for path in folder.iterdir()) == [
        "README.md", "inference.json", "pytorch_lora_weights.safetensors",
    ]  # fmt: skip


@pytest.mark.parametrize("averaged", [False, True])
def test_a_full_export_draws_the_same_pictures_in_diffusers(exported, tiny_sd3, averaged):  # noqa: F811
    from diffusers import SD3Transformer2DModel

    policy, folder, ours, base = exported("full", averaged)
    pipe = load_pipeline(tiny_sd3)
    pipe.transformer = SD3Transformer2DModel.from_pretrained(folder / "transformer")
    theirs = draw_with(pipe, policy, json.loads((folder / "inference.json").read_text()))
    assert (ours - base).abs().max() > 0.01
    torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-5)
    assert "_name_or_path" not in (folder / "transformer" / "config.json").read_text()
    assert {path.suffix for path in folder.rglob("*") if path.is_file()} == {".md", ".json", ".safetensors"}


@both_kinds
def test_the_readme_s_code_runs_and_draws_the_policy_s_picture(exported, kind, monkeypatch):
    policy, folder, *_ = exported(kind, True)
    code = (folder / "README.md").read_text().split("```python\n")[1].split("```")[0]
    assert len(code.splitlines()) <= 8
    monkeypatch.chdir(folder.parent)
    exec(code.replace("your prompt", PROMPTS[0]), {})
    x = torch.randn(1, *policy.model.noise_shape(32, 32), generator=torch.manual_seed(0))
    with policy.averaged(), torch.no_grad():
        x0 = euler(policy.velocity, x, policy.model.times(3, 32, 32), policy.encode(PROMPTS[:1]))
        ours = policy.model.decode(x0)[0, 0]
    theirs = torch.from_numpy(np.array(Image.open("image.png"))).permute(2, 0, 1) / 255
    torch.testing.assert_close(theirs, ours, rtol=0, atol=0.51 / 255)


def test_the_linear_grid_is_exported_as_sigmas(tiny_sd3, tmp_path):  # noqa: F811
    policy = Policy(load(tiny_sd3, grid="linear"), lora=LORA)
    train(policy)
    folder = policy.export(tmp_path, inference={"num_inference_steps": 3})
    settings = json.loads((folder / "inference.json").read_text())
    torch.testing.assert_close(draw_with(policy.model.pipe, policy, settings), draw(policy), rtol=0, atol=1e-5)


@both_kinds
@pytest.mark.parametrize("into", ["policy", "frozen", "model", "pipeline"])
def test_exported_weights_can_be_applied_again(exported, make, tiny_sd3, kind, into):  # noqa: F811
    policy, folder, ours, _ = exported(kind, True)
    if into == "policy":
        target = make(kind, ema_decay=0.5, seed=7)
        load_weights(target, folder)
        with target.averaged():
            torch.testing.assert_close(draw(target), ours, rtol=0, atol=1e-5)
        other = target
    elif into == "frozen":
        other = Policy(load(tiny_sd3), frozen=True)
        load_weights(other, folder)
    elif into == "model":
        model = load(tiny_sd3)
        load_weights(model, folder)
        assert not any(p.requires_grad for p in model.trainable.parameters())
        other = Policy(model, frozen=True)
    else:
        pipe = load_pipeline(tiny_sd3)
        load_weights(pipe, folder)
        settings = json.loads((folder / "inference.json").read_text())
        torch.testing.assert_close(draw_with(pipe, policy, settings), ours, rtol=0, atol=1e-5)
        return
    torch.testing.assert_close(draw(other), ours, rtol=0, atol=1e-5)


def test_weights_that_do_not_fit_are_refused(exported, make, tmp_path):
    _, folder, *_ = exported("lora", False)
    with pytest.raises(ModelError, match="neither pytorch_lora_weights.safetensors nor a folder transformer/"):
        load_weights(make(), tmp_path / "nothing")
    with pytest.raises(ModelError, match="lora alpha 24.*the policy 8"):
        load_weights(make(lora={"rank": 4, "alpha": 8}), folder)
    with pytest.raises(ModelError, match="differ in name or shape"):
        load_weights(make(lora={"rank": 2, "alpha": 24}), folder)
    with pytest.raises(ModelError, match="are LoRA, the policy trains all weights"):
        load_weights(make("full"), folder)
    full = make("full").export(tmp_path / "full")
    with pytest.raises(ModelError, match="are a full export, the policy trains LoRA"):
        load_weights(make(), full)


def test_training_does_not_start_on_a_model_with_other_adapters(exported, tiny_sd3):  # noqa: F811
    _, folder, *_ = exported("lora", False)
    model = load(tiny_sd3)
    load_weights(model, folder)
    for lora in (LORA, None):
        with pytest.raises(ModelError, match="carries adapters already"):
            Policy(model, lora=lora)


def test_exporting_again_replaces_and_does_not_mix(make, tmp_path):
    policy = make("full")
    first = policy.export(tmp_path)
    before = load_file(next(first.rglob("*.safetensors")))
    train(policy)
    policy.export(tmp_path)
    after = load_file(next(first.rglob("*.safetensors")))
    assert len(list(first.rglob("*.safetensors"))) == 1
    assert any(not torch.equal(before[n], after[n]) for n in before)


def test_a_model_without_diffusers_can_be_a_policy():
    """The protocol is enough for full training; only LoRA and export need a diffusers component."""

    class Toy:
        def __init__(self):
            self.trainable = torch.nn.Linear(2, 2)

        def encode(self, prompts):
            return {"prompt_embeds": torch.zeros(len(prompts), 2)}

        def velocity(self, x, t, cond, guidance=1.0):
            return self.trainable(x) + t[:, None]

    policy = Policy(Toy(), reference=True)
    x, t = torch.randn(3, 2), torch.ones(3)
    before = policy.velocity(x, t, {})
    with torch.no_grad():
        policy.trainable_parameters()[0].add_(1)
    assert not torch.equal(policy.velocity(x, t, {}), before)
    with policy.reference():
        assert torch.equal(policy.velocity(x, t, {}), before)
    assert copy.deepcopy(policy).num_trainable == 6
