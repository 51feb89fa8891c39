"""Adapters for the released model from a few photographs, on one card: docs/tutorial.md.

The values are usual ones for adapters; nobody has tuned them on the released weights.
"""

_base_ = "mige_512.py"

train = dict(
    pretrained="output/pretrained_models/mige",
    steps=200,
    batch_size=8,
    learning_rate=1e-4,
    lr_reference_batch=8,
    warmup=20,
    weight_decay=0.0,
    eps=1e-8,
    max_grad_norm=1.0,
    trainable="lora",
    compile=[],  # the compiler would take longer than it saves
    checkpoint_every=100,
    sample_every=0,
)
