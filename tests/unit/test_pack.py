"""Packs: written and read; and damage to a repository's files, which must always be found."""

from __future__ import annotations

import json
import secrets
import shutil
import threading
from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from imager.errors import (
    FormatError,
    ImagerError,
    IntegrityError,
    ObjectMissing,
    UnsupportedError,
)
from imager.format import (
    NO_DIGEST,
    PackKind,
    Page,
    Place,
    RecordKind,
    State,
    digest_of,
    map_height,
    root_digest,
    seal,
    unseal,
)
from imager.manifest import new_document
from imager.pack import Decoder, Encoder, Pack, Packer, PackWriter, Record, pack_name
from imager.plan import RestoreOptions, plan_restore
from imager.progress import NullProgress
from imager.repository import Repository
from imager.restore import restore
from imager.store.local import LocalStore
from imager.verify import VerifyResult, verify
from tests.data.make_vectors import BLOCK, PlannedDisk, capture_disks

TINY = Path(__file__).parents[1] / "data" / "v1-tiny"


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    return LocalStore(tmp_path / "repository")


def record(content: bytes) -> Record:
    return Encoder(3, 65536).encode(RecordKind.BLOCK, digest_of(content), content)


def noise(count: int, length: int = 1000) -> list[bytes]:
    """Contents that do not compress."""
    return [secrets.token_bytes(length) for _ in range(count)]


def read(store: LocalStore, place: Place) -> bytes:
    pack = Pack(store, place.pack)
    frame = pack.frame(pack.read(place.ordinal, 1), place.ordinal, place.ordinal)
    return Decoder().decode(pack.entries[place.ordinal], frame)


# --- writing and reading ----------------------------------------------------------------------


def test_records_come_back(store: LocalStore) -> None:
    contents = [b"a", bytes(65536), *noise(5)]
    with Packer(store, PackKind.DATA) as packer:
        places = [packer.append(record(content)) for content in contents]
    assert [place.ordinal for place in places] == list(range(7))
    assert {place.pack for place in places} == packer.pack_ids
    assert [read(store, place) for place in places] == contents
    assert packer.bytes_written == store.size(pack_name(places[0].pack))


def test_neighbours_are_read_at_once(store: LocalStore) -> None:
    contents = noise(4)
    with Packer(store, PackKind.DATA) as packer:
        (place, *_) = [packer.append(record(content)) for content in contents]
    pack = Pack(store, place.pack)
    group = pack.read(1, 2)
    for ordinal in (1, 2):
        assert pack.header_is_right(group, 1, ordinal)
        frame = pack.frame(group, 1, ordinal)
        assert Decoder().decode(pack.entries[ordinal], frame) == contents[ordinal]
    assert not pack.header_is_right(group, 0, 1)


def test_packs_are_closed_at_their_target_size(store: LocalStore) -> None:
    contents = noise(10)
    with Packer(store, PackKind.DATA, target_size=3000) as packer:
        places = [packer.append(record(content)) for content in contents]
    assert [place.ordinal for place in places] == [0, 1, 2, 0, 1, 2, 0, 1, 2, 0]
    assert len(packer.pack_ids) == 4
    assert [read(store, place) for place in places] == contents
    assert len(list(store.names("packs"))) == 4


def test_an_empty_packer_makes_no_pack(store: LocalStore) -> None:
    with Packer(store, PackKind.DATA):
        pass
    assert not store.folder.exists()


def test_a_failed_capture_keeps_what_was_stored(store: LocalStore) -> None:
    content = noise(1)[0]
    with pytest.raises(KeyboardInterrupt), Packer(store, PackKind.DATA) as packer:
        place = packer.append(record(content))
        raise KeyboardInterrupt
    assert read(store, place) == content
    assert not any(store.folder.joinpath("tmp").iterdir())


class _FailingStore(LocalStore):
    """Takes so many packs, then fails."""

    def __init__(self, folder: Path, packs: int) -> None:
        super().__init__(folder)
        self.left = packs

    def writer(self, name: str):  # type: ignore[no-untyped-def]
        if not self.left:
            raise ImagerError("no room is left")
        self.left -= 1
        return super().writer(name)


def test_a_failing_store_ends_the_capture_and_leaves_no_thread(tmp_path: Path) -> None:
    before = set(threading.enumerate())
    with (
        pytest.raises(ImagerError, match="no room"),
        Packer(_FailingStore(tmp_path, 2), PackKind.DATA, target_size=500) as packer,
    ):
        for content in noise(10):
            packer.append(record(content))
    assert not set(threading.enumerate()) - before
    assert len(list(LocalStore(tmp_path).names("packs"))) == 2
    assert not any((tmp_path / "tmp").iterdir())


def test_a_pack_that_ends_within_a_record_is_never_finished(store: LocalStore) -> None:
    with closing(PackWriter(store, PackKind.DATA, 0)) as writer:
        with pytest.raises(TypeError):
            writer.append(Record(record(b"a").entry, None))  # type: ignore[arg-type]
        with pytest.raises(ImagerError, match="within a record"):
            writer.finish()
    assert not list(store.names("packs"))


# --- decoding ---------------------------------------------------------------------------------


def test_frames_that_lie_are_refused() -> None:
    content = bytes(1000)
    entry, frame = record(content)
    compressor = zstandard.ZstdCompressor(write_content_size=False)
    lies = {
        "empty": b"",
        "noise": secrets.token_bytes(len(frame)),
        "truncated": frame[:-1],
        "shorter": record(bytes(999)).frame,
        "longer": record(bytes(1001)).frame,
        "a bomb": compressor.compress(bytes(100 << 20)),
        "other content": record(b"\1" * 1000).frame,
    }
    for name, lie in lies.items():
        target = memoryview(bytearray(1000))
        with pytest.raises(IntegrityError):
            Decoder().decode_into(entry, lie, target, check_crc=False)
            pytest.fail(f"{name} was decoded")
        with pytest.raises(IntegrityError, match="checksum"):
            Decoder().decode_into(entry, lie, target, check_crc=True)


def test_content_of_another_length_than_asked_for_is_refused() -> None:
    entry, frame = record(bytes(1000))
    with pytest.raises(IntegrityError, match="1000 bytes instead of 999"):
        Decoder().decode_into(entry, frame, memoryview(bytearray(999)), check_crc=True)


# --- damaged packs ----------------------------------------------------------------------------


@pytest.fixture
def one_pack(store: LocalStore) -> Path:
    with Packer(store, PackKind.DATA) as packer:
        for content in noise(3, 40):
            packer.append(record(content))
    (name,) = store.names("packs")
    return store.folder / name


def test_every_truncation_of_a_pack_is_found(one_pack: Path, store: LocalStore) -> None:
    content = one_pack.read_bytes()
    for length in range(len(content)):
        one_pack.write_bytes(content[:length])
        with pytest.raises(FormatError, match=one_pack.name):
            Pack(store, bytes.fromhex(one_pack.stem))
    one_pack.write_bytes(content + b"\0")
    with pytest.raises(FormatError, match=one_pack.name):
        Pack(store, bytes.fromhex(one_pack.stem))


def test_every_flipped_bit_outside_of_the_records_is_found_on_opening(
    one_pack: Path, store: LocalStore
) -> None:
    pack_id, content = bytes.fromhex(one_pack.stem), one_pack.read_bytes()
    table_offset = Pack(store, pack_id).offsets[-1]
    for at in [*range(48), *range(table_offset, len(content))]:
        for bit in range(8):
            changed = bytearray(content)
            changed[at] ^= 1 << bit
            one_pack.write_bytes(changed)
            with pytest.raises((FormatError, UnsupportedError)):
                Pack(store, pack_id)


def test_a_pack_that_shrinks_while_it_is_open_is_found(one_pack: Path, store: LocalStore) -> None:
    pack = Pack(store, bytes.fromhex(one_pack.stem))
    one_pack.write_bytes(one_pack.read_bytes()[: pack.offsets[2] + 5])
    with pytest.raises(IntegrityError, match="truncated"):
        pack.read(2, 1)


def test_a_missing_pack_is_missing_not_damaged(store: LocalStore) -> None:
    with pytest.raises(ObjectMissing):
        Pack(store, bytes(16))


# --- damaged repositories ---------------------------------------------------------------------


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    return Path(shutil.copytree(TINY, tmp_path / "tiny"))


def is_found(folder: Path) -> bool:
    """Whether verifying everything finds damage."""
    try:
        return not verify(Repository.open(str(folder)), [], NullProgress()).is_sound
    except ImagerError:
        return True


def restored(folder: Path, image: str, target: Path) -> bytes | None:
    """What a restore writes; None where it refuses."""
    target.unlink(missing_ok=True)
    try:
        repository = Repository.open(str(folder))
        manifest = repository.manifest(image)
        disk = manifest.disks[0]
        plan = plan_restore(repository, manifest, disk, str(target), RestoreOptions())
        restore(repository, manifest, disk, plan, NullProgress())
    except ImagerError:
        return None
    return target.read_bytes()


def tiny_files() -> list[Path]:
    return sorted(path for path in TINY.rglob("*") if path.is_file())


def tiny_image() -> str:
    (image,) = json.loads(TINY.with_suffix(".json").read_text())
    return str(image)


@pytest.mark.parametrize(
    "path", tiny_files(), ids=lambda path: path.parent.parent.name + path.suffix
)
def test_every_flipped_byte_is_found_and_never_restored(
    path: Path, tiny: Path, tmp_path: Path
) -> None:
    target, image = tmp_path / "disk.img", tiny_image()
    right = restored(tiny, image, target)
    assert right is not None
    damaged = tiny / path.relative_to(TINY)
    content = path.read_bytes()
    for at in range(len(content)):
        changed = bytearray(content)
        changed[at] ^= 1 << at % 8
        damaged.write_bytes(changed)
        assert is_found(tiny), f"byte {at} of {path.name}: not found"
        assert restored(tiny, image, target) in (None, right), f"byte {at} of {path.name}"


def test_every_truncated_file_is_found(tiny: Path) -> None:
    for path in tiny_files():
        damaged = tiny / path.relative_to(TINY)
        content = path.read_bytes()
        for length in {0, 1, len(content) // 2, len(content) - 1}:
            damaged.write_bytes(content[:length])
            assert is_found(tiny), f"{path.name}, {length} bytes"
        damaged.write_bytes(content)
    assert not is_found(tiny)


class Shop:
    """A repository with two images of one disk each, and what verifying says of it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.repository = Repository.create(str(folder), block_size=BLOCK)
        self.images = [
            capture_disks(self.repository, PlannedDisk("sda", plan)).id for plan in ("AzB", "CzD")
        ]

    def verify(self, *images: str) -> VerifyResult:
        return verify(Repository.open(str(self.folder)), list(images), NullProgress())

    def packs_of(self, image: str) -> tuple[Path, Path]:
        """The map pack and the data pack of an image."""
        (disk,) = self.repository.manifest(image).disks
        place = next(run.place for run in self.repository.block_map(disk).runs() if run.place)
        return self.path(disk.top.pack), self.path(place.pack)

    def path(self, pack: bytes) -> Path:
        return self.folder / pack_name(pack)

    def manifest(self, image: str) -> Path:
        return self.folder / "manifests" / f"{image}.json"


@pytest.fixture
def shop(tmp_path: Path) -> Iterator[Shop]:
    shop = Shop(tmp_path / "shop")
    assert shop.verify().is_sound
    yield shop


def swap(one: Path, other: Path) -> None:
    first, second = one.read_bytes(), other.read_bytes()
    one.write_bytes(second)
    other.write_bytes(first)


@pytest.mark.parametrize("which", [0, 1], ids=["map", "data"])
def test_swapped_packs(shop: Shop, which: int, tmp_path: Path) -> None:
    first, second = (shop.packs_of(image)[which] for image in shop.images)
    swap(first, second)
    result = shop.verify()
    assert len(result.pack_faults) == 2
    assert all("another pack" in fault for fault in result.pack_faults)
    assert {fault.image for fault in result.faults} == set(shop.images)
    for image in shop.images:
        assert restored(shop.folder, image, tmp_path / "disk.img") is None


@pytest.mark.parametrize("which", [0, 1], ids=["map", "data"])
def test_missing_pack(shop: Shop, which: int, tmp_path: Path) -> None:
    hurt, whole = shop.images
    pack = shop.packs_of(hurt)[which]
    pack.unlink()
    result = shop.verify()
    assert {fault.image for fault in result.faults} == {hurt}
    assert any(pack.name in fault.reason for fault in result.faults)
    assert not shop.verify(hurt).is_sound
    assert shop.verify(whole).is_sound
    assert restored(shop.folder, hurt, tmp_path / "disk.img") is None
    assert restored(shop.folder, whole, tmp_path / "disk.img") is not None


def test_truncated_data_pack_names_the_places_that_are_lost(shop: Shop) -> None:
    hurt, whole = shop.images
    pack = shop.packs_of(hurt)[1]
    pack.write_bytes(pack.read_bytes()[:-1])
    result = shop.verify()
    assert [(fault.image, fault.disk, fault.offset) for fault in result.faults] == [
        (hurt, "sda", 0),
        (hurt, "sda", 2 * BLOCK),
    ]
    assert shop.verify(whole).is_sound


def test_manifest_of_another_image_under_a_name(shop: Shop, tmp_path: Path) -> None:
    one, other = shop.images
    shutil.copy(shop.manifest(one), shop.manifest(other))
    result = shop.verify()
    assert [fault.image for fault in result.faults] == [other]
    assert "another image" in result.faults[0].reason
    assert restored(shop.folder, other, tmp_path / "disk.img") is None


def test_sealed_manifest_with_the_root_of_another_disk(shop: Shop, tmp_path: Path) -> None:
    """Not damage but a mix-up: each file is sound for itself, together they are not."""
    one, other = (unseal(shop.manifest(image).read_bytes(), "it") for image in shop.images)
    one["disks"][0]["top"] = other["disks"][0]["top"]
    shop.manifest(shop.images[0]).write_bytes(seal(one))
    result = shop.verify(shop.images[0])
    assert "root digest" in result.faults[0].reason
    assert restored(shop.folder, shop.images[0], tmp_path / "disk.img") is None


def test_damaged_manifest_does_not_hide_the_other_image(shop: Shop) -> None:
    shop.manifest(shop.images[0]).write_bytes(b"{}")
    result = shop.verify()
    assert [fault.image for fault in result.faults] == [shop.images[0]]
    assert result.blocks == 2


def test_damaged_pack_is_not_shared_by_the_next_capture(shop: Shop, tmp_path: Path) -> None:
    hurt = shop.images[0]
    shop.packs_of(hurt)[1].write_bytes(b"damage")
    disk = PlannedDisk("sda", "AzB")
    again = capture_disks(Repository.open(str(shop.folder)), disk).id
    assert shop.verify(again).is_sound
    assert restored(shop.folder, again, tmp_path / "disk.img") == disk.expected()


def test_session_and_trash_are_verified(shop: Shop) -> None:
    for name in ("sessions/20240229t235959z-0123abcd.json", "trash/x.json"):
        path = shop.folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"{}")
        assert not shop.verify().is_sound
        path.unlink()
    assert shop.verify().is_sound


def test_expired_capture_is_no_damage(shop: Shop) -> None:
    """A gc of another host creates the manifest of a stalled capture as ``aborted``."""
    image = "20240229t235959z-0123abcd"
    document = {"kind": "aborted", "format": 1, "features": [], "id": image}
    shop.repository.store.create(f"manifests/{image}.json", seal(document))
    result = shop.verify()
    assert result.is_sound, result.faults
    assert result.images == 2


# --- sealed, and still wrong ------------------------------------------------------------------

NEEDED = ("kind", "format", "features", "block_size")
NEEDED_OF_DISK = ("name", "size", "height", "top", "root")
HOSTILE_ID = "20240229t235959z-0123abcd"


def commit(folder: Path, document: dict[str, Any]) -> str:
    """Put a sealed manifest into a repository."""
    content = seal({**document, "id": HOSTILE_ID})
    (folder / "manifests" / f"{HOSTILE_ID}.json").write_bytes(content)
    return HOSTILE_ID


def document_of(folder: Path, image: str) -> dict[str, Any]:
    return dict(Repository.open(str(folder)).manifest(image).document)


def test_the_needed_keys_of_a_manifest_are_enough(tiny: Path, tmp_path: Path) -> None:
    """The document: "Readers need only the keys in bold"."""
    document = document_of(tiny, tiny_image())
    least = {key: document[key] for key in NEEDED}
    least["disks"] = [{key: disk[key] for key in NEEDED_OF_DISK} for disk in document["disks"]]
    image = commit(tiny, least)
    right = restored(tiny, tiny_image(), tmp_path / "right.img")
    assert restored(tiny, image, tmp_path / "disk.img") == right is not None
    assert verify(Repository.open(str(tiny)), [image], NullProgress()).is_sound


@pytest.mark.parametrize("key", ["partitions", "table", "unreadable", "identity", "logical_sector"])
@pytest.mark.parametrize("value", [None, 5, "x", [], {}, [5], [{}], [{"number": 1, "offset": "x"}]])
def test_impossible_values_of_other_keys_are_errors_at_most(
    tiny: Path, tmp_path: Path, key: str, value: object
) -> None:
    document = document_of(tiny, tiny_image())
    document["disks"][0][key] = value
    image = commit(tiny, document)
    is_found(tiny)
    restored(tiny, image, tmp_path / "disk.img")


@st.composite
def hostile_pages(draw: st.DrawFn) -> Page:
    """A page that follows the format; its places lead anywhere in two packs, or nowhere."""
    level = draw(st.integers(0, 2))
    count = draw(st.sampled_from([1, 3, 5, 1024]))
    states = draw(
        st.lists(st.integers(0, 3 if level == 0 else 2), min_size=count, max_size=count)
        if count < 9
        else st.just([draw(st.integers(0, 2))] * count)
    )
    place = st.builds(
        Place,
        st.sampled_from([b"A" * 16, b"B" * 16, b"C" * 16]),
        st.sampled_from([0, 1, 2, 3, 9, 0xFFFFFFFF]),
    )
    shared = draw(place)
    stored = [state in (State.DATA, State.UNREADABLE) for state in states]
    places = tuple((draw(place) if count < 9 else shared) if is_ else None for is_ in stored)
    return Page(
        level, bytes(states), tuple(b"d" * 32 if is_ else NO_DIGEST for is_ in stored), places
    )


hostile_records = st.lists(
    hostile_pages().map(lambda page: (RecordKind.PAGE, page.encode()))
    | st.binary(min_size=1, max_size=200).map(lambda content: (RecordKind.PAGE, content))
    | st.binary(min_size=1, max_size=200).map(lambda content: (RecordKind.BLOCK, content)),
    min_size=1,
    max_size=5,
)


def write_pack(folder: Path, pack_id: bytes, records: list[tuple[RecordKind, bytes]]) -> None:
    """A pack that is sound in itself, under an id of our choice."""
    encoder = Encoder(1, BLOCK)
    with ExitStack() as stack, pytest.MonkeyPatch.context() as patch:
        patch.setattr(secrets, "token_bytes", lambda _: pack_id)
        writer = stack.enter_context(closing(PackWriter(LocalStore(folder), PackKind.MAP, 0)))
        for kind, content in records:
            writer.append(encoder.encode(kind, digest_of(content), content))
        writer.finish()


def commit_disk(folder: Path, blocks: int, top: int, digest: bytes) -> str:
    """An image of one disk, with record ``top`` of the pack "AA…" as its map's top."""
    size, height = blocks * BLOCK, map_height(blocks)
    disk = {
        "name": "sda",
        "size": size,
        "height": height,
        "top": {"pack": (b"A" * 16).hex(), "ordinal": top},
        "root": root_digest(size, BLOCK, height, digest).hex(),
        "table": {"scheme": "none", "sector_size": 512},
    }
    (folder / "manifests").mkdir()
    return commit(folder, new_document("image", block_size=BLOCK, disks=[disk]))


def test_places_that_lead_to_another_block_of_the_same_length(tmp_path: Path) -> None:
    """The map names two blocks rightly and finds each where the other one is."""
    folder = tmp_path / "repository"
    repository = Repository.create(str(folder), block_size=BLOCK)
    blocks = [PlannedDisk("", sign).expected() for sign in "AB"]
    page = Page(
        0,
        bytes([State.DATA] * 2),
        tuple(digest_of(block) for block in blocks),
        (Place(b"B" * 16, 1), Place(b"B" * 16, 0)),
    )
    write_pack(folder, b"A" * 16, [(RecordKind.PAGE, page.encode())])
    write_pack(folder, b"B" * 16, [(RecordKind.BLOCK, block) for block in blocks])
    image = commit_disk(folder, 2, 0, page.content_digest())
    result = verify(repository, [], NullProgress())
    assert [fault.offset for fault in result.faults] == [0, BLOCK]
    assert all("another block" in fault.reason for fault in result.faults)
    assert restored(folder, image, tmp_path / "disk.img") is None


@settings(max_examples=60, deadline=None)
@given(hostile_records, hostile_records, st.sampled_from([1, 3, 5, 1024, 1025, 3 * 1024, 1 << 21]))
def test_a_hostile_repository_is_an_error_at_most(
    first: list[tuple[RecordKind, bytes]], second: list[tuple[RecordKind, bytes]], blocks: int
) -> None:
    """Everything is sealed and every checksum right; only what the pages say makes no sense."""
    with TemporaryDirectory() as name:
        folder = Path(name, "repository")
        repository = Repository.create(str(folder), block_size=BLOCK)
        write_pack(folder, b"A" * 16, first)
        write_pack(folder, b"B" * 16, second)
        top = next((n for n, (kind, _) in enumerate(first) if kind == RecordKind.PAGE), 0)
        try:
            digest = repository.page(Place(b"A" * 16, top)).content_digest()
        except ImagerError:
            digest = NO_DIGEST
        image = commit_disk(folder, blocks, top, digest)
        damaged = is_found(folder)
        content = restored(folder, image, Path(name, "disk.img"))
        if content is not None:
            assert not damaged
            assert not any(content)  # no block has the digest that the pages name


def test_finished_packs_free_their_memory(tmp_path: Path) -> None:
    """Each pack under construction has buffers; a capture of a large disk makes thousands."""
    content = b"\xff" * 100_000
    digest = digest_of(content)
    record = Encoder(1, len(content)).encode(RecordKind.BLOCK, digest, content)
    with Packer(LocalStore(tmp_path), PackKind.DATA, target_size=1) as packer:
        for _ in range(20):
            packer.append(record)
        assert len(packer.pack_ids) == 20
        maps = Path("/proc/self/maps").read_text().splitlines()
        chunks = [line for line in maps if "/dev/zero" in line]
        assert len(chunks) < 10, "chunks of packs that are finished are still mapped"
