"""A convolutional autoencoder trained on the radiographs themselves: the baseline without labels.

The encoder halves the side by strided 3 × 3 convolutions, each followed by GroupNorm and GELU, and
ends in a code with a few channels per cell, which extraction pools. The decoder mirrors it with
nearest upsampling and convolution, which avoids the checkerboards of transposed convolutions
(Odena, Dumoulin and Olah, "Deconvolution and Checkerboard Artifacts", Distill 2016).
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from medembed.core.errors import EncoderError
from medembed.encoders.checkpoint_files import AUTOENCODER_TYPE, read_json
from medembed.encoders.devices import stored_dtypes
from medembed.encoders.features import Features, token_poolings
from medembed.encoders.fingerprint import Digest, read_part
from medembed.encoders.preprocessing import FITS, RESAMPLES, Preprocessing
from medembed.encoders.torch_encoder import TorchEncoder

__all__ = [
    "Architecture",
    "Autoencoder",
    "AutoencoderEncoder",
    "CodeDecoder",
    "CodeEncoder",
    "checkpoint_config",
    "load_autoencoder",
    "preprocessing_for",
    "processor_config",
]

_MOST = 16384  # pixels of a side, or channels; more indicates a damaged file
_MOST_HALVINGS = 10
_HALF = (0.5, 0.5, 0.5)


@dataclass(frozen=True)
class Architecture:
    """The shape of an autoencoder, as stored in `config.json`.

    Parameters
    ----------
    image_size : int
        Side of its square images in pixels: a multiple of 2 to the number of `widths`, such that
        the code has at least 2 cells a side.
    widths : tuple of int
        Channels after each halving of the side, multiples of `norm_groups`.
    latent_channels : int
        Channels of the code: the length d of a token.
    norm_groups : int
        Groups of every GroupNorm.

    Raises
    ------
    EncoderError
        The autoencoder cannot be built.
    """

    image_size: int
    widths: tuple[int, ...]
    latent_channels: int
    norm_groups: int = 8

    def __post_init__(self) -> None:
        if not 1 <= len(self.widths) <= _MOST_HALVINGS:
            raise EncoderError(
                f"an autoencoder has 1 to {_MOST_HALVINGS} widths; this one has {len(self.widths)}."
            )
        for name, value in (
            ("image_size", self.image_size),
            *(("widths", width) for width in self.widths),
            ("latent_channels", self.latent_channels),
            ("norm_groups", self.norm_groups),
        ):
            if type(value) is not int or not 1 <= value <= _MOST:
                raise EncoderError(f"{name} {value!r} is not a whole number from 1 to {_MOST}.")
        uneven = [width for width in self.widths if width % self.norm_groups]
        if uneven:
            raise EncoderError(
                f"{uneven[0]} channels cannot be normalised in groups of equal size. Give --widths "
                f"that are multiples of {self.norm_groups}."
            )
        self._refuse_uneven_side()

    @property
    def code_side(self) -> int:
        """Cells of the code in a row, and in a column."""
        return self.image_size >> len(self.widths)

    def as_dict(self) -> dict[str, object]:
        """Return the JSON-able form used in `config.json` and the fingerprint."""
        known = asdict(self)
        return {"model_type": AUTOENCODER_TYPE, **known, "widths": list(self.widths)}

    def _refuse_uneven_side(self) -> None:
        step = 1 << len(self.widths)
        if self.image_size % step == 0 and self.code_side >= 2:
            return
        below = max(2 * step, self.image_size // step * step)
        raise EncoderError(
            f"a side of {self.image_size} pixels cannot be halved {len(self.widths)} times to 2 or "
            f"more. Give --size {below} or {below + step}, or fewer --widths."
        )


class CodeEncoder(nn.Module):
    """The half that is used for extraction; see the module.

    Parameters
    ----------
    architecture : Architecture
    """

    def __init__(self, architecture: Architecture) -> None:
        super().__init__()
        widths, n_groups = (1, *architecture.widths), architecture.norm_groups
        self.stages = nn.Sequential(*(_stage(a, b, n_groups, 2) for a, b in pairwise(widths)))
        self.code = nn.Conv2d(widths[-1], architecture.latent_channels, 1)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Return the code, (n, latent_channels, side, side), of normalised (n, c, height, width).

        The c channels are equal, so only the first is read: `TorchEncoder` passes three views of
        one channel.
        """
        code: Tensor = self.code(self.stages(pixel_values[:, :1]))
        return code


class CodeDecoder(nn.Module):
    """The half that reconstructs an image from its code, needed only in training.

    Parameters
    ----------
    architecture : Architecture
    """

    def __init__(self, architecture: Architecture) -> None:
        super().__init__()
        widths, n_groups = architecture.widths[::-1], architecture.norm_groups
        self.code = _stage(architecture.latent_channels, widths[0], n_groups, 1)
        self.stages = nn.Sequential(
            *(
                nn.Sequential(nn.Upsample(scale_factor=2), _stage(a, b, n_groups, 1))
                for a, b in pairwise(widths)
            )
        )
        self.grey = nn.Sequential(nn.Upsample(scale_factor=2), nn.Conv2d(widths[-1], 1, 3, 1, 1))

    def forward(self, code: Tensor) -> Tensor:
        """Return the image, (n, 1, height, width), in grey levels from 0 (black) to 1."""
        grey: Tensor = self.grey(self.stages(self.code(code)))
        return grey


class Autoencoder(nn.Module):
    """Both halves, as trained and as stored in `model.safetensors`.

    Parameters
    ----------
    architecture : Architecture
    """

    def __init__(self, architecture: Architecture) -> None:
        super().__init__()
        self.encoder = CodeEncoder(architecture)
        self.decoder = CodeDecoder(architecture)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Return reconstructions, (n, 1, height, width), in grey levels from 0 to 1."""
        grey: Tensor = self.decoder(self.encoder(pixel_values))
        return grey


class AutoencoderEncoder(TorchEncoder):
    """The encoder half of a trained autoencoder; created by `load_autoencoder`.

    Its tokens are the cells of the code.

    Parameters
    ----------
    model : CodeEncoder
    architecture : Architecture
    """

    def __init__(
        self, model: Any, preprocessing: Preprocessing, *, architecture: Architecture, **known: Any
    ) -> None:
        super().__init__(model, preprocessing, **known)
        self._grid = (architecture.code_side, architecture.code_side)
        self._dimensions = token_poolings(architecture.latent_channels, self._grid)

    @property
    def dimensions(self) -> Mapping[str, tuple[int, ...]]:
        """Shape of one image's vector under each pooling."""
        return dict(self._dimensions)

    def features(self, pixel_values: Tensor) -> Features:
        """Run the encoder; see `TorchEncoder.features`."""
        return Features(self.tower(pixel_values).flatten(2).transpose(1, 2), self._grid)


def load_autoencoder(
    directory: Path,
    preprocessing: Preprocessing,
    *,
    source: str,
    revision: str | None = None,
    device: str = "cpu",
    precision: str = "fp32",
) -> AutoencoderEncoder:
    """Return the encoder half of an autoencoder that `medembed autoencoder` wrote.

    The fingerprint is SHA-256 over the architecture and over the encoder's tensors, as in
    `siglip.load_siglip`: it depends neither on the decoder nor on the file layout.

    Raises
    ------
    EncoderError
        The directory holds no autoencoder, or not exactly the tensors, shapes and finite values
        that its config requires; or images would be prepared differently than in its training.
    """
    architecture = _read_architecture(directory, preprocessing, source)
    digest = Digest()
    digest.add(architecture.as_dict())
    with torch.device("meta"):
        model = CodeEncoder(architecture)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    dtypes, state = stored_dtypes(model, precision), {}
    for name, dtype, tensor in read_part(directory, shapes, source, "encoder"):
        digest.add_tensor(name, dtype, tensor)
        state[name] = tensor.to(device, dtypes[name])
    model.load_state_dict(state, strict=True, assign=True)
    known: dict[str, Any] = {"source": source, "revision": revision, "device": device}
    return AutoencoderEncoder(
        model,
        preprocessing,
        architecture=architecture,
        fingerprint=digest.hexdigest(),
        precision=precision,
        reload=partial(load_autoencoder, directory, preprocessing, **known),
        **known,
    )


def checkpoint_config(architecture: Architecture, fit: str) -> dict[str, object]:
    """Return `config.json`: the architecture, and how images are made square."""
    return {**architecture.as_dict(), "fit": fit}


def preprocessing_for(size: int, fit: str) -> Preprocessing:
    """Return the preprocessing of an autoencoder's images, in training and extraction.

    Raises
    ------
    EncoderError
        The fit is unknown.
    """
    if fit not in FITS:
        raise EncoderError(f"fit {fit!r} is unknown. Choose one of: {', '.join(FITS)}.")
    return Preprocessing(size, size, fit, "bilinear", _HALF, _HALF, 1 / 255)


def processor_config(preprocessing: Preprocessing) -> dict[str, object]:
    """Return the `preprocessor_config.json` that `read_preprocessing` reads, except `fit`."""
    return {
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": list(preprocessing.mean),
        "image_processor_type": "ViTImageProcessor",
        "image_std": list(preprocessing.std),
        "resample": int(RESAMPLES[preprocessing.resample]),
        "rescale_factor": preprocessing.rescale,
        "size": {"height": preprocessing.height, "width": preprocessing.width},
    }


def _stage(n_in: int, n_out: int, n_groups: int, stride: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(n_in, n_out, 3, stride, 1), nn.GroupNorm(n_groups, n_out), nn.GELU()
    )


def _read_architecture(directory: Path, preprocessing: Preprocessing, source: str) -> Architecture:
    config = read_json(directory / "config.json")
    try:
        architecture = _parse(config)
    except EncoderError as error:
        raise EncoderError(
            f"config.json of {source} describes no autoencoder: {error} Train it again with "
            "`medembed autoencoder`, or restore the file."
        ) from error
    side, fit = architecture.image_size, config.get("fit")
    if (preprocessing.height, preprocessing.width) != (side, side):
        raise EncoderError(
            f"{source}: its processor makes images of {preprocessing.height} x "
            f"{preprocessing.width}, but its encoder reads {side} x {side}. The two files are not "
            "of one checkpoint."
        )
    if len({*preprocessing.mean}) > 1 or len({*preprocessing.std}) > 1:
        raise EncoderError(
            f"{source} reads one grey channel, and its preprocessor_config.json gives colours "
            "different means or deviations. Restore the file."
        )
    if fit in FITS and fit != preprocessing.fit:
        raise EncoderError(
            f"{source} was trained on images brought to its size by --fit {fit}; this run asks for "
            f"--fit {preprocessing.fit}. Give --fit {fit}."
        )
    return architecture


def _parse(config: Mapping[str, Any]) -> Architecture:
    widths = config.get("widths")
    if not isinstance(widths, list):
        raise EncoderError(f"widths {widths!r} is no list of whole numbers.")
    sizes: dict[str, Any] = {
        name: config.get(name) for name in ("image_size", "latent_channels", "norm_groups")
    }
    return Architecture(widths=tuple(widths), **sizes)
