"""The script of mige/cli/prepare_data.py."""

from mige.cli.prepare_data import main

if __name__ == "__main__":
    raise SystemExit(main())
