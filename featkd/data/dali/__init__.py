"""Image loading with NVIDIA DALI, on a GPU or on the CPU.

`DaliLoader` returns the same samples as the timm loader. For each batch:

1. `read_ahead` reads the files in threads. `files` checks each one, and replaces it with a PNG of
   Pillow's pixels if DALI would decode it differently.
2. `featkd.data.augment_params` draws the random parameters of the whole batch.
3. `pipeline` decodes, resizes, flips and augments (`randaugment`), all in DALI.
4. `featkd.data.device` normalizes and erases, as for the timm loader.

Both loaders use the same crops, flips, operations and erased boxes for a key. Their pixels differ
only by the rounding of decoders and filters.

Importing this package does not import nvidia.dali.
"""

from featkd.data.dali.loader import DaliLoader
from featkd.data.dali.support import unsupported_reason

__all__ = ["DaliLoader", "unsupported_reason"]
