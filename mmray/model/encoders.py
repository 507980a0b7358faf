"""From the arrays of one modality to one embedding per row.

One contract: an encoder reads its arrays by name from a mapping, gives [B, output_dim], and knows `output_dim`.

Inputs:
    image: uint8 [B, S, S, 3], RGB. Scaled and normalised here, on the device.
    token_ids: int [B, L], 0 is padding, 1 the unknown word.
    ngram_ids: int [B, G], 0 is padding; only where `text.ngram_buckets` is set.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from mmray.config import (
    BagEncoderConfig,
    CnnEncoderConfig,
    Config,
    RecurrentEncoderConfig,
    TextConfig,
    TorchvisionEncoderConfig,
)
from mmray.model.pretrained import load_word_vectors, torchvision_backbone

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
RESERVED_IDS = 2  # padding and the unknown word
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
        return torch.addcmul(self.shift, images.float(), self.scale).permute(0, 3, 1, 2)


class CnnEncoder(Encoder):
    """Blocks of 3x3 convolution, 2x2 pooling, normalisation and ReLU, then the average over all positions.

    Pooling comes before ReLU: the result is the same, and what follows works on a quarter of the positions.
    """

    def __init__(self, config: CnnEncoderConfig) -> None:
        super().__init__()
        self._pixels = _Pixels((0.5,) * 3, (0.25,) * 3)
        layers: list[nn.Module] = []
        for inputs, outputs in zip((3, *config.channels), config.channels, strict=False):
            layers.append(nn.Conv2d(inputs, outputs, 3, padding=1, bias=not config.batch_norm))
            layers.append(nn.MaxPool2d(2, ceil_mode=True))
            layers += [nn.BatchNorm2d(outputs)] if config.batch_norm else []
            layers.append(nn.ReLU(inplace=True))
        self._layers = nn.Sequential(*layers).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.output_dim = config.channels[-1]

    def forward(self, arrays: Mapping[str, Tensor]) -> Tensor:
        """Returns [B, output_dim]."""
        features: Tensor = self._layers(self._pixels(arrays["image"]))
        return features.mean(dim=(2, 3))


class TorchvisionEncoder(Encoder):
    """A torchvision classification network without its last layer."""

    def __init__(self, config: TorchvisionEncoderConfig) -> None:
        super().__init__()
        self._pixels = _Pixels(IMAGENET_MEAN, IMAGENET_STD)
        backbone, self.output_dim = torchvision_backbone(config.name, config.weights)
        self._backbone = backbone.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self._frozen = config.freeze
        self._backbone.requires_grad_(not config.freeze)

    def train(self, mode: bool = True) -> "TorchvisionEncoder":
        """Sets the mode; a frozen network stays in evaluation, so that its batch statistics do not drift."""
        super().train(mode)
        if self._frozen:
            self._backbone.eval()
        return self

    def forward(self, arrays: Mapping[str, Tensor]) -> Tensor:
        """Returns [B, output_dim]."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self._frozen):
            features: Tensor = self._backbone(self._pixels(arrays["image"]))
        return features.flatten(1)


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
    image = config.model.image_encoder
    return CnnEncoder(image) if isinstance(image, CnnEncoderConfig) else TorchvisionEncoder(image)


def _text_encoder(config: Config, words: Sequence[str]) -> Encoder:
    text = config.model.text_encoder
    kind = BagEncoder if isinstance(text, BagEncoderConfig) else RecurrentEncoder
    return kind(text, config.text, words)  # type: ignore[arg-type]


# A third modality is one preprocess file, one encoder, and a line here.
ENCODERS: dict[str, Callable[[Config, Sequence[str]], Encoder]] = {"image": _image_encoder, "text": _text_encoder}
