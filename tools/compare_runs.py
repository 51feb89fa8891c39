"""The script of mige/cli/compare_runs.py."""

from mige.cli.compare_runs import main

if __name__ == "__main__":
    raise SystemExit(main())
