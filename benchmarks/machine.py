"""Which machine, commit and versions a result belongs to, in words that name no host."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from datetime import date
from pathlib import Path
from typing import Any

PACKAGES = ("torch", "transformers", "llama-cpp-python", "gguf", "numpy")
TOLD = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "avx_vnni", "amx_int8", "asimddp", "bf16")


def describe() -> dict[str, Any]:
    """Return date, commit (with "+" when the tree differs from it), processor and versions."""
    return {
        "date": date.today().isoformat(),
        "commit": _commit(),
        "processor": _processor(),
        "versions": {name: found for name in PACKAGES if (found := _version(name))}
        | {"g++": _output("g++", "-dumpfullversion"), "python": platform.python_version()},
        "llama.cpp": _llama_cpp(),
    }


def _processor() -> dict[str, Any]:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    values = dict(line.split(":", 1) for line in lines if ":" in line)
    fields = {name.strip(): value.strip() for name, value in values.items()}
    flags = set((fields.get("flags") or fields.get("Features") or "").split())
    return {
        "name": fields.get("model name", platform.machine()),
        "family_and_model": [fields.get("cpu family"), fields.get("model")],
        "cores": os.cpu_count(),
        "instructions": [name for name in TOLD if name in flags],
    }


def _llama_cpp() -> str:
    """Return the instruction sets that llama.cpp was built for, as it prints them itself."""
    try:
        import llama_cpp
    except ImportError:
        return ""
    return str(llama_cpp.llama_print_system_info().decode())


def _commit() -> str:
    root = Path(__file__).parent
    found = _output("git", "-C", str(root), "rev-parse", "--short", "HEAD")
    changed = _output("git", "-C", str(root), "status", "--porcelain", "--", "../aios_compile")
    return found + ("+" if changed else "")


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _output(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""
