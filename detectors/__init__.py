"""The DETR family on one shared :class:`~detectors.detector.Detector`."""
