"""Judges: images and an instruction in, scores with reasons out; questions, models that answer, what becomes of it."""
