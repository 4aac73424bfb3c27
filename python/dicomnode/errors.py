"""Every exception that dicomnode raises.

All of them derive from `DicomnodeError`, so one `except` catches what this package reports.
A message names the instance (its UID), the attribute and the remedy, and never a patient's name.
"""


class DicomnodeError(Exception):
    """The base of all errors of this package."""


class IncorrectlyConfigured(DicomnodeError):
    """A setting of a pipeline, an input or a command cannot work as it is."""


class CannotListen(IncorrectlyConfigured, OSError):
    """The address and port of a node cannot be opened."""


class InvalidRootDataDirectory(IncorrectlyConfigured):
    """The `root_data_directory` is not a directory that this node can own."""


class InvalidDicom(DicomnodeError, ValueError):
    """Bytes that should be DICOM cannot be understood."""


class InvalidDataset(DicomnodeError, ValueError):
    """A dataset lacks an attribute, or has a value, that makes it unusable here."""


class UnsupportedImage(DicomnodeError, ValueError):
    """The pixels of an image are of a kind that cannot be turned into an array here."""


class InconsistentSeries(DicomnodeError, ValueError):
    """Images do not form one volume: a gap, a duplicate, mixed geometry, mixed series."""


class CouldNotCompleteDIMSEMessage(DicomnodeError):
    """A peer could not be reached, refused, or did not acknowledge what was sent to it.

    `is_permanent` is true where it will say the same until somebody changes its configuration, or ours.
    """

    is_permanent = False


class PeerRefuses(CouldNotCompleteDIMSEMessage):
    """A peer accepts no presentation context of what would be sent to it."""

    is_permanent = True


class PeerUnreachable(CouldNotCompleteDIMSEMessage):
    """A peer is not there, or takes no association, whatever would be sent over it."""


class PeerRejects(PeerUnreachable):
    """A peer rejects the association for good: it does not know the AE title, for example."""

    is_permanent = True


class ProcessingFailed(DicomnodeError):
    """A case could not be processed where it was processed; `trace` is the traceback there, if any."""

    def __init__(self, message: str, trace: str = "") -> None:
        super().__init__(message)
        self.trace = trace


class OutOfResources(DicomnodeError):
    """The disk is full or a memory limit is reached; nothing was stored."""


class NoRoom(OutOfResources):
    """The disk of root_data_directory is full, or cannot be written now; it is tried again."""

    #: So many bytes are to be written; 0 where that is not known.
    needed: int = 0


class UnknownCase(DicomnodeError, KeyError):
    """No case with that number, or it is not in a state that allows the request."""

    def __str__(self) -> str:
        return str(self.args[0]) if self.args else ""
