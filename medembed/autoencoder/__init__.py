"""Train the autoencoder baseline on a manifest's images; its encoder then serves `extract`."""

from medembed.autoencoder.job import TrainingReport, train_autoencoder

__all__ = ["TrainingReport", "train_autoencoder"]
