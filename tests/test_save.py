"""Saving and loading: round trips to the bit, what the folder holds, and what is refused when reading one."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from save_support import (
    DIFFERING,
    DIT,
    FLUX,
    MODELS,
    Plain,
    dense_model,
    inputs_of,
    output_of,
    plain_inputs,
    routed_model,
    routed_plain,
    same_state,
)
from torch import nn

import moefx
from moefx.errors import InputError, OptionError, UnsafeInputError
from moefx.model.layout import MANIFEST, PLANS, is_owned


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved DiT, to be copied, never changed."""
    folder = tmp_path_factory.mktemp("saves") / "dit"
    moefx.save(routed_model(DIT), folder, max_shard_size="100KB")
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """A copy of the saved DiT that a test may damage."""
    return Path(shutil.copytree(saved, tmp_path / "copy"))


# --------------------------------------------------------------------------------------------------------- round trips


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("size", ["10GB", 50_000])
def test_round_trip_to_the_bit(name: str, size: int | str, tmp_path: Path) -> None:
    model = routed_model(name)
    moefx.save(model, tmp_path / "model", max_shard_size=size)
    again = moefx.load(tmp_path / "model")
    assert type(again) is type(model)
    assert same_state(model, again)
    assert not again.training
    assert [p.to_json() for p in again.moefx.plans] == [p.to_json() for p in model.moefx.plans]
    inputs = inputs_of(model)
    assert torch.equal(output_of(model, inputs), output_of(again, inputs))
    assert _public(again.config) == _public(model.config)


def _public(config: Any) -> Any:
    return json.loads(json.dumps({k: v for k, v in config.items() if not k.startswith("_")}))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_types_are_kept(dtype: torch.dtype, tmp_path: Path) -> None:
    model = routed_model(DIT).to(dtype)
    moefx.save(model, tmp_path / "model")
    assert same_state(model, moefx.load(tmp_path / "model"))


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_model_of_no_library(device: str, tmp_path: Path) -> None:
    model = routed_plain()
    moefx.save(model, tmp_path / "model")
    torch.manual_seed(99)
    with torch.device(device):
        fresh = Plain()
    again = moefx.load(tmp_path / "model", fresh)
    assert again is fresh
    assert same_state(model, again)
    assert torch.equal(again(*plain_inputs()), model(*plain_inputs()))
    assert again.out.weight is again.into.weight
    assert again.training == fresh.training
    assert not any(p.is_meta for p in again.parameters())


def test_a_loaded_model_trains_and_is_saved_again(tmp_path: Path) -> None:
    moefx.save(routed_plain(), tmp_path / "one")
    model = moefx.load(tmp_path / "one", Plain())
    model(*plain_inputs()).square().mean().backward()
    assert all(p.grad is not None for p in model.parameters())
    moefx.save(model, tmp_path / "two")
    assert same_state(model, moefx.load(tmp_path / "two", Plain()))
    for name in (PLANS, "model.safetensors"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_a_loaded_model_has_no_dense_weights_to_go_back_to(tmp_path: Path) -> None:
    moefx.save(routed_plain(), tmp_path / "one")
    with pytest.raises(moefx.MoefxError, match="holds no dense weights"):
        moefx.untransform(moefx.load(tmp_path / "one", Plain()))


def test_two_transforms_are_loaded_in_their_order(tmp_path: Path) -> None:
    model = routed_model(DIT)
    moefx.transform(model, passes=["mixture-of-heads"])
    assert len(model.moefx.plans) == 2
    model.save_pretrained(tmp_path / "model")
    again = moefx.load(tmp_path / "model")
    assert type(again) is getattr(moefx, f"Moefx{DIT}")
    assert [p.to_json() for p in again.moefx.plans] == [p.to_json() for p in model.moefx.plans]
    assert same_state(model, again)
    assert torch.equal(output_of(model), output_of(again))


def test_the_same_model_gives_the_same_bytes(tmp_path: Path) -> None:
    for name in ("one", "two"):
        moefx.save(routed_model(DIT), tmp_path / name)
    files = sorted(p.name for p in (tmp_path / "one").iterdir())
    assert files == sorted(p.name for p in (tmp_path / "two").iterdir())
    for name in files:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes(), name


def test_a_compiled_and_a_given_state(tmp_path: Path) -> None:
    model = routed_plain()
    averaged = {k: v * 2 for k, v in model.state_dict().items()}
    moefx.save(torch.compile(model), tmp_path / "model", state_dict=averaged)
    again = moefx.load(tmp_path / "model", Plain())
    assert all(torch.equal(v, averaged[k]) for k, v in again.state_dict().items())


def test_saving_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    model = routed_model(DIT)
    before, config = {k: v.clone() for k, v in model.state_dict().items()}, dict(model.config)
    model.save_pretrained(tmp_path / "model")
    assert dict(model.config) == config
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


# ------------------------------------------------------------------------------------------------------ what it holds


def test_what_the_folder_holds(saved: Path) -> None:
    names = {p.name for p in saved.iterdir()}
    assert {"config.json", PLANS, MANIFEST, "diffusion_pytorch_model.safetensors.index.json"} <= names
    assert not [n for n in names if n.endswith((".bin", ".pt", ".pt2", ".pkl", ".py"))]
    manifest = json.loads((saved / MANIFEST).read_text())
    assert set(manifest["files"]) == names - {MANIFEST}
    for name, entry in manifest["files"].items():
        content = (saved / name).read_bytes()
        assert entry == {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    config = json.loads((saved / "config.json").read_text())
    assert config["_class_name"] == f"Moefx{DIT}"
    assert config["moefx"]["schema_version"] == 1
    assert config["num_layers"] == 2
    plans = json.loads((saved / PLANS).read_text())
    assert [p["recipe"] for p in plans] == ["sparse-upcycling"]


def test_the_index_names_every_tensor(saved: Path) -> None:
    index = json.loads((saved / "diffusion_pytorch_model.safetensors.index.json").read_text())
    state = routed_model(DIT).state_dict()
    assert index["weight_map"].keys() == state.keys()
    assert index["metadata"]["total_size"] == sum(v.numel() * v.element_size() for v in state.values())
    for name in set(index["weight_map"].values()):
        content = load_file(saved / name)
        assert content.keys() == {k for k, v in index["weight_map"].items() if v == name}
        assert sum(v.numel() * v.element_size() for v in content.values()) <= 100_000 or len(content) == 1


def test_tied_weights_are_stored_once(tmp_path: Path) -> None:
    moefx.save(routed_plain(), tmp_path / "model")
    assert "out.weight" not in load_file(tmp_path / "model" / "model.safetensors")


def test_other_files_of_the_folder_are_kept(tmp_path: Path) -> None:
    target = tmp_path / "model"
    target.mkdir()
    (target / "README.md").write_text("a card")
    (target / "diffusion_pytorch_model.bin").write_text("an older, dense save")
    moefx.save(routed_model(DIT), target)
    moefx.save(routed_model(DIT), target)
    assert (target / "README.md").read_text() == "a card"
    assert not (target / "diffusion_pytorch_model.bin").exists()
    assert [p.name for p in tmp_path.iterdir()] == ["model"]
    moefx.load(target)


@pytest.mark.parametrize(
    ("name", "owned"),
    [
        ("config.json", True),
        ("moefx_plan.json", True),
        ("diffusion_pytorch_model.fp16-00001-of-00002.safetensors", True),
        ("diffusion_pytorch_model.safetensors.index.json", True),
        ("model.safetensors", True),
        ("pytorch_lora_weights.safetensors", False),
        ("README.md", False),
        ("models.txt", False),
    ],
)
def test_which_files_a_save_replaces(name: str, owned: bool) -> None:
    assert is_owned(name) is owned


# ------------------------------------------------------------------------------------------------- refused when saving


def test_refused_models(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="it was not transformed"):
        moefx.save(Plain(), tmp_path / "x")
    with pytest.raises(InputError, match=r"no torch\.nn\.Module"):
        moefx.save("model", tmp_path / "x")  # type: ignore[arg-type]
    with torch.device("meta"):
        model = moefx.transform(Plain(), tuple(x.to("meta") for x in plain_inputs()), **DIFFERING)
    with pytest.raises(InputError, match="on meta, without values"):
        moefx.save(model, tmp_path / "x")
    with pytest.raises(InputError, match="another set of tensors"):
        moefx.save(routed_plain(), tmp_path / "x", state_dict={})
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("size", [0, -1, True, "ten", "0GB", "5", None, 1.5])
def test_refused_sizes(size: Any, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="max_shard_size"):
        moefx.save(routed_plain(), tmp_path / "x", max_shard_size=size)


def test_refused_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = routed_plain()
    (tmp_path / "file").write_text("x")
    (tmp_path / "pipe" / "vae").mkdir(parents=True)
    (tmp_path / "here").mkdir()
    with pytest.raises(InputError, match="a file of that name"):
        moefx.save(model, tmp_path / "file")
    with pytest.raises(InputError, match="other folders in it: vae"):
        moefx.save(model, tmp_path / "pipe")
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(InputError, match="working directory"):
        moefx.save(model, ".")
    with pytest.raises(InputError, match=r"File exists|Not a directory"):
        moefx.save(model, tmp_path / "file" / "inside")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "here", "pipe"]


def test_one_variant_per_folder(tmp_path: Path) -> None:
    model = routed_model(DIT)
    model.save_pretrained(tmp_path / "m", variant="fp16", max_shard_size="100KB")
    names = {p.name for p in (tmp_path / "m").iterdir()}
    assert "diffusion_pytorch_model.safetensors.index.fp16.json" in names
    assert "diffusion_pytorch_model.fp16-00001-of-00006.safetensors" in names
    with pytest.raises(InputError, match="a folder holds one"):
        model.save_pretrained(tmp_path / "m")
    with pytest.raises(OptionError, match="no plain name"):
        model.save_pretrained(tmp_path / "n", variant="../x")
    assert same_state(type(model).from_pretrained(tmp_path / "m", variant="fp16"), model)
    with pytest.raises(InputError, match="variant 'fp16', not None"):
        type(model).from_pretrained(tmp_path / "m")


@pytest.mark.parametrize(
    "option",
    [{"safe_serialization": False}, {"push_to_hub": True}, {"save_function": print}, {"use_flashpack": True}, {"x": 1}],
)
def test_refused_options_of_save_pretrained(option: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(InputError, match=next(iter(option))):
        routed_model(DIT).save_pretrained(tmp_path / "m", **option)
    assert not (tmp_path / "m").exists()


def test_only_the_main_process_writes(tmp_path: Path) -> None:
    routed_model(DIT).save_pretrained(tmp_path / "m", is_main_process=False)
    assert not (tmp_path / "m").exists()


# ------------------------------------------------------------------------------------------------ from_pretrained


def test_from_pretrained(saved: Path) -> None:
    cls = getattr(moefx, f"Moefx{DIT}")
    model = cls.from_pretrained(saved.parent, subfolder="dit", torch_dtype=torch.bfloat16, low_cpu_mem_usage=True)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert not model.training
    assert same_state(cls.from_pretrained(str(saved), device_map="cpu"), routed_model(DIT))


@pytest.mark.parametrize(
    "option", [{"use_safetensors": False}, {"quantization_config": {"a": 1}}, {"use_flashpack": True}, {"nonsense": 1}]
)
def test_refused_options_of_from_pretrained(option: dict[str, Any], saved: Path) -> None:
    with pytest.raises(InputError, match=next(iter(option))):
        getattr(moefx, f"Moefx{DIT}").from_pretrained(saved, **option)


def test_refused_places_of_from_pretrained(saved: Path) -> None:
    cls = getattr(moefx, f"Moefx{DIT}")
    with pytest.raises(InputError, match="snapshot_download"):
        cls.from_pretrained("someone/something")
    with pytest.raises(UnsafeInputError, match="lies outside it"):
        cls.from_pretrained(saved, subfolder="../dit/../..")
    with pytest.raises(InputError, match="device_map"):
        cls.from_pretrained(saved, device_map="auto")
    with pytest.raises(UnsafeInputError, match=f"a save of {DIT}, not of {FLUX}"):
        getattr(moefx, f"Moefx{FLUX}").from_pretrained(saved)


def test_stock_loaders_refuse_the_folder(saved: Path) -> None:
    import diffusers

    with pytest.raises(ValueError, match="Unknown quantization type, got moefx"):
        type(dense_model(DIT)).from_pretrained(saved)
    with pytest.raises((ValueError, AttributeError, OSError)):
        diffusers.AutoModel.from_pretrained(saved)


# ----------------------------------------------------------------------------------------------- refused when loading


def _edit(path: Path, change: Callable[[Any], Any]) -> None:
    content = json.loads(path.read_text())
    path.write_text(json.dumps(change(content)))


def _sign(folder: Path) -> None:
    """Write a manifest that agrees with the files: what a forger would do."""
    body = json.loads((folder / MANIFEST).read_text())
    body.pop("sha256", None)
    for name in body["files"]:
        if (folder / name).is_file():
            content = (folder / name).read_bytes()
            body["files"][name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    digest = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
    (folder / MANIFEST).write_text(json.dumps(body | {"sha256": digest}))


def test_missing(tmp_path: Path) -> None:
    with pytest.raises(UnsafeInputError, match="no such folder"):
        moefx.load(tmp_path / "nothing")
    with pytest.raises(UnsafeInputError, match=f"no {MANIFEST}"):
        moefx.load(tmp_path)


def test_every_file_is_needed(folder: Path) -> None:
    for path in sorted(folder.iterdir()):
        aside = path.rename(folder.parent / path.name)
        with pytest.raises(UnsafeInputError, match=path.name):
            moefx.load(folder)
        aside.rename(path)
    moefx.load(folder)


def test_every_file_is_checked(folder: Path) -> None:
    for path in sorted(folder.iterdir()):
        content = path.read_bytes()
        for damaged in (content[:-2], content[: len(content) // 2], b"", content + b"}", _flip(content)):
            path.write_bytes(damaged)
            with pytest.raises(UnsafeInputError):
                moefx.load(folder)
        path.write_bytes(content)
    moefx.load(folder)


def _flip(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


def test_newer_versions(folder: Path) -> None:
    _edit(folder / MANIFEST, lambda m: m | {"schema_version": 2, "moefx_version": "9.9", "something": "new"})
    with pytest.raises(UnsafeInputError, match=r"schema 2.*9\.9.*\n.*upgrade moefx"):
        moefx.load(folder)


def test_a_newer_plan(folder: Path) -> None:
    _edit(folder / PLANS, lambda plans: [plans[0] | {"schema_version": 99}])
    _sign(folder)
    with pytest.raises(UnsafeInputError, match="schema 99"):
        moefx.load(folder)


@pytest.mark.parametrize("name", ["../outside.safetensors", "/etc/hostname", "a/b.safetensors", "..", "", "-rf", ".x"])
def test_names_that_leave_the_folder(folder: Path, name: str) -> None:
    entry = {"bytes": 1, "sha256": "0" * 64}
    _edit(folder / MANIFEST, lambda m: m | {"files": m["files"] | {name: entry}, "weights": [name]})
    _sign(folder)
    with pytest.raises(UnsafeInputError, match="leaves the folder"):
        moefx.load(folder)


def test_links_that_leave_the_folder(folder: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside.json"
    (folder / PLANS).rename(outside)
    os.symlink(outside, folder / PLANS)
    with pytest.raises(UnsafeInputError, match="a link to a place outside"):
        moefx.load(folder)


def test_links_of_a_cache_snapshot(saved: Path, tmp_path: Path) -> None:
    snapshot, blobs = tmp_path / "repo" / "snapshots" / "abc", tmp_path / "repo" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for i, path in enumerate(sorted(saved.iterdir())):
        shutil.copy(path, blobs / str(i))
        os.symlink(Path("../../blobs") / str(i), snapshot / path.name)
    assert same_state(moefx.load(snapshot), routed_model(DIT))


FORGED: dict[str, Callable[[Any], Any]] = {
    "no plan": lambda plans: [],
    "not a list": lambda plans: {"plans": plans},
    "a number": lambda plans: 3,
    "unknown key": lambda plans: [plans[0] | {"code": "print()"}],
    "unknown pass": lambda plans: [_with(plans[0], ("passes", 0, "name"), "os.system")],
    "unknown rule": lambda plans: [_with(plans[0], ("sites", 0, "rule"), "nothing")],
    "unknown module": lambda plans: [_with(plans[0], ("sites", 0, "module"), "transformer_blocks.7.ff")],
    "no such dtype": lambda plans: [_with(plans[0], ("sites", 0, "module_inputs", "args", 0, "dtype"), "load")],
    "huge shape": lambda plans: [_with(plans[0], ("sites", 0, "module_inputs", "args", 0, "tensor"), [1 << 62, 4])],
    "no inputs": lambda plans: [_with(plans[0], ("sites", 0, "module_inputs"), None)],
    "other experts": lambda plans: [_with(plans[0], ("passes", 0, "options", "experts"), 8)],
    "too many experts": lambda plans: [_with(plans[0], ("passes", 0, "options", "experts"), 10**9)],
    "zero experts": lambda plans: [_with(plans[0], ("passes", 0, "options", "experts"), 0)],
}


def _with(content: Any, path: tuple[Any, ...], value: Any) -> Any:
    place = content
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    return content


@pytest.mark.parametrize("case", FORGED)
def test_forged_plans(case: str, folder: Path) -> None:
    _edit(folder / PLANS, FORGED[case])
    with pytest.raises(UnsafeInputError, match=PLANS):
        moefx.load(folder)
    _sign(folder)
    with pytest.raises(UnsafeInputError):
        moefx.load(folder)


@pytest.mark.parametrize("text", ["", "[", "nonsense", "[" * 100_000, '{"a": NaN', "\x00", "null"])
def test_text_that_is_no_plan(text: str, folder: Path) -> None:
    (folder / PLANS).write_text(text)
    _sign(folder)
    with pytest.raises(UnsafeInputError, match=PLANS):
        moefx.load(folder)


def test_forged_configs(folder: Path) -> None:
    for change in ({"num_layers": 3}, {"num_layers": "many"}, {"attention_head_dim": 16}, {"_class_name": FLUX}):
        original = (folder / "config.json").read_text()
        _edit(folder / "config.json", lambda c, change=change: c | change)
        _sign(folder)
        with pytest.raises(moefx.MoefxError):
            moefx.load(folder)
        (folder / "config.json").write_text(original)


def test_a_file_that_is_no_safetensors(folder: Path) -> None:
    name = json.loads((folder / MANIFEST).read_text())["weights"][0]
    (folder / name).write_bytes(b"\x80\x04cos\nsystem\n")
    _sign(folder)
    with pytest.raises(UnsafeInputError, match="no safetensors file"):
        moefx.load(folder)


def test_weights_that_do_not_fit(folder: Path) -> None:
    body = json.loads((folder / MANIFEST).read_text())
    dropped = body["weights"].pop()
    del body["files"][dropped]
    (folder / MANIFEST).write_text(json.dumps(body))
    _sign(folder)
    with pytest.raises(UnsafeInputError, match="tensors are missing"):
        moefx.load(folder)


class Other(nn.Module):
    """Another model."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)


def test_another_model(folder: Path, tmp_path: Path) -> None:
    moefx.save(routed_plain(), tmp_path / "plain")
    with pytest.raises(UnsafeInputError, match="a save of Plain, not of Other"):
        moefx.load(tmp_path / "plain", Other())
    with pytest.raises(UnsafeInputError, match=r"does not fit|is \["):
        moefx.load(tmp_path / "plain", Plain(width=32))
    with pytest.raises(UnsafeInputError, match="tensors are missing"):
        moefx.load(tmp_path / "plain", Plain(depth=3))
    with pytest.raises(UnsafeInputError, match="does not fit"):
        moefx.load(tmp_path / "plain", Plain(depth=1))
    with pytest.raises(InputError, match="pass a fresh dense model"):
        moefx.load(tmp_path / "plain")
    with pytest.raises(InputError, match="was transformed before"):
        moefx.load(tmp_path / "plain", routed_plain())
    with pytest.raises(InputError, match=r"torch\.nn\.Module"):
        moefx.load(tmp_path / "plain", "Plain")  # type: ignore[arg-type]
    with pytest.raises(UnsafeInputError, match=f"a save of {DIT}, not of Plain"):
        moefx.load(folder, Plain())


def test_loading_runs_no_code_of_the_folder(folder: Path) -> None:
    (folder / "moefx.py").write_text("raise SystemExit('ran')")
    (folder / "__init__.py").write_text("raise SystemExit('ran')")
    _edit(folder / "config.json", lambda c: c | {"auto_map": {"AutoModel": "moefx.Evil"}})
    _sign(folder)
    moefx.load(folder)
