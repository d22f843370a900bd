"""Records out of shards: WebDataset tars of any making, to be packed anew."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from shards.captions import CaptionRule
from shards.damage import BadSample, Problem, Reason
from shards.decode import Limits, decode_fields
from shards.manifest import CAPTION_FIELD, IMAGE_FIELDS, JSON_FIELD, Manifest
from shards.read import ShardReader
from shards.sources.record import Record, Source, identity, keeps, offers, safe_key, template_key

# Together with the longest key these fit the 100 bytes of a tar header.
_FIT_FIELD = re.compile(r"[a-z0-9][a-z0-9_.-]{0,17}")


class ShardSource(Source):
    """The samples of a data set in shards as records, for example to mix them or resize them.

    Keys stay as they are where they are fit (see `safe_key`), JSON fields too, and so do further
    members, such as `cls`. What was bad in the shards is told again, as `problems`.

    Args:
        place: A folder, a shard, a pattern such as `pairs/{000..031}.tar`, or a URL of one of them;
            or a manifest.
        caption: Where captions stand: `txt`, `txt.lines` (each line is one), `json.KEY`; without
            it, the list `captions` of the JSON, else the text, else `caption` of the JSON.
        key: Names a record from its JSON fields and `{__key__}`, `{__shard__}`, `{__index__}`.
        where: Keeps the samples in whose JSON each field has the value, or one of the values,
            given.

    Raises:
        FileNotFoundError: If there is no such place or no shard in it.
        ValueError: If the place is malformed, or no sample is left.
    """

    def __init__(
        self,
        place: Manifest | Path | str,
        *,
        caption: str | None = None,
        key: str | None = None,
        where: Mapping[str, Any] | None = None,
    ) -> None:
        manifest = place if isinstance(place, Manifest) else Manifest.open(place)
        self._manifest = manifest
        self._reader = ShardReader(manifest)
        self._rule = CaptionRule(() if caption is None else (caption,))
        self._key = key
        known = {*IMAGE_FIELDS, CAPTION_FIELD, JSON_FIELD}
        side = [name for name in manifest.fields if name not in known]
        self._side = [name for name in side if _FIT_FIELD.fullmatch(name)]
        self._ids = np.arange(len(manifest))
        if where:
            self._ids = self._ids[[keeps(where, self._fields(i)) for i in range(len(manifest))]]
            if not len(self._ids):
                there = offers(where, map(self._fields, range(min(len(manifest), 10_000))))
                raise ValueError(f"where={where} leaves no sample of {manifest.place}; {there}")
        unfit = (
            Problem(manifest.place, "", Reason.UNSAFE_NAME, f"members {name!r} stay behind")
            for name in side
            if name not in self._side
        )
        self.problems = (*manifest.problems, *unfit)
        options = {"caption": caption, "key": key, "where": where, "data": manifest.fingerprint}
        self.identity = identity("shards", options, [])

    @classmethod
    def recognises(cls, place: str) -> bool:
        """A tar, a pattern or URL of some, or a folder with a tar or a manifest right in it."""
        path = Path(place)
        if "://" in place or "{" in path.name or re.search(r"\.(tar|tgz|tar\.\w+)$", path.name):
            return True
        return path.is_dir() and any(
            re.search(r"^[^.].*\.(tar|tgz|tar\.\w+)$", one.name) for one in path.iterdir()
        )

    def __len__(self) -> int:
        return len(self._ids)

    def record(self, index: int) -> Record:
        """A sample, read anew."""
        sample = int(self._ids[index])
        manifest = self._manifest
        shard = manifest.shards[int(manifest.shard_numbers[sample])].name
        name = manifest.keys[sample].as_py()
        key, origin = safe_key(name), shard
        try:
            choice = int(manifest.image_choice[sample])
            if choice < 0:
                raise BadSample(Reason.NO_IMAGE, f"none of {', '.join(IMAGE_FIELDS)}")
            image = manifest.image_fields[choice]
            members = self._reader.read(sample, [image, CAPTION_FIELD, JSON_FIELD, *self._side])
            captions, fields = self._rule.read(members, Limits())
        except BadSample as fault:
            return Record(key, b"", None, origin=origin, fault=fault)
        if self._key is not None:
            named = {**fields, "__key__": name, "__shard__": Path(shard).stem, "__index__": sample}
            key = template_key(self._key, named)
        kept = {one: members[one] for one in self._side if one in members}
        several = captions if len(captions) > 1 else ()
        return Record(
            key, members[image], captions[0], fields, origin, captions=several, members=kept
        )

    def _fields(self, sample: int) -> dict[str, Any]:
        """The JSON fields of a sample; none where they cannot be read, which is told in packing."""
        try:
            data = self._reader.read(sample, [JSON_FIELD]).get(JSON_FIELD)
            return decode_fields(data) if data is not None else {}
        except BadSample:
            return {}
