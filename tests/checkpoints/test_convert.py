"""Official files -> our parts: every key accounted for, every bit compared, every kind of wrong file refused."""

import pickle
import random
import shutil
import sys
import zipfile
from collections import Counter
from pathlib import Path

import pytest
import torch
from conftest import ROOT, release_arguments
from golden import CONFIG, FIXTURES, OVERRIDES, golden_state
from processes import run_program
from safetensors.torch import load_file, save_file
from transformers import T5EncoderModel

from mige import config
from mige.checkpoints import convert, key_map, official_files
from mige.checkpoints.errors import CheckpointError
from mige.cli import convert_checkpoint
from mige.models.build import PARTS, build_parts

TOOL = ROOT / "tools" / "convert_checkpoint.py"
TINY = config.load(CONFIG)


def official_keys() -> dict[str, tuple[int, ...]]:
    lines = (FIXTURES / "official_keys.tsv").read_text().splitlines()[1:]
    return {key: tuple(map(int, shape.split("x"))) for key, shape, *_ in (line.split("\t") for line in lines)}


def count(shape: tuple[int, ...]) -> int:
    return torch.Size(shape).numel()


@pytest.fixture(scope="module")
def full_size():
    return build_parts(config.load(ROOT / "configs" / "mige_512.py").model, device="meta")


@pytest.fixture(scope="module")
def released(official_dir) -> dict[str, torch.Tensor]:
    return torch.load(official_dir / "model.pth", weights_only=True)["state_dict"]


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a, b)


# ---- the table


def test_the_keys_of_the_full_size(full_size):
    want = official_keys()
    assert len(want) == 1451
    assert key_map.official_shapes(full_size) == want
    tied = "t5_model.encoder.embed_tokens.weight"
    assert sum(count(shape) for key, shape in want.items() if key != tied) == 6_476_124_448


def test_the_values_of_the_full_size(full_size):
    """The parts hold what the file holds, and besides only EVA's key biases, zeros which the file leaves out."""
    stored = [p for name, part in full_size.items() if name != "vae" for p in part.parameters()]
    ours = sum(p.numel() for p in stored) + full_size["fusion"].null_context.numel()
    tables = sum(count(shape) for key, shape in official_keys().items() if key in ("pos_embed", key_map.POSITION_IDS))
    assert ours == 6_476_124_448 - tables + 39 * 1408


@pytest.mark.parametrize("size", ["full", "tiny"])
def test_every_key_once(full_size, size):
    """Each of our tensors has one piece; each official tensor's rows go out once, and none is left over."""
    parts = full_size if size == "full" else build_parts(TINY.model, device="meta")
    table = list(key_map.key_mappings(parts))
    ours = [(name, key) for name, part in parts.items() if name != "vae" for key in part.state_dict()]
    assert sorted((p.part, p.key) for p in table) == sorted(ours)
    used = Counter((name, p.rows) for p in table for name in p.official)
    assert set(used.values()) == {1}
    rows: dict[str, list] = {}
    for name, which in used:
        rows.setdefault(name, []).append(which)
    for name, which in rows.items():
        n = 3 if name.endswith(("attn.qkv.weight", "attn.qkv.bias")) and "visual" not in name else 1
        n = 2 if "kv_linear" in name else n
        assert which == ([(i, n) for i in range(n)] if n > 1 else [None]), name
    assert rows.keys() | {"pos_embed", key_map.POSITION_IDS} == key_map.official_shapes(parts).keys()


def test_a_part_the_release_does_not_have_is_named():
    parts = {"fusion": torch.nn.ModuleDict({"surprise": torch.nn.Linear(1, 1)})}
    with pytest.raises(CheckpointError, match=r"fusion/surprise\.weight"):
        list(key_map.key_mappings(parts))


# ---- values


@pytest.fixture(scope="module")
def golden():
    """The golden state and the parts filled with it."""
    parts = build_parts(config.load(CONFIG, OVERRIDES).model, device="meta")
    state = golden_state(parts)
    key_map.load_official(parts, state)
    return parts, state


def test_there_and_back(golden):
    parts, state = golden
    back = key_map.to_official(parts)
    assert back.keys() == state.keys()
    computed = {"pos_embed", key_map.POSITION_IDS}  # the golden rule gives random numbers for these
    assert [key for key in state.keys() - computed if not same(back[key], state[key])] == []
    assert same(back[key_map.POSITION_IDS], torch.arange(16)[None])


def test_split_and_joined_tensors(golden):
    """Against slices by hand, at the tiny widths: the DiT's is 64, EVA's 48."""
    parts, state = golden
    dit, vision = parts["transformer"].state_dict(), parts["image_encoder"].state_dict()
    for i in range(2):
        for kind in ("weight", "bias"):
            qkv, kv = state[f"blocks.{i}.attn.qkv.{kind}"], state[f"blocks.{i}.cross_attn.kv_linear.{kind}"]
            block = f"transformer_blocks.{i}"
            assert same(dit[f"{block}.attn1.to_q.{kind}"], qkv[0:64])
            assert same(dit[f"{block}.attn1.to_k.{kind}"], qkv[64:128])
            assert same(dit[f"{block}.attn1.to_v.{kind}"], qkv[128:192])
            assert same(dit[f"{block}.attn2.to_k.{kind}"], kv[0:64])
            assert same(dit[f"{block}.attn2.to_v.{kind}"], kv[64:128])
            assert same(dit[f"{block}.attn2.to_q.{kind}"], state[f"blocks.{i}.cross_attn.q_linear.{kind}"])
        bias = vision[f"encoder.layers.{i}.self_attn.qkv.bias"]
        assert same(bias[:48], state[f"visual_encoder.blocks.{i}.attn.q_bias"])
        assert same(bias[48:96], torch.zeros(48))
        assert same(bias[96:], state[f"visual_encoder.blocks.{i}.attn.v_bias"])
        qkv = vision[f"encoder.layers.{i}.self_attn.qkv.weight"]
        assert same(qkv, state[f"visual_encoder.blocks.{i}.attn.qkv.weight"])


def test_the_text_embedding_is_one_tensor(golden):
    encoder = golden[0]["text_encoder"]
    assert encoder.shared.weight is encoder.encoder.embed_tokens.weight


# ---- the release


@pytest.fixture
def release(released, official_dir, tmp_path):
    """`release(changes, without=..., dtype=...)` writes a model.pth and reads it: parts and report."""

    def read(changes=(), without=(), dtype=None, **beside):
        state = {key: value for key, value in released.items() if key not in without} | dict(changes)
        if dtype:
            state = {key: value.to(dtype) if value.is_floating_point() else value for key, value in state.items()}
        torch.save({"state_dict": state, **beside}, tmp_path / "model.pth")
        return convert.from_release(TINY, tmp_path / "model.pth", official_dir / "vae")

    return read


def test_the_release_end_to_end(official_dir, tiny_model, released):
    """The folder the tool wrote holds the official file's values, and the parts they were made from."""
    parts, report = convert.from_release(TINY, official_dir / "model.pth", official_dir / "vae")
    torch.manual_seed(0)
    made = build_parts(TINY.model)  # as tools/make_tiny_checkpoint.py made them
    for name in PARTS:
        want, got = made[name].state_dict(), parts[name].state_dict()
        assert got.keys() == want.keys()
        assert [key for key in want if not same(got[key], want[key])] == []
        (file,) = (tiny_model / name).glob("*.safetensors")
        assert all(same(value, want[key]) for key, value in load_file(file).items())
    assert all(same(value, released[key]) for key, value in key_map.to_official(parts).items())
    assert len(report) == len(set(report)) and all(any(key in line for line in report) for key in released)


def test_bfloat16_stays_and_the_optimizer_is_not_read(release, released):
    optimizer = {"state": {0: {"exp_avg": torch.full((9,), torch.nan)}}, "param_groups": [{"lr": 1e-5, "params": [0]}]}
    parts, _ = release(dtype=torch.bfloat16, optimizer=optimizer, scheduler={"last_epoch": 3}, epoch=3)
    for name in PARTS:
        dtypes = {tensor.dtype for tensor in parts[name].state_dict().values()}
        assert dtypes == {torch.float32 if name == "vae" else torch.bfloat16}, name
    back = key_map.to_official(parts)
    for key, value in released.items():
        if key != "pos_embed" and value.is_floating_point():
            assert same(back[key], value.bfloat16()), key


def test_all_faulty_keys_in_one_message(release):
    changes = {
        "extra.a": torch.ones(2),
        "blocks.2.attn.qkv.bias": torch.ones(192),
        "t5_proj.bias": torch.ones(41),
        "blocks.0.attn.qkv.weight": torch.ones(64, 192),
    }
    with pytest.raises(CheckpointError) as error:
        release(changes, without=["query_tokens", "FFM.mlp.weight"])
    first, *lines = str(error.value).splitlines()
    assert first.endswith("6 of its keys do not fit the config; is it the right file?") and "model.pth" in first
    assert sorted(line.strip() for line in lines) == [
        "missing: FFM.mlp.weight [32, 32]",
        "missing: query_tokens [1, 3, 32]",
        "shape mismatch: blocks.0.attn.qkv.weight is [64, 192], expected [192, 64]",
        "shape mismatch: t5_proj.bias is [41], expected [40]",
        "unexpected: blocks.2.attn.qkv.bias [192]",
        "unexpected: extra.a [2]",
    ]


def test_computed_buffers_are_compared(release, released):
    table, ids = released["pos_embed"], key_map.POSITION_IDS
    wrong = table.clone()
    wrong[0, 5, 7] += 0.1
    for bad in (wrong, table.flip(1), torch.full_like(table, torch.nan)):
        with pytest.raises(CheckpointError, match=r"model\.pth: pos_embed is not the sine-cosine table"):
            release({"pos_embed": bad})
    with pytest.raises(CheckpointError, match=r"position_ids does not count"):
        release({ids: released[ids].flip(1)})
    other = released["t5_model.shared.weight"].clone()
    other[3, 4] += 1e-3
    with pytest.raises(CheckpointError, match="two copies of T5's embedding differ"):
        release({"t5_model.encoder.embed_tokens.weight": other})


# ---- files that are no state dict


class Evil:
    def __init__(self, path: Path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


@pytest.mark.parametrize("kind", ["zip", "legacy", "pickle"])
def test_a_pickle_that_carries_code(tmp_path, kind):
    file, trace = tmp_path / "model.pth", tmp_path / "trace"
    data = {"state_dict": {"a": torch.ones(2)}, "epoch": Evil(trace)}
    if kind == "pickle":
        file.write_bytes(pickle.dumps({"epoch": Evil(trace)}, protocol=2))
    else:
        torch.save(data, file, _use_new_zipfile_serialization=kind == "zip")
    with pytest.raises(CheckpointError, match=r"model\.pth: refused, it holds more than tensors") as error:
        official_files.read_weights(file, "state_dict")
    assert not trace.exists()
    assert "weights_only" not in str(error.value)  # torch's own message advises to switch the protection off
    if kind == "zip":  # the file is a working weapon
        torch.load(file, weights_only=False)["epoch"].close()
        assert trace.exists()


def test_the_legacy_format_is_read(tmp_path):
    torch.save({"state_dict": {"a": torch.arange(6.0)}}, tmp_path / "x", _use_new_zipfile_serialization=False)
    assert not zipfile.is_zipfile(tmp_path / "x")
    assert same(official_files.read_weights(tmp_path / "x", "state_dict")["a"], torch.arange(6.0))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([torch.ones(1)], "expected a dict with the key 'state_dict', got a list"),
        (torch.ones(1), "expected a dict with the key 'state_dict', got a Tensor"),
        ({"model": {}}, r"expected a dict with the key 'state_dict', got a dict with the keys \['model'\]"),
        ({"state_dict": [torch.ones(1)]}, "expected a dict of tensors, got a list"),
        ({"state_dict": {"a": {"b": torch.ones(1)}}}, r"expected a dict of tensors, got a dict with the keys \['a'\]"),
    ],
)
def test_no_state_dict(tmp_path, data, message):
    torch.save(data, tmp_path / "model.pth")
    with pytest.raises(CheckpointError, match=rf"model\.pth: {message}"):
        official_files.read_weights(tmp_path / "model.pth", "state_dict")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("legacy", [False, True])
def test_damaged_files(tmp_path, legacy):
    """Truncated anywhere, zero bytes, no file at all, and any one byte of the structure wrong: one kind of error."""
    file = tmp_path / "model.pth"
    with pytest.raises(CheckpointError, match=r"model\.pth: no such file"):
        official_files.read_weights(file, "state_dict")
    torch.save({"state_dict": {"a": torch.ones(300)}}, file, _use_new_zipfile_serialization=not legacy)
    good = file.read_bytes()
    for size in (0, 1, 4, 60, 200, len(good) // 2, len(good) - 1):
        file.write_bytes(good[:size])
        with pytest.raises(CheckpointError, match=r"model\.pth: .*damaged"):
            official_files.read_weights(file, "state_dict")
    random.seed(0)
    refused = 0
    for _ in range(150):
        damaged = bytearray(good)
        damaged[random.randrange(300)] ^= random.randrange(1, 256)
        file.write_bytes(damaged)
        try:
            official_files.read_weights(file, "state_dict")
        except CheckpointError:
            refused += 1
    assert refused > 30  # a byte of padding may be anything


# ---- the files that training starts from


@pytest.fixture(scope="module")
def training(released, official_dir, tmp_path_factory) -> tuple[Path, dict[str, torch.Tensor]]:
    """Files with the keys of the public ones, extra keys included, and the tensors that must come out of them."""
    folder = tmp_path_factory.mktemp("training")
    fresh = ("FFM.", "pos_embed", "y_embedder.y_embedding")
    want = {key: value for key, value in released.items() if not key.startswith((*fresh, "t5_model."))}
    blip2 = {key: want[key] for key in want if key.startswith(("query_tokens", "ln_vision", "Qformer", "t5_proj"))}
    eva = {key: want[key].half() for key in want if key.startswith("visual_encoder.")}
    pixart = {key: want[key] for key in want if key not in blip2 and key not in eva}
    pixart["x_embedder.proj.weight"] = pixart["x_embedder.proj.weight"][:, :4].clone()
    pixart |= {"pos_embed": torch.randn(1, 1024, 64), "y_embedder.y_embedding": torch.randn(120, 40)}
    eva = {key.removeprefix("visual_encoder."): value for key, value in eva.items()}
    eva |= {key.replace("blocks.1.", "blocks.39."): eva[key] for key in eva if key.startswith("blocks.1.")}
    eva |= {f"{name}.{kind}": torch.ones(48) for name in ("head", "norm") for kind in ("weight", "bias")}
    blip2["Qformer.bert.embeddings.word_embeddings.weight"] = torch.ones(9, 32)
    blip2["Qformer.bert.embeddings.position_embeddings.weight"] = torch.ones(9, 32)
    blip2["Qformer.cls.predictions.bias"] = torch.ones(9)
    for name in ("intermediate.dense", "output.dense", "output.LayerNorm"):
        blip2[f"Qformer.bert.encoder.layer.0.{name}.weight"] = torch.ones(9)
    torch.save({"state_dict": pixart}, folder / "pixart.pth")
    torch.save(eva, folder / "eva.pth")
    torch.save({"model": blip2}, folder / "blip2.pth")
    want = {key: value.half() if key.startswith("visual_encoder.") else value for key, value in want.items()}
    want |= {key: value for key, value in released.items() if key.startswith("t5_model.")}
    want.pop(key_map.POSITION_IDS)
    return folder, want


def training_parts(folder: Path, official_dir: Path, seed: int = 0, **changed):
    files = {name: folder / f"{name}.pth" for name in ("pixart", "eva", "blip2")} | {"t5_dir": official_dir / "t5"}
    return convert.from_training_files(TINY, vae_dir=official_dir / "vae", seed=seed, **files | changed)


def test_training_files(training, official_dir):
    folder, want = training
    parts, report = training_parts(folder, official_dir)
    got = key_map.to_official(parts)
    conv, source = got.pop("x_embedder.proj.weight"), want["x_embedder.proj.weight"]
    assert conv.shape == (64, 8, 2, 2)
    assert same(conv[:, :4], source[:, :4]) and not conv[:, 4:].any()
    rest = want.keys() - {"x_embedder.proj.weight"}
    assert [key for key in rest if not same(got[key], want[key])] == []
    fresh = got.keys() - want.keys() - {"pos_embed", key_map.POSITION_IDS}
    assert fresh == {key for key in got if key.startswith("FFM.")} | {"y_embedder.y_embedding"}
    assert len([line for line in report if line.startswith("fresh, seed 0  ->  fusion/")]) == len(fresh) == 24
    assert not parts["fusion"].fusion.out.weight.any() and not parts["fusion"].fusion.out.bias.any()
    assert 0.8 < parts["fusion"].null_context.std() * 40**0.5 < 1.2


def test_fresh_parts_depend_on_the_seed_alone(training, official_dir):
    def fusion(seed: int, noise: int) -> dict[str, torch.Tensor]:
        torch.manual_seed(noise)
        before = torch.get_rng_state()
        parts, _ = training_parts(training[0], official_dir, seed)
        assert torch.equal(torch.get_rng_state(), before)
        return parts["fusion"].state_dict()

    first, again, other = fusion(3, noise=1), fusion(3, noise=2), fusion(4, noise=1)
    assert all(same(first[key], again[key]) for key in first)
    random_ones = [key for key in first if key.endswith(("_proj.weight", "_proj.0.weight", "_proj.2.weight"))]
    random_ones = [key for key in random_ones if key != "text_proj.weight"]  # from BLIP-2
    assert len(random_ones) == 6
    assert not any(torch.equal(first[key], other[key]) for key in [*random_ones, "null_context"])


@pytest.mark.parametrize(
    ("name", "wrapper", "key"),
    [
        ("pixart", "state_dict", "csize_embedder.mlp.0.weight"),
        ("eva", None, "blocks.2.norm1.weight"),
        ("eva", None, "header.weight"),
        ("blip2", "model", "opt_proj.weight"),
    ],
)
def test_unknown_extra_keys_and_lacks_are_refused(training, official_dir, tmp_path, name, wrapper, key):
    data = torch.load(training[0] / f"{name}.pth", weights_only=True)
    tensors = data[wrapper] if wrapper else data
    tensors[key] = torch.ones(1)
    lost = next(iter(tensors))
    del tensors[lost]
    torch.save(data, tmp_path / "wrong.pth")
    with pytest.raises(CheckpointError) as error:
        training_parts(training[0], official_dir, **{name: tmp_path / "wrong.pth"})
    assert "wrong.pth: 2 of its keys" in str(error.value)
    assert f"unexpected: {key} [1]" in str(error.value) and f"missing: {lost} " in str(error.value)


@pytest.mark.parametrize("fault", ["missing key", "shape mismatch", "truncated", "other size", "missing"])
def test_a_wrong_t5(training, official_dir, tmp_path, fault):
    t5 = tmp_path / "t5"
    if fault != "missing":
        shutil.copytree(official_dir / "t5", t5)
    file, key = t5 / "model.safetensors", "encoder.final_layer_norm.weight"
    if fault in ("missing key", "shape mismatch"):
        tensors = load_file(file)
        tensors[key] = torch.ones(3)
        if fault == "missing key":
            del tensors[key]
        save_file(tensors, file, metadata={"format": "pt"})
    if fault == "truncated":
        file.write_bytes(file.read_bytes()[:-5])
    if fault == "other size":
        model = config.load(CONFIG, ["model.text_encoder.num_layers=2"]).model
        build_parts(model, only=["text_encoder"])["text_encoder"].save_pretrained(t5)
    with pytest.raises(CheckpointError) as error:
        training_parts(training[0], official_dir, t5_dir=t5)
    if fault == "missing key":
        assert key in str(error.value)
    if fault == "other size":
        assert "missing: t5_model.encoder.block.2.layer.0.SelfAttention.q.weight [32, 40]" in str(error.value)
    else:
        assert str(t5) in str(error.value)


@pytest.mark.parametrize(
    "fault", ["missing key", "extra keys", "shape mismatch", "truncated", "scale", "other size", "missing"]
)
def test_a_wrong_vae(official_dir, tmp_path, fault):
    vae, changes = tmp_path / "vae", {"other size": {"latent_channels": 8}, "scale": {"scaling_factor": 0.13025}}
    shutil.copytree(official_dir / "vae", vae)
    file, key = vae / "diffusion_pytorch_model.safetensors", "decoder.conv_in.bias"
    expected = build_parts(TINY.model, device="meta", only=["vae"])["vae"]
    assert same(convert.load_vae(vae, expected).state_dict()[key], load_file(file)[key])
    tensors = load_file(file)
    if fault == "missing":
        shutil.rmtree(vae)
    elif fault == "truncated":
        file.write_bytes(file.read_bytes()[:-5])
    elif fault in changes:
        type(expected)(**dict(TINY.model.vae) | changes[fault]).save_pretrained(vae)
    else:
        tensors[key] = torch.ones(3)
        if fault == "missing key":
            del tensors[key]
        if fault == "extra keys":  # a deeper VAE
            tensors = load_file(file) | {"decoder.up_blocks.4.resnets.0.conv1.weight": torch.ones(3)}
        save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError) as error:
        convert.load_vae(vae, expected)
    assert str(vae) in str(error.value)
    at_fault = {"extra keys": "decoder.up_blocks.4.resnets.0.conv1.weight", "other size": "decoder.conv_in.weight is"}
    if fault in ("missing key", "shape mismatch", *at_fault):
        assert at_fault.get(fault, key) in str(error.value)


def test_a_half_precision_vae_becomes_float32(official_dir, tmp_path):
    vae = Path(shutil.copytree(official_dir / "vae", tmp_path / "vae"))
    file = vae / "diffusion_pytorch_model.safetensors"
    save_file({key: value.half() for key, value in load_file(file).items()}, file, metadata={"format": "pt"})
    expected = build_parts(TINY.model, device="meta", only=["vae"])["vae"]
    assert {p.dtype for p in convert.load_vae(vae, expected).parameters()} == {torch.float32}


@pytest.mark.parametrize("dtype", ["bfloat16", None])
def test_the_tool_on_training_files(training, official_dir, tmp_path, monkeypatch, capsys, dtype):
    folder, want = training
    files = [x for name in ("pixart", "eva", "blip2") for x in (f"--{name}", folder / f"{name}.pth")]
    places = ["--vae", official_dir / "vae", "--t5", official_dir / "t5", "--output", tmp_path / "start"]
    options = ["--config", CONFIG, "--seed", 5, *(["--dtype", dtype] if dtype else [])]
    assert convert_checkpoint.main(["training", *map(str, [*files, *places, *options])]) == 0
    lines = capsys.readouterr().out.splitlines()
    for extra in (
        "pixart.pth: pos_embed",
        "pixart.pth: y_embedder.y_embedding",
        "eva.pth: blocks.39.attn.qkv.weight",
        "eva.pth: head.bias",
        "eva.pth: norm.weight",
        "blip2.pth: Qformer.bert.embeddings.position_ids",
        "blip2.pth: Qformer.bert.embeddings.word_embeddings.weight",
        "blip2.pth: Qformer.cls.predictions.bias",
        "blip2.pth: Qformer.bert.encoder.layer.0.intermediate.dense.weight",
        "blip2.pth: Qformer.bert.encoder.layer.0.output.LayerNorm.weight",
    ):
        assert f"{extra}  ->  not used" in lines
    assert "fresh, seed 5  ->  fusion/null_context" in lines
    for key in want:
        assert any(key in line.split("->")[0] for line in lines), key
    dtypes = {}
    for part in PARTS:
        (file,) = (tmp_path / "start" / part).glob("*.safetensors")
        dtypes[part] = {value.dtype for value in load_file(file).values()}
    if dtype:
        assert dtypes == {part: {torch.float32 if part == "vae" else torch.bfloat16} for part in PARTS}
    else:  # as in the files: EVA's are float16, the last norm comes from BLIP-2
        assert dtypes == {part: {torch.float32} for part in PARTS} | {"image_encoder": {torch.float16, torch.float32}}


# ---- memory

MEASURE = """
import pathlib, sys
import mige.checkpoints.convert, mige.inference.pipeline  # not to be measured
from mige.cli import convert_checkpoint
def kib(field):
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field))
before = kib("VmRSS")
convert_checkpoint.main(sys.argv[2:])
print((kib("VmHWM") - before) * 1024)  # VmHWM: ru_maxrss would count what the parent had at the fork
"""


@pytest.mark.processes
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's /proc")
def test_peak_memory(official_dir, tmp_path):
    """Converting takes little more memory than the weights have bytes, however much else lies in the file."""
    text = dict(d_model=1024, d_ff=4096, num_layers=18, num_heads=16, d_kv=64)
    wide = dict(transformer=dict(caption_channels=1024), fusion=dict(text_width=1024), text_encoder=text)
    sizes = tmp_path / "wide.py"
    sizes.write_text(f"_base_ = {str(CONFIG)!r}\nmodel = {wide!r}\n")
    parts = build_parts(config.load(sizes).model, device="meta")
    state = {key: torch.ones(shape, dtype=torch.bfloat16) for key, shape in key_map.official_shapes(parts).items()}
    state["pos_embed"] = key_map.position_table(parts["transformer"]).bfloat16()
    state[key_map.POSITION_IDS] = torch.arange(512)[None]
    state["t5_model.encoder.embed_tokens.weight"] = state["t5_model.shared.weight"]
    model, output = tmp_path / "model.pth", tmp_path / "model"
    torch.save({"state_dict": state, "optimizer": {"state": torch.ones(100_000_000)}}, model)
    size = 2 * sum(value.numel() for key, value in state.items() if "embed_tokens" not in key)
    assert 600e6 < size < 700e6 and model.stat().st_size > size + 400e6
    del state
    arguments = release_arguments(official_dir, output, sizes)
    arguments[arguments.index("--model") + 1] = model
    try:
        done = run_program(sys.executable, "-c", MEASURE, TOOL, *arguments)
        assert done.returncode == 0, done.stderr
        assert sum(file.stat().st_size for file in output.rglob("*.safetensors")) > size
        encoder = T5EncoderModel.from_pretrained(output / "text_encoder", device_map="meta", dtype="auto")
        assert encoder.dtype == torch.bfloat16
        ratio = int(done.stdout.splitlines()[-1]) / size
        print(f"peak memory {ratio:.2f} of the weights")
        assert 0.5 < ratio < 1.3
    finally:
        model.unlink()
        shutil.rmtree(output, ignore_errors=True)
