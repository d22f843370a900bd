"""Records into shards and a manifest, with equal bytes for equal input.

| module | holds |
|---|---|
| `pack` | `pack`: the whole way |
| `assemble` | what goes into each member; several shards written at a time |
| `recode` | pictures checked, and on request made smaller or encoded anew |
| `work` | where a data set grows until it moves into place |
| `sidecars` | files beside the shards that other tools look for |
"""

from shards.packing.pack import pack
from shards.packing.recode import Recode
from shards.packing.sidecars import SIDECARS
from shards.packing.work import WORK_FOLDER

__all__ = ["SIDECARS", "WORK_FOLDER", "Recode", "pack"]
