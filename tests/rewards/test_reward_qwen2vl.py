"""What HPSv3 and VideoReward share: pixels against transformers' processors, templates, and names of weights.

Also the tiny models of both, written as upstream writes them: config.json, preprocessor_config.json and
chat_template.json of the hub's Qwen2-VL, and weights in the layout of before transformers 4.52.
"""

import json

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from rewards import RewardError
from rewards._qwen2vl import PIXELS, Template, normalised, patches, read_checkpoint, resized, split_head
from rewards.files import Weights
from rewards.media import from_pil, to_pil
from tests.rewards.makers import noise

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    "{% endif %}<|im_start|>{{ message['role'] }}\n"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif part['type'] == 'video' %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CONTROL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>",
           "<|image_pad|>", "<|video_pad|>"]  # fmt: skip


# ------------------------------------------------------------------------------------------------ tiny models


def chat(question, kind):
    """What the network reads, before the picture's one place becomes many."""
    return (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
        f"<|vision_start|><|{kind}_pad|><|vision_end|>{question}<|im_end|>\n<|im_start|>assistant\n"
    )


def write_base(folder):
    """A Qwen2-VL without weights, as the hub has it; the folder."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from tokenizers.decoders import ByteLevel
    from transformers import Qwen2TokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(letters)}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = ByteLevel()
    made.add_special_tokens(CONTROL)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = Qwen2TokenizerFast(
        tokenizer_object=made, eos_token="<|im_end|>", pad_token="<|endoftext|>", unk_token="<|endoftext|>",
        padding_side="left",
    )  # fmt: skip
    tokenizer.save_pretrained(folder)
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": CHAT_TEMPLATE}))
    pixels = {
        "min_pixels": 3136, "max_pixels": 12845056, "patch_size": 14, "temporal_patch_size": 2, "merge_size": 2,
        "image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711],
        "image_processor_type": "Qwen2VLImageProcessor", "processor_class": "Qwen2VLProcessor",
    }  # fmt: skip
    (folder / "preprocessor_config.json").write_text(json.dumps(pixels))
    ids = dict(zip(CONTROL, tokenizer.convert_tokens_to_ids(CONTROL), strict=True))
    config = {
        "architectures": ["Qwen2VLForConditionalGeneration"], "model_type": "qwen2_vl", "hidden_act": "silu",
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "rms_norm_eps": 1e-6, "rope_theta": 1e4, "vocab_size": 400,
        "rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]}, "tie_word_embeddings": False,
        "bos_token_id": ids["<|endoftext|>"], "eos_token_id": ids["<|im_end|>"],
        "image_token_id": ids["<|image_pad|>"], "video_token_id": ids["<|video_pad|>"],
        "vision_start_token_id": ids["<|vision_start|>"], "vision_end_token_id": ids["<|vision_end|>"],
        "vision_config": {"depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 2, "mlp_ratio": 2,
                          "patch_size": 14, "in_chans": 3, "spatial_merge_size": 2, "temporal_patch_size": 2},
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def processor_of(base, marks):
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(base)
    processor.tokenizer.add_special_tokens({"additional_special_tokens": list(marks)})  # as upstream does it
    return processor


def network_of(base, marks):
    """A random Qwen2-VL with a vocabulary that has the marks, resized as upstream does it."""
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Qwen2VLForConditionalGeneration(Qwen2VLConfig.from_pretrained(base))
        model.resize_token_embeddings(len(processor_of(base, marks).tokenizer))
        with torch.no_grad():
            for weight in model.parameters():
                weight += 0.1 * torch.randn_like(weight)  # tiny models start so evenly that nothing would matter
    return model.eval()


def old_names(tensors):
    """The layout of before transformers 4.52, in which all these rewards were published."""
    names = {
        name: name.replace("model.language_model.", "model.").replace("model.visual.", "visual.") for name in tensors
    }
    return {names[name]: value.contiguous().clone() for name, value in tensors.items()}


def shard(file, folder, count=3):
    """A file's tensors as `count` shards with an index."""
    folder.mkdir()
    tensors = load_file(file)
    where = {name: f"model-{i % count + 1:05d}-of-{count:05d}.safetensors" for i, name in enumerate(sorted(tensors))}
    for part in sorted(set(where.values())):
        save_file({name: value for name, value in tensors.items() if where[name] == part}, folder / part)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    return folder


# ------------------------------------------------------------------------------------------------ pixels


def picture(height, width):
    """Smooth and sharp things, in bytes; never so bright that overshooting between PIL's two passes is cut off."""
    coarse = noise(height * 1000 + width, 12).media
    smooth = to_pil(coarse).resize((width, height), Image.Resampling.BICUBIC)
    grain = torch.rand(3, height, width, generator=torch.Generator().manual_seed(1))
    return to_pil(0.15 + 0.7 * (0.7 * from_pil(smooth) + 0.3 * grain))


@pytest.mark.parametrize("size", [(300, 300), (90, 400), (1100, 700), (28, 28), (61, 40)])
def test_pictures_are_those_of_the_processor(size):
    """Its PIL path rounds to bytes after resizing, twice; ours does not."""
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    image, least, most = picture(*size), 100 * PIXELS, 200 * PIXELS
    theirs = Qwen2VLImageProcessorPil(size={"shortest_edge": least, "longest_edge": most})(image, return_tensors="pt")
    ours, grid = patches(normalised(resized(from_pil(image)[None], 28, least, most)), 14, 2, 2)
    assert list(grid) == theirs["image_grid_thw"][0].tolist()
    difference = (ours - theirs["pixel_values"]).abs() * 0.27  # in [0, 1], about
    assert difference.max() < 2 / 255
    assert difference.mean() < 0.5 / 255


def test_pictures_that_keep_their_size_are_exactly_those_of_the_processor():
    from transformers import Qwen2VLImageProcessor

    image = noise(3, 112).media
    processor = Qwen2VLImageProcessor(size={"shortest_edge": 4 * PIXELS, "longest_edge": 100 * PIXELS})
    theirs = processor(image, do_rescale=False, return_tensors="pt")
    ours, grid = patches(normalised(resized(image[None], 28, 4 * PIXELS, 100 * PIXELS)), 14, 2, 2)
    assert list(grid) == theirs["image_grid_thw"][0].tolist()
    torch.testing.assert_close(ours, theirs["pixel_values"], atol=1e-5, rtol=0)


@pytest.mark.parametrize(("count", "size"), [(4, (120, 200)), (5, (300, 180)), (2, (56, 84))])
def test_videos_are_those_of_the_processor(count, size):
    """An odd number of frames included: the last one is repeated."""
    from transformers import Qwen2VLVideoProcessor

    frames = torch.stack([from_pil(picture(size[0], size[1])).roll(9 * i, -1) for i in range(count)])
    least, most = 16 * PIXELS, 30 * PIXELS
    processor = Qwen2VLVideoProcessor(size={"shortest_edge": least, "longest_edge": most}, cap_pixels_per_frame=False)
    theirs = processor([(frames * 255).round().to(torch.uint8)], return_tensors="pt")
    ours, grid = patches(normalised(resized(frames, 28, least, most)), 14, 2, 2)
    assert list(grid) == theirs["video_grid_thw"][0].tolist()
    difference = (ours - theirs["pixel_values_videos"]).abs() * 0.27
    assert difference.max() < 2 / 255
    assert difference.mean() < 0.5 / 255


def test_a_gradient_reaches_every_pixel():
    """Without resizing every pixel of a picture stands in two patches, divided by its channel's std."""
    image = noise(0, 56).media[None].requires_grad_()
    patches(normalised(resized(image, 28, PIXELS, 100 * PIXELS)), 14, 2, 2)[0].sum().backward()
    expected = 2 / torch.tensor([0.26862954, 0.26130258, 0.27577711])
    torch.testing.assert_close(image.grad, expected.view(1, 3, 1, 1).expand_as(image))
    small = noise(0, 40).media[None].requires_grad_()
    patches(normalised(resized(small, 28, 16 * PIXELS, 20 * PIXELS)), 14, 2, 2)[0].square().sum().backward()
    assert small.grad.isfinite().all() and (small.grad != 0).all()


# ------------------------------------------------------------------------------------------------ template


def test_a_prompt_is_put_in_as_it_is():
    template = Template("Text: {prompt}! {braces} <|m|>", ("<|m|>",))
    for prompt in ["a {red} circle", "{prompt}", "{text_prompt}", "{0.__class__}", "}{", "", "%s \\1"]:
        assert template.about(prompt) == "Text: " + prompt + "! {braces} <|m|>"
    assert Template("a {text_prompt} b {text_prompt}", ()).about("{prompt}") == "a {prompt} b {prompt}"


def test_a_template_is_read_with_all_its_white_space(tmp_path):
    text = "\n  Is it {text_prompt}?  \n\n<|m|>\nEND\n"
    (tmp_path / "mine.txt").write_text(text)
    assert Template.read("r", str(tmp_path / "mine.txt"), "own", ("<|m|>",)).text == text
    assert Template.read("r", None, "own", ("<|m|>",)).text == "own"


@pytest.mark.parametrize(
    ("text", "pattern"),
    [
        ("Is it good? <|m|>", r"has no \{prompt\}"),
        ("Is it {prompt}?", r"has <\|m\|> 0 times; expected each once"),
        ("<|m|> {prompt} <|m|>", r"has <\|m\|> 2 times"),
    ],
)
def test_a_template_that_lacks_something_is_refused(tmp_path, text, pattern):
    (tmp_path / "mine.txt").write_text(text)
    with pytest.raises(RewardError, match=pattern):
        Template.read("r", str(tmp_path / "mine.txt"), "own", ("<|m|>",))


def test_a_template_that_is_not_there_is_named(tmp_path):
    with pytest.raises(RewardError, match=r"template '.*none.txt' cannot be read.*Mend: give the path"):
        Template.read("r", str(tmp_path / "none.txt"), "own", ())


# ------------------------------------------------------------------------------------------------ weights


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_base(tmp_path_factory.mktemp("base"))


def test_both_layouts_are_those_of_todays_network(base):
    model = network_of(base, ("<|m|>",))
    wanted = model.model.state_dict()
    for tensors in (model.state_dict(), old_names(model.state_dict())):
        body, head = split_head({**tensors, "rm_head.0.weight": torch.ones(1)})
        assert body.keys() == wanted.keys()
        assert all(torch.equal(body[name], wanted[name]) for name in wanted)
        assert head.keys() == {"0.weight"}
    assert "model.layers.0.mlp.up_proj.weight" in old_names(model.state_dict())
    assert "visual.blocks.0.attn.qkv.weight" in old_names(model.state_dict())


def test_shards_are_read_as_one(tmp_path):
    tensors = {f"model.layers.{i}.weight": torch.full((2,), float(i)) for i in range(7)}
    save_file(tensors, tmp_path / "all.safetensors")
    folder = shard(tmp_path / "all.safetensors", tmp_path / "shards")
    read = read_checkpoint(Weights(str(folder), ("all.safetensors",)), "r")
    assert {name: value.tolist() for name, value in read.items()} == {k: v.tolist() for k, v in tensors.items()}
    (folder / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(RewardError, match="has no model-00002-of-00003.safetensors"):
        read_checkpoint(Weights(str(folder), ("all.safetensors",)), "r")
