"""What the documents say is true: their Python runs, their tables are complete, and their links lead somewhere."""

from __future__ import annotations

import inspect
import json
import re
import tomllib
from pathlib import Path

import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from ad_core.api import errors, hooks
from ad_core.api.batch import FIELDS
from ad_core.cli.main import COMMANDS
from ad_core.config import EngineConfig, make_config
from ad_core.native.compiler import SWITCH
from ad_core.registry.controls import ALLOW, DENY, STRICT
from ad_core.runtime.params import SamplingParams

ROOT = Path(__file__).parents[1]
README, USERS, AUTHORS, CONCEPTS = (ROOT / name for name in ("README.md", "docs/users.md", "docs/plugin-authors.md", "docs/concepts.md"))
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("plugins/*/README.md"), ROOT / "benchmarks/README.md"])


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def blocks(page: Path, language: str) -> list[tuple[int, str]]:
    """(line, text) of each fenced block of the language."""
    text = page.read_text()
    found = re.finditer(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    return [(text[: match.start()].count("\n") + 2, match[1]) for match in found]


def rows(page: Path, heading: str) -> dict[str, str]:
    """First and second cell of the rows of the table under a heading; names stand in backquotes."""
    section = page.read_text().split(f"\n## {heading}\n")[1].split("\n## ")[0]
    cells = [line.strip("| \n").split(" | ") for line in section.splitlines() if line.startswith("| `")]
    return {row[0].strip().strip("`"): row[1].strip() for row in cells}


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A working directory with a tiny chat model at path/to/model: random weights, a token a byte."""
    folder = tmp_path / "path/to/model"
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: index for index, letter in enumerate(["</s>", *letters])}, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")
    fast.chat_template = "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    fast.save_pretrained(folder)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "max_position_embeddings": 512}
    config = transformers.LlamaConfig(**sizes, num_attention_heads=2, vocab_size=len(letters) + 1, eos_token_id=0)
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")], ids=name_of)
def test_python_in_the_documents_runs_from_top_to_bottom(page, here, capsys):
    namespace: dict = {"__name__": "document"}
    for line, text in blocks(page, "python"):
        exec(compile("\n" * (line - 1) + text, name_of(page), "exec"), namespace)


def test_configuration_files_in_the_documents_are_valid():
    pages = {page: blocks(page, "toml") for page in PAGES}
    assert pages[USERS]
    for found in pages.values():
        for _, text in found:
            options = tomllib.loads(text)
            if "project" not in options:
                make_config(options)


def shown(value: object) -> str:
    """A default as the tables write it."""
    if isinstance(value, str):
        return f'"{value}"'
    if isinstance(value, bool):
        return str(value).lower()
    return "none" if value is None else "empty" if value in ({}, []) else str(value)


def test_every_option_is_documented_with_its_default():
    expected = {name: shown(field.default) for name, field in EngineConfig.model_fields.items()}
    assert rows(USERS, "Options") == expected


def test_every_sampling_parameter_is_documented_with_its_default():
    expected = {name: "none" if field.default == [] else shown(field.default) for name, field in SamplingParams.model_fields.items()}
    assert rows(USERS, "Sampling") == expected


def test_every_error_is_documented():
    public = {name for name, kind in vars(errors).items() if inspect.isclass(kind) and issubclass(kind, errors.AdError)}
    assert set(rows(USERS, "Errors")) == public - {"AdError"}


def test_every_environment_variable_hook_and_batch_field_is_documented():
    assert set(rows(USERS, "Environment")) == {ALLOW, DENY, STRICT, SWITCH, "CC"}
    assert set(rows(AUTHORS, "Hooks")) == {name for name in vars(hooks) if name.startswith("ad_")}
    assert [field for field in FIELDS if f"`{field}`" not in CONCEPTS.read_text()] == []


def test_every_command_is_documented():
    assert [words.split()[1] for words in rows(README, "Commands")] == list(COMMANDS)


def test_the_table_of_plugins_is_that_of_the_index():
    index = json.loads((ROOT / "ad_core/registry/known_plugins.json").read_text())["plugins"]
    section = README.read_text().split("\n## Plugins\n")[1].split("\n## ")[0]
    table = re.findall(r"^\| `(\w+)` \| `([\w-]+)` \| .* \| (.*) \|$", section, re.MULTILINE)
    assert {name: (distribution, state != "planned") for name, distribution, state in table} == {
        name: (entry["distribution"], entry["available"]) for name, entry in index.items()
    }


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_relative_links_lead_to_files(page):
    targets = re.findall(r"\]\(([^)\s]+)\)", page.read_text())
    local = [target.partition("#")[0] for target in targets if not target.startswith(("http:", "https:", "#"))]
    assert [target for target in local if not (page.parent / target).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_paths_named_in_the_documents_exist(page):
    """`ad_core/api/batch.py` in backquotes, from the root of the repository."""
    named = re.findall(r"`((?:ad_core|docs|tests|examples|tools|benchmarks|plugins)/[\w/]+\.\w+)`", page.read_text())
    assert [name for name in named if not (ROOT / name).exists() and not (page.parent / name).exists()] == []
