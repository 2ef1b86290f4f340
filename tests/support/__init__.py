"""Data, models and processes that tests share; `support` is importable because tests/ is on the path."""
