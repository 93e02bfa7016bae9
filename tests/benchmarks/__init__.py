"""Benchmarks: run by hand, each a program that says how far the instrument can be trusted."""
