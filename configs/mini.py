"""MIGE-mini: the whole model at small size, for the miniature world at 128 px; see docs/mini.md."""

_base_ = "base.py"

model = dict(
    transformer=dict(
        num_attention_heads=6,
        attention_head_dim=64,
        num_layers=9,
        in_channels=16,
        out_channels=16,
        cross_attention_dim=384,
        caption_channels=256,
        sample_size=32,
    ),
    image_encoder=dict(
        hidden_size=192,
        intermediate_size=768,
        num_hidden_layers=5,
        num_attention_heads=6,
        image_size=64,
        patch_size=8,
    ),
    qformer=dict(
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        hidden_size=192,
        num_hidden_layers=2,
        num_attention_heads=6,
        intermediate_size=768,
        encoder_hidden_size=192,
    ),
    text_encoder=dict(dropout_rate=0.0, vocab_size=1280, d_model=256, d_kv=64, num_heads=4, d_ff=512, num_layers=3),
    fusion=dict(
        num_queries=48,
        width=192,
        patch_width=384,
        text_width=256,
        max_tokens=160,
        timestep_dtype="float32",
        vision_dtype="float32",
    ),
    vae=dict(
        latent_channels=8,
        block_out_channels=[32, 64, 128],
        down_block_types=["DownEncoderBlock2D"] * 3,
        up_block_types=["UpDecoderBlock2D"] * 3,
        layers_per_block=1,
        norm_num_groups=8,
        sample_size=128,
    ),
)

# The kinds of the miniature world's tasks and how often each is shown.
data = dict(
    size=128,
    workers=14,
    world=dict(
        text_to_image=2,
        one_reference=6,
        two_references=6,
        reference_and_name=3,
        add=6,
        add_relative=9,
        remove=1,
        replace=11,
        background=4,
        recolour=3,
        move=12,
        scale=10,
        flip=15,
        add_by_reference=4,
        add_by_reference_relative=6,
        replace_by_reference=6,
    ),
)

train = dict(
    pretrained="output/mini/start",
    steps=40_000,
    batch_size=512,
    noise_levels=2,
    learning_rate=1.5e-3,
    lr_reference_batch=512,
    warmup=300,
    weight_decay=0.01,
    betas=[0.9, 0.99],
    eps=1e-8,
    max_grad_norm=0.3,  # thrice the usual norm; at 1 a run went astray for a hundred steps
    optimizer="muon",
    snr_gamma=5.0,
    snr_power=0.5,
    trainable="all",
    gradient_checkpointing=[],
    compile=["transformer", "text_encoder", "image_encoder", "qformer", "vae"],  # 96 s before the first step on an H100
    ema=0.9995,
    log_every=50,
    checkpoint_every=2000,
    keep_checkpoints=1,
    trackers=[],
)
"""For one H100, on which train.precision=auto is mixed."""
