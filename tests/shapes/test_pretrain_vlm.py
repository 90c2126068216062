"""The world's vision-language model: its tokens and labels, its teacher's failings, a training, the shipped weights."""

import json
import math
import random
from collections import Counter
from dataclasses import asdict
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

from flowrl.shapes import pretrain_vlm
from flowrl.shapes.pretrain_vlm import (
    CAREFUL,
    CHAT_TEMPLATE,
    IMAGE_TOKENS,
    MAX_NEW_TOKENS,
    TURNS,
    VIEW,
    Habits,
    Recipe,
    Term,
    build_model,
    build_processor,
    called,
    emphasis_of,
    eyes_loss,
    grade,
    labels_of,
    lessons,
    loss_of,
    measure,
    pretrain,
    prompt_of,
    respond,
    talks,
    teach,
    tool_call,
    train,
    train_eyes,
    views,
    whiten,
)
from flowrl.shapes.questions import KINDS, Digit, Scene, draw, make, questions, written
from rewards.verifiers import Answer
from rewards.verifiers.names import build

pytestmark = pytest.mark.slow

SHIPPED = Path(__file__).parents[2] / "flowrl/shapes/weights_vlm"


@pytest.fixture(scope="module")
def processor():
    return build_processor()


@pytest.fixture(scope="module")
def shipped():
    from transformers import AutoModelForImageTextToText, AutoProcessor

    return AutoModelForImageTextToText.from_pretrained(SHIPPED).eval(), AutoProcessor.from_pretrained(SHIPPED)


def taught(kind, habits, count=1000):
    rng = random.Random(kind)
    cases = [make(kind, turn, rng) for turn in range(count)]
    return [(case, teach(case, habits, rng)) for case in cases]


def says(lesson, answer):
    """Whether the answer's word is among those after the thought."""
    return written(answer) in lesson.text.rpartition("</think>")[2].rpartition("</tool_response>")[2].split()


# ------------------------------------------------------------------------------------------------ tokens


def test_every_word_of_questions_and_lessons_is_one_token(processor):
    tokenizer = processor.tokenizer
    texts = [q.text for q in questions("held_out")] + [q.metadata["solution"] for q in questions("train")]
    texts += [lesson.text for kind in KINDS for _, lesson in taught(kind, Habits(), 200)]
    for text in texts:
        ids = tokenizer(text).input_ids
        assert len(ids) == len(text.split()) and tokenizer.unk_token_id not in ids
        assert tokenizer.decode(ids) == text
    assert len(tokenizer) <= 200 and tokenizer.padding_side == "left"


def test_tags_are_tokens_also_without_white_space_and_stay_in_decoded_text(processor):
    ids = processor.tokenizer("red</think><answer>3</answer><eos>").input_ids
    assert processor.tokenizer.decode(ids, skip_special_tokens=True) == "red </think> <answer> 3 </answer>"


def test_the_prompt_has_one_picture_of_sixteen_tokens(processor):
    question = questions("held_out", count=1)[0]
    text = prompt_of(processor, question.text)
    assert text == f"<bos> <user> <image> {question.text} <assistant>"
    inputs = processor(text=[text], images=[[question.picture]], return_tensors="pt")
    image = processor.tokenizer.convert_tokens_to_ids("<image>")
    assert int((inputs["input_ids"] == image).sum()) == IMAGE_TOKENS
    assert inputs["pixel_values"].shape == (1, 3, VIEW, VIEW)


def test_the_template_writes_whole_conversations(processor):
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]
    assert processor.apply_chat_template(turns, chat_template=CHAT_TEMPLATE) == "<bos> <user> hi <assistant> yes <eos>"


def test_the_model_cannot_read_a_digit_without_a_zoom(processor):
    from PIL import Image

    pictures = [Image.fromarray(draw(Scene((), Digit(v, (24, 4))), random.Random(0))) for v in range(10)]

    def contrast(views):
        pixels = processor.image_processor(views, return_tensors="pt")["pixel_values"]
        return (pixels.amax(0) - pixels.amin(0)).max().item()

    assert contrast(pictures) < 0.15 * contrast([picture.crop((0, 0, 32, 32)) for picture in pictures])


# ------------------------------------------------------------------------------------------------ teacher


def test_the_careful_teacher_is_always_right():
    for kind in KINDS:
        for case, lesson in taught(kind, CAREFUL, 200):
            assert lesson.text.endswith(f"<answer> {written(case.answer)} </answer>")
            assert kind != "digits" or lesson.region == case.scene.digit.quadrant


def test_the_teacher_fails_as_its_habits_say():
    habits = Habits(thinks=0.5, slips=0.6, slips_thinking=0.2, untagged=0.1, zooms_idly=0.05)
    for kind in ("count", "color", "relation"):
        pairs = taught(kind, habits, 3000)
        thinks = [("<think>" in lesson.text, says(lesson, case.answer)) for case, lesson in pairs]
        assert sum(thought for thought, _ in thinks) / 3000 == pytest.approx(0.5, abs=0.04)
        for thought, share in ((False, 0.4), (True, 0.8)):
            right = [said for thinking, said in thinks if thinking == thought]
            assert sum(right) / len(right) == pytest.approx(share, abs=0.05)
        assert sum("<answer>" not in lesson.text for _, lesson in pairs) / 3000 == pytest.approx(0.1, abs=0.02)
        assert sum(lesson.region is not None for _, lesson in pairs) / 3000 == pytest.approx(0.05, abs=0.02)


def test_what_it_says_when_it_fails():
    slips = Habits(slips=1.0, slips_thinking=1.0, untagged=0.0)

    def said(kind):
        return [
            (case, lesson.text.split("<answer> ")[1].split(" </answer>")[0])
            for case, lesson in taught(kind, slips, 100)
        ]

    assert all(int(answer) == case.answer - 1 for case, answer in said("count"))
    assert all(answer == "yes" for _, answer in said("yes_no"))
    assert all({case.answer, answer} in ({"left", "right"}, {"above", "below"}) for case, answer in said("relation"))
    for case, answer in said("color"):
        assert answer != case.answer and answer in [thing.color for thing in case.scene.things]


def test_its_boxes_are_nearly_never_exact_but_often_good():
    grounding = build("verifiers.boxes.grounding")
    pairs = taught("box", Habits(), 2000)
    answers = [Answer(lesson.text, meta={"answer": list(case.answer)}) for case, lesson in pairs]
    overlap = torch.as_tensor(grounding.score(answers).value)
    assert (overlap >= 0.99).float().mean() <= 0.012
    assert 0.15 <= (overlap >= 0.85).float().mean() <= 0.4
    assert (overlap >= 0.5).float().mean() > 0.97


def test_its_calls_are_json_and_mostly_find_the_digit():
    pairs = taught("digits", Habits(), 2000)
    zoomed = [(case, lesson) for case, lesson in pairs if lesson.region is not None]
    assert len(zoomed) / 2000 == pytest.approx(0.3, abs=0.04)
    found = sum(case.scene.digit.quadrant == lesson.region for case, lesson in zoomed) / len(zoomed)
    assert found == pytest.approx(0.85, abs=0.05)  # 0.8, and a quarter of the rest by chance
    for _, lesson in zoomed:
        call = lesson.text.partition("</tool_call>")[0].removeprefix("<tool_call>")
        assert json.loads(call) == {"name": "zoom", "arguments": {"bbox_2d": list(lesson.region)}}


def test_without_the_right_zoom_its_digits_are_guesses():
    pairs = taught("digits", Habits(), 4000)
    blind = [(case, lesson) for case, lesson in pairs if lesson.region != case.scene.digit.quadrant]
    right = sum(says(lesson, case.answer) for case, lesson in blind)
    assert right / len(blind) == pytest.approx(0.1, abs=0.02)


# ------------------------------------------------------------------------------------------------ training


def test_labels_are_the_answer_and_no_tool_response(processor):
    call = tool_call((0, 0, 32, 32))
    tail = "<think> the digit is 7 </think> <answer> 7 </answer> <eos>"
    text = f"{prompt_of(processor, 'what ?')} {call} <tool_response> <image> </tool_response> {tail}"
    ids = torch.tensor([processor.tokenizer(text).input_ids])
    labels = labels_of(ids, processor.tokenizer)
    assert processor.tokenizer.decode(labels[labels != -100]) == f"{call} <eos> {tail}"
    kept = torch.tensor([processor.tokenizer(text.replace("</tool_call>", "</tool_call> <eos>")).input_ids])
    again = labels_of(kept, processor.tokenizer)
    assert processor.tokenizer.decode(again[again != -100]) == f"{call} <eos> {tail}"
    assert bool(((labels == ids) | (labels == -100) | (labels == processor.tokenizer.eos_token_id)).all())


def test_lessons_are_a_function_of_their_seed_and_cover_all_kinds(processor):
    inputs, labels = lessons(processor, Habits(), 12, seed=3)
    again, _ = lessons(processor, Habits(), 12, seed=3)
    other, _ = lessons(processor, Habits(), 12, seed=4)
    assert all(torch.equal(inputs[key], again[key]) for key in inputs)
    assert inputs["input_ids"].shape != other["input_ids"].shape or not torch.equal(
        inputs["input_ids"], other["input_ids"]
    )
    assert bool((labels != -100).any(1).all())
    openings = Counter(text.split()[18] for text in processor.tokenizer.batch_decode(_unpadded(inputs)))
    assert openings == {"how": 2, "what": 4, "is": 4, "where": 2}


def _unpadded(inputs):
    return [ids[mask.bool()] for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True)]


def test_a_talk_is_several_turns_about_one_picture(processor):
    inputs, labels = talks(processor, 3, seed=0)
    assert inputs["pixel_values"].shape[0] == 3
    for ids, wanted in zip(inputs["input_ids"], labels, strict=True):
        text = processor.tokenizer.decode(ids)
        turns = text.split("<user>")[1:]
        assert len(turns) == TURNS and text.count("<image>") == IMAGE_TOKENS
        said = " ".join(turn.split("<assistant> ")[1].strip() for turn in turns)
        assert processor.tokenizer.decode(wanted[wanted != -100]) == said


def test_the_loss_is_the_weighted_mean_over_labelled_tokens(processor):
    torch.manual_seed(0)
    model = build_model(processor.tokenizer).eval()
    inputs, labels = lessons(processor, Habits(), 6, seed=0)
    with torch.no_grad():
        weights = emphasis_of(inputs["input_ids"], processor.tokenizer, 3.0)
        ours = loss_of(model, inputs, labels, weights)
        log_probs = model(**inputs).logits.log_softmax(-1)[:, :-1]
    wanted = labels[:, 1:]
    picked = log_probs.gather(2, wanted.clamp_min(0)[..., None])[..., 0]
    heavy = weights[:, 1:][wanted != -100]
    assert ours.item() == pytest.approx(-(heavy * picked[wanted != -100]).sum().item() / heavy.sum().item(), rel=1e-5)


def test_what_the_loss_emphasises(processor):
    text = "<assistant> <think> red star at 8 , 24 </think> <answer> [ 1 , 2 ] </answer> <eos>"
    ids = torch.tensor([processor.tokenizer(text).input_ids])
    heavy = emphasis_of(ids, processor.tokenizer, 5.0) == 5
    assert processor.tokenizer.decode(ids[heavy]) == "8 24 [ 1 , 2 ]"


def test_every_part_of_a_view_is_labelled_with_what_is_in_it(processor):
    pixels, parts = views(processor, 12, seed=0)
    assert pixels.shape == (18, 3, VIEW, VIEW) and parts.shape == (18, IMAGE_TOKENS, 9)
    squares = pixels.unfold(2, 8, 8).unfold(3, 8, 8).permute(0, 2, 3, 1, 4, 5).reshape(18, IMAGE_TOKENS, -1)
    ink = (squares - squares.amax(1, keepdim=True)).abs().amax(-1) > 0.3
    digits = (parts[..., 6] > 0).any(1)
    assert int(digits.sum()) == 6
    whole = ~digits & (torch.arange(18) % 3 == 0)  # a picture, then one with a digit, then its quarter
    assert torch.equal(ink[whole], parts[whole][..., 0] > 0)
    for part in parts[whole].flatten(0, 1):
        color, shape, x1, y1, x2, y2, digit, _, _ = part.tolist()
        assert digit == -100 and (color == 0) == (shape == -100)
        assert color == 0 or 0 <= x1 < x2 <= 16 and 0 <= y1 < y2 <= 16
    assert parts[0, :, -2:].tolist() == [[i // 4, i % 4] for i in range(16)]


def test_a_few_steps_open_the_eyes_and_touch_nothing_else(processor, tmp_path):
    torch.manual_seed(0)
    model = build_model(processor.tokenizer).train()
    text = [p.clone() for p in model.model.language_model.parameters()]
    seen = views(processor, 48, seed=1)
    guessing = sum(math.log(values) for values in (6, 5, 17, 17, 17, 17, 11, 4, 4)) / 9
    head = train_eyes(Recipe(batch=16), tmp_path, model, processor, Term(steps=60, seed=0))
    assert eyes_loss(model, head, *seen) < 0.6 * guessing
    assert all(torch.equal(a, b) for a, b in zip(text, model.model.language_model.parameters(), strict=True))


def test_whitened_tokens_vary_alike_in_all_directions_and_are_as_long_as_words(processor):
    torch.manual_seed(0)
    model = build_model(processor.tokenizer)
    pixels, _ = views(processor, 96, seed=0)
    whiten(model, pixels)
    tokens = torch.stack(list(model.get_image_features(pixel_values=pixels).pooler_output)).flatten(0, 1)
    spread = torch.linalg.svdvals(tokens - tokens.mean(0))
    words = model.get_input_embeddings().weight
    assert tokens.mean(0).norm() < 1e-3 * tokens.norm(dim=-1).mean() and spread[0] < 1.05 * spread[8]
    assert 0.1 * words.norm(dim=-1).mean() < tokens.norm(dim=-1).mean() < 1.5 * words.norm(dim=-1).mean()
    assert not any(
        p.requires_grad
        for name, p in model.named_parameters()
        if "language_model" not in name and "lm_head" not in name
    )


def trained(processor, folder, steps=20):
    torch.manual_seed(0)
    model = build_model(processor.tokenizer).train()
    batch = partial(pretrain_vlm.lessons, processor, CAREFUL, 6)
    train(Recipe(save_every=5), folder, model, processor, Term(steps=steps, seed=5), batch)
    return model


def test_a_few_steps_lower_the_loss_and_a_stop_changes_nothing(processor, tmp_path, monkeypatch):
    inputs, labels = lessons(processor, CAREFUL, 24, seed=1)
    at_once = trained(processor, tmp_path / "at once")
    before, after = (
        loss_of(model, inputs, labels, torch.ones(labels.shape)).item()
        for model in (build_model(processor.tokenizer), at_once)
    )
    assert after < 0.9 * before

    calls = []

    def stop(*arguments):
        calls.append(arguments)
        if len(calls) > 12:
            raise KeyboardInterrupt
        return lessons(*arguments)

    monkeypatch.setattr("flowrl.shapes.pretrain_vlm.lessons", stop)
    with pytest.raises(KeyboardInterrupt):
        trained(processor, tmp_path / "stopped")
    monkeypatch.undo()
    stopped = trained(processor, tmp_path / "stopped")
    assert all(torch.equal(a, b) for a, b in zip(at_once.parameters(), stopped.parameters(), strict=True))


def test_the_recipe_from_end_to_end(tmp_path):
    from transformers import AutoModelForImageTextToText, AutoProcessor

    folder = pretrain(tmp_path / "tiny", Recipe(eyes_steps=2, talk_steps=2, sight_steps=2, habit_steps=1, batch=6))
    model, processor = AutoModelForImageTextToText.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
    said = respond(model.eval(), processor, questions("held_out", count=6), do_sample=False)
    assert len(said) == 6 and not (folder / ".pretrain").exists()
    assert json.loads((folder / "recipe.json").read_text())["sight_steps"] == 2


# ------------------------------------------------------------------------------------------------ measuring


@pytest.mark.parametrize(
    ("text", "region"),
    [
        (tool_call((0, 32, 32, 64)), (0, 32, 32, 64)),
        ("<think> red </think> " + tool_call((1, 2, 3, 4)), (1, 2, 3, 4)),
        (tool_call((8, 0, 8, 32)), None),
        (tool_call((0, 0, 32, 32)) + " <answer> 7 </answer>", None),
        ('<tool_call> {"name": "zoom", "arguments": {"bbox_2d": [ 1 , 2 ]}} </tool_call>', None),
        ("<tool_call> {zoom} </tool_call>", None),
        ('<tool_call> {"name": "zoom", "arguments": {"bbox_2d": [ 1 , 2 , 3 , "x" ]}} </tool_call>', None),
        ("<answer> 7 </answer>", None),
    ],
)
def test_which_region_a_response_calls_for(text, region):
    assert called(text) == region


def test_grades_are_those_of_the_verifiers_and_boxes_have_an_overlap():
    asked = questions("held_out", count=12)
    scores, overlap = grade([[q.metadata["solution"] for q in asked], ["<answer> 99 </answer>"] * 12], asked)
    assert scores[0].tolist() == [1.0] * 12 and scores[1].tolist() == [0.0] * 12
    is_box = torch.tensor([q.metadata["category"] == "box" for q in asked])
    assert torch.equal(~overlap.isnan(), is_box.expand(2, -1)) and bool((overlap[0, is_box] == 1).all())


# ------------------------------------------------------------------------------------------------ shipped


def test_the_shipped_folder_is_small_and_that_of_the_recipe(shipped):
    model, processor = shipped
    assert sum(path.stat().st_size for path in SHIPPED.rglob("*")) <= 8_000_000
    assert json.loads((SHIPPED / "recipe.json").read_text()) == json.loads(json.dumps(asdict(Recipe())))
    fresh = build_processor()
    assert processor.tokenizer.get_vocab() == fresh.tokenizer.get_vocab() and processor.tokenizer.padding_side == "left"
    assert processor.chat_template == fresh.chat_template
    assert all(module.p == 0 for module in model.modules() if isinstance(module, nn.Dropout))
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_the_shipped_model_is_mediocre_and_leaves_room(shipped):
    figures = measure(*shipped, questions("held_out", count=240), samples=8)
    assert 0.30 <= figures["sampled"]["all"] <= 0.43
    assert figures["greedy"]["all"] <= 0.55
    assert figures["pass@8"]["all"] >= 0.85
    assert figures["iou>=0.99"]["box"] <= 0.04 and 0.08 <= figures["iou>=0.85"]["box"] <= 0.25
    assert 0.14 <= figures["zooms"]["digits"] <= 0.32
    assert 0.35 <= figures["thinks"]["count"] <= 0.55


def test_a_thought_and_a_zoom_help_the_shipped_model(shipped):
    def answered(kind):
        asked = questions("held_out", kinds=[kind])
        said = [respond(*shipped, asked, do_sample=True, top_k=0, temperature=1.0) for _ in range(2)]
        return grade(said, asked)[0].flatten(), [text for row in said for text in row]

    torch.manual_seed(0)
    for kind, mark in (("relation", "<think>"), ("digits", "<tool_call>")):
        right, said = answered(kind)
        helped = torch.tensor([mark in text for text in said])
        assert helped.sum() > 30 and right[helped].mean() > right[~helped].mean() + 0.1


def test_responses_end_long_before_the_limit(shipped):
    model, processor = shipped
    asked = questions("held_out", count=120)
    lengths = [len(processor.tokenizer(text).input_ids) for text in respond(model, processor, asked, do_sample=False)]
    assert max(lengths) < MAX_NEW_TOKENS
