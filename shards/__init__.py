"""Image-text pairs on disk, and a resumable stream of batches made of them.

| module | holds |
|---|---|
| `sources`, `packing` | records out of what people have; records into shards and a manifest |
| `storage` | where shards lie: folders, URLs, compressed files, the local cache |
| `tar` | what is inside a tar file, found by one walk over its headers |
| `manifest` | `Manifest`: shards, samples, offsets, fingerprint |
| `catalog`, `scan` | its two files; how it is made where there are none |
| `quarantine` | samples that were set aside |
| `order` | `Order` and `Mixture`: which sample stands at which position, a pure function |
| `read` | `ShardReader`: the bytes of a sample |
| `decode`, `native` | bytes into pixels, within limits; torchvision's decoders, watched |
| `crop`, `augment` | random boxes and random changes, functions of (seed, epoch, sample) |
| `captions` | where captions stand, and which of several is drawn |
| `damage` | bad samples: reasons, counts, lists |
| `batch` | `Batch`: decoded samples that are used together |
| `loader` | `ShardLoader` for training, `iterate` for one pass in order |
| `audit` | what a data set holds and what is wrong with it; a repaired copy |
| `prefetch`, `atomic` | threads that work ahead; files that are whole or absent |
| `demo` | the built-in data set |
"""
