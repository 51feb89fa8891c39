"""Benchmarks with published protocols: their files, their scores, their report."""
