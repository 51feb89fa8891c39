"""Experiments on the synthetic world; nothing imports them but the command line."""
