"""The script of mige/cli/extract_features.py."""

from mige.cli.extract_features import main

if __name__ == "__main__":
    raise SystemExit(main())
