"""A client's own randomness, for noise that nobody else can take off again.

It comes from a key that never leaves the client, and not from the run's seed, which the server knows. From key and task
the same numbers come again, so a client that starts again after a kill answers with the same bytes; any other task gets
numbers that have nothing to do with them. They are drawn from SHAKE-256, since who sees enough of what a generator of
simulations gives can tell the rest.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import numpy as np
from scipy.special import ndtri

from promptfed.errors import DataError
from promptfed.types import FloatArray

KEY_BYTES = 32


class Secret:
    """Numbers from a key and the name of what they are for."""

    def __init__(self, key: bytes) -> None:
        if len(key) != KEY_BYTES:
            raise DataError(f"a noise key has {KEY_BYTES} bytes; got {len(key)}")
        self._key = key

    @classmethod
    def kept_in(cls, folder: Path | None) -> Secret:
        """The secret of a client with that folder, made when it is first asked for; without one, one for this process.

        Raises `DataError` for a file that holds no key.
        """
        if folder is None:
            return cls(os.urandom(KEY_BYTES))
        path = folder / "noise.key"
        if not path.exists():
            folder.mkdir(parents=True, exist_ok=True)
            scratch = path.with_name(path.name + ".tmp")
            scratch.unlink(missing_ok=True)
            with os.fdopen(os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
                file.write(os.urandom(KEY_BYTES))
                file.flush()
                os.fsync(file.fileno())
            scratch.replace(path)
        return cls(path.read_bytes())

    def uniforms(self, n: int, *purpose: str) -> FloatArray:
        """``n`` numbers in (0, 1), of 53 bits, the same for the same ``purpose``."""
        name = hashlib.sha256(repr(purpose).encode()).digest()
        stream = hashlib.shake_256(self._key + name).digest(8 * n)
        return (np.frombuffer(stream, dtype="<u8") >> np.uint64(11)).astype(np.float64) * 2.0**-53 + 2.0**-54

    def normals(self, n: int, *purpose: str) -> FloatArray:
        """``n`` standard normal numbers."""
        return np.asarray(ndtri(self.uniforms(n, *purpose)))


def simulated_key(seed: int, client_id: str) -> bytes:
    """What stands in for a key in a simulation, where there is nobody to hide from: the same for the same seed."""
    return hashlib.sha256(f"simulated noise\0{seed}\0{client_id}".encode()).digest()
