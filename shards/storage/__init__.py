"""Where shards lie: a local folder, or any place that fsspec reads by URL.

`storage_of` makes a `Storage` of what a user names. Compressed shards (`.tar.gz`, `.tgz`,
`.tar.zst`) are unpacked into a cache when they are first read; that is the slow way, and `align
pack` makes plain ones. Remote shards are read in blocks that the cache keeps.

| module | holds |
|---|---|
| `storage` | `Storage`, the promise of every place; `Reading`, its limits |
| `place` | `storage_of`: paths, patterns, URLs; `cache_folder`: what is known of a place |
| `local` | a folder |
| `remote`, `fetching`, `transport` | a URL: its blocks; tries and shared requests; one request |
| `unpack` | compressed shards |
| `cache` | files that may be thrown away, within a limit |
"""

from shards.storage.local import LocalStorage
from shards.storage.place import cache_folder, storage_of
from shards.storage.storage import Reading, Storage

__all__ = ["LocalStorage", "Reading", "Storage", "cache_folder", "storage_of"]
