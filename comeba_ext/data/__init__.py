"""Files into edit requests and texts."""

from comeba_ext.data.readers import ReadResult, read_requests, read_texts

__all__ = ["ReadResult", "read_requests", "read_texts"]
