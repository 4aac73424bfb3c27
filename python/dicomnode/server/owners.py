"""Under which identifier images came: one SOPInstanceUID under two is a mistake about the patient.

Solves that this is known of the newest images, also when their cases are done, in memory that is taken once:
a dictionary that forgets its oldest entries moves megabytes whenever it has been turned over.
"""

from array import array

# Buckets of so many images; each image has one place to be, and pushes out the oldest there.
_BUCKETS, _OF_ONE = 1 << 15, 8


class Owners:
    """Remembers the newest images: each of the last 50,000, but for one in some thousands."""

    def __init__(self) -> None:
        # Hashes, newest first in each bucket: of an image, and of its identifier.
        self._images = array("q", bytes(8 * _BUCKETS * _OF_ONE))
        self._owners = array("q", bytes(8 * _BUCKETS * _OF_ONE))

    def is_other(self, uid: str, identifier: str) -> bool:
        """Whether an image came under another identifier before; the first one is remembered."""
        image, owner = hash(uid), hash(identifier)
        start = image % _BUCKETS * _OF_ONE
        images = self._images[start : start + _OF_ONE]
        if image in images:
            return self._owners[start + images.index(image)] != owner
        for table, new in ((self._images, image), (self._owners, owner)):
            table[start + 1 : start + _OF_ONE] = table[start : start + _OF_ONE - 1]
            table[start] = new
        return False
