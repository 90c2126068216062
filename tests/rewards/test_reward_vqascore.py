"""P(Yes) by tiny chat models and InstructBLIPs of the real classes, against forward passes by hand."""

import pytest
import torch

from rewards import RewardError, RewardHub, Sample, build, traits_of
from rewards._vlm import (
    _ROWS,
    _in_full,
    answers,
    asked,
    load_chat_model,
    load_vlm,
    next_token_logprobs,
    prepare,
    token_ids,
)
from rewards.vqascore import QUESTION, VQAScore
from tests.rewards.makers import noise
from tests.rewards.test_reward_suder import (
    bert_tokenizer,
    build_blip,
    build_llava,
    build_qwen,
    byte_tokenizer,
    copy_of,
    save,
)

PROMPTS = ["a red circle", "two blue squares left of a star", "a"]
CPU = torch.device("cpu")


# ------------------------------------------------------------------------------------------------ tiny models


def answering(folder, start):
    """A saved model that has tokens for its answers (two for Yes, one for No) and a template that starts them."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    model, processor = AutoModelForImageTextToText.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
    processor.tokenizer.add_tokens(["Yes", "No", "ĠYes"])
    processor.chat_template += f"{{% if add_generation_prompt %}}{{{{ {start!r} }}}}{{% endif %}}"
    model.resize_token_embeddings(len(processor.tokenizer), mean_resizing=False)
    return save(folder, model, processor)


def build_instructblip(folder, text_config):
    from transformers import (
        BlipImageProcessor,
        InstructBlipConfig,
        InstructBlipForConditionalGeneration,
        InstructBlipProcessor,
    )

    tokenizer = byte_tokenizer(["<image>", "Yes", "No"])
    size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    reader = bert_tokenizer()
    config = InstructBlipConfig(
        vision_config={**size, "image_size": 16, "patch_size": 8},
        qformer_config={**size, "vocab_size": len(reader), "max_position_embeddings": 128},
        text_config={**text_config, "vocab_size": len(tokenizer)},
        num_query_tokens=3,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
    )
    images = BlipImageProcessor(size={"height": 16, "width": 16})
    processor = InstructBlipProcessor(images, tokenizer, reader, num_query_tokens=3)
    model = InstructBlipForConditionalGeneration(config)
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.3 * torch.randn_like(weight)  # so that the picture's three tokens among many matter
    return save(folder, model, processor)


def build_t5(folder):
    """FlanT5's kind: it reads with one half and answers with the other."""
    return build_instructblip(folder, {
        "model_type": "t5", "d_model": 16, "d_ff": 32, "d_kv": 8, "num_layers": 2, "num_heads": 2,
        "decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 2,
    })  # fmt: skip


def build_vicuna(folder):
    return build_instructblip(folder, {
        "model_type": "llama", "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
        "num_attention_heads": 2,
    })  # fmt: skip


BUILDERS = {
    "llava": lambda folder: answering(build_llava(folder), "ASSISTANT:"),
    "qwen": lambda folder: answering(build_qwen(folder), "<|im_start|>assistant\n"),
    "t5": build_t5,
    "vicuna": build_vicuna,
}
AROUND = {
    "llava": "USER: <image>\n{} ASSISTANT:",
    "qwen": "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>{}<|im_end|>\n<|im_start|>assistant\n",
    "t5": "{}",
    "vicuna": "{}",
}


def tiny(folder):
    """For the conformance tests."""
    return {"model": build_t5(folder)}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return {name: make(tmp_path_factory.mktemp(name)) for name, make in BUILDERS.items()}


def loaded(folder, **options):
    reward = build("vqascore", {"model": str(folder), **options})
    reward.load(CPU, torch.float32)
    return reward


@pytest.fixture(scope="module", params=BUILDERS)
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def reward(folders, kind):
    return loaded(folders[kind])


def samples_of(prompts=PROMPTS):
    return [noise(i, 28 + 28 * (i % 2), prompt=prompt) for i, prompt in enumerate(prompts)]


# ------------------------------------------------------------------------------------------------ the score


def one_input(folder, kind, sample, question=QUESTION):
    """Model and inputs for one sample, without padding."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    model, processor = AutoModelForImageTextToText.from_pretrained(folder).eval(), AutoProcessor.from_pretrained(folder)
    text = AROUND[kind].format(question.replace("{prompt}", sample.prompt))
    inputs = processor(text=[text], images=[sample.media], do_rescale=False, return_tensors="pt")
    return model, processor.tokenizer, inputs


@torch.no_grad()
def by_hand(folder, kind, sample, question=QUESTION):
    """P(Yes) and P(No) from one forward pass."""
    model, tokenizer, inputs = one_input(folder, kind, sample, question)
    if kind == "t5":
        inputs["decoder_input_ids"] = torch.tensor([[0]])
    logits = model(**inputs).logits[0, -1]
    probabilities = logits.double().softmax(-1)
    vocabulary = tokenizer.get_vocab()
    yes = sum(probabilities[vocabulary[form]].item() for form in ("Yes", "ĠYes") if form in vocabulary)
    return yes, probabilities[vocabulary["No"]].item()


def test_it_is_the_probability_of_yes_for_each_sample(reward, folders, kind):
    """Of different sizes and lengths in one batch."""
    samples = samples_of()
    scores = reward.score(samples)
    expected = [by_hand(folders[kind], kind, sample) for sample in samples]
    assert scores.value.tolist() == pytest.approx([yes for yes, _ in expected], rel=1e-4)
    assert torch.equal(scores.parts["yes"], scores.value)
    ratios = [yes / (yes + no) for yes, no in expected]
    assert scores.parts["ratio"].tolist() == pytest.approx(ratios, rel=1e-4)
    assert min(abs(a - b) for a, b in zip(ratios, ratios[1:], strict=False)) > 1e-4
    assert torch.equal(loaded(folders[kind], ratio=True).score(samples).value, scores.parts["ratio"])


def test_it_is_exp_of_minus_the_models_own_loss(folders):
    """The cross-entropy of "Yes" as T5 takes it, one sample at a time."""
    reward = loaded(folders["t5"])
    for sample in samples_of():
        model, tokenizer, inputs = one_input(folders["t5"], "t5", sample)
        loss = model(**inputs, labels=torch.tensor([[tokenizer.convert_tokens_to_ids("Yes")]])).loss
        assert reward.score([sample]).value.item() == pytest.approx(loss.neg().exp().item(), rel=1e-4)


def test_a_batch_changes_nothing_and_keeps_the_order(reward):
    samples = samples_of()
    alone = [reward.score([sample]).value.item() for sample in samples]
    assert reward.score(samples).value.tolist() == pytest.approx(alone, rel=1e-4)
    assert reward.score(samples[::-1]).value.tolist() == pytest.approx(alone[::-1], rel=1e-4)


def test_white_space_around_a_prompt_is_not_asked(reward):
    bare, wide = (noise(0, 28, prompt=prompt) for prompt in ("a red circle", " \n a red circle\t\n"))
    assert reward.score([wide]).value.item() == pytest.approx(reward.score([bare]).value.item(), rel=1e-6)


@pytest.mark.parametrize("kind", ["t5", "vicuna"])
def test_the_q_former_reads_what_it_has_places_for_and_the_rest_reads_all(folders, kind):
    """128 here: the first 127 tokens and the end mark, by a forward pass of the model itself."""
    reward, samples = loaded(folders[kind]), samples_of()
    samples[1] = noise(1, 56, prompt=" ".join(["red"] * 200))
    model, tokenizer, inputs = one_input(folders[kind], kind, samples[1])
    for name in ("qformer_input_ids", "qformer_attention_mask"):
        assert inputs[name].shape[1] > 200
        inputs[name] = torch.cat([inputs[name][:, :127], inputs[name][:, -1:]], 1)
    start = {"decoder_input_ids": torch.tensor([[0]])} if kind == "t5" else {}
    with torch.no_grad():
        probabilities = model(**inputs, **start).logits[0, -1].double().softmax(-1)
    expected = probabilities[tokenizer.convert_tokens_to_ids("Yes")].item()
    assert reward.score([samples[1]]).value.item() == pytest.approx(expected, rel=1e-4)
    together = reward.score(samples).value.tolist()
    assert together == pytest.approx([reward.score([sample]).value.item() for sample in samples], rel=1e-4)


def test_the_template_is_filled_by_replacing(folders, kind):
    """So that braces in it, or in a prompt, are only braces."""
    template, sample = "{x} {prompt}? {", noise(0, 28, prompt="a {0} {circle}")
    score = loaded(folders[kind], template=template).score([sample]).value.item()
    assert score == pytest.approx(by_hand(folders[kind], kind, sample, template)[0], rel=1e-4)


def test_the_picture_and_the_prompt_matter(reward):
    first, second = (noise(i, 28, prompt="a red circle") for i in range(2))
    other = Sample(media=first.media, prompt="a blue star")
    values = reward.score([first, second, other]).value.tolist()
    assert len({round(value, 7) for value in values}) == 3


@pytest.mark.parametrize("shape", [(20, 33), (33, 20), (24, 24)])
def test_a_square_is_padded_with_the_mean_colour(folders, shape):
    media = torch.rand((3, *shape), generator=torch.Generator().manual_seed(0))
    reward, side = loaded(folders["t5"], square=True), max(shape)
    colour = torch.tensor(reward._processor.image_processor.image_mean)[:, None, None]
    canvas = colour.expand(3, side, side).clone()
    top, left = (side - shape[0]) // 2, (side - shape[1]) // 2
    canvas[:, top : top + shape[0], left : left + shape[1]] = media
    padded = reward.score([Sample(media=media, prompt="a star")]).value.item()
    plain = loaded(folders["t5"])
    assert padded == pytest.approx(plain.score([Sample(media=canvas, prompt="a star")]).value.item(), rel=1e-5)
    same = padded == pytest.approx(plain.score([Sample(media=media, prompt="a star")]).value.item(), rel=1e-5)
    assert same == (shape[0] == shape[1])


def test_the_hub_runs_it_in_half_precision_and_on_videos(reward, folders, kind):
    sample = noise(prompt="a red circle")
    exact = reward.score([sample]).value.tolist()
    entry = {"use": "vqascore", "model": folders[kind], "dtype": "bfloat16", "on_error": "raise"}
    with RewardHub(entry) as hub:
        hub.warmup()
        video = Sample(media=sample.media.expand(4, 3, 32, 32), prompt="a red circle")
        assert hub([video]).total.tolist() == pytest.approx(exact, rel=0.1)


def test_what_it_declares():
    traits = traits_of(build("vqascore", {"model": "anything"}))
    assert traits.deterministic and not traits.differentiable
    assert traits.range == (0.0, 1.0) and traits.card.options == ("model",)


# ------------------------------------------------------------------------------------------------ the words


def sentencepiece_like():
    """Words begin with ▁, as in T5 and Llama."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.Unigram([("<unk>", 0.0), ("▁Yes", -1.0), ("▁No", -1.0), ("No", -2.0), ("▁", -3.0)], 0))
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=made)


def bytes_of(words):
    """A byte-level BPE in which each of some words is one token."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    made.train_from_iterator(words * 9, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=made)


@pytest.mark.parametrize(
    ("make", "word", "texts"),
    [
        (lambda: bytes_of(["Yes", " Yes"]), "Yes", ["Yes", " Yes"]),
        (lambda: bytes_of(["Yes"]), "Yes", ["Yes"]),
        (sentencepiece_like, "Yes", ["Yes"]),
        (bert_tokenizer, "Yes", []),
    ],
)
def test_a_word_is_looked_for_with_a_space_before_it_and_without(make, word, texts):
    """What the tokenizer itself makes of each text is one token, and those are found."""
    tokenizer = make()
    expected = [tokenizer.encode(text, add_special_tokens=False) for text in texts]
    assert sorted(token_ids(tokenizer, word)) == sorted(one for (one,) in expected)


def test_both_forms_of_a_word_without_a_space_are_found():
    tokenizer = sentencepiece_like()
    assert tokenizer.convert_ids_to_tokens(token_ids(tokenizer, "No")) == ["No", "▁No"]


# ------------------------------------------------------------------------------------------------ shared helpers


def test_greedy_answers_are_those_of_one_token_after_another(folders):
    """In a batch, left padded; against argmax over single forward passes, which stop at the end token."""
    model, processor = load_chat_model("test", folders["llava"], "main", CPU, torch.float32)
    samples = samples_of()
    talks = [[asked(sample.prompt)] for sample in samples]
    inputs = prepare(processor, [[sample.media] for sample in samples], talks)
    assert inputs["attention_mask"][:, 0].tolist() == [0, 1, 0]
    made = answers(model, processor, inputs, max_tokens=4)
    for sample, (text, whole) in zip(samples, made, strict=True):
        _, tokenizer, one = one_input(folders["llava"], "llava", sample, "{prompt}")
        ids, count = one["input_ids"], one["input_ids"].shape[1]
        for _ in range(4):
            with torch.no_grad():
                best = model(input_ids=ids, pixel_values=one["pixel_values"]).logits[0, -1].argmax()
            ids = torch.cat([ids, best.view(1, 1)], 1)
            if best == model.generation_config.eos_token_id:
                break
        assert text == tokenizer.decode(ids[0, count:], skip_special_tokens=True).strip()
        assert whole == (ids[0, -1] == model.generation_config.eos_token_id)


def test_greedy_answers_of_an_encoder_decoder_have_only_what_is_new(folders):
    from transformers import AutoModelForImageTextToText, AutoProcessor

    model = AutoModelForImageTextToText.from_pretrained(folders["t5"]).eval()
    processor = AutoProcessor.from_pretrained(folders["t5"])
    inputs = prepare(processor, [[noise(0, 16).media]], ["a red circle"], padding_side="right")
    first = next_token_logprobs(model, inputs)[0].argmax()
    assert answers(model, processor, inputs, max_tokens=1) == [(processor.tokenizer.decode([first]).strip(), False)]


@pytest.mark.parametrize("kind", BUILDERS)
def test_half_precision_does_not_round_the_logits(folders, kind):
    """The state before the last layer, taken from a plain forward pass, and that layer in fp64."""
    model, processor = load_vlm("test", folders[kind], "main", CPU, torch.bfloat16)
    talk = [asked("a star")] if kind in ("llava", "qwen") else "a star"
    inputs = prepare(processor, [[noise(0, 28).media]], [talk])
    start = {"decoder_input_ids": torch.tensor([[0]])} if kind == "t5" else {}
    last, states = model.get_output_embeddings(), []
    hook = last.register_forward_pre_hook(lambda _, args: states.append(args[0]))
    with torch.no_grad():
        rounded = model(**inputs.to(CPU, torch.bfloat16), **start).logits[:, -1]
    hook.remove()
    expected = (states[0][:, -1].double() @ last.weight.double().T).log_softmax(-1).float()
    torch.testing.assert_close(next_token_logprobs(model, inputs), expected, rtol=0, atol=1e-4)
    assert (rounded.float().log_softmax(-1) - expected).abs().max() > 1e-3
    assert not last._forward_hooks  # other uses of the model are as they were


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_large_vocabulary_is_gone_through_in_parts(bias, dtype):
    layer = torch.nn.Linear(8, 2 * _ROWS + 5, bias=bias, dtype=dtype)
    state = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    made = _in_full(layer, (state,), torch.empty(0))
    expected = torch.nn.functional.linear(state[:, -1:].double(), *(p.double() for p in layer.parameters()))
    assert made.shape == (2, 1, 2 * _ROWS + 5)
    assert made.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(made.double(), expected, rtol=0, atol=1e-5)


def test_log_probabilities_are_of_the_whole_vocabulary(folders):
    model, processor = load_chat_model("test", folders["qwen"], "main", CPU, torch.float32)
    inputs = prepare(processor, [[noise(0, 28).media, noise(1, 28).media]], [[asked("a star", pictures=2)]])
    logprobs = next_token_logprobs(model, inputs)
    assert logprobs.shape == (1, model.config.get_text_config().vocab_size)
    assert logprobs.exp().sum().item() == pytest.approx(1, abs=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(logprobs, model(**inputs).logits[:, -1].log_softmax(-1))


# ------------------------------------------------------------------------------------------------ verdicts and errors


@pytest.mark.parametrize(("prompt", "why"), [(" \n", "the prompt is empty"), ("a </s> b", "has '</s>' in it")])
def test_a_prompt_that_cannot_be_asked_has_no_verdict(reward, prompt, why):
    samples = [noise(0, 28, prompt=prompt), noise(1, 28, prompt="a red circle")]
    scores = reward.score(samples)
    assert scores.value.isnan().tolist() == scores.parts["ratio"].isnan().tolist() == [True, False]
    assert why in scores.info[0]["error"] and not scores.info[1]
    assert scores.value[1].item() == pytest.approx(reward.score(samples[1:]).value.item(), rel=1e-4)
    assert reward.score(samples[:1]).value.isnan().all()


def test_a_template_without_a_place_for_the_prompt_is_refused():
    with pytest.raises(RewardError, match=r"expected a question with \{prompt\} in it"):
        VQAScore(model="anything", template="Is it good?")


def refused(folder, pattern):
    with pytest.raises(RewardError, match=pattern) as caught:
        loaded(folder)
    assert "Salesforce/instructblip-flan-t5-xl" in str(caught.value)


def test_without_a_model_the_error_says_what_to_give():
    with pytest.raises(RewardError, match="no model is given.*Salesforce/instructblip-flan-t5-xl"):
        RewardHub("vqascore").warmup()


def test_a_folder_that_is_not_there(tmp_path):
    refused(tmp_path / "none", "none does not exist")


def test_a_model_that_cannot_say_yes(tmp_path):
    refused(build_blip(tmp_path), "has no token for Yes")


def test_a_model_that_lacks_weights_is_refused(folders, tmp_path):
    """Left to itself, transformers would draw them at random."""
    from safetensors.torch import load_file, save_file

    folder = copy_of(folders["llava"], tmp_path / "part")
    tensors = load_file(f"{folder}/model.safetensors")
    lacking = {name: value for name, value in tensors.items() if "layers.1.mlp" not in name}
    assert len(lacking) < len(tensors)
    save_file(lacking, f"{folder}/model.safetensors", {"format": "pt"})
    refused(folder, "no checkpoint of LlavaForConditionalGeneration: it lacks 7 weights")


def test_a_chat_model_needs_a_template(folders):
    with pytest.raises(RewardError, match="'judge': .*InstructBlip.* has no chat template"):
        load_chat_model("judge", folders["t5"], "main", CPU, torch.float32)


def test_unloaded_it_has_nothing_to_score_with(folders):
    reward = loaded(folders["t5"])
    reward.unload()
    with pytest.raises(RewardError, match="no weights yet"):
        reward.score([noise()])
