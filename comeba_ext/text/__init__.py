"""Requests and their tokens: what is asked to be edited, and the rows of text made from it."""
