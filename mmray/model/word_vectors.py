"""Word vectors that others have learned, as a start: from a text file, or from a package.

Reads the words of a vocabulary -> fills an embedding. Nothing of it is needed once a bundle has the weights.
"""

import itertools
from collections.abc import Iterable, Mapping, Sequence, Set

import torch
from torch import Tensor

from mmray.errors import ConfigError
from mmray.model.pretrained import package_folder


def load_word_vectors(source: str, embedding: Tensor, words: Sequence[str], reserved: int) -> None:
    """Puts the vectors of known words into an embedding [V, D]; words without a vector keep their random start.

    Args:
        source: `package` (of the extra `pretrained`), or a text file of `word v1 v2 ...` lines.
        embedding: to fill.
        words: of the vocabulary.
        reserved: rows of the embedding before that of the first word.

    Raises:
        ConfigError: they are missing, of another width, or know none of the words.
    """
    width = embedding.shape[1]
    vectors = _packaged(words, width) if source == "package" else _of_file(source, words, width)
    if not vectors:
        raise ConfigError(
            f"{source} has a vector for none of the {len(words)} words; is it of another language, or in upper case?"
        )
    with torch.no_grad():
        for k, word in enumerate(words):
            if word in vectors:
                embedding[k + reserved] = vectors[word]


def _packaged(words: Sequence[str], width: int) -> Mapping[str, Tensor]:
    """Returns the mean of each word's pieces in WordLlama's table (D. Lee Miller 2024): what language models know."""
    folder = package_folder("wordllama", "model.text_encoder.word_vectors")
    from safetensors.torch import load_file
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizers" / "l2_supercat_tokenizer_config.json"))
    table = load_file(folder / "weights" / "l2_supercat_256.safetensors")["embedding.weight"].float()
    _check_width("the package", table.shape[1], width)
    pieces = {word: tokenizer.encode(word, add_special_tokens=False).ids for word in words}
    return {word: table[ids].mean(dim=0) for word, ids in pieces.items() if ids}


def _of_file(path: str, words: Sequence[str], width: int) -> Mapping[str, Tensor]:
    try:
        with open(path, encoding="utf-8") as lines:
            first = lines.readline()
            _check_width(path, _vector_width(first), width)
            return _known_vectors(itertools.chain([first], lines), set(words), width)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"cannot read word vectors from {path!r}: {error}; give 'package' or a text file of `word v1 v2 ...` lines"
        ) from None


def _check_width(source: str, found: int, width: int) -> None:
    if found != width:
        raise ConfigError(f"{source} has vectors of {found} numbers; set embedding_dim = {found}, got {width}")


def _vector_width(first: str) -> int:
    # word2vec and fastText begin with a line `number_of_words width`, GloVe with its first word.
    fields = first.split()
    return int(fields[1]) if len(fields) == 2 else len(fields) - 1


def _known_vectors(lines: Iterable[str], words: Set[str], width: int) -> dict[str, Tensor]:
    vectors = {}
    for line in lines:
        word, _, numbers = line.rstrip().partition(" ")
        # GloVe has words with spaces: a line that begins with a known word and is too long is another word's.
        if word in words and numbers.count(" ") == width - 1:
            vectors[word] = torch.tensor([float(number) for number in numbers.split(" ")])
    return vectors
