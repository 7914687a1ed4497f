"""Errors a user can act on. Each message says what was wrong, where, and what to do; nothing was changed."""


class ComebaError(ValueError):
    """Base of every error this package raises on bad input."""


class RequestError(ComebaError):
    """An edit request, or a batch of them, cannot be used."""


class ArchitectureError(ComebaError):
    """The model's blocks, projections, final norm or head could not be located."""


class ConfigError(ComebaError):
    """An edit configuration is malformed or does not fit the model."""


class CovarianceError(ComebaError):
    """A covariance belongs to another model or layer, or is not usable."""


class StorageError(ComebaError):
    """A file or folder is truncated, foreign or belongs to another base model."""
