"""An option that would have no effect, or not the one that was meant, is an error that says which."""

from __future__ import annotations

from typing import Literal

import pytest
import torch
from pydantic import BaseModel, ConfigDict

from ad_core.api import PluginInfo
from ad_core.api.errors import ConfigError
from ad_core.config import EngineConfig, load_config, make_config, parse_bytes, plugin_options


@pytest.mark.parametrize(
    ("text", "expected"),
    [(1024, 1024), ("1024", 1024), ("2GiB", 2 << 30), ("1.5 KiB", 1536), ("3 MB", 3_000_000), ("1tib", 1 << 40), ("7b", 7), ("2kB", 2000)],
)
def test_amounts_of_memory(text, expected):
    assert parse_bytes(text) == expected


@pytest.mark.parametrize("text", ["", "GiB", "2 lemons", "-1", "1e9", 0, "0MiB", True, 1.5, None])
def test_what_is_no_amount_of_memory(text):
    with pytest.raises(ConfigError):
        parse_bytes(text)


@pytest.mark.parametrize(
    ("options", "message", "hint"),
    [
        ({"page_sise": 16}, "unknown option 'page_sise'", "did you mean 'page_size'?"),
        ({"zzz": 16}, "unknown option 'zzz'", "known are: allow_plugins"),
        ({"page_size": 0}, "page_size: Input should be greater than 0, got 0", None),
        ({"page_size": "16"}, "page_size: Input should be a valid integer, got '16'", None),
        ({"max_requests": True}, "max_requests: Input should be a valid integer, got True", None),
        ({"dtype": "float8"}, "dtype: Input should be 'auto', 'float32', 'bfloat16' or 'float16', got 'float8'", None),
        ({"memory": "2 lemons"}, "memory: '2 lemons' is not an amount of memory", None),
        ({"checkpoint_interval": 100}, "checkpoint_interval 100 is not a multiple of page_size 16", None),
        ({"kernels": {"a::b": 3}}, "kernels.a::b: Input should be a valid string", None),
        ({"plugins": {"attention": 3}}, "plugins.attention: Input should be a valid dictionary", None),
    ],
)
def test_a_wrong_option_is_named(options, message, hint):
    with pytest.raises(ConfigError) as caught:
        make_config(options)
    assert caught.value.what.startswith(message)
    assert (caught.value.hint or "").startswith(hint or "")


def test_all_wrong_options_are_named_at_once():
    with pytest.raises(ConfigError) as caught:
        make_config({"page_size": 0, "thread": 2})
    assert "2 options" in caught.value.what
    assert "page_size" in caught.value.what
    assert "'thread'" in caught.value.what
    assert "'threads'" in caught.value.hint


def test_torchs_own_words_are_understood():
    config = make_config({"dtype": torch.bfloat16, "device": torch.device("cuda", 1), "memory": "2GiB"})
    assert (config.dtype, config.device, config.memory) == ("bfloat16", "cuda:1", 2 << 30)


@pytest.mark.parametrize(("page_size", "interval"), [(16, 256), (1, 256), (7, 259), (512, 512)])
def test_the_checkpoint_interval_defaults_to_whole_pages(page_size, interval):
    assert make_config({"page_size": page_size}).checkpoint_interval == interval


def test_a_configuration_cannot_be_changed_afterwards():
    config = EngineConfig()
    with pytest.raises(Exception, match="frozen"):
        config.page_size = 3


def test_a_file_and_flags_are_merged_and_flags_win(tmp_path):
    path = tmp_path / "ad.toml"
    path.write_text('page_size = 8\nthreads = 2\n[kernels]\n"a::b" = "x"\n[plugins.attention]\nwide = true\n')
    config = load_config(path, {"page_size": 4, "threads": None, "kernels": {"c::d": "y"}})
    assert (config.page_size, config.threads) == (4, 2)
    assert config.kernels == {"a::b": "x", "c::d": "y"}
    assert config.plugins == {"attention": {"wide": True}}


def test_no_file_and_no_flags_is_the_default():
    assert load_config() == EngineConfig()


def test_an_error_in_the_file_names_the_file(tmp_path):
    path = tmp_path / "ad.toml"
    path.write_text("page_sise = 8\n")
    with pytest.raises(ConfigError, match="did you mean 'page_size'") as caught:
        load_config(path, {"threads": 2})
    assert caught.value.where == str(path)
    path.write_text("page_size = 8\n")
    with pytest.raises(ConfigError) as caught:
        load_config(path, {"thread": 2})
    assert caught.value.where == "the options"


def test_a_flag_may_mend_what_the_file_alone_could_not_say(tmp_path):
    path = tmp_path / "ad.toml"
    path.write_text("checkpoint_interval = 100\n")
    assert load_config(path, {"page_size": 10}).checkpoint_interval == 100


@pytest.mark.parametrize(
    ("text", "message"), [(None, "cannot be read"), ("page_size = = 3", "is not TOML"), ("page_size = '\x00'", "is not TOML")]
)
def test_a_file_that_cannot_be_used(tmp_path, text, message):
    path = tmp_path / "ad.toml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigError, match=message) as caught:
        load_config(path)
    assert caught.value.where == str(path)


class Inner(BaseModel):
    model_config = ConfigDict(extra="forbid")
    depth: int = 1


class Options(BaseModel):
    model_config = ConfigDict(extra="forbid")
    mode: Literal["fast", "safe"] = "safe"
    inner: Inner = Inner()


TOY, PLAIN = PluginInfo("toy", (1, 0), config=Options), PluginInfo("plain", (1, 0))


def test_each_plugins_options_are_filled_in_by_its_own_model():
    assert plugin_options({"toy": {"mode": "fast"}}, [TOY, PLAIN]) == {"toy": {"mode": "fast", "inner": {"depth": 1}}, "plain": {}}
    assert plugin_options({}, [TOY])["toy"]["mode"] == "safe"


@pytest.mark.parametrize(
    ("sections", "message", "hint"),
    [
        ({"toy": {"mod": "fast"}}, "unknown option 'plugins.toy.mod'", "did you mean 'mode'?"),
        ({"toy": {"inner": {"dept": 2}}}, "unknown option 'plugins.toy.inner.dept'", "did you mean 'depth'?"),
        ({"toy": {"mode": "quick"}}, "plugins.toy.mode: Input should be 'fast' or 'safe', got 'quick'", ""),
        ({"tyo": {}}, "there are options for the plugin 'tyo', which is not loaded", "did you mean 'toy'?"),
        ({"plain": {"x": 1}}, "the plugin 'plain' takes no options", ""),
    ],
)
def test_a_wrong_option_of_a_plugin_is_named_with_its_full_path(sections, message, hint):
    with pytest.raises(ConfigError) as caught:
        plugin_options(sections, [TOY, PLAIN])
    assert caught.value.what.startswith(message)
    assert (caught.value.hint or "").startswith(hint)
