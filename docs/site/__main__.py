"""Builds the documentation site; a dead link or a page that the navigation lacks is an error.

python -m docs.site [FOLDER]    # default: build/site
"""

from __future__ import annotations

import sys
from pathlib import Path

from docs.site.build import build

build(Path(sys.argv[1] if len(sys.argv) > 1 else "build/site"))
