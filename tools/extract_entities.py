"""The script of mige/cli/extract_entities.py."""

from mige.cli.extract_entities import main

if __name__ == "__main__":
    raise SystemExit(main())
