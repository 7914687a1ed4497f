"""What an editor remembers: the key memory ``C``, and the ledger of every request."""
