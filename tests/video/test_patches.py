"""Patches against the real Hugging Face processors, end to end as well, and the cache key.

The processors need torchvision, which has no CPU build: the comparison runs in a process of its own, with the CUDA
wheel from a side folder (bench/video/torchvision_folder.py). Run as a module, this file is that process.
"""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image as PilImage
from veripo_kernels import resize_frames

from tests.support.children import run
from tests.support.paths import PYTHONPATH
from veripo_fast.config.inputs import VideoConfig
from veripo_fast.errors import MediaError
from veripo_fast.types import Image, Video
from veripo_fast.video.contract import resized_size
from veripo_fast.video.decode import decode_image
from veripo_fast.video.patches import fingerprint, patchify

CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
GEOMETRY = {"qwen2_5_vl": (*CLIP, 14, 2), "qwen3_vl": (*HALF, 16, 2)}
CONTRACT = VideoConfig(min_pixels=16 * 28 * 28, max_pixels=60 * 28 * 28)
SIZES = [(720, 1280), (333, 500), (40, 60), (900, 100)]


def oracle_folder() -> str | None:
    """Folder that holds a torchvision for the oracle process; None when it imports directly."""
    folder = Path(os.environ.get("VERIPO_TEST_ORACLE", Path(sys.prefix) / "oracle"))
    if (folder / "torchvision").is_dir():
        return str(folder)
    if subprocess.run([sys.executable, "-c", "import torchvision"], capture_output=True).returncode == 0:
        return None
    pytest.fail(f"the Hugging Face processors need torchvision in {folder}; make it with\n"
                f"  {sys.executable} -m pip install --no-deps --target {folder} torchvision==0.28.0\n"
                f"or name another folder in VERIPO_TEST_ORACLE")


def photo(height: int, width: int, seed: int) -> np.ndarray:
    """Smooth colours with fine detail on top, uint8 [height, width, 3]."""
    generator = np.random.default_rng(seed)
    coarse = generator.integers(0, 256, (6, 8, 3), dtype=np.uint8)
    smooth = np.asarray(PilImage.fromarray(coarse).resize((width, height), PilImage.Resampling.BICUBIC), np.int16)
    return np.clip(smooth + generator.integers(-20, 21, (height, width, 3)), 0, 255).astype(np.uint8)


def clip(frames: int, height: int, width: int) -> torch.Tensor:
    return torch.from_numpy(np.stack([photo(height, width, i) for i in range(frames)])).permute(0, 3, 1, 2)


@pytest.fixture(scope="module")
def oracle(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the processors make of our inputs (one process for all comparisons: it takes seconds to start)."""
    folder = tmp_path_factory.mktemp("oracle")
    cases: dict[str, Any] = {"videos": {}, "images": {}, "sizes": []}
    for name in GEOMETRY:
        for frames in (1, 4, 5):
            cases["videos"][f"{name}/{frames}/as-is"] = clip(frames, 128 if name == "qwen3_vl" else 112, 224)
        for height, width in SIZES:
            cases["videos"][f"{name}/{height}x{width}/resize"] = clip(2, height, width)
    for suffix, mode in (("jpg", "RGB"), ("png", "L"), ("png", "P")):
        path = folder / f"{mode}.{suffix}"
        PilImage.fromarray(photo(300, 411, 3)).convert(mode).save(path)
        cases["images"][mode] = str(path)
    cases["bounds"] = (CONTRACT.min_pixels, CONTRACT.max_pixels)
    torch.save(cases, folder / "cases.pt")
    environment = {**os.environ, "VERIPO_TEST_ORACLE": oracle_folder() or "", "HF_HUB_OFFLINE": "1",
                   "OMP_NUM_THREADS": "1", "PYTHONPATH": PYTHONPATH}
    done = run(sys.executable, "-m", "tests.video.test_patches", folder, env=environment)
    assert done.returncode == 0, done.stderr
    return {"cases": cases, **torch.load(folder / "answers.pt", weights_only=False)}


@pytest.mark.parametrize("name", GEOMETRY)
@pytest.mark.parametrize("frames", [1, 4, 5])
def test_patchify_equals_the_processor(oracle: dict[str, Any], name: str, frames: int) -> None:
    case = f"{name}/{frames}/as-is"
    values, grid = patchify(oracle["cases"]["videos"][case], *GEOMETRY[name])
    expected, expected_grid = oracle["videos"][case]
    assert grid.tolist() == expected_grid[0].tolist()
    torch.testing.assert_close(values, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", GEOMETRY)
@pytest.mark.parametrize("size", SIZES)
def test_resize_and_patchify_equal_the_processor(oracle: dict[str, Any], name: str, size: tuple[int, int]) -> None:
    mean, std, patch, merge = GEOMETRY[name]
    case = f"{name}/{size[0]}x{size[1]}/resize"
    pixels = oracle["cases"]["videos"][case]
    frames = resize_frames(pixels, *resized_size(*pixels.shape[2:], patch * merge, CONTRACT.min_pixels,
                                                 CONTRACT.max_pixels))
    values, grid = patchify(frames, mean, std, patch, merge)
    expected, expected_grid = oracle["videos"][case]
    assert grid.tolist() == expected_grid[0].tolist()
    assert mean_levels(values - expected, std) < 0.05  # measured: 0, bit for bit


@pytest.mark.parametrize("name", GEOMETRY)
@pytest.mark.parametrize("mode", ["RGB", "L", "P"])
def test_image_equals_the_image_processor(oracle: dict[str, Any], name: str, mode: str) -> None:
    mean, std, patch, merge = GEOMETRY[name]
    frames = decode_image(Image(oracle["cases"]["images"][mode]), CONTRACT, patch * merge)
    values, grid = patchify(frames, mean, std, patch, merge)
    expected, expected_grid = oracle["images"][f"{name}/{mode}"]
    assert grid.tolist() == expected_grid[0].tolist()
    assert grid[0] == 1
    assert mean_levels(values - expected, std) < 0.05  # measured: 0, bit for bit


def mean_levels(difference: torch.Tensor, std: tuple[float, ...]) -> float:
    """Mean absolute difference in levels of 255, from normalised patches."""
    per_channel = difference.abs().view(len(difference), 3, -1).mean(dim=(0, 2))
    return float((per_channel * torch.tensor(std) * 255).mean())


def test_resized_size_equals_smart_resize(oracle: dict[str, Any]) -> None:
    assert len(oracle["sizes"]) > 300
    for height, width, factor, low, high, expected in oracle["sizes"]:
        assert resized_size(height, width, factor, low, high) == expected, (height, width, factor, low, high)


def test_patchify_refuses_other_shapes() -> None:
    good = torch.zeros(2, 3, 56, 56, dtype=torch.uint8)
    for bad, words in ((good.float(), "uint8"), (good[0], "T, 3, H, W"), (good[:0], "T > 0"),
                       (good[..., :50], "multiples of 28")):
        with pytest.raises(ValueError, match=words):
            patchify(bad, *GEOMETRY["qwen2_5_vl"])


def test_odd_count_repeats_the_last_frame() -> None:
    frames = torch.randint(0, 256, (3, 3, 56, 84), dtype=torch.uint8)
    padded = torch.cat([frames, frames[2:]])
    odd, even = patchify(frames, *GEOMETRY["qwen2_5_vl"]), patchify(padded, *GEOMETRY["qwen2_5_vl"])
    assert torch.equal(odd[0], even[0])
    assert odd[1].tolist() == even[1].tolist() == [2, 4, 6]


def test_fingerprint_changes_with_whatever_changes_pixels(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    path.write_bytes(b"one")
    video, contract = Video(str(path)), VideoConfig()
    key = fingerprint(video, contract, patch_size=14)
    assert key == fingerprint([video], contract, patch_size=14) == fingerprint(
        video, VideoConfig(workers=7, timeout_seconds=1.0), patch_size=14)
    others = [fingerprint(video, contract, patch_size=16)]
    others += [fingerprint(video, other, patch_size=14) for other in (VideoConfig(fps=1), VideoConfig(max_pixels=9999))]
    others += [fingerprint(media, contract, patch_size=14)
               for media in ([video, video], Video(str(path), 0.0, 1.0), Image(str(path)))]
    path.write_bytes(b"two!")
    others.append(fingerprint(video, contract, patch_size=14))
    assert len({key, *others}) == len(others) + 1
    with pytest.raises(MediaError, match=r"gone\.mp4 cannot be read: No such file"):
        fingerprint(Video(str(tmp_path / "gone.mp4")), contract)


# -- the oracle process -----------------------------------------------------------------------------------------------


def answer(folder: Path) -> None:
    """Run the Hugging Face processors over cases.pt and write answers.pt."""
    if side := os.environ["VERIPO_TEST_ORACLE"]:
        from bench.video import torchvision_folder

        torchvision_folder.add(side)
    torch.set_num_threads(1)
    from transformers.models.qwen2_vl.image_processing_qwen2_vl import Qwen2VLImageProcessor
    from transformers.models.qwen2_vl.video_processing_qwen2_vl import Qwen2VLVideoProcessor, smart_resize
    from transformers.models.qwen3_vl.video_processing_qwen3_vl import Qwen3VLVideoProcessor

    cases = torch.load(folder / "cases.pt")
    low, high = cases["bounds"]
    videos, images = {}, {}
    for case, frames in cases["videos"].items():
        kind = Qwen2VLVideoProcessor if case.startswith("qwen2") else Qwen3VLVideoProcessor
        per_video = 1 if case.startswith("qwen2") else len(frames)  # Qwen3-VL bounds the area of all frames together
        processor = kind(size={"shortest_edge": low * per_video, "longest_edge": high * per_video},
                         cap_pixels_per_frame=False)
        out = processor(videos=[frames], do_resize=case.endswith("resize"), do_sample_frames=False, return_tensors="pt")
        videos[case] = (out["pixel_values_videos"], out["video_grid_thw"])
    for name, (mean, std, patch, merge) in GEOMETRY.items():
        processor = Qwen2VLImageProcessor(size={"shortest_edge": low, "longest_edge": high}, image_mean=mean,
                                          image_std=std, patch_size=patch, merge_size=merge)
        for mode, path in cases["images"].items():
            out = processor(images=[PilImage.open(path)], return_tensors="pt")
            images[f"{name}/{mode}"] = (out["pixel_values"], out["image_grid_thw"])
    generator = np.random.default_rng(0)
    sizes = []
    for _ in range(400):
        height, width = (int(side) for side in np.exp(generator.uniform(3.5, 8.3, 2)))
        factor = int(generator.choice([28, 32]))
        bounds = (16 * factor**2, int(generator.integers(32, 2000)) * factor**2)
        sizes.append((height, width, factor, *bounds, smart_resize(height, width, factor, *bounds)))
    torch.save({"videos": videos, "images": images, "sizes": sizes}, folder / "answers.pt")


if __name__ == "__main__":
    answer(Path(sys.argv[1]))


def test_fingerprint_knows_gpu_decoders(tmp_path: Path) -> None:
    """CPU decoders give the same bits (test_exactness.py); NVDEC and DALI round colours in their own ways."""
    (tmp_path / "a.mp4").write_bytes(b"x")
    keys = {decoder: fingerprint(Video(str(tmp_path / "a.mp4")), VideoConfig(decoder=decoder))
            for decoder in ("auto", "pyav", "torchcodec", "nvdec", "dali")}
    assert keys["auto"] == keys["pyav"] == keys["torchcodec"]
    assert len(set(keys.values())) == 3
