"""From the arrays of one modality to one embedding per row.

One contract: an encoder reads its arrays by name from a mapping, gives [B, output_dim], and knows `output_dim`.

Inputs:
    image: uint8 [B, S, S, 3], RGB. Scaled and normalised here, on the device.
    image_features: float [B, D], in place of the image: what a frozen network made of it.
    token_ids: int [B, L], 0 is padding, 1 the unknown word.
    ngram_ids: int [B, G], 0 is padding; only where `text.ngram_buckets` is set.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from mmray.config import (
    BagEncoderConfig,
    CnnEncoderConfig,
    Config,
    EfficientNetEncoderConfig,
    RecurrentEncoderConfig,
    TextConfig,
    TorchvisionEncoderConfig,
)
from mmray.model.pretrained import efficientnet_lite0, torchvision_backbone
from mmray.model.word_vectors import load_word_vectors

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
FEATURES = "image_features"
PADDING, UNKNOWN = 0, 1
RESERVED_IDS = 2
EMBEDDING_STD = 0.05  # of a vector's start: what training hardly sees (rare words, n-grams) stays near nothing


class Encoder(nn.Module):
    """One embedding per row."""

    output_dim: int

    def forward(self, arrays: Mapping[str, Tensor]) -> Tensor:
        """Returns [B, output_dim]."""
        raise TypeError("an encoder gives an embedding")


class _Pixels(nn.Module):
    """uint8 [B, S, S, 3] -> normalised float [B, 3, S, S], channels last in memory: OpenCV's order as it comes."""

    scale: Tensor
    shift: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.register_buffer("scale", 1 / (255 * torch.tensor(std)), persistent=False)
        self.register_buffer("shift", -torch.tensor(mean) / torch.tensor(std), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        batch, height, width, channels = images.shape
        rows = images.reshape(batch * height, width * channels).float()  # long ones: three numbers at a time take twice
        shift, scale = self.shift.repeat(width), self.scale.repeat(width)
        return torch.addcmul(shift, rows, scale).view(images.shape).permute(0, 3, 1, 2)


class CnnEncoder(Encoder):
    """Blocks of 3x3 convolution, 2x2 pooling, normalisation and ReLU, then the average over all positions.

    Pooling comes before ReLU: the result is the same, and what follows works on a quarter of the positions.
    """

    def __init__(self, config: CnnEncoderConfig) -> None:
        super().__init__()
        self._pixels = _Pixels((0.5,) * 3, (0.25,) * 3)
        layers: list[nn.Module] = []
        for block, (inputs, outputs) in enumerate(itertools.pairwise((3, *config.channels))):
            layers += [_conv(inputs, outputs, config), nn.MaxPool2d(2, ceil_mode=True), *_activation(outputs, config)]
            if config.residual and block:
                layers.append(_Residual(outputs, config))
        self._layers = nn.Sequential(*layers).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.output_dim = config.channels[-1]

    def forward(self, arrays: Mapping[str, Tensor]) -> Tensor:
        """Returns [B, output_dim]."""
        features: Tensor = self._layers(self._pixels(arrays["image"]))
        return features.mean(dim=(2, 3))


class _Residual(nn.Module):
    """x + relu(norm(convolution(x))): more depth that is easy to train (He et al. 2016)."""

    def __init__(self, channels: int, config: CnnEncoderConfig) -> None:
        super().__init__()
        self._branch = nn.Sequential(_conv(channels, channels, config), *_activation(channels, config))

    def forward(self, features: Tensor) -> Tensor:
        added: Tensor = features + self._branch(features)
        return added


def _conv(inputs: int, outputs: int, config: CnnEncoderConfig) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, padding=1, bias=not config.batch_norm)


def _activation(channels: int, config: CnnEncoderConfig) -> list[nn.Module]:
    return [*([nn.BatchNorm2d(channels)] if config.batch_norm else []), nn.ReLU(inplace=True)]


class BackboneEncoder(Encoder):
    """A classification network of others without its last layer.

    What a frozen one gives does not change while training, so it may be computed once: where the arrays hold
    `image_features` they are taken for it.
    """

    def __init__(self, backbone: nn.Module, output_dim: int, *, freeze: bool, pixels: nn.Module) -> None:
        super().__init__()
        self._pixels, self.output_dim, self._frozen = pixels, output_dim, freeze
        self._backbone = backbone.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self._backbone.requires_grad_(not freeze)

    def train(self, mode: bool = True) -> "BackboneEncoder":
        """Sets the mode; a frozen network stays in evaluation, so that its batch statistics do not drift."""
        super().train(mode)
        if self._frozen:
            self._backbone.eval()
        return self

    def forward(self, arrays: Mapping[str, Tensor]) -> Tensor:
        """Returns [B, output_dim]."""
        if FEATURES in arrays:
            return arrays[FEATURES]
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self._frozen):
            features: Tensor = self._backbone(self._pixels(arrays["image"]))
        return features.flatten(1)


class TorchvisionEncoder(BackboneEncoder):
    """A torchvision network."""

    def __init__(self, config: TorchvisionEncoderConfig) -> None:
        backbone, width = torchvision_backbone(config.name, config.weights)
        super().__init__(backbone, width, freeze=config.freeze, pixels=_Pixels(IMAGENET_MEAN, IMAGENET_STD))


class EfficientNetEncoder(BackboneEncoder):
    """EfficientNet-Lite0, whose published weights expect pixels of -1 to 1."""

    def __init__(self, config: EfficientNetEncoderConfig) -> None:
        backbone, width = efficientnet_lite0(config.weights)
        super().__init__(backbone, width, freeze=config.freeze, pixels=_Pixels((0.5,) * 3, (0.5,) * 3))


class _Words(nn.Module):
    """Word embeddings, and the mean of the character n-grams' where there are any (Bojanowski et al. 2017)."""

    def __init__(self, text: TextConfig, width: int, words: Sequence[str], vectors: str | None) -> None:
        super().__init__()
        self.embedding = nn.Embedding(len(words) + RESERVED_IDS, width, padding_idx=0)
        _start_small(self.embedding)
        if vectors is not None:
            load_word_vectors(vectors, self.embedding.weight, words, RESERVED_IDS)
        self.ngrams: nn.EmbeddingBag | None = None
        if text.ngram_buckets:
            self.ngrams = nn.EmbeddingBag(text.ngram_buckets + 1, width, mode="mean", padding_idx=0)
            _start_small(self.ngrams)
        self.extra_dim = width if text.ngram_buckets else 0

    def append_ngrams(self, encoded: Tensor, arrays: Mapping[str, Tensor]) -> Tensor:
        """Returns [B, D + extra_dim]: an encoding of the words with that of their n-grams beside it."""
        if self.ngrams is None:
            return encoded
        return torch.cat([encoded, self.ngrams(arrays["ngram_ids"]).to(encoded.dtype)], dim=1)


def _start_small(table: nn.Embedding | nn.EmbeddingBag) -> None:
    with torch.no_grad():
        table.weight.normal_(std=EMBEDDING_STD)[table.padding_idx] = 0


class RecurrentEncoder(Encoder):
    """Word embeddings, an LSTM, GRU or plain recurrent layer, and pooling over the tokens that are there."""

    def __init__(self, config: RecurrentEncoderConfig, text: TextConfig, words: Sequence[str]) -> None:
        super().__init__()
        kinds: dict[str, Callable[..., nn.RNNBase]] = {"lstm": nn.LSTM, "gru": nn.GRU, "rnn": nn.RNN}
        self._words = _Words(text, config.embedding_dim, words, config.word_vectors)
        self._recurrent = kinds[config.kind](
            config.embedding_dim, config.hidden_dim, batch_first=True, bidirectional=config.bidirectional
        )
        self._pooling, self._bidirectional = config.pooling, config.bidirectional
        self.output_dim = config.hidden_dim * (2 if config.bidirectional else 1) + self._words.extra_dim

    def forward(self, arrays: Mapping[str, Tensor]) -> Tensor:
        """Returns [B, output_dim]."""
        token_ids = arrays["token_ids"]
        mask = token_ids != 0
        states = self._states(self._words.embedding(token_ids), mask)
        return self._words.append_ngrams(self._pool(states, mask), arrays)

    def _pool(self, states: Tensor, mask: Tensor) -> Tensor:
        if not self._bidirectional or self._pooling != "last":
            return _POOLINGS[self._pooling](states, mask)
        forwards, backwards = states.chunk(2, dim=2)  # reading backwards, the last state stands at the first token
        return torch.cat([_last(forwards, mask), _last(backwards[:, :1], mask[:, :1])], dim=1)

    def _states(self, embedded: Tensor, mask: Tensor) -> Tensor:
        if not self._bidirectional:  # reading forwards, what follows the last token cannot reach the states before it
            return self._recurrent(embedded)[0]  # type: ignore[no-any-return]
        lengths = mask.sum(dim=1).clamp_min(1).cpu()
        packed = pack_padded_sequence(embedded, lengths, batch_first=True, enforce_sorted=False)
        states, _ = pad_packed_sequence(self._recurrent(packed)[0], batch_first=True, total_length=mask.shape[1])
        return states


class BagEncoder(Encoder):
    """The mean of the word embeddings: no order, and hard to beat on short texts."""

    def __init__(self, config: BagEncoderConfig, text: TextConfig, words: Sequence[str]) -> None:
        super().__init__()
        self._words = _Words(text, config.embedding_dim, words, config.word_vectors)
        self.output_dim = config.embedding_dim + self._words.extra_dim

    def forward(self, arrays: Mapping[str, Tensor]) -> Tensor:
        """Returns [B, output_dim]."""
        token_ids = arrays["token_ids"]
        return self._words.append_ngrams(_mean(self._words.embedding(token_ids), token_ids != 0), arrays)


def _mean(states: Tensor, mask: Tensor) -> Tensor:
    weights = mask.to(states.dtype)[:, :, None]
    return (states * weights).sum(dim=1) / weights.sum(dim=1).clamp_min(1)


def _max(states: Tensor, mask: Tensor) -> Tensor:
    lowest = torch.finfo(states.dtype).min
    highest = states.masked_fill(~mask[:, :, None], lowest).amax(dim=1)
    return highest.masked_fill(~mask.any(dim=1)[:, None], 0.0)


def _last(states: Tensor, mask: Tensor) -> Tensor:
    index = (mask.sum(dim=1) - 1).clamp_min(0)
    last = states[torch.arange(len(states), device=states.device), index]
    return last.masked_fill(~mask.any(dim=1)[:, None], 0.0)


_POOLINGS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"mean": _mean, "max": _max, "last": _last}


def _image_encoder(config: Config, words: Sequence[str]) -> Encoder:
    match config.model.image_encoder:
        case CnnEncoderConfig() as image:
            return CnnEncoder(image)
        case TorchvisionEncoderConfig() as image:
            return TorchvisionEncoder(image)
        case EfficientNetEncoderConfig() as image:
            return EfficientNetEncoder(image)


def _text_encoder(config: Config, words: Sequence[str]) -> Encoder:
    text = config.model.text_encoder
    kind = BagEncoder if isinstance(text, BagEncoderConfig) else RecurrentEncoder
    return kind(text, config.text, words)  # type: ignore[arg-type]


# A third modality is one preprocess file, one encoder, and a line here.
ENCODERS: dict[str, Callable[[Config, Sequence[str]], Encoder]] = {"image": _image_encoder, "text": _text_encoder}
