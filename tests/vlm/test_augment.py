"""What is done to pictures and prompts: exact where it is exact, keyed where it is random."""

import math
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from flowrl.resolve import ResolveError
from flowrl.types import Prompt
from flowrl.vlm.augment import (
    BEGIN,
    CORRECTED,
    GIVEN,
    HookError,
    NoisyRollout,
    correct,
    corrections,
    first_words,
    hint,
    hook,
    inpaint,
    masked,
)  # fmt: skip

KEY = {"seed": 1, "iteration": 2, "prompt": 3}


def grey(size=(64, 48)):
    return Image.new("RGB", size, (128, 128, 128))


def stripes(size=64):
    pixels = np.zeros((size, size, 3), dtype=np.uint8)
    pixels[:, ::2] = 255
    return Image.fromarray(pixels)


# ------------------------------------------------------------------------------------------------ pictures


def test_the_strength_falls_along_a_sigmoid():
    noisy = NoisyRollout(strength=0.4, midpoint=0.5, steepness=10)
    values = [noisy.strength_at(p) for p in (0, 0.25, 0.5, 0.75, 1)]
    assert values[2] == pytest.approx(0.2) and values == sorted(values, reverse=True)
    assert values[1] == pytest.approx(0.4 * (1 - 1 / (1 + math.exp(-10 * (0.25 - 0.5)))))
    assert values[0] + values[4] == pytest.approx(0.4), "symmetric around its middle"


@pytest.mark.parametrize(("share", "count", "noisy"), [(0.5, 8, 4), (0, 8, 0), (1, 8, 8), (0.25, 6, 2), (0.5, 3, 2)])
def test_the_last_answers_of_a_group_see_the_distorted_picture(share, count, noisy):
    assert NoisyRollout(share=share).members(count) == [False] * (count - noisy) + [True] * noisy


def test_noise_has_the_std_that_it_says():
    (made,) = NoisyRollout(strength=0.1, steepness=100).pictures([grey((200, 200))], 0.0, **KEY)
    noise = (np.array(made).astype(float) - 128) / 255
    assert abs(noise.mean()) < 2e-3 and noise.std() == pytest.approx(0.1, rel=0.02)


def test_blur_and_crop_grow_with_the_strength():
    blurred = [
        np.array(NoisyRollout(kind="blur", strength=s, steepness=100).pictures([stripes()], 0.0, **KEY)[0]).std()
        for s in (0.0, 0.01, 0.05)
    ]
    assert blurred[0] == np.array(stripes()).std() and blurred[0] > blurred[1] > blurred[2]
    ramp = Image.fromarray(np.tile(np.arange(64, dtype=np.uint8)[None, :, None], (64, 1, 3)))
    (cropped,) = NoisyRollout(kind="crop", strength=0.5, steepness=100).pictures([ramp], 0.0, **KEY)
    values = np.array(cropped)[32, :, 0]
    assert cropped.size == ramp.size and 28 <= int(values[-1]) - int(values[0]) <= 33, "half of what was in view"


@pytest.mark.parametrize("kind", ["noise", "blur", "crop"])
def test_at_no_strength_nothing_changes(kind):
    (made,) = NoisyRollout(kind=kind, strength=0.0).pictures([stripes()], 0.0, **KEY)
    assert (np.array(made) == np.array(stripes())).all()


@pytest.mark.parametrize("kind", ["noise", "crop"])
def test_distortions_are_keyed(kind):
    noisy = NoisyRollout(kind=kind, strength=0.3)

    def draw(pictures=1, **changed):
        return [np.array(p) for p in noisy.pictures([ramp()] * pictures, 0.1, **{**KEY, **changed})]

    def ramp():
        return Image.fromarray(np.arange(96 * 96 * 3, dtype=np.uint32).astype(np.uint8).reshape(96, 96, 3))

    first = draw()[0]
    assert (first == draw()[0]).all()
    others = [draw(**{name: 9})[0] for name in KEY] + [draw(2)[1]]
    assert all((first != other).any() for other in others), "another seed, iteration, prompt, or picture"


@pytest.mark.parametrize("options", [{"kind": "rain"}, {"share": 1.5}, {"strength": -1.0}])
def test_options_out_of_range_are_refused(options):
    with pytest.raises(ValueError, match="noisy"):
        NoisyRollout(**options)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.6, 1.0])
def test_exactly_a_share_of_the_patches_is_black(share):
    made = np.array(masked(Image.new("RGB", (56, 42), "white"), share, **KEY))
    patches = made.reshape(3, 14, 4, 14, 3).transpose(0, 2, 1, 3, 4).reshape(12, -1)
    assert set(patches.min(1)) == set(patches.max(1)) <= {0, 255}, "each patch is black or as it was"
    assert (patches.max(1) == 0).sum() == round(share * 12)


def test_patches_at_the_border_may_be_cut_and_masks_are_keyed():
    picture = Image.new("RGB", (50, 31), "white")
    assert np.array(masked(picture, 1.0, **KEY)).max() == 0
    draws = {
        np.array(masked(picture, 0.5, **{**KEY, **c})).tobytes()
        for c in ({}, {"seed": 5}, {"number": 1}, {"prompt": 8}, {"iteration": 7})
    }
    assert len(draws) == 5 and np.array(masked(picture, 0.5, **KEY)).tobytes() in draws
    with pytest.raises(ValueError, match="share"):
        masked(picture, 1.2, **KEY)


# ------------------------------------------------------------------------------------------------ dead groups

QUESTION = Prompt(id=4, text="How many?", metadata={"answer": 2, "solution": "one  red,\none blue: two in all here"})


@pytest.mark.parametrize(
    ("share", "words"),
    [(0.25, "one  red,"), (0.5, "one  red,\none blue:"), (0.75, "one  red,\none blue: two in"),
     (1.0, "one  red,\none blue: two in all"), (0.0, "")],
)  # fmt: skip
def test_the_first_words_never_are_all_of_them(share, words):
    assert first_words(QUESTION.metadata["solution"], share) == words
    assert first_words("two", share) == "" and first_words("", share) == ""


def test_hints_grow_until_there_is_none():
    hinted, texts = QUESTION, []
    for _ in range(3):
        hinted = hint(hinted)
        assert (hinted.id, hinted.metadata["answer"]) == (4, 2)
        texts.append((hinted.metadata[GIVEN], hinted.text))
    assert hint(hinted) is None and [share for share, _ in texts] == [0.25, 0.5, 0.75]
    for share, text in texts:
        assert text == f"How many?\nHint: the solution begins with: {first_words(QUESTION.metadata['solution'], share)}"
    assert QUESTION.text == "How many?" and GIVEN not in QUESTION.metadata, "the prompt itself stays as it is"


def test_inpainting_begins_the_answer_and_leaves_the_question():
    once = inpaint(QUESTION)
    twice = inpaint(once)
    assert once.text == twice.text == QUESTION.text
    assert (once.metadata[BEGIN], twice.metadata[BEGIN]) == ("one  red,", "one  red,\none blue:")


@pytest.mark.parametrize("metadata", [{}, {"solution": ""}, {"solution": "two"}, {"solution": 3}, {"solution": None}])
def test_without_a_solution_there_is_no_help(metadata):
    bare = replace(QUESTION, metadata=metadata)
    assert hint(bare) is None and inpaint(bare) is None


def test_some_wrong_answers_are_corrected():
    treated = correct(QUESTION, share=0.5)
    assert treated.metadata[CORRECTED] == 0.5 and correct(treated) is None and correct(Prompt(id=1, text="a")) is None
    wrong = [True, False, True, True, True]
    chosen = corrections(treated, wrong, seed=0, iteration=1)
    assert len(chosen) == 2 and all(wrong[member] for member in chosen) and chosen == sorted(chosen)
    assert chosen == corrections(treated, wrong, seed=0, iteration=1)
    assert {tuple(corrections(treated, wrong, seed=s, iteration=1)) for s in range(30)} > {tuple(chosen)}
    assert corrections(QUESTION, wrong, seed=0, iteration=1) == []
    assert corrections(treated, [False] * 3, seed=0, iteration=1) == []


@pytest.mark.parametrize(("share", "count", "replaced"), [(0.01, 4, 1), (1.0, 4, 3), (0.5, 1, 0)])
def test_at_least_one_answer_is_replaced_and_never_all(share, count, replaced):
    assert len(corrections(correct(QUESTION, share), [True] * count, seed=0, iteration=0)) == replaced


def test_hooks_by_name(tmp_path):
    assert (hook("hint"), hook("inpaint"), hook("correct")) == (hint, inpaint, correct)
    file = tmp_path / "mine.py"
    file.write_text("def mine(prompt):\n    return None\nnumber = 3\n")
    assert hook(f"{file}:mine")(QUESTION) is None
    with pytest.raises(ResolveError, match="no 'hnt' .did you mean 'hint'"):
        hook("hnt")
    with pytest.raises(ResolveError, match="is a int; give a function"):
        hook(f"{file}:number")


def test_a_hook_of_ones_own_that_fails_is_named(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(
        "from dataclasses import replace\n"
        "def words(prompt):\n    return prompt.text + '!'\n"
        "def fails(prompt):\n    return replace(prompt, text=prompt.metadata['hint'])\n"
        "def two(prompt, more):\n    return None\n"
        "def sound(prompt):\n    return replace(prompt, text='And now?')\n"
    )
    assert hook(f"{file}:sound")(QUESTION) == replace(QUESTION, text="And now?")
    with pytest.raises(HookError) as caught:
        hook(f"{file}:words")(QUESTION)
    assert f"data.on_dead_group: {file}:words returned str 'How many?!'. Let it return the prompt" in str(caught.value)
    with pytest.raises(HookError) as caught:
        hook(f"{file}:fails")(QUESTION)
    assert f"data.on_dead_group: {file}:fails raises KeyError: 'hint' ({file}:5) for the question" in str(caught.value)
    assert isinstance(caught.value.__cause__, KeyError)
    with pytest.raises(ResolveError, match=r"takes \(prompt, more\): .*'more'. Give a function of the prompt alone"):
        hook(f"{file}:two")
