"""Damaged and hostile files and options end in a sentence or a correct load: no traceback, hang or flood of memory."""

from __future__ import annotations

import json
import resource
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from aq_lightning.cli import main
from aq_lightning.errors import RequestError
from aq_lightning.export.loading import open_model
from aq_lightning.models.loading import load

ROOM = 4 * 2**30  # bytes of address space that one load may take


@pytest.fixture(autouse=True)
def little_memory() -> Iterator[None]:
    """A flood of memory would end in a MemoryError that names no file."""
    now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (now + ROOM, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


@pytest.fixture(scope="module")
def checkpoint(fit: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A quantized checkpoint of our own."""
    return fit("w4a16g32", tmp_path_factory.mktemp("run") / "run", "--trainer.max_epochs=0") / "checkpoint"


@pytest.fixture
def copy(model_directory: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(model_directory, tmp_path / "model"))


def change(directory: Path, **fields: object) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


@pytest.mark.parametrize(
    "fields, said",
    [
        ({"num_hidden_layers": 10**9}, "num_hidden_layers 1000000000 and "),
        ({"num_hidden_layers": -1}, "a tensor or more to a layer"),
        ({"num_hidden_layers": "many"}, "a tensor or more to a layer"),
        ({"vocab_size": 10**11}, "for 74,"),
        ({"intermediate_size": 10**9}, "stored numbers"),
        ({"hidden_size": 2**62}, "sensible numbers"),
        ({"num_attention_heads": 0}, "readable by transformers"),
    ],
)
def test_impossible_sizes(copy: Path, fields: dict[str, object], said: str) -> None:
    change(copy, **fields)
    for opened in (load, open_model):
        with pytest.raises(RequestError) as refusal:
            opened(str(copy))
        assert said in str(refusal.value) or "stored numbers" in str(refusal.value), refusal.value


@pytest.mark.parametrize("claim", [2**60, 2**31, 5, 0])
def test_impossible_header(copy: Path, claim: int) -> None:
    file = copy / "model.safetensors"
    file.write_bytes(claim.to_bytes(8, "little") + file.read_bytes()[8:])
    with pytest.raises(RequestError, match=r"whole header and all its tensors.*model\.safetensors"):
        load(str(copy))


def sharded(directory: Path) -> Path:
    """The same model in two files with an index."""
    tensors = load_file(directory / "model.safetensors")
    names = sorted(tensors)
    files = {name: f"model-0000{1 + 2 * index // len(names)}-of-00002.safetensors" for index, name in enumerate(names)}
    for file in set(files.values()):
        save_file({name: tensors[name] for name in names if files[name] == file}, directory / file, {"format": "pt"})
    (directory / "model.safetensors").unlink()
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    return directory


@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/passwd", "sub/x.safetensors", "pickle.bin", "..", 3])
def test_an_index_cannot_leave_its_directory(copy: Path, name: object) -> None:
    index = sharded(copy) / "model.safetensors.index.json"
    assert load(str(copy)).model.config.model_type, "untouched, it loads"
    content = json.loads(index.read_text())
    content["weight_map"][min(content["weight_map"])] = name
    index.write_text(json.dumps(content))
    with pytest.raises(RequestError, match="names safetensors files beside it"):
        load(str(copy))


def test_missing_and_truncated_shards(copy: Path) -> None:
    shard = sharded(copy) / "model-00002-of-00002.safetensors"
    content = shard.read_bytes()
    shard.write_bytes(content[:-100])
    with pytest.raises(RequestError, match=r"whole header and all its tensors.*model-00002"):
        load(str(copy))
    shard.unlink()
    with pytest.raises(RequestError, match=r"All shards of a model are there.*model-00002"):
        load(str(copy))


def test_missing_tensor_and_nan(copy: Path) -> None:
    tensors = load_file(copy / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name][3, 5] = float("nan")
    save_file(tensors, copy / "model.safetensors", {"format": "pt"})
    with pytest.raises(RequestError, match=r"weights are finite, got NaN or infinity in .*mlp.up_proj.weight"):
        load(str(copy)).block(1)  # which reads it
    tensors["padding"] = tensors.pop(name).zero_()
    save_file(tensors, copy / "model.safetensors", {"format": "pt"})
    with pytest.raises(RequestError, match=rf"all its tensors, got .* without {name}"):
        load(str(copy))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=4,
)
FUZZ = settings(max_examples=50, deadline=20_000, suppress_health_check=[HealthCheck.function_scoped_fixture])


def load_or_refuse(directory: Path) -> None:
    """The only two ways to end."""
    for opened in (open_model, load):
        try:
            opened(str(directory))
        except RequestError as refusal:
            assert str(refusal) and "Traceback" not in str(refusal)


def fuzz_config(directory: Path, data: st.DataObject) -> None:
    original = (directory / "config.json").read_text()
    config = json.loads(original)
    for field in data.draw(st.lists(st.sampled_from(sorted(config)), min_size=1, max_size=3)):
        if data.draw(st.booleans()):
            config[field] = data.draw(JSON)
        else:
            config.pop(field, None)
    (directory / "config.json").write_text(json.dumps(config))
    try:
        load_or_refuse(directory)
    finally:
        (directory / "config.json").write_text(original)


@pytest.mark.filterwarnings("ignore")
@FUZZ
@given(data=st.data())
def test_any_config(model_directory: Path, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    directory = tmp_path_factory.mktemp("fuzz") / "model"
    shutil.copytree(model_directory, directory)
    fuzz_config(directory, data)


@pytest.mark.filterwarnings("ignore")
@FUZZ
@given(data=st.data())
def test_any_config_of_a_checkpoint(
    checkpoint: Path, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    directory = tmp_path_factory.mktemp("fuzz") / "checkpoint"
    shutil.copytree(checkpoint, directory)
    fuzz_config(directory, data)


def header_of(content: bytes) -> tuple[dict, bytes]:
    size = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + size]), content[8 + size :]


@pytest.mark.filterwarnings("ignore")
@FUZZ
@given(data=st.data())
def test_any_safetensors(
    model_directory: Path, checkpoint: Path, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """Bytes flipped or cut anywhere, and headers whose entries claim anything."""
    source = data.draw(st.sampled_from([model_directory, checkpoint]))
    directory = tmp_path_factory.mktemp("fuzz") / "model"
    shutil.copytree(source, directory)
    file = directory / "model.safetensors"
    content = bytearray(file.read_bytes())
    if data.draw(st.booleans()):
        header, rest = header_of(bytes(content))
        entry = header[data.draw(st.sampled_from(sorted(set(header) - {"__metadata__"})))]
        entry[data.draw(st.sampled_from(["dtype", "shape", "data_offsets", "more"]))] = data.draw(
            JSON | st.lists(st.integers(0, 2**64), max_size=3) | st.sampled_from(["F64", "F8_E4M3", "BOOL", "U8"])
        )
        text = json.dumps(header).encode()
        content = bytearray(len(text).to_bytes(8, "little") + text + rest)
    else:
        for _ in range(data.draw(st.integers(1, 3))):
            content[data.draw(st.integers(0, min(len(content), 4000) - 1))] ^= data.draw(st.integers(1, 255))
        content = content[: data.draw(st.integers(0, len(content)) | st.just(len(content)))]
    file.write_bytes(content)
    load_or_refuse(directory)


@pytest.mark.filterwarnings("ignore")
@settings(FUZZ, max_examples=25)
@given(
    option=st.sampled_from(
        ["model.scheme", "model.batch_size", "model.transforms", "model.plan", "model.streams", "model.optimizer",
         "model.learning_rates", "model.objective", "data.samples", "data.length", "data.seed", "data.source", "resume",
         "save_every", "keep_streams", "trainer.max_epochs", "trainer.precision", "trainer.devices"]
    ),
    value=JSON,
)  # fmt: skip
def test_any_option(
    fit: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory, capsys: pytest.CaptureFixture, option, value
) -> None:
    """A configuration with anything in one of its fields is refused in a sentence, or runs."""
    place = tmp_path_factory.mktemp("option")
    section, _, field = option.rpartition(".")
    content = {field: value} if not section else {section: {field: value}}
    (place / "mine.yaml").write_text(json.dumps(content))
    torch.manual_seed(0)
    try:
        fit("w4a16", place / "run", f"--config={place / 'mine.yaml'}", "--data.samples=2", "--trainer.max_epochs=0")
    except SystemExit as exit:
        captured = capsys.readouterr()
        assert exit.code == 2 and "Traceback" not in captured.err and "error: " in captured.err


def test_no_pickle_is_ever_opened(copy: Path, capsys: pytest.CaptureFixture) -> None:
    (copy / "model.safetensors").rename(copy / "pytorch_model.bin")
    with pytest.raises(SystemExit) as exit:
        main(["test", f"--model.pretrained={copy}"])
    assert exit.value.code == 2 and "pickled .bin files are never read" in capsys.readouterr().err
