"""How an endpoint runs and what it refuses."""

from typing import Annotated, Literal

from pydantic import Field, SecretStr, model_validator

from mmray.config import Section
from mmray.options import ScoreConfig


class ServeConfig(Section):
    """An endpoint: where it listens, how many processes answer, and a bound for everything that a client can send."""

    host: str = Field(default="127.0.0.1", pattern=r"^[0-9A-Za-z.:_-]+$")
    """Address to listen on; only this machine by default."""
    port: int = Field(default=8000, ge=1, le=65_535)
    """Port to listen on."""
    tls_cert: str | None = None
    """File with the certificate and what leads from it to a root, in PEM; answers over HTTPS only."""
    tls_key: str | None = None
    """File with the certificate's private key, in PEM, without a passphrase."""
    cors_origins: tuple[Annotated[str, Field(pattern=r"^https?://[^/]+$")], ...] = ()
    """Origins whose pages may call the endpoint from a browser; none by default."""
    num_replicas: int = Field(default=1, ge=1)
    """Processes that hold the model."""
    gpus_per_replica: float = Field(default=0.0, ge=0)
    """GPUs of each, or a fraction of one."""
    precision: Literal["auto", "bf16", "fp32"] = "fp32"
    """Number format of the forward pass, as in scoring."""
    batch_size: int = Field(default=32, ge=1)
    """Most items in one forward pass; what waits while the model is busy goes together."""
    decode_threads: int = Field(default=2, ge=1)
    """Threads of each replica that read and decode images."""
    image_roots: tuple[str, ...] = ()
    """Folders, URIs or https:// URLs that images named in requests may lie in; without any, only uploads are read."""
    token: SecretStr | None = None
    """Bearer token that requests must carry; none asks for none."""
    max_items: int = Field(default=64, ge=1)
    """Most items in one request."""
    max_body_bytes: int = Field(default=32 * 2**20, ge=1024)
    """Larger requests are answered with 413, without reading them to the end."""
    header_timeout_s: int = Field(default=10, ge=1)
    """Requests whose headers take longer to arrive are answered with 408; on a cluster of its own only."""
    body_timeout_s: float = Field(default=10.0, gt=0)
    """Requests whose body takes longer to arrive are answered with 408."""
    request_timeout_s: float = Field(default=30.0, gt=0)
    """Requests that take longer to score are answered with 503."""
    max_ongoing: int = Field(default=32, ge=1)
    """Requests that a replica works on at once."""
    max_queued: int = Field(default=32, ge=1)
    """Requests that wait, for each replica; more are answered with 503 at once."""

    @model_validator(mode="after")
    def _certificate_and_key(self) -> "ServeConfig":
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ValueError("a certificate needs its key, and a key its certificate: give both or neither")
        return self

    @property
    def of_the_listener(self) -> set[str]:
        """The settings given here that are not the application's own: in a Serve config file, Serve's are elsewhere."""
        return self.model_fields_set & {"host", "port", "tls_cert", "tls_key", "header_timeout_s"}

    @property
    def address(self) -> str:
        """Host and port, as they stand in a URL."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def url(self) -> str:
        """Where the endpoint answers."""
        return f"{'https' if self.tls_cert else 'http'}://{self.address}"

    def score_config(self) -> ScoreConfig:
        """Returns the same as settings of the predictor."""
        return ScoreConfig(
            precision=self.precision,
            batch_size=self.batch_size,
            gpus_per_actor=self.gpus_per_replica,
            image_roots=self.image_roots,
            decode_threads=self.decode_threads,
            probabilities=True,
        )
