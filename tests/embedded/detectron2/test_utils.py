"""Paths, seeds, loggers and dotted names."""

import json
import logging
import random

import detectron2
import numpy as np
import pytest
import torch
from detectron2.utils import logger as log
from detectron2.utils.collect_env import collect_env_info
from detectron2.utils.env import seed_all_rng
from detectron2.utils.file_io import PathManager

own_paths = pytest.mark.skipif(
    "embedded" not in detectron2.__file__, reason="the installed detectron2 downloads"
)
NAME = "ImageNetPretrained/torchvision/R-50.pkl"


@own_paths
class TestPaths:
    def test_weights_folder(self, tmp_path, monkeypatch):
        monkeypatch.setenv("DETECTRON2_WEIGHTS", str(tmp_path))
        file = tmp_path / NAME
        file.parent.mkdir(parents=True)
        file.write_bytes(b"abc")
        url = "detectron2://" + NAME
        assert PathManager.get_local_path(url) == str(file)
        assert PathManager.isfile(url)
        with PathManager.open(url, "rb") as opened:
            assert opened.read() == b"abc"

    def test_place_where_the_real_package_downloads_to(self, tmp_path, monkeypatch):
        monkeypatch.delenv("DETECTRON2_WEIGHTS", raising=False)
        monkeypatch.setenv("FVCORE_CACHE", str(tmp_path))
        file = tmp_path / "detectron2" / NAME
        file.parent.mkdir(parents=True)
        file.write_bytes(b"abc")
        for prefix in ("detectron2://", "https://dl.fbaipublicfiles.com/detectron2/"):
            assert PathManager.get_local_path(prefix + NAME) == str(file)

    @pytest.mark.parametrize("prefix", ["detectron2://", "https://example.org/"])
    def test_missing_file_is_one_helpful_line(self, tmp_path, monkeypatch, prefix):
        monkeypatch.delenv("DETECTRON2_WEIGHTS", raising=False)
        monkeypatch.setenv("FVCORE_CACHE", str(tmp_path))
        url = prefix + "x/y.pkl"
        assert not PathManager.exists(url)
        for use in (PathManager.get_local_path, PathManager.open):
            with pytest.raises(FileNotFoundError) as info:
                use(url)
            message = str(info.value)
            assert url in message
            assert str(tmp_path) in message
            assert "download" in message
            assert "\n" not in message
        if prefix == "detectron2://":
            assert "DETECTRON2_WEIGHTS" in message

    def test_urls_cannot_be_written(self):
        with pytest.raises(ValueError, match="read-only"):
            PathManager.open("detectron2://x.pkl", "w")


def test_seeds_of_all_generators(reference_dir):
    recorded = json.loads((reference_dir / "detrex" / "runtime.json").read_text())["misc"]
    recorded = recorded["seed_all_rng"]
    seed_all_rng(recorded["seed"])
    assert np.random.rand(2).tolist() == recorded["numpy_rand"]
    assert torch.rand(2).tolist() == pytest.approx(recorded["torch_rand"], rel=1e-12)
    assert random.random() == recorded["python_random"]


def test_seed_none_draws_a_new_one():
    draws = set()
    for _ in range(3):
        seed_all_rng(None)
        draws.add(random.random())
    assert len(draws) == 3


class TestSetupLogger:
    def test_main_process_writes_terminal_and_file(self, tmp_path, capsys):
        logger = log.setup_logger(str(tmp_path), name="house", abbrev_name="h")
        assert log.setup_logger(str(tmp_path), name="house", abbrev_name="h") is logger
        logging.getLogger("house.room").info("hello")
        logger.warning("careful")
        terminal = capsys.readouterr().out
        assert terminal.count("hello") == 1
        assert "h.room" in terminal
        assert "WARNING" in terminal
        text = (tmp_path / "log.txt").read_text()
        assert text.count("\n") == 2
        assert all(part in text.splitlines()[0] for part in ("INFO", ".room", "hello"))

    def test_other_ranks_write_their_own_file_only(self, tmp_path, capsys):
        logger = log.setup_logger(str(tmp_path / "run.log"), distributed_rank=2, name="house2")
        logger.error("rank two")
        assert capsys.readouterr().out == ""
        assert "rank two" in (tmp_path / "run.log.rank2").read_text()

    def test_two_loggers_share_a_file(self, tmp_path):
        for name in ("house3", "house4"):
            log.setup_logger(str(tmp_path), name=name, configure_stdout=False).info("from %s", name)
        text = (tmp_path / "log.txt").read_text()
        assert "from house3" in text
        assert "from house4" in text


class TestRateLimits:
    @pytest.fixture(autouse=True)
    def _all_levels(self, caplog):
        caplog.set_level(logging.INFO)

    def test_first_n(self, caplog):
        for i in range(5):
            log.log_first_n(logging.INFO, f"a{i}", n=2, name="x")
        assert caplog.messages == ["a0", "a1"]

    def test_first_n_by_message(self, caplog):
        for i in range(4):
            log.log_first_n(logging.INFO, f"b{i % 2}", name="x", key="message")
        log.log_first_n(logging.INFO, "b0", name="x", key="message")
        log.log_first_n(logging.INFO, "b0", name="x", key=("caller", "message"))
        assert caplog.messages == ["b0", "b1", "b0"]

    def test_every_n(self, caplog):
        for i in range(7):
            log.log_every_n(logging.INFO, f"c{i}", n=3, name="x")
        assert caplog.messages == ["c0", "c3", "c6"]

    def test_every_n_seconds(self, caplog):
        for i in range(3):
            log.log_every_n_seconds(logging.INFO, f"d{i}", n=60, name="x")
        assert caplog.messages == ["d0"]

    def test_logger_is_the_callers_module(self, caplog):
        log.log_first_n(logging.INFO, "who")
        assert caplog.records[-1].name == __name__


def test_small_table():
    table = log.create_small_table({"AP": 12.34567, "name": "x"})
    assert [cell.strip() for cell in table.splitlines()[0].strip("|").split("|")] == ["AP", "name"]
    assert "12.346" in table.splitlines()[2]


def test_environment_report_names_versions():
    report = collect_env_info()
    assert torch.__version__ in report
    assert np.__version__ in report
