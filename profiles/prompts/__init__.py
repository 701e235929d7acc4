"""Prompt files -> requests -> token ids."""

from profiles.prompts.reader import Request, Requests, read, read_all, sample, user_text
from profiles.prompts.tokens import tokenize

__all__ = ["Request", "Requests", "read", "read_all", "sample", "tokenize", "user_text"]
