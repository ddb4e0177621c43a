"""Write the running Python's documentation as rows of plain text, of about 2,000 characters each.

    python examples/python_docs.py python-docs.jsonl

The text is `pydoc_data.topics` of the standard library (PSF licence), so it differs a little between versions.
"""

import json
import sys
from pathlib import Path
from pydoc_data.topics import topics

SIZE = 2000  # characters, about: a row ends with the paragraph that reaches it


def rows() -> list[str]:
    """All topics by their names, cut at blank lines."""
    found: list[str] = []
    for name in sorted(topics):
        waiting = ""
        for paragraph in topics[name].strip().split("\n\n"):
            waiting += paragraph + "\n\n"
            if len(waiting) >= SIZE:
                found.append(waiting)
                waiting = ""
        found += [waiting] if waiting else []
    return found


if __name__ == "__main__":
    written = rows()
    Path(sys.argv[1]).write_text("".join(json.dumps({"text": row}) + "\n" for row in written))
    print(f"{sys.argv[1]}: {len(written)} rows, {sum(map(len, written)):,} characters")
