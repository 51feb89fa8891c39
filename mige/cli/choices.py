"""Names that options choose from, before anything heavy is imported; a test compares them with the facts."""

MEASURED = ("dreambench", "emu_edit", "magicbrush", "migebench", "dreambench_plus")
BENCHMARKS = (*MEASURED, "gedit", "imgedit", "omnicontext")  # the last ones are scored by a judge alone
CLIP = ("ViT-B/32", "ViT-L/14")
BACKBONES = ("DINOv2 ViT-B/14", "DINOv3 ViT-B/16", "SigLIP 2 B/16")
PRESERVATION = ("psnr", "ssim", "lpips")
DETECTOR, SEGMENTER = "IDEA-Research/grounding-dino-base", "facebook/sam-vit-huge"
SOURCES = ("instructpix2pix", "layout", "magicbrush", "mige_sub_edit", "seed_data_edit", "subjects200k")
STORE_DTYPES = ("float32", "float16")
STORE_PRECISIONS = ("auto", "float32", "bfloat16")
WORLD_KINDS = (
    *("text_to_image", "one_reference", "two_references", "reference_and_name"),
    *("add", "add_relative", "remove", "replace", "background", "recolour", "move", "scale", "flip"),
    *("add_by_reference", "add_by_reference_relative", "replace_by_reference"),
)
VARIANTS = ("joint", "subject_only", "edit_only", "without_subject_edit", "without_vae_features", "text_only")
