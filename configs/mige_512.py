"""MIGE as released: PixArt-alpha XL/2 at 512 px, EVA-ViT-g, BLIP-2's Q-Former, T5 v1.1 XXL, the SD VAE."""

_base_ = "base.py"

model = dict(
    transformer=dict(
        num_attention_heads=16,
        attention_head_dim=72,
        num_layers=28,
        in_channels=8,
        out_channels=8,
        cross_attention_dim=1152,
        caption_channels=4096,
        sample_size=64,
    ),
    image_encoder=dict(
        hidden_size=1408,
        intermediate_size=6144,
        num_hidden_layers=39,
        num_attention_heads=16,
        image_size=224,
        patch_size=14,
    ),
    qformer=dict(
        hidden_size=768,
        num_hidden_layers=12,
        num_attention_heads=12,
        intermediate_size=3072,
        encoder_hidden_size=1408,
    ),
    text_encoder=dict(vocab_size=32128, d_model=4096, d_kv=64, num_heads=64, d_ff=10240, num_layers=24),
    fusion=dict(
        num_queries=32,
        width=768,
        patch_width=1152,
        text_width=4096,
        max_tokens=256,
        timestep_dtype="bfloat16",
        vision_dtype="float16",
    ),
    vae=dict(
        block_out_channels=[128, 256, 512, 512],
        down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4,
        layers_per_block=2,
        sample_size=256,
    ),
)

data = dict(sets=[dict(file="example_data/train.jsonl", weight=1.0)])

train = dict(
    pretrained="output/pretrained_models/start",
    sample_every=1000,
    sample_records=["example_data/subject.json", "example_data/edit.json", "example_data/subject_edit.json"],
)
