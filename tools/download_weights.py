"""The script of mige/cli/download_weights.py."""

from mige.cli.download_weights import main

if __name__ == "__main__":
    raise SystemExit(main())
