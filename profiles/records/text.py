"""Text that is safe to print. Standard library only."""


def printable(text: str) -> str:
    """`text` as one line that cannot steer a terminal: each character that cannot be shown becomes a space."""
    return "".join(character if character.isprintable() else " " for character in text)
