"""A chat model as the judge: a tiny LLaVA, asked here and over HTTP, and servers that say what no judge should."""

import json
import math
import threading
import time

import pytest
import torch
import yaml

from rewards import RewardContractError, RewardError, RewardHub, Sample, build, traits_of
from rewards._answers import ScoreLines
from rewards._chat import read_completion
from rewards._template import modes, read_template
from rewards.media import from_pil, to_pil
from rewards.pairs import PairJudge
from tests.rewards.chat_server import chat_server, completion, logs, model_server, serving, shown
from tests.rewards.faults import FaultServer, reply, status, without_answer
from tests.rewards.makers import noise
from tests.rewards.stopwatch import Stopwatch
from tests.rewards.test_reward_suder import LLAVA_TEMPLATE, byte_tokenizer

TEMPLATE = LLAVA_TEMPLATE + "{% if add_generation_prompt %}{{ 'ASSISTANT: ' }}{% endif %}"
WORDS = ["Yes", "No", "excellent", "bad"]
WRITTEN = "Good.\nFinal Score: 3"
"""What the tiny model answers to questions that want a text."""


# ------------------------------------------------------------------------------------------------ a tiny judge


def build_judge(folder):
    """A random LLaVA that was taught a little: to answer in the words of each mode, and not too surely."""
    from transformers import CLIPImageProcessor, LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor

    tokenizer = byte_tokenizer(["<image>"])
    tokenizer.add_tokens(WORDS)
    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlavaConfig(
        vision_config={**size, "model_type": "clip_vision_model", "image_size": 28, "patch_size": 14},
        text_config={**size, "model_type": "llama", "vocab_size": len(tokenizer), "num_key_value_heads": 1},
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"), vision_feature_layer=-1, image_seq_length=4,
    )  # fmt: skip
    images = CLIPImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    processor = LlavaProcessor(
        images, tokenizer, patch_size=14, vision_feature_select_strategy="default", num_additional_image_tokens=1,
        chat_template=TEMPLATE,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlavaForConditionalGeneration(config)
        teach(model, processor)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return str(folder)


def lessons():
    """(number of pictures, question, answer)"""
    asked = {mode: read_template("judge", mode) for mode in modes("judge")}
    for words, prompt in enumerate(["a red circle", 'a sign that says "hello"']):
        yield 1, asked["yes_prob"].ask("image", prompt), ["Yes", "No"][words]
        yield 1, asked["level_expectation"].ask("image", prompt), ["2", "4"][words]
        yield 2, asked["pair"].ask("image", prompt), ["1", "2"][words]
        yield 1, asked["text"].ask("image", prompt), WRITTEN


def teach(model, processor, steps=45):
    for weight in model.parameters():
        weight.data += 0.05 * torch.randn_like(weight)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    rows = list(lessons())
    texts, fronts = [], []
    for pictures, question, answer in rows:
        labelled = "".join(f"Image {k + 1}:<image>\n" for k in range(pictures)) if pictures > 1 else "<image>\n"
        fronts.append(f"USER: {labelled}{question} ASSISTANT: ")
        texts.append(fronts[-1] + answer + "</s>")
    images = [[to_pil(torch.rand(3, 28, 28)) for _ in range(pictures)] for pictures, _, _ in rows]
    inputs = processor(images=images, text=texts, padding=True, padding_side="right", return_tensors="pt")
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    for row, (picture, front) in enumerate(zip(images, fronts, strict=True)):
        labels[row, : processor(images=[picture], text=[front], return_tensors="pt")["input_ids"].shape[1]] = -100
    for _ in range(steps):
        optimizer.zero_grad()
        model(**inputs, labels=labels).loss.backward()
        optimizer.step()
    model.eval()


def tiny(folder):
    """For the conformance tests."""
    return {"model": build_judge(folder)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return build_judge(tmp_path_factory.mktemp("judge"))


@pytest.fixture(scope="module")
def parts_of_the_model(folder):
    from transformers import AutoModelForImageTextToText, AutoProcessor

    return AutoModelForImageTextToText.from_pretrained(folder).eval(), AutoProcessor.from_pretrained(folder)


@pytest.fixture(scope="module")
def server(parts_of_the_model):
    with model_server(*parts_of_the_model) as running:
        yield running


def loaded(use="judge", **options):
    reward = build(use, options)
    reward.load(torch.device("cpu"), torch.float32)
    return reward


def remote(server, **options):
    return loaded(url=server.url + "/v1", **{"model": "tiny", "deadline": 5.0, **options})


def samples_of(count=4, size=28):
    """Pictures whose pixels survive PNG, with prompts of different lengths."""
    prompts = ["a red circle", 'a sign that says "hello"', "two {blue} squares", "Zwei große Kreise, 2 ⭐!"]
    made = [noise(seed, size, prompt=prompts[seed % 4]) for seed in range(count)]
    return [Sample(media=from_pil(to_pil(each.media)), prompt=each.prompt) for each in made]


def image_of(sample):
    return to_pil(sample.media)


# ------------------------------------------------------------------------------------------------ probabilities


@torch.no_grad()
def probabilities(parts_of_the_model, pictures, text):
    """Of the next token, by its text; the processor gets bytes, one sample at a time."""
    model, processor = parts_of_the_model
    logits = model(**processor(images=pictures, text=text, return_tensors="pt")).logits[0, -1]
    chances = logits.softmax(-1).tolist()
    return {processor.tokenizer.decode([index]): chance for index, chance in enumerate(chances)}


def asked_by_hand(mode, prompt):
    return f"USER: <image>\n{read_template('judge', mode).user.replace('{kind}', 'image').replace('{prompt}', prompt)} "


def test_yes_prob_is_the_share_of_yes(folder, parts_of_the_model):
    """Where one of the two is the likeliest; where it is another word, that would have been the answer."""
    samples = samples_of()
    scores = loaded(model=folder).score(samples)
    for sample, value, mass in zip(samples, scores.value, scores.parts["mass"], strict=True):
        text = asked_by_hand("yes_prob", sample.prompt) + "ASSISTANT: "
        p = probabilities(parts_of_the_model, [image_of(sample)], text)
        answered = max(p, key=p.get) in ("Yes", "No")
        yes, both = (p["Yes"], p["Yes"] + p["No"]) if answered else (math.nan, math.nan)
        assert value.item() == pytest.approx(yes / both, abs=1e-5, nan_ok=True)
        assert mass.item() == pytest.approx(both, abs=1e-5, nan_ok=True)
    assert len({round(value, 4) for value in scores.value.tolist() if not math.isnan(value)}) >= 2


def test_level_expectation_is_the_mean_level(folder, parts_of_the_model):
    samples = samples_of()
    scores = loaded(model=folder, mode="level_expectation").score(samples)
    for sample, value, level in zip(samples, scores.value, scores.parts["level"], strict=True):
        text = asked_by_hand("level_expectation", sample.prompt) + "ASSISTANT: "
        p = probabilities(parts_of_the_model, [image_of(sample)], text)
        top = set(sorted(p, key=p.get)[-20:])
        chances = {k: p[str(k)] for k in range(1, 6) if str(k) in top}
        expected = sum(k * chance for k, chance in chances.items()) / sum(chances.values())
        assert level.item() == pytest.approx(expected, abs=1e-4)
        assert value.item() == pytest.approx((expected - 1) / 4, abs=1e-4)


def test_a_pair_judge_sees_both_in_their_order(folder, parts_of_the_model):
    first, second = samples_of(2)
    judge = loaded(model=folder, mode="pair")
    question = read_template("judge", "pair").ask("image", first.prompt)
    text = f"USER: Image 1:<image>\nImage 2:<image>\n{question} ASSISTANT: "
    for a, b in ((first, second), (second, first)):
        b = Sample(media=b.media, prompt=first.prompt)
        a = Sample(media=a.media, prompt=first.prompt)
        p = probabilities(parts_of_the_model, [[image_of(a), image_of(b)]], text)
        assert judge.prefers(a, b) == pytest.approx(p["1"] / (p["1"] + p["2"]), abs=1e-5)


# ------------------------------------------------------------------------------------------------ over HTTP


@pytest.mark.parametrize("mode", ["yes_prob", "level_expectation", "text"])
def test_a_server_says_what_the_local_model_says(folder, server, mode):
    samples = samples_of()
    here, there = loaded(model=folder, mode=mode).score(samples), remote(server, mode=mode).score(samples)
    assert not here.value.isnan().all()
    torch.testing.assert_close(there.value, here.value, atol=1e-5, rtol=0, equal_nan=True)
    assert there.parts.keys() == here.parts.keys()
    for name, part in here.parts.items():
        torch.testing.assert_close(there.parts[name], part, atol=1e-5, rtol=1e-5, equal_nan=True)
    assert [info["answer"] for info in there.info] == [info["answer"] for info in here.info]


def test_what_is_written_is_scored(folder, server):
    scores = remote(server, mode="text").score(samples_of(2))
    assert scores.info[0]["answer"] == WRITTEN
    assert scores.value.tolist() == [0.5, 0.5]  # (3 - 1) / 4
    assert scores.parts["score"].tolist() == [3, 3]


def test_pairs_over_http_are_the_local_ones(folder, server):
    samples = [Sample(media=sample.media, prompt="a red circle") for sample in samples_of(3)]
    options = {"mode": "pair"}
    ways = []
    for more in ({"model": folder}, {"url": server.url + "/v1", "model": "tiny"}):
        entry = {"use": "pairs", "judge": "judge", "judge_options": {**options, **more}, "margin": 0.0}
        with RewardHub({**entry, "on_error": "raise"}) as hub:
            hub.warmup()
            ways.append(hub(samples))
    assert ways[0].total.tolist() == ways[1].total.tolist()
    assert not ways[0].total.isnan().any()


def test_the_request_is_of_the_api_and_greedy(folder, server):
    server.requests.clear()
    remote(server, mode="level_expectation", seed=7).score(samples_of(1))
    got = [request for request in server.requests if request.method == "POST"]
    assert [(request.method, request.path) for request in server.requests][0] == ("GET", "/v1/models")
    body = got[0].json()
    content = body.pop("messages")[0]["content"]
    assert body == {
        "model": "tiny", "max_tokens": 1, "temperature": 0, "top_p": 1, "seed": 7, "logprobs": True, "top_logprobs": 20,
    }  # fmt: skip
    assert [part["type"] for part in content] == ["image_url", "text"]
    remote(server, mode="text").score(samples_of(1))
    assert not {"logprobs", "top_logprobs"} & server.requests[-1].json().keys()


def test_pictures_travel_without_loss():
    """A picture of noise is what JPEG would change most."""
    seen = []
    with chat_server(lambda body: seen.extend(shown(body)[1]) or completion("Final Score: 2")) as server:
        sample = samples_of(1, 64)[0]
        remote(server, mode="text").score([sample])
    assert torch.equal(from_pil(seen[0]), sample.media)


def test_the_system_message_and_the_token_are_sent(tmp_path, monkeypatch):
    monkeypatch.setenv("JUDGE_TOKEN", "s3cret")
    template = tmp_path / "mine.yaml"
    template.write_text("system: Be fair.\nuser: 'How good is {prompt}?'\n")
    with chat_server(lambda body: completion("Final Score: 2")) as server:
        judge = remote(server, mode="text", template=str(template), token="env:JUDGE_TOKEN")
        assert judge.score(samples_of(1)).value.tolist() == [0.25]
        request = server.requests[-1]
    assert request.headers["authorization"] == "Bearer s3cret"
    assert request.json()["messages"][0] == {"role": "system", "content": "Be fair."}
    assert request.json()["messages"][1]["content"][-1]["text"] == "How good is a red circle?"


def test_many_are_asked_at_once_and_answered_in_order():
    def slowly(body):
        number = int(shown(body)[0][0].rpartition("number ")[2].split()[0])
        time.sleep(0.02 * (8 - number))
        return completion(f"Final Score: {1 + number / 2}")

    with chat_server(slowly) as server:
        judge = remote(server, mode="text", max_concurrency=4)
        samples = [noise(i, 16, prompt=f"number {i} of them") for i in range(8)]
        assert judge.score(samples).parts["score"].tolist() == [1 + i / 2 for i in range(8)]
        assert 2 <= server.most_running <= 4


# ------------------------------------------------------------------------------------------------ what is no verdict


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        (completion("It is fine."), "cannot be read: expected a line 'Final Score"),
        (completion(""), "cannot be read"),
        (completion(None), r"choices\[0\].message.content is None; expected text"),
        (completion(["Final Score: 4"]), "expected text"),
        (completion(None, refusal="I won't."), "refuses: I won't."),
        (completion("Final Score: 4", "content_filter"), "content filter"),
        ({"choices": []}, "expected a chat completion with 0"),
        ({"choices": [{}]}, "expected a chat completion with 'message'"),
        ({"choices": "none"}, "expected a chat completion"),
        ({"error": {"message": "no such model"}}, "expected a chat completion with 'choices'"),
        ([], "expected a chat completion with 'choices'"),
        (None, "expected a chat completion with 'choices'"),
    ],
)
def test_an_answer_without_a_score_is_no_verdict(said, reason):
    def answer(body):
        return said if "BAD" in shown(body)[0][0] else completion("Final Score: 4")

    with chat_server(lambda body: reply(answer(body))) as server, RewardHub(
        {"use": "judge", "mode": "text", "url": server.url + "/v1", "model": "tiny"}
    ) as hub:  # fmt: skip
        result = hub([noise(0, 16), noise(1, 16, prompt="BAD"), noise(2, 16)])
    assert result.total.isnan().tolist() == [False, True, False]
    assert result.total[[0, 2]].tolist() == [0.75, 0.75]
    with pytest.raises(AssertionError, match=reason):
        raise AssertionError(result.info[1]["judge"]["error"])
    if said and isinstance(said, dict) and reason.startswith("cannot be read"):
        assert result.info[1]["judge"]["answer"] == said["choices"][0]["message"]["content"]


@pytest.mark.parametrize(
    ("steps", "reason"),
    [
        (None, "tells no log-probabilities"),
        ([], "the answer is none of yes, no"),
        ([("I", logs(I=0.9, Yes=0.1))], "the answer is none of yes, no"),
        ([("Yes", {})], "no probability is told"),
        ([("Yes", {"Yes": 0.5})], "expected a number of at most 0"),
        ([("Yes", {"Yes": "-1"})], "expected a number of at most 0"),
        ([("Yes", {"Yes": True})], "expected a number of at most 0"),
    ],
)
def test_without_probabilities_there_is_no_verdict(steps, reason):
    with chat_server(lambda body: completion("Yes", steps=steps)) as server:
        scores = remote(server).score([noise(0, 16)])
    assert scores.value.isnan().all()
    assert reason in scores.info[0]["error"]


@pytest.mark.parametrize("logprob", [-(10**400), 10**400, -math.inf, math.nan])
def test_a_number_that_is_none_is_an_error_of_its_answer(logprob):
    with pytest.raises(RewardError, match="a log-probability is .*; expected a number of at most 0"):
        read_completion(completion("Yes", steps=[("Yes", {"Yes": logprob})]), logprobs=True)


def test_a_number_too_large_for_a_float_costs_its_sample_only():
    def answer(body):
        return completion('{"score": [20, ' + ("9" * 400 if "BAD" in shown(body)[0][-1] else "5") + "]}")

    samples = [noise(i, 16, prompt="BAD" if i == 1 else "fine", meta={"source": noise(9).media}) for i in range(3)]
    with chat_server(answer) as server:
        entry = {"use": "unifiedreward", "mode": "edit", "url": server.url + "/v1", "model": "tiny"}
        with RewardHub(entry) as hub:
            result = hub(samples)
        assert sum(request.method == "POST" for request in server.requests) == 3, "none is asked again"
    assert result.total.isnan().tolist() == [False, True, False]
    assert "expected a list of 2 numbers" in result.info[1]["unifiedreward"]["error"]


def test_of_a_long_answer_both_ends_are_kept():
    thought = "<think>" + "hm, " * 5000 + "</think>\nFinal Score: 4"
    for text, value in ((thought, 0.75), ("x" * 3_000_000 + "the end", math.nan)):
        with chat_server(lambda body, text=text: completion(text)) as server:
            scores = remote(server, mode="text").score([noise(0, 16)])
        assert scores.value.tolist() == pytest.approx([value], nan_ok=True)
        said = scores.info[0]["answer"]
        assert len(json.dumps(scores.info)) < 5000
        assert said.startswith(text[:2000]) and said.endswith(text[-2000:])
        assert f"[{len(text) - 4000} characters]" in said


def test_probabilities_are_not_asked_for_again_because_the_answer_goes_on():
    said = completion("Yes, it", "length", [("Yes", logs(Yes=0.6, No=0.2)), (",", logs(No=1.0))])
    with chat_server(lambda body: said) as server:
        assert remote(server).score([noise(0, 16)]).value.tolist() == pytest.approx([0.75])
        assert [request.method for request in server.requests] == ["GET", "POST"]


@pytest.mark.parametrize("enough", [64, 128, 129])
def test_an_answer_that_is_cut_off_gets_twice_the_tokens_once(enough):
    def answer(body):
        done = body["max_tokens"] >= enough
        return completion("Final Score: 4" if done else "Final Score: 4", "stop" if done else "length")

    with chat_server(answer) as server:
        scores = remote(server, mode="text", max_tokens=64).score([noise(0, 16)])
        tokens = [request.json()["max_tokens"] for request in server.requests if request.method == "POST"]
    assert tokens == ([64] if enough == 64 else [64, 128])
    assert scores.value.isnan().item() == (enough > 128)
    if enough > 128:
        assert "did not end within 128 tokens" in scores.info[0]["error"]
        assert scores.info[0]["answer"] == "Final Score: 4"


def test_a_local_answer_that_is_cut_off_is_no_verdict(folder):
    """The taught answer has about twenty tokens; 12 are enough when they are doubled, 4 are not."""
    long, short = loaded(model=folder, mode="text", max_tokens=12), loaded(model=folder, mode="text", max_tokens=4)
    assert long.score(samples_of(1)).value.tolist() == [0.5]
    scores = short.score(samples_of(1))
    assert scores.value.isnan().all() and "did not end within 8 tokens" in scores.info[0]["error"]


@pytest.mark.parametrize("name", without_answer())
def test_a_server_that_fails_costs_its_sample_only_and_no_more_than_the_deadline(name):
    deadline, fault = 1.2, without_answer()[name]

    def answer(body):
        return fault if "BAD" in shown(body)[0][0] else completion("Final Score: 4")

    with chat_server(answer) as server:
        judge = remote(server, mode="text", deadline=deadline, retries=1)
        samples = [noise(0, 16), noise(1, 16, prompt="BAD"), noise(2, 16)]
        watch = Stopwatch()
        scores = judge.score(samples)
        assert watch.stop() < deadline + 1.5
        judge.unload()
    assert scores.value.isnan().tolist() == [False, True, False]
    assert scores.value[[0, 2]].tolist() == [0.75, 0.75]
    assert len(scores.info[1]["error"]) > 20


def test_the_deadline_is_for_all_samples_of_a_call():
    with chat_server(lambda body: without_answer()["hang"]) as server:
        judge = remote(server, mode="text", deadline=0.6, max_concurrency=2)
        watch = Stopwatch()
        scores = judge.score([noise(i, 16) for i in range(6)])
        assert watch.stop() < 1.5  # three deadlines would be 1.8 s
    assert scores.value.isnan().all()
    assert "the deadline of 0.6 s was over before it was its turn" in scores.info[5]["error"]


def test_a_server_that_recovers_is_not_a_failure():
    faults = iter([status(503), status(429, {"Retry-After": "0"})])
    with chat_server(lambda body: next(faults, completion("Final Score: 5"))) as server:
        assert remote(server, mode="text").score([noise(0, 16)]).value.tolist() == [1.0]


def test_no_other_advantage_changes_sign_when_samples_fail():
    """Group z-scores with and without the failures, as a policy gradient takes them."""

    def answer(body, broken):
        number = int(shown(body)[0][0].rpartition("number ")[2].split()[0])
        return status(400) if number in broken else completion(f"Final Score: {1 + 4 * (number % 5) / 4}")

    samples = [noise(i, 16, prompt=f"number {i} of them") for i in range(5)]
    totals = []
    for broken in (set(), {1}):
        with chat_server(lambda body, broken=broken: answer(body, broken)) as server:
            entry = {"use": "judge", "mode": "text", "url": server.url + "/v1", "model": "tiny"}
            with RewardHub(entry) as hub:
                totals.append(hub(samples).total)
    whole, holed = totals
    kept = ~holed.isnan()
    assert kept.tolist() == [True, False, True, True, True]
    assert torch.equal(whole[kept], holed[kept])
    assert torch.equal((whole - whole.mean()).sign()[[0, 3, 4]], (holed - holed[kept].mean()).sign()[[0, 3, 4]])


def test_a_control_token_in_the_prompt_is_no_verdict_here(folder):
    samples = [noise(0, 28, prompt="a <image> circle"), noise(1, 28, prompt="a red circle")]
    scores = loaded(model=folder).score(samples)
    assert scores.value.isnan().tolist() == [True, False]
    assert "'<image>' in it" in scores.info[0]["error"]


# ------------------------------------------------------------------------------------------------ loading


def test_a_server_that_is_down_is_an_error_before_the_first_sample():
    with FaultServer(status(500)) as server, pytest.raises(RewardError, match="cannot be reached.*Mend: start"):
        remote(server, retries=0)
    with pytest.raises(RewardError, match="cannot be reached"):
        remote(server, retries=0)  # closed


def test_the_model_is_found_or_asked_for():
    one, two = serving(None, ["alone"]), serving(None, ["a", "b"])
    with FaultServer(one) as server:
        assert remote(server, model=None)._chat._model == "alone"
        with pytest.raises(RewardError, match="has no model 'other'. Mend: set `model` to one that it serves: alone"):
            remote(server, model="other")
    with FaultServer(two) as server, pytest.raises(RewardError, match="it serves: a, b"):
        remote(server, model=None)


def test_a_gateway_without_a_list_of_models_will_do():
    with FaultServer(status(404)) as server:
        assert remote(server, model="any")._chat._model == "any"
        with pytest.raises(RewardError, match="cannot be reached"):
            remote(server, model=None)


def test_without_a_judge_the_error_says_what_to_give():
    with pytest.raises(RewardError, match="no judge is given. Mend: give `url`.*or `model` alone"):
        RewardHub("judge").warmup()


def test_a_place_that_a_local_model_does_not_tell_is_refused(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("options: {levels: {'yes': 1, 'no': 0}, after: [My answer is]}")
    with pytest.raises(RewardError, match="read from its first token.*behind 'my answer is'"):
        loaded(model="any", template=str(path))


def test_a_missing_folder_names_the_command(tmp_path):
    with pytest.raises(RewardError, match="hf download"):
        loaded(model="nobody/nothing")


def test_unloaded_it_says_so(folder, server):
    for judge in (loaded(model=folder), remote(server)):
        judge.unload()
        if judge._chat.__class__.__name__ == "LocalChat":
            with pytest.raises(RewardError, match="no weights yet"):
                judge.score(samples_of(1))
        else:
            assert "is not loaded" in judge.score(samples_of(1)).info[0]["error"]


# ------------------------------------------------------------------------------------------------ what is shown


def seen_by(samples, how="score", **options):
    """The texts and pictures of the requests for some samples."""
    seen, lock = [], threading.Lock()

    def answer(body):
        with lock:
            seen.append(shown(body))
        return completion("Final Score: 3\n1 is better")

    with chat_server(answer) as server:
        judge = remote(server, max_concurrency=1, **options)
        getattr(judge, how)(samples)
    return seen


def test_of_a_video_evenly_spread_frames_are_shown():
    video = Sample(media=torch.arange(16).view(16, 1, 1, 1).expand(16, 3, 8, 8) / 255, prompt="a wave", fps=8.0)
    ((texts, pictures),) = seen_by([video], mode="text", num_frames=4)
    assert [picture.getpixel((0, 0))[0] for picture in pictures] == [2, 6, 10, 14]
    assert texts[0].startswith("Look at this video")
    short = Sample(media=video.media[:2], prompt="a wave")
    assert len(seen_by([short], mode="text", num_frames=4)[0][1]) == 2


def test_two_videos_are_told_apart():
    first, second = (Sample(media=torch.full((4, 3, 8, 8), level), prompt="a wave") for level in (0.2, 0.8))
    ((texts, pictures),) = seen_by([(first, second)], "prefers_batch", mode="pair_text", num_frames=2)
    assert texts[:2] == ["Video 1:", "Video 2:"]
    assert [picture.getpixel((0, 0))[0] for picture in pictures] == [51, 51, 204, 204]


NASTY = ["{prompt} {kind}", "{0.__class__} {} {{}} %s $x", 'a "quoted" {braced} sign\nwith lines']


@pytest.mark.parametrize("prompt", NASTY)
def test_a_prompt_is_put_in_as_it_is(prompt):
    ((texts, _),) = seen_by([noise(0, 8, prompt=prompt)], mode="text")
    front, back = read_template("judge", "text").user.split("{prompt}")
    kind = "image"
    assert texts == [front.replace("{kind}", kind) + prompt + back.replace("{kind}", kind)]


# ------------------------------------------------------------------------------------------------ pairs


def test_it_is_a_judge_of_pairs():
    assert isinstance(build("judge", {"mode": "pair"}), PairJudge)


def by_brightness(body):
    """Says which of two pictures is brighter, and of one how bright it is."""
    levels = [picture.convert("L").resize((1, 1)).getpixel((0, 0)) for picture in shown(body)[1]]
    if len(levels) == 1:
        return completion(f"Final Score: {1 + 4 * levels[0] / 255:.4f}")
    texts = {True: "1 is better", False: "2 is better"}
    return completion(texts[levels[0] > levels[1]] if levels[0] != levels[1] else "both are equal")


def greys(*levels):
    return [Sample(media=torch.full((3, 8, 8), level), prompt="grey", group=1) for level in levels]


@pytest.mark.parametrize("mode", ["pair_text", "text"])
def test_win_rates_by_either_kind_of_mode(mode):
    with chat_server(by_brightness) as server:
        options = {"mode": mode, "url": server.url + "/v1", "model": "tiny"}
        with RewardHub({"use": "pairs", "judge": "judge", "judge_options": options, "margin": 0.01}) as hub:
            result = hub(greys(0.2, 0.8, 0.5, 0.5))
    assert result.total.tolist() == pytest.approx([0, 1, 0.5, 0.5])


def test_a_mode_that_scores_prefers_by_the_difference():
    with chat_server(by_brightness) as server:
        judge = remote(server, mode="text")
        dark, light = greys(0.2, 1.0)
        assert judge.prefers(light, dark) == pytest.approx(0.5 + 0.8 / 2, abs=1e-3)
        server.requests.clear()
        judge.prefers_batch([(dark, light), (light, dark)])
        assert len(server.requests) == 2  # each was scored once


def test_an_unreadable_pair_has_no_verdict_and_is_told_once():
    with chat_server(lambda body: completion("I cannot decide")) as server:
        judge = remote(server, mode="pair_text")
        pair = tuple(greys(0.1, 0.2))
        with pytest.warns(UserWarning, match="1 of 1 questions have no verdict.*cannot be read"):
            assert judge.prefers(*pair) != judge.prefers(*pair)  # NaN


def test_it_says_whether_it_compares():
    assert {mode: build("judge", {"mode": mode}).compares for mode in modes("judge")} == {
        "level_expectation": False, "pair": True, "pair_text": True, "text": False, "yes_prob": False,
    }  # fmt: skip


def test_a_comparing_mode_scores_nothing():
    judge = build("judge", {"mode": "pair", "model": "any"})
    with pytest.raises(RewardContractError, match="use it as the judge of pairs: {use: pairs, judge: judge,"):
        judge.score(greys(0.1))


# ------------------------------------------------------------------------------------------------ templates and traits


def test_a_template_of_ones_own_is_a_judge(tmp_path):
    path = tmp_path / "mine.yaml"
    mine = {
        "user": "Rate {prompt} like a hotel.", "parser": "pattern", "range": [-1, 1], "media": ["image"],
        "options": {"pattern": r"^STARS: (\d)$", "scale": [0, 5]}, "max_tokens": 9,
    }  # fmt: skip
    path.write_text(yaml.safe_dump(mine))
    with chat_server(lambda body: completion("STARS: 4")) as server:
        judge = remote(server, template=str(path))
        traits = traits_of(judge)
        assert judge.score([noise(0, 8)]).value.tolist() == pytest.approx([0.6])  # -1 + 2 * 4 / 5
        assert server.requests[-1].json()["max_tokens"] == 9
    assert traits.range == (-1, 1) and traits.media == {"image"}


def test_a_text_file_replaces_the_words_alone(tmp_path):
    path = tmp_path / "upstream.txt"
    path.write_text("Caption: [{prompt}] {not a key}")
    ((texts, pictures),) = seen_by([tuple(greys(0.1, 0.2))], "prefers_batch", mode="pair_text", template=str(path))
    assert texts == ["Caption: [grey] {not a key}"] and len(pictures) == 2  # no labels: it is shown as it is


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("user: [a]", "user is \\['a'\\]; expected text"),
        ("user: ' '", "expected the question"),
        ("usr: x", "mine.yaml: a template has no key 'usr' \\(did you mean 'user'.*It has: user, parser"),
        ("1: x", "a template has no key 1|expected keys with values"),
        ("parser: scors", "mine.yaml: parser is 'scors'; expected one of scores, choice"),
        ("parser: [scores]", "parser is \\['scores'\\]"),
        ("parser: scores", "mine.yaml: parser 'scores' is missing its options labels and scale"),
        ("options: {levls: {a: 1}}", "mine.yaml: parser 'levels' has no option 'levls'.*It has: levels, after"),
        ("options: {}", "parser 'levels' is missing its option levels$"),
        ("options: {levels: {Yes: 1, No: 0}}", "parser 'levels': levels is .* put them in quotes"),
        ("range: [1, 0]", "range is \\[1, 0\\]"),
        ("range: 1", "range is 1"),
        ("media: image", "media is 'image'"),
        ("media: [text]", "media is \\['text'\\]"),
        ("shows: two", "shows is 'two'"),
        ("labels: 1", "labels is 1; expected true or false"),
        ("max_tokens: 0", "max_tokens is 0"),
        ("- a", "expected keys with values"),
        ("a: [", "is no YAML"),
        ("!!python/object/apply:os.getcwd []", "is no YAML"),
    ],
)
def test_a_broken_template_says_where(tmp_path, text, reason):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(RewardError, match=reason) as caught:
        build("judge", {"template": str(path)})
    assert "mine.yaml" in str(caught.value) and "reward '" not in str(caught.value)


def test_another_parser_does_not_inherit_what_belongs_to_the_modes(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("parser: scores\noptions: {labels: {score: Score}, scale: [0, 10]}\n")
    mine = read_template("judge", "yes_prob", str(path))
    assert mine.parser == ScoreLines(labels={"score": "Score"}, scale=(0, 10)) and mine.max_tokens == 512
    assert mine.user == read_template("judge", "yes_prob").user


def test_the_same_parser_inherits_its_options_and_length(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("parser: levels\nuser: '{prompt}?'\n")
    mine, modes_own = read_template("judge", "yes_prob", str(path)), read_template("judge", "yes_prob")
    assert mine.parser == modes_own.parser and mine.max_tokens == modes_own.max_tokens == 1
    assert mine.user == "{prompt}?"


def test_options_are_checked_when_the_config_is_read(tmp_path):
    with pytest.raises(RewardError, match="mode is 'yes_porb' \\(did you mean 'yes_prob'"):
        RewardHub({"use": "judge", "mode": "yes_porb"})
    with pytest.raises(RewardError, match="does not exist"):
        RewardHub({"use": "judge", "template": str(tmp_path / "none.yaml")})
    with pytest.raises(RewardError, match="num_frames is 0"):
        RewardHub({"use": "judge", "num_frames": 0})
    with pytest.raises(RewardError, match="max_tokens is True"):
        RewardHub({"use": "judge", "max_tokens": True})


@pytest.mark.parametrize("use", ["judge", "unifiedreward", "deqa"])
@pytest.mark.parametrize("token", ["s3cret-7", "ENV:s3cret-7", 37])
def test_a_token_never_stands_in_a_config(use, token):
    with pytest.raises(RewardError, match=f"{use}: a token must not stand in a config.*token: env:NAME") as caught:
        build(use, {"url": "http://127.0.0.1:1/v1", "token": token})
    assert "s3cret" not in str(caught.value) and "37" not in str(caught.value)


def test_what_it_declares():
    here, there = traits_of(build("judge", {"model": "x"})), traits_of(build("judge", {"url": "http://127.0.0.1:1/v1"}))
    assert here.deterministic and not there.deterministic
    assert here.media == {"image", "video"} and here.range == (0, 1)
    assert json.dumps(here.card.note)


def test_on_error_raise_stops_where_the_server_has_gone():
    """Not where an answer cannot be read: that is the sample's affair."""
    with FaultServer(*_alive_then(status(503))) as server:
        entry = {"use": "judge", "url": f"{server.url}/v1", "model": "m", "retries": 0, "on_error": "raise"}
        with RewardHub(entry) as hub, pytest.raises(RewardError, match="503"):
            hub([noise(0), noise(1)])


def _alive_then(fault):
    """A list of models, then the fault for ever."""
    return reply({"data": [{"id": "m"}]}), fault
