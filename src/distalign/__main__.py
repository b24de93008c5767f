"""`python -m distalign` is the command `distalign`."""

from __future__ import annotations

from distalign.cli import main

if __name__ == "__main__":
    main()
