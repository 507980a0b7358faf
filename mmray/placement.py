"""Where the processes of a step run: how many there are, what each holds, and who prepares its rows."""

from dataclasses import dataclass

import ray

from mmray.errors import ConfigError
from mmray.options import ScoreConfig

SPARE_CPUS = 1  # Ray Data's own tasks need one: actors that hold every CPU starve them
CPUS_PER_GPU = 8  # decode about as many images as a GPU of today scores with a small network


@dataclass(frozen=True)
class Placement:
    """A pool of processes on the cluster that this one is connected to."""

    min_actors: int
    max_actors: int
    num_cpus: int
    """CPUs that each process holds."""
    options: ScoreConfig
    """What was asked for, with `placement` and `decode_threads` settled."""


def place(options: ScoreConfig, num_slices: int) -> Placement:
    """Settles what `options` leave open, for this cluster.

    Raises:
        ConfigError: no CPU is left to prepare rows.
    """
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]
    cpus, gpus = (int(sum(node.get(kind, 0) for node in nodes)) for kind in ("CPU", "GPU"))
    beside = min((_cpus_beside(node, options) for node in nodes if node.get("GPU")), default=1)
    elsewhere = sum(node.get("CPU", 0) for node in nodes if not node.get("GPU"))
    few = bool(options.gpus_per_actor) and beside < CPUS_PER_GPU and elsewhere > SPARE_CPUS
    fed = options.placement == "cluster" or (options.placement == "auto" and few)
    threads = options.decode_threads or (beside if options.gpus_per_actor and not fed else 1)
    num_cpus = 1 if not options.gpus_per_actor else 0 if fed else threads
    room = (cpus - SPARE_CPUS) // (num_cpus or 1)  # for processes, by CPUs
    if options.gpus_per_actor:
        by_gpus = int(gpus / options.gpus_per_actor)
        fit = by_gpus if fed else min(by_gpus, room)
    else:
        fit = cpus // 2 if fed else room
    most = min(options.num_actors or max(fit, 1), num_slices)
    if fed and most * num_cpus + SPARE_CPUS >= cpus:
        raise ConfigError(
            f"{most} processes hold every CPU of {cpus}, and none is left to prepare their rows; give fewer --actors, "
            "or --placement local"
        )
    settled = options.model_copy(update={"placement": "cluster" if fed else "local", "decode_threads": threads})
    return Placement(min(options.min_actors or most, most), most, num_cpus, settled)


def _cpus_beside(node: dict[str, float], options: ScoreConfig) -> int:
    """Returns the CPUs of a node for each process that its GPUs allow."""
    return max(int((node.get("CPU", 0) - SPARE_CPUS) * options.gpus_per_actor / node["GPU"]), 1)
