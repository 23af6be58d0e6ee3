"""The benchmark's arithmetic and its table. The timings themselves are no test."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def rooms(monkeypatch):
    """The benchmark's modules, which are scripts beside the packages and not installed."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import report
    from peers import tally

    return report, tally


def samples(tally, case, engine, values, threads=2):
    return [tally.Sample(case, threads, engine, number, value) for number, value in enumerate(values)]


def result(rows, when="2030-01-02T03:04:05+00:00", absent=None, load=0.1):
    return {
        "suite": "cpu",
        "when": when,
        "git": {"commit": "abc", "dirty": False},
        "hw": {"cpu": "A CPU", "ncores": 2, "features": ["avx2"], "load_before": load},
        "sw": {"torch": "2", "transformers": "5", "llama-cpp-python": "absent"},
        "model": {"source": "Tiny.Q4.gguf"},
        "workload": {"rounds": 3, "cold_rounds": 1},
        "agreement": {"of": 16, "tokens": {"hf": [16, 16], "ours": [16, 9]}},
        "ceilings": {"read_gb_s": {"2": {"median": 50.0}}},
        "absent": absent or {},
        "rows": rows,
    }


def test_ratio_is_the_median_of_the_ratios_inside_each_round(rooms):
    _, tally = rooms
    # Medians are 20 and 20, but in the middle round of three ours was twice as fast: 10/20, 40/20, 20/10.
    measured = tally.rows(samples(tally, "decode", "ours", [10, 40, 20]) + samples(tally, "decode", "hf", [20, 20, 10]))
    (peer,) = [row for row in measured if row["engine"] == "hf"]
    assert peer["median"] == 20
    assert peer["ours_speedup"] == {"median": 2.0, "min": 0.5, "max": 2.0, "n": 3}


def test_speedup_above_one_is_better_for_times_too(rooms):
    _, tally = rooms
    measured = tally.rows(samples(tally, "cold", "ours", [2.0]) + samples(tally, "cold", "hf", [6.0]))
    assert measured[1]["ours_speedup"]["median"] == pytest.approx(3.0)


def test_rounds_that_only_one_engine_finished_are_left_out_of_the_ratio(rooms):
    _, tally = rooms
    measured = tally.rows(samples(tally, "decode", "ours", [10]) + samples(tally, "decode", "hf", [5, 1000]))
    assert measured[1]["ours_speedup"] == {"median": 2.0, "min": 2.0, "max": 2.0, "n": 1}


def test_targets_pass_miss_or_stay_unmeasured(rooms):
    _, tally = rooms
    decode = samples(tally, "decode", "ours", [12]) + samples(tally, "decode", "hf", [10])
    measured = tally.rows(decode + samples(tally, "cold", "ours", [16.0]))
    verdicts = [
        tally.judge(target, measured)["passed"]
        for target in (
            tally.Target("decode", 2, 1.2, "hf"),
            tally.Target("decode", 2, 1.3, "hf"),
            tally.Target("decode", 1, 1.1, "hf"),
            tally.Target("cold", 2, 15.0),
        )
    ]
    assert verdicts == [True, False, None, False]


def test_agreement_counts_leading_tokens_against_the_first_engine(rooms):
    _, tally = rooms
    counted = tally.agreement({"hf": [[1, 2, 3], [4, 5, 6]], "ours": [[1, 2, 9], [7, 5, 6]]})
    assert counted == {"hf": [3, 3], "ours": [2, 0]}


def test_readme_keeps_everything_outside_the_markers(rooms, tmp_path):
    report, tally = rooms
    readme = tmp_path / "README.md"
    start, end = report.markers("cpu")
    readme.write_text(f"# top\n\n{start}\nstale table\n{end}\n\nbottom\n")
    rows = tally.rows(samples(tally, "decode", "ours", [12, 14, 13]) + samples(tally, "decode", "hf", [10, 10, 10]))
    for _ in range(2):  # a second writing finds its markers again
        report.update_readme(result(rows, absent={"llama.cpp": "cannot be imported: No module named 'llama_cpp'"}), readme)
    text = readme.read_text()
    assert text.startswith("# top\n\n" + start)
    assert text.endswith(end + "\n\nbottom\n")
    assert "stale table" not in text
    assert "| 2 | 13.0 (12.0 to 14.0) | 10.0 (10.0 to 10.0) | absent | 1.30 (1.20 to 1.40) |  |" in text
    assert "llama.cpp is absent (cannot be imported: No module named 'llama_cpp')" in text
    assert "at least the first 9 of 16" in text


@pytest.mark.parametrize("text", ["no markers", "<!-- benchmark cpu:end --> <!-- benchmark cpu:start -->"])
def test_readme_without_a_place_for_the_table_is_refused_and_left_alone(rooms, tmp_path, text):
    report, _ = rooms
    readme = tmp_path / "README.md"
    readme.write_text(text)
    with pytest.raises(report.NoPlace, match="benchmark cpu:start"):
        report.update_readme(result([]), readme)
    assert readme.read_text() == text


def test_a_run_on_a_busy_machine_says_so(rooms):
    report, _ = rooms
    assert "not to be trusted" not in report.cpu_table(result([], load=0.9))
    assert "load 3.0" in report.cpu_table(result([], load=3.0))


def test_newest_is_the_latest_cpu_result(rooms, tmp_path):
    report, _ = rooms
    (tmp_path / "z-first.json").write_text(json.dumps(result([], when="2030-01-01T00:00:00+00:00")))
    (tmp_path / "a-last.json").write_text(json.dumps(result([], when="2030-02-01T00:00:00+00:00")))
    (tmp_path / "gpu.json").write_text(json.dumps({"suite": "device", "when": "2031-01-01T00:00:00+00:00"}))
    assert report.newest(tmp_path, "cpu")["when"].startswith("2030-02-01")
    with pytest.raises(report.NoResult, match=r"benchmarks/mixers\.py"):
        report.newest(tmp_path, "mixers")


def test_mixers_show_the_share_of_what_their_linear_layers_alone_would_allow(rooms):
    report, tally = rooms
    measured = tally.rows(samples(tally, "decode", "ours", [90.0]) + samples(tally, "decode", "hf", [30.0]))
    measured[0]["share_of_linears"] = 1.5
    model = {
        "model_type": "mamba2",
        "parameters": 129e6,
        "rows": measured,
        "absent": {},
        "ceilings": {"linears_tokens_s": {"median": 60.0}},
    }
    shown = report.mixers_table(result([]) | {"workload": {"threads": 2, "rounds": 1}, "models": {"small": model}})
    assert "| small: 129 M, `mamba2` | decode, one request, tokens/s | 90.0 | 30.0 | 3.00 |" in shown
    assert "small 60.0 tokens/s, of which ad-core's decode is 150%" in shown


def test_every_table_of_the_readme_has_its_place_and_a_result(rooms):
    report, _ = rooms
    text = (BENCHMARKS.parent / "README.md").read_text()
    for suite, table in report.TABLES.items():
        start, end = report.markers(suite)
        assert text.split(start)[1].split(end)[0].strip() == table(report.newest(BENCHMARKS / "results", suite)).strip()


def test_an_engine_that_cannot_be_imported_says_so_and_why(tmp_path):
    """The real worker, with the library hidden: the same answer as where it is not installed."""
    (tmp_path / "llama_cpp").mkdir()
    (tmp_path / "llama_cpp" / "__init__.py").write_text("raise ImportError('built for another machine')\n")
    command = [sys.executable, "-m", "peers.llama_cpp", "--directory", "x", "--gguf", "y", "--threads", "1"]
    command += ["--max-requests", "1", "--longest", "8", "--longest-in-batch", "8"]
    done = subprocess.run(command, cwd=BENCHMARKS, env={"PYTHONPATH": str(tmp_path)}, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == {"absent": "cannot be imported: built for another machine"}
