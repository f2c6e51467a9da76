"""Benchmarks of rimet against a copy of the same bytes, torch, and AIMET.

``python -m benchmarks`` (or ``make bench``) prints one table and writes JSON to
``benchmarks/results``. A section is a module of this package with a function
``rows(size: Size) -> Iterator[Row]``, named in ``benchmarks.run.SECTIONS``.
"""
