"""Seeds derived from the purpose of a draw, independent of its time and process."""

from __future__ import annotations

import hashlib
import struct


def derive_seed(*parts: int) -> int:
    """Derives a 63-bit seed from integers (seed, epoch, sample, ...); other parts, other seed.

    Examples:
        >>> derive_seed(0, 1) == derive_seed(0, 1), derive_seed(0, 1) == derive_seed(1, 0)
        (True, False)
    """
    digest = hashlib.blake2b(struct.pack(f"<{len(parts)}q", *parts), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
