"""UnifiedReward's modes, with servers that answer as its models do."""

import json

import pytest
import torch

from rewards import RewardError, RewardHub, Sample, build, traits_of
from rewards.media import from_pil, to_pil
from tests.rewards.chat_server import chat_server, completion, shown
from tests.rewards.makers import noise

SERVERS = []


def scored(body):
    """Three aspects, from the first pixels of the picture."""
    red, green, blue = (1 + 4 * level / 255 for level in shown(body)[1][0].getpixel((0, 0)))
    return completion(
        f"Alignment Score (1-5): {red:.4f}\nCoherence Score (1-5): {green:.4f}\nStyle Score (1-5): {blue:.4f}"
    )


def tiny(folder):
    """For the conformance tests: a server, which lives as long as they do."""
    SERVERS.append(chat_server(scored))
    return {"url": SERVERS[-1].url + "/v1", "model": "tiny"}


def asking(server, mode, **options):
    reward = build("unifiedreward", {"mode": mode, "url": server.url + "/v1", "model": "tiny", **options})
    reward.load(torch.device("cpu"), torch.float32)
    return reward


def says(text):
    return chat_server(lambda body: completion(text))


@pytest.mark.parametrize(
    ("mode", "text", "value", "parts"),
    [
        ("point_v1", "Final Score: 3.5", 0.625, {"score": 3.5}),
        ("point_v1", "Final Score: 1", 0, {"score": 1}),
        (
            "point_v2",
            'Word-wise Scores: [["a", 1]]\n\nAlignment Score (1-5): 5\nCoherence Score (1-5): 3\nStyle Score (1-5): 1',
            0.5,
            {"alignment": 5, "coherence": 3, "style": 1},
        ),
        ("edit_quality", '{"reasoning": "fine", "score": [25, 10]}', 0.4, {"naturalness": 25, "artifacts": 10}),
    ],
)
def test_points(mode, text, value, parts):
    with says(text) as server:
        scores = asking(server, mode).score([noise(0, 16)])
    assert scores.value.tolist() == pytest.approx([value])
    assert {name: part.item() for name, part in scores.parts.items()} == parts


def test_a_video_has_physics():
    with says("Alignment Score (1-5): 2\nPhysics Score (1-5): 3\nStyle Score (1-5): 4") as server:
        reward = asking(server, "point_v2_video", num_frames=3)
        scores = reward.score([noise(0, 16, frames=6)])
        assert len(shown(server.requests[-1].json())[1]) == 3
    assert scores.value.tolist() == [0.5] and "physics" in scores.parts
    assert traits_of(reward).media == {"video"}


@pytest.mark.parametrize("source", ["a tensor", "a path"])
def test_an_edit_is_shown_behind_its_source(source, tmp_path):
    before, after = (from_pil(to_pil(noise(seed, 16).media)) for seed in (0, 1))
    to_pil(before).save(tmp_path / "source.png")
    meta = {"source": before if source == "a tensor" else str(tmp_path / "source.png")}
    with says('{"reasoning" : "ok",\n"score" : [20, 15],\n}') as server:
        reward = asking(server, "edit")
        scores = reward.score([Sample(media=after, prompt="make it {blue}", meta=meta)])
        texts, pictures = shown(server.requests[-1].json())
    assert scores.value.tolist() == pytest.approx([0.6])
    assert texts[:2] == ["Image 1:", "Image 2:"] and "Instruction: make it {blue}\n" in texts[2]
    assert [torch.equal(from_pil(p), m) for p, m in zip(pictures, (before, after), strict=True)] == [True, True]
    assert traits_of(reward).needs == ("source",)


@pytest.mark.parametrize("source", [3, "nowhere.png", torch.zeros(3, 4), b"x"])
def test_an_edit_without_a_readable_source_is_no_verdict(source):
    good = torch.zeros(3, 16, 16)
    with says('{"score": [25, 25]}') as server:
        samples = [noise(0, 16, meta={"source": source}), noise(1, 16, meta={"source": good})]
        scores = asking(server, "edit").score(samples)
    assert scores.value.isnan().tolist() == [True, False]
    assert 'meta["source"]' in scores.info[0]["error"]


def verdict(mode, side):
    image = f"Image {side}"
    if mode == "pair":
        return f"{image} is better than Image {3 - side}."
    if mode == "think":
        return f"<think>Image 1 is better in colour, 7 to 6.</think>\n<answer>{image} is better</answer>"
    categories = [{"name": "A", "cat_winner": image}, {"name": "B", "cat_winner": image}]
    return "```json\n" + json.dumps({"categories": categories, "winner": image}) + "\n```"


@pytest.mark.parametrize("mode", ["pair", "think", "flex"])
def test_pairs_are_won_by_the_brighter_one(mode):
    def brighter(body):
        levels = [picture.getpixel((0, 0))[0] for picture in shown(body)[1]]
        return completion(verdict(mode, 1 if levels[0] > levels[1] else 2))

    samples = [Sample(media=torch.full((3, 8, 8), level), prompt="grey") for level in (0.4, 0.9, 0.1)]
    with chat_server(brighter) as server:
        options = {"mode": mode, "url": server.url + "/v1", "model": "tiny"}
        with RewardHub({"use": "pairs", "judge": "unifiedreward", "judge_options": options}) as hub:
            assert hub(samples).total.tolist() == [0.5, 1, 0]
        assert len([request for request in server.requests if request.method == "POST"]) == 6  # both orders


def test_a_judge_that_favours_one_side_ties_everything():
    samples = [Sample(media=torch.full((3, 8, 8), level), prompt="grey") for level in (0.4, 0.9, 0.1)]
    with says("Image 1 is better") as server:
        options = {"mode": "pair", "url": server.url + "/v1", "model": "tiny"}
        with RewardHub({"use": "pairs", "judge": "unifiedreward", "judge_options": options}) as hub:
            assert hub(samples).total.tolist() == [0.5, 0.5, 0.5]


def test_flex_is_finer_than_its_winner():
    answer = {
        "categories": [{"cat_winner": "Image 1"}, {"cat_winner": "Image 2"}, {"cat_winner": "Image 2"}],
        "winner": "Image 2",
    }
    with says(json.dumps(answer)) as server:
        first, second = noise(0, 16), noise(1, 16)
        assert asking(server, "flex").prefers(first, second) == pytest.approx(0.5 * 0 + 0.5 / 3)


def test_thinking_gets_its_tokens():
    with says("<think>..</think><answer>Image 1 is better</answer>") as server:
        asking(server, "think").prefers(noise(0, 16), noise(1, 16))
        assert server.requests[-1].json()["max_tokens"] == 4096


def test_the_users_copy_of_the_upstream_words_is_sent_as_it_is(tmp_path):
    path = tmp_path / "upstream.txt"
    path.write_text('Form: {"winner": "Image 1/2"}\nText Caption: [{prompt}]')
    with says("Image 2 is better than Image 1.") as server:
        judge = asking(server, "pair", template=str(path))
        assert judge.prefers(noise(0, 16, prompt="a {dog}"), noise(1, 16)) == 0
        content = server.requests[-1].json()["messages"][0]["content"]
    assert [part["type"] for part in content] == ["image_url", "image_url", "text"]
    assert content[-1]["text"] == 'Form: {"winner": "Image 1/2"}\nText Caption: [a {dog}]'


def test_the_default_and_the_modes():
    assert traits_of(build("unifiedreward")).media == {"image"}
    with pytest.raises(RewardError, match="expected one of edit, edit_quality, flex, pair, point_v1, point_v2,"):
        build("unifiedreward", {"mode": "yes_prob"})
    assert "upstream" in build("unifiedreward").card.note
