"""The script of mige/cli/pretrain_mini_encoder.py."""

from mige.cli.pretrain_mini_encoder import main

if __name__ == "__main__":
    raise SystemExit(main())
