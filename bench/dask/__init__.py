"""Benchmarks of dask graphs on a cluster."""
