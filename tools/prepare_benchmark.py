"""The script of mige/cli/prepare_benchmark.py."""

from mige.cli.prepare_benchmark import main

if __name__ == "__main__":
    raise SystemExit(main())
