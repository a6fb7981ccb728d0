"""What a process of the report is asked, and how it answers: plain values, so that they can travel and be kept."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Job = dict[str, Any]
Emit = Callable[[dict[str, Any]], None]
"""Called with what is known so far; each call replaces the one before."""
