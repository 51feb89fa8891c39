"""The script of mige/cli/ablate.py."""

from mige.cli.ablate import main

if __name__ == "__main__":
    raise SystemExit(main())
