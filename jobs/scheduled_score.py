"""One tick of a schedule; for `ray job submit -- python jobs/scheduled_score.py BUNDLE TABLE ROOT`; as `mmray tick`."""

import sys

from mmray.cli import main

if __name__ == "__main__":
    sys.exit(main(["tick", *sys.argv[1:]]))
