"""The hooked layer, what it must know of the pass around it, and editing beside readers."""
