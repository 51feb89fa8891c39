"""The judge on this machine: Qwen2.5-VL's own classes, tiny and random, with a tokenizer of letters."""

import json
from pathlib import Path

import pytest
import torch
from evaluation_files import image
from peft import LoraConfig, get_peft_model
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2Tokenizer,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
)

from mige.evaluation.judges import local
from mige.evaluation.judges.judge import JudgeError
from mige.evaluation.judges.local import LocalJudge

TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
NAMES = ["endoftext", "im_start", "im_end", "vision_start", "vision_end", "image_pad", "video_pad"]
SPECIAL = [f"<|{name}|>" for name in NAMES]


def save_judge(folder: Path) -> Path:
    """A Qwen2.5-VL of two layers with random weights and its processor, as `from_pretrained` reads them."""
    letters = sorted(ByteLevel.alphabet())
    vocabulary = {word: n for n, word in enumerate([*letters, *SPECIAL])}
    tokenizer = Qwen2Tokenizer(vocab=vocabulary, merges=[], additional_special_tokens=SPECIAL[1:])
    ids = {word: tokenizer.convert_tokens_to_ids(word) for word in SPECIAL}
    processor = Qwen2_5_VLProcessor(
        image_processor=Qwen2VLImageProcessor(min_pixels=28 * 28, max_pixels=56 * 56),
        tokenizer=tokenizer,
        video_processor=Qwen2VLVideoProcessor(),
        chat_template=TEMPLATE,
    )
    processor.save_pretrained(folder)
    text = {"vocab_size": len(vocabulary), "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    text |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 8192}
    text |= {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}}
    vision = {"depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 4, "out_hidden_size": 32,
              "fullatt_block_indexes": [1], "window_size": 56}  # fmt: skip
    named = {"image_token_id": ids["<|image_pad|>"], "video_token_id": ids["<|video_pad|>"]}
    named |= {"vision_start_token_id": ids["<|vision_start|>"], "vision_end_token_id": ids["<|vision_end|>"]}
    config = Qwen2_5_VLConfig(text_config=text, vision_config=vision, **named)
    config.text_config.eos_token_id = ids["<|im_end|>"]
    torch.manual_seed(0)
    model = Qwen2_5_VLForConditionalGeneration(config)
    for weight in model.parameters():
        weight.data *= 1 if weight.ndim == 1 else 15  # or images would hardly matter
    model.generation_config.eos_token_id = ids["<|im_end|>"]
    model.generation_config.pad_token_id = ids["<|endoftext|>"]
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return save_judge(tmp_path_factory.mktemp("judge"))


@pytest.fixture
def short(monkeypatch):
    monkeypatch.setattr(local, "MAX_TOKENS", 12)


def test_a_reply_is_the_likeliest_tokens(folder, short):
    """Against the model itself, token by token; the text before the reply is not part of it."""
    judge = LocalJudge(str(folder), dtype=torch.float32)
    reply = judge.ask("rate it", [image(0), image(1)], 0)
    content = [{"type": "image", "image": image(n)} for n in range(2)] + [{"type": "text", "text": "rate it"}]
    chat, wanted = [{"role": "user", "content": content}], {"return_dict": True, "return_tensors": "pt"}
    inputs = judge.processor.apply_chat_template(chat, tokenize=True, add_generation_prompt=True, **wanted)
    ids, said = inputs.pop("input_ids"), []
    inputs.pop("attention_mask")
    types = inputs.pop("mm_token_type_ids", None)
    with torch.inference_mode():
        for _ in range(12):
            more = {} if types is None else {"mm_token_type_ids": torch.nn.functional.pad(types, (0, len(said)))}
            token = judge.model(input_ids=ids, use_cache=False, **inputs, **more).logits[0, -1].argmax()
            ids, said = torch.cat([ids, token.view(1, 1)], 1), [*said, int(token)]
    assert (ids == judge.model.config.image_token_id).sum() >= 2
    assert reply.text == judge.processor.tokenizer.decode(said, skip_special_tokens=True).strip()
    assert reply.stop == "length"
    assert judge.ask("rate it", [image(0), image(1)], 5) == reply  # nothing is drawn at temperature 0
    assert judge.ask("rate it", [image(0), image(2)], 0) != reply  # images matter
    assert judge.ask("rate it", [image(1), image(0)], 0) != reply  # and their order


def test_repetitions_seed_what_is_drawn(folder, short):
    judge = LocalJudge(str(folder), dtype=torch.float32, temperature=1.0)
    torch.manual_seed(3)
    before = torch.random.get_rng_state()
    first, second = (judge.ask("rate it", [image(0)], repetition) for repetition in (0, 1))
    assert first != second and judge.ask("rate it", [image(0)], 0) == first
    assert torch.equal(torch.random.get_rng_state(), before)


def test_adapters_are_merged_and_told(folder, tmp_path, short):
    torch.manual_seed(1)
    base = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    tuned = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    tuned.save_pretrained(tmp_path / "adapter")
    plain, other = LocalJudge(str(folder)), LocalJudge(str(folder), str(tmp_path / "adapter"))
    assert plain.fingerprint != other.fingerprint == LocalJudge(str(folder), str(tmp_path / "adapter")).fingerprint
    assert not any("lora" in key for key in other.model.state_dict())
    assert other.settings["judge"] == f"{folder} with {tmp_path / 'adapter'}"
    assert other.settings["precision"] == "bfloat16" and other.settings["temperature"] == "0"


def test_files_that_are_no_judge(folder, tmp_path):
    with pytest.raises(JudgeError, match=r"--judge .*nowhere"):
        LocalJudge(str(tmp_path / "nowhere"))
    with pytest.raises(JudgeError, match="--adapter"):
        LocalJudge(str(folder), str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "t5"}))
    with pytest.raises(JudgeError, match="vision-language"):
        LocalJudge(str(tmp_path))
