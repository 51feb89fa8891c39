"""The script of mige/cli/distill.py."""

from mige.cli.distill import main

if __name__ == "__main__":
    raise SystemExit(main())
