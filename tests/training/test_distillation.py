"""A few-step student: closed forms of its questions, and real runs of the tiny model from teacher to sampled images."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate.state import AcceleratorState
from test_trainer import weights

from mige import config
from mige.cli import distill, infer
from mige.config import ConfigError
from mige.data.batch import collate
from mige.data.synthetic.cases import make_cases
from mige.diffusion.few_step import FewStepSolver, first_order_solver
from mige.diffusion.settings import resolve
from mige.diffusion.solver import DPMSolver2M, time_grid
from mige.inference.pipeline import MIGEPipeline
from mige.mini import bench
from mige.tasks import Task
from mige.training.distillation import DistillationTrainer, SegmentObjective, cut
from mige.training.errors import TrainingError
from mige.training.trainer import PREEMPTED, Trainer

ROOT = Path(__file__).parents[2]
CAT = ROOT / "example_data" / "images" / "cat.jpg"
SOLVER = DPMSolver2M()


def settings(model: Path, *more: str) -> list[str]:
    return [
        f"train.pretrained={str(model)!r}",
        f"data.sets=[{{'file': {str(ROOT / 'example_data' / 'train.jsonl')!r}, 'weight': 1.0}}]",
        "data.size=64",
        "train.steps=4",
        "train.warmup=1",
        "train.log_every=1",
        "train.checkpoint_every=2",
        *more,
    ]


@pytest.fixture(scope="module")
def tiny_config(tmp_path_factory) -> Path:
    """configs/tiny.py with a section distillation and nothing dropped."""
    path = tmp_path_factory.mktemp("config") / "distill_tiny.py"
    path.write_text(
        f"_base_ = {str(ROOT / 'configs' / 'tiny.py')!r}\n"
        "data = dict(drop_text=0.0, drop_source=0.0, drop_both=0.0)\n"
        "train = dict(trainable='dit', ema=0.5, sample_every=0, sample_steps=None)\n"
        "distillation = dict(steps=2, teacher_steps=4, guidance=3.0, source_guidance=1.0)\n"
    )
    return path


def build(path: Path, model: Path, run: Path, *more: str) -> DistillationTrainer:
    AcceleratorState._reset_state(reset_partial_state=True)
    return DistillationTrainer(config.load(path, settings(model, *more)), run)


def newest(run: Path) -> Path:
    return sorted((run / "checkpoints").glob("step-*"))[-1]


# ---- closed forms ----------------------------------------------------------------------------------------------------


def linear_teacher(scale: float):
    """Noise estimates of data that is normal with this standard deviation: linear in x."""
    grid = time_grid(1000, SOLVER.betas)

    def denoise(x, t):
        i = (grid.model_time - t).abs().argmin()
        alpha, sigma = grid.alpha[i], grid.sigma[i]
        return x * sigma / (alpha**2 * scale**2 + sigma**2)

    return denoise


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_a_student_that_answers_with_the_targets_arrives_where_its_teacher_does(steps):
    """Of a linear teacher too, whose way no single step of its own estimate follows."""
    noise, points = torch.randn(3, 4, 2, 2, generator=torch.Generator().manual_seed(0)), []
    end = SOLVER.sample(linear_teacher(0.5), noise, 20, lambda i, x, x0: points.append(x))
    segments = cut([noise, *points[20 // steps - 1 :: 20 // steps]], SOLVER)
    targets = iter(segments.x0_BCHW.chunk(steps))
    grid = time_grid(steps, SOLVER.betas)
    places = {float(t): i for i, t in enumerate(grid.model_time)}

    def student(x, t):
        i = places[float(t)]
        return (x - grid.alpha[i] * next(targets)) / grid.sigma[i]

    torch.testing.assert_close(first_order_solver(student, noise, grid), end, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(FewStepSolver().sample(linear_teacher(0.5), noise, steps), end, rtol=1e-2, atol=1e-2)


def test_one_segment_of_a_linear_teacher_is_linear_and_a_linear_student_learns_it_exactly():
    """x at the end is c x at the start, so the noise estimate of the one step is k x; least squares finds that k."""
    objective = SimpleNamespace(snr_gamma=None, snr_power=1.0)
    noise = torch.randn(64, 1, 2, 2, generator=torch.Generator().manual_seed(1))
    segments = cut([noise, SOLVER.sample(linear_teacher(0.5), noise, 20)], SOLVER)
    k = torch.nn.Parameter(torch.zeros(()))
    optimizer = torch.optim.LBFGS([k], max_iter=20)

    def loss():
        optimizer.zero_grad()
        output = torch.cat([k * segments.x_BCHW, torch.zeros_like(segments.x_BCHW)], dim=1)
        judged = SegmentObjective.judge(objective, output, segments)
        total = (judged.loss.total * judged.weight_B).mean()
        total.backward()
        return total

    optimizer.step(loss)
    fresh = torch.randn(8, 1, 2, 2, generator=torch.Generator().manual_seed(2))
    got = FewStepSolver().sample(lambda x, t: k.detach() * x, fresh, 1)
    torch.testing.assert_close(got, SOLVER.sample(linear_teacher(0.5), fresh, 20), rtol=1e-3, atol=1e-3)


def test_weights_of_the_points():
    """Power 1: the error of x0. Power 1/2: about that of where the step lands."""
    points = list(torch.randn(5, 2, 1, 2, 2, generator=torch.Generator().manual_seed(3)))
    segments, grid = cut(points, SOLVER), time_grid(4, SOLVER.betas)
    output = torch.randn(8, 2, 2, 2, generator=torch.Generator().manual_seed(4))
    alpha, sigma = (v[:-1].repeat_interleave(2).reshape(-1, 1, 1, 1) for v in (grid.alpha, grid.sigma))
    error = ((segments.x_BCHW - sigma * output[:, :1]) / alpha - segments.x0_BCHW).square().mean(dim=(1, 2, 3))
    judged = SegmentObjective.judge(SimpleNamespace(snr_gamma=None, snr_power=1.0), output, segments)
    noisy = segments.ratio_B < 1
    torch.testing.assert_close((judged.loss.total * judged.weight_B)[noisy], error[noisy], rtol=1e-3, atol=1e-6)
    judged = SegmentObjective.judge(SimpleNamespace(snr_gamma=None, snr_power=0.5), output, segments)
    gain = (grid.alpha[1:] - grid.alpha[:-1] * grid.sigma[1:] / grid.sigma[:-1]).repeat_interleave(2)
    share = judged.loss.total * judged.weight_B / (error * gain**2)
    assert (share > 0.9).all() and (share < 2.5).all()
    assert judged.time_B.tolist() == pytest.approx([999, 999, 749.25, 749.25, 499.5, 499.5, 249.75, 249.75])


# ---- runs ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def student(lively, tiny_config, tmp_path_factory) -> Path:
    """A run of four steps."""
    run = tmp_path_factory.mktemp("student") / "run"
    assert build(tiny_config, lively, run).run() == 0
    return run


def test_a_student_folder_is_sampled_in_its_steps_and_one_branch_by_itself(student, tmp_path, monkeypatch):
    model, calls = newest(student) / "model", []
    assert json.loads((model / "model_index.json").read_text())["scheduler"] == [
        "mige.diffusion.few_step", "FewStepSolver"]  # fmt: skip
    pipe = MIGEPipeline.from_pretrained(model)  # verified
    forward = pipe.transformer.forward
    monkeypatch.setattr(pipe.transformer, "forward", lambda x, *a, **k: calls.append(len(x)) or forward(x, *a, **k))
    pipe("a<imagehere>in the jungle", [str(CAT)], height=64, width=64)
    pipe("make it red", source=str(CAT), height=64, width=64)
    assert calls == [1, 1, 1, 1]  # two calls, two steps each, a batch of one branch
    with pytest.raises(ValueError, match="guidance_scale is 5, but guidance is in the weights"):
        pipe("make it red", source=str(CAT), guidance_scale=5)
    case = ["--model", model, "--prompt", "make it red", "--reference", CAT, "--source", CAT, "--device", "cpu"]
    case = [str(text) for text in [*case, "--height", 64, "--width", 64]]
    assert infer.main([*case, "--output", str(tmp_path / "own")]) == 0
    line = json.loads((tmp_path / "own" / "results.jsonl").read_text())
    assert (line["steps"], line["guidance"], line["source_guidance"]) == (2, 1.0, 1.0)
    monkeypatch.setattr(MIGEPipeline, "from_pretrained", lambda *_, **__: pytest.fail("the weights were loaded"))
    with pytest.raises(SystemExit, match="guidance_scale is 5, but guidance is in the weights"):
        infer.main([*case, "--output", str(tmp_path / "other"), "--guidance", "5"])


def test_the_mini_bench_samples_a_student_as_it_is_to_be_sampled(student, tmp_path):
    pipe = MIGEPipeline.from_pretrained(newest(student) / "model")
    bench.run(pipe, make_cases(2, kinds=["move"])[:1], tmp_path, model="student")
    saved = json.loads((tmp_path / "settings.json").read_text())
    assert (saved["steps"], saved["guidance"], saved["source_guidance"]) == (2, 1.0, 1.0)


def test_only_the_student_s_dit_has_moved(student, lively):
    was, now = MIGEPipeline.from_pretrained(lively), MIGEPipeline.from_pretrained(newest(student) / "model")
    for part in ("image_encoder", "qformer", "fusion", "text_encoder", "vae"):
        for (name, a), b in zip(getattr(was, part).named_parameters(), getattr(now, part).parameters(), strict=True):
            assert torch.equal(a, b), (part, name)
    moved = {name for (name, a), b in zip(was.transformer.named_parameters(), now.transformer.parameters(), strict=True)
             if not torch.equal(a, b)}  # fmt: skip
    assert (
        not [name for name in moved if name.startswith("pos_embed")] and "transformer_blocks.0.ff.net.2.weight" in moved
    )


def test_the_loss_is_against_the_teacher_s_guided_path(lively, tiny_config, tmp_path):
    """Its points and targets are those of the teacher sampled by the pipeline, whatever the student has learnt."""
    trainer = build(tiny_config, lively, tmp_path / "run", "train.batch_size=3")
    batch = collate([trainer.dataset[number] for number in range(3)])
    seen = []
    trainer.objective.judge = lambda output, segments: seen.append((output, segments))
    with torch.no_grad():
        trainer._loss(batch)
        _, references, source = batch.latents(trainer.vae)
        teacher = MIGEPipeline.from_pretrained(lively)
        condition = teacher.model.eval().encode(batch.instructions, batch.vision_RCHW, references, source)
        null, mixed = teacher.model.null_context, []

        def guided(x, t):
            without = teacher.model.denoise(x, t.expand(3), condition.drop(null, text=True))
            full = teacher.model.denoise(x, t.expand(3), condition)
            return (without + 3.0 * (full - without))[:, :4]

        end = SOLVER.sample(guided, batch.noise_BCHW, 4, lambda i, x, x0: mixed.append(x))
    [(output, segments)] = seen
    assert output.shape == (6, 8, 8, 8)
    torch.testing.assert_close(segments.x_BCHW, torch.cat([batch.noise_BCHW, mixed[1]]), rtol=1e-3, atol=1e-4)
    grid = time_grid(2, SOLVER.betas)
    landed = [grid.sigma[i + 1] / grid.sigma[i] * segments.x_BCHW[3 * i : 3 * i + 3]
              + (grid.alpha[i + 1] - grid.alpha[i] * grid.sigma[i + 1] / grid.sigma[i])
              * segments.x0_BCHW[3 * i : 3 * i + 3] for i in range(2)]  # fmt: skip
    torch.testing.assert_close(torch.cat(landed), torch.cat([mixed[1], end]), rtol=1e-3, atol=1e-3)


def test_a_stopped_and_resumed_distillation_equals_one_that_was_not(student, lively, tiny_config, tmp_path):
    trainer = build(tiny_config, lively, tmp_path / "run")
    step = trainer._train_step

    def stopping(batches):
        step(batches)
        trainer.stop.given = trainer.stop.given or trainer.step == 0

    trainer._train_step = stopping
    assert trainer.run() == PREEMPTED
    assert trainer.step < 4
    assert build(tiny_config, lively, tmp_path / "run").run() == 0
    want, got = weights(newest(student)), weights(newest(tmp_path / "run"))
    assert all(torch.equal(want[name], got[name]) for name in want)


def test_resuming_under_another_teacher_is_refused(student, lively, tiny_config, tmp_path):
    shutil.copytree(student, tmp_path / "run")
    pipe = MIGEPipeline.from_pretrained(lively)
    pipe.transformer.proj_out.weight.data.mul_(2)
    pipe.save_pretrained(tmp_path / "other")
    with pytest.raises(TrainingError, match="cannot be resumed as this run is set: teacher: "):
        build(tiny_config, tmp_path / "other", tmp_path / "run", "train.steps=5").run()
    with pytest.raises(TrainingError, match="cannot be resumed as this run is set: distillation: "):
        build(tiny_config, lively, tmp_path / "run", "train.steps=5", "distillation.guidance=2.0").run()


def test_adapters_bring_their_steps_along(lively, tiny_config, tmp_path):
    lora = ["train.trainable=lora", "train.ema=None", "train.lora_rank=2", "train.steps=1"]
    run = tmp_path / "run"
    AcceleratorState._reset_state(reset_partial_state=True)
    arguments = [tiny_config, "--output", run, *settings(lively, *lora)]
    assert distill.main([str(text) for text in arguments]) == 0
    case = ["--model", lively, "--lora", newest(run) / "lora", "--prompt", "make it red", "--reference", CAT,
            "--source", CAT, "--device", "cpu", "--height", 64, "--width", 64]  # fmt: skip
    case = [str(text) for text in case]
    assert infer.main([*case, "--output", str(tmp_path / "own")]) == 0
    line = json.loads((tmp_path / "own" / "results.jsonl").read_text())
    assert (line["steps"], line["guidance"]) == (2, 1.0)
    with pytest.raises(SystemExit, match="guidance_scale is 5, but guidance is in the weights"):
        infer.main([*case, "--output", str(tmp_path / "other"), "--guidance", "5"])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.trainable=full", "train.trainable is 'full', expected 'dit' or 'lora'"),
        ("train.lora_targets=['t5']", r"train.lora_targets has 't5', expected the DiT's"),
        ("data.drop_text=0.05", r"data.drop_text is 0.05, expected 0"),
        ("distillation.teacher_steps=5", "teacher_steps is 5, expected a multiple of distillation.steps, which is 2"),
        ("distillation.steps=0", "distillation.steps"),
    ],
)
def test_what_is_no_distillation_is_refused(tiny_config, lively, tmp_path, override, message):
    with pytest.raises(ConfigError, match=message):
        build(tiny_config, lively, tmp_path / "run", override)


def test_a_student_is_no_teacher_and_each_script_takes_its_own_config(student, lively, tiny_config, tmp_path):
    with pytest.raises(ConfigError, match="samples with FewStepSolver, expected a teacher"):
        build(tiny_config, newest(student) / "model", tmp_path / "run")
    with pytest.raises(ConfigError, match=r"train it by train_scripts/distill\.py"):
        AcceleratorState._reset_state(reset_partial_state=True)
        Trainer(config.load(tiny_config, settings(lively)), tmp_path / "run")
    with pytest.raises(ConfigError, match="has no section distillation"):
        build(ROOT / "configs" / "tiny.py", lively, tmp_path / "run")


def test_the_shipped_config_is_one():
    loaded = config.load(ROOT / "configs" / "distill.py")
    how = resolve(FewStepSolver(num_inference_steps=loaded.distillation.steps).config, Task.EDIT)
    assert how.steps == 4 and loaded.distillation.teacher_steps % 4 == 0
