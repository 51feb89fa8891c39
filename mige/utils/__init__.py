"""Images in and out, files written whole or not at all."""
