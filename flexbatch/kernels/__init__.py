"""Kernels that Numba compiles.

Numba keeps a kernel's machine code until the file of its own function changes, but what a kernel is made of stands in
several of these files: so the code is kept in a folder that is named by all of them.
"""

import hashlib
from pathlib import Path

from numba.core import config


def _digest() -> str:
    files = sorted(Path(__file__).parent.glob("*.py"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:16]


_given: str = config.CACHE_DIR  # type: ignore[attr-defined]
CODE_FOLDER = Path(_given or Path(__file__).parent / "__pycache__") / f"kernels-{_digest()}"
config.CACHE_DIR = str(CODE_FOLDER)  # type: ignore[attr-defined]
