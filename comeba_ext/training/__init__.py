"""Training methods that learn to edit (:mod:`comeba_ext.methods.trained`): ``comeba train``, :class:`Trainer`."""

from comeba_ext.training.trainer import TrainConfig, Trainer

__all__ = ["TrainConfig", "Trainer"]
