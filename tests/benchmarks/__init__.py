"""Benchmarks to run by hand: how far the instrument can be trusted."""
