"""Questions from every kind of source, how they are asked, what is refused; and how hard they are."""

import io
import json
import math
import re
import time

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from flowrl.data import DataError, fingerprint
from flowrl.types import Prompt
from flowrl.vlm.data import lettered, load_questions, messages, pictures, without_options
from flowrl.vlm.grading import Grade, grade, write_graded

SPELT = {"problem": "How many?", "picture": None, "solution": "2", "level": 3}


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    """A cache folder of its own."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("FLOWRL_CACHE", str(folder))
    return folder / "pictures"


def png(colour, size=(6, 4)):
    data = io.BytesIO()
    Image.new("RGB", size, colour).save(data, "PNG")
    return data.getvalue()


def jsonl(folder, *rows, name="questions.jsonl"):
    for colour in ("red", "blue"):
        (folder / f"{colour}.png").write_bytes(png(colour))
    file = folder / name
    file.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return file


def colours(prompt):
    return [picture.getpixel((0, 0)) for picture in pictures(prompt)]


RED, BLUE = (255, 0, 0), (0, 0, 255)


# ------------------------------------------------------------------------------------------------ JSON lines


def test_rows_of_a_jsonl_file(tmp_path):
    file = jsonl(
        tmp_path,
        {"prompt": "How many?", "images": ["red.png", "blue.png"], "answer": 2, "data_source": "clevr"},
        {"problem": "What colour?", "image": "blue.png", "answer": "blue", "options": ["red", "blue"]},
        {"question": "2 + 2?", "answer": 4},
    )
    first, second, third = load_questions(file)
    assert (first.id, first.text, first.metadata["answer"], first.metadata["data_source"]) == (
        0,
        "How many?",
        2,
        "clevr",
    )
    assert first.metadata["images"] == [str(tmp_path / name) for name in ("red.png", "blue.png")]
    assert (second.text, second.metadata["options"], colours(second)) == ("What colour?", ["red", "blue"], [BLUE])
    assert "image" not in second.metadata and "problem" not in second.metadata
    assert (third.id, third.text, third.metadata["images"]) == (2, "2 + 2?", [])
    assert all(picture.mode == "RGB" and picture.size == (6, 4) for picture in pictures(first))


def test_fields_that_are_called_otherwise(tmp_path):
    file = jsonl(tmp_path, {**SPELT, "picture": "red.png", "prompt": "not this"})
    names = {"prompt": "problem", "images": "picture", "answer": "solution", "data_source": None}
    (made,) = load_questions(file, fields=names)
    assert (made.text, colours(made)) == ("How many?", [RED])
    assert made.metadata == {"answer": "2", "level": 3, "images": [str(tmp_path / "red.png")]}


@pytest.mark.parametrize(
    ("row", "options", "message"),
    [
        ("{", {}, r"questions.jsonl:2: broken JSON"),
        ({"text": "How many?"}, {}, r"questions.jsonl:2: none of the fields prompt, problem, question; it has text"),
        ({"promt": "How many?"}, {}, r":2: none of the fields .*did you mean 'promt'"),
        ({"prompt": 3}, {}, r":2: the prompt is int 3, not text"),
        ({"prompt": " "}, {}, r":2: the prompt is empty"),
        ({"prompt": "a", "images": "gren.png"}, {}, r":2: 'images': there is no file .*gren.png"),
        ({"prompt": "a", "images": ["rde.png"]}, {}, r":2: 'images': .*did you mean 'red.png'"),
        ({"prompt": "a", "images": 3}, {}, r":2: 'images' is 3; give the path of a picture"),
        ({"prompt": "a", "images": [["red.png"]]}, {}, r":2: 'images' is \['red.png'\]"),
        ({"prompt": "<image> or <image>?", "image": "red.png"}, {}, r":2: 2 times <image> in the text, and 1 pictures"),
        (
            {"prompt": "a", "level_": 1}, {"template": "{{ level }}"},
            r":2: data.template fails: UndefinedError: 'level' is undefined \(did you mean 'level_'",
        ),  # fmt: skip
        ({"prompt": "a", "level": 0}, {"template": "{{ 1 / level }}"}, r":2: data.template fails: ZeroDivisionError"),
        ({"prompt": "a", "level": 0}, {"template": "{% if level %}x{% endif %}"}, r":2: the prompt is empty"),
        ({"prompt": "a", "options": ["x", "y"], "answer": "z"}, {"drop_options": True}, r":2: the answer 'z' is none"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_told_with_its_line(tmp_path, row, options, message):
    file = jsonl(tmp_path, {"prompt": "fine", "level": 1, "options": ["x", "y"], "answer": "A"}, row)
    with pytest.raises(DataError, match=message):
        load_questions(file, **options)


def test_sources_that_are_none(tmp_path):
    jsonl(tmp_path, {"prompt": "a"})
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.csv").write_text("a,b")
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 no table")
    for source, message in {
        "question.jsonl": "there is no file .*did you mean 'questions.jsonl'",
        "empty": "is no data set: no state.json",
        "notes.csv": "unknown kind of file '.csv'",
        "empty.jsonl": "holds no questions",
        "broken.parquet": "not a table that pyarrow reads",
    }.items():
        with pytest.raises(DataError, match=message):
            load_questions(tmp_path / source)
    with pytest.raises(DataError, match="fields names 'problm' as prompt, which is no field .did you mean"):
        load_questions(jsonl(tmp_path, SPELT), fields={"prompt": "problm"})


def test_texts_in_a_list_are_questions_without_pictures():
    assert [(p.text, p.metadata) for p in load_questions(["a", "b"])] == [("a", {"images": []}), ("b", {"images": []})]


# ------------------------------------------------------------------------------------------------ data sets


def table(*colours, **columns):
    """Rows with a picture each, in the form in which Hugging Face stores them."""
    shown = [{"bytes": png(colour), "path": None} for colour in colours]
    return pa.table({"image": shown, "problem": [f"Is it {colour}?" for colour in colours], **columns})


def saved(folder, made, as_stream=True):
    """What Dataset.save_to_disk writes."""
    folder.mkdir(parents=True)
    name = "data-00000-of-00001.arrow"
    open_writer = pa.ipc.new_stream if as_stream else pa.ipc.new_file
    with open_writer(str(folder / name), made.schema) as writer:
        writer.write_table(made, max_chunksize=1)
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": name}], "_split": None}, indent=2))
    return folder


@pytest.mark.parametrize("as_stream", [True, False])
def test_a_data_set_of_save_to_disk(tmp_path, cache, as_stream):
    made = load_questions(saved(tmp_path / "set", table("red", "blue", "red", answer=["yes", "no", "yes"]), as_stream))
    assert [p.text for p in made] == ["Is it red?", "Is it blue?", "Is it red?"]
    assert [p.metadata["answer"] for p in made] == ["yes", "no", "yes"]
    assert [colours(p) for p in made] == [[RED], [BLUE], [RED]]
    assert len(list(cache.iterdir())) == 2, "pictures are kept once, by their contents"
    assert made[0].metadata["images"] == made[2].metadata["images"]


def test_splits_of_a_data_set(tmp_path):
    saved(tmp_path / "set" / "train", table("red"))
    saved(tmp_path / "set" / "test", table("blue", "blue"))
    (tmp_path / "set" / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    assert len(load_questions(tmp_path / "set")) == 1 and len(load_questions(tmp_path / "set", "held_out")) == 2
    with pytest.raises(DataError, match="no split mine; there are train, test"):
        load_questions(tmp_path / "set", "mine")


def test_parquet_files(tmp_path):
    (tmp_path / "data").mkdir()
    several = pa.table({"images": [[png("red"), png("blue")]], "problem": ["Are <image> and <image> alike?"]})
    pq.write_table(table("red"), tmp_path / "data" / "train-00000-of-00002.parquet")
    pq.write_table(table("blue"), tmp_path / "data" / "train-00001-of-00002.parquet")
    pq.write_table(several, tmp_path / "data" / "validation-00000-of-00001.parquet")
    assert [colours(p) for p in load_questions(tmp_path)] == [[RED], [BLUE]]
    (held_out,) = load_questions(tmp_path, "held_out")
    assert colours(held_out) == [RED, BLUE]
    (one,) = load_questions(tmp_path / "data" / "train-00001-of-00002.parquet", "held_out")
    assert one.text == "Is it blue?", "a file has no splits"
    with pytest.raises(DataError, match="no split test2 among train-00000"):
        load_questions(tmp_path, "test2")


def test_pictures_of_a_table_that_are_paths_or_broken(tmp_path):
    jsonl(tmp_path)
    beside = pa.table({"image": [{"bytes": None, "path": "red.png"}], "problem": ["a"]})
    pq.write_table(beside, tmp_path / "beside.parquet")
    assert colours(load_questions(tmp_path / "beside.parquet")[0]) == [RED]
    pq.write_table(pa.table({"image": [png("red"), b"GIF89a..."], "problem": ["a", "b"]}), tmp_path / "bad.parquet")
    with pytest.raises(DataError, match="bad.parquet:2: 'image': 9 bytes that are no PNG"):
        load_questions(tmp_path / "bad.parquet")


# ------------------------------------------------------------------------------------------------ how it is asked


def test_messages_put_pictures_where_they_belong(tmp_path):
    shown = [Image.new("RGB", (2, 2), colour) for colour in ("red", "blue")]

    def kinds(prompt, **options):
        return [
            (
                m["role"],
                [part.get("text", part.get("image") and part["image"].getpixel((0, 0))) for part in m["content"]],
            )
            for m in messages(prompt, **options)
        ]

    front = Prompt(id=0, text="Alike?", metadata={"images": shown, "system": "Think."})
    assert kinds(front) == [("system", ["Think."]), ("user", [RED, BLUE, "Alike?"])]
    inside = Prompt(id=0, text="<image>Is it in <image> too?", metadata={"images": shown})
    assert kinds(inside) == [("user", [RED, "Is it in ", BLUE, " too?"])]
    assert kinds(inside, shown=shown[::-1]) == [("user", [BLUE, "Is it in ", RED, " too?"])]
    assert kinds(Prompt(id=0, text="2 + 2?")) == [("user", ["2 + 2?"])]


def test_the_system_message_is_the_same_for_all(tmp_path):
    made = load_questions(jsonl(tmp_path, {"prompt": "a"}, {"prompt": "b"}), system="Think first.")
    assert {p.metadata["system"] for p in made} == {"Think first."}


def test_pictures_are_read_as_a_viewer_shows_them(tmp_path):
    turned = Image.new("RGB", (6, 4), "red")
    exif = turned.getexif()
    exif[0x0112] = 6  # a quarter turn
    turned.save(tmp_path / "turned.jpg", exif=exif)
    Image.new("RGBA", (2, 2), (0, 0, 0, 0)).save(tmp_path / "clear.png")
    prompt = Prompt(id=5, text="a", metadata={"images": [str(tmp_path / "turned.jpg"), str(tmp_path / "clear.png")]})
    first, second = pictures(prompt)
    assert first.size == (4, 6) and second.getpixel((0, 0)) == (255, 255, 255)
    (tmp_path / "clear.png").write_bytes(b"gone")
    with pytest.raises(DataError, match="prompt 5: images: .*clear.png cannot be read"):
        pictures(prompt)


def test_templates(tmp_path):
    row = {"prompt": "Which?", "level": 2, "options": ["red", "B. blue"], "answer": "B", "{{ evil }}": "{{ 1 + 1 }}"}
    file = jsonl(tmp_path, row)
    (made,) = load_questions(
        file, template="[{{ level }}] {{ prompt }}\n{{ options | lettered }}\n{{ row['{{ evil }}'] }}"
    )
    assert made.text == "[2] Which?\nA. red\nB. blue\n{{ 1 + 1 }}", "what is in a row is no template"
    (tmp_path / "ask.jinja").write_text("{% for o in options %}{{ loop.index }}) {{ o }} {% endfor %}\n")
    (made,) = load_questions(file, template=str(tmp_path / "ask.jinja"))
    assert made.text == "1) red 2) B. blue" and made.metadata["answer"] == "B"
    with pytest.raises(DataError, match="there is no file .*nothing.jinja"):
        load_questions(file, template=str(tmp_path / "nothing.jinja"))
    with pytest.raises(DataError, match="template, line 2: .*see jinja's syntax"):
        load_questions(file, template="a\n{{ prompt ")


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}", "{{ row.__init__.__globals__ }}", "{{ options.append(1) }}x",
        "{{ row.update(prompt='b') }}x", "{% for i in range(10 ** 9) %}{% endfor %}x", "{{ lettered }}",
    ],
)  # fmt: skip
def test_templates_run_in_a_sandbox(tmp_path, template):
    start = time.perf_counter()
    with pytest.raises(DataError, match="data.template fails: (SecurityError|OverflowError|UndefinedError)"):
        load_questions(jsonl(tmp_path, {"prompt": "a", "options": ["x"]}), template=template)
    assert time.perf_counter() - start < 2


def test_options_keep_their_letters_or_get_some():
    assert lettered(["red", "(B) blue", "C. green"]) == "A. red\nB. blue\nC. green"
    assert lettered({"D": "no", "A": "yes"}) == "A. yes\nD. no" and lettered(None) == ""


# ------------------------------------------------------------------------------------------------ open questions


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("What colour is it?", "B"), ("What colour is it?\nA. red\nB. blue\nC. light blue", "(b)"),
        ("What colour is it?\nOptions:\n(A) red\n(B) blue\n(C) light blue\n", "blue"),
        ("What colour is it? (A) red, (B) blue, (C) light blue", "B. blue"),
        ("A: red B: blue C: light blue\nWhat colour is it?", "b."),
    ],
)  # fmt: skip
def test_options_are_dropped_from_the_text_as_well(text, answer):
    bare, metadata = without_options(
        "x:1", text, {"answer": answer, "options": ["red", "blue", "light blue"], "images": []}
    )
    assert bare == "What colour is it?"
    assert metadata == {"answer": "blue", "images": [], "blank": True}


@pytest.mark.parametrize(
    ("text", "options"),
    [
        ("Which?", None), ("Which?", []), ("What colour?", ["red", "none of the above"]), ("What?", ["both", "red"]),
        ("Which of the following is red?", ["it", "that"]), ("What?\nA. a red thing\nB. blue", ["red", "blue"]),
        ("A. red\nB. blue", ["red", "blue"]),
    ],
)  # fmt: skip
def test_a_question_that_needs_its_options_keeps_them(text, options):
    metadata = {"answer": "A", "options": options}
    assert without_options("x:1", text, metadata) == (text, {**metadata, "blank": False})


def test_open_questions_are_graded_by_their_text(tmp_path):
    from rewards.verifiers import Answer, Verifiers

    file = jsonl(tmp_path, {"prompt": "What colour?", "options": ["red", "blue"], "answer": "B", "data_source": "s"})
    (made,) = load_questions(
        file, drop_options=True, template="{{ prompt }}{% if options %} {{ options | lettered }}{% endif %}"
    )
    assert made.text == "What colour?"
    judge = Verifiers([{"use": "verifiers.exact", "when": {"blank": True}}])
    answers = [Answer(f"<answer>{said}</answer>", meta=made.metadata) for said in ("blue", "B", "red")]
    assert judge(answers).total.tolist() == [1, 0, 0]


# ------------------------------------------------------------------------------------------------ identity


def test_the_fingerprint_is_of_what_the_pictures_show(tmp_path):
    file = jsonl(tmp_path, {"prompt": "a", "images": ["red.png"]})
    before = fingerprint(load_questions(file))
    (tmp_path / "other").mkdir()
    assert fingerprint(load_questions(jsonl(tmp_path / "other", {"prompt": "a", "images": ["red.png"]}))) == before
    (tmp_path / "red.png").write_bytes(png("blue"))
    assert fingerprint(load_questions(file)) != before


def test_the_fingerprint_of_pictures_in_memory():
    def of(colour, size=(4, 2)):
        return fingerprint([Prompt(id=0, text="a", metadata={"images": [Image.new("RGB", size, colour)]})])

    assert of("red") == of("red") and len({of("red"), of("blue"), of("red", (2, 4))}) == 3
    assert fingerprint([Prompt(id=0, text="a", metadata={"images": 3})]), "someone else's field of that name"


# ------------------------------------------------------------------------------------------------ difficulty


def test_grades_of_answers():
    prompt = torch.tensor([3, 3, 3, 3, 0, 0, 8])
    rewards = torch.tensor([1.0, 0.2, 0.7, 0.1, 0.0, math.nan, math.nan], dtype=torch.float64)
    grades = grade(rewards, prompt, passes=(1, 2, 8))
    assert list(grades) == [0, 3], "one without a verdict has no grade"
    assert grades[3] == Grade(2, 4, 0.5, {1: 0.5, 2: 1 - 1 / 6}) and grades[3].difficulty == grades[3].pass_rate == 0.5
    assert grades[0] == Grade(0, 1, 0.0, {1: 0.0}) and grades[0].difficulty == 1
    assert grade(rewards, prompt, threshold=0.1)[3].pass_rate == 1


def test_graded_rows_are_the_same_rows_with_their_difficulty(tmp_path):
    rows = [
        {**SPELT, "picture": "red.png"}, {**SPELT, "picture": ["blue.png", "red.png"], "level": "{{ x }} é"},
        {**SPELT, "problem": "b"},
    ]  # fmt: skip
    file = jsonl(tmp_path, *rows)
    names = {"prompt": "problem", "images": "picture"}
    target = tmp_path / "graded" / "hard.jsonl"
    assert (
        write_graded(file, {0: Grade(1, 4, 0.3, {1: 0.25, 2: 0.5}), 2: Grade(4, 4, 1.0, {})}, target, fields=names) == 3
    )
    written = [json.loads(line) for line in target.read_text().splitlines()]
    assert written[0] == {
        **rows[0], "picture": ["../red.png"], "difficulty": 0.75, "pass_rate": 0.25, "right": 1, "answers": 4,
        "mean_reward": 0.3, "pass@1": 0.25, "pass@2": 0.5,
    }  # fmt: skip
    assert written[1] == {**rows[1], "picture": ["../blue.png", "../red.png"]} and written[2]["difficulty"] == 0
    again, before = load_questions(target, fields=names), load_questions(file, fields=names)
    assert [p.text for p in again] == [p.text for p in before]
    assert [colours(p) for p in again] == [colours(p) for p in before] == [[RED], [BLUE, RED], []]
    with pytest.raises(DataError, match="would replace their source"):
        write_graded(file, {}, file)


def test_graded_rows_of_a_table_have_their_pictures_beside_them(tmp_path, cache):
    pq.write_table(table("red", "blue", score=[1.0, math.nan], made=[b"x", None]), tmp_path / "set.parquet")
    target = tmp_path / "graded.jsonl"
    write_graded(tmp_path / "set.parquet", {1: Grade(0, 2, 0.0, {})}, target)
    again = load_questions(target)
    assert [colours(p) for p in again] == [[RED], [BLUE]] and not cache.exists()
    assert again[1].metadata["score"] is None and again[1].metadata["difficulty"] == 1
    assert all("graded_pictures" in p.metadata["images"][0] for p in again)


# ------------------------------------------------------------------------------------------------ the built-in world


@pytest.mark.slow
def test_the_built_in_world_asks_questions(tmp_path):
    made = load_questions("shapes_questions", "held_out")
    assert len(made) >= 600 and all(p.metadata["answer"] is not None for p in made)
    assert np.array(pictures(made[0])[0]).shape == (64, 64, 3)
    assert fingerprint(made) == fingerprint(load_questions("shapes_questions", "held_out"))
    assert fingerprint(made) != fingerprint(load_questions("shapes_questions", "train")[: len(made)])
    write_graded("shapes_questions", {0: Grade(1, 2, 0.5, {})}, tmp_path / "graded.jsonl", "held_out")
    again = load_questions(tmp_path / "graded.jsonl")
    assert again[0].metadata["difficulty"] == 0.5
    assert [p.text for p in again] == [p.text for p in made]
    assert (np.array(pictures(again[7])[0]) == np.array(pictures(made[7])[0])).all()


# ------------------------------------------------------------------------------------------------ a config's questions


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ("data.evaluation.headline=acuracy", r"no score 'acuracy' \(did you mean 'accuracy'\?\)"),
        ("model.path=tiny/qwen9", "no such tiny vision-language model"),
        ("model.path=shapes", "built-in models: shapes_vlm"),
        (
            "data.fields={anwser: answer}",
            r"no question has 'answer' \(did you mean 'anwser'\?\), which is read by 'count'",
        ),
        ("rewards=[{use: verifiers.exact, name: a, only_where: {b: 1}}]", "only_where names 'b'"),
        ("rewards=[{use: verifiers.exact, when: {data_source: color}}]", "is for number 0, 'how many"),
        ("rewards=[{use: verifiers.boxes.grounding, mode: hitt}]", "mode is 'hitt'"),
        ("generation.temperature=0", "evaluation_temperature may be 0"),
    ],
)
def test_what_a_run_could_not_use_is_known_before_weights_are_read(change, told):
    from flowrl.config import check

    (problem, *more) = check("configs/vlm/quickstart.yaml", [change])
    assert re.search(told, problem) and not more


def test_a_part_of_a_score_can_be_the_headline():
    from flowrl.config import check

    assert check("configs/vlm/quickstart.yaml", ["data.evaluation.headline=box.iou"]) == []
