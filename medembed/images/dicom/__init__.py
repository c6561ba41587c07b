"""Decode DICOM files into grey pixels."""
