"""pydicom, imported without GDCM.

Where python-gdcm is installed, pydicom imports it to offer its codecs, and it puts its own copies
of zlib, libjpeg and others before those of every library loaded later: zlib then ends the process
("double free or corruption", python-gdcm 3.2.6). Its codecs are not needed here.
"""

import sys

_gdcm = sys.modules.get("gdcm")
if _gdcm is None:
    sys.modules["gdcm"] = None  # type: ignore[assignment]  # makes its import fail
try:
    from pydicom import Dataset, dcmread
    from pydicom.encaps import encapsulate, get_frame
    from pydicom.pixels.decoders.base import get_decoder
    from pydicom.pixels.processing import apply_color_lut
    from pydicom.uid import UID
finally:
    if _gdcm is None:
        del sys.modules["gdcm"]

__all__ = [
    "UID",
    "Dataset",
    "apply_color_lut",
    "dcmread",
    "encapsulate",
    "get_decoder",
    "get_frame",
]
