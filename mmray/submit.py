"""A command of mmray as a job of a running Ray cluster: submitted once, followed to its end, its exit code told.

Ray gives a job an id for ever, and no second attempt. Here an id names work: its attempts are the jobs ID, ID-2, ID-3,
..., one at a time, and whoever submits it while one runs follows that one. Ray creates a job only where no job of that
id is (https://docs.ray.io/en/latest/cluster/running-applications/job-submission/), so of two at once one is second.
"""

import hashlib
import itertools
import json
import os
import re
import shlex
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from ray.exceptions import AuthenticationError, RayError
from ray.job_submission import JobDetails, JobStatus, JobSubmissionClient

from mmray import __version__
from mmray.errors import ConfigError, EnvironmentFaultError, JobError

ADDRESSES = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")  # where Ray's client looks, in its order
POLL_S = 0.5
LOG_CHARACTERS_PER_S = 2**18  # a log is fetched whole each time: the longer it is, the less often
TIMEOUT_S = 60.0  # of a request
LOST_AFTER_S = 60.0  # a head that is restarted on the same state answers before
STOPPED = 130  # as where mmray itself is interrupted

T = TypeVar("T")


@dataclass(frozen=True)
class Claim:
    """The job that does the work."""

    name: str
    """The id of the work: of all its attempts."""
    job_id: str
    """Ray's submission id: of this attempt."""
    state: Literal["submitted", "running", "succeeded"]
    """What it was found to be, or what was done."""


class _Client(JobSubmissionClient):
    """Ray's client, whose requests do not wait for ever."""

    def _do_request(self, *args: Any, **kwargs: Any) -> Any:
        return super()._do_request(*args, timeout=TIMEOUT_S, **kwargs)


def connect(address: str | None = None) -> JobSubmissionClient:
    """Returns a client of a cluster's job API, with the token that Ray finds in the environment.

    Args:
        address: URL of the cluster's dashboard; by default what `RAY_API_SERVER_ADDRESS` or `RAY_ADDRESS` names.

    Raises:
        ConfigError: no cluster is named, or it refuses the token.
        EnvironmentFaultError: the cluster cannot be reached.
    """
    if address:
        os.environ[ADDRESSES[0]] = address  # over an argument, Ray's client prefers the environment
    elif not any(os.environ.get(name) for name in ADDRESSES):
        raise ConfigError(f"no cluster to submit to; give --address http://HEAD:8265, or set {ADDRESSES[0]}")
    return _ask(_Client)


def claim(
    client: JobSubmissionClient,
    command: Sequence[str],
    name: str | None = None,
    *,
    working_dir: str | None = None,
    variables: Mapping[str, str] | None = None,
) -> Claim:
    """Finds the job that runs a command, or submits one.

    A job of that name that is pending or running is found. So is one that succeeded, where the name was given; without
    a name, the same command runs again. After one that failed or was stopped comes the next attempt.

    Args:
        command: arguments of `mmray`; paths in them are the cluster's.
        name: id of the work; by default one made of the command, the folder and the variables.
        working_dir: folder, or URI of an archive, that the job runs in and imports from first.
        variables: for the environment of the job and its workers; Ray shows them to all who see its dashboard.

    Raises:
        ConfigError: the name is malformed or another command's, the folder is missing or too large, the token is wrong.
        EnvironmentFaultError: the cluster did not take the job.
    """
    environment = {"working_dir": working_dir, "env_vars": dict(variables or {})}
    work = {
        "mmray_id": _made_of(command, environment) if name is None else _checked(name),
        "mmray_command": shlex.join(command),
    }
    jobs = _jobs(client)
    last = _last_attempt(jobs, work)
    if last and not jobs[last].status.is_terminal():
        return Claim(work["mmray_id"], last, "running")
    if last and jobs[last].status == JobStatus.SUCCEEDED and name is not None:
        return Claim(work["mmray_id"], last, "succeeded")
    job_id = next(id_ for id_ in _attempt_ids(work["mmray_id"]) if id_ not in jobs)
    try:
        _submit(client, job_id, work, environment)
    except EnvironmentFaultError:
        if _last_attempt(_jobs(client), work) != job_id:
            raise
        return Claim(work["mmray_id"], job_id, "running")  # somebody else was faster, or only the answer was lost
    return Claim(work["mmray_id"], job_id, "submitted")


def _made_of(command: Sequence[str], environment: Mapping[str, Any]) -> str:
    folder = environment["working_dir"]
    made_of = [command, os.path.abspath(folder) if folder else None, sorted(environment["env_vars"].items())]
    digest = hashlib.sha256(json.dumps(made_of).encode()).hexdigest()[:8]
    return "-".join(["mmray", *re.findall(r"\w+", command[0], re.ASCII)[:1], digest])


def _checked(name: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", name):
        raise ConfigError(f"--id takes up to 100 letters, digits, dots, dashes and underscores, got {name!r}")
    return name


def _submit(client: JobSubmissionClient, job_id: str, work: Mapping[str, str], environment: dict[str, Any]) -> None:
    _ask(
        client.submit_job,
        # `exec`: a signal that ends Python would otherwise come as an exit code of the shell.
        entrypoint=f"exec python -m mmray.cli {work['mmray_command']}",
        submission_id=job_id,
        runtime_env={key: value for key, value in environment.items() if value},
        metadata={**work, "mmray_version": __version__},
    )


def _attempt_ids(name: str) -> Iterator[str]:
    yield name
    yield from (f"{name}-{attempt}" for attempt in itertools.count(2))


def _jobs(client: JobSubmissionClient) -> dict[str, JobDetails]:
    return {job.submission_id: job for job in _ask(client.list_jobs) if job.submission_id}


def _last_attempt(jobs: Mapping[str, JobDetails], work: Mapping[str, str]) -> str | None:
    """Returns the id of the last job of some work; refuses a name under which other work was done."""
    attempts = []
    for job_id, job in jobs.items():
        labels = job.metadata or {}
        if work["mmray_id"] in (job_id, labels.get("mmray_id")):
            if not work.items() <= labels.items():
                raise ConfigError(f"job {job_id} is of another command: {job.entrypoint}; choose another --id")
            attempts.append(job_id)
    return max(attempts, key=lambda job_id: jobs[job_id].start_time or 0, default=None)


def follow(client: JobSubmissionClient, job_id: str, on_log: Callable[[str], None]) -> None:
    """Hands on the log of a job as it grows, and returns when the job has succeeded.

    It asks again and again, rather than holding a connection: one that breaks costs nothing, and no line comes twice.

    Raises:
        JobError: the job ended with an exit code other than 0, which is the error's too, or was stopped (130).
        EnvironmentFaultError: the job died without an exit code, or its cluster is silent.
    """
    shown, due = 0, 0.0
    while True:
        job = _ask_patiently(client.get_job_info, job_id)
        ended = job.status.is_terminal()
        if ended or time.monotonic() >= due:
            try:
                log = _ask(client.get_job_logs, job_id)
                on_log(log[shown:])
                shown = len(log)
            except EnvironmentFaultError as error:  # how a job ends does not depend on whether its log can be read
                if ended:
                    on_log(f"mmray: the log of job {job_id} cannot be read: {error}\n")
            due = time.monotonic() + shown / LOG_CHARACTERS_PER_S
        if ended:
            return _check_end(job)
        time.sleep(POLL_S)


def _check_end(job: JobDetails) -> None:
    code, name = job.driver_exit_code, job.submission_id
    if job.status == JobStatus.SUCCEEDED:
        return
    if job.status == JobStatus.STOPPED:
        raise JobError(f"job {name} was stopped; the same command starts it again", STOPPED)
    if code is None or code <= 0:
        message = " ".join((job.message or "").split())[:500]
        raise EnvironmentFaultError(f"job {name} died: {message}; the same command starts it again")
    raise JobError(f"job {name} ended with exit code {code}; its log says why", code)


def _ask_patiently(question: Callable[[str], T], job_id: str) -> T:
    """Asks about a job until there is an answer, for as long as a head may take to come back."""
    deadline = time.monotonic() + LOST_AFTER_S
    while True:
        try:
            return _ask(question, job_id)
        except EnvironmentFaultError as error:
            if time.monotonic() > deadline:
                raise EnvironmentFaultError(
                    f"job {job_id} is out of sight: {error}; the same command finds it again if it still runs"
                ) from error
            time.sleep(POLL_S)


def _ask(question: Callable[..., T], *args: Any, **kwargs: Any) -> T:
    """Calls Ray's client, and turns what it raises into our errors."""
    try:
        return question(*args, **kwargs)
    except AuthenticationError as error:
        raise ConfigError(
            f"the Ray cluster refuses this client: {_cause(error)}; "
            "set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN (or RAY_AUTH_TOKEN_PATH) to the cluster's"
        ) from error
    except ValueError as error:
        raise ConfigError(_cause(error)) from error
    except (OSError, RuntimeError, RayError) as error:
        if "status code 413" in str(error):
            raise ConfigError(
                "--working-dir is too large for a cluster; list what the job can do without in .rayignore"
            ) from error
        raise EnvironmentFaultError(f"the Ray cluster did not do what it was asked: {_cause(error)}") from error


def _cause(error: BaseException) -> str:
    """Returns the one line that says most: the first, or the last of a traceback that came from the cluster."""
    lines = [line for line in str(error).splitlines() if line.strip(" .")] or [type(error).__name__]
    return lines[-1] if any(line.endswith("Traceback (most recent call last):") for line in lines) else lines[0]
