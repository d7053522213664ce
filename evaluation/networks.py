"""The networks whose features the scores compare: ADM's Inception, DINOv2 and exported programs."""

import io
import json
import sys
import warnings
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.export.passes import move_to_device_pass
from tqdm import tqdm

from evaluation.files import (
    INCEPTION,
    content_hash,
    has_images,
    has_statistics,
    read_images,
    read_network,
    read_statistics,
)
from evaluation.scores import GaussianStatistics, inception_score
from runtime.errors import UserError
from runtime.files import atomic_write

# Images per batch. Rounding depends on it.
FEATURE_BATCH = 64


class AdmInception(nn.Module):
    """The Inception network (TensorFlow, 2015) of ADM's evaluator, converted by torch-fidelity.

    Args:
        weights: path of torch-fidelity's weights (.pth). None downloads them.
    """

    def __init__(self, weights: str | None):
        super().__init__()
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

        self.inception = FeatureExtractorInceptionV3(
            "adm", ["2048", "logits_unbiased"], feature_extractor_weights_path=weights
        )
        self.inception.Mixed_6d.branch1x1.register_forward_hook(self._store_spatial)

    def _store_spatial(self, module, inputs, output: Tensor):
        self.spatial = output[:, :7].permute(0, 2, 3, 1).flatten(1)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Compute the features of images.

        Args:
            images: uint8 [B, 3, H, W].

        Returns:
            Pooled features [B, 2048]; spatial features [B, 2023], the first 7 channels of Mixed_6d's 1x1 branch in NHWC
            order; logits [B, 1008] without bias.
        """
        pool, logits = self.inception(images)
        return pool, self.spatial, logits


class DinoV2(nn.Module):
    """The DINOv2 ViT-L/14 network of FD-DINOv2, loaded by torch-fidelity."""

    def __init__(self):
        super().__init__()
        from torch_fidelity.feature_extractor_dinov2 import FeatureExtractorDinoV2

        self.dinov2 = FeatureExtractorDinoV2("dinov2-vit-l-14", ["dinov2"])

    def forward(self, images: Tensor) -> tuple[Tensor]:
        """Compute the features of images.

        The images are resized to 224 x 224 in 8 bits, bicubic with antialiasing, as in Stein et al., arXiv 2306.04675.

        Args:
            images: uint8 [B, 3, H, W].

        Returns:
            A tuple of one tensor, the features [B, 1024].
        """
        from torchvision.transforms.functional import InterpolationMode, resize

        return self.dinov2(resize(images, [224, 224], InterpolationMode.BICUBIC, antialias=True))


class ExportedNetwork(nn.Module):
    """An exported program on a device of choice.

    The code of a program names the device that it was exported on, and checks the device of its input. `nn.Module.to`
    moves tensors only.

    Args:
        program: the program. Its tensors are moved with it.

    Attributes:
        image_size: height and width of the images that it takes; None if it takes several sizes.
    """

    def __init__(self, program: torch.export.ExportedProgram):
        super().__init__()
        self.program = program
        self.module = program.module()
        [images, *_] = program.graph_signature.user_inputs
        shape = next(node.meta["val"].shape for node in program.graph.nodes if node.name == images)
        # Sizes that the program does not fix are symbols.
        self.image_size = tuple(shape[2:]) if all(isinstance(n, int) for n in shape[2:]) else None

    def to(self, device: torch.device) -> "ExportedNetwork":
        """Move the program to a device, and return this module."""
        # With the index of the GPU, as the devices of tensors have it.
        device = torch.empty(0, device=device).device
        self.module = move_to_device_pass(self.program, str(device)).module()
        return self

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Return the program's outputs for images, uint8 [B, 3, H, W]."""
        return self.module(images)


def load_dinov2() -> DinoV2:
    """Load DINOv2, or raise UserError if torch.hub cannot."""
    try:
        return DinoV2()
    # Without network access, torch.hub raises errors of several types.
    except Exception as error:
        raise UserError(
            f"--also fd-dinov2: torch.hub cannot load facebookresearch/dinov2 "
            f"({type(error).__name__}: {str(error)[:200]}); "
            f"without network access, copy {torch.hub.get_dir()} from a machine that has loaded it"
        ) from None


def load_network(weights: str | None) -> nn.Module:
    """Load the network that computes the features.

    Args:
        weights: path of torch-fidelity's Inception weights (.pth) or of an exported program (.pt2). None downloads the
            Inception weights.

    Returns:
        A network that maps uint8 images [B, 3, H, W] to pooled features [B, D], spatial features [B, S] and logits
        [B, classes].

    Raises:
        UserError: if the file cannot be loaded or could run code, or if the download fails.
    """
    try:
        if weights and weights.endswith(".pt2"):
            check_program(weights)
            # torch.export.load warns about read-only buffers, which it copies.
            with warnings.catch_warnings(action="ignore", category=UserWarning):
                return ExportedNetwork(torch.export.load(weights))
        if weights:
            # torch-fidelity would run code that is stored in a pickle.
            torch.load(weights, map_location="cpu", weights_only=True)
        return AdmInception(weights)
    # A damaged file or a failed download raises errors of many types.
    except Exception as error:
        problem = (
            f"--weights {weights} cannot be loaded"
            if weights
            else "torch-fidelity could not download Inception's weights (give --weights PATH)"
        )
        raise UserError(f"{problem}: {type(error).__name__}: {str(error)[:200]}") from None


def check_program(path: str):
    """Raise ValueError if torch.export.load would run code from this .pt2 file: pickles or compiled libraries."""
    with zipfile.ZipFile(path) as archive:
        for name in archive.namelist():
            if "aotinductor" in name:
                raise ValueError("it holds compiled code")
            if name.endswith(".pt"):
                torch.load(io.BytesIO(archive.read(name)), weights_only=True)
            # These files record how each tensor is stored.
            if name.endswith("_config.json"):
                entries = json.loads(archive.read(name)).get("config", {})
                if any(entry.get("use_pickle") for entry in entries.values()):
                    raise ValueError("it holds pickles")


@contextmanager
def without_tf32() -> Iterator[None]:
    """Compute float32 products without TF32, whose rounding would change the scores."""
    precision, allowed = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(precision)
        torch.backends.cudnn.allow_tf32 = allowed


class FeatureExtractor:
    """Runs one network over files of images and caches the results by the hash of the file and the network's name.

    The network is loaded only when the features of a file are not in the cache.

    Args:
        load: function that returns the network.
        name: name of the network in the cache, different for every network.
        outputs: number of the network's outputs: 3 (pooled features, spatial features, logits) or 1 (pooled features).
        cache: folder of the cache. None disables it.
        batch_size: images per batch.
        device: device of the network.
    """

    def __init__(
        self,
        load: Callable[[], nn.Module],
        name: str,
        outputs: int,
        cache: Path | None,
        batch_size: int,
        device: torch.device,
    ):
        self.load = load
        self.name = name
        self.outputs = outputs
        self.cache = cache
        self.batch_size = batch_size
        self.device = device
        self.entries: dict[str, Path] = {}

    @cached_property
    def network(self) -> nn.Module:
        return self.load().to(self.device)

    def check(self, path):
        """Raise UserError if the file is not in the cache and the network cannot process its images."""
        if self.cache and path not in self.entries:
            self.entries[path] = self.cache / f"{content_hash(path)}-{self.name}-v1.npz"
        if self.cache and self.entries[path].exists():
            return
        self.check_network(next(read_images(path, 2))[0], f"the images of {path}")

    def check_network(self, images: np.ndarray, name: str) -> int:
        """Run the network on two images [2, H, W, 3], uint8, and return its number of pooled features.

        Raises:
            UserError: if it cannot process the images, which `name` describes, or has other outputs than expected.
        """
        size = getattr(self.network, "image_size", None)
        if size and images.shape[1:3] != size:
            sizes = " but ".join(
                f"{text} {w}x{h} pixels" for text, (h, w) in (("have", images.shape[1:3]), ("the network takes", size))
            )
            raise UserError(f"{name} {sizes}: extract_features.py --reference writes images of a given --image-size")
        try:
            outputs = self.run(self.network, images)
            shapes = [tuple(output.shape) for output in outputs]
        except UserError:
            raise
        # An exported program raises errors of its own.
        except Exception as error:
            raise UserError(f"the network cannot process {name}: {str(error)[:200]}") from None
        if len(outputs) != self.outputs or any(len(shape) != 2 or shape[0] != 2 for shape in shapes):
            raise UserError(
                f"the network returns shapes {shapes} for 2 images, expected {self.outputs} outputs [2, features]"
            )
        return shapes[0][1]

    def to(self, device: torch.device):
        """Move the network to a device."""
        self.device = device
        self.network.to(device)

    def __call__(self, path) -> dict[str, np.ndarray]:
        """Return the features of a checked file, from the cache or computed.

        Returns:
            mu and sigma of the pooled features. A network of three outputs also gives mu_s and sigma_s of the spatial
            features, pools (the pooled features of all images, float32 [n, D]) and inception_score.
        """
        if self.cache is None:
            return self.compute(path)
        entry = self.entries[path]
        try:
            with np.load(entry, allow_pickle=False) as file:
                return dict(file)
        except FileNotFoundError:
            pass
        # A damaged archive raises errors of many types.
        except Exception as error:
            print(f"warning: {entry} is damaged and is computed again ({type(error).__name__})", file=sys.stderr)
        features = self.compute(path)
        try:
            with atomic_write(entry) as temporary, open(temporary, "wb") as file:
                np.savez(file, **features)
        # The disk is full, or the folder cannot be written.
        except OSError as error:
            print(f"warning: the features of {path} could not be cached: {error}", file=sys.stderr)
        return features

    def compute(self, path) -> dict[str, np.ndarray]:
        """Run the network over all images of a file."""
        pooled_statistics, spatial_statistics = GaussianStatistics(), GaussianStatistics()
        pooled_features, probs = [], []
        with tqdm(unit="img", desc=Path(path).name, smoothing=0) as bar:
            for batch, total in read_images(path, self.batch_size):
                bar.total = total
                pooled, *rest = self.run(self.network, batch)
                pooled_statistics.add(pooled)
                if rest:
                    spatial, logits = rest
                    spatial_statistics.add(spatial)
                    pooled_features.append(pooled.float())
                    probs.append(logits.float().softmax(1))
                bar.update(len(batch))
        features = dict(zip(("mu", "sigma"), pooled_statistics.result(), strict=True))
        if pooled_features:
            features |= dict(zip(("mu_s", "sigma_s"), spatial_statistics.result(), strict=True))
            features["pools"] = torch.cat(pooled_features).cpu().numpy()
            features["inception_score"] = np.array(inception_score(torch.cat(probs)))
        return features

    @torch.no_grad()
    @without_tf32()
    def run(self, network: nn.Module, batch: np.ndarray) -> tuple[Tensor, ...]:
        """Run the network on uint8 images [B, H, W, 3]."""
        return network(torch.from_numpy(batch.copy()).permute(0, 3, 1, 2).contiguous().to(self.device))


def save_program(network: nn.Module, path, side: int):
    """Write a network as an exported program for square images, uint8 [B, 3, side, side] with any B from 1.

    Args:
        network: the network, in eval mode on the CPU.
        path: the file, whose name ends in .pt2.
        side: side of the images in pixels.
    """
    example = torch.zeros(2, 3, side, side, dtype=torch.uint8)
    # PyTorch 2.6 requires a largest size.
    shapes = ({0: torch.export.Dim("batch", min=1, max=65536)},)
    program = torch.export.export(network, (example,), dynamic_shapes=shapes)
    with atomic_write(path) as temporary:
        # torch.export.save accepts only this suffix.
        program_path = temporary.with_name(f"{temporary.name}.pt2")
        torch.export.save(program, program_path)
        program_path.rename(temporary)


def network_name(weights: str | None) -> str:
    """Return the name under which statistics record the network of --weights, or Inception's for None.

    Raises:
        UserError: if the file does not exist.
    """
    if weights and not Path(weights).is_file():
        raise UserError(f"--weights {weights}: no such file")
    return content_hash(weights) if weights and weights.endswith(".pt2") else INCEPTION


def make_extractor(weights: str | None, cache: Path | None, batch_size: int, device: torch.device) -> FeatureExtractor:
    """Return the extractor of the network of --weights; its arguments are those of `FeatureExtractor`."""
    name = content_hash(weights) if weights else INCEPTION
    return FeatureExtractor(lambda: load_network(weights), name, 3, cache, batch_size, device)


def image_features(path, extractors: dict[str, FeatureExtractor]) -> dict[str, np.ndarray]:
    """Return the features of a file from all networks.

    Args:
        path: an .npz file or a folder of images.
        extractors: the networks, by the suffix that is appended to the names of their results.

    Returns:
        The results of `FeatureExtractor` under keys such as "mu" and, for DINOv2, "mu_dinov2". Statistics that the file
        holds replace those computed from its images.
    """
    features = {}
    if has_images(path):
        for suffix, extractor in extractors.items():
            features |= {f"{key}{suffix}": value for key, value in extractor(path).items()}
    return features | (read_statistics(path) if has_statistics(path) else {})


def check_networks(reference, path, network: str):
    """Check that the features of two files come from one network.

    Args:
        reference: a file of images or statistics.
        path: another one, or the same.
        network: name of the network that processes images.

    Raises:
        UserError: if a file holds statistics of another network.
    """
    sources = {}
    for file in (reference, path):
        if has_statistics(file):
            sources[f"the statistics in {file}"] = read_network(file)
        if has_images(file):
            sources["the network for images (--weights)"] = network
    if len(set(sources.values())) > 1:
        names = ", ".join(f"{source}: {name}" for source, name in sources.items())
        raise UserError(f"features of different networks cannot be compared ({names})")
