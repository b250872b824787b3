"""The suites of ``benchmarks/run.py``. Each has a function ``run_suite(settings, header, probe) -> SuiteResult``."""
