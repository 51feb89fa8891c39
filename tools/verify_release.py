"""The script of mige/cli/verify_release.py."""

from mige.cli.verify_release import main

if __name__ == "__main__":
    raise SystemExit(main())
