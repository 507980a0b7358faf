"""The manifests of deploy/ are what Kubernetes, KubeRay and mmray understand, to the letter: a typo fails here.

KubeRay's CustomResourceDefinitions lie beside the project (`MMRAY_SHARED`, `../shared`): they are large, and not ours.
"""

import copy
import re
import shlex
import tomllib
from pathlib import Path

import pytest
import ray
import yaml
from manifests import (
    EVERYTHING,
    VALUES,
    VARIANTS,
    Node,
    clusters,
    every,
    found,
    groups,
    jobs,
    manifests,
    only,
    pods,
    problems,
    strict,
    walk,
)
from render import HERE, KINDS, main, render, text

from mmray import __version__
from mmray.cli import build_parser
from mmray.serve.app import ServeArgs

OPEN = {"labels", "annotations", "matchLabels", "requests", "limits", "rayStartParams"}  # any key may stand there


@pytest.fixture(scope="session")
def schemas(shared: Path) -> dict[str, Node]:
    """The strict schema of each of KubeRay's kinds, and of what others have in common with them."""
    made = {}
    for file in sorted((shared / "crds").glob("*.yaml")):
        definition = yaml.load(file.read_text(), Loader=yaml.CSafeLoader)["spec"]
        (version,) = (version for version in definition["versions"] if version["name"] == "v1")
        schema = strict(version["schema"]["openAPIV3Schema"])
        job = schema["properties"]["spec"]["properties"]
        if definition["names"]["kind"] == "RayJob":
            made["pod"] = job["submitterPodTemplate"]
            policy = job["rayClusterSpec"]["properties"]["networkPolicy"]["properties"]
            made["ingress"] = policy["head"]["properties"]["ingressRules"]
        made[definition["names"]["kind"]] = schema
    if not made:
        pytest.skip(f"no KubeRay definitions in {shared / 'crds'}")
    for schema in made.values():  # a CustomResourceDefinition says nothing of metadata; a pod template in it does
        if "kind" in schema.get("properties", {}):
            schema["properties"]["metadata"] = made["pod"]["properties"]["metadata"]
    return made


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_manifest_for_kuberay_holds_to_its_schema(schemas: dict[str, Node], variant: str) -> None:
    kinds = []
    for document in manifests(variant):
        if document["kind"].startswith("Ray"):
            kinds.append(document["kind"])
            assert document["apiVersion"] == "ray.io/v1"
            assert problems(schemas[document["kind"]], document) == []
    assert sorted(kinds) == ["RayCluster", "RayCronJob", "RayJob", "RayJob", "RayService"]


@pytest.mark.parametrize("kind", ["rayjob-score", "raycronjob", "rayservice"])
def test_a_typo_in_any_key_of_a_manifest_is_found(schemas: dict[str, Node], kind: str) -> None:
    (document,) = render(kind, **EVERYTHING)
    for path in [path for path, _ in walk(document) if path and isinstance(path[-1], str) and not OPEN & {*path[:-1]}]:
        broken = copy.deepcopy(document)
        node = broken
        for step in path[:-1]:
            node = node[step]
        node[f"{path[-1]}x"] = node.pop(path[-1])
        assert problems(schemas[document["kind"]], broken), path


def test_kubernetes_own_kinds_have_only_keys_that_there_are(schemas: dict[str, Node]) -> None:
    account, policy, monitor, cron = (
        only(manifests("everything"), kind) for kind in ("ServiceAccount", "NetworkPolicy", "PodMonitor", "CronJob")
    )
    assert account.keys() == {"apiVersion", "kind", "metadata", "imagePullSecrets"}
    assert account["metadata"].keys() == {"name", "namespace", "annotations"}
    assert policy["spec"].keys() == {"podSelector", "policyTypes", "ingress"}
    assert problems(schemas["ingress"], policy["spec"]["ingress"]) == []
    assert monitor["spec"].keys() == {"selector", "podMetricsEndpoints"}
    assert monitor["spec"]["podMetricsEndpoints"][0].keys() == {"port", "relabelings"}
    assert cron["spec"].keys() == {
        "schedule", "timeZone", "concurrencyPolicy", "startingDeadlineSeconds", "jobTemplate"
    }  # fmt: skip
    job = cron["spec"]["jobTemplate"]["spec"]
    assert job.keys() == {
        "backoffLimit", "activeDeadlineSeconds", "ttlSecondsAfterFinished", "podFailurePolicy", "template"
    }  # fmt: skip
    assert problems(schemas["pod"], job["template"]) == []
    (rule,) = job["podFailurePolicy"]["rules"]
    assert rule["action"] == "FailJob"
    assert rule["onExitCodes"].keys() == {"containerName", "operator", "values"}
    assert rule["onExitCodes"]["containerName"] == job["template"]["spec"]["containers"][0]["name"]


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_namespace_that_enforces_the_restricted_standard_takes_every_pod(variant: str) -> None:
    documents = manifests(variant)
    assert only(documents, "Namespace")["metadata"]["labels"] == {"pod-security.kubernetes.io/enforce": "restricted"}
    own = {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
    seen = [pod["spec"] for document in documents for pod in pods(document)]
    assert len(seen) == 3 * 3 + 2 * 2 + 1, "head, worker and submitter of a job; head and worker of others; a CronJob's"
    for pod in seen:
        assert pod["securityContext"] == {"runAsNonRoot": True, "seccompProfile": {"type": "RuntimeDefault"}}
        for container in pod["containers"]:
            assert container["securityContext"] == own
            assert container["resources"]["requests"] == container["resources"]["limits"]
    for options in (node for document in documents for node in found(document, "autoscalerOptions")):
        assert options["securityContext"] == own


def test_the_network_policy_reaches_every_pod_and_lets_in_whom_it_names() -> None:
    documents = manifests()
    policy = only(documents, "NetworkPolicy")
    mine = policy["spec"]["podSelector"]["matchLabels"].items()
    submitters = 0
    for document in documents:
        for pod in pods(document):
            labels = pod["metadata"]["labels"]
            assert mine <= labels.items()
            submitters += labels["app.kubernetes.io/component"] == "submit"
    assert submitters == 4
    ports = {port["name"]: port["containerPort"] for port in found(only(documents, "RayService"), "ports")[0]}
    let_in = [[port["port"] for port in rule.get("ports", [])] for rule in policy["spec"]["ingress"]]
    assert let_in == [[], [ports["dashboard"]], [ports["serve"]], [ports["metrics"]]]
    components = [found(rule, "app.kubernetes.io/component") for rule in policy["spec"]["ingress"]]
    assert components == [["ray"], ["submit"], [], []]


def test_a_gpu_of_a_worker_is_used_by_what_runs_there() -> None:
    for kind in ("rayjob-train", "rayjob-score", "raycronjob"):
        (document,) = render(kind, worker_gpus=2, max_workers=3, train_workers=3)
        (job,) = jobs(document)
        assert "use_gpu=true" in job["entrypoint"] or "--gpus 1" in job["entrypoint"]
        assert re.search(r"(num_workers=|--actors )6\b", job["entrypoint"])
        head, worker = (group["template"]["spec"]["containers"][0] for group in groups(clusters(document)[0]))
        assert worker["resources"]["limits"]["nvidia.com/gpu"] == 2
        assert "nvidia.com/gpu" not in head["resources"]["limits"]


def test_every_entrypoint_is_a_command_that_mmray_understands() -> None:
    seen = set()
    for document in every():
        for job in jobs(document):
            program, *arguments = shlex.split(job["entrypoint"])
            assert program == "mmray"
            seen.add(build_parser().parse_args(arguments).run.__name__)
    assert seen == {"_train", "_score", "_tick"}


def test_a_value_reaches_its_command_as_it_is() -> None:
    odd = "s3://tables/it's $HOME/*.parquet"
    (document,) = render("rayjob-score", table=odd)
    assert shlex.split(document["spec"]["entrypoint"])[3] == odd


def test_the_cron_job_ticks_on_the_cluster_that_stays() -> None:
    (cron,), (cluster,) = render("cronjob"), render("raycluster")
    (container,) = cron["spec"]["jobTemplate"]["spec"]["template"]["spec"]["containers"]
    end = container["command"].index("--")
    assert container["command"][:end] == [
        "mmray", "submit", "--address", f"http://{cluster['metadata']['name']}-head-svc:8265", "--id", "$(JOB)"
    ]  # fmt: skip
    assert build_parser().parse_args(container["command"][end + 1 :]).run.__name__ == "_tick"
    (nightly,) = render("raycronjob")
    assert container["command"][end:] == ["--", *shlex.split(nightly["spec"]["jobTemplate"]["entrypoint"])[1:]]
    environment = {entry["name"]: entry for entry in container["env"]}
    secret = environment["RAY_AUTH_TOKEN"]["valueFrom"]["secretKeyRef"]
    assert secret == {"name": cluster["spec"]["authOptions"]["secretName"], "key": "auth_token"}
    pytest.importorskip("mmray.commands.submit", reason="mmray submit comes with another change")
    assert build_parser().parse_args(container["command"][1:]).run.__name__ == "_submit"


def test_the_ray_service_serves_the_serve_config_with_its_own_bundle() -> None:
    (service,) = render("rayservice", bundle="s3://b/other", serve_port=8123, worker_gpus=1)
    config = yaml.safe_load(service["spec"]["serveConfigV2"])
    original = yaml.safe_load((HERE / "serve.yaml").read_text())
    (application,) = config["applications"]
    assert application["deployments"][0]["user_config"] == {"bundle": "s3://b/other"}
    args = ServeArgs.model_validate(application["args"])
    assert args.settings.gpus_per_replica == 1
    assert config["http_options"] == {**original["http_options"], "port": 8123}
    (other,) = render("rayservice", bundle="s3://b/another", serve_port=8123, worker_gpus=1)
    again = yaml.safe_load(other["spec"]["serveConfigV2"])["applications"][0]
    assert again["args"] == application["args"], "or the replicas that run would be restarted"
    application["args"], application["deployments"][0]["user_config"] = (
        original["applications"][0]["args"],
        original["applications"][0]["deployments"][0]["user_config"],
    )
    assert application == original["applications"][0]
    for group in groups(clusters(service)[0]):
        (container,) = group["template"]["spec"]["containers"]
        assert {"name": "serve", "containerPort": 8123} in container["ports"]
        assert {"name": "RAY_SERVE_ENABLE_HA_PROXY", "value": "1"} in container["env"]
    assert container["readinessProbe"]["httpGet"] == {"path": "/-/healthz", "port": "serve"}


def test_versions_are_those_of_the_project() -> None:
    project = tomllib.loads((HERE.parent / "pyproject.toml").read_text())["project"]
    pins = [line.partition("==")[2] for line in project["dependencies"] if line.startswith("ray[")]
    assert pins == [ray.__version__]
    for document in every():
        assert [cluster["rayVersion"] for cluster in clusters(document)] == pins[: len(clusters(document))]
        assert {*found(document, "image")} <= {f"{VALUES['image']}:{__version__}"}
    for file in HERE.rglob("*.j2"):
        assert not re.search(r"\d+\.\d+\.\d+(?!\.)", file.read_text()), f"{file} has a version of its own"


def test_every_value_is_used_and_none_is_written_twice() -> None:
    others = {
        key: 1000 + k if isinstance(value, int) else f"other-{k}-" for k, (key, value) in enumerate(VALUES.items())
    }
    printed = {kind: re.sub("#.*", "", text(kind, **others)) for kind in KINDS}
    assert [key for key, value in others.items() if str(value) not in "\n".join(printed.values())] == [], "used nowhere"
    names = {value for value in VALUES.values() if isinstance(value, str)}
    names -= {"", "mmray"}  # that one is the program's name too
    left = re.compile(rf"(?<![\w/.-])({'|'.join(map(re.escape, names))})(?![\w/.-])")
    assert [kind for kind in KINDS if left.search(printed[kind])] == []
    numbers = re.compile(r"\b(replicas|minReplicas|maxReplicas|activeDeadlineSeconds): (?!1\d{3}\b)|: 8000")
    assert [kind for kind in KINDS if numbers.search(printed[kind])] == []


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["rayjob-scor"], "did you mean 'rayjob-score'?"),
        (["raycluster", "--set", "tabel=s3://x"], "did you mean 'table'?"),
        (["raycluster", "--set", "max_workers=many"], "max_workers is a whole number, got 'many'"),
        (["raycluster", "--set", "table"], "KEY=VALUE, got 'table'"),
        ([], "KIND"),
    ],
)
def test_a_wrong_command_line_is_answered_with_the_right_one(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    printed = capsys.readouterr()
    assert words in printed.err
    assert printed.out == ""


def test_what_is_printed_is_what_is_rendered(capsys: pytest.CaptureFixture[str]) -> None:
    main(["namespace", "raycluster", "--set", "max_workers=9"])
    assert list(yaml.safe_load_all(capsys.readouterr().out)) == [
        *render("namespace", max_workers=9),
        *render("raycluster", max_workers=9),
    ]


def test_the_guide_has_only_commands_that_there_are(capsys: pytest.CaptureFixture[str]) -> None:
    lines = (HERE / "README.md").read_text().splitlines()
    rendered = [shlex.split(words[1]) for line in lines if (words := re.search(r"deploy/render\.py ([^|>]+)", line))]
    for words in rendered:
        main(words)
    assert {kind for words in rendered for kind in words} >= set(KINDS), "each kind has its place in the guide"
    submitted = [shlex.split(line.partition(" -- ")[2]) for line in lines if line.startswith("mmray submit")]
    assert [build_parser().parse_args(words).command for words in submitted] == ["score", "score"]
    names = {document["metadata"]["name"] for document in manifests()} | {VALUES["token_secret"]}
    for name in re.findall(r"(?:job|cronjob|svc|rayjob|generic)[/ ](mmray-[a-z-]+)", "\n".join(lines)):
        known = {name, name.removesuffix("-serve-svc"), name.removesuffix("-head-svc")}
        assert known & names or name == "mmray-store", f"nothing is called {name}"
