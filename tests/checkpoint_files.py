"""Forges checkpoints."""

import json
from pathlib import Path

import xxhash


def rewrite(path: Path, index: object) -> None:
    """Put a forged index in place, with the digest that it then has."""
    body = index if isinstance(index, bytes) else json.dumps(index).encode()
    digest = xxhash.xxh3_128_hexdigest(body).encode()
    (path / "index.json").write_bytes(b'{"digest": "' + digest + b'", "index": ' + body + b"}\n")
