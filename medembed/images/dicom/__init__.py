"""DICOM files become grey pixels."""
