"""Fusion: each kind is its formula, whatever the order of the modalities."""

from typing import Any

import pytest
import torch
from pydantic import TypeAdapter
from torch import Tensor

from mmray.config import FusionConfig
from mmray.model.fusion import Attention, Bilinear, Concat, Conv, Fusion, WeightedSum, build_fusion

WIDTH = 8
KINDS: list[dict[str, Any]] = [
    {"kind": "weighted_sum", "alpha": "fixed"},
    {"kind": "weighted_sum", "alpha": "learned"},
    {"kind": "weighted_sum", "alpha": "gated"},
    {"kind": "concat"},
    {"kind": "conv", "channels": 3},
    {"kind": "attention", "num_heads": 2},
    {"kind": "bilinear", "rank": 5},
]


def fusion_of(config: dict[str, Any], modalities: tuple[str, ...] = ("image", "text")) -> Fusion:
    torch.manual_seed(0)
    return build_fusion(TypeAdapter(FusionConfig).validate_python(config), modalities, WIDTH).eval()


def inputs(num_rows: int = 3) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    names = ("image", "text")
    embeddings = {name: torch.randn(num_rows, WIDTH, generator=generator) for name in names}
    return embeddings, {name: torch.ones(num_rows, dtype=torch.bool) for name in names}


def named(config: dict[str, Any]) -> str:
    return "-".join(map(str, config.values()))


@pytest.mark.parametrize("config", KINDS, ids=named)
def test_the_order_of_modalities_at_construction_changes_nothing(config: dict[str, Any]) -> None:
    one, other = fusion_of(config, ("image", "text")), fusion_of(config, ("text", "image"))
    assert all(torch.equal(one.state_dict()[name], tensor) for name, tensor in other.state_dict().items())
    assert torch.equal(one(*inputs()), other(*inputs()))


@pytest.mark.parametrize("config", KINDS, ids=named)
def test_every_fusion_takes_three_modalities_and_gives_the_width_it_says(config: dict[str, Any]) -> None:
    fusion = fusion_of(config, ("text", "image", "audio"))
    embeddings = {name: torch.randn(2, WIDTH) for name in fusion.modalities}
    fused = fusion(embeddings, {name: torch.ones(2, dtype=torch.bool) for name in embeddings})
    assert fused.shape == (2, fusion.output_dim)


@pytest.mark.parametrize("config", KINDS, ids=named)
def test_only_the_weighted_sum_of_several_modalities_has_an_image_weight(config: dict[str, Any]) -> None:
    weight = fusion_of(config).image_weight(*inputs())
    assert (weight is not None) == (config["kind"] == "weighted_sum")
    embeddings, present = inputs()
    alone = fusion_of(config, ("image",))
    assert alone.image_weight({"image": embeddings["image"]}, {"image": present["image"]}) is None


@pytest.mark.parametrize("config", KINDS[3:], ids=named)
def test_a_fusion_without_weights_of_its_own_reads_absent_embeddings_like_any(config: dict[str, Any]) -> None:
    embeddings, present = inputs()
    withheld = {**present, "image": torch.zeros(3, dtype=torch.bool)}
    assert torch.equal(fusion_of(config)(embeddings, present), fusion_of(config)(embeddings, withheld))


def test_a_gate_gives_each_row_its_own_weight_and_learns_it() -> None:
    fusion = fusion_of({"kind": "weighted_sum", "alpha": "gated"})
    assert isinstance(fusion, WeightedSum)
    assert fusion._gate is not None
    torch.nn.init.normal_(fusion._gate.weight)
    embeddings, present = inputs()
    weight = fusion.image_weight(embeddings, present)
    assert weight is not None
    assert len(weight.unique()) == 3
    expected = weight[:, None] * embeddings["image"] + (1 - weight[:, None]) * embeddings["text"]
    torch.testing.assert_close(fusion(embeddings, present), expected)


def test_concat_is_its_formula() -> None:
    fusion, (embeddings, present) = fusion_of({"kind": "concat"}), inputs()
    assert isinstance(fusion, Concat)
    weight, bias = fusion._linear.weight, fusion._linear.bias
    expected = embeddings["image"] @ weight[:, :WIDTH].T + embeddings["text"] @ weight[:, WIDTH:].T + bias
    torch.testing.assert_close(fusion(embeddings, present), expected)


def test_conv_slides_over_the_embedding_with_the_modalities_as_channels() -> None:
    fusion, (embeddings, present) = fusion_of({"kind": "conv", "channels": 1, "kernel_size": 3}), inputs(1)
    assert isinstance(fusion, Conv)
    with torch.no_grad():
        for parameter in fusion.parameters():
            parameter.zero_()
        fusion._convolutions[0].weight[0, :, 2] = torch.tensor([2.0, 3.0])  # reads the position to the right
        fusion._convolutions[2].weight.fill_(1.0)
    sums = (2 * embeddings["image"] + 3 * embeddings["text"])[0].relu()
    torch.testing.assert_close(fusion(embeddings, present)[0], torch.cat([sums[1:], torch.zeros(1)]))


def test_attention_without_what_it_attends_to_is_the_mean_of_the_normed_embeddings() -> None:
    fusion, (embeddings, present) = fusion_of({"kind": "attention", "num_heads": 2}), inputs()
    assert isinstance(fusion, Attention)
    with torch.no_grad():
        fusion._attention.out_proj.weight.zero_()
    norm = torch.nn.functional.layer_norm
    expected = (norm(embeddings["image"], (WIDTH,)) + norm(embeddings["text"], (WIDTH,))) / 2
    torch.testing.assert_close(fusion(embeddings, present), expected)


def test_bilinear_is_its_formula() -> None:
    fusion, (embeddings, present) = fusion_of({"kind": "bilinear", "rank": 5}), inputs()
    assert isinstance(fusion, Bilinear)
    product = torch.tanh(fusion._factors["image"](embeddings["image"]))
    product = product * torch.tanh(fusion._factors["text"](embeddings["text"]))
    expected = product @ fusion._output.weight.T + fusion._output.bias + embeddings["image"] + embeddings["text"]
    torch.testing.assert_close(fusion(embeddings, present), expected)


@pytest.mark.parametrize("certainty", [20.0, 95.0, 500.0])
def test_a_modality_left_alone_is_taken_bit_for_bit_however_certain_of_the_other_the_gate_is(certainty: float) -> None:
    fusion, (embeddings, present) = fusion_of({"kind": "weighted_sum", "alpha": "gated"}), inputs()
    assert isinstance(fusion, WeightedSum)
    assert fusion._gate is not None
    with torch.no_grad():
        fusion._gate.bias.copy_(torch.tensor([certainty, 0.0]))
    withheld = {**present, "image": torch.zeros(3, dtype=torch.bool)}
    assert torch.equal(fusion(embeddings, withheld), embeddings["text"])


@pytest.mark.parametrize("alpha", ["fixed", "learned", "gated"])
def test_a_weight_that_is_given_takes_the_place_of_the_models_own(alpha: str) -> None:
    fusion, (embeddings, present) = fusion_of({"kind": "weighted_sum", "alpha": alpha}), inputs()
    assert isinstance(fusion, WeightedSum)
    image, text = embeddings["image"], embeddings["text"]
    torch.testing.assert_close(fusion(embeddings, present, 0.3), 0.3 * image + 0.7 * text)
    assert torch.equal(fusion(embeddings, present, 0.0), text)
    assert torch.equal(fusion(embeddings, present, 1.0), image)


@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
def test_at_any_weight_of_the_image_a_row_without_it_is_its_text(weight: float) -> None:
    fusion, (embeddings, present) = fusion_of({"kind": "weighted_sum"}), inputs()
    assert isinstance(fusion, WeightedSum)
    for name, other in (("image", "text"), ("text", "image")):
        withheld = {**present, name: torch.zeros(3, dtype=torch.bool)}
        assert torch.equal(fusion(embeddings, withheld, weight), embeddings[other])
