"""What test files share: memory that starts as NaN, thread counts that are put back, skips with a reason."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch

# Before the first import: an assertion in there then explains itself as one in a test does.
pytest.register_assert_rewrite("ops_cases")


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("cuda") and not torch.cuda.is_available():
        pytest.skip(f"needs a CUDA device, torch {torch.__version__} finds none")


@pytest.fixture
def nan_filled_memory() -> Iterator[None]:
    """Tensors come filled with NaN instead of whatever the memory holds, so an element that nobody writes shows."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all(), "torch no longer fills uninitialised memory in deterministic mode"
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def set_threads() -> Iterator[Callable[[int], None]]:
    """``torch.set_num_threads`` that is undone after the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def one_thread(set_threads: Callable[[int], None]) -> None:
    """For tests of small tensors, where a second thread that waits for a busy core costs more than it brings."""
    set_threads(1)
