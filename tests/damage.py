"""Damage to files, of every kind that a disk or a careless hand does."""

from __future__ import annotations

from pathlib import Path

DAMAGES = ["missing", "emptied", "truncated", "flipped", "zeroed", "appended"]


def damaged(path: Path, how: str) -> None:
    content = path.read_bytes()
    match how:
        case "missing":
            path.unlink()
        case "emptied":
            path.write_bytes(b"")
        case "truncated":
            path.write_bytes(content[:-5])
        case "flipped":
            middle = len(content) // 2
            path.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
        case "zeroed":
            path.write_bytes(bytes(len(content)))
        case "appended":
            path.write_bytes(content + b"\0")


def swapped(one: Path, other: Path) -> None:
    content = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(content)
