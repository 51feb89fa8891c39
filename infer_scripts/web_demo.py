"""The script of mige/cli/web_demo.py."""

from mige.cli.web_demo import main

if __name__ == "__main__":
    raise SystemExit(main())
