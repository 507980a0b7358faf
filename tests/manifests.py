"""The manifests of deploy/ as tests look at them."""

from collections.abc import Iterable, Iterator
from functools import cache
from itertools import chain
from typing import Any

import yaml
from jsonschema import Draft202012Validator
from render import HERE, KINDS, render

Node = dict[str, Any]
VALUES: Node = yaml.safe_load((HERE / "values.yaml").read_text())
EVERYTHING: Node = {
    "worker_gpus": 2,
    "queue": "nightly",
    "store_role": "arn:aws:iam::1:role/x",
    "store_secret": "store",
    "pull_secret": "pull",
}
VARIANTS: dict[str, Node] = {
    "as it comes": {},
    "everything": EVERYTHING,
    "no autoscaler": {"min_workers": 2, "max_workers": 2},
}


@cache
def manifests(variant: str = "as it comes") -> tuple[Node, ...]:
    """Every manifest for Kubernetes."""
    return tuple(document for kind in KINDS if kind != "cluster" for document in render(kind, **VARIANTS[variant]))


def every() -> Iterator[Node]:
    """Every manifest in every variant."""
    return chain.from_iterable(map(manifests, VARIANTS))


def walk(node: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """Every node of a document with its path."""
    yield path, node
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, value in items:
        yield from walk(value, (*path, key))


def only(documents: Iterable[Node], kind: str) -> Node:
    """The one manifest of a Kubernetes kind."""
    (document,) = (document for document in documents if document["kind"] == kind)
    return document


def found(document: Node, key: str) -> list[Any]:
    """What stands at a key, wherever it is."""
    return [node for path, node in walk(document) if path and path[-1] == key]


def clusters(document: Node) -> list[Node]:
    """The cluster that a manifest describes, if it does."""
    if document["kind"] == "RayCluster":
        return [document["spec"]]
    return found(document, "rayClusterSpec") + found(document, "rayClusterConfig")


def jobs(document: Node) -> list[Node]:
    """The RayJobSpec of a manifest, if it has one."""
    return [node for _, node in walk(document) if isinstance(node, dict) and "entrypoint" in node]


def groups(cluster: Node) -> list[Node]:
    """The head group and the worker groups of a cluster."""
    return [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]


def pods(document: Node) -> list[Node]:
    """The pod templates of a manifest."""
    return found(document, "template") + found(document, "submitterPodTemplate")


def strict(schema: Any) -> Any:
    """Refuses unknown keys wherever a schema names the known ones."""
    if isinstance(schema, list):
        return [strict(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    made = {key: strict(value) for key, value in schema.items()}
    return {"additionalProperties": False, **made} if isinstance(made.get("properties"), dict) else made


def problems(schema: Node, document: Any) -> list[str]:
    """Where a document does not hold to a schema."""
    return [f"{error.json_path}: {error.message}" for error in Draft202012Validator(schema).iter_errors(document)]
