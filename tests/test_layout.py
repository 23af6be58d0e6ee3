"""The shape of the repository: who may import whom, what must stay light, and what must agree with what."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import ad_core

ROOT = Path(__file__).parents[1]
CORE = sorted((ROOT / "ad_core").rglob("*.py"))
PLUGINS = sorted(path.parent for path in ROOT.glob("plugins/*/pyproject.toml"))
ROOMS = sorted(path for path in (ROOT / "ad_core").iterdir() if path.is_dir() and any(path.glob("*.py")))

MODELS = (
    "llama mistral mixtral ministral gemma qwen phi3 gpt2 gptj gptneox gpt_oss falcon granite olmo cohere smollm "
    "deepseek kimi minimax mamba bamba jamba zamba nemotron rwkv xlstm lfm2 retnet deltanet hgrn gla kda"
).split()
NAME = re.compile(rf"(?<![a-z])(?:{'|'.join(MODELS)})(?![a-z])", re.IGNORECASE)
PLUGIN = re.compile(r"(?<![a-z_])ad_(?:attention|conv|mamba|deltanet|moe|fusion|sharding|quant|serve)(?![a-z_])")


def project(folder: Path) -> dict:
    return tomllib.loads((folder / "pyproject.toml").read_text())["project"]


@pytest.mark.parametrize("path", CORE, ids=lambda path: str(path.relative_to(ROOT)))
def test_the_core_names_no_model_no_mixer_and_no_plugin(path):
    lines = enumerate(path.read_text().splitlines(), 1)
    named = [f"{path.relative_to(ROOT)}:{number}: {line.strip()}" for number, line in lines if NAME.search(line) or PLUGIN.search(line)]
    assert not named, "\n".join(named)


def imported(code: str) -> set[str]:
    """Top-level packages that are loaded after running `code` in a fresh interpreter."""
    program = f"{code}\nimport sys\nprint(*{{name.partition('.')[0] for name in sys.modules}})"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


HEAVY = {"torch", "transformers", "triton", "numpy", "safetensors"}


def modules_of(*rooms: str) -> list[str]:
    paths = [path for path in CORE if path.relative_to(ROOT / "ad_core").parts[0].removesuffix(".py") in rooms]
    return [".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for path in paths]


def test_api_plan_config_registry_and_cli_import_no_torch():
    modules = modules_of("__init__", "api", "plan", "config", "registry", "cli")
    assert {"ad_core", "ad_core.api.hooks", "ad_core.plan", "ad_core.config", "ad_core.registry.arbitrate"} <= set(modules)
    assert not imported("import " + ", ".join(modules)) & HEAVY


@pytest.mark.parametrize("folder", PLUGINS, ids=lambda folder: folder.name)
def test_what_the_core_asks_a_plugin_first_imports_no_torch(folder):
    for entries in project(folder)["entry-points"].values():
        for module in entries.values():
            assert not imported(f"import {module}") & HEAVY


@pytest.mark.parametrize("room", ROOMS, ids=lambda room: room.name)
def test_every_room_of_the_core_is_a_package_that_says_what_it_is(room):
    start = room / "__init__.py"
    assert start.exists(), f"{room.name} has no __init__.py, so import-linter cannot see it"
    assert ast.get_docstring(ast.parse(start.read_text())), f"{start} has no docstring"


@pytest.mark.parametrize("folder", PLUGINS, ids=lambda folder: folder.name)
def test_a_plugin_is_a_distribution_of_its_own(folder):
    about = project(folder)
    package = folder / "src" / folder.name
    assert (package / "py.typed").exists()
    assert ast.get_docstring(ast.parse((package / "__init__.py").read_text()))
    assert (folder / "README.md").exists()
    assert (folder / "LICENSE").read_text() == (ROOT / "LICENSE").read_text()
    assert about["version"] == ad_core.__version__
    (core,) = [need for text in about["dependencies"] if (need := Requirement(text)).name == "ad-core"]
    assert core.specifier.contains(ad_core.__version__)
    assert not core.specifier.contains("1.0")


def test_versions_extras_and_lists_of_packages_agree():
    core = project(ROOT)
    assert core["version"] == ad_core.__version__
    names = {folder.name for folder in PLUGINS}
    distributions = {project(folder)["name"] for folder in PLUGINS}
    extras = core["optional-dependencies"]
    offered = {Requirement(text).name for name, needs in extras.items() if name not in ("all", "bench", "dev") for text in needs}
    assert offered == distributions
    (everything,) = map(Requirement, extras["all"])
    assert everything.extras == {name for name in extras if name not in ("all", "bench", "dev")}
    lists = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]
    assert set(lists["importlinter"]["root_packages"]) == names | {"ad_core"}
    for text in ((ROOT / "Makefile").read_text(), (ROOT / "requirements-dev.txt").read_text()):
        assert all(f"plugins/{name}" in text for name in names)


def test_the_slow_build_of_a_peer_is_never_installed_by_test_or_ci():
    for path in ("Makefile", "requirements-dev.txt", ".ci/run"):
        text = (ROOT / path).read_text()
        assert "llama-cpp" not in text
        assert "[bench]" not in text


def test_the_contract_is_what_was_written_down():
    done = subprocess.run([sys.executable, ROOT / "tools" / "api_snapshot.py", "--check"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{done.stdout}\nif this is meant: python tools/api_snapshot.py, and mind API_VERSION\n{done.stderr}"


VIOLATIONS = {
    "Floors": ("ad_core/cache/spec.py", "import ad_core.runtime"),
    "The runtime knows": ("ad_core/runtime/__init__.py", "import ad_core.graph"),
    "The core imports no plugin": ("ad_core/plan.py", "def late():\n    import ad_quant"),
    "Plugins do not import each other": ("plugins/ad_quant/src/ad_quant/plugin.py", "import ad_attention"),
    "Plugins import the contract": ("plugins/ad_attention/src/ad_attention/plugin.py", "import ad_core.cache"),
    "The test kit": ("ad_core/cache/batch.py", "import ad_core.testing"),
    "What answers": ("ad_core/registry/records.py", "import torch"),
}


def lint(folder: Path) -> str:
    """What import-linter says of the packages under `folder`."""
    sources = [folder, *sorted((folder / "plugins").glob("*/src"))]
    program = f"import sys; sys.path[:0] = {list(map(str, sources))!r}; from importlinter.cli import lint_imports; sys.exit(lint_imports())"
    done = subprocess.run([sys.executable, "-c", program], cwd=folder, capture_output=True, text=True, check=False)
    return done.stdout + done.stderr


def test_the_import_contracts_are_kept_and_each_catches_a_violation(tmp_path):
    assert re.search(r"Contracts: (\d+) kept, 0 broken", lint(ROOT)), lint(ROOT)
    for name in ("ad_core", "plugins", "pyproject.toml"):
        source = ROOT / name
        (shutil.copytree if source.is_dir() else shutil.copy)(source, tmp_path / name)
    for path, line in VIOLATIONS.values():
        with (tmp_path / path).open("a") as file:
            file.write(f"\n{line}\n")
    said = lint(tmp_path)
    kept = [name for name in VIOLATIONS if not re.search(rf"{name}.*BROKEN", said)]
    assert not kept, f"{kept}\n{said}"
