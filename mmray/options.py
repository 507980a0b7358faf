"""How a table is scored: what may differ from run to run, for the rest is in the bundle."""

from typing import Any, Literal

from pydantic import Field, model_validator

from mmray.config import Section

OnUnavailable = Literal["fail", "record"]
CALLS_PER_PROCESS = 2  # one slice is read and committed while another is scored: a slow store does not idle the model


class ScoreConfig(Section):
    """How a table is scored; only what may differ from run to run, for the rest is in the bundle."""

    image_column: str | None = None
    """Column of images; by default the one the model was trained on."""
    text_column: str | None = None
    """Column of texts; by default the one the model was trained on."""
    image_roots: tuple[str, ...] = ()
    """Folders, URIs or https:// URLs that images may lie in; without any, the table's own folder."""
    probabilities: bool = False
    """Add the probability of every label."""
    precision: Literal["auto", "bf16", "fp32"] = "fp32"
    """Number format of the forward pass; auto takes bf16 where the hardware has it and the golden rows agree."""
    batch_size: int | None = Field(default=None, ge=1)
    """Rows per forward pass, by default 32, on a GPU 256; never changes a score by more than the stated tolerance."""
    slice_rows: int | None = Field(default=None, ge=1)
    """Rows per slice, the unit of work and commit; by default a 64th of the table, within bounds."""
    num_actors: int | None = Field(default=None, ge=1)
    """Scoring processes; by default one per CPU, or per GPU where `gpus_per_actor` is set."""
    min_actors: int | None = Field(default=None, ge=1)
    """Fewest scoring processes: from here they grow to `num_actors` as there is work; by default all start at once."""
    gpus_per_actor: float = Field(default=0.0, ge=0)
    """GPUs each scoring process holds, or a fraction of one."""
    local: bool | None = None
    """Score by processes of this machine, without Ray; by default where no cluster is at hand and rows are few."""
    placement: Literal["auto", "local", "cluster"] = "auto"
    """Who prepares a process's rows: itself (local), or tasks on every node with a free CPU (cluster); auto takes the
    cluster where the CPUs beside the GPUs are few and other nodes have some."""
    node_labels: dict[str, str] = Field(default_factory=dict)
    """Labels of the nodes that scoring processes may run on; any by default."""
    decode_threads: int | None = Field(default=None, ge=1)
    """Threads that decode images in each scoring process; by default 1, or the CPUs beside each process with a GPU."""
    reads: int = Field(default=64, ge=1)
    """Images of a store that each scoring process reads at a time; local ones are read as they are decoded."""
    on_unavailable: OnUnavailable = "fail"
    """What becomes of an image that cannot be read now, in spite of several tries: the run fails, and the same command
    goes on; or its row is recorded as `UNAVAILABLE`."""
    stuck_after_s: float = Field(default=600.0, gt=0)
    """Seconds that any step of a slice is given; a process that gets on with none for so long, and for twenty times as
    long as it ever took, is ended, and its slices are scored where a row that hangs can be named."""
    max_error_rate: float = Field(default=1.0, ge=0, le=1)
    """Share of rows that may fail before `_SUCCESS` is withheld (exit 6); by default any, each with its reason."""

    @model_validator(mode="after")
    def _grow(self) -> "ScoreConfig":
        if self.min_actors is not None and self.num_actors is not None and self.min_actors > self.num_actors:
            raise ValueError(f"{self.min_actors} processes at least and {self.num_actors} at most leave none")
        return self

    @model_validator(mode="after")
    def _stay(self) -> "ScoreConfig":
        if self.local and self.needs_cluster:
            raise ValueError("--local is without Ray, which --node-label, --placement and --min-actors need")
        return self

    @property
    def needs_cluster(self) -> bool:
        """Whether something is asked for that only Ray gives."""
        return bool(self.node_labels or self.min_actors or self.placement == "cluster")

    @property
    def rows_per_batch(self) -> int:
        """Rows of a forward pass: on a CPU what its cache holds, on a GPU what keeps it busy."""
        return self.batch_size or (256 if self.gpus_per_actor else 32)

    def numeric_options(self) -> dict[str, Any]:
        """Returns the settings that change what is written: part of the plan's identity."""
        return self.model_dump(include={"image_column", "text_column", "image_roots", "probabilities", "precision"})


COLUMNS = "name the right one with --image-column or --text-column"
"""What to do about a column of a modality that a table lacks."""


def column_of(modality: str, options: ScoreConfig, trained: Any) -> str:
    """Returns the name of a modality's column: the run's own, or the one trained on."""
    return str(getattr(options, f"{modality}_column") or getattr(trained, f"{modality}_column"))
