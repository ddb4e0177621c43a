"""Make src/luthier/prepare/trigrams.txt: the most frequent trigrams of letters of each language, most frequent first.

    pip install --no-deps django home-assistant-intents hassil
    python tools/trigrams.py src/luthier/prepare/trigrams.txt

Counted in the translations of Django's messages (BSD) and the commands of Home Assistant's languages (Apache-2.0); none
of the texts is kept. As Cavnar and Trenkle, N-Gram-Based Text Categorization, 1994.
"""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from collections import Counter
from pathlib import Path

LANGUAGES = (
    "en", "de", "fr", "es", "it", "pt", "nl", "sv", "da", "no", "fi", "pl", "cs", "sk", "hu", "ro", "tr", "id", "vi",
    "ca", "hr", "et", "lt", "lv", "af", "sq", "eu", "gl", "is", "sl", "az", "cy", "ga", "eo", "ms", "sw",
    "ru", "uk", "bg", "sr", "mk", "be", "kk", "ky", "mn",
)  # fmt: skip
SAME = {"nb": "no", "nn": "no", "pt-BR": "pt", "pt_BR": "pt", "sr-Latn": "hr", "sr_Latn": "hr", "bs": "hr"}
SLOTS = re.compile(r"%\(\w+\)[sd]|%[sd]|\\[nt]|<[^>]+>|\{[^}]*\}|&\w+;")
KEPT = 300
WORD = re.compile(r"[^\W\d_]+")


def folder(package: str) -> Path:
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        sys.exit(f"{package} is not installed")
    return Path(spec.submodule_search_locations[0])


def messages(root: Path) -> dict[str, list[str]]:
    """Texts by language from the catalogues of a package; English are those that are translated."""
    texts: dict[str, list[str]] = {}
    for path in sorted(root.glob("**/locale/*/LC_MESSAGES/*.po")):
        code = path.parts[-3]
        content = path.read_text(encoding="utf-8")
        for key, name in (("msgstr", SAME.get(code, code)), ("msgid", "en")):
            if key == "msgid" and code != "de":
                continue
            for match in re.finditer(rf'^{key} "(.*)"\n((?:".*"\n)*)', content, re.M):
                text = match[1] + "".join(re.findall(r'"(.*)"', match[2]))
                if "Project-Id" not in text:
                    texts.setdefault(name, []).append(SLOTS.sub(" ", text))
    return texts


def commands() -> dict[str, list[str]]:
    texts: dict[str, list[str]] = {}
    for path in sorted((folder("home_assistant_intents") / "data").glob("*.json")):
        told = json.loads(path.read_text(encoding="utf-8"))
        sentences = [s for intent in told["intents"].values() for block in intent["data"] for s in block["sentences"]]
        code = SAME.get(path.stem, path.stem)
        texts.setdefault(code, []).extend(re.sub(r"\{[^}]*\}|<[^>]*>", " ", s) for s in sentences)
    return texts


def main() -> None:
    catalogues = [(0.75, messages(folder("django"))), (0.25, commands())]  # the latter speak of lamps and timers only
    lines = []
    for code in LANGUAGES:
        counts: Counter[str] = Counter()
        for share, texts in catalogues:
            own: Counter[str] = Counter()
            for text in texts.get(code, []):
                for word in WORD.findall(text.lower()):
                    padded = f"_{word}_"
                    own.update(padded[i : i + 3] for i in range(len(padded) - 2))
            total = sum(own.values()) or 1
            for trigram, count in own.items():
                counts[trigram] += share * count / total  # type: ignore[assignment]
        kept = [trigram for trigram, _ in sorted(counts.items(), key=lambda pair: (-pair[1], pair[0]))[:KEPT]]
        lines.append(f"{code} {' '.join(kept)}\n")
    Path(sys.argv[1]).write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
