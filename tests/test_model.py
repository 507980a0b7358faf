"""The model: every encoder, fusion and head does what its formula says, for any batch, with anything missing."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from models import WORDS, small_config
from pydantic import TypeAdapter
from torch import Tensor

from mmray.config import Config, FusionConfig, TaskConfig
from mmray.errors import ConfigError
from mmray.model import FusionModel, precision
from mmray.model.folding import ActivatedConv, fold
from mmray.model.fusion import WeightedSum, build_fusion
from mmray.model.heads import build_head
from mmray.model.precision import autocast, computes_bf16, resolve_precision
from mmray.model.vision import torchvision
from mmray.train.loop import best_epoch
from mmray.train.rows import shares
from mmray.train.steps import TrainingLoss

FUSIONS: list[dict[str, Any]] = [
    {"kind": "weighted_sum", "alpha": "fixed", "initial_alpha": 0.3},
    {"kind": "weighted_sum", "alpha": "learned"},
    {"kind": "weighted_sum", "alpha": "gated"},
    {"kind": "concat"},
    {"kind": "conv"},
    {"kind": "attention"},
    {"kind": "bilinear", "rank": 8},
]
IMAGE_ENCODERS: list[dict[str, Any]] = [
    {"kind": "cnn", "channels": [4, 8]},
    {"kind": "cnn", "channels": [4], "batch_norm": False},
    {"kind": "torchvision", "name": "mobilenet_v3_small"},
    {"kind": "torchvision", "name": "resnet18"},
    {"kind": "torchvision", "name": "squeezenet1_1"},
    {"kind": "efficientnet_lite0", "weights": "none", "freeze": False},
]
TEXT_ENCODERS: list[dict[str, Any]] = [
    {"kind": kind, "hidden_dim": 8, "embedding_dim": 8, "bidirectional": two, "pooling": pooling}
    for kind, two, pooling in [
        ("lstm", False, "mean"),
        ("lstm", True, "last"),
        ("gru", True, "max"),
        ("gru", False, "last"),
        ("rnn", False, "max"),
        ("rnn", True, "mean"),
    ]
] + [{"kind": "bag", "embedding_dim": 8}]


def model_of(**model: Any) -> FusionModel:
    torch.manual_seed(0)
    base = small_config().model.model_dump()
    return FusionModel(small_config(model={**base, **model}), num_labels=3, words=WORDS)


def _take(tensors: dict[str, Tensor], indices: list[int]) -> dict[str, Tensor]:
    return {name: tensor[indices] for name, tensor in tensors.items()}


def rows(num: int = 6, size: int = 32) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(1, len(WORDS) + 2, (num, 5), generator=generator)
    ids[torch.arange(5) >= torch.arange(num)[:, None] % 5 + 1] = 0
    arrays = {
        "image": torch.randint(0, 256, (num, size, size, 3), generator=generator, dtype=torch.uint8),
        "token_ids": ids,
        "ngram_ids": torch.randint(0, 51, (num, 20), generator=generator),
    }
    present = {"image": torch.arange(num) % 3 != 1, "text": torch.arange(num) % 3 != 2}
    return arrays, present


def untrained(model: FusionModel) -> list[str]:
    """Parameters without a gradient; the absent embeddings have one only where the fusion uses them."""
    gradients = {name: p.grad for name, p in model.named_parameters() if "_absent" not in name}
    return [name for name, gradient in gradients.items() if gradient is None or not gradient.abs().sum() > 0]


@pytest.mark.parametrize("fusion", FUSIONS, ids=lambda f: "-".join(map(str, f.values())))
def test_every_fusion_trains_all_of_its_parameters(fusion: dict[str, Any]) -> None:
    model = model_of(fusion=fusion)
    arrays, present = rows()
    model.head.loss(model(arrays, present), torch.tensor([0, 1, 2, 0, 1, 2])).backward()
    without = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    # The weighted sum leaves an absent modality out: its absent embedding is used by a gate only.
    expected = ["_absent.image", "_absent.text"] if fusion["kind"] == "weighted_sum" else []
    assert without in (expected, [] if fusion.get("alpha") == "gated" else expected)


@pytest.mark.parametrize("fusion", FUSIONS, ids=lambda f: "-".join(map(str, f.values())))
def test_every_encoder_learns_from_the_rows_that_have_its_modality_and_from_no_other(fusion: dict[str, Any]) -> None:
    model = model_of(fusion=fusion)
    arrays, present = rows()
    embeddings = {name: embedding.detach().requires_grad_() for name, embedding in model.encode(arrays).items()}
    model.head.loss(model.fuse(embeddings, present), torch.tensor([0, 1, 2, 0, 1, 2])).backward()
    for name, embedding in embeddings.items():
        assert embedding.grad is not None
        assert torch.equal(embedding.grad.abs().sum(dim=1) > 0, present[name])


@pytest.mark.parametrize("encoder", IMAGE_ENCODERS, ids=lambda e: e.get("name", e["kind"]))
def test_every_image_encoder_trains_all_of_its_parameters(encoder: dict[str, Any]) -> None:
    model = model_of(image_encoder=encoder)
    arrays, present = rows(size=64)
    model.head.loss(model(arrays, present), torch.tensor([0, 1, 2, 0, 1, 2])).backward()
    assert untrained(model) == []


@pytest.mark.parametrize("encoder", TEXT_ENCODERS, ids=lambda e: "-".join(map(str, e.values())))
def test_every_text_encoder_trains_all_of_its_parameters(encoder: dict[str, Any]) -> None:
    model = model_of(text_encoder=encoder)
    arrays, present = rows()
    model.head.loss(model(arrays, present), torch.tensor([0, 1, 2, 0, 1, 2])).backward()
    assert untrained(model) == []


@pytest.mark.parametrize(
    ("image", "text", "fusion"),
    [(IMAGE_ENCODERS[k % 4], TEXT_ENCODERS[k], FUSIONS[k]) for k in range(len(FUSIONS))],
    ids=[f"{TEXT_ENCODERS[k]['kind']}-{FUSIONS[k]['kind']}" for k in range(len(FUSIONS))],
)
def test_a_row_does_not_depend_on_its_neighbours(
    image: dict[str, Any], text: dict[str, Any], fusion: dict[str, Any]
) -> None:
    model = model_of(image_encoder=image, text_encoder=text, fusion=fusion)
    arrays, present = rows(size=32)
    for _ in range(3):
        model.train()(arrays, present)  # an untrained deep network gives next to nothing in evaluation
    model.eval()
    with torch.inference_mode():
        together = model(arrays, present)
        alone = [
            model({n: a[k : k + 1] for n, a in arrays.items()}, {n: p[k : k + 1] for n, p in present.items()})
            for k in range(6)
        ]
        order = torch.tensor([3, 1, 5, 0, 4, 2])
        shuffled = model({n: a[order] for n, a in arrays.items()}, {n: p[order] for n, p in present.items()})
        wider = {**arrays, "token_ids": torch.nn.functional.pad(arrays["token_ids"], (0, 7))}
        padded = model(wider, present)
    torch.testing.assert_close(torch.cat(alone), together, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(shuffled, together[order], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(padded, together, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("fusion", FUSIONS, ids=lambda f: "-".join(map(str, f.values())))
def test_what_is_absent_has_no_influence(fusion: dict[str, Any]) -> None:
    model = model_of(fusion=fusion).eval()
    arrays, present = rows()
    with torch.inference_mode():
        before = model(arrays, present)
        noise = torch.where(present["image"][:, None, None, None], arrays["image"], 255 - arrays["image"])
        words = torch.where(present["text"][:, None], arrays["token_ids"], 3)
        after = model({**arrays, "image": noise, "token_ids": words}, present)
    torch.testing.assert_close(before, after, atol=0, rtol=0)


@pytest.mark.parametrize("modality", ["image", "text"])
@pytest.mark.parametrize("fusion", FUSIONS, ids=lambda f: "-".join(map(str, f.values())))
def test_a_model_of_one_modality_works(fusion: dict[str, Any], modality: str) -> None:
    other = {"image": "text_column", "text": "image_column"}[modality]
    config = small_config(
        table={"train": "rows", other: ""}, model={**small_config().model.model_dump(), "fusion": fusion}
    )
    model = FusionModel(config, num_labels=3, words=WORDS)
    arrays, present = rows()
    assert model(arrays, {modality: present[modality]}).shape == (6, 3)


@pytest.mark.parametrize("alpha", ["fixed", "learned", "gated"])
def test_the_weighted_sum_is_its_formula(alpha: str) -> None:
    fusion = build_fusion(
        TypeAdapter(FusionConfig).validate_python({"kind": "weighted_sum", "alpha": alpha, "initial_alpha": 0.3}),
        ("text", "image"),
        4,
    )
    image, text = torch.randn(4, 4), torch.randn(4, 4)
    present = {"image": torch.tensor([True, True, False, False]), "text": torch.tensor([True, False, True, False])}
    embeddings = {"text": text, "image": image}
    fused, weight = fusion(embeddings, present), fusion.image_weight(embeddings, present)
    torch.testing.assert_close(fused[0], 0.3 * image[0] + 0.7 * text[0])
    assert torch.equal(fused[1], image[1])
    assert torch.equal(fused[2], text[2])
    assert torch.equal(fused[3], torch.zeros(4))
    assert weight is not None
    torch.testing.assert_close(weight, torch.tensor([0.3, 1.0, 0.0, 0.0]))


def test_alpha_is_a_parameter_only_where_it_is_learned() -> None:
    for alpha, learned in (("fixed", 0), ("learned", 1), ("gated", 2)):
        fusion = model_of(fusion={"kind": "weighted_sum", "alpha": alpha})._fusion
        assert isinstance(fusion, WeightedSum)
        assert len(list(fusion.parameters())) == learned


@pytest.mark.parametrize("fusion", FUSIONS, ids=lambda f: "-".join(map(str, f.values())))
def test_the_order_of_a_mapping_does_not_matter(fusion: dict[str, Any]) -> None:
    model = model_of(fusion=fusion).eval()
    arrays, present = rows()
    turned = dict(reversed(arrays.items())), dict(reversed(present.items()))
    assert torch.equal(model(arrays, present), model(*turned))


def test_modality_dropout_never_takes_the_last_modality() -> None:
    model = model_of(modality_dropout=0.5).train()
    present = {"image": torch.ones(500, dtype=torch.bool), "text": torch.arange(500) % 2 == 0}
    kept = model.withhold(present)
    assert (kept["image"] | kept["text"]).all()
    assert not (kept["text"] & ~present["text"]).any()
    assert 0.8 < kept["image"].float().mean() < 0.95
    assert model.eval().withhold(present) is present


def head_of(task: dict[str, Any], num_labels: int = 3, **extra: Any) -> Any:
    if task["kind"] == "multiclass":
        task = {"label_smoothing": 0.0, **task}
    return build_head(TypeAdapter(TaskConfig).validate_python(task), 4, num_labels=num_labels, **extra)


def sigmoid(z: float) -> float:
    return 1 / (1 + math.exp(-z))


def test_binary_losses_are_their_formulas() -> None:
    logits, targets = torch.tensor([[0.5], [-1.0]]), torch.tensor([1.0, 0.0])
    p = sigmoid(0.5), sigmoid(-1.0)
    plain = [-math.log(p[0]), -math.log(1 - p[1])]
    assert head_of({"kind": "binary"}).loss(logits, targets).item() == pytest.approx(sum(plain) / 2, rel=1e-5)
    focal = [plain[0] * (1 - p[0]) ** 2, plain[1] * p[1] ** 2]
    got = head_of({"kind": "binary", "loss": "focal"}).loss(logits, targets).item()
    assert got == pytest.approx(sum(focal) / 2, rel=1e-5)
    counts = torch.tensor([30, 10])
    got = head_of({"kind": "binary", "class_weights": "balanced"}, class_counts=counts).loss(logits, targets).item()
    assert got == pytest.approx((plain[0] * 2 + plain[1] * 2 / 3) / 2, rel=1e-5)
    smooth = head_of({"kind": "binary", "label_smoothing": 0.2}).loss(logits[:1], targets[:1]).item()
    assert smooth == pytest.approx(-0.9 * math.log(p[0]) - 0.1 * math.log(1 - p[0]), rel=1e-5)


def test_multiclass_losses_are_their_formulas() -> None:
    logits, targets = torch.tensor([[1.0, 2.0, 0.5], [0.1, -0.3, 0.9]]), torch.tensor([1, 0])
    p = np.exp(logits.numpy()) / np.exp(logits.numpy()).sum(1, keepdims=True)
    plain = -np.log([p[0, 1], p[1, 0]])
    assert head_of({"kind": "multiclass"}).loss(logits, targets).item() == pytest.approx(plain.mean(), rel=1e-5)
    focal = plain * (1 - np.array([p[0, 1], p[1, 0]])) ** 3
    got = head_of({"kind": "multiclass", "loss": "focal", "focal_gamma": 3}).loss(logits, targets).item()
    assert got == pytest.approx(focal.mean(), rel=1e-5)
    counts = torch.tensor([60, 30, 10])
    got = head_of({"kind": "multiclass", "class_weights": "balanced"}, class_counts=counts).loss(logits, targets).item()
    assert got == pytest.approx((plain[0] * 100 / 90 + plain[1] * 100 / 180) / 2, rel=1e-5)
    smooth = -(0.7 * np.log(p[0, 1]) + 0.1 * np.log(p[0]).sum())
    got = head_of({"kind": "multiclass", "label_smoothing": 0.3}).loss(logits[:1], targets[:1]).item()
    assert got == pytest.approx(smooth, rel=1e-5)


def test_the_multilabel_loss_is_its_formula() -> None:
    logits, targets = torch.tensor([[0.2, -0.4]]), torch.tensor([[1.0, 0.0]])
    terms = [-math.log(sigmoid(0.2)), -math.log(1 - sigmoid(-0.4))]
    got = head_of({"kind": "multilabel"}, num_labels=2).loss(logits, targets).item()
    assert got == pytest.approx(sum(terms) / 2, rel=1e-5)
    balanced = head_of(
        {"kind": "multilabel", "class_weights": "balanced"}, 2, class_counts=torch.tensor([20, 50]), num_rows=100
    )
    assert balanced.loss(logits, targets).item() == pytest.approx((terms[0] * 4 + terms[1]) / 2, rel=1e-5)


def test_regression_losses_are_their_formulas() -> None:
    logits, targets = torch.tensor([[0.5], [-3.0]]), torch.tensor([12.0, 10.0])
    moments = {"target_mean": 10.0, "target_std": 4.0}
    squares = (0.5 - 0.5) ** 2, (-3.0 - 0.0) ** 2
    got = head_of({"kind": "regression", "beta": 2.5}, **moments).loss(logits, targets).item()
    assert got == pytest.approx(2.5 * sum(squares) / 2)
    got = head_of({"kind": "regression", "loss": "huber", "huber_delta": 1.0}, **moments).loss(logits, targets).item()
    assert got == pytest.approx((3.0 - 0.5) / 2)
    values = head_of({"kind": "regression"}, **moments).outputs(logits)
    assert values.squeeze(1).tolist() == [12.0, -2.0]
    huber = {"kind": "regression", "loss": "huber", "huber_delta": 0.5, "beta": 2.0}
    got = head_of(huber, **moments).loss(torch.tensor([[0.9], [-3.0]]), targets).item()
    assert got == pytest.approx(2.0 * (0.4**2 / 2 + 0.5 * (3.0 - 0.25)) / 2)  # quadratic within delta, linear beyond


def test_the_options_of_a_loss_multiply() -> None:
    logits, targets, counts = torch.tensor([[0.5], [-1.0]]), torch.tensor([1.0, 0.0]), torch.tensor([30, 10])
    every = {"loss": "focal", "focal_gamma": 1.5, "class_weights": "balanced", "label_smoothing": 0.2}
    p = sigmoid(0.5), sigmoid(-1.0)
    terms = [
        2 * (1 - p[0]) ** 1.5 * -(0.9 * math.log(p[0]) + 0.1 * math.log(1 - p[0])),
        2 / 3 * p[1] ** 1.5 * -(0.9 * math.log(1 - p[1]) + 0.1 * math.log(p[1])),
    ]
    got = head_of({"kind": "binary", **every}, class_counts=counts).loss(logits, targets).item()
    assert got == pytest.approx(sum(terms) / 2, rel=1e-5)
    # Two classes of logits [0, z] are the binary task; smoothing gives either label the same half.
    pairs = torch.cat([torch.zeros(2, 1), logits], dim=1)
    got = head_of({"kind": "multiclass", **every}, 2, class_counts=counts).loss(pairs, targets.long()).item()
    assert got == pytest.approx(sum(terms) / 2, rel=1e-5)


def test_the_training_loss_adds_each_modality_alone_over_the_rows_that_have_it() -> None:
    model = model_of(dropout=0.0).eval()
    arrays, present = rows()
    targets = torch.tensor([0, 1, 2, 0, 1, 2])
    nobody = torch.zeros(6, dtype=torch.bool)
    embeddings = model.encode(arrays)
    expected = model.head.loss(model.fuse(embeddings, present), targets)
    for name, other in (("image", "text"), ("text", "image")):
        alone = model.fuse(embeddings, {name: present[name], other: nobody})
        expected = expected + 0.3 * model.head.loss(alone[present[name]], targets[present[name]])
    torch.testing.assert_close(TrainingLoss(model, 0.3)(arrays, present, targets), expected)
    plain = TrainingLoss(model, 0.0)(arrays, present, targets)
    torch.testing.assert_close(plain, model.head.loss(model(arrays, present), targets))


def test_outputs_are_probabilities() -> None:
    logits = torch.randn(5, 3)
    assert torch.allclose(head_of({"kind": "multiclass"}).outputs(logits).sum(1), torch.ones(5))
    binary = head_of({"kind": "binary"}).outputs(logits[:, :1])
    assert torch.allclose(binary[:, 1], torch.sigmoid(logits[:, 0]))
    assert torch.allclose(binary.sum(1), torch.ones(5))


NETWORKS = ["mobilenet_v3_small", "resnet18", "densenet121", "squeezenet1_1", "efficientnet_lite0"]


def model_to_fold(name: str) -> tuple[FusionModel, Any, Any]:
    """A model with a network, whose statistics differ from their start, and rows for it."""
    ours = IMAGE_ENCODERS[-1]
    model = model_of(image_encoder=ours if name == ours["kind"] else {"kind": "torchvision", "name": name})
    arrays, present = rows(size=64)
    for _ in range(2):
        model.train()(arrays, present)
    return model.eval(), arrays, present


@torch.inference_mode()
@pytest.mark.parametrize("name", NETWORKS)
def test_folding_changes_nothing(name: str) -> None:
    model, arrays, present = model_to_fold(name)
    before = model(arrays, present)
    fold(model)
    after = model(arrays, present)
    norms = [module for module in model.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    assert len(norms) < {"densenet121": 70}.get(name, 1)
    torch.testing.assert_close(after, before, atol=1e-4, rtol=1e-4)


@pytest.mark.skipif(not computes_bf16("cpu"), reason="this CPU cannot compute in bf16")
@torch.inference_mode()
@pytest.mark.parametrize("name", NETWORKS)
def test_folding_leaves_bf16_as_near_as_it_was(name: str) -> None:
    model, arrays, present = model_to_fold(name)
    exact = model(arrays, present)
    with autocast("cpu", "bf16"):
        before = model(arrays, present).float()
        fold(model)
        after = model(arrays, present).float()
    assert any(isinstance(module, ActivatedConv) for module in model.modules())
    assert 0 < (after - exact).abs().max() <= 2 * (before - exact).abs().max()


def test_bf16_is_refused_where_the_cpu_cannot_compute_in_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict)
    monkeypatch.setattr(precision, "computes_bf16", lambda device: False)
    with pytest.raises(ConfigError, match="take auto, which is fp32 here"):
        resolve_precision("bf16", "cpu")
    assert resolve_precision("auto", "cpu") == "fp32"


def test_weights_survive_a_safetensors_file(tmp_path: Path) -> None:
    model = model_of().eval()
    arrays, present = rows()
    safetensors.torch.save_file({n: t.contiguous() for n, t in model.state_dict().items()}, tmp_path / "w.safetensors")
    torch.manual_seed(9)
    other = FusionModel(small_config(), num_labels=3, words=WORDS).eval()
    other.load_state_dict(safetensors.torch.load_file(tmp_path / "w.safetensors"))
    assert torch.equal(model(arrays, present), other(arrays, present))


@pytest.mark.parametrize("ending", ["safetensors", "pt"])
def test_a_network_starts_from_weights_in_a_file(tmp_path: Path, ending: str) -> None:
    torch.manual_seed(5)
    state = torchvision().models.get_model("resnet18", num_classes=7).state_dict()
    path = tmp_path / f"weights.{ending}"
    safetensors.torch.save_file(state, path) if ending == "safetensors" else torch.save(state, path)
    encoder = {"kind": "torchvision", "name": "resnet18", "weights": str(path), "freeze": True}
    model = model_of(image_encoder=encoder).train()
    loaded = model._encoders["image"]._backbone
    assert torch.equal(loaded.state_dict()["conv1.weight"], state["conv1.weight"])
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    mean = loaded.bn1.running_mean.clone()
    model(*rows())
    assert torch.equal(loaded.bn1.running_mean, mean)


def encoder_error(encoder: dict[str, Any]) -> str:
    with pytest.raises(ConfigError) as caught:
        model_of(image_encoder={"kind": "torchvision", **encoder})
    return str(caught.value)


def test_mistakes_with_pretrained_networks_are_explained(tmp_path: Path) -> None:
    assert "did you mean 'resnet18'?" in encoder_error({"name": "resnet_18"})
    assert "known: IMAGENET1K_V1" in encoder_error({"name": "resnet18", "weights": "IMAGENET"})
    other = tmp_path / "other.safetensors"
    safetensors.torch.save_file(torchvision().models.get_model("alexnet").state_dict(), other)
    assert "are not those of resnet18: it lacks" in encoder_error({"name": "resnet18", "weights": str(other)})
    (tmp_path / "broken.pt").write_bytes(b"not weights")
    assert "cannot read weights" in encoder_error({"name": "resnet18", "weights": str(tmp_path / "broken.pt")})


def test_word_vectors_start_the_embedding(tmp_path: Path) -> None:
    (tmp_path / "vectors.txt").write_text(
        "3 8\nred " + " ".join(["0.5"] * 8) + "\nunheard " + " ".join(["1"] * 8) + "\n"
    )
    text = {"kind": "bag", "embedding_dim": 8, "word_vectors": str(tmp_path / "vectors.txt")}
    embedding = model_of(text_encoder=text)._encoders["text"]._words.embedding.weight
    assert embedding[2].tolist() == [0.5] * 8
    with pytest.raises(ConfigError, match="set embedding_dim = 8, got 9"):
        model_of(text_encoder={**text, "embedding_dim": 9})
    with pytest.raises(ConfigError, match="cannot read word vectors"):
        model_of(text_encoder={**text, "word_vectors": str(tmp_path / "nothing.txt")})


def test_a_config_builds_the_same_model_for_the_same_seed() -> None:
    config: Config = small_config()
    states = []
    for _ in range(2):
        torch.manual_seed(3)
        states.append(FusionModel(config, num_labels=3, words=WORDS).state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


@pytest.mark.parametrize(("rows", "batch_size", "world"), [(100, 32, 1), (100, 32, 3), (100, 32, 7), (5, 32, 4)])
def test_workers_share_each_batch_and_together_average_over_all_of_its_rows(
    rows: int, batch_size: int, world: int
) -> None:
    order = np.random.default_rng(0).permutation(rows)
    workers = [list(shares(order, batch_size, rank, world)) for rank in range(world)]
    assert {len(batches) for batches in workers} == {max(rows // batch_size, 1)}, "they take their steps together"
    for batch in zip(*workers, strict=True):
        seen = np.concatenate([mine for mine, _ in batch])
        assert len(seen) == (batch_size if rows >= batch_size else max(rows, 2 * world))
        if rows >= batch_size:
            assert len(set(seen)) == batch_size
        of_workers = [factor * mine.mean() for mine, factor in batch]
        assert np.mean(of_workers) == pytest.approx(seen.mean())


def test_the_epoch_with_the_lowest_validation_loss_becomes_the_model() -> None:
    lucky, calibrated, late = (
        {"validation_loss": 0.9, "accuracy": 0.8},
        {"validation_loss": 0.5, "accuracy": 0.79},
        {"validation_loss": 0.6, "accuracy": 0.79},
    )
    assert best_epoch([lucky, calibrated, late]) == 1
