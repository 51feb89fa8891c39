"""The script of mige/cli/judge.py."""

from mige.cli.judge import main

if __name__ == "__main__":
    raise SystemExit(main())
