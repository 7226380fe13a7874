"""MovieLens-1M from its publisher: fetched, verified, and stored as a seqrec file."""

from __future__ import annotations

import hashlib
import http.client
import tempfile
import urllib.request
import zipfile
import zlib
from pathlib import Path

from fisherkern.data.dataset import SequenceDataset
from fisherkern.data.reading import read_file, write_seqrec
from fisherkern.errors import InputError
from fisherkern.files import atomic_path
from fisherkern.progress import progress_bar

ML_1M_URL = "https://files.grouplens.org/datasets/movielens/ml-1m.zip"
ML_1M_MD5 = "c4d9eecfca2ab87c1945afe126590906"
_PIECE_BYTES = 1 << 18
_TIMEOUT_SECONDS = 30


def download_ml_1m(folder: Path, *, url: str = ML_1M_URL, md5: str = ML_1M_MD5) -> Path:
    """Fetch MovieLens-1M into `folder`: ml-1m.txt, whose path is returned, and its attributes.

    Movies are renumbered 1..V by first appearance in ratings.dat, as in the copies that
    papers on sequential recommendation share. The attributes are genres, numbered from 1
    by first appearance in movies.dat. Users keep their numbers.

    Raises InputError when the archive cannot be had, its MD5 differs from `md5`, or it
    lacks a file; nothing is left behind then. Source: F. M. Harper and J. A. Konstan,
    The MovieLens Datasets, ACM TiiS 5(4), 2015.
    """
    target = folder / "ml-1m.txt"
    with tempfile.TemporaryDirectory(prefix="fisherkern-") as scratch:
        archive = Path(scratch) / "ml-1m.zip"
        fetch(url, archive, md5=md5)
        ratings, movies = Path(scratch) / "ratings.dat", Path(scratch) / "movies.dat"
        try:
            with zipfile.ZipFile(archive) as members:
                ratings.write_bytes(members.read("ml-1m/ratings.dat"))
                movies.write_bytes(members.read("ml-1m/movies.dat"))
        except (KeyError, OSError, zipfile.BadZipFile, zlib.error) as error:
            raise InputError(f"{url}: not the MovieLens-1M archive: {error}") from error
        data = read_file(ratings)
        number = {item: str(code) for code, item in enumerate(data.item_ids, start=1)}
        genres = _read_genres(movies)
        renumbered = SequenceDataset(
            "ml-1m",
            data.items,
            data.offsets,
            list(number.values()),
            data.user_ids,
            {number[item]: values for item, values in genres.items() if item in number},
        )
        write_seqrec(renumbered, target)
    return target


def fetch(url: str, target: Path, *, md5: str) -> None:
    """Download `url` to `target`, with a progress bar, whole and verified or not at all.

    Raises InputError when the transfer fails or the MD5 of what came is not `md5`.
    """
    digest = hashlib.md5(usedforsecurity=False)
    with atomic_path(target) as temporary, temporary.open("wb") as file:
        try:
            # Read errors are the network's; atomic_path would call them errors of writing.
            with urllib.request.urlopen(url, timeout=_TIMEOUT_SECONDS) as response:
                size = int(response.headers.get("Content-Length") or 0) or None
                with progress_bar(total=size, unit="B", unit_scale=True, desc=target.name) as bar:
                    while piece := response.read(_PIECE_BYTES):
                        digest.update(piece)
                        file.write(piece)
                        bar.update(len(piece))
        except (OSError, http.client.HTTPException) as error:
            raise InputError(
                f"{url}: could not be downloaded: {error}; "
                "a copy in the folder FISHERKERN_DATA would be used instead"
            ) from error
        if digest.hexdigest() != md5:
            raise InputError(
                f"{url}: the download's MD5 is {digest.hexdigest()}, not {md5}; nothing was kept"
            )


def _read_genres(movies: Path) -> dict[str, list[int]]:
    """Movie id -> genre numbers, from `id::title::genre|genre` lines in Latin-1."""
    numbers: dict[str, int] = {}
    genres: dict[str, list[int]] = {}
    for line, text in enumerate(movies.read_text(encoding="latin-1").splitlines(), start=1):
        fields = text.split("::")
        if len(fields) != 3:
            raise InputError(f"{movies.name}:{line}: not of the form 'id::title::genres'")
        genres[fields[0]] = [
            numbers.setdefault(genre, len(numbers) + 1) for genre in fields[2].split("|")
        ]
    return genres
