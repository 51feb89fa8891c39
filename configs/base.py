"""What every size of the model shares: architecture facts of the released weights (widths are in the files beside)."""

model = dict(
    transformer=dict(
        patch_size=2,
        norm_type="ada_norm_single",
        activation_fn="gelu-approximate",
        interpolation_scale=1,
        use_additional_conditions=False,
        attention_bias=True,
        norm_elementwise_affine=False,
        norm_eps=1e-6,
    ),
    image_encoder=dict(hidden_act="gelu", layer_norm_eps=1e-6, qkv_bias=True),
    qformer=dict(
        max_position_embeddings=512,
        cross_attention_frequency=2,
        layer_norm_eps=1e-12,
        hidden_act="gelu",
        use_qformer_text_input=False,
    ),
    text_encoder=dict(
        feed_forward_proj="gated-gelu",
        relative_attention_num_buckets=32,
        relative_attention_max_distance=128,
        layer_norm_epsilon=1e-6,
        tie_word_embeddings=False,
        pad_token_id=0,
        eos_token_id=1,
    ),
    fusion=dict(num_heads=8, eps=1e-6),
    vae=dict(scaling_factor=0.18215, latent_channels=4, act_fn="silu"),
)
