"""The script root and the version store: what may be named, what is never followed, and what a crash cannot leave."""

import os
import threading
import unicodedata
from pathlib import Path

import pytest

from app.domain.errors import Invalid
from app.registry.scripts.names import FileOutsideRoot, FilePathTooLong, InvalidFilePath, script_path
from app.registry.scripts.root import NotARegularFile, ScriptRoot, ScriptTooLarge, digest_of
from app.registry.scripts.versions import VersionLost, VersionStore

SOURCE = b"print('hello')\n"


@pytest.fixture
def root(tmp_path: Path) -> ScriptRoot:
    (tmp_path / "scripts").mkdir()
    return ScriptRoot(tmp_path / "scripts", max_bytes=1000)


class TestScriptPath:
    @pytest.mark.parametrize(
        ("given", "kept"),
        [
            ("train.py", "train.py"),
            ("linux_code/save_model", "linux_code/save_model.py"),
            ("./train.py", "train.py"),
            ("deploy_v1.2", "deploy_v1.2.py"),
            ("训练 文件.py", "训练 文件.py"),
            (unicodedata.normalize("NFD", "größe.py"), "größe.py"),
        ],
    )
    def test_keeps_one_form(self, given: str, kept: str) -> None:
        assert script_path(given) == kept

    @pytest.mark.parametrize(
        "given", ["/etc/passwd", "../train.py", "a/../../b.py", "a/..", "C:\\train.py", "C:/train.py", "\\\\host\\x.py"]
    )
    def test_refuses_to_leave_the_root(self, given: str) -> None:
        with pytest.raises(FileOutsideRoot):
            script_path(given)

    @pytest.mark.parametrize(
        "given",
        [
            "",
            ".",
            "a//b.py",
            "folder/",
            "a\\b.py",
            "a\0.py",
            "a\n.py",
            "a\u202egnp.py",
            "a\u200bb.py",
            "a\u00a0b.py",
            "\ud800.py",
            "nul.py",
            "CON",
            "x/LPT1.tar.py",
            "train.py.",
            "train.",
            "train .py",
            " train.py",
            "folder /x.py",
            "-c.py",
            ".hidden.py",
            ".py",
            "what?.py",
            "a:b.py",
            "__pycache__/x.py",
            "\uff0e\uff0e/x.py",
        ],
    )
    def test_refuses_names_that_would_be_misread(self, given: str) -> None:
        with pytest.raises(InvalidFilePath):
            script_path(given)

    @pytest.mark.parametrize("given", ["ä" * 127, "/".join(["folder"] * 200)])
    def test_refuses_names_longer_than_file_systems_take(self, given: str) -> None:
        with pytest.raises(FilePathTooLong):
            script_path(given)


class TestScriptRoot:
    def test_reads_what_was_written(self, root: ScriptRoot) -> None:
        root.write("deep/er/train.py", SOURCE)

        assert root.read("deep/er/train.py") == SOURCE
        assert root.digest("deep/er/train.py") == digest_of(SOURCE)

    def test_absent_files_are_none(self, root: ScriptRoot) -> None:
        root.write("train.py", SOURCE)

        assert root.read("nowhere.py") is None
        assert root.digest("nowhere/train.py") is None
        assert root.read("train.py/inner.py") is None

    def test_create_leaves_what_is_there_alone(self, root: ScriptRoot) -> None:
        assert root.create("train.py", SOURCE)

        assert not root.create("train.py", b"other")
        assert root.read("train.py") == SOURCE
        assert sorted(path.name for path in root.root.iterdir()) == ["train.py"]

    def test_digest_sees_an_edit_of_equal_size(self, root: ScriptRoot) -> None:
        root.write("train.py", b"a = 1")
        first = root.digest("train.py")

        (root.root / "train.py").write_bytes(b"a = 2")

        assert root.digest("train.py") != first

    def test_a_settled_file_is_not_read_again(self, root: ScriptRoot, monkeypatch: pytest.MonkeyPatch) -> None:
        root.write("train.py", SOURCE)
        monkeypatch.setattr("app.registry.scripts.root._SETTLED_NS", -1)
        root.digest("train.py")

        monkeypatch.setattr(root, "_content", lambda *_: pytest.fail("read again"))

        assert root.digest("train.py") == digest_of(SOURCE)

    def test_follows_a_link_that_stays_inside(self, root: ScriptRoot) -> None:
        root.write("shared/train.py", SOURCE)
        (root.root / "train.py").symlink_to("shared/train.py")

        assert root.read("train.py") == SOURCE

    def test_never_leaves_by_a_link(self, root: ScriptRoot, tmp_path: Path) -> None:
        outside = tmp_path / "outside"
        outside.mkdir()
        (outside / "secret.py").write_bytes(SOURCE)
        (root.root / "file.py").symlink_to(outside / "secret.py")
        (root.root / "folder").symlink_to(outside)
        (root.root / "dangling.py").symlink_to(outside / "new.py")

        for path in ("file.py", "folder/secret.py"):
            with pytest.raises(FileOutsideRoot):
                root.read(path)
        for path in ("file.py", "folder/new.py", "dangling.py"):
            with pytest.raises(FileOutsideRoot):
                root.write(path, b"changed")
        assert (outside / "secret.py").read_bytes() == SOURCE
        assert [path.name for path in outside.iterdir()] == ["secret.py"]

    def test_a_link_put_there_meanwhile_is_refused(
        self, root: ScriptRoot, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "secret.py").write_bytes(SOURCE)
        (tmp_path / "outside").mkdir()
        (root.root / "file.py").symlink_to(tmp_path / "secret.py")
        (root.root / "folder").symlink_to(tmp_path / "outside")

        # what a check before the link was put there would have said
        monkeypatch.setattr(root, "_resolved_parts", lambda path: path.split("/"))

        with pytest.raises(FileOutsideRoot):
            root.read("file.py")
        with pytest.raises(FileOutsideRoot):
            root.write("folder/new.py", SOURCE)

    def test_links_in_a_circle_are_refused(self, root: ScriptRoot) -> None:
        (root.root / "a.py").symlink_to("b.py")
        (root.root / "b.py").symlink_to("a.py")

        with pytest.raises(Invalid):
            root.read("a.py")

    def test_only_regular_files(self, root: ScriptRoot) -> None:
        os.mkfifo(root.root / "pipe.py")
        (root.root / "folder.py").mkdir()

        for path in ("pipe.py", "folder.py"):
            with pytest.raises(NotARegularFile):
                root.read(path)
            with pytest.raises(NotARegularFile):
                root.write(path, SOURCE)

    def test_size_is_limited_both_ways(self, root: ScriptRoot) -> None:
        (root.root / "big.py").write_bytes(b"#" * 1001)

        with pytest.raises(ScriptTooLarge):
            root.digest("big.py")
        with pytest.raises(ScriptTooLarge):
            root.write("big.py", b"#" * 1001)

    def test_entries_show_what_a_stage_could_name(self, root: ScriptRoot, tmp_path: Path) -> None:
        root.write("b.py", SOURCE)
        root.write("a/inner.py", SOURCE)
        for name in ("notes.txt", ".hidden.py", "odd\u200b.py"):
            (root.root / name).write_bytes(SOURCE)
        (root.root / "__pycache__").mkdir()
        (root.root / "__pycache__" / "b.py").write_bytes(SOURCE)
        (root.root / "linked").symlink_to(tmp_path)

        assert [(entry.path, entry.size) for entry in root.entries()] == [
            ("a/inner.py", len(SOURCE)),
            ("b.py", len(SOURCE)),
        ]

    def test_of_two_creates_one_wins(self, root: ScriptRoot) -> None:
        won: list[bytes] = []
        barrier = threading.Barrier(8)

        def create(content: bytes) -> None:
            barrier.wait()
            if root.create("race.py", content):
                won.append(content)

        threads = [threading.Thread(target=create, args=(f"n = {n}".encode(),)) for n in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

        assert [root.read("race.py")] == won


class TestVersionStore:
    def test_gives_back_what_was_put(self, tmp_path: Path) -> None:
        store = VersionStore(tmp_path)

        sha256 = store.put(SOURCE)

        assert sha256 == digest_of(SOURCE).sha256
        assert store.put(SOURCE) == sha256
        assert store.get(sha256) == SOURCE

    def test_materialises_under_the_script_s_name(self, tmp_path: Path) -> None:
        store = VersionStore(tmp_path)
        sha256 = store.put(SOURCE)

        file = store.materialise(sha256, "folder/train.py")

        assert file.name == "train.py"
        assert file.read_bytes() == SOURCE
        assert store.materialise(sha256, "folder/train.py") == file

    def test_mends_a_copy_that_somebody_changed(self, tmp_path: Path) -> None:
        store = VersionStore(tmp_path)
        sha256 = store.put(SOURCE)
        file = store.materialise(sha256, "train.py")
        file.chmod(0o644)
        file.write_bytes(b"tampered")

        assert store.materialise(sha256, "train.py").read_bytes() == SOURCE

    def test_refuses_bytes_that_are_not_those(self, tmp_path: Path) -> None:
        store = VersionStore(tmp_path)
        sha256 = store.put(SOURCE)
        content = tmp_path / sha256[:2] / sha256 / "content"
        content.chmod(0o644)
        content.write_bytes(b"tampered")

        with pytest.raises(VersionLost):
            store.get(sha256)
        assert store.get(store.put(SOURCE)) == SOURCE
