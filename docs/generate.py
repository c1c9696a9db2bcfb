"""Write the generated documents: docs/env.md, and docs/passes.md from the passes' docstrings.

python docs/generate.py
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

from aios_compile import env

DOCS = Path(__file__).resolve().parent


def main() -> None:
    """Write every document whose generator exists."""
    (DOCS / "env.md").write_text(env.markdown())
    print("docs/env.md")
    if importlib.util.find_spec("aios_compile.passes.catalogue") is not None:
        from aios_compile.passes import catalogue

        (DOCS / "passes.md").write_text(catalogue.markdown())
        print("docs/passes.md")


if __name__ == "__main__":
    main()
