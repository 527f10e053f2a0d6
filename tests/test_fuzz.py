"""Files that were damaged at random: an error that says so, or the same content as before."""

from __future__ import annotations

import io
import json
import resource
import tomllib
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import openmm
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors.torch import save as serialize

from openmm_vtdis import DiffusionBoltzmannGenerator, WeightedEnsemble, cli, cli_options, storage
from openmm_vtdis.generator import sharded
from openmm_vtdis.targets import double_well
from openmm_vtdis.topology import placeholder_topology

FUZZ = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
DAMAGE = st.lists(
    st.tuples(
        st.floats(0.0, 1.0, exclude_max=True),
        st.sampled_from(["flip", "cut", "insert", "zero"]),
        st.binary(min_size=1, max_size=12),
    ),
    min_size=1,
    max_size=4,
)
"""Where in the file, what happens there, and with which bytes."""


def damaged(content: bytes, damage: list[tuple[float, str, bytes]]) -> bytes:
    for where, what, extra in damage:
        k = int(where * len(content))
        if what == "flip":
            content = content[:k] + extra + content[k + len(extra) :]
        elif what == "cut":
            content = content[:k]
        elif what == "insert":
            content = content[:k] + extra + content[k:]
        else:
            content = content[:k] + bytes(64) + content[k + 64 :]
        if not content:
            return b"\0"
    return content


def read_or_refuse(
    read: Callable[[Path], object], write: Callable[[Path], object], suffix: str, folder: Path
) -> Callable[[list[tuple[float, str, bytes]]], object | None]:
    """What a damaged copy of a file is read as; None where it is refused with a ValueError."""
    original, copy = folder / f"original{suffix}", folder / f"copy{suffix}"
    write(original)
    content = original.read_bytes()

    def attempt(damage: list[tuple[float, str, bytes]]) -> object | None:
        copy.write_bytes(damaged(content, damage))
        try:
            return read(copy)
        except ValueError:
            return None

    return attempt


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


def test_archives(folder: Path) -> None:
    tensors = {"a": torch.arange(40.0), "b.c": torch.tensor([True, False])}
    attempt = read_or_refuse(
        lambda path: storage.read_archive(path, "checkpoint"),
        lambda path: storage.write_archive(path, "checkpoint", tensors, {"n": [1, 2.5, "x"]}),
        ".vtdis",
        folder,
    )
    refused = []

    @FUZZ
    @given(damage=DAMAGE)
    @example(damage=[(0.5, "flip", b"\x01")])
    def check(damage: list[tuple[float, str, bytes]]) -> None:
        found = attempt(damage)
        refused.append(found is None)
        if found is not None:
            read, metadata = found  # type: ignore[misc]
            assert read.keys() == tensors.keys()
            assert all(torch.equal(read[name], tensors[name]) for name in tensors)
            assert metadata["n"] == [1, 2.5, "x"]

    check()
    assert any(refused)


def test_generators(folder: Path) -> None:
    system = double_well()
    gen = DiffusionBoltzmannGenerator(
        system.system, None, system.temperature, n_dims=2, network="egnn-1x8", seed=0
    )
    frames = system.positions + 0.1 * np.random.default_rng(0).normal(size=(50, 4, 2))
    gen.train(frames, 1, batch_size=4, progress=False)
    attempt = read_or_refuse(DiffusionBoltzmannGenerator.load, gen.save, ".vtdis", folder)
    x = 0.1 * torch.ones(1, 4, 2, dtype=torch.float64).cumsum(1)
    expected = gen.denoiser(x, torch.tensor([0.5]))

    @settings(FUZZ, max_examples=FUZZ.max_examples // 2)
    @given(damage=DAMAGE)
    def check(damage: list[tuple[float, str, bytes]]) -> None:
        found = attempt(damage)
        if found is not None:
            assert torch.equal(found.denoiser(x, torch.tensor([0.5])), expected)  # type: ignore[attr-defined]

    check()


@pytest.mark.parametrize("suffix", [".nc", ".npz"])
def test_ensembles(suffix: str, folder: Path) -> None:
    rng = np.random.default_rng(0)
    ensemble = WeightedEnsemble(
        rng.normal(size=(7, 3, 3)), rng.normal(size=7), rng.normal(size=7), 300.0,
        placeholder_topology(3), {"times": [0.1, 1.0]},
    )  # fmt: skip
    attempt = read_or_refuse(WeightedEnsemble.load, ensemble.save, suffix, folder)

    @FUZZ
    @given(damage=DAMAGE)
    def check(damage: list[tuple[float, str, bytes]]) -> None:
        found = attempt(damage)
        if found is not None:
            assert isinstance(found, WeightedEnsemble)
            assert found.temperature == 300.0
            assert found.metadata == ensemble.metadata
            for name in ("positions", "log_weights", "reduced_energies"):
                np.testing.assert_array_equal(getattr(found, name), getattr(ensemble, name))

    check()


@pytest.mark.parametrize("n_frames", [8, 10**7, 2**31 - 1])
def test_ensembles_that_declare_more_than_there_is(n_frames: int, folder: Path) -> None:
    """Bytes 4 to 8 of a NetCDF 3 file count its frames; nothing is allocated for them."""
    rng = np.random.default_rng(0)
    path = folder / "frames.nc"
    WeightedEnsemble(
        rng.normal(size=(7, 3, 3)), rng.normal(size=7), rng.normal(size=7), 300.0
    ).save(path)  # fmt: skip
    content = path.read_bytes()
    assert content[:8] == b"CDF\x02\0\0\0\x07"
    path.write_bytes(content[:4] + n_frames.to_bytes(4, "big") + content[8:])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError, match="truncated"):
        WeightedEnsemble.load(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # kB


def test_an_npz_whose_array_claims_more_than_there_is(folder: Path) -> None:
    """Once with a wrong checksum, once with a right one."""
    rng = np.random.default_rng(0)
    path, forged = folder / "frames.npz", folder / "forged.npz"
    WeightedEnsemble(
        rng.normal(size=(7, 3, 3)), rng.normal(size=7), rng.normal(size=7), 300.0
    ).save(path)  # fmt: skip
    content = path.read_bytes()
    assert content.count(b"(7, 3, 3), }     ") == 1
    altered = content.replace(b"(7, 3, 3), }     ", b"(7777777, 777), }")
    path.write_bytes(altered)
    with pytest.raises(ValueError, match="does not match its checksum"):
        WeightedEnsemble.load(path)
    with zipfile.ZipFile(forged, "w") as archive, np.load(io.BytesIO(content)) as arrays:
        for name in arrays.files:
            member = io.BytesIO()
            np.save(member, arrays[name])
            claimed = member.getvalue().replace(
                b"(7, 3, 3), }           ", b"(77777777, 77777777), }"
            )
            archive.writestr(f"{name}.npy", claimed)
    with pytest.raises(ValueError, match="truncated or foreign"):
        WeightedEnsemble.load(forged)


def test_systems(folder: Path) -> None:
    attempt = read_or_refuse(
        lambda path: cli.read_system(str(path)),
        lambda path: path.write_text(openmm.XmlSerializer.serialize(double_well().system)),
        ".xml",
        folder,
    )

    @FUZZ
    @given(damage=DAMAGE)
    def check(damage: list[tuple[float, str, bytes]]) -> None:
        found = attempt(damage)
        assert found is None or isinstance(found, openmm.System)

    check()


@FUZZ
@given(text=st.text(max_size=80) | st.sampled_from(["[info]\nseed = 'x'", "[info]\nfoo = 1", "["]))
def test_config_files(text: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = folder / "run.toml"
    path.write_text(text, encoding="utf-8", errors="replace")
    try:
        code = cli.main(["info", "dw4", "--config", str(path)])
    except SystemExit as stop:  # argparse's own
        code = int(stop.code or 0)
    assert code in (0, 2)
    assert code == 0 or capsys.readouterr().err


NEEDED = {
    "train": ("train -s a.xml -t a.dcd -T 300", {"system", "trajectory", "temperature"}),
    "tune": ("tune dw4 -t a.dcd", {"archive", "trajectory"}),
    "sample": ("sample dw4", {"archive"}),
    "analyze": ("analyze a.nc", {"samples"}),
    "info": ("info dw4", {"archive"}),
    "demo": ("demo", set()),
}
"""A command line for each command that needs no file of options, and what it gives."""
OPTIONS = {
    name: [action.dest for action in parser._actions]
    for name, parser in cli_options.make_parser(cli.RUNS)[1].items()
}
TYPES = {
    **dict.fromkeys(("progress", "allow_pickle", "not_centred"), bool),
    **dict.fromkeys(("temperature", "learning_rate"), float),
    **dict.fromkeys(
        ("seed", "n_dims", "iterations", "batch_size", "pairs", "steps", "n_threads"), int
    ),
    **dict.fromkeys(("trajectories", "n", "shard_size"), int),
}
LISTS = ("trajectory", "parameters")
"""Types of the options; others take text, these a list of texts."""
TEXT = st.text(st.characters(codec="utf-8", exclude_characters="\x7f"), max_size=6)
WHOLE = st.integers(-5, 5) | st.sampled_from([10**18, 2**63, 10**400])
SCALARS = st.one_of(
    st.booleans(), WHOLE, st.floats(), TEXT, st.sampled_from(["", "-1", "3", "true", "--seed"])
)
VALUES = st.one_of(
    SCALARS,
    st.lists(SCALARS, max_size=3) | st.lists(TEXT, max_size=3),
    st.dictionaries(TEXT, SCALARS, max_size=2),
)
TABLES = st.one_of(
    st.dictionaries(
        st.sampled_from(["shard-size", "n-dims", "run", "command"]) | TEXT, VALUES, max_size=2
    ),
    *(st.dictionaries(st.sampled_from(keys), VALUES, max_size=2) for keys in OPTIONS.values()),
)


def toml(value: object) -> str:
    """A value as TOML; texts and lists are written as in JSON."""
    if isinstance(value, float):
        return repr(value)  # with nan and inf
    if isinstance(value, list):
        return f"[{', '.join(map(toml, value))}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{toml(k)} = {toml(v)}' for k, v in value.items())}}}"
    return json.dumps(value, ensure_ascii=False)


def test_config_files_of_all_kinds_of_values(folder: Path) -> None:
    """Options of the types that they have, with the values of the file; or a ValueError."""
    path = folder / "typed.toml"
    refused: list[str] = []

    @settings(FUZZ, max_examples=3 * FUZZ.max_examples)
    @given(
        call=st.sampled_from(list(NEEDED)).flatmap(
            lambda name: st.tuples(
                st.just(name),
                st.dictionaries(st.sampled_from(OPTIONS[name]), VALUES, min_size=1, max_size=2)
                | TABLES,
            )
        ),
        other=TABLES,
        above=st.just({})
        | st.dictionaries(st.sampled_from(["seed", *NEEDED]) | TEXT, VALUES, max_size=1),
    )
    @example(call=("train", {"temperature": 10**400}), other={}, above={})
    @example(call=("train", {"learning-rate": 1, "checkpoint": "a"}), other={}, above={})
    @example(call=("analyze", {"trajectory": "a.dcd"}), other={}, above={})
    @example(call=("analyze", {"trajectory": ["a.dcd", "b.dcd"]}), other={}, above={})
    @example(call=("demo", {"name": "lj13", "progress": False}), other={"x": 1}, above={})
    @example(call=("demo", {}), other={}, above={"seed": 3})
    def check(call: tuple[str, Any], other: Any, above: Any) -> None:
        name, table = call
        line, given = NEEDED[name]
        rest = "tune" if name == "train" else "train"
        parts = [f"{toml(key)} = {toml(value)}" for key, value in above.items()]
        for key, entries in {name: table, rest: other}.items():
            if key not in above:
                parts += [f"[{key}]", *(f"{toml(k)} = {toml(v)}" for k, v in entries.items())]
        path.write_text("\n".join(parts), encoding="utf-8")
        tomllib.loads(path.read_text(encoding="utf-8"))
        try:
            found = vars(cli_options.parse([*line.split(), "--config", str(path)], cli.RUNS))
        except ValueError as error:
            refused.append(str(error))
            return
        refused.append("")
        assert all(key in NEEDED and isinstance(value, dict) for key, value in above.items())
        for key, value in above.get(name, table).items():
            option = key.replace("-", "_")
            if option not in given and not {"n-dims", "n_dims"} <= table.keys():
                expected = [value] if key in LISTS and isinstance(value, str) else value
                assert found[option] == expected or expected != expected  # NaN
        for option in found.keys() - {"run", "command", "config"}:
            values = found[option] if option in LISTS else [found[option]]
            assert values in (None, [None]) or {type(v) for v in values} == {TYPES.get(option, str)}

    check()
    assert 0.1 < refused.count("") / len(refused) < 0.9
    assert all(str(path) in text for text in refused if text)


def test_the_plan_of_a_run_of_shards(folder: Path) -> None:
    """The same plan, however it is written, or refused with a ValueError."""
    plan = {"n": 20, "shard_size": 5, "batch_size": 5, "seed": 3, "n_steps": 8, "generator": "ab"}
    file = folder / "plan.json"
    values = st.none() | st.booleans() | WHOLE | st.floats() | st.text(max_size=4)
    documents = st.recursive(
        values,
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner),
        max_leaves=6,
    )
    altered = st.dictionaries(st.sampled_from([*plan, "more"]), documents, max_size=2)
    refused: list[str] = []

    @FUZZ
    @given(
        content=st.one_of(
            st.binary(max_size=60),
            st.builds(lambda d: damaged(json.dumps(plan).encode(), d), DAMAGE),
            documents.map(json.dumps).map(str.encode),
            altered.map(lambda changes: json.dumps({**plan, **changes}, indent=1).encode()),
        )
    )
    @example(content=json.dumps(dict(reversed(plan.items())), indent=4).encode())
    @example(content=json.dumps({**plan, "more": None}).encode())
    @example(content=b"")
    @example(content=b'{"n": ' + b"9" * 5_000 + b"}")
    @example(content=b"\xff\xfe")
    def check(content: bytes) -> None:
        file.write_bytes(content)
        try:
            sharded._check_plan(folder, plan)
        except ValueError as error:
            refused.append(str(error))
        else:
            refused.append("")
            assert json.loads(content) == plan
        assert file.read_bytes() == content

    check()
    assert 1 <= refused.count("") < 0.5 * len(refused)
    assert all("remove the folder" in text for text in refused if text)


def test_documents_that_are_nested_too_deeply(folder: Path) -> None:
    """JSON and TOML that Python cannot read are refused like any other foreign text."""
    deep = "[" * 100_000
    (folder / "plan.json").write_text(deep)
    with pytest.raises(ValueError, match="expected the plan of a run, got something else"):
        sharded._check_plan(folder, {})
    (folder / "deep.toml").write_text(f"a = {deep}")
    with pytest.raises(ValueError, match=r"deep.toml: expected TOML, got maximum recursion"):
        cli_options.parse(["demo", "--config", str(folder / "deep.toml")], cli.RUNS)
    model = folder / "deep.vtdis"
    model.write_bytes(serialize({"a": torch.zeros(1)}, metadata={"openmm_vtdis": deep}))
    with pytest.raises(ValueError, match=r"deep.vtdis: expected an openmm-vtdis archive"):
        DiffusionBoltzmannGenerator.load(model)
    ensemble = folder / "deep.npz"
    WeightedEnsemble(np.zeros((1, 1, 1)), np.zeros(1), np.zeros(1)).save(ensemble)
    with np.load(ensemble) as arrays:
        np.savez(ensemble, **{**arrays, "document": np.frombuffer(deep.encode(), np.uint8)})
    with pytest.raises(ValueError, match="an unreadable document"):
        WeightedEnsemble.load(ensemble)
