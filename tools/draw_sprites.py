"""The script of mige/cli/draw_sprites.py."""

from mige.cli.draw_sprites import main

if __name__ == "__main__":
    raise SystemExit(main())
