"""`mmray submit`: another command as a job of a running cluster."""

import argparse
import os
import sys
from collections.abc import Sequence
from typing import Any

from mmray.errors import ConfigError

FOUND = {
    "submitted": "is submitted",
    "running": "runs already; following it",
    "succeeded": "has succeeded before; nothing is run",
}


def register(commands: Any) -> None:
    """Adds this command to the parser."""
    submit = commands.add_parser(
        "submit",
        help="run a command as a job of a running cluster",
        usage="mmray submit [--address URL] [--id ID] [--working-dir DIR] [--env NAME] -- COMMAND ARGS...",
        description="Run `mmray COMMAND ARGS...` as a job of a Ray cluster, show its log, and exit with its exit code "
        "(130 if it was stopped, 5 if it died without one). Paths among ARGS are the cluster's, not this machine's. "
        "While the job runs, the same command follows it; Ctrl-C leaves it running.",
        epilog="A cluster that asks for a token finds it in RAY_AUTH_MODE=token and RAY_AUTH_TOKEN or "
        "RAY_AUTH_TOKEN_PATH. Example: mmray submit --id tonight -- score s3://models/one s3://tables/tonight "
        "s3://scored/tonight",
    )
    submit.add_argument(
        "--address",
        metavar="URL",
        help="the cluster's dashboard, http://HEAD:8265 (default: RAY_API_SERVER_ADDRESS, then RAY_ADDRESS)",
    )
    submit.add_argument(
        "--id",
        metavar="ID",
        help="name of the work: once it has succeeded it is not run again; if it failed, it is, as ID-2, ID-3, ... "
        "(default: made of the command, which runs every time)",
    )
    submit.add_argument(
        "--working-dir",
        metavar="DIR",
        help="folder that the job runs in, a checkout for example: copied to the cluster without what .gitignore and "
        ".rayignore list, at most 100 MiB (default: none, and the mmray that is installed there)",
    )
    submit.add_argument(
        "--env",
        action="append",
        default=[],
        metavar="NAME",
        help="variable of this environment for the job's; repeatable. Ray shows it to all who see its dashboard: "
        "credentials belong in the cluster's own environment",
    )
    submit.add_argument("words", nargs="+", metavar="COMMAND", help="command of mmray, and its arguments")
    submit.set_defaults(run=_submit)


def _submit(args: argparse.Namespace) -> None:
    from mmray.submit import claim, connect, follow

    variables = _variables(args.env)
    client = connect(args.address)
    job = claim(client, args.words, args.id, working_dir=args.working_dir, variables=variables)
    print(f"mmray: job {job.job_id} {FOUND[job.state]}", file=sys.stderr)
    if job.state == "succeeded":
        return
    try:
        follow(client, job.job_id, _show)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(
            f"job {job.job_id} runs on; the same command with --id {job.name} follows it, "
            f"RAY_API_SERVER_ADDRESS={client.get_address()} ray job stop {job.job_id} stops it"
        ) from None


def _variables(names: Sequence[str]) -> dict[str, str]:
    for name in names:
        if name not in os.environ:
            raise ConfigError(f"--env {name}: there is no such variable here; export it, and give its name alone")
    return {name: os.environ[name] for name in names}


def _show(text: str) -> None:
    try:
        print(text, end="", flush=True)
    except BrokenPipeError:  # whoever read it has gone; the exit code still counts
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
