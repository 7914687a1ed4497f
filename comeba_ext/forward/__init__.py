"""Running parts of a model: where its parts are, and the passes that editing needs of them."""
