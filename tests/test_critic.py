"""Latents to reward with a gradient: right by finite differences, small in memory, unharmed by missing verdicts."""

import copy
import math

import pytest
import torch

from flowrl.critic import Critic
from flowrl.models import ModelError, load
from flowrl.policy import Policy
from flowrl.types import Prompt
from rewards import RewardError, RewardHub, declare

REWARDS = ["pixel.contrast", {"use": "pixel.redness", "weight": 2.0, "norm": "unit"}]


def prompts(count):
    return [Prompt(id=i, text=f"prompt {i}", metadata={"number": i}) for i in range(count)]


def latents(count, shape=(4, 16, 16), seed=0):
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(seed)).requires_grad_()


def gradient(critic, x0):
    return torch.autograd.grad(critic(x0, prompts(len(x0))).total.sum(), x0)[0]


@pytest.fixture(scope="module")
def sd3(tiny_model):
    return load(tiny_model)


@pytest.fixture(scope="module")
def pale(sd3):
    """Its pictures are far from black and white, where a clamp would differ from its straight-through gradient."""
    return with_contrast(sd3, 0.2)


def with_contrast(model, factor):
    """The model with a VAE of its own, whose pictures have so many times the contrast."""
    model = copy.copy(model)
    model.pipe = copy.copy(model.pipe)
    model.pipe.vae = copy.deepcopy(model.pipe.vae)
    model.pipe.vae.decoder.conv_out.weight.mul_(factor)
    return model


@pytest.fixture
def hub():
    with RewardHub(REWARDS) as made:
        yield made


class Toy:
    """A decoder of latents [N,3,4,4] that counts what it decodes; with `frames`, of as many shades."""

    def __init__(self, frames=1):
        self.frames, self.decoded = frames, []

    def decode(self, x0):
        self.decoded.append(len(x0))
        return torch.stack([torch.sigmoid(x0 + shade) for shade in range(self.frames)], 1)


class Pair:
    """Image and text features by fixed random projections; remembers which texts it was asked for."""

    differentiable = True

    def __init__(self):
        self.asked, self.scale = [], 5.0
        self.image = torch.randn(6, 48, generator=torch.Generator().manual_seed(0))

    def image_features(self, media):
        return torch.nn.functional.normalize(media.flatten(1) @ self.image.T, dim=1)

    def text_features(self, texts):
        self.asked.append(list(texts))
        rows = [torch.randn(6, generator=torch.Generator().manual_seed(sum(map(ord, text)))) for text in texts]
        return torch.nn.functional.normalize(torch.stack(rows), dim=1)

    def score(self, samples):
        images = self.image_features(torch.stack([sample.media for sample in samples]))
        return (images * self.text_features([sample.prompt for sample in samples])).sum(1)


def test_the_gradient_of_the_whole_chain_is_that_of_finite_differences(pale, hub):
    """Latents -> VAE -> two rewards -> total, along the gradient and along random unit directions.

    Rewards are float32 means of about 1: rounding of 1e-7 over 2 h = 0.2 is 1e-6, and curvature costs less; the
    gradient's length is 1e-3 and more, a random direction's share of it 1/55. So 1e-3 of its length is the tolerance.
    """
    critic, x0, h = Critic(pale, hub), latents(3), 0.1
    with torch.no_grad():
        media = critic.media(x0)
        assert media.min() > 0.1 and media.max() < 0.9
    found = gradient(critic, x0)
    assert found.flatten(1).norm(dim=1).min() > 1e-3
    x0, length = x0.detach(), found.norm()
    directions = [found / length] + [d / d.norm() for d in (latents(3, seed=s).detach() for s in (1, 2, 3))]
    for direction in directions:
        ends = [critic(x0 + step * direction, prompts(3)).total.double().sum() for step in (h, -h)]
        measured = (ends[0] - ends[1]) / (2 * h)
        assert abs(measured - (found * direction).sum()) < 1e-3 * length


def test_total_and_scores_are_those_of_the_hub(sd3, hub):
    x0 = latents(2)
    found = Critic(sd3, hub)(x0, prompts(2))
    assert found.total.requires_grad and not any(score.requires_grad for score in found.scores.values())
    assert list(found.scores) == ["pixel.contrast", "pixel.redness"]
    expected = found.scores["pixel.contrast"] + 2 * (found.scores["pixel.redness"] + 1) / 2
    torch.testing.assert_close(found.total, expected)


def test_a_policy_is_taken_for_its_model(sd3, hub):
    x0 = latents(2)
    model = copy.copy(sd3)
    model.trainable = torch.nn.Linear(1, 1)
    critic = Critic(Policy(model), hub)
    assert critic.decoder is model
    assert torch.equal(critic.media(x0), sd3.decode(x0))


@pytest.mark.parametrize("decode_batch", [None, 1, 2])
@pytest.mark.parametrize("checkpoint", [True, False])
def test_portions_and_checkpoints_change_no_gradient(sd3, hub, decode_batch, checkpoint):
    """Equal to the last bits: convolutions of other batch sizes add in another order."""
    whole = gradient(Critic(sd3, hub, checkpoint=False), latents(3))
    portions = gradient(Critic(sd3, hub, decode_batch=decode_batch, checkpoint=checkpoint), latents(3))
    torch.testing.assert_close(portions, whole, rtol=1e-4, atol=1e-4 * whole.abs().max().item())


def test_the_model_s_own_micro_batches_change_no_gradient(sd3, hub):
    model = copy.copy(sd3)
    model.decode_micro_batch = 2
    whole = gradient(Critic(sd3, hub), latents(3))
    torch.testing.assert_close(
        gradient(Critic(model, hub), latents(3)), whole, rtol=1e-4, atol=1e-4 * whole.abs().max().item()
    )


def kept_bytes(function):
    """What autograd keeps for the backward pass of `function()`, each storage once."""
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()  # kept, so that no address comes twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        function()
    return sum(storage.nbytes() for storage in kept.values())


def test_a_checkpointed_decode_keeps_its_latents_and_none_of_its_activations(sd3, hub):
    x0 = latents(4)
    everything = kept_bytes(lambda: Critic(sd3, hub, checkpoint=False).media(x0))
    little = kept_bytes(lambda: Critic(sd3, hub, decode_batch=1).media(x0))
    assert little <= x0.nbytes
    assert everything > 50 * x0.nbytes


def test_a_checkpointed_decode_is_done_once_more_in_the_backward_pass():
    with RewardHub("pixel.contrast") as hub:
        for checkpoint, expected in ((True, [2, 2, 1, 1, 2, 2]), (False, [2, 2, 1])):
            toy = Toy()
            gradient(Critic(toy, hub, decode_batch=2, checkpoint=checkpoint), latents(5, (3, 4, 4)))
            assert sorted(toy.decoded) == sorted(expected)
        toy = Toy()
        Critic(toy, hub)(latents(5, (3, 4, 4)).detach(), prompts(5))
        assert toy.decoded == [5]


def test_the_clamp_passes_gradients_and_changes_no_bit(sd3):
    """Against the VAE called directly, with so much contrast that most pixels are saturated."""
    x0, sd3 = latents(2), with_contrast(sd3, 10)
    weight = torch.randn(2, 1, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    media = sd3.decode(x0)
    with torch.no_grad():
        assert torch.equal(media, sd3.decode(x0))
    assert ((media == 0) | (media == 1)).float().mean() > 0.5
    assert media.min() == 0 and media.max() == 1
    vae = sd3.pipe.vae
    raw = vae.decode(x0 / vae.config.scaling_factor + vae.config.shift_factor).sample * 0.5 + 0.5
    (expected,) = torch.autograd.grad((weight[:, 0] * raw).sum(), x0)
    (found,) = torch.autograd.grad((weight * media).sum(), x0)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())


def test_an_infinite_pixel_is_no_verdict_instead_of_white(pale, hub):
    x0 = latents(2)
    with torch.no_grad():
        x0[1, 0, 0, 0] = math.inf
    found = Critic(pale, hub)(x0, prompts(2))
    assert found.total.isnan().tolist() == [False, True]


def test_tiles_have_the_gradient_of_finite_differences_too(pale, hub):
    """Tiles of 8 x 8 latents with an overlap; tolerance as above."""
    model = with_contrast(pale, 1)
    vae = model.pipe.vae
    model.enable_tiling()
    vae.tile_latent_min_size, vae.tile_sample_min_size = 8, 16
    critic, x0, h = Critic(model, hub), latents(1), 0.1
    assert not torch.allclose(critic.media(x0), Critic(pale, hub).media(x0), atol=1e-4)  # tiles were used
    found = gradient(critic, x0)
    x0, direction = x0.detach(), found / found.norm()
    ends = [critic(x0 + step * direction, prompts(1)).total.double() for step in (h, -h)]
    assert abs((ends[0] - ends[1]) / (2 * h) - found.norm()) < 1e-3 * found.norm()


def test_a_vae_without_tiles_is_refused(sd3):
    model = with_contrast(sd3, 1)
    model.pipe.vae = torch.nn.Identity()
    with pytest.raises(ModelError, match="Identity cannot work in tiles"):
        model.enable_tiling()


@declare(differentiable=True)
def moody(samples):
    """No verdict on prompt 1, with an infinite derivative there."""
    level = torch.stack([sample.media.mean() for sample in samples])
    zero = torch.tensor([0.0 if sample.prompt == "prompt 1" else 1.0 for sample in samples])
    return (zero * level).sqrt() / zero


def test_a_sample_without_a_verdict_does_not_poison_the_others():
    """Through a weight that all share, as the policy's are; the control shows that it would."""
    noise = latents(3, (3, 4, 4)).detach()
    theta = torch.tensor(0.7, requires_grad=True)
    toy = Toy()
    levels = toy.decode(theta * noise).mean((1, 2, 3, 4))
    (unguarded,) = torch.autograd.grad((torch.tensor([1.0, 0.0, 1.0]) * levels).sqrt()[[0, 2]].sum(), theta)
    assert unguarded.isnan()
    (expected,) = torch.autograd.grad(toy.decode(theta * noise).mean((1, 2, 3, 4))[[0, 2]].sqrt().sum(), theta)
    with RewardHub(moody) as hub:
        found = Critic(toy, hub)(theta * noise, prompts(3))
    assert found.total.isnan().tolist() == [False, True, False]
    found.total[~found.total.isnan()].sum().backward()
    torch.testing.assert_close(theta.grad, expected)


@pytest.mark.parametrize("relative", [False, True])
def test_a_broken_latent_gets_gradient_zero_and_the_others_theirs(relative):
    def value(critic, x0, who):
        if relative:
            return critic.relative(x0, who, "good", "bad", 0.5)
        return critic(x0, who).total

    broken = latents(3, (3, 4, 4)).detach()
    broken[1, 0, 0, 0] = math.nan
    broken.requires_grad_()
    fine = broken.detach()[[0, 2]].requires_grad_()
    with RewardHub(Pair()) as hub:
        critic, who = Critic(Toy(), hub), prompts(3)
        found = value(critic, broken, who)
        (others,) = torch.autograd.grad(value(critic, fine, [who[0], who[2]]).sum(), fine)
    assert found.isnan().tolist() == [False, True, False]
    (total,) = torch.autograd.grad(found.nansum(), broken)
    torch.testing.assert_close(total[[0, 2]], others)
    assert total[1].count_nonzero() == 0


def test_samples_carry_their_prompt_its_metadata_and_its_group():
    seen = []

    @declare(differentiable=True)
    def look(samples):
        seen.extend((s.prompt, s.group, s.meta["number"], s.kind) for s in samples)
        return torch.stack([s.media.mean() for s in samples])

    who = [prompts(2)[i] for i in (0, 1, 1)]
    with RewardHub(look) as hub:
        Critic(Toy(), hub)(latents(3, (3, 4, 4)), who)
    assert seen == [("prompt 0", 0, 0, "image"), ("prompt 1", 1, 1, "image"), ("prompt 1", 1, 1, "image")]


def test_videos_have_a_gradient_and_a_preference():
    """The preference of a video is the mean of its frames'."""
    x0, who = latents(2, (3, 4, 4)), prompts(2)
    with RewardHub({"use": Pair(), "frames": 2}) as hub:
        critic = Critic(Toy(frames=2), hub)
        assert critic.media(x0).shape == (2, 2, 3, 4, 4)
        total, relative = critic(x0, who).total, critic.relative(x0, who, "good", "bad", 0.1)
        still = [Critic(Toy(), hub).relative(x0 + shade, who, "good", "bad", 0.1) for shade in (0, 1)]
    torch.testing.assert_close(relative, (still[0] + still[1]) / 2)
    for value in (total, relative):
        (found,) = torch.autograd.grad(value.sum(), x0, retain_graph=True)
        assert found.abs().amax((1, 2, 3)).min() > 0


@pytest.mark.parametrize("k", [0.0, 0.25, torch.tensor([0.1, 0.5, -1.0])])
def test_relative_is_the_formula_of_srpo(k):
    """scale <f, (1 + k) c_p - c_n>, with features asked for directly; its gradient by autograd on the formula."""
    reward, x0, who = Pair(), latents(3, (3, 4, 4)), prompts(3)
    with RewardHub(reward) as hub:
        found = Critic(Toy(), hub).relative(x0, who, "Natural-lighting", "Oil", k)
    f = reward.image_features(torch.sigmoid(x0))
    good = reward.text_features([f"Natural-lighting. {prompt.text}" for prompt in who])
    bad = reward.text_features([f"Oil. {prompt.text}" for prompt in who])
    expected = 5.0 * torch.einsum("nd,nd->n", f, (1 + torch.as_tensor(k).expand(3))[:, None] * good - bad)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(*(torch.autograd.grad(value.sum(), x0)[0] for value in (found, expected)))


def test_an_empty_control_word_is_the_prompt_alone():
    reward = Pair()
    with RewardHub(reward) as hub:
        Critic(Toy(), hub).relative(latents(1, (3, 4, 4)), prompts(1), "", "Oil", 0.0)
    assert sorted(sum(reward.asked, [])) == ["Oil. prompt 0", "prompt 0"]


def test_each_text_is_asked_for_once_and_the_oldest_are_forgotten():
    reward, x0 = Pair(), latents(3, (3, 4, 4))
    who = [prompts(2)[i] for i in (0, 1, 0)]
    with RewardHub(reward) as hub:
        critic = Critic(Toy(), hub)
        first, again = (critic.relative(x0, who, "good", "bad", 0.0) for _ in range(2))
        assert reward.asked == [["good. prompt 0", "good. prompt 1"], ["bad. prompt 0", "bad. prompt 1"]]
        assert torch.equal(first, again)
        critic.texts_kept = 2
        critic.relative(x0, who, "good", "bad", 0.0)  # drops what was used longest ago, after it was used
        reward.asked.clear()
        assert torch.equal(critic.relative(x0, who, "bad", "bad", 0.0), torch.zeros(3))
    assert reward.asked == []


def test_mistakes_are_told():
    with RewardHub("pixel.contrast") as hub:
        critic, x0 = Critic(Toy(), hub), latents(3, (3, 4, 4))
        with pytest.raises(RewardError, match="no weighted reward offers image and text features"):
            critic.relative(x0, prompts(3), "good", "bad", 0.0)
        for ask in (critic, lambda x, who: critic.relative(x, who, "good", "bad", 0.0)):
            with pytest.raises(ValueError, match="3 latents and 1 prompts"):
                ask(x0, prompts(1))
    with RewardHub("pixel.jpeg_size") as hub, pytest.raises(RewardError, match="not differentiable"):
        Critic(Toy(), hub)(latents(1, (3, 4, 4)), prompts(1))
