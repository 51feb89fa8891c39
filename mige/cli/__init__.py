"""The mains of all scripts: parse, then import, then call."""
