"""Text: what a sequence has written, grown at its end; no step costs more for what came before."""


class Text:
    """A string in pieces."""

    def __init__(self) -> None:
        self._pieces: list[str] = []
        self._length = 0

    def __len__(self) -> int:
        return self._length

    def __str__(self) -> str:
        return "".join(self._pieces)

    def append(self, piece: str) -> None:
        if piece:
            self._pieces.append(piece)
            self._length += len(piece)

    def since(self, start: int) -> str:
        """All from character `start` on; costs as much as that is long."""
        missing, first = self._length - start, len(self._pieces)
        while missing > 0 and first:
            first -= 1
            missing -= len(self._pieces[first])
        return "".join(self._pieces[first:])[max(0, -missing) :]
