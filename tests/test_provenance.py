"""Provenance: the commit read from the forms that git writes, versions, processor."""

import jax
import pytest

from regvit_jax import provenance

ID = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    (tmp_path / "regvit_jax").mkdir()
    monkeypatch.setattr(provenance, "__file__", str(tmp_path / "regvit_jax" / "provenance.py"))
    provenance.commit.cache_clear()
    yield tmp_path
    provenance.commit.cache_clear()


def write(folder, **files):
    for name, text in files.items():
        path = folder / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def test_an_installed_package_has_no_commit(checkout):
    assert provenance.commit() is None


def test_a_branch_a_detached_head_and_packed_refs(checkout):
    write(checkout / ".git", HEAD="ref: refs/heads/main\n", refs__heads__main=f"{ID}\n")
    assert provenance.commit() == ID
    provenance.commit.cache_clear()
    (checkout / ".git/refs/heads/main").unlink()
    (checkout / ".git/packed-refs").write_text(
        f"# pack-refs with: peeled\n{'f' * 40} refs/heads/other\n{ID} refs/heads/main\n"
    )
    assert provenance.commit() == ID
    provenance.commit.cache_clear()
    write(checkout / ".git", HEAD=f"{'a' * 40}\n")
    assert provenance.commit() == "a" * 40


def test_a_linked_worktree(checkout):
    home = checkout / "home" / ".git"
    write(
        home,
        refs__heads__side=f"{ID}\n",
        worktrees__w__HEAD="ref: refs/heads/side\n",
        worktrees__w__commondir="../..\n",
    )
    (checkout / ".git").write_text(f"gitdir: {home / 'worktrees' / 'w'}\n")
    assert provenance.commit() == ID


def test_versions_and_processor():
    found = provenance.versions()
    assert {"jax", "numpy"} <= found.keys() <= set(provenance.PACKAGES)
    assert found["jax"] == jax.__version__
    assert "cores of" in provenance.processor()
