"""VAE moments of a data set's images, computed once."""
