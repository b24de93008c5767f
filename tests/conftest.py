import gc
import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from jaxtyping import install_import_hook

# Every shape annotation of the package is checked while the tests run.
install_import_hook("distalign", "type_checker.check")

import hypothesis
import pytest
import torch

# CI tries the same examples every time: what it finds, a laptop finds too.
hypothesis.settings.register_profile("ci", derandomize=True)
if os.environ.get("CI"):
    hypothesis.settings.load_profile("ci")


def pytest_collection_finish():
    """What is imported stays: the collector, which every training calls, does not look through it each time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _reproducible():
    torch.manual_seed(0)
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _no_waiting_for_the_disk(monkeypatch):
    """A test's files need not outlive a loss of power."""
    monkeypatch.setattr(os, "fsync", lambda _: None)


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory):
    """A tiny language model and its tokenizer, as save_pretrained writes them."""
    import tiny

    return tiny.save(tmp_path_factory.mktemp("tiny") / "model")
