"""Opening and reading checkpoints: what is listed, what is read, what memory that takes, and every refusal's words."""

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from offprincipal_peft.audit import AdapterFolder, CheckpointError, iterate, open_checkpoint, pair

MIB = 1 << 20


def write_raw(path: Path, header: object, data: bytes = b"") -> Path:
    """A file of the safetensors layout with any header: JSON of it, or its bytes as they are."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def entry(begin: int, end: int, shape: list[int] | None = None, dtype: str = "F32") -> dict[str, object]:
    return {"dtype": dtype, "shape": [(end - begin) // 4] if shape is None else shape, "data_offsets": [begin, end]}


def write_shards(folder: Path, shards: dict[str, dict[str, Tensor]], **index: str) -> Path:
    """A sharded checkpoint; ``index``: names that the index holds beside, or instead of, the true ones."""
    folder.mkdir(exist_ok=True)
    for name, tensors in shards.items():
        save_file(tensors, folder / name)
    places = {tensor: shard for shard, tensors in shards.items() for tensor in tensors} | index
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return folder


def weights(seed: int = 0) -> dict[str, Tensor]:
    """Every floating dtype, an odd size, a scalar and an empty tensor."""
    generator = torch.Generator().manual_seed(seed)
    return {
        "a.weight": torch.randn(7, 5, generator=generator).bfloat16(),
        "b.weight": torch.randn(3, 2, 4, generator=generator),
        "c.bias": torch.randn(9, generator=generator).half(),
        "d.scale": torch.randn((), generator=generator).double(),
        "e.empty": torch.zeros(0, 3),
        "f.codes": torch.arange(5, dtype=torch.uint8),
        "g.fp8": torch.randn(4, generator=generator).to(torch.float8_e4m3fn),
    }


def raw(tensor: Tensor) -> bytes:
    return bytes(tensor.contiguous().reshape(-1).view(torch.uint8).tolist())


# ---- what is read


def test_every_tensor_is_listed_and_read_as_it_was_saved(tmp_path):
    saved = weights()
    save_file(saved, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with open_checkpoint(tmp_path) as checkpoint:
        assert set(checkpoint.tensors) == set(saved)
        for name, tensor in saved.items():
            info = checkpoint.tensors[name]
            assert (info.name, info.shape, info.dtype) == (name, tuple(tensor.shape), tensor.dtype)
            assert (info.nbytes, info.file) == (tensor.nbytes, tmp_path / "model.safetensors")
            read = checkpoint.read(name)
            assert (read.shape, read.dtype, raw(read)) == (tensor.shape, tensor.dtype, raw(tensor))
        assert checkpoint.nbytes == sum(tensor.nbytes for tensor in saved.values())


def test_rows_and_entries_are_the_slices_of_the_whole(tmp_path):
    saved = weights()
    save_file(saved, tmp_path / "model.safetensors")
    with open_checkpoint(tmp_path) as checkpoint:
        for name in ("a.weight", "b.weight", "c.bias", "g.fp8"):
            tensor = saved[name]
            for start in range(len(tensor) + 1):
                for stop in range(start, len(tensor) + 1):
                    rows = checkpoint.read_rows(name, start, stop)
                    assert (rows.shape, raw(rows)) == (tensor[start:stop].shape, raw(tensor[start:stop]))
            entries = checkpoint.read_entries(name, 1, 4)
            assert raw(entries) == raw(tensor.reshape(-1)[1:4])
        assert checkpoint.read_rows("e.empty", 0, 0).shape == (0, 3)


def test_what_was_read_is_memory_of_its_own(tmp_path):
    path = tmp_path / "x.safetensors"
    save_file({"w": torch.zeros(4)}, path)
    with open_checkpoint(path) as checkpoint:
        first = checkpoint.read("w")
        first += 1
        assert checkpoint.read("w").tolist() == [0.0] * 4
    assert first.tolist() == [1.0] * 4
    assert open_checkpoint(path).read("w").tolist() == [0.0] * 4  # nor was it written back


def test_opening_reads_headers_alone(tmp_path):
    """A sparse file: 40 GB that the disk does not hold and that no test could read."""
    path = write_raw(tmp_path / "big.safetensors", {"w": entry(0, 40 << 30, [10 << 30])})
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size + (40 << 30))
    with open_checkpoint(path) as checkpoint:
        assert checkpoint.tensors["w"].nbytes == 40 << 30
        assert checkpoint.read_rows("w", (10 << 30) - 3, 10 << 30).tolist() == [0.0] * 3


def test_shards_are_one_checkpoint(tmp_path):
    one, two = {"a": torch.ones(3), "b": torch.zeros(2)}, {"c": torch.full((2, 2), 3.0)}
    folder = write_shards(tmp_path / "m", {"model-00001-of-00002.safetensors": one, "model-2.safetensors": two})
    for path in (folder, folder / "model.safetensors.index.json"):
        with open_checkpoint(path) as checkpoint:
            assert list(checkpoint.tensors) == ["a", "b", "c"]
            assert checkpoint.tensors["c"].file.name == "model-2.safetensors"
            for name in "cabc":  # back and forth between the files
                assert torch.equal(checkpoint.read(name), (one | two)[name])


def test_a_folder_with_one_file_of_any_name(tmp_path):
    save_file({"w": torch.ones(1)}, tmp_path / "consolidated.safetensors")
    assert list(open_checkpoint(str(tmp_path)).tensors) == ["w"]


def test_a_header_of_640_bytes_is_not_taken_for_a_pickle(tmp_path):
    text = json.dumps({"w": entry(0, 4)}).encode().ljust(640)
    assert list(open_checkpoint(write_raw(tmp_path / "x.safetensors", text, bytes(4))).tensors) == ["w"]


def test_the_config_is_read_from_the_top_or_its_text_part(tmp_path):
    save_file({"w": torch.ones(1)}, tmp_path / "model.safetensors")
    assert open_checkpoint(tmp_path).config.model_type is None
    values = {
        "model_type": "vl",
        "tie_word_embeddings": True,
        "text_config": {"model_type": "text", "num_attention_heads": 8, "num_key_value_heads": [2, 4], "head_dim": 16},
        "quantization_config": {"quant_method": "fp8"},
    }
    (tmp_path / "config.json").write_text(json.dumps(values))
    config = open_checkpoint(tmp_path / "model.safetensors").config
    assert (config.model_type, config.tie_word_embeddings, config.num_attention_heads) == ("vl", True, 8)
    assert (config.num_key_value_heads, config.head_dim, config.quantized_by) == (None, 16, "fp8")


def test_a_dtype_that_a_later_safetensors_defines_is_listed_and_not_read(tmp_path):
    header = {"new": entry(0, 3, [5], "F5"), "four": entry(3, 5, [4], "F4"), "w": entry(5, 9)}
    checkpoint = open_checkpoint(write_raw(tmp_path / "x.safetensors", header, bytes(9)))
    assert [info.dtype for info in checkpoint.tensors.values()] == [None, None, torch.float32]
    with pytest.raises(CheckpointError, match=r"'new' in .*x\.safetensors is stored as F5, which torch cannot hold"):
        checkpoint.read("new")


def resident() -> dict[str, int]:
    """Bytes of this process' private and file-backed pages that are in memory."""
    lines = Path("/proc/self/status").read_text().splitlines()
    fields = dict(line.split(":", 1) for line in lines if line.startswith("Rss"))
    return {key: int(value.split()[0]) * 1024 for key, value in fields.items()}


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="resident memory is read from Linux's /proc")
def test_reading_in_blocks_holds_a_few_megabytes(tmp_path):
    size = 50 * MIB
    header = {name: entry(i * size, (i + 1) * size, [size // 2048, 1024], "BF16") for i, name in enumerate("abc")}
    path = write_raw(tmp_path / "x.safetensors", header)
    with path.open("r+b") as file:  # sparse: its zeros take the same memory when they are read
        file.truncate(path.stat().st_size + 3 * size)

    def growth(block_bytes: int | None) -> dict[str, int]:
        with open_checkpoint(path) as base, open_checkpoint(path) as tuned:
            before, most = resident(), {"RssAnon": 0, "RssFile": 0}
            for _ in iterate(pair(base, tuned), block_bytes=block_bytes):
                now = resident()
                most = {key: max(most[key], now[key] - before[key]) for key in most}
        return most

    blocks = growth(4 * MIB)
    assert blocks["RssAnon"] < 40 * MIB  # observed 8
    assert blocks["RssFile"] < 4 * MIB  # observed 0: nothing is mapped
    assert growth(None)["RssAnon"] > 80 * MIB  # two whole tensors: the measure sees what is held


# ---- what is refused


def damaged(tmp_path: Path) -> dict[str, tuple[Path, str]]:
    good = tmp_path / "good.safetensors"
    save_file({"w": torch.arange(8.0)}, good)
    content = good.read_bytes()

    def file(name: str, data: bytes) -> Path:
        (tmp_path / name).write_bytes(data)
        return tmp_path / name

    def header(name: str, value: object, data: bytes = b"") -> Path:
        return write_raw(tmp_path / name, value, data)

    return {
        "absent": (tmp_path / "none", "none does not exist; give a model's folder"),
        "empty": (file("a.safetensors", b""), "has 0 bytes; a safetensors file begins with 8"),
        "cut data": (file("b.safetensors", content[:-5]), f"cut short: its tensors end at byte {len(content)} and "
                     f"the file has {len(content) - 5}; copy it again"),
        "cut header": (file("c.safetensors", content[:20]), "cut short within its header: .* the file has 20; copy"),
        "longer": (file("d.safetensors", content + b"xyz"), f"3 bytes after its last tensor, which ends at byte "
                   f"{len(content)}"),
        "zip": (file("e.safetensors", b"PK\x03\x04" + b"\x14" * 99), "no safetensors file but a zip archive, as "
                "torch.save writes it: a pickle, which is never opened"),
        "pickle": (file("f.safetensors", b"\x80\x02}q\x00" + b"\x14" * 99), "no safetensors file but a pickle"),
        "gguf": (file("g.safetensors", b"GGUF\x03" + b"\x01" * 99), "no safetensors file but a GGUF file"),
        "lfs": (file("h.safetensors", b"version https://git-lfs.example/spec/v1\noid sha256:0\n"), "a git-lfs pointer: "
                "the weights were not downloaded"),
        "noise": (file("i.safetensors", b"\xff" * 99), "but damaged, or of another format. Its first 8 bytes"),
        "not json": (header("j.safetensors", b"{not json"), "the header is not JSON .*damaged, or no safetensors"),
        "not utf-8": (header("k.safetensors", b'{"\xff": 1}'), "the header is not JSON"),
        "too deep": (header("l.safetensors", b"[" * 99_999), "the header is not JSON"),
        "list": (header("m.safetensors", [1]), "the header is a JSON list; an object is needed"),
        "twice": (header("n.safetensors", b'{"w": {}, "w": {}}'), "the header names 'w' twice"),
        "no dtype": (header("o.safetensors", {"w": {"shape": [1]}}), "entry of 'w' is .* it needs a dtype, a shape"),
        "no object": (header("p.safetensors", {"w": 3}), "entry of 'w' is 3; it needs a dtype"),
        "negative": (header("q.safetensors", {"w": entry(0, 4, [-1])}), r"entry of 'w' is .*\[-1\].* whole numbers"),
        "bool": (header("r.safetensors", {"w": entry(0, 4, [True])}), "entry of 'w' is .*whole numbers"),
        "size": (header("s.safetensors", {"w": entry(0, 8, [3])}, bytes(8)), r"'w' of shape \(3,\) and dtype F32 "
                 r"needs 12 bytes, its data_offsets \[0, 8\] hold 8"),
        "backward": (header("t.safetensors", {"w": entry(8, 4, [0])}, bytes(8)), r"data_offsets \[8, 4\] hold -4"),
        "overlap": (header("u.safetensors", {"v": entry(0, 8), "w": entry(4, 12)}, bytes(12)), "'w' begins at byte "
                    "[0-9]+ and overlaps 'v', which ends at"),
        "hole": (header("v.safetensors", {"v": entry(0, 8), "w": entry(12, 16)}, bytes(16)), "'w' begins at byte "
                 "[0-9]+ and leaves a hole after 'v'"),
        "late": (header("w.safetensors", {"w": entry(4, 8)}, bytes(8)), "leaves a hole after the header"),
        "nothing": (header("x.safetensors", {"__metadata__": {"a": "b"}}), "holds no tensors"),
        "bin": (file("pytorch_model.bin", b""), "any code when it is opened .* save_pretrained"),
        "pt": (file("model.PT", b""), "any code when it is opened and is never read here; convert it"),
        "gguf name": (file("m.gguf", b"GGUF"), "GGUF files .* give the safetensors folder that it was made from"),
        "other": (file("w.npz", b""), "w.npz is neither a .safetensors file nor an index"),
    }  # fmt: skip


def test_each_damaged_file_is_named_with_its_fault(tmp_path):
    for case, (path, message) in damaged(tmp_path).items():
        with pytest.raises(CheckpointError, match=message) as caught:
            open_checkpoint(path)
        assert str(path) in str(caught.value), case


ONE, TWO = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


def test_faults_of_an_index(tmp_path):
    tensors = {"w": torch.ones(2)}
    folder = write_shards(tmp_path / "missing", {ONE: tensors}, v=TWO, u="model-3.safetensors")
    with pytest.raises(CheckpointError, match=f"names 3 shards and 2 of them are not in its folder: {TWO}, model-3"):
        open_checkpoint(folder)
    folder = write_shards(tmp_path / "twice", {ONE: tensors | {"v": torch.ones(1)}, TWO: tensors})
    with pytest.raises(CheckpointError, match=f"'w' is in {ONE} and in {TWO}; it must be in one"):
        open_checkpoint(folder)
    folder = write_shards(tmp_path / "stale", {ONE: tensors}, **{name: ONE for name in "abcde"})
    with pytest.raises(CheckpointError, match="names 5 tensors that no shard holds: a, b, c and 2 more"):
        open_checkpoint(folder)
    for shard in ("../model.safetensors", "/tmp/model.safetensors", "..\\model.safetensors", "C:\\m.safetensors", ""):
        folder = write_shards(tmp_path / "outside", {ONE: tensors}, v=shard)
        with pytest.raises(CheckpointError, match=re.escape(f"puts 'v' into {shard!r}; a shard is the name of a file")):
            open_checkpoint(folder)
    index = folder / "model.safetensors.index.json"
    for text, message in (
        ("{", "is not JSON"),
        ("[]", "holds a JSON list; an object is needed"),
        ("{}", "has no weight_map with entries"),
        ('{"weight_map": {}}', "has no weight_map with entries"),
    ):
        index.write_text(text)
        with pytest.raises(CheckpointError, match=message):
            open_checkpoint(folder)
    folder = write_shards(tmp_path / "cut", {ONE: tensors})
    (folder / ONE).write_bytes((folder / ONE).read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=f"{ONE} is cut short"):
        open_checkpoint(folder)


def test_faults_of_a_folder(tmp_path):
    with pytest.raises(CheckpointError, match=r"holds no safetensors file; give a folder with model\.safetensors or"):
        open_checkpoint(tmp_path)
    for name in ("optimizer.pt", "pytorch_model.bin"):
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"pytorch_model.bin: a pickle can run any code"):
        open_checkpoint(tmp_path)
    for name in (ONE, TWO, "x.safetensors", "y.safetensors"):
        save_file({"w": torch.ones(1)}, tmp_path / name)
    with pytest.raises(CheckpointError, match=rf"4 safetensors files \({ONE}, {TWO}, x.*, …\) and neither model"):
        open_checkpoint(tmp_path)
    write_shards(tmp_path, {ONE: {"w": torch.ones(1)}})
    save_file({"w": torch.ones(2)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"holds both model\.safetensors and .* give the one you mean"):
        open_checkpoint(tmp_path)
    assert open_checkpoint(tmp_path / "model.safetensors").tensors["w"].shape == (2,)
    write_shards(tmp_path, {"model.safetensors": {"w": torch.ones(3)}})  # an index of that file alone is no conflict
    assert open_checkpoint(tmp_path).tensors["w"].shape == (3,)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config.json is not JSON .*copy it again"):
        open_checkpoint(tmp_path)


def test_an_adapter_is_refused_with_what_a_caller_needs_to_merge_it(tmp_path):
    save_file({"lora_A.weight": torch.ones(1)}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(AdapterFolder, match=r"PEFT adapter: factors .*audit_source\.open_adapter\(folder, base\)"):
        open_checkpoint(tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "some/base"}))
    for path in (tmp_path, tmp_path / "adapter_model.safetensors"):
        with pytest.raises(AdapterFolder, match="PEFT adapter of some/base") as caught:
            open_checkpoint(path)
        assert (caught.value.path, caught.value.base) == (tmp_path, "some/base")


def test_faults_of_a_request(tmp_path):
    save_file(weights(), tmp_path / "model.safetensors")
    checkpoint = open_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match=r"holds no tensor 'a\.wight'; the nearest names are a\.weight"):
        checkpoint.read("a.wight")
    with pytest.raises(CheckpointError, match=r"'d\.scale' in .* is a scalar and has no rows; read it whole"):
        checkpoint.read_rows("d.scale", 0, 1)
    for start, stop in ((-1, 2), (3, 2), (0, 8)):
        with pytest.raises(CheckpointError, match=f"rows {start} to {stop} of 'a.weight' .* <= 7 is needed"):
            checkpoint.read_rows("a.weight", start, stop)
    with pytest.raises(CheckpointError, match=r"entries 0 to 36 of 'a.weight' .* <= 35 is needed"):
        checkpoint.read_entries("a.weight", 0, 36)
    with pytest.raises(TypeError):
        checkpoint.tensors["a.weight"] = None
    checkpoint.close()
    with pytest.raises(CheckpointError, match="was closed; open it again"):
        checkpoint.read("a.weight")


def test_a_file_that_becomes_shorter_while_it_is_read(tmp_path):
    path = tmp_path / "x.safetensors"
    save_file({"w": torch.ones(8)}, path)
    with open_checkpoint(path) as checkpoint:
        path.write_bytes(path.read_bytes()[:-12])
        with pytest.raises(CheckpointError, match="ended after 20 of 32 bytes of 'w': it became shorter since"):
            checkpoint.read("w")
