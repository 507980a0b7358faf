"""Compares fusions; for `ray job submit -- python jobs/compare.py CONFIG.toml --split test`; as `mmray compare`."""

import sys

from mmray.cli import main

if __name__ == "__main__":
    sys.exit(main(["compare", *sys.argv[1:]]))
