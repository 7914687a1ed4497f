"""One model for many who ask it, and edits made meanwhile: the service, and an OpenAI-compatible server around it."""
