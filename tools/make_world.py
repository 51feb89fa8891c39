"""The script of mige/cli/make_world.py."""

from mige.cli.make_world import main

if __name__ == "__main__":
    raise SystemExit(main())
