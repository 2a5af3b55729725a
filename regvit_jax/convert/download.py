"""Large files over HTTP: resumed where they broke off, one process at a time, checked before they get their name."""

import base64
import contextlib
import email.message
import errno
import fcntl
import hashlib
import http.client
import json
import logging
import os
import pathlib
import re
import shutil
import socket
import time
import urllib.error
import urllib.request
from collections.abc import Iterator

from tqdm import tqdm

CHUNK = 1 << 20
TIMEOUT = 60.0  # seconds without a byte
FINAL = (400, 401, 403, 404, 405, 410, 451)  # statuses that another try does not change


class DownloadError(OSError):
    """A file could not be fetched, or what came is not what was meant."""


def download(
    url: str,
    target: pathlib.Path,
    *,
    sha256: str | None = None,
    tries: int = 5,
    pause: float = 1.0,
) -> None:
    """Fetches a file, unless it is there. What an earlier call left is continued if the server's file is the same.

    Beside it, `<name>.sha256` gets the digest as `sha256sum -c` reads it.

    Args:
      url: http or https.
      target: the file to make; its folder is made too.
      sha256: what it must be. None: the length and, where the server says one, the MD5 are checked.
      tries: connections in a row that bring nothing before it gives up.
      pause: seconds before the second of them, doubled each time.

    Raises:
      DownloadError: says what went wrong; a broken part stays and the next call continues it.
    """
    if not url.startswith(("http://", "https://")):
        raise DownloadError(f"{url} is no http or https address")
    target.parent.mkdir(parents=True, exist_ok=True)
    with _lock(target):
        if target.exists():
            return
        part = target.with_name(f"{target.name}.part")
        headers = _fetch(url, part, tries, pause)
        digest = _check(url, part, headers, sha256)
        record(target, digest)
        os.replace(part, target)
        _origin(part).unlink(missing_ok=True)


def record(target: pathlib.Path, digest: str) -> None:
    """Writes `<name>.sha256`."""
    temporary = target.with_name(f"{target.name}.sha256.tmp")
    temporary.write_text(f"{digest}  {target.name}\n")
    os.replace(temporary, recorded(target))


def recorded(target: pathlib.Path) -> pathlib.Path:
    return target.with_name(f"{target.name}.sha256")


def _fetch(url: str, part: pathlib.Path, tries: int, pause: float) -> email.message.Message:
    """Brings `part` to its full length; the headers of the last answer."""
    failures = 0
    while True:
        before = part.stat().st_size if part.exists() else 0
        try:
            return _continue(url, part)
        except DownloadError:
            raise
        except urllib.error.HTTPError as error:
            error.close()
            if error.code == 416:  # the part is no beginning of that file
                part.unlink(missing_ok=True)
            elif error.code in FINAL:
                raise DownloadError(f"{url}: the server answers {error.code} {error.reason}") from error
            reason = f"the server answers {error.code} {error.reason}"
        except (OSError, http.client.HTTPException) as error:  # no network, a cut connection, a timeout
            reason = getattr(error, "reason", error)
            if isinstance(error, OSError) and error.errno == errno.ENOSPC:
                raise DownloadError(f"no space left for {part}") from error
            if isinstance(reason, socket.gaierror):
                raise DownloadError(f"{url}: this machine does not find the server ({reason})") from error
            reason = str(reason) or type(error).__name__
        now = part.stat().st_size if part.exists() else 0
        failures = 0 if now > before else failures + 1
        if failures >= tries:
            raise DownloadError(f"{url}: {reason} ({tries} tries, {now} bytes are kept in {part.name})")
        time.sleep(min(pause * 2 ** max(failures - 1, 0), 60.0))


def _continue(url: str, part: pathlib.Path) -> email.message.Message:
    """One connection: appends what is missing, or begins anew where the server does not continue."""
    have = part.stat().st_size if part.exists() else 0
    version = _version_of(part, url) if have else None
    request = urllib.request.Request(url, headers={"Accept-Encoding": "identity", "User-Agent": "regvit_jax"})
    if version:
        request.add_header("Range", f"bytes={have}-")
        request.add_header("If-Range", version)  # another file under the same address comes whole, not from the middle
    with urllib.request.urlopen(request, timeout=TIMEOUT) as answer:
        total = _total(answer, have if version else 0)
        if answer.status != 206:
            have = 0
        if total is not None and total - have > shutil.disk_usage(part.parent).free:
            raise DownloadError(f"{part.parent} has no space for {total - have} bytes")
        version = answer.headers["ETag"] or answer.headers["Last-Modified"] or ""
        _origin(part).write_text(json.dumps({"url": url, "version": "" if version.startswith("W/") else version}))
        bar = tqdm(total=total, initial=have, unit="B", unit_scale=True, desc=part.stem, mininterval=1.0)
        with bar, part.open("ab" if have else "wb") as file:
            while chunk := answer.read(CHUNK):
                file.write(chunk)
                bar.update(len(chunk))
        size = part.stat().st_size
        if total is not None and size != total:
            if size > total:
                part.unlink()
            raise ConnectionError(f"the connection broke after {size} of {total} bytes")
        return answer.headers


def _total(answer: http.client.HTTPResponse, have: int) -> int | None:
    """Bytes of the whole file, None where the server does not say."""
    if answer.status == 206:
        match = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+)", answer.headers["Content-Range"] or "")
        if match is None or int(match[1]) != have:
            raise DownloadError(f"{answer.url}: asked for bytes from {have}, got {answer.headers['Content-Range']}")
        return int(match[3])
    length = answer.headers["Content-Length"]
    return int(length) if length and length.isdecimal() else None


def _origin(part: pathlib.Path) -> pathlib.Path:
    """Where it is written what a part is a part of."""
    return part.with_name(f"{part.name}.json")


def _version_of(part: pathlib.Path, url: str) -> str | None:
    """The server's word for the file that the part began with; None if it is not known or was another file."""
    try:
        origin = json.loads(_origin(part).read_text())
        return origin["version"] if origin["url"] == url else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _check(url: str, part: pathlib.Path, headers: email.message.Message, sha256: str | None) -> str:
    """The digest of a complete part that is what was meant; one that is not is deleted."""
    with part.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        file.seek(0)
        expected_md5 = None if sha256 else _md5(headers)
        md5 = hashlib.file_digest(file, "md5").hexdigest() if expected_md5 else None
    if digest == sha256 or (sha256 is None and md5 == expected_md5):
        return digest
    size = part.stat().st_size
    part.unlink()
    expected = f"SHA-256 {sha256}, got {digest}" if sha256 else f"MD5 {expected_md5}, got {md5}"
    raise DownloadError(
        f"{url}: {size} bytes came and are not the file that is meant (expected {expected}). They were deleted; the "
        "mirror or a proxy on the way may serve something else"
    )


def _md5(headers: email.message.Message) -> str | None:
    """The MD5 that a server tells: Content-MD5, or the ETag of S3 for a file sent in one piece without a KMS key."""
    if headers["Content-MD5"]:
        with contextlib.suppress(ValueError):
            return base64.b64decode(headers["Content-MD5"], validate=True).hex()
    etag = (headers["ETag"] or "").strip('"')
    kms = (headers["x-amz-server-side-encryption"] or "").startswith("aws:kms")
    return etag if headers["Server"] == "AmazonS3" and not kms and re.fullmatch("[0-9a-f]{32}", etag) else None


@contextlib.contextmanager
def _lock(target: pathlib.Path) -> Iterator[None]:
    """Held by one process; a second one waits and then finds the file."""
    with target.with_name(f"{target.name}.lock").open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            logging.info("waiting for another process that downloads %s", target.name)
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield
