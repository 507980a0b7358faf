"""Trains a model; for `ray job submit -- python jobs/train.py CONFIG.toml`; as `mmray train`."""

import sys

from mmray.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
