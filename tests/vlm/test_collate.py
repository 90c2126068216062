"""Batches put together from prompts that were processed alone: as the processor's own, whatever the class."""

import pytest
import torch
from torch import Tensor

from flowrl.vlm.collate import Cache, Inputs, asked, collate, later_media, split, whole
from tests.vlm.policies import NAMES, QUESTIONS, RESPONSE, load, picture

pytestmark = pytest.mark.slow

LATER = picture(9, 40, 90)


@pytest.fixture(scope="module")
def models():
    return {name: load(name) for name in NAMES}


def none(count):
    """Answers without a place."""
    return torch.zeros(count, 0, dtype=torch.int64), torch.zeros(count, 0, dtype=torch.bool)


def processed(model, questions):
    """The processor's own batch."""
    texts = [
        model.processor.apply_chat_template(list(asked(text, pictures)), add_generation_prompt=True)
        for text, pictures in questions
    ]
    return model.processor(text=texts, images=[p for _, p in questions], padding=True, return_tensors="pt")


@pytest.mark.parametrize("name", NAMES)
def test_prompts_processed_alone_make_the_processors_batch(models, name):
    model = models[name]
    questions = [question for question in QUESTIONS if question[1]]
    wanted = processed(model, questions)
    made = collate([model.prepare(asked(*q)) for q in questions], *none(3), model.tokenizer.pad_token_id)
    assert made.keys() == wanted.keys()
    for key, tensor in wanted.items():
        assert torch.equal(made[key], tensor), key


@pytest.mark.parametrize("name", NAMES)
def test_a_row_says_the_same_in_any_batch(models, name):
    """Rows without a picture too, which have no part in what is packed."""
    model = models[name]
    inputs = [model.prepare(asked(*question)) for question in QUESTIONS]
    with torch.no_grad():
        together, _ = model.states(collate(inputs, *none(4), model.pad_id))
        for row, one in enumerate(inputs):
            alone, _ = model.states(collate([one], *none(1), model.pad_id))
            assert torch.allclose(together[row, -1], alone[0, -1], atol=2e-5), row


@pytest.mark.parametrize("name", NAMES)
def test_a_tools_picture_stands_where_its_tokens_are(models, name):
    """A text with both pictures, processed in one go, is what a prompt and the part of an answer make of it."""
    model = models[name]
    first = model.prepare(asked("count", [picture(0)]))
    said, part = torch.tensor(model.encode("hm")), model.foreign("ok", [LATER], RESPONSE)
    row = first.then(len(said), part)
    ids = torch.cat([said, part.ids])
    text = model.processor.apply_chat_template(list(asked("count", [picture(0)])), add_generation_prompt=True)
    text += "hm" + RESPONSE.replace("{images}", model.picture).replace("{text}", "ok")
    wanted = model.processor(
        text=[text], images=[[picture(0), LATER]], add_special_tokens=False, padding=True, return_tensors="pt"
    )
    made = collate([row], ids[None], torch.ones(1, len(ids), dtype=torch.bool), model.pad_id)
    assert torch.equal(made["input_ids"], wanted["input_ids"])
    for key, tensor in split(wanted).places.items():
        assert torch.equal(made[key][0], tensor) and tensor.sum() > 0, key
    with torch.no_grad():  # pictures may be laid out otherwise, but mean the same
        ours, _ = model.states(made)
        theirs, _ = model.states(dict(wanted))
    assert torch.allclose(ours, theirs, atol=2e-5)
    again = whole(row, ids)
    assert torch.equal(again.ids, made["input_ids"][0])
    assert all(torch.equal(again.places[key], made[key][0]) for key in again.places)
    assert all(torch.equal(again.media[key], made[key]) for key in again.media)


def of(*numbers, **more):
    return Inputs(ids=torch.tensor(numbers), **more)


def test_prompts_are_padded_on_the_left_and_answers_on_the_right():
    types = {"types": torch.tensor([0, 1, 1])}
    ids, present = torch.tensor([[7, 8], [9, 0]]), torch.tensor([[True, True], [True, False]])
    batch = collate([of(1, 2, 3, places=types), of(4)], ids, present, pad_id=5)
    assert batch["input_ids"].tolist() == [[1, 2, 3, 7, 8], [5, 5, 4, 9, 5]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1, 1], [0, 0, 1, 1, 0]]
    assert batch["types"].tolist() == [[0, 1, 1, 0, 0], [0, 0, 0, 0, 0]]


def test_what_is_packed_follows_the_rows():
    def pixels(value, count):
        return torch.full((count, 2), float(value))

    first = of(1, media={"pixels": pixels(1, 2)}).then(0, of(6, media={"pixels": pixels(2, 1)}))
    second = of(2, media={"pixels": pixels(3, 1), "sizes": torch.tensor([[5, 5]])})
    batch = collate([first, of(3), second], *none(3), pad_id=0)
    assert batch["pixels"][:, 0].tolist() == [1, 1, 2, 3] and batch["sizes"].tolist() == [[5, 5]]
    assert later_media([first, of(3), second])["pixels"][:, 0].tolist() == [2]
    sizes = collate([first, of(3), second], *none(3), pad_id=0, media={"sizes"})
    assert "pixels" not in sizes and torch.equal(sizes["sizes"], batch["sizes"])


def test_missing_tiles_are_zeros():
    one, three = (of(1, media={"tiles": torch.ones(1, n, 2, 2)}) for n in (1, 3))
    tiles: Tensor = collate([one, three], *none(2), pad_id=0)["tiles"]
    assert tiles.shape == (2, 3, 2, 2)
    assert tiles.sum((-1, -2)).tolist() == [[4, 0, 0], [4, 4, 4]]


def test_a_part_beyond_the_last_place_is_left_out():
    """Where a table was cut to its longest row."""
    row = of(1, places={"types": torch.tensor([1])}).then(3, of(2, 2, places={"types": torch.tensor([1, 1])}))
    batch = collate([row], torch.tensor([[4, 4]]), torch.ones(1, 2, dtype=torch.bool), pad_id=0)
    assert batch["types"].tolist() == [[1, 0, 0]]


def test_the_cache_makes_once_and_forgets_the_oldest():
    made = []

    def make(size):
        made.append(size)
        return Inputs(ids=torch.zeros(size, dtype=torch.int64))

    cache = Cache(most=8 * 100)
    for key in ("a", "b", "a", "c", "a", "b"):  # c drives b out: a was used after it
        assert len(cache.get(key, lambda: make(40)).ids) == 40
    assert len(made) == 4
    assert len(cache.get("large", lambda: make(1000)).ids) == 1000  # more than there is room for
    assert cache.get("large", lambda: make(1)).nbytes == 8000


def test_a_question_has_its_pictures_before_its_text():
    system, user = asked("how many?", ["one", "two"], system="be short")
    assert [part.get("image", part.get("text")) for part in user["content"]] == ["one", "two", "how many?"]
    assert (system["role"], user["role"]) == ("system", "user") and len(asked("x")) == 1
