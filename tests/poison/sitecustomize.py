"""Makes rows deadly: a folder of its own, on the path of processes in which some rows should kill.

Python imports this module as it starts. It wraps the decoder and the model as they are imported: an image whose bytes
end in the name of a death brings it about, and so does a text of one word repeated. Real decoders that do so are rare,
and mended when they are found.
"""

import ctypes
import os
import re
import resource
import signal
import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

REPEATS = 6  # words
FREE_BYTES = 2**31  # after so many the kernel, as it were, picks its victim


def segfault() -> None:
    ctypes.string_at(0)


def hang() -> None:
    re.match(r"(a+)+$", "a" * 60 + "b")  # for years, and no other thread runs meanwhile


def devour() -> None:
    import numpy

    eaten = []  # addresses only: nothing is written there
    while True:
        eaten.append(numpy.empty(2**26, numpy.uint8))
        unlimited = resource.getrlimit(resource.RLIMIT_AS)[0] == resource.RLIM_INFINITY
        if unlimited and len(eaten) * 2**26 > FREE_BYTES:
            os.kill(os.getpid(), signal.SIGKILL)


DEATHS: dict[bytes, Callable[[], None]] = {b"segfault": segfault, b"hang": hang, b"devour": devour}


def poison_images(module: ModuleType) -> None:
    decode = module.decode_image

    def decode_image(data: bytes, config: Any) -> Any:
        for name, death in DEATHS.items():
            if data.endswith(name):
                death()
        return decode(data, config)

    module.decode_image = decode_image  # type: ignore[attr-defined]


def poison_texts(module: ModuleType) -> None:
    encode = module.FusionModel.encode

    def encode_or_die(self: Any, arrays: Any) -> Any:
        ids = arrays["token_ids"]
        if ids.shape[1] >= REPEATS and ((ids == ids[:, :1]) & (ids > 0))[:, :REPEATS].all(1).any():
            os.abort()
        return encode(self, arrays)

    module.FusionModel.encode = encode_or_die


POISONED = {"mmray.preprocess.image": poison_images, "mmray.model": poison_texts}


class Poisoner(MetaPathFinder):
    """Has a module wrapped as it is imported."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        spec = PathFinder.find_spec(name, path, target) if name in POISONED else None
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                execute(module)
                POISONED[name](module)

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


sys.meta_path.insert(0, Poisoner())
