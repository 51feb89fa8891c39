"""The script of mige/cli/start_mini.py."""

from mige.cli.start_mini import main

if __name__ == "__main__":
    raise SystemExit(main())
