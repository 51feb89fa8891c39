"""The script of mige/cli/train_mige.py."""

from mige.cli.train_mige import main

if __name__ == "__main__":
    raise SystemExit(main())
