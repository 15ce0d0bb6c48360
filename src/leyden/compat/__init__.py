"""Code and checkpoints that were written for others: the API of 2020, Lightning's files, a tool that rewrites programs.

Nothing here is loaded before it is used. The engine reaches it at few places, which docs/architecture.md lists.
"""
