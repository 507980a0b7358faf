"""What others have learned, as a start: torchvision networks with their weights, and word vectors."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from mmray.errors import ConfigError, nearest
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
    network: nn.Module = models.get_model(name, **_without_auxiliary_heads(name))
    if weights != "none":
        state = _read_state(weights) if Path(weights).is_file() else _download(name, weights)
        _load(network, state, name, weights)
    return network, _cut_last_layer(network, name)


def load_word_vectors(path: str, embedding: Tensor, words: Sequence[str], reserved: int) -> None:
    """Puts the vectors of known words into an embedding [V, D]; words without a vector keep their random start.

    Raises:
        ConfigError: the file is missing or its vectors are of another width.
    """
    rows = {word: k + reserved for k, word in enumerate(words)}
    try:
        with open(path, encoding="utf-8") as lines, torch.no_grad():
            for line in lines:
                word, *values = line.rstrip().split(" ")
                if word not in rows:
                    continue
                if len(values) != embedding.shape[1]:
                    raise ConfigError(
                        f"{path} has vectors of {len(values)} numbers; set embedding_dim = {len(values)}, "
                        f"got {embedding.shape[1]}"
                    )
                embedding[rows[word]] = torch.tensor([float(value) for value in values])
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read word vectors from {path!r}: {error}") from None


def _without_auxiliary_heads(name: str) -> dict[str, bool]:
    # These two also train through side branches, and give them beside their output.
    return {"aux_logits": False, "init_weights": True} if name in ("googlenet", "inception_v3") else {}


def _read_state(path: str) -> Mapping[str, Tensor]:
    try:
        if path.endswith(".safetensors"):
            import safetensors.torch

            return safetensors.torch.load_file(path)
        state: Mapping[str, Tensor] = torch.load(path, map_location="cpu", weights_only=True)
        return state
    except Exception as error:  # damaged files raise whatever their bytes lead to
        raise ConfigError(f"cannot read weights from {path!r}: {str(error).splitlines()[0]}") from None


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
    wrong = [key for key in wanted & set(usable) if own[key].shape != usable[key].shape]
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
