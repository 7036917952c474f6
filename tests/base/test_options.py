"""Options as values."""

from sepconvert.base.options import Budget


def test_budget_defaults():
    assert Budget().or_default(labelled=True, timed=False) == Budget(max_drop=1.0)
    assert Budget(rank=2).or_default(labelled=False, timed=False) == Budget(rank=2)
