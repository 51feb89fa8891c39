"""The network: instruction -> encoder -> fusion -> DiT; the VAE."""
