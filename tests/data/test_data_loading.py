"""Finding data sets by name, and the verified download, from a server in this process."""

import hashlib
import http.server
import io
import os
import threading
import zipfile

import numpy as np
import pytest

import fisherkern.data.loading as loading
from fisherkern.data import cache_folder, download_ml_1m, load
from fisherkern.errors import InputError

RATINGS = "1::1193::5::30\n1::661::3::20\n1::914::3::20\n2::914::4::1\n2::50::4::2\n2::1193::4::3\n"
MOVIES = (
    "50::A::Drama\n661::B (1996)::Animation|Drama\n914::C::War\n1193::D\xe9::War|Drama\n7::E::X\n"
)


def archive(**changes: str) -> bytes:
    files = {"ratings.dat": RATINGS, "movies.dat": MOVIES} | changes
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as members:
        for name, text in files.items():
            members.writestr(f"ml-1m/{name}", text.encode("latin-1"))
    return stream.getvalue()


@pytest.fixture
def serve():
    """serve(body, announced=None) -> (url, md5) of a server that sends `body`."""
    servers = []

    def start(body: bytes, announced: int | None = None) -> tuple[str, str]:
        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.send_response(200)
                self.send_header("Content-Length", str(announced or len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *arguments: object) -> None:
                pass

        server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        servers.append(server)
        url = f"http://127.0.0.1:{server.server_port}/ml-1m.zip"
        return url, hashlib.md5(body).hexdigest()

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def test_download_numbers_movies_by_appearance_and_keeps_genres(tmp_path, serve, capsys):
    url, md5 = serve(archive())
    path = download_ml_1m(tmp_path, url=url, md5=md5)
    assert path == tmp_path / "ml-1m.txt"
    assert path.read_text() == "1 2\n1 3\n1 1\n2 3\n2 4\n2 1\n"
    assert load(path).attributes == {"1": [3, 1], "2": [2, 1], "3": [3], "4": [1]}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["ml-1m.attributes.json", "ml-1m.txt"]
    assert "%" not in capsys.readouterr().err  # no terminal, no bar


def test_a_download_that_is_not_what_it_should_be_leaves_nothing(tmp_path, serve):
    folder = tmp_path / "cache"
    folder.mkdir()
    whole = archive()
    md5 = hashlib.md5(whole).hexdigest()
    corrupt = whole[:40] + bytes([whole[40] ^ 1]) + whole[41:]
    for body, announced, said in (
        (corrupt, None, f"MD5 .*{md5}.* but got .*[0-9a-f]{{32}}"),
        (whole[:-9], len(whole), f"{len(whole) - 9} bytes read, 9 more expected"),
    ):
        with pytest.raises(InputError, match=f"could not be downloaded: .*{said}"):
            download_ml_1m(folder, url=serve(body, announced)[0], md5=md5)
    with pytest.raises(InputError, match="not the MovieLens-1M archive"):
        url, md5 = serve(b"not a zip")
        download_ml_1m(folder, url=url, md5=md5)
    with pytest.raises(InputError, match="not the MovieLens-1M archive: .*movies.dat"):
        url, md5 = serve(whole.replace(b"movies.dat", b"moovie.dat"))
        download_ml_1m(folder, url=url, md5=md5)
    with pytest.raises(InputError, match=r"movies\.dat:1: not of the form"):
        url, md5 = serve(archive(**{"movies.dat": "1::title\n"}))
        download_ml_1m(folder, url=url, md5=md5)
    with pytest.raises(InputError, match="could not be downloaded: .*FISHERKERN_DATA"):
        download_ml_1m(folder, url=(tmp_path / "none.zip").as_uri(), md5=md5)
    assert not list(folder.iterdir())


def test_names_are_looked_up_in_the_data_folder_then_the_cache_then_downloaded(
    tmp_path, serve, monkeypatch
):
    url, md5 = serve(archive())
    monkeypatch.setattr(
        loading, "download_ml_1m", lambda folder: download_ml_1m(folder, url=url, md5=md5)
    )
    data, cache = tmp_path / "data", tmp_path / "cache"
    data.mkdir()
    monkeypatch.setenv("FISHERKERN_DATA", str(data))
    monkeypatch.setenv("FISHERKERN_CACHE", str(cache))
    first = load("ml-1m")
    assert (first.num_users, first.num_items, first.num_actions) == (2, 4, 6)
    assert (cache / "ml-1m.txt").is_file() and not list(data.iterdir())

    monkeypatch.setattr(loading, "download_ml_1m", lambda folder: pytest.fail("second download"))
    assert load("ml-1m").fingerprint() == first.fingerprint()
    (data / "ml-1m.txt").write_text("1 5\n1 6\n1 7\n")
    assert load("ml-1m").num_actions == 3
    monkeypatch.delenv("FISHERKERN_DATA")
    assert load("ml-1m").num_actions == 6


def test_names_that_lead_nowhere_say_where_was_searched(tmp_path, monkeypatch):
    monkeypatch.setenv("FISHERKERN_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("FISHERKERN_DATA", raising=False)
    with pytest.raises(InputError, match=r"beauty\.txt in .*cache \(FISHERKERN_DATA is not set\)"):
        load("beauty")
    monkeypatch.setenv("FISHERKERN_DATA", str(tmp_path))
    with pytest.raises(InputError, match=r"no beauty\.txt in .* nor in .*cache; only ml-1m is"):
        load("beauty")
    monkeypatch.setenv("FISHERKERN_DATA", str(tmp_path / "none"))
    with pytest.raises(InputError, match="FISHERKERN_DATA names .*none, which is not a folder"):
        load("beauty")


def test_the_cache_is_in_the_home_folder_unless_named(tmp_path, monkeypatch):
    monkeypatch.delenv("FISHERKERN_CACHE", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache" / "fisherkern"


@pytest.mark.skipif(not os.environ.get("FISHERKERN_DATA"), reason="FISHERKERN_DATA is not set")
@pytest.mark.parametrize(
    ("name", "sizes"),
    [("ml-1m", (6_040, 3_706, 1_000_209)), ("beauty", (22_363, 12_101, 198_502))],
)
def test_the_shared_data_sets_have_their_published_sizes(name, sizes):
    data = load(name)
    assert (data.num_users, data.num_items, data.num_actions) == sizes and data.name == name
    assert data.attributes is not None and set(data.attributes) == set(data.item_ids)
    # The ids are by first appearance, so item v is met only after items 1..v-1's users.
    assert (np.diff(data.offsets) >= 5).all() and data.item_ids[-1] == str(sizes[1])
