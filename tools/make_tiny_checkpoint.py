"""The script of mige/cli/make_tiny_checkpoint.py."""

from mige.cli.make_tiny_checkpoint import main

if __name__ == "__main__":
    raise SystemExit(main())
