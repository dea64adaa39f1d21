"""A path is a file and nothing else: neither a path nor a file leads FFmpeg to another host, protocol or file.

A server on 127.0.0.1 holds a good clip, and no test may make it see a request.
"""

import http.server
import json
import tarfile
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image as PilImage

from bench.video import clips
from veripo_fast.config.inputs import DataConfig, VideoConfig
from veripo_fast.data.prompts import read_prompts
from veripo_fast.errors import MediaError
from veripo_fast.types import Video
from veripo_fast.video.decode import decode

torch.set_num_threads(1)
DECODERS = ["auto", "pyav", "torchcodec", "dali"]


class Server:
    """Answers every request with a clip, and remembers it."""

    def __init__(self, content: bytes) -> None:
        requests: list[str] = []

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                requests.append(self.path)
                self.send_response(200)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *_: object) -> None:
                pass

        self.requests = requests
        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.host = f"127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    made = Server(clips.make_clip(tmp_path / "bait.mp4", frames=30).read_bytes())
    yield made
    made.server.shutdown()
    made.server.server_close()


def contract(decoder: str) -> VideoConfig:
    return VideoConfig(fps=None, num_frames=4, decoder=decoder)


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("codec", ["libx264", "libvpx-vp9"])
def test_a_folder_named_like_a_protocol_is_a_folder(tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch,
                                                    codec: str, decoder: str) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in (f"http:/{server.host}", f"tcp:/{server.host}", "pipe:", "concat:", "subfile,,start,0,end,0,,:"):
        Path(folder).mkdir(parents=True)
        path = Path(folder) / "x.mp4"
        options = {} if codec == "libx264" else {"options": {"cpu-used": "8", "deadline": "realtime"}}
        clips.make_clip(tmp_path / "one.mp4", frames=9, codec=codec, **options).rename(path)
        name = str(path).replace(":/", "://", 1) if "/" in folder else str(path)
        frames = decode(Video(name), contract(decoder), 28, device="cpu")
        assert clips.read_indices(frames.pixels) == list(frames.indices) and frames.indices[-1] == 8
    assert server.requests == []


@pytest.mark.parametrize("decoder", DECODERS)
def test_a_colon_in_a_name_is_a_colon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, decoder: str) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("cam:1.mp4", "2024-05-01T10:30:00.mp4", "file:x.mp4", "-y.mp4", "%d.mp4"):
        clips.make_clip(tmp_path / "one.mp4", frames=9).rename(name)
        frames = decode(Video(name), contract(decoder), 28, device="cpu")
        assert clips.read_indices(frames.pixels) == list(frames.indices)


@pytest.mark.parametrize("decoder", DECODERS)
def test_playlists_lead_nowhere(tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch, decoder: str) -> None:
    monkeypatch.chdir(tmp_path)
    clips.make_clip(tmp_path / "part.mp4", frames=9)
    lists = {
        "hls": f"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nhttp://{server.host}/x.ts\n#EXT-X-ENDLIST\n",
        "local hls": "#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\npart.mp4\n#EXT-X-ENDLIST\n",
        "concat": f"ffconcat version 1.0\nfile http://{server.host}/x.mp4\n",
        "local concat": "ffconcat version 1.0\nfile part.mp4\n",
        "dash": f"<MPD xmlns='urn:mpeg:dash:schema:mpd:2011'><BaseURL>http://{server.host}/</BaseURL></MPD>",
    }
    for name, text in lists.items():
        path = tmp_path / f"{name}.mp4"
        path.write_text(text)
        with pytest.raises(MediaError, match=r"is a playlist that names other files|not a video that FFmpeg can open"):
            decode(Video(str(path)), contract(decoder), 28, device="cpu")
    assert server.requests == []


def test_texts_and_pictures_are_no_videos(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("a text\n" * 400)
    (tmp_path / "art.nfo").write_text("a text\n" * 400)
    PilImage.fromarray(np.zeros((64, 64, 3), np.uint8)).save(tmp_path / "still.png")
    for name in ("notes.txt", "art.nfo", "still.png"):
        with pytest.raises(MediaError, match="is not a video that FFmpeg can open"):
            decode(Video(str(tmp_path / name)), contract("auto"), 28)


# -- data.confine ------------------------------------------------------------------------------------------------------


def test_confined_media_lie_inside_the_data_root(tmp_path: Path) -> None:
    """Records that lead out of it, symbolic links included, are skipped by name; without the option they are taken."""
    root, outside = tmp_path / "root", tmp_path / "outside"
    (root / "in").mkdir(parents=True)
    outside.mkdir()
    clips.make_clip(outside / "secret.mp4", frames=4)
    clips.make_clip(root / "in" / "good.mp4", frames=4)
    (root / "link.mp4").symlink_to(outside / "secret.mp4")
    (root / "folder").symlink_to(outside)
    (root / "inner.mp4").symlink_to(root / "in" / "good.mp4")
    with tarfile.open(outside / "shard.tar", "w") as tar:
        tar.add(outside / "secret.mp4", "a.mp4")
    (root / "shard.tar").symlink_to(outside / "shard.tar")
    good = ["in/good.mp4", "inner.mp4", str(root / "in" / "good.mp4"), "in/../in/good.mp4"]
    bad = ["link.mp4", "folder/secret.mp4", "../outside/secret.mp4", str(outside / "secret.mp4"), "shard.tar/a.mp4",
           f"file://{outside}/secret.mp4"]
    data = root / "data.jsonl"
    data.write_text("".join(json.dumps({"problem": "How many?", "solution": "<answer>1</answer>", "data_type": "video",
                                        "problem_type": "numerical", "path": name}) + "\n" for name in [*good, *bad]))
    prompts, skipped = read_prompts([str(data)], DataConfig(confine=True))
    assert (len(prompts), len(skipped)) == (len(good), len(bad))
    assert all("outside" in item.reason and "data.confine" in item.reason for item in skipped)
    prompts, skipped = read_prompts([str(data)], DataConfig())
    assert (len(prompts), len(skipped)) == (len(good) + len(bad), 0)
    (tmp_path / "alias").symlink_to(root)  # the root itself may be reached through a link
    assert len(read_prompts([str(tmp_path / "alias" / "data.jsonl")], DataConfig(confine=True))[0]) == len(good)
