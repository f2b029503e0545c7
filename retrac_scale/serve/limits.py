"""How much a service takes on."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """Bounds of what one request, and all of them together, may ask for.

    Attributes:
        upload_bytes: size of an uploaded file.
        pixels: of an uploaded image, read from its header before it is decoded.
        json_bytes: size of any other body.
        k: results per side.
        ids: queries in one request.
        concurrent: requests at a time; further ones are told to come again.
        batch: queries in one scan, of which one in views is nine.
        kept_uploads: uploads that can still be explained, likewise; the oldest are forgotten.
        body_seconds: time a client may take to send its request.
    """

    upload_bytes: int = 10 * 2**20
    pixels: int = 25_000_000
    json_bytes: int = 2**18
    k: int = 100
    ids: int = 64
    concurrent: int = 256
    batch: int = 64
    kept_uploads: int = 64
    body_seconds: float = 30.0
