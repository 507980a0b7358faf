"""The whole configuration of a run, checked before anything starts.

A frozen `Config` is stored in the bundle, so weights never travel without the settings that made them. Unknown keys are
refused.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, model_validator


class Section(BaseModel):
    """A group of settings: frozen, keyword-only, unknown keys refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _of_the_default_kind(cls, raw: Any) -> Any:
        """Lets a part be changed without saying again which kind it is, where that is the usual one."""
        if not isinstance(raw, dict):
            return raw
        kinds = {name: getattr(field.default, "kind", None) for name, field in cls.model_fields.items()}
        return {
            name: {"kind": kinds[name], **part} if kinds.get(name) and isinstance(part, dict) else part
            for name, part in raw.items()
        }


class TableConfig(Section):
    """Which tables to train on, and which of their columns."""

    train: str
    """Training table: a parquet file, a folder of them, or a glob; a local path or a URI."""
    validation: str | None = None
    """Validation table; without one, `split_column` or `validation_fraction` decides."""
    split_column: str | None = None
    """Column whose values `train`, `validation` and `test` assign each row of `train`."""
    validation_fraction: float = Field(default=0.1, gt=0, lt=1)
    """Share of training rows held out when neither `validation` nor `split_column` is given."""
    image_column: str | None = "image_path"
    """Column of image paths, URIs, bytes or {bytes, path} structs; empty for a text-only model."""
    text_column: str | None = "text"
    """Column of texts; empty for an image-only model."""
    label_column: str = "label"
    """Column of labels: strings, integers or booleans; lists for multilabel; numbers for regression."""
    max_unlabelled: float = Field(default=0.5, ge=0, le=1)
    """Larger shares of rows without a label stop the run; smaller ones are left out and counted."""
    image_roots: tuple[str, ...] = ()
    """Folders, URIs or https:// URLs that images may lie in; without any, the table's own folder."""

    @model_validator(mode="before")
    @classmethod
    def _empty_means_none(cls, values: Any) -> Any:
        # TOML has no null: an empty string switches a column off.
        if isinstance(values, dict):
            return {k: None if v == "" and k.endswith(("_column", "validation")) else v for k, v in values.items()}
        return values

    @model_validator(mode="after")
    def _one_modality_at_least(self) -> "TableConfig":
        if self.image_column is None and self.text_column is None:
            raise ValueError("image_column and text_column are both empty; keep at least one")
        if self.validation is not None and self.split_column is not None:
            raise ValueError("validation and split_column both say what to hold out; keep one, set the other to ''")
        return self

    @property
    def modalities(self) -> tuple[str, ...]:
        """The modalities in use, sorted by name."""
        columns = {"image": self.image_column, "text": self.text_column}
        return tuple(name for name in sorted(columns) if columns[name] is not None)


class ImageConfig(Section):
    """How bytes become pixels."""

    size: int = Field(default=96, ge=16, le=1024)
    """Side of the square that images are resized to, in pixels; 224 suits networks with ImageNet weights."""
    max_bytes: int = Field(default=32 * 2**20, gt=0)
    """Larger files are refused unread (TOO_LARGE_BYTES)."""
    max_pixels: int = Field(default=50_000_000, gt=0)
    """Larger images are refused undecoded (TOO_MANY_PIXELS)."""
    max_side: int = Field(default=16_384, gt=0)
    """Wider or taller images are refused undecoded (TOO_MANY_PIXELS)."""


class TextConfig(Section):
    """How a string becomes token ids."""

    vocabulary_size: int = Field(default=10_000, ge=3)
    """Most frequent words kept, the two reserved ids (padding, unknown) included."""
    min_count: int = Field(default=1, ge=1)
    """Rarer words are unknown words."""
    max_tokens: int = Field(default=64, ge=1, le=4096)
    """Tokens kept of each text."""
    max_bytes: int = Field(default=65_536, ge=16)
    """Texts are cut to this many UTF-8 bytes before tokenising."""
    ngram_buckets: int = Field(default=20_000, ge=0)
    """Hash buckets for character n-grams (fastText's subwords); 0 switches them off."""
    ngram_min: int = Field(default=3, ge=1)
    """Shortest character n-gram."""
    ngram_max: int = Field(default=5, ge=1)
    """Longest character n-gram."""
    max_ngrams: int = Field(default=256, ge=1)
    """Character n-grams kept of each text."""


class CnnEncoderConfig(Section):
    """Blocks of 3x3 convolution, ReLU and 2x2 pooling, each with a residual one, then the global average."""

    kind: Literal["cnn"] = "cnn"
    channels: tuple[PositiveInt, ...] = Field(default=(32, 64, 128, 256), min_length=1)
    """Output channels of each block."""
    batch_norm: bool = True
    """Normalise after each convolution."""
    residual: bool = True
    """After each block but the first, one more convolution whose result is added to its input."""


class TorchvisionEncoderConfig(Section):
    """A torchvision classification network without its last layer."""

    kind: Literal["torchvision"] = "torchvision"
    name: str = "mobilenet_v3_small"
    """torchvision's name of the network."""
    weights: str = "none"
    """`none`, a torchvision weights name (`DEFAULT`, `IMAGENET1K_V1`), or a file with a state dict."""
    freeze: bool = False
    """Keep the network as it is and train only what follows it."""
    learning_rate_factor: float = Field(default=1.0, gt=0)
    """Its learning rate, as a share of `train.learning_rate`; with weights, 0.1 keeps what they know."""


class EfficientNetEncoderConfig(Section):
    """EfficientNet-Lite0 without its last layer; the extra `pretrained` brings its ImageNet weights as a package."""

    kind: Literal["efficientnet_lite0"] = "efficientnet_lite0"
    weights: str = "package"
    """`package` (of the extra `pretrained`), `none`, or a file with a state dict."""
    freeze: bool = True
    """Keep the network as it is and train only what follows it."""
    learning_rate_factor: float = Field(default=0.1, gt=0)
    """Where it is not frozen: its learning rate, as a share of `train.learning_rate`."""


class RecurrentEncoderConfig(Section):
    """Word embeddings, a recurrent layer, masked pooling over the tokens."""

    kind: Literal["lstm", "gru", "rnn"] = "lstm"
    embedding_dim: int = Field(default=128, ge=1)
    """Width of a word vector."""
    hidden_dim: int = Field(default=128, ge=1)
    """Width of the recurrent state."""
    bidirectional: bool = False
    """Read the text in both directions."""
    pooling: Literal["last", "max", "mean"] = "max"
    """What of the states over the tokens is kept."""
    word_vectors: str | None = None
    """What the embedding starts from: `package` (of the extra `pretrained`), or a file of `word v1 v2 ...` lines."""


class BagEncoderConfig(Section):
    """The mean of the word embeddings: the strong plain baseline."""

    kind: Literal["bag"] = "bag"
    embedding_dim: int = Field(default=128, ge=1)
    """Width of a word vector."""
    word_vectors: str | None = None
    """What the embedding starts from: `package` (of the extra `pretrained`), or a file of `word v1 v2 ...` lines."""


class WeightedSumConfig(Section):
    """F = alpha * I + (1 - alpha) * T, renormalised over what is present."""

    kind: Literal["weighted_sum"] = "weighted_sum"
    alpha: Literal["fixed", "learned", "gated"] = "learned"
    """One given number, one learned number, or one number per row from a gate."""
    initial_alpha: float = Field(default=0.75, gt=0, lt=1)
    """Weight of the image at the start (and for ever when fixed); above a half, as words are learned sooner."""


class ConcatConfig(Section):
    """A linear layer over the concatenated embeddings."""

    kind: Literal["concat"] = "concat"


class ConvConfig(Section):
    """A one-dimensional convolution over the stacked embeddings."""

    kind: Literal["conv"] = "conv"
    channels: int = Field(default=16, ge=1)
    """Filters of the convolution."""
    kernel_size: int = Field(default=3, ge=1)
    """Width of a filter along the embedding; odd."""

    @model_validator(mode="after")
    def _odd(self) -> "ConvConfig":
        if self.kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be odd, got {self.kernel_size}")
        return self


class AttentionConfig(Section):
    """Multi-head self-attention over the embeddings as tokens."""

    kind: Literal["attention"] = "attention"
    num_heads: int = Field(default=4, ge=1)
    """Heads; must divide `model.width`."""


class BilinearConfig(Section):
    """Low-rank bilinear product of the two embeddings."""

    kind: Literal["bilinear"] = "bilinear"
    rank: int = Field(default=64, ge=1)
    """Rank of the product."""


ImageEncoderConfig = Annotated[
    CnnEncoderConfig | TorchvisionEncoderConfig | EfficientNetEncoderConfig, Field(discriminator="kind")
]
TextEncoderConfig = Annotated[RecurrentEncoderConfig | BagEncoderConfig, Field(discriminator="kind")]
FusionConfig = Annotated[
    WeightedSumConfig | ConcatConfig | ConvConfig | AttentionConfig | BilinearConfig,
    Field(discriminator="kind"),
]


class ModelConfig(Section):
    """Encoders -> one width -> fusion -> head."""

    width: int = Field(default=128, ge=1)
    """Width that each encoder's output is projected to."""
    dropout: float = Field(default=0.3, ge=0, lt=1)
    """Dropout before the head and on each projected embedding."""
    modality_dropout: float = Field(default=0.0, ge=0, lt=1)
    """Chance per row and modality, in training, that it is withheld: one learned by heart must not hide the other."""
    image_encoder: ImageEncoderConfig = CnnEncoderConfig()
    """`kind = "cnn"`, `"torchvision"` or `"efficientnet_lite0"`."""
    text_encoder: TextEncoderConfig = RecurrentEncoderConfig()
    """`kind = "lstm"`, `"gru"`, `"rnn"` or `"bag"`."""
    fusion: FusionConfig = WeightedSumConfig()
    """`kind = "weighted_sum"`, `"concat"`, `"conv"`, `"attention"` or `"bilinear"`."""


class AutoTaskConfig(Section):
    """What the label column asks for: lists are multilabel, numbers a regression, two labels binary, others multiclass.

    Whole numbers of few kinds are labels.
    """

    kind: Literal["auto"] = "auto"


class BinaryConfig(Section):
    """Two labels; binary cross-entropy with logits."""

    kind: Literal["binary"] = "binary"
    positive_label: str | None = None
    """The label whose probability is the score; without one, the last in sorted order."""
    loss: Literal["bce", "focal"] = "bce"
    """Binary cross-entropy, or focal loss (Lin et al. 2017)."""
    focal_gamma: float = Field(default=2.0, ge=0)
    """Focusing parameter of the focal loss."""
    class_weights: Literal["none", "balanced"] = "none"
    """`balanced` weighs each label by the inverse of its frequency."""
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)
    """Share of the target spread evenly over the labels."""
    calibrate: bool = False
    """Divide the logits by a temperature fitted on the validation rows (Guo et al. 2017)."""


class MulticlassConfig(Section):
    """One of several labels; cross-entropy."""

    kind: Literal["multiclass"] = "multiclass"
    loss: Literal["cross_entropy", "focal"] = "cross_entropy"
    """Cross-entropy, or focal loss (Lin et al. 2017)."""
    focal_gamma: float = Field(default=2.0, ge=0)
    """Focusing parameter of the focal loss."""
    class_weights: Literal["none", "balanced"] = "none"
    """`balanced` weighs each label by the inverse of its frequency."""
    label_smoothing: float = Field(default=0.1, ge=0, lt=1)
    """Share of the target spread evenly over the labels."""
    calibrate: bool = False
    """Divide the logits by a temperature fitted on the validation rows (Guo et al. 2017)."""


class MultilabelConfig(Section):
    """Any number of labels; binary cross-entropy for each."""

    kind: Literal["multilabel"] = "multilabel"
    class_weights: Literal["none", "balanced"] = "none"
    """`balanced` weighs each label's positives by the inverse of their frequency."""
    calibrate: bool = False
    """Divide the logits by a temperature fitted on the validation rows (Guo et al. 2017)."""


class RegressionConfig(Section):
    """A number; beta times the squared error, or Huber's loss, on standardised targets."""

    kind: Literal["regression"] = "regression"
    loss: Literal["mse", "huber"] = "mse"
    """Squared error, or Huber's."""
    beta: float = Field(default=1.0, gt=0)
    """Factor of the loss: L = beta * |F - Y|^2."""
    huber_delta: float = Field(default=1.0, gt=0)
    """Where Huber's loss turns from square to linear, in standard deviations of the target."""


TaskConfig = BinaryConfig | MulticlassConfig | MultilabelConfig | RegressionConfig


class TrainConfig(Section):
    """How long, how fast, and where to keep what is learned."""

    epochs: int = Field(default=0, ge=0)
    """Passes over the training rows; 0 chooses: 60 for a few hundred rows, 24 for 3,000, 9 for 20,000, 5 at least."""
    batch_size: int = Field(default=64, ge=1)
    """Rows per optimiser step over all workers together."""
    optimizer: Literal["adam", "adamw"] = "adamw"
    """Adam, or Adam with decoupled weight decay."""
    learning_rate: float = Field(default=2e-3, gt=0)
    """Peak learning rate."""
    weight_decay: float = Field(default=0.05, ge=0)
    """Weight decay."""
    schedule: Literal["constant", "cosine", "linear"] = "cosine"
    """How the learning rate falls after the warm-up."""
    warmup_fraction: float = Field(default=0.05, ge=0, lt=1)
    """Share of the steps over which the learning rate rises from zero."""
    clip_norm: float = Field(default=1.0, ge=0)
    """Largest norm of the gradient; 0 switches clipping off."""
    auxiliary_weight: float = Field(default=0.3, ge=0)
    """Weight of the loss of each modality alone, the others withheld, beside the fused loss."""
    augment: bool = True
    """Flip, shift, scale and turn training images a little."""
    word_dropout: float = Field(default=0.2, ge=0, lt=1)
    """Chance of each word and character n-gram, while training, that it is withheld."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Number format of the forward pass (autocast); auto is bf16 where the hardware has it; fp16 needs a GPU."""
    patience: int = Field(default=0, ge=0)
    """Epochs without a lower validation loss before training stops; 0 never stops early."""
    seed: int = Field(default=0, ge=0)
    """Seed of the initial weights, the order of rows and the augmentation."""
    num_workers: PositiveInt | tuple[PositiveInt, PositiveInt] = 1
    """Training processes; two numbers are a least and a most, between which it is what the cluster has room for."""
    accumulation: int = Field(default=1, ge=1)
    """Parts in which a process takes its share of a batch, one after another: larger batches than memory holds."""
    shard: bool = False
    """A worker keeps only its part of the weights and the optimiser's state (FSDP2): for encoders that do not fit."""
    use_gpu: bool = False
    """One GPU per worker (nccl); otherwise CPUs (gloo)."""
    cache_bytes: int = Field(default=4 * 2**30, ge=0)
    """Decoded training rows up to this size stay in memory; larger tables are decoded each epoch."""
    max_failures: int = Field(default=2, ge=0)
    """Failures of workers on a cluster that are survived before the run stops."""
    checkpoint_minutes: float = Field(default=10.0, ge=0)
    """After so long an epoch is saved in its middle too, as it is when a node with a worker is about to go."""
    storage: str = "runs"
    """Folder or URI for checkpoints and the bundle."""
    name: str | None = None
    """Name of the run below `storage`; without one, a digest of the configuration."""

    @property
    def max_workers(self) -> int:
        """Training processes at most."""
        return self.num_workers if isinstance(self.num_workers, int) else max(self.num_workers)


class Config(Section):
    """Everything that decides what a model becomes."""

    table: TableConfig
    """Tables and columns."""
    image: ImageConfig = ImageConfig()
    """Image preprocessing."""
    text: TextConfig = TextConfig()
    """Text preprocessing."""
    model: ModelConfig = ModelConfig()
    """Encoders and fusion."""
    task: Annotated[AutoTaskConfig | TaskConfig, Field(discriminator="kind")] = AutoTaskConfig()
    """`kind = "auto"`, `"binary"`, `"multiclass"`, `"multilabel"` or `"regression"`."""
    train: TrainConfig = TrainConfig()
    """Optimisation and storage."""

    @model_validator(mode="after")
    def _agree(self) -> "Config":
        fusion = self.model.fusion
        if isinstance(fusion, AttentionConfig) and self.model.width % fusion.num_heads:
            raise ValueError(
                f"model.fusion.num_heads = {fusion.num_heads} does not divide model.width = {self.model.width}"
            )
        image = self.model.image_encoder
        if not isinstance(image, CnnEncoderConfig) and image.freeze and image.weights == "none":
            raise ValueError(
                "model.image_encoder.freeze = true would keep a network that knows nothing; give it weights, "
                "or set freeze = false"
            )
        if self.text.ngram_max < self.text.ngram_min:
            raise ValueError("text.ngram_max is smaller than text.ngram_min")
        if not isinstance(self.train.num_workers, int) and self.train.num_workers[0] > self.train.num_workers[1]:
            raise ValueError(f"train.num_workers = {list(self.train.num_workers)}: the first number is the least")
        least = 2 * self.train.max_workers * self.train.accumulation
        if self.train.batch_size < least:
            raise ValueError(
                f"train.batch_size = {self.train.batch_size} leaves a worker less than two rows; use at least {least}"
            )
        if self.train.precision == "fp16" and not self.train.use_gpu:
            raise ValueError("train.precision = 'fp16' needs train.use_gpu = true; use 'bf16'")
        return self
