"""Public training sets: their layouts -> records."""
