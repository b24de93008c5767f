import gc
import os
import sys

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import shapes

shapes.install()

import hypothesis
import pytest
import torch

# CI tries the same examples every time: what it finds, a laptop finds too. A busy machine is no fault of a test's.
_patient = {"deadline": None, "suppress_health_check": [hypothesis.HealthCheck.too_slow]}
hypothesis.settings.register_profile("laptop", **_patient)
hypothesis.settings.register_profile("ci", derandomize=True, **_patient)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "laptop")

_known_modules = 0


def pytest_runtest_setup():
    """What is imported stays: the collector, which every training calls, does not look through it each time."""
    global _known_modules
    if len(sys.modules) > _known_modules:
        _known_modules = len(sys.modules)
        gc.collect()
        gc.freeze()


@pytest.fixture(autouse=True)
def _reproducible():
    shapes.begin()
    torch.manual_seed(0)
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _no_pictures_beside_pages(monkeypatch, request):
    """Every page has its figures; what they are as files is tests/report's to test."""
    if "report" not in request.path.parts:
        monkeypatch.setattr("distalign.report.drawing.Figure.png", b"")


@pytest.fixture(autouse=True)
def _no_waiting_for_the_disk(monkeypatch):
    """A test's files need not outlive a loss of power."""
    monkeypatch.setattr(os, "fsync", lambda _: None)


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory):
    """A tiny language model and its tokenizer, as save_pretrained writes them."""
    import tiny

    return tiny.save(tmp_path_factory.mktemp("tiny") / "model")
