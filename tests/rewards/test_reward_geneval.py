"""GenEval end to end: tiny detectors and a tiny CLIP of the real classes, and drawn scenes that are found exactly."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageColor, ImageDraw
from safetensors.torch import save_file

from rewards import RewardError, RewardHub, Sample, build, traits_of
from rewards._clip import encoder
from rewards._detectors import Limits, box_of, instances, load_detector
from rewards._geneval import COLORS, Found
from rewards.files import Weights
from rewards.geneval import GenEval, _ClipColors
from rewards.media import from_pil, to_array, to_pil
from tests.rewards.makers import noise
from tests.rewards.test_reward_suder import bert_tokenizer

CPU = torch.device("cpu")
LABELS = {0: "person", 1: "cat", 2: "TV", 3: "dog", 4: "mouse"}


# ------------------------------------------------------------------------------------------------ tiny models


def clip_tokenizer():
    """Letters, each also as the end of a word, as CLIP's byte-level BPE has them."""
    from transformers import CLIPTokenizer

    letters = "abcdefghijklmnopqrstuvwxyz0123456789-"
    pieces = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={piece: i for i, piece in enumerate(pieces)}, merges=[], model_max_length=32)


def towers(tokenizer, image, patch, length):
    """Configs of the two towers of a CLIP or an OWLv2."""
    size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    special = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    text = {**size, **special, "vocab_size": len(tokenizer), "max_position_embeddings": length}
    return {"text_config": text, "vision_config": {**size, "image_size": image, "patch_size": patch}}


def loud(model, scale):
    """The model with weights that are large enough for its inputs to matter."""
    with torch.no_grad():
        for weight in model.parameters():
            weight += scale * torch.randn_like(weight)
    return model.eval()


def build_clip(folder):
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

    torch.manual_seed(0)
    tokenizer = clip_tokenizer()
    config = CLIPConfig(**towers(tokenizer, 32, 8, 48), projection_dim=12)
    loud(CLIPModel(config), 0.3).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    size = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    CLIPImageProcessor(**size).save_pretrained(folder)
    return str(folder)


def mask2former_config():
    from transformers import Mask2FormerConfig, SwinConfig

    swin = SwinConfig(
        image_size=64, embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 2, 2], window_size=2,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )  # fmt: skip
    return Mask2FormerConfig(
        backbone_config=swin, feature_size=32, mask_feature_size=32, hidden_dim=32, encoder_feedforward_dim=32,
        encoder_layers=1, decoder_layers=2, num_attention_heads=2, dim_feedforward=32, num_queries=8, id2label=LABELS,
        label2id={label: index for index, label in LABELS.items()},
        architectures=["Mask2FormerForUniversalSegmentation"],
    )  # fmt: skip


def build_mask2former(folder, side=64, head=True):
    """The files that Mask2FormerForUniversalSegmentation saves, which itself cannot be made without scipy."""
    from transformers import Mask2FormerImageProcessor, Mask2FormerModel

    torch.manual_seed(0)
    config = mask2former_config()
    tensors = {f"model.{key}": value for key, value in loud(Mask2FormerModel(config), 0.02).state_dict().items()}
    linear = torch.nn.Linear(config.hidden_dim, config.num_labels + 1)
    if head:
        tensors |= {f"class_predictor.{key}": 4 * value for key, value in linear.state_dict().items()}
    tensors["criterion.empty_weight"] = torch.ones(config.num_labels + 1)
    folder.mkdir(exist_ok=True)
    save_file(
        {key: value.contiguous() for key, value in tensors.items()}, folder / "model.safetensors", {"format": "pt"}
    )
    config.save_pretrained(folder)
    Mask2FormerImageProcessor(size={"height": side, "width": side}).save_pretrained(folder)
    return str(folder)


def build_owlv2(folder):
    from transformers import Owlv2Config, Owlv2ForObjectDetection, Owlv2ImageProcessor, Owlv2Processor

    torch.manual_seed(1)
    tokenizer = clip_tokenizer()
    config = Owlv2Config(**towers(tokenizer, 48, 16, 32), projection_dim=16)
    model = loud(Owlv2ForObjectDetection(config), 0.1)
    with torch.no_grad():
        model.box_head.dense2.weight *= 0.1  # boxes about the cells of its grid, most of them within the picture
    model.save_pretrained(folder)
    Owlv2Processor(Owlv2ImageProcessor(size={"height": 48, "width": 48}), tokenizer).save_pretrained(folder)
    return str(folder)


def build_grounding_dino(folder):
    from transformers import (
        BertConfig,
        GroundingDinoConfig,
        GroundingDinoForObjectDetection,
        GroundingDinoImageProcessor,
        GroundingDinoProcessor,
        SwinConfig,
    )

    torch.manual_seed(2)
    tokenizer = bert_tokenizer()
    swin = SwinConfig(
        image_size=64, embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 2, 2], window_size=2, out_indices=[2, 3, 4]
    )
    bert = BertConfig(
        vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
    )
    config = GroundingDinoConfig(
        backbone_config=swin, text_config=bert, num_queries=9, encoder_layers=1, encoder_ffn_dim=32, d_model=32,
        encoder_attention_heads=2, decoder_layers=2, decoder_ffn_dim=32, decoder_attention_heads=2,
    )  # fmt: skip
    loud(GroundingDinoForObjectDetection(config), 0.1).save_pretrained(folder)
    images = GroundingDinoImageProcessor(size={"shortest_edge": 64, "longest_edge": 128})
    GroundingDinoProcessor(images, tokenizer).save_pretrained(folder)
    return str(folder)


def tiny(folder):
    """For the conformance tests."""
    options = {"detector": build_mask2former(folder / "detector"), "clip": build_clip(folder / "clip")}
    return options | {"threshold": 0.2, "mode": "dense"}


def metas():
    """For the conformance tests: the tiny detector sees cats in noise."""
    return {
        "tag": "color_attr",
        "include": [{"class": "cat", "count": 1, "color": "red"}, {"class": "person", "count": 2}],
        "exclude": [{"class": "computer mouse", "count": 1}],
    }


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """{kind: folder} of tiny models, made when first asked for."""
    made = {}
    makers = {"mask2former": build_mask2former, "clip": build_clip, "owlv2": build_owlv2, "dino": build_grounding_dino}

    def folder(kind):
        if kind not in made:
            made[kind] = makers[kind](tmp_path_factory.mktemp(kind))
        return made[kind]

    return folder


# ------------------------------------------------------------------------------------------------ Mask2Former


def blobs(queries, side, seed=0):
    """Smooth logits [Q,side,side], positive here and negative there."""
    drawn = torch.randn(1, queries, 5, 5, generator=torch.Generator().manual_seed(seed)) * 4
    return F.interpolate(drawn, (side, side), mode="bicubic")[0]


@pytest.mark.parametrize("threshold", [0.05, 0.3])
def test_instances_are_those_of_transformers_at_the_size_where_it_does_not_distort(threshold):
    from transformers import Mask2FormerImageProcessor

    classes, masks = torch.randn(12, 6, generator=torch.Generator().manual_seed(1)) * 2, blobs(12, 96)
    outputs = SimpleNamespace(class_queries_logits=classes[None], masks_queries_logits=masks[None])
    [theirs] = Mask2FormerImageProcessor().post_process_instance_segmentation(
        outputs, threshold=threshold, target_sizes=[(384, 384)], return_binary_maps=True
    )
    label, score, mask = instances(classes, masks, (384, 384), (384, 384), (384, 384), range(5), threshold)
    order = score.argsort(descending=True)
    expected = sorted(zip(theirs["segments_info"], theirs["segmentation"], strict=True), key=lambda e: -e[0]["score"])
    assert len(expected) == len(label) > 3
    assert label[order].tolist() == [info["label_id"] for info, _ in expected]
    torch.testing.assert_close(score[order], torch.tensor([i["score"] for i, _ in expected]), atol=1e-6, rtol=1e-5)
    assert torch.equal(mask[order].float(), torch.stack([shape for _, shape in expected]))
    some = instances(classes, masks, (384, 384), (384, 384), (384, 384), [1, 3], threshold)
    assert sorted(some[1].tolist()) == sorted(score[(label == 1) | (label == 3)].tolist())


def test_padding_is_cut_off_and_masks_are_stretched_to_the_picture():
    classes = torch.tensor([[5.0, 0, 0], [0, 5.0, 0]])
    masks = torch.full((2, 16, 24), -3.0)
    masks[0, :, :8] = 3.0  # the left half of the picture
    masks[1, :, 16:] = 3.0  # the padding, right of it
    label, score, mask = instances(classes, masks, (64, 96), (64, 64), (30, 200), [0, 1], 0.3)
    assert label.tolist() == [0]
    assert mask.shape == (1, 30, 200)
    assert box_of(mask[0]) == (0, 0, 100, 30)
    inner = torch.sigmoid(torch.tensor(3.0)) * classes[0].softmax(0)[0]
    assert 0.95 * inner < score[0] < inner, "the mean probability within, a little less at the border"


def test_box_of_is_the_extent_of_the_pixels():
    rng = np.random.default_rng(0)
    for _ in range(20):
        mask = rng.random((9, 13)) > 0.95
        mask[rng.integers(9), rng.integers(13)] = True
        y, x = np.where(mask)
        assert box_of(torch.from_numpy(mask)) == (x.min(), y.min(), x.max() + 1, y.max() + 1)


def test_mask2former_sees_what_its_own_processor_shows_it(tmp_path):
    detector = load_detector(Weights(build_mask2former(tmp_path / "wide", side=384)), CPU)
    image = noise(3, 384).media
    [found] = detector.detect(image[None], ("cat", "dog", "person"), 0.1)
    classes, masks = detector._trunk.model(detector._processor(to_pil(image), return_tensors="pt")["pixel_values"])
    outputs = SimpleNamespace(class_queries_logits=classes, masks_queries_logits=masks)
    [theirs] = detector._processor.post_process_instance_segmentation(outputs, 0.1, target_sizes=[(384, 384)])
    expected = [(LABELS[each["label_id"]], each["score"]) for each in theirs["segments_info"]]
    expected = sorted(((n, s) for n, s in expected if n in ("cat", "dog", "person")), key=lambda e: -e[1])
    seen = sorted(((each.name, each.score) for each in found), key=lambda e: -e[1])
    assert [name for name, _ in seen] == [name for name, _ in expected]
    assert len(seen) > 1
    np.testing.assert_allclose([s for _, s in seen], [s for _, s in expected], atol=1e-5)
    assert all(each.mask.shape == (384, 384) and each.box == box_of(each.mask) for each in found)


def test_the_network_is_that_of_transformers(folders):
    pytest.importorskip("scipy", reason="transformers' own class makes its training loss, which needs it")
    from transformers import Mask2FormerForUniversalSegmentation

    theirs, report = Mask2FormerForUniversalSegmentation.from_pretrained(
        folders("mask2former"), output_loading_info=True
    )
    assert not report["missing_keys"] and not report["unexpected_keys"]
    pixels = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    ours = load_detector(Weights(folders("mask2former")), CPU)._trunk.model
    with torch.no_grad():
        expected, (classes, masks) = theirs.eval()(pixels), ours(pixels)
    torch.testing.assert_close(classes, expected.class_queries_logits, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(masks, expected.masks_queries_logits, rtol=1e-3, atol=1e-3)


def test_class_names_are_matched_whatever_label_file_they_come_from(folders):
    detector = load_detector(Weights(folders("mask2former")), CPU)
    assert detector.unknown(["computer mouse", "mouse", "tv", "Person", "unicorn", "keyboard"]) == [
        "unicorn",
        "keyboard",
    ]
    images = torch.stack([noise(seed, 64).media for seed in range(4)])
    for one, two in zip(*(detector.detect(images, (n,), 0.02) for n in ("mouse", "computer mouse")), strict=True):
        assert [each.score for each in one] == [each.score for each in two]
    both = detector.detect(images, ("mouse", "computer mouse"), 0.02)
    assert sum(map(len, both)) == 2 * sum(map(len, detector.detect(images, ("mouse",), 0.02))) > 0


def test_side_decides_how_large_the_picture_is_shown(folders):
    for side, shown in ((None, (64, 64)), (96, (96, 160))):  # the longer side is at most 5/3 of it
        detector = load_detector(Weights(folders("mask2former")), CPU, side)
        shapes = []
        hook = detector._trunk.model.register_forward_pre_hook(lambda _, args, to=shapes: to.append(args[0].shape))
        [found] = detector.detect(noise(0, 128).media[None, :, :64], ("cat", "person"), 0.0)
        hook.remove()
        assert shapes == [(1, 3, *shown)]
        assert found and all(each.mask.shape == (64, 128) for each in found)


def test_files_that_are_no_detector_are_refused(folders, tmp_path):
    bare = build_mask2former(tmp_path / "bare", head=False)
    with pytest.raises(RewardError, match="no checkpoint of Mask2Former.*lacks 2 weights.*class_predictor.bias"):
        load_detector(Weights(bare), CPU)
    with pytest.raises(RewardError, match="is a 'clip', no detector"):
        load_detector(Weights(folders("clip")), CPU)


def test_what_is_not_here_is_named_with_the_command_that_fetches_it(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(RewardError, match="hf download facebook/mask2former-swin-small-coco-instance"):
        GenEval().load(CPU, torch.float32)
    with pytest.raises(RewardError, match="hf download someone/detector"):
        GenEval(detector="someone/detector").load(CPU, torch.float32)


# ------------------------------------------------------------------------------------------------ detectors by name


def test_owlv2_finds_what_its_processor_says(folders):
    detector = load_detector(Weights(folders("owlv2")), CPU)
    names = ("cat", "wine glass", "tv")
    images = torch.stack([noise(seed, 64).media[:, :40] for seed in range(3)])  # wider than high: it is padded
    found = detector.detect(images, names, 0.3)
    text = [f"a photo of a {name}" for name in names]
    inputs = detector._processor(images=[to_pil(image) for image in images], text=[text] * 3, return_tensors="pt")
    with torch.no_grad():
        outputs = detector._trunk.model(**inputs)
    theirs = detector._processor.post_process_grounded_object_detection(outputs, 0.3, [(40, 64)] * 3, [names] * 3)
    assert any(0 < each.box[1] < each.box[3] < 40 for row in found for each in row), "one that no border cuts"
    for ours, expected in zip(found, theirs, strict=True):
        assert [each.name for each in ours] == expected["text_labels"]
        torch.testing.assert_close(torch.tensor([each.score for each in ours]), expected["scores"])
        boxes = torch.stack([e.clamp(0, limit) for e, limit in zip(expected["boxes"].T, (64, 40, 64, 40), strict=True)])
        torch.testing.assert_close(torch.tensor([each.box for each in ours]), boxes.T)
    assert detector.unknown(names) == [] and detector.open


def test_grounding_dino_scores_a_name_by_the_mean_over_its_tokens(folders):
    detector = load_detector(Weights(folders("dino")), CPU)
    names = ("red", "circle of 1")  # of one and of three pieces of the tiny vocabulary
    images = torch.stack([noise(seed, 96).media[:, :60] for seed in range(2)])
    found = detector.detect(images, names, 0.0)
    inputs = detector._processor(
        images=[to_pil(image) for image in images], text=["red. circle of 1."] * 2, return_tensors="pt"
    )
    tokens = detector._processor.tokenizer.convert_ids_to_tokens(inputs["input_ids"][0])
    assert tokens == ["[CLS]", "red", ".", "circle", "of", "1", ".", "[SEP]"]
    with torch.no_grad():
        outputs = detector._trunk.model(**inputs)
    theirs = detector._processor.post_process_grounded_object_detection(
        outputs, threshold=0.0, target_sizes=[(60, 96)] * 2
    )
    share = outputs.logits.sigmoid()
    for row, ours in enumerate(found):
        both = torch.stack([share[row, :, 1], share[row, :, 3:6].mean(-1)])
        torch.testing.assert_close(torch.tensor([each.score for each in ours]), both.amax(0))
        assert [each.name for each in ours] == [names[index] for index in both.argmax(0)]
        limits = torch.tensor([96.0, 60, 96, 60])
        torch.testing.assert_close(
            torch.tensor([each.box for each in ours]), theirs[row]["boxes"].clamp(min=0).minimum(limits)
        )


@pytest.mark.parametrize("kind", ["mask2former", "owlv2", "dino"])
def test_the_whole_reward_runs_with_each_detector(kind, folders):
    row = {"tag": "colors", "include": [{"class": "cat", "count": 1, "color": "red"}]}
    samples = [noise(seed, 64, meta={"geneval": row}) for seed in range(4)]
    entry = {"use": "geneval", "detector": folders(kind), "clip": folders("clip"), "threshold": 0.05, "max_overlap": 1}
    with RewardHub({**entry, "on_error": "raise"}, device="cpu") as hub:
        result = hub(samples)
    parts = result.parts["geneval"]
    assert not result.total.isnan().any()
    assert torch.equal(result.total, parts["strict"])
    found = [each["geneval"]["found"]["cat"] for each in result.info]
    assert any(found), "it sees something in the noise"
    for cats, strict, exact, dense in zip(found, parts["strict"], parts["exact"], parts["dense"], strict=True):
        assert strict == (len(cats) > 0 and cats[0].get("color") == "red")
        assert exact == (len(cats) == 1 and strict)
        assert dense == (0 if len(cats) != 1 else (1 + exact) / 2)
        assert [each["score"] for each in cats] == sorted((each["score"] for each in cats), reverse=True)
    json.dumps(result.info)


def test_half_precision_is_for_clip_only_and_unload_lets_both_go(folders):
    reward = GenEval(detector=folders("mask2former"), clip=folders("clip"), threshold=0.05)
    reward.load(CPU, torch.bfloat16)
    assert reward._detector._trunk.model.class_predictor.weight.dtype == torch.float32
    assert reward._colors._clip.trunk.dtype == torch.bfloat16
    row = {"include": [{"class": "cat", "count": 1, "color": "red"}]}
    scores = reward.score([noise(seed, 64, meta=row) for seed in range(3)])
    assert {each["color"] for info in scores.info for each in info["found"]["cat"][:1]} <= set(COLORS)
    assert scores.value.dtype == torch.float32
    reward.unload()
    with pytest.raises(RewardError, match="no weights yet"):
        reward.score([noise(0)])


# ------------------------------------------------------------------------------------------------ colours


def test_colours_are_not_asked_of_a_siglip(folders, tmp_path):
    from tests.rewards.clips import build_siglip

    with pytest.raises(RewardError, match="'geneval': .* is a SiglipModel; expected a CLIP"):
        GenEval(detector=folders("mask2former"), clip=build_siglip(tmp_path)).load(CPU, torch.float32)


def test_colours_are_those_of_transformers_own_pipeline(folders):
    from transformers import AutoTokenizer, CLIPImageProcessor, CLIPModel

    folder = folders("clip")
    ours = _ClipColors(encoder(Weights(folder), "geneval", CPU, torch.float32))
    rng = np.random.default_rng(0)
    crops = []
    for size in ((40, 30), (64, 64), (33, 90), (120, 70)) * 6:
        patch = rng.integers(0, 256, (3, 3, 3), dtype=np.uint8)
        crops.append(Image.fromarray(patch).resize(size, Image.Resampling.BICUBIC))
    names = ["cat", "wine glass"] * (len(crops) // 2)
    model, tokenizer = CLIPModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    expected = []
    with torch.no_grad():
        for picture, name in zip(crops, names, strict=True):
            pixels = CLIPImageProcessor.from_pretrained(folder)(picture, return_tensors="pt")
            mean = []
            for color in COLORS:
                asked = [f"a photo of a {color} {name}", f"a photo of a {color}-colored {name}",
                         f"a photo of a {color} object"]  # fmt: skip
                out = model(**tokenizer(asked, padding=True, return_tensors="pt"), **pixels)
                mean.append(F.normalize(out.text_embeds.mean(0), dim=0))
            expected.append(COLORS[int((torch.stack(mean) @ out.image_embeds[0]).argmax())])
    assert ours.name([from_pil(picture) for picture in crops], names) == expected
    assert len(set(expected)) > 1


# ------------------------------------------------------------------------------------------------ drawn scenes

BORDERS = {"cat": (10, 20, 30), "dog": (40, 50, 60), "car": (70, 80, 90)}
PALETTE = {color: ImageColor.getrgb(color) for color in COLORS}


def scene(*objects, size=96):
    """Rectangles of 20 x 20 on grey: (class, colour, x, y of the centre); the border says the class."""
    image = Image.new("RGB", (size, size), "#555")
    for name, color, x, y in objects:
        box = (x - 10, y - 10, x + 9, y + 9)
        ImageDraw.Draw(image).rectangle(box, fill=PALETTE[color], outline=BORDERS[name], width=2)
    return from_pil(image)


class ByBorder:
    """A detector of such rectangles, exact: every border is one object, wherever it stands by itself."""

    def __init__(self, score=0.95, is_open=False):
        self.limits, self.open, self.score = Limits(), is_open, score
        self.calls = []

    def unknown(self, names):
        return [name for name in names if name not in BORDERS]

    def detect(self, images, names, threshold):
        self.calls.append((len(images), names, threshold))
        return [self.look(to_array(image), names) if self.score > threshold else [] for image in images]

    def look(self, pixels, names):
        found = []
        for name in names:
            left = (pixels == BORDERS[name]).all(-1)
            while left.any():
                top, start = np.argwhere(left)[0]
                box = (float(start), float(top), float(start + 20), float(top + 20))
                mask = torch.zeros(left.shape, dtype=torch.bool)
                mask[top : top + 20, start : start + 20] = True
                left[top : top + 20, start : start + 20] = False
                found.append(Found(name=name, score=self.score - len(found) / 1000, box=box, mask=mask))
        return found


class ByMedian:
    """Names the colour of the middle of a crop, exactly."""

    def name(self, crops, names):
        exact = {rgb: color for color, rgb in PALETTE.items()}
        return [exact[tuple(int(v) for v in np.median(to_array(crop)[4:-4, 4:-4], (0, 1)))] for crop in crops]


def clause(name, count=1, **more):
    return {"class": name, "count": count, **more}


ROWS = {
    "single_object": {"include": [clause("cat")]},
    "two_object": {"include": [clause("cat"), clause("dog")]},
    "counting": {"include": [clause("cat", 3)], "exclude": [clause("cat", 4)]},
    "colors": {"include": [clause("car", color="red")]},
    "pair": {"include": [clause("car", 2, color="red")]},
    "position": {"include": [clause("dog"), clause("cat", position=["left of", 0])]},
    "color_attr": {"include": [clause("car", color="red"), clause("dog", color="blue")]},
}
CAT, DOG = ("cat", "black", 20, 50), ("dog", "white", 70, 50)
THREE = [("cat", "black", x, 20) for x in (15, 45, 75)]
SCENES = [
    # tag, what is drawn, strict, exact, dense, why not
    ("single_object", [CAT], 1, 1, 1, ""),
    ("single_object", [DOG], 0, 0, 0, "expected cat>=1, found 0"),
    ("single_object", [CAT, DOG], 1, 1, 1, ""),
    ("single_object", THREE, 1, 0, 0, ""),
    ("two_object", [CAT, DOG], 1, 1, 1, ""),
    ("two_object", [CAT], 0, 0, 0.5, "expected dog>=1, found 0"),
    ("counting", THREE, 1, 1, 1, ""),
    ("counting", THREE[:2], 0, 0, 2 / 3, "expected cat>=3, found 2"),
    ("counting", [*THREE, ("cat", "red", 20, 80)], 0, 0, 2 / 3, "expected cat<4, found 4"),
    ("counting", [], 0, 0, 0, "expected cat>=3, found 0"),
    ("colors", [("car", "red", 50, 50)], 1, 1, 1, ""),
    ("colors", [("car", "blue", 50, 50)], 0, 0, 0.5, "expected red car>=1, found 0 red (blue)"),
    ("colors", [("cat", "red", 50, 50)], 0, 0, 0, "expected car>=1, found 0"),
    ("position", [CAT, DOG], 1, 1, 1, ""),
    ("position", [("cat", "black", 80, 50), ("dog", "white", 30, 50)], 0, 0, 2 / 3, "left of target, found right of"),
    ("position", [("cat", "black", 50, 20), ("dog", "white", 50, 70)], 0, 0, 2 / 3, "left of target, found above"),
    ("position", [CAT], 0, 0, 1 / 3, "no target for cat"),
    ("pair", [("car", "red", 20, 20), ("car", "red", 70, 70)], 1, 1, 1, ""),
    ("pair", [("car", "red", 20, 20), ("car", "blue", 70, 70)], 0, 0, 0.75, "found 1 red (red, blue)"),
    ("color_attr", [("car", "red", 20, 20), ("dog", "blue", 70, 70)], 1, 1, 1, ""),
    ("color_attr", [("car", "blue", 20, 20), ("dog", "red", 70, 70)], 0, 0, 0.5, "expected red car"),
    ("color_attr", [("car", "red", 20, 20), ("dog", "green", 70, 70)], 0, 0, 0.75, "expected blue dog"),
]


@pytest.mark.parametrize("place", ["a key of its own", "top level"])
def test_drawn_scenes_are_judged_as_one_sees_them(place):
    rows = [{"tag": tag, **ROWS[tag]} for tag, *_ in SCENES]
    samples = [
        Sample(media=scene(*drawn), meta=row if place == "top level" else {"geneval": row})
        for row, (_, drawn, *_) in zip(rows, SCENES, strict=True)
    ]
    with RewardHub({"use": GenEval(detector=ByBorder(), clip=ByMedian()), "on_error": "raise"}, device="cpu") as hub:
        result = hub(samples)
    parts = result.parts["geneval"]
    for index, (tag, _, strict, exact, dense, told) in enumerate(SCENES):
        info = result.info[index]["geneval"]
        seen = tuple(round(parts[mode][index].item(), 5) for mode in ("strict", "exact", "dense"))
        assert seen == (strict, exact, round(dense, 5)), (tag, info)
        assert told in info["reason"] and bool(info["reason"]) == (not strict)
        assert info["tag"] == tag
    assert torch.equal(result.total, parts["strict"])
    json.dumps(result.info)


def test_every_correct_scene_passes_and_its_mirror_image_fails_for_every_relation():
    opposite = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
    moves = {"left of": (-30, 0), "right of": (30, 0), "above": (0, -30), "below": (0, 30)}
    reward = GenEval(detector=ByBorder(), clip=ByMedian())
    reward.load(CPU, torch.float32)
    for relation, (x, y) in moves.items():
        media = scene(("dog", "white", 48, 48), ("cat", "red", 48 + x, 48 + y))
        asked = [relation, opposite[relation], *(set(moves) - {relation, opposite[relation]})]
        rows = [{"include": [clause("dog"), clause("cat", position=[each, 0])]} for each in asked]
        value = reward.score([Sample(media=media, meta=row) for row in rows]).value
        assert value.tolist() == [1, 0, 0, 0]


@pytest.mark.parametrize("mode", ["strict", "exact", "dense"])
def test_mode_says_which_of_the_parts_is_the_reward(mode):
    reward = GenEval(mode=mode, detector=ByBorder(), clip=ByMedian())
    reward.load(CPU, torch.float32)
    samples = [Sample(media=scene(*drawn), meta={"tag": tag, **ROWS[tag]}) for tag, drawn, *_ in SCENES]
    scores = reward.score(samples)
    assert torch.equal(scores.value, scores.parts[mode])
    assert len({tuple(part.tolist()) for part in scores.parts.values()}) == 3
    spoilt = next(i for i, (tag, drawn, *_) in enumerate(SCENES) if tag == "single_object" and drawn is THREE)
    assert (scores.info[spoilt]["reason"] == "") == (mode == "strict")


def test_the_tag_counting_has_a_threshold_of_its_own():
    rows = [{"tag": tag, "include": [clause("cat")]} for tag in ("single_object", "counting", "")]
    samples = [Sample(media=scene(CAT), meta=row) for row in rows]
    expected = {0.2: [0, 0, 0], 0.5: [1, 0, 1], 0.95: [1, 1, 1]}
    for score, values in expected.items():
        reward = GenEval(detector=ByBorder(score), clip=ByMedian())
        reward.load(CPU, torch.float32)
        assert reward.score(samples).value.tolist() == values
    reward = GenEval(detector=ByBorder(0.5), clip=ByMedian(), threshold=0.6, counting_threshold=0.4)
    reward.load(CPU, torch.float32)
    assert reward.score(samples).value.tolist() == [0, 1, 0]


def test_no_more_than_max_objects_of_a_class_count():
    row = {"tag": "counting", "include": [clause("cat", 2)], "exclude": [clause("cat", 3)]}
    for most, value in ((16, 0), (2, 1), (1, 0)):
        reward = GenEval(detector=ByBorder(), clip=ByMedian(), max_objects=most)
        reward.load(CPU, torch.float32)
        assert reward.score([Sample(media=scene(*THREE), meta=row)]).value.tolist() == [value]


@pytest.mark.parametrize("is_open", [False, True])
def test_pictures_are_looked_at_together_where_that_changes_nothing(is_open):
    detector = ByBorder(is_open=is_open)
    reward = GenEval(detector=detector, clip=ByMedian())
    reward.load(CPU, torch.float32)
    cats, dogs, counted = ({"include": [clause("cat")]}, {"include": [clause("dog")]}, {"tag": "counting"})
    samples = [Sample(media=scene(CAT), meta=row) for row in (cats, dogs, cats, {**counted, **cats})]
    samples.append(Sample(media=scene(CAT, size=120), meta=cats))
    assert reward.score(samples).value.tolist() == [1, 0, 1, 1, 1]
    together = [(2, ("cat",), 0.3), (1, ("dog",), 0.3)] if is_open else [(3, ("cat", "dog"), 0.3)]
    assert detector.calls == [*together, (1, ("cat",), 0.9), (1, ("cat",), 0.3)]


def test_without_a_readable_spec_there_is_no_verdict():
    metas = [{}, {"geneval": {"include": [clause("cat", 0)]}}, {"include": [clause("unicorn")]}, ROWS["single_object"]]
    with RewardHub({"use": GenEval(detector=ByBorder(), clip=ByMedian())}, device="cpu", max_nan_frac=None) as hub:
        result = hub([Sample(media=scene(CAT), meta=meta) for meta in metas])
    assert result.total.isnan().tolist() == [True, True, True, False]
    errors = [each["geneval"].get("error", "") for each in result.info]
    for told, error in zip(("no objects to look for", "whole number", "does not know 'unicorn'"), errors, strict=False):
        assert told in error
    assert errors[3] == ""


@pytest.mark.parametrize(
    "options, told",
    [
        ({"mode": "loose"}, "'loose'"),
        ({"max_objects": 0}, "max_objects is 0"),
        ({"side": 1.5}, "side is 1.5"),
        ({"threshold": 2}, "threshold is 2"),
        ({"position_threshold": "far"}, "position_threshold is 'far'"),
        ({"max_overlap": True}, "max_overlap is True"),
    ],
)
def test_options_are_checked_when_the_config_is_read(options, told):
    with pytest.raises(RewardError, match=told):
        build("geneval", options)


def test_it_says_what_it_is():
    traits = traits_of(GenEval())
    assert traits.range == (0, 1) and traits.deterministic and not traits.differentiable
    assert [each.source for each in traits.card.weights] == [
        "facebook/mask2former-swin-small-coco-instance",
        "openai/clip-vit-large-patch14",
    ]
    with pytest.raises(RewardError, match="no weights yet"):
        GenEval().score([noise(0)])
