"""Tiny models and process runners, for the installation check, the benchmark and the test suite."""
