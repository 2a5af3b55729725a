"""The members of a tar archive: where their bytes lie, so that they are read without unpacking, and their names."""

import os
import tarfile

from regvit_jax.data.sources.kept_index import OpenFile


def members(path: str) -> tuple[list[tuple[str, int, int]], str]:
    """([(name, offset, size)] of the regular files in an archive that are whole, what is wrong with it or "").

    A damaged archive gives what comes before the damage. Compressed ones have no places to read at: they are refused.
    """
    found, end = [], 0
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        if file.read(2) == b"\x1f\x8b":
            return [], "it is compressed, and then nothing in it can be read in place: gunzip it"
    try:
        with tarfile.open(path, "r:") as archive:
            for member in archive:
                # tarfile keeps each one to find it by its name; an archive may have millions.
                archive.members = []
                end = member.offset_data + member.size
                if end > size:
                    base = os.path.basename(member.name)
                    return found, f"{base} is cut after {max(0, size - member.offset_data)} of {member.size} bytes"
                if member.isreg():
                    found.append((member.name, member.offset_data, member.size))
    except (tarfile.TarError, EOFError, OSError) as error:
        return found, str(error)
    # A whole archive ends in blocks of zeros. Where a download stopped between two members there are none, and where a
    # header is damaged something else is there: tarfile takes both for the end.
    with open(path, "rb") as file:
        file.seek(-(-end // 512) * 512)
        mark = file.read(512)
    return found, "" if mark == bytes(512) else f"it ends without an end mark at byte {end}"


def member_name(file: OpenFile, offset: int) -> str:
    """The name of the member whose bytes begin at `offset` of an open archive, from the block before it; "" where it
    cannot be read. Long ones are cut to 100 bytes."""
    try:
        header = file.pread(100, offset - 512)
    except OSError:
        return ""
    return header.split(b"\0")[0].decode("utf-8", "replace")
