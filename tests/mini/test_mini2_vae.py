"""The second world's VAE that ships: what it makes of drawings of names it has not seen."""

from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL

from mige import config
from mige.data.synthetic import tasks
from mige.data.synthetic.scenes import Scenes, draw
from mige.data.synthetic.world import SECOND
from mige.mini.vae_training import psnr

ROOT = Path(__file__).parents[2]


def test_it_is_the_config_s_and_shows_unseen_names():
    vae = AutoencoderKL.from_pretrained(ROOT / "output" / "pretrained_models" / "mini2-vae", dtype=torch.float32)
    sizes = config.load(ROOT / "configs" / "mini2.py").model.vae
    assert all(vae.config[key] == value for key, value in sizes.items() if key != "scaling_factor")  # its own
    unseen = SECOND.splits()["unseen_names"]
    scenes = [tasks.sample(np.random.default_rng([11, i]), unseen, world=SECOND).target for i in range(6)]
    images = draw(Scenes.stack(scenes), torch.device("cpu"), world=SECOND)
    assert psnr(vae, images) > 31  # 34.4 over 128 images
    with torch.no_grad():
        latents = vae.encode(images).latent_dist.mode() * vae.config.scaling_factor
    assert 0.8 < latents.std() < 1.2
