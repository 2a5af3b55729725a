"""The bytes of a weights file, mapped and not copied, and the zip archives (.pth, .npz) that some of them are."""

import mmap
import os
import pathlib
import struct
import zlib
from typing import NamedTuple

# An archive's table of contents that is longer than this lists no weights: a model has a few hundred tensors.
MAX_DIRECTORY = 64 << 20
MAX_MEMBERS = 200_000

_END = struct.Struct("<4s4H2LH")  # end of central directory
_END64 = struct.Struct("<4sQ2H2L4Q")
_LOCATOR64 = struct.Struct("<4sLQL")
_ENTRY = struct.Struct("<4s6H3L5H2L")  # one entry of the central directory
_LOCAL = struct.Struct("<4s5H3L2H")  # what stands before a member's data
_FULL16, _FULL32 = 0xFFFF, 0xFFFFFFFF  # "see the zip64 record"


class WeightsError(ValueError):
    """A weights file is truncated, contradicts itself, is unsafe or of an unknown kind. Nothing in it was executed."""


def map_file(path: str | os.PathLike) -> memoryview:
    """The read-only bytes of a file. Pages are read on use; a file that is cut short while mapped kills the process.

    Raises:
      FileNotFoundError, PermissionError: as `open` does.
      WeightsError: if it is empty or no regular file.
    """
    path = pathlib.Path(path)
    with path.open("rb") as file:
        if not path.is_file():
            raise WeightsError(f"{path} is no regular file")
        if os.fstat(file.fileno()).st_size == 0:
            raise WeightsError(f"{path} is empty: copy or download it again")
        return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))


class Member(NamedTuple):
    """One file of an archive: method 0 is stored, 8 deflated; `start` is where its data begins."""

    name: str
    method: int
    crc: int
    packed: int
    size: int
    start: int


class Archive:
    """A zip file, read from memory and strictly: every member lies inside the file, none overlaps another, no name is
    given twice. Nothing is ever written to the disk, so names are only names.

    Args:
      data: the whole file.
      where: what error messages call it.

    Raises:
      WeightsError: if the table of contents is damaged or lies.
    """

    def __init__(self, data: memoryview, where: str):
        self._data, self._where = data, where
        try:
            self.members = {member.name: member for member in self._directory()}
        except (struct.error, UnicodeDecodeError) as error:
            raise self._bad(f"its table of contents is damaged ({error})") from error
        # `torch.serialization.set_crc32_options(False)` leaves every checksum 0.
        self._checked = any(member.crc for member in self.members.values())

    def read(self, name: str) -> memoryview:
        """A member's bytes: a view of the file where it is stored, inflated (to no more than it declares) where not.

        Raises:
          WeightsError: if there is no such member or its checksum does not fit.
        """
        if name not in self.members:
            raise self._bad(f"it has no member {name[:80]!r}")
        member = self.members[name]
        content = self._data[member.start : member.start + member.packed]
        if member.method == 8:
            try:
                content = memoryview(zlib.decompressobj(-15).decompress(content, member.size + 1))
            except zlib.error as error:
                raise self._bad(f"member {name[:80]!r} does not inflate ({error})") from error
            if len(content) != member.size:
                raise self._bad(f"member {name[:80]!r} does not inflate to the {member.size} bytes it declares")
        if self._checked and zlib.crc32(content) != member.crc:
            raise self._bad(f"the checksum of member {name[:80]!r} is wrong")
        return content

    def _directory(self) -> list[Member]:
        count, size, start = self._end()
        if size > MAX_DIRECTORY or count > MAX_MEMBERS:
            raise self._bad(f"a table of contents of {count} members and {size} bytes is no weights file's")
        members, names, at = [], set(), start
        for _ in range(count):
            member, at = self._member(at, start)
            if member.name in names:
                raise self._bad(f"member {member.name[:80]!r} is there twice")
            names.add(member.name)
            members.append(member)
        if at != start + size:
            raise self._bad("its table of contents has another length than it declares")
        used = sorted((m.start, m.start + m.packed) for m in members if m.packed)
        if any(end > begin for (_, end), (begin, _) in zip(used, used[1:], strict=False)):
            raise self._bad("members overlap")
        return members

    def _end(self) -> tuple[int, int, int]:
        """(number of members, bytes of the central directory, where it starts)."""
        size = len(self._data)
        tail = bytes(self._data[max(0, size - _END.size - _FULL16) :])
        at = tail.rfind(b"PK\5\6")
        if at < 0:
            raise self._bad("the end of the archive is missing: it is truncated")
        _, disk, first, here, count, length, start, comment = _END.unpack_from(tail, at)
        at += size - len(tail)
        if at + _END.size + comment != size or disk or first or here != count:
            raise self._bad("the end of the archive is damaged")
        if count == _FULL16 or _FULL32 in (length, start):
            at -= _LOCATOR64.size
            if at < 0:
                raise self._bad("its zip64 record is missing")
            magic, _, at, _ = _LOCATOR64.unpack_from(self._data, at)
            if magic != b"PK\6\7" or at + _END64.size > size:
                raise self._bad("its zip64 record is missing")
            magic, _, _, _, _, _, _, count, length, start = _END64.unpack_from(self._data, at)
            if magic != b"PK\6\6":
                raise self._bad("its zip64 record is damaged")
        if start + length > at:
            raise self._bad("its table of contents reaches past the end: the file is truncated, or has bytes in front")
        return count, length, start

    def _member(self, at: int, limit: int) -> tuple[Member, int]:
        """The member whose entry stands at `at`, and where the next entry does. All data ends before `limit`."""
        entry = _ENTRY.unpack_from(self._data, at)
        magic, _, _, flags, method, _, _, crc, packed, size, n, extra, comment, _, _, _, offset = entry
        at += _ENTRY.size
        name = bytes(self._data[at : at + n])
        fields = bytes(self._data[at + n : at + n + extra])
        at += n + extra + comment
        if magic != b"PK\1\2" or at > len(self._data):
            raise self._bad("its table of contents is damaged")
        size, packed, offset = _zip64(fields, size, packed, offset)
        text = name.decode("utf-8")
        if flags & 0x2041 or method not in (0, 8):
            raise self._bad(f"member {text[:80]!r} is encrypted, or compressed by method {method}")
        if text.startswith("/") or "\\" in text or "\0" in text or ".." in text.split("/"):
            raise self._bad(f"member {text[:80]!r} has a path for a name")
        if method == 0 and packed != size:
            raise self._bad(f"member {text[:80]!r} is stored and has two sizes, {packed} and {size}")
        if offset + _LOCAL.size > limit:
            raise self._bad(f"member {text[:80]!r} lies outside the file")
        magic, _, _, again, *_, n, extra = _LOCAL.unpack_from(self._data, offset)
        offset += _LOCAL.size
        start = offset + n + extra
        if magic != b"PK\3\4" or bytes(self._data[offset : offset + n]) != name or again != method:
            raise self._bad(f"member {text[:80]!r} is not where the table of contents says")
        if start + packed > limit:
            raise self._bad(f"member {text[:80]!r} reaches past the end of the data")
        return Member(text, method, crc, packed, size, start), at

    def _bad(self, what: str) -> WeightsError:
        return WeightsError(f"{self._where}: {what}. Copy or download it again, from a source you trust")


def _zip64(fields: bytes, *values: int) -> list[int]:
    """(size, packed, offset) with those that did not fit 32 bits taken from the extra field 1."""
    out, at = list(values), 0
    while at + 4 <= len(fields):
        kind, length = struct.unpack_from("<HH", fields, at)
        if kind == 1:
            wide = iter(struct.unpack_from(f"<{length // 8}Q", fields, at + 4))
            out = [next(wide, value) if value == _FULL32 else value for value in out]
        at += 4 + length
    return out
