"""The script of mige/cli/evaluate.py."""

from mige.cli.evaluate import main

if __name__ == "__main__":
    raise SystemExit(main())
