"""Scores a table; for `ray job submit -- python jobs/score.py BUNDLE INPUT OUTPUT`; as `mmray score`."""

import sys

from mmray.cli import main

if __name__ == "__main__":
    sys.exit(main(["score", *sys.argv[1:]]))
