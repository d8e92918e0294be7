"""Each foreseeable mistake: one sentence, status 2, no stack trace, and the state as it was."""

from __future__ import annotations

import hashlib
import shutil
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
from command import Fedvit
from PIL import Image


def image(path: Path, shade: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (20, 20), (200, 30, shade)).save(path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A small data set in the ImageFolder layout."""
    for split, count in (("train", 12), ("test", 3)):
        for k, name in enumerate(("red", "green")):
            for i in range(count):
                image(tmp_path / "images" / split / name / f"{i}.png", shade=20 * k + i)
    return tmp_path / "images"


def snapshot(home: Path) -> dict[str, str]:
    """Every file of the state folder by its hash."""
    return {
        str(p.relative_to(home)): hashlib.sha256(p.read_bytes()).hexdigest() for p in home.rglob("*") if p.is_file()
    }


def missing_folder(folder: Path) -> dict[str, str]:
    return {"data.path": str(folder / "absent")}


def empty_folder(folder: Path) -> dict[str, str]:
    shutil.rmtree(folder)
    folder.mkdir()
    return {}


def undecodable_image(folder: Path) -> dict[str, str]:
    (folder / "train" / "red" / "3.png").write_bytes(b"\x89PNG not really")
    return {}


def one_image_twice(folder: Path) -> dict[str, str]:
    shutil.copy(folder / "train" / "red" / "3.png", folder / "train" / "green" / "4.png")
    # By class, so that the two lie with two vehicles for certain.
    return {"data.partition.scheme": "shard", "data.partition.shards_per_client": "1", "data.partition.clients": "2"}


def class_without_image(folder: Path) -> dict[str, str]:
    (folder / "train" / "amber").mkdir()
    return {}


def unknown_source(folder: Path) -> dict[str, str]:
    return {"data.source": "trafic-lights"}


def unknown_model(folder: Path) -> dict[str, str]:
    return {"model.name": "vit_tiny_patch16_225"}


def no_vit(folder: Path) -> dict[str, str]:
    return {"model.name": "resnet18", "model.pretrained": "false"}


def missing_checkpoint(folder: Path) -> dict[str, str]:
    return {"model.checkpoint": str(folder / "absent.safetensors")}


def config_typo(folder: Path) -> dict[str, str]:
    return {"training.roundz": "3"}


def out_of_range(folder: Path) -> dict[str, str]:
    return {"privacy.sampling_prob": "1.5"}


def too_many_clients(folder: Path) -> dict[str, str]:
    return {"data.partition.clients": "20"}


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (missing_folder, ["absent"]),
        (empty_folder, ["images"]),
        (undecodable_image, ["train/red/3.png"]),
        (one_image_twice, ["train/red/3.png", "train/green/4.png", "same image"]),
        (class_without_image, ["amber"]),
        (unknown_source, ["trafic-lights", "traffic-lights, folder, gtsrb"]),
        (unknown_model, ["vit_tiny_patch16_225", "vit_tiny_patch16_224"]),
        (no_vit, ["resnet18"]),
        (missing_checkpoint, ["absent.safetensors"]),
        (config_typo, ["training.roundz", "rounds"]),
        (out_of_range, ["privacy.sampling_prob", "1.5"]),
        (too_many_clients, ["20"]),
    ],
)
def test_a_mistake_is_one_sentence_and_changes_nothing(
    tmp_path: Path, folder: Path, spoil: Callable[[Path], dict[str, str]], words: list[str]
) -> None:
    basic = {
        "data.source": "folder",
        "data.path": str(folder),
        "data.partition.clients": "2",
        "data.partition.scheme": "iid",
    }
    fedvit = Fedvit(tmp_path / "var", basic | spoil(folder))
    done = fedvit.call("run")
    refuses(done.returncode, done.stderr, words)
    assert not fedvit.home.exists()


def refuses(status: int, stderr: str, words: list[str]) -> None:
    """Status 2, one error sentence with these words, no stack trace."""
    assert status == 2, stderr
    assert "Traceback" not in stderr
    assert stderr.count("Error:") == 1
    for word in words:
        assert word in stderr


def test_a_port_in_use_is_named(tmp_path: Path) -> None:
    fedvit = Fedvit(tmp_path / "var")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        fedvit.settings["serving.port"] = str(port)
        for command in ("run", "up"):
            done = fedvit.call(command)
            refuses(done.returncode, done.stderr, [f"Port {port}", "serving.port"])
    assert not fedvit.home.exists()


@pytest.mark.parametrize("damage", [b"this is not a database", b""])
def test_a_corrupt_state_file_is_left_as_it_is(tmp_path: Path, damage: bytes) -> None:
    fedvit = Fedvit(tmp_path / "var")
    fedvit.home.mkdir()
    (fedvit.home / "state.db").write_bytes(damage)
    before = snapshot(fedvit.home)
    for command in (["run"], ["status"], ["model", "list"], ["privacy", "show"]):
        done = fedvit.call(*command, configured=command == ["run"])
        refuses(done.returncode, done.stderr, ["state.db"])
    after = snapshot(fedvit.home)
    after.pop("state.lock", None)
    assert after == before


def test_a_question_makes_no_state(tmp_path: Path) -> None:
    fedvit = Fedvit(tmp_path / "var")
    for command in (["model", "list"], ["privacy", "show"]):
        done = fedvit.call(*command, configured=False)
        refuses(done.returncode, done.stderr, ["no fedvit state"])
    assert fedvit.json("status", configured=False)["system"] == "down"
    assert not fedvit.home.exists()


def test_errors_are_json_where_json_was_asked_for(tmp_path: Path) -> None:
    import json

    done = Fedvit(tmp_path / "var").call("privacy", "show", "--json", configured=False)
    assert done.returncode == 2
    assert json.loads(done.stdout)["error"] == "invalid-state"
