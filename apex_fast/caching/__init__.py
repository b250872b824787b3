"""What is encoded once and kept in files: embeddings of prompts, latents of pictures, samples of the base.

:mod:`~apex_fast.caching.shards` is the format, :mod:`~apex_fast.caching.identity` says what encoded it,
:mod:`~apex_fast.caching.build` writes it, in one process or many (``apex-fast cache``,
:mod:`~apex_fast.caching.command`), and :mod:`~apex_fast.caching.reading` is what a run reads it by.
"""

from __future__ import annotations

from apex_fast.caching.reading import Cache, open_cache, state_of
from apex_fast.caching.shards import cache_folder

__all__ = ["Cache", "cache_folder", "open_cache", "state_of"]
