"""The script of mige/cli/start_ablation.py."""

from mige.cli.start_ablation import main

if __name__ == "__main__":
    raise SystemExit(main())
