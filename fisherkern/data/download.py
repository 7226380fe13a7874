"""MovieLens-1M from its publisher: fetched, verified, and stored as a seqrec file."""

from __future__ import annotations

import sys
import tempfile
import zipfile
import zlib
from pathlib import Path

from fisherkern.data.dataset import SequenceDataset
from fisherkern.data.reading import read_file, write_seqrec
from fisherkern.errors import InputError

ML_1M_URL = "https://files.grouplens.org/datasets/movielens/ml-1m.zip"
ML_1M_MD5 = "c4d9eecfca2ab87c1945afe126590906"


def download_ml_1m(folder: Path, *, url: str = ML_1M_URL, md5: str = ML_1M_MD5) -> Path:
    """Fetch MovieLens-1M into `folder`: ml-1m.txt and its attributes.

    Movies are renumbered 1..V by first appearance in ratings.dat, as in the copies that papers on
    sequential recommendation share. The attributes are genres, numbered from 1 by first appearance
    in movies.dat. Users keep their numbers.

    Args:
        folder: where the two files go.
        url: of the archive.
        md5: of the archive, 32 hex digits.

    Returns:
        The path of ml-1m.txt.

    Raises:
        InputError: an archive that cannot be had, has another MD5 or lacks a file; nothing is left
            behind then.

    Source:
        F. M. Harper and J. A. Konstan, The MovieLens Datasets, ACM TiiS 5(4), 2015.
    """
    import pooch  # which takes requests along

    target = folder / "ml-1m.txt"
    with tempfile.TemporaryDirectory(prefix="fisherkern-") as scratch:
        try:
            archive = pooch.retrieve(
                url, f"md5:{md5}", fname="ml-1m.zip", path=scratch, progressbar=sys.stderr.isatty()
            )
        except (OSError, ValueError) as error:  # requests' errors are the system's
            raise InputError(
                f"{url}: could not be downloaded: {error}; "
                "a copy in the folder FISHERKERN_DATA would be used instead"
            ) from error
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
