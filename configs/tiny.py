"""A twin of a few hundred thousand values for tests and a first try: every part there, 128 px, seconds on a CPU."""

_base_ = "base.py"

model = dict(
    transformer=dict(
        num_attention_heads=4,
        attention_head_dim=16,
        num_layers=2,
        in_channels=8,
        out_channels=8,
        cross_attention_dim=64,
        caption_channels=40,
        sample_size=16,
    ),
    image_encoder=dict(
        hidden_size=48,
        intermediate_size=66,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=28,
        patch_size=14,
    ),
    qformer=dict(
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        hidden_size=32,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=72,
        encoder_hidden_size=48,
    ),
    text_encoder=dict(dropout_rate=0.0, vocab_size=512, d_model=40, d_kv=8, num_heads=4, d_ff=56, num_layers=3),
    fusion=dict(
        num_queries=3,
        width=32,
        patch_width=64,
        text_width=40,
        max_tokens=128,
        timestep_dtype="float32",
        vision_dtype="float32",
    ),
    vae=dict(
        block_out_channels=[16, 16, 32, 32],
        down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4,
        layers_per_block=1,
        norm_num_groups=8,
        sample_size=128,
    ),
)

data = dict(sets=[dict(file="example_data/train.jsonl", weight=1.0)], size=128, workers=0)

train = dict(
    pretrained="output/pretrained_models/mige-tiny",
    steps=20,
    batch_size=2,
    learning_rate=1e-3,
    warmup=5,
    max_grad_norm=1.0,
    gradient_checkpointing=[],
    log_every=5,
    checkpoint_every=10,
    sample_every=20,
    sample_records=["example_data/subject.json", "example_data/edit.json", "example_data/subject_edit.json"],
    sample_steps=10,
    trackers=[],
)
