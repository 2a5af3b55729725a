"""Released files: addresses, and downloads from a local server that cuts, lies, forgets and is not there."""

import hashlib
import http.server
import os
import re
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from regvit_jax.convert import download, released
from regvit_jax.convert.download import DownloadError
from regvit_jax.convert.files import WeightsError, sha256_of
from regvit_jax.convert.released import RELEASED, Released, fetch
from regvit_jax.models.zoo import list_models

ROOT = Path(__file__).parents[2]
CONTENT = bytes(range(256)) * 4096  # 1 MiB
DIGEST = hashlib.sha256(CONTENT).hexdigest()


class Server(http.server.ThreadingHTTPServer):
    """Serves CONTENT under every path; what it does wrong is set by the test. Keeps the ranges it was asked for."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.content, self.etag, self.status = CONTENT, '"one"', 200
        self.ranges, self.cut_after, self.more = True, None, {}
        self.asked: list[str | None] = []


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        server = self.server
        wanted = self.headers["Range"]
        server.asked.append(wanted)
        if server.status != 200:
            return self.send_error(server.status)
        start, content = 0, server.content
        if wanted and server.ranges and self.headers["If-Range"] == server.etag:
            start = int(re.fullmatch(r"bytes=(\d+)-", wanted)[1])
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.send_header("Content-Length", str(len(content) - start))
        if server.etag:
            self.send_header("ETag", server.etag)
        for key, value in server.more.items():
            self.send_header(key, value)
        self.end_headers()
        end = len(content) if server.cut_after is None else start + server.cut_after
        self.wfile.write(content[start:end])
        self.close_connection = True

    def version_string(self):
        return self.server.more.get("Server", "test")

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch, tmp_path):
    server = Server()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    monkeypatch.setenv("REGVIT_WEIGHTS_URL", f"http://127.0.0.1:{server.server_port}/mirror/")
    monkeypatch.setenv("REGVIT_CACHE", str(tmp_path))
    monkeypatch.setattr(download.time, "sleep", lambda _: None)
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def known(monkeypatch):
    """A model "known" with a digest and one, "unknown", without."""
    table = {"known": Released("a/b/known.pth", "dinov2", DIGEST), "unknown": Released("a/unknown.pth", "dinov2")}
    monkeypatch.setattr(released, "RELEASED", table)
    return {name: entry.place for name, entry in table.items()}


def test_addresses_are_those_of_the_model_zoos():
    host = "https://dl.fbaipublicfiles.com"
    assert {
        name: RELEASED[name].url for name in ("dinov2_vits14", "dinov2_vitl14_reg4", "deit3_vith14", "dino_vitb8")
    } == {
        "dinov2_vits14": f"{host}/dinov2/dinov2_vits14/dinov2_vits14_pretrain.pth",
        "dinov2_vitl14_reg4": f"{host}/dinov2/dinov2_vitl14/dinov2_vitl14_reg4_pretrain.pth",
        "deit3_vith14": f"{host}/deit/deit_3_huge_224_1k.pth",
        "dino_vitb8": f"{host}/dino/dino_vitbase8_pretrain/dino_vitbase8_pretrain.pth",
    }
    assert RELEASED["deit3_vith14_in21k"].url == f"{host}/deit/deit_3_huge_224_21k_v1.pth"
    assert (
        RELEASED["dinov2_vitb14_reg4_linear4"].url == f"{host}/dinov2/dinov2_vitb14/dinov2_vitb14_reg4_linear4_head.pth"
    )


def test_every_model_that_was_released_under_our_names_is_there():
    ours = {name for name in list_models() if name.startswith(("dinov2_", "deit3_"))}
    never = {name for name in ours if name.startswith("deit3") and "reg" in name} | {"deit3_vitti16"}
    assert ours - never <= set(RELEASED)
    assert not never & set(RELEASED)
    places = [entry.place for entry in RELEASED.values()]
    assert len(set(places)) == len(places)
    assert all(re.fullmatch("[0-9a-f]{64}|", entry.sha256) for entry in RELEASED.values())


def test_a_file_is_fetched_once_and_verified_every_time(server, known):
    path = fetch("known")
    assert path == known["known"] and path.read_bytes() == CONTENT
    assert path.with_name("known.pth.sha256").read_text() == f"{DIGEST}  known.pth\n"
    assert fetch("known") == path and len(server.asked) == 1
    assert {p.name for p in path.parent.iterdir()} == {"known.pth", "known.pth.sha256", "known.pth.lock"}
    path.write_bytes(CONTENT[:-1] + b"x")
    with pytest.raises(WeightsError, match=f"known.pth is not the file.*expected {DIGEST}"):
        fetch("known")


def test_without_a_known_digest_the_first_one_holds(server, known):
    path = fetch("unknown")
    assert path.with_name("unknown.pth.sha256").read_text().split()[0] == DIGEST
    path.write_bytes(b"other")
    with pytest.raises(WeightsError, match="delete it"):
        fetch("unknown")


def test_a_file_placed_by_hand_is_taken(monkeypatch, tmp_path, known):
    monkeypatch.setenv("REGVIT_CACHE", str(tmp_path))
    for name in known:
        place = released.RELEASED[name].place
        place.parent.mkdir(exist_ok=True)
        place.write_bytes(CONTENT)
        assert fetch(name) == place == fetch(name)
    place.write_bytes(b"other")  # it was remembered
    with pytest.raises(WeightsError):
        fetch("unknown")


def test_a_broken_download_goes_on_where_it_stopped(server, known):
    server.cut_after = 400_000
    assert fetch("known").read_bytes() == CONTENT
    assert server.asked == [None, "bytes=400000-", "bytes=800000-"]


def test_the_next_process_goes_on_too(server, known):
    server.cut_after = 400_000
    part = known["known"].with_name("known.pth.part")
    with pytest.raises(DownloadError, match=r"broke after 400000 of 1048576 bytes \(1 tries, 400000 bytes are kept"):
        once(server, known)
    assert part.stat().st_size == 400_000
    server.cut_after = None
    assert fetch("known").read_bytes() == CONTENT and server.asked[-1] == "bytes=400000-"


def once(server, known):
    """One connection that breaks, then a server that answers nothing more."""
    real = download._continue

    def and_no_more(url, part):
        if server.asked:
            raise ConnectionError("the connection broke after 400000 of 1048576 bytes")
        return real(url, part)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(download, "_continue", and_no_more)
        download.download(released.RELEASED["known"].url, known["known"], sha256=DIGEST, tries=1)


@pytest.mark.parametrize("change", ["etag", "no ranges", "no etag", "part too long"])
def test_what_cannot_be_continued_begins_anew(server, known, change):
    part = known["known"].with_name("known.pth.part")
    part.parent.mkdir()
    part.write_bytes(b"old bytes")
    origin = part.with_name("known.pth.part.json")
    origin.write_text(f'{{"url": "{released.RELEASED["known"].url}", "version": "\\"one\\""}}')
    if change == "etag":
        server.etag = '"two"'  # the file on the server is another one now
    elif change == "no ranges":
        server.ranges = False
    elif change == "no etag":
        origin.unlink()
    else:
        part.write_bytes(CONTENT * 2)
    assert fetch("known").read_bytes() == CONTENT


def test_a_server_without_etags_and_lengths_is_enough(server, known):
    server.etag = ""
    assert fetch("unknown").read_bytes() == CONTENT


def test_a_wrong_checksum_is_refused_and_deleted(server, known):
    server.content = b"a page that says: log in first"
    with pytest.raises(DownloadError, match=f"SHA-256 {DIGEST}, got .*known.pth"):
        fetch("known")
    assert not known["known"].exists() and not known["known"].with_name("known.pth.part").exists()


@pytest.mark.parametrize(
    "headers",
    [{"Content-MD5": "AAAAAAAAAAAAAAAAAAAAAA=="}, {"Server": "AmazonS3"}],
    ids=["Content-MD5", "ETag of S3"],
)
def test_an_md5_that_the_server_tells_is_checked(server, known, headers):
    server.more, server.etag = headers, '"00000000000000000000000000000000"'
    with pytest.raises(DownloadError, match="MD5"):
        fetch("unknown")
    right = hashlib.md5(CONTENT)
    server.etag = f'"{right.hexdigest()}"'
    server.more = {"Server": "AmazonS3"}
    assert fetch("unknown").exists()


def test_what_is_not_there_is_not_tried_again(server, known):
    server.status = 404
    with pytest.raises(DownloadError, match=f"404.*place the file http.*known.pth as {known['known']}"):
        fetch("known")
    assert len(server.asked) == 1


def test_a_server_in_trouble_is_tried_again(server, known):
    server.status = 503
    with pytest.raises(DownloadError, match=r"503.*5 tries"):
        fetch("known")
    assert len(server.asked) == 5


def test_offline_says_which_file_to_place_where(monkeypatch, tmp_path, known):
    monkeypatch.setenv("REGVIT_CACHE", str(tmp_path))
    monkeypatch.delenv("REGVIT_WEIGHTS_URL", raising=False)

    def unreachable(*_, **__):
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unreachable)
    for proxy in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(proxy, raising=False)
    place = tmp_path / "weights" / "known.pth"
    with pytest.raises(DownloadError, match=f"place the file https://dl.fbaipublicfiles.com/a/b/known.pth as {place}"):
        fetch("known")


def test_other_addresses_than_http_are_refused(monkeypatch, tmp_path, known):
    monkeypatch.setenv("REGVIT_CACHE", str(tmp_path))
    monkeypatch.setenv("REGVIT_WEIGHTS_URL", "file:///etc")
    with pytest.raises(DownloadError, match="no http"):
        fetch("known")


def test_unknown_names_get_the_nearest(known, monkeypatch):
    with pytest.raises(ValueError, match="'knwon'; nearest: known"):
        fetch("knwon")


def test_two_processes_download_once(server, tmp_path):
    """The second waits for the first, then finds the file."""
    url = f"{os.environ['REGVIT_WEIGHTS_URL']}x.pth"
    program = "import pathlib, sys; from regvit_jax.convert.download import download; "
    program += "download(sys.argv[1], pathlib.Path(sys.argv[2]))"
    command = [sys.executable, "-c", program, url, str(tmp_path / "x.pth")]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    both = [subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL) for _ in range(2)]
    assert [process.wait(timeout=120) for process in both] == [0, 0]
    assert sha256_of(tmp_path / "x.pth") == DIGEST and len(server.asked) == 1
