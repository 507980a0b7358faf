"""The manifests keep the rules that KubeRay's operator checks beyond its schema.

They stand in ray-operator/controllers/ray/utils/validation.go and controllers/ray/common/ of KubeRay 1.7; each is held
here with something that breaks it.
"""

import re
import zoneinfo
from collections.abc import Callable
from typing import Any

import pytest
from manifests import VALUES, Node, clusters, every, found, groups, jobs, pods
from render import render

NAME_LENGTH = {"RayCluster": 53, "RayJob": 47, "RayService": 47, "RayCronJob": 36, "CronJob": 52}
RULES: dict[str, tuple[Callable[[Node], bool], Callable[[Node], Any]]] = {}


def rule(breaks: Callable[[Node], Any]) -> Callable[[Callable[[Node], bool]], Callable[[Node], bool]]:
    """Keeps a rule with something that breaks it."""

    def keep(holds: Callable[[Node], bool]) -> Callable[[Node], bool]:
        RULES[holds.__name__] = holds, breaks
        return holds

    return keep


@rule(lambda job: job["metadata"].update(name="a" * 48))
def names_leave_room_for_what_is_made_of_them(document: Node) -> bool:
    name = document["metadata"]["name"]
    return len(name) <= NAME_LENGTH.get(document["kind"], 63) and bool(
        re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", name)
    )


@rule(lambda job: job["spec"].update(shutdownAfterJobFinishes=False))
def a_job_that_is_held_or_leaves_later_ends_its_cluster(document: Node) -> bool:
    return all(job["shutdownAfterJobFinishes"] and "deletionStrategy" not in job for job in jobs(document))


@rule(lambda job: job["spec"].update(activeDeadlineSeconds=0))
def bounds_of_a_job_are_positive(document: Node) -> bool:
    bounds = ("activeDeadlineSeconds", "preRunningDeadlineSeconds")
    none_less = all(job["backoffLimit"] >= 0 and job["ttlSecondsAfterFinished"] >= 0 for job in jobs(document))
    return none_less and all(job[bound] > 0 for job in jobs(document) for bound in bounds)


@rule(lambda job: job["spec"].update(submissionMode="SidecarMode"))
def a_submitter_of_its_own_goes_with_its_mode(document: Node) -> bool:
    return all(job["submissionMode"] == "K8sJobMode" and "clusterSelector" not in job for job in jobs(document))


@rule(lambda job: job["spec"]["rayClusterSpec"]["workerGroupSpecs"][0].update(minReplicas=9))
def workers_have_bounds(document: Node) -> bool:
    workers = [group for cluster in clusters(document) for group in cluster["workerGroupSpecs"]]
    return all(0 <= group["minReplicas"] <= group["replicas"] <= group["maxReplicas"] for group in workers)


@rule(lambda job: job["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"].update(restartPolicy="Always"))
def pods_under_the_autoscaler_are_not_restarted(document: Node) -> bool:
    scaled = [cluster for cluster in clusters(document) if cluster.get("enableInTreeAutoscaling")]
    restarts = [group["template"]["spec"].get("restartPolicy", "Never") for c in scaled for group in groups(c)]
    return all(c["autoscalerOptions"]["version"] == "v2" for c in scaled) and set(restarts) <= {"Never"}


@rule(lambda job: job["spec"]["rayClusterSpec"].update(rayVersion="2.51.0"))
def a_token_needs_a_version_that_asks_for_one(document: Node) -> bool:
    versions = [tuple(map(int, cluster["rayVersion"].split("."))) for cluster in clusters(document)]
    return all(c["authOptions"]["mode"] == "token" for c in clusters(document)) and min(versions, default=(3,)) >= (
        2,
        52,
    )


@rule(lambda job: job["spec"]["rayClusterSpec"].update(networkPolicy={"mode": "DenyAll"}))
def nothing_behind_a_gate_that_is_off_is_used(document: Node) -> bool:
    gated = {"networkPolicy", "tlsOptions", "historyServerOptions", "gcsFaultToleranceOptions", "upgradeStrategy"}
    return not any(gated & cluster.keys() for cluster in clusters(document))


@rule(lambda job: job["spec"]["rayClusterSpec"]["headGroupSpec"].update(resources={"CPU": "0"}))
def a_group_says_once_what_it_has(document: Node) -> bool:
    every = [group for cluster in clusters(document) for group in groups(cluster)]
    return not any({"resources", "labels"} & group.keys() or "labels" in group["rayStartParams"] for group in every)


@rule(lambda job: job["spec"]["submitterPodTemplate"]["metadata"]["labels"].update({"app.kubernetes.io/name": "x"}))
def labels_that_kuberay_selects_by_are_left_to_it(document: Node) -> bool:
    labels = {label for pod in pods(document) for label in pod["metadata"]["labels"]}
    own = {"app.kubernetes.io/name", "app.kubernetes.io/created-by"}
    return not labels & own and not any(label.startswith("ray.io/") for label in labels)


@rule(lambda job: found(job, "env")[0].append({"name": "RAY_ADDRESS", "value": "x"}))
def variables_that_kuberay_sets_are_left_to_it(document: Node) -> bool:
    own = r"RAY_ADDRESS|RAY_CLUSTER_NAME|RAY_REDIS_ADDRESS|REDIS_.*|RAY_AUTH_.*|RAY_enable_autoscaler_v2|KUBERAY_.*"
    names = [entry["name"] for c in clusters(document) for env in found(c, "env") for entry in env]
    return not any(re.fullmatch(own, name) for name in names)


@rule(lambda job: job["spec"]["rayClusterSpec"]["headGroupSpec"]["rayStartParams"].update({"num-cpu": "0"}))
def parameters_are_options_of_ray_start(document: Node) -> bool:
    from ray.scripts.scripts import start

    options = {name for option in start.params for name in option.opts}
    every = [group for cluster in clusters(document) for group in groups(cluster)]
    return all(f"--{parameter}" in options for group in every for parameter in group["rayStartParams"])


@rule(lambda job: job["spec"].update(schedule="TZ=UTC 0 2 * * *"))
def a_schedule_is_five_fields_without_a_time_zone(document: Node) -> bool:
    plain = all(re.fullmatch(r"[-\d*,/]+( [-\d*,/]+){4}", schedule) for schedule in found(document, "schedule"))
    return plain and {*found(document, "timeZone")} <= zoneinfo.available_timezones()


@rule(
    lambda job: job["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"].update(serviceAccountName="a" * 51)
)
def the_service_account_keeps_its_name(document: Node) -> bool:
    return all(len(name) <= 50 for name in found(document, "serviceAccountName"))  # the operator cuts off longer ones


@pytest.mark.parametrize("name", RULES)
def test_the_operator_takes_every_manifest(name: str) -> None:
    holds, breaks = RULES[name]
    assert [document["metadata"]["name"] for document in every() if not holds(document)] == []
    (broken,) = render("rayjob-score")
    breaks(broken)
    assert not holds(broken)


def test_kueue_starts_a_job_that_has_a_queue_and_no_autoscaler() -> None:
    for kind in ("rayjob-train", "rayjob-score"):
        (free,), (queued,) = render(kind), render(kind, queue="nightly")
        assert "suspend" not in free["spec"]
        assert "labels" not in free["metadata"]
        assert queued["metadata"]["labels"] == {"kueue.x-k8s.io/queue-name": "nightly"}
        assert queued["spec"]["suspend"] is True
        assert "enableInTreeAutoscaling" not in queued["spec"]["rayClusterSpec"]
    assert queued["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]["replicas"] == VALUES["max_workers"]
    (nightly,) = render("raycronjob", queue="nightly")  # its jobs get no label: Kueue would never start them
    assert "suspend" not in nightly["spec"]["jobTemplate"]
