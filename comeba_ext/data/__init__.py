"""Files into edit requests and texts."""

from comeba_ext.data.readers import ReadResult, place_of, read_requests, read_texts

__all__ = ["ReadResult", "place_of", "read_requests", "read_texts"]
