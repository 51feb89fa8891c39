"""MIGE-mini 2: MIGE-mini for the second miniature world at 256 px, with an f8 VAE; see docs/mini.md."""

_base_ = "mini.py"

model = dict(
    transformer=dict(num_layers=8, in_channels=32, out_channels=32, sample_size=32),
    image_encoder=dict(num_hidden_layers=4, image_size=112, patch_size=14),
    text_encoder=dict(vocab_size=1408),
    vae=dict(
        latent_channels=16,
        block_out_channels=[32, 64, 128, 128],
        down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4,
        mid_block_add_attention=False,  # what it learns from crops must hold for every shape
        sample_size=256,
    ),
)

# Squares, 4:3 nearly, 16:9 nearly, lying and standing: 256 and 252 patches.
data = dict(
    size=256,
    world_name="second",
    shapes=[[16, 16], [14, 18], [18, 14], [12, 21], [21, 12]],
    world=dict(  # three in ten draw scenes of their own, where MIGE-mini is weak
        text_to_image=10,
        one_reference=12,
        two_references=8,
        reference_and_name=4,
        add=6,
        add_relative=6,
        remove=3,
        replace=8,
        background=5,
        recolour=5,
        move=8,
        scale=8,
        flip=9,
        add_by_reference=6,
        add_by_reference_relative=5,
        replace_by_reference=7,
    ),
)

train = dict(pretrained="output/mini2/start")
