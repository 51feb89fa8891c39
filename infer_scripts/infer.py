"""The script of mige/cli/infer.py."""

from mige.cli.infer import main

if __name__ == "__main__":
    raise SystemExit(main())
