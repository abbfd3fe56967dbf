"""Attention over the paged cache: interchangeable backends behind `base.AttentionBackend`, chosen by `select`."""

from quire.attention.base import AttentionBackend, AttentionBatch, AttentionSpec, Plan
from quire.attention.select import select_backend

__all__ = ["AttentionBackend", "AttentionBatch", "AttentionSpec", "Plan", "select_backend"]
