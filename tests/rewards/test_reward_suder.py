"""The likelihood of a prompt given the picture, by tiny random models of the real classes with their processors."""

import pytest
import torch

from rewards import RewardContractError, RewardError, RewardHub, Sample, build, traits_of
from rewards.media import to_pil
from rewards.suder import SUDER
from tests.rewards.makers import noise

PROMPTS = ["a red circle", "two blue squares left of a star", "a", "Zwei große Kreise, 2 ⭐!"]
ASKED = "Describe this image in one sentence."
LLAVA_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] | upper + ': ' }}"
    "{% for part in message['content'] %}{{ '<image>\n' if part['type'] == 'image' else part['text'] }}{% endfor %}"
    "{{ ' ' if message['role'] == 'user' else '</s>' }}{% endfor %}"
)
QWEN_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% for part in message['content'] %}"
    "{{ '<|vision_start|><|image_pad|><|vision_end|>' if part['type'] == 'image' else part['text'] }}{% endfor %}"
    "{{ '<|im_end|>\n' }}{% endfor %}"
)


# ------------------------------------------------------------------------------------------------ tiny models


def bert_tokenizer():
    """Letters and numbers as pieces, and BLIP's own token for the start of a caption."""
    from transformers import BertTokenizer

    letters = "abcdefghijklmnopqrstuvwxyz0123456789ß⭐,.!"
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[DEC]", "red", "circle", "picture", "of"]
    pieces = [*words, *letters, *(f"##{letter}" for letter in letters)]
    return BertTokenizer(vocab={piece: i for i, piece in enumerate(pieces)})


def byte_tokenizer(specials, *, across_words=False, begins=False):
    """A byte-level BPE with a few merges, which may reach `across_words`; `begins`: it puts <s> before every text."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
    from tokenizers.decoders import ByteLevel
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not across_words)
    made.decoder = ByteLevel()
    corpus = ["a red circle", "two blue squares left of a star", "describe this", *[": a"] * 10] * 5
    trainer = trainers.BpeTrainer(
        vocab_size=340,
        special_tokens=["<pad>", "<s>", "</s>", *specials],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(corpus, trainer)
    if begins:
        made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", bos_token="<s>", eos_token="</s>", padding_side="left",
        extra_special_tokens=specials,
    )  # fmt: skip


def save(folder, model, processor):
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.05 * torch.randn_like(weight)  # tiny models start so evenly that nothing would matter
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return str(folder)


def build_blip(folder):
    from transformers import BlipConfig, BlipForConditionalGeneration, BlipImageProcessor, BlipProcessor

    tokenizer = bert_tokenizer()
    start, end = tokenizer.convert_tokens_to_ids(["[DEC]", "[SEP]"])
    size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = BlipConfig(
        text_config={
            **size, "vocab_size": len(tokenizer), "encoder_hidden_size": 16, "max_position_embeddings": 64,
            "bos_token_id": start, "eos_token_id": end, "sep_token_id": end, "pad_token_id": 0, "is_decoder": True,
        },
        vision_config={**size, "image_size": 16, "patch_size": 8},
    )  # fmt: skip
    images = BlipImageProcessor(size={"height": 16, "width": 16})
    return save(folder, BlipForConditionalGeneration(config), BlipProcessor(images, tokenizer))


def tiny(folder):
    """For the conformance tests."""
    return {"model": build_blip(folder)}


def build_git(folder):
    from transformers import CLIPImageProcessor, GitConfig, GitForCausalLM, GitProcessor

    tokenizer = bert_tokenizer()
    start, end = tokenizer.convert_tokens_to_ids(["[CLS]", "[SEP]"])
    size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = GitConfig(
        **size, vocab_size=len(tokenizer), max_position_embeddings=64, bos_token_id=start, eos_token_id=end,
        vision_config={**size, "image_size": 16, "patch_size": 8},
    )  # fmt: skip
    images = CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    return save(folder, GitForCausalLM(config), GitProcessor(images, tokenizer))


def build_llava(folder, **tokenizer_options):
    from transformers import CLIPImageProcessor, LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor

    tokenizer = byte_tokenizer(["<image>"], **tokenizer_options)
    size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlavaConfig(
        vision_config={**size, "model_type": "clip_vision_model", "image_size": 28, "patch_size": 14},
        text_config={**size, "model_type": "llama", "vocab_size": len(tokenizer), "num_key_value_heads": 1},
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"), vision_feature_layer=-1, image_seq_length=4,
    )  # fmt: skip
    images = CLIPImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    processor = LlavaProcessor(
        images, tokenizer, patch_size=14, vision_feature_select_strategy="default", num_additional_image_tokens=1,
        chat_template=LLAVA_TEMPLATE,
    )  # fmt: skip
    return save(folder, LlavaForConditionalGeneration(config), processor)


def build_qwen(folder):
    from transformers import (
        Qwen2VLConfig,
        Qwen2VLForConditionalGeneration,
        Qwen2VLImageProcessor,
        Qwen2VLProcessor,
        Qwen2VLVideoProcessor,
    )

    marks = ["<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
    tokenizer = byte_tokenizer(marks)
    ids = tokenizer.convert_tokens_to_ids(marks)
    config = Qwen2VLConfig(
        text_config={
            "vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 2,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]},
        },
        vision_config={"depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 2, "mlp_ratio": 2},
        vision_start_token_id=ids[2], vision_end_token_id=ids[3], image_token_id=ids[4], video_token_id=ids[5],
    )  # fmt: skip
    images = Qwen2VLImageProcessor(size={"shortest_edge": 28 * 28, "longest_edge": 56 * 56})
    processor = Qwen2VLProcessor(images, tokenizer, Qwen2VLVideoProcessor(), chat_template=QWEN_TEMPLATE)
    return save(folder, Qwen2VLForConditionalGeneration(config), processor)


BUILDERS = {"blip": build_blip, "git": build_git, "llava": build_llava, "qwen": build_qwen}
CAPTION_START = {"blip": "[DEC]", "git": "[CLS]"}
BEFORE_ANSWER = {
    "llava": f"USER: <image>\n{ASKED} ASSISTANT: ",
    "qwen": f"<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>{ASKED}<|im_end|>\n<|im_start|>assistant\n",
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return {name: make(tmp_path_factory.mktemp(name)) for name, make in BUILDERS.items()}


def loaded(folder, **options):
    reward = build("suder", {"model": folder, **options})
    reward.load(torch.device("cpu"), torch.float32)
    return reward


@pytest.fixture(scope="module", params=BUILDERS)
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def reward(folders, kind):
    return loaded(folders[kind])


def value_of(reward, *samples):
    return reward.score(samples).value.tolist()


def samples_of(prompts=PROMPTS, size=32):
    """Noise in different sizes, one with each prompt; a multiple of 28 keeps its size for Qwen."""
    return [noise(i, size + 28 * (i % 2), prompt=prompt) for i, prompt in enumerate(prompts)]


# ------------------------------------------------------------------------------------------------ the score


@torch.no_grad()
def by_hand(folder, kind, sample, prefix="", images=None):
    """Log-probabilities of the prompt's tokens, each from a forward pass of its own over what stands before it.

    Which tokens they are is found by decoding ever longer ends of the text until one has the whole prompt in it.
    """
    from transformers import AutoModelForImageTextToText, AutoProcessor

    model, processor = AutoModelForImageTextToText.from_pretrained(folder).eval(), AutoProcessor.from_pretrained(folder)
    tokenizer = processor.tokenizer
    text = BEFORE_ANSWER.get(kind, "") + (f"{prefix} " if prefix else "") + sample.prompt
    picture = {"images": sample.media, "do_rescale": False} if images is None else {"images": images}
    inputs = processor(text=text, return_tensors="pt", **picture)
    ids = inputs.pop("input_ids")
    if kind in CAPTION_START:
        ids = ids[:, :-1].clone()  # without [SEP]
        ids[0, 0] = tokenizer.convert_tokens_to_ids(CAPTION_START[kind])
        count = len(tokenizer.tokenize(sample.prompt))
    else:
        ends = (tokenizer.decode(ids[0, -k:]) for k in range(1, ids.shape[1]))
        count = next(k for k, end in enumerate(ends, 1) if end.endswith(sample.prompt))
    pixels = {key: value for key, value in inputs.items() if key.startswith(("pixel", "image"))}
    types = inputs.get("mm_token_type_ids")
    found = []
    for at in range(ids.shape[1] - count, ids.shape[1]):
        marks = {} if types is None else {"mm_token_type_ids": types[:, :at]}
        logits = model(input_ids=ids[:, :at], **pixels, **marks).logits[0, -1]
        found.append(logits.log_softmax(-1)[ids[0, at]].item())
    return found


def mean(numbers):
    return sum(numbers) / len(numbers)


def test_it_is_the_mean_log_probability_of_the_prompts_tokens(reward, folders, kind):
    """And that of four prompts of different lengths, with pictures of different sizes, in one batch."""
    samples = samples_of()
    scores = reward.score(samples)
    expected = [by_hand(folders[kind], kind, sample) for sample in samples]
    assert scores.value.tolist() == pytest.approx([mean(one) for one in expected], abs=1e-5)
    assert scores.parts["tokens"].tolist() == [len(one) for one in expected]
    assert len({round(value, 3) for value in scores.value.tolist()}) == len(samples)


def test_a_captioners_own_loss_agrees(folders):
    from transformers import BlipForConditionalGeneration, BlipProcessor

    sample = noise(3, prompt="a red circle")
    model = BlipForConditionalGeneration.from_pretrained(folders["blip"]).eval()
    processor = BlipProcessor.from_pretrained(folders["blip"])
    ids = processor.tokenizer("picture of a red circle", return_tensors="pt").input_ids[:, :-1].clone()  # no [SEP]
    ids[:, 0] = model.config.text_config.bos_token_id
    labels = ids.clone()
    labels[:, :3] = -100
    pixels = processor.image_processor(sample.media, do_rescale=False, return_tensors="pt").pixel_values
    loss = model(pixel_values=pixels, input_ids=ids, labels=labels).loss.item()
    assert value_of(loaded(folders["blip"], prefix=" picture of "), sample) == pytest.approx([-loss], abs=1e-5)


def test_a_chat_models_own_loss_agrees(folders):
    """Padded on the left, as its tokenizer wants it, and with labels by the length of what stands before the answer."""
    from transformers import LlavaForConditionalGeneration, LlavaProcessor

    samples = samples_of(PROMPTS[:2])
    processor = LlavaProcessor.from_pretrained(folders["llava"])
    inputs = processor(
        images=[sample.media for sample in samples],
        text=[BEFORE_ANSWER["llava"] + sample.prompt for sample in samples],
        do_rescale=False, padding=True, return_tensors="pt",
    )  # fmt: skip
    assert inputs["attention_mask"][0, 0] == 0
    labels = inputs["input_ids"].clone()
    counts = [len(by_hand(folders["llava"], "llava", sample)) for sample in samples]
    for row, count in zip(labels, counts, strict=True):
        row[:-count] = -100
    loss = LlavaForConditionalGeneration.from_pretrained(folders["llava"]).eval()(**inputs, labels=labels).loss.item()
    values = value_of(loaded(folders["llava"]), *samples)
    total = sum(count * value for count, value in zip(counts, values, strict=True))
    assert total / sum(counts) == pytest.approx(-loss, abs=1e-5)


def test_a_token_over_the_border_of_the_answer_is_scored(tmp_path):
    """The tokenizer joins ": a", so that the tokens before the answer are no beginning of the whole text's tokens."""
    folder = build_llava(tmp_path, across_words=True)
    reward, sample = loaded(folder), noise(prompt="a red circle")
    whole = reward._processor.tokenizer.tokenize(BEFORE_ANSWER["llava"] + sample.prompt)
    front = reward._processor.tokenizer.tokenize(BEFORE_ANSWER["llava"])
    assert whole[: len(front)] != front
    assert value_of(reward, sample) == pytest.approx([mean(by_hand(folder, "llava", sample))], abs=1e-5)


def test_the_first_token_is_there_once_whoever_writes_it(tmp_path):
    reward, sample = loaded(build_llava(tmp_path, begins=True)), noise(prompt="a red circle")
    by_tokenizer = value_of(reward, sample)
    reward._processor.chat_template = "{{ '<s>' }}" + LLAVA_TEMPLATE
    inputs = reward._inputs([sample.media], [sample.prompt])
    assert (inputs["input_ids"] == reward._processor.tokenizer.bos_token_id).sum() == 1
    assert value_of(reward, sample) == by_tokenizer


def test_a_prefix_is_given_and_not_scored(folders, kind):
    sample = noise(1, prompt="a red circle")
    prefixed = loaded(folders[kind], prefix="a picture of")
    expected = by_hand(folders[kind], kind, sample, prefix="a picture of")
    scores = prefixed.score([sample])
    assert scores.value.tolist() == pytest.approx([mean(expected)], abs=1e-5)
    assert scores.parts["tokens"].tolist() == [len(expected)]


def test_without_normalising_it_is_the_sum(reward, folders, kind):
    samples = samples_of()
    scores = reward.score(samples)
    total = loaded(folders[kind], normalise=False).score(samples).value
    torch.testing.assert_close(total, scores.value * scores.parts["tokens"])


def test_of_a_long_prompt_the_first_tokens_are_scored(reward, folders, kind):
    """Left to right: what is cut off at the end changes nothing before it."""
    sample = noise(prompt="a star of two blue circles")
    short = loaded(folders[kind], max_tokens=2).score([sample])
    assert short.parts["tokens"].tolist() == [2]
    assert short.value.tolist() == pytest.approx([mean(by_hand(folders[kind], kind, sample)[:2])], abs=1e-5)


def test_a_batch_changes_nothing_and_keeps_the_order(reward):
    samples = samples_of()
    alone = [value_of(reward, sample)[0] for sample in samples]
    assert value_of(reward, *samples) == pytest.approx(alone, abs=1e-5)
    assert value_of(reward, *samples[::-1]) == pytest.approx(alone[::-1], abs=1e-5)


def test_the_picture_and_the_instruction_matter(reward, folders, kind):
    sample, other = noise(0, prompt="a red circle"), noise(1, prompt="a red circle")
    first, second = value_of(reward, sample, other)
    assert abs(first - second) > 1e-4
    asked = value_of(loaded(folders[kind], instruction="What is this?"), sample)[0]
    assert (abs(asked - first) > 1e-4) == (kind in BEFORE_ANSWER)


def test_pictures_are_read_as_from_a_file(reward, folders, kind):
    """A PIL picture through the processor's own scaling gives the same, where nothing has to be resized."""
    size = 28 if kind in BEFORE_ANSWER else 16
    media = (noise(2, size).media * 255).round() / 255
    sample = Sample(media=media, prompt="a red circle")
    expected = mean(by_hand(folders[kind], kind, sample, images=to_pil(media)))
    assert value_of(reward, sample) == pytest.approx([expected], abs=1e-4)


def test_a_processor_that_scales_in_its_own_way_gets_pil(folders):
    reward, sample = loaded(folders["blip"]), noise(prompt="a red circle")
    usual = value_of(reward, sample)[0]
    reward._processor.image_processor.rescale_factor = 2 / 255
    doubled = value_of(reward, sample)[0]
    bright = value_of(loaded(folders["blip"]), Sample(media=sample.media / 2, prompt=sample.prompt))[0]
    reward._processor.image_processor.rescale_factor = 0.5 / 255
    assert value_of(reward, sample)[0] == pytest.approx(bright, abs=2e-3)
    assert abs(doubled - usual) > 1e-3


# ------------------------------------------------------------------------------------------------ verdicts


@pytest.mark.parametrize("prompt", ["", " \n "])
def test_an_empty_prompt_has_no_verdict(reward, prompt):
    samples = [noise(0, prompt=prompt), noise(1, prompt="a red circle")]
    scores = reward.score(samples)
    assert scores.value.isnan().tolist() == scores.parts["tokens"].isnan().tolist() == [True, False]
    assert scores.info[0]["error"].startswith("the prompt has no text")
    assert value_of(reward, samples[1]) == pytest.approx(scores.value[1:].tolist(), abs=1e-5)
    assert reward.score(samples[:1]).value.isnan().all()


@pytest.mark.parametrize(("kind", "token"), [("llava", "<image>"), ("qwen", "<|im_end|>"), ("blip", "[SEP]")])
def test_a_prompt_with_a_control_token_has_no_verdict(folders, kind, token):
    with RewardHub({"use": "suder", "model": folders[kind]}) as hub:
        result = hub([noise(0, prompt=f"a {token} circle"), noise(1, prompt="a red circle")])
    assert result.total.isnan().tolist() == [True, False]
    assert f"{token!r} in it" in result.info[0]["suder"]["error"]


def test_the_hub_runs_it_in_half_precision_and_on_videos(folders, kind):
    exact = value_of(loaded(folders[kind]), noise(prompt="a red circle"))
    video = noise(prompt="a red circle").media.expand(4, 3, 32, 32)
    entry = {"use": "suder", "model": folders[kind], "dtype": "bfloat16", "on_error": "raise"}
    with RewardHub(entry) as hub:
        hub.warmup()
        assert hub([Sample(media=video, prompt="a red circle")]).total.tolist() == pytest.approx(exact, abs=0.05)


def test_what_it_declares():
    traits = traits_of(build("suder", {"model": "anything"}))
    assert traits.deterministic and not traits.differentiable
    assert traits.media == {"image"} and traits.range is None


# ------------------------------------------------------------------------------------------------ errors


def refused(folder, pattern):
    with pytest.raises(RewardError, match=pattern) as caught:
        loaded(str(folder))
    assert "Salesforce/blip-image-captioning-large" in str(caught.value)


def test_without_a_model_the_error_says_what_to_give():
    with pytest.raises(RewardError, match="no model is given.*Salesforce/blip-image-captioning-large.*chat model"):
        RewardHub("suder").warmup()


def test_a_folder_that_is_not_there(tmp_path):
    refused(tmp_path / "none", "none does not exist")


def test_a_language_model_sees_nothing(tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = byte_tokenizer([])
    size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    save(tmp_path, LlamaForCausalLM(LlamaConfig(**size, vocab_size=len(tokenizer))), tokenizer)
    refused(tmp_path, "has no image_processor|has no tokenizer and no image_processor")


def test_clip_does_not_write(tmp_path):
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor

    size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = CLIPConfig(text_config={**size, "vocab_size": 400}, vision_config={**size, "image_size": 16})
    save(tmp_path, CLIPModel(config), CLIPProcessor(CLIPImageProcessor(), byte_tokenizer([])))
    refused(tmp_path, "cannot be loaded: Unrecognized configuration class")


def copy_of(folder, to, *without):
    """The folder's files without some of them."""
    import shutil

    shutil.copytree(folder, to, ignore=shutil.ignore_patterns(*without))
    return to


def test_a_missing_processor(folders, tmp_path):
    refused(copy_of(folders["blip"], tmp_path / "bare", "*processor*", "*token*"), "cannot be loaded|has no tokenizer")


def test_a_missing_chat_template(folders, tmp_path):
    refused(copy_of(folders["llava"], tmp_path / "mute", "chat_template*"), "has no chat template, and is none of the")


def test_weights_that_are_not_safetensors_are_refused(folders, tmp_path):
    """A pickle can run code."""
    from safetensors.torch import load_file

    folder = copy_of(folders["blip"], tmp_path / "pickled", "*.safetensors")
    torch.save(load_file(f"{folders['blip']}/model.safetensors"), folder / "pytorch_model.bin")
    refused(folder, "safetensors")


def test_a_template_that_rewrites_the_answer_is_a_bug(folders):
    """transformers itself only looks whether the answer is anywhere in the text, and "a" is in the instruction."""
    reward = loaded(folders["llava"])
    reward._processor.chat_template = LLAVA_TEMPLATE.replace("else part['text']", "else part['text'] | upper")
    reward._instruction = "what"
    with pytest.raises(RewardContractError, match="rewrites the answer 'a': it gives '.*ASSISTANT: A'"):
        reward.score([noise(prompt="a")])


@pytest.mark.parametrize("count", [0, -1, 1.5, True])
def test_max_tokens_is_a_whole_number(count):
    with pytest.raises(RewardError, match="max_tokens is .*; expected a whole number of at least 1"):
        SUDER(model="anything", max_tokens=count)


def test_unloaded_it_has_nothing_to_score_with(folders):
    reward = loaded(folders["blip"])
    reward.unload()
    assert reward._model is None and reward._processor is None
    with pytest.raises(RewardError, match=r"no weights yet; call load\(device, dtype\) first"):
        reward.score([noise()])
