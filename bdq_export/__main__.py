"""`python -m bdq_export` is `bdq`; torchrun starts it so."""

from __future__ import annotations

from bdq_export.cli import main

if __name__ == "__main__":
    main()
