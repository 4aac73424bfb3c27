"""Storage commitment (PS3.4 annex J): what is asked, and what is reported, as datasets and back.

A sender asks a receiver to take responsibility for instances, and gets a report later: which of them it
keeps, and why not the others.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from pydicom.dataset import Dataset

from dicomnode.errors import InvalidDataset
from dicomnode.lib.dicom import READ_ERRORS, is_uid

PUSH_MODEL = "1.2.840.10008.1.20.1"
PUSH_MODEL_INSTANCE = "1.2.840.10008.1.20.1.1"
REQUEST = 1
ALL_COMMITTED, SOME_FAILED = 1, 2
#: Failure Reason (0008,1197): no such object instance, processing failure, class and instance conflict.
NOT_THERE, PROCESSING_FAILURE, OTHER_CLASS = 0x0112, 0x0110, 0x0119
# No study has more.
_MOST_INSTANCES = 200_000


@dataclass(frozen=True)
class Commitment:
    """A transaction: what is asked to be kept, or, in a report, what is and what is not.

    `instances` maps SOPInstanceUID to SOPClassUID; `failed` maps those that are not kept to the reason.
    """

    transaction_uid: str
    instances: Mapping[str, str]
    failed: Mapping[str, int] = field(default_factory=dict)

    @property
    def event_type(self) -> int:
        """Of the report: whether all are kept."""
        return SOME_FAILED if self.failed else ALL_COMMITTED

    def to_dataset(self) -> Dataset:
        """The Action Information of a request, or the Event Information of a report."""
        dataset = Dataset()
        dataset.TransactionUID = self.transaction_uid
        kept = [uid for uid in self.instances if uid not in self.failed]
        if kept:
            dataset.ReferencedSOPSequence = [self._item(uid) for uid in kept]
        if self.failed:
            dataset.FailedSOPSequence = [self._item(uid) for uid in self.failed]
            for item, reason in zip(dataset.FailedSOPSequence, self.failed.values(), strict=True):
                item.FailureReason = reason
        return dataset

    def _item(self, uid: str) -> Dataset:
        item = Dataset()
        item.ReferencedSOPClassUID, item.ReferencedSOPInstanceUID = self.instances[uid], uid
        return item

    @classmethod
    def of(cls, dataset: Dataset) -> "Commitment":
        """What a peer asked or reported. Raises InvalidDataset for what is neither."""
        try:
            transaction = str(dataset.get("TransactionUID") or "")
            kept = _references(dataset.get("ReferencedSOPSequence") or ())
            items = list(dataset.get("FailedSOPSequence") or ())
            failed = _references(items)
            reasons = [int(item.get("FailureReason") or PROCESSING_FAILURE) for item in items]
        except (*READ_ERRORS, AttributeError, KeyError) as error:
            raise InvalidDataset(
                f"a storage commitment is damaged: {type(error).__name__}"
            ) from error
        uids = [transaction, *kept, *failed, *kept.values(), *failed.values()]
        if not all(map(is_uid, uids)) or (not kept and not failed) or len(uids) > _MOST_INSTANCES:
            raise InvalidDataset(
                "a storage commitment has no instances, too many, or none with a UID"
            )
        return cls(transaction, {**kept, **failed}, dict(zip(failed, reasons, strict=False)))


def _references(items: Iterable[Dataset]) -> dict[str, str]:
    found: dict[str, str] = {}
    # There are few, and all instances of one share it.
    kinds: dict[str, str] = {}
    for item in items:
        kind = str(item.get("ReferencedSOPClassUID") or "")
        uid = str(item.get("ReferencedSOPInstanceUID") or "")
        found[uid] = kinds.setdefault(kind, kind)
    return found
