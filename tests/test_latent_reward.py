"""The latent reward begins as the generator's first blocks, learns from pairs, and pulls samples where it points."""

import copy
import json
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from flowrl.collect import Conditions, Geometry, draw, sample
from flowrl.latent_reward import FACTS, WEIGHTS, LatentReward, LatentRewardError, guided_by, read_facts
from flowrl.pairs import PAIRS, read_pairs, save_media
from flowrl.policy import Policy
from flowrl.train_latent import Scored, better, fit, pair_accuracy, stored_pairs, train_latent
from flowrl.types import Prompt, take

pytestmark = pytest.mark.slow

PROMPTS = [Prompt(id=i, text=text) for i, text in enumerate(["a cat", "two dogs", "a red house"])]
GEOMETRY = Geometry(height=32, width=32)
SHAPE = (4, 16, 16)


@pytest.fixture(scope="module")
def model(tiny_model):
    from flowrl.models import load

    return load(tiny_model)


@pytest.fixture(scope="module")
def policy(model):
    return Policy(model, frozen=True)


@pytest.fixture(scope="module")
def conditions(policy):
    return Conditions(encode=policy.encode)


def seeded(number, seed=0):
    return torch.randn(number, *SHAPE, generator=torch.Generator().manual_seed(seed))


def toy(conditions, groups=12, members=6, seed=0):
    """Latents that differ in brightness, which is their reward; prompts take turns."""
    shift = torch.randn(groups * members, generator=torch.Generator().manual_seed(seed + 1))
    return Scored(
        cond=conditions([PROMPTS[g % 3].text for g in range(groups)]),
        x0=0.3 * seeded(groups * members, seed) + 0.3 * shift[:, None, None, None],
        prompt=torch.arange(groups).repeat_interleave(members),
        reward=shift,
    )


@pytest.fixture(scope="module")
def bright(model, conditions):
    """One that has learnt brightness, and the losses on the way."""
    reward = LatentReward.of(model, 1)
    losses = fit(reward, toy(conditions), steps=60, lr=3e-3, samples=36)
    return reward, losses


# ------------------------------------------------------------------------------------------------ what it is


@pytest.mark.parametrize("blocks", [1, 2])
def test_it_begins_as_the_generator_s_first_blocks(model, conditions, blocks):
    """Block by block the same hidden states; the last block of the two has a form of its own."""
    reward = LatentReward.of(model, blocks)
    seen = {"generator": [], "reward": []}
    hooks = [
        block.register_forward_hook(lambda m, i, out, name=name: seen[name].append(out[1].detach()))
        for name, parts in (("generator", model.trainable), ("reward", reward))
        for block in parts.transformer_blocks
    ]
    x, t, cond = seeded(3), torch.tensor([0.2, 0.5, 1.0]), conditions([p.text for p in PROMPTS])
    try:
        with torch.no_grad():
            model.velocity(x, t, cond)
            score = reward(x, t, cond)
    finally:
        for hook in hooks:
            hook.remove()
    assert len(seen["reward"]) == blocks == reward.blocks
    for ours, theirs in zip(seen["reward"], seen["generator"], strict=False):
        assert torch.equal(ours, theirs)
    assert torch.equal(score, torch.zeros(3))


def test_it_is_a_copy_that_learns_while_the_generator_stays(model, conditions):
    before = {name: tensor.clone() for name, tensor in model.trainable.state_dict().items()}
    reward = LatentReward.of(model, 1)
    start = {name: tensor.clone() for name, tensor in reward.state_dict().items()}
    fit(reward, toy(conditions), steps=3, lr=1e-2)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.trainable.state_dict().items())
    moved = {name.split(".")[0] for name, tensor in reward.state_dict().items() if not torch.equal(start[name], tensor)}
    assert moved >= {"pos_embed", "time_text_embed", "context_embedder", "transformer_blocks", "head", "score"}


def test_its_gradient_is_that_of_finite_differences(bright, conditions):
    reward, _ = bright
    x, t, cond = seeded(3, 5).requires_grad_(), torch.tensor([0.1, 0.4, 0.8]), conditions([p.text for p in PROMPTS])
    (gradient,) = torch.autograd.grad(reward(x, t, cond).sum(), x)
    direction = gradient / gradient.flatten(1).norm(dim=1)[:, None, None, None]
    with torch.no_grad():
        step = 0.05
        slope = (reward(x + step * direction, t, cond) - reward(x - step * direction, t, cond)) / (2 * step)
    torch.testing.assert_close(slope, gradient.flatten(1).norm(dim=1), rtol=2e-2, atol=1e-4)


@pytest.mark.parametrize("blocks", [0, 3])
def test_more_blocks_than_there_are_are_refused(model, blocks):
    with pytest.raises(LatentRewardError, match="choose from 1 to 2"):
        LatentReward.of(model, blocks)


def test_a_generator_of_another_family_is_refused():
    with pytest.raises(LatentRewardError, match="Linear has no pos_embed"):
        LatentReward.of(SimpleNamespace(trainable=torch.nn.Linear(2, 2)))


def test_a_generator_with_adapters_is_refused(tiny_model):
    from flowrl.models import load

    adapted = Policy(load(tiny_model), lora={"rank": 2, "alpha": 2}).model
    with pytest.raises(LatentRewardError, match="bare model"):
        LatentReward.of(adapted)


# ------------------------------------------------------------------------------------------------ on disk


def test_it_is_saved_and_loaded_bit_by_bit(model, bright, conditions, tmp_path):
    reward, _ = bright
    reward.save(tmp_path / "saved", {"reward": "brightness"})
    assert {path.name for path in (tmp_path / "saved").iterdir()} == {WEIGHTS, FACTS}
    loaded = LatentReward.load(tmp_path / "saved", model)
    state = loaded.state_dict()
    assert state.keys() == reward.state_dict().keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in reward.state_dict().items())
    assert not any(p.requires_grad for p in loaded.parameters())
    x, t, cond = seeded(3), torch.tensor([0.2, 0.5, 1.0]), conditions([p.text for p in PROMPTS])
    assert torch.equal(loaded(x, t, cond), reward(x, t, cond))
    assert read_facts(tmp_path / "saved")["reward"] == "brightness"


def test_a_reward_of_another_model_is_refused(model, bright, tmp_path):
    from diffusers import SD3Transformer2DModel

    bright[0].save(tmp_path)
    other = copy.copy(model)
    other.trainable = SD3Transformer2DModel.from_config({**model.trainable.config, "pooled_projection_dim": 8})
    with pytest.raises(LatentRewardError, match="pooled_projection_dim is 32 there and 8 here"):
        LatentReward.load(tmp_path, other)


def test_damaged_and_absent_files_are_refused(model, bright, tmp_path):
    with pytest.raises(LatentRewardError, match="holds no latent reward"):
        LatentReward.load(tmp_path / "nothing", model)
    bright[0].save(tmp_path)
    facts = json.loads((tmp_path / FACTS).read_text())
    (tmp_path / FACTS).write_text(json.dumps({**facts, "format": 0}))
    with pytest.raises(LatentRewardError, match="another format"):
        LatentReward.load(tmp_path, model)
    (tmp_path / FACTS).write_text(json.dumps({**facts, "blocks": 2}))
    with pytest.raises(LatentRewardError, match="cannot be read"):
        LatentReward.load(tmp_path, model)
    (tmp_path / FACTS).write_text(json.dumps(facts))
    (tmp_path / WEIGHTS).write_bytes(b"\x80\x04N.")  # a pickle
    with pytest.raises(LatentRewardError, match="cannot be read"):
        LatentReward.load(tmp_path, model)


# ------------------------------------------------------------------------------------------------ learning


def test_it_learns_what_can_be_seen_and_less_in_more_noise(bright, conditions):
    reward, losses = bright
    assert losses[0] == pytest.approx(math.log(2), abs=1e-6)
    assert sum(losses[-10:]) / 10 < 0.4
    found = pair_accuracy(reward, toy(conditions, seed=50))
    assert list(found) == ["0.1", "0.3", "0.5", "0.7", "0.9"]
    assert found["0.1"]["accuracy"] > 0.9 > found["0.9"]["accuracy"] > 0.5
    assert found["0.1"]["pairs"] == 12 * 6 * 5 / 2


def test_the_other_objective_learns_the_values(model, conditions):
    reward, data = LatentReward.of(model, 1), toy(conditions)
    shifted = replace(data, reward=5 + data.reward)
    losses = fit(reward, shifted, steps=60, lr=3e-3, samples=36, objective="mse")
    assert losses[0] < 4 and sum(losses[-10:]) / 10 < 0.4 * shifted.reward.var().item()
    fresh = toy(conditions, seed=50)
    with torch.no_grad():
        r = reward(fresh.x0, torch.full((len(fresh.x0),), 0.05), take(fresh.cond, fresh.prompt))
    assert (r - 5 - fresh.reward).square().mean() < 0.3 * fresh.reward.var()


def test_training_depends_on_the_seed_alone(model, conditions):
    def trained(seed):
        torch.rand(1)  # the global generator is somewhere else each time
        reward = LatentReward.of(model, 1, seed=seed)
        return fit(reward, toy(conditions), steps=3, lr=1e-2, seed=seed), reward.state_dict()

    (losses, one), (again, two), (other, _) = trained(3), trained(3), trained(4)
    assert losses == again != other
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize("objective", ["bradley_terry", "mse"])
def test_a_sample_without_a_verdict_is_as_if_never_drawn(model, conditions, objective):
    data = toy(conditions, groups=3)
    at = torch.tensor([2, 6, 6 + 5])  # in the middle, and at both ends of a group
    keep = torch.ones(len(data.x0), dtype=torch.bool).index_fill(0, at, False)
    without = replace(data, x0=data.x0[keep], prompt=data.prompt[keep], reward=data.reward[keep])
    broken = replace(data, x0=data.x0.clone(), reward=data.reward.clone())
    broken.x0[at], broken.reward[at] = math.nan, math.nan
    losses = [fit(LatentReward.of(model, 1), d, steps=3, objective=objective) for d in (without, broken)]
    assert losses[0] == losses[1] and all(map(math.isfinite, losses[0]))


def test_pairs_are_of_one_prompt_and_differ():
    reward, prompt = torch.tensor([1.0, 2.0, 2.0, math.nan, 3.0]), torch.tensor([0, 0, 0, 0, 1])
    expected = torch.zeros(5, 5, dtype=torch.bool)
    expected[1, 0] = expected[2, 0] = True
    assert torch.equal(better(reward, prompt), expected)


def test_the_first_steps_follow_the_bradley_terry_gradient(model, conditions):
    """The first step moves only the last layer; its gradient is written out pair by pair, independently of the code."""
    data = toy(conditions, groups=1, members=4)
    reward = LatentReward.of(model, 1)
    generator = torch.Generator().manual_seed(0)
    torch.randperm(1, generator=generator)
    t = torch.rand(1, generator=generator).expand(4)
    noise = torch.randn(data.x0.shape, generator=generator)
    x = data.x0 * (1 - t)[:, None, None, None] + noise * t[:, None, None, None]
    scores = reward(x, t, take(data.cond, data.prompt))
    terms = [
        -torch.log(1 / (1 + torch.exp(scores[j] - scores[i])))
        for i in range(4)
        for j in range(4)
        if data.reward[i] > data.reward[j]
    ]
    assert len(terms) == 6
    (expected,) = torch.autograd.grad(torch.stack(terms).mean(), reward.score.weight)
    found = []
    reward.score.weight.register_hook(lambda gradient: found.append(gradient.clone()))
    fit(reward, data, steps=1)
    torch.testing.assert_close(found[0], expected, rtol=1e-4, atol=1e-6)


def test_accuracy_counts_pairs(bright, conditions):
    """Against a loop over pairs, at one level of noise."""
    reward, _ = bright
    data = toy(conditions, groups=3, members=3, seed=9)
    noise = torch.randn(data.x0.shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        r = reward(0.3 * data.x0 + 0.7 * noise, torch.full((9,), 0.7), take(data.cond, data.prompt))
    shares = []
    for group in range(3):
        rows = range(3 * group, 3 * group + 3)
        pairs = [(i, j) for i in rows for j in rows if data.reward[i] > data.reward[j]]
        shares.append(sum(bool(r[i] > r[j]) for i, j in pairs) / len(pairs))
    found = pair_accuracy(reward, data)["0.7"]
    assert found["accuracy"] == pytest.approx(sum(shares) / 3)
    assert found["se"] == pytest.approx(torch.tensor(shares).std().item() / math.sqrt(3), abs=1e-6)


def test_nothing_to_learn_is_said(model, conditions):
    data = toy(conditions, groups=3)
    ties = replace(data, reward=data.prompt.float())
    with pytest.raises(LatentRewardError, match="nothing to learn"):
        fit(LatentReward.of(model, 1), ties, steps=1)
    with pytest.raises(LatentRewardError, match="unknown objective 'hinge'"):
        fit(LatentReward.of(model, 1), data, steps=1, objective="hinge")


# ------------------------------------------------------------------------------------------------ guiding


def latents(policy, conditions, guide, seed=1):
    found = draw(policy, PROMPTS, range(3), conditions, GEOMETRY, num_steps=6, seed=seed, guide=guide)
    return torch.cat(list(found))


def test_samples_are_pulled_to_more_of_the_reward(policy, conditions, bright):
    reward, _ = bright

    def judged(weight):
        x0 = latents(policy, conditions, guided_by([(reward, weight)]))
        with torch.no_grad():
            return reward(x0, torch.zeros(3), conditions([p.text for p in PROMPTS])), x0.mean((1, 2, 3))

    (low, dark), (none, plain), (high, light) = judged(-3.0), judged(0.0), judged(3.0)
    assert (low < none).all() and (none < high).all()
    assert (dark < plain).all() and (plain < light).all()


def test_weight_zero_leaves_the_pictures_and_the_calls_are_the_same(policy, conditions, bright):
    def media(guide):
        before = policy.calls["eval"]
        found = sample(policy, PROMPTS, range(3), conditions, GEOMETRY, num_steps=3, seed=0, batch=2, guide=guide)
        return found, policy.calls["eval"] - before

    (plain, calls), (zero, _), (guided, same) = (
        media(None), media(guided_by([(bright[0], 0.0)])), media(guided_by([(bright[0], 2.0)])),
    )  # fmt: skip
    assert torch.equal(plain, zero) and not torch.equal(plain, guided)
    assert calls == same == 9


# ------------------------------------------------------------------------------------------------ pairs on disk


def store(folder, sizes=((32, 32), (32, 32))):
    lines = []
    for number in range(4):
        size = sizes[number % 2]
        names = [
            save_media(torch.full((1, 3, *size), light + 0.05 * number), folder, f"{number}_{light}")
            for light in (0.7, 0.2)
        ]
        lines.append(json.dumps({"prompt": PROMPTS[number % 3].text, "chosen": names[0], "rejected": names[1]}))
    (folder / PAIRS).write_text("\n".join(lines) + "\n")
    return folder


def test_stored_pairs_are_encoded(model, conditions, tmp_path):
    prompts = read_pairs(store(tmp_path))
    data = stored_pairs(prompts, model, conditions)
    assert data.prompt.tolist() == [0, 0, 1, 1, 2, 2, 3, 3] and data.reward.tolist() == [1.0, 0.0] * 4
    media = torch.full((1, 1, 3, 32, 32), round((0.7 + 0.05) * 255) / 255)
    torch.testing.assert_close(data.x0[2:3], model.encode_media(media))
    assert len(data.cond["prompt_embeds"]) == 4


def test_pairs_of_several_sizes_are_refused(model, conditions, tmp_path):
    with pytest.raises(LatentRewardError, match="several sizes"):
        stored_pairs(read_pairs(store(tmp_path, ((32, 32), (48, 32)))), model, conditions)


def test_it_is_trained_from_a_folder_of_pairs(make_config, tmp_path):
    facts = train_latent(make_config(), tmp_path / "out", pairs=store(tmp_path / "pairs"), steps=2, blocks=1)
    assert facts["prompts"] == 4 and facts["samples"] == 8 and facts["held_out_prompts"] in (1, 2)
    assert read_facts(tmp_path / "out")["pair_accuracy"] == facts["pair_accuracy"]


# ------------------------------------------------------------------------------------------------ the commands


def test_the_commands_train_it_and_guide_with_it(command, config_file, tiny_model, tmp_path):
    config, folder = config_file({"data.evaluation.num_samples": 3}), tmp_path / "latent"
    options = ("--output", folder, "--prompts", 6, "--samples-per-prompt", 3, "--steps", 4, "--blocks", 1)
    code, out, err = command("reward", "train-latent", config, *options, "--reward", "pixel.brightness")
    assert code == 0 and "told apart at t = 0.5" in out, err
    facts = read_facts(folder)
    assert (facts["samples"], facts["reward"], facts["blocks"]) == (18, "pixel.brightness", 1)
    weights = (folder / WEIGHTS).read_bytes()
    assert command("reward", "train-latent", config, *options)[0] == 0
    assert (folder / WEIGHTS).read_bytes() == weights  # the total is this one reward: nothing else was random

    def drawn(*arguments):
        path = tmp_path / "grid.png"
        code, _, err = command("sample", "a cat", "--model", tiny_model, "--count", 2, "--output", path, *arguments)
        assert code == 0, err
        return Image.open(path).tobytes()

    plain = drawn()
    assert drawn("--guide", f"{folder}=0") == plain
    guided = drawn("--guide", f"{folder}=400")
    others = [drawn("--guide", f"{folder}=400", *o) for o in (("--guide-range", 0, 0.5), ("--guide-cap", 0.01))]
    assert guided not in (plain, *others)
    assert drawn("--guide", f"{folder}=200", "--guide", f"{folder}=-200") == plain

    assert command("train", config, "iterations=1")[0] == 0
    code, out, err = command("eval", tmp_path / "run", "--guide", f"{folder}=50", "--no-base")
    assert code == 0 and "tuned" in out and "guided" in out and "gain" in out, err


@pytest.mark.parametrize("given", ["latent", "latent=much", "=1"])
def test_a_guide_that_cannot_be_read_is_explained(command, tiny_model, given):
    code, _, err = command("sample", "a cat", "--model", tiny_model, "--guide", given)
    assert code == 2 and "FOLDER=WEIGHT" in err and "Traceback" not in err


def test_a_range_of_times_that_is_empty_is_explained(command, tiny_model):
    code, _, err = command("sample", "a cat", "--model", tiny_model, "--guide", "latent=1", "--guide-range", 0.8, 0.2)
    assert code == 2 and "--guide-range 0.8 0.2" in err and "Traceback" not in err


def test_an_unknown_score_is_refused(make_config, tmp_path):
    with pytest.raises(LatentRewardError, match="no score 'beauty'.*pixel.brightness"):
        train_latent(make_config(), tmp_path, reward="beauty", num_prompts=2, samples_per_prompt=2, steps=1)
