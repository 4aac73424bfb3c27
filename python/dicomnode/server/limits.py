"""What strangers may take of a node."""

from dataclasses import dataclass

from dicomnode.errors import IncorrectlyConfigured

# Common senders refuse to send shorter PDUs; and a length has 32 bits.
_BOUNDS = {"pdu_bytes": (4096, 1 << 30), "free_bytes": (0, 1 << 62)}


@dataclass(frozen=True)
class Limits:
    """What strangers may take of a node.

    An association that goes beyond is rejected or aborted, an image answered 0xA700 (out of
    resources); the others go on.
    """

    #: Associations at once; more are rejected as a transient problem, so that senders try again.
    associations: int = 100
    #: Of these from one address, so that it does not keep all others out; more are rejected as above.
    associations_per_address: int = 50
    #: Images of one association; more are answered 0xA700.
    instances: int = 1_000_000
    #: Bytes of the images of one association; more are answered 0xA700.
    association_bytes: int = 1 << 40
    #: Bytes of one image.
    instance_bytes: int = 16 << 30
    #: The largest PDU that senders are asked to use, and may use.
    pdu_bytes: int = 131_072
    #: Seconds for an association to be asked for, once connected, and to begin with the next message.
    idle_seconds: float = 60.0
    #: Seconds without a byte in the middle of a PDU or an image.
    stall_seconds: float = 30.0
    #: An image that arrives more slowly, after `stall_seconds`, ends its association.
    bytes_per_second: int = 10_000
    #: Bytes that stay free on the disk of `root_data_directory`: below, images are answered 0xA700.
    #: None is 5 % of the disk, at most 1 GiB.
    free_bytes: int | None = None

    def __post_init__(self) -> None:
        """Raises IncorrectlyConfigured for a value that is no limit."""
        for name, value in vars(self).items():
            if name == "free_bytes" and value is None:
                continue
            is_time = name.endswith("_seconds")
            least, most = _BOUNDS.get(name, (0.001, 1_000_000) if is_time else (1, 1 << 62))
            is_number = isinstance(value, int | float if is_time else int)
            if not is_number or isinstance(value, bool) or not least <= value <= most:
                raise IncorrectlyConfigured(
                    f"limits: {name} has to be a {'' if is_time else 'whole '}number from {least} to "
                    f"{most}, not {value!r}"
                )
