"""The script of mige/cli/convert_checkpoint.py."""

from mige.cli.convert_checkpoint import main

if __name__ == "__main__":
    raise SystemExit(main())
