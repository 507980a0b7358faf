"""Tries other settings; for `ray job submit -- python jobs/tune.py CONFIG.toml --trials 20`; as `mmray tune`."""

import sys

from mmray.cli import main

if __name__ == "__main__":
    sys.exit(main(["tune", *sys.argv[1:]]))
