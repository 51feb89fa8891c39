"""The script of mige/cli/check_data.py."""

from mige.cli.check_data import main

if __name__ == "__main__":
    raise SystemExit(main())
