"""A student of the released model in 4 steps of one branch, as adapters: train_scripts/distill.py, docs/training.md.

Nobody has trained with it yet: batch, steps and rate are MIGE-mini's (distill.py), where they were enough. The whole
DiT instead: train.trainable=dit train.precision=bfloat16 train.learning_rate=1e-5
"""

_base_ = "mige_512.py"

data = dict(drop_text=0.0, drop_source=0.0, drop_both=0.0)  # a student has one branch

train = dict(
    pretrained="output/pretrained_models/mige",  # the teacher
    steps=800,
    batch_size=16,
    gradient_accumulation_steps=4,
    learning_rate=1e-4,
    lr_reference_batch=64,
    warmup=50,
    cooldown=200,
    weight_decay=0.0,
    eps=1e-8,
    max_grad_norm=1.0,
    snr_power=0.5,  # about the error of where a step lands
    trainable="lora",
    lora_rank=64,
    compile=["transformer"],
    checkpoint_every=200,
    sample_every=0,
)

distillation = dict(
    steps=4,
    teacher_steps=20,
    guidance=5.0,
    source_guidance=1.0,
)
