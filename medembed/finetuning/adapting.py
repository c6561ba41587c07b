"""Leave the trained blocks as an encoder of its own, and the trained head as a model."""

import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from medembed.core.errors import EncoderError
from medembed.core.files import json_bytes, read_plain, sync_directory, write_atomically
from medembed.encoders.base_ref import BASE_FILE, CHANGED_FILE, Origin, describe_base
from medembed.encoders.checkpoint_files import holds_file
from medembed.encoders.delta import find_changed
from medembed.encoders.loading import adapt_encoder, load_encoder
from medembed.encoders.preprocessing import PROCESSOR_FILES
from medembed.encoders.torch_encoder import TorchEncoder
from medembed.encoders.weights import WEIGHTS_FILE
from medembed.finetuning.network import Network

__all__ = ["adapt", "save_adapted"]


def adapt(encoder: TorchEncoder, network: Network) -> TorchEncoder:
    """Copy the encoder that training began with, with what it has changed, adapters merged."""
    adapted = encoder.copy()
    state = adapted.model.state_dict()
    for name, tensor in network.changed_tensors().items():
        state[name].copy_(tensor)
    return adapted


def save_adapted(encoder: TorchEncoder, directory: Path) -> str:
    """Write an encoder as what it has in place of its base's tensors; give its fingerprint.

    The directory appears whole or not at all, in the place of one that is there. It holds the
    changed tensors alone and names the base; where all have changed it is a checkpoint that needs
    no base. It is loaded once, and compared, before it appears.

    Raises
    ------
    EncoderError
        What was written does not read back as written.
    """
    assert encoder.origin is not None
    origin = encoder.origin
    tensors, is_whole = find_changed(encoder)
    directory.parent.mkdir(parents=True, exist_ok=True)
    for left in directory.parent.glob(f".{directory.name}.*.partial"):
        shutil.rmtree(left, ignore_errors=True)
    made = Path(
        tempfile.mkdtemp(prefix=f".{directory.name}.", suffix=".partial", dir=directory.parent)
    )
    try:
        made.chmod(0o755)
        for name in ("config.json", *PROCESSOR_FILES):
            if holds_file(origin.directory / name):
                write_atomically(made / name, read_plain(origin.directory / name))
        fingerprint = _write(encoder, origin, made, directory, tensors, is_whole)
        shutil.rmtree(directory, ignore_errors=True)
        os.rename(made, directory)
    except BaseException:
        shutil.rmtree(made, ignore_errors=True)
        raise
    sync_directory(directory.parent)
    return fingerprint


def _write(
    encoder: TorchEncoder,
    origin: Origin,
    made: Path,
    directory: Path,
    tensors: Mapping[str, torch.Tensor],
    is_whole: bool,
) -> str:
    contiguous = {name: tensor.contiguous() for name, tensor in sorted(tensors.items())}
    data = save(contiguous, {"format": "pt"})
    write_atomically(made / (WEIGHTS_FILE if is_whole else CHANGED_FILE), data)
    if not is_whole:
        again = adapt_encoder(origin, encoder.preprocessing, tensors)
        document = describe_base(origin, directory, again.fingerprint)
        write_atomically(made / BASE_FILE, json_bytes(document))
    # Beside its place, so that a base's relative path is right already.
    read: Any = load_encoder(made, device="cpu", precision="fp32", fit=encoder.preprocessing.fit)
    theirs = read.model.state_dict()
    for name, tensor in encoder.model.state_dict().items():
        if not torch.equal(theirs[name], tensor.cpu()):
            raise EncoderError(
                f"the encoder written to {directory} does not read back as written: {name} differs."
            )
    fingerprint: str = read.fingerprint
    return fingerprint
