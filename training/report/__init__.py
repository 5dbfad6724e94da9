"""Runs in pictures, from what they recorded: ``python -m training.report RUN [RUN …] --out DIR``.

A page that needs no other file, and the same charts as PNGs.
"""
