"""MIGE-mini made smaller, for many short training runs that are compared: tools/ablate.py and docs/mini.md."""

_base_ = "mini.py"

model = dict(
    transformer=dict(num_attention_heads=4, num_layers=8, cross_attention_dim=256),
    fusion=dict(patch_width=256, vae_features=True),
)

# The joint mixture: subject-driven, edits and subject edits as 2 : 1 : 1. The variants are parts of it.
data = dict(
    world=dict(
        _delete_=True,
        one_reference=20,
        two_references=8,
        reference_and_name=4,
        add=4,
        add_relative=2,
        remove=2,
        replace=4,
        background=2,
        recolour=2,
        add_by_reference=6,
        add_by_reference_relative=3,
        replace_by_reference=7,
    ),
)

# Four checkpoints are scored. Of a rate that stays constant each is what a shorter run would have ended with.
train = dict(steps=2800, batch_size=128, lr_reference_batch=256, warmup=100, cooldown=0, log_every=50)
