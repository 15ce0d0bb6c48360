"""A tool that rewrites programs for Lightning into programs for leyden: ``python -m leyden.compat.migrate PATH``.

`rewriting` does one text; `files` and `notebooks` are where texts come from; the rest is what `rewriting` knows of names,
arguments and hooks. It needs libcst (``pip install 'leyden[migrate]'``). Nothing of the code that it reads is imported or run.
"""
