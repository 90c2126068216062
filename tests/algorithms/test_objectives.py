"""The objectives against their cases, closed-form gradients, published vectors and the densities of torch."""

import math
from typing import get_args

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from flowrl.algorithms.objectives import MAX_LOG_RATIO, NEEDS_MEANS, Edges, Limits, Objective, objective

NAMES = get_args(Objective)
LIMITS = Limits(low=0.1, high=0.3, trust=0.2, dual=3.0)
METRICS = {
    "ratio_mean", "ratio_max_dev", "clip_frac", "clip_frac_low", "clip_frac_high", "approx_kl", "approx_kl_k1",
    "approx_kl_k3", "clamp_frac",
}  # fmt: skip
PENALISED = ("dro", "kl_cov")
"""Objectives with a loss of edges without an advantage."""


def edges_of(log_ratio, advantages, **known):
    """Edges of std 0.5, each of a sample (or answer) of its own, with no divergence, unless `known` says otherwise."""
    num = len(log_ratio)
    values = {
        "logprob": torch.full((num,), -0.7),
        "std": torch.full((num,), 0.5),
        "h": torch.full((num,), 0.1),
        "divergence": torch.zeros(num),
        "segment": torch.arange(num),
        "position": torch.zeros(num, dtype=torch.long),
    }
    return Edges(log_ratio=log_ratio, advantages=advantages, **(values | known))


def some(num=200, scale=0.3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    draw = lambda: torch.randn(num, generator=generator, dtype=torch.float64)  # noqa: E731
    return (scale * draw()).requires_grad_(), draw()


def clipped_by_cases(log_ratio, advantage, low, high):
    ratio = math.exp(log_ratio)
    return max(-advantage * ratio, -advantage * min(max(ratio, 1 - low), 1 + high))


def pairs(*tensors):
    return zip(*(tensor.tolist() for tensor in tensors), strict=True)


# ------------------------------------------------------------------------------------------- what all have in common


@pytest.mark.parametrize("name", NAMES)
def test_on_policy_the_loss_is_minus_the_advantage_and_so_is_the_gradient(name):
    """The policy gradient theorem; guard's exponent is in units of std."""
    log_ratio = torch.zeros(4, requires_grad=True)
    advantages, std = torch.tensor([2.0, -0.5, 0.0, 1.0]), torch.tensor([0.1, 0.5, 0.5, 2.0])
    segment, position = torch.tensor([0, 0, 0, 5]), torch.tensor([0, 1, 2, 0])
    edges = edges_of(log_ratio, advantages, std=std, segment=segment, position=position)
    loss, metrics = objective(name, edges, LIMITS)
    loss.sum().backward()
    assert torch.equal(loss, -advantages)
    expected = -advantages * std if name == "guard" else -advantages
    torch.testing.assert_close(log_ratio.grad, expected, rtol=1e-6 if name == "sapo" else 0, atol=0)
    assert metrics.keys() == METRICS
    assert {key: float(value) for key, value in metrics.items()} == dict.fromkeys(METRICS, 0.0) | {
        "ratio_mean": 1.0,
        "clip_frac": 0.25 if name == "kl_cov" else 0.0,
    }


@pytest.mark.parametrize("name", [name for name in NAMES if name not in PENALISED])
def test_without_an_advantage_there_is_exactly_nothing(name):
    """Off-policy and in a sample whose other steps do have one."""
    log_ratio, advantages = some()
    advantages[::3] = 0
    divergence = 0.3 * torch.rand(200, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    number = torch.arange(200)
    edges = edges_of(log_ratio, advantages, segment=number // 5, position=number % 5, divergence=divergence)
    loss, _ = objective(name, edges, LIMITS)
    loss.sum().backward()
    assert (loss[::3] == 0).all() and (log_ratio.grad[::3] == 0).all()
    assert (loss != 0).any() and (log_ratio.grad != 0).any()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("value", [1e4, -1e4, float("inf"), -float("inf")])
@pytest.mark.parametrize("advantage", [1.0, -1.0, 0.0])
def test_huge_log_ratios_stay_finite_and_are_counted(name, value, advantage):
    """N2."""
    log_ratio = torch.tensor([value, 0.0], requires_grad=True)
    loss, metrics = objective(name, edges_of(log_ratio, torch.tensor([advantage, 1.0])), LIMITS)
    loss.sum().backward()
    assert loss.isfinite().all()
    assert log_ratio.grad.isfinite().all()
    assert log_ratio.grad[0] == 0
    assert log_ratio.grad[1] == (-0.5 if name == "guard" else -1)
    assert metrics["clamp_frac"] == 0.5


@pytest.mark.parametrize("name", NAMES)
def test_advantages_of_another_precision_are_taken(name):
    loss, _ = objective(name, edges_of(torch.zeros(2), torch.tensor([1.0, -1.0], dtype=torch.float64)), LIMITS)
    assert loss.dtype == torch.float32
    assert loss.tolist() == [-1, 1]


@pytest.mark.parametrize("name", NAMES)
def test_means_are_asked_for_by_those_that_read_them(name):
    """NEEDS_MEANS is what a run stores means for: it must be neither short nor long."""
    edges = edges_of(torch.zeros(2), torch.ones(2), divergence=None)
    if name in NEEDS_MEANS:
        with pytest.raises(ValueError, match=f"'{name}' needs edges.divergence"):
            objective(name, edges, LIMITS)
    else:
        objective(name, edges, LIMITS)


def test_metrics_are_those_of_the_ratio():
    log_ratio, advantages = some()
    metrics = objective("clip", edges_of(log_ratio, advantages), LIMITS)[1]
    ratio = log_ratio.detach().exp()
    assert float(metrics["clip_frac"]) == pytest.approx(float(((ratio < 0.9) | (ratio > 1.3)).double().mean()))
    assert float(metrics["ratio_mean"]) == pytest.approx(float(ratio.mean()))
    assert float(metrics["ratio_max_dev"]) == pytest.approx(float((ratio - 1).abs().max()))
    assert float(metrics["approx_kl"]) == pytest.approx(float((ratio.log() ** 2).mean() / 2))
    assert not any(value.requires_grad for value in metrics.values())


def test_an_unknown_objective_is_named():
    with pytest.raises(ValueError, match="'ppo'; choose clip, dual_clip, gspo"):
        objective("ppo", edges_of(torch.zeros(1), torch.ones(1)), LIMITS)


# --------------------------------------------------------------------------------------------------- clip, dual_clip


@pytest.mark.parametrize(("low", "high"), [(1e-4, 1e-4), (0.2, 0.2), (0.1, 0.3)])
def test_clip_equals_the_cases(low, high):
    log_ratio, advantages = some()
    loss, _ = objective("clip", edges_of(log_ratio, advantages), LIMITS._replace(low=low, high=high))
    expected = [clipped_by_cases(r, a, low, high) for r, a in pairs(log_ratio, advantages)]
    assert loss.tolist() == pytest.approx(expected, rel=1e-12)


def test_gradient_stops_only_on_the_good_side():
    """-A r where the ratio has moved against the advantage or not left the range, else 0."""
    log_ratio = torch.tensor([0.5, 0.5, -0.5, -0.5, 0.05]).requires_grad_()
    advantages = torch.tensor([1.0, -1.0, 1.0, -1.0, 1.0])
    objective("clip", edges_of(log_ratio, advantages), LIMITS._replace(low=0.1, high=0.1))[0].sum().backward()
    ratio = log_ratio.detach().exp()
    assert torch.equal(log_ratio.grad, -advantages * ratio * torch.tensor([0.0, 1, 1, 0, 1]))


def test_dual_clip_caps_negative_advantages_only():
    log_ratio, advantages = some(scale=1.5)
    loss, metrics = objective("dual_clip", edges_of(log_ratio, advantages), LIMITS)
    loss.sum().backward()
    plain = [clipped_by_cases(r, a, 0.1, 0.3) for r, a in pairs(log_ratio, advantages)]
    expected = [min(p, -3 * a) if a < 0 else p for p, a in zip(plain, advantages.tolist(), strict=True)]
    assert loss.tolist() == pytest.approx(expected, rel=1e-12)
    ratio = log_ratio.detach().exp()
    capped = (advantages < 0) & (ratio > 3)
    assert capped.any() and (log_ratio.grad[capped] == 0).all()
    assert (log_ratio.grad[(advantages < 0) & (ratio > 1.3) & ~capped] != 0).all()
    assert float(metrics["clip_frac"]) == pytest.approx(float(((ratio < 0.9) | (ratio > 1.3)).double().mean()))


def test_dual_clip_counts_what_only_the_cap_cuts():
    edges = edges_of(torch.tensor([0.2, 0.2, 0.0]), torch.tensor([-1.0, 1.0, -1.0]))
    assert float(objective("dual_clip", edges, LIMITS._replace(dual=1.1))[1]["clip_frac"]) == pytest.approx(1 / 3)


@pytest.mark.parametrize("dual", [1.0, 0.5, float("nan")])
def test_a_cap_at_ratio_one_is_refused(dual):
    with pytest.raises(ValueError, match="more than 1"):
        objective("dual_clip", edges_of(torch.zeros(1), torch.ones(1)), LIMITS._replace(dual=dual))


# -------------------------------------------------------------------------------------------------------------- gspo


def test_gspo_has_the_ratios_of_the_known_vectors():
    """Two samples with log-ratios (.3, -.5) and (.1): s = exp(-.1), exp(.1)."""
    log_ratio, segment = torch.tensor([0.3, 0.1, -0.5]), torch.tensor([7, 2, 7])
    edges = edges_of(log_ratio, torch.tensor([1.0, -1.0, 1.0]), segment=segment)
    loss, metrics = objective("gspo", edges, LIMITS._replace(low=0.2, high=0.2))
    assert loss.tolist() == pytest.approx([-0.9048374, 1.1051710, -0.9048374], rel=1e-6)
    assert float(metrics["clip_frac"]) == 0
    assert float(metrics["approx_kl"]) == pytest.approx((0.3**2 + 0.5**2 + 0.1**2) / 6)


def test_gspo_is_the_sequence_form_where_a_sample_has_one_advantage():
    """Loss and gradient of n (segment's loss), the ratio clipped as a whole, in any order of the edges."""
    log_ratio, advantages = some()
    order = torch.randperm(200, generator=torch.Generator().manual_seed(1))
    segment = (torch.arange(200) // 7)[order]
    advantages = advantages[segment]
    loss, metrics = objective("gspo", edges_of(log_ratio, advantages, segment=segment), LIMITS)
    loss.sum().backward()

    other = log_ratio.detach().clone().requires_grad_()
    total, outside = torch.zeros((), dtype=torch.float64), 0
    for name in segment.unique():
        mine = segment == name
        ratio, advantage = other[mine].mean().exp(), advantages[mine][0]
        value = torch.maximum(-advantage * ratio, -advantage * ratio.clamp(0.9, 1.3))
        assert loss[mine].tolist() == pytest.approx([value.item()] * int(mine.sum()), rel=1e-12)
        total = total + mine.sum() * value
        outside += int(mine.sum()) * bool(ratio < 0.9 or ratio > 1.3)
    total.backward()
    torch.testing.assert_close(log_ratio.grad, other.grad, rtol=1e-12, atol=1e-14)
    assert (other.grad == 0).any() and (other.grad != 0).any()
    assert float(metrics["clip_frac"]) == pytest.approx(outside / 200)


def test_gspo_judges_a_sample_by_its_mean_even_where_single_steps_are_clamped():
    log_ratio = torch.tensor([30.0, -30.0, 0.5, -0.5], requires_grad=True)
    edges = edges_of(log_ratio, torch.ones(4), segment=torch.tensor([0, 0, 1, 1]))
    loss, metrics = objective("gspo", edges, LIMITS)
    loss.sum().backward()
    assert loss.tolist() == [-1] * 4
    assert log_ratio.grad.tolist() == [0, 0, -1, -1]
    assert metrics["clamp_frac"] == 0


# ------------------------------------------------------------------------------------------------------------- cispo


def test_cispo_weighs_the_gradient_of_the_new_logprob():
    """-clip(r) A grad log pi, from the density itself; also where clip has no gradient."""
    generator = torch.Generator().manual_seed(0)
    x, advantages = (torch.randn(50, generator=generator, dtype=torch.float64) for _ in range(2))
    mean = (0.5 * torch.randn(50, generator=generator, dtype=torch.float64)).requires_grad_()
    old = Normal(torch.zeros(50, dtype=torch.float64), 0.8).log_prob(x)
    log_ratio = Normal(mean, 0.8).log_prob(x) - old
    loss, metrics = objective("cispo", edges_of(log_ratio, advantages), LIMITS)
    found = torch.autograd.grad(loss.sum(), mean, retain_graph=True)[0]
    weight = log_ratio.detach().exp().clamp(0.9, 1.3)
    expected = torch.autograd.grad((-weight * advantages * Normal(mean, 0.8).log_prob(x)).sum(), mean)[0]
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(loss, -weight * advantages, rtol=1e-12, atol=0)
    assert float(metrics["clip_frac"]) == pytest.approx(float((weight != log_ratio.exp()).double().mean()))
    assert 0 < metrics["clip_frac"] < 1


# --------------------------------------------------------------------------------------------------------- spo, drpo


def test_spo_fades_turns_at_the_edge_and_comes_back():
    """Weight of -A r's gradient: 1 - sign(A (r - 1)) |r - 1| / trust."""
    log_ratio, advantages = some()
    loss, metrics = objective("spo", edges_of(log_ratio, advantages), LIMITS)
    loss.sum().backward()
    for lr, a, value, grad in pairs(log_ratio, advantages, loss, log_ratio.grad):
        r = math.exp(lr)
        weight = 1 - math.copysign(1, a * (r - 1)) * abs(r - 1) / 0.2
        assert value == pytest.approx(-a * r + abs(a) * (r - 1) ** 2 / 0.4, rel=1e-12)
        assert grad == pytest.approx(-a * r * weight, rel=1e-9, abs=1e-12)
    outside = (log_ratio.detach().exp() - 1).abs() > 0.2
    assert float(metrics["clip_frac"]) == pytest.approx(float(outside.double().mean()))


def test_drpo_has_the_known_values():
    """trust .1, the probabilities of four tokens before and after: values of an independent computation."""
    logprob = torch.tensor([-0.3, -0.9, -3.5, -0.05], dtype=torch.float64)
    log_ratio = (torch.tensor([-0.2, -1.0, -3.0, -0.05], dtype=torch.float64) - logprob).requires_grad_()
    advantages = torch.tensor([1.0, -2.0, 0.5, -1.0], dtype=torch.float64)
    loss, _ = objective("drpo", edges_of(log_ratio, advantages, logprob=logprob), LIMITS._replace(trust=0.1))
    loss.sum().backward()
    assert loss.tolist() == pytest.approx([-1.064200, 1.846493, -0.792590, 1.0], abs=1e-6)
    assert log_ratio.grad.tolist() == pytest.approx([-0.244104, 1.109508, -0.662871, 1.0], abs=1e-6)


def test_drpo_bounds_the_change_of_the_density():
    """The gradient's weight is 1 - sign(A (r - 1)) |pi - mu| / trust, whatever the ratio."""
    log_ratio, advantages = some()
    logprob = torch.linspace(-4, 1, 200, dtype=torch.float64)
    loss, _ = objective("drpo", edges_of(log_ratio, advantages, logprob=logprob), LIMITS)
    loss.sum().backward()
    for lr, a, before, grad in pairs(log_ratio, advantages, logprob, log_ratio.grad):
        change = math.exp(before + lr) - math.exp(before)
        expected = -a * math.exp(lr) * (1 - math.copysign(1, a * change) * abs(change) / 0.2)
        assert grad == pytest.approx(expected, rel=1e-9, abs=1e-12)


# ------------------------------------------------------------------------------------------------------- guard, dppo


def gaussian_steps(num=40, dims=12, moved=0.3, seed=0):
    """Steps mu_old -> x_next = mu_old + std eps, seen by a policy whose mean has moved: all from torch's densities."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda: torch.randn(num, dims, generator=generator, dtype=torch.float64)  # noqa: E731
    std = torch.linspace(0.05, 2.0, num, dtype=torch.float64)
    eps, mean_old = draw(), draw()
    mean = (mean_old + moved * std[:, None] * draw()).requires_grad_()
    x_next = mean_old + std[:, None] * eps
    old, new = Normal(mean_old, std[:, None]), Normal(mean, std[:, None])
    log_ratio = (new.log_prob(x_next) - old.log_prob(x_next)).mean(1)
    divergence = kl_divergence(new, old).mean(1)
    return eps, mean_old, mean, edges_of(log_ratio, torch.ones(num), std=std, divergence=divergence)


def test_guards_exponent_is_the_move_along_the_noise():
    """(lr + divergence) std = mean_d(dmu eps), read off the loss -A r where nothing is clipped; so is its gradient."""
    eps, mean_old, mean, edges = gaussian_steps()
    loss, metrics = objective("guard", edges, LIMITS._replace(low=1.0, high=1e9))
    along = ((mean - mean_old).detach() * eps).mean(1)
    torch.testing.assert_close(loss, -along.exp(), rtol=1e-9, atol=0)
    assert float(metrics["ratio_mean"]) == pytest.approx(float(along.exp().mean()))
    found = torch.autograd.grad(loss.sum(), mean)[0]
    torch.testing.assert_close(found, -along.exp()[:, None] * eps / eps.shape[1], rtol=1e-9, atol=1e-12)


def test_guard_clips_the_normalised_ratio():
    _, _, _, edges = gaussian_steps()
    low, high = 0.05, 0.02
    loss, metrics = objective("guard", edges, LIMITS._replace(low=low, high=high))
    exponent = (edges.log_ratio + edges.divergence) * edges.std
    expected = [clipped_by_cases(lr, 1.0, low, high) for lr in exponent.tolist()]
    assert loss.tolist() == pytest.approx(expected, rel=1e-12)
    outside = (exponent.exp() < 1 - low) | (exponent.exp() > 1 + high)
    assert float(metrics["clip_frac"]) == pytest.approx(float(outside.double().mean()))
    assert 0 < metrics["clip_frac"] < 1


def test_dppo_masks_what_is_far_and_moves_on():
    _, _, _, edges = gaussian_steps(num=200)
    log_ratio = edges.log_ratio.detach().requires_grad_()
    advantages = torch.randn(200, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    trust = float(edges.divergence.detach().median())
    edges = edges._replace(log_ratio=log_ratio, advantages=advantages)
    loss, metrics = objective("dppo", edges, LIMITS._replace(trust=trust))
    loss.sum().backward()
    kinds = set()
    for lr, a, far, value, grad in pairs(log_ratio, advantages, edges.divergence, loss, log_ratio.grad):
        outwards = (a > 0 and lr > 0) or (a < 0 and lr < 0)
        masked = far >= trust and outwards
        expected = 0.0 if masked else -a * math.exp(lr)
        assert (value, grad) == (pytest.approx(expected, rel=1e-12), pytest.approx(expected, rel=1e-12))
        kinds.add((far >= trust, outwards, a > 0))
    assert len(kinds) == 8
    assert float(metrics["clip_frac"]) == pytest.approx(float((loss == 0).double().mean()))
    assert 0 < metrics["clip_frac"] < 0.5


def test_the_divergence_bounds_dppo_without_a_gradient_of_its_own():
    _, _, mean, edges = gaussian_steps()
    loss, _ = objective("dppo", edges, LIMITS._replace(trust=0.0))
    found = torch.autograd.grad(loss.sum(), mean, retain_graph=True)[0]
    kept = (edges.log_ratio <= 0).double()
    expected = torch.autograd.grad((-kept * edges.log_ratio.exp()).sum(), mean)[0]
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)


def test_the_clamp_is_far_outside_of_use():
    """Just inside it nothing is clamped."""
    edges = edges_of(torch.tensor([MAX_LOG_RATIO - 0.01]), torch.ones(1))
    loss, metrics = objective("dppo", edges, LIMITS)
    assert float(loss) == pytest.approx(-math.exp(MAX_LOG_RATIO - 0.01), rel=1e-4)
    assert metrics["clamp_frac"] == 0


# ------------------------------------------------------------------------------------------- objectives of answers


def two_answers(*, requires_grad=False):
    """Log-ratios .3, -.5 of a good answer and .1 of a bad one."""
    log_ratio = torch.tensor([0.3, -0.5, 0.1], dtype=torch.float64, requires_grad=requires_grad)
    advantages = torch.tensor([1.0, 1.0, -1.0], dtype=torch.float64)
    known = {"segment": torch.tensor([0, 0, 1]), "position": torch.tensor([0, 1, 0])}
    return log_ratio, advantages, edges_of(log_ratio, advantages, **known)


def test_clip_has_the_known_vectors():
    loss, metrics = objective("clip", two_answers()[2], LIMITS._replace(low=0.2, high=0.2))
    assert loss.tolist() == pytest.approx([-1.2, -0.6065307, 1.1051710], abs=1e-7)
    assert float(metrics["approx_kl_k1"]) == pytest.approx(0.1 / 3)
    assert float(metrics["approx_kl_k3"]) == pytest.approx(sum(math.expm1(x) - x for x in (0.3, -0.5, 0.1)) / 3)


def test_sapo_has_the_known_vectors():
    """They are of the unshifted gate, A 4 / tau sigmoid(0) = 2 A / tau lower than minus the advantage at ratio 1."""
    _, advantages, edges = two_answers()
    tau = torch.tensor([1.0, 1.0, 1.05], dtype=torch.float64)
    loss = objective("sapo", edges, LIMITS)[0] + advantages * (1 - 2 / tau)
    assert loss.tolist() == pytest.approx([-2.3463335, -1.6115296, 2.0098262], abs=3e-7)


@pytest.mark.parametrize("advantage", [1.0, -0.5])
def test_sapos_gradient_is_the_derivative_of_its_gate(advantage):
    """w = 4 sigmoid(z)(1 - sigmoid(z)) with z = tau (r - 1), times r: 1 at ratio 1, less on both sides."""
    log_ratio = torch.linspace(-1, 1, 21, dtype=torch.float64).requires_grad_()
    tau = 2.0 if advantage > 0 else 3.0
    edges = edges_of(log_ratio, torch.full((21,), advantage, dtype=torch.float64))
    objective("sapo", edges, LIMITS._replace(tau_pos=2.0, tau_neg=3.0))[0].sum().backward()
    ratio = log_ratio.detach().exp()
    gate = (tau * (ratio - 1)).sigmoid()
    torch.testing.assert_close(log_ratio.grad, -advantage * ratio * 4 * gate * (1 - gate), rtol=1e-10, atol=1e-12)
    assert float(log_ratio.grad[10]) == pytest.approx(-advantage)


def test_gmpo_has_the_known_vectors():
    """-.5 is not cut to -.4: the update does not move outwards there."""
    loss, metrics = objective("gmpo", two_answers()[2], LIMITS._replace(low=0.4, high=0.4))
    assert loss.tolist() == pytest.approx([-0.9048374, -0.9048374, 1.1051710], abs=1e-7)
    assert (float(metrics["clip_frac"]), float(metrics["clip_frac_low"])) == (pytest.approx(1 / 3), 0)
    assert float(metrics["ratio_max_dev"]) == pytest.approx(1 - math.exp(-0.5))


def test_gmpo_is_the_sequence_form_where_an_answer_has_one_advantage():
    """-A exp(mean d), with d cut on the outer side alone; loss and gradient of n times it."""
    log_ratio, advantages = some(scale=0.5)
    segment = torch.arange(200) // 7
    advantages = advantages[segment]
    loss, _ = objective("gmpo", edges_of(log_ratio, advantages, segment=segment), LIMITS)
    loss.sum().backward()
    other = log_ratio.detach().clone().requires_grad_()
    total = 0.0
    for name in segment.unique():
        mine = segment == name
        a = float(advantages[mine][0])
        d = [x.clamp(max=0.3) if a > 0 else x.clamp(min=-0.1) for x in other[mine]]
        value = -a * torch.stack(d).mean().exp()
        assert loss[mine].tolist() == pytest.approx([value.item()] * len(d), rel=1e-12)
        total = total + len(d) * value
    total.backward()
    torch.testing.assert_close(log_ratio.grad, other.grad, rtol=1e-12, atol=1e-14)
    assert (other.grad == 0).any()


def test_a_dual_clip_is_the_two_sided_clip_of_intellect():
    """max(-A min(r, delta), -A clip(r)) for delta >= 1 + high."""
    log_ratio, advantages = some(scale=1.5)
    loss, _ = objective("dual_clip", edges_of(log_ratio, advantages), LIMITS._replace(dual=4.0))
    ratio = log_ratio.detach().exp()
    expected = torch.maximum(-advantages * ratio.clamp(max=4.0), -advantages * ratio.clamp(0.9, 1.3))
    torch.testing.assert_close(loss.detach(), expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", ["reinforce", "dro"])
def test_reinforce_and_dro_have_the_gradient_of_the_logprob(name):
    """Of -A log pi, and of -(A log pi - beta / 2 (log pi - log mu)^2), from the distribution itself."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(50, 5, generator=generator, dtype=torch.float64, requires_grad=True)
    chosen = torch.randint(5, (50,), generator=generator)
    before = torch.distributions.Categorical(logits=logits.detach() + 0.3).log_prob(chosen) - 0.1
    advantages = torch.randn(50, generator=generator, dtype=torch.float64)
    logprob = torch.distributions.Categorical(logits=logits).log_prob(chosen)
    edges = edges_of(logprob - before, advantages, logprob=before)
    loss, metrics = objective(name, edges, LIMITS._replace(trust=0.5))
    (found,) = torch.autograd.grad(loss.sum(), logits, retain_graph=True)
    beta = 0.0 if name == "reinforce" else 2.0
    expected = -(advantages * logprob - beta / 2 * (logprob - before).square()).sum()
    torch.testing.assert_close(found, torch.autograd.grad(expected, logits)[0], rtol=1e-10, atol=1e-12)
    assert metrics["clip_frac"] == 0


PI, MU = (0.5, 0.3, 0.9, 0.1, 0.6), (0.2, 0.28, 0.55, 0.35, 0.58)
TV = LIMITS._replace(trust=0.2)


@pytest.mark.parametrize(
    ("name", "advantage", "kept"),
    [
        ("dppo_tv", 1.0, [0, 1, 0, 1, 1]),
        ("dppo_tv", -1.0, [1, 1, 1, 0, 1]),
        ("cppo_tv", 1.0, [0, 0, 0, 1, 0]),
        ("cppo_tv", -1.0, [1, 1, 1, 0, 1]),
    ],
)
def test_tv_regions_keep_the_known_tokens(name, advantage, kept):
    """pi, mu and what is kept of an independent computation; a kept token has -A r, another exactly nothing."""
    pi, mu = (torch.tensor(x, dtype=torch.float64) for x in (PI, MU))
    # A second answer of one token, in between: it must not share the budget.
    order = torch.tensor([3, 0, 5, 2, 4, 1])
    pi, mu = (torch.cat([x, torch.tensor([0.5], dtype=torch.float64)])[order] for x in (pi, mu))
    log_ratio = (pi.log() - mu.log()).requires_grad_()
    known = {
        "logprob": mu.log(),
        "segment": torch.tensor([4, 4, 4, 4, 4, 9])[order],
        "position": torch.tensor([0, 1, 2, 3, 4, 0])[order],
    }
    loss, metrics = objective(name, edges_of(log_ratio, torch.full((6,), advantage, dtype=torch.float64), **known), TV)
    loss.sum().backward()
    expected = torch.tensor([*kept, 1])[order] * -advantage * (pi / mu)
    torch.testing.assert_close(loss.detach(), expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(log_ratio.grad, expected, rtol=1e-12, atol=0)
    assert float(metrics["clip_frac"]) == pytest.approx(kept.count(0) / 6)
    side = "clip_frac_high" if advantage > 0 else "clip_frac_low"
    assert metrics[side] == metrics["clip_frac"]


def cppo_by_loop(pi, mu, advantage, trust, early, budget):
    change = [abs(p - m) for p, m in zip(pi, mu, strict=True)]
    weight = [1 - (1 - early) * t / max(len(pi) - 1, 1) for t in range(len(pi))]
    each = min(max(float(torch.tensor(change, dtype=torch.float64).quantile(0.9)), budget), 2 * budget)
    kept, spent, earned = [], 0.0, 0.0
    for p, m, d, w in zip(pi, mu, change, weight, strict=True):
        bound = min(trust, trust + each * earned - spent)
        kept.append(w * d <= bound or advantage * (p / m - 1) <= 0)
        spent, earned = spent + w * d, earned + w
    return kept


def test_cppo_equals_the_loop_for_answers_of_any_length():
    generator = torch.Generator().manual_seed(0)
    limits = LIMITS._replace(trust=0.1, early=0.6, budget=0.03)
    lengths, rows = [1, 7, 2, 12], []
    for answer, length in enumerate(lengths):
        mu, pi = 0.05 + 0.9 * torch.rand(2, length, generator=generator, dtype=torch.float64)
        pi = mu + 0.5 * (pi - mu)
        advantage = (-1.0) ** answer
        kept = cppo_by_loop(pi.tolist(), mu.tolist(), advantage, 0.1, 0.6, 0.03)
        rows += [(answer, t, p, m, advantage, k) for t, (p, m, k) in enumerate(zip(pi, mu, kept, strict=True))]
    rows = [rows[i] for i in torch.randperm(len(rows), generator=generator).tolist()]
    segment, position, pi, mu, advantages, kept = (torch.tensor(column) for column in zip(*rows, strict=True))
    known = {"segment": segment, "position": position, "logprob": mu.log()}
    loss, _ = objective("cppo_tv", edges_of(pi.log() - mu.log(), advantages, **known), limits)
    assert torch.equal(loss != 0, kept) and 0 < kept.sum() < len(kept)


def test_cppo_has_the_papers_budget():
    """Many answers of 30 tokens with small changes, at the defaults: early 0.8, budget 0.02 to 0.04, quantile 0.9."""
    generator = torch.Generator().manual_seed(0)
    draw = lambda: torch.rand(60, 30, generator=generator, dtype=torch.float64)  # noqa: E731
    # All of a size, some that are large, and few that are, whose answers get the least budget.
    change = torch.cat([0.08 * draw(), 0.08 * draw().pow(4), 0.06 * draw().pow(12)])
    mu = torch.full_like(change, 0.5)
    pi = mu + change
    expected = [cppo_by_loop(new, old, 1.0, 0.03, 0.8, 0.02) for new, old in zip(pi.tolist(), mu.tolist(), strict=True)]
    known = {
        "segment": torch.arange(180).repeat_interleave(30), "position": torch.arange(30).repeat(180),
        "logprob": mu.log().flatten(),
    }  # fmt: skip
    edges = edges_of((pi.log() - mu.log()).flatten(), torch.ones(5400, dtype=torch.float64), **known)
    loss, _ = objective("cppo_tv", edges, LIMITS._replace(trust=0.03))
    assert (loss != 0).tolist() == sum(expected, [])


def test_the_tv_region_ends_at_its_bound():
    mu = torch.tensor([0.5, 0.5, 0.02, 0.9], dtype=torch.float64)
    pi = mu + torch.tensor([0.0299, 0.0301, 0.0301, 0.0299], dtype=torch.float64)
    for advantage, after in ((1.0, pi), (-1.0, 2 * mu - pi)):
        keeps = torch.tensor([True, False, False, True]) if advantage > 0 else torch.tensor([True, False, True, True])
        after = after.clamp(min=0.001)  # 0.02 cannot fall by more than 0.02
        edges = edges_of(after.log() - mu.log(), torch.full_like(mu, advantage), logprob=mu.log())
        loss, _ = objective("dppo_tv", edges, LIMITS._replace(trust=0.03))
        assert torch.equal(loss != 0, keeps)


def test_cppo_asks_for_the_places_of_the_tokens():
    with pytest.raises(ValueError, match="needs edges.position"):
        objective("cppo_tv", edges_of(torch.zeros(2), torch.ones(2), position=None), LIMITS)


def covariances():
    log_ratio, advantages = some(num=400)
    logprob = -2 * torch.rand(400, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    edges = edges_of(log_ratio, advantages, logprob=logprob)
    now = logprob + log_ratio.detach()
    return log_ratio, advantages, edges, (now - now.mean()) * (advantages - advantages.mean())


def test_kl_cov_penalises_the_highest_covariances():
    log_ratio, advantages, edges, cov = covariances()
    loss, metrics = objective("kl_cov", edges, LIMITS._replace(cov_share=0.05))
    highest = cov >= cov.sort().values[-20]
    expected = -advantages * log_ratio.detach().exp() + log_ratio.detach().abs() * highest
    torch.testing.assert_close(loss.detach(), expected, rtol=1e-12, atol=1e-14)
    assert float(metrics["clip_frac"]) == pytest.approx(0.05)
    assert float(objective("kl_cov", edges, LIMITS)[1]["clip_frac"]) == pytest.approx(1 / 400)


def test_clip_cov_silences_some_of_those_in_its_range():
    log_ratio, advantages, edges, cov = covariances()
    limits = LIMITS._replace(cov_share=0.02, cov_range=(0.5, 1.5))
    loss, metrics = objective("clip_cov", edges, limits)
    loss.sum().backward()
    plain, told = objective("clip", edges, limits)
    changed = loss != plain
    assert int(changed.sum()) == 8 and (loss[changed] == 0).all() and (log_ratio.grad[changed] == 0).all()
    assert ((cov > 0.5) & (cov < 1.5))[changed].all()
    assert float(metrics["clip_frac"] - told["clip_frac"]) == pytest.approx(0.02, abs=1e-6)
    assert torch.equal(objective("clip_cov", edges, limits)[0], loss)


def test_clip_fractions_know_their_side():
    log_ratio, advantages = some()
    metrics = objective("clip", edges_of(log_ratio, advantages), LIMITS)[1]
    ratio = log_ratio.detach().exp()
    low, high = (ratio < 0.9) & (advantages < 0), (ratio > 1.3) & (advantages > 0)
    assert float(metrics["clip_frac_low"]) == pytest.approx(float(low.double().mean()))
    assert float(metrics["clip_frac_high"]) == pytest.approx(float(high.double().mean()))
    assert low.any() and high.any()
