"""What the policy-gradient methods for answers share: the hyperparameters of the loss, and the loss of their tokens.

A method is a `TokenPolicyGradient` that says what each answer is worth (`AnswerCredit`), or each token
(`TokenReturns`); objective, mean and penalties are its fields, so that any of them goes with any such worth. An edge of
`flowrl.algorithms.objectives` is a token here.

Symbols: B answers of all processes, R of this one (N in a part of it), S places.
"""

from abc import abstractmethod
from typing import Self

import torch
from pydantic import model_validator
from torch import Tensor

from flowrl.algorithms import token_fields as fields
from flowrl.algorithms.advantages import ROUNDING, Advantages, earlier_tools, sure_first, whiten
from flowrl.algorithms.aggregate import aggregate, averaged, mass, of_answers, share
from flowrl.algorithms.corrections import importance_weights, off_policy_sequences, rejected, weight_metrics
from flowrl.algorithms.kl import estimate, token_kl
from flowrl.algorithms.objectives import MAX_LOG_RATIO, Edges, Limits, objective
from flowrl.algorithms.schedule import AlgorithmError, check_group_size
from flowrl.schedules import value_at
from flowrl.types import Hyperparameters, Loss, Needs, TokenBatch, TokenPolicy, Tokens, TokenStats, held_to
from samplers import stable_seed

Terms = dict[str, tuple[float, Tensor]]
"""Terms of a loss by their names in the metrics: a weight, and the losses of the tokens [N,S]."""
_MASKED_PICTURES = -8


class ResetReference(Hyperparameters):
    """Methods for answers whose reference may be reset to the policy, so that it can go on from there (ProRL).

    arXiv:2505.24864: a hard copy every so often, and an optimiser without momentum.
    """

    reset_every: fields.ResetEvery = None

    @abstractmethod
    def loss(self, policy: TokenPolicy, batch: TokenBatch) -> Loss:
        """Loss of a part of an update; see `flowrl.types.Algorithm`."""

    def old_decay(self, iteration: int) -> float:
        """0, the policy becomes the reference, after every `reset_every` iterations; else 1."""
        return 0.0 if self.resets_optimizer(iteration) else 1.0

    def resets_optimizer(self, iteration: int) -> bool:
        """Together with the reference."""
        return self.reset_every is not None and (iteration + 1) % self.reset_every == 0

    def with_reference(self, needs: Needs) -> Needs:
        """What a method with a reference needs for it: the initial weights, or a copy that is moved."""
        moves = self.reset_every is not None
        return needs._replace(reference=not moves, old=moves, on_policy=True)


class TokenPolicyGradient(ResetReference):
    """The hyperparameters of the family, and its usual loss: PPO's on tokens (arXiv:1707.06347), and what was added."""

    objective: fields.ObjectiveName = "clip"
    clip_range: fields.ClipRange = 0.2
    dual_clip: fields.DualClip = 3.0
    trust: fields.Trust = None
    tau_pos: fields.Tau = 1.0
    tau_neg: fields.TauNegative = 1.05
    top_entropy: fields.TopEntropy = 1.0
    aggregate: fields.Aggregate = "seq_mean_token_mean"
    horizon: fields.Horizon = None
    mask_truncated: fields.MaskTruncated = False
    kl_coef: fields.KLCoef = 0.0
    kl_form: fields.KLForm = "k3"
    kl_unbiased: fields.KLUnbiased = False
    kl_in_reward: fields.KLInReward = 0.0
    entropy_coef: fields.EntropyCoef = 0.0
    correction: fields.Correction = "tis"
    correction_level: fields.CorrectionLevel = "token"
    correction_low: fields.CorrectionLow = 0.5
    correction_high: fields.CorrectionHigh = None
    rejection: fields.RejectionName = None
    reject_range: fields.RejectRange = (-1.0, 1.0)
    off_policy_delta: fields.OffPolicyDelta = None
    positive_sft_coef: fields.PositiveSFT = 0.0
    positive_sft_reward: fields.PositiveReward = 1.0
    sft_coef: fields.SFTCoef = 0.0
    perception_coef: fields.PerceptionCoef = 0.0
    perception_mask: fields.PerceptionMask = 0.6
    perception_entropy: fields.PerceptionEntropy = 0.0

    @model_validator(mode="after")
    def _meant(self) -> Self:
        fields.check_tokens(self.objective)
        fields.check_trust(self.objective, self.trust)
        fields.check_aggregate(self.objective, self.aggregate, self.horizon)
        if self.correction == "icepop" and not self.correction_low < self._correction_high:
            raise ValueError(
                f"correction_low={self.correction_low:g} is not below correction_high={self._correction_high:g}, so "
                "that no token would be left; 0.5 and 5 are usual."
            )
        if self.reject_range[0] >= self.reject_range[1]:
            raise ValueError(f"reject_range={list(self.reject_range)} must be rising.")
        if self.reset_every is not None and not self._has_reference:
            raise ValueError("reset_every resets the reference, and there is none without a KL; set kl_coef.")
        return self

    @property
    def needs(self) -> Needs:
        """A model that writes; a reference for the KL alone."""
        needs = Needs(tokens=True, reference_logprobs=self.kl_in_reward > 0)
        return self.with_reference(needs) if self._has_reference else needs

    def mass(self, batch: TokenBatch) -> Tensor:
        """Answers and tokens, float64 [2]."""
        return mass(batch.tokens.mask)

    def share(self, batch: TokenBatch, total: Tensor) -> float:
        """By answers, or by tokens: whichever `aggregate` divides by."""
        return share(batch.tokens.mask, total, self.aggregate)

    def starts_at_one(self, batch: TokenBatch) -> bool:
        """Not where ratios are taken against a foreign engine."""
        return self.correction != "bypass" or batch.tokens.behaviour is None

    # ------------------------------------------------------------------------------------------------------- credit

    @abstractmethod
    def credit(self, batch: TokenBatch) -> Tensor:
        """What this process's answers are worth, [R], or their tokens, [R,S]; see `flowrl.types.Algorithm`."""

    def trained(self, batch: TokenBatch) -> Tensor:
        """This process's answers that are trained on, bool [R]: with a verdict and a token of the policy's own.

        With mask_truncated those that were cut off are not.
        """
        verdict = own(batch, rewards_of(batch)).isfinite() & batch.tokens.mask.any(1).cpu()
        return verdict & ~(own(batch, fact(batch, "truncated")) > 0) if self.mask_truncated else verdict

    def reward_kl(self, batch: TokenBatch) -> Tensor:
        """log pi - log ref of this process's tokens as the rollout had them, float64 [R,S]; 0 off the mask."""
        if batch.reference is None:
            raise ValueError("kl_in_reward needs batch.reference; see needs.reference_logprobs.")
        return (batch.tokens.logprob - batch.reference).where(batch.tokens.mask, 0.0).cpu().double()

    # --------------------------------------------------------------------------------------------------------- loss

    def loss(self, policy: TokenPolicy, batch: TokenBatch) -> Loss:
        """The mean, by `aggregate`, of the weighted objective and of the penalties of the answers' tokens."""
        reference = self._reference(policy, batch)
        stats = policy.evaluate(batch.tokens, entropy=self._reads_entropy, value=self.needs.value)
        terms, metrics = self.terms(policy, batch, stats, reference)
        mask, value = batch.tokens.mask, stats.logprob.new_zeros(())
        counts = dict.fromkeys(metrics, float(mask.sum()))
        for name, (weight, table) in terms.items():
            term = aggregate(table, mask, self.aggregate, self.horizon)
            metrics[name], counts[name] = averaged(term.detach(), mask, self.aggregate)
            value = value + weight * term
        return Loss(value, metrics, counts)

    def terms(
        self, policy: TokenPolicy, batch: TokenBatch, stats: TokenStats, reference: Tensor | None
    ) -> tuple[Terms, dict[str, Tensor]]:
        """The terms of the loss, and more to log; `reference` [N,S] are log-probs of the reference."""
        tokens, mask = batch.tokens, batch.tokens.mask
        credit = token_credit(batch)
        table, metrics = self._objective(tokens, stats, credit)
        imitation = value_at(self.sft_coef, batch.iteration)
        terms: Terms = {"policy_loss": (1 - imitation, table)}
        if reference is not None:
            ratio = _since_drawn(tokens, stats.logprob) if self.kl_unbiased else None
            terms["kl"] = self.kl_coef, token_kl(stats.logprob, reference, self.kl_form, ratio)
        if self.entropy_coef > 0:
            assert stats.entropy is not None
            terms["entropy_bonus"] = -self.entropy_coef, stats.entropy
        if self.positive_sft_coef > 0:
            terms["positive_sft"] = self.positive_sft_coef, -stats.logprob * self._right(batch, credit)
        if imitation > 0:
            terms |= self._imitation(policy, tokens, imitation)
        if self.perception_coef > 0 or self.perception_entropy > 0:
            terms |= self._perception(policy, batch, stats)
        # Minus the log-probs of drawn tokens are an estimate of the entropy that costs nothing.
        entropy = -stats.logprob if stats.entropy is None else stats.entropy
        metrics["entropy"] = entropy.detach()[mask].mean()
        metrics["adv_abs"] = credit[mask].abs().mean()
        metrics["adv_zero_frac"] = (credit[mask] == 0).float().mean()
        return terms, metrics

    def _objective(self, tokens: Tokens, stats: TokenStats, credit: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The objective's losses [N,S], 0 off the mask and where an answer or token is left out."""
        mask, bypass = tokens.mask, self.correction == "bypass"
        before = tokens.behaviour if bypass and tokens.behaviour is not None else tokens.logprob
        seen = token_edges(tokens, stats.logprob, before, credit)
        found, metrics = objective(self.objective, seen, self._limits)
        table = found.new_zeros(mask.shape).masked_scatter(mask, found)
        if tokens.behaviour is not None and not bypass:
            weight, told = self._correction(tokens.logprob - tokens.behaviour, mask)
            table, metrics = table * weight, metrics | told
        if self.off_policy_delta is not None:
            gone = off_policy_sequences(stats.logprob - _drawn(tokens), mask, credit, self.off_policy_delta)[:, None]
            table, metrics["opsm_frac"] = table * ~gone, gone.expand_as(mask)[mask].float().mean()
        if self.top_entropy < 1:
            assert stats.entropy is not None
            table = table * _highest(stats.entropy.detach(), mask, self.top_entropy)
        return table, metrics

    def _correction(self, log_weight: Tensor, mask: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Weights [N,S] of answers that an engine wrote, and how far it is away."""
        weight = mask.to(log_weight)
        if self.correction in ("tis", "mis", "icepop"):
            bounds = (self.correction_low if self.correction == "icepop" else 0.0, self._correction_high)
            weight = importance_weights(log_weight, mask, self.correction, self.correction_level, *bounds)
        if self.rejection is not None:
            weight = weight * ~rejected(log_weight, mask, self.rejection, *self.reject_range)[:, None]
        return weight, weight_metrics(log_weight, mask, weight)

    def _right(self, batch: TokenBatch, credit: Tensor) -> Tensor:
        """Which answers to imitate (VAPO, arXiv:2504.05118; Intern-S1, arXiv:2508.15763), bool [N,S] or [N,1].

        Right ones, by their reward, not by `credit` [N,S]: that of a wrong answer's token may well be positive.
        Note: VAPO divides by the tokens of right answers alone, which a part of an update does not know; here the mean
        is that of the other terms, so that the weight of imitation grows with the share of right answers.
        Note: in an iteration with answers of earlier ones (`data.replay`), of which the advantage alone is kept, those
        with a positive one are imitated.
        """
        if batch.rewards is None:
            return credit > 0
        return (batch.rewards >= self.positive_sft_reward - ROUNDING).to(credit.device)[:, None]

    def _imitation(self, policy: TokenPolicy, tokens: Tokens, weight: float) -> Terms:
        """CHORD (arXiv:2508.11408): -p (1 - p) log p of the tokens of a worked answer, its factor cut from the graph.

        Note: an answer carries the mean over its prompt's worked answer, so that `aggregate` can be any.
        Note: (1 - mu) is the factor of the policy gradient alone; KL, entropy and other terms keep their weights.
        """
        _, of_row = torch.unique(tokens.prompt, return_inverse=True)
        first = torch.full((int(of_row.max()) + 1,), len(tokens), device=of_row.device)
        first = first.scatter_reduce(0, of_row, torch.arange(len(tokens), device=of_row.device), "amin")
        gold = policy.gold(tokens.select(first))
        if gold is None:
            return {"sft": (weight, torch.zeros_like(tokens.logprob))}
        logprob = policy.evaluate(gold).logprob
        chance = logprob.detach().exp()
        each = (-chance * (1 - chance) * logprob).where(gold.mask, 0.0).sum(1) / gold.mask.sum(1).clamp(min=1)
        return {"sft": (weight, of_answers(each[of_row], tokens.mask, self.aggregate, self.horizon))}

    def _perception(self, policy: TokenPolicy, batch: TokenBatch, stats: TokenStats) -> Terms:
        """PAPO (arXiv:2507.06448): the KL (k3) to the policy with masked pictures is raised, both entropies held down.

        Note: the entropies are those of the distributions; the paper's code takes the log-probs of the drawn tokens.
        """
        seed = stable_seed(batch.seed, batch.iteration, _MASKED_PICTURES)
        with policy.masked_images(self.perception_mask, seed):
            blind = policy.evaluate(batch.tokens, entropy=self.perception_entropy > 0)
        terms: Terms = {"perception": (-self.perception_coef, estimate(stats.logprob, blind.logprob, "k3"))}
        if self.perception_entropy > 0:
            assert stats.entropy is not None and blind.entropy is not None
            terms["perception_entropy"] = self.perception_entropy, stats.entropy + blind.entropy
        return terms

    def _reference(self, policy: TokenPolicy, batch: TokenBatch) -> Tensor | None:
        if self.kl_coef == 0:
            return None
        if batch.reference is not None:
            return batch.reference
        with torch.no_grad(), held_to(policy, self.needs):
            return policy.evaluate(batch.tokens).logprob

    @property
    def _correction_high(self) -> float:
        return self.correction_high or fields.USUAL_HIGH[self.correction]

    @property
    def _has_reference(self) -> bool:
        return self.kl_coef > 0 or self.kl_in_reward > 0

    @property
    def _reads_entropy(self) -> bool:
        return self.entropy_coef > 0 or self.top_entropy < 1 or self.perception_entropy > 0

    @property
    def _limits(self) -> Limits:
        low, high = self.clip_range if isinstance(self.clip_range, tuple) else (self.clip_range, self.clip_range)
        return Limits(
            low, high, trust=self.trust or fields.TV_TRUST, dual=self.dual_clip, tau_pos=self.tau_pos,
            tau_neg=self.tau_neg,
        )  # fmt: skip


class AnswerCredit(TokenPolicyGradient):
    """Methods that give an answer one advantage for all of its tokens, from the rewards of all answers."""

    shaping: fields.ShapingName = None
    shaping_coef: fields.ShapingCoef = -2.0
    shaping_cap: fields.ShapingCap = 0.7

    @property
    def fewest_samples(self) -> int:
        """Answers to a prompt without which nothing can be compared."""
        return 2

    @abstractmethod
    def advantages(self, batch: TokenBatch, rewards: Tensor) -> Advantages:
        """What the answers of all processes are worth, [B], by their `rewards` [B]."""

    def credit(self, batch: TokenBatch) -> Tensor:
        """Advantages [R] of this process's answers, fp32; NaN where there is no verdict, or no training (`trained`)."""
        found = self.advantages(batch, self.penalised(batch))
        value = own(batch, self._shaped(batch, found.value))
        return value.where(self.trained(batch), torch.nan).to(batch.tokens.mask.device, torch.float32)

    def penalised(self, batch: TokenBatch) -> Tensor:
        """Rewards [B] of all answers, less kl_in_reward times their sums of log pi - log ref."""
        rewards = rewards_of(batch)
        if self.kl_in_reward == 0:
            return rewards
        assert batch.place is not None
        mine = rewards.new_zeros(len(rewards)).index_add(0, batch.place.cpu(), self.reward_kl(batch).sum(1))
        return rewards - self.kl_in_reward * batch.total(mine)

    def _shaped(self, batch: TokenBatch, value: Tensor) -> Tensor:
        if self.shaping is None:
            return value
        group = batch.group.cpu()
        if self.shaping == "entropy":
            return sure_first(value, group, fact(batch, "entropy"))
        places, lengths = fact(batch, "tool_position"), fact(batch, "tokens")
        return earlier_tools(value, group, places, lengths.nan_to_num(), self.shaping_coef, self.shaping_cap)


class TokenReturns(TokenPolicyGradient):
    """Methods that give each token an advantage of its own, normalised over all tokens of the batch."""

    gamma: fields.Gamma = 1.0

    @property
    def needs(self) -> Needs:
        """An advantage of each token."""
        return super().needs._replace(token_credit=True)

    @abstractmethod
    def returns(self, batch: TokenBatch, rewards: Tensor) -> Tensor:
        """Advantages [R,S] of this process's tokens before they are normalised, by their `rewards` [R,S]."""

    def credit(self, batch: TokenBatch) -> Tensor:
        """Whitened returns [R,S] of this process's tokens, fp32; NaN for answers that are not trained on."""
        trained = self.trained(batch)
        rewards = self.token_rewards(batch, own(batch, rewards_of(batch)).where(trained, 0.0))
        mask = batch.tokens.mask.cpu() & trained[:, None]
        white = whiten(self.returns(batch, rewards), mask, batch.total)
        return white.where(trained[:, None], torch.nan).to(batch.tokens.mask.device, torch.float32)

    def token_rewards(self, batch: TokenBatch, rewards: Tensor) -> Tensor:
        """Rewards of tokens, float64 [N,S]: an answer's own [N] at its last, less kl_in_reward (log pi - log ref)."""
        mask = batch.tokens.mask.cpu()
        last = mask & (mask.flip(1).long().cumsum(1).flip(1) == 1)
        table = last * rewards.detach().cpu().double()[:, None]
        return table - self.kl_in_reward * self.reward_kl(batch) if self.kl_in_reward > 0 else table


def rewards_of(batch: TokenBatch) -> Tensor:
    """Rewards of all answers, float64 [B]."""
    if batch.rewards is None:
        raise ValueError("credit needs batch.rewards; score the answers first.")
    return batch.rewards.detach().cpu().double()


def own(batch: TokenBatch, value: Tensor) -> Tensor:
    """Of values [B] of all answers, those of this process's [R], while credit is given."""
    if batch.place is None:
        raise ValueError("credit needs batch.place, where this process's answers stand among all.")
    return value[batch.place.cpu()]


def check_groups(batch: TokenBatch) -> None:
    """Refuse groups of one answer, which have nothing to be compared with."""
    check_group_size(int(torch.unique(batch.group, return_counts=True)[1].max()))


def fact(batch: TokenBatch, name: str) -> Tensor:
    """What is known of all answers under that name, float64 [B]."""
    if name not in batch.facts:
        raise AlgorithmError(
            f"nothing is known of the answers' {name!r} (there are {', '.join(batch.facts) or 'no facts'}), which this "
            "setting of the algorithm reads; leave mask_truncated, shaping or the length-weighted baseline out, or "
            "collect it."
        )
    return batch.facts[name].cpu()


def token_credit(batch: TokenBatch) -> Tensor:
    """Advantages [N,S] of the tokens: those of their answers where there is one for each; 0 off the mask."""
    if batch.advantages is None:
        raise ValueError("the loss needs batch.advantages; fill them with credit(batch) first.")
    mask, credit = batch.tokens.mask, batch.advantages
    return (credit[:, None] if credit.dim() == 1 else credit) * mask


def _drawn(tokens: Tokens) -> Tensor:
    """log mu [N,S] of who drew the tokens, perhaps a foreign engine."""
    return tokens.logprob if tokens.behaviour is None else tokens.behaviour


def _since_drawn(tokens: Tokens, logprob: Tensor) -> Tensor:
    """pi / mu [N,S] with its gradient, cut as all ratios are."""
    return (logprob - _drawn(tokens)).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()


def token_edges(tokens: Tokens, logprob: Tensor, before: Tensor, credit: Tensor) -> Edges:
    """The policy's tokens as an objective sees them, answer by answer; logprob, before and credit are [N,S]."""
    mask = tokens.mask
    answer = torch.arange(len(tokens), device=mask.device)[:, None].expand_as(mask)
    return Edges(
        log_ratio=logprob[mask] - before[mask],
        advantages=credit[mask],
        logprob=before[mask],
        segment=answer[mask],
        position=(mask.long().cumsum(1) - 1)[mask],
    )


def _highest(entropy: Tensor, mask: Tensor, share: float) -> Tensor:
    """The `share` of each answer's tokens with the highest entropy, at least one, bool [N,S] (arXiv:2506.01939).

    Note: the paper takes the highest of a whole batch; of each answer, it does not matter how an update is cut.
    """
    order = entropy.where(mask, -torch.inf).argsort(dim=1, descending=True, stable=True)
    rank = torch.empty_like(order).scatter_(1, order, torch.arange(mask.shape[1], device=order.device).expand_as(order))
    # Rounding must not make 2 of 5 tokens 3 where the share is 0.4.
    return mask & (rank < (share * mask.sum(1, keepdim=True).double() - 1e-9).ceil())
