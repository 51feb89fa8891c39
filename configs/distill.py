"""A student of MIGE-mini in 4 steps of one branch: train_scripts/distill.py, docs/training.md.

Of the methods tried on MIGE-mini (docs/notes/few_steps.md), segments of the teacher's path beat guided consistency
(LCM, arXiv 2310.04378) at either of two rates, with a quarter of the samples; so it is the one that is here.
"""

_base_ = "mini.py"

data = dict(drop_text=0.0, drop_source=0.0, drop_both=0.0)  # a student has one branch

train = dict(
    pretrained="output/pretrained_models/mige-mini",  # the teacher
    steps=800,
    batch_size=64,
    noise_levels=1,
    learning_rate=3e-4,
    lr_reference_batch=64,
    warmup=50,
    cooldown=200,
    weight_decay=0.0,
    max_grad_norm=1.0,
    snr_gamma=None,
    snr_power=0.5,  # about the error of where a step lands
    trainable="dit",
    ema=0.99,
    compile=["transformer"],
    log_every=20,
    checkpoint_every=200,
)

distillation = dict(
    steps=4,
    teacher_steps=12,  # latents .003 (mean square, four cases) from those of 60 steps; of 20 steps .001
    guidance=2.0,
    source_guidance=1.0,
)
