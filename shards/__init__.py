"""Image-text pairs on disk, and a resumable stream of batches made of them.

| module | holds |
|---|---|
| `sources` | records out of what people have: Parquet tables, folders of pictures |
| `write` | `pack`: records into tar shards and a manifest |
| `tar` | what is inside a tar file, found by one walk over its headers |
| `manifest` | `Manifest`: shards, samples, offsets, fingerprint |
| `order` | `Order`: which sample stands at which position, a pure function |
| `read` | `ShardReader`: the bytes of a sample |
| `decode` | bytes into pixels, captions and fields, within limits |
| `damage` | bad samples: reasons, counts, lists |
| `batch` | `Batch`: decoded samples that are used together |
| `loader` | `ShardLoader` for training, `iterate` for one pass in order |
| `prefetch`, `atomic` | threads that work ahead; files that are whole or absent |
| `demo` | the built-in data set |
"""
