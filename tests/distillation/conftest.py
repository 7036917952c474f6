import pytest
import torch


@pytest.fixture(autouse=True)
def one_thread():
    """Sums in the same order as in the worker's processes."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
