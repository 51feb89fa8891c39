"""Every reference value of the official implementation, reproduced from its inputs and the weight rule alone."""

import functools

import pytest
import torch
from golden import FIXTURES, golden_model, golden_state, rule_weight
from safetensors.torch import load_file

from mige.checkpoints import key_map
from mige.diffusion import guidance
from mige.diffusion.gaussian import Diffusion
from mige.diffusion.solver import DPMSolver2M, time_grid
from mige.models.instruction import Instruction
from mige.tasks import Task

GOLDEN = load_file(FIXTURES / "golden_tiny.safetensors")
TOLERANCE = 1e-5

EOS = 1
SEGMENTS = {
    "s0": ([], [5, 7, 9]),
    "s1": ([3, 4], [8], [11, 12, 13]),
    "s2": ([20] * 8, [21] * 12, [22]),
    "s3": ([30], [31], [32]),
    # the official code loses segment [10], after the fifth placeholder, and the placeholder with it
    "s4": ([2], [3], [4], [6], [14]),
    "s5": ([40, 41],),
}
INSTRUCTIONS = {
    name: Instruction((*map(tuple, segments[:-1]), (*segments[-1], EOS))) for name, segments in SEGMENTS.items()
}


def close(got: torch.Tensor, name: str, tolerance: float = TOLERANCE) -> None:
    want = GOLDEN[name]
    assert got.shape == want.shape, name
    error = (got.double() - want.double()).norm() / want.double().norm()
    assert error < tolerance, f"{name}: relative L2 {error:.2e}"  # false for NaN too


@functools.cache
def model():
    return golden_model()


def images(*names: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The images that the named instructions have room for, as the flat stack our encoder takes."""
    index = {name: i for i, name in enumerate(SEGMENTS)}
    slots = [(index[name], slot) for name in names for slot in range(INSTRUCTIONS[name].num_images)]
    rows, columns = (list(x) for x in zip(*slots, strict=True))
    return GOLDEN["in.ref_clip"][rows, columns], GOLDEN["in.ref_vae"][rows, columns]


def condition(*names: str, source: torch.Tensor):
    vision, references = images(*names)
    return model().encode([INSTRUCTIONS[n] for n in names], vision, references, source)


@pytest.mark.parametrize("key", [k.removeprefix("weight.") for k in GOLDEN if k.startswith("weight.")])
def test_the_weight_rule(key):
    state = golden_state(vars(model().encoder)["_modules"] | {"transformer": model().transformer})
    if key.startswith("checksum"):
        made = [v.double() for k, v in state.items() if "embed_tokens" not in k and k not in key_map.COMPUTED]
        total = sum((v.abs() if key == "checksum_abs" else v).sum() for v in made)
        assert torch.allclose(total, GOLDEN[f"weight.{key}"].double(), rtol=1e-12)
    elif key == "pos_embed":
        assert torch.allclose(model().transformer.pos_embed.pos_embed, GOLDEN["weight.pos_embed"], atol=1e-6)
    else:
        assert torch.equal(rule_weight(key, tuple(GOLDEN[f"weight.{key}"].shape)), GOLDEN[f"weight.{key}"])


def test_the_key_list():
    lines = (FIXTURES / "golden_tiny_keys.tsv").read_text().splitlines()[1:]
    want = {key: tuple(map(int, shape.split("x"))) for key, shape, _ in (line.split("\t") for line in lines)}
    parts = vars(model().encoder)["_modules"] | {"transformer": model().transformer}
    assert key_map.official_shapes(parts) == want


@torch.no_grad()
def test_every_stage_of_the_vision_side():
    encoder = model().encoder
    clip, vae = GOLDEN["in.ref_clip"].flatten(0, 1), GOLDEN["in.ref_vae"].flatten(0, 1)
    before_norm = []
    hook = encoder.image_encoder.post_layernorm.register_forward_pre_hook(lambda _, args: before_norm.append(args[0]))
    seen = encoder.encode_vision(clip)
    hook.remove()
    close(before_norm[0], "out.cond.vit")
    close(seen, "out.cond.ln_vision")
    query = encoder.fusion.query_tokens.expand(len(seen), -1, -1)
    tokens = encoder.qformer(query_embeds=query, encoder_hidden_states=seen).last_hidden_state
    close(tokens, "out.cond.qformer")
    patches = model().patchify(vae)
    close(encoder.fusion.fusion(tokens, patches), "out.cond.ffm")
    close(encoder.encode_images(clip, patches), "out.cond.t5_proj")


def check_text(embeds, mask, names: list[int], prefix: str) -> None:
    """Compare embeddings, mask and T5's output; ours are padded to the longest of the batch, the official to 24."""
    length = mask.shape[1]
    want_mask = GOLDEN[f"out.{prefix}.mask"][names]
    assert torch.equal(mask, want_mask[:, :length]) and want_mask[:, length:].sum() == 0
    want = GOLDEN[f"out.{prefix}.mixed"][names][:, :length]
    assert (embeds - want).norm() / want.norm() < TOLERANCE
    got = model().encoder.text_encoder(inputs_embeds=embeds, attention_mask=mask).last_hidden_state
    want = GOLDEN[f"out.{prefix}.t5"][names][:, :length][mask.bool()]
    assert (got[mask.bool()] - want).norm() / want.norm() < TOLERANCE


@torch.no_grad()
def test_the_multimodal_instruction():
    names = list(SEGMENTS)
    vision, references = images(*(n for n in names if INSTRUCTIONS[n].num_images))
    tokens = model().encoder.encode_images(vision, model().patchify(references))
    embeds, mask = model().encoder.interleave([INSTRUCTIONS[n] for n in names], tokens)
    assert mask.shape[1] == 24  # s2 has 28 vectors: truncated, its end-of-sentence token lost
    check_text(embeds, mask, [0, 1, 2, 3, 4, 5], "cond")


@torch.no_grad()
def test_a_batch_without_any_image():
    """The official code gives such a batch zero vectors in place of images."""
    nothing = torch.zeros(2, 3, 40)
    embeds, mask = model().encoder.interleave([INSTRUCTIONS["s3"], INSTRUCTIONS["s5"]], nothing)
    check_text(embeds, mask, [0, 1], "norefs")


@torch.no_grad()
@pytest.mark.parametrize("task", ["subject", "edit"])
def test_the_transformer_on_all_branches(task):
    """The official batch holds every branch, those of weight zero too: none, (source,) full, in this order."""
    source = torch.zeros(2, 4, 8, 8) if task == "subject" else GOLDEN["in.source"]
    full = condition("s0", "s1", source=source)
    null = model().null_context
    drops = [(True, True), (False, False)] if task == "subject" else [(True, True), (True, False), (False, False)]
    stacked = guidance.stack(full, [guidance.Branch(1.0, *drop) for drop in drops], null)
    x, t = GOLDEN[f"in.x_{task}"], GOLDEN[f"in.t_{task}"]
    close(model().denoise(x, t.float(), stacked), f"out.dit.{task}")


@torch.no_grad()
@pytest.mark.parametrize(
    "name, task, steps, text, source",
    [
        ("subject10", Task.SUBJECT, 10, 7.0, 1.0),
        ("subject6", Task.SUBJECT, 6, 7.0, 1.0),
        ("edit10", Task.EDIT, 10, 5.0, 1.0),
        ("edit10_s15", Task.EDIT, 10, 5.0, 1.5),
    ],
)
def test_guided_sampling(name, task, steps, text, source):
    latent = torch.zeros(2, 4, 8, 8) if task is Task.SUBJECT else GOLDEN["in.source"]
    chosen = guidance.branches(task, text, source)
    stacked = guidance.stack(condition("s0", "s1", source=latent), chosen, model().null_context)

    def denoise(x, t):
        many = len(chosen)
        return guidance.combine(model().denoise(x.repeat(many, 1, 1, 1), t.expand(2 * many), stacked)[:, :4], chosen)

    close(DPMSolver2M().sample(denoise, GOLDEN["in.z"], steps), f"out.sample.{name}")


@pytest.mark.parametrize("steps", [6, 10, 20, 50, 60])
def test_the_solver_alone(steps):
    got = DPMSolver2M().sample(lambda x, t: 0.98 * x - 0.05 * torch.cos(2 * x + 0.01 * t), GOLDEN["solver.z"], steps)
    close(got, f"solver.out{steps}", 1e-6)  # the same bits where exp rounds as on the machine of the reference


@pytest.mark.parametrize("steps", [20, 50, 60])
def test_the_schedules(steps):
    grid = time_grid(steps, DPMSolver2M().betas)
    assert torch.equal(grid.model_time, GOLDEN[f"schedule{steps}.t_model"])
    assert torch.equal(grid.model_time.bfloat16().float(), GOLDEN[f"schedule{steps}.t_model_bf16"].float())
    for name, got in (("alpha", grid.alpha), ("sigma", grid.sigma), ("lambda", grid.lam)):
        torch.testing.assert_close(got, GOLDEN[f"schedule{steps}.{name}"], rtol=1e-6, atol=2e-7)  # exp: see above


def test_losses_and_gradients():
    """One training step's loss and the gradient norm of every stored parameter, by its official name."""
    net, diffusion = model(), Diffusion()
    source = torch.cat([GOLDEN["in.source"], torch.zeros(1, 4, 8, 8)])
    x0, noise, t = GOLDEN["in.x0"], GOLDEN["in.noise"], GOLDEN["in.t_train"]
    vision, references = images("s0", "s1", "s3")
    x_t = diffusion.add_noise(x0, noise, t)
    close(x_t, "out.loss.x_t")
    output = net(x_t, t.float(), [INSTRUCTIONS[n] for n in ("s0", "s1", "s3")], vision, references, source)
    loss = diffusion.loss(output, x0, x_t, noise, t)
    for name, got in (("mse", loss.mse), ("vb", loss.vb), ("loss", loss.total)):
        close(got.detach(), f"out.loss.{name}")
    net.zero_grad()
    loss.total.mean().backward()

    parts = vars(net.encoder)["_modules"] | {"transformer": net.transformer}
    grads = {(name, key): p.grad for name, part in parts.items() for key, p in part.named_parameters()}
    wanted = [name for name in GOLDEN if name.startswith("out.gradnorm.")]
    assert len(wanted) == 11
    for name in wanted:
        official = name.removeprefix("out.gradnorm.")
        ours = [
            grads[p.part, p.key]
            for p in key_map.key_mappings(parts)
            if official in p.official and p.key in dict(parts[p.part].named_parameters())
        ]
        close(torch.cat([g.flatten() for g in ours]).norm().reshape(GOLDEN[name].shape), name)
    net.zero_grad()
