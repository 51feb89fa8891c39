"""The script of mige/cli/demo.py."""

from mige.cli.demo import main

if __name__ == "__main__":
    raise SystemExit(main())
