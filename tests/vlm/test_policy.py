"""The policy that writes: first ratios of 1, entropies and gradients, references, hooks of the losses, and exports."""

import json
from dataclasses import replace

import pytest
import torch

from flowrl.models.pipeline import ModelError
from flowrl.types import Tokens
from flowrl.vlm import policy as module
from flowrl.vlm.collate import asked
from flowrl.vlm.generate import begin
from tests.vlm.policies import (
    LORA,
    NAMES,
    QUESTIONS,
    TEMPERATURE,
    answers,
    begun,
    expected,
    load,
    make,
    picture,
    prompts,
    used_tool,
    written_out,
)

pytestmark = pytest.mark.slow


def moved(policy, size=0.05, seed=0):
    """Its weights, after a step that an optimiser might have made."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in policy.trainable_parameters():
            parameter += size * torch.randn(parameter.shape, generator=generator)
    return policy


# ------------------------------------------------------------------------------------------------ log-probabilities


@pytest.mark.parametrize("name", NAMES)
def test_the_first_ratio_is_one(name):
    """All traps at once: temperature 0.7, bans, mixed lengths and sizes, tools' pictures, ends; in any micro-batch."""
    policy = make(name, lora=LORA)
    rows, tokens = answers(policy)
    after = used_tool(policy, rows)
    tokens = Tokens.cat([tokens, policy.tokens(after, [0] * len(after))], [0, 4])
    for size in (len(tokens), 3):
        for part in torch.randperm(len(tokens), generator=torch.Generator().manual_seed(size)).split(size):
            chosen = tokens.select(part)
            ratio = (policy.evaluate(chosen).logprob - chosen.logprob).abs()
            assert ratio.max() < 1e-5
    assert not tokens.mask.all() and tokens.logprob[tokens.mask].min() < -1


@pytest.mark.parametrize("name", NAMES)
def test_after_a_step_it_is_what_the_model_says_then(name):
    policy = make(name, lora=LORA)
    rows, tokens = answers(policy)
    moved(policy)
    now = policy.evaluate(tokens).logprob
    assert (now - tokens.logprob).abs().max() > 0.05
    for i, row in enumerate(rows):
        assert torch.allclose(now[i, : len(row.ids)].double(), expected(policy.model, row), atol=1e-5)


def test_each_trap_shows():
    """What the first ratio would be if a rule were broken: far from 1 each time, so the tests above can fail."""
    policy = make("qwen3_vl")
    rows, tokens = answers(policy)

    def error(change):
        other = make("qwen3_vl")
        change(other)
        return (other.evaluate(tokens).logprob - tokens.logprob)[tokens.mask].abs().max()

    assert error(lambda p: None) < 1e-5
    assert error(lambda p: setattr(p, "temperature", 1.0)) > 0.1
    assert error(lambda p: setattr(p.model, "banned", p.model.banned[:0])) > 1e-3
    assert (
        error(lambda p: p.model.__dict__.update(positions=lambda batch: batch["attention_mask"].cumsum(1) - 1)) > 1e-3
    )
    blind = [replace(one, places={name: 0 * value for name, value in one.places.items()}) for one in tokens.inputs]
    untold = policy.evaluate(replace(tokens, inputs=tuple(blind))).logprob
    assert (untold - tokens.logprob)[tokens.mask].abs().max() > 1e-2
    batch = {name: value for name, value in written_out(policy.model, rows).items() if name != "mm_token_type_ids"}
    with pytest.raises(ValueError, match="mm_token_type_ids"):
        policy.model.trainable(**batch)


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_gradient_and_entropy_are_those_of_the_whole_table(name):
    """Against autograd through the model's own logits and torch.distributions, and in parts that are made twice."""
    policy = make(name, lora=LORA)
    moved(policy)
    rows, tokens = answers(policy, members=1)

    def gradient(total):
        return torch.autograd.grad(total, policy.trainable_parameters())

    plain = []
    for row in rows:
        logits = policy.model.trainable(**written_out(policy.model, [row])).logits[0, len(row.inputs.ids) - 1 : -1]
        logits = (logits / TEMPERATURE).index_fill(-1, policy.model.banned, -1e9)
        spoken = torch.distributions.Categorical(logits=logits)
        plain.append((spoken.log_prob(row.ids), spoken.entropy()))
    wanted = gradient(sum(logprob.sum() + 0.3 * entropy.sum() for logprob, entropy in plain))
    for numbers in (1 << 26, 5 * 270):  # all at once; five places at a time
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, "_NUMBERS", numbers)
            stats = policy.evaluate(tokens, entropy=True)
        for i, (logprob, entropy) in enumerate(plain):
            assert torch.allclose(stats.logprob[i, : len(logprob)], logprob, atol=1e-5)
            assert torch.allclose(stats.entropy[i, : len(entropy)], entropy, atol=1e-5)
        found = gradient(stats.logprob.sum() + 0.3 * stats.entropy.sum())
        for mine, theirs in zip(found, wanted, strict=True):
            assert torch.allclose(mine, theirs, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("name", NAMES)
def test_a_prompt_read_once_says_and_teaches_the_same(name):
    """One graph of a prompt for all its answers, against a graph of its own for each; pictures of tools too."""
    shared = moved(make(name, lora=LORA))
    rows, _ = answers(shared, members=3)
    rows = [*used_tool(shared, rows), begin(prompts(shared)[1], (7,))]
    tokens = shared.tokens(rows, [0] * len(rows)).select(torch.tensor([7, 0, 12, 3, 1, 10, 2, 4]))
    apart = moved(make(name, lora=LORA, share=False))
    found, read = [], []
    for policy in (shared, apart):
        stats = policy.evaluate(tokens, entropy=True)
        read.append(policy.calls["train"])
        total = (stats.logprob * torch.arange(8)[:, None]).sum() + stats.entropy.sum()
        found.append([stats.logprob.detach(), *torch.autograd.grad(total, policy.trainable_parameters())])
    for ours, theirs in zip(*found, strict=True):
        assert torch.allclose(ours, theirs, atol=2e-4, rtol=1e-3)
    assert torch.allclose(found[0][0], found[1][0], atol=1e-5)
    # Where tokens of pictures are marked, rows with a tool's picture are read by themselves.
    told = any(part.places for row in rows for _, part in row.inputs.later)
    assert shared._share and shared._share_checked != told


def test_a_network_that_does_not_heed_its_cache_reads_each_prompt_again(monkeypatch):
    policy = make("llava", lora=LORA)
    _, tokens = answers(policy)
    own = policy.model.states

    def forgetful(batch, cache=None, use_cache=False):
        states, made = own(batch, cache, use_cache)
        return (states if cache is None or states.shape[1] == 1 else states.flip(0)), made

    monkeypatch.setattr(policy.model, "states", forgetful)
    assert torch.allclose(policy.evaluate(tokens).logprob, tokens.logprob, atol=1e-5) and not policy._share


def test_a_prompt_is_read_each_time_where_activations_are_forgotten():
    grads = []
    for forget in (False, True):
        policy = make("qwen2_vl", lora=LORA, gradient_checkpointing=forget)
        _, tokens = answers(moved(policy))
        total = policy.evaluate(tokens).logprob.sum()
        assert torch.allclose(total, tokens.logprob.sum(), atol=1e-3)
        grads.append(torch.autograd.grad(total, policy.trainable_parameters()))
        assert policy._share_checked != forget
    assert all(torch.allclose(a, b, atol=1e-3, rtol=1e-3) for a, b in zip(*grads, strict=True))


def test_parts_keep_no_table(monkeypatch):
    """What the backward pass holds on to is the states, not log-probabilities of the vocabulary."""
    policy = make("llava", lora=LORA)
    _, tokens = answers(policy, members=4)
    kept = {}
    for numbers in (1 << 26, 2 * 270):
        monkeypatch.setattr(module, "_NUMBERS", numbers)
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, s=saved: (s.append(t.shape), t)[1], lambda t: t):
            policy.evaluate(tokens)
        kept[numbers] = sum(len(shape) == 2 and shape[-1] == 260 for shape in saved)
    assert kept[1 << 26] > 0 and kept[540] == 0


def test_answers_without_a_chosen_token_are_zeros():
    policy = make("llava", lora=LORA)
    part = policy.model.foreign("given")
    rows = [row.append(part) for row in begun(prompts(policy), members=1)]
    tokens = policy.tokens(rows, [0, 1, 2, 3])
    stats = policy.evaluate(tokens, entropy=True)
    assert stats.logprob.shape == tokens.ids.shape and (stats.logprob == 0).all() and (stats.entropy == 0).all()
    (stats.logprob.sum() + stats.entropy.sum()).backward()  # a graph, though nothing depends on anything


def test_below_fp32_the_table_is_scored_as_the_update_does():
    policy = make(model=load("qwen2_vl", dtype=torch.bfloat16), lora=LORA, share=False)
    rows, tokens = answers(policy)
    chosen = torch.nn.utils.rnn.pad_sequence([row.logprob for row in rows], batch_first=True)
    assert (chosen - tokens.logprob).abs().max() > 1e-3  # one token at a time rounds otherwise
    assert (policy.evaluate(tokens).logprob - tokens.logprob).abs().max() < 1e-5
    half = make(model=load("qwen2_vl", dtype=torch.bfloat16), lora=LORA, rescore=False)
    assert torch.equal(answers(half)[1].logprob, chosen)


def test_a_policy_writes_at_its_own_temperature_and_counts_tokens():
    policy = make("llava")
    inputs = prompts(policy)
    with policy.role("rollout"):
        rows = policy.write(begun(inputs), limit=5)
    read, written = sum(len(one.ids) for one in inputs), sum(len(row.ids) for row in rows)
    assert dict(policy.calls) == {"rollout": read + written}
    tokens = policy.tokens(rows, [0] * 8)
    policy.evaluate(tokens)
    assert policy.calls["train"] == read + written
    hot = policy.write(begun(inputs), limit=5, temperature=3.0)
    assert (
        policy.evaluate(policy.tokens(hot, [0] * 8)).logprob - policy.tokens(hot, [0] * 8).logprob
    ).abs().max() > 0.1
    with pytest.raises(ModelError, match="above 0"):
        make("llava", temperature=0.0)


def test_prompts_are_kept_under_a_key():
    policy = make("llava")
    first = policy.prepare(asked("x", [picture(0)]), key=("a", 1))
    assert policy.prepare(asked("y"), key=("a", 1)) is first and policy.prepare(asked("y")) is not first


# ------------------------------------------------------------------------------------------------ what learns


@pytest.mark.parametrize("name", NAMES)
def test_without_adapters_it_is_the_initial_model(name):
    policy = make(name, lora=LORA)
    _, tokens = answers(policy)
    moved(policy)
    now = policy.evaluate(tokens).logprob
    with policy.reference(), torch.no_grad():
        assert (policy.evaluate(tokens).logprob - tokens.logprob).abs().max() < 1e-5
    assert torch.equal(policy.evaluate(tokens).logprob, now)
    now.sum().backward()
    assert all(p.grad is not None for p in policy.trainable_parameters())
    learning = {n for n, p in policy.model.trainable.named_parameters() if p.requires_grad}
    assert learning == set(policy._parameters) and all("lora_" in n for n in learning)
    before = policy.calls["train"]
    policy.evaluate(tokens)
    assert policy.calls["reference"] == policy.calls["train"] - before > 0


def test_all_weights_keep_a_reference_if_told():
    policy = make("llava", reference=True)
    _, tokens = answers(policy)
    moved(policy, 0.02)
    with policy.reference():
        assert (policy.evaluate(tokens).logprob - tokens.logprob).abs().max() < 1e-5
    assert (policy.evaluate(tokens).logprob - tokens.logprob).abs().max() > 0.01
    with pytest.raises(ModelError, match="reference=True"), make("llava").reference():
        pass


def test_targets_of_ones_own_stay_in_the_language_model():
    policy = make("llava", lora=LORA | {"targets": ["q_proj"]})
    assert len(policy._parameters) == 4 and all("language_model" in name for name in policy._parameters)


def test_a_value_head_learns_beside_adapters():
    for lora in (LORA, None):
        policy = make(model=load("llava", value_head=True), lora=lora, reference=True)
        _, tokens = answers(policy)
        assert {"value_head.weight", "value_head.bias"} < set(policy._parameters)
        assert (policy.values(tokens) == 0).all()
        stats = policy.evaluate(tokens, value=True)
        (stats.value - 1).square()[tokens.mask].mean().backward()
        bias = policy._parameters["value_head.bias"].grad
        assert torch.allclose(bias, torch.tensor([-2.0]))
        moved(policy)
        values = policy.values(tokens)
        assert values[tokens.mask].std() > 0 and (values[~tokens.mask] == 0).all()
        state = policy.state_dict()
        assert "weights.value_head.weight" in state
        policy.load_state_dict(state)


def test_a_value_is_expected_before_its_token():
    """The value before a token does not change with it; the one behind it does."""
    policy = moved(make(model=load("llava", value_head=True), lora=LORA))
    one = prompts(policy)[0]
    ids = [torch.tensor([5, 6, 7]), torch.tensor([5, 90, 7])]
    rows = [begin(one, ()).wrote(each, torch.zeros(3), "length") for each in ids]
    values = policy.values(policy.tokens(rows, [0, 0]))
    assert torch.allclose(values[0, :2], values[1, :2], atol=1e-6)
    assert abs(float(values[0, 2] - values[1, 2])) > 1e-4


# ------------------------------------------------------------------------------------------------ hooks of losses


def test_gold_answers_belong_to_their_rows():
    policy = make("llava")
    inputs = [
        policy.prepare(asked("1 + 1"), solution="2"),
        policy.prepare(asked("2 + 2")),
        policy.prepare(asked("x", [picture(0)]), solution="red"),
    ]
    rows = policy.write(begun(inputs, members=3), limit=4)
    tool = rows[6].append(policy.model.foreign("ok", [picture(1)]))
    tokens = policy.tokens([*rows[:6], tool, *rows[7:]], [0] * 3 + [1] * 3 + [2] * 3)
    gold = policy.gold(tokens)
    ends = policy.model.ends
    assert [ids[mask].tolist() for ids, mask in zip(gold.ids, gold.mask, strict=True)] == [
        [*policy.model.encode(text), ends[0]] if text else [] for text in ("2", "", "red") for _ in range(3)
    ]
    assert gold.prompt.tolist() == tokens.prompt.tolist()
    assert policy.evaluate(gold).logprob[gold.mask].max() < 0
    assert policy.gold(tokens.select(torch.arange(3, 6))) is None


@pytest.mark.parametrize("name", ["qwen2_vl", "smolvlm"])
def test_masked_pictures_are_seen_inside_only(name):
    policy = make(name)
    _, tokens = answers(policy)
    with policy.masked_images(1.0, seed=0), torch.no_grad():
        black = policy.evaluate(tokens).logprob
    blank = [asked(text, [picture(0, *p.size).point(lambda _: 0) for p in pictures]) for text, pictures in QUESTIONS]
    other = [policy.prepare(talk) for talk in blank]
    shown = replace(tokens, inputs=tuple(other[p] for p in tokens.prompt.tolist()))
    assert torch.allclose(black, policy.evaluate(shown).logprob, atol=1e-6)
    assert (black - tokens.logprob)[tokens.prompt != 2].abs().max() > 0.01
    assert torch.allclose(black[tokens.prompt == 2], tokens.logprob[tokens.prompt == 2], atol=1e-5)  # no picture
    with policy.masked_images(0.5, seed=1), torch.no_grad():
        first = policy.evaluate(tokens).logprob
        assert torch.equal(first, policy.evaluate(tokens).logprob)
    with policy.masked_images(0.5, seed=2), torch.no_grad():
        assert not torch.equal(first, policy.evaluate(tokens).logprob)
    assert (policy.evaluate(tokens).logprob - tokens.logprob).abs().max() < 1e-5


# ------------------------------------------------------------------------------------------------ exports


@pytest.mark.parametrize("name", NAMES)
def test_adapters_are_read_by_peft_and_read_back(name, tmp_path):
    from peft import PeftModel

    policy = moved(make(name, lora=LORA))
    rows, tokens = answers(policy)
    policy.export(tmp_path / "out", inference={"max_new_tokens": 12})
    assert json.loads((tmp_path / "out/inference.json").read_text()) == {"temperature": 0.7, "max_new_tokens": 12}
    base = load(name)
    base.trainable = PeftModel.from_pretrained(base.trainable, tmp_path / "out").base_model.model.eval()
    assert torch.allclose(expected(base, rows[0]), rows[0].logprob.double(), atol=1e-5)
    again = make(name, lora=LORA)
    again.load_weights(tmp_path / "out")
    assert torch.equal(again.evaluate(tokens).logprob, policy.evaluate(tokens).logprob)
    with pytest.raises(ModelError, match="lora alpha 8"):
        make(name, lora=LORA | {"alpha": 16}).load_weights(tmp_path / "out")
    with pytest.raises(ModelError, match="are LoRA adapters"):
        make(name).load_weights(tmp_path / "out")


@pytest.mark.parametrize("lora", [LORA, None], ids=["merged", "all weights"])
@pytest.mark.parametrize("name", ["qwen2_5_vl", "llava"])
def test_a_whole_folder_is_read_by_transformers_and_read_back(name, lora, tmp_path):
    from transformers import AutoModelForImageTextToText

    policy = moved(make(model=load(name, value_head=True), lora=lora), 0.02)
    rows, tokens = answers(policy)
    policy.export(tmp_path / "out", form="full")
    network, told = AutoModelForImageTextToText.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not told["unexpected_keys"] and not told["missing_keys"]
    fresh = type(policy.model).load(tmp_path / "out")
    for row in rows:
        assert torch.allclose(expected(fresh, row), row.logprob.double(), atol=2e-5)
    assert fresh.prepare(asked(*QUESTIONS[1])).ids.tolist() == rows[2].inputs.ids.tolist()
    if lora is None:
        again = make(model=load(name, value_head=True))
        again.load_weights(tmp_path / "out")
        assert torch.equal(again.evaluate(tokens, value=True).value, policy.evaluate(tokens, value=True).value)
        assert torch.equal(again.evaluate(tokens).logprob, policy.evaluate(tokens).logprob)
    assert torch.allclose(policy.evaluate(tokens).logprob, tokens.logprob, atol=1e-5)  # itself it trains on


def test_files_hold_no_path_of_this_machine(tmp_path):
    from flowrl.vlm.model import resolve

    for form, lora in (("peft", LORA), ("full", LORA)):
        folder = make("llava", lora=lora).export(tmp_path / form, form=form)
        texts = [file.read_text() for file in folder.iterdir() if file.suffix != ".safetensors"]
        assert len(texts) >= 3 and not [
            text for text in texts if resolve("tiny/llava") in text or str(tmp_path) in text
        ]


@pytest.mark.parametrize("form", ["peft", "full"])
def test_the_code_of_the_readme_runs(form, tmp_path, monkeypatch, capsys):
    make("llava", lora=LORA).export(tmp_path / "out", form=form)
    code = (tmp_path / "out/README.md").read_text().split("```")[1].removeprefix("python")
    picture(0).save(tmp_path / "picture.png")
    monkeypatch.chdir(tmp_path)
    exec(compile(code.replace("256", "4"), "README", "exec"), {})
    assert capsys.readouterr().out.strip()


def test_the_average_is_what_is_exported(tmp_path):
    policy = make("llava", lora=LORA, ema_decay=0.5)
    _, tokens = answers(policy)
    moved(policy)
    policy.update_average()
    with policy.averaged():
        wanted = policy.evaluate(tokens).logprob
    policy.export(tmp_path / "out")
    again = make("llava", lora=LORA)
    again.load_weights(tmp_path / "out")
    assert torch.allclose(again.evaluate(tokens).logprob, wanted, atol=1e-6)
    assert not torch.allclose(policy.evaluate(tokens).logprob, wanted, atol=1e-3)


def test_what_cannot_be_exported_is_said(tmp_path):
    with pytest.raises(ModelError, match="learnt nothing"):
        make("llava", frozen=True).export(tmp_path)
    with pytest.raises(ModelError, match="for LoRA adapters"):
        make("llava").export(tmp_path, form="peft")
    with pytest.raises(ModelError, match="peft or full"):
        make("llava", lora=LORA).export(tmp_path, form="comfyui")


def test_the_built_in_model_keeps_its_tags(tmp_path):
    """In its vocabulary of words the tags of thinking, answers and tools are words, which verifiers must see."""
    policy = make(model=type(load("llava")).load("shapes_vlm"), rescore=True, lora=LORA)
    text = "<think> red circle </think> <answer> 2 </answer>"
    ids = [*policy.model.encode(text), *policy.model.ends]
    assert policy.text(torch.tensor(ids)) == text and not set(ids[:-1]) & set(policy.model.banned.tolist())
    assert len(policy.model.encode("</tool_call>")) == 1
    rows, tokens = answers(
        policy, limit=24, inputs=[policy.prepare(asked("how many squares are there ?", [picture(0, 64, 64)]))]
    )
    assert (policy.evaluate(tokens).logprob - tokens.logprob).abs().max() < 1e-5
    drawn = torch.nn.utils.rnn.pad_sequence([row.logprob for row in rows], batch_first=True)
    assert (drawn - tokens.logprob).abs().max() < 1e-4  # logits around 20, in fp32
