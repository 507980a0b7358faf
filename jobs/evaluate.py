"""Measures a bundle; for `ray job submit -- python jobs/evaluate.py BUNDLE TABLE --output DIR`; as `mmray evaluate`."""

import sys

from mmray.cli import main

if __name__ == "__main__":
    sys.exit(main(["evaluate", *sys.argv[1:]]))
