"""The one path from a row's cells to the arrays a model reads: training, scoring and serving all come this way.

Reads cells of each modality -> gives `Features`: arrays, what is present, and why the rest is not.
"""

import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from mmray.config import Config
from mmray.preprocess.image import decode_image
from mmray.preprocess.text import Vocabulary, encode
from mmray.source import ImageSource
from mmray.table import Fault

Encoded = tuple[dict[str, NDArray[np.generic]], list[Fault | None]]


@dataclass(frozen=True)
class Features:
    """B rows as arrays."""

    arrays: dict[str, NDArray[np.generic]]
    """`image` uint8 [B, S, S, 3]; `token_ids` int32 [B, L]; `ngram_ids` int32 [B, G]. Zeros where absent."""
    present: dict[str, NDArray[np.bool_]]
    """Modality -> [B]."""
    faults: dict[str, list[Fault | None]]
    """Modality -> B entries; a fault exactly where the modality is not present."""

    @property
    def num_rows(self) -> int:
        """B."""
        return len(next(iter(self.present.values())))

    def split(self, size: int) -> list["Features"]:
        """Returns the same rows, at most `size` at a time."""
        return [self._part(slice(k, k + size)) for k in range(0, self.num_rows, size)]

    def _part(self, rows: slice) -> "Features":
        return Features(
            {name: array[rows] for name, array in self.arrays.items()},
            {name: mask[rows] for name, mask in self.present.items()},
            {name: faults[rows] for name, faults in self.faults.items()},
        )

    @classmethod
    def concatenate(cls, parts: Sequence["Features"]) -> "Features":
        """Joins rows that were preprocessed apart; ids are padded to the longest text."""
        first = parts[0]
        return cls(
            {name: _stack([part.arrays[name] for part in parts]) for name in first.arrays},
            {name: np.concatenate([part.present[name] for part in parts]) for name in first.present},
            {name: [fault for part in parts for fault in part.faults[name]] for name in first.faults},
        )


def _stack(arrays: Sequence[NDArray[np.generic]]) -> NDArray[np.generic]:
    width = max(array.shape[1] for array in arrays)
    rest = [((0, 0), (0, width - array.shape[1]), *((0, 0),) * (array.ndim - 2)) for array in arrays]
    padded = [np.pad(a, pad) if a.shape[1] < width else a for a, pad in zip(arrays, rest, strict=True)]
    return np.concatenate(padded)


class Preprocessor:
    """Turns cells into features. Thread-safe."""

    version: ClassVar[int] = 3
    """Part of every bundle's fingerprint: raised when the same cells give other arrays."""

    def __init__(
        self,
        config: Config,
        vocabulary: Vocabulary | None,
        source: ImageSource,
        *,
        decode_threads: int = 1,
        reads: int = 1,
    ) -> None:
        """Takes what decides the arrays, and how much is done at a time.

        Args:
            config: sizes and limits.
            vocabulary: the words that are known; None for a model without texts.
            source: where images are read.
            decode_threads: images decoded at a time.
            reads: images read at a time where they lie in a store.
        """
        self._config, self._vocabulary, self._source = config, vocabulary, source
        threads = max(decode_threads, reads) if source.is_remote else decode_threads
        self._pool = ThreadPoolExecutor(threads) if threads > 1 else None
        # Threads wait for the store in large numbers; as many decoders would only take the CPU from the model.
        self._decoding = threading.Semaphore(decode_threads)
        # A third modality is one preprocess file and a line here.
        self._encoders = {"image": self._images, "text": self._texts}

    def __call__(self, columns: Mapping[str, Sequence[Any]]) -> Features:
        """Preprocesses B rows; `columns` maps each modality of the configuration to B cells.

        A cell may be a `Fault`: why it cannot be used is known already.
        """
        arrays: dict[str, NDArray[np.generic]] = {}
        faults: dict[str, list[Fault | None]] = {}
        for name in self._config.table.modalities:
            known = [cell if isinstance(cell, Fault) else None for cell in columns[name]]
            encoded, found = self._encoders[name](
                [None if bad else c for c, bad in zip(columns[name], known, strict=True)]
            )
            arrays.update(encoded)
            faults[name] = [bad or new for bad, new in zip(known, found, strict=True)]
        present = {name: np.asarray([fault is None for fault in found], bool) for name, found in faults.items()}
        return Features(arrays, present, faults)

    def _images(self, cells: Sequence[Any]) -> Encoded:
        size = self._config.image.size
        images = np.zeros((len(cells), size, size, 3), np.uint8)
        found = self._pool.map(self._image, cells) if self._pool and len(cells) > 1 else map(self._image, cells)
        faults: list[Fault | None] = []
        for k, image in enumerate(found):
            faults.append(image if isinstance(image, Fault) else None)
            if not isinstance(image, Fault):
                images[k] = image
        return {"image": images}, faults

    def _image(self, cell: Any) -> NDArray[np.uint8] | Fault:
        data = self._source.read(cell)
        if isinstance(data, Fault):
            return data
        with self._decoding:
            return decode_image(data, self._config.image)

    def _texts(self, cells: Sequence[Any]) -> Encoded:
        assert self._vocabulary is not None, "a model that reads texts has a vocabulary"
        return encode(cells, self._vocabulary, self._config.text)
