"""Configs: what a file may say, what it may not, and that the message names the key at fault."""

import dataclasses
import re
from pathlib import Path

import pytest

from mige import config
from mige.config import ConfigError
from mige.models.build import PARTS, build_parts

CONFIGS = Path(__file__).parents[2] / "configs"
TINY = CONFIGS / "tiny.py"


def write(folder: Path, text: str) -> Path:
    """A config on top of tiny.py."""
    file = folder / "mine.py"
    file.write_text(f"_base_ = {str(TINY)!r}\n{text}\n")
    return file


@pytest.mark.parametrize("file", sorted(CONFIGS.glob("[!b]*.py")), ids=lambda file: file.stem)
def test_every_config_builds(file):
    loaded = config.load(file)
    assert tuple(build_parts(loaded.model, device="meta")) == PARTS


def test_sections_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.load(TINY).model = None


def test_inheritance(tmp_path):
    """A file changes what it names and keeps the rest, through two levels of bases."""
    model = config.load(write(tmp_path, "model = dict(text_encoder=dict(num_layers=7))")).model
    assert model.text_encoder["num_layers"] == 7
    assert model.text_encoder["d_model"] == 40  # tiny.py
    assert model.text_encoder["feed_forward_proj"] == "gated-gelu"  # base.py
    assert config.load(TINY).model.text_encoder["num_layers"] == 3


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3", 3),
        ("0.5", 0.5),
        ("True", True),
        ("None", None),
        ("[1, 2]", [1, 2]),
        ("'7'", "7"),
        ("float32", "float32"),
        ("", ""),
        ("a=b", "a=b"),
    ],
)
def test_override_values_are_typed(text, value):
    got = config.load(TINY, [f"model.fusion.vision_dtype={text}"]).model.fusion["vision_dtype"]
    assert got == value and type(got) is type(value)


def test_later_overrides_win():
    overrides = ["model.transformer.num_layers=1", "model.transformer.num_layers=4"]
    assert config.load(TINY, overrides).model.transformer["num_layers"] == 4


@pytest.mark.parametrize(
    "override",
    [
        "model.transformer.num_layer=1",
        "model.transformr.num_layers=1",
        "modell.transformer.num_layers=1",
        "num_layers=1",
        "model.transformer.num_layers.x=1",
        "model.transformer.num_layers",
        "=1",
        "",
    ],
)
def test_only_an_existing_key_is_overridden(override):
    with pytest.raises(ConfigError) as error:
        config.load(TINY, [override])
    assert f"cannot override {override!r}" in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("trainer = dict(lr=1)", r"unknown key\(s\) \['trainer'\]; known are \[.*'model'"),
        ("data = dict(sise=1)", r"data: unknown key\(s\) \['sise'\]; known are .*'size'"),
        ("train = dict(step=1)", r"train: unknown key\(s\) \['step'\]; known are .*'steps'"),
        ("model = dict(vea=dict())", r"model: unknown key\(s\) \['vea'\]; known are .*'vae'"),
        ("model = dict(_delete_=True, vae=dict(latent_channels=4))", r"missing key\(s\) .*'fusion', 'image_encoder'"),
        ("model = dict(qformer=dict(_delete_=True, hidden_size=32))", "lacks the key 'encoder_hidden_size'"),
        ("model = 3", "model: expected a dict, got int"),
        ("model = dict(", "cannot be read: SyntaxError"),
        ("model = dict(vae=1 / 0)", "cannot be read: ZeroDivisionError"),
    ],
)
def test_faulty_files(tmp_path, text, message):
    with pytest.raises(ConfigError, match=message) as error:
        config.load(write(tmp_path, text))
    if "lacks" not in message:
        assert "mine.py" in str(error.value)


def test_missing_files(tmp_path):
    with pytest.raises(ConfigError, match=r"nope\.py: no such config file"):
        config.load(tmp_path / "nope.py")
    (tmp_path / "mine.py").write_text("_base_ = 'nope.py'")
    with pytest.raises(ConfigError, match=r"mine\.py: cannot be read.*nope\.py"):
        config.load(tmp_path / "mine.py")
    (tmp_path / "empty.py").write_text("")
    with pytest.raises(ConfigError, match=r"empty\.py: missing key\(s\) \[.*'model'"):
        config.load(tmp_path / "empty.py")


@pytest.mark.parametrize(
    ("override", "names"),
    [
        ("model.transformer.in_channels=4", ("transformer.in_channels is 4", "is 8")),
        ("model.transformer.out_channels=4", ("transformer.out_channels is 4", "is 8")),
        ("model.transformer.attention_head_dim=8", ("transformer.cross_attention_dim is 64", "is 32")),
        ("model.fusion.patch_width=32", ("fusion.patch_width is 32", "is 64")),
        ("model.fusion.width=16", ("fusion.width is 16", "qformer.hidden_size is 32")),
        ("model.fusion.text_width=41", ("fusion.text_width is 41", "text_encoder.d_model is 40")),
        ("model.transformer.caption_channels=41", ("caption_channels is 41", "text_encoder.d_model is 40")),
        ("model.image_encoder.hidden_size=52", ("qformer.encoder_hidden_size is 48", "is 52")),
        ("model.vae.latent_channels=16", ("transformer.in_channels is 8", "is 32")),
    ],
)
def test_contradictory_widths(override, names):
    with pytest.raises(ConfigError) as error:
        config.load(TINY, [override])
    assert all(name in str(error.value) for name in names), error.value


@pytest.mark.parametrize("section", PARTS)
def test_an_unknown_key_of_a_library_is_refused(tmp_path, section):
    loaded = config.load(write(tmp_path, f"model = dict({section}=dict(num_layerz=1))"))
    with pytest.raises(ConfigError, match=rf"model\.{section}: .*num_layerz"):
        build_parts(loaded.model, device="meta", only=[section])


@pytest.mark.parametrize(
    "override",
    [
        "model.transformer.num_layers=many",
        "model.transformer.norm_type=odd",
        "model.image_encoder.num_attention_heads=5",
        "model.qformer.num_attention_heads=5",
        "model.text_encoder.d_ff=wide",
        "model.fusion.num_heads=5",
        "model.vae.act_fn=odd",
    ],
)
def test_a_value_a_library_refuses_is_named(override):
    section = override.split(".")[1]
    with pytest.raises(ConfigError, match=rf"model\.{section}: "):
        build_parts(config.load(TINY, [override]).model, device="meta", only=[section])
    with pytest.raises(ConfigError, match=rf"model\.{section}: expected a dict, got 3"):
        config.load(TINY, [f"model.{section}=3"])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ("data.sets=[{'weight': 1.0}]", "data.sets[0]: missing key(s) ['file']"),
        ("data.sets=[{'file': 'a.json'}]", "data.sets[0]: missing key(s) ['weight']"),
        (
            "data.sets=[{'file': 'a.json', 'weight': 1.0}, {'file': 'b.json', 'weight': 1.0, 'wieght': 2.0}]",
            "data.sets[1]: unknown key(s) ['wieght']; known are ['file', 'root', 'task', 'weight']",
        ),
        ("data.world={'add': 1.0}", "data.world draws its own images: leave data.sets empty"),
        ("data.world={'add': 1.0} data.sets=[] data.features=store", "data.world draws its own images"),
        ("train.optimizer=adam", "train.optimizer is 'adam', expected one of adamw, adamw_8bit, muon"),
        ("train.precision=float16", "train.precision is 'float16', expected one of auto, float32, mixed, bfloat16"),
        (
            "train.trainable=most",
            "trainable is 'most', expected one of full, text_encoder_frozen, dit, lora, all",
        ),
        (
            "train.gradient_checkpointing=['transformer','vae']",
            "train.gradient_checkpointing is 'vae', expected one of transformer, text_encoder",
        ),
        ("train.steps=0", "train.steps is 0, expected at least 1"),
        ("train.steps=10.5", "train.steps is 10.5, expected a whole number"),
        ("train.steps=True", "train.steps is True, expected a whole number"),
        ("train.compile=transformer", "train.compile is 'transformer', expected a list, such as ['transformer']"),
        ("train.trackers=tensorboard", "train.trackers is 'tensorboard', expected a list, such as ['tensorboard']"),
        ("train.sample_records=[1]", "train.sample_records[0] is 1, expected a text"),
        ("train.learning_rate=high", "train.learning_rate is 'high', expected a number"),
        ("train.learning_rate=0", "train.learning_rate is 0, expected a number above 0"),
        ("train.max_grad_norm=None", "train.max_grad_norm is None, expected a number"),
        ("train.ema=1", "train.ema is 1, expected None or a number between 0 and 1"),
        ("train.betas=[0.9]", "train.betas is [0.9], expected two numbers from 0 to below 1"),
        ("train.warmup=-1", "train.warmup is -1, expected at least 0"),
        ("train.seed=4294967296", "train.seed is 4294967296, expected 0 to 4294967295"),
        ("train.seed=-1", "train.seed is -1, expected 0 to 4294967295"),
        ("train.pretrained=3", "train.pretrained is 3, expected a text, or None"),
        ("data.skip_bad=1", "data.skip_bad is 1, expected True or False"),
        ("data.drop_text=1.5", "data.drop_text is 1.5, expected 0 to 1"),
        ("data.workers=-1", "data.workers is -1, expected at least 0"),
        ("data.sets=train.jsonl", "data.sets is 'train.jsonl', expected a list"),
        ('data.sets=[dict(file="a.jsonl")]', 'expected a list of plain values; a dict is written {"file": "a.jsonl"}'),
        ("data.sets=['train.jsonl']", "data.sets[0] is 'train.jsonl', expected a dict"),
        (
            "data.sets=[{'file': 'a', 'weight': 'x'}]",
            "data.sets[0].weight is 'x', expected a number above 0, or a fraction",
        ),
        ("data.world={'add': 0} data.sets=[]", "data.world.add is 0, expected a number above 0"),
        ("train.optimizer=muon train.precision=bfloat16", "'bfloat16', but train.optimizer is 'muon'"),
        ("train.param_dtype=bfloat16", "train.param_dtype is now train.precision"),
        ("train.optimizer=adamw_8bit train.precision=bfloat16", "'bfloat16', but train.optimizer is 'adamw_8bit'"),
        ("train.trainable=lora train.optimizer=muon", "'muon', which trains whole matrices: use adamw with 'lora'"),
        ("train.accumulate=2", "train.accumulate is now train.gradient_accumulation_steps"),
        ("train.clip=2", "train.clip is now train.max_grad_norm"),
        ("train.batch_size=0", "train.batch_size is 0, expected at least 1"),
        ("train.gradient_accumulation_steps=-1", "train.gradient_accumulation_steps is -1, expected at least 1"),
        (f"train.learning_rate={10**400}", f"train.learning_rate is {10**400}, expected a number"),
        ("train.noise_levels=0", "train.noise_levels is 0, expected at least 1"),
        ("train.log_every=0", "train.log_every is 0, expected at least 1"),
        ("train.checkpoint_every=0", "train.checkpoint_every is 0, expected at least 1"),
        ("train.keep_checkpoints=0", "train.keep_checkpoints is 0, expected at least 1"),
        ("train.pretrained=None", "train.pretrained is None: fresh weights need train.tokenizer"),
        ("train.pretrained=None train.tokenizer=t train.trainable=lora", "'lora', but train.pretrained is None"),
        ("train.trainable=lora train.ema=0.9", "train.ema averages whole models; set it to None for 'lora'"),
        ("train.sample_records=[]", "train.sample_every is set, but train.sample_records names no file"),
    ],
)
def test_contradictory_training(overrides, message):
    """Overrides are applied one after the other and checked together."""
    with pytest.raises(ConfigError) as error:
        config.load(TINY, _split(overrides))
    assert message in str(error.value)


def test_former_keys_of_a_file_are_named(tmp_path):
    (tmp_path / "old.py").write_text(f"_base_ = {str(TINY)!r}\ntrain = dict(weights='float32')\n")
    with pytest.raises(ConfigError, match="train: the key 'weights' is now 'precision'"):
        config.load(tmp_path / "old.py")


@pytest.mark.parametrize(
    "overrides",
    [
        "data.sets=[{'file': 'a.json', 'weight': 0.5, 'root': '.', 'task': 'edit'}]",
        "data.world={'add': 1.0} data.sets=[]",
        "train.pretrained=None train.tokenizer=t",
        "train.trainable=lora",
        "train.trainable=lora train.precision=bfloat16",
        "train.seed=4294967295",
        "train.learning_rate=1",
        "train.ema=0.9",
        "train.precision=bfloat16",
        "train.sample_every=0 train.sample_records=[]",
        "train.gradient_checkpointing=['transformer','text_encoder']",
    ],
)
def test_what_the_contradictions_are_apart_from_is_accepted(overrides):
    config.load(TINY, _split(overrides))


def _split(overrides: str) -> list[str]:
    return re.split(r" (?=data\.|train\.)", overrides)
