"""DICOM files made for the tests: as small as they can be, with any element that is asked for."""

import io
from typing import Any

import imagecodecs
import numpy as np
import pydicom
from PIL import Image
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.filewriter import write_file_meta_info
from pydicom.uid import (
    UID,
    ComputedRadiographyImageStorage,
    ExplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    JPEGLosslessSV1,
    JPEGLSLossless,
    RLELossless,
)

RAMP = np.add.outer(3 * np.arange(40), 2 * np.arange(56)).astype(np.uint8)
DEEP = np.random.default_rng(1).integers(0, 4096, (40, 56), dtype=np.uint16)


def dataset(pixels: np.ndarray, **elements: Any) -> Dataset:
    """Make a data set of grey, or with a third axis of colour; None takes an element away."""
    made = Dataset()
    made.SOPClassUID = ComputedRadiographyImageStorage
    made.SOPInstanceUID = f"1.2.3.{abs(hash(pixels.tobytes())) % 10**12}"
    made.StudyInstanceUID = "1.2.3.4"
    made.Modality = "CR"
    made.Rows, made.Columns = pixels.shape[:2]
    made.SamplesPerPixel = pixels.shape[2] if pixels.ndim == 3 else 1
    made.PhotometricInterpretation = "RGB" if pixels.ndim == 3 else "MONOCHROME2"
    if pixels.ndim == 3:
        made.PlanarConfiguration = 0
    made.BitsAllocated = pixels.itemsize * 8
    made.BitsStored = elements.get("BitsStored") or made.BitsAllocated
    made.HighBit = made.BitsStored - 1
    made.PixelRepresentation = int(pixels.dtype.kind == "i")
    made.PixelData = pixels.tobytes()
    made["PixelData"].VR = "OB" if pixels.itemsize == 1 else "OW"
    for keyword, value in elements.items():
        if value is None and keyword in made:
            delattr(made, keyword)
        elif value is not None:
            setattr(made, keyword, value)
    return made


def dicom(pixels: np.ndarray, syntax: str = ExplicitVRLittleEndian, **elements: Any) -> bytes:
    """Write a file in a transfer syntax; what the pixels are compressed by is decoded elsewhere."""
    return write(dataset(pixels, **elements), UID(syntax))


def write(made: Dataset, syntax: UID = ExplicitVRLittleEndian) -> bytes:
    made.file_meta = FileMetaDataset()
    made.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    made.file_meta.MediaStorageSOPClassUID = made.SOPClassUID
    made.file_meta.MediaStorageSOPInstanceUID = made.SOPInstanceUID
    if syntax in (RLELossless, JPEGLSLossless, JPEG2000Lossless):
        made.compress(syntax, generate_instance_uid=False)
    elif syntax == JPEGBaseline8Bit:
        put_frame(made, jpeg(made), syntax)
    elif syntax == JPEGLosslessSV1:
        put_frame(made, lossless(made), syntax)
    elif not syntax.is_encapsulated:
        made.file_meta.TransferSyntaxUID = syntax
        if not syntax.is_little_endian and made.BitsAllocated == 16:
            made.PixelData = np.frombuffer(made.PixelData, "<u2").astype(">u2").tobytes()
    file = io.BytesIO()
    pydicom.dcmwrite(file, made, enforce_file_format=True)
    return file.getvalue()


def put_frame(made: Dataset, frame: bytes, syntax: str) -> None:
    made.PixelData = encapsulate([frame])
    made["PixelData"].VR = "OB"
    made["PixelData"].is_undefined_length = True
    made.file_meta.TransferSyntaxUID = UID(syntax)


def jpeg(made: Dataset, **options: Any) -> bytes:
    shape = (made.Rows, made.Columns) + (() if made.SamplesPerPixel == 1 else (3,))
    file = io.BytesIO()
    image = Image.fromarray(np.frombuffer(made.PixelData, np.uint8).reshape(shape))
    image.save(file, "JPEG", quality=95, **options)
    return file.getvalue()


def lossless(made: Dataset) -> bytes:
    """Encode as process 14, selection value 1, by liblj92; it is decoded by libjpeg-turbo."""
    pixels = np.frombuffer(made.PixelData, f"u{made.BitsAllocated // 8}")
    pixels = pixels.reshape(made.Rows, made.Columns)
    return bytes(imagecodecs.ljpeg_encode(pixels, bitspersample=made.BitsStored))


def read(data: bytes) -> Dataset:
    return pydicom.dcmread(io.BytesIO(data))


def change(data: bytes, **elements: Any) -> bytes:
    """Rewrite a file with other elements; None takes one away."""
    made = read(data)
    for keyword, value in elements.items():
        if value is None:
            del made[keyword]
        else:
            setattr(made, keyword, value)
    file = io.BytesIO()
    made.save_as(file)
    return file.getvalue()


def relabelled(data: bytes, syntax: str) -> bytes:
    """Put another transfer syntax into group 2, and leave the data set as it is."""
    meta = read(data).file_meta
    meta.TransferSyntaxUID = UID(syntax)
    file = io.BytesIO()
    file.write(bytes(128) + b"DICM")
    write_file_meta_info(file, meta)
    return file.getvalue() + data[144 + int.from_bytes(data[140:144], "little") :]
