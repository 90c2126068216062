"""What every algorithm owes, checked for each one in the folder; a new file is picked up by being there."""

import importlib
import inspect
import pkgutil
from dataclasses import replace

import pytest
import torch
from pydantic import ValidationError

import flowrl.algorithms
from flowrl.algorithms.policy_gradient import PolicyGradient
from flowrl.algorithms.schedule import credit_of, plans_of
from flowrl.history import PromptHistory
from flowrl.types import Hyperparameters
from samplers import linear_times
from tests.algorithms.toy import ToyPolicy, collect, gradient, live
from tests.algorithms.words import Words, moved, tokens_with
from tests.algorithms.words import batch_of as answers
from tests.algorithms.words import gradient as gradient_of
from tests.algorithms.words import live as living

SDES = {"flow_sde": 0.7, "dance_sde": 0.3, "wan_sde": 0.8, "cps": 0.6, "ddim": 0.8}


def algorithms():
    names = [module.name for module in pkgutil.iter_modules(flowrl.algorithms.__path__)]
    modules = [importlib.import_module(f"flowrl.algorithms.{name}") for name in names]
    return [
        thing
        for module in modules
        for thing in vars(module).values()
        if inspect.isclass(thing)
        and issubclass(thing, Hyperparameters)
        and thing.__module__ == module.__name__
        and not inspect.isabstract(thing)
    ]


def make(cls, **wanted):
    """The algorithm with those of the wanted settings that it has."""
    return cls(**{name: value for name, value in wanted.items() if name in cls.model_fields})


ALL = algorithms()
WRITERS = [cls for cls in ALL if cls().needs.tokens]
PAINTERS = [cls for cls in ALL if not cls().needs.tokens]
FAMILY = [cls for cls in ALL if issubclass(cls, PolicyGradient)]
every = pytest.mark.parametrize("cls", ALL, ids=lambda cls: cls.__name__)
every_painter = pytest.mark.parametrize("cls", PAINTERS, ids=lambda cls: cls.__name__)
every_writer = pytest.mark.parametrize("cls", WRITERS, ids=lambda cls: cls.__name__)
every_policy_gradient = pytest.mark.parametrize("cls", FAMILY, ids=lambda cls: cls.__name__)
# Credit by a sample's own group alone, whatever its place in the tree.
flat = pytest.mark.parametrize(
    "cls",
    [cls for cls in FAMILY if cls.__name__ not in ("BranchGRPO", "TempFlowGRPO", "GranularGRPO")],
    ids=lambda cls: cls.__name__,
)
K = 48  # every method's default tree and tails divide it


def weight(algorithm, batch):
    """The method's factor on each edge."""
    found = algorithm.weight(batch)
    return torch.ones(len(batch.trajectory)) if found is None else found


def test_the_folder_was_listed():
    assert {"FlowGRPO", "MixGRPO", "GRPO", "PPO"} <= {cls.__name__ for cls in ALL}
    assert all(callable(getattr(cls, "plan", None)) for cls in PAINTERS)
    assert not any(hasattr(cls, "plan") for cls in WRITERS)


@every
def test_fields_are_documented_and_have_defaults(cls):
    for name, field in cls.model_fields.items():
        assert field.description, f"{cls.__name__}.{name} has no description"
        assert not field.is_required(), f"{cls.__name__}.{name} has no default"
    assert "arXiv:" in (cls.__doc__ or "").splitlines()[0]
    assert "| symbol |" in (inspect.getmodule(cls).__doc__ or "")


@every
def test_record_is_frozen_strict_and_survives_a_round_trip(cls):
    record = cls()
    assert cls.model_validate_json(record.model_dump_json()) == record
    with pytest.raises(ValidationError, match="frozen"):
        record.clip_range = 0.1
    with pytest.raises(ValidationError, match="clip_rnge"):
        cls(clip_rnge=1e-4)


@every_painter
def test_plan_is_a_pure_function_with_something_to_train(cls):
    algorithm = cls()
    for iteration in (0, 1, 7, 100, 10_000):
        first, again = (plans_of(cls(), linear_times(algorithm.num_steps), iteration, K, seed) for seed in (0, 0))
        assert first == again
        for plan in first:
            assert plan.num_stochastic >= algorithm.needs.logprobs
            assert not plan.stochastic[-1], "noise of the last step would stay in the sample"


@every_policy_gradient
def test_groups_of_one_are_refused(cls):
    algorithm = cls()
    with pytest.raises(ValueError, match="samples_per_prompt=1.*at least 2"):
        algorithm.plan(linear_times(algorithm.num_steps), 0, 1, 0)


@every_policy_gradient
@pytest.mark.parametrize("sde", SDES)
@pytest.mark.parametrize("shared_noise", [False, True])
def test_first_update_is_exactly_on_policy(cls, sde, shared_noise):
    """Ratio 1, loss = -mean A w, and the gradient -mean A w dlogp."""
    if shared_noise and "shared_noise" not in cls.model_fields:
        pytest.skip("the tree says what is shared")
    algorithm = make(cls, sde=sde, eta=SDES[sde], shared_noise=shared_noise, split_noise=1.1)
    policy = ToyPolicy()
    batch = live(collect(algorithm, policy, k=K))
    loss, grad = gradient(algorithm, policy, batch)
    assert float(loss.metrics["ratio_max_dev"]) <= 1e-6
    assert float(loss.metrics["clip_frac"]) == 0
    expected = -float((batch.advantages * weight(algorithm, batch)).mean())
    assert float(loss.metrics["policy_loss"]) == pytest.approx(expected, abs=1e-5)
    assert loss.value.isfinite()
    assert grad.isfinite().all()
    assert grad.abs().min() > 0
    assert all(not value.requires_grad and value.isfinite() for value in loss.metrics.values())


@every_policy_gradient
def test_edges_without_credit_have_no_policy_gradient(cls):
    algorithm, policy = make(cls, kl_coef=0.0, clip_range=0.5), ToyPolicy()
    batch = live(collect(algorithm, policy, k=K))
    batch = batch.select(torch.arange(len(batch.trajectory) // 2 * 2))
    with torch.no_grad():
        policy.bias += 0.01
    batch.advantages = torch.where(torch.arange(len(batch.trajectory)) % 2 == 0, batch.advantages, 0.0)
    _, expected = gradient(algorithm, policy, batch.select(torch.arange(0, len(batch.trajectory), 2)))
    _, found = gradient(algorithm, policy, batch)
    torch.testing.assert_close(found, expected / 2, rtol=1e-4, atol=1e-7)
    batch.advantages = torch.zeros(len(batch.trajectory))
    assert (gradient(algorithm, policy, batch)[1] == 0).all()


@flat
def test_a_sample_without_a_verdict_is_as_if_never_drawn(cls):
    """R1: its edges leave, and the gradient is that of a run without it."""
    algorithm, policy = make(cls, kl_coef=0.0, step_share=1.0), ToyPolicy()
    batch = collect(algorithm, policy)
    batch.rewards[3] = batch.scores["reward"][3] = float("nan")
    valid = ~batch.rewards.isnan()
    batch.advantages = algorithm.credit(batch)
    gone = (batch.trajectory.leaves & valid).any(1).logical_not()
    assert gone.any() and torch.equal(batch.advantages.isnan(), gone)
    _, found = gradient(algorithm, policy, live(batch))
    batch.trajectory, batch.rewards = batch.trajectory.keep_leaves(valid), batch.rewards[valid]
    batch.scores = {"reward": batch.rewards}
    batch.advantages = algorithm.credit(batch)
    _, expected = gradient(algorithm, policy, batch)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


@every_policy_gradient
def test_a_missing_verdict_is_nobody_elses_business(cls):
    """R1 on trees: other prompts keep their credit, and no edge of any gets NaN for a sample that is not below it."""
    algorithm = make(cls, adv_std="group", step_share=1.0)
    batch = collect(algorithm, ToyPolicy(), k=K)
    before = batch.advantages
    batch.rewards[3] = batch.scores["reward"][3] = float("nan")
    after = algorithm.credit(batch)
    others = ~batch.trajectory.leaves[:, batch.trajectory.group == 0].any(1)
    if not algorithm.needs.history:  # whose short buffers are filled up with everybody's rewards
        torch.testing.assert_close(after[others], before[others], rtol=0, atol=0, equal_nan=True)
    some = (batch.trajectory.leaves & batch.rewards.isfinite()).any(1)
    assert torch.equal(after.isnan(), before.isnan() | ~some)


@every_painter
def test_constant_rewards_give_no_credit(cls):
    algorithm = cls()
    batch = collect(algorithm, ToyPolicy(), k=K)
    batch.rewards = torch.full_like(batch.rewards, 0.3) + 1e-7 * torch.rand(len(batch.rewards))
    batch.scores = {"reward": batch.rewards}
    batch.history = PromptHistory(K, 4)
    for prompt, rewards in enumerate(batch.rewards.view(4, K)):
        batch.history.add(prompt, rewards, 0)
    batch.draws = algorithm.draws(batch)
    credit = algorithm.credit(batch)
    assert (credit.nan_to_num() == 0).all() and ((credit == 0).any() or not len(batch.rows))


@flat
def test_credit_follows_the_samples_order(cls):
    """Renumbering the samples renumbers nothing else: an edge keeps its credit."""
    algorithm = make(cls, step_share=1.0)
    batch = collect(algorithm, ToyPolicy())
    before = algorithm.credit(batch)
    order = torch.randperm(batch.trajectory.num_leaves, generator=torch.Generator().manual_seed(0))
    shuffled = {name: getattr(batch.trajectory, name)[order] for name in ("x0", "group", "leaf_prompt")}
    fields = {
        name: getattr(batch.trajectory, name)
        for name in ("x", "x_next", "t", "t_next", "step", "state", "prompt", "eta", "logprob")
    }
    batch.trajectory = type(batch.trajectory)(leaves=batch.trajectory.leaves[:, order], **shuffled, **fields)
    batch.rewards = batch.rewards[order]
    batch.scores = {"reward": batch.rewards}
    torch.testing.assert_close(algorithm.credit(batch), before, rtol=1e-6, atol=0)


@every_writer
def test_answers_have_credit_or_leave_training(cls):
    """One number an answer or a token, fp32, and NaN for an answer without a verdict, whatever the others got."""
    algorithm, policy = make(cls, k=2), Words()
    before = answers(policy, algorithm)
    rewards = before.rewards.clone()
    rewards[3] = float("nan")
    found = algorithm.credit(replace(before, rewards=rewards, scores={"reward": rewards}))
    assert found.dtype == torch.float32 and found.shape in ((16,), before.tokens.ids.shape)
    assert found[3].isnan().all() and not found.isnan().all()
    assert not credit_of(algorithm, before).isnan().all()


@pytest.mark.parametrize("cls", [cls for cls in WRITERS if not cls().needs.whole_groups], ids=lambda cls: cls.__name__)
def test_an_answer_with_no_token_of_the_policys_is_not_trained_on(cls):
    algorithm, policy = make(cls, k=2), Words()
    batch = answers(policy, algorithm)
    mask = batch.tokens.mask.clone()
    mask[5] = False
    batch.tokens = tokens_with(batch.tokens, mask=mask)
    assert algorithm.credit(batch)[5].isnan().all()


@every_writer
def test_the_loss_of_answers_is_finite_and_teaches(cls):
    """On and off policy, with metrics that can be merged."""
    algorithm, policy = make(cls, k=2), Words()
    batch = living(answers(policy, algorithm))
    for by in (0.0, 0.3):
        loss, grad = gradient_of(algorithm, moved(policy, by), batch)
        assert loss.value.isfinite() and grad.isfinite().all() and grad.norm() > 0
        assert all(not value.requires_grad and value.dim() == 0 and value.isfinite() for value in loss.metrics.values())


@every_writer
@pytest.mark.parametrize("size", [1, 3])
def test_the_loss_of_answers_does_not_depend_on_the_cut(cls, size):
    """Value and gradient of an update in parts of whole units, weighed by their shares."""
    algorithm, policy = make(cls, k=2), Words()
    batch = living(answers(policy, algorithm))
    moved(policy)
    loss, expected = gradient_of(algorithm, policy, batch)
    unit = batch.group if algorithm.needs.whole_groups else torch.arange(len(batch.tokens))
    total = algorithm.mass(batch)
    value, grad = 0.0, torch.zeros_like(expected)
    for names in unit.unique().flip(0).split(size):
        part = batch.select(torch.isin(unit, names))
        share = algorithm.share(part, total)
        part_loss, part_grad = gradient_of(algorithm, policy, part, share)
        value, grad = value + share * part_loss.value, grad + part_grad
    torch.testing.assert_close(value, loss.value)
    torch.testing.assert_close(grad, expected, rtol=1e-6, atol=1e-9)
